"""RODEO: double control variates with a network, through discrete Stein operators (Shi et al. 2022)."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ._base import Draw, SiteView, estimators, sloping_draw
from ._distributions import describe, elementary, is_bernoulli, is_one_hot
from ._reruns import loss_of_state, share_shape
from .double_control_variates import (
    Coefficients,
    DoubleControlVariates,
    Linear,
    covariance_times,
    others_mean,
    times_event,
)
from .score import update_moments, zero_network


class Surrogate(Coefficients):
    """The two coefficients, a network for the residual of the cost, and the cost's running moments.

    The inputs of the network are a cost and the change of its linear model, both in units of the cost's standard
    deviation; its initial output is zero.
    """

    def __init__(self, like: Tensor, decay: float, hidden: int):
        super().__init__(like, decay)
        options = {"dtype": like.dtype, "device": like.device}
        self.net = zero_network(2, hidden, like.dtype).to(like.device)
        self.register_buffer("mean", torch.zeros((), **options))
        self.register_buffer("variance", torch.zeros((), **options))
        self.register_buffer("seen", torch.zeros((), **options))

    mean: Tensor
    variance: Tensor
    seen: Tensor

    def scale(self, cost: Tensor, average: Callable[[Tensor], Tensor]) -> Tensor:
        """The standard deviation of costs in earlier steps; before the first, the size of the costs."""
        return torch.where(self.seen > 0, self.variance, average(cost.square())).clamp(min=1e-12).sqrt()

    def forward(self, cost: Tensor, moved: Tensor, scale: Tensor) -> Tensor:
        """The network's output for neighbours of a draw, from the change of the linear model at that draw."""
        cost, moved = torch.broadcast_tensors((cost - self.mean) / scale, moved / scale)
        said = self.net(torch.stack([cost, moved], -1).to(next(self.net.parameters()).dtype))
        return scale * said.squeeze(-1).to(scale.dtype)


class Rodeo(DoubleControlVariates):
    """``double-cv`` with a network in addition to its linear models (Shi et al. 2022, arXiv 2202.09497).

    From a draw zⱼ with cost fⱼ and slope f′ⱼ, h(y) = net(fⱼ, f′ⱼ·(y − zⱼ)) models the nonlinear part of the cost at a
    neighbour y, without further runs. A discrete Stein operator A replaces coordinates by fresh draws, so that A h has
    expectation zero:

    * in the particle's term, h of the *other* particles times the score, where coordinate i of the gradient replaces
      coordinate i of zₖ: −h(zₖ) sₖᵢ + Σᵥ pᵢ(v) h(zₖ with i = v) sᵢ(v);
    * in the baseline, h of each other particle at its own neighbours: Σᵢ Σᵥ pᵢ(v) (h(zⱼ with i = v) − h(zⱼ)).

    The paper averages its operator over all coordinates in both places; here only the coordinate whose gradient it is
    is replaced, so that a linear h gives the ``double-cv`` term, exact for linear costs. The network minimizes the
    squared gradient, with the loss's optimizer, and has no effect on other parameters; like the coefficients it depends
    on earlier steps only. For Bernoulli and one-hot sites.

    Args:
        hidden: units of the network.
        decay: the weight of earlier steps in the running means, in [0, 1).

    >>> Rodeo().name, Rodeo().min_particles, Rodeo().evaluations(num_particles=2, num_sites=3)
    ('rodeo', 2, 2)
    """

    lazy_parameters = True

    def __init__(self, hidden: int = 16, decay: float = 0.98):
        super().__init__(decay)
        self.hidden = int(hidden)

    def why_not(self, site: Mapping[str, Any]) -> str | None:
        fn = site["fn"]
        if is_bernoulli(fn) or is_one_hot(fn):
            return None
        return f"it replaces coordinates of Bernoulli and OneHotCategorical sites, this one is {describe(fn)}"

    def make_state(self, site: Mapping[str, Any], inputs: Any) -> nn.Module:
        return Surrogate(elementary(site["fn"]).mean, self.decay, self.hidden)

    def draw(self, fn: Any, step: int, args: tuple = (), kwargs: Mapping[str, Any] | None = None) -> Draw:
        return sloping_draw(fn, args, kwargs)

    def own_term(self, view: SiteView, found: Linear) -> tuple[Tensor, Tensor]:
        """h of the other particles at the draw, shaped like the cost, and its change with each coordinate.

        The second, shaped like the value, multiplies the gradient of the mean.
        """
        dim, event_dim, count = view.particle_dim, view.event_dim, view.num_particles
        here, contrast = torch.zeros_like(view.cost), torch.zeros_like(found.value)
        for shift in range(1, count):
            cost = view.cost.roll(shift, dim)
            slope, value = (tensor.roll(shift, dim - event_dim) for tensor in (found.slope, found.value))
            moved = view.sum_event(slope * (found.value - value)).sum_to_size(view.cost.shape)
            said, changed = self.neighbours(view, cost, moved, slope, found.value)
            here = here + said / (count - 1)
            contrast = contrast + changed / (count - 1)
        return here, contrast

    def baseline_term(self, view: SiteView, found: Linear) -> Tensor:
        """The mean over the other particles of the Stein operator applied to their own h, shaped like the cost."""
        _, changed = self.neighbours(view, view.cost, torch.zeros_like(view.cost), found.slope, found.value)
        # (mean − value) times the change of each coordinate: the expected change by a fresh draw of it.
        fresh = view.sum_event((found.mean - found.value) * changed).sum_to_size(view.cost.shape)
        return others_mean(view, fresh)

    def neighbours(
        self, view: SiteView, cost: Tensor, moved: Tensor, slope: Tensor, value: Tensor
    ) -> tuple[Tensor, Tensor]:
        """h at a value, and h with each coordinate replaced: as a difference of 1 and 0 if binary, or by class."""
        scale, events = view.state.scale(view.cost, view.mean), (1,) * view.event_dim
        said = view.state(cost, moved, scale)
        one_hot = is_one_hot(view.fns[0])
        step = slope - (slope * value).sum(-1, keepdim=True) if one_hot else slope * (1 - 2 * value)
        cost, moved = cost.reshape(cost.shape + events), moved.reshape(moved.shape + events)
        there = view.state(cost, moved + step, scale)
        return said, there if one_hot else (there - said.reshape(said.shape + events)) * (1 - 2 * value)

    def surrogate(self, view: SiteView) -> Tensor | None:
        if not torch.is_grad_enabled():
            return None
        mean = view.parameter("mean")
        found = self.linear_models(view, mean)
        here, contrast = self.own_term(view, found)
        fitted = here + self.baseline_term(view, found)
        path = view.sum_event((found.vector + contrast.detach()) * mean).sum_to_size(share_shape(view))
        share = (found.weight - fitted.detach()) * view.log_prob + path
        if not view.training:
            return share
        score = times_event(fitted, found.value - found.mean, view.event_dim)
        loss = self.variance_loss(view, found.gradient - score + covariance_times(view, contrast))
        update_moments(view.state, view.cost, view.mean, self.decay)
        return share - loss / math.prod(share.shape)

    def variance_loss(self, view: SiteView, gradient: Tensor) -> Tensor:
        """A scalar whose gradient, for the network's parameters alone, is that of the squared gradient of the site."""
        mean = gradient.mean(view.particle_dim - view.event_dim, keepdim=True)
        return loss_of_state(view, (mean / view.state.scale(view.cost, view.mean)).square().sum())


estimators.register("rodeo", Rodeo)
