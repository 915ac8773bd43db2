"""Doubly reparameterized gradients of the importance-weighted bound."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ._base import estimators
from ._distributions import describe, has_score_term
from .pathwise import Pathwise


class DoublyReparameterized(Pathwise):
    """DReG (Tucker et al. 2018, arXiv 1810.04152; hierarchies: Bauer & Mnih 2021, arXiv 2101.11046).

    The score terms inside the pathwise gradient of the bound are reparameterized again, so that the signal-to-noise
    ratio of the guide's gradient does not decrease with K: Σₖ w̃ₖ² (∂ log wₖ/∂zₖ) ∇zₖ, with log q differentiated through
    values only. All sites must take it together.

    >>> sorted(DoublyReparameterized().objectives)
    ['iwae']
    """

    objectives = frozenset({"iwae"})  # type: ignore[assignment]
    log_q = "full"  # type: ignore[assignment]
    together = True

    def __init__(self):
        super().__init__(drop_score=True)

    def __repr__(self) -> str:
        return "DoublyReparameterized()"

    def why_not(self, site: Mapping[str, Any]) -> str | None:
        if has_score_term(site["fn"]):
            return f"{describe(site['fn'])} is reparameterized in part only, and its score is not reparameterized again"
        return super().why_not(site)

    def evaluations(self, num_particles: int = 1, num_sites: int = 1) -> int:
        return num_particles


estimators.register("dreg", DoublyReparameterized)
