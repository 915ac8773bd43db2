"""How good a fitted pair is: the bound, the evidence, and the two parts of the bound, in nats per datum."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field, fields
from functools import cached_property
from typing import TYPE_CHECKING

import torch

from ...errors import BadInput
from ..engine.rows import Rows
from ..engine.scopes import device_of, private_seed
from .runner import _REFUSALS, Sweep, quietly

if TYPE_CHECKING:
    from ..training.distributed import Processes
    from .information import Information

# Rows (data times draws) that one run of the programs holds: a bound on memory.
_ROWS_A_RUN = 8192
_PRIME = 1_000_003  # keeps the random streams of a seed's batches apart from those of its neighbours
PARTS = ("log_prior", "log_likelihood", "log_q", "log_global")


@dataclass(frozen=True)
class Evaluation:
    """What :func:`evaluate` found: means over the data and their standard errors, in nats per datum.

    ``elbo`` is ``-(rate + distortion)``; ``log_evidence`` is the importance-weighted estimate of log p(x) over
    ``num_samples`` draws, a lower bound in expectation that tightens with the number of draws (Burda et al. 2015,
    arXiv:1509.00519); ``rate`` is E[log q(z | x) - log p(z)] and ``distortion`` is -E[log p(x | z)] (Alemi et al. 2018,
    arXiv:1711.00464). ``kl``, ``active_units`` and ``mutual_information`` are found when asked for.
    """

    elbo: float
    elbo_se: float
    log_evidence: float
    log_evidence_se: float
    rate: float
    rate_se: float
    distortion: float
    distortion_se: float
    num_data: int
    num_samples: int
    _ask: Callable[[], Information] | None = field(default=None, compare=False, repr=False)

    def as_dict(self) -> dict[str, float]:
        """The means, errors and counts; `information` has the rest."""
        return {item.name: getattr(self, item.name) for item in fields(self) if item.name != "_ask"}

    @cached_property
    def information(self) -> Information:
        """KL, activity and mutual information, see :func:`.information.information`.

        They cost runs of their own and are found when first asked for, with the parameters as they then are.
        """
        if self._ask is None:
            raise BadInput(
                "this evaluation does not know its programs: call gumbo.inference.posterior.information.information"
            )
        return self._ask()

    @property
    def kl(self) -> dict[str, torch.Tensor]:
        """KL of the guide to the prior, in nats, by latent site and dimension."""
        return self.information.kl

    @property
    def active_units(self) -> dict[str, torch.Tensor]:
        """Which latent dimensions vary with the data, by site."""
        return self.information.active_units

    @property
    def mutual_information(self) -> float | None:
        """Nats that the latents know of the data; None where the guide's density cannot be had."""
        return self.information.mutual_information


