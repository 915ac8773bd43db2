"""Hidden Markov models, whose states are summed out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro.ops.indexing import Vindex
from torch import Tensor, nn

from ..errors import UnknownName
from ._base import models
from ._sequences import Padded, SequenceModel, silent_where_masked

KINDS = ("plain", "autoregressive", "factorial", "partially-factorial")


@models.register("hidden-markov-model")
class HiddenMarkovModel(SequenceModel):
    r"""A chain of discrete states under a sequence of binary vectors, such as chords; its likelihood is exact.

    .. math:: z_t \mid z_{t-1} \sim \mathrm{Categorical}(\mathrm{softmax}\,A_{z_{t-1}}), \qquad
              x_t \mid z_t \sim \prod_i \mathrm{Bernoulli}(x_{ti}; \sigma(E_{z_t i})), \qquad t = 1 \dots T

    Guides do not draw the states: the model marks them for enumeration, and with the guide ``none`` every ELBO,
    `SiteELBO` among them, sums them out in time linear in T and is log p(x), for maximum likelihood without
    Baum–Welch. ``kind="autoregressive"`` adds weights of x_{t−1} to the emission's logits; ``kind="factorial"`` has two
    independent chains of ``num_states`` states each, and a table of emissions for each pair of states; with
    ``kind="partially-factorial"`` w_t decides by which table z_t follows z_{t−1}. These are models 1 to 4 of Pyro's
    example. With another ``likelihood``, a word of `gumbo.models.likelihoods`, the tables hold its parameters, such as
    log rates of counts.

    Sequences of different lengths are padded with zeros: ``mask`` has ones for the valid steps, and a masked step has
    zeros as data. Called as ``model(x, mask=mask)``. Shapes: ``x`` is ``(B, T, D)`` or ``(B, 1, T, D)``,
    ``mask`` ``(B, T)``; sites ``z1`` ... ``zT`` (and ``w1`` ...) are integers ``(B,)``, sites ``x1`` ... ``xT``
    ``(B, D)``. ``inputs(x, lengths)`` makes the mask; ``per_step(values, mask)`` turns nats per sequence into nats per
    step.

    Args:
        data_shape: ``(T, D)`` or ``(1, T, D)``.
        num_states: number of states of a chain.
        kind: ``plain``, ``autoregressive``, ``factorial`` or ``partially-factorial``.
        likelihood: p(x | output), a word of `gumbo.models.likelihoods`.
        likelihood_options: options of the likelihood, by name; None takes its defaults.
        data_size: number of data in the whole set: terms are scaled by ``data_size / B``; None does not scale.

    Rabiner 1989, "A tutorial on hidden Markov models"; Ghahramani & Jordan 1997 for the factorial kinds.

    >>> from gumbo.guides import NoGuide
    >>> from gumbo.inference import SiteELBO
    >>> model = HiddenMarkovModel(data_shape=(6, 4), num_states=3)
    >>> given = model.example(5)
    >>> SiteELBO()(model, NoGuide(model))(**given).item() > 0  # minus log p(x), exactly
    True
    """

    variants = (
        {"num_states": 3},
        {"num_states": 3, "kind": "autoregressive"},
        {"num_states": 3, "kind": "factorial"},
        {"num_states": 3, "kind": "partially-factorial"},
    )

    def __init__(
        self,
        data_shape: Sequence[int],
        num_states: int = 16,
        kind: str = "plain",
        likelihood: str = "bernoulli",
        likelihood_options: Mapping[str, Any] | None = None,
        data_size: int | None = None,
    ):
        super().__init__(data_shape, data_size)
        if kind not in KINDS:
            raise UnknownName("kind of hidden Markov model", kind, KINDS)
        self.kind = kind
        self.latents = {}
        chains = ("w", "z") if "factorial" in kind else ("z",)
        self.upstream = {"z": ("w",)} if kind == "partially-factorial" else {}
        self.summed = tuple(f"{chain}{t}" for t in range(1, self.steps + 1) for chain in chains)
        self.observed = tuple(f"x{t}" for t in range(1, self.steps + 1))
        tables = {chain: (num_states,) * len(self.upstream.get(chain, ())) for chain in chains}
        self.decoder_initial = nn.ParameterDict(
            {chain: nn.Parameter(torch.zeros(*table, num_states)) for chain, table in tables.items()}
        )
        # Initially states tend to persist, and emissions differ, which breaks the symmetry between states.
        self.decoder_transition = nn.ParameterDict(
            {chain: nn.Parameter(torch.eye(num_states).repeat(*table, 1, 1)) for chain, table in tables.items()}
        )
        pairs = (num_states,) * len(chains)
        outputs = self.observe_by(likelihood, likelihood_options, (self.width,))
        self.decoder_emission = nn.Parameter(torch.randn(*pairs, outputs) - float(self.binary_data))
        self.decoder_previous = nn.Parameter(torch.zeros(self.width, outputs)) if kind == "autoregressive" else None

    def forward(self, x: Tensor | None = None, *, mask: Tensor | None = None, batch_size: int = 1) -> Tensor:
        with self.data_plate(x, batch_size):
            mask = self.checked_mask(mask, x, batch_size)
            rows = None if x is None else x.flatten(1, -2)
            states: dict[str, Tensor] = {}
            drawn: list[Tensor] = []
            for t in pyro.markov(range(1, self.steps + 1)):
                for chain, logits in (self.decoder_transition if states else self.decoder_initial).items():
                    given = [states[one] for one in (*self.upstream.get(chain, ()), *([chain] if t > 1 else []))]
                    fn = dist.Categorical(logits=Vindex(logits)[tuple(given)] if given else logits)
                    states[chain] = pyro.sample(f"{chain}{t}", fn, infer={"enumerate": "parallel"})
                seen = None if rows is None else rows[:, t - 1]
                fn = self.emission(states, mask[:, t - 1], drawn[-1] if drawn else None)
                drawn.append(pyro.sample(f"x{t}", fn, obs=seen))
        return torch.stack(drawn, -2).unflatten(-2, self.data_shape[:-1])

    def emission(self, states: Mapping[str, Tensor], mask: Tensor, before: Tensor | None) -> dist.TorchDistribution:
        """p(x_t) at states ``(...)`` of each chain, batch shape ``(...)``, and the previous x, if any."""
        logits = Vindex(self.decoder_emission)[tuple(states.values())]
        if self.decoder_previous is not None and before is not None:
            logits = logits + before @ self.decoder_previous
        if self.binary_data:
            return dist.Bernoulli(logits=silent_where_masked(logits, mask)).to_event(1)
        return Padded(self.observation(logits), mask > 0)
