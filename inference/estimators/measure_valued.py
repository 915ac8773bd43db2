"""Measure-valued derivatives: the derivative of a density as a difference of two densities, each sampled."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ._base import Draw, Estimator, SiteView, detached_draw, estimators
from ._coordinates import gains
from ._distributions import describe, elementary, is_of


class MeasureValued(Estimator):
    """∇E[f] = c (E₊[f] − E₋[f]), coordinate by coordinate (Rosca et al. 2019; Mohamed et al. 2020, arXiv 1906.10652).

    * Bernoulli: f(1) − f(0) with respect to the probability.
    * Poisson: f(z + 1) − f(z) with respect to the rate.
    * Binomial of n trials: n (f(y + 1) − f(y)) with respect to the probability, y the draw without one of its trials,
      so that one of y and y + 1 is the draw.
    * Negative binomial: r/(1 − p)² (f(y + 1) − f(y)) with respect to torch's p, y the draw and another Geometric
      count, which makes it one of r + 1.
    * Geometric: the same with r = 1, and p one less the probability.
    * Gamma: (α/β) (f(z) − f(z + e)) with respect to the rate β, e exponential of that rate.
    * Normal: location, f(μ + σw) − f(μ − σw) with w Weibull; scale, f(μ + σm) − f(z) with m double-sided Maxwell,
      tied to the draw z.

    Each coordinate is changed alone: upstream sites and the other coordinates keep their draws, downstream sites are
    drawn again. This takes one more run per coordinate, three for a Normal with learnable location and scale. Elements
    of a plate are changed together where the program keeps them independent. f need not be differentiable.

    >>> MeasureValued().name, MeasureValued().unbiased
    ('measure-valued', True)
    """

    log_q = "value"
    reruns = True

    def evaluations(self, num_particles: int = 1, num_sites: int = 1) -> int:
        """Model runs per gradient, where ``num_sites`` counts coordinates.

        A negative binomial or Geometric one counts two, a Normal one three.
        """
        return num_particles * (1 + num_sites)

    def why_not(self, site: Mapping[str, Any]) -> str | None:
        if _rule(site["fn"]) is None:
            names = ", ".join(family.__name__ for family in RULES)
            return f"it has derivatives of {names} only, not of {describe(site['fn'])}"
        for name in ("total_count", "concentration"):
            fixed = getattr(elementary(site["fn"]), name, None)
            if isinstance(fixed, Tensor) and fixed.requires_grad:
                return f"it has no derivative of {describe(site['fn'])} with respect to {name}, which learns"
        return None

    def draw(self, fn: Any, step: int, args: tuple = (), kwargs: Mapping[str, Any] | None = None) -> Draw:
        return detached_draw(fn, args, kwargs)

    def surrogate(self, view: SiteView) -> Tensor | None:
        return _rule(view.fns[0])(view)


def _rule(fn: Any) -> Any:
    return next((rule for family, rule in RULES.items() if is_of(fn, family)), None)


def bernoulli(view: SiteView) -> Tensor:
    gain = gains(view, (1 - view.value).unsqueeze(0))[0]
    return view.sum_event((1 - 2 * view.value) * gain * view.parameter("probs"))


def poisson(view: SiteView) -> Tensor:
    gain = gains(view, (view.value + 1).unsqueeze(0))[0]
    return view.sum_event(gain * view.parameter("rate"))


def coin(probs: Tensor) -> Tensor:
    return torch.bernoulli(probs)


def binomial(view: SiteView) -> Tensor:
    count = view.parameter("total_count").to(view.value.dtype)
    # One trial of the draw is left out at random; both of its outcomes are compared, and one of them is the draw.
    success = coin((view.value / count.clamp(min=1)).clamp(0, 1))
    sign = 1 - 2 * success
    gain = gains(view, (view.value + torch.where(count > 0, sign, 0)).unsqueeze(0))[0]
    return view.sum_event(count * sign * gain * view.parameter("probs"))


def negative_binomial(view: SiteView) -> Tensor:
    probs = view.parameter("probs")
    count = view.parameter("total_count").to(probs.dtype)
    return _one_more_failure(view, count, probs)


def geometric(view: SiteView) -> Tensor:
    probs = 1 - view.parameter("probs")
    return _one_more_failure(view, torch.ones_like(probs), probs)


def _one_more_failure(view: SiteView, count: Tensor, probs: Tensor) -> Tensor:
    """A count before ``count`` failures, each trial a success of probability ``probs``."""
    with torch.no_grad():
        room = (1 - probs).clamp(min=torch.finfo(probs.dtype).tiny)
        before = view.value + torch.distributions.Geometric(probs=room, validate_args=False).sample()
    gain = gains(view, torch.stack([before, before + 1]))
    return view.sum_event(count / room.square() * (gain[1] - gain[0]) * probs)


def gamma(view: SiteView) -> Tensor | None:
    rate = view.parameter("rate")
    if not rate.requires_grad:
        return None
    fixed = rate.detach()
    gain = gains(view, (view.value + torch.empty_like(view.value).exponential_() / fixed).unsqueeze(0))[0]
    return view.sum_event(-view.parameter("concentration").detach() / fixed * gain * rate)


def normal(view: SiteView) -> Tensor | None:
    loc, scale = view.parameter("loc"), view.parameter("scale")
    mean, sigma = loc.detach(), scale.detach()
    noise = (view.value - mean) / sigma
    alternatives = []
    if loc.requires_grad:
        step = sigma * (2 * torch.empty_like(noise).exponential_()).sqrt()
        alternatives += [mean + step, mean - step]
    if scale.requires_grad:
        # |m|² = ε² + 2E with E exponential: m is Maxwell, and ε = m u with u uniform is the Normal draw.
        far = (noise.square() + 2 * torch.empty_like(noise).exponential_()).sqrt()
        alternatives.append(mean + sigma * torch.where(noise < 0, -far, far))
    if not alternatives:
        return None
    gain = gains(view, torch.stack(alternatives))
    total = torch.zeros_like(gain[0])
    if loc.requires_grad:
        total = total + (gain[0] - gain[1]) / (sigma * math.sqrt(2 * math.pi)) * loc
    if scale.requires_grad:
        total = total + gain[-1] / sigma * scale
    return view.sum_event(total)


RULES = {
    torch.distributions.Bernoulli: bernoulli,
    torch.distributions.Poisson: poisson,
    torch.distributions.Binomial: binomial,
    torch.distributions.NegativeBinomial: negative_binomial,
    torch.distributions.Geometric: geometric,
    torch.distributions.Gamma: gamma,
    torch.distributions.Normal: normal,
}


estimators.register("measure-valued", MeasureValued)
