"""Correlations of pairs of dimensions: those of the guide's draws against those of importance-weighted draws."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .units import Units

# The groups of draws for the jackknife.
GROUPS = 20
# All pairs are compared up to so many over all units: some seconds.
PAIRS = 2_000_000
# Pairs of dimensions over all units that are computed at once, which bounds the memory.
_AT_ONCE = 250_000
# Dimensions spaced over all whose pairs are compared where not all can be.
_SPACED = 30


@dataclass(frozen=True)
class Pairs:
    """Pairs of dimensions ``one < other``: the number of units that show both, mean squares of differences and errors.

    Each array is ``(pairs,)``.
    """

    one: np.ndarray
    other: np.ndarray
    count: np.ndarray
    raw: np.ndarray
    noise: np.ndarray


def compared_pairs(units: Units, blocks: list[np.ndarray]) -> Pairs:
    """All pairs of dimensions, or those within ``blocks`` and of some dimensions spaced over all if they are too many.

    Only units whose weights can tell are compared. Errors are from a jackknife over groups of draws.
    """
    telling = np.flatnonzero(units.telling)
    found = []
    for one, other in _tiles(len(units.names), len(telling), blocks):
        sums: list[np.ndarray] | None = None
        step = max(1, _AT_ONCE // (len(one) * len(other)))
        for start in range(0, len(telling), step):
            some = telling[start : start + step]
            more = _of_units(units, some, one, other)
            sums = more if sums is None else [so_far + part for so_far, part in zip(sums, more, strict=True)]
        assert sums is not None
        first, second = np.meshgrid(one, other, indexing="ij")
        above = first < second
        count, raw, noise = (part[above] for part in sums)
        count = count.clip(1)
        found.append((first[above], second[above], count, raw / count, noise / count))
    return Pairs(*(np.concatenate(parts) for parts in zip(*found, strict=True)))


def _of_units(units: Units, some: np.ndarray, one: np.ndarray, other: np.ndarray) -> list[np.ndarray]:
    """The number of units that show both dimensions, and sums over them of squares of differences and errors."""
    weight = units.log_weight[some]
    weight = np.exp(weight - weight.max(-1, keepdims=True))
    values = [units.values[some][..., part].astype(np.float64) for part in (one, other)]
    difference, error = _jackknife(*values, weight)
    both = units.shown[some][:, one][:, :, None] & units.shown[some][:, other][:, None, :]
    return [both.sum(0), (difference**2 * both).sum(0), (error**2 * both).sum(0)]


def _tiles(count: int, units: int, blocks: list[np.ndarray]) -> list[tuple[np.ndarray, np.ndarray]]:
    """Pairs of sets of dimensions between which correlations are compared."""
    if count * (count - 1) // 2 * units > PAIRS:
        spaced = np.linspace(0, count - 1, min(count, _SPACED)).round().astype(int)
        return [(block, block) for block in (*blocks, spaced)]
    width = int(_AT_ONCE**0.5)
    parts = [np.arange(start, min(start + width, count)) for start in range(0, count, width)]
    return [(one, other) for place, one in enumerate(parts) for other in parts[place:]]


def _jackknife(one: np.ndarray, other: np.ndarray, weight: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The difference of correlations of draws ``(units, S, d)`` and of weighted ones, and its standard error."""
    one, other = (values - values.mean(1, keepdims=True) for values in (one, other))
    edges = np.linspace(0, one.shape[1], GROUPS + 1).astype(int)
    spans = [slice(start, stop) for start, stop in zip(edges[:-1], edges[1:], strict=True)]
    sides = []
    for weights in (np.ones_like(weight), weight):
        groups = [_sums(one[:, span], other[:, span], weights[:, span]) for span in spans]
        sides.append((groups, [sum(parts) for parts in zip(*groups, strict=True)]))
    (of_q, whole_q), (of_p, whole_p) = sides
    difference = _correlations(whole_q) - _correlations(whole_p)
    mean, square = np.zeros_like(difference), np.zeros_like(difference)
    for number, (q, p) in enumerate(zip(of_q, of_p, strict=True), 1):
        left = _correlations([w - part for w, part in zip(whole_q, q, strict=True)])
        left -= _correlations([w - part for w, part in zip(whole_p, p, strict=True)])
        step = left - mean
        mean += step / number
        square += step * (left - mean)
    return difference, np.sqrt((GROUPS - 1) / GROUPS * square)


def _sums(one: np.ndarray, other: np.ndarray, weight: np.ndarray) -> tuple[np.ndarray, ...]:
    """Sums over draws: of the weights, of the values and of their squares, and of products."""
    left, right = one * weight[..., None], other * weight[..., None]
    products = np.matmul(left.transpose(0, 2, 1), other)
    return weight.sum(1), left.sum(1), right.sum(1), (left * one).sum(1), (right * other).sum(1), products


def _correlations(sums: list[np.ndarray]) -> np.ndarray:
    total, one, other, one_square, other_square, products = sums
    with np.errstate(divide="ignore", invalid="ignore"):
        one, other = one / total[:, None], other / total[:, None]
        one_sd, other_sd = (
            np.sqrt((square / total[:, None] - mean**2).clip(0))
            for square, mean in ((one_square, one), (other_square, other))
        )
        covariance = products / total[:, None, None] - one[:, :, None] * other[:, None, :]
        return np.nan_to_num(covariance / (one_sd[:, :, None] * other_sd[:, None, :])).clip(-1.0, 1.0)
