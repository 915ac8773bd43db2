"""``audit``: bias, variance and cost of gradient estimators on a user's programs at fixed parameters."""

from __future__ import annotations

import copy
import statistics
import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from pyro.infer import ELBO

from ...errors import BadInput, GumboError, GumboWarning, Refusal, UnsupportedSite, first_line, raised_here
from ...options import holds_to_annotations
from ..elbo import SiteELBO
from ..engine.arrangement import ONE_BY_ONE
from ..engine.resolution import as_estimator
from ..engine.rows import given_arguments
from ..engine.scopes import modules_of
from ..estimators import Estimator, estimators
from ..objectives import Objective, as_objective
from ..stock import make_loss, stock_elbos
from .confirmation import are_doubted, confirmed
from .directions import Directions
from .reference import find_reference, without_paths
from .rows import Row
from .sampler import Draws, Stage, set_aside
from .verdicts import dataset_of

if TYPE_CHECKING:
    import xarray

ROUNDS = 31  # timed steps of each estimator, interleaved with the others; fewer if few gradients are drawn
WARM_UP = 3
COUNTED = 8  # steps whose model runs are counted


@holds_to_annotations()
def audit(
    model: Callable,
    guide: Callable,
    *args: Any,
    estimators: Any = None,
    num_samples: int = 2000,
    num_particles: int | None = None,
    objective: str | Objective = "elbo",
    reference: Any = "auto",
    seed: int = 0,
    burn_in: int = 200,
    alpha: float = 0.05,
    vectorize_particles: bool | None = None,
    max_plate_nesting: int | None = None,
    kl_weight: float = 1.0,
    progress: Callable[[str, int, int], None] | None = None,
    **kwargs: Any,
) -> xarray.Dataset:
    """Compare the gradients of estimators at fixed parameters with the exact gradient: bias, variance, cost.

    Param store, parameters, ``.grad``, random state, training modes and buffers are restored.

    Args:
        model, guide: Pyro programs, modules or functions with ``pyro.param``.
        args, kwargs: their arguments and keywords, or one object in the form that ``fit`` takes: a tuple holds the
            positional arguments, a mapping the keywords, anything else is the single argument. Rows of subsampled
            plates are drawn once and kept.
        estimators: words of gumbo's estimators and of Pyro's own ELBOs (``trace``, ``trace-graph``,
            ``trace-graph+baseline``, ``trace-meanfield``, ``trace-enum``), :class:`Estimator` objects, mappings from
            sites to words, ELBO objects; a list of these, or a dict from your own labels. None takes every word. A word
            applies to every latent site and overrides the sites' own ``infer`` entries.
        num_samples: gradients per estimator.
        num_particles: K; None takes each estimator's smallest number.
        objective: a word, or an :class:`~gumbo.inference.objectives.Objective` that takes estimators: ``"elbo"``,
            ``"iwae"``, or ``RenyiBound(0.5)``. One with importance weights per datum needs ``num_particles``. The exact
            reference exists for ``elbo`` and for functions of a datum's importance weights; others use a long run.
        reference: ``"auto"``: the exact gradient by enumeration if possible, otherwise a long run of pathwise and
            leave-one-out gradients, whose standard error enters the verdicts; where an estimator without paths differs
            from it, and a long run of leave-one-out gradients too, the latter; ``"exact"`` and ``"long-run"`` require
            one of the two; an estimator's word (or anything ``estimators`` takes) makes a long run of it.
        seed: of all draws.
        burn_in: steps in which baselines and control variates adapt, and their parameters take Adam steps, at fixed
            model and guide; then they are frozen, so that draws are independent.
        alpha: the probability that any unbiased estimator is flagged, over all tests of the audit together.
        vectorize_particles: as for :class:`SiteELBO`: None runs particles one after the other where vectorized programs
            give other log-probabilities, with a warning; False always does; True refuses such programs.
        max_plate_nesting: the number of batch dimensions that plates use; None finds it in the first run.
        kl_weight: a factor of all latent terms, a number.
        progress: called with a label, the rows done and the number of rows.

    Returns:
        An ``xarray.Dataset`` whose ``repr`` is the table of estimators, with dimensions ``estimator`` and ``parameter``
        (``guide.…``, ``model.…``), and coordinates ``size`` and ``sites``: the sites whose distribution depends on the
        parameter, joined by ``+`` (``groupby("sites")`` is the table by site). In nats, summed over the batch:

        - ``bias``: the length of mean − reference, minus the expected contribution of sampling, and ``bias_error``, the
          root of the summed squared standard errors, an upper bound of the error of that length;
        - ``z``: of the worst element, ``worst_element``, with its ``worst_mean`` and ``worst_reference``; ``p_value``:
          the smallest over the parameter's elements and its components along five directions (the reference's and
          random signs), adjusted for all tests (Holm); ``flagged``: whether it is below alpha;
        - ``variance`` (trace of the covariance), ``signal_to_noise`` (length of the reference over the root of the
          variance), ``cosine`` of the mean to the reference;
        - by estimator ``verdict``, ``unbiased`` (what it declares), ``any_flagged``, ``relative_bias`` (over the length
          of the reference), ``detectable_bias`` (the smallest bias along the reference that would have been flagged,
          over the same length), ``total_bias``, ``total_bias_error``, ``total_cosine``, ``max_z`` over all parameters,
          and ``total_variance``, ``total_signal_to_noise`` over the guide's, where estimators differ;
        - ``evaluations`` (mean number of model runs per step), ``seconds`` (median time of a step, estimators
          interleaved, without what other processes took of a CPU), ``work_normalized_variance`` (total variance ×
          seconds), ``evaluation_normalized_variance``;
        - ``warnings``: the estimator's warnings.

        Verdicts are ``"ok"``; ``"flagged: …"`` for a biased estimator that is declared unbiased; ``"biased"`` and
        ``"no bias seen"`` for those that are not declared unbiased for this objective; ``"cannot say: …"`` if the
        draws are too few to exclude a gradient of the opposite sign, with the number needed; ``"refused: …"`` and
        ``"failed: …"``. No p-value is below the probability that a rare large draw was missed, so that the few nonzero
        draws of a rarely nonzero gradient flag no estimator.

        ``attrs["mixed_plates"]`` names the plates in which a change of one row's draws changes other rows: gumbo's
        estimators sum these, Pyro's own assume independent rows. The check can find dependence; it cannot prove
        independence.

    Raises:
        BadInput: a number out of range, data in another form, or no exact reference for ``reference="exact"``.
        UnknownName: an unknown estimator or objective.
        UnsupportedSite: no unbiased gradient can serve as the reference.

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
    target = check_settings(num_samples, num_particles, objective, burn_in, alpha, kl_weight)
    entries = labelled(estimators)
    options = {
        "objective": target,
        "vectorize_particles": vectorize_particles,
        "max_plate_nesting": max_plate_nesting,
        "kl_weight": float(kl_weight),
    }
    say = progress or (lambda label, done, total: None)
    with set_aside(model, guide, seed):
        stage = Stage(model, guide, args, kwargs, max_plate_nesting)
        rows = [_make_row(stage, label, entry, num_particles, options) for label, entry in entries.items()]
        say("reference", 0, len(rows))
        truth = find_reference(
            stage, reference, num_samples=num_samples, num_particles=num_particles, seed=seed, options=options
        )
        say("time", 0, len(rows))
        _settle(rows, burn_in, min(ROUNDS, 1 + num_samples // 20), seed)
        for done, row in enumerate(rows):
            say(row.label, done, len(rows))
            _draw(row, num_samples, seed, truth.directions)
        if are_doubted(truth, rows, alpha):
            say("reference", len(rows), len(rows))
            truth = confirmed(truth, without_paths(stage, truth, num_samples, num_particles, seed, options), alpha)
        say("", len(rows), len(rows))
        sites = stage.sites_of_parameters()
    _say_once(rows)
    settings = {"num_samples": num_samples, "seed": seed, "burn_in": burn_in, "alpha": alpha, **options}
    settings["objective"] = target.said
    settings["mixed_plates"] = ", ".join(stage.mixed_plates)
    settings["num_particles"] = "own minimum" if num_particles is None else num_particles
    return dataset_of(stage, rows, truth, sites, settings)


def check_settings(num_samples, num_particles, objective, burn_in, alpha, kl_weight) -> Objective:
    """The objective; raises BadInput or UnknownName for invalid options of an audit."""
    target = as_objective(objective)
    if not target.takes_estimators:
        raise BadInput(
            f"objective {target.name!r} takes no estimator, and an audit compares estimators: take 'elbo' or"
            " 'iwae', or another objective that takes estimators"
        )
    if num_samples < 10:
        raise BadInput(f"num_samples is {num_samples}: expected at least 10; below 1000 the tests have little power")
    if burn_in < 0:
        raise BadInput(f"burn_in is {burn_in}: expected at least 0")
    if not 0 < alpha < 1:
        raise BadInput(f"alpha is {alpha}: expected a number between 0 and 1")
    if callable(kl_weight):
        raise BadInput("kl_weight is a schedule: an audit is at one step: pass the number at it")
    if target.weighs_rows and num_particles is None:
        raise BadInput(f"objective {target.name!r} depends on K: pass num_particles")
    return target


def labelled(given: Any) -> dict[str, Any]:
    """Labels for the values of ``estimators=``; raises UnknownName for an unknown word.

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
                raise BadInput(f"estimator {label!r} occurs twice; pass a dict from labels to estimators")
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


