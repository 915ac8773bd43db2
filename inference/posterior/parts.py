"""The terms of every datum's log-weight, log p(z), log p(x | z) and log q(z | x), over all rows and many draws."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import numpy as np
import pyro
import torch

from ...errors import PROGRAM_ERRORS, BadInput
from ...options import check_seed
from ..engine.progress import Progress
from ..engine.rows import ProcessGroup, Rows
from ..engine.scopes import device_of, private_seed, quietly, seed_all
from ..engine.stored_rows import rows_in
from .checks import Checks
from .division import data_in, first_sweep, sweep_of, turns_of
from .graphs import PER_DATUM, Compiler, Graphs
from .importance import integrated, rounding_of
from .runner import Pass, Sweep
from .sites import Block
from .vmapped import outside

_PRIME = 1_000_003  # keeps the random streams of a seed's batches apart from those of its neighbours
PARTS = ("log_prior", "log_likelihood", "log_q", "log_global")
# Draws of the local latents per draw of the global ones.
_LOCAL_SAMPLES = 64


def log_weights(
    model: Callable,
    guide: Callable,
    data: object,
    *,
    num_samples: int = 100,
    batch_size: int | None = None,
    seed: int | None = 0,
) -> dict[str, torch.Tensor]:
    """``log_prior``, ``log_likelihood`` and ``log_q`` in nats, each ``(num_samples, N)`` in float64.

    ``log_global`` of the same shape is log p − log q of the latents outside the data plate, divided among the data.
    """
    weighing = Weighing(model, guide, data, num_samples, batch_size, None)
    return weighing.together(weighing.pieces(seed))


class Weighing:
    """The terms of all log-weights of a model and a guide on data, a batch at a time.

    The programs are surveyed once; every call of `pieces` runs them with their current parameters.

    Attributes:
        one_weight: which data share a weight: empty where each datum has its own; "globals" where these are conditional
            on global latents; "latents" where the guide draws all latents jointly; "all" where no plate separates the
            data.
        num_local_samples: the draws of the local latents per draw of the global ones.
        relaxed: whether the programs are the discrete form of the given ones.
        uncompiled: why runs are not compiled although a ``compiler`` is given; empty if they are.

    Raises:
        BadInput: data or settings that cannot be used.
    """

    def __init__(
        self,
        model: Callable,
        guide: Callable,
        data: object,
        num_samples: int,
        batch_size: int | None,
        plate: str | None,
        num_local_samples: int | None = 1,
        compiler: Compiler | None = None,
    ):
        self.rows = rows_in(data).check("data")
        if num_samples < 1:
            raise BadInput(f"num_samples is {num_samples}: expected at least 1")
        if batch_size is not None and batch_size < 1:
            raise BadInput(f"batch_size is {batch_size}: expected at least 1")
        with private_seed(None, model, guide):
            self.model, self.guide = exact_pair(model, guide)
        self.relaxed = self.model is not model
        self.num_samples, self.plate = num_samples, plate
        self.device = device_of(self.model, self.guide)
        self._checks = Checks(self.rows.tensors() if type(self.rows) is Rows else ())
        self.rows, self.size, *found = first_sweep(self.model, self.guide, self.rows, batch_size, plate, num_samples)
        self.sweep, self.name = found[0]
        # The last batch may have fewer rows.
        self._by_length = {len(self.rows) % self.size or self.size: found[1], min(self.size, len(self.rows)): found[0]}
        sweep = self.sweep
        self._by_batch = self.size if self.name is None else sweep.sizes[self.name]
        self.one_weight = "all" if self.name is None else "latents" if sweep.tied else "globals" if sweep.shared else ""
        self.num_local_samples = 1
        if self.one_weight == "globals" and not sweep.summed_out.issuperset(sweep.local):
            self.num_local_samples = num_local_samples or (_LOCAL_SAMPLES if sweep.vectorized else 1)
        self.graphs: Graphs | None = None
        self.uncompiled = ""
        if compiler is not None and self.relaxed:
            self.uncompiled = "the discrete form of a relaxed pair is made anew for every evaluation"
        elif compiler is not None:
            try:
                with quietly(self.model, self.guide, None):
                    self.graphs = Graphs(sweep, self.name, compiler)
            except BadInput as error:
                self.uncompiled = str(error)

    def pieces(
        self,
        seed: int | None,
        processes: ProcessGroup | None = None,
        reduce: Callable[[dict[str, torch.Tensor]], Any] = lambda parts: parts,
        progress: Progress | None = None,
    ) -> list[Any]:
        """``reduce`` of every batch's parts, in order; ``progress`` is told the number of runs."""
        if seed is not None:
            check_seed(seed)
        count = math.ceil(len(self.rows) / self.size)
        shown = _Counted(progress or Progress())

        def pieces_of(numbers: range) -> list[Any]:
            with quietly(self.model, self.guide, seed):
                return [reduce(self._piece(number, seed, number == numbers[0], shown)) for number in numbers]

        if processes is None:
            return pieces_of(range(count))
        mine = range(processes.rank, count, processes.world_size)
        shares = processes.gather(processes.together(lambda: pieces_of(mine)))
        return [shares[number % processes.world_size][number // processes.world_size] for number in range(count)]

    @property
    def num_runs(self) -> int:
        """How many times the programs run, about."""
        return math.ceil(len(self.rows) / self.size) * len(self.turns)

    @property
    def turns(self) -> list[int]:
        """The draws of a batch, a run at a time."""
        return turns_of(self.sweep, self.num_samples, self._by_batch)

    def together(self, pieces: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        """The parts of all batches, ``(S, N)`` each."""
        parts = {part: torch.cat([piece[part] for piece in pieces], 1) for part in pieces[0]}
        if "integrated" in parts and parts["integrated"].isnan().any():
            # The guide draws global latents given local ones: only the joint draw has a weight.
            del parts["integrated"]
            self.num_local_samples = 1
        return parts

    def rounding(self, largest: float) -> float:
        """The rounding error of log-weights whose terms are at most ``largest``."""
        return rounding_of(self.sweep, largest)

    def no_evidence(self, num_data: int, globals_count: bool) -> str:
        """The reason why importance weights of these programs do not estimate the evidence; empty if they do."""
        return _no_evidence(self.sweep, self.name, num_data, globals_count)

    def _piece(self, number: int, seed: int | None, first: bool, shown: _Counted) -> dict[str, torch.Tensor]:
        batch = self.rows[number * self.size : (number + 1) * self.size].to(self.device)
        length = len(batch)
        if length not in self._by_length:
            self._by_length[length] = sweep_of(self.model, self.guide, batch, self.plate, self.sweep.mode)
        sweep, name = self._by_length[length]

        def found(checks: Checks | None, validates_first: bool) -> dict[str, torch.Tensor]:
            if seed is not None:  # a separate one for each batch: every process draws the same for it
                seed_all(_seed_of(seed, number), self.device)
            whole = None if self.rows.whole else len(self.rows)
            run = _Batch(sweep, name, batch, self.num_samples, whole, self.num_local_samples, checks, shown)
            return run.parts(validates_first)

        if self.graphs is not None and length == self.size:
            before = torch.get_rng_state()
            if seed is not None:
                seed_all(_seed_of(seed, number), self.device)
            parts = self._by_graph(self.graphs, sweep, batch, shown)
            if parts is not None:
                return parts
            torch.set_rng_state(before)  # an eager run serves, or says what is wrong
        if sweep.mode != "plates" or self.num_local_samples > 1 or not pyro.infer.util.is_validation_enabled():
            return found(None, True)
        before = torch.get_rng_state()
        try:
            return found(self._checks, first)
        except (BadInput, *PROGRAM_ERRORS):
            torch.set_rng_state(before)  # Pyro's own validation names the argument of a distribution
            found(None, True)
            raise

    def _by_graph(self, graphs: Graphs, sweep: Sweep, batch: Rows, shown: _Counted) -> dict[str, torch.Tensor] | None:
        """The parts of a batch by its graph; None where something is wrong with them."""
        counts, found = self.turns, []
        try:
            graphs.prepare(sweep, batch, counts[0])
        except BadInput as error:
            self.graphs, self.uncompiled = None, str(error)
            return None
        for count in counts:  # all turns with the graph of the first, the longest
            terms = graphs.run(batch, counts[0])
            if not terms.valid:
                return None
            found.append(terms.parts[:, :count].cpu())
            shown.add()
        together = torch.cat(found, 1) if len(found) > 1 else found[0]
        parts = dict(zip(PER_DATUM, together, strict=True))
        return parts | {"log_global": torch.zeros((), dtype=torch.float64).expand(self.num_samples, self._by_batch)}


def _seed_of(seed: int, number: int) -> int:
    """The seed of a batch."""
    found = seed + _PRIME * number
    return found if found < 2**64 else found - 2**64


class _Counted:
    """Counts runs for a progress display."""

    def __init__(self, progress: Progress):
        self.progress, self.done = progress, 0

    def add(self) -> None:
        self.done += 1
        self.progress.step(self.done)


def _no_evidence(sweep: Sweep, name: str | None, num_data: int, globals_count: bool) -> str:
    """The reason why importance weights of these programs do not estimate the evidence; empty if they do."""
    if sweep.points:
        return f"the guide {next(iter(sweep.points.values()))}; neither is the ELBO a bound"
    of_guide = [site for program, site in sweep.scaled if program == "guide"]
    if of_guide:
        return f"the guide scales log q of {of_guide[0]!r}, so that its draws have another density than the weights"
    if globals_count and _data_size(sweep, name, num_data, num_data) != num_data:
        return f"the {num_data} rows are a batch of more, which the global latents are shared with"
    return ""


def _data_size(sweep: Sweep, name: str | None, size: int, num_data: int) -> int:
    """The number of data that share the global latents, of which ``size`` rows are in a run."""
    # A plate that does not subsample covers the given data, which may come in batches.
    at_hand = name is None or name not in sweep.at_hand
    return num_data if at_hand and sweep.full_sizes.get(name, size) == size else sweep.full_sizes[name]


def exact_pair(model: Callable, guide: Callable) -> tuple[Callable, Callable]:
    """The discrete programs of a relaxed pair, with the same networks; any other pair unchanged.

    A relaxed model has ``relaxed`` set, and returns its discrete form by ``exact()``; its guide by ``exact(model)``.
    """
    if not getattr(model, "relaxed", False):
        return model, guide
    if not (hasattr(model, "exact") and hasattr(guide, "exact")):
        raise BadInput(
            f"{type(model).__name__} is relaxed: to report its discrete bound, it must define exact() and "
            f"{type(guide).__name__} must define exact(model)"
        )
    discrete = model.exact()
    return discrete, guide.exact(discrete)


class _Batch:
    """All draws of one batch, each term ``(num_samples, B)``; ``inner`` draws of local latents per global draw.

    Where no argument has rows, the plate gives their number. With ``checks`` runs are not validated, but for the first
    where that is asked.
    """

    def __init__(
        self,
        sweep: Sweep,
        name: str | None,
        batch: Rows,
        num_samples: int,
        num_data: int | None,
        inner: int,
        checks: Checks | None,
        shown: _Counted,
    ):
        self.sweep, self.name, self.inner, self.checks, self.shown = sweep, name, inner, checks, shown
        self.size = data_in(sweep, name, batch)
        self.num_samples, self.arguments = num_samples, (batch.args, batch.kwargs)
        self.data_size = _data_size(sweep, name, self.size, num_data or self.size)
        shape = num_samples, self.size
        self.found = {part: torch.zeros(*shape, dtype=torch.float64) for part in PARTS}
        if inner > 1:
            self.found["integrated"] = torch.zeros(*shape, dtype=torch.float64)

    def parts(self, validates_first: bool) -> dict[str, torch.Tensor]:
        counts = turns_of(self.sweep, self.num_samples, self.size)
        starts = [0, *itertools.accumulate(counts)]
        turns = self.sweep.turns(counts, self.arguments)
        checks = None if validates_first else self.checks
        while True:
            with nullcontext() if checks is None else pyro.validation_enabled(False):
                found = next(turns, None)
                if found is None:
                    return self.found
                turn, block, guide, model = found
                self._add(slice(starts[turn], starts[turn + 1]), block, guide, model, checks)
            self.shown.add()
            checks = self.checks

    def _add(self, where: slice, block: Block, guide: Pass, model: Pass, checks: Checks | None) -> None:
        name, parts, count = self.name, self.found, guide.count
        for program, run in (("guide", guide), ("model", model)):
            if checks is None and self.checks is not None:
                self.checks.learn(program, (one.site for one in run.seen.values()))
            for site, layout in run.layouts.items():
                if layout.kind == "deterministic" or not block.first(layout):
                    continue
                keep = (name,) if name in layout.plates else ()
                value = run.log_prob(site, keep, scaled=True).cpu()
                if torch.isnan(value).any():
                    raise BadInput(
                        f"site {site!r} has a log-probability of NaN: look at the parameters of its distribution"
                    )
                of_guide = None if site not in guide.seen else guide.seen[site].site
                if checks is not None and not checks.passes(program, run.seen[site].site, of_guide):
                    raise outside(site)
                part = "log_q" if run is guide else "log_prior" if layout.in_prior else "log_likelihood"
                if keep:
                    parts[part][where, block.index(keep)[0]] += value
                elif name is None:
                    parts[part][where] += value[:, None] / self.size
                else:
                    parts["log_global"][where] += (-value if run is guide else value)[:, None] / self.data_size
        if self.inner > 1:
            found, known = integrated(
                self.sweep,
                block,
                self.sweep.given(guide),
                self.inner,
                guide,
                np.arange(count),
                arguments=self.arguments,
                scaled=True,
            )
            parts["integrated"][where, block.index((name,))[0]] = found.cpu() if known else math.nan
