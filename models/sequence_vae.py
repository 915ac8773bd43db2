"""A variational autoencoder of sequences of tokens, such as names."""

from __future__ import annotations

import math
from collections.abc import Sequence
from types import MappingProxyType

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn
from torch.distributions import constraints
from torch.nn.functional import one_hot

from ..errors import BadInput
from ._base import GenerativeModel, Latent, models
from .expectation import Reward, reward_named, reward_of_rows
from .likelihoods import likelihoods


class TokenSequence(dist.TorchDistribution):
    """L tokens 0 ... V − 1, each given the earlier ones: scored in one pass of a recurrent network, drawn one by one.

    Args:
        network: from one-hot tokens before each position ``(..., V)`` and a state ``(..., H)`` to the next state.
        output: from states ``(..., H)`` to logits ``(..., V)``.
        state: the state before the first token, ``(..., H)``.
        length: number of tokens.
        vocabulary: number of token types.

    Shapes: batch ``(...)``, event ``(L,)``, of the state's dtype.
    """

    arg_constraints = MappingProxyType({})
    support = constraints.independent(constraints.nonnegative_integer, 1)
    has_rsample = False

    def __init__(self, network: nn.Module, output: nn.Linear, state: Tensor, length: int, vocabulary: int):
        self.network, self.output, self.state, self.vocabulary = network, output, state, vocabulary
        super().__init__(state.shape[:-1], torch.Size((length,)), validate_args=False)

    def expand(self, batch_shape, _instance=None) -> TokenSequence:
        state = self.state.expand(*batch_shape, -1)
        return type(self)(self.network, self.output, state, self.event_shape[0], self.vocabulary)

    def _steps(self, tokens: Tensor | None, shape: torch.Size) -> tuple[Tensor, Tensor]:
        """Tokens, given or drawn, and the normalized log-probabilities at each position, ``(..., L, V)``."""
        state = self.state.expand(*shape, -1).flatten(0, -2)
        rows, before, chosen, logs = len(state), None, [], []
        given = None if tokens is None else tokens.expand(*shape, -1).reshape(rows, -1).long()
        for place in range(self.event_shape[0]):
            state, logits = advanced(self.network, self.output, before, state)
            logs.append(logits.log_softmax(-1))
            token = torch.multinomial(logs[-1].exp(), 1).squeeze(-1) if given is None else given[:, place]
            chosen.append(token)
            before = one_hot(token, self.vocabulary).to(state.dtype)
        return torch.stack(chosen, -1).reshape(*shape, -1), torch.stack(logs, -2).reshape(*shape, len(logs), -1)

    def sample(self, sample_shape=()) -> Tensor:
        with torch.no_grad():
            return self._steps(None, torch.Size(sample_shape) + self.batch_shape)[0].to(self.state.dtype)

    def log_prob(self, value: Tensor) -> Tensor:
        shape = torch.broadcast_shapes(value.shape[:-1], self.batch_shape)
        tokens, logs = self._steps(value, shape)
        return logs.gather(-1, tokens.unsqueeze(-1)).squeeze(-1).sum(-1)


def advanced(network: nn.Module, output: nn.Linear, before: Tensor | None, state: Tensor) -> tuple[Tensor, Tensor]:
    """The next state ``(..., H)`` and the logits ``(..., V)`` of its token, after a one-hot or relaxed token.

    ``before`` is ``(..., V)``, or None at the start.
    """
    before = state.new_zeros(output.out_features) if before is None else before
    leading = torch.broadcast_shapes(before.shape[:-1], state.shape[:-1])
    rows = [part.expand(*leading, -1).reshape(-1, part.shape[-1]) for part in (before, state)]
    state = network(*rows).reshape(*leading, -1)  # recurrent cells support one leading dimension only
    return state, output(state)


def written(
    sites: Sequence[str], start: nn.Module, network: nn.Module, output: nn.Linear, z: Tensor
) -> dict[str, Tensor]:
    """Sample one-hot tokens ``(..., V)`` at these sites, each given the earlier ones, from latents ``(..., Z)``."""
    state, before, drawn = start(z).tanh(), None, {}
    for site in sites:
        state, logits = advanced(network, output, before, state)
        before = drawn[site] = pyro.sample(site, dist.OneHotCategorical(logits=logits))
    return drawn


