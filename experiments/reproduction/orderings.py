"""Orderings of the arms of a trained table, at equal steps and at equal time, beside the published ordering."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

LEAST_SEEDS = 3
LEVEL = 0.05  # probability of a difference this large between equal arms

Runs = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Difference:
    """How far one arm ends above another, in nats, with its standard error; ``sure`` if seeds do not explain it."""

    mean: float
    error: float
    sure: bool

    def __str__(self) -> str:
        return f"{self.mean:+.2f} ± {self.error:.2f}"


@dataclass(frozen=True)
class Ordering:
    """Two arms of one group; differences are ``one`` minus ``other``, so that ``one`` is ahead where they are negative.

    Attributes:
        one, other: names of cells.
        published: the papers' difference, None where a paper lacks one of the two.
        steps: the difference of what is reported, after equal steps; None after unequal ones.
        time: the difference of the curves at the seconds of the faster arm; None where these show different bounds.
    """

    one: str
    other: str
    published: float | None
    steps: Difference | None
    time: Difference | None

    def verdict(self, ours: Difference | None) -> str:
        """Confirmed or contradicted if the difference exceeds the spread over seeds, otherwise undecided."""
        if ours is None:
            return "not comparable"
        if not ours.sure:
            return "undecided"
        if not self.published:
            return f"{(self.one if ours.mean < 0 else self.other).split('/')[-1]} ahead"
        return "confirmed" if ours.mean * self.published > 0 else "contradicted"


def orderings(found: Runs) -> list[Ordering]:
    """Every pair of arms of a group (the part of a cell's name before the slash) with three seeds or more each."""
    arms = by_cell(found)
    pairs = [pair for pair in combinations(arms, 2) if group(pair[0]) == group(pair[1])]
    return [
        between(one, arms[one], other, arms[other])
        for one, other in pairs
        if min(len(arms[one]), len(arms[other])) >= LEAST_SEEDS
    ]


def by_cell(found: Runs) -> dict[str, list[Mapping[str, Any]]]:
    arms: dict[str, list[Mapping[str, Any]]] = {}
    for numbers in found:
        arms.setdefault(numbers["cell"]["name"], []).append(numbers)
    return arms


def group(name: str) -> str:
    return name.split("/")[0]


def between(one: str, ours: Runs, other: str, theirs: Runs) -> Ordering:
    published = [runs[0]["cell"]["published"] for runs in (ours, theirs)]
    known = None if None in published else published[0] - published[1]
    equal = len({run["steps"] for run in (*ours, *theirs)}) == 1
    steps = difference([r["value"] for r in ours], [r["value"] for r in theirs]) if equal else None
    return Ordering(one, other, known, steps, at_equal_time(ours, theirs))


def difference(ours: Sequence[float], theirs: Sequence[float]) -> Difference:
    """The difference of two means by Welch's test, which allows unequal variances.

    >>> difference([1.0, 1.1, 0.9], [2.0, 2.1, 1.9]).sure, difference([1.0, 3.0, 2.0], [2.0, 2.1, 1.9]).sure
    (True, False)
    """
    from scipy import stats

    parts = []
    means = []
    for values in (ours, theirs):
        mean = sum(values) / len(values)
        means.append(mean)
        parts.append(sum((value - mean) ** 2 for value in values) / (len(values) - 1) / len(values))
    mean, variance = means[0] - means[1], sum(parts)
    if variance == 0:
        return Difference(mean, 0.0, mean != 0)
    freedom = variance**2 / sum(p**2 / (len(v) - 1) for p, v in zip(parts, (ours, theirs), strict=True))
    chance = 2 * stats.t.sf(abs(mean) / math.sqrt(variance), freedom)
    return Difference(mean, math.sqrt(variance), bool(chance < LEVEL))


def at_equal_time(ours: Runs, theirs: Runs) -> Difference | None:
    """The difference of the curves at the time when the first run of either arm ends."""
    of = what_curves_show([*ours, *theirs])
    if of is None:
        return None
    ends = [seconds_of(run)[-1] for run in (*ours, *theirs)]
    return difference(*([height_at(run, of, min(ends)) for run in runs] for runs in (ours, theirs)))


def what_curves_show(runs: Runs) -> str | None:
    """``valid`` if every curve has it, ``train`` if all show the same bound, otherwise None."""
    if not all(run.get("curve") for run in runs):
        return None
    if all("valid" in point for run in runs for point in run["curve"]):
        return "valid"
    bounds = {(run["cell"]["objective"], draws_of_bound(run["cell"]), is_relaxed(run["cell"])) for run in runs}
    return "train" if len(bounds) == 1 and not bounds.pop()[2] else None


def draws_of_bound(cell: Mapping[str, Any]) -> int:
    """The number of draws of the bound that the cell trains."""
    return 1 if cell["objective"] == "elbo" else cell["particles"] or 1


def is_relaxed(cell: Mapping[str, Any]) -> bool:
    """Whether the training objective of a cell is the bound of a relaxed model."""
    from gumbo.inference.engine.resolution import as_estimator

    return as_estimator(cell["estimator"]).objective_name() != "elbo"


def seconds_of(run: Mapping[str, Any]) -> list[float]:
    """Seconds of training at each point of the curve; from the mean time of a step if the points lack them."""
    return [point.get("seconds", point["step"] * run["ms_per_step"] / 1000) for point in run["curve"]]


def height_at(run: Mapping[str, Any], of: str, seconds: float) -> float:
    """The curve at a time, linear between its points, with the tables' sign: smaller is better."""
    import numpy as np

    return float(np.interp(seconds, seconds_of(run), [-point[of] for point in run["curve"]]))


HEADS = ["pair", "published", "ours, equal steps", "verdict", "ours, equal time", "verdict"]


def rows(found: Runs) -> list[list[str]]:
    """The orderings as rows under ``HEADS``."""
    return [
        [
            f"{one.one} − {one.other.split('/', 1)[-1]}",
            "" if one.published is None else f"{one.published:+.2f}",
            *(text for ours in (one.steps, one.time) for text in (str(ours or ""), one.verdict(ours))),
        ]
        for one in orderings(found)
    ]


def totals(found: Runs) -> list[str]:
    """How many published orderings are confirmed, and which arms have too few seeds."""
    known = [one for one in orderings(found) if one.published]
    said = []
    for title, kind in (("equal steps", "steps"), ("equal time", "time")):
        words = [one.verdict(getattr(one, kind)) for one in known]
        if words:
            counts = ", ".join(f"{words.count(word)} {word}" for word in sorted(set(words)))
            said.append(f"Published orderings at {title}, {len(known)} pair{'s' * (len(known) > 1)}: {counts}.")
    few: dict[int, list[str]] = {}
    for name, runs in by_cell(found).items():
        if len(runs) < LEAST_SEEDS:
            few.setdefault(len(runs), []).append(name)
    for seeds, names in sorted(few.items()):
        said.append(f"{'One seed' if seeds == 1 else f'{seeds} seeds'} only, not ordered: {', '.join(names)}.")
    return said


def conclude(found: Runs) -> list[str]:
    """The totals, and every pair with both numbers."""
    said = [
        f"{one.one} against {one.other.split('/', 1)[-1]}: "
        f"{'not published' if one.published is None else f'published {one.published:+.2f}'}; "
        f"ours {one.steps or 'after unequal steps'}, {one.verdict(one.steps)} at equal steps; "
        f"{one.time or 'curves'}, {one.verdict(one.time)} at equal time."
        for one in orderings(found)
    ]
    return [*totals(found), *said]
