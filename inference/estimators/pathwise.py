"""Pathwise gradients through the sample (Kingma & Welling 2013, arXiv 1312.6114; implicit: Figurnov et al. 2018)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ._base import Draw, Estimator, estimators
from ._distributions import (
    describe,
    hides_score_term,
    is_straight_through,
    path_at_half,
    support_moves,
    why_other_draws,
    why_wrong_path,
)


class Pathwise(Estimator):
    """The reparameterization trick: z = g(ε), and the gradient passes through g.

    A partly reparameterized distribution (a rejection sampler with ``score_parts``) adds the cost times its score term.

    Args:
        drop_score: drop the derivative of log q with respect to its own parameters, whose expectation is zero
            ("sticking the landing", Roeder et al. 2017, arXiv 1703.09194): at the exact posterior the gradient then has
            no variance. Transforms that cache their inverse (Pyro's IAF autoguides) keep this term: the gradient is
            then the plain pathwise one.

    >>> Pathwise().unbiased, Pathwise(drop_score=True).name
    (True, 'stl')
    """

    has_path = True

    def __init__(self, drop_score: bool = False):
        self.drop_score = bool(drop_score)

    @property
    def objectives(self) -> frozenset[str]:  # type: ignore[override]
        return frozenset({"elbo"}) if self.drop_score else frozenset({"elbo", "iwae"})

    @property
    def log_q(self) -> str:  # type: ignore[override]
        return "path" if self.drop_score else "full"

    def why_not(self, site: Mapping[str, Any]) -> str | None:
        fn = site["fn"]
        if is_straight_through(fn):
            biased = f"the rsample of {describe(fn)} is a straight-through one, whose gradient is biased"
            return why_other_draws(fn) or biased
        if not getattr(fn, "has_rsample", False):
            return f"{describe(fn)} has no reparameterized sampler (rsample)"
        if hides_score_term(fn):
            return f"{describe(fn)} is made of draws that are reparameterized in part, and does not give their score"
        if self.drop_score and support_moves(fn):
            return f"the support of {describe(fn)} depends on parameters, so that the score it drops has a mean"
        return why_wrong_path(fn)

    def draw(self, fn: Any, step: int, args: tuple = (), kwargs: Mapping[str, Any] | None = None) -> Draw:
        return Draw(path_at_half(fn, fn(*args, **(kwargs or {}))))  # as Pyro does, whose ZukoToPyro has no rsample


estimators.register("pathwise", Pathwise)
estimators.register("stl", lambda: Pathwise(drop_score=True))
