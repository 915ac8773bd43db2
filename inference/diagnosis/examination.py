"""`diagnose`: all diagnostics of a guide."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from ...errors import BadInput
from ...options import holds_to_annotations
from ..engine.progress import Stages
from ..engine.rows import given_arguments
from ..engine.scopes import private_seed
from ..posterior.collection import Collection
from ..posterior.conversion import afford, refitted
from ..posterior.naming import Naming
from ..posterior.parts import exact_pair
from ..posterior.runner import Sweep
from ..posterior.weights import weight_statistics
from .agreement import between_refits
from .calibration import calibration
from .collapse import collapsed, point
from .gaps import gap, with_parts
from .missed_mass import missed_mass
from .moments import moments
from .report import CANNOT_SAY, Report, Verdict, merged, not_done
from .rows import few_rows
from .units import Units, units_of
from .weights import effective_draws, tails, weights_bear


@holds_to_annotations("memory_limit")
def diagnose(
    model: Callable,
    guide: Callable | Sequence[Callable],
    *args: Any,
    num_samples: int = 2000,
    num_data: int = 200,
    num_simulations: int = 400,
    num_local_samples: int = 64,
    batch_size: int | None = None,
    data_plates: str | Sequence[str] | None = None,
    refine_steps: int = 200,
    num_refits: int | None = None,
    calibration_refits: int = 0,
    refit_steps: int = 1000,
    refit: Callable | None = None,
    seed: int | None = 0,
    progress: bool | None = None,
    **kwargs: Any,
) -> Report:
    """Test whether ``guide`` is a reliable posterior of ``model`` on data; report verdicts and numbers.

    A verdict is *ok*, *alarm*, or *cannot say* if there is too little evidence. Each has a number, a threshold and an
    advice. A *unit* is a datum with its local latents, or the global latents with the local ones integrated out.

    - ``khat``: units whose importance weights have a Pareto k̂ above min(1 − 1/log₁₀ S, 0.7) by more than its standard
      error (Vehtari et al. 2024, arXiv:1507.02646);
    - ``ess``: units whose importance effective sample size is below a tenth of the draws;
    - ``gap``: log-evidence minus ELBO, in nats; ``refine_steps`` of optimization per datum split it into the gain by a
      better member of the family (*amortization*) and the rest (*approximation*; Cremer et al. 2018, arXiv:1801.03558);
    - ``width``, ``shift``, ``correlation``: the guide's standard deviations, means and correlations against those of
      the importance-weighted draws, if enough of these are effective. Correlations are compared in blocks of 30
      neighbouring dimensions, and among 30 that are evenly spaced over all;
    - ``shape``: the guide's marginals against those of the weighted draws, beyond means and standard deviations. A few
      wrong data among many have limits of their own in ``gap``, ``shift`` and ``width``;
    - ``collapsed``: the guide is the prior although the posterior is not (Bowman et al. 2016, arXiv:1511.06349);
    - ``point``: the guide is a point, without a distribution;
    - ``calibration``: simulation-based calibration: latents and data are drawn from the model, and the ranks of these
      latents among the guide's draws leave the band of uniform ranks (Talts et al. 2018, arXiv:1804.06788; with ranks
      of the log-density, Modrák et al. 2023, arXiv:2211.02383). Ranks of discrete latents are randomized. A guide that
      does not read the data is fitted to each simulated data set if ``calibration_refits`` is set (Yao et al. 2018,
      arXiv:1802.02538);
    - ``missed-mass``: a search from the prior, and mirror images of the guide's draws, find more evidence than the
      guide's own draws, as for a guide on one of several modes (Neal 2001; Del Moral et al. 2006). Where a latent is
      discrete: one latent at a time is moved through its values, and those that the guide hardly draws have
      considerable probability under the model;
    - ``refits``: with several guides, or ``num_refits``, R̂ above 1.05 between them (Vehtari et al. 2021,
      arXiv:1903.08008).

    Draws are vectorized where this gives the same numbers, otherwise run one by one, which is slow. Networks run in
    evaluation mode; global state does not change.

    Args:
        model: a Pyro model.
        guide: a Pyro guide, or a sequence of independently fitted guides.
        args, kwargs: the programs' arguments and keywords, or one object in the form that `fit` takes: a tuple holds
            the positional arguments, a mapping the keywords, anything else is the single argument.
        num_samples: S, the draws of the guide.
        num_data: the largest number of rows to test, where the programs accept a part of the rows and no latent is
            global.
        num_simulations: data, or data sets, that the model draws for ``calibration``.
        num_local_samples: draws of the local latents per draw of the global ones, to integrate them out.
        batch_size: rows of the arguments per run; None passes all.
        data_plates: the plates whose elements are the data; None takes those around every observed site that hold a
            latent.
        refine_steps: optimization steps that split the gap; 0 does not split it.
        num_refits: the total number of fits from different initial values to compare.
        calibration_refits: simulated data sets that the guide is fitted to for ``calibration``: 0, or at least 20.
        refit_steps: optimization steps of each of these fits.
        refit: a function for these fits: called like the guide with the simulated data, it returns a fitted guide.
        seed: of all draws; None draws from the current random state.
        progress: True prints the stages to standard error, None after some seconds, False never.

    Returns:
        A `Report` whose ``ok`` is False when any verdict is an alarm. ``alarms`` and ``cannot_say`` name verdicts,
        ``vi_stats`` has the numbers (k̂, effective sample sizes, evidence in nats), ``to_arviz()`` the same and the
        ranks for ArviZ's plots. For an exact guide only ``calibration`` and ``missed-mass`` can raise a false alarm,
        with probability 0.001 each.

    Raises:
        BadInput: programs whose sites do not match or vary between draws, and invalid options.

    >>> import torch, pyro, pyro.distributions as dist
    >>> def model(x):
    ...     with pyro.plate("data", len(x)):
    ...         z = pyro.sample("z", dist.Normal(0.0, 1.0))
    ...         pyro.sample("x", dist.Normal(z, 1.0), obs=x)
    >>> def guide(x, sd=0.5**0.5):
    ...     with pyro.plate("data", len(x)):
    ...         pyro.sample("z", dist.Normal(x / 2, sd))
    >>> x = torch.tensor([0.3, -1.2, 0.8])
    >>> diagnose(model, lambda x: guide(x, 0.2), x, num_samples=500, num_simulations=40, refine_steps=3).ok
    False
    """
    args, kwargs = given_arguments(args, kwargs)
    return _examined(
        model,
        guide,
        args,
        kwargs,
        num_samples=num_samples,
        num_data=num_data,
        num_simulations=num_simulations,
        num_local_samples=num_local_samples,
        batch_size=batch_size,
        data_plates=data_plates,
        refine_steps=refine_steps,
        num_refits=num_refits,
        calibration_refits=calibration_refits,
        refit_steps=refit_steps,
        refit=refit,
        seed=seed,
        say=Stages("diagnose", progress),
    )


def _examined(
    model: Callable,
    guide: Callable | Sequence[Callable],
    args: tuple,
    kwargs: Mapping[str, Any],
    *,
    num_samples: int,
    num_data: int,
    num_simulations: int,
    num_local_samples: int,
    batch_size: int | None,
    data_plates: str | Sequence[str] | None,
    refine_steps: int,
    num_refits: int | None,
    calibration_refits: int,
    refit_steps: int,
    refit: Callable | None,
    seed: int | None,
    say: Stages,
) -> Report:
    import xarray

    for name, value, least in (
        ("num_samples", num_samples, 100),
        ("num_data", num_data, 1),
        ("num_simulations", num_simulations, 20),
        ("refine_steps", refine_steps, 0),
        ("calibration_refits", calibration_refits, 0),
        ("refit_steps", refit_steps, 1),
    ):
        if value < least:
            raise BadInput(f"{name} is {value}: expected at least {least}")
    if 0 < calibration_refits < 20:
        raise BadInput(f"calibration_refits is {calibration_refits}: expected 0, or at least 20 data sets to rank in")
    guides = list(guide) if isinstance(guide, (list, tuple)) else [guide]
    if calibration_refits and refit is None and not isinstance(guides[0], torch.nn.Module):
        raise BadInput(
            "calibration_refits fits guides that are modules with parameters: for any other give refit=, a function of "
            "the simulated data, called as the guide is, that returns a fitted guide"
        )
    with private_seed(None, model, *guides):
        pairs = [exact_pair(model, one) for one in guides]
    model, guides = pairs[0][0], [pair[1] for pair in pairs]
    if num_refits is not None:
        say.stage("refitting the guide")
        guides += refitted(model, guides, args, kwargs, num_refits, seed, None)
    options: dict[str, Any] = {"batch_size": batch_size, "data_plates": data_plates}
    sweep, args, kwargs = few_rows(Sweep(model, guides[0], args, kwargs, **options), num_data, options)
    sweeps = [sweep, *(Sweep(model, one, args, kwargs, **options) for one in guides[1:])]
    groups = frozenset({"posterior", "log_likelihood", "vi_stats"})
    collection = Collection(sweep, len(sweeps), num_samples, groups, num_local_samples=num_local_samples)
    afford(collection.bytes_needed(), 4.0)
    collection.allocate()
    for chain, one in enumerate(sweeps):
        say.stage(f"drawing from the guide{one.slowly()}", collection.steps(one))
        collection.fill(chain, one, None if seed is None else seed + chain, say)
    say.stage("computing importance weights")
    found = weight_statistics(collection, Naming(sweep, {}, {}).event_names)
    skipped: dict[str, str] = {}
    verdicts = [one for units in units_of(collection, found) for one in _by_weights(units, collection)]
    verdicts += _unweighed(sweep, collection, skipped)
    known = merged(verdicts)
    extra: dict[str, tuple[Sequence[str], np.ndarray]] = {}
    known["gap"] = with_parts(known["gap"], sweep, refine_steps, seed, skipped, extra, options, say)
    ranks: dict[str, np.ndarray] = {}
    rank_draws = 0
    if not known["point"].fired:
        fits = (calibration_refits, refit_steps, refit)
        calibrated, rank_draws = calibration(sweep, num_simulations, seed, skipped, ranks, say, *fits)
        known |= calibrated
        known |= missed_mass(sweep, num_samples, seed, skipped, options, say)
    known |= between_refits(collection)
    made = Naming(sweep, {}, {}).statistics(found | extra)
    return Report(tuple(known.values()), xarray.Dataset(made), skipped, ranks, rank_draws)


def _by_weights(units: Units, collection: Collection) -> list[Verdict]:
    """The verdicts from the importance weights of one kind of unit."""
    khat = tails(units)
    weak = weights_bear(units, khat)
    if points := [found for site, found in collection.sweep.points.items() if site in units.sites]:
        weak = f"the guide {points[0]}, and its draws no weights", "fit a guide with a width, such as AutoNormal"
        text, advice = f"{units.what}: {weak[0]}", weak[1]
        verdicts = [Verdict(name, CANNOT_SAY, text, advice=advice) for name in ("khat", "ess", "gap")]
        verdicts.insert(2, point(units))
    else:
        verdicts = [khat, effective_draws(units), point(units), gap(units, collection, weak)]
    if not verdicts[2].fired:
        verdicts += moments(units, weak)
    return verdicts + collapsed(units, collection, verdicts)


def _unweighed(sweep: Sweep, collection: Collection, skipped: dict[str, str]) -> list[Verdict]:
    """The verdicts of units without importance weights."""
    if sweep.tied and not sweep.local:
        skipped["single data"] = "the guide draws the latents of all data jointly, so that no datum has a weight"
    if not (sweep.local and sweep.shared and collection.global_log_weight() is None):
        return []
    reason = "the guide draws them given local ones, so that their own density is not known"
    skipped["global latents"] = reason
    advice = "a guide that draws the global latents first has weights"
    return [
        not_done(name, f"global latents: {reason}", advice)
        for name in ("khat", "ess", "gap", "shift", "width", "shape")
    ]
