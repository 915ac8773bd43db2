"""The diagnostics behind ``diagnose``: each compares the guide with something that does not believe it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ...errors import BadInput, GumboError
from ..engine.progress import Stages
from ..engine.scopes import private_seed
from ..posterior.conversion import Collection, Naming, _afford, _refits
from ..posterior.evaluation import exact_pair
from ..posterior.importance import _rounding, importance_ess, khat, log_evidence, weight_statistics
from ..posterior.refits import can_refine, refine
from ..posterior.runner import _REFUSALS, Block, Sweep, _first_line, _has_rows, quietly
from .missed_mass import Target, annealed_evidence, to_units
from .report import Report, Verdict

# A share of the units may be odd before an alarm; of few units, none.
SHARE = 0.05
KHAT = 0.7
ESS = 0.1
GAP = 0.05
WIDTH = 0.85
SHIFT = 0.2
PROBABILITY = 0.05
CORRELATION = 0.25
COLLAPSED = 0.01
LEVEL = 1e-3
# Nats of evidence: in up to two dimensions, and in more, where the particles are less sure.
MASS = (0.25, 0.4)
RHAT = 1.05
# Beyond so many dimensions random-walk particles do not find their way from the prior.
_SEARCHED = 20
_COORDINATES = 30


@dataclass
class Units:
    """What weights are formed for: log-weights ``(units, S)`` and the numbers they belong to ``(units, S, d)``."""

    what: str
    sites: list[str]
    plates: tuple[str, ...]
    log_weight: np.ndarray
    values: np.ndarray
    names: list[str]
    discrete: np.ndarray
    binary: np.ndarray

    def __len__(self) -> int:
        return len(self.log_weight)


def examine(
    model: Callable,
    guide: Callable | Sequence[Callable],
    args: tuple,
    kwargs: Mapping[str, Any],
    *,
    num_samples: int,
    num_data: int,
    num_simulations: int,
    batch_size: int | None,
    data_plates: str | Sequence[str] | None,
    refine_steps: int,
    num_refits: int | None,
    seed: int | None,
    say: Stages,
) -> Report:
    """All diagnostics of a pair; see :func:`~gumbo.inference.diagnose`."""
    import xarray

    for name, value, least in (
        ("num_samples", num_samples, 100),
        ("num_data", num_data, 1),
        ("num_simulations", num_simulations, 20),
        ("refine_steps", refine_steps, 0),
    ):
        if value < least:
            raise BadInput(f"{name} is {value}: expected at least {least}")
    guides = list(guide) if isinstance(guide, (list, tuple)) else [guide]
    with private_seed(None, model, *guides):
        pairs = [exact_pair(model, one) for one in guides]
    model, guides = pairs[0][0], [pair[1] for pair in pairs]
    if num_refits is not None:
        say.stage("fitting guides once more")
        guides += _refits(model, guides, args, kwargs, num_refits, seed, None)
    options: dict[str, Any] = {"batch_size": batch_size, "data_plates": data_plates}
    sweep, args, kwargs = few_rows(Sweep(model, guides[0], args, kwargs, **options), num_data, options)
    sweeps = [sweep, *(Sweep(model, one, args, kwargs, **options) for one in guides[1:])]
    groups = frozenset({"posterior", "log_likelihood", "vi_stats"})
    collection = Collection(sweep, len(sweeps), num_samples, groups)
    _afford(collection.bytes_needed(), 4.0)
    collection.allocate()
    for chain, one in enumerate(sweeps):
        say.stage(f"drawing from the guide{one.slowly()}", collection.steps(one))
        collection.fill(chain, one, None if seed is None else seed + chain, say)
    say.stage("weighing the draws")
    found = weight_statistics(collection, Naming(sweep, {}, {}).event_names)
    skipped: dict[str, str] = {}
    units = units_of(collection, skipped)
    rounding = _rounding(collection)
    verdicts = [judge(group, collection, rounding) for group in units]
    merged = _merged([one for some in verdicts for one in some])
    extra: dict[str, tuple[Sequence[str], np.ndarray]] = {}
    if "gap" in merged:
        merged["gap"] = _with_parts(merged["gap"], sweep, refine_steps, seed, skipped, extra, options, say)
    ranks: dict[str, np.ndarray] = {}
    if "point" not in merged or not merged["point"].fired:
        merged |= _calibration(sweep, num_simulations, seed, skipped, ranks, say)
        merged |= _missed_mass(sweep, num_samples, seed, skipped, options, say)
    merged |= _between_refits(collection)
    made = Naming(sweep, {}, {}).statistics(found | extra)
    return Report(tuple(merged.values()), xarray.Dataset(made), skipped, ranks)


def few_rows(sweep: Sweep, num_data: int, options: Mapping[str, Any]) -> tuple[Sweep, tuple, dict]:
    """The same programs on evenly spaced rows, where they take a part of them and every latent is a datum's own."""
    args, kwargs = sweep.args, sweep.kwargs
    plates = [plate for plate in sweep.data_plates if sweep.sizes[plate] > num_data]
    if not plates or sweep.shared or sweep.swept.keys() - {sweep.sliced}:
        return sweep, args, kwargs
    size = sweep.sizes[plates[0]]
    rows = torch.linspace(0, size - 1, num_data).round().long()

    def cut(value):
        return value[rows.to(value.device)] if _has_rows(value, size) else value

    fewer = tuple(cut(value) for value in args), {name: cut(value) for name, value in kwargs.items()}
    if not any(_has_rows(value, size) for value in (*args, *kwargs.values())):
        return sweep, args, kwargs
    try:
        smaller = Sweep(sweep.model, sweep.guide, *fewer, **options)
    except _REFUSALS:
        return sweep, args, kwargs
    return (smaller, *fewer) if smaller.sizes.get(plates[0]) == num_data else (sweep, args, kwargs)


