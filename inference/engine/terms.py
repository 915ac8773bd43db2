"""From recorded runs to one scalar whose value is the objective and whose gradient is the estimator.

The main function is :func:`walk_back`: from the last statement to the first, the sum of the terms so far is the cost of
the current site. Enumerated sites are summed out on the way, plates are summed when a site outside them is reached, and
every estimator adds a term of value zero that carries its gradient.
"""

from __future__ import annotations

import math
import operator
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from functools import reduce
from typing import Any

import torch
from torch import Tensor

from ...errors import BadInput
from ..estimators._base import Estimator, SiteView
from .first_order import first_order
from .records import Frames, Run, Site

NO_FRAMES: Frames = frozenset()


class NeedsJoint(Exception):
    """Raised if a term outside a plate depends on a site enumerated inside it."""

    def __init__(self, site: str):
        super().__init__(site)
        self.site = site


@dataclass
class Layout:
    """The layout of the batch dimensions of all terms, and which plates have independent rows."""

    room: int  # dimensions for particles and plates
    num_particles: int
    kl_weight: float = 1.0
    trust_plates: bool = True
    mixed_plates: tuple[str, ...] = ()  # plates with dependent rows

    def apart(self, frames: Frames) -> Frames:
        """The plates among these with independent rows."""
        if not self.trust_plates:
            return NO_FRAMES
        return frozenset(f for f in frames if f[0] not in self.mixed_plates) if self.mixed_plates else frames

    def frames(self, site: Site) -> Frames:
        """The plates along which a site's elements are separate."""
        return NO_FRAMES if site.joint else self.apart(site.frames)

    def join(self, tensors: list[Tensor]) -> Tensor:
        """Concatenate tensors of single particles; a sum over no sites has no dimensions."""
        if len(tensors) == 1:
            return tensors[0]
        own = [tensor if tensor.dim() else tensor.reshape((1,) * self.room) for tensor in tensors]
        return torch.cat(torch.broadcast_tensors(*own), dim=-self.room)

    # Overridden where the rows of a batch are split over processes, to include the other rows.

    def cost(self, site: Site, costs: CostToGo) -> Tensor:
        """The cost-to-go at a site, by element of its plates."""
        return costs.total()

    def cost_once(self, site: Site, costs: CostToGo) -> Tensor:
        """The cost-to-go at a site with each term counted once."""
        return costs.scalar()

    def surrogate(self, site: Site, view: SiteView) -> Tensor | None:
        """The term that the site's estimator adds to the objective."""
        return surrogate_of(site, view)

    def whole(self, total: Tensor) -> Tensor:
        """A sum over this process's rows as one over all rows."""
        return total

    def mean(self, site: Site, tensor: Tensor) -> Tensor:
        """The mean of a tensor shaped like a site's cost, over all of its elements."""
        return tensor.mean()


def surrogate_of(site: Site, view: SiteView) -> Tensor | None:
    """The term of a site's estimator; for a reparameterized draw the score term of its distribution, if any."""
    if site.estimator.has_path and view.log_prob is not None:
        return view.cost * view.log_prob
    return site.estimator.surrogate(view)


def with_terms(value: Tensor, terms: list[Tensor]) -> Tensor:
    """``value``, with the gradient of its sum with ``terms``, whose own values do not count.

    The terms take the value, and the value the draws that the terms stand for, as constants. A derivative of the
    gradient that would pass from one to the other is refused; second derivatives of the value alone are right.
    """
    if not terms:
        return value
    total = reduce(operator.add, terms)
    own = first_order(value.view_as(value), total)
    return own + first_order(total - total.detach(), total, value)


def summed_to(tensor: Tensor, frames: Frames, keep: Frames) -> Tensor:
    gone = [dim for _, dim, _ in frames - keep]
    return tensor.sum(gone, keepdim=True) if gone else tensor


