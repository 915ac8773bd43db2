"""The variational Rényi bound, importance-weighted."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ...errors import BadInput
from ..estimators._base import Estimator
from ._base import Objective, objectives
from .evidence import EvidenceLowerBound
from .importance import ImportanceWeightedBound


@objectives.register("renyi")
class RenyiBound(ImportanceWeightedBound):
    """(1/(1 − α)) log (1/K) Σₖ wₖ^(1 − α) per datum (Li & Turner 2016, arXiv 1602.02311).

    With K draws it is the VR-IWAE bound (Daudel et al. 2023, arXiv 2210.06226). It decreases from ``iwae`` at α = 0 to
    ``elbo`` at α = 1 and further beyond; its expectation over the K draws is a lower bound on log p(x) for each α.
    Gradients are those of ``iwae`` with w^(1 − α) in place of w: a path has Σₖ w̃ₖ ∇ log wₖ, a site without one has the
    whole bound of its datum as its learning signal, and ``dreg`` has the factor α w̃ + (1 − α) w̃². At α = 1 the
    estimators and the gradient are those of ``elbo``.

    Args:
        alpha: the order, at least 0.

    Raises:
        BadInput: a negative order, at which the value is no lower bound.

    >>> import torch
    >>> RenyiBound(alpha=0.5).bound(torch.tensor([0.0, 2.0]), 0)
    tensor([1.2402])
    >>> RenyiBound(alpha=-1.0)
    Traceback (most recent call last):
    gumbo.errors.BadInput: alpha is -1.0: a negative order gives no lower bound on log p(x); expected at least 0
    """

    name = "renyi"
    _ranges = {"alpha": float("-inf")}

    def __init__(self, alpha: float = 0.5):
        if alpha < 0:
            raise BadInput(f"alpha is {alpha}: a negative order gives no lower bound on log p(x); expected at least 0")
        self.alpha = float(alpha)

    @property
    def weighs_rows(self) -> bool:  # type: ignore[override]
        return self.alpha != 1.0

    def accepts(self, estimator: Estimator) -> bool:
        return ("iwae" if self.weighs_rows else "elbo") in estimator.objectives

    def refined(self, chosen: Mapping[str, Estimator]) -> Objective:
        return super().refined(chosen) if self.weighs_rows else EvidenceLowerBound()

    def value_name(self, chosen: Mapping[str, Estimator], kl_weight: Any) -> str:
        own = EvidenceLowerBound().value_name(chosen, kl_weight)
        return self.name if own == "elbo" else own
