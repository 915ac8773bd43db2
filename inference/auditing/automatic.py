"""``"auto"``: selects the estimator of each site by pilot runs that measure variance × cost on the first batches."""

from __future__ import annotations

import math
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from pyro import poutine
from torch import Tensor

from ...errors import BadInput, UnsupportedSite
from ...options import check_seed
from ...tables import digits, markdown
from ..elbo import SiteELBO
from ..estimators import Estimator, estimators
from ..estimators._base import Chooser, choosers
from .sampler import Draws, Stage, set_aside

COSTS = ("evaluations", "time")
ALL, AS_CHOSEN = "(all)", "as chosen"  # last comparison: one word for all sites against one per site
RIVALS = 3  # words of a site that the last comparison tries again
ROUND = 5  # the first round takes a fifth of the draws
KEPT = 3.0  # candidates within this factor of the best of the first round continue
FEWEST = 8  # draws of the most expensive candidate
RUNS_PER_DRAW = 4  # the most model runs of a candidate per draw of the budget
BURN_IN = 20  # steps for baselines and control variates to adapt


@dataclass
class Measured:
    """A candidate at a site: variance and squared bias of the gradient (nats²), cost of a step, and the score."""

    site: str
    word: str
    variance: float = math.nan
    squared_bias: float = 0.0
    evaluations: float = math.nan
    seconds: float = math.nan
    score: float = math.nan
    draws: int = 0
    note: str = ""
    chosen: bool = False


