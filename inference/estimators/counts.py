"""Gradients of expectations over counts by the derivative with respect to the count (He & Wu 2026)."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ._base import Draw, Estimator, detached_draw, estimators
from ._distributions import describe, elementary, is_of, rewrap


class Fini(Estimator):
    """A path through a count: E[u(z) f′(z)] in place of ∂E[f(z)]/∂μ (He & Wu 2026): biased, low variance.

    u is the polynomial of degree ``order`` − 1 for which both sides agree for every polynomial f of degree at most
    ``order``. With the variance V of the count as a function of its mean μ, and y = z − μ, it is

    * order 1: 1;
    * order 2: 1 + V′ y / (2 V);
    * order 3: 1 − c + (½ − c) V′ y / V + c y² / V, with c = (2 V V″ − V′²) / (6 V (2 + V″)),

    and higher orders follow from the moments. For Poisson V = μ, Binomial μ − μ²/n, negative binomial μ + μ²/r,
    Geometric μ + μ². In the paper's terms, w = u ∂μ/∂η: order 2 gives (z + λ)/2 per log λ, np/2 + (1 − 2p) z/2 per
    logit p, and rp/2 + (1 + p) z/2 per logit of torch's p. f, including log p and log q, must be differentiable at the
    draws and defined between counts, as densities with lgamma are; for a cost of several counts the gradient is exact
    if f is such a polynomial in each. The score of log q has expectation zero and is left out. One run; only the
    parameter of the mean receives a gradient.

    The paper's Beta-Binomial is not included: it is no exponential family in its mean.

    Args:
        order: the degree of the polynomials f for which the gradient is exact, at least 1.

    >>> Fini(order=3).unbiased, Fini().name
    (False, 'fini')
    """

    unbiased = False

    def __init__(self, order: int = 2):
        self.order = int(order)

    def why_not(self, site: Mapping[str, Any]) -> str | None:
        fn = site["fn"]
        if curvature(fn) is None:
            return (
                "its weights are derived for Poisson, Binomial, NegativeBinomial and Geometric only, not for"
                f" {describe(fn)}"
            )
        count = getattr(elementary(fn), "total_count", None)
        if isinstance(count, Tensor) and count.requires_grad:
            return f"the total_count of {describe(fn)} is learnt, and the path goes through its mean alone"
        if is_of(fn, torch.distributions.Binomial) and bool((count < self.order - 1).any()):
            return f"order {self.order} needs counts that reach {self.order - 1}, and a total_count is smaller"
        return None

    def draw(self, fn: Any, step: int, args: tuple = (), kwargs: Mapping[str, Any] | None = None) -> Draw:
        value = detached_draw(fn, args, kwargs).value
        mean = elementary(fn).mean
        mean = mean.expand(tuple(fn.batch_shape) + tuple(fn.event_shape))
        fixed = mean.detach()
        weight = path_weight(value.double(), fixed.double(), curvature(fn), self.order).to(value.dtype)
        return Draw(value + weight * (mean - fixed))

    def guide_fn(self, fn: Any, draw: Draw, step: int) -> Any:
        return rewrap(fn, without_gradients)


def curvature(fn: Any) -> Tensor | float | None:
    """v in the variance μ + v μ² of a count; None for other variances."""
    base = elementary(fn)
    if is_of(base, torch.distributions.Poisson):
        return 0.0
    if is_of(base, torch.distributions.Geometric):
        return 1.0
    if is_of(base, torch.distributions.NegativeBinomial):
        return 1.0 / torch.as_tensor(base.total_count).detach().double()
    if is_of(base, torch.distributions.Binomial):
        return -1.0 / torch.as_tensor(base.total_count).detach().double().clamp(min=1.0)
    return None


def without_gradients(base: Any) -> Any:
    """The same distribution with parameters that receive no gradient."""
    base = copy.copy(base)
    vars(base).update({name: item.detach() for name, item in vars(base).items() if isinstance(item, Tensor)})
    return base


def standard_moments(mean: Tensor, curve: Tensor | float, count: int) -> list[Tensor]:
    """E[(z − μ)ʳ] / V^(r/2) for r < ``count``, of a family whose variance V is μ + v μ² (Morris 1982).

    Central moments are polynomials in μ: M₀ = 1, M₁ = 0, M₍ᵣ₊₁₎ = V (dMᵣ/dμ + r M₍ᵣ₋₁₎).
    """
    one, zero = torch.ones_like(mean), torch.zeros_like(mean)
    moments = [[one], [zero]]  # for each r the coefficients of 1, μ, μ², …
    for r in range(1, count - 1):
        slope = [power * c for power, c in enumerate(moments[r])][1:]
        total = [
            (slope[i] if i < len(slope) else zero) + (r * moments[r - 1][i] if i < len(moments[r - 1]) else zero)
            for i in range(max(len(slope), len(moments[r - 1])))
        ]
        moments.append(
            [zero, total[0], *(b + curve * a for a, b in zip(total, total[1:], strict=False)), curve * total[-1]]
        )
    sigma = (mean + curve * mean.square()).sqrt()
    return [
        sum(c * mean**power for power, c in enumerate(coefficients)) / sigma**r
        for r, coefficients in enumerate(moments[:count])
    ]


def path_weight(value: Tensor, mean: Tensor, curve: Tensor | float, order: int) -> Tensor:
    """u(z), of degree ``order`` − 1, with E[u(z) f′(z)] = ∂E[f]/∂μ for polynomials f of degree ``order`` and less.

    With t the count less its mean, in standard deviations, and Nᵣ = E[tʳ], the coefficients of u = Σ cᵢ tⁱ solve
    Σᵢ cᵢ N₍ₖ₋₁₊ᵢ₎ = N₍ₖ₊₁₎ / k for k = 1 … ``order``.
    """
    smallest = 1e-10
    # The gradient at a probability of one (or zero) is zero; the clamp keeps the weights finite.
    mean = mean.clamp(min=smallest)
    room = 1 + curve * mean
    mean = torch.where(room < smallest, mean * (1 - smallest), mean)
    t = (value - mean) / (mean + curve * mean.square()).sqrt()
    n = standard_moments(mean, curve, max(2 * order - 1, order + 2))
    rows = [[n[k + i] for i in range(order)] + [n[k + 2] / (k + 1)] for k in range(order)]
    for k in range(order):  # a matrix of moments is positive definite, so that elimination needs no pivots
        for below in rows[k + 1 :]:
            factor = below[k] / rows[k][k]
            below[k:] = [b - factor * a for a, b in zip(rows[k][k:], below[k:], strict=True)]
    solved: list[Tensor] = [t.new_zeros(())] * order
    for k in reversed(range(order)):
        rest = sum((rows[k][i] * solved[i] for i in range(k + 1, order)), start=t.new_zeros(()))
        solved[k] = (rows[k][order] - rest) / rows[k][k]
    return sum((c * t**i for i, c in enumerate(solved)), start=torch.zeros_like(t))


estimators.register("fini", Fini)
