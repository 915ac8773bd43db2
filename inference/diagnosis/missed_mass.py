"""Evidence found from the prior, without the guide: tempered particles that see every mode the prior reaches."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch.distributions import biject_to

from ..engine.progress import Progress
from ..posterior.runner import Block, Layout, Pass, Sweep


def to_units(value: torch.Tensor, layout: Layout, plates: Sequence[str]) -> torch.Tensor:
    """``(S, *batch, *event)`` as ``(S, units, numbers of a unit)``, a unit being an element of ``plates``."""
    axes = [1 + layout.names.index(plate) for plate in plates]
    moved = value.movedim(axes, list(range(1, 1 + len(axes))))
    units = math.prod(moved.shape[1 : 1 + len(axes)])
    return moved.reshape(len(value), units, -1)


def from_units(flat: torch.Tensor, layout: Layout, plates: Sequence[str], event: Sequence[int]) -> torch.Tensor:
    """The way back; ``event`` is the shape of a value's event dimensions."""
    sizes = dict(zip(layout.names, layout.sizes, strict=True))
    others = [size for name, size in zip(layout.names, layout.sizes, strict=True) if name not in plates]
    moved = flat.reshape(len(flat), *(sizes[plate] for plate in plates), *others, *event)
    axes = [1 + layout.names.index(plate) for plate in plates]
    return moved.movedim(list(range(1, 1 + len(axes))), axes)


