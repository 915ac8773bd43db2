"""Shapes of marginals: probabilities below the guide's octiles, beyond what means and standard deviations explain."""

from __future__ import annotations

import numpy as np

from .pairs import GROUPS

# The guide's shares below the points of comparison.
SHARES = np.arange(1, 8) / 8


def shape_differences(values: np.ndarray, weight: np.ndarray, discrete: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """How far weighted draws have another share below each octile of the draws, and its standard error.

    Both are ``(units, d, 7)`` for values ``(units, S, d)`` and weights ``(units, S)``. The indicator of values below an
    octile is regressed on the value and its square, and its residual is averaged: a small fault of the mean or of the
    width, which have verdicts of their own, leaves that near zero, and so does an outlier. Classes and counts, whose
    width has no verdict, are regressed on the value alone. Errors are from a jackknife over groups of draws.
    """
    starts = np.linspace(0, values.shape[1], GROUPS + 1).astype(int)[:-1]
    values = values - values.mean(1, keepdims=True)
    with np.errstate(divide="ignore", invalid="ignore"):
        values = np.nan_to_num(values / values.std(1, keepdims=True), posinf=0.0, neginf=0.0)
    skewness = (values**3).mean(1, keepdims=True)
    square = values**2 - 1 - skewness * values  # uncorrelated with the value
    size = (square**2).mean(1)

    def by_group(function: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return tuple(np.add.reduceat(part, starts, 1) for part in (function, function * weight[..., None]))

    ones = np.ones((*weight.shape, 1))
    totals, firsts, seconds = (by_group(function) for function in (ones, values, square))
    found, errors = [], []
    for edge in np.quantile(values, SHARES, axis=1):
        below = (values <= edge[:, None]).astype(np.float64)
        slope = (below * values).mean(1, keepdims=True)
        with np.errstate(divide="ignore", invalid="ignore"):
            bend = np.where(discrete | (size < 1e-9), 0.0, (below * square).mean(1) / size)[:, None]
        sides = []
        for below_sum, total, first, second in zip(by_group(below), totals, firsts, seconds, strict=True):
            residual = below_sum - slope * first - bend * second
            whole = residual.sum(1, keepdims=True), total.sum(1, keepdims=True)
            with np.errstate(divide="ignore", invalid="ignore"):
                left = np.nan_to_num((whole[0] - residual) / (whole[1] - total))
            sides.append((whole[0][:, 0] / whole[1][:, 0], left))
        (of_q, left_q), (of_p, left_p) = sides
        found.append(of_p - of_q)
        left = left_p - left_q
        errors.append(np.sqrt((GROUPS - 1) / GROUPS * ((left - left.mean(1, keepdims=True)) ** 2).sum(1)))
    return np.stack(found, -1), np.stack(errors, -1)
