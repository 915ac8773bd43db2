"""Whether the reference of an audit stands: pathwise gradients miss the steps of a cost, and say nothing of it."""

from __future__ import annotations

from dataclasses import replace

from .bias import adjusted, compare
from .moments import Moments
from .reference import Reference
from .rows import Row


def are_doubted(truth: Reference, rows: list[Row], alpha: float) -> bool:
    """Whether an estimator that takes no path where the reference does, and is declared unbiased, differs from it."""
    for row in rows if truth.paths else ():
        binding = None if row.draws is None else row.draws.binding
        if not row.judged or not row.unbiased or binding is None:
            continue
        chosen = [binding.chosen[name] for name in truth.paths if name in binding.chosen]
        if any(estimator.log_q == "value" for estimator in chosen) and _differs(row.moments, truth, alpha):
            return True
    return False


def _differs(moments: Moments | None, truth: Reference, alpha: float) -> bool:
    tests = {name: found.p_value for name, found in compare(moments, truth).items() if len(found.p_value)}
    return any(bool((p < alpha).any()) for p in adjusted(tests).values())


def confirmed(truth: Reference, other: Reference | None, alpha: float) -> Reference:
    """The reference of paths, or the one without them where both differ: a cost that steps has no such path."""
    if other is None or not _differs(other.moments, truth, alpha):
        return truth
    return replace(other, kind=f"{other.kind}, from which pathwise gradients differ: the programs step in a draw")
