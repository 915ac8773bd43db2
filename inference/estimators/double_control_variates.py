"""Double control variates: leave-one-out with linear models of the cost (Titsias & Shi 2022)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ._base import Draw, Estimator, SiteView, estimators, score_why_not, sloping_draw
from ._distributions import describe, elementary, inherits, is_discrete, is_one_hot
from ._reruns import share_shape, spread
from .relaxation import mean_why_not
from .score import check_decay


def sloping_why_not(site: Mapping[str, Any]) -> str | None:
    """Why an estimator that uses the slope of the cost at discrete draws does not support a site, or None."""
    fn = site["fn"]
    if (reason := score_why_not(site)) is not None:
        return reason
    if not is_discrete(fn):
        return f"it is for discrete draws, and {describe(fn)} is continuous"
    if not (is_one_hot(fn) or elementary(fn).event_shape == torch.Size()) or is_index(fn):
        return f"the values of {describe(fn)} are no numbers that a cost could be linear in; take OneHotCategorical"
    if inherits(type(elementary(fn)), "variance"):
        return f"{describe(fn)} has a draw or a density of its own and the variance of another law; define its variance"
    return mean_why_not(site)


def is_index(fn: Any) -> bool:
    return isinstance(elementary(fn), torch.distributions.Categorical)


def covariance_times(view: SiteView, vector: Tensor) -> Tensor:
    """The covariance of the site's draw times a tensor shaped like its value."""
    fn = view.fns[0]
    if is_one_hot(fn):
        probs = view.parameter("probs").detach()
        return probs * (vector - (probs * vector).sum(-1, keepdim=True))
    return view.parameter("variance").detach() * vector


def others_mean(view: SiteView, tensor: Tensor, event_dim: int = 0) -> Tensor:
    """The mean over the other particles of a tensor shaped like the cost or the value; zero if there are none."""
    if view.num_particles == 1:
        return torch.zeros_like(tensor)
    return (tensor.sum(view.particle_dim - event_dim, keepdim=True) - tensor) / (view.num_particles - 1)


class Coefficients(nn.Module):
    """Two coefficients that minimize the variance of the gradient, estimated from earlier steps.

    With the gradient g₀ + a₁ g₁ + a₂ g₂, they minimize the running mean of its square; initially both are zero.
    """

    def __init__(self, like: Tensor, decay: float):
        super().__init__()
        self.decay = decay
        options = {"dtype": torch.float64, "device": like.device}
        self.register_buffer("gram", torch.zeros(2, 2, **options))
        self.register_buffer("cross", torch.zeros(2, **options))

    gram: Tensor
    cross: Tensor

    def read(self) -> tuple[Tensor, Tensor]:
        (a, b), (_, d) = self.gram
        pull = 1e-3 * (a + d) + torch.finfo(torch.float64).tiny ** 0.25
        first, second = -self.cross
        a, d = a + pull, d + pull
        determinant = a * d - b * b
        return (d * first - b * second) / determinant, (a * second - b * first) / determinant

    @torch.no_grad()
    def observe(self, view: SiteView, parts: tuple[Tensor, Tensor, Tensor]) -> None:
        """Update the moments by the three parts of a step's gradient, each shaped like the value."""
        dim = view.particle_dim - view.event_dim
        zero, *known = (part.mean(dim, keepdim=True) for part in parts)

        def moment(one: Tensor, other: Tensor) -> Tensor:
            return view.mean(view.sum_event(one * other)).to(self.gram.dtype)

        gram = torch.stack([torch.stack([moment(one, other) for other in known]) for one in known])
        cross = torch.stack([moment(zero, one) for one in known])
        for mean, found in ((self.gram, gram), (self.cross, cross)):
            mean.mul_(self.decay).add_((1 - self.decay) * found)


@dataclass
class Linear:
    """The draws of a step, and the terms from linear models of the cost.

    Attributes:
        slope, value, mean: of the site, without gradients, with an element for every particle and enumerated value.
        weight: the factor of the score, shaped like the cost.
        vector: the factor of the gradient of the mean, shaped like the value.
        gradient: that of each natural parameter, shaped like the value.
    """

    slope: Tensor
    value: Tensor
    mean: Tensor
    weight: Tensor
    vector: Tensor
    gradient: Tensor