def evaluate(
    model: Callable,
    guide: Callable,
    data: object,
    *,
    num_samples: int = 100,
    batch_size: int = 256,
    seed: int | None = 0,
    plate: str | None = None,
    processes: Processes | None = None,
) -> Evaluation:
    """The true bound and the importance-weighted evidence of a model and guide on ``data``, in nats per datum.

    ``data`` is the positional arguments of both programs as a tuple, their keywords as a mapping, or else their one
    argument; tensors that have as many rows as the first one are cut into batches, all else is passed whole (as in
    ``fit``). Any Pyro pair will do whose latents the guide all draws. The *data plate* is the one of N rows
    that encloses all that is observed (``plate`` names it where more than one fits); one that subsamples is visited in
    full. Each datum's log-weight is summed over everything else; a plate's subsampling scale does not enter.

    Latents outside that plate are global (the weights of a regression): their KL is spread evenly over the data (where
    the rows are a batch under a plate of more, over all that it counts) and enters the bound and the rate;
    ``log_evidence`` is then the log predictive density of each datum, averaged over the guide's draws of them. All rows
    are then passed at once; else ``batch_size`` of them, where the programs take so few. Where the guide draws the
    latents of all data jointly, or no plate encloses the data, there is one weight for all: ``log_evidence`` is that of
    all data over N, and its error (without a plate, every error) is that of the draws. A relaxed pair that knows its
    exact counterpart is judged by that counterpart.

    Networks run in evaluation mode without gradients; parameters, param store, seeds and training flags stay as they
    were, and the same ``seed`` gives the same numbers (``None`` draws from the current stream). Several ``processes``,
    which must all call it alike, take every so-manieth batch each and all get the numbers that one would have found.

    Raises :class:`~gumbo.errors.BadInput` for empty data, NaN, a latent that only one of the two programs draws, or a
    draw outside a prior's support.

    >>> import pyro, pyro.distributions as dist
    >>> def model(x):
    ...     with pyro.plate("data", len(x)):
    ...         z = pyro.sample("z", dist.Normal(0.0, 1.0))
    ...         pyro.sample("x", dist.Normal(z, 1.0), obs=x)
    >>> def exact_posterior(x):
    ...     with pyro.plate("data", len(x)):
    ...         pyro.sample("z", dist.Normal(x / 2, 0.5**0.5))
    >>> x = torch.tensor([0.3, -1.2])
    >>> truth = dist.Normal(0.0, 2**0.5).log_prob(x).mean()
    >>> found = evaluate(model, exact_posterior, x, num_samples=5)
    >>> bool(torch.isclose(torch.tensor(found.log_evidence), truth)), abs(found.elbo - found.log_evidence) < 1e-5
    (True, True)
    """
    if processes is not None and seed is None:
        raise BadInput("several processes draw what one would from a seed: pass seed=")
    parts, whole = _drawn(model, guide, data, num_samples, batch_size, seed, plate, processes)
    log_weight = parts["log_prior"] + parts["log_likelihood"] - parts["log_q"]
    found = {
        "elbo": log_weight + parts["log_global"],
        "rate": parts["log_q"] - parts["log_prior"] - parts["log_global"],
        "distortion": -parts["log_likelihood"],
    }
    numbers: dict[str, float] = {}
    for name, value in found.items():
        # By datum over draws; where no datum can be told from the others, by draw.
        numbers[name], numbers[f"{name}_se"] = _mean_and_error(value.mean(0 if whole != "all" else 1))
    if whole:
        evidence = _evidence_together(found["elbo"].sum(1))
        numbers["log_evidence"], numbers["log_evidence_se"] = (one / log_weight.shape[1] for one in evidence)
    else:
        each = torch.logsumexp(log_weight, 0) - math.log(num_samples)
        numbers["log_evidence"], numbers["log_evidence_se"] = _mean_and_error(each)

    def ask() -> Information:
        from .information import information

        with private_seed(None, model, guide):
            pair = exact_pair(model, guide)
        return information(*pair, data, seed=seed, plate=plate)

    return Evaluation(**numbers, num_data=log_weight.shape[1], num_samples=num_samples, _ask=ask)


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

    ``log_global`` of the same shape is log p - log q of the latents outside the data plate, each datum's share.
    """
    return _drawn(model, guide, data, num_samples, batch_size, seed, plate)[0]


def _drawn(
    model: Callable,
    guide: Callable,
    data: object,
    num_samples: int,
    batch_size: int,
    seed: int | None,
    plate: str | None,
    processes: Processes | None = None,
) -> tuple[dict[str, torch.Tensor], str]:
    """The parts of all log-weights, and what has one weight only: "" if nothing, the "latents", or "all"."""
    rows = Rows(data).check("data")
    if num_samples < 1:
        raise BadInput(f"num_samples is {num_samples}: expected at least 1")
    if batch_size < 1:
        raise BadInput(f"batch_size is {batch_size}: expected at least 1")
    with private_seed(None, model, guide):
        model, guide = exact_pair(model, guide)
    rows = rows.to(device_of(model, guide))
    sweep, name, size = _first_sweep(model, guide, rows, batch_size, plate)

    def piece(number: int) -> dict[str, torch.Tensor]:
        batch, here = rows[number * size : (number + 1) * size], (sweep, name)
        if len(batch) < min(size, len(rows)):
            here = _sweep(model, guide, batch, plate, sweep.mode)
        # A seed of its own for each batch: whoever evaluates it draws the same.
        with nullcontext() if seed is None else private_seed(seed + _PRIME * number, model, guide):
            return _batch(*here, batch, num_samples, None if rows.whole else len(rows))

    def pieces_of(numbers: range) -> list[dict[str, torch.Tensor]]:
        with quietly(model, guide, seed):
            return [piece(number) for number in numbers]

    count = math.ceil(len(rows) / size)
    if processes is None:
        pieces = pieces_of(range(count))
    else:
        mine = range(processes.index, count, processes.number)
        shares = processes.gather(processes.together(lambda: pieces_of(mine)))
        pieces = [shares[number % processes.number][number // processes.number] for number in range(count)]
    whole = "all" if name is None else "latents" if sweep.tied else ""
    return {part: torch.cat([piece[part] for piece in pieces], 1) for part in pieces[0]}, whole


def _evidence_together(log_weight: torch.Tensor) -> tuple[float, float]:
    """log p(x) of everything from joint weights ``(S,)``, and its standard error by the delta method."""
    weight = (log_weight - log_weight.max()).exp()
    error = weight.std().item() / math.sqrt(len(weight)) / weight.mean().item() if len(weight) > 1 else math.nan
    return (weight.mean().log() + log_weight.max()).item(), error


def exact_pair(model: Callable, guide: Callable) -> tuple[Callable, Callable]:
    """The discrete programs behind a relaxed pair, over the same networks; any other pair itself.

    A relaxed model says so by ``relaxed``, gives its discrete form by ``exact()``, and its guide by ``exact(model)``.
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
    """The programs on a batch of rows, the data plate, and how many rows a batch has.

    They see all rows at once where something depends on all of them: latents outside the data plate, a joint draw, a
    plate that is written for so many rows.
    """
    if batch_size < len(rows):
        try:
            sweep, name = _sweep(model, guide, rows[:batch_size], plate)
            last, also = _sweep(model, guide, rows[-(len(rows) % batch_size or batch_size) :], plate, sweep.mode)
            if name is not None and name == also and not sweep.outside_data():
                return sweep, name, batch_size
        except (BadInput, *_REFUSALS):
            pass  # said again below, if it is not for want of rows
    sweep, name = _sweep(model, guide, rows, plate)
    return sweep, name, len(rows)


