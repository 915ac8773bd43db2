"""Sequences whose hidden state is a chain of Normals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn

from ._base import Latent, models
from ._chains import GatedTransition, NormalChain
from ._networks import mlp
from ._sequences import Padded, SequenceModel, silent_where_masked


@models.register("deep-markov-model")
class DeepMarkovModel(SequenceModel):
    r"""A chain of Normal latents under a sequence of binary vectors, such as chords.

    .. math:: z_t \mid z_{t-1} \sim N(\mu(z_{t-1}), \mathrm{diag}\,\sigma(z_{t-1})^2), \qquad
              x_t \mid z_t \sim \prod_i \mathrm{Bernoulli}(x_{ti}; \sigma(f(z_t)_i)), \qquad t = 1 \dots T

    μ and σ are a gated transition; the value before z_1 is a parameter. Sequences of different lengths are padded with
    zeros: ``mask`` has ones for the valid steps. A masked step has zeros as data and a N(0, I) latent, in the
    model and in the guide ``combiner``, so that it adds nothing to any bound. With another ``likelihood``, a word of
    `gumbo.models.likelihoods`, f gives its parameters for vectors of other numbers.

    Called as ``model(x, mask=mask)``, and so are its guides. Shapes: ``x`` is ``(B, T, D)`` or ``(B, 1, T, D)`` (a
    ``data_shape`` of two or three sizes), ``mask`` ``(B, T)``, site ``z``, of all steps, ``(B, T, latent_dim)``.
    ``inputs(x, lengths)`` makes the mask; ``per_step(values, mask)`` turns nats per sequence into nats per step. Raises
    BadInput for data or masks of another shape and, under validation, for masks that are no run of ones from the first
    step on, for NaN or for values other than 0 and 1.

    Args:
        data_shape: ``(T, D)`` or ``(1, T, D)``.
        latent_dim: size of z_t.
        hidden: widths of the decoder's hidden layers, in the encoder's order.
        transition_hidden: width of the hidden layers of the transition.
        min_sd: smallest standard deviation, added to the softplus of an output.
        activation: activation between layers: ``relu``, ``leaky-relu``, ``elu``, ``silu``, ``softplus`` or ``tanh``.
        likelihood: p(x | output), a word of `gumbo.models.likelihoods`.
        likelihood_options: options of the likelihood, by name; None takes its defaults.
        data_size: number of data in the whole set: terms are scaled by ``data_size / B``; None does not scale.

    Krishnan, Shalit & Sontag 2017, "Structured inference networks for nonlinear state space models", arXiv:1609.09869.

    >>> model = DeepMarkovModel(data_shape=(6, 4), latent_dim=2, hidden=(8,), transition_hidden=8)
    >>> draws = model.sample_prior(3, mask=model.mask_of(torch.tensor([6, 2, 1])))
    >>> {site: tuple(value.shape) for site, value in draws.items()}
    {'z': (3, 6, 2), 'x': (3, 6, 4)}
    >>> bool((draws["x"][1, 2:] == 0).all())  # after its end a sequence is silent
    True
    """

    variants = ({"latent_dim": 2, "hidden": (6,), "transition_hidden": 5},)

    def __init__(
        self,
        data_shape: Sequence[int],
        latent_dim: int = 100,
        hidden: Sequence[int] = (100, 100),
        transition_hidden: int = 200,
        min_sd: float = 1e-3,
        activation: str = "relu",
        likelihood: str = "bernoulli",
        likelihood_options: Mapping[str, Any] | None = None,
        data_size: int | None = None,
    ):
        super().__init__(data_shape, data_size)
        self.latents = {"z": Latent("normal", (self.steps, latent_dim))}
        self.mirror = {"channels": (), "hidden": tuple(hidden), "activation": activation}
        outputs = self.observe_by(likelihood, likelihood_options, (self.width,))
        self.decoder = mlp([latent_dim, *reversed(hidden), outputs], activation)
        self.decoder_transition = GatedTransition(latent_dim, transition_hidden, min_sd)
        self.decoder_start = nn.Parameter(torch.zeros(latent_dim))

    def forward(self, x: Tensor | None = None, *, mask: Tensor | None = None, batch_size: int = 1) -> Tensor:
        with self.data_plate(x, batch_size):
            mask = self.checked_mask(mask, x, batch_size)
            # Accessed here and not when z is scored, so that Pyro registers the parameters inside the program.
            transition = self.decoder_transition
            z = pyro.sample("z", NormalChain(lambda previous, t: transition(previous), self.decoder_start, mask))
            return pyro.sample("x", self.likelihood(z, mask), obs=x)

    def likelihood(self, z: Tensor, mask: Tensor) -> dist.TorchDistribution:
        """p(x | z) for ``z`` of shape ``(..., B, T, Z)`` and ``mask`` ``(B, T)``, batch shape ``(..., B)``."""
        output, rank = self.decoder(z), len(self.data_shape)
        if self.binary_data:
            logits = silent_where_masked(output, mask)
            return dist.Bernoulli(logits=logits.unflatten(-2, self.data_shape[:-1])).to_event(rank)
        steps = self.observation(output.unflatten(-2, self.data_shape[:-1]))
        return Padded(steps, mask.unflatten(-1, self.data_shape[:-1]) > 0).to_event(rank - 1)
