"""A variational autoencoder of data given something else."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch.nn.functional import one_hot, softplus

from ..errors import BadInput
from ._base import GenerativeModel, Latent, models
from ._networks import mlp


@models.register("conditional-vae")
class ConditionalVAE(GenerativeModel):
    r"""Normal latents and a Bernoulli likelihood, both given a condition c: a class, attributes, another image.

    .. math:: z \mid c \sim N(0, I) \quad\text{or}\quad N(\mu(c), \mathrm{diag}\,\sigma(c)^2), \qquad
              x \mid z, c \sim \prod_i \mathrm{Bernoulli}(x_i; \sigma(f(z, c)_i))

    Called as ``model(x, c=c)``, and so are its guides. Shapes: ``x`` is ``(B, *data_shape)``, ``c`` is
    ``(B, *condition_shape)``, of x's dtype (labels as one-hot vectors), site ``z`` is ``(B, latent_dim)``. With
    ``conditional_prior=True`` the prior's mean and standard deviation are a network of c. Raises BadInput for data or
    conditions of another shape and, under validation, for NaN or for values of x other than 0 and 1.

    Args:
        data_shape: shape of one datum, without the batch dimension.
        condition_shape: shape of one condition, without the batch dimension.
        latent_dim: size of site ``z``.
        hidden: widths of the decoder's hidden layers, in the encoder's order.
        conditional_prior: whether the prior depends on the condition.
        prior_hidden: width of the hidden layer of the prior's network.
        min_sd: smallest standard deviation, added to the softplus of an output.
        activation: activation between layers: ``relu``, ``leaky-relu``, ``elu``, ``silu``, ``softplus`` or ``tanh``.
        likelihood: p(x | output), a word of `gumbo.models.likelihoods`.
        likelihood_options: options of the likelihood, by name; None takes its defaults.
        data_size: number of data in the whole set: terms are scaled by ``data_size / B``; None does not scale.

    Sohn, Lee & Yan 2015, "Learning structured output representation using deep conditional generative models".

    >>> model = ConditionalVAE(data_shape=(1, 8, 8), condition_shape=(10,), latent_dim=2, hidden=(16,))
    >>> draws = model.sample_prior(10, c=torch.eye(10))
    >>> {site: tuple(value.shape) for site, value in draws.items()}
    {'z': (10, 2), 'x': (10, 1, 8, 8)}
    """

    variants = (
        {"condition_shape": (4,), "latent_dim": 3, "hidden": (8,)},
        {"condition_shape": (2, 2), "latent_dim": 3, "hidden": (8,), "conditional_prior": True},
    )
    binary_data = True

    def __init__(
        self,
        data_shape: Sequence[int],
        condition_shape: Sequence[int] = (10,),
        latent_dim: int = 20,
        hidden: Sequence[int] = (256, 128),
        conditional_prior: bool = False,
        prior_hidden: int = 64,
        min_sd: float = 1e-3,
        activation: str = "relu",
        likelihood: str = "bernoulli",
        likelihood_options: Mapping[str, Any] | None = None,
        data_size: int | None = None,
    ):
        super().__init__(data_shape, data_size)
        if not condition_shape:
            raise BadInput("ConditionalVAE: condition_shape is (): expected a dimension, as (10,) for one-hot labels")
        self.latents = {"z": Latent("normal", (latent_dim,))}
        self.conditions = {"c": tuple(condition_shape)}
        self.mirror = {"channels": (), "hidden": tuple(hidden), "activation": activation}
        self.conditional_prior, self.min_sd = conditional_prior, min_sd
        size = math.prod(condition_shape)
        self.decoder = mlp(
            [latent_dim + size, *reversed(hidden), self.observe_by(likelihood, likelihood_options)], activation
        )
        if conditional_prior:
            self.decoder_prior = mlp([size, prior_hidden, 2 * latent_dim], activation)
        else:
            self.register_buffer("prior_loc", torch.zeros(latent_dim), persistent=False)
            self.register_buffer("prior_scale", torch.ones(latent_dim), persistent=False)

    def forward(
        self, x: torch.Tensor | None = None, *, c: torch.Tensor | None = None, batch_size: int = 1
    ) -> torch.Tensor:
        with self.data_plate(x, batch_size):
            (c,) = self.check_conditions({"c": c}, batch_size if x is None else len(x))
            z = pyro.sample("z", self.prior(c))
            return pyro.sample("x", self.likelihood(z, c), obs=x)

    def prior(self, c: torch.Tensor) -> dist.TorchDistribution:
        """p(z | c) for ``c`` of shape ``(B, *condition_shape)``."""
        if not self.conditional_prior:
            return dist.Normal(self.prior_loc, self.prior_scale).to_event(1)
        loc, raw = self.decoder_prior(c.flatten(1)).chunk(2, -1)
        return dist.Normal(loc, softplus(raw) + self.min_sd).to_event(1)

    def likelihood(self, z: torch.Tensor, c: torch.Tensor) -> dist.TorchDistribution:
        """p(x | z, c) for ``z`` of shape ``(..., B, D)`` and ``c`` of shape ``(B, *condition_shape)``."""
        joined = torch.cat([z, c.flatten(1).expand(*z.shape[:-1], -1)], -1)
        return self.observation(self.decoder(joined))

    def inputs(self, images: torch.Tensor, labels: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
        """Images as ``x`` and their labels ``(N,)``, one-hot, as ``c``; other conditions are for the caller to give."""
        if labels is None or len(self.conditions["c"]) != 1:
            raise BadInput("ConditionalVAE conditions on c: give labels (N,), with condition_shape=(num_classes,)")
        return {"x": images, "c": one_hot(labels, self.conditions["c"][0]).to(images.dtype)}