def _make_row(stage: Stage, label: str, entry: Any, num_particles: int | None, options: dict[str, Any]) -> Row:
    row = Row(label)

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
    objective, weight = options["objective"].said, options["kl_weight"]
    if isinstance(entry, ELBO):
        target = getattr(entry, "target", None)
        own = objective if target is None else target.gradient_of or target.said
        other = own, getattr(entry, "kl_weight", weight)
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
            vectorize_particles=(num_particles or 1) > 1 and stage.at_once(options["vectorize_particles"]),
            max_plate_nesting=stage.nesting if nesting is None else nesting,
        )
    # A mapping by site has precedence over the sites' own infer entries.
    words = entry if isinstance(entry, Mapping) else dict.fromkeys((*stage.latents, "*"), entry)
    return SiteELBO(words, num_particles=num_particles, **options)


def _say_once(rows: list[Row]) -> None:
    """Warn once for all estimators whose particles run one by one."""
    slow = [(row.label, text) for row in rows for text in row.warned if ONE_BY_ONE in text]
    if slow:
        labels = ", ".join(dict.fromkeys(label for label, _ in slow))
        warnings.warn(f"{slow[0][1]}; here for {labels}", GumboWarning, stacklevel=4)


def _attempt(row: Row, action: Callable[[], None]) -> None:
    """Record an estimator's error or warnings in its row, so that the other estimators continue."""
    if row.refused is not None:
        return
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            action()
        said = (" ".join(str(warning.message).split()) for warning in caught)
        row.warned += [text for text in dict.fromkeys(said) if text not in row.warned]
    except UnsupportedSite as error:
        row.refused = Refusal(error.reason, error.site, error.estimator, error.alternatives)
    except GumboError as error:
        row.refused = Refusal(str(error))
    except Exception as error:
        # Pyro raises NotImplementedError for what it does not support.
        is_refusal = isinstance(error, NotImplementedError) and str(error) and not raised_here(error)
        row.refused, row.failed = Refusal(first_line(error, kind=not is_refusal)), not is_refusal


