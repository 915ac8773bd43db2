"""The categorical variational autoencoder, in its discrete and in its relaxed form."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pyro
import pyro.distributions as dist
import torch

from ..errors import BadInput
from ._base import GenerativeModel, Latent, models
from ._networks import mlp
from ._relaxed import RelaxedOneHot
from .priors import code_priors, made


@models.register("categorical-vae")
class CategoricalVAE(GenerativeModel):
    r"""Several one-hot latents under a uniform or another prior, a perceptron decoder, and a Bernoulli likelihood.

    .. math:: y_n \sim \mathrm{Categorical}(1/C, \dots, 1/C),\ n = 1 \dots N, \qquad
              x \mid y \sim \prod_i \mathrm{Bernoulli}(x_i; \sigma(f(y)_i))

    Shapes: ``x`` is ``(B, *data_shape)``, site ``y`` is ``(B, num_latents, num_classes)``, one-hot along the last
    dimension. With ``relaxed=True`` y is a point of the simplex instead, from RelaxedOneHotCategorical at
    ``temperature`` (a buffer: ``model.temperature.fill_(0.3)`` changes it); its bound is the relaxed model's and does
    not compare with the discrete one's. A prior other than the uniform one goes with the discrete form. Raises BadInput
    for data of another shape and, under validation, for NaN or for values other than 0 and 1.

    Args:
        data_shape: shape of one datum, without the batch dimension.
        num_latents: N, the number of one-hot latents.
        num_classes: C, the number of classes of each.
        relaxed: whether y is a point of the simplex instead of one-hot.
        temperature: initial temperature of the relaxed prior.
        hidden: widths of the decoder's hidden layers, in the encoder's order.
        activation: activation between layers: ``relu``, ``leaky-relu``, ``elu``, ``silu``, ``softplus`` or ``tanh``.
        likelihood: p(x | output), a word of `gumbo.models.likelihoods`.
        likelihood_options: options of the likelihood, by name; None takes its defaults.
        prior: p(y), a word of `gumbo.models.priors`: ``uniform``, ``independent`` or ``autoregressive``.
        prior_options: options of the prior, by name; None takes its defaults.
        data_size: number of data in the whole set: terms are scaled by ``data_size / B``; None does not scale.

    Jang, Gu & Poole 2017, arXiv:1611.01144; Maddison, Mnih & Teh 2017, arXiv:1611.00712, whose prior temperature of 1/2
    is the default.

    >>> model = CategoricalVAE(data_shape=(1, 8, 8), num_latents=4, num_classes=3, hidden=(16,))
    >>> {site: tuple(draws.shape) for site, draws in model.sample_prior(5).items()}
    {'y': (5, 4, 3), 'x': (5, 1, 8, 8)}
    """

    variants = (
        {"num_latents": 3, "num_classes": 4, "hidden": (16, 8)},
        {"num_latents": 3, "num_classes": 4, "hidden": (16,), "relaxed": True},
        {"num_latents": 3, "num_classes": 4, "hidden": (8,), "prior": "autoregressive"},
    )
    binary_data = True

    def __init__(
        self,
        data_shape: Sequence[int],
        num_latents: int = 20,
        num_classes: int = 10,
        relaxed: bool = False,
        temperature: float = 0.5,
        hidden: Sequence[int] = (256, 128),
        activation: str = "relu",
        likelihood: str = "bernoulli",
        likelihood_options: Mapping[str, Any] | None = None,
        prior: str = "uniform",
        prior_options: Mapping[str, Any] | None = None,
        data_size: int | None = None,
    ):
        super().__init__(data_shape, data_size)
        self.mirror = {"channels": (), "hidden": tuple(hidden), "activation": activation}
        self.relaxed = relaxed
        family = "relaxed-categorical" if relaxed else "categorical"
        self.latents = {"y": Latent(family, (num_latents, num_classes))}
        self.decoder = mlp(
            [num_latents * num_classes, *reversed(hidden), self.observe_by(likelihood, likelihood_options)], activation
        )
        if relaxed and prior != "uniform":
            raise BadInput(
                f"CategoricalVAE: prior={prior!r} is a distribution of one-hot codes: it does not go with relaxed=True"
            )
        options = (prior_options, num_latents, num_classes)
        self.decoder_prior = None if prior == "uniform" else made(code_priors, prior, *options)
        self.register_buffer("prior_logits", torch.zeros(num_latents, num_classes), persistent=False)
        if relaxed:
            self.register_buffer("temperature", torch.tensor(float(temperature)))

    def forward(self, x: torch.Tensor | None = None, *, batch_size: int = 1) -> torch.Tensor:
        with self.data_plate(x, batch_size):
            y = pyro.sample("y", self.prior().to_event(1) if self.decoder_prior is None else self.decoder_prior())
            return pyro.sample("x", self.likelihood(y), obs=x)

    def exact(self) -> CategoricalVAE:
        """The discrete model over the same decoder, whose bound is reported for a relaxed one; itself if discrete."""
        if not self.relaxed:
            return self
        twin = CategoricalVAE(**{**self.config, "relaxed": False}).to(self.prior_logits)
        twin.decoder = self.decoder
        return twin

    def prior(self) -> dist.TorchDistribution:
        """The uniform prior of the latents, batch shape ``(num_latents,)``."""
        if self.relaxed:
            return RelaxedOneHot(self.temperature, logits=self.prior_logits)
        return dist.OneHotCategorical(logits=self.prior_logits)

    def likelihood(self, y: torch.Tensor) -> dist.TorchDistribution:
        """p(x | y) for ``y`` of shape ``(..., num_latents, num_classes)``, batch shape ``(...)``."""
        return self.observation(self.decoder(y.flatten(-2)))
