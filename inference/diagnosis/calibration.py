"""Simulation-based calibration: ranks of latents drawn by the model among the guide's draws must be uniform."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import pyro
import torch

from ...errors import PROGRAM_ERRORS, BadInput, GumboError, first_line
from ..engine.progress import Stages
from ..engine.scopes import quietly
from ..posterior.likelihoods import changing_factors, masked_priors
from ..posterior.refits import refitted
from ..posterior.runner import Pass, Sweep
from .report import ALARM, OK, Verdict, not_done
from .thresholds import ROUNDING, UNIFORM
from .units import direction, to_units, turned

_COORDINATES = 10
# Simulated data sets that a guide's site is compared at before it counts as one that does not read the data.
_TRIES = 5
_POINTS = 20  # at which the ECDF of ranks is compared
_SIDES = " (by its sides)"
_UNREAD = "the guide does not read the data, so that calibrating it needs a fit to each simulated data set"
_OFFER = (
    "calibration_refits=50 fits it to 50 data sets that the model draws (Yao et al. 2018, arXiv:1802.02538); a guide "
    "that is no module needs refit= as well"
)


def calibration(
    sweep: Sweep,
    simulations: int,
    seed: int | None,
    skipped: dict[str, str],
    ranks: dict[str, np.ndarray],
    say: Stages,
    refits: int = 0,
    steps: int = 1000,
    refit: Callable | None = None,
) -> tuple[dict[str, Verdict], int]:
    """Ranks of simulated latents among the guide's draws; with ``refits``, of guides fitted to each data set.

    They are added to ``ranks``. Returns the verdict, and the number of draws that the ranks are among, 0 without ranks.
    """
    try:
        with quietly(sweep.model, sweep.guide, None if seed is None else seed + 1):
            if refits:
                found, draws = refitted_ranks(sweep, refits, steps, refit, seed or 0, say)
            else:
                found, draws = simulated_ranks(sweep, simulations, say)
    except _Unread:
        skipped["calibration"] = _UNREAD
        return {"calibration": not_done("calibration", _UNREAD, _OFFER)}, 0
    except (GumboError, *PROGRAM_ERRORS) as error:
        reason = str(error) if isinstance(error, GumboError) else f"it failed ({first_line(error, kind=True)})"
        skipped["calibration"] = reason
        advice = "models that draw from their own density, with their data in an argument, can be calibrated"
        return {"calibration": not_done("calibration", reason, advice)}, 0
    ranks.update(found)
    chances = {name: uniformity(values, draws) for name, values in found.items()}
    if refits:
        chances |= {f"{name}{_SIDES}": symmetry(values, draws) for name, values in found.items()}
    worst = min(chances, key=chances.__getitem__)
    chance = min(1.0, chances[worst] * len(chances))
    count = len(found[worst.removesuffix(_SIDES)])
    over = f"{count} data that the model drew"
    paper = "Talts et al. 2018, arXiv:1804.06788"
    if refits:
        over = f"{refits} data sets that the model drew, the guide fitted to each"
        paper = "Yao et al. 2018, arXiv:1802.02538"
    word = ALARM if chance < UNIFORM else OK
    advice = "the guide is wrong on average: see shift and width for how, then train longer or widen the family"
    verdict = Verdict(
        "calibration",
        word,
        f"ranks of {worst} among {draws} draws of the guide, over {over}, leave the band of uniform ranks with "
        f"probability {chance:.2g} if the guide is exact, limit {UNIFORM:g} ({paper})",
        chance,
        UNIFORM,
        advice if word == ALARM else "more simulations see smaller faults",
    )
    return {"calibration": verdict}, draws


class _Unread(BadInput):
    """Raised where the guide's distributions do not depend on the data."""


def simulated_ranks(sweep: Sweep, simulations: int, say: Stages | None = None) -> tuple[dict[str, np.ndarray], int]:
    """Ranks of the model's latents among the guide's draws, by coordinate, and the number of those draws."""
    places = _argument_places(sweep)
    _check_simulated(sweep)
    draws = 100 if sweep.vectorized else 19
    given, tested = _reacting(sweep, places)
    own = sweep.local if set(tested) <= set(sweep.local) else []
    plates = sweep.data_plates if own else ()
    # Where only local latents are tested, all others are held fixed, so that the ranks of a round are independent.
    rounds = max(2, math.ceil(simulations / math.prod(sweep.sizes[plate] for plate in plates)))
    rounds = rounds if sweep.vectorized else min(rounds, 60)
    found: dict[str, list[np.ndarray]] = {}
    say = say or Stages("", False)
    say.stage(f"calibrating on simulated data{sweep.slowly()}", rounds)
    for done in range(rounds):
        say.step(done)
        held = {}
        if given:
            guide, _model = sweep.run(1)
            held = {name: sweep.held(guide, name) for name in given}
        truth = sweep.model_run(1, fixed=held, observe=False)
        data = _replaced(sweep, places, truth)
        fixed = {name: value.expand(draws, *value.shape[1:]) for name, value in held.items()}
        _, model = sweep.run(draws, fixed=fixed, arguments=data)
        _check_factors(model)
        values = {name: sweep.held(truth, name) for name in sweep.latents}
        again = sweep.model_run(1, fixed=values, arguments=data)
        for name, rank in _ranks(sweep, tested, plates, model, again, draws).items():
            found.setdefault(name, []).append(rank)
    return _joined(found), draws


