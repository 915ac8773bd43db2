"""The posterior of some latents in unconstrained coordinates: prior, likelihood, draws, and the inverse map."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch.distributions import biject_to

from ..posterior.runner import Pass, Sweep
from ..posterior.sites import Block, SiteLayout
from .units import from_units, to_units


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
            if layout.discrete:
                self.sizes[name] = layout.numel
                continue
            self.maps[name] = biject_to(_plain(sweep.supports[name]))
            free = self.maps[name].inv(run.value(name))
            self.events[name] = tuple(free.shape[1 + len(layout.names) :])
            self.sizes[name] = to_units(free, layout, self.plates).shape[-1]
        self.dimension = sum(self.sizes.values())

    def draw(self, particles: int) -> torch.Tensor:
        """Unconstrained draws of the prior."""
        return self._drawn(particles, lambda count: self.sweep.model_run(count, self.block, self._given(count)))

    def of_guide(self, particles: int) -> torch.Tensor:
        """Unconstrained draws of the guide."""
        return self._drawn(particles, lambda count: self.sweep.run(count, self.block, self._given(count))[1])

    def _drawn(self, particles: int, run) -> torch.Tensor:
        parts = []
        for start in range(0, particles, self._at_once()):
            one = run(min(self._at_once(), particles - start))
            parts.append(self.free({name: one.value(name) for name in self.sites}))
        return torch.cat(parts).cpu().double()

    def free(self, values: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """``(particles, units, d)`` of values in the shapes of their layouts."""
        layouts = self.sweep.model_sites
        return torch.cat(
            [to_units(self.maps[name].inv(values[name]), layouts[name], self.plates) for name in self.sites], -1
        )

    def values(self, free: torch.Tensor) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        """The constrained values, and the log-determinant ``(particles, units)`` of the map's Jacobian."""
        values, jacobian = {}, torch.zeros(free.shape[:2], dtype=torch.float64)
        start = 0
        for name in self.sites:
            layout, size = self.sweep.model_sites[name], self.sizes[name]
            laid = from_units(free[..., start : start + size], layout, self.plates, self.events[name])
            laid = laid.to(self.sweep.device, layout.dtype)
            start += size
            values[name] = self.maps[name](laid)
            slope = self.maps[name].log_abs_det_jacobian(laid, values[name]).double().cpu()
            jacobian = jacobian + to_units(slope, layout, self.plates).sum(-1)
        return values, jacobian

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
        values, jacobian = self.values(free)
        run = self.sweep.model_run(len(free), self.block, self._given(len(free)) | values)
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
    """A mixture has its components' support; torch has no map for the wrapper."""
    while type(support).__name__ == "MixtureSameFamilyConstraint":
        support = support.base_constraint
    return support


def _kept(layout: SiteLayout, plates: Sequence[str]) -> SiteLayout:
    names = tuple(name for name in layout.names if name in plates)
    return replace(layout, names=names)
