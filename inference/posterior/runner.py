"""Runs of a model and guide over all rows, many draws at a time, with site layouts and without scales or subsampling.

The rows of a subsampled plate are visited in blocks, so that every row is visited once and keeps its index.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import replace
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.poutine.messenger import Messenger
from pyro.poutine.trace_struct import Trace
from pyro.poutine.util import site_is_subsample

from ...errors import PROGRAM_ERRORS, BadInput, GumboError, first_line
from ..engine.interventions import ChosenRows, DrawnAnew, GivenValues
from ..engine.programs import element_support, in_support
from ..engine.scopes import modules_of, networks_at_hand, private_seed, quietly
from .alone import Run, agree, changed_alone
from .checks import Checks
from .sites import Block, SiteLayout, has_rows, key_of, kind_of
from .survey import Survey
from .vmapped import Coordinates, Lane, Seen, outside, random_sites, run_in_turn, run_lanes

DRAWS = "_gumbo_draws"
# Numbers per run over all sites: bounds memory, and is large enough to amortize Python's overhead.
NUMBERS_A_RUN = 2**20


class Pass:
    """One run of a program: values ``(count, *batch, *event)`` and log-probabilities in float64, by site."""

    def __init__(
        self, seen: Mapping[str, Seen], sweep: Sweep, layouts: Mapping[str, SiteLayout], count: int, block: Block
    ):
        self.seen, self.sweep, self.layouts, self.count, self.block = seen, sweep, layouts, count, block
        self.model: Pass | None = None  # of the guide's draws: its masks hide terms of log q

    def raw(self, name: str) -> torch.Tensor:
        """The value in the program's own shape."""
        return self.seen[name].value

    def value(self, name: str) -> torch.Tensor:
        """``(count, *batch, *event)``, with the block's new rows only."""
        layout = self.layouts[name]
        return self.whole_value(name)[(slice(None), *self.block.fresh(layout.names))]

    def shown_value(self, name: str) -> torch.Tensor:
        """``value`` as floats, with NaN for masked numbers if the site is masked."""
        value, shown = self.value(name), self.shown(name) if name in self.sweep.masked else None
        if shown is None:
            return value
        value = value if value.is_floating_point() else value.double()
        return value.masked_fill(~shown, torch.nan)

    def shown(self, name: str) -> torch.Tensor | None:
        """Which of the numbers of ``value`` are unmasked; None without a mask."""
        seen, layout = self.seen[name], self.layouts[name]
        if seen.shown is None:
            return None
        batch = seen.shown.dim() - len(layout.event)
        shown = self.sweep.picked(seen.shown, seen.shown.shape[:batch], seen, layout, self.count)
        return shown[(slice(None), *self.block.fresh(layout.names))]

    def whole_value(self, name: str) -> torch.Tensor:
        """The value in all rows of the run, repeated ones included, as ``fixed`` takes it."""
        layout, seen = self.layouts[name], self.seen[name]
        batch = seen.value.dim() - len(layout.event)
        return self.sweep.picked(seen.value, seen.value.shape[:batch], seen, layout, self.count)

    def log_prob(self, name: str, keep: Sequence[str] | None = None, *, scaled: bool = False) -> torch.Tensor:
        """``(count, *keep)`` in nats, summed over all plates but ``keep``; None keeps the site's own.

        Unscaled; ``scaled`` applies the scales other than a plate's subsampling scale and one that all sites share.
        """
        layout, seen = self.layouts[name], self.seen[name]
        try:
            found = seen.scaled_log_prob if scaled and self.sweep.scaled else seen.log_prob
        except ValueError as error:
            if "within the support" in str(error):
                raise outside(name) from error
            raise
        laid = self.sweep.picked(found.double(), found.shape, seen, layout, self.count)
        laid = laid[(slice(None), *self.block.fresh(layout.names))]
        if self.model is not None and name in self.sweep.superfluous:
            of_model = self.sweep.superfluous[name]
            laid = laid * _of_any(self.model.shown(of_model), len(self.model.layouts[of_model].event))
        if keep is None:
            return laid
        others = [1 + place for place, plate in enumerate(layout.names) if plate not in keep]
        return laid.sum(others) if others else laid

    def joint_log_prob(
        self, plates: Sequence[str], names: Collection[str] | None = None, *, scaled: bool = False
    ) -> torch.Tensor:
        """The joint log-probability of all sites in these plates, ``(count, *plates)`` in nats.

        Args:
            plates: the plates to keep; a site outside one of them is left out.
            names: restricts the sum to these sites.
            scaled: as for :meth:`log_prob`.
        """
        total = torch.zeros((), dtype=torch.float64, device=self.sweep.device)
        for name, layout in self.layouts.items():
            if layout.kind == "deterministic" or not set(plates) <= layout.plates:
                continue
            if names is None or name in names:
                total = total + self.log_prob(name, plates, scaled=scaled)
        return total

    def coordinates(self, name: str) -> Coordinates | None:
        """Log-probabilities of a site's coordinates, 0 where they are masked; None if they are dependent."""
        found, masks = self.seen[name].coordinates(self.layouts[name].event), [self.seen[name].shown]
        if found is None:
            return None
        if self.model is not None and name in self.sweep.superfluous:
            masks.append(self.model.seen[self.sweep.superfluous[name]].shown)
        number = found.log_prob
        for mask in masks:
            if mask is not None:
                shown = _of_any(mask, len(self.layouts[name].event) - found.depth)
                number = torch.where(shown, number, torch.zeros_like(number))
        return replace(found, log_prob=number)


