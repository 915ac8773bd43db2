"""How the rows of data and the draws of each are divided: rows a batch, draws a run."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import suppress

import torch

from ...errors import PROGRAM_ERRORS, BadInput
from ..engine.rows import Rows, is_array
from ..engine.scopes import autoguides_in, device_of, quietly
from .alone import Run, changed_alone
from .runner import Sweep

Found = tuple[Sweep, "str | None"]

# Rows (data times draws) per run of the programs, which bounds memory.
_ROWS_A_RUN = 8192
# The number of rows on which the programs are examined: odd, so that no other dimension is likely to have it.
_FEW = 7
# The limits of the default batch size: the more draws a row has, the fewer rows.
_FEWEST_ROWS, _MOST_ROWS = 64, 1024
# Batches are compared with a run on the first rows: at least so many, or those of so many numbers.
_FEWEST_COMPARED, _COMPARED = 2 * _FEWEST_ROWS, 2**19
# Numbers per run over all sites, where each row has draws of its own.
_LARGEST_RUN = 2**21


def first_sweep(
    model: Callable, guide: Callable, rows: Rows, batch_size: int | None, plate: str | None, num_samples: int
) -> tuple[Rows, int, Found, Found]:
    """The rows of the data plate, their number per batch, and the programs with that plate on the first and last batch.

    There is one batch of all rows if something depends on all of them: latents outside the data plate, a joint draw,
    rows that depend on each other, terms that the other rows of a batch change, a plate of fixed size. The number of
    rows is that of the first argument, or else of the data plate in a run on everything.
    """
    if any(one.prototype_trace is None for one in autoguides_in(guide)):
        with suppress(*PROGRAM_ERRORS), quietly(model, guide, 0):
            everything = rows.to(device_of(model, guide))
            guide(*everything.args, **everything.kwargs)  # the number of rows of its first call sizes its parameters
    if found := _in_batches(model, guide, rows, batch_size, plate, num_samples):
        return rows, *found
    whole, name = sweep_of(model, guide, rows, plate, whole=True)
    if name is not None and whole.sizes[name] != len(rows):
        rows = rows.counted_as(whole.sizes[name]).check("data")
        if not rows.whole and (found := _in_batches(model, guide, rows, batch_size, name, num_samples)):
            return rows, *found
    return rows, len(rows), (whole, name), (whole, name)


def _in_batches(
    model: Callable, guide: Callable, rows: Rows, batch_size: int | None, plate: str | None, num_samples: int
) -> tuple[int, Found, Found] | None:
    """`first_sweep` of programs that take batches; None for others."""
    if min(batch_size or _FEW, _FEW) >= len(rows):
        return None
    try:
        few, name = sweep_of(model, guide, rows[: min(batch_size or _FEW, _FEW)], plate)
        if name is None or few.tied or few.outside_data():
            return None
        size = batch_size or _fitting(few, len(rows), num_samples)
        if size >= len(rows):
            return None
        first = last = _resized(few, rows[:size], plate, name)
        if left := len(rows) % size:
            last = _resized(few, rows[-left:], plate, name)
        known = first[1] == last[1] == name and not first[0].outside_data()
        return (size, first, last) if known and _stand_alone(few, rows, size, plate, name) else None
    except (BadInput, *PROGRAM_ERRORS):
        return None  # a run on all rows raises it again, or does not have the problem


def _stand_alone(few: Sweep, rows: Rows, size: int, plate: str | None, name: str) -> bool:
    """Whether the first rows have the same terms in batches as all together, at the same draws.

    As many rows are run as memory surely allows; a row that reads one further away than these is not found.
    """
    a_row = max(1, few.numbers_a_draw() // few.sizes[name])
    rows = rows[: min(max(_FEWEST_COMPARED, _COMPARED // a_row), _ROWS_A_RUN)].to(few.device)
    size = min(size, len(rows) // 2)

    def run_on(batch: Rows) -> Run:
        sweep = _resized(few, batch, plate, name)[0]
        return lambda values: sweep.run(1, fixed=values, arguments=(batch.args, batch.kwargs))

    # A row may depend on those before it or on those after it.
    numbers = torch.arange(len(rows))
    parts = ((run_on(rows[part]), numbers[part]) for part in (slice(size), slice(len(rows) - size, None)))
    with quietly(few.model, few.guide, 0):
        return changed_alone(run_on(rows), parts, name) is None


def _resized(few: Sweep, batch: Rows, plate: str | None, name: str) -> Found:
    """`sweep_of` of a batch, of programs whose sites were found on a few rows."""
    found = few.with_rows(name, len(batch))
    if found is None:
        return sweep_of(few.model, few.guide, batch, plate, few.mode)
    return found, name


def _fitting(few: Sweep, count: int, num_samples: int) -> int:
    """The rows of a batch whose draws all fit into one run, within limits; batches of about equal size."""
    a_run = few.draws_a_run(at_most=_LARGEST_RUN) * min(_FEW, count) if few.vectorized else _MOST_ROWS
    size = min(_MOST_ROWS, max(_FEWEST_ROWS, a_run // num_samples))
    return math.ceil(count / math.ceil(count / size))


def sweep_of(
    model: Callable, guide: Callable, rows: Rows, plate: str | None, mode: str | None = None, *, whole: bool = False
) -> Found:
    """The programs on these rows, and the data plate: None if no plate encloses all observed sites.

    The data plate of a batch is the one with as many elements as the batch has rows. ``whole`` says that these are all
    rows: then it is ``plate``, whatever its size; or the plate with as many elements as an argument has rows, the first
    argument for which there is one; or the plate that holds latents.
    """
    rows = rows.to(device_of(model, guide))
    sweep = Sweep(model, guide, rows.args, rows.kwargs, mode=mode, latents_needed=False)
    around = [name for name in sweep.sizes if name in sweep.around_data]
    counts = [len(rows)] if not rows.whole else []
    if whole:
        counts += [len(value) for _, value in rows.named() if is_array(value)]
    by_count = ([name for name in around if sweep.sizes[name] == count] for count in counts)
    fitting = next(filter(None, by_count), list(sweep.data_plates) if whole else [])
    known = around if whole else fitting
    if plate is not None and plate not in known:
        of = "" if whole else f" of {len(rows)} rows"
        raise BadInput(
            f"no plate {plate!r}{of} encloses every observed site; those that do: {', '.join(known) or 'none'}"
        )
    if plate is None and len(fitting) > 1:
        raise BadInput(f"plates {', '.join(fitting)} all fit the data: name one with plate=")
    name = plate or (fitting[0] if fitting else None)
    sweep.divide(name or ())
    return sweep, name


def data_in(sweep: Sweep, name: str | None, batch: Rows) -> int:
    """The number of data in a batch; where no argument has rows, the plate gives it."""
    return len(batch) if name is None else sweep.sizes[name]


def turns_of(sweep: Sweep, num_samples: int, size: int) -> list[int]:
    """The draws of a batch of ``size`` rows, a run at a time."""
    together = sweep.tied or bool(sweep.shared)
    a_run = sweep.draws_a_run() if together else sweep.draws_a_run(at_most=_LARGEST_RUN)
    per_run = max(1, min(num_samples, a_run, _ROWS_A_RUN // size)) if sweep.vectorized else 1
    if together:
        return [min(per_run, num_samples - start) for start in range(0, num_samples, per_run)]
    runs = math.ceil(num_samples / per_run)  # of about equal length
    return [num_samples // runs + (run < num_samples % runs) for run in range(runs)]
