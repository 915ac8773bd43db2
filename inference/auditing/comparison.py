"""Gradient estimators judged on anybody's program: bias, variance and cost at fixed parameters."""

from __future__ import annotations

import copy
import statistics
import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from pyro.infer import ELBO

from ...errors import BadInput, GumboError, GumboWarning, Refusal, UnsupportedSite
from ...options import holds_to_annotations
from ..elbo import SiteELBO
from ..engine.binding import ONE_BY_ONE
from ..engine.resolution import as_estimator
from ..engine.rows import given_arguments
from ..engine.scopes import modules_of
from ..estimators import Estimator, estimators
from ..objectives import Objective, as_objective
from ..stock import make_loss, stock_elbos
from .directions import Directions
from .reference import find_reference
from .rows import Row
from .sampler import Draws, Stage, set_aside
from .verdicts import dataset_of

if TYPE_CHECKING:
    import xarray

ROUNDS = 31  # timed steps of each estimator, in turns with the others; fewer where few gradients are drawn
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
    """Draw gradients of every estimator at the same fixed parameters and hold them against the exact gradient.

    Param store, parameters, ``.grad``, random streams, training modes and buffers stay as they were.

    Args:
        model, guide: any Pyro programs, modules or functions with ``pyro.param``.
        args, kwargs: their arguments and keywords, or one object in the form that ``fit`` takes: a tuple is the
            positional arguments, a mapping the keywords, anything else the one argument. Rows of subsampled plates are
            drawn once and kept.
        estimators: words of gumbo's estimators and of Pyro's own ELBOs (``trace``, ``trace-graph``,
            ``trace-graph+baseline``, ``trace-meanfield``, ``trace-enum``), :class:`Estimator` objects, mappings from
            sites to words, ELBO objects; a list of these, or a dict from labels of your own. None: every word there is.
            A word applies to every latent site, whatever marks the sites carry.
        num_samples: gradients drawn with each estimator.
        num_particles: K; None is each estimator's own minimum.
        objective: what is estimated, a word or an :class:`~gumbo.inference.objectives.Objective` that takes estimators:
            ``"elbo"``, ``"iwae"``, or ``RenyiBound(0.5)``. One that weighs each datum needs ``num_particles``.
            ``elbo`` and what is a function of a datum's importance weights have an exact reference, others a long run.
        reference: ``"auto"``: the exact gradient by enumeration where that can be had, and otherwise a long run of
            pathwise and leave-one-out gradients, whose own error enters the verdicts; ``"exact"`` and ``"long-run"``
            insist; an estimator's word (or anything ``estimators`` takes) is run long.
        seed: of all draws.
        burn_in: steps in which baselines and control variates settle, and their parameters take Adam steps, while model
            and guide stay; then they are frozen, so that draws are independent.
        alpha: the probability that any unbiased estimator is flagged, over all tests of the audit together.
        vectorize_particles: as for :class:`SiteELBO`: None runs particles one after the other where the programs mean
            another thing for many at once, and warns of it once; False always does; True refuses such programs.
        max_plate_nesting: how deep plates nest; None finds it in the first run.
        kl_weight: a factor of all latent terms, a number.
        progress: called with a label, the rows done and the number of rows.

    Returns:
        An ``xarray.Dataset`` whose ``repr`` is the table of estimators, with dimensions ``estimator`` and ``parameter``
        (``guide.…``, ``model.…``), and coordinates ``size`` and ``sites``: the sites whose distribution the parameter
        enters, joined by ``+`` (``groupby("sites")`` is the table by site). In nats, summed over the batch:

        - ``bias``: the length of mean − reference, less what sampling alone adds to it, and ``bias_error``, the root of
          the summed squared standard errors, at least the error of that length;
        - ``z``: of the worst element, ``worst_element``, with its ``worst_mean`` and ``worst_reference``; ``p_value``:
          the least of the parameter's elements and of its components along five directions (the reference's and random
          signs), adjusted for all tests (Holm); ``flagged``: whether it is below alpha;
        - ``variance`` (trace of the covariance), ``signal_to_noise`` (length of the reference over the root of the
          variance), ``cosine`` of the mean to the reference;
        - by estimator ``verdict``, ``unbiased`` (what it declares), ``any_flagged``, ``relative_bias`` (over the length
          of the reference), ``detectable_bias`` (the least bias along the reference that would have been flagged, over
          the same length), ``total_bias``, ``total_bias_error``, ``total_cosine``, ``max_z`` over all parameters, and
          ``total_variance``, ``total_signal_to_noise`` over the guide's, where estimators differ;
        - ``evaluations`` (model runs a step, counted, on average), ``seconds`` (median of a step, taken in turns),
          ``work_normalized_variance`` (total variance × seconds), ``evaluation_normalized_variance``;
        - ``warnings``: what the estimator warned of.

        Verdicts are ``"ok"``; ``"flagged: …"`` for an estimator that is declared unbiased and is not; ``"biased"`` and
        ``"no bias seen"`` for those that do not claim to be unbiased for this objective; ``"cannot say: …"`` where so
        few gradients were drawn that one of the opposite sign could pass, with the number that would tell;
        ``"refused: …"`` and ``"failed: …"``. No p-value is below the probability that a rare large draw was missed, so
        that gradients which are seldom nonzero convict no estimator by the few draws that were met.

        ``attrs["mixed_plates"]`` names the plates in which a change of one row's draws changes other rows: gumbo's
        estimators sum these, Pyro's own trust them. The check can find mixing, and cannot prove that there is none.

    Raises:
        BadInput: a number out of range, data in another form, or no exact reference where one is asked for.
        UnknownName: a word that names no estimator or objective.
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
        say("", len(rows), len(rows))
        sites = stage.sites_of_parameters()
    _say_once(rows)
    settings = {"num_samples": num_samples, "seed": seed, "burn_in": burn_in, "alpha": alpha, **options}
    settings["objective"] = target.said
    settings["mixed_plates"] = ", ".join(stage.mixed_plates)
    settings["num_particles"] = "own minimum" if num_particles is None else num_particles
    return dataset_of(stage, rows, truth, sites, settings)


def check_settings(num_samples, num_particles, objective, burn_in, alpha, kl_weight) -> Objective:
    """The objective; raises BadInput or UnknownName for numbers and words that no audit can have."""
    target = as_objective(objective)
    if not target.takes_estimators:
        raise BadInput(
            f"objective {target.name!r} takes no estimator, so that an audit has nothing to compare: take 'elbo' or"
            " 'iwae', or another objective that takes estimators"
        )
    if num_samples < 10:
        raise BadInput(f"num_samples is {num_samples}: an audit needs at least 10 draws, and says little below 1000")
    if burn_in < 0:
        raise BadInput(f"burn_in is {burn_in}: expected at least 0")
    if not 0 < alpha < 1:
        raise BadInput(f"alpha is {alpha}: expected a number between 0 and 1")
    if callable(kl_weight):
        raise BadInput("kl_weight is a schedule: an audit stands at one step, so give the number for it")
    if target.weighs_rows and num_particles is None:
        raise BadInput(f"objective {target.name!r} is another bound for every K: give num_particles")
    return target


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
    # Named site by site, a word outranks the marks that sites carry.
    words = entry if isinstance(entry, Mapping) else dict.fromkeys((*stage.latents, "*"), entry)
    return SiteELBO(words, num_particles=num_particles, **options)


def _say_once(rows: list[Row]) -> None:
    """Warn of what was run one by one, once for all estimators that were."""
    slow = [(row.label, text) for row in rows for text in row.warned if ONE_BY_ONE in text]
    if slow:
        labels = ", ".join(dict.fromkeys(label for label, _ in slow))
        warnings.warn(f"{slow[0][1]}; here for {labels}", GumboWarning, stacklevel=4)


def _attempt(row: Row, action: Callable[[], None]) -> None:
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
        row.refused = Refusal(error.reason, error.site, error.estimator, error.alternatives)
    except GumboError as error:
        row.refused = Refusal(str(error))
    except Exception as error:
        first = next(iter(str(error).splitlines()), "")
        # Pyro refuses what it cannot do by a NotImplementedError.
        is_refusal = isinstance(error, NotImplementedError) and first
        row.refused, row.failed = Refusal(first if is_refusal else f"{type(error).__name__}: {first}"), not is_refusal


def _settle(rows: list[Row], burn_in: int, rounds: int, seed: int) -> None:
    """Let what learns learn, then time all in turns, in training mode, and freeze."""
    torch.manual_seed(seed + 2**33)

    def times(row: Row, steps: int) -> list[float]:
        return [row.draws.draw()[2] for _ in range(steps)]

    def count(row: Row) -> None:
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


def _draw(row: Row, num_samples: int, seed: int, directions: Directions | None) -> None:
    def moments() -> None:
        # One stream for all, so that a row's numbers do not depend on which others there are.
        torch.manual_seed(seed)
        row.moments = row.draws.moments(num_samples, directions)
        if row.moments.bad:
            row.refused, row.failed = Refusal(f"{row.moments.bad} of {num_samples} gradients are not finite"), True

    _attempt(row, moments)
