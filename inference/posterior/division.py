"""How the rows of data and the draws of each are divided: rows a batch, draws a run."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from ...errors import PROGRAM_ERRORS, BadInput
from ..engine.rows import Rows
from ..engine.scopes import device_of, quietly
from .runner import Sweep, agree

# Rows (data times draws) per run of the programs, which bounds memory.
_ROWS_A_RUN = 8192
# Rows on which is found how the programs run, an odd number that no other dimension is likely to have.
_FEW = 7
# Rows of a batch where no number is asked for: few runs for few draws, and few runs of the guide for many.
_FEWEST_ROWS, _MOST_ROWS = 64, 1024
# Numbers per run over all sites, where each row has draws of its own.
_LARGEST_RUN = 2**21


def first_sweep(
    model: Callable, guide: Callable, rows: Rows, batch_size: int | None, plate: str | None, num_samples: int
) -> tuple[int, tuple[Sweep, str | None], tuple[Sweep, str | None]]:
    """The number of rows per batch, and the programs with the data plate on the first batch and on the last.

    They get all rows at once if something depends on all of them: latents outside the data plate, a joint draw, rows
    that depend on each other, terms that the other rows of a batch change, a plate of fixed size.
    """
    if min(batch_size or _FEW, _FEW) < len(rows):
        try:
            few, name = sweep_of(model, guide, rows[: min(batch_size or _FEW, _FEW)], plate)
            if name is not None and not few.tied and not few.outside_data():
                size = batch_size or _fitting(few, len(rows), num_samples)
                if size < len(rows):
                    first = last = _resized(few, rows[:size], plate, name)
                    if left := len(rows) % size:
                        last = _resized(few, rows[-left:], plate, name)
                    known = first[1] == last[1] == name and not first[0].outside_data()
                    if known and _independent(few, rows, min(size, _FEWEST_ROWS), plate, name):
                        return size, first, last
        except (BadInput, *PROGRAM_ERRORS):
            pass  # raised again below, unless all rows remove the cause
    whole = sweep_of(model, guide, rows, plate)
    return len(rows), whole, whole


def _independent(few: Sweep, rows: Rows, size: int, plate: str | None, name: str) -> bool:
    """Whether rows have the same terms, at the same draws, without the ``size`` rows before."""
    rows = rows[: 2 * size]

    def run(batch: Rows, values: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], list[tuple[Tensor, Any]]]:
        sweep, batch = _resized(few, batch, plate, name)[0], batch.to(few.device)
        both = sweep.run(1, fixed=values, arguments=(batch.args, batch.kwargs))
        found = [
            (one.log_prob(site, (name,))[:, size - len(rows) :], layout.dtype)
            for one in both
            for site, layout in one.layouts.items()
            if layout.kind != "deterministic"
        ]
        return {site: both[0].whole_value(site) for site in sweep.latents}, found

    def same(found: list, other: list) -> bool:
        return all(agree(a, b, dtype) for (a, dtype), (b, _) in zip(found, other, strict=True))

    with quietly(few.model, few.guide, 0):
        drawn, _ = run(rows, {})
        _, before = run(rows, drawn)
        _, again = run(rows, drawn)
        later = torch.arange(size, len(rows), device=few.device)
        places = {site: 1 + few.model_sites[site].names.index(name) for site in drawn}
        _, alone = run(rows[size:], {site: value.index_select(places[site], later) for site, value in drawn.items()})
    # Where a repetition differs the programs draw noise of their own, which no comparison tells from a dependence.
    return same(alone, before) or not same(again, before)


def _resized(few: Sweep, batch: Rows, plate: str | None, name: str) -> tuple[Sweep, str | None]:
    """`sweep_of` of a batch, of programs whose sites were found on a few rows."""
    found = few.with_rows(name, len(batch))
    if found is None:
        return sweep_of(few.model, few.guide, batch, plate, few.mode)
    return found, name


def _fitting(few: Sweep, count: int, num_samples: int) -> int:
    """Rows of a batch such that all draws of it fit one run, within limits; batches have equally many, but the last."""
    a_run = few.draws_a_run(at_most=_LARGEST_RUN) * min(_FEW, count) if few.vectorized else _MOST_ROWS
    size = min(_MOST_ROWS, max(_FEWEST_ROWS, a_run // num_samples))
    return math.ceil(count / math.ceil(count / size))


def sweep_of(
    model: Callable, guide: Callable, rows: Rows, plate: str | None, mode: str | None = None
) -> tuple[Sweep, str | None]:
    """The programs on these rows, and the data plate: None if no plate encloses all observed sites."""
    rows = rows.to(device_of(model, guide))
    sweep = Sweep(model, guide, rows.args, rows.kwargs, mode=mode, latents_needed=False)
    fitting = [name for name in sweep.sizes if name in sweep.around_data]
    of = "" if rows.whole else f" of {len(rows)} rows"
    if not rows.whole:
        fitting = [name for name in fitting if sweep.sizes[name] == len(rows)]
    elif plate is None:
        fitting = list(sweep.data_plates)
    if plate is not None and plate not in fitting:
        raise BadInput(
            f"no plate {plate!r}{of} encloses every observed site; those that do: {', '.join(fitting) or 'none'}"
        )
    if plate is None and len(fitting) > 1:
        raise BadInput(f"plates {', '.join(fitting)} all fit the data: name one with plate=")
    name = plate or (fitting[0] if fitting else None)
    sweep.divide(name or ())
    return sweep, name


def turns_of(sweep: Sweep, num_samples: int, size: int) -> list[int]:
    """The draws of a batch of ``size`` rows, a run at a time."""
    together = sweep.tied or bool(sweep.shared)
    a_run = sweep.draws_a_run() if together else sweep.draws_a_run(at_most=_LARGEST_RUN)
    per_run = max(1, min(num_samples, a_run, _ROWS_A_RUN // size)) if sweep.vectorized else 1
    if together:
        return [min(per_run, num_samples - start) for start in range(0, num_samples, per_run)]
    runs = math.ceil(num_samples / per_run)  # of about equal length
    return [num_samples // runs + (run < num_samples % runs) for run in range(runs)]
