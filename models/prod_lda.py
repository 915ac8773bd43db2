"""A topic model with products of topics."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pyro
import pyro.distributions as dist
import torch
from torch import nn

from ._base import GenerativeModel, Latent, models
from .likelihoods import MultinomialCounts


@models.register("prod-lda")
class ProdLDA(GenerativeModel):
    r"""A document's distribution over words as a product of experts, the topics.

    .. math:: z \sim N(0, \sigma_\alpha^2 I), \qquad \theta = \mathrm{softmax}(z), \qquad
              x \mid \theta \sim \mathrm{Multinomial}(N, \mathrm{softmax}(\textstyle\sum_k \theta_k w_k + b))

    The Normal is Laplace's approximation of Dirichlet(α, ..., α) in the softmax basis, of variance (1 − 1/K) / α.

    Shapes: ``x`` is ``(B, *data_shape)``, counts of each word; site ``z`` is ``(B, num_topics)``. The length N of each
    document is given: draws of x at data (the posterior predictive) have the lengths of these data, others ``length``
    words. Encoders take log(1 + x). The paper normalizes the decoder's outputs over the batch, which makes rows
    dependent; here each document's own logits are normalized instead, with ``normalize=True``. ``topics()`` are the
    experts as distributions over words; `gumbo.models.perplexity`, `npmi` and `top_words` evaluate them. Raises
    BadInput for data of another shape and, under validation, for NaN or for values that are not counts.

    Args:
        data_shape: shape of one datum, without the batch dimension.
        num_topics: number of topics, the size of site ``z``.
        concentration: α of the Dirichlet that the prior approximates: below 1 it favours few topics per document.
        normalize: whether each document's logits are normalized.
        length: number of words of a document that is drawn without data.
        hidden: widths of the hidden layers of the guides' encoders.
        activation: activation between layers: ``relu``, ``leaky-relu``, ``elu``, ``silu``, ``softplus`` or ``tanh``.
        data_size: number of data in the whole set: terms are scaled by ``data_size / B``; None does not scale.

    Srivastava & Sutton 2017, "Autoencoding variational inference for topic models", arXiv:1703.01488.

    >>> model = ProdLDA(data_shape=(30,), num_topics=3)
    >>> {site: tuple(draws.shape) for site, draws in model.sample_prior(5).items()}
    {'z': (5, 3), 'x': (5, 30)}
    """

    variants = ({"num_topics": 3, "hidden": (8,)}, {"num_topics": 3, "hidden": (8,), "normalize": True})

    def __init__(
        self,
        data_shape: Sequence[int],
        num_topics: int = 20,
        concentration: float = 0.5,
        normalize: bool = False,
        length: int = 100,
        hidden: Sequence[int] = (100, 100),
        activation: str = "softplus",
        data_size: int | None = None,
    ):
        super().__init__(data_shape, data_size)
        self.latents = {"z": Latent("normal", (num_topics,))}
        self.mirror = {"channels": (), "hidden": tuple(hidden), "activation": activation, "inputs": "log1p"}
        words = self.observe_by("multinomial", {"total_count": length})
        self.decoder = nn.Linear(num_topics, words)
        self.decoder_norm = nn.LayerNorm(words) if normalize else nn.Identity()
        scale = math.sqrt(max(1 - 1 / num_topics, 0.5) / concentration)
        self.register_buffer("prior_loc", torch.zeros(num_topics), persistent=False)
        self.register_buffer("prior_scale", torch.full((num_topics,), scale), persistent=False)

    def forward(self, x: torch.Tensor | None = None, *, batch_size: int = 1) -> torch.Tensor:
        with self.data_plate(x, batch_size):
            z = pyro.sample("z", dist.Normal(self.prior_loc, self.prior_scale).to_event(1))
            return pyro.sample("x", self.likelihood(z).with_totals(x), obs=x)

    def likelihood(self, z: torch.Tensor) -> MultinomialCounts:
        """p(x | z) for ``z`` of shape ``(..., num_topics)``, batch shape ``(...)``."""
        return self.observation(self.decoder_norm(self.decoder(z.softmax(-1))))

    def topics(self) -> torch.Tensor:
        """The distribution over words of each expert alone, ``(num_topics, size)``."""
        return self.decoder.weight.mT.softmax(-1)