@models.register("sequence-vae")
class SequenceVAE(GenerativeModel):
    r"""Normal latents and a recurrent network that generates a sequence token by token.

    .. math:: z \sim N(0, I), \qquad
              x_l \mid x_{<l}, z \sim \mathrm{Categorical}(\mathrm{softmax}\,f(h_l)), \qquad
              h_l = \mathrm{GRU}(x_{l-1}, h_{l-1}), \quad h_0 = g(z)

    Without ``reward`` it is trained by maximum likelihood (its bound). Tokens are integers 0 to ``vocabulary`` − 1 in a
    float tensor; a shorter sequence is padded with a token of its own (0, for example), which is scored like any other.

    With a ``reward`` the same networks are trained by what they generate: x is a given context, and the model weights
    each generated sequence by :math:`e^{f(t, x)}`. f takes one-hot tokens ``(..., B, length, vocabulary)`` and the
    context and returns numbers ``(..., B)``: a function, its import path, or a word of `gumbo.models.rewards`. The
    guide ``token-policy`` has such networks of its own, initially with the model's weights. ``SiteELBO({"z":
    "pathwise", "*": word}, kl_weight=0)`` maximizes :math:`E[f]` over it: ``score`` is REINFORCE, ``score-average``,
    ``nvil`` and ``rloo`` subtract a baseline, ``gumbel-softmax`` relaxes the tokens. A weight α subtracts α times the
    KL from the model, so that a model trained by maximum likelihood, whose state the one with a reward loads, is not
    left far behind; its parameters should then be frozen. ``length`` is the number of tokens, by default that of
    numbers in x.

    Shapes: ``x`` is ``(B, L)``, or ``(B, 1, L)`` for a ``data_shape`` of two sizes; site ``z`` is ``(B, latent_dim)``.
    With a reward x has any shape, and sites ``t1`` ... ``tL`` are one-hot, ``(B, vocabulary)``. Raises BadInput for
    data of another shape, for a ``length`` without a reward, for an f that does not return a number per row and, under
    validation, for NaN or for values that are no tokens.

    Args:
        data_shape: ``(L,)`` or ``(1, L)``; with a reward, the shape of one context.
        vocabulary: V, the number of token types.
        latent_dim: size of site ``z``.
        rnn_hidden: size of the recurrent state.
        hidden: widths of the hidden layers of the guides' encoders.
        activation: activation between layers: ``relu``, ``leaky-relu``, ``elu``, ``silu``, ``softplus`` or ``tanh``.
        reward: f, as a function, its import path, or a word; None trains by maximum likelihood.
        length: L, with a reward; None takes the number of elements of x.
        data_size: number of data in the whole set: terms are scaled by ``data_size / B``; None does not scale.

    Bowman et al. 2016, "Generating sentences from a continuous space", arXiv:1511.06349; Ranzato et al. 2016, "Sequence
    level training with recurrent neural networks", arXiv:1511.06732.

    >>> model = SequenceVAE(data_shape=(6,), vocabulary=5, latent_dim=2, rnn_hidden=8)
    >>> {site: tuple(draws.shape) for site, draws in model.sample_prior(3).items()}
    {'z': (3, 2), 'x': (3, 6)}
    """

    variants = (
        {"vocabulary": 3, "latent_dim": 2, "rnn_hidden": 6, "hidden": (8,)},
        {"vocabulary": 3, "latent_dim": 2, "rnn_hidden": 6, "hidden": (8,), "reward": "counting", "length": 3},
    )

    _unchecked = ("reward",)
    _ranges = {"length": -math.inf}

    def __init__(
        self,
        data_shape: Sequence[int],
        vocabulary: int = 27,
        latent_dim: int = 16,
        rnn_hidden: int = 128,
        hidden: Sequence[int] = (128,),
        activation: str = "relu",
        reward: str | Reward | None = None,
        length: int | None = None,
        data_size: int | None = None,
    ):
        super().__init__(data_shape, data_size)
        if length is not None and (length < 1 or reward is None):
            raise BadInput(f"SequenceVAE: length={length} must be at least 1 and goes with a reward")
        self.vocabulary = vocabulary
        self.latents = {"z": Latent("normal", (latent_dim,))}
        self.reward = None if reward is None else reward_named(reward, "SequenceVAE")
        self.tokens: tuple[str, ...] = ()
        if reward is not None:
            self.x_is_given, self.observed = True, ("reward",)
            self.tokens = tuple(f"t{place}" for place in range(1, (length or self.data_shape.numel()) + 1))
            self.latents |= {site: Latent("categorical", (vocabulary,)) for site in self.tokens}
        self.mirror = {"channels": (), "hidden": tuple(hidden), "activation": activation}
        self.decoder_state = nn.Linear(latent_dim, rnn_hidden)
        self.decoder_rnn = nn.GRUCell(vocabulary, rnn_hidden)
        self.decoder_output = nn.Linear(rnn_hidden, vocabulary)
        self.register_buffer("prior_loc", torch.zeros(latent_dim), persistent=False)
        self.register_buffer("prior_scale", torch.ones(latent_dim), persistent=False)

    def forward(self, x: Tensor | None = None, *, batch_size: int = 1) -> Tensor:
        with self.data_plate(x, batch_size):
            z = pyro.sample("z", dist.Normal(self.prior_loc, self.prior_scale).to_event(1))
            if self.reward is None:
                return pyro.sample("x", self.likelihood(z), obs=x)
            drawn = written(self.tokens, self.decoder_state, self.decoder_rnn, self.decoder_output, z)
            tokens = torch.stack(torch.broadcast_tensors(*drawn.values()), -2)
            reward = reward_of_rows(self.reward, tokens, x, 2, "SequenceVAE")
            pyro.factor("reward", reward)
            return reward

    def likelihood(self, z: Tensor) -> dist.TorchDistribution:
        """p(x | z) for ``z`` of shape ``(..., latent_dim)``, batch shape ``(...)``."""
        state, size = self.decoder_state(z).tanh(), self.data_shape.numel()
        flat = TokenSequence(self.decoder_rnn, self.decoder_output, state, size, self.vocabulary)
        if len(self.data_shape) == 1:
            return flat
        reshape = dist.transforms.ReshapeTransform(torch.Size((size,)), self.data_shape)
        return dist.TransformedDistribution(flat, [reshape])

    def check_values(self, x: Tensor) -> None:
        super().check_values(x)
        if self.reward is not None:
            return
        if found := likelihoods["categorical"].wants(x, num_categories=self.vocabulary):
            raise BadInput(f"SequenceVAE needs {found.partition(':')[0]}: set vocabulary")
