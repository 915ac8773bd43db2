"""The guide for binary latents."""

from __future__ import annotations

from collections.abc import Sequence

import pyro.distributions as dist
import torch

from ..models._base import GenerativeModel, Latent
from ._base import FactorizedGuide, guides


@guides.register("bernoulli")
class BernoulliGuide(FactorizedGuide):
    r"""Binary latents: :math:`q(z_j \mid x) = \mathrm{Bernoulli}(\sigma(h_j(x)))`, independent over j.

    Shapes: ``x`` is ``(B, *data_shape)``; a site is ``(B, *shape)`` as the model declares it. ``hidden=()`` makes h
    linear. Raises BadInput for a model with latents of another family.

    Mnih & Gregor 2014, arXiv:1402.0030.

    >>> from gumbo.models import BernoulliVAE
    >>> model = BernoulliVAE((1, 8, 8), num_latents=6, hidden=(16,))
    >>> BernoulliGuide(model, hidden=(16,))(torch.zeros(5, 1, 8, 8))["z"].shape
    torch.Size([5, 6])
    """

    families = ("bernoulli",)

    def __init__(self, model: GenerativeModel, hidden: Sequence[int] = (200, 200), activation: str = "leaky-relu"):
        super().__init__(model, hidden, activation)

    def distribution(self, latent: Latent, output: torch.Tensor) -> dist.TorchDistribution:
        return dist.Bernoulli(logits=output.unflatten(-1, latent.shape)).to_event(len(latent.shape))