def _of_any(shown: torch.Tensor, event_dim: int) -> torch.Tensor:
    """Whether any number is unmasked along the last dimensions."""
    return shown.flatten(-event_dim).any(-1) if event_dim else shown


class _SameForAllDraws(Messenger):
    """Keeps the distributions that have no dimension for the draws, and so the same parameters for all of them."""

    def __init__(self, depth: int):
        super().__init__()
        self.depth = depth

    def _pyro_sample(self, msg) -> None:
        if not site_is_subsample(msg):
            batch = msg["fn"].batch_shape
            same = len(batch) <= self.depth or batch[-1 - self.depth] == 1
            msg["infer"] = {**msg["infer"], _SAME: msg["fn"] if same else None}


_SAME = "_same_for_all_draws"


def log_weight(guide: Pass, model: Pass, plates: Sequence[str], *, scaled: bool = False) -> torch.Tensor:
    """log p − log q of one run, ``(count, *plates)`` in nats, over the sites in these plates."""
    return model.joint_log_prob(plates, scaled=scaled) - guide.joint_log_prob(plates, scaled=scaled)


class VaryingSites(BadInput):
    """Programs whose runs differ in their sites, in the plates of a site, or in its event dimensions."""


def _shape_of(site: Mapping[str, Any]) -> tuple[Any, ...]:
    """What must be the same in all runs of a mode."""
    frames = [(frame.name, frame.dim) for frame in site["cond_indep_stack"] if frame.vectorized and frame.name != DRAWS]
    return kind_of(site), sorted(frames), site["fn"].event_dim


