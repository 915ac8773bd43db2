"""A variational autoencoder with Normal latents and perceptrons (system of Kingma & Welling 2013)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch import nn

from ..errors import BadInput
from ._base import GenerativeModel, Latent, models
from ._networks import mlp
from .priors import made, priors


@models.register("gaussian-vae")
class GaussianVAE(GenerativeModel):
    r"""Normal latents, a perceptron decoder, and a likelihood: Bernoulli, Normal, or another by its word.

    .. math:: z \sim N(0, I_D), \qquad x \mid z \sim \prod_i \mathrm{Bernoulli}(x_i; \sigma(f(z)_i))
              \quad\text{or}\quad \prod_i N(x_i; f(z)_i, s^2)

    Shapes: ``x`` is ``(B, *data_shape)``, site ``z`` is ``(B, latent_dim)``. A guide with the same ``hidden`` mirrors
    the decoder. Other likelihoods are ``poisson``, ``negative-binomial``, ``multinomial``, ``categorical``,
    ``discretized-logistic``, ...; the guide ``vamp`` shares the encoder of the prior ``vamp``. Raises BadInput for data
    of another shape and, under validation, for NaN or for values other than 0 and 1 under a Bernoulli likelihood.

    Args:
        data_shape: shape of one datum, without the batch dimension.
        latent_dim: size of site ``z``.
        hidden: widths of the decoder's hidden layers, in the encoder's order.
        likelihood: p(x | output), a word of `gumbo.models.likelihoods`.
        likelihood_sd: s of the Normal likelihood; None learns one number, which starts at 1.
        activation: activation between layers: ``relu``, ``leaky-relu``, ``elu``, ``silu``, ``softplus`` or ``tanh``.
        likelihood_options: options of the likelihood, by name; None takes its defaults.
        prior: p(z), a word of `gumbo.models.priors`: ``standard``, ``mixture``, ``vamp`` or ``flow``.
        prior_options: options of the prior, by name; None takes its defaults.
        data_size: number of data in the whole set: terms are scaled by ``data_size / B``; None does not scale.

    Kingma & Welling 2013, "Auto-Encoding Variational Bayes", arXiv:1312.6114.

    >>> model = GaussianVAE(data_shape=(1, 8, 8), latent_dim=2, hidden=(16,))
    >>> {site: tuple(draws.shape) for site, draws in model.sample_prior(5).items()}
    {'z': (5, 2), 'x': (5, 1, 8, 8)}
    """

    variants = (
        {"latent_dim": 3, "hidden": (16, 8)},
        {"latent_dim": 3, "hidden": (16,), "likelihood": "normal"},
        {"latent_dim": 2, "hidden": (8,), "prior": "vamp", "prior_options": {"components": 4}},
    )

    _ranges = {"likelihood_sd": -math.inf}

    def __init__(
        self,
        data_shape: Sequence[int],
        latent_dim: int = 50,
        hidden: Sequence[int] = (256, 128),
        likelihood: str = "bernoulli",
        likelihood_sd: float | None = None,
        activation: str = "relu",
        likelihood_options: Mapping[str, Any] | None = None,
        prior: str = "standard",
        prior_options: Mapping[str, Any] | None = None,
        data_size: int | None = None,
    ):
        super().__init__(data_shape, data_size)
        if likelihood_sd is not None and (likelihood != "normal" or likelihood_sd <= 0):
            raise BadInput(f"likelihood_sd={likelihood_sd} must be positive and goes with likelihood='normal'")
        self.latents = {"z": Latent("normal", (latent_dim,))}
        self.mirror = {"channels": (), "hidden": tuple(hidden), "activation": activation}
        outputs = self.observe_by(likelihood, likelihood_options)
        self.decoder = mlp([latent_dim, *reversed(hidden), outputs], activation)
        self.decoder_prior = made(priors, prior, prior_options, latent_dim, self.data_shape, self.mirror)
        self.normal = likelihood == "normal"
        if self.normal:
            fixed = (likelihood_options or {}).get("sd", likelihood_sd)
            log_sd = torch.tensor(math.log(fixed or 1.0))
            if fixed is None:
                self.decoder_log_sd = nn.Parameter(log_sd)
            else:
                self.register_buffer("decoder_log_sd", log_sd)

    def forward(self, x: torch.Tensor | None = None, *, batch_size: int = 1) -> torch.Tensor:
        with self.data_plate(x, batch_size):
            z = pyro.sample("z", self.decoder_prior())
            return pyro.sample("x", self.likelihood(z), obs=x)

    @property
    def prior_loc(self) -> torch.Tensor:
        """The mean of the standard prior, a buffer."""
        return self.decoder_prior.loc

    def likelihood(self, z: torch.Tensor) -> dist.TorchDistribution:
        """p(x | z) for ``z`` of shape ``(..., D)``, batch shape ``(...)``."""
        output = self.decoder(z)
        if not self.normal:
            return self.observation(output)
        loc = output.unflatten(-1, self.data_shape)
        return dist.Normal(loc, self.decoder_log_sd.exp()).to_event(len(self.data_shape))
