"""Free bits as a loss."""

from __future__ import annotations

from ..elbo import SiteELBO
from ..objectives.free_bits import FreeBitsBound


class FreeBits(SiteELBO):
    """The evidence lower bound with a lower limit (``floor``, in nats) for the KL of each latent dimension.

    The same as ``SiteELBO(objective=FreeBitsBound(floor))`` with particles one after the other. The loss is in nats,
    summed over the batch; the KL that is compared with the floor is its mean over the batch. Kingma et al. 2016,
    arXiv:1606.04934.

    Args:
        floor: nats per latent dimension, at least 0.
        num_particles: number of draws that the loss is averaged over.

    Raises:
        BadInput: a floor that is not a number of at least 0.
        UnsupportedSite: a latent without a reparameterized draw or a KL in closed form, when the loss is called.

    >>> import torch
    >>> from gumbo.guides import NormalGuide
    >>> from gumbo.models import GaussianVAE
    >>> model = GaussianVAE((1, 4, 4), latent_dim=3, hidden=(8,), likelihood="bernoulli")
    >>> loss = FreeBits(0.5)(model, NormalGuide(model, hidden=(8,)))
    >>> loss(torch.zeros(5, 1, 4, 4)).backward()
    >>> loss.objective_name
    'free-bits-elbo'
    """

    def __init__(self, floor: float, *, num_particles: int = 1):
        super().__init__(objective=FreeBitsBound(floor), num_particles=num_particles, vectorize_particles=False)
        self.floor = floor

    def __repr__(self) -> str:
        return f"FreeBits({self.floor}, num_particles={self.num_particles})"


__all__ = ["FreeBits"]
