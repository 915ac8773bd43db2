"""Measure-valued derivatives: a derivative of a density as a difference of two densities, each of them sampled."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ._base import Draw, Estimator, SiteView, detached_draw, estimators
from ._coordinates import gains
from ._distributions import describe, elementary, is_bernoulli


class MeasureValued(Estimator):
    """∇E[f] = c (E₊[f] − E₋[f]), coordinate by coordinate (Rosca et al. 2019; Mohamed et al. 2020, arXiv 1906.10652).

    * Bernoulli: f(1) − f(0) with respect to the probability.
    * Poisson: f(z + 1) − f(z) with respect to the rate.
    * Normal: location, f(μ + σw) − f(μ − σw) with w Weibull; scale, f(μ + σm) − f(z) with m double-sided Maxwell,
      tied to the draw z.

    Each coordinate is changed alone, with everything upstream and the other coordinates as drawn and everything
    downstream drawn anew: one more run for each coordinate, three for a Normal whose location and scale both learn.
    Elements of a plate are changed together where the program keeps them apart. f need not be differentiable.

    >>> MeasureValued().name, MeasureValued().unbiased
    ('measure-valued', True)
    """

    log_q = "value"
    reruns = True

    def evaluations(self, num_particles: int = 1, num_sites: int = 1) -> int:
        """Model runs that one gradient costs, where ``num_sites`` counts coordinates; a Normal one counts three."""
        return num_particles * (1 + num_sites)

    def why_not(self, site: Mapping[str, Any]) -> str | None:
        if _rule(site["fn"]) is None:
            return f"it has derivatives of Bernoulli, Normal and Poisson only, not of {describe(site['fn'])}"
        return None

    def draw(self, fn: Any, step: int, args: tuple = (), kwargs: Mapping[str, Any] | None = None) -> Draw:
        return detached_draw(fn, args, kwargs)

    def surrogate(self, view: SiteView) -> Tensor | None:
        return _rule(view.fns[0])(view)


def _rule(fn: Any) -> Any:
    if is_bernoulli(fn):
        return bernoulli
    if isinstance(elementary(fn), torch.distributions.Normal):
        return normal
    if isinstance(elementary(fn), torch.distributions.Poisson):
        return poisson
    return None


def bernoulli(view: SiteView) -> Tensor:
    gain = gains(view, (1 - view.value).unsqueeze(0))[0]
    return view.sum_event((1 - 2 * view.value) * gain * view.parameter("probs"))


def poisson(view: SiteView) -> Tensor:
    gain = gains(view, (view.value + 1).unsqueeze(0))[0]
    return view.sum_event(gain * view.parameter("rate"))


def normal(view: SiteView) -> Tensor | None:
    loc, scale = view.parameter("loc"), view.parameter("scale")
    mean, sigma = loc.detach(), scale.detach()
    noise = (view.value - mean) / sigma
    alternatives = []
    if loc.requires_grad:
        step = sigma * (2 * torch.empty_like(noise).exponential_()).sqrt()
        alternatives += [mean + step, mean - step]
    if scale.requires_grad:
        # |m|² = ε² + 2E with E exponential: m is Maxwell, and ε = m u with u uniform is the Normal draw at hand.
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


estimators.register("measure-valued", MeasureValued)