@dataclass
class Choice:
    """The result of a pilot: a word for each site, and the measurements; ``step`` counts earlier training steps."""

    words: dict[str, str]
    rows: list[Measured] = field(default_factory=list)
    settings: dict[str, Any] = field(default_factory=dict)
    step: int = 0
    note: str = ""

    def __str__(self) -> str:
        # Candidates with numbers, best first; refused ones are named below the table.
        order = {site: i for i, site in enumerate([*self.words, ALL])}
        measured = sorted((r for r in self.rows if r.score == r.score), key=lambda r: (order[r.site], r.score))
        table = markdown(
            ["site", "estimator", "variance", "bias²", "model runs", "score", "draws", ""],
            [
                [
                    row.site,
                    row.word,
                    digits(row.variance),
                    digits(row.squared_bias),
                    digits(row.evaluations),
                    digits(row.score),
                    str(row.draws),
                    "chosen" if row.chosen else "",
                ]
                for row in measured
            ],
        )
        chosen = ", ".join(f"{site}: {word}" for site, word in self.words.items())
        cost = "model runs" if self.settings.get("cost") != "time" else "seconds"
        said = f"auto chose {chosen} (score: variance × {cost} of a step)"
        return "\n".join([said, *table, *([self.note] if self.note else [])])

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for the run folder."""
        return asdict(self)

    @classmethod
    def from_dict(cls, found: Mapping[str, Any]) -> Choice:
        """The selection stored in a run folder."""
        return cls(**{**found, "rows": [Measured(**row) for row in found.get("rows", [])]})


class Auto(Chooser):
    """Select for each site the word with the smallest variance × cost, measured by a pilot before training.

    Sites are processed in the guide's order. Each candidate (every registered word that supports the site under the
    objective) gives gradients of the whole program, with the other sites' current words; the candidate with the
    smallest variance of the guide's gradient × cost of a step is selected. A last comparison tries one word for all
    sites, and the nearest rivals at the sites that were selected before others. A first round with a fifth of the draws
    keeps the candidates within a factor of 3 of the best. Parameters, baselines and random state are restored; control
    variates adapt for 20 steps. The same seed gives the same selection if costs are counted and the time limit is not
    reached.

    Args:
        allow_biased: admit biased words; their squared bias (against the mean of the best unbiased word, minus the
            sampling error) is added to the variance.
        cost: ``"evaluations"`` counts model runs; ``"time"`` measures seconds, which vary between runs.
        draws: gradients per candidate; fewer for one that needs more than ``4 × draws`` model runs.
        seconds: processor time after which no further candidate is measured; the table names those left out.
        batches: the number of first batches of ``fit`` to use; elsewhere the first call's batch is used.
        again: training steps, in increasing order, before which ``fit`` repeats the selection; a change is recorded
            and printed.
        max_evaluations: candidates with more model runs per step are left out, and named.
        candidates: the words to compare; None takes all registered ones.
        seed: of the pilot's draws.
        quiet: do not print the table to standard error.

    >>> from gumbo.guides import BernoulliGuide
    >>> from gumbo.models import BernoulliVAE
    >>> model = BernoulliVAE((1, 2, 2), num_latents=2, hidden=(4,))
    >>> x = torch.ones(3, 1, 2, 2)
    >>> elbo = SiteELBO(Auto(draws=20, candidates=["score", "rloo", "enumerate"], quiet=True))
    >>> elbo.loss(model, BernoulliGuide(model, hidden=(4,)), x) > 0, elbo.choice.words
    (True, {'z': 'enumerate'})
    """

    def __init__(
        self,
        allow_biased: bool = False,
        cost: str = "evaluations",
        draws: int = 100,
        seconds: float = 120.0,
        batches: int = 2,
        again: Sequence[int] = (),
        max_evaluations: int = 1024,
        candidates: Sequence[str] | None = None,
        seed: int = 0,
        quiet: bool = False,
    ):
        if cost not in COSTS:
            raise BadInput(f"Auto: cost is {cost!r}: expected 'evaluations' or 'time'")
        if draws < FEWEST:
            raise BadInput(f"Auto: draws is {draws}: expected at least {FEWEST}")
        if list(again) != sorted(set(again)):
            raise BadInput(f"Auto: again is {list(again)}: expected steps in rising order")
        check_seed(seed)
        for word in candidates or ():
            estimators[word]  # raises UnknownName
        self.allow_biased, self.cost, self.draws, self.seconds = allow_biased, cost, draws, float(seconds)
        self.batches, self.again, self.max_evaluations = batches, tuple(again), max_evaluations
        self.candidates = None if candidates is None else tuple(candidates)
        self.seed, self.quiet = seed, quiet

    _ranges = {"seed": -math.inf}

    @property
    def unbiased(self) -> bool:  # type: ignore[override]
        return not self.allow_biased

    def choose(
        self, loss: SiteELBO, model: Callable, guide: Callable, batches: Iterable[tuple[tuple, Mapping[str, Any]]]
    ) -> Choice:
        with set_aside(model, guide, self.seed):
            return _Pilot(self, loss, model, guide, list(batches)).choose()

    def recall(self, found: Mapping[str, Any]) -> Choice:
        return Choice.from_dict(found)

    def announce(self, choice: Choice) -> None:
        if not self.quiet:
            print(choice, file=sys.stderr)


choosers["auto"] = Auto


class _Contestant:
    """A candidate at a site, with its gradients on every batch."""

    def __init__(self, row: Measured, stages: list[Stage], loss: Callable[[], SiteELBO]):
        self.row, self.names = row, _guides(stages[0])
        self.draws = [Draws(stage, loss()) for stage in stages]
        self.took: list[float] = []
        self.sums = [[torch.zeros(()), torch.zeros(()), 0] for _ in stages]  # mean, sum of squares about it, count

    def settle(self) -> None:
        for draws in self.draws:
            for _ in range(BURN_IN if draws.has_state else 1):
                draws.draw()
        runs = [draws.evaluations() for draws in self.draws]
        self.row.evaluations = statistics.mean(runs)
        for draws in self.draws:
            draws.freeze()

    def draw(self, count: int, deadline: float) -> None:
        """Draw until there are ``count`` gradients, spread over the batches, or the time limit is reached."""
        few = FEWEST * len(self.draws)
        while self.row.draws < count and (self.row.draws < few or time.process_time() < deadline):
            place = self.row.draws % len(self.draws)
            gradient, _, seconds = self.draws[place].draw()
            flat = torch.cat([gradient[name] for name in self.names]).cpu()
            if not flat.isfinite().all():
                self.row.note, self.row.score = "refused: a gradient is not finite", math.nan
                return
            mean, square, seen = self.sums[place]
            step = flat - mean
            mean = mean + step / (seen + 1)
            self.sums[place] = [mean, square + (step * (flat - mean)).sum(), seen + 1]
            self.row.draws += 1
            self.took.append(seconds)
        parts = [(float(square) / (seen - 1), seen) for _, square, seen in self.sums if seen > 1]
        if parts:
            self.row.variance = _still(statistics.mean(part for part, _ in parts), self.mean())
            self.row.seconds = statistics.median(self.took)

    def mean(self) -> Tensor:
        """The mean gradient over the batches."""
        return torch.stack([mean for mean, _, seen in self.sums if seen]).mean(0)

    def error(self) -> float:
        """The expected squared distance of :meth:`mean` from the gradient's own mean."""
        parts = [float(square) / (seen - 1) / seen for _, square, seen in self.sums if seen > 1]
        return sum(parts) / max(len(parts), 1) ** 2


def _still(variance: float, mean: Tensor) -> float:
    """The variance, or 0 if it is rounding error."""
    return 0.0 if variance <= 1e-10 * float(mean.square().sum()) else variance


