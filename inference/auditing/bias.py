"""Tests of a mean gradient against a reference: element by element, and along fixed directions."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from .moments import Central, Moments
from .reference import Reference

UNMET = 1.0  # an unmet draw may be this many times as large as the largest that was met


@dataclass(frozen=True)
class Comparison:
    """Mean − reference of one parameter, number by number, with p-values of the differences.

    ``z`` is the standard Normal's quantile at the p-value, with the sign of the difference. ``resolution`` says how
    large a difference must be to have a p-value at a level that is asked for.
    """

    offset: Tensor
    squared_error: Tensor
    z: Tensor
    p_value: Tensor
    freedom: Tensor
    largest: float
    count: int

    def resolution(self, level: float, count: int | None = None) -> Tensor:
        """The least difference that ``count`` draws (by default those that were made) would find at that level."""
        from scipy.stats import t as student

        scale = self.count / (self.count if count is None else count)
        quantile = torch.as_tensor(student.isf(level / 2, self.freedom.cpu().numpy() / scale))
        seen = (self.squared_error * scale).sqrt() * quantile
        unmet = -UNMET * self.largest * math.log(level) / self.count * scale
        return seen.clamp(min=unmet)


def compare(moments: Moments, reference: Reference) -> dict[str, Comparison]:
    """Test every number of the mean gradient, and its components along ``reference.directions``, against the reference.

    The difference in standard errors is freed of skewness (Hall 1992, "On the removal of skewness by transformation")
    and held to Student's t with as many degrees of freedom as the fourth moment leaves to the variance
    (Satterthwaite), since gradients are skewed and heavy-tailed: most of one may come from a few draws.

    No test of a mean is valid for every distribution: a draw that is rare enough is never met, and moves the mean as
    far as it is large. So a difference d has no p-value below that of the excuse that such a draw was missed: if no
    draw deviates by more than ``UNMET`` times the largest deviation M that any number of the parameter showed, the
    draws that owe us d are missed by n draws with probability (1 − d / (UNMET · M))ⁿ at most. This keeps numbers that
    are nonzero in a few draws only (a unit behind a ReLU that is seldom on) from being convicted by the few. If
    nothing moves at all, there is no such excuse.
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
    # How far two sums of the same terms may differ in the arithmetic of the parameter.
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
    """At least the largest |draw − mean| of any number."""
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
    """P-values of many tests adjusted together, by the keys that they came with."""
    if not tests:
        return {}
    parts = holm(torch.cat(list(tests.values()))).split([len(test) for test in tests.values()])
    return dict(zip(tests, parts, strict=True))
