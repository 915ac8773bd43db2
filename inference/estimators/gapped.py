"""Gapped straight-through: the backward softmax is shifted towards the draw, without noise (Fan et al. 2022)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from ...errors import BadInput
from ._base import Draw, Estimator, Schedule, at_step, check_temperature, detached_draw, estimators
from ._distributions import LinearExtension
from .relaxation import bounded_logits, one_hot_why_not, squash


class GappedStraightThrough(Estimator):
    """Straight-through with shifted logits in the backward pass (Fan et al. 2022, arXiv 2206.07235): biased.

    The backward pass raises the logit of the drawn class to the largest, and lowers the others to at most that minus
    ``gap``; the gradient is that of their softmax at ``temperature``. The shifts replace the mean effect of
    Gumbel-softmax's noise: given the draw the path has no variance. The log pmf is extended linearly.

    Args:
        temperature: a positive number or a schedule of the training step.
        gap: the smallest difference between the drawn class's logit and the others, at least 0.

    Raises:
        BadInput: a temperature or a gap out of range.

    >>> GappedStraightThrough(gap=0.5).unbiased, GappedStraightThrough().name
    (False, 'gapped-straight-through')
    """

    unbiased = False
    _ranges = {"gap": 0}

    def __init__(self, temperature: float | Schedule = 1.0, gap: float = 1.0):
        if not 0 <= float(gap) < math.inf:
            raise BadInput(f"gap must be a number of at least 0, got {gap!r}")
        self.temperature, self.gap = check_temperature(temperature), float(gap)

    def why_not(self, site: Mapping[str, Any]) -> str | None:
        return one_hot_why_not(site)

    def draw(self, fn: Any, step: int, args: tuple = (), kwargs: Mapping[str, Any] | None = None) -> Draw:
        logits = bounded_logits(fn)
        fixed = logits.detach()
        value = detached_draw(fn, args, kwargs).value
        largest = fixed.max(-1, keepdim=True).values
        raised = (largest - fixed) * value
        lowered = (fixed + self.gap - largest).clamp(min=0.0) * (1 - value)
        soft = squash(logits + raised - lowered, at_step(self.temperature, step), True)
        return Draw(value + (soft - soft.detach()))

    def guide_fn(self, fn: Any, draw: Draw, step: int) -> Any:
        return LinearExtension(fn)

    def model_fn(self, fn: Any, draw: Draw, step: int) -> Any:
        return LinearExtension(fn)


estimators.register("gapped-straight-through", GappedStraightThrough)