def units_of(collection: Collection, skipped: dict[str, str]) -> list[Units]:
    """Data with their local latents, and the global latents."""
    sweep = collection.sweep
    groups: list[Units] = []
    if sweep.local:
        groups.append(_units("data", sweep.local, sweep.data_plates, collection.unit_log_weight()[0], collection))
        shared = collection.global_log_weight()
        if shared is not None:
            groups.append(_units("global latents", sweep.shared, sweep.shared_plates, shared[0], collection))
        elif sweep.shared:
            skipped["global latents"] = "the guide draws them given local ones, so that their own density is not known"
    else:
        groups.append(_units("all latents together", sweep.latents, (), collection.log_weight()[0], collection))
        if sweep.tied:
            skipped["single data"] = "the guide draws the latents of all data jointly, so that no datum has a weight"
    return groups


def _units(what: str, sites: Sequence[str], plates: Sequence[str], log_weight: np.ndarray, collection) -> Units:
    layouts = collection.sweep.model_sites
    values, names, discrete = [], [], []
    draws = len(log_weight)
    for site in sites:
        drawn = torch.from_numpy(collection.array("posterior", site)[0][:draws])
        flat = to_units(drawn, layouts[site], plates).numpy()
        values.append(flat)
        names += [site] if flat.shape[-1] == 1 else [f"{site}[{place}]" for place in range(flat.shape[-1])]
        discrete += [layouts[site].discrete] * flat.shape[-1]
    joined = np.moveaxis(np.concatenate(values, -1), 0, 1)
    binary = np.array(discrete) & ((joined == 0) | (joined == 1)).all((0, 1))
    return Units(
        what, list(sites), tuple(plates), log_weight.reshape(draws, -1).T, joined, names, np.array(discrete), binary
    )


# --- weights ----------------------------------------------------------------------------------------------------------


