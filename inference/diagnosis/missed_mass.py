"""Is there posterior mass where the guide has none? Searched for without the guide, and at mirror images of its draws.

Proposals are Gaussian clusters, with heavy tails: of particles annealed from the prior, of the guide's draws, and of
their reflections and exchanges that the model likes as well. The evidence under all of them together, by importance
sampling from their mixture, is held against that of the guide's own draws.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch.distributions import biject_to

from ...errors import GumboError
from ..engine.progress import Progress, Stages
from ..posterior.importance import log_evidence
from ..posterior.runner import _REFUSALS, Block, Layout, Pass, Sweep, _first_line, quietly
from .gaps import unit_weights
from .report import ALARM, CANNOT_SAY, OK, Verdict, not_done, three_way
from .rows import few_rows
from .thresholds import MASS, SEARCHED, allowed
from .units import from_units, to_units

_ROWS = 16
_PAPER = "Neal 2001; Del Moral et al. 2006"
# Draws of each proposal, clusters a population, and degrees of freedom of their tails.
_DRAWS, _CLUSTERS, _TAILS = 500, 4, 5.0
# Images of the guide's draws that are tried, how many of them are kept, and how many nats less likely they may be.
_IMAGES, _KEPT, _NATS = 64, 8, 8.0


def missed_mass(
    sweep: Sweep,
    num_samples: int,
    seed: int | None,
    skipped: dict[str, str],
    options: Mapping[str, Any],
    say: Stages,
) -> dict[str, Verdict]:
    """Whether a search of the posterior finds more evidence than the guide's draws do."""

    def undone(reason: str, advice: str) -> dict[str, Verdict]:
        skipped["missed-mass"] = reason
        return {"missed-mass": not_done("missed-mass", reason, advice)}

    refit = "num_refits=4 compares fits from other initial values, which may find other modes"
    if sweep.swept:
        return undone("rows come in blocks", "without batch_size and subsampling the search can be run")
    fewer, *_ = few_rows(sweep, _ROWS, options)
    try:
        with quietly(fewer.model, fewer.guide, None if seed is None else seed + 2):
            plan = _plan(fewer)
            if any(fewer.model_sites[name].discrete for name in plan.sites):
                return undone("a latent is discrete", f"sum discrete latents out of the model; {refit}")
            target = Target(fewer, plan.sites, plan.plates, plan.given)
            if target.dimension > SEARCHED:
                return undone(f"{target.dimension} dimensions are too many to search from the prior", refit)
            say.stage(f"searching for mass that the guide misses{sweep.slowly()}")
            own = unit_weights(fewer, max(num_samples, 1000), seed, plan.given, plan.plates)
            found = _search(target, own, say)
    except (GumboError, *_REFUSALS) as error:
        return undone(f"the search failed ({_first_line(error)})", refit)
    return {"missed-mass": _judged(found, plan, target, refit)}


@dataclass
class _Plan:
    """Which latents are searched, in which units, the others held at ``given``; global ones ``left`` out."""

    sites: list[str]
    plates: tuple[str, ...]
    given: dict[str, torch.Tensor]
    left: list[str]


def _plan(sweep: Sweep) -> _Plan:
    if not sweep.local:
        return _Plan(list(sweep.latents), (), {}, [])
    if not sweep.shared:
        return _Plan(list(sweep.local), tuple(sweep.weight_plates), {}, [])
    size = sum(sweep.model_sites[name].numel for name in sweep.latents)
    if size <= SEARCHED and not any(sweep.model_sites[name].discrete for name in sweep.latents):
        return _Plan(list(sweep.latents), (), {}, [])
    run, _ = sweep.run(1)
    return _Plan(list(sweep.local), tuple(sweep.weight_plates), sweep.given(run), list(sweep.shared))


