"""The diagonal Normal guide."""

from __future__ import annotations

from collections.abc import Sequence

import pyro.distributions as dist
import torch

from ..models._base import GenerativeModel, Latent
from ..models.families import MIN_SD, distribution
from ._base import FactorizedGuide, guides


class UnreparameterizedNormal(dist.Normal):
    """A Normal without a pathwise gradient: its draws are detached, its log-probability is the Normal's.

    A class, and not ``has_rsample_(False)`` on an instance: expansion by a plate drops the latter.

    >>> UnreparameterizedNormal(torch.zeros(2), 1.0).expand((3, 2)).has_rsample
    False
    """

    has_rsample = False


@guides.register("normal")
class NormalGuide(FactorizedGuide):
    r"""Diagonal Normal: :math:`q(z_j \mid x) = N(\mu_j(x), \mathrm{diag}\,\sigma_j(x)^2)` for each Normal latent.

    Shapes: ``x`` is ``(B, *data_shape)``; a site is ``(B, *shape)`` as the model declares it. The standard deviation is
    ``softplus(output) + min_sd``. With ``reparameterized=False`` the sites have no pathwise gradient, so that
    estimators for any density can be compared with the pathwise one on the same guide. Raises BadInput for a model with
    latents of another family.

    Args:
        model: the model, whose latents and data shape the guide takes.
        hidden: widths of the encoder's hidden layers; None mirrors the model's decoder.
        channels: maps of the encoder's convolutions of stride 2; None mirrors the model's decoder.
        activation: activation of the guide's networks; None mirrors the model's decoder.
        min_sd: smallest standard deviation, added to the softplus of an output.
        reparameterized: whether draws have a pathwise gradient.

    Kingma & Welling 2013, arXiv:1312.6114.

    >>> import torch
    >>> from gumbo.models import GaussianVAE
    >>> model = GaussianVAE((1, 8, 8), latent_dim=2, hidden=(16,))
    >>> NormalGuide(model, hidden=(16,))(torch.zeros(5, 1, 8, 8))["z"].shape
    torch.Size([5, 2])
    """

    families = ("normal",)

    def __init__(
        self,
        model: GenerativeModel,
        hidden: Sequence[int] | None = None,
        channels: Sequence[int] | None = None,
        activation: str | None = None,
        min_sd: float = MIN_SD,
        reparameterized: bool = True,
    ):
        super().__init__(model, hidden, channels, activation)
        self.min_sd = min_sd
        self.reparameterized = reparameterized

    def distribution(self, latent: Latent, output: torch.Tensor) -> dist.TorchDistribution:
        q = distribution(latent, output, min_sd=self.min_sd)
        if self.reparameterized:
            return q
        return UnreparameterizedNormal(q.base_dist.loc, q.base_dist.scale).to_event(len(latent.shape))
