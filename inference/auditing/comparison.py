"""Gradient estimators judged on anybody's program: bias, variance and cost at fixed parameters."""

from __future__ import annotations

import copy
import math
import statistics
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from pyro.infer import ELBO
from torch import Tensor

from ...errors import BadInput, GumboError, UnknownName, UnsupportedSite
from ..elbo import SiteELBO, as_estimator
from ..engine.rows import given_arguments
from ..engine.scopes import modules_of
from ..estimators import Estimator, estimators
from ..stock import make_loss, stock_elbos
from .reference import Reference, find_reference
from .sampler import Central, Draws, Moments, Stage, set_aside

if TYPE_CHECKING:
    import xarray

ROUNDS = 31  # timed steps of each estimator, in turns with the others; fewer where few gradients are drawn
WARM_UP = 3
COUNTED = 8  # steps whose model runs are counted


@dataclass
class _Row:
    """One estimator in the audit; ``refused`` says why it has no numbers."""

    label: str
    loss: ELBO | None = None
    draws: Draws | None = None
    refused: str | None = None
    unbiased: bool = True
    objective: str = "elbo"
    num_particles: int = 0
    evaluations: float = math.nan
    seconds: list[float] = field(default_factory=list)
    moments: Moments | None = None
    warned: list[str] = field(default_factory=list)

    @property
    def judged(self) -> bool:
        return self.refused is None and self.moments is not None and self.moments.count > 1


