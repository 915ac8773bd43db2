"""Normalizing flows as guides."""

from __future__ import annotations

from collections.abc import Sequence

import pyro
import torch
from pyro.contrib.zuko import ZukoToPyro
from torch import nn
from torch.distributions import constraints

from ..errors import UnknownName
from ..models._base import GenerativeModel
from ._base import Guide, guides
from .triangular_normal import why_not_vectors

FLOWS = ("maf", "nsf")


class FlowDistribution(ZukoToPyro):
    """A flow as a Pyro distribution that scores every value by itself.

    The parent keeps the log-probability of each draw, computed along the way of drawing it. Estimators that need the
    derivative of log q at a fixed value would be handed that one, so it is not kept here.
    """

    support = constraints.real_vector

    def rsample(self, sample_shape=()):
        return self.dist.rsample(torch.Size(sample_shape))

    def sample(self, sample_shape=()):
        with torch.no_grad():
            return self.rsample(sample_shape)

    def __call__(self, sample_shape=()):
        return self.rsample(sample_shape)

    def log_prob(self, value: torch.Tensor) -> torch.Tensor:
        return self.dist.log_prob(value)

    def expand(self, batch_shape, _instance=None):
        return type(self)(self.dist.expand(torch.Size(batch_shape)))


def _zuko_flows():
    """zuko's flows. Imported late, being slow, and in a context, since the import switches validation off for good."""
    validates = pyro.settings.get("validate_distributions_torch")
    with pyro.settings.context(validate_distributions_torch=validates):
        import zuko.flows
    return zuko.flows


@guides.register("flow")
class FlowGuide(Guide):
    r"""A normalizing flow: :math:`z_j = g_j(\epsilon; x),\ \epsilon \sim N(0, I)`, with :math:`\log q(z_j \mid x) =
    \log N(\epsilon; 0, I) - \log |\det \partial z_j / \partial \epsilon|`.

    The flows are zuko's, conditioned on features of x: ``maf`` composes affine, ``nsf`` spline transforms
    (``transforms`` of them, each a network of ``flow_hidden`` layers). ``passes=2`` makes them coupling transforms,
    fast both in drawing and in scoring a given value; ``passes=None`` makes them autoregressive: richer, and D times
    slower to draw. Several latents are independent given x.

    Shapes: ``x`` is ``(B, *data_shape)``; a site is ``(B, D)``. Raises BadInput for a model with latents of another
    family or with latents that are not vectors, and UnknownName for another flow.

    Rezende & Mohamed 2015, arXiv:1505.05770; Papamakarios et al. 2017, arXiv:1705.07057; Durkan et al. 2019,
    arXiv:1906.04032.

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
        if flow not in FLOWS:
            raise UnknownName("flow", flow, FLOWS)
        super().__init__(model, hidden, channels, activation)
        make = getattr(_zuko_flows(), flow.upper())
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
