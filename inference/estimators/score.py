"""Score-function gradients, around the sample, and the baselines that tame them (Williams 1992)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ...errors import BadInput
from ._base import Draw, Estimator, SiteView, detached_draw, estimators, score_why_not


class Baseline:
    """What is subtracted from the cost of a draw: anything that does not depend on that draw."""

    min_particles = 1

    def make_state(self) -> nn.Module | None:
        return None

    def __call__(self, view: SiteView) -> Tensor | float:
        """The baseline, broadcastable against ``view.cost``."""
        return 0.0

    def loss(self, view: SiteView) -> Tensor | None:
        """What the baseline's own parameters minimise, if it has any."""
        return None

    def __repr__(self) -> str:
        options = ", ".join(f"{key}={value!r}" for key, value in sorted(vars(self).items()) if not key.startswith("_"))
        return f"{type(self).__name__}({options})"


class _Average(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.zeros((), dtype=torch.float64))
        self.register_buffer("weight", torch.zeros((), dtype=torch.float64))

    mean: Tensor
    weight: Tensor


class MovingAverage(Baseline):
    """A decaying average of the costs seen so far: one number a site, so that it survives any batch size.

    The average is corrected for its start at zero, and read before the present costs enter it.
    """

    def __init__(self, decay: float = 0.9):
        if not 0.0 <= decay < 1.0:
            raise BadInput(f"MovingAverage(decay=…) must lie in [0, 1), got {decay!r}")
        self.decay = float(decay)

    def make_state(self) -> nn.Module:
        return _Average()

    def __call__(self, view: SiteView) -> Tensor:
        state = view.state
        baseline = (state.mean / state.weight.clamp(min=1e-12)).to(view.cost.dtype)
        if view.training:
            with torch.no_grad():
                state.mean.mul_(self.decay).add_((1 - self.decay) * view.cost.mean().to(state.mean.dtype))
                state.weight.mul_(self.decay).add_(1 - self.decay)
        return baseline


class LeaveOneOut(Baseline):
    """The mean cost of the other particles (Kool et al. 2019; under ``iwae``, VIMCO, Mnih & Rezende 2016)."""

    min_particles = 2

    def __call__(self, view: SiteView) -> Tensor:
        if view.bound is not None:
            return view.bound.leave_one_out()
        cost, dim = view.cost, view.particle_dim
        return (cost.sum(dim, keepdim=True) - cost) / (view.num_particles - 1)


class ScoreFunction(Estimator):
    """REINFORCE: f(z) ∇ log q(z), less a baseline; f need not be differentiable (Williams 1992).

    >>> ScoreFunction().name, ScoreFunction(baseline=LeaveOneOut()).name
    ('score', 'rloo')
    >>> ScoreFunction(baseline=LeaveOneOut()).min_particles
    2
    """

    objectives = frozenset({"elbo", "iwae"})

    def __init__(self, baseline: Baseline | None = None):
        if baseline is not None and not isinstance(baseline, Baseline):
            raise BadInput(
                f"ScoreFunction(baseline=…) takes MovingAverage(), Neural() or LeaveOneOut(), got {baseline!r}"
            )
        self.baseline = baseline

    log_q = "value"

    @property
    def min_particles(self) -> int:  # type: ignore[override]
        return self.baseline.min_particles if self.baseline else 1

    def why_not(self, site: Mapping[str, Any]) -> str | None:
        return score_why_not(site)

    def make_state(self, site: Mapping[str, Any], view: Any = None) -> nn.Module | None:
        return self.baseline.make_state() if self.baseline else None

    def draw(self, fn: Any, step: int, args: tuple = (), kwargs: Mapping[str, Any] | None = None) -> Draw:
        return detached_draw(fn, args, kwargs)

    def surrogate(self, view: SiteView) -> Tensor:
        if self.baseline is None:
            return view.cost * view.log_prob
        loss = self.baseline.loss(view)
        surrogate = (view.cost - torch.as_tensor(self.baseline(view)).detach()) * view.log_prob
        return surrogate if loss is None else surrogate - loss


estimators.register("score", ScoreFunction)
estimators.register("score-average", lambda: ScoreFunction(baseline=MovingAverage()))
estimators.register("rloo", lambda: ScoreFunction(baseline=LeaveOneOut()))
