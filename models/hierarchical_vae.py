"""A hierarchy of Normal latents."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch import nn
from torch.nn.functional import softplus

from ..errors import BadInput
from ._base import GenerativeModel, Latent, models
from ._networks import mlp


@models.register("hierarchical-vae")
class HierarchicalVAE(GenerativeModel):
    r"""Several levels of Normal latents, each given the one above, over a Bernoulli likelihood.

    .. math:: z_L \sim N(0, I), \qquad
              z_l \mid z_{l+1} \sim N(\mu_l(z_{l+1}), \mathrm{diag}\,\sigma_l(z_{l+1})^2), \qquad
              x \mid z_1 \sim \prod_i \mathrm{Bernoulli}(x_i; \sigma(f(z_1)_i))

    Shapes: ``x`` is ``(B, *data_shape)``; ``latent_dims`` are the sizes of z1, z2, ... from the data upwards, and site
    ``zl`` is ``(B, latent_dims[l - 1])``. Raises BadInput for data of another shape and, under validation, for NaN or
    for values other than 0 and 1.

    Args:
        data_shape: shape of one datum, without the batch dimension.
        latent_dims: sizes of z1, z2, ..., at least two.
        hidden: widths of the decoder's hidden layers, in the encoder's order.
        level_hidden: width of the hidden layer between two levels.
        min_sd: smallest standard deviation, added to the softplus of an output.
        activation: activation between layers: ``relu``, ``leaky-relu``, ``elu``, ``silu``, ``softplus`` or ``tanh``.
        likelihood: p(x | output), a word of `gumbo.models.likelihoods`.
        likelihood_options: options of the likelihood, by name; None takes its defaults.
        data_size: number of data in the whole set: terms are scaled by ``data_size / B``; None does not scale.

    Rezende, Mohamed & Wierstra 2014, arXiv:1401.4082; Sønderby et al. 2016, arXiv:1602.02282.

    >>> model = HierarchicalVAE(data_shape=(1, 8, 8), latent_dims=(5, 3), hidden=(16,), level_hidden=8)
    >>> {site: tuple(draws.shape) for site, draws in model.sample_prior(2).items()}
    {'z2': (2, 3), 'z1': (2, 5), 'x': (2, 1, 8, 8)}
    """

    variants = (
        {"latent_dims": (4, 3), "hidden": (8,), "level_hidden": 6},
        {"latent_dims": (4, 3, 2), "hidden": (8,), "level_hidden": 6},
    )
    binary_data = True

    def __init__(
        self,
        data_shape: Sequence[int],
        latent_dims: Sequence[int] = (32, 16),
        hidden: Sequence[int] = (256, 128),
        level_hidden: int = 64,
        min_sd: float = 1e-3,
        activation: str = "relu",
        likelihood: str = "bernoulli",
        likelihood_options: Mapping[str, Any] | None = None,
        data_size: int | None = None,
    ):
        super().__init__(data_shape, data_size)
        if len(latent_dims) < 2:
            raise BadInput(f"HierarchicalVAE: latent_dims={tuple(latent_dims)} must hold at least two levels")
        names = [f"z{level}" for level in range(len(latent_dims), 0, -1)]  # from the top level down
        sizes = dict(zip(names, reversed(latent_dims), strict=True))
        self.latents = {name: Latent("normal", (sizes[name],)) for name in names}
        self.guide_parents = {names[0]: ()} | {below: (above,) for above, below in pairwise(names)}
        self.mirror = {"channels": (), "hidden": tuple(hidden), "activation": activation}
        self.min_sd = min_sd
        self.decoder = mlp(
            [latent_dims[0], *reversed(hidden), self.observe_by(likelihood, likelihood_options)], activation
        )
        # Keyed by the site whose mean and standard deviation the network computes.
        self.decoder_levels = nn.ModuleDict(
            {below: mlp([sizes[above], level_hidden, 2 * sizes[below]], activation) for above, below in pairwise(names)}
        )
        self.register_buffer("prior_loc", torch.zeros(latent_dims[-1]), persistent=False)
        self.register_buffer("prior_scale", torch.ones(latent_dims[-1]), persistent=False)

    def forward(self, x: torch.Tensor | None = None, *, batch_size: int = 1) -> torch.Tensor:
        with self.data_plate(x, batch_size):
            top, *levels = self.latents
            z = pyro.sample(top, dist.Normal(self.prior_loc, self.prior_scale).to_event(1))
            for site in levels:
                loc, raw = self.decoder_levels[site](z).chunk(2, -1)
                z = pyro.sample(site, dist.Normal(loc, softplus(raw) + self.min_sd).to_event(1))
            return pyro.sample("x", self.likelihood(z), obs=x)

    def likelihood(self, z1: torch.Tensor) -> dist.TorchDistribution:
        """p(x | z1) for ``z1`` of shape ``(..., latent_dims[0])``, batch shape ``(...)``."""
        return self.observation(self.decoder(z1))
