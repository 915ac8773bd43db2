"""ReinMax: a straight-through gradient of second order (Liu et al. 2023)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ...errors import BadInput
from ._base import Draw, Estimator, Schedule, at_step, check_temperature, detached_draw, estimators
from ._distributions import LinearExtension, is_one_hot
from .relaxation import bounded_logits, relaxable_why_not, squash


class ReinMax(Estimator):
    """Heun's second-order step in place of straight-through's first-order one (Liu et al. 2023, arXiv 2304.08612).

    The forward pass uses the discrete value; the backward pass uses 2 J(½(z + π_τ)) − ½ J(π), where J is the Jacobian
    of a softmax at these probabilities and π_τ are those at ``temperature``. At temperature 1 the gradient is exact for
    a cost quadratic in one site; otherwise it is biased. The log pmf is extended linearly. The first-order step,
    J(π_τ), is the straight-through gradient without Gumbel noise (Bengio et al. 2013, arXiv 1308.3432), exact for a
    linear cost at temperature 1.

    Args:
        temperature: τ, a positive number or a schedule of the training step.
        order: 2, or 1 for the first-order step.

    Raises:
        BadInput: another order, or a temperature that is not positive.

    >>> ReinMax().unbiased, ReinMax().name
    (False, 'reinmax')
    """

    unbiased = False
    _ranges = {"order": 1}

    def __init__(self, temperature: float | Schedule = 1.0, order: int = 2):
        if order not in (1, 2):
            raise BadInput(f"ReinMax order is {order!r}: expected 1 (straight-through) or 2 (ReinMax)")
        self.temperature, self.order = check_temperature(temperature), int(order)

    def why_not(self, site: Mapping[str, Any]) -> str | None:
        return relaxable_why_not(site)

    def draw(self, fn: Any, step: int, args: tuple = (), kwargs: Mapping[str, Any] | None = None) -> Draw:
        logits, one_hot = bounded_logits(fn), is_one_hot(fn)
        fixed = logits.detach()
        value = detached_draw(fn, args, kwargs).value
        nudge, tempered = logits - fixed, squash(fixed, at_step(self.temperature, step), one_hot)
        if self.order == 1:
            return Draw(value + _along(nudge, tempered, one_hot))
        halfway = (value + tempered) / 2
        path = 2 * _along(nudge, halfway, one_hot) - _along(nudge, squash(fixed, 1.0, one_hot), one_hot) / 2
        return Draw(value + path)

    def guide_fn(self, fn: Any, draw: Draw, step: int) -> Any:
        return LinearExtension(fn)

    def model_fn(self, fn: Any, draw: Draw, step: int) -> Any:
        return LinearExtension(fn)


def _along(nudge: Tensor, probs: Tensor, one_hot: bool) -> Tensor:
    """The derivative of probabilities along logits: the Jacobian of softmax, or of sigmoid, times ``nudge``."""
    if not one_hot:
        return probs * (1 - probs) * nudge
    return probs * (nudge - (probs * nudge).sum(-1, keepdim=True))


estimators.register("reinmax", ReinMax)