class CostToGo:
    """Sums of terms, stored by the plates that they still have."""

    def __init__(self, terms: dict[Frames, Tensor] | None = None):
        self.terms = {} if terms is None else terms

    def add(self, frames: Frames, term: Tensor) -> None:
        self.terms[frames] = self.terms[frames] + term if frames in self.terms else term

    def subtract(self, frames: Frames, term: Tensor) -> None:
        self.terms[frames] = self.terms[frames] - term if frames in self.terms else -term

    def sum_out(self, plates: Callable[[Frames], Frames]) -> None:
        terms, self.terms = self.terms, {}
        for frames, term in terms.items():
            gone = plates(frames)
            self.add(frames - gone, summed_to(term, gone, NO_FRAMES))

    def keep_only(self, frames: Frames) -> None:
        """Sum out every plate that is not in ``frames``."""
        if any(own - frames for own in self.terms):
            self.sum_out(lambda own: own - frames)

    def expect(self, site: Site, probabilities: Tensor, frames: Frames) -> None:
        """Sum over an enumerated site; a term that does not depend on it is its own expectation."""
        for own, term in list(self.terms.items()):
            if term.dim() >= -site.enum_dim and term.shape[site.enum_dim] > 1:
                if not own >= frames:
                    raise NeedsJoint(site.name)
                # Impossible values contribute zero although log p is −∞, and −∞ must not reach q's gradient.
                possible = torch.where(probabilities > 0, term, torch.zeros_like(term))
                self.terms[own] = (probabilities * possible).sum(site.enum_dim, keepdim=True)

    def total(self) -> Tensor:
        """The sum of the terms, broadcast."""
        return reduce(operator.add, self.terms.values()) if self.terms else 0  # type: ignore[return-value]

    def scalar(self) -> Tensor:
        """All terms summed, each counted once."""
        once = CostToGo(dict(self.terms))
        once.keep_only(NO_FRAMES)
        return once.total().sum()


def probabilities(site: Site, layout: Layout) -> Tensor:
    """q of each value of an enumerated site."""
    return summed_to(site.score, site.frames, layout.frames(site)).exp()


def walk_back(run: Run, layout: Layout, visit: Callable[[Site, CostToGo], None] | None = None) -> CostToGo:
    """Collect the terms of the ELBO from last to first; ``visit`` receives each drawn site with its cost-to-go."""
    costs, beta = CostToGo(), layout.kl_weight
    plain = not isinstance(beta, Tensor) and beta == 1.0
    above: list[Frames] = []  # for each model site, the plates of the latent sites that ran before it
    met: Frames = NO_FRAMES
    for site in run.model:
        above.append(met)
        met = met | site.frames if site.latent else met
    for site, before in zip(reversed(run.model), reversed(above), strict=True):
        if site.summed:
            continue
        costs.add(site.frames, site.log_prob if plain or not site.latent else beta * site.log_prob)
        if site.settled and not site.latent and before - site.frames:
            # A deterministic value outside a plate may combine the plate's elements.
            costs.sum_out(lambda own, mixed=before - site.frames: own & mixed)
    for site in reversed(run.guide):
        log_q = site.with_gradient_of(scale=True) if is_dropped(site) else site.log_prob
        costs.subtract(site.frames, log_q if plain else beta * log_q)
        costs.keep_only(layout.apart(site.frames))
        if visit is not None and (site.drawn or site.factor):
            visit(site, costs)
        if site.enum_dim is not None:
            costs.expect(site, probabilities(site, layout), layout.frames(site))
    return costs


def is_dropped(site: Site) -> bool:
    """Whether −log q of a guide's site enters by its value only, without a derivative but that of its scale."""
    return site.factor or (site.estimator is not None and site.estimator.log_q == "value")


def has_term(site: Site) -> bool:
    """Whether the site's estimator adds a term, or has state; the path of a reparameterized draw needs neither."""
    kind = type(site.estimator)
    return (
        kind.surrogate is not Estimator.surrogate
        or kind.make_state is not Estimator.make_state
        or (site.estimator.has_path and site.score is not None)
    )


def sloping_cost(run: Run, site: Site, costs: CostToGo, layout: Layout) -> Tensor | None:
    """The cost at a site as a function of its draw, each term counted once; None if its slope is not needed."""
    if not site.estimator.takes_slope or not torch.is_grad_enabled():
        return None
    later = run.guide[next(i for i, other in enumerate(run.guide) if other is site) :]
    # These terms are in the cost as numbers, without a derivative, although they depend on the draw.
    counted = [other.with_gradient_of(log_prob=True).sum() for other in later if is_dropped(other)]
    return layout.cost_once(site, costs) - layout.kl_weight * sum(counted)


