"""Further runs of the programs in one call: the cost of other draws, and log q through values only."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ...errors import CallsAutograd, UnsupportedSite
from ..estimators import Estimator, GumbelSoftmax, Pathwise
from ..estimators._base import Draw, pad_left
from ..estimators._distributions import describe, has_score_term
from ..estimators.relaxation import Mean
from .contents import closed_over
from .first_order import first_order
from .programs import Program
from .records import Run, Site
from .terms import Layout, Row, cost_at

Cost = Callable[[Run, Draw], Tensor]


class RunsAgain(Exception):
    """Raised if an estimator reruns programs whose noise was not separate in the first run."""


@dataclass
class Reruns:
    """Reruns the programs of one call, at recorded draws or at other draws of one site.

    Attributes:
        program, layout, args, kwargs: those of the call.
        stand_ins: the relaxations and means that sites take in further runs, cached.
        stacks: whether many alternatives of a draw run at once.
        at_once: the largest number of particles × alternatives per run, which bounds memory.
        calls_autograd: whether the programs compute gradients themselves; set when a run without gradients fails.
    """

    program: Program
    layout: Layout
    args: tuple
    kwargs: Mapping[str, Any]
    stand_ins: dict[Any, Estimator] = field(default_factory=dict)
    stacks: bool = True
    at_once: int = 64
    calls_autograd: bool = False

    def through_values(self, groups: list[list[Run]]) -> None:
        """Where log q is differentiated through values only, take it from a second run with frozen parameters."""
        for run in (run for paths in groups for run in paths):
            sites = [site for site in run.guide if site.estimator is not None and site.estimator.log_q == "path"]
            if not sites:
                continue
            again = self._at(run, {site.name: site.draw for site in run.guide if site.latent}, with_model=False)
            for site in sites:
                log_prob = _rescaled(again.guide_site(site.name), site)
                site.log_prob = first_order(log_prob.view_as(log_prob), log_prob)

    def cut(self, groups: list[list[Run]]) -> list[list[Run]]:
        """The same runs with detached values."""

        def leaf(tensor: Tensor) -> Tensor:
            return tensor.detach().requires_grad_(tensor.requires_grad)

        return [
            [self._at(run, {site.name: site.draw.map(leaf) for site in run.guide if site.latent}) for run in paths]
            for paths in groups
        ]

    def _at(self, run: Run, draws: dict[str, Draw], with_model: bool = True) -> Run:
        """A run at these draws; one of the guide alone is with its parameters frozen."""
        # With the model nothing is frozen: the guide may hand it more than draws, and that gradient must stay.
        still = nullcontext() if with_model else frozen(_parts(self.program.guide), run.guide_params.values())
        return self.program.run(
            self.args,
            self.kwargs,
            fixed=draws,
            subsamples=run.subsamples,
            choices=dict(run.choices),
            noise=run.noise,
            with_model=with_model,
            around_guide=still,
        )

    def evaluate(
        self, rows: list[Row], draw: Draw, downstream: str = "draw", differentiable: bool = False
    ) -> Tensor | tuple[Tensor, Tensor]:
        """The cost at a site for alternative draws of it; see :class:`SiteView`."""
        run, site = rows[0].run, rows[0].site
        totals: list[Tensor] = []

        def cost(run: Run, alternative: Draw) -> Tensor:
            found, total = self._cost(run, site.name, alternative, downstream, differentiable)
            totals.append(total)
            return found

        programs = [self.program.model, self.program.guide]
        still = frozen(programs, [*run.guide_params.values(), *run.model_params.values()])
        with still if differentiable else nullcontext():
            if not self.program.vectorized:
                costs = self._particle_by_particle(rows, draw, cost)
            elif len(draw.value) == 1 or run.noise is None or run.noise.drew or not self.stacks:
                # The programs' own noise would have another shape for many alternatives than for the draw.
                costs = self._one_by_one(run, site, draw, cost)
            else:
                costs = self._stacked(run, site, draw, cost)
        return (costs, torch.stack(totals).sum()) if differentiable else costs

    def _cost(
        self, run: Run, name: str, alternative: Draw, downstream: str, differentiable: bool
    ) -> tuple[Tensor, Tensor]:
        """The cost at a site in a run with another draw of it: by element, and with each term counted once."""
        if run.noise is None:
            raise RunsAgain
        options = {
            "subsamples": run.subsamples,
            "fixed": {other.name: other.draw.map(Tensor.detach) for other in run.upstream(name) if other.latent},
            "stand_in": partial(stand_in, name, downstream, self.stand_ins),
            "noise": run.noise,
        }
        options["fixed"][name] = alternative
        if downstream == "draw" and not differentiable and self._repeats(run):
            options["statements"] = run.statements

        def evaluated() -> tuple[Tensor, Tensor]:
            again = self.program.paths(self.args, self.kwargs, **options)
            paths = [self.program.run(self.args, self.kwargs, **options)] if self.program.vectorized else list(again)
            return cost_at(name, paths, self.layout)

        return evaluated() if differentiable else self._without_gradients(evaluated)

    def _repeats(self, run: Run) -> bool:
        """Whether the guide's statements can be repeated without its body, for other draws of its sites.

        The guide declares it by ``factorized = True``. Its body runs again where it draws noise of its own, where hooks
        are to see it, and where a handler around it changes its sites.
        """
        guide: Any = self.program.guide
        return (
            getattr(type(guide), "factorized", False)
            and self.program.vectorized
            and not self.program.lists_chains
            and not run.noise.drew
            and not (guide._forward_hooks or guide._forward_pre_hooks or "forward" in vars(guide))
            and all(site.latent and site.estimator is not None for site in run.guide)
        )

    def _particle_by_particle(self, rows: list[Row], draw: Draw, cost: Cost) -> Tensor:
        def alone(alternative: int, particle: int, row: Row) -> Draw:
            shape, dim = row.site.draw.value.shape, -self.layout.room - row.site.fn.event_dim
            return draw.map(lambda t: t[alternative].select(dim, particle).reshape(shape))

        return torch.stack(
            [
                self.layout.join([cost(row.run, alone(a, k, row)) for k, row in enumerate(rows)])
                for a in range(len(draw.value))
            ]
        )

    def _width(self) -> int:
        """The dimensions of alternatives are left of all others, enumerated sites included."""
        return 1 + self.layout.room + len(self.program.enum_dims)

    def _one_by_one(self, run: Run, site: Site, draw: Draw, cost: Cost) -> Tensor:
        """Without leading dimensions, each alternative gets the shape that the program gave the draw.

        A draw that was expanded over upstream enumerated values keeps their dimensions.
        """
        shape = site.draw.value.shape
        same = draw.value[0].numel() == shape.numel()
        found = []
        for a in range(len(draw.value)):
            found.append(cost(run, draw.map(lambda t, a=a: t[a].reshape(shape) if same else t[a])))
            if not same and not run.noise.fits:
                raise UnsupportedSite(
                    site.name,
                    site.estimator.name,
                    "the programs draw noise of their own (dropout), in another shape where the draw is expanded"
                    " over the values enumerated upstream; pass vectorize_particles=False",
                )
        if len(found) == 1:
            return found[0].unsqueeze(0)
        return torch.stack([pad_left(cost, self._width() - 1) for cost in found])

    def _stacked(self, run: Run, site: Site, draw: Draw, cost: Cost) -> Tensor:
        width, event_dim = self._width(), site.fn.event_dim
        at_once = max(1, self.at_once // self.program.num_particles)
        found = []
        for part in range(0, len(draw.value), at_once):
            piece = draw.map(lambda t, p=part: t[p : p + at_once])
            piece = piece.map(lambda t: t.reshape(t.shape[:1] + (1,) * (width - (t.dim() - event_dim)) + t.shape[1:]))
            costs, size = cost(run, piece), len(piece.value)
            if costs.dim() < width or costs.shape[0] != size:
                costs = pad_left(costs, width).expand((size,) + (-1,) * (width - 1))
            found.append(costs)
        return torch.cat(found)

    def _without_gradients(self, evaluate: Callable[[], tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        """The result of ``evaluate``, without gradients unless the programs themselves need them."""
        if not self.calls_autograd:
            try:
                with torch.no_grad():
                    return evaluate()
            except CallsAutograd:
                self.calls_autograd = True
        with torch.enable_grad():
            cost, total = evaluate()
        return cost.detach(), total.detach()


def stand_in(
    name: str, downstream: str, known: dict[Any, Estimator], msg: Mapping[str, Any], estimator: Estimator, fixed: bool
) -> Estimator:
    """The estimator of a site in a second run: its own, a relaxation, or its mean; cached in ``known``."""
    if downstream == "draw" or (fixed and msg["name"] != name):
        return estimator
    key = (msg["name"], describe(msg["fn"]), downstream)
    if key in known:
        return known[key]
    site = {"name": msg["name"], "fn": msg["fn"]}
    for other in (GumbelSoftmax(), Pathwise()) if downstream == "soft" else (Mean(),):
        # The path of a rejection sampler is discontinuous where another proposal is accepted.
        if other.supports(site) and not (downstream == "soft" and has_score_term(msg["fn"])):
            known[key] = other
            return other
    raise UnsupportedSite(
        msg["name"],
        estimator.name,
        f"an estimator upstream differentiates through it, and {describe(msg['fn'])} cannot be relaxed",
    )


def _rescaled(again: Site, site: Site) -> Tensor:
    """Log q of the second run; its scale is the first run's, whose parameters are not frozen."""
    if site.unscaled is None:
        return again.log_prob
    return again.with_gradient_of(log_prob=True) + site.with_gradient_of(scale=True) - site.log_prob.detach()


def _parts(program: Any) -> list[Any]:
    """A program with the object that it is a method of, and what it closes over."""
    return [program, getattr(program, "__self__", None), *closed_over(program)]


@contextmanager
def frozen(programs: list[Any], params: Iterable[Any]) -> Iterator[None]:
    """Record no gradients for parameters; values in the programs keep theirs."""
    leaves: dict[int, Tensor] = {}
    for program in programs:
        if isinstance(program, nn.Module):
            leaves.update({id(p): p for p in nn.Module.parameters(program)})
        elif isinstance(program, Tensor) and program.is_leaf:
            leaves[id(program)] = program
    for value in params:
        leaf = value.unconstrained() if hasattr(value, "unconstrained") else value
        if isinstance(leaf, Tensor) and leaf.is_leaf:
            leaves[id(leaf)] = leaf
    thawed = [leaf for leaf in leaves.values() if leaf.requires_grad]
    try:
        for leaf in thawed:
            leaf.requires_grad_(False)
        with warnings.catch_warnings():
            # Pyro warns that it does not register frozen parameters, which is intended.
            warnings.filterwarnings("ignore", message=".*was not registered in the param store")
            yield
    finally:
        for leaf in thawed:
            leaf.requires_grad_(True)
