"""The units of verdicts: data with their local latents, and the global latents, with weights and draws of each."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch.distributions import biject_to

from ...errors import PROGRAM_ERRORS
from ..posterior.collection import Collection
from ..posterior.importance import importance_ess
from ..posterior.sites import SiteLayout
from .thresholds import BARELY, ENOUGH, INNER_NOISE, allowed


def to_units(value: torch.Tensor, layout: SiteLayout, plates: Sequence[str]) -> torch.Tensor:
    """``(S, *batch, *event)`` as ``(S, units, numbers per unit)``, where a unit is an element of ``plates``."""
    axes = [1 + layout.names.index(plate) for plate in plates]
    moved = value.movedim(axes, list(range(1, 1 + len(axes))))
    units = math.prod(moved.shape[1 : 1 + len(axes)])
    return moved.reshape(len(value), units, -1)


def from_units(flat: torch.Tensor, layout: SiteLayout, plates: Sequence[str], event: Sequence[int]) -> torch.Tensor:
    """The inverse of `to_units`; ``event`` is the shape of a value's event dimensions."""
    sizes = dict(zip(layout.names, layout.sizes, strict=True))
    others = [size for name, size in zip(layout.names, layout.sizes, strict=True) if name not in plates]
    moved = flat.reshape(len(flat), *(sizes[plate] for plate in plates), *others, *event)
    axes = [1 + layout.names.index(plate) for plate in plates]
    return moved.movedim(list(range(1, 1 + len(axes))), axes)


def turned(angles: torch.Tensor, centre: torch.Tensor) -> torch.Tensor:
    """The same angles within half a turn of ``centre``."""
    return (angles - centre + math.pi).remainder(2 * math.pi) - math.pi + centre


def direction(angles: torch.Tensor) -> torch.Tensor:
    """The mean direction of angles along the first dimension."""
    return torch.atan2(angles.sin().mean(0), angles.cos().mean(0))


@dataclass
class Units:
    """Units with importance weights: log-weights ``(units, S)`` and the latents' numbers ``(units, S, d)``.

    ``khat`` ``(units,)`` is that of ``vi_stats``; ``shown`` ``(units, d)`` says which numbers are unmasked, ``fixed``
    ``(d,)`` which cannot vary in the model. ``joint`` says that one unit holds the latents of all data. The log-weights
    of global latents have noise of variance ``noise``, from the ``inner`` draws that integrate out the local latents.
    """

    what: str
    sites: list[str]
    plates: tuple[str, ...]
    log_weight: np.ndarray
    khat: np.ndarray
    values: np.ndarray
    names: list[str]
    discrete: np.ndarray
    binary: np.ndarray
    joint: bool = False
    noise: float = 0.0
    inner: int = 0
    shown: np.ndarray = None  # type: ignore[assignment]
    fixed: np.ndarray = None  # type: ignore[assignment]

    def __post_init__(self):
        if self.fixed is None:
            self.fixed = np.zeros(len(self.names), dtype=bool)
        if self.shown is None:
            self.shown = np.ones((len(self.values), len(self.names)), dtype=bool)

    def __len__(self) -> int:
        return len(self.log_weight)

    @property
    def draws(self) -> int:
        return self.log_weight.shape[1]

    @cached_property
    def ess(self) -> np.ndarray:
        return importance_ess(self.log_weight)

    def clear(self, least: float) -> np.ndarray:
        """The units ``(units,)`` with at least ``least`` effective draws."""
        return (self.ess >= least * (1 - 1e-9)) & (self.noise <= INNER_NOISE)

    @property
    def telling(self) -> np.ndarray:
        """The units whose weights can show that the guide is wrong."""
        return self.clear(BARELY)

    @property
    def weak(self) -> tuple[str, str] | None:
        """Why these weights cannot support an ok, with an advice; None if they can."""
        if self.noise > INNER_NOISE:
            more = self.inner * self.noise / INNER_NOISE
            helps = f"pass num_local_samples={_round_up(more)}, or " if math.isfinite(more) else ""
            return (
                f"integrating the local latents out over {self.inner} draws leaves noise of variance {self.noise:.2g} "
                "in the log-weights",
                f"{helps}improve the guide of the local latents",
            )
        poor = int((~self.clear(ENOUGH)).sum())
        if poor > allowed(len(self)):
            least = float(self.ess.min())
            more = _round_up(self.draws * ENOUGH / least) if least else math.inf
            helps = f"num_samples={more}" if more <= 100_000 else "a better guide: more training, or a richer family"
            return (
                f"in {poor} of {len(self)} the weighted draws count as fewer than {ENOUGH:.0f} (least {least:.1f} of "
                f"{self.draws})",
                f"{helps} would give a verdict",
            )
        return None


