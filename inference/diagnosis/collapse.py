"""Diagnostics ``point`` and ``collapsed``: a guide without spread, and a guide that equals the prior."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ..posterior.collection import Collection
from .report import ALARM, CANNOT_SAY, OK, Verdict
from .thresholds import COLLAPSED
from .units import Units


def point(units: Units) -> Verdict:
    """Whether the guide is a point, such as AutoDelta."""
    still = (np.ptp(units.values, 1).max(0) == 0) & ~units.discrete & ~units.fixed
    points = [name for name, without_spread in zip(units.names, still, strict=True) if without_spread]
    if points:
        text = f"{units.what}: the guide is a point at {', '.join(points[:5])}, which is no posterior"
        return Verdict("point", ALARM, text, float(len(points)), 0.0, "fit a guide with a width, such as AutoNormal")
    text = f"{units.what}: the guide is a distribution at every latent"
    return Verdict("point", OK, text, 0.0, 0.0, "nothing")


def collapsed(units: Units, collection: Collection, others: Sequence[Verdict]) -> list[Verdict]:
    """Whether the guide collapsed to the prior; it is right where the data carry no information, as ``others`` show."""
    per_dimension = {site: collection.kl.get(site, [None])[0] for site in units.sites}
    known = {site: np.asarray(value) for site, value in per_dimension.items() if value is not None}
    for site, by_chain in collection.kl_sites.items():  # marginals may be those of the prior where the site's is not
        if site in known:
            known[site] = np.full(known[site].shape, by_chain[0] / known[site].size)
    if not known:
        return []
    idle = len(known) == len(units.sites) and all(abs(value).max(initial=0.0) < COLLAPSED for value in known.values())
    judges = {one.name: one.verdict for one in others if one.name in ("gap", "shift", "width")}
    text = f"{units.what}: KL of guide to prior is {', '.join(f'{s} {v.sum():.3f}' for s, v in known.items())} nats"
    numbers = float(min(value.sum() for value in known.values())), COLLAPSED
    if not idle:
        return [Verdict("collapsed", OK, f"{text}; collapsed is {COLLAPSED} at most in each", *numbers, "nothing")]
    text += f", at most {COLLAPSED} in every dimension: it is the prior"
    paper = "Bowman et al. 2016, arXiv:1511.06349"
    if ALARM in judges.values():
        fired = ", ".join(name for name, word in judges.items() if word == ALARM)
        advice = "a KL warm-up (kl_weight), free bits, or a weaker decoder"
        return [Verdict("collapsed", ALARM, f"{text}, and by {fired} the posterior is not ({paper})", *numbers, advice)]
    if judges.get("gap") == CANNOT_SAY:
        advice = "follow the advice of gap"
        return [Verdict("collapsed", CANNOT_SAY, f"{text}; gap cannot say if the posterior is", *numbers, advice)]
    advice = "these latents hold nothing: drop them, or use a weaker decoder if they should"
    return [Verdict("collapsed", OK, f"{text}, and so is the posterior by gap", *numbers, advice)]
