"""Pyro's autoguides, for global latents."""

from __future__ import annotations

from collections.abc import Sequence

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.infer.autoguide import (
    AutoDelta,
    AutoDiagonalNormal,
    AutoLowRankMultivariateNormal,
    AutoMultivariateNormal,
    AutoNormal,
)

from ..errors import UnknownName
from ..models._base import GenerativeModel
from ._base import AnyGuide, guides


class _Joint(dist.MultivariateNormal):
    """Many draws as one matrix product; torch computes a matrix-vector product for each."""

    mean = dist.MultivariateNormal.mean  # this class has a draw of its own, so it says that its mean is its parent's

    def rsample(self, sample_shape: Sequence[int] = ()) -> torch.Tensor:
        factor = self._unbroadcasted_scale_tril
        if factor.dim() > 2:
            return super().rsample(torch.Size(sample_shape))
        shape = self._extended_shape(torch.Size(sample_shape))
        return self.loc + torch.randn(shape, dtype=factor.dtype, device=factor.device) @ factor.mT


class _AutoMultivariateNormal(AutoMultivariateNormal):
    def get_posterior(self, *args, **kwargs) -> dist.MultivariateNormal:
        return _Joint(self.loc, scale_tril=self.scale[..., None] * self.scale_tril)


KINDS = {
    "normal": AutoNormal,
    "diagonal-normal": AutoDiagonalNormal,
    "multivariate-normal": _AutoMultivariateNormal,
    "low-rank-normal": AutoLowRankMultivariateNormal,
    "delta": AutoDelta,
}


@guides.register("auto")
class AutoGuide(AnyGuide):
    """One of Pyro's autoguides over a model's global latents (the weights of a Bayesian regression).

    ``kind`` is ``normal`` (a factor for each site), ``diagonal-normal``, ``multivariate-normal`` (full covariance over
    all sites together), ``low-rank-normal``, or ``delta`` (the most probable values). The autoguide is the attribute
    ``encoder``, with Pyro's methods (``encoder.median()``, ``encoder.quantiles(...)``).

    ``guide(x)`` takes the model's arguments, and draws each site once, with the shape that the model declares. Raises
    UnknownName for another kind, and BadInput for a model with local latents.

    Args:
        model: the model, whose latents and data shape the guide takes.
        kind: which autoguide, one of the words above.
        init_scale: initial standard deviation of the Normal ones; None takes Pyro's default.

    Kucukelbir et al. 2017, arXiv:1603.00788.

    >>> import torch
    >>> from gumbo.models import BayesianRegression
    >>> model = BayesianRegression((3,), hidden=(4,))
    >>> {site: tuple(value.shape) for site, value in AutoGuide(model)(torch.zeros(10, 3)).items()}
    {'weight1': (4, 3), 'bias1': (4,), 'weight2': (1, 4), 'bias2': (1,)}
    """

    families = ("normal", "relaxed-categorical")
    local = False

    def __init__(self, model: GenerativeModel, kind: str = "multivariate-normal", init_scale: float | None = None):
        if kind not in KINDS:
            raise UnknownName("kind of autoguide", kind, KINDS)
        super().__init__(model)
        options = {} if init_scale is None or kind == "delta" else {"init_scale": init_scale}
        self.encoder = KINDS[kind](poutine.block(model, expose=list(model.latents)), **options)
        # A first run creates its parameters, without side effects.
        with torch.random.fork_rng(), torch.no_grad(), pyro.get_param_store().scope():
            trace = poutine.trace(self.encoder).get_trace(**model.example(2))
        sites = trace.nodes.items()
        self.auxiliary = tuple(name for name, site in sites if site.get("infer", {}).get("is_auxiliary"))

    def forward(self, x: torch.Tensor, **given: torch.Tensor) -> dict[str, torch.Tensor]:
        self.check_batch(x, next(self.parameters()))
        return self.encoder(x, **given)
