"""Relaxed one-hots and coins: gradients through a softened sample."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..distributions import (
    AtLogValue,
    LinearExtension,
    describe,
    elementary,
    is_bernoulli,
    is_one_hot,
    logits_of,
    relaxed,
    relaxed_draw,
)
from ._base import Draw, Estimator, Schedule, at_step, check_temperature, estimators


def _relaxable(site: Mapping[str, Any]) -> str | None:
    fn = site["fn"]
    if is_one_hot(fn) or is_bernoulli(fn):
        return None
    return f"a relaxation needs a OneHotCategorical or Bernoulli site, this one is {describe(fn)}"


def gumbel(like: Tensor) -> Tensor:
    """Standard Gumbel noise, −log(−log u), finite in every float type."""
    tiny = torch.finfo(like.dtype).tiny
    return -torch.empty_like(like).exponential_().clamp(min=tiny).log()


def soften(fn: Any, temperature: float) -> tuple[Tensor, Tensor]:
    """A relaxed draw of a one-hot or Bernoulli site and the discrete value it leans to.

    softmax((log π + g)/τ), or for coins the same with two classes: sigmoid((log odds + g₁ − g₀)/τ).
    """
    logits = logits_of(fn)
    if is_one_hot(fn):
        scores = logits + gumbel(logits)
        soft = (scores / temperature).softmax(-1)
        hard = torch.zeros_like(soft).scatter_(-1, scores.argmax(-1, keepdim=True), 1.0)
        return soft, hard
    scores = logits + gumbel(logits) - gumbel(logits)
    return (scores / temperature).sigmoid(), (scores > 0).to(logits.dtype)


class GumbelSoftmax(Estimator):
    """Relaxed samples in place of discrete ones (Jang et al. 2017, arXiv 1611.01144): biased, low variance.

    The log pmf is extended linearly, Σ yᵢ log πᵢ, in both log p and log q. ``hard`` sends the discrete value forward
    and the relaxed gradient back ("straight-through"). ``temperature`` is a positive number or a schedule, a function
    of the training step.

    >>> GumbelSoftmax(0.5, hard=True).unbiased
    False
    """

    unbiased = False

    def __init__(self, temperature: float | Schedule = 0.67, hard: bool = False):
        self.temperature = check_temperature(temperature)
        self.hard = bool(hard)

    @property
    def needs_relaxed_model(self) -> bool:  # type: ignore[override]
        return not self.hard

    def objective_name(self) -> str:
        return "elbo" if self.hard else "relaxed-elbo"

    def why_not(self, site: Mapping[str, Any]) -> str | None:
        return _relaxable(site)

    def draw(self, fn: Any, step: int, args: tuple = (), kwargs: Mapping[str, Any] | None = None) -> Draw:
        soft, hard = soften(fn, at_step(self.temperature, step))
        return Draw(hard + (soft - soft.detach()) if self.hard else soft)

    def guide_fn(self, fn: Any, draw: Draw, step: int) -> Any:
        return LinearExtension(fn)

    def model_fn(self, fn: Any, draw: Draw, step: int) -> Any:
        return LinearExtension(fn)


class Mean(Estimator):
    """A site held at its mean, for a deterministic pass through a program; not an estimator by itself."""

    unbiased = False
    needs_relaxed_model = True

    def why_not(self, site: Mapping[str, Any]) -> str | None:
        fn = site["fn"]
        return None if hasattr(elementary(fn), "mean") else f"{describe(fn)} has no mean"

    def draw(self, fn: Any, step: int, args: tuple = (), kwargs: Mapping[str, Any] | None = None) -> Draw:
        return Draw(mean_of(fn))

    def guide_fn(self, fn: Any, draw: Draw, step: int) -> Any:
        return LinearExtension(fn) if _relaxable({"fn": fn}) is None else fn

    def model_fn(self, fn: Any, draw: Draw, step: int) -> Any:
        return LinearExtension(fn) if _relaxable({"fn": fn}) is None else fn


def mean_of(fn: Any) -> Tensor:
    base = elementary(fn)
    mean = base.probs if is_one_hot(fn) or is_bernoulli(fn) else base.mean
    return mean.expand(tuple(fn.batch_shape) + tuple(fn.event_shape))


class Concrete(Estimator):
    """Relax the program itself: RelaxedOneHotCategorical in model and guide (Maddison et al. 2017, arXiv 1611.00712).

    Unbiased for the relaxed model's own bound, which is another objective than the discrete one.

    >>> Concrete(0.5).objective_name()
    'concrete-elbo'
    """

    needs_relaxed_model = True

    def __init__(self, temperature: float | Schedule = 0.67, prior_temperature: float | Schedule | None = None):
        self.temperature = check_temperature(temperature)
        self.prior_temperature = None if prior_temperature is None else check_temperature(prior_temperature)

    def objective_name(self) -> str:
        return "concrete-elbo"

    def why_not(self, site: Mapping[str, Any]) -> str | None:
        return _relaxable(site)

    def draw(self, fn: Any, step: int, args: tuple = (), kwargs: Mapping[str, Any] | None = None) -> Draw:
        value, unrounded = relaxed_draw(relaxed(fn, at_step(self.temperature, step)))
        return Draw(value, {"unrounded": unrounded})

    def guide_fn(self, fn: Any, draw: Draw, step: int) -> Any:
        return AtLogValue(relaxed(fn, at_step(self.temperature, step)), draw.extra["unrounded"])

    def model_fn(self, fn: Any, draw: Draw, step: int) -> Any:
        prior = self.temperature if self.prior_temperature is None else self.prior_temperature
        return AtLogValue(relaxed(fn, at_step(prior, step)), draw.extra["unrounded"])


estimators.register("gumbel-softmax", GumbelSoftmax)
estimators.register("straight-through", lambda: GumbelSoftmax(hard=True))
estimators.register("concrete", Concrete)
