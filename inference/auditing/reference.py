"""References for gradient estimators: the exact gradient, or a long run with a standard error."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from pyro.infer import ELBO
from pyro.poutine.trace_struct import Trace
from pyro.poutine.util import prune_subsample_sites
from torch import Tensor

from ...errors import BadInput, CannotVectorize, GumboError, UnsupportedSite
from ..elbo import SiteELBO
from ..engine.elimination import is_marked
from ..engine.looks import pair_of_traces
from ..estimators import LeaveOneOut, Pathwise, ScoreFunction
from ..estimators._distributions import describe, finite_support, is_deterministic
from ..objectives import Objective
from ..objectives.evidence import EvidenceLowerBound
from ..stock import LatentsWeighted
from .directions import Directions
from .exact import Choose, advance, exact_elbo, exact_iwae
from .moments import Gradient, Moments
from .sampler import Draws, Stage

ONE_BY_ONE = 2**10  # the most joint values of all sites: each needs a run of both programs
AT_ONCE = 2**13  # the most joint values of one datum: all run at once
TUPLES = 2**16  # the most tuples of K values of one datum
LONG_RUN_PARTICLES = 16


@dataclass(frozen=True)
class Reference:
    """A reference gradient: ``kind`` describes its origin; ``moments`` are those of a long run, or None.

    ``directions`` are those along which gradients are compared, in addition to single elements. ``paths`` are the sites
    whose pathwise gradient was taken by default: it misses the steps of a cost.
    """

    kind: str
    gradient: Gradient
    loss: float
    moments: Moments | None = None
    directions: Directions | None = None
    paths: tuple[str, ...] = ()

    @property
    def exact(self) -> bool:
        return self.moments is None


def find_reference(
    stage: Stage, kind: Any, *, num_samples: int, num_particles: int | None, seed: int, options: dict[str, Any]
) -> Reference:
    """The reference that ``kind`` asks for: ``"auto"``, ``"exact"``, ``"long-run"``, or an estimator for a long run.

    ``options`` are those of :class:`SiteELBO`. Raises BadInput if the exact gradient is required and not available.
    """
    if isinstance(kind, str) and kind in ("auto", "exact"):
        found = exact_reference(stage, num_particles, options)
        if isinstance(found, Reference):
            return found
        if kind == "exact":
            raise BadInput(f"reference='exact' is not available: {found}; take reference='long-run'")
    if isinstance(kind, str) and kind in ("auto", "long-run"):
        return long_run(stage, num_samples, num_particles, seed, options)
    loss = kind if isinstance(kind, ELBO) else SiteELBO(kind, num_particles=num_particles, **options)
    return run_long(stage, loss, 4 * num_samples, seed)


def exact_reference(stage: Stage, num_particles: int | None, options: dict[str, Any]) -> Reference | str:
    """The exact gradient by enumeration, or the reason why it is not available."""
    jointly, apart = _count_values(stage, True), _count_values(stage, False)
    if isinstance(apart, str):
        return apart
    if not _repeats_itself(stage):
        return "the programs draw noise of their own, so that two runs on the same values differ"
    target: Objective = options["objective"]
    weighed = target.weighs_rows and _has_bound_of_its_value(type(target))
    if not weighed and type(target.refined({})).value is not EvidenceLowerBound.value:
        return f"objective {target.name!r} has no exact gradient by enumeration"
    if weighed and stage.mixed_plates:
        return f"the programs mix the rows of plate {stage.mixed_plates[0]!r}, so that no row has a bound of its own"
    if weighed:
        try:
            return _as_reference(stage, "exact (every tuple of values)", exact_bound(stage, num_particles, target))
        except UnsupportedSite as error:
            return error.reason
    if isinstance(jointly, int) and jointly <= ONE_BY_ONE and not _sums_out(stage):
        with stage.held(), LatentsWeighted(options["kl_weight"]):
            loss = -exact_elbo(stage.model, stage.guide, *stage.args, **stage.kwargs)
        return _as_reference(stage, "exact (every value)", loss)
    at_once = options["vectorize_particles"] is not False
    if apart > AT_ONCE or not at_once:
        count = apart if at_once else jointly
        return f"there are {count} joint values" if isinstance(count, int) else count
    try:
        with stage.held():
            loss = SiteELBO(
                dict.fromkeys((*stage.latents, "*"), "enumerate"), **options | {"vectorize_particles": True}
            )
            value = loss.differentiable_loss(stage.model, stage.guide, *stage.args, **stage.kwargs)
    except GumboError as error:
        return str(error)
    return _as_reference(stage, "exact (every value, plates in parallel)", value)


def _has_bound_of_its_value(objective: type[Objective]) -> bool:
    """Whether ``bound`` computes the expectation of ``value``: a subclass may override only one of them."""
    bound, value = (
        next(depth for depth, base in enumerate(objective.__mro__) if name in vars(base)) for name in ("bound", "value")
    )
    return objective.bound is not Objective.bound and bound <= value


def _as_reference(stage: Stage, kind: str, loss: Tensor) -> Reference:
    gradient = stage.gradient(loss)
    return Reference(kind, gradient, loss.item(), directions=Directions(gradient))


def _count_values(stage: Stage, jointly: bool) -> int | str:
    """The number of joint values of the latents of one run, in total or with plate elements separate."""
    total = 1
    for name, fn in stage.latents.items():
        listed = finite_support(fn, joint=len(fn.batch_shape) if jointly else 0, limit=AT_ONCE)
        if isinstance(listed, str):
            return f"site {name!r}: {listed}"
        total *= len(listed)
    return total


def _repeats_itself(stage: Stage) -> bool:
    """Whether the first few values have the same probabilities in two runs."""
    found = []
    for _ in range(2):
        script: list[list[int]] = []
        for _ in range(8):
            with stage.held(), torch.no_grad(), Choose(script, AT_ONCE, alike=True):
                found.append([float(trace.log_prob_sum()) for trace in _traces(stage)])
            if not advance(script):
                break
    return found[: len(found) // 2] == found[len(found) // 2 :]


def _sums_out(stage: Stage) -> bool:
    """Whether the model sums out sites that the guide does not sample: their chains are too long to enumerate."""
    with stage.held(), torch.no_grad():
        guide, model = _traces(stage)
    return any(name not in guide and is_marked(site) for name, site in model.nodes.items() if site["type"] == "sample")


# The exact importance-weighted bound, per datum.


def exact_bound(stage: Stage, num_particles: int | None, target: Objective) -> Tensor:
    """Minus an importance-weighted bound of K particles, summed over every tuple of values, datum by datum.

    A datum is an element of the plates that enclose every site. Raises UnsupportedSite where a latent site has further
    plates inside, and where the tuples are too many.
    """
    assert num_particles is not None
    with stage.held():
        guide, model = _traces(stage)
        sites = [site for trace in (guide, model) for site in _random(trace)]
        plates = frozenset.intersection(*(_plates(site) for site in sites))
        inner = next((site for site in _random(guide) if not site["is_observed"] and _plates(site) != plates), None)
        if not plates:
            bound = exact_iwae(
                stage.model,
                stage.guide,
                *stage.args,
                num_particles=num_particles,
                limit=TUPLES,
                bound=target.bound,
                **stage.kwargs,
            )
            return -bound
        if inner is not None:
            raise UnsupportedSite(inner["name"], "enumerate", "it has further plates inside those of a datum")
        scales = [site["scale"] for site in sites]
        scale: Any = scales[0] if all(_same(scales[0], other) for other in scales) else 1.0
        script: list[list[int]] = []
        scores, weights = [], []
        while True:
            with Choose(script, AT_ONCE, alike=True) as choose:
                guide, model = _traces(stage)
            scores.append(sum(_per_datum(score, plates) for score in choose.scores))
            weights.append(_total(model, plates, scale) - _total(guide, plates, scale))
            if len(weights) ** num_particles > TUPLES:
                raise UnsupportedSite("(program)", "enumerate", f"more than {TUPLES} tuples of values are too many")
            if not advance(script):
                break
    index = torch.cartesian_prod(*[torch.arange(len(weights), device=weights[0].device)] * num_particles)
    index = index.reshape(-1, num_particles)
    probability = torch.stack(scores)[index].sum(1).exp()
    bound = target.bound(torch.stack(weights)[index], 1).squeeze(1)
    return -(scale * probability * bound).sum()


def _traces(stage: Stage) -> tuple[Trace, Trace]:
    guide, model = pair_of_traces(stage.model, stage.guide, stage.args, stage.kwargs)
    return prune_subsample_sites(guide), prune_subsample_sites(model)


def _random(trace: Trace) -> list[Any]:
    return [s for s in trace.nodes.values() if s["type"] == "sample" and not is_deterministic(s["fn"])]


def _plates(site: Any) -> frozenset[tuple[str, int]]:
    return frozenset((frame.name, frame.dim) for frame in site["cond_indep_stack"] if frame.vectorized)


def _same(a: Any, b: Any) -> bool:
    return a is b or (not isinstance(a, Tensor) and not isinstance(b, Tensor) and a == b)


def _total(trace: Trace, plates: frozenset, scale: Any) -> Tensor:
    trace.compute_log_prob()
    return sum((_per_datum(site["log_prob"] / scale, plates) for site in _random(trace)), start=torch.zeros(()))  # type: ignore[return-value]


def _per_datum(log_prob: Tensor, plates: frozenset[tuple[str, int]]) -> Tensor:
    """Summed over every batch dimension except those of ``plates``."""
    depth = max(-dim for _, dim in plates)
    log_prob = log_prob.reshape((1,) * (depth - log_prob.dim()) + tuple(log_prob.shape))
    kept = {dim for _, dim in plates}
    gone = [dim for dim in range(-log_prob.dim(), 0) if dim not in kept]
    summed = log_prob.sum(gone, keepdim=True) if gone else log_prob
    return summed.reshape(summed.shape[summed.dim() - depth :])


# Without enumeration.


def long_run(
    stage: Stage, num_samples: int, num_particles: int | None, seed: int, options: dict[str, Any]
) -> Reference:
    """A long run of pathwise gradients where sites support them, and of leave-one-out gradients elsewhere."""
    words: dict[str, str] = {}
    for name, fn in stage.latents.items():
        site = {"name": name, "fn": fn}
        if Pathwise().supports(site):
            words[name] = "pathwise"
        elif (reason := ScoreFunction(LeaveOneOut()).why_not(site)) is None:
            words[name] = "rloo"
        else:
            raise UnsupportedSite(
                name, "any", f"no unbiased gradient of {describe(fn)} serves as a reference ({reason}); name one"
            )
    found = _run_words(stage, words, num_samples, num_particles, seed, options)
    return replace(found, paths=tuple(name for name, word in words.items() if word == "pathwise"))


def without_paths(
    stage: Stage, truth: Reference, num_samples: int, num_particles: int | None, seed: int, options: dict[str, Any]
) -> Reference | None:
    """A long run of leave-one-out gradients, along the same directions.

    None where a site does not support them, or the run is refused: the reference of paths then stands unconfirmed.
    """
    if any(not ScoreFunction(LeaveOneOut()).supports({"name": n, "fn": fn}) for n, fn in stage.latents.items()):
        return None
    words = dict.fromkeys(stage.latents, "rloo")
    try:
        return _run_words(stage, words, num_samples, num_particles, seed + 1, options, truth.directions)
    except GumboError:
        return None


def _run_words(
    stage: Stage,
    words: dict[str, str],
    num_samples: int,
    num_particles: int | None,
    seed: int,
    options: dict[str, Any],
    directions: Directions | None = None,
) -> Reference:
    options = options | {"vectorize_particles": stage.at_once(options["vectorize_particles"])}
    if not isinstance(options["objective"].refined({}), EvidenceLowerBound):
        loss = SiteELBO(words, num_particles=num_particles, **options)
        return run_long(stage, loss, 4 * num_samples, seed, directions)
    try:
        if options["vectorize_particles"]:
            loss = SiteELBO(words, num_particles=LONG_RUN_PARTICLES, **options)
            return run_long(stage, loss, 2 * num_samples, seed, directions)
    except CannotVectorize:
        options = options | {"vectorize_particles": False}
    # Without vectorization, many draws with few particles cost as much as few draws with many.
    few = 2 if "rloo" in words.values() else 1
    return run_long(stage, SiteELBO(words, num_particles=few, **options), 4 * num_samples, seed, directions)


def run_long(stage: Stage, loss: ELBO, count: int, seed: int, directions: Directions | None = None) -> Reference:
    # Another stream than the estimators', which would otherwise correlate with the reference.
    torch.manual_seed(seed + 2**32)
    draws = Draws(stage, loss)
    draws.draw()
    draws.freeze()
    bad = 0
    if directions is None:
        # The directions use separate draws: along the mean of the same draws, its length would be overestimated.
        pilot = draws.moments(max(10, count // 8))
        bad, directions = pilot.bad, Directions(_means(stage, pilot)) if pilot.count else None
    moments = draws.moments(count, directions)
    if not moments.count or moments.bad or bad:
        bad = moments.bad or bad
        raise BadInput(f"the reference {loss!r} gave {bad} gradients of {count} that are not finite")
    said = repr(loss) if isinstance(loss, SiteELBO) else type(loss).__name__
    kind, loss_value = f"long run of {count} draws of {said}", moments.loss / moments.count
    return Reference(kind, _means(stage, moments), loss_value, moments, moments.directions)


def _means(stage: Stage, moments: Moments) -> Gradient:
    central = moments.central()
    return {name: central[name].mean for name in stage.parameters}
