"""Runs of any model and guide over all their rows, many draws at a time: sites laid out, nothing scaled or subsampled.

The rows of a subsampled plate are visited block by block, so that every row is seen once and has its id.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.poutine.messenger import Messenger
from pyro.poutine.trace_struct import Trace
from pyro.poutine.util import site_is_subsample

from ...errors import BadInput, GumboError
from ..engine.handlers import CheckedRows, row_numbers
from ..engine.scopes import device_of, modes_kept, modules_of, private_seed, private_store
from .enumerated import completed
from .vmapped import Coordinates, Lane, Seen, outside, random_sites, run_lanes, unmasked

DRAWS = "_gumbo_draws"
# Numbers that the sites of one run may hold: a bound on memory, large enough that Python's overhead does not count.
_NUMBERS_A_RUN = 2**20

# What programs raise when they cannot take one more dimension, or other rows than they were written for.
_REFUSALS = (RuntimeError, ValueError, IndexError, TypeError, AssertionError, NotImplementedError)


@dataclass(frozen=True)
class Layout:
    """Where the numbers of a site lie: dimensions ``(*batch, *event)``, those of size 1 outside plates left out.

    ``dims`` are the batch dimensions that are kept, as negative numbers from the right of the program's batch shape;
    ``names`` are their plates, None where a batch dimension stands in no plate.
    """

    name: str
    kind: str
    dims: tuple[int, ...]
    names: tuple[str | None, ...]
    sizes: tuple[int, ...]
    event: tuple[int, ...]
    depth: int
    dtype: torch.dtype
    point: bool = False
    discrete: bool = False

    @property
    def plates(self) -> frozenset[str]:
        return frozenset(name for name in self.names if name is not None)

    @property
    def shape(self) -> tuple[int, ...]:
        return (*self.sizes, *self.event)

    @property
    def numel(self) -> int:
        return int(torch.Size(self.shape).numel())


@dataclass(frozen=True)
class Block:
    """Some rows: where they go (``at``) and which of those that a run returns are new (``take``), by plate."""

    at: Mapping[str, slice] = field(default_factory=dict)
    take: Mapping[str, slice] = field(default_factory=dict)
    rows: Mapping[str, torch.Tensor] = field(default_factory=dict)

    def first(self, layout: Layout) -> bool:
        """Whether no block before this one has seen the site's numbers, or those of its rows."""
        return all(span.start == 0 for plate, span in self.at.items() if plate not in layout.plates)

    def index(self, names: Sequence[str | None]) -> tuple[slice, ...]:
        return tuple(self.at.get(name, slice(None)) for name in names)

    def fresh(self, names: Sequence[str | None]) -> tuple[slice, ...]:
        return tuple(self.take.get(name, slice(None)) for name in names)