@dataclass
class Row:
    """A draw of one site, with its cost and the probability of the enumerated choices before it.

    ``once`` is the cost with each term counted once, differentiable, for estimators that use its slope; ``slope`` is
    its derivative with respect to the draw, where it is known already.
    """

    run: Run
    site: Site
    cost: Tensor
    weight: Tensor | None = None
    once: Tensor | None = None
    slope: Tensor | None = None


MakeView = Callable[[list[Row], "Tensor | None", Tensor, Any], SiteView]


@dataclass
class Recorded:
    """What one call of a loss recorded of the programs.

    Attributes:
        groups: for each group of vectorized particles, its runs: one for each path through enumerated values.
        layout: the layout of the terms' dimensions.
        view: ``view(rows, log_prob, cost, bound)`` makes an estimator's :class:`SiteView`.
        again: ``again()`` reruns the programs at the same, detached values; returns the same groups.
        report: ``report(name, value)`` stores a further value of this call, a scalar in nats, summed like the
            objective and over the rows of all processes (``layout.whole``).
    """

    groups: list[list[Run]]
    layout: Layout
    view: MakeView
    again: Callable[[], list[list[Run]]]
    report: Callable[[str, Tensor], None] = lambda name, value: None


def factor_share(run: Run, site: Site, costs: CostToGo, layout: Layout) -> Tensor:
    """The gradient term of a guide's factor: its score times the cost of the draws that it represents.

    These draws were made anywhere before it, so that earlier statements may depend on them too.
    """
    costs = CostToGo(dict(costs.terms))
    upstream = run.guide[: next(i for i, other in enumerate(run.guide) if other is site)]
    for other in reversed(upstream):
        costs.add(other.frames, -layout.kl_weight * other.log_prob)
        costs.keep_only(layout.apart(other.frames))
    frames = layout.frames(site)
    costs.keep_only(frames)
    return weighed_by_enumerated(
        layout.cost(site, costs).detach() * summed_to(site.score, site.frames, frames), run, site, layout
    )


def weighed_by_enumerated(surrogate: Tensor, run: Run, site: Site, layout: Layout) -> Tensor:
    """The expectation of a site's term under upstream enumerated sites; downstream ones are summed out."""
    costs = CostToGo({layout.frames(site): surrogate})
    if surrogate.dim() > layout.room:
        upstream = run.guide[: next(i for i, other in enumerate(run.guide) if other is site)]
        for other in reversed(upstream):
            if other.enum_dim is not None:
                costs.expect(other, probabilities(other, layout).detach(), layout.frames(other))
    return costs.scalar()


def weighed(total: Tensor, chosen: list[tuple[str, Tensor]]) -> Tensor:
    """A path's total times the probability of its choices; impossible choices contribute zero."""
    if not chosen:
        return total
    weight = math.prod(q for _, q in chosen)
    return weight * torch.where(weight > 0, total, torch.zeros_like(total))