def _sweep(
    model: Callable, guide: Callable, rows: Rows, plate: str | None, mode: str | None = None
) -> tuple[Sweep, str | None]:
    """The programs on these rows, and the plate over the data: None if nothing encloses all that is observed."""
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
    sweep: Sweep, name: str | None, batch: Rows, num_samples: int, num_data: int | None
) -> dict[str, torch.Tensor]:
    """All draws of one batch, each part ``(num_samples, B)``; where no argument has rows, the plate says how many."""
    size = sweep.sizes[name] if batch.whole and name is not None else len(batch)
    num_data = num_data or size
    parts = {part: torch.zeros(num_samples, size, dtype=torch.float64) for part in PARTS}
    # A plate that is no subsample of more stands for the data at hand, which may come in batches.
    at_hand = name is None or name not in sweep.at_hand
    data_size = num_data if at_hand and sweep.full_sizes.get(name, size) == size else sweep.full_sizes[name]
    per_run = max(1, min(num_samples, sweep.draws_a_run(), _ROWS_A_RUN // size))
    for start in range(0, num_samples, per_run if sweep.vectorized else 1):
        count = min(per_run if sweep.vectorized else 1, num_samples - start)
        where = slice(start, start + count)
        for block, guide, model in sweep.over_rows(count, (batch.args, batch.kwargs)):
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
    return parts


def _mean_and_error(values: torch.Tensor) -> tuple[float, float]:
    error = values.std().item() / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return values.mean().item(), error
