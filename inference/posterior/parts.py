"""The terms of every datum's log-weight, log p(z), log p(x | z) and log q(z | x), over all rows and many draws."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from ...errors import PROGRAM_ERRORS, BadInput
from ..engine.rows import ProcessGroup, Rows
from ..engine.scopes import device_of, private_seed, quietly
from ..engine.stored_rows import rows_in
from .importance import integrated, rounding_of
from .runner import Sweep

if TYPE_CHECKING:
    pass


# Rows (data times draws) per run of the programs, which bounds memory.
_ROWS_A_RUN = 8192
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
    batch_size: int = 256,
    seed: int | None = 0,
    plate: str | None = None,
) -> dict[str, torch.Tensor]:
    """``log_prior``, ``log_likelihood`` and ``log_q`` in nats, each ``(num_samples, N)`` in float64.

    ``log_global`` of the same shape is log p − log q of the latents outside the data plate, divided among the data.
    """
    return all_parts(model, guide, data, num_samples, batch_size, seed, plate).parts


@dataclass(frozen=True)
class Parts:
    """The terms of all log-weights ``(S, N)``, and which data share a weight.

    ``one_weight`` is empty where each datum has its own weight; "globals" where these are conditional on global
    latents; "latents" where the guide draws all latents jointly; "all" where no plate separates the data.
    ``integrated`` among the parts is each datum's likelihood given the global latents. ``reason`` says why there is no
    evidence whatever the weights.
    """

    parts: dict[str, torch.Tensor]
    one_weight: str
    num_local_samples: int
    reason: str
    rounding: Callable[[float], float]


def all_parts(
    model: Callable,
    guide: Callable,
    data: object,
    num_samples: int,
    batch_size: int,
    seed: int | None,
    plate: str | None,
    processes: ProcessGroup | None = None,
    num_local_samples: int | None = 1,
) -> Parts:
    rows = rows_in(data).check("data")
    if num_samples < 1:
        raise BadInput(f"num_samples is {num_samples}: expected at least 1")
    if batch_size < 1:
        raise BadInput(f"batch_size is {batch_size}: expected at least 1")
    with private_seed(None, model, guide):
        model, guide = exact_pair(model, guide)
    device = device_of(model, guide)
    sweep, name, size = _first_sweep(model, guide, rows, batch_size, plate)
    one_weight = "all" if name is None else "latents" if sweep.tied else "globals" if sweep.shared else ""
    inner = 1
    if one_weight == "globals" and not sweep.summed_out.issuperset(sweep.local):
        inner = num_local_samples or (_LOCAL_SAMPLES if sweep.vectorized else 1)

    def piece(number: int) -> dict[str, torch.Tensor]:
        batch, here = rows[number * size : (number + 1) * size].to(device), (sweep, name)
        if len(batch) < min(size, len(rows)):
            here = _sweep(model, guide, batch, plate, sweep.mode)
        # A separate seed for each batch: every process draws the same for it.
        with nullcontext() if seed is None else private_seed(seed + _PRIME * number, model, guide):
            return _batch(*here, batch, num_samples, None if rows.whole else len(rows), inner)

    def pieces_of(numbers: range) -> list[dict[str, torch.Tensor]]:
        with quietly(model, guide, seed):
            return [piece(number) for number in numbers]

    count = math.ceil(len(rows) / size)
    if processes is None:
        pieces = pieces_of(range(count))
    else:
        mine = range(processes.rank, count, processes.world_size)
        shares = processes.gather(processes.together(lambda: pieces_of(mine)))
        pieces = [shares[number % processes.world_size][number // processes.world_size] for number in range(count)]
    parts = {part: torch.cat([piece[part] for piece in pieces], 1) for part in pieces[0]}
    if "integrated" in parts and parts["integrated"].isnan().any():
        # The guide draws global latents given local ones: only the joint draw has a weight.
        del parts["integrated"]
        inner = 1
    reason = _no_evidence(sweep, name, parts["log_q"].shape[1], bool(parts["log_global"].any()))
    return Parts(parts, one_weight, inner, reason, lambda largest: rounding_of(sweep, largest))


def _no_evidence(sweep: Sweep, name: str | None, num_data: int, globals_count: bool) -> str:
    """The reason why importance weights of these programs do not estimate the evidence; empty if they do."""
    points = [
        site
        for site in sweep.latents
        if sweep.guide_sites[site].point and site not in sweep.computed and not sweep.model_sites[site].discrete
    ]
    if points:
        return f"the guide is a point at {points[0]!r}, which has no density; neither is the ELBO a bound"
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


def _first_sweep(
    model: Callable, guide: Callable, rows: Rows, batch_size: int, plate: str | None
) -> tuple[Sweep, str | None, int]:
    """The programs on a batch of rows, the data plate, and the number of rows per batch.

    They get all rows at once if something depends on all of them: latents outside the data plate, a joint draw, a plate
    of fixed size.
    """
    if batch_size < len(rows):
        try:
            sweep, name = _sweep(model, guide, rows[:batch_size], plate)
            last, also = _sweep(model, guide, rows[-(len(rows) % batch_size or batch_size) :], plate, sweep.mode)
            if name is not None and name == also and not sweep.outside_data():
                return sweep, name, batch_size
        except (BadInput, *PROGRAM_ERRORS):
            pass  # raised again below, unless all rows remove the cause
    sweep, name = _sweep(model, guide, rows, plate)
    return sweep, name, len(rows)


def _sweep(
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


def _batch(
    sweep: Sweep, name: str | None, batch: Rows, num_samples: int, num_data: int | None, inner: int
) -> dict[str, torch.Tensor]:
    """All draws of one batch, each term ``(num_samples, B)``; ``inner`` draws of local latents per global draw.

    Where no argument has rows, the plate gives their number.
    """
    size = sweep.sizes[name] if batch.whole and name is not None else len(batch)
    num_data = num_data or size
    parts = {part: torch.zeros(num_samples, size, dtype=torch.float64) for part in PARTS}
    if inner > 1:
        parts["integrated"] = torch.zeros(num_samples, size, dtype=torch.float64)
    data_size = _data_size(sweep, name, size, num_data)
    arguments = batch.args, batch.kwargs
    per_run = max(1, min(num_samples, sweep.draws_a_run(), _ROWS_A_RUN // size))
    for start in range(0, num_samples, per_run if sweep.vectorized else 1):
        count = min(per_run if sweep.vectorized else 1, num_samples - start)
        where = slice(start, start + count)
        for block, guide, model in sweep.over_rows(count, arguments):
            for run in (guide, model):
                for site, layout in run.layouts.items():
                    if layout.kind == "deterministic" or not block.first(layout):
                        continue
                    keep = (name,) if name in layout.plates else ()
                    value = run.log_prob(site, keep, scaled=True).cpu()
                    if torch.isnan(value).any():
                        raise BadInput(
                            f"site {site!r} has a log-probability of NaN: look at the parameters of its distribution"
                        )
                    part = "log_q" if run is guide else "log_prior" if layout.kind == "latent" else "log_likelihood"
                    if keep:
                        parts[part][where, block.index(keep)[0]] += value
                    elif name is None:
                        parts[part][where] += value[:, None] / size
                    else:
                        parts["log_global"][where] += (-value if run is guide else value)[:, None] / data_size
            if inner > 1:
                found, known = integrated(
                    sweep, block, sweep.given(guide), inner, guide, np.arange(count), arguments=arguments, scaled=True
                )
                parts["integrated"][where, block.index((name,))[0]] = found.cpu() if known else math.nan
    return parts
