"""A variational autoencoder whose latents are entries of a codebook."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn

from ._base import GenerativeModel, Latent, models
from ._networks import mlp
from .priors import code_priors, made


class Codebook(nn.Module):
    """K vectors of D numbers, shared by the model, which looks codes up, and its guide, which finds near ones."""

    def __init__(self, classes: int, size: int):
        super().__init__()
        self.vectors = nn.Parameter(torch.randn(classes, size))

    def forward(self, codes: Tensor) -> Tensor:
        """The vectors of one-hot codes, ``(..., K)`` to ``(..., D)``."""
        return codes @ self.vectors

    def distances(self, h: Tensor) -> Tensor:
        """The squared distance of each of ``(..., D)`` to each vector, ``(..., K)``."""
        return (h.unsqueeze(-2) - self.vectors).square().sum(-1)


@models.register("vector-quantized-vae")
class VectorQuantizedVAE(GenerativeModel):
    r"""One code at each of N positions, a vector of a codebook for each code, and a likelihood given all of them.

    .. math:: y \sim p(y), \qquad x \mid y \sim \prod_i \mathrm{Bernoulli}(x_i; \sigma(f(e_{y_1}, \dots, e_{y_N})_i))

    The guide ``vector-quantized`` has :math:`q(y_n = k \mid x) \propto \exp(-\|h_n(x) - e_k\|^2 / \tau)` with the same
    vectors e. Its limit τ → 0 is the deterministic code of the original, whose ELBO is log p(x | y) + log p(y): a true
    bound, with the prior in it, and with an exact gradient of the encoder that is zero. The loss has no commitment
    term, and no straight-through gradient unless the estimator has one.

    Shapes: ``x`` is ``(B, *data_shape)``, site ``y`` is ``(B, num_codes, num_classes)``, one-hot along the last
    dimension. The prior is learned with the rest, unless it is uniform. ``code_use(y)`` counts the codes in use. Raises
    BadInput for data of another shape and, under validation, for data outside the likelihood's support.

    Args:
        data_shape: shape of one datum, without the batch dimension.
        num_codes: N, the number of positions.
        num_classes: K, the number of vectors of the codebook.
        code_dim: size of a vector.
        prior: p(y), a word of `gumbo.models.priors`: ``autoregressive``, ``independent`` or ``uniform``.
        prior_options: options of the prior, by name; None takes its defaults.
        hidden: widths of the decoder's hidden layers, in the encoder's order.
        activation: activation between layers: ``relu``, ``leaky-relu``, ``elu``, ``silu``, ``softplus`` or ``tanh``.
        likelihood: p(x | output), a word of `gumbo.models.likelihoods`.
        likelihood_options: options of the likelihood, by name; None takes its defaults.
        data_size: number of data in the whole set: terms are scaled by ``data_size / B``; None does not scale.

    van den Oord, Vinyals & Kavukcuoglu 2017, "Neural discrete representation learning", arXiv:1711.00937; Sønderby,
    Poole & Mnih 2017, for the stochastic code.

    >>> model = VectorQuantizedVAE(data_shape=(1, 8, 8), num_codes=4, num_classes=3, code_dim=2, hidden=(16,))
    >>> {site: tuple(draws.shape) for site, draws in model.sample_prior(5).items()}
    {'y': (5, 4, 3), 'x': (5, 1, 8, 8)}
    """

    variants = ({"num_codes": 3, "num_classes": 4, "code_dim": 2, "hidden": (8,), "prior_options": {"hidden": 5}},)

    def __init__(
        self,
        data_shape: Sequence[int],
        num_codes: int = 16,
        num_classes: int = 32,
        code_dim: int = 8,
        prior: str = "autoregressive",
        prior_options: Mapping[str, Any] | None = None,
        hidden: Sequence[int] = (256, 128),
        activation: str = "relu",
        likelihood: str = "bernoulli",
        likelihood_options: Mapping[str, Any] | None = None,
        data_size: int | None = None,
    ):
        super().__init__(data_shape, data_size)
        self.latents = {"y": Latent("categorical", (num_codes, num_classes))}
        self.mirror = {"channels": (), "hidden": tuple(hidden), "activation": activation}
        outputs = self.observe_by(likelihood, likelihood_options)
        self.decoder_codebook = Codebook(num_classes, code_dim)
        self.decoder = mlp([num_codes * code_dim, *reversed(hidden), outputs], activation)
        self.decoder_prior = made(code_priors, prior, prior_options, num_codes, num_classes)

    def forward(self, x: Tensor | None = None, *, batch_size: int = 1) -> Tensor:
        with self.data_plate(x, batch_size):
            y = pyro.sample("y", self.decoder_prior())
            return pyro.sample("x", self.likelihood(y), obs=x)

    def likelihood(self, y: Tensor) -> dist.TorchDistribution:
        """p(x | y) for ``y`` of shape ``(..., num_codes, num_classes)``, batch shape ``(...)``."""
        return self.observation(self.decoder(self.decoder_codebook(y).flatten(-2)))

    @staticmethod
    def code_use(y: Tensor) -> dict[str, float]:
        """How codes are used: the share of them that occur, and the perplexity of their frequencies, over positions.

        >>> VectorQuantizedVAE.code_use(torch.eye(4)[torch.tensor([[0, 1], [1, 0]])])
        {'used': 0.5, 'perplexity': 2.0}
        """
        share = y.flatten(0, -2).mean(0)
        entropy = -torch.special.xlogy(share, share).sum()
        return {"used": (share > 0).float().mean().item(), "perplexity": round(entropy.exp().item(), 4)}