def _guides(stage: Stage) -> list[str]:
    """The guide's parameters, where estimators differ; all parameters if the guide has none."""
    own = [name for name in stage.parameters if name.startswith("guide.")]
    return own or list(stage.parameters)


class _Pilot:
    def __init__(self, auto: Auto, loss: SiteELBO, model: Callable, guide: Callable, batches: list):
        self.auto, self.loss, self.began = auto, loss, time.process_time()
        self.stages = [Stage(model, guide, args, kwargs, loss.requested_nesting) for args, kwargs in batches]
        self.rows: list[Measured] = []
        self.left_out: list[str] = []

    @property
    def deadline(self) -> float:
        return self.began + self.auto.seconds

    def choose(self) -> Choice:
        sites = self._sites()
        first = {name: self._first(name) for name in sites}
        words = dict(first)
        for name in sites:
            words[name] = self._best(name, words)
        if len(sites) > 1:
            words = self._together(words, first)
        note = f"left out, as {self.auto.seconds:g} s were over: {', '.join(self.left_out)}" if self.left_out else ""
        settings = {"cost": self.auto.cost, "draws": self.auto.draws, "seconds": self.auto.seconds}
        settings |= {"seed": self.auto.seed, "allow_biased": self.auto.allow_biased}
        return Choice(words, self.rows, settings, note=note)

    def _sites(self) -> list[str]:
        """The sites that ask for a selection, in the guide's order."""
        stage, loss = self.stages[0], self.loss
        with stage.held(), torch.no_grad():
            nodes = poutine.trace(stage.guide).get_trace(*stage.args, **stage.kwargs).nodes
        found = []
        for name in stage.latents:
            own = loss.given.get(name)
            infer = nodes[name]["infer"] if name in nodes else {}
            marked = any(infer.get(mark) for mark in ("estimator", "enumerate", "baseline"))
            if isinstance(own, Chooser) or (own is None and not marked and isinstance(loss.otherwise, Chooser)):
                found.append(name)
        return found

    def _candidates(self, name: str) -> dict[str, Estimator]:
        """The words that support a site under the objective, by their own declarations."""
        site = {"name": name, "fn": self.stages[0].latents[name], "infer": {}, "is_observed": False}
        particles = self.loss.requested_particles
        found = {}
        for word in self.auto.candidates or estimators:
            estimator = estimators[word]()
            biased = not estimator.unbiased or estimator.objective_name() != "elbo"
            fits = particles is None or estimator.min_particles <= particles
            if (
                self.loss.target.accepts(estimator)
                and not (self.auto.again and estimator.lazy_parameters)  # the networks would change in mid-run
                and estimator.supports(site)
                and not estimator.together
                and fits
                and (self.auto.allow_biased or not biased)
            ):
                found[word] = estimator
        if not any(e.unbiased and e.objective_name() == "elbo" for e in found.values()):
            raise UnsupportedSite(name, "auto", "no unbiased estimator among the candidates serves it")
        return found

    def _first(self, name: str) -> str:
        """The word of a site before its own selection."""
        found = self._candidates(name)
        return next((word for word in ("pathwise", "rloo", "score") if word in found), next(iter(found)))

    def _listed(self, name: str, word: str) -> int:
        """The number of values of a site that this word enumerates."""
        stage = self.stages[0]
        fn = stage.latents[name]
        joint = 0 if stage.at_once(self.loss.requested_vectorized) else len(fn.batch_shape)
        values = estimators[word]().listed(fn, joint, name)
        return self.auto.max_evaluations + 1 if isinstance(values, str) else len(values)

    def _best(self, name: str, words: dict[str, str]) -> str:
        """The best word at one site, with the other sites' words fixed."""
        # Enumeration comes first: without variance, no other candidate can be better.
        known = sorted(self._candidates(name).items(), key=lambda item: not item[1].enumerates)
        return self._contest([(Measured(name, word), {**words, name: word}) for word, _ in known]).word

    def _together(self, words: dict[str, str], before: Mapping[str, str]) -> dict[str, str]:
        """These words, or what is better with all sites in view: site-by-site selection may miss it.

        Compared are one word for all sites, and at a site that was selected beside other words than these the words
        that came next, and enumeration.
        """
        known = {name: self._candidates(name) for name in words}
        ranked = {
            name: [r.word for r in sorted(self._measured(name), key=lambda r: r.score)[:RIVALS]] for name in words
        }
        firsts = [word for rivals in ranked.values() for word in rivals[:2]]
        tried = dict.fromkeys(["enumerate", *words.values(), *firsts])
        changed = {
            word: dict.fromkeys(words, word) for word in tried if all(word in served for served in known.values())
        }
        sites = list(words)
        for place, name in enumerate(sites):
            if all(words[later] == before[later] for later in sites[place + 1 :]):
                break
            for word in dict.fromkeys([*(word for word, one in known[name].items() if one.enumerates), *ranked[name]]):
                if (taken := {**words, name: word}) not in changed.values():
                    changed[f"{name}: {word}"] = taken
        entries = [(Measured(ALL, said), taken) for said, taken in changed.items() if taken != words]
        if not entries:
            return words
        best = self._contest([(Measured(ALL, AS_CHOSEN), words), *entries])
        if best.word == AS_CHOSEN:
            return words
        for row in self.rows:
            row.chosen = row is best or changed[best.word].get(row.site) == row.word
        return changed[best.word]

    def _measured(self, name: str) -> list[Measured]:
        return [row for row in self.rows if row.site == name and row.score == row.score]

    def _contest(self, entries: list[tuple[Measured, dict[str, str]]]) -> Measured:
        """Measure the whole program under each assignment of words to sites; returns the best row."""
        auto, contestants, unbiased = self.auto, [], []
        for row, words in entries:
            self.rows.append(row)
            if any(c.row.score == 0.0 for c in contestants):
                row.note = "not drawn: another has no variance"
                continue
            listed = math.prod(
                self._listed(name, word) for name, word in words.items() if estimators[word]().enumerates
            )
            if listed > auto.max_evaluations:
                row.note = f"left out: more than {auto.max_evaluations} model runs a step"
                continue
            if contestants and time.process_time() > self.deadline:
                row.note = "left out: time"
                self.left_out.append(f"{row.word} at {row.site}")
                continue
            try:
                torch.manual_seed(auto.seed)
                contestant = _Contestant(row, self.stages, lambda words=words: self._loss(words))
                contestant.settle()
                if row.evaluations > auto.max_evaluations:
                    row.note = f"left out: {row.evaluations:.0f} model runs a step"
                    continue
                contestant.draw(self._count(row, auto.draws // ROUND), self.deadline)
            except Exception as error:  # a word that fails for this program
                row.note = f"refused: {' '.join(str(error).split())[:200]}"
                continue
            if row.variance != row.variance or row.note:
                continue
            contestants.append(contestant)
            if all(_is_unbiased(estimators[word]()) for word in words.values()):
                unbiased.append(contestant)
                row.score = 0.0 if row.variance == 0.0 else math.nan
        site = entries[0][0].site
        if not unbiased:
            said = next((row.note for row, _ in reversed(entries) if row.note), "")
            raise UnsupportedSite(site, "auto", f"no unbiased estimator could be drawn in the pilot ({said})")
        self._judge(contestants, unbiased)
        best = min(c.row.score for c in contestants)
        for contestant in contestants:
            if contestant.row.score <= KEPT * best and contestant.row.variance > 0:
                contestant.draw(self._count(contestant.row, auto.draws), self.deadline)
        self._judge(contestants, unbiased)
        rows = [c.row for c in contestants if c.row.score == c.row.score]
        # Among candidates without variance, the cheapest.
        chosen = min(rows, key=lambda row: (row.score, self._cost(row)))
        chosen.chosen = True
        return chosen

    def _loss(self, words: Mapping[str, str]) -> SiteELBO:
        found = self.loss.settled_as(words)
        if found.plates == "check" and not any(stage.mixed_plates for stage in self.stages):
            found.plates = "trust"  # the stages have checked
        return found

    def _count(self, row: Measured, draws: int) -> int:
        """The number of gradients for a candidate, limited by its model runs."""
        affordable = (
            int(RUNS_PER_DRAW * draws / max(row.evaluations, 1.0)) if row.evaluations == row.evaluations else draws
        )
        return max(min(draws, affordable), FEWEST * len(self.stages))

    def _cost(self, row: Measured) -> float:
        if self.auto.cost == "time":
            return row.seconds
        return row.evaluations if row.evaluations == row.evaluations else 1.0

    def _judge(self, contestants: list[_Contestant], unbiased: list[_Contestant]) -> None:
        truth = min(unbiased, key=lambda c: c.error())
        for contestant in contestants:
            row = contestant.row
            if contestant not in unbiased:
                offset = float((contestant.mean() - truth.mean()).square().sum())
                row.squared_bias = max(offset - contestant.error() - truth.error(), 0.0)
            row.score = (row.variance + row.squared_bias) * self._cost(row) if not row.note else math.nan


def _is_unbiased(estimator: Estimator) -> bool:
    return estimator.unbiased and estimator.objective_name() == "elbo"


__all__ = ["Auto", "Choice", "Measured"]
