"""Diagnostic ``gap``: log-evidence minus ELBO, and its split into amortization and approximation gap."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from ...errors import PROGRAM_ERRORS, GumboError, first_line
from ..engine.progress import Stages
from ..engine.rows import Rows
from ..engine.scopes import quietly
from ..posterior.collection import Collection
from ..posterior.importance import importance_ess, log_evidence
from ..posterior.refinement import can_refine, refined_for
from ..posterior.runner import Sweep, log_weight
from ..posterior.sites import Block
from .report import ALARM, CANNOT_SAY, OK, Verdict, three_way
from .rows import few_rows
from .thresholds import GAP, INNER_NOISE, SURE, single
from .units import Units

_PAPER = "Cremer et al. 2018, arXiv:1801.03558"


def gap(units: Units, collection: Collection, weak: tuple[str, str] | None) -> Verdict:
    """Log-evidence minus ELBO. Weights with few effective draws underestimate it, so an alarm remains valid."""
    from scipy.stats import norm

    weight = units.log_weight
    evidence, error = log_evidence(weight)
    with np.errstate(invalid="ignore"):  # weights of zero
        # Noise in a log-weight lowers its mean by half its variance, and leaves the mean weight unbiased.
        lacking = evidence - weight.mean(1) - units.noise / 2
        noise = np.sqrt(weight.var(1, ddof=1) / weight.shape[1] + error**2)
    mean, spread = float(lacking.mean()), float(np.sqrt((noise**2).sum()) / len(lacking))
    dimensions = _dimensions(units, collection)
    limit = GAP * dimensions
    if not math.isfinite(mean + spread):
        text = f"{units.what}: log-weights of the guide's draws are not finite, so that there is no ELBO to compare"
        return Verdict("gap", CANNOT_SAY, text, mean, limit, "find the site whose log-density is not finite")
    most = limit * float(single(len(units), np.array(dimensions)) ** 2)  # nats are squares of differences
    beyond = (lacking > most) & (lacking > norm.isf(SURE / len(units)) * noise)
    alarm = (mean > limit and mean > 4 * spread or bool(beyond.any())) and units.noise <= INNER_NOISE
    word = three_way(alarm, mean <= limit and 2 * spread <= limit and weak is None)
    at_least = "at least " if weak else ""
    text = (
        f"{units.what}: log-evidence minus ELBO is {at_least}{mean:.3f} ± {spread:.3f} nats each, limit {limit:.2f} "
        f"({GAP} for each latent dimension; {_PAPER})"
    )
    if beyond.any():
        text += (
            f"; in {int(beyond.sum())} of {len(units)} it is up to {lacking[beyond].max():.2f}, more than the "
            f"{most:.2f} that one of so many may be"
        )
    if word == CANNOT_SAY:
        more = 100 * math.ceil(units.draws * (4 * spread / max(mean, limit)) ** 2 / 100)
        reason, advice = weak or (
            "its error is too large",
            f"num_samples={max(more, 2 * units.draws)} would give a verdict",
        )
        return Verdict("gap", word, f"{text}; {reason}", mean, limit, advice)
    advice = "a richer family or longer training; the split into amortization and family says which"
    return Verdict("gap", word, text, mean, limit, "nothing" if word == OK else advice)


def _dimensions(units: Units, collection: Collection) -> int:
    """The number of latent dimensions of a unit; a one-hot vector counts as one."""
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


def with_parts(
    verdict: Verdict,
    sweep: Sweep,
    steps: int,
    seed: int | None,
    skipped: dict[str, str],
    extra: dict[str, tuple[Sequence[str], np.ndarray]],
    options: Mapping[str, Any],
    say: Stages,
) -> Verdict:
    """Split the gap by refining the guide's parameters for each datum."""
    reason = ""
    if not steps:
        reason = "refine_steps is 0"
    elif sweep.swept:
        reason = "rows come in blocks, and refining needs them at once"
    elif sweep.local and sweep.shared:
        reason = "there are global latents beside local ones"
    elif sweep.summed_out:
        reason = "the model enumerates sites, whose exact conditional completes the guide"
    elif not can_refine(sweep.guide, Rows.of(sweep.args, sweep.kwargs)):
        reason = "a site's distribution has no parameters that can be moved (a flow, a point, a joint draw)"
    if reason:
        skipped["amortization gap"] = reason
        return verdict
    fewer, args, kwargs = few_rows(sweep, 32, options)
    say.stage("refining the guide for each datum", steps)
    try:
        rows, shared = Rows.of(args, kwargs), not sweep.local
        better = refined_for(sweep.model, sweep.guide, rows, steps=steps, seed=seed, shared=shared, progress=say)
        before = unit_weights(fewer, 1000, seed)
        after = unit_weights(Sweep(sweep.model, better, args, kwargs, **options), 1000, seed)
    except (GumboError, *PROGRAM_ERRORS) as error:
        skipped["amortization gap"] = f"refining failed ({first_line(error, kind=True)})"
        return verdict
    old, new = before.mean(1), after.mean(1)
    # The guide with more even weights estimates the evidence better.
    finer = importance_ess(after) >= importance_ess(before)
    evidence = np.where(finer, log_evidence(after)[0], log_evidence(before)[0])
    # Noisy optimization from an optimum may end slightly below it.
    amortization = np.maximum(new - old, 0.0)
    approximation = np.maximum(evidence - np.maximum(new, old), 0.0)
    extra["amortization_gap"] = ((), np.array([amortization.mean()]))
    extra["approximation_gap"] = ((), np.array([approximation.mean()]))
    text = (
        f"{verdict.text}; of {evidence.mean() - old.mean():.3f} nats for {len(old)} of them, {amortization.mean():.3f} "
        f"go to amortization and {approximation.mean():.3f} to the family"
    )
    advice = verdict.advice
    if verdict.verdict == ALARM:
        advice = "train longer, with a larger network, or refine each datum (gumbo.inference.refine)"
        if approximation.mean() > amortization.mean():
            advice = "a richer family: a full covariance, a flow, or latents drawn in turn"
    return replace(verdict, text=text, advice=advice)


def unit_weights(
    sweep: Sweep,
    draws: int,
    seed: int | None,
    given: Mapping[str, torch.Tensor] | None = None,
    plates: Sequence[str] | None = None,
) -> np.ndarray:
    """Log-weights ``(units, draws)`` of the local latents; of all latents if none is local or ``plates`` is ``()``."""
    found, block = [], sweep.whole() or Block()
    plates = sweep.weight_plates if plates is None else plates
    with quietly(sweep.model, sweep.guide, seed):
        for start in range(0, draws, sweep.draws_a_run(block)):
            count = min(sweep.draws_a_run(block), draws - start)
            fixed = {name: value.expand(count, *value.shape[1:]) for name, value in (given or {}).items()}
            found.append(log_weight(*sweep.run(count, block, fixed), plates).reshape(count, -1))
    return torch.cat(found).T.cpu().numpy()
