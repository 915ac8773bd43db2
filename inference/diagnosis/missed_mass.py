"""Diagnostic ``missed-mass``: posterior mass outside the guide, found by a search from the prior and by mirror images.

Proposals are clusters with heavy tails (t distributions) of particles annealed from the prior, of the guide's draws,
and of reflections and exchanges of these with a similar log-density. The evidence by importance sampling from their
mixture is compared with that of the guide's own draws. Discrete latents that the model enumerates are summed out. Where
the guide draws a discrete latent, see ``left_out``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ...errors import PROGRAM_ERRORS, GumboError, first_line
from ..engine.progress import Progress, Stages
from ..engine.scopes import quietly
from ..posterior.importance import khat, khat_limit, log_evidence
from ..posterior.runner import Sweep
from .annealing import annealed
from .gaps import unit_weights
from .images import images_of, in_other_modes
from .left_out import left_out
from .proposals import Cluster, clusters, mixture_evidence
from .report import ALARM, CANNOT_SAY, OK, Verdict, not_done, three_way
from .rows import few_rows
from .target import Target, summing_out
from .thresholds import KNOWN, MASS, SEARCHED, allowed

_ROWS = 16
# How many times as many draws of the proposals where their error is large beside the limit.
_MORE = 4
LIMIT = -math.log1p(-MASS)  # in nats of evidence
_MASKS = "mask what depends on a masked latent too"
_PAPER = "Neal 2001; Del Moral et al. 2006"


def missed_mass(
    sweep: Sweep,
    num_samples: int,
    seed: int | None,
    skipped: dict[str, str],
    options: Mapping[str, Any],
    say: Stages,
) -> dict[str, Verdict]:
    """Whether a search of the posterior finds more evidence than the guide's draws."""

    def undone(reason: str, advice: str) -> dict[str, Verdict]:
        skipped["missed-mass"] = reason
        return {"missed-mass": not_done("missed-mass", reason, advice)}

    refit = "num_refits=4 compares fits from other initial values, which may find other modes"
    if sweep.swept:
        return undone("rows come in blocks", "without batch_size and subsampling the search can be run")
    for name, reason in sweep.undrawable.items():
        if name in sweep.latents:
            return undone(f"site {name!r}: {reason}, so that no search can start", refit)
    fewer, *_ = few_rows(sweep, _ROWS, options)
    try:
        with quietly(fewer.model, fewer.guide, None if seed is None else seed + 2):
            plan = _plan(fewer)
            if any(fewer.model_sites[name].discrete for name in plan.sites):
                say.stage(f"moving discrete latents through their values{sweep.slowly()}")
                return {"missed-mass": left_out(fewer, plan.sites, plan.plates, plan.given, plan.left)}
            summing = summing_out(fewer, options) if plan.sums else None
            target = Target(fewer, plan.sites, plan.plates, plan.given, summing)
            if target.dimension > SEARCHED:
                return undone(f"{target.dimension} dimensions are too many to search from the prior", refit)
            if target.reads_masked():
                return undone("what is not masked depends on masked latents, which have no posterior", _MASKS)
            say.stage(f"searching for mass that the guide misses{sweep.slowly()}")
            own = unit_weights(fewer, max(num_samples, 1000), seed, plan.given, plan.plates)
            found = _search(target, own, say)
    except (GumboError, *PROGRAM_ERRORS) as error:
        return undone(f"the search failed ({first_line(error, kind=True)})", refit)
    return {"missed-mass": _judged(found, plan, target, refit)}


@dataclass
class _Plan:
    """The latents to search, the plates of their units, latents held at ``given``, and global ones ``left`` out.

    ``sums`` says that the enumerated sites of the model are summed out.
    """

    sites: list[str]
    plates: tuple[str, ...]
    given: dict[str, torch.Tensor]
    left: list[str]
    sums: bool


def _plan(sweep: Sweep) -> _Plan:
    # A point of the model follows from the others: there is nothing to search.
    layouts = sweep.model_sites
    moving = [name for name in sweep.latents if not layouts[name].point]
    discrete = {name for name in moving if layouts[name].discrete}
    sums = bool(discrete) and discrete <= sweep.summed_out and len(discrete) < len(moving)
    if sums:
        moving = [name for name in moving if name not in discrete]
    local = [name for name in moving if name in sweep.local]
    size = sum(layouts[name].numel for name in moving)
    few = size <= SEARCHED and not any(layouts[name].discrete for name in moving)
    if not local or sweep.shared and few:
        return _Plan(moving, (), {}, [], sums)
    if not sweep.shared:
        return _Plan(local, tuple(sweep.weight_plates), {}, [], sums)
    run, _ = sweep.run(1)
    shared = [name for name in sweep.shared if not layouts[name].point]
    return _Plan(local, tuple(sweep.weight_plates), sweep.given(run), shared, sums)


