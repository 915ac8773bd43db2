"""The importance-weighted bound."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ...errors import UnsupportedSite
from ..engine.records import Run
from ..engine.terms import Layout, MakeView, Row, check_shape, summed_to, surrogate_of, with_terms
from ..estimators._base import Estimator
from ._base import Objective, Recorded, objectives
from ._weights import Bound, Weights, importance_weights
from .doubly import DoublyReparameterizedBound


@objectives.register("iwae")
class ImportanceWeightedBound(Objective):
    """log (1/K) Σₖ wₖ per datum (Burda et al. 2015, arXiv 1509.00519).

    A site without a path gets the whole bound of its datum as its learning signal; its −log q stays in the weights.
    """

    name = "iwae"
    sums_over_rows = True
    weighs_rows = True
    alpha = 0.0

    def bound(self, log_weight: Tensor, dim: int) -> Tensor:
        return Bound(log_weight, dim, self.alpha).value()

    def refined(self, chosen: Mapping[str, Estimator]) -> Objective:
        doubly = any(estimator.together for estimator in chosen.values())
        return DoublyReparameterizedBound(self.alpha) if doubly else self

    def value(self, recorded: Recorded) -> Tensor:
        groups, layout, view = recorded.groups, recorded.layout, recorded.view
        weights = importance_weights(groups, layout)
        bound = Bound(weights.log_p - weights.log_q, -layout.room, self.alpha)
        value = (weights.scale * bound.value()).sum()
        fixed = Bound(bound.log_weight.detach(), bound.dim, bound.alpha)
        signal = fixed.value().expand_as(fixed.log_weight)
        runs = [run for paths in groups for run in paths]
        scored = (site for run in runs for site in run.guide if site.score is not None and (site.drawn or site.factor))
        names = dict.fromkeys(site.name for site in scored)
        terms = [_bound_surrogate(name, runs, weights, signal, fixed, layout, view) for name in names]
        return with_terms(value, [(weights.scale * term).sum() for term in terms])


def _bound_surrogate(
    name: str, runs: list[Run], weights: Weights, signal: Tensor, bound: Bound, layout: Layout, view: MakeView
) -> Tensor:
    """One site's part of the gradient of the bound; particles without the site have none."""
    found = {i: site for i, run in enumerate(runs) for site in run.guide if site.name == name}
    rows = [Row(runs[i], site, signal) for i, site in found.items()]
    site = rows[0].site
    scores = {i: summed_to(s.score, s.frames, weights.frames) for i, s in found.items()}
    none = torch.zeros_like(next(iter(scores.values())))
    if site.factor:
        return signal * layout.join([scores.get(i, none) for i in range(len(runs))])
    if len(found) < len(runs) and site.estimator.lazy_parameters:
        raise UnsupportedSite(
            name, site.estimator.name, "it shows in some particles only, and its baseline wants inputs from all"
        )
    log_prob = layout.join([scores.get(i, none) for i in range(len(runs))])
    surrogate = surrogate_of(site, view(rows, log_prob, signal, bound))
    check_shape(surrogate, signal, site, layout)
    return surrogate
