"""Counts with infinite support: sums over their first values, alone or with a drawn tail."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import torch
from pyro.distributions.torch_distribution import TorchDistribution
from torch import Tensor
from torch.distributions import constraints

from ...errors import GumboWarning
from ._base import Draw, Estimator, SiteView, detached_draw, estimators, pad_left, score_why_not
from ._coordinates import gains
from ._distributions import describe, elementary, listed_support, numbers_of, rewrap
from .enumeration import Enumerate
from .local_expectation import coordinate_log_probs

COUNTS = constraints.nonnegative_integer


def count_why_not(site: Mapping[str, Any]) -> str | None:
    """Why a site does not have the unbounded counts 0, 1, 2, … as values, or None if it does."""
    base = elementary(site["fn"])
    if not hasattr(base, "log_prob"):
        return "it has no log_prob"
    try:
        support = base.support
    except NotImplementedError:
        return f"{describe(site['fn'])} has no support to enumerate"
    if getattr(base, "has_enumerate_support", False):
        return f"the values of {describe(site['fn'])} are finitely many: take 'enumerate' or 'local-expectation'"
    if support is not COUNTS:
        return f"{describe(site['fn'])} is no distribution over the counts 0, 1, 2, …"
    return None


class Head(TorchDistribution):
    """A count conditioned on being less than ``values``.

    >>> import pyro.distributions as dist
    >>> round(Head(dist.Poisson(1.0), 3).log_prob(torch.arange(3.0)).exp().sum().item(), 6)
    1.0
    """

    arg_constraints = {}
    support = COUNTS

    def __init__(self, base: Any, values: int):
        self.base, self.values = base, values
        super().__init__(base.batch_shape, base.event_shape, validate_args=False)

    def listed(self) -> Tensor:
        """log q of the first values, ``(values, *batch)``."""
        like = next(numbers_of(self.base), torch.empty(()))
        counts = torch.arange(self.values, dtype=like.dtype, device=like.device)
        return self.base.log_prob(counts.reshape((-1,) + (1,) * len(self.base.batch_shape)))

    def log_prob(self, value: Tensor) -> Tensor:
        return self.base.log_prob(value) - self.listed().logsumexp(0)

    def expand(self, batch_shape: Any, _instance: Any = None) -> Head:
        return Head(self.base.expand(batch_shape), self.values)


class TruncatedEnumerate(Enumerate):
    """Sum over the first ``values`` counts, each weighted by q conditioned on these counts: biased.

    The value is the evidence lower bound of the guide without its tail, which is a lower bound too, and is named
    ``truncated-elbo``; the model need not be differentiable, and there are no draws. :attr:`cut_mass` is, for each
    site, the mass of q cut off in the last run, the largest over its elements and coordinates; more than ``tolerance``
    in the first run gives a warning. The sum is over the product of an event's coordinates, as for ``enumerate``.

    Args:
        values: the number of values: 0, 1, …, ``values`` − 1.
        tolerance: the largest cut mass without a warning.
        limit: the largest number of joint values of all coordinates.

    >>> TruncatedEnumerate(values=8).unbiased, TruncatedEnumerate().name
    (False, 'truncated-enumerate')
    """

    unbiased = False

    def __init__(self, values: int = 32, tolerance: float = 0.01, limit: int = 2**14):
        super().__init__(limit)
        self.values, self.tolerance = int(values), float(tolerance)
        self._cut: dict[str, Tensor] = {}

    @property
    def cut_mass(self) -> dict[str, float]:
        """The mass of q beyond the first values, by site, of the last run outside a captured graph."""
        return {name: float(mass) for name, mass in self._cut.items()}

    def objective_name(self) -> str:
        return "truncated-elbo"

    def why_not(self, site: Mapping[str, Any]) -> str | None:
        if (reason := count_why_not(site)) is not None:
            return reason
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", GumboWarning)  # a mere query cuts nothing off
            listed = TruncatedEnumerate(self.values, self.tolerance, self.limit).listed(
                site["fn"], 0, site.get("name", "")
            )
        return listed if isinstance(listed, str) else None

    def listed(self, fn: Any, joint: int, name: str) -> Tensor | str:
        head = Head(elementary(fn), self.values)
        with torch.no_grad():
            log_q = head.listed()
            mass = (1 - log_q.exp().sum(0)).max().clamp(min=0.0)
        if type(mass) is Tensor:  # during graph capture there are no numbers
            first = name not in self._cut
            self._cut[name] = mass
            if first and mass > self.tolerance:
                warnings.warn(
                    f"site {name!r}: truncated-enumerate cuts off {float(mass):.3g} of the guide's mass beyond"
                    f" {self.values - 1}: raise TruncatedEnumerate(values=…), or take 'head-tail', which draws it",
                    GumboWarning,
                    stacklevel=2,
                )
        values = torch.arange(self.values, dtype=log_q.dtype, device=log_q.device)
        return listed_support(fn, values, joint=joint, limit=self.limit)

    def guide_fn(self, fn: Any, draw: Draw, step: int) -> Any:
        return rewrap(fn, lambda base: Head(base, self.values))


class HeadTail(Estimator):
    """Sum over the first ``values`` counts, draw the tail: unbiased (Rao-Blackwellization of Liu et al. 2019).

    For each coordinate, with the others as drawn, Σᵥ ∇q(v) (f(v) − f(0)) over v < ``values``, and if the draw z is in
    the tail, (f(z) − f(0)) ∇ log q(z): "Rao-Blackwellized stochastic gradients for discrete distributions", arXiv
    1810.04777. f(0) does not depend on the coordinate's draw and serves as a baseline. A coordinate costs ``values``
    runs.

    Args:
        values: the number of counts to sum over: 0, 1, …, ``values`` − 1.

    >>> HeadTail().name, HeadTail().unbiased
    ('head-tail', True)
    """

    log_q = "value"
    reruns = True

    def __init__(self, values: int = 8):
        self.values = int(values)

    def evaluations(self, num_particles: int = 1, num_sites: int = 1) -> int:
        """Model runs per gradient, where ``num_sites`` counts coordinates."""
        return num_particles * (1 + self.values * num_sites)

    def why_not(self, site: Mapping[str, Any]) -> str | None:
        return count_why_not(site) or score_why_not(site)

    def draw(self, fn: Any, step: int, args: tuple = (), kwargs: Mapping[str, Any] | None = None) -> Draw:
        return detached_draw(fn, args, kwargs)

    def surrogate(self, view: SiteView) -> Tensor:
        value = view.value
        counts = torch.arange(self.values, dtype=value.dtype, device=value.device)
        listed = counts.reshape((-1,) + (1,) * value.dim()).expand(self.values, *value.shape)
        # f(v) − f(z); f(0) replaces f(z) by a value that does not depend on the coordinate's draw.
        gain = gains(view, listed)
        start = gain[0]
        cost = view.cost.reshape(view.cost.shape + (1,) * view.event_dim)
        start = torch.where(start.isfinite(), start, -cost)  # where 0 is impossible, no baseline is subtracted
        q = coordinate_log_probs(view, counts).exp()
        dims = max(gain.dim(), q.dim())
        gain, q = (t.reshape(t.shape[:1] + (1,) * (dims - t.dim()) + t.shape[1:]) for t in (gain, q))
        offset = torch.where(q > 0, gain - start, torch.zeros_like(gain))
        drawn = torch.where(value >= self.values, -start * own_log_prob(view), torch.zeros_like(start))
        return view.sum_event((q * offset).sum(0) + drawn)


def own_log_prob(view: SiteView) -> Tensor:
    """log q of each coordinate's draw, shaped like the draws, differentiable, unscaled and unmasked."""
    room = -view.particle_dim
    if len(view.fns) == 1:
        return elementary(view.fns[0]).log_prob(view.value)
    dim = view.particle_dim - view.event_dim
    found = []
    for k, fn in enumerate(view.fns):
        alone = view.value.narrow(dim, k, 1)
        found.append(pad_left(elementary(fn).log_prob(alone), room + view.event_dim))
    return torch.cat(torch.broadcast_tensors(*found), dim=dim)


estimators.register("truncated-enumerate", TruncatedEnumerate)
estimators.register("head-tail", HeadTail)

__all__ = ["Head", "HeadTail", "TruncatedEnumerate", "count_why_not"]