@dataclass
class _Found:
    """Evidence ``(units,)`` in nats: of the guide's draws, of the search alone, of all proposals; and errors.

    ``bound`` is the guide's ELBO; ``images`` are the reflections and exchanges that were kept. ``even`` marks units
    where the guide's weights determine its evidence. Where they do not, only what lies in other modes counts, beyond
    ``known`` nats: ``elsewhere`` is as many nats as those account for, estimated from a sample.
    """

    own: np.ndarray
    own_error: np.ndarray
    bound: np.ndarray
    searched: np.ndarray
    total: np.ndarray
    error: np.ndarray
    images: list[str]
    even: np.ndarray
    elsewhere: np.ndarray
    known: float

    @property
    def missed(self) -> np.ndarray:
        return self.total - self.own

    @property
    def short(self) -> np.ndarray:
        """The mass of the guide's draws that the search has not found."""
        return np.maximum(self.own - 4 * self.own_error, self.bound) - self.searched

    @property
    def noise(self) -> np.ndarray:
        return np.sqrt(self.error**2 + self.own_error**2)

    @property
    def sure(self) -> np.ndarray:
        """The units whose missed mass is beyond the limit and its own error."""
        elsewhere = (self.missed > self.known) & (self.elsewhere > self.known / 2)
        return (self.missed > 4 * self.noise) & ((self.missed > LIMIT) & self.even | elsewhere)

    @property
    def alarm(self) -> bool:
        return self.sure.sum() > allowed(len(self.own))

    @property
    def unclear(self) -> np.ndarray:
        """The units where more evidence is found, but not surely outside the guide's draws."""
        return (self.missed > LIMIT) & ~self.sure

    @property
    def blind(self) -> bool:
        return int((self.short > self.known).sum()) > allowed(len(self.own))


def _search(target: Target, own: np.ndarray, say: Progress) -> _Found:
    """Search at images of the guide's draws, then from the prior, with more particles if that finds too little."""
    evidence, error = log_evidence(own)
    bound = own.mean(1)
    drawn = target.of_guide(200)
    names, images = images_of(target, drawn)
    knowing = [cluster for some in (drawn, *images) for cluster in clusters(some, 2)]
    even = np.nan_to_num(khat(own)) <= khat_limit(own.shape[1])

    known = KNOWN[0] if target.dimension <= 2 and target.sweep.vectorized else KNOWN[1]

    def compared(searching: list[Cluster]) -> _Found:
        proposals = (searching, knowing) if searching else (knowing, [])
        mixture = mixture_evidence(target, *proposals)
        if target.sweep.vectorized and bool((4 * mixture.error > LIMIT).any()):
            mixture = mixture_evidence(target, *proposals, _MORE)
        other = in_other_modes(target, mixture.sample, drawn).numpy()
        elsewhere = -np.log1p(-other.clip(max=0.999))
        searched = mixture.searched if searching else evidence
        return _Found(evidence, error, bound, searched, mixture.total, mixture.error, names, even, elsewhere, known)

    found = compared([])
    # Without vectorized draws the search is slow, so it uses fewer particles.
    sizes = [(500, 6), (2000, 6)] if target.sweep.vectorized else [(300, 5)]
    for particles, moves in sizes:
        if found.alarm:
            break
        populations = [annealed(target, particles, moves, progress=say)[1] for _ in range(2)]
        found = compared([cluster for population in populations for cluster in clusters(population)])
        if not found.blind:
            break
    return found


def _judged(found: _Found, plan: _Plan, target: Target, refit: str) -> Verdict:
    limit, many = LIMIT, allowed(len(found.own))
    what = f"{len(found.own)} data" if plan.plates else "all latents together"
    text = (
        f"{what}: proposals from the prior and from images of the guide's draws find {found.missed.max():.2f} nats "
        f"more evidence than the guide's draws at most, above {limit:.2f} in {int(found.sure.sum())}; {many} allowed "
        f"({_PAPER})"
    )
    numbers = float(found.missed.max()), limit
    if found.alarm:
        advice = (
            f"the guide leaves out a part of the posterior, as on one of several modes: {refit}; a guide with several "
            "modes covers them"
        )
        if found.images:
            advice = (
                f"there is another mode where {found.images[0]}: break the symmetry in the model, use a guide with "
                "several modes, or say that this is one of them"
            )
        return Verdict("missed-mass", ALARM, text, *numbers, advice)
    if found.blind:
        text = (
            f"{what}: the search from the prior ends {found.short.max():.2f} nats below what the guide's own draws "
            f"hold, limit {found.known}: it has not found even the mode that is known ({_PAPER})"
        )
        return Verdict("missed-mass", CANNOT_SAY, text, *numbers, f"{refit}; or compare with draws by MCMC")
    if plan.left:
        text += f"; the global latents {', '.join(plan.left[:5])} were not searched"
        return Verdict("missed-mass", CANNOT_SAY, text, *numbers, refit)
    if int(found.unclear.sum()) > many:
        if bool(found.even[found.unclear].all()):
            text += f", by less than four times its error, up to {found.noise[found.unclear].max():.2f}"
            return Verdict("missed-mass", CANNOT_SAY, text, *numbers, "a larger num_samples would give a verdict")
        text += "; it lies in the guide's own mode, and the guide's weights are too uneven to know their own evidence"
        return Verdict("missed-mass", CANNOT_SAY, text, *numbers, "follow the advice of khat, ess and width first")
    unsure = int((2 * found.noise > limit).sum())
    word = three_way(False, unsure <= many)
    if word == OK:
        return Verdict("missed-mass", word, text, *numbers, "nothing; no search proves that all is found")
    text += f"; the error of either evidence is up to {found.noise.max():.2f}"
    return Verdict("missed-mass", word, text, *numbers, "a better guide would give a verdict")