def audit(
    model: Callable,
    guide: Callable,
    *args: Any,
    estimators: Any = None,
    num_samples: int = 2000,
    num_particles: int | None = None,
    objective: str = "elbo",
    reference: Any = "auto",
    seed: int = 0,
    burn_in: int = 200,
    alpha: float = 0.05,
    vectorize_particles: bool = True,
    max_plate_nesting: int | None = None,
    kl_weight: float = 1.0,
    progress: Callable[[str, int, int], None] | None = None,
    **kwargs: Any,
) -> xarray.Dataset:
    """Draw gradients of every estimator at the same fixed parameters and hold them against the exact gradient.

    Args:
        model, guide: any Pyro programs, modules or functions with ``pyro.param``.
        args, kwargs: their arguments and keywords, or one object in the form that ``fit`` takes: a tuple is the
            positional arguments, a mapping the keywords, anything else the one argument. Rows of subsampled plates are
            drawn once and kept.
        estimators: words of gumbo's estimators and of Pyro's own ELBOs (``trace``, ``trace-graph``,
            ``trace-graph+baseline``, ``trace-meanfield``, ``trace-enum``), :class:`Estimator` objects, mappings from
            sites to words, ELBO objects; a list of these, or a dict from labels of your own. None: every word there is.
            A word speaks for every latent site, whatever marks the sites carry.
        num_samples: gradients drawn of each estimator.
        num_particles: K; None is each estimator's own minimum.
        objective: ``"elbo"`` or ``"iwae"``, the importance-weighted bound (which needs ``num_particles``).
        reference: ``"auto"``: the exact gradient by enumeration where that can be had, and otherwise a long run of
            pathwise and leave-one-out gradients, whose own error enters the verdicts; ``"exact"`` and ``"long-run"``
            insist; an estimator's word (or anything ``estimators`` takes) is run long.
        burn_in: steps in which baselines and control variates settle, and their parameters take Adam steps, while model
            and guide stay; then they are frozen, so that draws are independent.
        alpha: the chance that any estimator that is unbiased is flagged, over all elements of all gradients.
        kl_weight: a factor for all latent terms, a number.
        progress: called with a label, the rows done and the rows there are.

    Returns a dataset with dimensions ``estimator`` and ``parameter`` (``guide.…``, ``model.…``), and coordinates
    ``size`` and ``sites``, the sites whose distribution the parameter enters, joined by ``+``: ``groupby("sites")`` is
    the table per site. In nats, summed over the batch:

    - ``bias``: the length of mean − reference with what sampling alone adds to it taken away, and ``bias_error``, the
      root of the summed squared standard errors, at least the error of that length;
    - ``z``, ``p_value``: of the worst element, ``worst_element``, with its ``worst_mean`` and ``worst_reference``; the
      p-value is adjusted for every element of every gradient (Holm), and ``flagged`` says whether it is below alpha;
    - ``variance`` (trace of the covariance), ``signal_to_noise`` (length of the reference over the root of the
      variance), ``cosine`` of the mean to the reference;
    - per estimator ``verdict``, ``unbiased`` (what it declares), ``any_flagged``, ``relative_bias`` (over the length of
      the reference), ``total_bias``, ``total_bias_error``, ``total_cosine``, ``max_z``, over all parameters, and
      ``total_variance``, ``total_signal_to_noise`` over the guide's, which is where estimators differ;
    - ``evaluations`` (model runs a step, counted, on average), ``seconds`` (median of a step, taken in turns),
      ``work_normalized_variance`` (total variance × seconds), ``evaluation_normalized_variance``;
    - ``warnings``, what the estimator warned of.

    Verdicts are ``"ok"``; ``"flagged: …"`` of one that is declared unbiased and is not; ``"biased"`` and ``"no bias
    seen"`` of those that do not claim to be unbiased for this objective; ``"refused: …"`` and ``"failed: …"``.

    Param store, parameters, ``.grad``, random streams, training modes and buffers stay as they were.

    Raises BadInput, UnknownName; UnsupportedSite where no reference can be had.

    >>> import pyro, pyro.distributions as dist
    >>> def model():
    ...     z = pyro.sample("z", dist.Bernoulli(0.5))
    ...     pyro.sample("x", dist.Normal(z, 1.0), obs=torch.tensor(0.3))
    >>> def guide():
    ...     pyro.sample("z", dist.Bernoulli(logits=pyro.param("a", torch.tensor(0.4))))
    >>> report = audit(model, guide, estimators=["rloo", "straight-through"], num_samples=200)
    >>> report.verdict.sel(estimator="rloo").item(), report.attrs["reference"]
    ('ok', 'exact (every value)')
    """
    args, kwargs = given_arguments(args, kwargs)
    _check(num_samples, num_particles, objective, burn_in, alpha, kl_weight)
    entries = labelled(estimators)
    options = {
        "objective": objective,
        "vectorize_particles": vectorize_particles,
        "max_plate_nesting": max_plate_nesting,
        "kl_weight": float(kl_weight),
    }
    say = progress or (lambda label, done, total: None)
    with set_aside(model, guide, seed):
        stage = Stage(model, guide, args, kwargs)
        rows = [_make_row(stage, label, entry, num_particles, options) for label, entry in entries.items()]
        say("reference", 0, len(rows))
        truth = find_reference(
            stage, reference, num_samples=num_samples, num_particles=num_particles, seed=seed, options=options
        )
        say("time", 0, len(rows))
        _settle(rows, burn_in, min(ROUNDS, 1 + num_samples // 20), seed)
        for done, row in enumerate(rows):
            say(row.label, done, len(rows))
            _draw(row, num_samples, seed)
        say("", len(rows), len(rows))
        sites = stage.sites_of_parameters()
    settings = {"num_samples": num_samples, "seed": seed, "burn_in": burn_in, "alpha": alpha, **options}
    settings["num_particles"] = "own minimum" if num_particles is None else num_particles
    return _dataset(stage, rows, truth, sites, settings)


def _check(num_samples, num_particles, objective, burn_in, alpha, kl_weight) -> None:
    if objective not in ("elbo", "iwae"):
        raise UnknownName("objective", objective, ("elbo", "iwae"))
    if num_samples < 10:
        raise BadInput(f"num_samples is {num_samples}: an audit needs at least 10 draws, and says little below 1000")
    if burn_in < 0:
        raise BadInput(f"burn_in is {burn_in}: expected at least 0")
    if not 0 < alpha < 1:
        raise BadInput(f"alpha is {alpha}: expected a number between 0 and 1")
    if callable(kl_weight):
        raise BadInput("kl_weight is a schedule: an audit stands at one step, so give the number for it")
    if objective == "iwae" and num_particles is None:
        raise BadInput("objective 'iwae' is another bound for every K: give num_particles")


def labelled(given: Any) -> dict[str, Any]:
    """Labels for whatever ``estimators=`` takes; a word that means nothing is an UnknownName.

    >>> list(labelled(["rloo", {"y": "rloo", "z": "pathwise"}]))
    ['rloo', 'y=rloo, z=pathwise']
    """
    if given is None:
        given = [*estimators, *stock_elbos]
    if isinstance(given, (str, Estimator, ELBO)):
        given = [given]
    if isinstance(given, Mapping):
        found = {str(label): entry for label, entry in given.items()}
    elif isinstance(given, Iterable):
        found = {}
        for entry in given:
            label = _label(entry)
            if label in found:
                raise BadInput(f"estimator {label!r} stands twice; give a dict from labels to estimators")
            found[label] = entry
    else:
        raise BadInput(f"estimators is {given!r}: expected a list of words, or a dict from labels to estimators")
    if not found:
        raise BadInput("estimators is empty: name at least one")
    for entry in found.values():
        for word in entry.values() if isinstance(entry, Mapping) else [entry]:
            if isinstance(word, str) and word not in stock_elbos:
                as_estimator(word)
    return found


def _label(entry: Any) -> str:
    if isinstance(entry, Mapping):
        return ", ".join(f"{site}={_label(word)}" for site, word in entry.items())
    if isinstance(entry, Estimator):
        return entry.name if entry.name in estimators else repr(entry)
    if isinstance(entry, ELBO):
        return repr(entry) if isinstance(entry, SiteELBO) else type(entry).__name__
    return str(entry)


# From words to draws.


def _make_row(stage: Stage, label: str, entry: Any, num_particles: int | None, options: dict[str, Any]) -> _Row:
    row = _Row(label)

    def make() -> None:
        row.loss = _make_loss(stage, entry, num_particles, options)
        row.draws = Draws(stage, row.loss)
        row.num_particles = row.loss.num_particles
        if (binding := row.draws.binding) is not None:
            chosen = binding.chosen.values()
            row.objective, row.num_particles = binding.objective_name(), binding.num_particles
            row.unbiased = all(e.unbiased and e.objective_name() == "elbo" for e in chosen)
        row.draws.draw()

    _attempt(row, make)
    return row


def _make_loss(stage: Stage, entry: Any, num_particles: int | None, options: dict[str, Any]) -> ELBO:
    objective, weight = options["objective"], options["kl_weight"]
    if isinstance(entry, ELBO):
        other = getattr(entry, "objective", objective), getattr(entry, "kl_weight", weight)
        if other != (objective, weight):
            raise BadInput(f"it estimates {other[0]!r} at kl_weight {other[1]}, and this audit another objective")
        return copy.deepcopy(entry, {id(program): program for program in modules_of(stage.model, stage.guide)})
    if isinstance(entry, str) and entry in stock_elbos:
        if objective != "elbo" or weight != 1.0:
            raise BadInput(f"Pyro's {entry!r} estimates the ELBO, and this audit is of another objective")
        nesting = options["max_plate_nesting"]
        return make_loss(
            entry,
            num_particles,
            vectorize_particles=options["vectorize_particles"] and (num_particles or 1) > 1,
            max_plate_nesting=stage.nesting if nesting is None else nesting,
        )
    # Named site by site, a word outranks the marks that sites carry.
    words = entry if isinstance(entry, Mapping) else dict.fromkeys((*stage.latents, "*"), entry)
    return SiteELBO(words, num_particles=num_particles, **options)


def _attempt(row: _Row, action: Callable[[], None]) -> None:
    """What goes wrong with one estimator is told in its row and stops nobody else; so is what it warns of."""
    if row.refused is not None:
        return
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            action()
        said = (" ".join(str(warning.message).split()) for warning in caught)
        row.warned += [text for text in dict.fromkeys(said) if text not in row.warned]
    except UnsupportedSite as error:
        row.refused = f"refused: site {error.site!r}: {error.reason}"
    except GumboError as error:
        row.refused = f"refused: {error}"
    except Exception as error:
        first = next(iter(str(error).splitlines()), "")
        # Pyro refuses what it cannot do by a NotImplementedError.
        is_refusal = isinstance(error, NotImplementedError) and first
        row.refused = f"refused: {first}" if is_refusal else f"failed: {type(error).__name__}: {first}"


def _settle(rows: list[_Row], burn_in: int, rounds: int, seed: int) -> None:
    """Let what learns learn, then time all in turns, in training mode, and freeze."""
    torch.manual_seed(seed + 2**33)

    def times(row: _Row, steps: int) -> list[float]:
        return [row.draws.draw()[2] for _ in range(steps)]

    def count(row: _Row) -> None:
        # Some estimators look at more values in one step than in the next.
        row.evaluations = statistics.mean(row.draws.evaluations() for _ in range(COUNTED))

    for row in rows:
        _attempt(row, lambda row=row: times(row, burn_in if row.draws.has_state else WARM_UP))
        _attempt(row, lambda row=row: count(row))
    for _ in range(rounds):
        for row in rows:
            _attempt(row, lambda row=row: row.seconds.extend(times(row, 1)))
    for row in rows:
        _attempt(row, lambda row=row: row.draws.freeze())


def _draw(row: _Row, num_samples: int, seed: int) -> None:
    def moments() -> None:
        # One stream for all, so that a row's numbers do not depend on which others there are.
        torch.manual_seed(seed)
        row.moments = row.draws.moments(num_samples)
        if row.moments.bad:
            row.refused = f"failed: {row.moments.bad} of {num_samples} gradients are not finite"

    _attempt(row, moments)


# From moments to verdicts.


@dataclass(frozen=True)
class _Comparison:
    """Mean − reference of one parameter, element by element, with p-values of the differences."""

    offset: Tensor
    squared_error: Tensor
    z: Tensor
    p_value: Tensor


def compare(moments: Moments, reference: Reference) -> dict[str, _Comparison]:
    """Test every element of the mean gradient against the reference.

    The difference in standard errors is freed of skewness (Hall 1992, "On the removal of skewness by transformation")
    and held to Student's t with as many degrees of freedom as the fourth moment leaves to the variance
    (Satterthwaite), since gradients are skewed and heavy-tailed: most of one may come from a few draws. An element that
    never moved may owe its offset d to a draw that has not been met; if no draw is larger than the largest deviation M
    of its parameter, that has probability (1 − d/M)ⁿ at most, and if nothing moves at all, none.
    """
    ours = moments.central()
    reference_moments = reference.moments.central() if reference.moments else {}
    largest = {name: _largest_deviation(central) for name, central in ours.items()}
    anywhere = max(largest.values(), default=0.0)
    found = {}
    for name, central in ours.items():
        theirs = reference_moments.get(name)
        offset = central.mean - reference.gradient[name]
        rounding = _rounding(moments, reference, name)
        beyond = offset.sign() * (offset.abs() - rounding).clamp(min=0.0)
        squared, skew, freedom = _error(central, theirs)
        moved = squared > 0
        t = torch.where(moved, beyond / squared.sqrt().where(moved, torch.ones_like(squared)), 0.0)
        p_value = torch.where(moved & (beyond != 0), _two_sided(_unskewed(t, skew), freedom), 1.0)
        size = largest[name] or anywhere
        unseen = torch.exp(-central.count * beyond.abs() / size) if size > 0 else torch.zeros_like(p_value)
        still = ~moved & (beyond != 0)
        p_value = torch.where(still, unseen, p_value)
        z = torch.where(still, beyond.sign() * math.inf, t)
        found[name] = _Comparison(offset, squared, z, p_value)
    return found


def _error(ours: Central, theirs: Central | None) -> tuple[Tensor, Tensor, Tensor]:
    """Squared standard error of a difference of means, its skewness, and the degrees of freedom behind it."""
    squared, third, spread = 0.0, 0.0, 0.0
    for sign, c in ((1.0, ours), (-1.0, theirs)):
        if c is not None:
            squared = squared + c.variance / c.count
            third = third + sign * c.third / c.count**2
            spread = spread + (c.fourth - c.variance**2).clamp(min=0.0) / c.count**3
    safe = torch.where(squared > 0, squared, torch.ones_like(squared))
    freedom = (2 * safe**2 / spread.clamp(min=1e-300)).clamp(min=1.0, max=float(ours.count - 1))
    return squared, third / safe**1.5, freedom


def _unskewed(t: Tensor, skew: Tensor) -> Tensor:
    return t + skew * t**2 / 3 + skew**2 * t**3 / 27 + skew / 6


def _two_sided(t: Tensor, freedom: Tensor) -> Tensor:
    from scipy.stats import t as student

    return torch.as_tensor(2 * student.sf(t.abs().cpu().numpy(), freedom.cpu().numpy()), device=t.device)


def _largest_deviation(central: Central) -> float:
    """At least the largest |draw − mean| of any element."""
    return (central.fourth * central.count).max().item() ** 0.25 if central.fourth.numel() else 0.0


def _rounding(moments: Moments, reference: Reference, name: str) -> float:
    """How far two sums of the same terms may differ in the arithmetic of the parameter."""
    loss = max(abs(reference.loss), abs(moments.loss / max(moments.count, 1)))
    size = max(reference.gradient[name].abs().max().item() if reference.gradient[name].numel() else 0.0, loss)
    return 16 * moments.precision[name] * size


def holm(p_values: Tensor) -> Tensor:
    """P-values adjusted so that the chance of any false rejection is bounded (Holm 1979).

    >>> holm(torch.tensor([0.01, 0.04, 0.03], dtype=torch.float64)).tolist()
    [0.03, 0.06, 0.06]
    """
    order = p_values.argsort()
    factors = torch.arange(len(p_values), 0, -1, dtype=p_values.dtype, device=p_values.device)
    adjusted = (p_values[order] * factors).cummax(0).values.clamp(max=1.0)
    return torch.empty_like(adjusted).scatter_(0, order, adjusted)


def _dataset(
    stage: Stage, rows: list[_Row], truth: Reference, sites: dict[str, str], settings: dict[str, Any]
) -> xarray.Dataset:
    import numpy as np
    import xarray

    names = list(stage.parameters)
    judged = {row.label: compare(row.moments, truth) for row in rows if row.judged}
    tests = [found[name].p_value for found in judged.values() for name in names]
    adjusted = iter(holm(torch.cat(tests)).split([len(test) for test in tests]) if tests else [])
    table: dict[str, np.ndarray] = {
        key: np.full((len(rows), len(names)), math.nan) for key in (*_PER_PARAMETER, "worst_element")
    }
    for i, row in enumerate(rows):
        central = row.moments.central() if row.judged else {}
        for j, name in enumerate(central):
            numbers = _parameter_numbers(central[name], truth.gradient[name], judged[row.label][name])
            numbers["p_value"] = next(adjusted)
            worst = int(numbers["p_value"].argmin()) if len(numbers["p_value"]) else 0
            for key, value in numbers.items():
                is_element = isinstance(value, Tensor) and value.dim()
                table[key][i, j] = (value[worst] if is_element else value) if not is_element or len(value) else math.nan
            table["worst_element"][i, j] = worst
    flagged = np.nan_to_num(table["p_value"], nan=1.0) < settings["alpha"]
    summary = [_summary(row, names, truth, table, i, flagged[i]) for i, row in enumerate(rows)]
    theirs = truth.moments.central() if truth.moments else {}
    reference_error = [
        math.sqrt(theirs[name].variance.sum().item() / theirs[name].count) if theirs else 0.0 for name in names
    ]
    data = {key: (("estimator", "parameter"), value) for key, value in table.items()}
    data["flagged"] = (("estimator", "parameter"), flagged)
    data |= {key: ("estimator", np.array([line[key] for line in summary])) for key in summary[0]}
    data["reference_norm"] = ("parameter", [truth.gradient[n].norm().item() for n in names])
    data["reference_error"] = ("parameter", reference_error)
    coords = {
        "estimator": [row.label for row in rows],
        "parameter": names,
        "size": ("parameter", [leaf.numel() for leaf in stage.parameters.values()]),
        "sites": ("parameter", [sites[name] for name in names]),
    }
    attributes = {
        **{key: _storable(value) for key, value in settings.items()},
        "reference": truth.kind,
        "reference_is_exact": int(truth.exact),
        "reference_total_norm": _norm(truth.gradient.values()),
        "reference_total_error": math.hypot(*reference_error),
        "reference_loss": truth.loss,
        "num_tests": sum(len(test) for test in tests),
        **_versions(),
    }
    return xarray.Dataset(data, coords, attributes)


_PER_PARAMETER = (
    "bias",
    "bias_error",
    "z",
    "p_value",
    "variance",
    "signal_to_noise",
    "cosine",
    "worst_mean",
    "worst_reference",
)


def _parameter_numbers(central: Central, truth: Tensor, found: _Comparison) -> dict[str, Any]:
    variance = central.variance.sum().item()
    noise = found.squared_error.sum().item()
    return {
        "bias": math.sqrt(max(found.offset.square().sum().item() - noise, 0.0)),
        "bias_error": math.sqrt(noise),
        "z": found.z,
        "variance": variance,
        "signal_to_noise": _ratio(truth.norm().item(), math.sqrt(variance)),
        "cosine": _cosine([central.mean], [truth]),
        "worst_mean": central.mean,
        "worst_reference": truth,
    }


def _summary(row: _Row, names: list[str], truth: Reference, table: dict, i: int, flagged) -> dict[str, Any]:
    """What is said of an estimator over all parameters, or over the guide's where its variance is meant."""
    own = [name.startswith("guide.") for name in names]
    own = own if any(own) else [True] * len(names)
    norm = _norm(truth.gradient.values())
    found: dict[str, Any] = {
        "verdict": row.refused or "",
        "warnings": "; ".join(row.warned),
        "unbiased": bool(row.unbiased and row.refused is None),
        "any_flagged": bool(flagged.any()),
        "objective_name": row.objective if row.refused is None else "",
        "num_particles": row.num_particles,
        "evaluations": row.evaluations,
        "seconds": statistics.median(row.seconds) if row.judged and row.seconds else math.nan,
        "nonfinite": row.moments.bad if row.moments else 0,
    }
    totals = dict.fromkeys(
        ("total_bias", "total_bias_error", "relative_bias", "total_cosine", "max_z")
        + ("total_variance", "total_signal_to_noise"),
        math.nan,
    )
    if row.judged:
        import numpy as np

        bias, error, z = (table[key][i] for key in ("bias", "bias_error", "z"))
        squared = sum(float(b**2) for b in bias)
        totals["total_bias"] = math.sqrt(squared)
        totals["total_bias_error"] = math.hypot(*error)
        totals["relative_bias"] = _ratio(math.sqrt(squared), norm)
        totals["total_cosine"] = _cosine(
            [part.mean for part in row.moments.central().values()], [truth.gradient[name] for name in names]
        )
        totals["max_z"] = float(np.nanmax(np.abs(z)))
        totals["total_variance"] = float(table["variance"][i][own].sum())
        signal = _norm(truth.gradient[name] for name, mine in zip(names, own, strict=True) if mine)
        totals["total_signal_to_noise"] = _ratio(signal, math.sqrt(totals["total_variance"]))
        found["verdict"] = row.refused or _verdict(row, names, table, i, flagged)
    found |= totals
    found["work_normalized_variance"] = totals["total_variance"] * found["seconds"]
    found["evaluation_normalized_variance"] = totals["total_variance"] * found["evaluations"]
    return found


def _verdict(row: _Row, names: list[str], table: dict, i: int, flagged) -> str:
    if not row.unbiased:
        return "biased" if flagged.any() else "no bias seen"
    if not flagged.any():
        return "ok"
    j = int(table["p_value"][i].argmin())
    mean, truth = table["worst_mean"][i, j], table["worst_reference"][i, j]
    return (
        f"flagged: declared unbiased, and {names[j]}[{int(table['worst_element'][i, j])}] is {mean:.4g} where the"
        f" reference is {truth:.4g} (z = {table['z'][i, j]:.1f})"
    )


def _norm(parts: Iterable[Tensor]) -> float:
    return math.sqrt(sum(part.square().sum().item() for part in parts))


def _cosine(a: list[Tensor], b: list[Tensor]) -> float:
    return _ratio(sum((x * y).sum().item() for x, y in zip(a, b, strict=True)), _norm(a) * _norm(b), math.nan)


def _ratio(over: float, under: float, otherwise: float = math.inf) -> float:
    if under > 0:
        return over / under
    return otherwise if over > 0 else math.nan


def _storable(value: Any) -> Any:
    if value is None:
        return "found in the first run"
    return int(value) if isinstance(value, bool) else value


def _versions() -> dict[str, str]:
    import pyro

    from ..._version import __version__

    return {"gumbo": __version__, "torch": str(torch.__version__), "pyro": pyro.__version__}


def recommend(dataset: xarray.Dataset) -> tuple[str | None, str]:
    """The estimator to use, by its label, and why, in a sentence; None where no unbiased one stands the audit.

    It has the smallest variance × time among those that are declared unbiased and not flagged. Relaxed ones are named
    with their bias as a share of the gradient's length, since a small one may be worth it.
    """
    verdict = dataset["verdict"]
    good = dataset.sel(estimator=(verdict == "ok").values)
    relaxed = dataset.sel(estimator=verdict.isin(["biased", "no bias seen"]).values)
    shares = ", ".join(
        f"{label} {share:.0%}" if said == "biased" else f"{label} none seen"
        for label, share, said in zip(
            relaxed["estimator"].values, relaxed["relative_bias"].values, relaxed["verdict"].values, strict=True
        )
    )
    biases = f"; bias of those that do not claim to have none, as a share of the gradient's length: {shares}"
    biases = biases if shares else ""
    if not good.sizes["estimator"]:
        return None, f"no estimator in the audit is declared unbiased and stands it{biases}"
    work = good["work_normalized_variance"].values
    least = min(range(len(work)), key=lambda i: (work[i], good["seconds"].values[i]))
    label = str(good["estimator"].values[least])
    return label, _reason(label, work, least, good["estimator"].values) + biases


def _reason(label: str, work: Any, least: int, labels: Any) -> str:
    if work[least] == 0:
        return f"{label} has no variance at all and can be afforded here"
    others = [i for i in range(len(work)) if i != least]
    if not others:
        return f"{label} is the only one that is declared unbiased and stands the audit"
    second = min(others, key=lambda i: work[i])
    return (
        f"{label} has the smallest variance × time among those declared unbiased and not flagged,"
        f" {work[second] / work[least]:.2g} times below {labels[second]}"
    )


def plot(dataset: xarray.Dataset, path: Any = None) -> Any:
    """Draw bias with its error, and variance against time with the Pareto front; returns the matplotlib figure.

    With ``path`` it is also saved there, as a PNG or whatever its suffix says.
    """
    from .plot import figure

    made = figure(dataset)
    if path is not None:
        made.savefig(path, dpi=150)
    return made
