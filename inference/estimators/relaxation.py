"""Relaxed one-hot and Bernoulli sites: gradients through a relaxed sample."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import softplus

from ...errors import BadInput
from ._base import Draw, Estimator, Schedule, at_step, check_temperature, estimators
from ._distributions import (
    AtLogValue,
    LinearExtension,
    describe,
    elementary,
    is_bernoulli,
    is_discrete,
    is_one_hot,
    logits_of,
    relaxed,
    relaxed_draw,
    unvalidated,
    why_no_expectation,
    why_no_mean,
)


def relaxable_why_not(site: Mapping[str, Any]) -> str | None:
    """Why a relaxation does not support a site, or None."""
    fn = site["fn"]
    if is_one_hot(fn) or is_bernoulli(fn):
        return None
    return f"a relaxation needs a OneHotCategorical or Bernoulli site, this one is {describe(fn)}"


def one_hot_why_not(site: Mapping[str, Any]) -> str | None:
    """Why an estimator of one-hot draws alone does not support a site, or None."""
    fn = site["fn"]
    return None if is_one_hot(fn) else f"it is for OneHotCategorical sites, this one is {describe(fn)}"


def gumbel(like: Tensor) -> Tensor:
    """Standard Gumbel noise, −log(−log u), finite in every float type."""
    tiny = torch.finfo(like.dtype).tiny
    return -torch.empty_like(like).exponential_().clamp(min=tiny).log()


def noise(like: Tensor, one_hot: bool) -> Tensor:
    """The noise of a discrete draw from logits: Gumbel for classes, logistic (two Gumbels' difference) for binary."""
    return gumbel(like) if one_hot else gumbel(like) - gumbel(like)


def bounded_logits(fn: Any) -> Tensor:
    """Logits in which impossible classes are finite, so that zero times them is zero."""
    return logits_of(fn).clamp(-1e4, 1e4)


def harden(scores: Tensor, one_hot: bool) -> Tensor:
    """The discrete value of perturbed logits."""
    if one_hot:
        return torch.zeros_like(scores).scatter_(-1, scores.argmax(-1, keepdim=True), 1.0)
    return (scores > 0).to(scores.dtype)


def squash(scores: Tensor, temperature: Tensor | float, one_hot: bool) -> Tensor:
    """The relaxed value of perturbed logits."""
    return (scores / temperature).softmax(-1) if one_hot else (scores / temperature).sigmoid()


def conditional_scores(logits: Tensor, value: Tensor, noise: Tensor, one_hot: bool) -> Tensor:
    """Perturbed logits given their discrete value, reparameterized (Tucker et al. 2017, appendix C).

    ``noise`` has the distribution of the original noise, and is independent of it; logits of classes are normalized.
    """
    if not one_hot:
        sign = 2 * value - 1
        return sign * softplus(noise + softplus(sign * logits))
    # The largest is a Gumbel; each other is a Gumbel truncated at the largest.
    top = (value * noise).sum(-1, keepdim=True)
    return torch.where(value > 0, noise, -torch.logaddexp(-noise - logits, -top))


def soften(fn: Any, temperature: float) -> tuple[Tensor, Tensor]:
    """A relaxed draw of a one-hot or Bernoulli site, and its discrete value.

    softmax((log π + g)/τ), or for Bernoulli the same with two classes: sigmoid((log odds + g₁ − g₀)/τ).
    """
    logits, one_hot = logits_of(fn), is_one_hot(fn)
    scores = logits + noise(logits, one_hot)
    return squash(scores, temperature, one_hot), harden(scores, one_hot)


class GumbelSoftmax(Estimator):
    """Relaxed samples in place of discrete ones (Jang et al. 2017, arXiv 1611.01144): biased, low variance.

    The log pmf is extended linearly, Σ yᵢ log πᵢ, in both log p and log q.

    Args:
        temperature: a positive number or a schedule of the training step.
        hard: use the discrete value in the forward pass and the relaxed gradient in the backward pass
            ("straight-through").
        rao: with ``hard``, average the relaxed gradient over that many noises, each drawn given the discrete value
            (Paulus et al. 2021, arXiv 2010.04838): the same mean with less variance, without further model runs.

    Raises:
        BadInput: ``rao`` without ``hard``, or a temperature that is not positive.

    >>> GumbelSoftmax(0.5, hard=True).unbiased, GumbelSoftmax(hard=True, rao=10).name
    (False, 'gumbel-rao')
    """

    unbiased = False
    _ranges = {"rao": 0}

    def __init__(self, temperature: float | Schedule = 0.67, hard: bool = False, rao: int = 0):
        if rao and not hard:
            raise BadInput("GumbelSoftmax(rao=…) averages given the hard draw: pass hard=True")
        self.temperature = check_temperature(temperature)
        self.hard, self.rao = bool(hard), int(rao)

    @property
    def needs_relaxed_model(self) -> bool:  # type: ignore[override]
        return not self.hard

    def objective_name(self) -> str:
        return "elbo" if self.hard else "relaxed-elbo"

    def why_not(self, site: Mapping[str, Any]) -> str | None:
        return relaxable_why_not(site)

    def draw(self, fn: Any, step: int, args: tuple = (), kwargs: Mapping[str, Any] | None = None) -> Draw:
        temperature = at_step(self.temperature, step)
        if self.rao:
            soft, hard = self._averaged(fn, temperature)
        else:
            soft, hard = soften(fn, temperature)
        return Draw(hard + (soft - soft.detach()) if self.hard else soft)

    def _averaged(self, fn: Any, temperature: float) -> tuple[Tensor, Tensor]:
        """A hard draw, and the mean of relaxed draws conditioned on it."""
        logits, one_hot = bounded_logits(fn), is_one_hot(fn)
        fixed = logits.detach()
        hard = harden(fixed + noise(fixed, one_hot), one_hot)
        many = fixed.expand(self.rao, *fixed.shape)
        scores = conditional_scores(many, hard, noise(many, one_hot), one_hot)
        # The scores contain the noise; the gradient is that of adding the logits to it.
        soft = squash(scores + (logits - fixed), temperature, one_hot)
        return soft.mean(0), hard

    def guide_fn(self, fn: Any, draw: Draw, step: int) -> Any:
        return LinearExtension(fn)

    def model_fn(self, fn: Any, draw: Draw, step: int) -> Any:
        return LinearExtension(fn)


class Mean(Estimator):
    """Sets a site to its mean, for a deterministic pass through a program; not registered as an estimator."""

    unbiased = False
    needs_relaxed_model = True

    def why_not(self, site: Mapping[str, Any]) -> str | None:
        # A control variate may run at any value; E[z] matters only where the control variate's own mean is taken.
        return _finite_mean_why_not(site["fn"], why_no_mean(site["fn"]))

    def draw(self, fn: Any, step: int, args: tuple = (), kwargs: Mapping[str, Any] | None = None) -> Draw:
        return Draw(mean_of(fn))

    def guide_fn(self, fn: Any, draw: Draw, step: int) -> Any:
        return _between(fn)

    def model_fn(self, fn: Any, draw: Draw, step: int) -> Any:
        return _between(fn)


def _between(fn: Any) -> Any:
    """The distribution, with a log-probability for relaxed values."""
    if relaxable_why_not({"fn": fn}) is None:
        return LinearExtension(fn)
    return unvalidated(fn) if is_discrete(fn) else fn


def mean_of(fn: Any) -> Tensor:
    return elementary(fn).mean.expand(tuple(fn.batch_shape) + tuple(fn.event_shape))


def mean_why_not(site: Mapping[str, Any]) -> str | None:
    """Why a site has no finite mean E[z] to expand a cost around, or None."""
    return _finite_mean_why_not(site["fn"], why_no_expectation(site["fn"]))


def _finite_mean_why_not(fn: Any, reason: str | None) -> str | None:
    if reason is not None or bool(elementary(fn).mean.isfinite().all()):
        return reason
    return f"{describe(fn)} has no finite mean"


class Concrete(Estimator):
    """Relax the program itself: RelaxedOneHotCategorical in model and guide (Maddison et al. 2017, arXiv 1611.00712).

    Unbiased for the relaxed model's own bound, which differs from the discrete objective.

    Args:
        temperature: the guide's temperature, a positive number or a schedule of the training step.
        prior_temperature: the model's temperature; None takes ``temperature``.

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
        return relaxable_why_not(site)

    def draw(self, fn: Any, step: int, args: tuple = (), kwargs: Mapping[str, Any] | None = None) -> Draw:
        value, unrounded = relaxed_draw(relaxed(fn, at_step(self.temperature, step)))
        return Draw(value, {"unrounded": unrounded})

    def guide_fn(self, fn: Any, draw: Draw, step: int) -> Any:
        return AtLogValue(relaxed(fn, at_step(self.temperature, step)), draw.extra["unrounded"])

    def model_fn(self, fn: Any, draw: Draw, step: int) -> Any:
        prior = self.temperature if self.prior_temperature is None else self.prior_temperature
        return AtLogValue(relaxed(fn, at_step(prior, step)), draw.extra["unrounded"])


estimators.register("gumbel-softmax", GumbelSoftmax)
estimators.register("straight-through", partial(GumbelSoftmax, hard=True))
estimators.register("gumbel-rao", partial(GumbelSoftmax, hard=True, rao=10))
estimators.register("concrete", Concrete)