def _round_up(number: float) -> int:
    """Rounded up to two digits."""
    scale = 10 ** max(0, math.floor(math.log10(max(number, 1))) - 1)
    return math.ceil(number / scale) * scale


def units_of(collection: Collection, stats: Mapping[str, tuple[Sequence[str], np.ndarray]]) -> list[Units]:
    """The units of data with local latents, and of the global latents; ``stats`` are the numbers of ``vi_stats``."""
    sweep = collection.sweep
    if not sweep.local:
        weight = collection.log_weight()[0]
        joint = _units("all latents together", sweep.latents, (), weight, "khat", collection, stats)
        joint.joint = sweep.tied
        return [joint]
    weight = collection.unit_log_weight()[0]
    groups = [_units("data", sweep.local, sweep.data_plates, weight, "khat", collection, stats)]
    shared = collection.global_log_weight()
    if shared is not None:
        one = _units("global latents", sweep.shared, sweep.shared_plates, shared[0], "khat_global", collection, stats)
        one.inner = collection.num_local_samples
        # The relative variance of one weight, divided by the draws of each integral.
        with np.errstate(divide="ignore"):  # a datum whose weights are all zero
            of_data = (groups[0].draws / groups[0].ess - 1) / one.inner
        one.noise = float(of_data.sum() / len(one))
        groups.append(one)
    return groups


def _units(what, sites: Sequence[str], plates: Sequence[str], log_weight: np.ndarray, khat: str, collection, stats):
    layouts = collection.sweep.model_sites
    values, names, discrete, shown, fixed = [], [], [], [], []
    draws = len(log_weight)
    for site in sites:
        drawn = torch.from_numpy(collection.array("posterior", site)[0][:draws])
        flat = to_units(drawn, layouts[site], plates).numpy()
        values.append(flat)
        names += [site] if flat.shape[-1] == 1 else [f"{site}[{place}]" for place in range(flat.shape[-1])]
        discrete += [layouts[site].discrete] * flat.shape[-1]
        known = torch.from_numpy(collection.shown.get(site, np.ones(layouts[site].shape, dtype=bool)))
        shown.append(to_units(known.unsqueeze(0), layouts[site], plates)[0].numpy())
        fixed.append(_fixed(drawn[:1], layouts[site], collection.sweep.supports[site], plates))
    joined = np.moveaxis(np.concatenate(values, -1), 0, 1)
    binary = np.array(discrete) & ((joined == 0) | (joined == 1)).all((0, 1))
    weight = log_weight.reshape(draws, -1).T
    shapes = stats[khat][1][0].reshape(-1)
    return Units(
        what,
        list(sites),
        tuple(plates),
        weight,
        shapes,
        joined,
        names,
        np.array(discrete),
        binary,
        shown=np.concatenate(shown, -1),
        fixed=np.concatenate(fixed),
    )


def _fixed(drawn: torch.Tensor, layout: SiteLayout, support: Any, plates: Sequence[str]) -> np.ndarray:
    """Which numbers ``(d,)`` of a unit the prior or its support determines, as the zeros of a triangular factor."""
    found = torch.full(drawn.shape, layout.point)
    if not (layout.point or layout.discrete):
        with suppress(*PROGRAM_ERRORS):  # a support without a map from all numbers
            mapped = biject_to(plain_support(support))
            free = mapped.inv(drawn)
            places = torch.linspace(-1, 1, free.numel(), dtype=free.dtype).reshape(free.shape)
            found = torch.stack([mapped(places).cpu() == drawn, mapped(-1.5 * places + 0.1).cpu() == drawn]).all(0)
    return to_units(found, layout, plates)[0].all(0).numpy()


def plain_support(support: Any) -> Any:
    """A mixture has its components' support; torch has no map for the wrapper."""
    while type(support).__name__ == "MixtureSameFamilyConstraint":
        support = support.base_constraint
    return support
