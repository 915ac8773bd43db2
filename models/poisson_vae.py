"""A variational autoencoder whose latents are counts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch import nn

from ..errors import UnknownName
from ._base import GenerativeModel, Latent, models
from ._networks import mlp
from .families import distribution

COUNTS = ("poisson", "negative-binomial", "binomial")


@models.register("poisson-vae")
class PoissonVAE(GenerativeModel):
    r"""Latents that are counts, as spikes of neurons are, a perceptron decoder, and a Bernoulli likelihood.

    .. math:: z_j \sim \mathrm{Poisson}(e^{a_j}),\ j = 1 \dots D, \qquad
              x \mid z \sim \prod_i \mathrm{Bernoulli}(x_i; \sigma(f(z)_i))

    Shapes: ``x`` is ``(B, *data_shape)``, site ``z`` is ``(B, num_latents)``. For negative binomial and binomial
    latents, of a fixed ``total_count``, a_j are logits. The prior's a are zero, Poisson(1), unless they are learned.
    The guide ``mean-field`` has a posterior of the same family. Raises BadInput for data of another shape and, under
    validation, for data outside the likelihood's support.

    Args:
        data_shape: shape of one datum, without the batch dimension.
        num_latents: size of site ``z``.
        counts: family of z: ``poisson``, ``negative-binomial`` or ``binomial``.
        total_count: r of negative binomial and n of binomial latents.
        nonlinear: whether the networks have hidden layers; False makes them linear.
        hidden: widths of the decoder's hidden layers, in the encoder's order.
        learn_prior: whether a is learned; False fixes it at zero.
        activation: activation between layers: ``relu``, ``leaky-relu``, ``elu``, ``silu``, ``softplus`` or ``tanh``.
        likelihood: p(x | output), a word of `gumbo.models.likelihoods`.
        likelihood_options: options of the likelihood, by name; None takes its defaults.
        data_size: number of data in the whole set: terms are scaled by ``data_size / B``; None does not scale.

    Vafaii, Galor & Yates 2024, "Poisson variational autoencoder", arXiv:2405.14473.

    >>> model = PoissonVAE(data_shape=(1, 8, 8), num_latents=6, hidden=(16,))
    >>> {site: tuple(draws.shape) for site, draws in model.sample_prior(5).items()}
    {'z': (5, 6), 'x': (5, 1, 8, 8)}
    """

    variants = (
        {"num_latents": 4, "hidden": (8,)},
        {"num_latents": 4, "hidden": (8,), "counts": "negative-binomial", "learn_prior": True},
        {"num_latents": 3, "nonlinear": False, "counts": "binomial", "total_count": 3},
    )

    def __init__(
        self,
        data_shape: Sequence[int],
        num_latents: int = 200,
        counts: str = "poisson",
        total_count: int = 8,
        nonlinear: bool = True,
        hidden: Sequence[int] = (200, 200),
        learn_prior: bool = False,
        activation: str = "leaky-relu(0.3)",
        likelihood: str = "bernoulli",
        likelihood_options: Mapping[str, Any] | None = None,
        data_size: int | None = None,
    ):
        super().__init__(data_shape, data_size)
        if counts not in COUNTS:
            raise UnknownName("family of counts", counts, COUNTS)
        self.latents = {"z": Latent(counts, (num_latents,), total_count=total_count)}
        hidden = tuple(hidden) if nonlinear else ()
        self.mirror = {"channels": (), "hidden": hidden, "activation": activation}
        outputs = self.observe_by(likelihood, likelihood_options)
        self.decoder = mlp([num_latents, *reversed(hidden), outputs], activation)
        if learn_prior:
            self.decoder_prior = nn.Parameter(torch.zeros(num_latents))
        else:
            self.register_buffer("decoder_prior", torch.zeros(num_latents), persistent=False)

    def forward(self, x: torch.Tensor | None = None, *, batch_size: int = 1) -> torch.Tensor:
        with self.data_plate(x, batch_size):
            z = pyro.sample("z", distribution(self.latents["z"], self.decoder_prior))
            return pyro.sample("x", self.likelihood(z), obs=x)

    def likelihood(self, z: torch.Tensor) -> dist.TorchDistribution:
        """p(x | z) for ``z`` of shape ``(..., num_latents)``, batch shape ``(...)``."""
        return self.observation(self.decoder(z))
