"""Importance weights of a guide's draws: Pareto k̂, effective sample size, and estimates of the evidence."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch.distributions import constraints

from . import _arviz
from .runner import Pass, Sweep, log_weight
from .sites import Block

_NUMBERS_A_PIECE = 2**20
# Log-weights closer together than this differ by rounding only; their tail has no shape.
_ROUNDING = 1e-3
# A tail with fewer distinct values than this is not from a continuous distribution.
_FEWEST = 10
# If the effective sample size is above this fraction of the draws, weights differ by at most 3 % (root mean square),
# and the shape of their tail is noise.
EVEN = 0.999
# Local latents with at most this many states have bounded weights given the global latents: no tail.
_STATES = 1000


def khat(log_weights: np.ndarray, rounding: float = _ROUNDING) -> np.ndarray:
    """Pareto k̂ of importance weights ``(…, S)`` given as log p − log q; 0 where the weights are nearly equal.

    Nearly equal: within ``rounding`` nats, or with an effective sample size above 99.9 % of S. NaN where the largest
    weights have too few distinct values for a fit, as for latents with few states, or S is below 25; infinite where
    every weight is zero. Where the tail would contain weights of zero, S counts the others. Vehtari et al. 2024,
    arXiv:1507.02646.

    >>> khat(np.zeros((2, 100)))
    array([0., 0.])
    """
    log_weights = np.asarray(log_weights, dtype=np.float64)
    flat = log_weights.reshape(-1, log_weights.shape[-1])
    found = np.full(len(flat), np.nan)
    draws = flat.shape[1]
    for row, weights in enumerate(flat):
        top, tail = weights.max(), tail_size(draws)
        if not np.isfinite(top):
            found[row] = np.inf
        elif top - weights.min() <= rounding or importance_ess(weights) >= EVEN * draws:
            found[row] = 0.0
        else:
            possible = weights[weights > -np.inf]
            if len(possible) <= tail:
                weights, tail = possible, tail_size(len(possible))
            if tail > 4 and len(np.unique(np.partition(weights, -tail)[-tail:])) >= min(_FEWEST, tail):
                found[row] = float(_arviz.pareto_k(weights))
    return found.reshape(log_weights.shape[:-1])


def khat_limit(num_samples: int) -> float:
    """The k̂ above which an importance-weighted mean over ``num_samples`` draws is unreliable.

    min(1 − 1/log₁₀ S, 0.7): fewer draws need lighter tails (Vehtari et al. 2024, arXiv:1507.02646, section 3.2.4).

    >>> round(khat_limit(100), 3), khat_limit(10_000)
    (0.5, 0.7)
    """
    return min(1 - 1 / math.log10(num_samples), 0.7) if num_samples > 10 else 0.0


def tail_size(num_samples: int) -> int:
    """The number of largest weights that k̂ is fitted to."""
    return math.ceil(min(num_samples / 5, 3 * math.sqrt(num_samples)))


def khat_error(num_samples: int, shape: float) -> float:
    """The standard error of k̂ from ``num_samples`` draws for a tail of shape ``shape``.

    (1 + k) / √M for the M largest weights: the asymptotic error of a generalized Pareto shape, k above −1/2 (Smith
    1987). The fit shrinks k̂ towards ½ with the weight of ten further observations.

    >>> round(khat_error(2000, 0.7), 3)
    0.136
    """
    size = tail_size(num_samples)
    return (1 + shape) / math.sqrt(size) * size / (size + 10)


def importance_ess(log_weights: np.ndarray) -> np.ndarray:
    """(Σ w)² / Σ w², the effective sample size of importance weights ``(…, S)``.

    S if all weights are equal, 0 if all are zero.
    """
    weights, _ = _scaled(log_weights)
    squares = (weights**2).sum(-1)
    return weights.sum(-1) ** 2 / np.where(squares == 0, 1.0, squares)


def _scaled(log_weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Weights in units of the largest one, and its logarithm ``(…)``; 0 for it where all weights are zero."""
    top = log_weights.max(-1, keepdims=True)
    top = np.where(np.isfinite(top), top, 0.0)
    return np.exp(log_weights - top), top[..., 0]


