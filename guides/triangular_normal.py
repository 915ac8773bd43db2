"""The Normal guide with a full covariance."""

from __future__ import annotations

from collections.abc import Sequence

import pyro.distributions as dist
import torch
from torch.distributions.utils import vec_to_tril_matrix
from torch.nn.functional import softplus

from ..models._base import GenerativeModel, Latent
from ..models.families import MIN_SD
from ._base import FactorizedGuide, guides


@guides.register("triangular-normal")
class TriangularNormalGuide(FactorizedGuide):
    r"""Full covariance: :math:`q(z_j \mid x) = N(\mu_j(x), L_j(x) L_j(x)^\top)` with L lower-triangular.

    A draw is z = μ + L ε. The diagonal of L is ``softplus(output) + min_sd``; what is below it is free. A site of size
    D takes D (D + 3) / 2 outputs. Several latents are independent given x.

    Shapes: ``x`` is ``(B, *data_shape)``; a site is ``(B, D)``. Raises BadInput for a model with latents of another
    family or with latents that are not vectors.

    Args:
        model: the model, whose latents and data shape the guide takes.
        hidden: widths of the encoder's hidden layers; None mirrors the model's decoder.
        channels: maps of the encoder's convolutions of stride 2; None mirrors the model's decoder.
        activation: activation of the guide's networks; None mirrors the model's decoder.
        min_sd: smallest diagonal element of L, added to the softplus of an output.

    Kingma & Welling 2019, "An introduction to variational autoencoders", section 2.5.1, arXiv:1906.02691.

    >>> import torch
    >>> from gumbo.models import GaussianVAE
    >>> model = GaussianVAE((1, 8, 8), latent_dim=3, hidden=(16,))
    >>> TriangularNormalGuide(model)(torch.zeros(5, 1, 8, 8))["z"].shape
    torch.Size([5, 3])
    """

    families = ("normal",)

    def __init__(
        self,
        model: GenerativeModel,
        hidden: Sequence[int] | None = None,
        channels: Sequence[int] | None = None,
        activation: str | None = None,
        min_sd: float = MIN_SD,
    ):
        super().__init__(model, hidden, channels, activation)
        self.min_sd = min_sd

    @classmethod
    def why_not(cls, model: GenerativeModel) -> str:
        return super().why_not(model) or why_not_vectors(model)

    def num_outputs(self, latent: Latent) -> int:
        return latent.size * (latent.size + 3) // 2

    def distribution(self, latent: Latent, output: torch.Tensor) -> dist.TorchDistribution:
        size = latent.size
        loc, raw, below = output.split([size, size, size * (size - 1) // 2], -1)
        scale_tril = torch.diag_embed(softplus(raw) + self.min_sd)
        if size > 1:
            scale_tril = scale_tril + vec_to_tril_matrix(below, -1)
        return dist.MultivariateNormal(loc, scale_tril=scale_tril)


def why_not_vectors(model: GenerativeModel) -> str:
    """Why a guide for vectors does not support ``model``; an empty string if it does."""
    for site, latent in model.latents.items():
        if len(latent.shape) != 1:
            return f"its latent {site!r} has shape {latent.shape}, and the guide serves vectors"
    return ""
