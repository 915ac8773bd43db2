"""Tests of a mean gradient against a reference: element by element, and along fixed directions."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from .moments import Central, Moments
from .reference import Reference

UNMET = 1.0  # the largest deviation assumed for unseen draws, relative to the largest observed one


@dataclass(frozen=True)
class Comparison:
    """Mean − reference of one parameter, element by element, with p-values of the differences.

    ``z`` is the standard Normal's quantile at the p-value, with the sign of the difference. ``resolution`` gives the
    smallest difference with a p-value at a given level.
    """

    offset: Tensor
    squared_error: Tensor
    z: Tensor
    p_value: Tensor
    freedom: Tensor
    largest: float
    count: int

    def resolution(self, level: float, count: int | None = None) -> Tensor:
        """The smallest difference that ``count`` draws (default: the number made) would detect at that level."""
        from scipy.stats import t as student

        scale = self.count / (self.count if count is None else count)
        quantile = torch.as_tensor(student.isf(level / 2, self.freedom.cpu().numpy() / scale))
        seen = (self.squared_error * scale).sqrt() * quantile
        unmet = -UNMET * self.largest * math.log(level) / self.count * scale
        return seen.clamp(min=unmet)


def compare(moments: Moments, reference: Reference) -> dict[str, Comparison]:
    """Test the mean gradient against the reference, by element and by component along ``reference.directions``.

    Gradients are skewed and heavy-tailed: a few draws may contribute most of the mean. The difference in standard
    errors is therefore corrected for skewness (Hall 1992, "On the removal of skewness by transformation") and compared
    with Student's t, whose degrees of freedom follow from the fourth moment (Satterthwaite).

    No test of a mean is valid for every distribution: a sufficiently rare draw is never observed and can change the
    mean by any amount. The p-value of a difference d is therefore at least the probability that such a draw was missed:
    if no draw deviates by more than ``UNMET`` times the largest observed deviation M of any element of the parameter, n
    draws miss those that would explain d with probability at most (1 − d / (UNMET · M))ⁿ. Elements that are nonzero in
    a few draws only (a rarely active ReLU unit) are thus not flagged by these draws. If no element varies at all, this
    lower limit does not apply.
    """
    ours = moments.central()
    theirs = reference.moments.central() if reference.moments else {}
    truth = reference.gradient
    if reference.directions is not None:
        truth = {**truth, **reference.directions.project(truth)}
    largest = {name: _largest_deviation(central) for name, central in ours.items()}
    anywhere = max(largest.values(), default=0.0)
    return {
        name: _compared(central, theirs.get(name), truth[name], moments, reference.loss, largest[name] or anywhere)
        for name, central in ours.items()
    }


def _compared(
    ours: Central, theirs: Central | None, truth: Tensor, moments: Moments, loss: float, size: float
) -> Comparison:
    offset = ours.mean - truth
    loss = max(abs(loss), abs(moments.loss / max(moments.count, 1)))
    # The rounding error of two sums of the same terms in the parameter's dtype.
    rounding = 2 * ours.precision * max(truth.abs().max().item() if truth.numel() else 0.0, loss)
    beyond = offset.sign() * (offset.abs() - rounding).clamp(min=0.0)
    squared, skew, freedom = _error(ours, theirs)
    moved = squared > 0
    t = torch.where(moved, beyond / squared.sqrt().where(moved, torch.ones_like(squared)), 0.0)
    by_t = torch.where(moved, _two_sided(_unskewed(t, skew), freedom), 0.0)
    unmet = torch.exp(-ours.count * beyond.abs() / (UNMET * size)) if size > 0 else torch.zeros_like(by_t)
    p_value = torch.where(beyond != 0, by_t.maximum(unmet), 1.0)
    return Comparison(offset, squared, beyond.sign() * _normal_quantile(p_value), p_value, freedom, size, ours.count)


def _error(ours: Central, theirs: Central | None) -> tuple[Tensor, Tensor, Tensor]:
    """Squared standard error of a difference of means, its skewness, and the degrees of freedom behind it."""
    squared, third, spread = 0.0, 0.0, 0.0
    for sign, c in ((1.0, ours), (-1.0, theirs)):
        if c is not None:
            squared = squared + c.variance / c.count
            third = third + sign * c.third / c.count**2
            spread = spread + (c.fourth - c.variance**2).clamp(min=0.0) / c.count**3
    safe = torch.where(squared > 0, squared, torch.ones_like(squared))
    freedom = (2 * safe**2 / spread.clamp(min=1e-300)).clamp(min=1.0, max=float(ours.count - 1))
    return squared, third / safe**1.5, freedom


def _unskewed(t: Tensor, skew: Tensor) -> Tensor:
    return t + skew * t**2 / 3 + skew**2 * t**3 / 27 + skew / 6


def _two_sided(t: Tensor, freedom: Tensor) -> Tensor:
    from scipy.stats import t as student

    return torch.as_tensor(2 * student.sf(t.abs().cpu().numpy(), freedom.cpu().numpy()), device=t.device)


def _normal_quantile(p_value: Tensor) -> Tensor:
    from scipy.stats import norm

    return torch.as_tensor(norm.isf(p_value.cpu().numpy() / 2), device=p_value.device)


def _largest_deviation(central: Central) -> float:
    """An upper bound of the largest |draw − mean| of any element."""
    return (central.fourth * central.count).max().item() ** 0.25 if central.fourth.numel() else 0.0


def holm(p_values: Tensor) -> Tensor:
    """P-values adjusted so that the chance of any false rejection is bounded (Holm 1979).

    >>> holm(torch.tensor([0.01, 0.04, 0.03], dtype=torch.float64)).tolist()
    [0.03, 0.06, 0.06]
    """
    order = p_values.argsort()
    factors = torch.arange(len(p_values), 0, -1, dtype=p_values.dtype, device=p_values.device)
    adjusted = (p_values[order] * factors).cummax(0).values.clamp(max=1.0)
    return torch.empty_like(adjusted).scatter_(0, order, adjusted)


def adjusted(tests: Mapping[object, Tensor]) -> dict[object, Tensor]:
    """P-values of many tests adjusted together, by key."""
    if not tests:
        return {}
    parts = holm(torch.cat(list(tests.values()))).split([len(test) for test in tests.values()])
    return dict(zip(tests, parts, strict=True))
