"""One loss bound to a model and a guide: the inspection of the programs, and the value of a call."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import pyro
import torch
from torch import Tensor, nn

from ...errors import ANY, PROGRAM, BadInput, CallsAutograd, CannotVectorize, GumboError, GumboWarning, UnsupportedSite
from ..estimators import Estimator
from ..estimators._base import at_step
from ..estimators._distributions import has_score_term
from .elimination import NeedsListing, TooMuchMemory
from .handlers import in_chain
from .looks import looking, one_particle, plates_mixed_by
from .messenger_guides import as_program
from .noise import current_tape
from .programs import Program, check_same_kind
from .records import Run, Site
from .reruns import Reruns, RunsAgain
from .resolution import Resolution, Words
from .scopes import check_shared_names, devices_of, one_at_a_time
from .streams import Generators
from .terms import Layout, NeedsJoint, Recorded
from .vectorizing import check_at_once, check_listed, differs_listed
from .views import Inputs, Views

ONE_BY_ONE = "are run one by one"
SIZES = 4  # the number of batch sizes per mode for which the programs are checked


class Loss(Words, Protocol):
    """The interface of a loss that a binding needs; :class:`SiteELBO` implements it."""

    requested_nesting: int | None
    requested_vectorized: bool | None
    vectorize_particles: bool
    undecided: bool
    decided: Callable[..., Any]
    kl_weight: float | Callable[[int], float]
    max_alternatives: int
    begins_with: Mapping[str, Any] | None
    memory_limit: float


@dataclass(frozen=True)
class Pair:
    """The programs of a binding, whose parameters belong to the binding's owner.

    ``program`` runs as the guide: the guide itself, or a program that wraps a guide which runs the model.
    """

    model: Callable
    guide: Callable
    program: Callable


class Binding(nn.Module):
    """The state of one loss for one model and guide: sites, plates, particles, and the estimators' state."""

    uncaptured = frozenset({"steps"})

    def __init__(self, elbo: Loss, model: Callable, guide: Callable):
        super().__init__()
        self.elbo, self.pair = elbo, Pair(model, guide, as_program(guide))
        self.resolution = Resolution(elbo)
        self.chosen: dict[str, Estimator] = {}  # the estimators of the sites in the first call
        self.enum_dims: dict[str, int] = {}
        self.stand_ins: dict[Any, Estimator] = {}
        self.states = nn.ModuleDict()
        self.steps = 0
        self.num_particles: int | None = None
        self.max_plate_nesting: int | None = None
        self.mixed_plates: tuple[str, ...] = ()
        self.looks: set[tuple[Any, ...]] = set()  # modes and batch sizes in which the programs were checked
        self.modules_met: list[nn.Module] = []
        self.generators = Generators()
        self.stacks = True  # whether many alternatives of a draw run at once
        self.runs_again = False  # if so, the programs' own noise is kept separate
        self.make_layout: Callable[..., Layout] = Layout
        self.checks_plates = True  # whether plates="check" checks the programs; False if they were checked before
        self.lists_chains = False  # whether enumerated sites under pyro.markov are summed out by elimination
        self.shares_dims = True  # whether elements of a sequential plate are enumerated along the same dimensions
        self.apart = False  # whether particles, and enumerated values, run one by one
        self.scored = False  # whether a factor, or a draw with a path, leaves a score term
        self.calls_autograd = False  # set when a run without gradients fails for this reason

    @property
    def model(self) -> Callable:
        return self.pair.model

    @property
    def guide(self) -> Callable:
        return self.pair.program

    @property
    def joint(self) -> set[str]:
        """The enumerated sites whose values are enumerated jointly over their plates."""
        return self.resolution.joint

    def has_state(self) -> bool:
        return len(self.states) > 0

    def get_extra_state(self) -> dict[str, int]:
        return {"steps": self.steps}

    def set_extra_state(self, state: dict[str, int]) -> None:
        self.steps = int(state["steps"])

    def ready(self) -> bool:
        return self.num_particles is not None

    def state_of(self, site: Site, inputs: Callable[[], list[Tensor]]) -> nn.Module | None:
        """The module of a site's estimator; it is created for a site that was not in the first call."""
        key = _key(site.name)
        if key not in self.states:
            state = site.estimator.make_state({"name": site.name, "fn": site.fn, "infer": site.infer}, inputs)
            if state is None:
                return None
            if site.name not in self.chosen and any(True for _ in state.parameters()):
                raise UnsupportedSite(
                    site.name,
                    site.estimator.name,
                    "it has parameters to learn, and the site did not show in the first call, when optimizers ask",
                )
            self.states[key] = state.to(site.log_prob.device)
        return self.states[key]

    # The first call, and checks of the programs.

    def initialize(self, args: tuple, kwargs: Mapping[str, Any]) -> None:
        """Run the programs once to find their sites; random state and statistics are restored."""
        if self.ready():
            return
        if self.elbo.undecided:
            self.elbo = self.elbo.decided(self.model, self.guide, [(args, kwargs)])
            self.resolution = Resolution(self.elbo)
        if _handles_itself(self.guide):
            raise BadInput(
                f"the guide is {type(self.guide).__name__}, a handler and no program: pass a function or a module that "
                "draws the latents, such as an autoguide"
            )
        with one_at_a_time, looking(self.model, self.guide, *args) as met:
            if self.ready():
                return
            program = one_particle(self.model, self.guide, self.elbo.requested_nesting, self.resolution.as_drawn)
            program.generators = Generators(devices_of(self.model, self.guide, *args), others=True)
            program.eliminates = False  # sites that are summed out are drawn once, as values for comparison
            seen = program.run(args, kwargs)
            program.eliminates = True
            self.modules_met = list(met)
            self.generators = Generators(program.generators.devices, others=seen.noise.drew_elsewhere)
            self._study(program, seen, args, kwargs)

    def look(self, args: tuple, kwargs: Mapping[str, Any]) -> None:
        """Check for dependent rows within a plate, once in each mode and for each of the first batch sizes."""
        mode = tuple([module.training for module in self.modules_met])
        size = tuple([item.shape[:1] for item in (*args, *kwargs.values()) if isinstance(item, Tensor)])
        if (mode, size) in self.looks or not self._needs_plates() or current_tape():
            return
        if sum(mode == other for other, _ in self.looks) < SIZES:
            nesting = self.max_plate_nesting or self.elbo.requested_nesting
            with one_at_a_time:
                found = plates_mixed_by(self.model, self.guide, args, kwargs, nesting, self.resolution.as_drawn)
            if new := sorted(found.difference(self.mixed_plates)):
                self.mix(new)
        self.looks.add((mode, size))

    def _needs_plates(self) -> bool:
        """Whether anything is estimated per row: without surrogates and weights all terms are summed anyway."""
        weighs = (type(e).surrogate is not Estimator.surrogate or e.enumerates for e in self.chosen.values())
        return (
            self.elbo.plates == "check"
            and self.checks_plates
            and (self.elbo.target.weighs_rows or self.scored or any(weighs))
        )

    def mix(self, plates: list[str]) -> None:
        """Record that rows of these plates are dependent: they are summed, or the objective refuses them."""
        what = f"a change of one row's draw changes other rows of plate {plates[0]!r}"
        if self.elbo.target.weighs_rows:
            raise UnsupportedSite(
                PROGRAM,
                ANY,
                f"{what} (a layer such as BatchNorm mixes them), so that there is no weight per row under"
                f" objective {self.elbo.objective!r}; pass plates='ignore' for one weight for all rows, or"
                " plates='trust'",
            )
        if self.looks and any(estimator.lazy_parameters for estimator in self.chosen.values()):
            raise BadInput(
                f"{what} in this mode or for this batch size, and a network was built for independent rows:"
                " call loss.initialize(x) in training mode, or pass plates='ignore'"
            )
        self.mixed_plates = (*self.mixed_plates, *plates)
        self.joint.update(name for name, estimator in self.chosen.items() if estimator.enumerates)

    def _study(self, program: Program, seen: Run, args: tuple, kwargs: Mapping[str, Any]) -> None:
        check_shared_names(self.pair.model, self.pair.guide)
        check_same_kind(seen)
        chosen = self.resolution.of_all(seen)
        if seen.eliminated:
            self._check_weight(seen.eliminated)
        chains = [site.name for site in seen.guide if in_chain({"infer": site.infer}, chosen.get(site.name))]
        self.lists_chains = bool(chains) and self.vectorized
        if self.lists_chains:
            for name, estimator in chosen.items():  # dimensions of enumerated chains are to the left of these
                if estimator.enumerates and name not in chains:
                    self.enum_dims.setdefault(name, -(2 + program.max_plate_nesting + len(self.enum_dims)))
        if seen.eliminated or self.lists_chains:
            self._settle_listed(program, seen, args, kwargs, chains)
        needed = max([self.elbo.target.min_particles, *(estimator.min_particles for estimator in chosen.values())])
        self.chosen = chosen
        self.scored = any(site.factor or (site.latent and has_score_term(site.fn)) for site in seen.guide)
        self.look(args, kwargs)
        trusted = self.elbo.plates != "ignore"
        layout = Layout(1 + program.max_plate_nesting, 1, trust_plates=trusted, mixed_plates=self.mixed_plates)
        for site in seen.guide:
            if site.name in chosen:
                self.state_of(site, partial(self._inputs(layout, args, kwargs), [seen], site))
        for name in self.elbo.target.reports:
            # A buffer, so that a captured step can write it; checkpoints do not hold it.
            zero = torch.zeros((), dtype=torch.float64, device=seen.sites[0].log_prob.device if seen.sites else None)
            self.register_buffer(f"reported_{name}", zero, persistent=False)
        self.max_plate_nesting = program.max_plate_nesting
        self.num_particles = self.elbo.requested_particles or needed
        leading = self.num_particles > 1 or any(e.enumerates or e.reruns for e in chosen.values())
        if self.vectorized and leading:
            try:
                self._settle(seen, args, kwargs)
            except GumboError:
                self.num_particles = None
                raise
        self.runs_again = any(e.runs_again or (e.enumerates and not self.vectorized) for e in chosen.values())
        if self.elbo.begins_with is not None:
            self._begin_with(self.elbo.begins_with)

    def _begin_with(self, state: Mapping[str, Any]) -> None:
        try:
            self.load_state_dict(dict(state))
        except (RuntimeError, AttributeError, TypeError, ValueError, LookupError) as error:
            self.num_particles = None
            said = " ".join(str(error).split())
            raise BadInput(
                f"what an earlier training left of this loss does not fit these programs ({said})"
            ) from error

    def _check_weight(self, eliminated: Sequence[str]) -> None:
        """Refuse a weight of latent terms if a latent site has no term of its own."""
        if callable(self.elbo.kl_weight) or self.elbo.kl_weight != 1:
            raise UnsupportedSite(
                eliminated[0],
                ANY,
                "the model sums over it, which leaves no log p(z) − log q(z) of its own for kl_weight to weigh; leave"
                " kl_weight at 1, or draw the site in the guide (where 'enumerate' sums over it exactly)",
            )

    def _settle_listed(
        self, program: Program, seen: Run, args: tuple, kwargs: Mapping[str, Any], chains: Sequence[str]
    ) -> None:
        """Determine the sites to enumerate jointly over their plates, and whether elimination serves the chains."""
        program.joint, program.memory_limit = self.joint, self.elbo.memory_limit * 2**30
        program.resolve = partial(self._as_listed, chains)
        if self.elbo.plates == "ignore":
            self.joint.update((*seen.eliminated, *(chains if self.lists_chains else ())))
        plates = {site.name: site.frames for site in seen.sites}
        while seen.eliminated or self.lists_chains:
            program.lists_chains, program.shares_dims = self.lists_chains, self.shares_dims
            try:
                difference = check_listed(program, seen, args, kwargs, chains if self.lists_chains else ())
            except NeedsJoint as mixed:
                self._list_jointly(mixed.site)
                continue
            except NeedsListing:
                self.lists_chains = False
                continue
            except UnsupportedSite as error:
                if isinstance(error, TooMuchMemory):
                    raise
                if self.shares_dims and seen.loops:
                    self.shares_dims = False
                    continue
                if not self.lists_chains:
                    raise
                self.lists_chains = False
                continue
            if difference is None:
                return
            if self.shares_dims and seen.loops:
                self.shares_dims = False
                continue
            site, reason, names = difference
            apart = [name for name in names if plates[name] and name not in self.joint]
            if apart and self.elbo.plates != "trust":
                self.joint.update(apart)
            elif self.lists_chains:
                self.lists_chains = False
            else:
                raise differs_listed(site, reason, names)

    def _as_listed(self, chains: Collection[str], msg: Mapping[str, Any]) -> Estimator | None:
        return self.resolution(msg) if msg["name"] in chains else self.resolution.as_drawn(msg)

    def _list_jointly(self, site: str) -> None:
        if site in self.joint:
            raise UnsupportedSite(
                site, "enumerate", "a later plate combines its values in a way that cannot be enumerated"
            ) from None
        self.joint.add(site)

    def _settle(self, seen: Run, args: tuple, kwargs: Mapping[str, Any]) -> None:
        """Determine what runs at once: particles and alternatives, enumerated values only, or nothing."""
        reruns = any(estimator.reruns for estimator in self.chosen.values())
        try:
            # Two particles test alternatives, which run in another leading dimension.
            self._check(seen, args, kwargs, max(self.num_particles, 2) if reruns else self.num_particles)
            return
        except GumboError as error:
            if not _of_the_dimensions(error):
                raise
            first = error
        if self.num_particles == 1 and reruns:
            self.stacks = False
            if not any(estimator.enumerates for estimator in self.chosen.values()):
                return
            self.enum_dims.clear()
            try:
                self._check(seen, args, kwargs, 1)
                return
            except GumboError as error:
                if not _of_the_dimensions(error):
                    raise
        if self.elbo.requested_vectorized:
            raise first
        self.enum_dims.clear()
        self.apart = True
        what = "particles" if self.num_particles > 1 else "enumerated values"
        why = str(first).split("; pass vectorize_particles")[0]
        warnings.warn(
            f"{why}; {what} {ONE_BY_ONE} (vectorize_particles=False does so without this warning)",
            GumboWarning,
            stacklevel=2,
        )

    def _check(self, seen: Run, args: tuple, kwargs: Mapping[str, Any], num_particles: int) -> None:
        while True:
            program = self.program()
            program.num_particles, program.generators = num_particles, self.generators
            try:
                check_at_once(program, seen, args, kwargs)
                return
            except NeedsJoint as mixed:
                self._list_jointly(mixed.site)
            except NeedsListing:
                self.lists_chains = False

    # Every call.

    @property
    def vectorized(self) -> bool:
        """Whether leading dimensions are in use; a single particle without enumeration needs none."""
        return self.elbo.vectorize_particles and not self.apart

    def program(self) -> Program:
        return Program(
            self.model,
            self.guide,
            resolve=self.resolution,
            num_particles=self.num_particles,
            max_plate_nesting=self.max_plate_nesting,
            vectorized=self.vectorized,
            joint=self.joint,
            enum_dims=self.enum_dims,
            step=self.steps,
            generators=self.generators if self.runs_again else None,
            memory_limit=self.elbo.memory_limit * 2**30,
            lists_chains=self.lists_chains and self.vectorized,
            shares_dims=self.shares_dims,
            kl_weight=at_step(self.elbo.kl_weight, self.steps),
        )

    def layout(self) -> Layout:
        return self.make_layout(
            room=1 + self.max_plate_nesting,
            num_particles=self.num_particles,
            kl_weight=at_step(self.elbo.kl_weight, self.steps),
            trust_plates=self.elbo.plates != "ignore",
            mixed_plates=self.mixed_plates,
        )

    def loss(self, args: tuple, kwargs: Mapping[str, Any]) -> Tensor:
        """The loss on these arguments: a scalar whose value is the objective and whose gradient is the estimator."""
        self.initialize(args, kwargs)
        self.look(args, kwargs)
        before = [] if current_tape() else self.generators.states()
        moving = self.training and torch.is_grad_enabled()
        while True:
            try:
                with torch.enable_grad() if self.calls_autograd else nullcontext():
                    value = self._value(self.program(), self.layout(), moving, args, kwargs)
                break
            except CallsAutograd:
                if self.calls_autograd or torch.is_grad_enabled():
                    raise
                self.calls_autograd = True
            except NeedsJoint as mixed:
                # A later site combines the plate's elements: from now on they are enumerated jointly.
                self._list_jointly(mixed.site)
            except NeedsListing:
                self.lists_chains = False
            except RunsAgain:
                self.runs_again = True
            if before:
                self.generators.restore(before)
        if moving:
            self.steps += 1
        return -value if torch.is_grad_enabled() else -value.detach()

    def _value(self, program: Program, layout: Layout, moving: bool, args: tuple, kwargs: Mapping[str, Any]) -> Tensor:
        objective = self.elbo.target.refined(self.chosen)
        groups = program.runs(args, kwargs, with_model=objective.runs_model, proposal=objective.proposal)
        for paths in groups:
            for run in paths:
                if run.eliminated:
                    self._check_weight(run.eliminated)
        reruns = self._reruns(program, layout, args, kwargs)
        reruns.through_values(groups)
        if not any(run.sites for paths in groups for run in paths):
            return torch.zeros(())
        views = Views(self._inputs(layout, args, kwargs), reruns.evaluate, self.state_of, self.steps, moving)
        try:
            report = self._report if moving else _unreported
            return objective.value(Recorded(groups, layout, views, partial(reruns.cut, groups), report))
        finally:
            self.calls_autograd = reruns.calls_autograd

    def _reruns(self, program: Program, layout: Layout, args: tuple, kwargs: Mapping[str, Any]) -> Reruns:
        return Reruns(
            program,
            layout,
            args,
            kwargs,
            stand_ins=self.stand_ins,
            stacks=self.stacks,
            at_once=self.elbo.max_alternatives,
            calls_autograd=self.calls_autograd,
        )

    def _inputs(self, layout: Layout, args: tuple, kwargs: Mapping[str, Any]) -> Inputs:
        return Inputs(layout, args, kwargs, weighted=self.elbo.target.weighs_rows)

    def _report(self, name: str, value: Tensor) -> None:
        with torch.no_grad():
            self.get_buffer(f"reported_{name}").copy_(value)

    def reported(self) -> dict[str, Tensor]:
        """The values that the objective reported in the last call in training mode, by name."""
        return {name: self.get_buffer(f"reported_{name}") for name in self.elbo.target.reports}

    def objective_name(self) -> str:
        return self.elbo.target.value_name(self.chosen, self.elbo.kl_weight)


def _unreported(name: str, value: Tensor) -> None:
    """Reports of calls that change no state are dropped."""


def _handles_itself(guide: Any) -> bool:
    return isinstance(pyro.poutine.unwrap(guide), pyro.poutine.messenger.Messenger)


def _key(site: str) -> str:
    return site.replace(".", "/")


def _of_the_dimensions(error: GumboError) -> bool:
    """Whether a run with leading dimensions failed because of these, judged by its error."""
    if isinstance(error, CannotVectorize):
        return True
    if isinstance(error, UnsupportedSite):
        return error.estimator == ANY
    return isinstance(error, BadInput) and not isinstance(error, CallsAutograd)
