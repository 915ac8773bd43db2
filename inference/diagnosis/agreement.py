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
        found[name] = rank_rhat(drawn)
    values = np.concatenate([value.reshape(-1) for value in found.values()])
    worst = max(found, key=lambda name: found[name].max())
    count, many = int((values > RHAT).sum()), allowed(len(values))
    text = (
        f"over {collection.chains} fits R̂ is above {RHAT} in {count} of {len(values)} dimensions ({many} allowed), "
        f"at most {values.max():.2f} at {worst} (Vehtari et al. 2021, arXiv:1903.08008)"
    )
    word = ALARM if count > many else OK
    advice = "train longer; if fits still differ, there are several modes" if word == ALARM else "nothing"
    return {"refits": Verdict("refits", word, text, float(values.max()), RHAT, advice)}


def rank_rhat(drawn: np.ndarray) -> np.ndarray:
    """Rank-normalized R̂ over chains, for each number of ``drawn`` ``(chains, draws, …)``; 1 where all are equal.

    The larger of the R̂ of the draws and that of their distances from the median, which sees fits that differ in spread.
    Chains are not split: the draws of one fit are independent of each other.

    >>> wide, narrow = np.random.default_rng(0).normal(size=(2, 1000)) * [[1.0], [0.3]]
    >>> bool(rank_rhat(np.stack([wide, wide])) < 1.01), bool(rank_rhat(np.stack([wide, narrow])) > 1.1)
    (True, True)
    """
    median = np.median(drawn, (0, 1), keepdims=True)
    return np.maximum(_rhat(_normal_scores(drawn)), _rhat(_normal_scores(np.abs(drawn - median))))


def _normal_scores(drawn: np.ndarray) -> np.ndarray:
    from scipy.special import ndtri
    from scipy.stats import rankdata

    together = drawn.reshape(-1, *drawn.shape[2:])
    return ndtri((rankdata(together, axis=0) - 0.375) / (len(together) + 0.25)).reshape(drawn.shape)


def _rhat(drawn: np.ndarray) -> np.ndarray:
    within, between = drawn.var(1, ddof=1).mean(0), drawn.mean(1).var(0, ddof=1)
    draws = drawn.shape[1]
    with np.errstate(divide="ignore", invalid="ignore"):
        found = np.sqrt((within * (draws - 1) / draws + between) / within)
    return np.where(np.isnan(found), 1.0, found)
