"""A convolutional variational autoencoder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pyro
import pyro.distributions as dist
import torch

from ..errors import BadInput
from ._base import GenerativeModel, Latent, models
from ._networks import Deconvolutions


@models.register("conv-vae")
class ConvVAE(GenerativeModel):
    r"""Normal latents, a decoder of transposed convolutions, and a Bernoulli likelihood.

    .. math:: z \sim N(0, I_D), \qquad x \mid z \sim \prod_i \mathrm{Bernoulli}(x_i; \sigma(f(z)_i))

    Shapes: ``x`` is ``(B, channels, height, width)``, site ``z`` is ``(B, latent_dim)``. f is a dense layer to
    ``channels[0]`` maps of a size that as many doublings bring to the image's, a transposed convolution of stride 2 for
    each of ``channels`` from the last to the first, and one of stride 1. With the defaults on 28 x 28 images that is
    dense 7 x 7 x 32, then 64, 32 and 1 maps; guides mirror it with convolutions of 32 and 64 and a dense head. Two
    latent dimensions can be drawn as a manifold. Raises BadInput for images whose height and width cannot be halved so
    often, for data of another shape and, under validation, for NaN or for values other than 0 and 1.

    Args:
        data_shape: ``(channels, height, width)``.
        latent_dim: size of site ``z``.
        channels: maps of the convolutions, in the encoder's order.
        activation: activation between layers: ``relu``, ``leaky-relu``, ``elu``, ``silu``, ``softplus`` or ``tanh``.
        likelihood: p(x | output), a word of `gumbo.models.likelihoods`.
        likelihood_options: options of the likelihood, by name; None takes its defaults.
        data_size: number of data in the whole set: terms are scaled by ``data_size / B``; None does not scale.

    LeCun et al. 1998 for the encoder; Kingma & Welling 2013, arXiv:1312.6114, for the rest.

    >>> model = ConvVAE(data_shape=(1, 8, 8), channels=(4, 8))
    >>> {site: tuple(draws.shape) for site, draws in model.sample_prior(5).items()}
    {'z': (5, 2), 'x': (5, 1, 8, 8)}
    """

    variants = ({"channels": (4, 6)},)
    binary_data = True

    def __init__(
        self,
        data_shape: Sequence[int],
        latent_dim: int = 2,
        channels: Sequence[int] = (32, 64),
        activation: str = "relu",
        likelihood: str = "bernoulli",
        likelihood_options: Mapping[str, Any] | None = None,
        data_size: int | None = None,
    ):
        super().__init__(data_shape, data_size)
        if not channels:
            raise BadInput("ConvVAE: channels is (): expected a number of maps for at least one convolution")
        self.latents = {"z": Latent("normal", (latent_dim,))}
        self.mirror = {"channels": tuple(channels), "hidden": (), "activation": activation}
        self.observe_by(likelihood, likelihood_options)
        maps = (self.observation.outputs * self.data_shape[0], *self.data_shape[1:])
        self.decoder = Deconvolutions(latent_dim, maps, channels, activation)
        self.register_buffer("prior_loc", torch.zeros(latent_dim), persistent=False)
        self.register_buffer("prior_scale", torch.ones(latent_dim), persistent=False)

    def forward(self, x: torch.Tensor | None = None, *, batch_size: int = 1) -> torch.Tensor:
        with self.data_plate(x, batch_size):
            z = pyro.sample("z", dist.Normal(self.prior_loc, self.prior_scale).to_event(1))
            return pyro.sample("x", self.likelihood(z), obs=x)

    def likelihood(self, z: torch.Tensor) -> dist.TorchDistribution:
        """p(x | z) for ``z`` of shape ``(..., D)``, batch shape ``(...)``."""
        return self.observation(self.decoder(z).flatten(-3))
