"""Local expectations: a sum over each coordinate of a discrete site, with the others as drawn."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from pyro.distributions import Empirical
from torch import Tensor

from ._base import Draw, Estimator, SiteView, detached_draw, estimators, pad_left
from ._coordinates import gains
from ._distributions import coordinate_values, elementary


class LocalExpectation(Estimator):
    """Σᵥ ∇qᵢ(v) f(z₋ᵢ, zᵢ = v) for each coordinate i (Titsias & Lázaro-Gredilla 2015, "Local expectation gradients").

    Coordinates are those of the event (Bernoulli, one-hot, categorical, binomial, …). Upstream sites and the other
    coordinates keep their draws, downstream sites are drawn again. Elements of a plate are changed together where the
    program keeps them independent, and one at a time where a later statement combines them. The value drawn is not run
    again, so that a coordinate with V values costs V − 1 runs: 200 Bernoulli coordinates cost 200, so use it for small
    layers.

    >>> LocalExpectation().name, LocalExpectation().unbiased
    ('local-expectation', True)
    """

    log_q = "value"
    reruns = True

    def evaluations(self, num_particles: int = 1, num_sites: int = 1) -> int:
        """Model runs per gradient, where ``num_sites`` counts binary coordinates; V values count as V − 1 of them."""
        return num_particles * (1 + num_sites)

    def why_not(self, site: Mapping[str, Any]) -> str | None:
        if isinstance(elementary(site["fn"]), Empirical):
            return "an Empirical scores one value at a time"
        found = coordinate_values(site["fn"])
        return found if isinstance(found, str) else None

    def draw(self, fn: Any, step: int, args: tuple = (), kwargs: Mapping[str, Any] | None = None) -> Draw:
        return detached_draw(fn, args, kwargs)

    def surrogate(self, view: SiteView) -> Tensor | None:
        values = coordinate_values(view.fns[0])
        if len(values) == 1:
            return None
        element_dim = values.dim() - 1
        picks = others(view.value, values, element_dim)
        gain = gains(view, values[picks], element_dim)
        log_q = coordinate_log_probs(view, values)
        dims = max(gain.dim(), log_q.dim(), picks.dim())
        gain, log_q, picks = (_with_dims(tensor, dims) for tensor in (gain, log_q, picks))
        shape = torch.broadcast_shapes(log_q.shape[1:], picks.shape[1:])
        q = log_q.expand(len(values), *shape).gather(0, picks.expand(len(picks), *shape)).exp()
        # The difference to the drawn value replaces f: the derivatives of q sum to zero over the values.
        terms = (q * torch.where(q > 0, gain, torch.zeros_like(gain))).sum(0)
        return view.sum_event(terms.reshape(terms.shape + (1,) * element_dim))


def others(value: Tensor, values: Tensor, element_dim: int) -> Tensor:
    """For each coordinate the indices of the values other than its own, ``(V − 1, *coordinates)``."""
    element = values.shape[1:]
    listed = values.reshape(values.shape[:1] + (1,) * (value.dim() - element_dim) + element)
    same = value.unsqueeze(0) == listed
    same = same.flatten(-element_dim).all(-1) if element_dim else same
    steps = torch.arange(1, len(values), device=value.device).reshape((-1,) + (1,) * (same.dim() - 1))
    return (same.int().argmax(0) + steps) % len(values)


def _with_dims(tensor: Tensor, dims: int) -> Tensor:
    """The tensor with ``dims`` dimensions; new ones are inserted after the first."""
    return tensor.reshape(tensor.shape[:1] + (1,) * (dims - tensor.dim()) + tensor.shape[1:])


def coordinate_log_probs(view: SiteView, values: Tensor) -> Tensor:
    """log qᵢ(v) for every value and coordinate, ``(V, …, K, *plates, *coordinates)``, differentiable."""
    element_dim = values.dim() - 1
    coordinate_dim = view.event_dim - element_dim
    found = []
    for fn in view.fns:
        base = elementary(fn)
        batch = tuple(fn.batch_shape) + tuple(fn.event_shape[:coordinate_dim])
        listed = values.reshape(values.shape[:1] + (1,) * len(base.batch_shape) + values.shape[1:])
        log_q = base.log_prob(listed).movedim(0, -1).expand(batch + values.shape[:1])
        found.append(pad_left(log_q, -view.particle_dim + coordinate_dim + 1))
    dim = view.particle_dim - coordinate_dim - 1
    joined = found[0] if len(found) == 1 else torch.cat(torch.broadcast_tensors(*found), dim=dim)
    return joined.movedim(-1, 0)


estimators.register("local-expectation", LocalExpectation)