def judge(units: Units, collection: Collection, rounding: float) -> list[Verdict]:
    """What importance weights say of the guide."""
    weight, draws = units.log_weight, units.log_weight.shape[1]
    shapes, sizes = khat(weight, rounding), importance_ess(weight)
    many = _allowed(len(units))
    high = int((shapes > KHAT).sum())
    unknown = int(np.isnan(shapes).sum())
    low = int((sizes < ESS * draws).sum())
    said = f", and {unknown} have too few different weights for a fit" if unknown else ""
    worst = np.nanmax(shapes) if unknown < len(units) else math.nan
    verdicts = [
        Verdict(
            "khat",
            high > many,
            f"{units.what}: k̂ is above {KHAT} in {high} of {len(units)} (at most {worst:.2f}{said}); {many} may be "
            "(Vehtari et al. 2024, arXiv:1507.02646)",
            float(worst),
            KHAT,
        ),
        Verdict(
            "ess",
            low > many,
            f"{units.what}: the importance ESS is below {ESS:.0%} of {draws} draws in {low} of {len(units)} (least "
            f"{sizes.min():.0f}); {many} may be",
            float(sizes.min() / draws),
            ESS,
        ),
    ]
    points = [
        name
        for name, spread, discrete in zip(units.names, np.ptp(units.values, 1).max(0), units.discrete, strict=True)
        if not discrete and spread == 0
    ]
    verdicts.append(
        Verdict(
            "point",
            bool(points),
            f"{units.what}: the guide is a point at {', '.join(points[:5])}, which is no posterior"
            if points
            else f"{units.what}: the guide is a distribution at every latent",
            float(len(points)),
            0.0,
        )
    )
    verdicts.append(_gap(units, collection))
    if not points:
        verdicts += _moments(units)
    verdicts += _collapse(units, collection, verdicts)
    return verdicts


def _allowed(count: int) -> int:
    return int(SHARE * count)


def _numbers(units: Units, collection: Collection) -> int:
    """How many latent dimensions a unit has; a one-hot vector counts as one."""
    total = 0
    for site in units.sites:
        by_dimension = collection.kl_kinds.get(site) in ("each", "marginal")
        known = collection.kl[site][0] if by_dimension else None
        size = np.size(known) if known is not None else collection.sweep.model_sites[site].event
        per_site = size if isinstance(size, int) else math.prod(size)
        layout = collection.sweep.model_sites[site]
        inside = math.prod(collection.sweep.sizes[p] for p in layout.plates if p not in units.plates)
        total += per_site * inside
    return max(1, total)


def _gap(units: Units, collection: Collection) -> Verdict:
    weight = units.log_weight
    evidence, error = log_evidence(weight)
    gap = evidence - weight.mean(1)
    noise = np.sqrt(weight.var(1, ddof=1) / weight.shape[1] + error**2)
    mean, spread = float(gap.mean()), float(np.sqrt((noise**2).sum()) / len(gap))
    limit = GAP * _numbers(units, collection)
    return Verdict(
        "gap",
        mean > limit and mean > 4 * spread,
        f"{units.what}: log-evidence minus ELBO is {mean:.3f} ± {spread:.3f} nats each, limit {limit:.2f} ({GAP} for "
        "each latent dimension; Cremer et al. 2018, arXiv:1801.03558)",
        mean,
        limit,
    )