def refitted_ranks(
    sweep: Sweep, refits: int, steps: int, refit: Callable | None, seed: int, say: Stages
) -> tuple[dict[str, np.ndarray], int]:
    """As `simulated_ranks`, for a guide refitted to each simulated data set; one rank per data set.

    The model's parameters do not change. ``refit``, called like the guide with the simulated data, returns a fitted
    guide. Yao et al. 2018, arXiv:1802.02538.
    """
    places = _argument_places(sweep)
    _check_simulated(sweep)
    draws = 100 if sweep.vectorized else 19
    found: dict[str, list[np.ndarray]] = {}
    rng = np.random.default_rng(seed)
    say.stage(f"fitting the guide to {refits} simulated data sets, {steps} steps each", refits)
    for done in range(refits):
        say.step(done)
        truth = sweep.model_run(1, observe=False)
        args, kwargs = _replaced(sweep, places, truth)
        values = {name: sweep.held(truth, name) for name in sweep.latents}
        with torch.enable_grad():
            if refit is not None:
                guide = refit(*args, **kwargs)
            else:
                guide = refitted(sweep.model, sweep.guide, args, kwargs, seed=seed + done, steps=steps, lr=0.02)
        fitted = Sweep(sweep.model, guide, args, kwargs, mode=sweep.mode)
        with quietly(sweep.model, guide, seed + done):
            _, model = fitted.run(draws)
            _check_factors(model)
            again = fitted.model_run(1, fixed=values)
        for name, rank in _ranks(fitted, sweep.latents, (), model, again, draws, rng).items():
            found.setdefault(name, []).append(rank)
    return _joined(found), draws


_MASKED = -1  # in place of the rank of a masked number, which has no posterior


def _joined(found: Mapping[str, list[np.ndarray]]) -> dict[str, np.ndarray]:
    """The ranks of all simulations by coordinate, without those of masked numbers."""
    ranks = {name: np.concatenate(parts) for name, parts in found.items()}
    known = {name: one[one != _MASKED] for name, one in ranks.items()}
    return {name: one for name, one in known.items() if len(one)}


def _check_simulated(sweep: Sweep) -> None:
    """Raise BadInput if the model's draws are not those of its density."""
    for name, reason in (sweep.undrawable | sweep.other_draws).items():
        raise BadInput(f"site {name!r}: {reason}")
    for name in masked_priors(sweep):
        raise BadInput(f"the prior of site {name!r} is masked, and what the model draws does not follow that")


def _check_factors(model: Pass) -> None:
    """Raise BadInput if a factor tells apart the draws of a run, since simulated data do not follow it."""
    for name in changing_factors(model):
        raise BadInput(f"factor {name!r} depends on the latents, and what the model draws does not follow it")


def _argument_places(sweep: Sweep) -> dict[str, int | str]:
    """The argument that holds each observed site's data."""
    if sweep.swept:
        raise BadInput("rows come in blocks, and simulating data needs them at once")
    if not sweep.observed:
        raise BadInput("the model observes nothing that could be simulated")
    places: dict[str, int | str] = {}
    for site, seen in sweep.observed_values.items():
        for place, value in [*enumerate(sweep.args), *sweep.kwargs.items()]:
            same = isinstance(value, torch.Tensor) and value.shape == seen.shape and value.dtype == seen.dtype
            if same and place not in places.values() and torch.equal(value, seen):
                places[site] = place
                break
        else:
            raise BadInput(f"the data of site {site!r} are no argument of the programs, so none can be simulated")
    return places


def _replaced(sweep: Sweep, places: Mapping[str, int | str], run: Pass) -> tuple[tuple, dict]:
    args, kwargs = list(sweep.args), dict(sweep.kwargs)
    for site, place in places.items():
        value = run.raw(site).reshape(sweep.observed_values[site].shape)
        if isinstance(place, int):
            args[place] = value
        else:
            kwargs[place] = value
    return tuple(args), kwargs


