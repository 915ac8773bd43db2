"""Normalizing flows as guides."""

from __future__ import annotations

from collections.abc import Sequence

import pyro
import torch
from torch import nn

from ..models._base import GenerativeModel
from ..models._flows import FlowDistribution, zuko_flow
from ._base import Guide, guides
from .triangular_normal import why_not_vectors


@guides.register("flow")
class FlowGuide(Guide):
    r"""A normalizing flow: :math:`z_j = g_j(\epsilon; x),\ \epsilon \sim N(0, I)`.

    Its density is :math:`\log q(z_j \mid x) = \log N(\epsilon; 0, I) - \log |\det \partial z_j / \partial \epsilon|`.

    The flows are zuko's, conditioned on features of x: ``maf`` composes affine, ``nsf`` spline transforms
    (``transforms`` of them, each a network of ``flow_hidden`` layers). ``passes=2`` makes them coupling transforms,
    fast both in drawing and in scoring a given value; ``passes=None`` makes them autoregressive: richer, and D times
    slower to draw. Several latents are independent given x.

    Shapes: ``x`` is ``(B, *data_shape)``; a site is ``(B, D)``. Raises BadInput for a model with latents of another
    family or with latents that are not vectors, and UnknownName for another flow.

    Args:
        model: the model, whose latents and data shape the guide takes.
        flow: ``nsf`` or ``maf``.
        transforms: number of transforms.
        flow_hidden: widths of the hidden layers of a transform.
        passes: 2 for couplings, None for autoregressive transforms.
        hidden: widths of the encoder's hidden layers; None mirrors the model's decoder.
        channels: maps of the encoder's convolutions of stride 2; None mirrors the model's decoder.
        activation: activation of the guide's networks; None mirrors the model's decoder.

    Rezende & Mohamed 2015, arXiv:1505.05770; Papamakarios et al. 2017, arXiv:1705.07057; Durkan et al. 2019,
    arXiv:1906.04032.

    >>> import torch
    >>> from gumbo.models import GaussianVAE
    >>> model = GaussianVAE((1, 8, 8), latent_dim=3, hidden=(16,))
    >>> FlowGuide(model, transforms=2, flow_hidden=(8,))(torch.zeros(5, 1, 8, 8))["z"].shape
    torch.Size([5, 3])
    """

    families = ("normal",)

    def __init__(
        self,
        model: GenerativeModel,
        flow: str = "nsf",
        transforms: int = 3,
        flow_hidden: Sequence[int] = (64, 64),
        passes: int | None = 2,
        hidden: Sequence[int] | None = None,
        channels: Sequence[int] | None = None,
        activation: str | None = None,
    ):
        make = zuko_flow(flow)
        super().__init__(model, hidden, channels, activation)
        self.encoder_flows = nn.ModuleDict(
            {
                site: make(
                    latent.size,
                    self.encoder.size,
                    transforms=transforms,
                    hidden_features=tuple(flow_hidden),
                    passes=passes,
                )
                for site, latent in self.latents.items()
            }
        )

    @classmethod
    def why_not(cls, model: GenerativeModel) -> str:
        return super().why_not(model) or why_not_vectors(model)

    def forward(self, x: torch.Tensor, **conditions: torch.Tensor) -> dict[str, torch.Tensor]:
        with self.data_plate(x):
            features = self.features(x, conditions)
            return {
                site: pyro.sample(site, FlowDistribution(flow(features))) for site, flow in self.encoder_flows.items()
            }
