"""A variational autoencoder whose prior is a mixture of Normals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch import nn

from ._base import GenerativeModel, Latent, models
from ._networks import mlp


@models.register("gaussian-mixture-vae")
class GaussianMixtureVAE(GenerativeModel):
    r"""A cluster, a Normal latent in it, and a Bernoulli likelihood.

    .. math:: y \sim \mathrm{Categorical}(\mathrm{softmax}\,a), \qquad
              z \mid y \sim N(m_y, \mathrm{diag}\,s_y^2), \qquad
              x \mid z \sim \prod_i \mathrm{Bernoulli}(x_i; \sigma(f(z)_i))

    Shapes: ``x`` is ``(B, *data_shape)``, site ``y`` is ``(B, num_components)``, one-hot, and site ``z`` is
    ``(B, latent_dim)``. Weights a, means m and standard deviations s are learned; the means start at Normal draws of
    standard deviation ``spread``, so that the clusters differ. Raises BadInput for data of another shape and, under
    validation, for NaN or for values other than 0 and 1.

    Args:
        data_shape: shape of one datum, without the batch dimension.
        num_components: number of clusters, the size of site ``y``.
        latent_dim: size of site ``z``.
        hidden: widths of the decoder's hidden layers, in the encoder's order.
        spread: standard deviation of the initial means of the clusters.
        activation: activation between layers: ``relu``, ``leaky-relu``, ``elu``, ``silu``, ``softplus`` or ``tanh``.
        likelihood: p(x | output), a word of `gumbo.models.likelihoods`.
        likelihood_options: options of the likelihood, by name; None takes its defaults.
        data_size: number of data in the whole set: terms are scaled by ``data_size / B``; None does not scale.

    Jiang et al. 2017, arXiv:1611.05148; Dilokthanakul et al. 2016, arXiv:1611.02648.

    >>> model = GaussianMixtureVAE(data_shape=(1, 8, 8), num_components=4, latent_dim=2, hidden=(16,))
    >>> {site: tuple(draws.shape) for site, draws in model.sample_prior(5).items()}
    {'y': (5, 4), 'z': (5, 2), 'x': (5, 1, 8, 8)}
    """

    variants = ({"num_components": 3, "latent_dim": 2, "hidden": (8,)},)
    binary_data = True

    def __init__(
        self,
        data_shape: Sequence[int],
        num_components: int = 10,
        latent_dim: int = 10,
        hidden: Sequence[int] = (256, 128),
        spread: float = 1.0,
        activation: str = "relu",
        likelihood: str = "bernoulli",
        likelihood_options: Mapping[str, Any] | None = None,
        data_size: int | None = None,
    ):
        super().__init__(data_shape, data_size)
        self.latents = {"y": Latent("categorical", (num_components,)), "z": Latent("normal", (latent_dim,))}
        self.guide_parents = {"y": (), "z": ("y",)}
        self.mirror = {"channels": (), "hidden": tuple(hidden), "activation": activation}
        outputs = self.observe_by(likelihood, likelihood_options)
        self.decoder = mlp([latent_dim, *reversed(hidden), outputs], activation)
        self.decoder_prior_logits = nn.Parameter(torch.zeros(num_components))
        self.decoder_means = nn.Parameter(spread * torch.randn(num_components, latent_dim))
        self.decoder_log_sds = nn.Parameter(torch.zeros(num_components, latent_dim))

    def forward(self, x: torch.Tensor | None = None, *, batch_size: int = 1) -> torch.Tensor:
        with self.data_plate(x, batch_size):
            y = pyro.sample("y", dist.OneHotCategorical(logits=self.decoder_prior_logits))
            z = pyro.sample("z", self.component(y))
            return pyro.sample("x", self.likelihood(z), obs=x)

    def component(self, y: torch.Tensor) -> dist.TorchDistribution:
        """p(z | y) for one-hot ``y`` of shape ``(..., num_components)``, batch shape ``(...)``."""
        return dist.Normal(y @ self.decoder_means, (y @ self.decoder_log_sds).exp()).to_event(1)

    def likelihood(self, z: torch.Tensor) -> dist.TorchDistribution:
        """p(x | z) for ``z`` of shape ``(..., latent_dim)``, batch shape ``(...)``."""
        return self.observation(self.decoder(z))
