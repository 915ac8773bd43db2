"""Antithetic pairs: ARM (Yin & Zhou 2019) and DisARM (Dong, Mnih & Tucker 2020, 2021)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from . import coupled
from ._base import Draw, Estimator, SiteView, estimators
from ._distributions import clear_caches, describe, is_bernoulli, is_one_hot, logits_of


class ARM(Estimator):
    """Augment-REINFORCE-merge for Bernoulli sites (Yin & Zhou 2019, arXiv 1807.11143): (f(b) − f(b̃)) (½ − u) per logit.

    The draws b = 1[u < σ(α)] have the antithetic partners b̃ = 1[1 − u < σ(α)]. One rerun replaces all Bernoulli draws
    of a site, over event and plates, by their partners; it shares the upstream draws and draws downstream sites again:
    one rerun for several layers would be biased. A particle is a pair, and costs one run and one more for each such
    site; f need not be differentiable. DisARM integrates out part of u; its variance is never larger.

    >>> ARM().name, ARM().evaluations(num_particles=1, num_sites=2)
    ('arm', 3)
    """

    log_q = "value"

    def evaluations(self, num_particles: int = 1, num_sites: int = 1) -> int:
        return num_particles * (1 + num_sites)

    def why_not(self, site: Mapping[str, Any]) -> str | None:
        fn = site["fn"]
        return None if is_bernoulli(fn) else f"antithetic pairs need a Bernoulli site, this one is {describe(fn)}"

    def draw(self, fn: Any, step: int, args: tuple = (), kwargs: Mapping[str, Any] | None = None) -> Draw:
        with torch.no_grad():
            probs = logits_of(fn).sigmoid().expand(fn.shape(*args, **(kwargs or {}))).contiguous()
            uniform = coupled.coin_uniforms(probs)
        clear_caches(fn)
        return Draw((uniform < probs).to(probs.dtype), {"uniform": uniform})

    def surrogate(self, view: SiteView) -> Tensor:
        logits = view.parameter("logits")
        with torch.no_grad():
            uniform = view.draw.extra["uniform"]
            partner = (1 - uniform < logits.sigmoid()).to(view.value.dtype)
            gap = view.cost - view.evaluate(Draw(partner.unsqueeze(0)))[0]
            gap = gap.reshape(gap.shape + (1,) * view.event_dim)
            weight = self.weigh(gap, view.value, partner, uniform, logits)
        return view.sum_event(weight * logits)

    def weigh(self, gap: Tensor, value: Tensor, partner: Tensor, uniform: Tensor, logits: Tensor) -> Tensor:
        """The derivative with respect to each logit, where ``gap`` is f(b) − f(b̃)."""
        return gap * (0.5 - uniform)


class DisARM(ARM):
    """ARM conditioned on its pair of draws (Dong, Mnih & Tucker 2020, arXiv 2006.10680; Yin et al. 2020).

    Each logit gets ½ (f(b) − f(b̃)) (b − b̃) σ(|α|), which is zero where both draws agree. One particle is one pair,
    which costs one run and one more for each such site; f need not be differentiable.

    A one-hot site is a sequence of Bernoulli draws, one per class (Dong, Mnih & Tucker 2021, "Coupled gradient
    estimators for discrete latent variables"): its value is the first class whose draw is 1, where α is the logit of a
    class against the later ones. A draw that one value of the pair does not reach is integrated out, which leaves
    ½ (f − f̃) (b − σ(α)) of the other's.

    >>> DisARM().name, DisARM().min_particles
    ('disarm', 1)
    """

    def why_not(self, site: Mapping[str, Any]) -> str | None:
        fn = site["fn"]
        if is_bernoulli(fn) or is_one_hot(fn):
            return None
        return f"antithetic pairs need a Bernoulli or OneHotCategorical site, this one is {describe(fn)}"

    def draw(self, fn: Any, step: int, args: tuple = (), kwargs: Mapping[str, Any] | None = None) -> Draw:
        return coupled.coupled_draw(fn, 2, args, kwargs) if is_one_hot(fn) else super().draw(fn, step, args, kwargs)

    def surrogate(self, view: SiteView) -> Tensor:
        return coupled.coupled_surrogate(view) if is_one_hot(view.fns[0]) else super().surrogate(view)

    def weigh(self, gap: Tensor, value: Tensor, partner: Tensor, uniform: Tensor, logits: Tensor) -> Tensor:
        # Selected, not multiplied: where the draws agree the gap must not count, even if it is infinite.
        differ = value != partner
        return torch.where(differ, 0.5 * gap * (value - partner) * logits.abs().sigmoid(), torch.zeros_like(gap))


estimators.register("arm", ARM)
estimators.register("disarm", DisARM)
