"""Deep exponential families of counts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import pyro
import pyro.distributions as dist
import torch
from torch import nn
from torch.nn.functional import softplus

from ..errors import BadInput, UnknownName
from ._base import GenerativeModel, Latent, models

KINDS = ("gamma", "poisson")
FLOOR = 1e-3  # the smallest rate: with rate zero, positive counts are impossible


@models.register("poisson-def")
class PoissonDEF(GenerativeModel):
    r"""Counts whose rates are positive sums over the layer above, layer upon layer.

    .. math:: z_L \sim \mathrm{Gamma}(a, a) \ \text{or}\ \mathrm{Poisson}(1), \qquad
              z_l \mid z_{l+1} \sim \mathrm{Gamma}(a, a / r_l) \ \text{or}\ \mathrm{Poisson}(r_l), \qquad
              x \mid z_1 \sim \mathrm{Poisson}(r_0), \qquad r_l = \mathrm{softplus}(W_l)^\top z_{l+1} + \epsilon

    ``kind`` is that of the layers: ``gamma``, of ``shape`` a and mean r_l, whose posteriors are differentiated
    through their draws (``pathwise``), or ``poisson``, whose posteriors take score-type estimators.

    Shapes: ``x`` is ``(B, *data_shape)``, counts, of which encoders take log(1 + x); ``layers`` are the widths of z1,
    z2, ... from the data upwards, and site ``zl`` is ``(B, layers[l - 1])``. Raises BadInput for data of another shape
    and, under validation, for NaN or for values that are not counts.

    Args:
        data_shape: shape of one datum, without the batch dimension.
        layers: widths of z1, z2, ...
        kind: family of the latents, ``gamma`` or ``poisson``.
        shape: a, the shape of the Gammas.
        hidden: widths of the hidden layers of the guides' encoders.
        activation: activation between layers: ``relu``, ``leaky-relu``, ``elu``, ``silu``, ``softplus`` or ``tanh``.
        data_size: number of data in the whole set: terms are scaled by ``data_size / B``; None does not scale.

    Ranganath, Tang, Charlin & Blei 2015, "Deep exponential families", arXiv:1411.2581, with point estimates of the
    weights.

    >>> model = PoissonDEF(data_shape=(30,), layers=(6, 3))
    >>> {site: tuple(draws.shape) for site, draws in model.sample_prior(5).items()}
    {'z2': (5, 3), 'z1': (5, 6), 'x': (5, 30)}
    """

    variants = ({"layers": (4, 3), "hidden": (8,)}, {"layers": (4, 3), "hidden": (8,), "kind": "poisson"})

    def __init__(
        self,
        data_shape: Sequence[int],
        layers: Sequence[int] = (50, 20),
        kind: str = "gamma",
        shape: float = 0.3,
        hidden: Sequence[int] = (100,),
        activation: str = "softplus",
        data_size: int | None = None,
    ):
        super().__init__(data_shape, data_size)
        if kind not in KINDS:
            raise UnknownName("kind of layer", kind, KINDS)
        if not layers:
            raise BadInput("PoissonDEF: layers is empty: expected at least one width")
        self.kind, self.shape = kind, shape
        names = ["x", *(f"z{level}" for level in range(1, len(layers) + 1))]  # from the data upwards
        sizes = dict(zip(names, [math.prod(self.data_shape), *layers], strict=True))
        self.latents = {name: Latent(kind, (sizes[name],)) for name in reversed(names[1:])}
        self.guide_parents = {"z1": ()} | {above: (below,) for below, above in pairwise(names[1:])}
        self.mirror = {"channels": (), "hidden": tuple(hidden), "activation": activation, "inputs": "log1p"}
        self.observe_by("poisson")
        # Keyed by the site whose rates they compute; initial rates are about 1 for any width above.
        self.decoder = nn.ParameterDict()
        for below, above in pairwise(names):
            start = math.log(math.expm1(1 / sizes[above]))
            self.decoder[below] = nn.Parameter(start + 0.1 * torch.randn(sizes[above], sizes[below]))
        self.register_buffer("top_rate", torch.ones(layers[-1]), persistent=False)

    def forward(self, x: torch.Tensor | None = None, *, batch_size: int = 1) -> torch.Tensor:
        with self.data_plate(x, batch_size):
            rate = self.top_rate
            for site, below in pairwise([*self.latents, "x"]):
                z = pyro.sample(site, self.layer(rate))
                rate = z @ softplus(self.decoder[below]) + FLOOR
            return pyro.sample("x", self.counts(rate), obs=x)

    def layer(self, rate: torch.Tensor) -> dist.TorchDistribution:
        """p of a layer with that mean, ``(..., width)``, batch shape ``(...)``."""
        if self.kind == "poisson":
            return dist.Poisson(rate).to_event(1)
        return dist.Gamma(torch.full_like(rate, self.shape), self.shape / rate).to_event(1)

    def likelihood(self, z1: torch.Tensor) -> dist.TorchDistribution:
        """p(x | z1) for ``z1`` of shape ``(..., layers[0])``, batch shape ``(...)``."""
        return self.counts(z1 @ softplus(self.decoder["x"]) + FLOOR)

    def counts(self, rate: torch.Tensor) -> dist.TorchDistribution:
        """p(x) at those rates ``(..., size)``."""
        return dist.Poisson(rate.unflatten(-1, self.data_shape)).to_event(len(self.data_shape))

    def topics(self) -> torch.Tensor:
        """The contribution of a unit of z1 to each number of x, normalized, ``(layers[0], size)``."""
        weights = softplus(self.decoder["x"])
        return weights / weights.sum(-1, keepdim=True)