def times_event(weight: Tensor, tensor: Tensor, event_dim: int) -> Tensor:
    """A tensor shaped like the cost times a tensor shaped like the value."""
    return weight.reshape(weight.shape + (1,) * event_dim) * tensor


class DoubleControlVariates(Estimator):
    """Leave-one-out with two linear models of the cost (Titsias & Shi 2022, arXiv 2111.05300).

    With s = z − μ for a draw z of mean μ, and f′ⱼ the slope of the cost at the draw of particle j, particle k has

        [fₖ − avg fⱼ + a₂ avg f′ⱼ·(zⱼ − μ) − a₁ avg f′ⱼ·sₖ] ∇log q(zₖ) + a₁ avg f′ⱼ·∇μ,

    where avg is the mean over the other particles. The slopes come from the same runs: no program runs again. The mean
    of the gradient does not depend on them, since the last term compensates for the one before it; where the program is
    not differentiable in its draws they vanish and the gradient is that of ``rloo``. The coefficients a₁ and a₂, two
    numbers per site, minimize the variance over earlier steps, and never use the current step, which would bias the
    gradient. They start at zero, which is ``rloo``; if both are one, a linear cost has an exact gradient. For
    Bernoulli, one-hot and count-valued sites (Binomial, Poisson, Geometric, negative binomial).

    Args:
        decay: the weight of earlier steps in the running means, in [0, 1).

    >>> DoubleControlVariates().name, DoubleControlVariates().min_particles
    ('double-cv', 2)
    >>> DoubleControlVariates().unbiased, DoubleControlVariates().evaluations(num_particles=4, num_sites=3)
    (True, 4)
    """

    log_q = "value"
    takes_slope = True
    min_particles = 2
    _ranges = {"decay": 0}

    def __init__(self, decay: float = 0.98):
        self.decay = check_decay(self, decay)

    def why_not(self, site: Mapping[str, Any]) -> str | None:
        return sloping_why_not(site)

    def make_state(self, site: Mapping[str, Any], inputs: Any) -> nn.Module:
        return Coefficients(elementary(site["fn"]).mean, self.decay)

    def draw(self, fn: Any, step: int, args: tuple = (), kwargs: Mapping[str, Any] | None = None) -> Draw:
        return sloping_draw(fn, args, kwargs)

    def coefficients(self, view: SiteView, parts: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """a₁ and a₂ for this step, computed before the step updates them."""
        found = view.state.read()
        if view.training:
            view.state.observe(view, parts)
        return found

    @torch.no_grad()
    def linear_models(self, view: SiteView, mean: Tensor) -> Linear:
        """The gradient's terms with a linear model of the cost in the particle's own term and in the baseline."""
        shape, event_dim = view.cost.shape, view.event_dim
        slope, value, mean = (spread(tensor.detach(), view) for tensor in (view.slope, view.value, mean))
        score = value - mean
        theirs = others_mean(view, slope, event_dim)
        own = view.sum_event(theirs * score).sum_to_size(shape)
        at_theirs = others_mean(view, view.sum_event(slope * value).sum_to_size(shape))
        other = at_theirs - view.sum_event(theirs * mean).sum_to_size(shape)
        gap = view.cost - others_mean(view, view.cost)
        parts = (
            times_event(gap, score, event_dim),
            covariance_times(view, theirs) - times_event(own, score, event_dim),
            times_event(other, score, event_dim),
        )
        first, second = (a.to(gap.dtype) for a in self.coefficients(view, parts))
        gradient = parts[0] + first * parts[1] + second * parts[2]
        return Linear(slope, value, mean, gap + second * other - first * own, first * theirs, gradient)

    def surrogate(self, view: SiteView) -> Tensor | None:
        if not torch.is_grad_enabled():
            return None
        mean = view.parameter("mean")
        found = self.linear_models(view, mean)
        return found.weight * view.log_prob + view.sum_event(found.vector * mean).sum_to_size(share_shape(view))


estimators.register("double-cv", DoubleControlVariates)