def _moments(units: Units) -> list[Verdict]:
    """Means, standard deviations and correlations of the guide's draws, against those of the weighted draws."""
    picked = np.unique(np.linspace(0, len(units.names) - 1, min(_COORDINATES, len(units.names))).round().astype(int))
    values, names = units.values[..., picked].astype(np.float64), [units.names[place] for place in picked]
    continuous, binary = ~units.discrete[picked], units.binary[picked]
    weight = _normal(units.log_weight)
    flat = np.full_like(weight, 1 / weight.shape[1])
    mean_q, sd_q, corr_q = _weighted(values, flat)
    mean_p, sd_p, corr_p = _weighted(values, weight)
    batches = 10
    edges = np.linspace(0, values.shape[1], batches + 1).astype(int)
    parts = []
    for start, stop in zip(edges[:-1], edges[1:], strict=True):
        piece = values[:, start:stop]
        even = np.full((len(values), stop - start), 1 / (stop - start))
        q, p = _weighted(piece, even), _weighted(piece, _normal(units.log_weight[:, start:stop]))
        parts.append(_differences(q, p, binary))
    errors = [np.std(part, 0, ddof=1) / math.sqrt(batches) for part in zip(*parts, strict=True)]
    shift, width, corr = _differences((mean_q, sd_q, corr_q), (mean_p, sd_p, corr_p), binary)
    found = []
    scale = np.where(binary, PROBABILITY, SHIFT)
    strength, fires = _beyond(shift / scale, errors[0] / scale, 1.0)
    worst = int(np.argmax(strength))
    unit = "in probability" if binary[worst] else "of the posterior's standard deviations"
    found.append(
        Verdict(
            "shift",
            bool(fires.any()),
            f"{units.what}: the guide's mean is off by {strength[worst] * scale[worst]:.2f} {unit} (root mean square) "
            f"at {names[worst]}, limit {scale[worst]}; posterior by importance weights",
            float(strength[worst] * scale[worst]),
            float(scale[worst]),
        )
    )
    if continuous.any():
        ratio, error = width.mean(0), np.sqrt((errors[1] ** 2).sum(0)) / len(units)
        limit = -math.log(WIDTH)
        fires = continuous & (np.abs(ratio) > limit) & (np.abs(ratio) > 4 * error)
        worst = int(np.argmax(np.where(continuous, np.abs(ratio), -1.0)))
        found.append(
            Verdict(
                "width",
                bool(fires.any()),
                f"{units.what}: at {names[worst]} the guide's standard deviation is {math.exp(ratio[worst]):.2f} times "
                f"the posterior's by importance weights, limits {WIDTH} and {1 / WIDTH:.2f}; "
                f"{int(fires.sum())} of {int(continuous.sum())} dimensions are outside",
                float(math.exp(ratio[worst])),
                WIDTH,
            )
        )
    if len(picked) > 1:
        upper = np.triu_indices(len(picked), 1)
        strength, fires = _beyond(corr[:, upper[0], upper[1]], errors[2][:, upper[0], upper[1]], CORRELATION)
        worst = int(np.argmax(strength))
        pair = f"{names[upper[0][worst]]} and {names[upper[1][worst]]}"
        found.append(
            Verdict(
                "correlation",
                bool(fires.any()),
                f"{units.what}: the correlation of {pair} is off by {strength[worst]:.2f} (root mean square), limit "
                f"{CORRELATION}; posterior by importance weights",
                float(strength[worst]),
                CORRELATION,
            )
        )
    return found


def _beyond(difference: np.ndarray, error: np.ndarray, limit: float) -> tuple[np.ndarray, np.ndarray]:
    """Root mean square over units ``(units, …)`` without what noise adds, and where it is surely beyond the limit."""
    noise = (error**2).mean(0)
    square = (difference**2).mean(0) - noise
    sure = square > 5 * math.sqrt(2 / len(difference)) * noise * (3 if len(difference) == 1 else 1)
    return np.sqrt(square.clip(0)), (square > limit**2) & sure


def _normal(log_weight: np.ndarray) -> np.ndarray:
    weight = np.exp(log_weight - log_weight.max(-1, keepdims=True))
    return weight / weight.sum(-1, keepdims=True)