class Pass:
    """One run of a program: values ``(count, *batch, *event)`` and log-probabilities in float64, by site."""

    def __init__(self, seen: Mapping[str, Seen], sweep: Sweep, layouts: Mapping[str, Layout], count: int, block: Block):
        self.seen, self.sweep, self.layouts, self.count, self.block = seen, sweep, layouts, count, block

    def raw(self, name: str) -> torch.Tensor:
        """The value as the program has it."""
        return self.seen[name].value

    def value(self, name: str) -> torch.Tensor:
        """``(count, *batch, *event)``, with the block's new rows only."""
        layout = self.layouts[name]
        return self.whole_value(name)[(slice(None), *self.block.fresh(layout.names))]

    def shown_value(self, name: str) -> torch.Tensor:
        """The same, as floats with NaN where a mask hides the number, if the site is masked."""
        value, seen, layout = self.value(name), self.seen[name], self.layouts[name]
        if name not in self.sweep.masked or seen.shown is None:
            return value
        batch = seen.shown.dim() - len(layout.event)
        shown = self.sweep.picked(seen.shown, seen.shown.shape[:batch], seen, layout, self.count)
        value = value if value.is_floating_point() else value.double()
        return value.masked_fill(~shown[(slice(None), *self.block.fresh(layout.names))], torch.nan)

    def whole_value(self, name: str) -> torch.Tensor:
        """The same in all rows that the run saw, repeated ones included: as ``fixed`` wants it."""
        layout, seen = self.layouts[name], self.seen[name]
        batch = seen.value.dim() - len(layout.event)
        return self.sweep.picked(seen.value, seen.value.shape[:batch], seen, layout, self.count)

    def log_prob(self, name: str, keep: Sequence[str] | None = None, *, scaled: bool = False) -> torch.Tensor:
        """``(count, *keep)`` in nats, summed over all but the plates ``keep``; None keeps the site's own.

        Unscaled; ``scaled`` brings in the scales that are not a plate's for its subsampling.
        """
        layout, seen = self.layouts[name], self.seen[name]
        try:
            found = seen.scaled_log_prob if scaled else seen.log_prob
        except ValueError as error:
            if "within the support" in str(error):
                raise outside(name) from error
            raise
        laid = self.sweep.picked(found.double(), found.shape, seen, layout, self.count)
        laid = laid[(slice(None), *self.block.fresh(layout.names))]
        if keep is None:
            return laid
        others = [1 + place for place, plate in enumerate(layout.names) if plate not in keep]
        return laid.sum(others) if others else laid

    def coordinates(self, name: str) -> Coordinates | None:
        """Log-probabilities of a site's coordinates; None if they are tied."""
        return self.seen[name].coordinates(self.layouts[name].event)


class _Subsamples(CheckedRows):
    """Gives subsampled plates their rows, and notes which of them would have drawn them at random."""

    def __init__(self, rows: Mapping[str, torch.Tensor]):
        super().__init__()
        self.rows = rows
        self.random: set[str] = set()

    def _pyro_sample(self, msg) -> None:
        if not site_is_subsample(msg):
            return
        if msg["value"] is None and msg["fn"].subsample_size not in (None, msg["fn"].size):
            self.random.add(msg["name"])
        if msg["name"] in self.rows and msg["value"] is None:
            msg["value"] = self.rows[msg["name"]].to(msg["fn"].device)
            msg["done"] = True


class _Fixed(Messenger):
    """Latent sites take the values given; observed sites stay as they are."""

    def __init__(self, values: Mapping[str, torch.Tensor]):
        super().__init__()
        self.values = values

    def _pyro_sample(self, msg) -> None:
        if msg["name"] in self.values and not msg["is_observed"]:
            msg["value"] = self.values[msg["name"]]
            msg["done"] = True


class _Unobserve(Messenger):
    """Observed sites are drawn instead."""

    def __init__(self, names: set[str]):
        super().__init__()
        self.names = names

    def _pyro_sample(self, msg) -> None:
        if msg["name"] in self.names and msg["is_observed"]:
            msg["is_observed"] = False
            msg["value"] = None
            msg["done"] = False


def _innermost(fn: Any) -> Any:
    while isinstance(fn, torch.distributions.Independent):
        fn = fn.base_dist
    return fn


def _lengths(*traces: Trace) -> dict[str, int]:
    """How many rows stand in each plate that has no size of its own (``pyro.plate("data")``)."""
    found: dict[str, int] = {}
    for trace in traces:
        for _, site in random_sites(trace):
            value, fn = site["value"], site["fn"]
            if site["infer"].get("_deterministic"):
                continue  # to Pyro all of its dimensions are event dimensions
            batch = torch.broadcast_shapes(fn.batch_shape, value.shape[: value.dim() - fn.event_dim])
            for frame in site["cond_indep_stack"]:
                if frame.vectorized and frame.size == -1:
                    rows = batch[frame.dim] if -frame.dim <= len(batch) else 1
                    found[frame.name] = max(rows, found.get(frame.name, 1))
    return found


def _kind(site: Mapping[str, Any]) -> str:
    if site["infer"].get("_deterministic"):
        return "deterministic"
    fn = site["fn"]
    while hasattr(fn, "base_dist") and not isinstance(fn, torch.distributions.TransformedDistribution):
        fn = fn.base_dist
    if isinstance(fn, dist.Unit):
        return "factor"
    if site["is_observed"]:
        return "observed"
    return "latent"