class Differentiated(torch.autograd.Function):
    """A value whose gradient has been found already, so that no backward pass finds it again."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, gradients: list[Tensor], *leaves: Tensor) -> Tensor:
        ctx.gradients = gradients
        return value.clone()

    @staticmethod
    def backward(ctx: Any, scale: Tensor) -> tuple:
        return None, None, *(scale * gradient for gradient in ctx.gradients)


def leaves_of(total: Tensor) -> list[Tensor] | None:
    """The leaves that a scalar can be differentiated for; None where a hook would meet their gradients twice."""
    waiting: list[Any] = [total.grad_fn]
    seen, found = set(waiting), []
    while waiting:
        node = waiting.pop()
        if (leaf := getattr(node, "variable", None)) is not None:
            if leaf._backward_hooks:
                return None
            found.append(leaf)
        for following, _ in node.next_functions:
            if following is not None and following not in seen:
                seen.add(following)
                waiting.append(following)
    return found


def with_slopes(total: Tensor, run: Run, layout: Layout, found: list) -> tuple[Tensor, dict[str, Tensor]]:
    """The total of a run, and the slopes of the cost at its draws, by one backward pass for the slopes and the total.

    The cost at a site is the total less what came before its draw, so that one derivative of the total has the slopes
    at all sites. The total that is returned has the gradient that the same pass found for all other leaves. Where a
    site asks for no slope, none are returned, and each is found when it is asked for.
    """
    sites = [site for site, _, once in found if once is not None]
    if not sites or len(sites) < len(found) or not total.requires_grad or (known := leaves_of(total)) is None:
        return total, {}
    draws = [site.draw.value for site in sites]
    own = {id(draw) for draw in draws}
    leaves = [leaf for leaf in known if id(leaf) not in own]
    gradients = torch.autograd.grad(total, [*draws, *leaves], retain_graph=True, allow_unused=True)
    found_by: dict[str, Any] = {site.name: gradient for site, gradient in zip(sites, gradients, strict=False)}
    dropped = [site.with_gradient_of(log_prob=True).sum() for site in run.guide if is_dropped(site)]
    counted = sum(dropped, start=total.new_zeros(()))
    if counted.requires_grad:  # terms that are in the cost as numbers, although they depend on the draws
        others = torch.autograd.grad(counted, draws, retain_graph=True, allow_unused=True)
        for site, other in zip(sites, others, strict=True):
            here = found_by[site.name]
            if other is not None:
                found_by[site.name] = (0.0 if here is None else here) - layout.kl_weight * other
    slopes = {
        site.name: torch.zeros_like(draw) if (slope := found_by[site.name]) is None else slope
        for site, draw in zip(sites, draws, strict=True)
    }
    parts = [(g, leaf) for g, leaf in zip(gradients[len(draws) :], leaves, strict=True) if g is not None]
    settled = Differentiated.apply(total.detach(), [g for g, _ in parts], *(leaf for _, leaf in parts))
    return first_order(settled, total), slopes


def elbo_value(groups: list[list[Run]], layout: Layout, view: MakeView) -> Tensor:
    """The evidence lower bound, averaged over particles.

    ``groups`` holds, for each group of vectorized particles, its paths through enumerated values.
    """
    value: Any = None
    # Draws of a site after the same enumerated choices in several particles: leave-one-out compares these.
    rows: dict[tuple, list[Row]] = defaultdict(list)
    terms: list[Tensor] = []
    alone = len(groups) == 1 and len(groups[0]) == 1  # otherwise the costs of all particles are compared in shape
    for paths in groups:
        for run in paths:
            found: list[tuple[Site, Tensor | None, Tensor | None]] = []
            factors: list[Tensor] = []

            def visit(site: Site, costs: CostToGo, run=run, found=found, factors=factors) -> None:
                if site.factor:
                    factors.append(factor_share(run, site, costs, layout))
                elif alone and not has_term(site):
                    found.append((site, None, None))
                else:
                    found.append((site, layout.cost(site, costs).detach(), sloping_cost(run, site, costs, layout)))

            total = walk_back(run, layout, visit).scalar()
            slopes: dict[str, Tensor] = {}
            listed = run.choices or any(site.enum_dim is not None for site in run.guide)
            if not listed and not factors:
                total, slopes = with_slopes(total, run, layout, found)
            chosen = [(site.name, site.score.sum().exp()) for site in run.guide if site.name in run.choices]
            value = weighed(total, chosen) if value is None else value + weighed(total, chosen)
            terms += [weighed(share, [(name, q.detach()) for name, q in chosen]) for share in factors]
            _share(paths, run, found, chosen, rows, slopes)
    if torch.is_grad_enabled():  # otherwise the reruns of estimators have no use
        terms += [site_surrogate(members, layout, view) for members in rows.values()]
    value = with_terms(value, terms)
    return value / layout.num_particles if layout.num_particles > 1 else value


def _share(
    paths: list[Run], run: Run, found: list, chosen: list, rows: dict[tuple, list[Row]], slopes: dict[str, Tensor]
) -> None:
    """Paths that agree up to a site share its draw; the cost there is their expectation over later choices."""
    order = {site.name: i for i, site in enumerate(run.guide)}
    for site, cost, once in found:
        if cost is None:
            continue
        made = tuple((name, run.choices[name]) for name, _ in chosen if order[name] < order[site.name])
        if not chosen:
            rows[site.name, made].append(Row(run, site, cost, once=once, slope=slopes.get(site.name)))
            continue
        before = math.prod((q for name, q in chosen if order[name] < order[site.name]), start=cost.new_ones(()))
        after = math.prod((q for name, q in chosen if order[name] > order[site.name]), start=cost.new_ones(()))
        share = torch.where(after > 0, after * cost, torch.zeros_like(cost)).detach()
        if once is not None:
            once = torch.where(after > 0, after.detach() * once, 0.0)
        # Paths run one particle after the other, so this particle's row, if any, is the last one.
        last = rows[site.name, made][-1] if rows[site.name, made] else None
        if last is not None and any(last.run is other for other in paths):
            last.cost = last.cost + share
            last.once = None if once is None or last.once is None else last.once + once
        else:
            rows[site.name, made].append(Row(run, site, share, before.detach(), once))


def cost_at(name: str, paths: list[Run], layout: Layout) -> tuple[Tensor, Tensor]:
    """The cost-to-go at one site, in expectation over the values enumerated after it; differentiable.

    Returned by element of the site's plates, and summed with each term counted once: a term outside a plate is part of
    every element's cost, so that the sum of the elements counts it too often.
    """
    cost: Any = 0.0
    total: Any = 0.0
    for run in paths:
        found: dict[str, tuple[Tensor, Tensor]] = {}

        def visit(site: Site, costs: CostToGo, found: dict = found) -> None:
            if site.name == name:
                found[name] = layout.cost(site, costs), layout.cost_once(site, costs)

        walk_back(run, layout, visit)
        order = [site.name for site in run.guide]
        later = [
            s.score.sum().exp() for s in run.guide if s.name in run.choices and order.index(s.name) > order.index(name)
        ]
        own, once = found[name]
        if later:
            share = math.prod(later)
            own, once = (torch.where(share > 0, share * term, 0.0) for term in (own, once))
        cost, total = cost + own, total + once
    return cost, total


def joined_dims(runs: list[Run], name: str, layout: Layout) -> tuple[int, ...]:
    """The plate dimensions of a site along which a later statement may combine its elements.

    This is any later statement outside the plate: of the guide, or of the model from the first statement of this site,
    or of one that the guide draws after it, on.
    """
    joined: set[int] = set()
    for run in runs:
        order = [site.name for site in run.guide]
        here = run.guide[order.index(name)]
        later = run.guide[order.index(name) + 1 :]
        met = {name, *(site.name for site in later)}
        first = next((i for i, site in enumerate(run.model) if site.name in met), len(run.model))
        kept = [layout.apart(site.frames) for site in (here, *later, *run.model[first:])]
        joined |= {dim for frames in kept for _, dim, _ in here.frames - frames}
    return tuple(sorted(joined))


def site_surrogate(rows: list[Row], layout: Layout, view: MakeView) -> Tensor:
    """One site's gradient term, summed over particles; its value is meaningless."""
    site, run = rows[0].site, rows[0].run
    frames = layout.frames(site)
    try:
        log_prob = None
        if site.score is not None:
            log_prob = layout.join([summed_to(row.site.score, row.site.frames, frames) for row in rows])
        cost = layout.join([row.cost for row in rows])
    except RuntimeError as error:
        raise BadInput(f"site {site.name!r} has another shape in every particle, so they cannot be compared") from error
    surrogate = layout.surrogate(site, view(rows, log_prob, cost, None))
    if surrogate is None:
        return cost.new_zeros(())
    check_shape(surrogate, cost, site, layout)
    if rows[0].weight is not None:
        return (layout.join([row.weight.reshape((1,) * layout.room) for row in rows]) * surrogate).sum()
    return weighed_by_enumerated(surrogate, run, site, layout)


def check_shape(surrogate: Tensor, cost: Tensor, site: Site, layout: Layout) -> None:
    """Refuse a surrogate of another shape, which would be broadcast and counted too often or too rarely."""
    if surrogate.shape[-layout.room :] != cost.shape[-layout.room :]:
        raise BadInput(
            f"estimator {site.estimator.name!r} at site {site.name!r} returned a surrogate of shape"
            f" {tuple(surrogate.shape)} where the cost has {tuple(cost.shape)}"
        )


def common_frames(runs: list[Run], layout: Layout) -> Frames:
    """The plates that enclose every site: each of their elements has one importance weight."""
    frames = [layout.apart(site.frames) for run in runs for site in run.sites if site.latent or not site.settled]
    return frozenset.intersection(*frames) if frames else NO_FRAMES
