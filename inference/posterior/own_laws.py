"""Whether a distribution from outside of torch and Pyro draws from the law of its own density."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch.distributions import Distribution, Transform, TransformedDistribution, biject_to

from ...errors import PROGRAM_ERRORS
from ..engine.scopes import private_seed
from ..estimators._distributions import describe, elementary, parts_of

_LIBRARIES = ("torch", "pyro", "zuko", "gumbo")
_DRAWS, _LEAST, _NUMBERS = 2000, 200, 2**20
# A difference of a tenth that ten thousand million coordinates of a right density would not show.
_DIFFERENCE, _ERRORS = 0.1, 8.0


def why_not_own_law(fn: Distribution) -> str | None:
    """Why ``fn``, if a user wrote a part of it, draws from another law than its ``log_prob``; None if nothing is seen.

    For unconstrained numbers u of a density q that vanishes far out, E[∂ log q / ∂u] is 0 and E[u ∂ log q / ∂u] is −1
    (Stein's identity); a transform's log-determinant is compared with its derivative. A law that fails no test may
    still be wrong.

    >>> import pyro.distributions as dist
    >>> class Narrow(dist.Normal):
    ...     __module__ = "mine"
    ...     def sample(self, sample_shape=torch.Size()):
    ...         return self.loc + 0.5 * (super().sample(sample_shape) - self.loc)
    >>> why_not_own_law(dist.Normal(0.0, 1.0)) is None
    True
    >>> why_not_own_law(Narrow(0.0, 1.0)).split(":")[0]
    'Narrow draws from another law than its log_prob'
    """
    foreign = [part for part in _parts(fn) if type(part).__module__.partition(".")[0] not in _LIBRARIES]
    if not foreign:
        return None
    what = f"{describe(fn)} draws from another law than its log_prob: "
    try:
        if fn.support.is_discrete:
            return None
        with private_seed(0), torch.enable_grad():
            for part in foreign:
                if isinstance(part, Transform) and not _has_its_jacobian(part):
                    return f"{what}log_abs_det_jacobian of {type(part).__name__} is not that of its derivative"
            said = _stein(fn)
    except PROGRAM_ERRORS:  # a density that cannot be differentiated
        return None
    return said and what + said


def _parts(fn: Any) -> Iterator[Any]:
    base = elementary(fn)
    yield base
    if isinstance(base, TransformedDistribution):
        yield from parts_of(base.transforms)
        yield from _parts(base.base_dist)


def _has_its_jacobian(transform: Transform) -> bool:
    """Whether a transform of single numbers has the log-determinant of its derivative; True for others."""
    if transform.domain.event_dim or transform.codomain.event_dim:
        return True
    free = torch.linspace(-2, 2, 41, dtype=torch.float64)
    start = biject_to(transform.domain)(free).detach().requires_grad_()
    end = transform(start)
    slope = torch.autograd.grad(end.sum(), start)[0].abs().log()
    said = transform.log_abs_det_jacobian(start, end)
    return said.shape != slope.shape or torch.allclose(said.to(slope), slope, rtol=1e-3, atol=1e-2)


def _stein(fn: Distribution) -> str | None:
    with torch.no_grad():
        size = fn.batch_shape.numel() * fn.event_shape.numel()
        draws = min(_DRAWS, _NUMBERS // max(1, size))
        if draws < _LEAST:
            return None
        space = biject_to(fn.support)
        free = space.inv(fn.sample(torch.Size([draws])))
    free = free.detach().requires_grad_()
    value = space(free)
    density = fn.log_prob(value).sum() + space.log_abs_det_jacobian(free, value).sum()
    slope = torch.autograd.grad(density, free)[0].double().reshape(draws, -1)
    place = free.detach().double().reshape(draws, -1)
    spread = place.std(0)
    if not (slope.isfinite().all() and spread.isfinite().all()):
        return None
    if ((place.sort(0).values.diff(dim=0) == 0).sum(0) > draws / 100).any():
        return None  # numbers that end at the precision of floats, or do not vary
    centred = place - place.mean(0)
    push, stretch = slope * spread, -centred * slope
    if (wrong := _differs(push, 0.0)).any():
        return f"its draws lie beside the density, by the slope of it at number {int(wrong.nonzero()[0])}"
    if (wrong := _differs(stretch, 1.0)).any():
        ratio = max(0.0, float(stretch.mean(0)[wrong][0])) ** 0.5
        return f"its draws have {ratio:.2g} times the spread that the density says"
    return None


def _differs(values: torch.Tensor, mean: float) -> torch.Tensor:
    """Which columns have surely another mean."""
    off = (values.mean(0) - mean).abs()
    error = values.std(0) / len(values) ** 0.5
    return (off > _DIFFERENCE) & (off > _ERRORS * error)
