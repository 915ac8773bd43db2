"""MuProp: a Taylor expansion of the cost around a mean-field pass as a control variate (Gu et al. 2016)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ._base import Draw, Estimator, SiteView, detached_draw, estimators, score_why_not
from ._reruns import cost_between, share_shape, slope, spread
from .relaxation import mean_why_not


class MuProp(Estimator):
    """The score function with a linear approximation of the cost as control variate (Gu et al. 2016, arXiv 1511.05176).

    The programs run again with the site and all downstream sites at their means. With f̄ and f̄' the cost of that run and
    its derivative at the mean μ, the gradient is (f(z) − f̄ − f̄'·(z − μ)) ∇log q(z) + f̄'·∇μ, unbiased for any f̄ and f̄'.
    It needs distributions with a mean and a model that accepts means as values.

    >>> MuProp().unbiased, MuProp().evaluations(num_particles=1, num_sites=2)
    (True, 3)
    """

    needs_relaxed_model = True
    log_q = "value"

    def evaluations(self, num_particles: int = 1, num_sites: int = 1) -> int:
        return num_particles * (1 + num_sites)

    def why_not(self, site: Mapping[str, Any]) -> str | None:
        return score_why_not(site) or mean_why_not(site)

    def draw(self, fn: Any, step: int, args: tuple = (), kwargs: Mapping[str, Any] | None = None) -> Draw:
        return detached_draw(fn, args, kwargs)

    def surrogate(self, view: SiteView) -> Tensor | None:
        if not torch.is_grad_enabled():
            return None
        mean = view.parameter("mean")
        point = spread(mean.detach(), view).clone().requires_grad_()
        at_mean, total = cost_between(view, self, point, downstream="mean")
        tangent = slope(total, point)
        linear = view.sum_event(tangent * (view.value - mean.detach())).sum_to_size(view.cost.shape)
        residual = view.cost - at_mean.detach() - linear
        path = view.sum_event(tangent * mean).sum_to_size(share_shape(view))
        return residual * view.log_prob + path


estimators.register("muprop", MuProp)
