"""Auxiliary draws of a guide that the latents do not determine: log q has terms to which log p has no counterpart."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

import pyro.distributions as dist
from pyro.poutine.util import site_is_subsample
from torch import Tensor
from torch.distributions import biject_to

from ...errors import PROGRAM_ERRORS, GumboWarning
from ..estimators._distributions import elementary, is_discrete
from .programs import is_settled
from .records import Run

REMEDY = (
    "the latents do not determine it, and the model has no term for it, so that log q(auxiliary | latents) stays in"
    " log p − log q; draw it in the model too, from any law given the latents (Ranganath et al. 2016,"
    " arXiv:1511.02386)"
)


def undetermined(guide: Mapping[str, Any], model: Mapping[str, Any]) -> list[str]:
    """The auxiliary sites of a guide, by name, of which some are no function of the latents.

    Autoguides compute their latents from auxiliary draws of the same number of dimensions, and then log q is that of
    the latents. A guide with a ``pyro.factor`` may correct its density itself, and is left alone.

    Args:
        guide: its statements by name, as Pyro's messages.
        model: the model's.
    """
    sites = {name: msg for name, msg in guide.items() if msg["type"] == "sample" and not site_is_subsample(msg)}
    if any(isinstance(elementary(msg["fn"]), dist.Unit) for msg in sites.values()):
        return []
    drawn = {name: msg for name, msg in sites.items() if not (msg["is_observed"] or is_settled(msg))}
    beside = {name: msg for name, msg in drawn.items() if name not in model}
    computed = [model[name]["fn"] for name, msg in sites.items() if is_settled(msg) and name in model]
    values = [msg["value"] for name, msg in sites.items() if is_settled(msg) and name in model]
    found = []
    if not any(is_discrete(fn) for fn in computed):
        found += [name for name, msg in beside.items() if is_discrete(msg["fn"])]
    smooth = {name: msg for name, msg in beside.items() if not is_discrete(msg["fn"])}
    numbers = sum(_free(msg["fn"], msg["value"]) for msg in smooth.values())
    if numbers > sum(map(_free, computed, values)):
        found += list(smooth)
    return found


def warn_of_undetermined_draws(seen: Run) -> None:
    """Warn of auxiliary draws that the latents do not determine, under which log p − log q is no bound."""
    names = undetermined(seen.statements, seen.model_statements)
    if names:
        warnings.warn(
            f"the guide's site {names[0]!r}: {REMEDY}; until then the objective is no bound, and training raises the"
            " entropy of such draws without end",
            GumboWarning,
            stacklevel=2,
        )


def _free(fn: Any, value: Tensor) -> int:
    """The number of dimensions in which a value can move."""
    with suppress(*PROGRAM_ERRORS):
        return biject_to(fn.support).inv(value).numel()
    return value.numel()