def _weighted(values: np.ndarray, weight: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    mean = np.matmul(weight[:, None], values)[:, 0]
    centred = values - mean[:, None]
    covariance = np.matmul((centred * weight[..., None]).transpose(0, 2, 1), centred)
    sd = np.sqrt(np.einsum("uii->ui", covariance).clip(0))
    with np.errstate(divide="ignore", invalid="ignore"):
        corr = np.nan_to_num(covariance / (sd[:, :, None] * sd[:, None, :]))
    return mean, sd, corr


def _differences(q: tuple, p: tuple, binary: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Shift in posterior sds (in probability where binary), log ratio of sds, difference of correlations."""
    with np.errstate(divide="ignore", invalid="ignore"):
        shift = np.where(binary, q[0] - p[0], (q[0] - p[0]) / p[1])
        width = np.log(q[1] / p[1])
    shift = np.nan_to_num(shift, posinf=1e3, neginf=-1e3)
    return shift, np.nan_to_num(width, posinf=10.0, neginf=-10.0), q[2] - p[2]


def _collapse(units: Units, collection: Collection, verdicts: Sequence[Verdict]) -> list[Verdict]:
    """A guide at the prior is right where the data say nothing, and collapsed where they do."""
    per_dimension = {site: collection.kl.get(site, [None])[0] for site in units.sites}
    known = {site: np.asarray(value) for site, value in per_dimension.items() if value is not None}
    if not known:
        return []
    idle = [site for site, value in known.items() if abs(value).max() < COLLAPSED]
    missing = next(one.value for one in verdicts if one.name == "gap")
    told = [one.name for one in verdicts if one.name in ("gap", "shift", "width") and one.fired]
    fired = bool(idle) and len(idle) == len(units.sites) and (missing > 2 * COLLAPSED or bool(told))
    least = ", ".join(f"{site} {value.sum():.3f}" for site, value in known.items())
    return [
        Verdict(
            "collapsed",
            fired,
            f"{units.what}: KL of guide to prior is {least} nats; below {COLLAPSED} in every dimension with a gap to "
            f"the evidence the guide is the prior where the posterior is not (Bowman et al. 2016, arXiv:1511.06349)",
            float(min(value.sum() for value in known.values())),
            COLLAPSED,
        )
    ]


def _merged(verdicts: Sequence[Verdict]) -> dict[str, Verdict]:
    """One verdict a name: what was found for data and for global latents in one text."""
    found: dict[str, Verdict] = {}
    for one in verdicts:
        if one.name not in found:
            found[one.name] = one
            continue
        other = found[one.name]
        leading = one if one.fired and not other.fired else other
        text = f"{other.text}. {one.text}"
        found[one.name] = Verdict(one.name, one.fired or other.fired, text, leading.value, leading.threshold)
    return found


# --- gaps -------------------------------------------------------------------------------------------------------------


def _with_parts(
    verdict: Verdict,
    sweep: Sweep,
    steps: int,
    seed: int | None,
    skipped: dict[str, str],
    extra: dict[str, tuple[Sequence[str], np.ndarray]],
    options: Mapping[str, Any],
    say: Stages,
) -> Verdict:
    """The gap split in two by refining the guide's parameters for each datum."""
    reason = ""
    if not steps:
        reason = "refine_steps is 0"
    elif sweep.swept:
        reason = "rows come in blocks, and refining needs them at once"
    elif sweep.local and sweep.shared:
        reason = "there are global latents beside local ones"
    elif not can_refine(sweep):
        reason = "a site's distribution has no parameters that can be moved (a flow, a point, a joint draw)"
    if reason:
        skipped["amortization gap"] = reason
        return verdict
    fewer, args, kwargs = few_rows(sweep, 32, options)
    say.stage("refining the guide for each datum", steps)
    try:
        better = refine(sweep.model, sweep.guide, args, kwargs, steps=steps, seed=seed, progress=say)
        before = _weights(fewer, 1000, seed)
        after = _weights(Sweep(sweep.model, better, args, kwargs, **options), 1000, seed)
    except (GumboError, *_REFUSALS) as error:
        skipped["amortization gap"] = f"refining failed ({_first_line(error)})"
        return verdict
    old, new = before.mean(1), after.mean(1)
    # The guide whose weights are more even knows the evidence better.
    finer = importance_ess(after) >= importance_ess(before)
    evidence = np.where(finer, log_evidence(after)[0], log_evidence(before)[0])
    # Steps of noisy optimisation may end a little below an optimum that they began at.
    amortization = np.maximum(new - old, 0.0)
    approximation = np.maximum(evidence - np.maximum(new, old), 0.0)
    extra["amortization_gap"] = ((), np.array([amortization.mean()]))
    extra["approximation_gap"] = ((), np.array([approximation.mean()]))
    text = (
        f"{verdict.text}; of {evidence.mean() - old.mean():.3f} nats for {len(old)} of them, {amortization.mean():.3f} "
        f"go to amortization and {approximation.mean():.3f} to the family"
    )
    return Verdict(verdict.name, verdict.fired, text, verdict.value, verdict.threshold)


def _weights(sweep: Sweep, draws: int, seed: int | None, given: Mapping[str, torch.Tensor] | None = None) -> np.ndarray:
    """Log-weights ``(units, draws)`` of the local latents, or of all where none is local."""
    found, block = [], sweep.whole() or Block()
    plates = sweep.weight_plates
    with quietly(sweep.model, sweep.guide, seed):
        for start in range(0, draws, sweep.draws_a_run(block)):
            count = min(sweep.draws_a_run(block), draws - start)
            fixed = {name: value.expand(count, *value.shape[1:]) for name, value in (given or {}).items()}
            total: Any = 0.0
            for run, sign in zip(sweep.run(count, block, fixed), (-1.0, 1.0), strict=True):
                for name, layout in run.layouts.items():
                    if layout.kind != "deterministic" and set(plates) <= layout.plates:
                        total = total + sign * run.log_prob(name, plates)
            found.append(total.reshape(count, -1))
    return torch.cat(found).T.cpu().numpy()


# --- calibration ------------------------------------------------------------------------------------------------------


def _calibration(
    sweep: Sweep,
    simulations: int,
    seed: int | None,
    skipped: dict[str, str],
    ranks: dict[str, np.ndarray],
    say: Stages,
) -> dict[str, Verdict]:
    try:
        with quietly(sweep.model, sweep.guide, None if seed is None else seed + 1):
            found, draws = simulated_ranks(sweep, simulations, say)
    except (GumboError, *_REFUSALS) as error:
        skipped["calibration"] = str(error) if isinstance(error, GumboError) else f"it failed ({_first_line(error)})"
        return {}
    ranks.update(found)
    chances = {name: uniformity(values, draws) for name, values in found.items()}
    worst = min(chances, key=chances.__getitem__)
    chance = min(1.0, chances[worst] * len(chances))
    return {
        "calibration": Verdict(
            "calibration",
            chance < LEVEL,
            f"ranks of {worst} among {draws} draws of the guide, over {len(found[worst])} data that the model drew, "
            f"leave the band of uniform ranks with probability {chance:.2g} if the guide is exact, limit {LEVEL:g} "
            "(Talts et al. 2018, arXiv:1804.06788)",
            chance,
            LEVEL,
        )
    }


def simulated_ranks(sweep: Sweep, simulations: int, say: Stages | None = None) -> tuple[dict[str, np.ndarray], int]:
    """Ranks of latents that the model drew among the guide's draws, by coordinate; and how many draws these are."""
    if sweep.swept:
        raise BadInput("rows come in blocks, and simulating data needs them at once")
    if not sweep.observed:
        raise BadInput("the model observes nothing that could be simulated")
    places = _argument_places(sweep)
    draws = 100 if sweep.vectorized else 19
    given, tested = _reacting(sweep, places)
    own = sweep.local if set(tested) <= set(sweep.local) else []
    plates = sweep.data_plates if own else ()
    units = math.prod(sweep.sizes[plate] for plate in plates)
    rounds = max(2, math.ceil(simulations / units)) if own and set(sweep.shared) <= set(given) else simulations
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
        values = {name: sweep.held(truth, name) for name in sweep.latents}
        again = sweep.model_run(1, fixed=values, arguments=data)
        one = None if units == 1 or rounds < simulations else np.random.default_rng(len(found)).integers(units)
        for name, rank in _ranks(sweep, tested, plates, model, again, draws).items():
            found.setdefault(name, []).append(rank if one is None else rank[[one]])
    return {name: np.concatenate(parts) for name, parts in found.items()}, draws


def _argument_places(sweep: Sweep) -> dict[str, int | str]:
    """Which argument each observed site's data are."""
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


def _replaced(sweep: Sweep, places: Mapping[str, int | str], run) -> tuple[tuple, dict]:
    args, kwargs = list(sweep.args), dict(sweep.kwargs)
    for site, place in places.items():
        value = run.raw(site).reshape(sweep.observed_values[site].shape)
        if isinstance(place, int):
            args[place] = value
        else:
            kwargs[place] = value
    return tuple(args), kwargs


def _reacting(sweep: Sweep, places: Mapping[str, int | str]) -> tuple[list[str], list[str]]:
    """Latents whose guide does not read the data, to be held at its draws; and those to be tested."""
    guide, _ = sweep.run(1)
    held = {name: sweep.held(guide, name) for name, layout in sweep.guide_sites.items() if layout.kind == "latent"}
    other, _ = sweep.run(1, fixed=held, arguments=_replaced(sweep, places, sweep.model_run(1, observe=False)))
    reads = {
        name
        for name, layout in sweep.guide_sites.items()
        if layout.kind == "latent" and not torch.equal(guide.log_prob(name), other.log_prob(name))
    }
    if any(name not in sweep.model_sites for name in sweep.guide_sites):
        if not reads:
            raise BadInput(
                "the guide does not read the data, so that calibrating it would need a fit for each data set"
            )
        return [], list(sweep.latents)
    if not reads:
        raise BadInput("the guide does not read the data, so that calibrating it would need a fit for each data set")
    given = [name for name in sweep.shared if name not in reads]
    local = [name for name in sweep.local if set(sweep.local) & reads]
    return given, [*local, *(name for name in sweep.shared if name in reads)]


def _ranks(sweep: Sweep, tested, plates, model, truth, draws: int) -> dict[str, np.ndarray]:
    """For each coordinate, and the log-density, ranks ``(units,)``; equal values share theirs at random."""
    found: dict[str, np.ndarray] = {}
    for name in tested:
        layout = sweep.model_sites[name]
        drawn, true = (to_units(run.value(name), layout, plates) for run in (model, truth))
        size = drawn.shape[-1]
        for place in np.unique(np.linspace(0, size - 1, min(size, 10)).round().astype(int)):
            label = name if size == 1 else f"{name}[{place}]"
            found[label] = _rank(drawn[..., place], true[..., place])
    density = [0.0, 0.0]
    for side, run in enumerate((model, truth)):
        for name, layout in run.layouts.items():
            if layout.kind != "deterministic" and set(plates) <= layout.plates:
                density[side] = density[side] + run.log_prob(name, plates)
    found["log p(x, z)"] = _rank(density[0].reshape(draws, -1), density[1].reshape(1, -1), 1e-5)
    return found


def _rank(drawn: torch.Tensor, true: torch.Tensor, tolerance: float = 0.0) -> np.ndarray:
    drawn, true = drawn.cpu(), true.cpu()
    close = tolerance * (1 + true.abs())
    less = (drawn < true - close).sum(0)
    equal = ((drawn - true).abs() <= close).sum(0)
    return (less + (torch.rand(less.shape) * (equal + 1)).floor().long()).numpy()


def uniformity(ranks: np.ndarray, draws: int, points: int = 20) -> float:
    """How likely uniform ranks on 0…draws are to stray as far, corrected for looking at many points of their ECDF."""
    from scipy.stats import binom

    at = np.unique(np.linspace(0, draws - 1, points).round().astype(int))
    counts = (ranks[:, None] <= at).sum(0)
    chance = (at + 1) / (draws + 1)
    tails = np.minimum(binom.cdf(counts, len(ranks), chance), binom.sf(counts - 1, len(ranks), chance))
    return float(min(1.0, 2 * len(at) * tails.min()))


# --- missed mass ------------------------------------------------------------------------------------------------------


def _missed_mass(
    sweep: Sweep,
    num_samples: int,
    seed: int | None,
    skipped: dict[str, str],
    options: Mapping[str, Any],
    say: Stages,
) -> dict[str, Verdict]:
    sites = sweep.local or sweep.latents
    if any(sweep.model_sites[name].discrete for name in sites):
        skipped["missed-mass"] = "a latent is discrete"
        return {}
    if sweep.swept:
        skipped["missed-mass"] = "rows come in blocks"
        return {}
    fewer, *_ = few_rows(sweep, 16, options)
    try:
        with quietly(fewer.model, fewer.guide, None if seed is None else seed + 2):
            given = {}
            if fewer.local and fewer.shared:
                run, _ = fewer.run(1)
                given = fewer.given(run)
            target = Target(fewer, sites, fewer.weight_plates, given)
            if target.dimension > _SEARCHED:
                skipped["missed-mass"] = f"{target.dimension} dimensions are too many to search from the prior"
                return {}
            # One draw at a time the search is slow: fewer particles have to do.
            size: dict[str, Any] = {} if fewer.vectorized else {"particles": 300, "moves": 5}
            limit = MASS[0] if target.dimension <= 2 and fewer.vectorized else MASS[1]
            size["progress"] = say
            say.stage(f"searching for mass that the guide misses{sweep.slowly()}")
            annealed = np.minimum(annealed_evidence(target, **size), annealed_evidence(target, **size))
        own, error = log_evidence(_weights(fewer, max(num_samples, 1000), seed, given))
    except (GumboError, *_REFUSALS) as error:
        skipped["missed-mass"] = f"the search failed ({_first_line(error)})"
        return {}
    missed = annealed - own
    count = int(((missed > limit) & (missed > 4 * error)).sum())
    many = _allowed(len(missed))
    what = "all latents together" if not fewer.local else f"{len(missed)} data"
    return {
        "missed-mass": Verdict(
            "missed-mass",
            count > many,
            f"{what}: particles annealed from the prior find {missed.max():.2f} nats more evidence than the guide's "
            f"draws at most, above {limit} in {count}; {many} may be: there is posterior mass where the guide "
            "has none (Neal 2001; Del Moral et al. 2006)",
            float(missed.max()),
            limit,
        )
    }


# --- refits -----------------------------------------------------------------------------------------------------------


def _between_refits(collection: Collection) -> dict[str, Verdict]:
    if collection.chains < 2:
        return {}
    found = {}
    for name in collection.sweep.latents:
        drawn = collection.array("posterior", name).astype(np.float64)
        within, between = drawn.var(1, ddof=1).mean(0), drawn.mean(1).var(0, ddof=1)
        draws = drawn.shape[1]
        with np.errstate(divide="ignore", invalid="ignore"):
            found[name] = np.sqrt((within * (draws - 1) / draws + between) / within)
    values = np.concatenate([np.nan_to_num(value, nan=1.0).reshape(-1) for value in found.values()])
    worst = max(found, key=lambda name: np.nan_to_num(found[name], nan=1.0).max())
    count, many = int((values > RHAT).sum()), _allowed(len(values))
    return {
        "refits": Verdict(
            "refits",
            count > many,
            f"over {collection.chains} fits R̂ is above {RHAT} in {count} of {len(values)} dimensions ({many} may be), "
            f"at most {values.max():.2f} at {worst} (Vehtari et al. 2021, arXiv:1903.08008)",
            float(values.max()),
            RHAT,
        )
    }
