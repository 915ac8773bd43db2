"""Layers of binary latents, each drawn given the one above."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch import nn

from ..errors import BadInput
from ._base import GenerativeModel, Latent, models
from ._networks import mlp


@models.register("sigmoid-belief-network")
class SigmoidBeliefNetwork(GenerativeModel):
    r"""One to three (or more) layers of binary latents, linear or nonlinear between them, over a Bernoulli likelihood.

    .. math:: z_L \sim \mathrm{Bernoulli}(\sigma(a)), \qquad
              z_l \mid z_{l+1} \sim \mathrm{Bernoulli}(\sigma(f_l(z_{l+1}))), \qquad
              x \mid z_1 \sim \mathrm{Bernoulli}(\sigma(f_0(z_1)))

    Shapes: ``x`` is ``(B, *data_shape)``; ``layers`` are the widths of z1, z2, ... from the data upwards, and site
    ``zl`` is ``(B, layers[l - 1])``. Each f is linear, or, with ``nonlinear=True``, has a hidden layer as wide as its
    output's layer (f_0: as z1). The prior logits a of the top layer are learned, from zero. Posteriors are usually
    layered upwards, q(z1 | x) q(z2 | z1) ..., the default of the layered guide. Raises BadInput for data of another
    shape and, under validation, for NaN or for data outside the likelihood's support.

    Args:
        data_shape: shape of one datum, without the batch dimension.
        layers: widths of z1, z2, ...
        nonlinear: whether the networks have hidden layers; False makes them linear.
        activation: activation between layers: ``relu``, ``leaky-relu``, ``elu``, ``silu``, ``softplus`` or ``tanh``.
        likelihood: p(x | output), a word of `gumbo.models.likelihoods`.
        likelihood_options: options of the likelihood, by name; None takes its defaults.
        data_size: number of data in the whole set: terms are scaled by ``data_size / B``; None does not scale.

    Neal 1992, "Connectionist learning of belief networks"; Mnih & Gregor 2014, arXiv:1402.0030.

    >>> model = SigmoidBeliefNetwork(data_shape=(1, 8, 8), layers=(6, 5, 4))
    >>> {site: tuple(draws.shape) for site, draws in model.sample_prior(2).items()}
    {'z3': (2, 4), 'z2': (2, 5), 'z1': (2, 6), 'x': (2, 1, 8, 8)}
    """

    variants = ({"layers": (6,)}, {"layers": (6, 5), "nonlinear": True}, {"layers": (6, 5, 4)})

    def __init__(
        self,
        data_shape: Sequence[int],
        layers: Sequence[int] = (200, 200),
        nonlinear: bool = False,
        activation: str = "tanh",
        likelihood: str = "bernoulli",
        likelihood_options: Mapping[str, Any] | None = None,
        data_size: int | None = None,
    ):
        super().__init__(data_shape, data_size)
        if not layers or min(layers) < 1:
            raise BadInput(f"SigmoidBeliefNetwork: layers={tuple(layers)} must hold at least one positive width")
        names = ["x", *(f"z{level}" for level in range(1, len(layers) + 1))]  # from the data upwards
        sizes = dict(zip(names, [self.observe_by(likelihood, likelihood_options), *layers], strict=True))
        self.latents = {name: Latent("bernoulli", (sizes[name],)) for name in reversed(names[1:])}
        self.guide_parents = {"z1": ()} | {above: (below,) for below, above in pairwise(names[1:])}
        self.mirror = {"channels": (), "hidden": (layers[0],) if nonlinear else (), "activation": activation}
        self.decoder = nn.ModuleDict()  # keyed by the site whose logits the network computes
        for below, above in pairwise(names):
            between = [sizes["z1" if below == "x" else below]] if nonlinear else []
            self.decoder[below] = mlp([sizes[above], *between, sizes[below]], activation)
        self.decoder_prior_logits = nn.Parameter(torch.zeros(layers[-1]))

    def forward(self, x: torch.Tensor | None = None, *, batch_size: int = 1) -> torch.Tensor:
        with self.data_plate(x, batch_size):
            logits = self.decoder_prior_logits
            for site, below in pairwise([*self.latents, "x"]):
                z = pyro.sample(site, dist.Bernoulli(logits=logits).to_event(1))
                logits = self.decoder[below](z)
            return pyro.sample("x", self.observation(logits), obs=x)

    def likelihood(self, z1: torch.Tensor) -> dist.TorchDistribution:
        """p(x | z1) for ``z1`` of shape ``(..., layers[0])``, batch shape ``(...)``."""
        return self.observation(self.decoder["x"](z1))