@dataclass
class _Found:
    """Evidence ``(units,)`` in nats: of the guide's draws, of the search alone, of all proposals; and errors.

    ``bound`` is the guide's own ELBO; ``images`` are the reflections and exchanges that were kept.
    """

    own: np.ndarray
    own_error: np.ndarray
    bound: np.ndarray
    searched: np.ndarray
    total: np.ndarray
    error: np.ndarray
    images: list[str]

    @property
    def missed(self) -> np.ndarray:
        return self.total - self.own

    @property
    def short(self) -> np.ndarray:
        """What the guide's draws surely hold and the search has not found."""
        return np.maximum(self.own - 4 * self.own_error, self.bound) - self.searched

    @property
    def noise(self) -> np.ndarray:
        return np.sqrt(self.error**2 + self.own_error**2)

    def count(self, limit: float) -> int:
        return int(((self.missed > limit) & (self.missed > 4 * self.noise)).sum())

    def alarm(self, limit: float) -> bool:
        return self.count(limit) > allowed(len(self.own))

    def blind(self, limit: float) -> bool:
        return int((self.short > limit).sum()) > allowed(len(self.own))


def _search(target: Target, own: np.ndarray, say: Progress) -> _Found:
    """At images of the guide's draws, then from the prior; with more particles where that finds less than is known."""
    evidence, error = log_evidence(own)
    bound = own.mean(1)
    drawn = target.of_guide(200)
    names, images = _images(target, drawn)
    knowing = [cluster for some in (drawn, *images) for cluster in _clusters(some, 2)]
    _, total, spread = _mixture_evidence(target, knowing, [])
    found = _Found(evidence, error, bound, evidence, total, spread, names)
    # One draw at a time the search is slow: fewer particles have to do.
    sizes = [(500, 6), (2000, 6)] if target.sweep.vectorized else [(300, 5)]
    limit = _limit(target)
    for particles, moves in sizes:
        if found.alarm(limit):
            break
        populations = [annealed(target, particles, moves, progress=say)[1] for _ in range(2)]
        searching = [cluster for population in populations for cluster in _clusters(population)]
        searched, total, spread = _mixture_evidence(target, searching, knowing)
        found = _Found(evidence, error, bound, searched, total, spread, names)
        if not found.blind(limit):
            break
    return found


def _limit(target: Target) -> float:
    return MASS[0] if target.dimension <= 2 and target.sweep.vectorized else MASS[1]


def _judged(found: _Found, plan: _Plan, target: Target, refit: str) -> Verdict:
    limit, many = _limit(target), allowed(len(found.own))
    what = f"{len(found.own)} data" if plan.plates else "all latents together"
    text = (
        f"{what}: proposals from the prior and from images of the guide's draws find {found.missed.max():.2f} nats "
        f"more evidence than the guide's draws at most, above {limit} in {found.count(limit)}; {many} may be ({_PAPER})"
    )
    numbers = float(found.missed.max()), limit
    if found.alarm(limit):
        at = f" (there is some where {found.images[0]})" if found.images else ""
        advice = (
            f"the posterior has mass where the guide has none{at}: break the symmetry in the model, use a guide with "
            "several modes, or say that this is one of them"
        )
        return Verdict("missed-mass", ALARM, text, *numbers, advice)
    if found.blind(limit):
        text = (
            f"{what}: the search from the prior ends {found.short.max():.2f} nats below what the guide's own draws "
            f"hold, limit {limit}: it has not found even the mode that is known ({_PAPER})"
        )
        return Verdict("missed-mass", CANNOT_SAY, text, *numbers, f"{refit}; or compare with draws by MCMC")
    if plan.left:
        text += f"; the global latents {', '.join(plan.left[:5])} were not searched"
        return Verdict("missed-mass", CANNOT_SAY, text, *numbers, refit)
    unsure = int((2 * found.noise > limit).sum())
    word = three_way(False, unsure <= many)
    if word == OK:
        return Verdict("missed-mass", word, text, *numbers, "nothing; no search proves that all is found")
    text += f"; the error of either evidence is up to {found.noise.max():.2f}"
    return Verdict("missed-mass", word, text, *numbers, "a better guide would let it say")


# --- the posterior in unconstrained numbers ---------------------------------------------------------------------------


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
        """``(particles, units, d)`` of values as the layouts have them."""
        layouts = self.sweep.model_sites
        return torch.cat(
            [to_units(self.maps[name].inv(values[name]), layouts[name], self.plates) for name in self.sites], -1
        )

    def values(self, free: torch.Tensor) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        """The way back, and the log-determinant ``(particles, units)`` of its slope."""
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
    """A mixture has its components' support, under a wrapper that no map knows."""
    while type(support).__name__ == "MixtureSameFamilyConstraint":
        support = support.base_constraint
    return support