class Target:
    """Prior and likelihood of some latents as functions of unconstrained numbers ``(particles, units, d)``.

    The other latents are held at ``given``. Each unit is an element of ``plates``; ``()`` makes one unit of everything.
    """

    def __init__(self, sweep: Sweep, sites: Sequence[str], plates: Sequence[str], given: Mapping[str, torch.Tensor]):
        self.sweep, self.sites, self.plates, self.given = sweep, list(sites), tuple(plates), dict(given)
        self.block = sweep.whole() or Block()
        run = sweep.model_run(1, self.block, self.given)
        self.maps, self.events, self.sizes = {}, {}, {}
        for name in self.sites:
            layout = sweep.model_sites[name]
            self.maps[name] = biject_to(_plain(sweep.supports[name]))
            free = self.maps[name].inv(run.value(name))
            self.events[name] = tuple(free.shape[1 + len(layout.names) :])
            self.sizes[name] = to_units(free, layout, self.plates).shape[-1]
        self.dimension = sum(self.sizes.values())

    def draw(self, particles: int) -> torch.Tensor:
        """Unconstrained draws of the prior."""
        parts = []
        for start in range(0, particles, self._at_once()):
            count = min(self._at_once(), particles - start)
            run = self.sweep.model_run(count, self.block, self._given(count))
            parts.append(
                torch.cat(
                    [
                        to_units(self.maps[name].inv(run.value(name)), self.sweep.model_sites[name], self.plates)
                        for name in self.sites
                    ],
                    -1,
                )
            )
        return torch.cat(parts).cpu()

    def __call__(self, free: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Log prior (with the Jacobian) and log-likelihood, each ``(particles, units)``."""
        parts = [self._some(free[start : start + self._at_once()]) for start in range(0, len(free), self._at_once())]
        prior, likelihood = (torch.cat(part) for part in zip(*parts, strict=True))
        return prior.nan_to_num(-math.inf), likelihood.nan_to_num(-math.inf)

    def _at_once(self) -> int:
        return self.sweep.draws_a_run(self.block)

    def _given(self, count: int) -> dict[str, torch.Tensor]:
        return {name: value.expand(count, *value.shape[1:]) for name, value in self.given.items()}

    def _some(self, free: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        values, jacobian = self._given(len(free)), torch.zeros(free.shape[:2], dtype=torch.float64)
        start = 0
        for name in self.sites:
            layout, size = self.sweep.model_sites[name], self.sizes[name]
            laid = from_units(free[..., start : start + size], layout, self.plates, self.events[name])
            laid = laid.to(self.sweep.device, layout.dtype)
            start += size
            values[name] = self.maps[name](laid)
            slope = self.maps[name].log_abs_det_jacobian(laid, values[name]).double().cpu()
            jacobian = jacobian + to_units(slope, layout, self.plates).sum(-1)
        run = self.sweep.model_run(len(free), self.block, values)
        prior = self._sum(run, lambda name: name in self.sites, len(free)) + jacobian
        return prior, self._sum(run, lambda name: name not in self.sites and name not in self.given, len(free))

    def _sum(self, run: Pass, chosen, count: int) -> torch.Tensor:
        total = torch.zeros(count, math.prod(self.sweep.sizes[plate] for plate in self.plates), dtype=torch.float64)
        for name, layout in run.layouts.items():
            if layout.kind != "deterministic" and chosen(name) and set(self.plates) <= layout.plates:
                total = (
                    total
                    + to_units(run.log_prob(name, self.plates).cpu(), _kept(layout, self.plates), self.plates)[..., 0]
                )
        return total


def _plain(support: Any) -> Any:
    """A mixture has its components' support, under a wrapper that no map knows."""
    while type(support).__name__ == "MixtureSameFamilyConstraint":
        support = support.base_constraint
    return support


def _kept(layout: Layout, plates: Sequence[str]) -> Layout:
    names = tuple(name for name in layout.names if name in plates)
    return replace(layout, names=names)


def annealed_evidence(
    target: Target, particles: int = 500, moves: int = 6, most: int = 80, progress: Progress | None = None
) -> np.ndarray:
    """log p(x) of each unit ``(units,)`` by sequential Monte Carlo from the prior to the posterior.

    Each unit's temperature falls so that half of the particles count; between temperatures they take random-walk
    Metropolis steps with their own covariance. Del Moral, Doucet & Jasra 2006.
    """
    free = target.draw(particles).double()
    prior, likelihood = target(free)
    _, units, size = free.shape
    inverse = torch.zeros(units, dtype=torch.float64)
    evidence = torch.zeros(units, dtype=torch.float64)
    step = torch.full((units,), 2.38 / math.sqrt(size), dtype=torch.float64)
    for temperature in range(most):
        higher = _next(inverse, likelihood)
        gain = (higher - inverse) * likelihood
        gain = gain.masked_fill((higher == inverse).expand_as(gain), 0.0)
        evidence = evidence + torch.logsumexp(gain, 0) - math.log(particles)
        if bool((higher >= 1).all()):
            return evidence.numpy()
        inverse = higher
        picked = _resampled(gain)
        free = free.gather(0, picked.unsqueeze(-1).expand_as(free))
        prior, likelihood = prior.gather(0, picked), likelihood.gather(0, picked)
        root = _root_covariance(free)
        for move in range(moves):
            if progress is not None:
                progress.step(temperature * moves + move)
            noise = torch.randn_like(free)
            proposed = free + step[:, None] * torch.einsum("uij,puj->pui", root, noise)
            new_prior, new_likelihood = target(proposed)
            ratio = new_prior + inverse * new_likelihood - prior - inverse * likelihood
            accepted = torch.rand_like(ratio).log() < ratio
            free = torch.where(accepted.unsqueeze(-1), proposed, free)
            prior = torch.where(accepted, new_prior, prior)
            likelihood = torch.where(accepted, new_likelihood, likelihood)
            step = step * (accepted.double().mean(0) - 0.3).exp()
    return np.full(units, -math.inf)


def _next(inverse: torch.Tensor, likelihood: torch.Tensor) -> torch.Tensor:
    """The largest inverse temperature of each unit that leaves half of the particles' weight."""
    low, high = inverse.clone(), torch.ones_like(inverse)
    enough = _effective((high - inverse) * likelihood) >= 0.5
    for _ in range(40):
        middle = (low + high) / 2
        good = _effective((middle - inverse) * likelihood) >= 0.5
        low, high = torch.where(good, middle, low), torch.where(good, high, middle)
    return torch.where(enough, torch.ones_like(low), torch.maximum(low, inverse + 1e-9).clamp(max=1.0))


def _effective(gain: torch.Tensor) -> torch.Tensor:
    weight = (gain - gain.max(0).values).exp()
    return weight.sum(0) ** 2 / (weight**2).sum(0) / len(gain)


def _resampled(gain: torch.Tensor) -> torch.Tensor:
    """Systematic resampling of each unit's particles ``(particles, units)``."""
    count = len(gain)
    weight = torch.softmax(gain, 0).nan_to_num(1 / count)
    at = (
        torch.arange(count, dtype=torch.float64).unsqueeze(1) + torch.rand(1, gain.shape[1], dtype=torch.float64)
    ) / count
    edges = weight.cumsum(0)
    return torch.searchsorted(edges.T.contiguous(), at.T.contiguous()).clamp(max=count - 1).T.contiguous()


def _root_covariance(free: torch.Tensor) -> torch.Tensor:
    centred = free - free.mean(0)
    covariance = torch.einsum("pui,puj->uij", centred, centred) / len(free)
    spread = covariance.diagonal(dim1=-2, dim2=-1).mean(-1).clamp(min=1e-12)
    covariance = covariance + 1e-6 * spread[:, None, None] * torch.eye(free.shape[-1], dtype=torch.float64)
    root, failed = torch.linalg.cholesky_ex(covariance)
    alone = covariance.diagonal(dim1=-2, dim2=-1).sqrt().diag_embed()
    return torch.where(failed[:, None, None] != 0, alone, root)
