"""The result of `diagnose`: verdicts with a number, a threshold and an advice each."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np

from ...tables import html

OK: Literal["ok"] = "ok"
ALARM: Literal["alarm"] = "alarm"
CANNOT_SAY: Literal["cannot say"] = "cannot say"
Word = Literal["ok", "alarm", "cannot say"]
_SEVERITY = {OK: 0, CANNOT_SAY: 1, ALARM: 2}
_COLUMNS = 79


@dataclass(frozen=True)
class Verdict:
    """The result of one diagnostic.

    ``verdict`` is ``"ok"``, ``"alarm"``, or ``"cannot say"`` if there is too little evidence. ``text`` has the number,
    its threshold and the paper; ``advice`` says what to do next, and after "cannot say" what would give a verdict.
    """

    name: str
    verdict: Word
    text: str
    value: float = math.nan
    threshold: float = math.nan
    advice: str = ""

    @property
    def fired(self) -> bool:
        """Whether this is an alarm."""
        return self.verdict == ALARM

    def __str__(self) -> str:
        head = {OK: "ok    ", ALARM: "ALARM ", CANNOT_SAY: "cannot say "}[self.verdict]
        lines = _wrapped(f"{head}{self.name}: {self.text}", "      ")
        return "\n".join(lines + (_wrapped(f"      Next: {self.advice}", "      ") if self.advice else []))


@dataclass(frozen=True, repr=False)
class Report:
    """The result of :func:`~gumbo.inference.diagnose`. Printed, it fits in 80 columns.

    ``ok`` is False when any verdict is an alarm; ``alarms`` names these, ``cannot_say`` those with too little evidence,
    which do not support the guide. ``report["width"]`` is one verdict. ``vi_stats`` is an ``xarray.Dataset`` of the
    numbers; ``skipped`` names the diagnostics that were not run, with reasons; ``ranks`` are those of the calibration,
    by latent.
    """

    verdicts: tuple[Verdict, ...]
    vi_stats: Any
    skipped: Mapping[str, str] = field(default_factory=dict)
    ranks: Mapping[str, np.ndarray] = field(default_factory=dict)

    @property
    def alarms(self) -> list[str]:
        return [verdict.name for verdict in self.verdicts if verdict.verdict == ALARM]

    @property
    def cannot_say(self) -> list[str]:
        return [verdict.name for verdict in self.verdicts if verdict.verdict == CANNOT_SAY]

    @property
    def ok(self) -> bool:
        return not self.alarms

    def __getitem__(self, name: str) -> Verdict:
        return {verdict.name: verdict for verdict in self.verdicts}[name]

    @property
    def summary(self) -> str:
        """Which verdicts are alarms, and which cannot say, in a line."""
        head = "no alarm" if self.ok else f"{len(self.alarms)} alarm(s): {', '.join(self.alarms)}"
        if self.cannot_say:
            head += f"; {len(self.cannot_say)} cannot say: {', '.join(self.cannot_say)}"
        return head

    def _not_judged(self) -> dict[str, str]:
        judged = {one.name for one in self.verdicts}
        return {name: f"not done, {reason}" for name, reason in self.skipped.items() if name not in judged}

    def __str__(self) -> str:
        lines = [*_wrapped(self.summary, "      "), *map(str, self.verdicts)]
        for name, text in self._not_judged().items():
            lines += _wrapped(f"--    {name}: {text}", "      ")
        return "\n".join(lines)

    __repr__ = __str__

    def _repr_html_(self) -> str:
        """The verdicts as a table, for notebooks."""
        rows = [[one.name, one.verdict, one.text, one.advice] for one in self.verdicts]
        rows += [[name, "--", text, ""] for name, text in self._not_judged().items()]
        return html(["diagnostic", "verdict", "what was found", "next"], rows, above=[self.summary])


def not_done(name: str, reason: str, advice: str) -> Verdict:
    """The verdict of a diagnostic that was not run."""
    return Verdict(name, CANNOT_SAY, f"not done, {reason}", advice=advice)


def three_way(alarm: bool, known: bool) -> Word:
    """Alarm if ``alarm``; ok only with sufficient evidence; otherwise cannot say."""
    return ALARM if alarm else OK if known else CANNOT_SAY


def merged(verdicts: Sequence[Verdict]) -> dict[str, Verdict]:
    """One verdict per name: the texts for data and for global latents are joined, the worse one first."""
    found: dict[str, Verdict] = {}
    for one in verdicts:
        if one.name not in found:
            found[one.name] = one
            continue
        other = found[one.name]
        leading = one if _SEVERITY[one.verdict] > _SEVERITY[other.verdict] else other
        found[one.name] = replace(leading, text=f"{other.text}. {one.text}")
    return found


def _wrapped(text: str, indent: str) -> list[str]:
    return textwrap.wrap(text, _COLUMNS, subsequent_indent=indent, break_on_hyphens=False)
