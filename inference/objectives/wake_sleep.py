"""Reweighted wake-sleep."""

from __future__ import annotations

from torch import Tensor

from ..engine.terms import with_terms
from ._base import Objective, Recorded, objectives
from ._weights import Bound, importance_weights, weighted


@objectives.register("rws")
class WakeSleep(Objective):
    """Wake updates of model and guide, per datum (Bornschein & Bengio 2014, arXiv 1406.2751).

    The value is the importance-weighted bound; the gradient is Σₖ w̃ₖ ∇(log p + log q) at detached draws.
    """

    name = "rws"
    sums_over_rows = True
    weighs_rows = True
    takes_estimators = False

    def value(self, recorded: Recorded) -> Tensor:
        groups, layout = recorded.groups, recorded.layout
        weights = importance_weights(groups, layout)
        log_weight = (weights.log_p - weights.log_q).detach()
        normalized = log_weight.softmax(-layout.room)
        value = (weights.scale * Bound(log_weight, -layout.room).value()).sum()
        return with_terms(value, [(weights.scale * weighted(normalized, weights.log_p + weights.log_q)).sum()])
