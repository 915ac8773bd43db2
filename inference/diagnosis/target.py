"""The posterior of some latents in unconstrained coordinates: prior, likelihood, draws, and the inverse map."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from pyro import poutine
from pyro.poutine.util import site_is_subsample
from torch.distributions import Normal, biject_to, constraints

from ...errors import BadInput
from ..posterior.runner import Pass, Sweep
from ..posterior.sites import Block, SiteLayout
from .units import direction, from_units, plain_support, to_units, turned

_NORMAL = Normal(torch.zeros((), dtype=torch.float64), 1.0)


class Target:
    """Prior and likelihood of some latents as functions of unconstrained numbers ``(particles, units, d)``.

    The other latents are held at ``given``. Each unit is an element of ``plates``; ``()`` makes one unit of everything.

    Masked elements of latents have no density in the programs. Here they are standard normal, independently of all
    else, so that they add nothing to the evidence and draws of them are no worse than any.

    Angles lie within half a turn of the guide's mean direction: a density that repeats itself is counted once.

    ``summing`` are the programs of :func:`summing_out`: the sites that the model enumerates are then summed out.
    """

    def __init__(
        self,
        sweep: Sweep,
        sites: Sequence[str],
        plates: Sequence[str],
        given: Mapping[str, torch.Tensor],
        summing: Sweep | None = None,
    ):
        self.sweep, self.sites, self.plates, self.given = sweep, list(sites), tuple(plates), dict(given)
        self.summing = summing
        self.block = sweep.whole() or Block()
        run = sweep.model_run(1, self.block, self.given)
        self.maps, self.events, self.sizes = {}, {}, {}
        for name in self.sites:
            layout = sweep.model_sites[name]
            if layout.discrete:
                self.sizes[name] = layout.numel
                continue
            self.maps[name] = biject_to(plain_support(sweep.supports[name]))
            free = self.maps[name].inv(run.value(name))
            self.events[name] = tuple(free.shape[1 + len(layout.names) :])
            self.sizes[name] = to_units(free, layout, self.plates).shape[-1]
        self.masked = bool(sweep.masked_latents & self.maps.keys())
        self.dimension = sum(self.sizes.values())
        self._centre: torch.Tensor | None = None
        if any(name in sweep.angles for name in self.maps):
            angles = [torch.full((self.sizes[name],), name in sweep.angles) for name in self.sites]
            self._is_angle = torch.cat(angles)
            self._centre = direction(self.of_guide(min(200, 10 * self._at_once())))

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
            free = self.free({name: one.value(name) for name in self.sites}).cpu().double()
            hidden = self._hidden(one)
            parts.append(free if hidden is None else torch.where(hidden, torch.randn_like(free), free))
        return self.turned(torch.cat(parts))

    def turned(self, free: torch.Tensor) -> torch.Tensor:
        """The same numbers, with angles where their density counts."""
        return free if self._centre is None else torch.where(self._is_angle, turned(free, self._centre), free)

    def free(self, values: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """``(particles, units, d)`` of values in the shapes of their layouts."""
        layouts = self.sweep.model_sites
        return torch.cat(
            [to_units(self.maps[name].inv(values[name]), layouts[name], self.plates) for name in self.sites], -1
        )

    def values(self, free: torch.Tensor) -> dict[str, torch.Tensor]:
        """The constrained values."""
        return {name: self.maps[name](laid) for name, laid in self._laid(free).items()}

    def _laid(self, free: torch.Tensor) -> dict[str, torch.Tensor]:
        """The unconstrained numbers of each site, in the shape of its layout."""
        found, start = {}, 0
        for name in self.sites:
            layout, size = self.sweep.model_sites[name], self.sizes[name]
            laid = from_units(free[..., start : start + size], layout, self.plates, self.events[name])
            found[name] = laid.to(self.sweep.device, layout.dtype)
            start += size
        return found

    def _jacobian(self, laid: Mapping[str, torch.Tensor], values: Mapping[str, torch.Tensor], run: Pass):
        """The log-determinant ``(particles, units)`` of the map's Jacobian, without masked elements."""
        total = torch.zeros((), dtype=torch.float64)
        for name, free in laid.items():
            layout = self.sweep.model_sites[name]
            slope = self.maps[name].log_abs_det_jacobian(free, values[name]).double().cpu()
            slope = slope.reshape(*slope.shape[: 1 + len(layout.names)], -1).sum(-1)
            shown = run.shown(name)
            if shown is not None:
                slope = slope * shown.reshape(*slope.shape, -1).any(-1).cpu()
            total = total + to_units(slope, layout, self.plates).sum(-1)
        return total

    def _hidden(self, run: Pass) -> torch.Tensor | None:
        """Which unconstrained numbers ``(particles, units, d)`` are masked in a run; None without masks."""
        if not self.masked:
            return None
        found = []
        for name in self.sites:
            layout, event = self.sweep.model_sites[name], self.events[name]
            batch = (run.count, *layout.sizes)
            shown = run.shown(name)
            if shown is None:
                shown = torch.ones(*batch, *event, dtype=torch.bool)
            elif not (event == layout.event and self._unmoved(name)):
                flat = shown.reshape(*batch, -1)
                if not torch.equal(flat.any(-1), flat.all(-1)):
                    raise BadInput(f"a mask hides a part of each value of {name!r}, whose support is not all numbers")
                shown = flat.any(-1).reshape(*batch, *[1] * len(event)).expand(*batch, *event)
            found.append(to_units(~shown.cpu(), layout, self.plates))
        return torch.cat(found, -1)

    def _unmoved(self, name: str) -> bool:
        """Whether a site's unconstrained numbers are its values."""
        support = plain_support(self.sweep.supports[name])
        while isinstance(support, constraints.independent):
            support = support.base_constraint
        return support is constraints.real

    def reads_masked(self) -> bool:
        """Whether what is not masked depends on masked elements, which have no posterior."""
        if not self.masked:
            return False
        drawn = self.of_guide(4)
        hidden = self._hidden(self.sweep.model_run(4, self.block, self._given(4) | self.values(drawn)))
        moved = torch.where(hidden, torch.randn_like(drawn), drawn)
        before, after = (sum(self(free)) - (_NORMAL.log_prob(free) * hidden).sum(-1) for free in (drawn, moved))
        return not torch.allclose(before, after, rtol=1e-5, atol=1e-4)

    def __call__(self, free: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Log prior (with the Jacobian) and log-likelihood, each ``(particles, units)``."""
        parts = [self._some(free[start : start + self._at_once()]) for start in range(0, len(free), self._at_once())]
        prior, likelihood = (torch.cat(part) for part in zip(*parts, strict=True))
        if self._centre is not None:
            outside = ((free - self._centre).abs() > math.pi) & self._is_angle
            prior = prior.masked_fill(outside.any(-1), -math.inf)
        return prior.nan_to_num(-math.inf), likelihood.nan_to_num(-math.inf)

    def _at_once(self) -> int:
        return min(one.draws_a_run(self.block) for one in (self.sweep, self.summing) if one is not None)

    def _given(self, count: int) -> dict[str, torch.Tensor]:
        return {name: value.expand(count, *value.shape[1:]) for name, value in self.given.items()}

    def _some(self, free: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        laid = self._laid(free)
        values = {name: self.maps[name](one) for name, one in laid.items()}
        fixed, held = self._given(len(free)) | values, {*self.sites, *self.given}
        if self.summing is None:
            run, conditional = self.sweep.model_run(len(free), self.block, fixed), None
        else:
            conditional, run = self.summing.run(len(free), self.block, fixed)
        prior = self._sum(run, lambda name: name in self.sites, len(free)) + self._jacobian(laid, values, run)
        hidden = self._hidden(run)
        if hidden is not None:
            prior = prior + (_NORMAL.log_prob(free) * hidden).sum(-1)
        likelihood = self._sum(run, lambda name: name not in held, len(free))
        if conditional is not None:  # log p(z, x) − log p(z | x) is log p(x) at any z
            summed = self.sweep.summed_out - held
            likelihood = likelihood - self._sum(conditional, lambda name: name in summed, len(free))
        return prior, likelihood

    def _sum(self, run: Pass, chosen, count: int) -> torch.Tensor:
        total = torch.zeros(count, math.prod(self.sweep.sizes[plate] for plate in self.plates), dtype=torch.float64)
        for name, layout in run.layouts.items():
            if layout.kind != "deterministic" and chosen(name) and set(self.plates) <= layout.plates:
                total = (
                    total
                    + to_units(run.log_prob(name, self.plates).cpu(), _kept(layout, self.plates), self.plates)[..., 0]
                )
        return total


def summing_out(sweep: Sweep, options: Mapping[str, Any]) -> Sweep:
    """The model with a guide of its prior and the exact conditional of the sites that it enumerates.

    The conditional is then known at any values of the other latents, also where the guide computes these.
    """
    shown = set(sweep.latents) - sweep.summed_out

    def prior(*args: Any, **kwargs: Any) -> None:
        hidden = poutine.block(hide_fn=lambda site: not (site["name"] in shown or site_is_subsample(site)))
        # The density is not asked for, and may depend on the draw of a hidden site.
        with hidden, poutine.mask(mask=False):
            sweep.model(*args, **kwargs)

    return Sweep(sweep.model, prior, sweep.args, sweep.kwargs, **options)


def _kept(layout: SiteLayout, plates: Sequence[str]) -> SiteLayout:
    names = tuple(name for name in layout.names if name in plates)
    return replace(layout, names=names)
