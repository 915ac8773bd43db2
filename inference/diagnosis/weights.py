"""Diagnostics ``khat`` and ``ess``: Pareto k̂ and effective sample size of the importance weights."""

from __future__ import annotations

import math
from statistics import NormalDist

import numpy as np

from ..posterior.importance import khat_error, khat_limit, tail_size
from .report import ALARM, CANNOT_SAY, OK, Verdict, three_way
from .thresholds import ESS, INNER_NOISE, LEAST_TAIL, LEVEL, allowed
from .units import Units

_PAPER = "Vehtari et al. 2024, arXiv:1507.02646"


def tails(units: Units) -> Verdict:
    """Pareto k̂ against its limit for this number of draws, min(1 − 1/log₁₀ S, 0.7).

    An alarm needs more units above the limit than allowed, by their own errors: either singly (false discovery rate
    5 %), or on average without the ``SHARE`` of units that may exceed it.
    """
    limit = khat_limit(units.draws)
    known = units.khat[~np.isnan(units.khat)]
    many, unknown = allowed(len(units)), len(units) - len(known)
    high = int((known > limit).sum())
    worst = float(known.max()) if len(known) else math.nan
    text = f"{units.what}: "
    if units.joint:
        text += (
            "the guide draws the latents of all data jointly, and k̂ of all of them together grows with their number "
            "at any quality of the guide"
        )
        advice = "read gap, which is by latent dimension; a guide that draws inside the data plate has k̂ for each datum"
        return Verdict("khat", CANNOT_SAY, text, worst, limit, advice)
    if units.noise > INNER_NOISE:
        reason, advice = units.weak or ("", "")
        return Verdict("khat", CANNOT_SAY, text + reason, worst, limit, advice)
    short = tail_size(units.draws) < LEAST_TAIL
    flat = bool((known == 0).all()) and not unknown
    error = khat_error(units.draws, limit)
    if len(known):
        text += f"k̂ is above {limit:.2f} in {high} of {len(units)} (at most {worst:.2f} ± {error:.2f}); {many} allowed"
    if unknown:
        text += f"{', and ' if len(known) else ''}{unknown} of {len(units)} have weights without a tail to fit"
    text += f" ({_PAPER})"
    if flat or not short:
        sure = _surely_above(known, units.draws, limit, many)
        if sure:
            advice = "widen the guide's family or train it longer; do not reweight these draws"
            return Verdict("khat", ALARM, text, worst, limit, advice)
        if unknown > len(units) / 2:
            return Verdict(
                "khat",
                CANNOT_SAY,
                text,
                worst,
                limit,
                "read ess, gap and shift: latents with few states have bounded weights, whose tail has no shape",
            )
        if high <= many:
            return Verdict("khat", OK, text, worst, limit, "importance weights of these draws can be used")
    more = max(1000, 4 * units.draws)
    reason = "too few draws for a tail" if short else "above, but not by more than its error"
    return Verdict("khat", CANNOT_SAY, f"{text}: {reason}", worst, limit, f"num_samples={more} would give a verdict")


def _surely_above(shapes: np.ndarray, draws: int, limit: float, many: int) -> bool:
    """Whether more than ``many`` shapes are above the limit by more than their errors."""
    rest = np.sort(shapes)[: len(shapes) - many] if many else np.sort(shapes)
    if not len(rest):
        return False
    # The fit shrinks the shape towards ½ with the weight of ten observations.
    size = tail_size(draws)
    error = khat_error(draws, limit)
    center = (limit * size + 5) / (size + 10)
    z = (rest - center) / error
    if float(z.clip(-10, 10).mean()) * math.sqrt(len(z)) > NormalDist().inv_cdf(1 - LEVEL):
        return True
    chances = np.array(sorted(NormalDist().cdf(-one) for one in z))
    steps = LEVEL * np.arange(1, len(z) + 1) / len(z)
    return bool((chances <= steps).any())


def effective_draws(units: Units) -> Verdict:
    """The number of effective draws after weighting."""
    low, many = int((units.ess < ESS * units.draws).sum()), allowed(len(units))
    text = (
        f"{units.what}: the importance ESS is below {ESS:.0%} of {units.draws} draws in {low} of {len(units)} (least "
        f"{units.ess.min():.0f}); {many} allowed"
    )
    value = float(units.ess.min() / units.draws)
    if units.noise > INNER_NOISE:
        reason, advice = units.weak or ("", "")
        return Verdict("ess", CANNOT_SAY, f"{text}, but {reason}", value, ESS, advice)
    if units.joint and low > many:
        text += ", but weights of the latents of all data together fall with their number"
        return Verdict("ess", CANNOT_SAY, text, value, ESS, "read gap, which is by latent dimension")
    word = three_way(low > many, True)
    advice = "widen the guide's family or train it longer" if word == ALARM else "nothing"
    return Verdict("ess", word, text, value, ESS, advice)


def weights_bear(units: Units, khat: Verdict) -> tuple[str, str] | None:
    """Why no verdict from these weights may be ok, with an advice; None if it may."""
    if khat.verdict == ALARM:
        return ("k̂ is too high for weighted draws to be the posterior's", "follow the advice of khat first")
    return units.weak