def _reacting(sweep: Sweep, places: Mapping[str, int | str]) -> tuple[list[str], list[str]]:
    """Sites whose guide does not depend on the data, which are held fixed, and the latents to test."""
    guide, _ = sweep.run(1)
    drawn = [name for name, layout in sweep.guide_sites.items() if layout.kind == "latent"]
    held = {name: sweep.held(guide, name) for name in drawn}
    reads: set[str] = set()
    for _ in range(_TRIES):  # few discrete data are often the same again
        arguments = _replaced(sweep, places, sweep.model_run(1, observe=False))
        with pyro.validation_enabled(False):  # other data may move a bounded guide away from the draws
            other, _model = sweep.run(1, fixed=held, arguments=arguments)
        reads |= {name for name in drawn if _differs(guide.log_prob(name), other.log_prob(name))}
        # A computed site is not held: it reads the data if they move it where its auxiliary draws are the same.
        reads |= {name for name in sweep.computed if _differs(guide.value(name), other.value(name))}
        if reads >= {*drawn, *sweep.computed}:
            break
    if not reads:
        raise _Unread(_UNREAD)
    outside = sweep.outside_data()
    auxiliary = {name for name in outside if name in sweep.computed or name not in sweep.model_sites}
    if auxiliary & reads:
        return [], list(sweep.latents)  # which draws determine which latents is not known
    given = [name for name in outside if name not in reads]
    local = sweep.local if reads - set(outside) else []
    return given, [*local, *(name for name in sweep.shared if name in reads)]


def _differs(one: torch.Tensor, other: torch.Tensor) -> bool:
    """By more than rounding: a flow inverts its own draws, with rounding errors."""
    size = max(float(value[value.isfinite()].abs().max()) if value.isfinite().any() else 0.0 for value in (one, other))
    return not torch.allclose(one, other, rtol=0.0, atol=ROUNDING * (1 + size), equal_nan=True)


def _ranks(
    sweep: Sweep,
    tested: Sequence[str],
    plates: Sequence[str],
    model: Pass,
    truth: Pass,
    draws: int,
    rng: np.random.Generator | None = None,
) -> dict[str, np.ndarray]:
    """Ranks ``(units,)`` of each coordinate and of the log-density; ties are broken at random.

    With ``rng`` a site with many rows is ranked at one random row, so that ranks are independent.
    """
    found: dict[str, np.ndarray] = {}
    for name in tested:
        layout = sweep.model_sites[name]
        drawn, true = (to_units(run.value(name), layout, plates) for run in (model, truth))
        if name in sweep.angles:
            centre = direction(torch.cat([drawn, true]))
            drawn, true = turned(drawn, centre), turned(true, centre)
        shown = truth.shown(name)
        shown = torch.ones_like(true, dtype=torch.bool) if shown is None else to_units(shown, layout, plates)
        size = drawn.shape[-1]
        event = math.prod(layout.event)
        if rng is not None and size > event:
            row = int(rng.integers(size // event))
            drawn, true, shown = (value[..., row * event : (row + 1) * event] for value in (drawn, true, shown))
            size = event
        for place in np.unique(np.linspace(0, size - 1, min(size, _COORDINATES)).round().astype(int)):
            label = name if size == 1 else f"{name}[{place}]"
            known = shown[0, :, place].cpu().numpy()
            found[label] = np.where(known, _rank(drawn[..., place], true[..., place]), _MASKED)
    density = [run.joint_log_prob(plates) for run in (model, truth)]
    found["log p(x, z)"] = _rank(density[0].reshape(draws, -1), density[1].reshape(1, -1), 1e-5)
    return found


def _rank(drawn: torch.Tensor, true: torch.Tensor, tolerance: float = 0.0) -> np.ndarray:
    drawn, true = drawn.cpu(), true.cpu()
    close = tolerance * (1 + true.abs())
    less = (drawn < true - close).sum(0)
    equal = ((drawn - true).abs() <= close).sum(0)
    return (less + (torch.rand(less.shape) * (equal + 1)).floor().long()).numpy()


def uniformity(ranks: np.ndarray, draws: int) -> float:
    """The p-value of uniform ranks on 0…draws, corrected for the number of points at which their ECDF is compared."""
    from scipy.stats import binom

    at = np.unique(np.linspace(0, draws - 1, _POINTS).round().astype(int))
    counts = (ranks[:, None] <= at).sum(0)
    chance = (at + 1) / (draws + 1)
    tails = np.minimum(binom.cdf(counts, len(ranks), chance), binom.sf(counts - 1, len(ranks), chance))
    return float(min(1.0, 2 * len(at) * tails.min()))


def symmetry(ranks: np.ndarray, draws: int) -> float:
    """The p-value of a one-sided shift of uniform ranks, which detects a biased guide but not a narrow one."""
    from scipy.stats import norm

    spread = math.sqrt(((draws + 1) ** 2 - 1) / 12 / len(ranks))
    return float(2 * norm.sf(abs(float(ranks.mean()) - draws / 2) / spread))
