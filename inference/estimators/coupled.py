"""ARMS and CARMS: several negatively coupled draws (Dimitriev & Zhou 2021).

A one-hot draw is a sequence of Bernoulli draws, one per class: its value is the first class whose draw is 1, or the
last class. Each Bernoulli logit is that of its class against the later ones, so that gradients of the Bernoulli logits
give those of the classes (Dong, Mnih & Tucker 2021).
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import combinations
from typing import Any

import torch
from torch import Tensor

from ...errors import BadInput
from ._base import Draw, Estimator, SiteView, estimators
from ._distributions import clear_caches, describe, is_bernoulli, is_one_hot
from .relaxation import bounded_logits, one_hot_why_not


def coin_uniforms(probs: Tensor) -> Tensor:
    """The uniform of each Bernoulli draw, which is 1 where the uniform is below ``probs``."""
    return torch.rand_like(probs)


def pair_of_coins(probs: Tensor) -> list[Tensor]:
    """A Bernoulli draw and its antithetic partner, which uses the complement of the same uniform."""
    uniform = coin_uniforms(probs)
    return [(uniform < probs).to(probs.dtype), (1 - uniform < probs).to(probs.dtype)]


def several_coins(probs: Tensor, count: int) -> list[Tensor]:
    """``count`` Bernoulli draws, any two of which disagree more often than independent ones (a Dirichlet copula).

    With d uniform on the simplex, (1 − dᵢ)^(count − 1) is uniform; the rarer value, of probability q, occurs where that
    is below q. So the probability that s given draws all have it is max(0, s q^(1/(count−1)) − s + 1)^(count−1).
    """
    waits = torch.empty((count, *probs.shape), dtype=probs.dtype, device=probs.device).exponential_()
    uniforms = (1 - waits / waits.sum(0)) ** (count - 1)
    rare = uniforms < torch.minimum(probs, 1 - probs)
    return list(torch.where(probs > 0.5, ~rare, rare).to(probs.dtype))


def coupled_coins(probs: Tensor, count: int) -> list[Tensor]:
    return pair_of_coins(probs) if count == 2 else several_coins(probs, count)


def pair_correction(probs: Tensor, count: int) -> Tensor:
    """1/(1 − ρ), with the correlation ρ of two of ``count`` coupled draws: p (1 − p) / P(one is 1, the other 0)."""
    rare = torch.minimum(probs, 1 - probs)
    both = (2 * rare ** (1 / (count - 1)) - 1).clamp(min=0.0) ** (count - 1)
    return (1 - rare) / (1 - both / rare.clamp(min=torch.finfo(rare.dtype).tiny))


def sticks(logits: Tensor) -> Tensor:
    """The logit of each class but the last against the later ones."""
    after = logits.flip(-1).logcumsumexp(-1).flip(-1)
    return logits[..., :-1] - after[..., 1:]


def reached(coins: Tensor) -> Tensor:
    """For each class whether all earlier Bernoulli draws are 0."""
    stopped = coins.cumsum(-1).clamp(max=1.0)
    return torch.cat([_one(coins), 1 - stopped], dim=-1)


def from_sticks(coins: Tensor) -> Tensor:
    """The one-hot value of a sequence of Bernoulli draws."""
    return reached(coins) * torch.cat([coins, _one(coins)], dim=-1)


def _one(coins: Tensor) -> Tensor:
    """A one for one class, ``(…, 1)``: a site of a single class has no coins."""
    return coins.new_ones((*coins.shape[:-1], 1))


def coupled_draw(fn: Any, count: int, args: tuple = (), kwargs: Mapping[str, Any] | None = None) -> Draw:
    """A draw, with ``count`` − 1 partners in its extras, each with the same marginal distribution."""
    with torch.no_grad():
        logits = bounded_logits(fn).expand(fn.shape(*args, **(kwargs or {})))
        one_hot = is_one_hot(fn)
        probs = (sticks(logits) if one_hot else logits).sigmoid().contiguous()
        values = [from_sticks(coins) if one_hot else coins for coins in coupled_coins(probs, count)]
    clear_caches(fn)
    return Draw(values[0], {f"partner{i}": value for i, value in enumerate(values[1:], 1)})


def coupled_surrogate(view: SiteView) -> Tensor:
    """The mean over the pairs of coupled draws of their gradient estimates.

    For a Bernoulli draw that both values of a pair reach, ½ (f − f′) (b − b′) / (1 − ρ) is unbiased for its logit. If
    one value does not reach it, its draw has no effect and is integrated out given the other: ½ (f − f′) (b − π).
    """
    one_hot = is_one_hot(view.fns[0])
    logits = view.parameter("logits")
    logits = sticks(logits.clamp(-1e4, 1e4)) if one_hot else logits
    with torch.no_grad():
        partners = [view.draw.extra[name] for name in sorted(view.draw.extra, key=len_then_name)]
        values = [view.value, *partners]
        costs = [view.cost, *view.evaluate(Draw(torch.stack(partners)))]
        costs = [cost.reshape(cost.shape + (1,) * view.event_dim) for cost in costs]
        probs = logits.sigmoid()
        correction = pair_correction(probs, len(values))
        weight = torch.zeros_like(correction)
        pairs = list(combinations(range(len(values)), 2))
        for i, j in pairs:
            factor = 0.5 * contrast(values[i], values[j], probs, correction, one_hot)
            # Selected, not multiplied: where the draws agree the gap must not count, even if it is infinite.
            gap = costs[i] - costs[j]
            weight = weight + torch.where(factor != 0, factor * gap, torch.zeros_like(gap)) / len(pairs)
    return view.sum_event(weight * logits)


def len_then_name(name: str) -> tuple[int, str]:
    return len(name), name


def contrast(value: Tensor, other: Tensor, probs: Tensor, correction: Tensor, one_hot: bool) -> Tensor:
    """The factor of (f − f′)/2 of a pair for each Bernoulli draw."""
    if not one_hot:
        return (value - other) * correction
    here, there = (1 - (one.cumsum(-1) - one)[..., :-1] for one in (value, other))
    coin, coin_of_other = value[..., :-1], other[..., :-1]
    alone = here * (1 - there) * (coin - probs) - there * (1 - here) * (coin_of_other - probs)
    return here * there * (coin - coin_of_other) * correction + alone


class ARMS(Estimator):
    """Antithetic REINFORCE with multiple draws (Dimitriev & Zhou 2021, arXiv 2105.14141), for Bernoulli sites.

    K = ``draws`` draws per site and particle, any two of which disagree more often than independent ones. With their
    pair correlation ρ, which has a closed form,

        1/(K (K − 1)) Σ over pairs (fᵢ − fⱼ) (bᵢ − bⱼ) / (1 − ρ)

    is unbiased for each logit; with K = 2 it is ``disarm``. Without the correction for ρ it is biased: the mean over
    the other draws of a group is no valid baseline, as these depend on the draw. All Bernoulli draws of a site, over
    event and plates, are replaced at once. The K draws share the upstream values; each draws downstream sites again, in
    a separate run for each such site: K − 1 more runs per site. A particle is one group; ``num_particles`` counts
    groups.

    Args:
        draws: K, at least 2.

    Raises:
        BadInput: fewer than 2 draws.

    >>> ARMS(draws=4).name, ARMS(draws=4).evaluations(num_particles=1, num_sites=2)
    ('arms', 7)
    """

    log_q = "value"
    _ranges = {"draws": 2}

    def __init__(self, draws: int = 4):
        if int(draws) < 2:
            raise BadInput(f"{type(self).__name__}(draws=…) couples at least 2 draws, got {draws!r}")
        self.draws = int(draws)

    @property
    def reruns(self) -> bool:  # type: ignore[override]
        return self.draws > 2

    def evaluations(self, num_particles: int = 1, num_sites: int = 1) -> int:
        return num_particles * (1 + (self.draws - 1) * num_sites)

    def why_not(self, site: Mapping[str, Any]) -> str | None:
        fn = site["fn"]
        if is_bernoulli(fn):
            return None
        return f"it couples the draws of a Bernoulli site, this one is {describe(fn)}"

    def draw(self, fn: Any, step: int, args: tuple = (), kwargs: Mapping[str, Any] | None = None) -> Draw:
        return coupled_draw(fn, self.draws, args, kwargs)

    def surrogate(self, view: SiteView) -> Tensor:
        return coupled_surrogate(view)


class CARMS(ARMS):
    """ARMS for one-hot sites (Dimitriev & Zhou 2021, arXiv 2110.14002), through sequences of Bernoulli draws.

    A class is the first whose Bernoulli draw is 1, and the K draws of each class are coupled as in ``arms``. The paper
    draws by an inverse distribution function and weights pairs by p(a) p(b) / P(a, b), which needs a positive
    probability of every pair of classes; with Bernoulli sequences, as in ``disarm``, weights are bounded. With K = 2 it
    is ``disarm`` for one-hot sites, with two classes ``arms``.

    >>> CARMS().name, CARMS(draws=2).evaluations()
    ('carms', 2)
    """

    def why_not(self, site: Mapping[str, Any]) -> str | None:
        return one_hot_why_not(site)


estimators.register("arms", ARMS)
estimators.register("carms", CARMS)
