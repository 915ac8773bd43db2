"""One layer of binary latents under an image."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch import nn

from ._base import GenerativeModel, Latent, models
from ._networks import mlp


@models.register("bernoulli-vae")
class BernoulliVAE(GenerativeModel):
    r"""Binary latents, a linear or a perceptron decoder, and a Bernoulli likelihood.

    .. math:: z_j \sim \mathrm{Bernoulli}(\sigma(a_j)),\ j = 1 \dots D, \qquad
              x \mid z \sim \prod_i \mathrm{Bernoulli}(x_i; \sigma(f(z)_i))

    Shapes: ``x`` is ``(B, *data_shape)``, site ``z`` is ``(B, num_latents)``. With ``nonlinear=False`` it is a sigmoid
    belief network of one layer. The prior logits a start at zero. Wide layers, such as a thousand latents, are
    supported. Raises BadInput for data of another shape and, under validation, for NaN or for values other than 0 and
    1.

    Args:
        data_shape: shape of one datum, without the batch dimension.
        num_latents: size of site ``z``.
        nonlinear: whether the networks have hidden layers; False makes them linear.
        hidden: widths of the decoder's hidden layers, in the encoder's order.
        learn_prior: whether the prior's logits are learned; False fixes them at zero.
        activation: activation between layers: ``relu``, ``leaky-relu``, ``elu``, ``silu``, ``softplus`` or ``tanh``.
        likelihood: p(x | output), a word of `gumbo.models.likelihoods`.
        likelihood_options: options of the likelihood, by name; None takes its defaults.
        data_size: number of data in the whole set: terms are scaled by ``data_size / B``; None does not scale.

    The benchmark of Tucker et al. 2017, arXiv:1703.07370, and of Dong et al. 2020, arXiv:2006.10680.

    >>> model = BernoulliVAE(data_shape=(1, 8, 8), num_latents=6, hidden=(16,))
    >>> {site: tuple(draws.shape) for site, draws in model.sample_prior(5).items()}
    {'z': (5, 6), 'x': (5, 1, 8, 8)}
    """

    variants = (
        {"num_latents": 6, "hidden": (16, 8)},
        {"num_latents": 6, "nonlinear": False, "learn_prior": False},
    )
    binary_data = True

    def __init__(
        self,
        data_shape: Sequence[int],
        num_latents: int = 200,
        nonlinear: bool = True,
        hidden: Sequence[int] = (200, 200),
        learn_prior: bool = True,
        activation: str = "leaky-relu",
        likelihood: str = "bernoulli",
        likelihood_options: Mapping[str, Any] | None = None,
        data_size: int | None = None,
    ):
        super().__init__(data_shape, data_size)
        self.latents = {"z": Latent("bernoulli", (num_latents,))}
        hidden = tuple(hidden) if nonlinear else ()
        self.mirror = {"channels": (), "hidden": hidden, "activation": activation}
        self.decoder = mlp(
            [num_latents, *reversed(hidden), self.observe_by(likelihood, likelihood_options)], activation
        )
        if learn_prior:
            self.decoder_prior_logits = nn.Parameter(torch.zeros(num_latents))
        else:
            self.register_buffer("decoder_prior_logits", torch.zeros(num_latents), persistent=False)

    def forward(self, x: torch.Tensor | None = None, *, batch_size: int = 1) -> torch.Tensor:
        with self.data_plate(x, batch_size):
            z = pyro.sample("z", dist.Bernoulli(logits=self.decoder_prior_logits).to_event(1))
            return pyro.sample("x", self.likelihood(z), obs=x)

    def likelihood(self, z: torch.Tensor) -> dist.TorchDistribution:
        """p(x | z) for ``z`` of shape ``(..., num_latents)``, batch shape ``(...)``."""
        return self.observation(self.decoder(z))