class Sweep:
    """A model and a guide, bound to their arguments, that can be run for any number of draws and block of rows.

    ``batch_size`` passes so many rows of the arguments at a time; None passes them all. Raises
    :class:`~gumbo.errors.BadInput` for programs without a latent or an observed site, for latents that only one of the
    two draws, and where the arguments cannot be cut.
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
    ):
        self.latents_needed = latents_needed
        self._parameters: dict[int, set[str]] = {}  # names in the param store, by program
        self.model, self.guide, self.args, self.kwargs = model, guide, args, dict(kwargs)
        self.device = device_of(model, guide)
        self.row_ids: dict[str, torch.Tensor] = {}
        self.sizes: dict[str, int] = {}
        self.full_sizes: dict[str, int] = {}
        self.swept: dict[str, int] = {}
        self.at_hand: dict[str, torch.Tensor] = {}
        self.sliced: str | None = None
        self.depth = 0
        self.reason = ""
        # Sites that the model enumerates, which the guide is completed by.
        self.summed_out: frozenset[str] = frozenset()
        with quietly(model, guide, None):
            self._discover()
        self.divide(data_plates)
        if batch_size is not None:
            self._cut(batch_size)
        with quietly(model, guide, None):
            self.mode = mode or self._fastest()

    @property
    def vectorized(self) -> bool:
        """Whether many draws fit in one run."""
        return self.mode != "single"

    def slowly(self) -> str:
        """What there is to say of the pace."""
        return "" if self.vectorized else f", one by one, since they do not run together ({self.reason})"

    # --- what the programs are ----------------------------------------------------------------------------------------

    def _discover(self) -> None:
        subsamples = _Subsamples({})
        try:
            with subsamples:
                guide = poutine.trace(self.guide).get_trace(*self.args, **self.kwargs)
            rows = {
                name: row_numbers(name, site["value"])
                for name, site in guide.nodes.items()
                if site["type"] == "sample" and site_is_subsample(site)
            }
            subsamples.rows = rows
            with subsamples, _Fixed({name: site["value"] for name, site in random_sites(guide)}):
                model = poutine.trace(self.model).get_trace(*self.args, **self.kwargs)
        except GumboError:
            raise
        except _REFUSALS as error:
            raise BadInput(f"the programs fail on these arguments: {_first_line(error)}") from error
        whole = completed(self.model, self.guide, guide, model)
        if whole is not self.guide:
            self.guide, self.summed_out = whole, frozenset(whole.sites)
            return self._discover()
        held = {name: site["value"] for name, site in random_sites(guide)}
        open_ended = _lengths(guide, model)
        for trace in (guide, model):
            for name, site in trace.nodes.items():
                if not (site["type"] == "sample" and site_is_subsample(site)):
                    continue
                numbers = row_numbers(name, site["value"])
                if name not in self.at_hand:
                    self.row_ids[name] = numbers.detach().cpu()
                    if name in subsamples.random:
                        self._look_for_rows(name, site["fn"], rows | {name: site["value"]}, held, model)
            for _, site in random_sites(trace):
                batch = len(site["fn"].batch_shape)
                frames = [-frame.dim for frame in site["cond_indep_stack"] if frame.vectorized]
                if _kind(site) == "deterministic":
                    stack = {frame.dim: frame for frame in site["cond_indep_stack"] if frame.vectorized}
                    batch = len(self._deterministic_batch(site["value"], site["fn"].event_dim, stack))
                self.depth = max(self.depth, batch, *frames, 0)
                for frame in site["cond_indep_stack"]:
                    if frame.vectorized and frame.size == -1:
                        self.sizes[frame.name] = self.full_sizes[frame.name] = open_ended.get(frame.name, 1)
                    elif frame.vectorized:
                        swept = frame.name in subsamples.random and frame.name not in self.at_hand
                        self.full_sizes[frame.name] = frame.full_size or frame.size
                        self.sizes[frame.name] = frame.full_size if swept else frame.size
                        if swept:
                            self.swept[frame.name] = frame.size
                            self.row_ids[frame.name] = torch.arange(frame.full_size)
        self.guide_sites = {name: self._layout(name, site) for name, site in random_sites(guide)}
        self.model_sites = {name: self._layout(name, site) for name, site in random_sites(model)}
        self._check(guide, model)
        # What the guide computes from auxiliary draws it computes again from them: were it fixed as well, a value that
        # is off by rounding would have no density.
        auxiliary = self.guide_sites.keys() - self.model_sites.keys()
        self.computed = {name for name, layout in self.guide_sites.items() if layout.point and auxiliary}
        self.supports = {
            name: model.nodes[name]["fn"].support
            for name, layout in self.model_sites.items()
            if layout.kind == "latent"
        }
        observed = [name for name, layout in self.model_sites.items() if layout.kind == "observed"]
        self.observed_values = {name: model.nodes[name]["value"].detach() for name in observed}
        self.masked = frozenset(name for name in observed if unmasked(model.nodes[name]) is not None)

    def _look_for_rows(self, plate: str, subsample: Any, rows: Mapping, held: Mapping, model: Trace) -> None:
        """Whether a plate that would draw its rows is given a batch instead: then these are the rows there are.

        So it is with programs that are called with a batch under ``plate(size=…, subsample_size=len(batch))``: no
        argument has all rows, one has as many as are drawn, and other numbers of rows bring the same data.
        """
        full, size = subsample.size, subsample.subsample_size
        values = (*self.args, *self.kwargs.values())
        if any(_has_rows(value, full) for value in values) or not any(_has_rows(value, size) for value in values):
            return
        others = {**rows, plate: (rows[plate] + 1) % full}
        with _Subsamples(others), _Fixed(held):
            again = poutine.trace(self.model).get_trace(*self.args, **self.kwargs)
        same = [
            torch.equal(site["value"], model.nodes[name]["value"])
            for name, site in random_sites(again)
            if site["is_observed"] and name in model.nodes
        ]
        if all(same):
            self.at_hand[plate] = torch.arange(size)
            self.row_ids[plate] = torch.arange(size)

    def _check(self, guide: Trace, model: Trace) -> None:
        latent = [name for name, layout in self.model_sites.items() if layout.kind == "latent"]
        drawn = [name for name, layout in self.guide_sites.items() if layout.kind == "latent"]
        for name in latent:
            if name not in drawn:
                raise BadInput(
                    f"site {name!r} is latent in the model but the guide does not draw it: add it to the guide, or mark"
                    " a discrete one infer={'enumerate': 'parallel'} in the model"
                )
        for name in drawn:
            auxiliary = guide.nodes[name]["infer"].get("is_auxiliary") or name in self.model_sites
            if name not in latent and not auxiliary:
                raise BadInput(
                    f"site {name!r} is drawn by the guide but is no latent of the model: remove it, rename it, or mark"
                    " it infer={'is_auxiliary': True}"
                )
        if not latent and self.latents_needed:
            raise BadInput("the model has no latent site, so that there is no posterior")

    def _layout(self, name: str, site: Mapping[str, Any]) -> Layout:
        kind, fn, value = _kind(site), site["fn"], site["value"]
        frames = {frame.dim: frame for frame in site["cond_indep_stack"] if frame.vectorized}
        if kind == "deterministic":
            batch = self._deterministic_batch(value, fn.event_dim, frames)
            event_dim = value.dim() - len(batch)
        elif kind == "factor":
            event_dim, batch = 1, tuple(fn.batch_shape)
        else:
            event_dim = fn.event_dim
            batch = tuple(torch.broadcast_shapes(fn.batch_shape, value.shape[: value.dim() - event_dim]))
        depth = len(batch)
        # What is drawn once under a plate without a size is not drawn for each of its rows.
        for dim in [dim for dim, frame in frames.items() if frame.size == -1 and -dim <= depth]:
            if batch[dim] != self.sizes[frames[dim].name]:
                del frames[dim]
        dims = [dim for dim in range(-depth, 0) if dim in frames or batch[dim] > 1]
        names = tuple(frames[dim].name if dim in frames else None for dim in dims)
        return Layout(
            name,
            kind,
            tuple(dims),
            names,
            tuple(self.sizes.get(plate, batch[dim]) for plate, dim in zip(names, dims, strict=True)),
            tuple(value.shape[value.dim() - event_dim :]),
            depth,
            value.dtype,
            isinstance(_innermost(fn), dist.Delta) and kind == "latent",
            kind in ("latent", "observed") and bool(fn.support.is_discrete),
        )

    @staticmethod
    def _deterministic_batch(value: torch.Tensor, event_dim: int, frames: Mapping[int, Any]) -> tuple[int, ...]:
        """The leading dimensions that are the plates', since ``pyro.deterministic`` calls all of them event."""
        if event_dim < value.dim():
            return tuple(value.shape[: value.dim() - event_dim])
        depth = max((-dim for dim in frames), default=0)
        leading = value.shape[:depth]
        fits = len(leading) == depth and all(frame.size in (-1, leading[depth + dim]) for dim, frame in frames.items())
        return tuple(leading) if fits else ()

    def divide(self, data_plates: str | Sequence[str] | None) -> None:
        """Which plates make a datum, and which latents belong to one datum alone."""
        observed = [layout for layout in self.model_sites.values() if layout.kind == "observed"]
        # Where nothing is observed, factors are what the model says of a datum.
        observed = observed or [layout for layout in self.model_sites.values() if layout.kind == "factor"]
        self.latents = [name for name, layout in self.model_sites.items() if layout.kind == "latent"]
        self.observed = [layout.name for layout in observed if layout.kind == "observed"]
        self.evidence = "+".join(layout.name for layout in observed)
        common = frozenset.intersection(*[layout.plates for layout in observed]) if observed else frozenset()
        self.around_data = common
        depth_of = {
            plate: dim
            for layout in observed
            for plate, dim in zip(layout.names, layout.dims, strict=True)
            if plate is not None
        }
        if data_plates is None:
            with_latents = common & frozenset().union(*[self.model_sites[name].plates for name in self.latents])
            chosen = with_latents or common
        else:
            asked = (data_plates,) if isinstance(data_plates, str) else tuple(data_plates)
            for plate in asked:
                if plate not in common:
                    raise BadInput(
                        f"no plate {plate!r} encloses every observed site; those that do: "
                        f"{', '.join(sorted(common)) or 'none'}"
                    )
            chosen = frozenset(asked)
        self.data_plates = tuple(sorted(chosen, key=depth_of.__getitem__))
        wanted = set(self.data_plates)
        candidates = [name for name in self.latents if wanted and wanted <= self.model_sites[name].plates]
        self.local = [name for name in candidates if wanted <= self.guide_sites[name].plates]
        # Latents of single data whose draws the guide ties together: no weight of one datum can be formed.
        self.tied = len(self.local) < len(candidates) or (bool(candidates) and self._tied(candidates, wanted))
        if self.tied:
            self.local = []
        self.shared = [name for name in self.latents if name not in self.local]
        self.weight_plates = self.data_plates if self.local else ()
        shared = [self.model_sites[name] for name in self.shared]
        inside = frozenset.intersection(*[layout.plates for layout in shared]) if shared else frozenset()
        self.shared_plates = tuple(plate for plate in self.data_plates if plate in inside)

    def _tied(self, candidates: list[str], wanted: set[str]) -> bool:
        """Whether latents of single data get their values from one draw for all, or a factor joins them."""
        auxiliary = [layout for name, layout in self.guide_sites.items() if name not in self.model_sites]
        inside = [layout for layout in auxiliary if wanted <= layout.plates]
        points = [name for name in candidates if self.guide_sites[name].point]
        factors = [layout for layout in self.model_sites.values() if layout.kind == "factor"]
        joined = any(not wanted <= layout.plates for layout in factors)
        return joined or len(inside) < len(auxiliary) and len(inside) < len(points)

    # --- rows ---------------------------------------------------------------------------------------------------------

    def _cut(self, batch_size: int) -> None:
        if batch_size < 1:
            raise BadInput(f"batch_size is {batch_size}: expected at least 1")
        plates = [plate for plate in self.data_plates if plate not in self.swept]
        for plate in plates:
            size = self.sizes[plate]
            tensors = [value for value in (*self.args, *self.kwargs.values()) if _has_rows(value, size)]
            if not tensors or batch_size >= size:
                continue
            self.sliced = plate
            self.swept[plate] = batch_size
            try:
                with quietly(self.model, self.guide, None):
                    for block in (self._block({plate: slice(0, batch_size)}), list(self.blocks())[-1]):
                        self.run(1, block, mode="single")
            except GumboError:
                raise
            except _REFUSALS as error:
                raise BadInput(
                    f"the programs do not take {batch_size} of their {size} rows ({_first_line(error)}): leave out"
                    " batch_size, or let plate sizes follow the data"
                ) from error
            return
        if not self.swept and all(batch_size < self.sizes[plate] for plate in plates) and plates:
            raise BadInput(f"no argument has as many rows as plate {plates[0]!r}: leave out batch_size")

    def blocks(self) -> Iterator[Block]:
        """Blocks of rows that together hold every row once."""
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
                # A plate that subsamples wants exactly so many rows: the last block repeats some.
                start = max(0, span.stop - self.swept[plate])
            rows[plate] = torch.arange(start, span.stop)
            take[plate] = slice(span.start - start, span.stop - start)
        return Block(at, take, rows)

    def whole(self) -> Block | None:
        """The only block, if all rows fit in one."""
        blocks = list(itertools.islice(self.blocks(), 2))
        return blocks[0] if len(blocks) == 1 else None

    def _arguments(self, block: Block) -> tuple[tuple, dict]:
        if self.sliced is None or self.sliced not in block.at:
            return self.args, self.kwargs
        rows, size = block.at[self.sliced], self.sizes[self.sliced]

        def cut(value):
            return value[rows] if _has_rows(value, size) else value

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
        drawn = {name: guide.raw(name) for name in self.latents}
        seen = self._seen(self.model, self.model_sites, count, block, drawn, set(), mode, arguments)
        return guide, Pass(seen, self, self.model_sites, count, block)

    def over_rows(self, count: int, arguments: tuple[tuple, dict] | None = None) -> Iterator[tuple[Block, Pass, Pass]]:
        """Guide and model on every block of rows, what stands outside the rows at one and the same draws throughout."""
        held: dict[tuple, torch.Tensor] = {}
        for block in self.blocks():
            fixed, new = self.known(held, block, self.guide_sites)
            guide, model = self.run(count, block, fixed, arguments=arguments)
            self.keep(held, guide, new, self.guide_sites)
            self._check_held(guide, fixed, held, block)
            yield block, guide, model

    def known(self, held: dict, block: Block, layouts: Mapping[str, Layout]) -> tuple[dict, list[str]]:
        """Latents that an earlier block has drawn already, and those of this one that a later block will meet again."""
        names = [name for name, layout in layouts.items() if layout.kind == "latent" and set(block.at) - layout.plates]
        fixed = {n: held[_key(layouts[n], block)] for n in names if _key(layouts[n], block) in held}
        return fixed, [name for name in names if name not in fixed]

    def keep(self, held: dict, run: Pass, new: Sequence[str], layouts: Mapping[str, Layout]) -> None:
        """Remember what a block drew for the blocks to come."""
        for name in new:
            held[_key(layouts[name], run.block)] = run.whole_value(name)

    @staticmethod
    def _check_held(guide: Pass, fixed: Mapping, held: dict, block: Block) -> None:
        """A global latent's q must be the same whatever rows the program is given."""
        for name, layout in guide.layouts.items():
            if layout.kind != "latent" or not set(block.at) - layout.plates:
                continue
            now = guide.log_prob(name)
            before = held.setdefault(("log_q", *_key(layout, block)), now)
            if name in fixed and not torch.allclose(now, before, rtol=1e-3, atol=1e-3):
                raise BadInput(
                    f"the guide's distribution of {name!r} depends on the rows it is given, and these come in blocks: "
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
        """The guide alone, some of its latents given."""
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
        """The model alone at the latents given, others drawn from it; ``observe=False`` draws the data too."""
        hidden = set() if observe else set(self.observed)
        return self._pass(self.model, self.model_sites, count, block or Block(), fixed or {}, hidden, None, arguments)

    def _pass(self, program, layouts, count, block, fixed, hidden, mode=None, arguments=None) -> Pass:
        laid = {
            name: self._placed(value, layouts[name], count, block, mode or self.mode)
            for name, value in fixed.items()
            if name in layouts and not (program is self.guide and name in self.computed)
        }
        seen = self._seen(program, layouts, count, block, laid, hidden, mode, arguments)
        return Pass(seen, self, layouts, count, block)

    def _seen(self, program, layouts, count, block, values, hidden, mode=None, arguments=None) -> Mapping[str, Seen]:
        """The sites of a run at ``values``, which lie as the program has them."""
        mode = mode or self.mode

        def once(given: Mapping[str, torch.Tensor]) -> Trace:
            return self._trace(program, layouts, count, block, given, hidden, mode, arguments)

        if mode == "lanes":
            stored = pyro.get_param_store()
            if self._parameters.get(id(program), {""}) - set(stored.keys()):
                # A parameter that the param store meets for the first time cannot be registered from within vmap.
                with private_seed(None, program):
                    once({name: value[0] for name, value in values.items()})
                self._parameters[id(program)] = set(stored.keys())
            events = {name: layout.event for name, layout in layouts.items()}
            return run_lanes(once, values, count, events, self.device, self.masked)
        return {name: Seen(site) for name, site in random_sites(once(values))}

    def _trace(self, program, layouts, count, block, values, hidden, mode, arguments=None) -> Trace:
        args, kwargs = arguments or self._arguments(block)
        rows = self.at_hand | {name: index for name, index in block.rows.items() if name != self.sliced}
        with ExitStack() as stack:
            for handler in (_Subsamples(rows), _Unobserve(hidden), _Fixed(values)):
                stack.enter_context(handler)
            if mode == "plates":
                stack.enter_context(pyro.plate(DRAWS, count, dim=-1 - self.depth, device=str(self.device)))
            trace = poutine.trace(program).get_trace(*args, **kwargs)
        found = {name for name, _ in random_sites(trace)}
        if found != set(layouts):
            odd = sorted(found ^ set(layouts))[0]
            raise BadInput(
                f"site {odd!r} is there in some runs and not in others: programs whose sites change from draw to draw"
                " have no array of draws"
            )
        return trace

    def _fastest(self) -> str:
        """How many draws run at once: along a plate, along torch's vmap, or not at all.

        Two draws at once must mean what they mean one by one.
        """
        for mode in ("plates", "lanes"):
            if self._agrees(mode):
                return mode
        return "single"

    def _agrees(self, mode: str) -> bool:
        block = next(iter(self.blocks()))
        try:
            together = self.run(2, block, mode=mode)
            for draw in range(2):
                fixed = {name: together[0].whole_value(name)[draw : draw + 1] for name in self.guide_sites}
                alone = self.run(1, block, fixed, mode="single")
                for many, one in zip(together, alone, strict=True):
                    for name, layout in many.layouts.items():
                        if layout.kind == "deterministic" or layout.point:
                            a, b = many.value(name)[draw].double(), one.value(name)[0].double()
                        else:
                            a, b = many.log_prob(name)[draw], one.log_prob(name)[0]
                        if a.shape != b.shape or not _agree(a, b, layout.dtype):
                            self.reason = f"site {name!r} has other numbers when draws run together"
                            return False
        except GumboError:
            raise
        except (*_REFUSALS, Warning) as error:
            self.reason = _first_line(error)
            return False
        return True

    def held(self, run: Pass, name: str) -> torch.Tensor:
        """A latent's values in all rows that the run saw, repeated ones included, as ``fixed`` wants them."""
        return run.whole_value(name)

    def given(self, guide: Pass) -> dict[str, torch.Tensor]:
        """All that a run of the guide drew outside the data's plates, auxiliary draws included."""
        return {name: guide.whole_value(name) for name in self.outside_data()}

    def outside_data(self) -> list[str]:
        """What the guide draws outside the data's plates."""
        wanted = set(self.data_plates)
        return [
            name
            for name, layout in self.guide_sites.items()
            if layout.kind == "latent" and not (wanted and wanted <= layout.plates)
        ]

    def draws_a_run(self, block: Block | None = None) -> int:
        """How many draws of a block fit in one run."""
        block = block or next(iter(self.blocks()))
        numbers = 0
        for layout in (*self.guide_sites.values(), *self.model_sites.values()):
            size = layout.numel
            for plate in layout.plates & set(block.rows):
                size = size * len(block.rows[plate]) // self.sizes[plate]
            numbers += max(1, size)
        return max(1, _NUMBERS_A_RUN // numbers) if self.vectorized else 1

    # --- shapes -------------------------------------------------------------------------------------------------------

    def _sizes_in(self, layout: Layout, block: Block) -> tuple[int, ...]:
        return tuple(
            len(block.rows[name]) if name in block.rows else size
            for name, size in zip(layout.names, layout.sizes, strict=True)
        )

    def _placed(self, value, layout: Layout, count: int, block: Block, mode: str) -> torch.Tensor:
        """``(count, *batch, *event)`` as the program has it."""
        sizes = dict(zip(layout.dims, self._sizes_in(layout, block), strict=True))
        depth = self.depth if mode == "plates" else layout.depth
        batch = [sizes.get(dim, 1) for dim in range(-depth, 0)]
        return value.reshape([*([] if mode == "single" else [count]), *batch, *layout.event])

    def picked(self, value, batch, seen: Seen, layout: Layout, count: int) -> torch.Tensor:
        """Left-padded to ``(count, depth…)``, spread over the plates, and only the dimensions of the layout kept."""
        event = tuple(value.shape[len(batch) :])
        if isinstance(seen, Lane):
            value = value.reshape((batch[0],) + (1,) * (1 + self.depth - len(batch)) + tuple(batch[1:]) + event)
        else:
            value = value.reshape((1,) * (1 + self.depth - len(batch)) + tuple(batch) + event)
        target = [count] + [
            (seen.sizes.get(dim, value.shape[dim - len(event)])) if dim in layout.dims else 1
            for dim in range(-self.depth, 0)
        ]
        value = value.expand(*target, *event)
        drop = [1 + self.depth + dim for dim in range(-self.depth, 0) if dim not in layout.dims]
        return value.squeeze(drop) if drop else value


def _key(layout: Layout, block: Block) -> tuple:
    return (layout.name, *((plate, span.start) for plate, span in block.at.items() if plate in layout.plates))


def _has_rows(value: object, size: int) -> bool:
    return isinstance(value, torch.Tensor) and value.dim() > 0 and value.shape[0] == size


def _agree(a: torch.Tensor, b: torch.Tensor, dtype: torch.dtype) -> bool:
    size = b[b.isfinite()].abs().max().item() if b.isfinite().any() else 0.0
    tolerance = 1e-9 if dtype == torch.float64 else (2e-3 if a.is_cuda else 5e-5)
    return torch.allclose(a, b, rtol=0.0, atol=tolerance * (1 + size), equal_nan=True)


def _first_line(error: Exception) -> str:
    said = str(error).strip().splitlines()
    return f"{type(error).__name__}: {said[0]}" if said else type(error).__name__


@contextmanager
def quietly(model: Callable, guide: Callable, seed: int | None) -> Iterator[None]:
    """No gradients, evaluation mode, and a param store and random stream of our own.

    The stream is not that of ``torch.manual_seed(seed)``: a guide that was trained under the same seed would be judged
    by the very noise that it was trained on.
    """
    own = None if seed is None else (seed * 0x9E3779B9 + 0x5EED) % 2**63
    with private_store(model, guide), private_seed(own, model, guide), modes_kept(model, guide), torch.no_grad():
        for module in modules_of(model, guide):
            module.eval()
        yield
