"""The evidence lower bound."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ..engine.terms import elbo_value
from ..estimators._base import Estimator
from ._base import Objective, Recorded, objectives


@objectives.register("elbo")
class EvidenceLowerBound(Objective):
    """E[log p(x, z) − log q(z)], averaged over particles; ``kl_weight`` multiplies the terms of latent sites."""

    name = "elbo"
    sums_over_rows = True
    takes_kl_weight = True

    def value(self, recorded: Recorded) -> Tensor:
        return elbo_value(recorded.groups, recorded.layout, recorded.view)

    def value_name(self, chosen: Mapping[str, Estimator], kl_weight: Any) -> str:
        own = sorted({estimator.objective_name() for estimator in chosen.values()} - {"elbo"})
        name = "+".join(own) or self.name
        return name if not callable(kl_weight) and float(kl_weight) == 1.0 else f"weighted-{name}"
