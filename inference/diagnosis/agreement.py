"""Diagnostic ``refits``: agreement of independent fits of the guide."""

from __future__ import annotations

import numpy as np

from ..posterior.collection import Collection
from .report import ALARM, OK, Verdict
from .thresholds import RHAT, allowed


def between_refits(collection: Collection) -> dict[str, Verdict]:
    """R̂ over the chains, each of which is an independent fit."""
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
    count, many = int((values > RHAT).sum()), allowed(len(values))
    text = (
        f"over {collection.chains} fits R̂ is above {RHAT} in {count} of {len(values)} dimensions ({many} may be), "
        f"at most {values.max():.2f} at {worst} (Vehtari et al. 2021, arXiv:1903.08008)"
    )
    word = ALARM if count > many else OK
    advice = "train longer; if fits still differ, there are several modes" if word == ALARM else "nothing"
    return {"refits": Verdict("refits", word, text, float(values.max()), RHAT, advice)}
