"""The result of `diagnose`: verdicts with a number, a threshold and an advice each."""

from __future__ import annotations

import math
import re
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np

from ...tables import html
from ..posterior import _arviz

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
    by latent, among ``rank_draws`` draws; :meth:`to_arviz` has them in the form that ArviZ's plots take.
    """

    verdicts: tuple[Verdict, ...]
    vi_stats: Any
    skipped: Mapping[str, str] = field(default_factory=dict)
    ranks: Mapping[str, np.ndarray] = field(default_factory=dict)
    rank_draws: int = 0

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

    def to_arviz(self) -> Any:
        """The numbers for ArviZ: ``InferenceData`` with ArviZ 0.x, ``xarray.DataTree`` with 1.x.

        Group ``vi_stats`` has the numbers of each datum. Group ``prior_sbc``, if the calibration was done, has the
        ranks in the form of simuk's: variables ``(chain, draw, …)``, one draw for each simulation, so that ArviZ 1.x's
        ``plot_ecdf_pit(report.to_arviz())`` shows them. ``attrs["rank_draws"]`` is the largest possible rank.
        """
        import xarray

        groups = {"vi_stats": self.vi_stats}
        if self.ranks:
            attrs = {"rank_draws": self.rank_draws}
            groups["prior_sbc"] = xarray.Dataset(_by_site(self.ranks), attrs=attrs)
        return _arviz.make(groups)

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


def _by_site(ranks: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Ranks ``(chain, draw, place)`` by latent, from ranks of coordinates, ``z[0]``, ``z[3]`` or ``z``."""
    import xarray

    found: dict[str, dict[int | None, np.ndarray]] = {}
    for label, values in ranks.items():
        inside = re.fullmatch(r"(.+)\[(\d+)\]", label)
        name, place = (inside[1], int(inside[2])) if inside and inside[1] not in ranks else (label, None)
        found.setdefault(name, {})[place] = values
    made = {}
    for name, parts in found.items():
        dims, coords = ["chain", "draw"], {}
        stacked = np.stack(list(parts.values()), -1)[None]
        if None in parts:
            stacked = stacked[..., 0]
        else:
            dims, coords = [*dims, f"{name}_dim_0"], {f"{name}_dim_0": list(parts)}
        coords |= {dim: np.arange(size) for dim, size in zip(dims[:2], stacked.shape, strict=False)}
        made[name] = xarray.DataArray(stacked, dims=dims, coords=coords)
    return made


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