class Sweep(Survey):
    """A model and a guide with their arguments, which run for any number of draws and block of rows.

    ``batch_size`` passes that many rows of the arguments at a time; None passes all. Raises
    :class:`~gumbo.errors.BadInput` for programs without a latent or an observed site, for latents that only one program
    draws, and for arguments that cannot be cut into batches.
    """

    def __init__(
        self,
        model: Callable,
        guide: Callable,
        args: tuple,
        kwargs: Mapping[str, Any],
        *,
        batch_size: int | None = None,
        data_plates: str | Sequence[str] | None = None,
        mode: str | None = None,
        latents_needed: bool = True,
        scored: bool = True,
    ):
        super().__init__(model, guide, args, kwargs, latents_needed, scored)
        self._parameters: dict[int, set[str]] = {}  # names in the param store, by id of the program
        self._shapes: dict[tuple[bool, bool, str], dict[str, Any]] = {}  # of the sites, in the first run of its kind
        self.sliced: str | None = None
        self.reason = ""
        self.divide(data_plates)
        if batch_size is not None:
            self._cut(batch_size)
        with quietly(model, guide, None):
            self.mode = mode or self._fastest()

    @property
    def vectorized(self) -> bool:
        """Whether many draws run at once."""
        return self.mode != "single"

    def slowly(self) -> str:
        """A remark if draws run one by one."""
        return "" if self.vectorized else f", one by one, since they do not run together ({self.reason})"

    # --- rows ---------------------------------------------------------------------------------------------------------

    def _cut(self, batch_size: int) -> None:
        if batch_size < 1:
            raise BadInput(f"batch_size is {batch_size}: expected at least 1")
        plates = [plate for plate in self.data_plates if plate not in self.swept]
        for plate in plates:
            size = self.sizes[plate]
            tensors = [value for value in (*self.args, *self.kwargs.values()) if has_rows(value, size)]
            if not tensors or batch_size >= size:
                continue
            self.sliced = plate
            self.swept[plate] = batch_size
            try:
                site = self._changed_in_blocks(plate)
            except GumboError:
                raise
            except PROGRAM_ERRORS as error:
                raise BadInput(
                    f"the programs do not take {batch_size} of their {size} rows ({first_line(error, kind=True)}):"
                    " leave out batch_size, or let plate sizes follow the data"
                ) from error
            if site is not None:
                raise BadInput(
                    f"site {site!r} has other log-probabilities in {batch_size} rows of plate {plate!r} than among all"
                    f" {size}, so that these rows do not stand alone: leave out batch_size"
                )
            return
        if not self.swept and all(batch_size < self.sizes[plate] for plate in plates) and plates:
            raise BadInput(f"no argument has as many rows as plate {plates[0]!r}: leave out batch_size")

    def _changed_in_blocks(self, plate: str) -> str | None:
        """A site whose terms depend on the other rows of the block, or on the place of a row in it."""
        others = {name: slice(0, size) for name, size in self.swept.items() if name != plate}
        ends = {block.at[plate].start: block.at[plate] for block in self.blocks()}
        blocks = [self._block({**others, plate: ends[start]}) for start in (0, max(ends))]

        def run_on(block: Block) -> Run:
            return lambda values: self.run(1, block, values, mode="single")

        with quietly(self.model, self.guide, 0):
            parts = ((run_on(block), block.rows[plate]) for block in blocks)
            found = changed_alone(run_on(self._block(others)), parts, plate, self.scored)
        return None if found is None else found[1]

    def blocks(self) -> Iterator[Block]:
        """Blocks of rows that together contain every row once."""
        names = list(self.swept)
        spans = [
            [slice(s, min(s + self.swept[n], self.sizes[n])) for s in range(0, self.sizes[n], self.swept[n])]
            for n in names
        ]
        for chosen in itertools.product(*spans):
            yield self._block(dict(zip(names, chosen, strict=True)))

    def _block(self, at: dict[str, slice]) -> Block:
        take, rows = {}, {}
        for plate, span in at.items():
            start = span.start
            if plate != self.sliced:
                # A plate that subsamples needs its exact number of rows: the last block repeats some.
                start = max(0, span.stop - self.swept[plate])
            rows[plate] = torch.arange(start, span.stop)
            take[plate] = slice(span.start - start, span.stop - start)
        return Block(at, take, rows)

    def whole(self) -> Block | None:
        """The only block, if one block holds all rows."""
        blocks = list(itertools.islice(self.blocks(), 2))
        return blocks[0] if len(blocks) == 1 else None

    def _arguments(self, block: Block) -> tuple[tuple, dict]:
        if self.sliced is None or self.sliced not in block.at:
            return self.args, self.kwargs
        rows, size = block.at[self.sliced], self.sizes[self.sliced]

        def cut(value):
            return value[rows] if has_rows(value, size) else value

        return tuple(cut(value) for value in self.args), {name: cut(value) for name, value in self.kwargs.items()}

    # --- runs ---------------------------------------------------------------------------------------------------------

    def run(
        self,
        count: int,
        block: Block | None = None,
        fixed: Mapping[str, torch.Tensor] | None = None,
        *,
        mode: str | None = None,
        arguments: tuple[tuple, dict] | None = None,
    ) -> tuple[Pass, Pass]:
        """Guide and model at ``count`` draws; ``fixed`` gives latents ``(count, *batch, *event)`` of the block."""
        block = block or Block()
        guide = self._pass(self.guide, self.guide_sites, count, block, fixed or {}, set(), mode, arguments)
        return guide, self._of_model(guide, mode, arguments)

    def _of_model(self, guide: Pass, mode: str | None = None, arguments: tuple[tuple, dict] | None = None) -> Pass:
        """The model at the draws of a run of the guide."""
        drawn = {name: guide.raw(name) for name in self.latents}
        seen = self._seen(self.model, self.model_sites, guide.count, guide.block, drawn, set(), mode, arguments)
        guide.model = Pass(seen, self, self.model_sites, guide.count, guide.block)
        return guide.model

    def turns(
        self, counts: Sequence[int], arguments: tuple[tuple, dict] | None = None
    ) -> Iterator[tuple[int, Block, Pass, Pass]]:
        """`over_rows` for so many draws in each turn, one after the other, with the number of the turn.

        A guide whose distributions are the same for all draws runs for the first turn only; the draws are those that
        its runs would make.
        """
        first: Pass | None = None
        plain = self.mode == "plates" and self.device.type == "cpu" and not self.swept
        for turn, count in enumerate(counts):
            if first is not None:
                guide = self._drawn_again(first, count)
                yield turn, first.block, guide, self._of_model(guide, None, arguments)
            elif turn == 0 and len(counts) > 1 < count and plain:
                before = torch.get_rng_state()
                guide = self._pass(self.guide, self.guide_sites, count, Block(), {}, set(), None, arguments)
                first = guide if self._is_sampling(guide, before) else None
                yield turn, guide.block, guide, self._of_model(guide, None, arguments)
            else:
                for run in self.over_rows(count, arguments):
                    yield turn, *run

    def _drawn_again(self, run: Pass, count: int) -> Pass:
        """``count`` new draws from the distributions of a run, which are the same for all draws."""
        seen = {}
        for name, one in run.seen.items():
            site, fn = one.site, one.site["fn"]
            if count != run.count:
                fn = site["infer"][_SAME].expand(torch.Size((count, *fn.batch_shape[1:])))
            seen[name] = Seen({**site, "fn": fn, "value": fn(*site["args"], **site["kwargs"])})
        return Pass(seen, self, run.layouts, count, run.block)

    def _is_sampling(self, guide: Pass, before: torch.Tensor) -> bool:
        """Whether a run of the guide from that random state consists of draws from distributions that do not change."""
        sites = [one.site for one in guide.seen.values()]
        plain = all(layout.kind == "latent" and not layout.point for layout in guide.layouts.values())
        if self.summed_out or not plain or any(site["infer"].get(_SAME) is None for site in sites):
            return False
        after = torch.get_rng_state()
        torch.set_rng_state(before)
        again = self._drawn_again(guide, guide.count)
        same = torch.equal(after, torch.get_rng_state())  # else the guide also draws noise of its own
        torch.set_rng_state(after)
        return same and all(torch.equal(again.raw(name), guide.raw(name)) for name in guide.seen)

    def over_rows(self, count: int, arguments: tuple[tuple, dict] | None = None) -> Iterator[tuple[Block, Pass, Pass]]:
        """Guide and model on every block of rows, with the same draws of sites outside the rows in all blocks."""
        held: dict[tuple, torch.Tensor] = {}
        for block in self.blocks():
            fixed, new = self.known(held, block, self.guide_sites)
            guide, model = self.run(count, block, fixed, arguments=arguments)
            self.keep(held, guide, new, self.guide_sites)
            self._check_held(guide, fixed, held, block)
            yield block, guide, model

    def known(
        self, held: dict, block: Block, layouts: Mapping[str, SiteLayout], kind: str = "latent"
    ) -> tuple[dict, list[str]]:
        """Latents (sites of that kind) that an earlier block has drawn, and those that a later block needs again."""
        names = [name for name, layout in layouts.items() if layout.kind == kind and set(block.at) - layout.plates]
        fixed = {n: held[key_of(layouts[n], block)] for n in names if key_of(layouts[n], block) in held}
        return fixed, [name for name in names if name not in fixed]

    def keep(self, held: dict, run: Pass, new: Sequence[str], layouts: Mapping[str, SiteLayout]) -> None:
        """Store the draws that later blocks need."""
        for name in new:
            held[key_of(layouts[name], run.block)] = run.whole_value(name)

    @staticmethod
    def _check_held(guide: Pass, fixed: Mapping, held: dict, block: Block) -> None:
        """The q of a global latent must not depend on the rows."""
        for name, layout in guide.layouts.items():
            if layout.kind != "latent" or not set(block.at) - layout.plates:
                continue
            now = guide.log_prob(name)
            before = held.setdefault(("log_q", *key_of(layout, block)), now)
            if name in fixed and not torch.allclose(now, before, rtol=1e-3, atol=1e-3):
                raise BadInput(
                    f"the guide's distribution of {name!r} depends on its rows, which are passed in blocks: "
                    "leave out batch_size, or do not subsample"
                )

    def guide_run(
        self,
        count: int,
        block: Block | None = None,
        fixed: Mapping[str, torch.Tensor] | None = None,
        *,
        arguments: tuple[tuple, dict] | None = None,
    ) -> Pass:
        """The guide alone, with some latents given."""
        block = block or Block()
        return self._pass(self.guide, self.guide_sites, count, block, fixed or {}, set(), None, arguments)

    def model_run(
        self,
        count: int,
        block: Block | None = None,
        fixed: Mapping[str, torch.Tensor] | None = None,
        *,
        observe: bool = True,
        arguments: tuple[tuple, dict] | None = None,
    ) -> Pass:
        """The model alone at the given latents, others drawn from it; ``observe=False`` also draws the data."""
        hidden = set() if observe else set(self.observed)
        return self._pass(self.model, self.model_sites, count, block or Block(), fixed or {}, hidden, None, arguments)

    def _how(self, count: int, mode: str | None) -> str:
        """How so many draws run in a mode."""
        mode = mode or self.mode
        return "in turn" if mode == "single" and count > 1 else mode

    def _pass(self, program, layouts, count, block, fixed, hidden, mode=None, arguments=None) -> Pass:
        laid = {
            name: self._placed(value, layouts[name], count, block, self._how(count, mode))
            for name, value in fixed.items()
            if name in layouts and not (program is self.guide and name in self.computed)
        }
        seen = self._seen(program, layouts, count, block, laid, hidden, mode, arguments)
        return Pass(seen, self, layouts, count, block)

    def _seen(self, program, layouts, count, block, values, hidden, mode=None, arguments=None) -> Mapping[str, Seen]:
        """The sites of a run at ``values``, in the program's own shapes."""

        def once(given: Mapping[str, torch.Tensor]) -> Trace:
            return self._trace(program, layouts, count, block, given, hidden, mode or self.mode, arguments)

        how = self._how(count, mode)
        if mode is not None:  # a trial: its errors say that the programs do not run in this way
            return self._sites(program, layouts, count, values, how, once, trial=True)
        try:
            return self._sites(program, layouts, count, values, how, once)
        except ValueError as error:
            if isinstance(error, GumboError):
                raise
            raise _invalid(error, lambda: once(values)) from error

    def _sites(self, program, layouts, count, values, how: str, once: Callable, trial=False) -> Mapping[str, Seen]:
        events = {name: layout.event for name, layout in layouts.items()}
        masked = self.masked | self.masked_latents
        if how == "lanes":
            stored = pyro.get_param_store()
            if self._parameters.get(id(program), {""}) - set(stored.keys()):
                # vmap cannot register a new parameter in the param store.
                with private_seed(None, program):
                    once({name: value[0] for name, value in values.items()})
                self._parameters[id(program)] = set(stored.keys())
            try:
                return run_lanes(once, values, count, events, self.device, masked)
            except GumboError:
                raise
            except PROGRAM_ERRORS:
                if trial:
                    raise
                how = "in turn"  # a sampler that vmap cannot run, of a site whose values were given in the trial
        if how == "in turn":
            return run_in_turn(once, values, count, events, masked)
        return {name: Seen(site) for name, site in random_sites(once(values))}

    def _trace(self, program, layouts, count, block, values, hidden, mode, arguments=None) -> Trace:
        args, kwargs = arguments or self._arguments(block)
        rows = self.at_hand | {name: index for name, index in block.rows.items() if name != self.sliced}
        with ExitStack() as stack:
            # The innermost acts first: a site that is drawn anew may be given its draw.
            for handler in (ChosenRows(rows), GivenValues(values), DrawnAnew(hidden)):
                stack.enter_context(handler)
            if mode == "plates":
                stack.enter_context(pyro.plate(DRAWS, count, dim=-1 - self.depth, device=str(self.device)))
                stack.enter_context(_SameForAllDraws(self.depth))
            stack.enter_context(networks_at_hand(*modules_of(self.model, self.guide)))
            trace = poutine.trace(program).get_trace(*args, **kwargs)
        sites = {name: _shape_of(site) for name, site in random_sites(trace)}
        if sites.keys() != set(layouts):
            odd = sorted(sites.keys() ^ set(layouts))[0]
            raise VaryingSites(
                f"site {odd!r} occurs in some runs only: programs whose sites vary between draws have no array of draws"
            )
        first = self._shapes.setdefault((program is self.guide, bool(hidden), mode), sites)
        if sites != first:
            odd = next(name for name in first if sites[name] != first[name])
            raise VaryingSites(
                f"site {odd!r} has other plates or event dimensions in some runs: such programs have no array of draws"
            )
        return trace

    def _fastest(self) -> str:
        """How to run many draws: along a plate, by torch.vmap, or one by one.

        Two draws at once must have the log-probabilities that they have one by one; where the data are not scored, two
        draws of the data as well.
        """
        for mode in ("plates", "lanes"):
            if self._agrees(mode):
                return mode
        return "single"

    def _agrees(self, mode: str) -> bool:
        block = next(iter(self.blocks()))
        try:
            together = self.run(2, block, mode=mode)
            anew, drawn = None, [*self.latents, *self.observed]
            if not self.scored:
                values = {name: together[0].whole_value(name) for name in self.latents}
                anew = self._of_data(values, 2, block, mode)
            for draw in range(2):
                fixed = {name: together[0].whole_value(name)[draw : draw + 1] for name in self.guide_sites}
                alone = self.run(1, block, fixed, mode="single")
                pairs = list(zip(together, alone, strict=True))
                if anew is not None:
                    fixed = {name: anew.whole_value(name)[draw : draw + 1] for name in drawn}
                    pairs.append((anew, self._of_data(fixed, 1, block, "single")))
                for many, one in pairs:
                    for name, layout in many.layouts.items():
                        if layout.kind == "deterministic" or layout.point:
                            a, b = many.value(name)[draw].double(), one.value(name)[0].double()
                        else:
                            a, b = many.log_prob(name)[draw], one.log_prob(name)[0]
                        if a.shape != b.shape or not agree(a, b, layout.dtype):
                            self.reason = f"site {name!r} has other values when draws run together"
                            return False
        except GumboError:
            raise
        except (*PROGRAM_ERRORS, Warning) as error:
            self.reason = first_line(error, kind=True)
            return False
        return True

    def _of_data(self, fixed: Mapping[str, torch.Tensor], count: int, block: Block, mode: str) -> Pass:
        """The model with the data drawn anew, or given as well."""
        return self._pass(self.model, self.model_sites, count, block, fixed, set(self.observed), mode)

    def held(self, run: Pass, name: str) -> torch.Tensor:
        """A latent's values in all rows of the run, repeated ones included, as ``fixed`` takes them."""
        return run.whole_value(name)

    def given(self, guide: Pass) -> dict[str, torch.Tensor]:
        """All draws of a guide run outside the data plates, auxiliary ones included."""
        return {name: guide.whole_value(name) for name in self.outside_data()}

    def draws_a_run(self, block: Block | None = None, at_most: int = NUMBERS_A_RUN) -> int:
        """The number of draws of a block per run, with about so many numbers ``at_most``."""
        return max(1, at_most // self.numbers_a_draw(block)) if self.vectorized else 1

    def numbers_a_draw(self, block: Block | None = None) -> int:
        """The numbers of one draw of a block over all sites."""
        block = block or next(iter(self.blocks()))
        numbers = 0
        for layout in (*self.guide_sites.values(), *self.model_sites.values()):
            size = layout.numel
            for plate in layout.plates & set(block.rows):
                size = size * len(block.rows[plate]) // self.sizes[plate]
            numbers += max(1, size)
        return numbers * getattr(self.guide, "width", 1)

    # --- shapes -------------------------------------------------------------------------------------------------------

    def _sizes_in(self, layout: SiteLayout, block: Block) -> tuple[int, ...]:
        return tuple(
            len(block.rows[name]) if name in block.rows else size
            for name, size in zip(layout.names, layout.sizes, strict=True)
        )

    def _placed(self, value, layout: SiteLayout, count: int, block: Block, mode: str) -> torch.Tensor:
        """``(count, *batch, *event)`` in the program's own shape."""
        sizes = dict(zip(layout.dims, self._sizes_in(layout, block), strict=True))
        depth = self.depth if mode == "plates" else layout.depth
        batch = [sizes.get(dim, 1) for dim in range(-depth, 0)]
        return value.reshape([*([] if mode == "single" else [count]), *batch, *layout.event])

    def picked(self, value, batch, seen: Seen, layout: SiteLayout, count: int) -> torch.Tensor:
        """Left-padded to ``(count, depth…)``, expanded over the plates, reduced to the layout's dimensions."""
        event = tuple(value.shape[len(batch) :])
        if isinstance(seen, Lane):
            value = value.reshape((batch[0],) + (1,) * (1 + self.depth - len(batch)) + tuple(batch[1:]) + event)
        else:
            value = value.reshape((1,) * (1 + self.depth - len(batch)) + tuple(batch) + event)
        target = [count] + [
            (seen.sizes.get(dim, value.shape[dim - len(event)])) if dim in layout.dims else 1
            for dim in range(-self.depth, 0)
        ]
        try:
            value = value.expand(*target, *event)
        except RuntimeError:
            if 0 not in batch:
                raise  # handled where another way to run the programs is tried
            raise BadInput(
                f"site {layout.name!r} has batch shape {tuple(batch[1:])} where its plates have {tuple(target[1:])}"
                " rows; give data with a row for each element of a plate, and at least one"
            ) from None
        drop = [1 + self.depth + dim for dim in range(-self.depth, 0) if dim not in layout.dims]
        return value.squeeze(drop) if drop else value


def _invalid(error: ValueError, again: Callable[[], Trace]) -> BadInput:
    """What a distribution refuses in a run, as one line with the first site that is to blame.

    A program may make a distribution of a draw before any site has it: a run without validation finds the draw.
    """
    checks, said = Checks(), first_line(error, kind=True).removesuffix(":")
    with suppress(*PROGRAM_ERRORS), pyro.validation_enabled(False):
        for name, site in random_sites(again()):
            if not checks.passes("", site):
                inside = in_support(element_support(site["fn"]), site["value"])
                if inside is not None and not bool(inside.all()):
                    return outside(name)
                return BadInput(f"site {name!r}: {said}; look at what its parameters depend on")
    return BadInput(f"the programs fail at a draw of the guide: {said}")