def log_evidence(log_weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The logarithm of the mean weight over ``(…, S)``, and its standard error by the delta method.

    −∞, with an unknown error, where every weight is zero.

    >>> log_evidence(np.log([[1.0, 3.0], [0.5, 0.5]]))[0].round(4)
    array([ 0.6931, -0.6931])
    """
    weights, top = _scaled(log_weights)
    mean = weights.mean(-1)
    with np.errstate(divide="ignore", invalid="ignore"):
        error = weights.std(-1, ddof=min(1, weights.shape[-1] - 1)) / math.sqrt(weights.shape[-1]) / mean
        return np.log(mean) + top, error


def pieces(shape: Sequence[int], draws: int) -> Iterator[tuple[slice, ...]]:
    """Slices of an array of units, small enough that copies of ``draws`` numbers for each take little memory."""
    if not shape:
        yield ()
        return
    step = max(1, _NUMBERS_A_PIECE // (draws * math.prod(shape[1:])))
    for start in range(0, shape[0], step):
        yield (slice(start, start + step),)


def by_piece(statistic: Callable[[np.ndarray], np.ndarray], log_weights: np.ndarray) -> np.ndarray:
    """A statistic of weights ``(chain, *units, S)``, computed a few units at a time to save memory."""
    found = np.empty(log_weights.shape[:-1])
    for chain in range(len(log_weights)):
        for piece in pieces(log_weights.shape[1:-1], log_weights.shape[-1]):
            found[(chain, *piece)] = statistic(log_weights[(chain, *piece)])
    return found


def integrated(
    sweep: Sweep,
    block: Block,
    given: Mapping[str, torch.Tensor],
    draws: int,
    seen: Pass,
    picks: np.ndarray,
    *,
    arguments: tuple[tuple, dict] | None = None,
    scaled: bool = False,
) -> tuple[torch.Tensor, bool]:
    """log p(x | global latents) of each datum ``(count, *data plates)``, by ``draws`` draws of the local latents each.

    Also returns whether the guide's density of the global latents is known separately: it is not if it depends on local
    latents.
    """
    count = len(next(iter(given.values())))
    if sweep.summed_out.issuperset(sweep.local):
        draws = 1  # for an exact conditional all draws have the same weight
    room = sweep.draws_a_run(block)
    inner = min(draws, room)
    outer = max(1, room // inner)
    found, known = [], True
    for start in range(0, count, outer):
        some = {name: value[start : start + outer] for name, value in given.items()}
        size = len(next(iter(some.values())))
        total, left = None, draws
        while left:
            now = min(inner, left)
            repeated = {name: value.repeat_interleave(now, 0) for name, value in some.items()}
            guide, model = sweep.run(size * now, block, repeated, arguments=arguments)
            for name in given:
                density = guide.log_prob(name).unflatten(0, (size, now))
                before = seen.log_prob(name)[torch.as_tensor(picks[start : start + outer])].unsqueeze(1)
                known &= bool(torch.allclose(density, before.expand_as(density), rtol=1e-4, atol=1e-4))
            weight = log_weight(guide, model, sweep.data_plates, scaled=scaled)
            part = torch.logsumexp(weight.unflatten(0, (size, now)), 1)
            total = part if total is None else torch.logaddexp(total, part)
            left -= now
        found.append(total - np.log(draws))
    return torch.cat(found), known


def number_of_states(sweep: Sweep, names: Sequence[str]) -> float:
    """The number of joint values of a datum's latents; infinite if one of them has no finite support."""
    total = 1.0
    for name in names:
        layout, support = sweep.model_sites[name], sweep.supports[name]
        while isinstance(support, constraints.independent):
            support = support.base_constraint
        inside = [s for plate, s in zip(layout.names, layout.sizes, strict=True) if plate not in sweep.data_plates]
        numbers = math.prod((*inside, *layout.event))
        if isinstance(support, type(constraints.boolean)):
            states, power = 2.0, numbers
        elif isinstance(support, type(constraints.one_hot)):
            states, power = float(layout.event[-1]), numbers // layout.event[-1]
        elif isinstance(support, constraints.integer_interval):
            states, power = float(torch.as_tensor(support.upper_bound - support.lower_bound).max()) + 1, numbers
        else:
            return math.inf
        total = total * states**power if power * math.log(max(states, 2.0)) < 50 else math.inf
    return total


def largest_of(log_probs: np.ndarray) -> float:
    """The largest size of finite log-probabilities; a draw that a program excludes has −∞, without rounding."""
    return float(np.abs(log_probs[np.isfinite(log_probs)]).max(initial=0.0))


def rounding_of(sweep: Sweep, largest: float) -> float:
    """The rounding error of log-weights whose terms are at most ``largest``, at the programs' precision."""
    sizes = [layout.dtype.itemsize for layout in sweep.model_sites.values() if layout.dtype.is_floating_point]
    precision = 1e-6 if min(sizes, default=8) < 8 else 1e-14
    return _ROUNDING + precision * largest


# --- evidence of all data together --------------------------------------------------------------------------------

# Weights that differ by less than a tenth have bounded influence, whatever the shape of their tail.
_ALIKE = 0.1


@dataclass(frozen=True)
class JointEvidence:
    """log p of all data by importance weights, in nats; NaN with a ``reason`` where the weights are unreliable."""

    value: float
    mc_se: float
    khat: float
    reason: str


def joint_evidence(log_weights: np.ndarray, rounding: float = _ROUNDING) -> JointEvidence:
    """The evidence from joint log-weights ``(S,)`` of independent draws, if their Pareto k̂ allows it.

    Weights with few distinct values (discrete latents) have no tail; they are used if the largest value occurs often
    enough.

    >>> rng = np.random.default_rng(0)
    >>> z = 1.1 * rng.standard_normal(2000)
    >>> found = joint_evidence(-0.5 * z**2 + 0.5 * (z / 1.1) ** 2 + np.log(1.1) - 3.0)
    >>> abs(found.value + 3.0) < 4 * found.mc_se < 0.1, found.reason
    (True, '')
    >>> joint_evidence(rng.standard_normal(2000) * 9).value
    nan
    """
    draws = len(log_weights)
    shape = float(khat(log_weights, max(rounding, _ALIKE)))
    limit = khat_limit(draws)
    repeated = int((log_weights >= log_weights.max() - rounding).sum())
    if shape > limit:
        reason = f"k̂ of the weights is {shape:.2f}, above {limit:.2f} for {draws} draws"
    elif math.isnan(shape) and repeated < _FEWEST:
        reason = f"{draws} draws are too few for the k̂ of their weights"
    else:
        value, error = log_evidence(log_weights[None])
        return JointEvidence(float(value[0]), float(error[0]) if draws > 1 else math.nan, shape, "")
    return JointEvidence(math.nan, math.nan, math.nan if math.isnan(shape) else shape, reason)
