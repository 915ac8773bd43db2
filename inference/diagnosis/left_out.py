"""Diagnostic ``missed-mass`` of discrete latents: values that the guide leaves out and the model does not.

One latent is moved through all of its values while the others stay at the guide's draws; the model's log-density gives
the probability of each value. Values that the guide draws less than a twentieth as often carry no importance weight, so
that neither k̂ nor the evidence shows their mass. One half of the draws says which values these are, the other half how
often the guide draws them: among many rare values some are always absent from the draws, of an exact guide too.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from ..estimators._distributions import elementary
from ..posterior.runner import Sweep
from ..posterior.sites import Block, SiteLayout
from .report import ALARM, CANNOT_SAY, OK, Verdict
from .thresholds import MASS, SELDOM, SURE, allowed
from .units import from_units, to_units

_DRAWS, _RUNS = 500, 120  # of the guide; of the model at all of these draws
_FEW_DRAWS, _FEW_RUNS = 60, 24  # where draws run one by one


@dataclass(frozen=True)
class _Coordinate:
    """A discrete number, or a one-hot vector, among those of a unit: its place, and the values that it may take."""

    site: str
    place: slice
    values: torch.Tensor  # (values, numbers)
    name: str


def left_out(
    sweep: Sweep,
    sites: Sequence[str],
    plates: tuple[str, ...],
    given: Mapping[str, torch.Tensor],
    unsearched: Sequence[str],
) -> Verdict:
    """The verdict on these latents in units of ``plates``; those outside are ``given``, and some ``unsearched``."""
    block = sweep.whole() or Block()
    draws, runs = (_DRAWS, _RUNS) if sweep.vectorized else (_FEW_DRAWS, _FEW_RUNS)
    found = list(_coordinates(sweep, sites, plates, block))
    picked = _within(found, runs)
    units = math.prod(sweep.sizes[plate] for plate in plates)
    what = f"{units} data" if plates else "all latents together"
    if not picked:
        reason = "the discrete latents have no finite list of values, and the search moves continuous ones"
        return Verdict("missed-mass", CANNOT_SAY, f"{what}: {reason}", advice=_REFIT)
    selecting, testing = (_probabilities(sweep, plates, given, block, picked, draws // 2) for _ in range(2))
    lacking, noise, sure = _lacking(selecting, testing, draws // 2)
    shown = np.stack([np.broadcast_to(_shown(sweep, one, plates, block), len(lacking)) for one in picked], -1)
    lacking, noise = lacking * shown, noise * shown
    worst = int(lacking.max(0).argmax())
    high = lacking > MASS
    count, many = int((high & sure).any(-1).sum()), allowed(units)
    unclear = int((high & ~sure | (2 * noise > MASS)).any(-1).sum())
    nats, limit = -np.log1p(-np.array([lacking.max(), MASS]))
    text = (
        f"{what}: given the other latents, values of {picked[worst].name} that the guide hardly draws hold up to "
        f"{lacking.max():.2f} more of the model's probability than of the guide's ({nats:.2f} nats, limit {limit:.2f}, "
        f"exceeded in {count}; {many} allowed)"
    )
    numbers = float(nats), float(limit)
    if count > many:
        advice = "the guide's probabilities leave these values out: train longer, and let the guide read the data"
        return Verdict("missed-mass", ALARM, text, *numbers, advice)
    if unsearched:
        text += (
            f"; the global latents {', '.join(unsearched[:5])} were not searched: if they name components or classes, "
            "the guide may have one labelling of them, and log_evidence is then that of this one"
        )
        return Verdict("missed-mass", CANNOT_SAY, text, *numbers, _REFIT)
    if unclear > many:
        text += f"; in {unclear} these are too many rare values for {draws} draws"
        return Verdict("missed-mass", CANNOT_SAY, text, *numbers, _REFIT)
    numbers_of_a_unit = sum(_numbers_of(sweep.model_sites[site], sweep, plates) for site in sites)
    if len(found) == 1 and numbers_of_a_unit == found[0].place.stop - found[0].place.start:
        return Verdict("missed-mass", OK, text, *numbers, "nothing")  # all values of all latents were listed
    text += f"; {len(picked)} latents were moved one at a time, which does not find values that differ in several"
    return Verdict("missed-mass", CANNOT_SAY, text, *numbers, _REFIT)


def _lacking(
    selecting: tuple[list[np.ndarray], list[np.ndarray]],
    testing: tuple[list[np.ndarray], list[np.ndarray]],
    draws: int,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """What the guide lacks at the values that it hardly draws, its standard error, and whether that is no chance.

    Each is ``(units, coordinates)``. An exact guide draws these values as a coin with the model's mean probability, or
    more evenly (Hoeffding 1956).
    """
    from scipy.stats import binom

    found = []
    for ours, often, model, guide in zip(*selecting, *testing, strict=True):
        seldom = often < SELDOM * ours
        mass, drawn = ((side * seldom).sum(0).clip(0, 1) for side in (model, guide))
        found.append(
            (mass - drawn, np.sqrt(mass * (1 - mass) / draws), binom.cdf(np.round(drawn * draws), draws, mass))
        )
    lacking, noise, chance = (np.stack(side, -1) for side in zip(*found, strict=True))
    return lacking.clip(0, 1 - 1e-12), noise, chance * chance.size < SURE


_REFIT = "num_refits=4 compares fits from other initial values, which may find other modes"


def _numbers_of(layout: SiteLayout, sweep: Sweep, plates: Sequence[str]) -> int:
    """How many numbers a unit has of a site."""
    return layout.numel // math.prod(sweep.sizes[plate] for plate in plates)


def _shown(sweep: Sweep, one: _Coordinate, plates: Sequence[str], block: Block) -> np.ndarray | bool:
    """Whether a coordinate has a posterior in each unit: under a mask all values are as probable."""
    if one.site not in sweep.masked_latents:
        return True
    shown = sweep.run(1, block)[1].shown(one.site)
    return shown is None or to_units(shown, sweep.model_sites[one.site], plates)[0, :, one.place].any(-1).cpu().numpy()


def _coordinates(sweep: Sweep, sites: Sequence[str], plates: Sequence[str], block: Block) -> Iterator[_Coordinate]:
    model = sweep.run(1, block)[1]
    for site in sites:
        layout = sweep.model_sites[site]
        size = _numbers_of(layout, sweep, plates)
        if layout.values == "one-hot":
            width = layout.event[-1]
            values = torch.eye(width, dtype=layout.dtype, device=sweep.device)
        elif layout.values in ("classes", "binary"):
            width = 1
            classes = 2 if layout.values == "binary" else elementary(model.seen[site].site["fn"]).probs.shape[-1]
            values = torch.arange(classes, device=sweep.device).to(layout.dtype).unsqueeze(-1)
        else:
            continue
        for start in range(0, size, width):
            name = site if size == width else f"{site}[{start // width}]"
            yield _Coordinate(site, slice(start, start + width), values, name)


def _within(found: Sequence[_Coordinate], runs: int) -> list[_Coordinate]:
    """As many of them, evenly spaced, as so many runs of the model can move."""
    if not found:
        return []
    count = max(1, min(len(found), runs // max(len(one.values) for one in found)))
    return [found[place] for place in np.unique(np.linspace(0, len(found) - 1, count).round().astype(int))]


def _probabilities(
    sweep: Sweep,
    plates: tuple[str, ...],
    given: Mapping[str, torch.Tensor],
    block: Block,
    picked: Sequence[_Coordinate],
    draws: int,
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Of each coordinate ``(values, units)``: the model's mean probability given the others, and the guide's share."""
    ours: list[list[torch.Tensor]] = [[] for _ in picked]
    often: list[list[torch.Tensor]] = [[] for _ in picked]
    for start in range(0, draws, sweep.draws_a_run(block)):
        count = min(sweep.draws_a_run(block), draws - start)
        fixed = {name: value.expand(count, *value.shape[1:]) for name, value in given.items()}
        guide = sweep.guide_run(count, block, fixed)
        drawn = {name: guide.whole_value(name) for name in sweep.latents}
        for place, one in enumerate(picked):
            layout = sweep.model_sites[one.site]
            flat = to_units(drawn[one.site], layout, plates)
            densities = []
            for value in one.values:
                moved = flat.clone()
                moved[..., one.place] = value
                changed = {one.site: from_units(moved, layout, plates, layout.event)}
                run = sweep.model_run(count, block, {**drawn, **changed})
                densities.append(run.joint_log_prob(plates).reshape(count, -1))
            # Where no value is possible the other latents are not, and nothing is known of this one.
            probability = torch.stack(densities).softmax(0).nan_to_num(0.0)
            ours[place].append(probability.sum(1))
            at = (flat[..., one.place].unsqueeze(0) == one.values[:, None, None]).all(-1)
            often[place].append(at.double().sum(1))
    model = [(torch.stack(parts).sum(0) / draws).cpu().numpy() for parts in ours]
    return model, [(torch.stack(parts).sum(0) / draws).cpu().numpy() for parts in often]
