"""The importance-weighted bound with the doubly reparameterized gradient."""

from __future__ import annotations

import torch
from torch import Tensor

from ..engine.terms import with_terms
from ._base import Objective, Recorded
from ._weights import Bound, importance_weights, weighted


class DoublyReparameterizedBound(Objective):
    """The value of ``iwae`` or ``renyi``, with the gradient of the estimator ``dreg`` (Tucker et al. 2018).

    The draws z(φ) are those of the first runs; the weights come from a rerun of the programs at the same values,
    detached. The factor w̃² (at order α it is α w̃ + (1 − α) w̃², Daudel et al. 2023, arXiv 2210.06226) is applied once,
    where the gradient leaves the rerun.
    """

    name = "iwae"
    sums_over_rows = True
    weighs_rows = True
    runs_model = False

    def __init__(self, alpha: float = 0.0):
        self.alpha = alpha

    _ranges = {"alpha": 0}

    def value(self, recorded: Recorded) -> Tensor:
        groups, layout = recorded.again(), recorded.layout
        weights = importance_weights(groups, layout)
        log_weight = weights.log_p - weights.log_q
        bound = Bound(log_weight.detach(), -layout.room, self.alpha)
        value = (weights.scale * bound.value()).sum()
        if not torch.is_grad_enabled():
            return value
        normalized = bound.normalized()
        # Without log q, which is to have a gradient through values only.
        own = weights.log_p - weights.log_q.detach()
        terms = [(weights.scale * weighted(normalized, own)).sum()]
        pairs = [
            (before.draw.value, after.draw.value)
            for firsts, seconds in zip(recorded.groups, groups, strict=True)
            for first, second in zip(firsts, seconds, strict=True)
            for before, after in zip(first.guide, second.guide, strict=True)
            if before.latent and before.draw.value.requires_grad
        ]
        if not pairs:
            return with_terms(value, terms)
        factor = normalized * (self.alpha + (1 - self.alpha) * normalized)
        slopes = torch.autograd.grad(
            (weights.scale * factor * log_weight).sum(),
            [leaf for _, leaf in pairs],
            retain_graph=True,
            allow_unused=True,
        )
        terms += [(slope * draw).sum() for slope, (draw, _) in zip(slopes, pairs, strict=True) if slope is not None]
        return with_terms(value, terms)