def _kept(layout: Layout, plates: Sequence[str]) -> Layout:
    names = tuple(name for name in layout.names if name in plates)
    return replace(layout, names=names)


# --- images of the guide's draws --------------------------------------------------------------------------------------


def _images(target: Target, drawn: torch.Tensor) -> tuple[list[str], list[torch.Tensor]]:
    """Reflections and exchanges of the guide's draws that are about as likely as these, in some unit."""
    some = drawn[:50]
    here = sum(target(some)).mean(0)
    kept: list[tuple[float, str, torch.Tensor]] = []
    tried = 0
    for name, image in _symmetries(target, drawn):
        tried += 1
        if tried > _IMAGES or not target.sweep.vectorized and tried > 12:
            break
        if not bool(image.isfinite().all()):
            continue
        less = float((here - sum(target(image[:50])).mean(0)).min())
        # What lies among the guide's own draws is no other place.
        apart = (image.mean(0) - drawn.mean(0)).abs() / drawn.std(0).clamp(min=1e-12)
        if less < _NATS and float(apart.max()) > 1.0:
            kept.append((less, name, image))
    kept.sort(key=lambda one: one[0])
    return [name for _, name, _ in kept[:_KEPT]], [image for _, _, image in kept[:_KEPT]]


def _symmetries(target: Target, drawn: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
    """Signs of all numbers, of a site's, of one number; exchanges of the rows of all sites that have as many."""
    yield "all signs change", -drawn
    center = target.draw(200).median(0).values
    if float(center.abs().max()) > 0.2 * float((target.draw(200) - center).abs().mean()):
        yield "all is mirrored at the prior's centre", 2 * center - drawn
    start = 0
    spans = {}
    for name in target.sites:
        spans[name] = slice(start, start + target.sizes[name])
        start += target.sizes[name]
    if len(target.sites) > 1:
        for name, span in spans.items():
            image = drawn.clone()
            image[..., span] = -image[..., span]
            yield f"the signs of {name} change", image
    if target.dimension > 1:
        for place in range(target.dimension):
            image = drawn.clone()
            image[..., place] = -image[..., place]
            yield f"the sign of number {place} changes", image
    yield from _exchanges(target, drawn)


def _exchanges(target: Target, drawn: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
    """Two components change places in every site that has as many of them, as labels of a mixture may."""
    values, _ = target.values(drawn)
    axes: dict[int, list[tuple[str, int]]] = {}
    for name in target.sites:
        layout = target.sweep.model_sites[name]
        offset = 1
        for place, (plate, size) in enumerate(zip(layout.names, layout.sizes, strict=True)):
            if plate not in target.plates and size > 1:
                axes.setdefault(size, []).append((name, offset + place))
        for place, size in enumerate(layout.event):
            if size > 1:
                axes.setdefault(size, []).append((name, offset + len(layout.names) + place))
    for size, where in axes.items():
        first: dict[str, int] = {}
        for name, axis in where:
            first.setdefault(name, axis)
        for one in range(size):
            for other in range(one + 1, size):
                order = torch.arange(size)
                order[[one, other]] = order[[other, one]]
                swapped = dict(values)
                for name, axis in first.items():
                    swapped[name] = swapped[name].index_select(axis, order.to(swapped[name].device))
                names = ", ".join(first)
                yield f"{one} and {other} of {names} change places", target.free(swapped).cpu().double()


# --- evidence under a mixture of proposals ----------------------------------------------------------------------------


@dataclass
class _Cluster:
    """A t distribution a unit: centres ``(units, d)`` and roots of scale ``(units, d, d)``."""

    center: torch.Tensor
    root: torch.Tensor

    def draw(self, count: int) -> torch.Tensor:
        units, size = self.center.shape
        normal = torch.randn(count, units, size, dtype=torch.float64)
        chi = torch.distributions.Chi2(torch.tensor(_TAILS, dtype=torch.float64)).sample((count, units, 1))
        return self.center + torch.einsum("uij,puj->pui", self.root, normal) * (_TAILS / chi).sqrt()

    def log_prob(self, at: torch.Tensor) -> torch.Tensor:
        size = self.center.shape[-1]
        away = torch.linalg.solve_triangular(self.root, (at - self.center).movedim(0, -1), upper=False)
        square = (away**2).sum(-2).T
        log_root = self.root.diagonal(dim1=-2, dim2=-1).log().sum(-1)
        constant = math.lgamma((_TAILS + size) / 2) - math.lgamma(_TAILS / 2) - size / 2 * math.log(_TAILS * math.pi)
        return constant - log_root - (_TAILS + size) / 2 * torch.log1p(square / _TAILS)


def _clusters(population: torch.Tensor, count: int = _CLUSTERS) -> list[_Cluster]:
    """Each unit's particles ``(particles, units, d)`` in groups that lie together, a proposal for each."""
    _, units, size = population.shape
    whole = _root_covariance(population)
    found = [_Cluster(torch.zeros(units, size).double(), torch.zeros(units, size, size).double()) for _ in range(count)]
    for unit in range(units):
        points = torch.linalg.solve_triangular(whole[unit], population[:, unit].T, upper=False).T
        labels = _nearest(points, count)
        for number, cluster in enumerate(found):
            own = population[labels == number, unit] if bool((labels == number).any()) else population[:, unit]
            few = len(own) < 2 * size + 2
            cluster.center[unit] = own.mean(0)
            cluster.root[unit] = (_root_covariance(own.unsqueeze(1))[0] if not few else whole[unit] * 0.5) * 1.1
    return found


def _nearest(points: torch.Tensor, count: int, rounds: int = 10) -> torch.Tensor:
    """k-means from points that lie far apart."""
    centers = points[[int((points - points.mean(0)).norm(dim=1).argmax())]]
    for _ in range(count - 1):
        centers = torch.cat([centers, points[[int(_squares(points, centers).min(1).values.argmax())]]])
    labels = torch.zeros(len(points), dtype=torch.long)
    for _ in range(rounds):
        labels = _squares(points, centers).argmin(1)
        for number in range(count):
            if bool((labels == number).any()):
                centers[number] = points[labels == number].mean(0)
    return labels


def _squares(points: torch.Tensor, centers: torch.Tensor) -> torch.Tensor:
    return ((points[:, None] - centers) ** 2).sum(-1)


def _mixture_evidence(
    target: Target, searching: list[_Cluster], knowing: list[_Cluster]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """log p(x) of each unit under the searching proposals, under all, and the latter's error: ``(units,)`` each."""
    count = _DRAWS if target.sweep.vectorized else 100
    everyone = [*searching, *knowing]
    draws = torch.cat([cluster.draw(count) for cluster in everyone])
    log_p = sum(target(draws))
    log_q = torch.stack([cluster.log_prob(draws) for cluster in everyone])
    cut = count * len(searching)
    part = log_p[:cut] - torch.logsumexp(log_q[: len(searching), :cut], 0) + math.log(len(searching))
    whole = log_p - torch.logsumexp(log_q, 0) + math.log(len(everyone))
    searched, _ = log_evidence(part.T.numpy())
    total, error = log_evidence(whole.T.numpy())
    return searched, total, error


# --- particles from the prior -----------------------------------------------------------------------------------------


def annealed(
    target: Target, particles: int = 500, moves: int = 6, most: int = 80, progress: Progress | None = None
) -> tuple[np.ndarray, torch.Tensor]:
    """log p(x) of each unit ``(units,)`` and particles ``(particles, units, d)`` of its posterior, from the prior.

    Sequential Monte Carlo: each unit's temperature falls so that half of the particles count; between temperatures they
    take random-walk Metropolis steps with their own covariance. Del Moral, Doucet & Jasra 2006. The evidence is −∞
    where ``most`` temperatures do not lead to the posterior.
    """
    free = target.draw(particles)
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
        if bool((inverse >= 1).all()):
            return evidence.numpy(), free
    return np.where(inverse.numpy() >= 1, evidence.numpy(), -math.inf), free


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