def _settle(rows: list[Row], burn_in: int, rounds: int, seed: int) -> None:
    """Let baselines and control variates adapt, time all estimators interleaved in training mode, and freeze."""
    torch.manual_seed(seed + 2**33)

    def times(row: Row, steps: int) -> list[float]:
        return [row.draws.draw()[2] for _ in range(steps)]

    def count(row: Row) -> None:
        # Some estimators run the model more often in one step than in another.
        row.evaluations = statistics.mean(row.draws.evaluations() for _ in range(COUNTED))

    for row in rows:
        _attempt(row, lambda row=row: times(row, burn_in if row.draws.has_state else WARM_UP))
        _attempt(row, lambda row=row: count(row))
    for _ in range(rounds):
        for row in rows:
            _attempt(row, lambda row=row: row.seconds.extend(times(row, 1)))
    for row in rows:
        _attempt(row, lambda row=row: row.draws.freeze())


def _draw(row: Row, num_samples: int, seed: int, directions: Directions | None) -> None:
    def moments() -> None:
        # The same stream for all, so that a row's numbers do not depend on the other rows.
        torch.manual_seed(seed)
        row.moments = row.draws.moments(num_samples, directions)
        if row.moments.bad:
            row.refused, row.failed = Refusal(f"{row.moments.bad} of {num_samples} gradients are not finite"), True

    _attempt(row, moments)
