"""Latent Dirichlet allocation, with an amortized posterior."""

from __future__ import annotations

from collections.abc import Sequence

import pyro
import pyro.distributions as dist
import torch
from torch import nn

from ._base import GenerativeModel, Latent, models
from .likelihoods import MultinomialCounts


@models.register("latent-dirichlet-allocation")
class LatentDirichletAllocation(GenerativeModel):
    r"""Documents as mixtures of topics, topics as distributions over words; each word's own topic is summed out.

    .. math:: \theta \sim \mathrm{Dirichlet}(\alpha, \dots, \alpha), \qquad
              x \mid \theta \sim \mathrm{Multinomial}(N, \textstyle\sum_k \theta_k \beta_k), \qquad
              \beta_k = \mathrm{softmax}(w_k)

    Shapes: ``x`` is ``(B, *data_shape)``, counts of each word; site ``theta`` is ``(B, num_topics)``, on the simplex.
    Topics are parameters. The length N of each document is given: draws of x at data (the posterior predictive) have
    the lengths of these data, others ``length`` words. The guide ``mean-field`` has Dirichlet posteriors,
    differentiated by implicit reparameterization (``pathwise``); encoders take log(1 + x). ``topics()`` is β;
    `gumbo.models.perplexity`, `npmi` and `top_words` evaluate it. Raises BadInput for data of another shape and, under
    validation, for NaN or for values that are not counts.

    Args:
        data_shape: shape of one datum, without the batch dimension.
        num_topics: number of topics, the size of site ``theta``.
        concentration: α of the Dirichlet prior: below 1 it favours few topics per document.
        length: number of words of a document that is drawn without data.
        hidden: widths of the hidden layers of the guides' encoders.
        activation: activation between layers: ``relu``, ``leaky-relu``, ``elu``, ``silu``, ``softplus`` or ``tanh``.
        data_size: number of data in the whole set: terms are scaled by ``data_size / B``; None does not scale.

    Blei, Ng & Jordan 2003, "Latent Dirichlet allocation"; Figurnov, Mohamed & Mnih 2018, arXiv:1805.08498, for the
    gradients; Srivastava & Sutton 2017, arXiv:1703.01488, for amortized topic models.

    >>> model = LatentDirichletAllocation(data_shape=(30,), num_topics=3)
    >>> {site: tuple(draws.shape) for site, draws in model.sample_prior(5).items()}
    {'theta': (5, 3), 'x': (5, 30)}
    >>> model.topics().shape
    torch.Size([3, 30])
    """

    variants = ({"num_topics": 3, "hidden": (8,)},)

    def __init__(
        self,
        data_shape: Sequence[int],
        num_topics: int = 20,
        concentration: float = 0.5,
        length: int = 100,
        hidden: Sequence[int] = (100, 100),
        activation: str = "softplus",
        data_size: int | None = None,
    ):
        super().__init__(data_shape, data_size)
        self.latents = {"theta": Latent("dirichlet", (num_topics,))}
        self.mirror = {"channels": (), "hidden": tuple(hidden), "activation": activation, "inputs": "log1p"}
        words = self.observe_by("multinomial", {"total_count": length})
        self.decoder_topics = nn.Parameter(0.1 * torch.randn(num_topics, words))
        self.register_buffer("concentration", torch.full((num_topics,), float(concentration)), persistent=False)

    def forward(self, x: torch.Tensor | None = None, *, batch_size: int = 1) -> torch.Tensor:
        with self.data_plate(x, batch_size):
            theta = pyro.sample("theta", dist.Dirichlet(self.concentration))
            return pyro.sample("x", self.likelihood(theta).with_totals(x), obs=x)

    def likelihood(self, theta: torch.Tensor) -> MultinomialCounts:
        """p(x | θ) for ``theta`` of shape ``(..., num_topics)``, batch shape ``(...)``."""
        return self.observation((theta @ self.topics()).clamp(min=torch.finfo(theta.dtype).tiny).log())

    def topics(self) -> torch.Tensor:
        """The probability of each word in each topic, ``(num_topics, size)``."""
        return self.decoder_topics.softmax(-1)
