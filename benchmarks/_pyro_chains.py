"""Hidden Markov models as Pyro's example of them is written, at the parameters of a model of the collection.

Pyro's models 1 to 4 are the kinds ``plain``, ``autoregressive``, ``factorial`` and ``partially-factorial`` here; its
model 0 is the first without a plate of sequences, a loop over them. Sequences and tones are plates, a masked step is
masked by a handler, and states are indices that broadcast against the tones.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.ops.indexing import Vindex
from torch import Tensor

from gumbo.models import HiddenMarkovModel


def chains(model: HiddenMarkovModel, plate: bool = True) -> Callable[..., None]:
    """A program ``(x, mask)`` with the law of ``model``; without ``plate`` it runs sequence by sequence (model 0)."""
    first, moves = model.decoder_initial, model.decoder_transition

    def law(chain: str, before: Mapping[str, Tensor], now: Mapping[str, Tensor]) -> dist.Categorical:
        upstream = (now["w"],) if chain == "z" and model.kind == "partially-factorial" else ()
        table, index = (moves, (*upstream, before[chain])) if before else (first, upstream)
        logits = table[chain]
        return dist.Categorical(logits=Vindex(logits)[index] if index else logits)

    def sequence(rows: Tensor, mask: Tensor, name: str = "") -> None:
        """Rows ``(..., T, D)`` under the plates in force."""
        before: dict[str, Tensor] = {}
        for t in pyro.markov(range(rows.shape[-2])):
            now: dict[str, Tensor] = {}
            with poutine.mask(mask=(mask[..., t] > 0).unsqueeze(-1)):
                for chain in first:
                    fn = law(chain, before, now)
                    now[chain] = pyro.sample(f"{chain}{name}_{t}", fn, infer={"enumerate": "parallel"})
                with pyro.plate(f"tones{name}_{t}", rows.shape[-1], dim=-1) as tones:
                    logits = Vindex(model.decoder_emission)[(*now.values(), tones)]
                    if model.decoder_previous is not None and t:
                        logits = logits + rows[..., t - 1, :] @ model.decoder_previous
                    pyro.sample(f"y{name}_{t}", dist.Bernoulli(logits=logits), obs=rows[..., t, :])
            before = now

    def program(x: Tensor, mask: Tensor) -> None:
        rows = x.reshape(len(x), model.steps, model.width)
        if plate:
            with pyro.plate("sequences", len(x), dim=-2):
                sequence(rows, mask)
        else:
            for number in pyro.plate("sequences", len(x)):
                length = int(mask[number].sum())
                sequence(rows[number, :length], torch.ones(length), f"_{number}")

    return program
