"""One loss bound to a model and a guide: the inspection of the programs, and the value of a call."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any

import pyro
import torch
from torch import Tensor, nn

from ...changes import announce
from ...errors import ANY, PROGRAM, BadInput, CallsAutograd, GumboError, UnsupportedSite
from ..estimators import Estimator
from ..estimators._base import at_step
from ..estimators._distributions import has_score_term
from .arrangement import Arrangement, Loss, Pair
from .auxiliary import warn_of_undetermined_draws
from .elimination import NeedsListing
from .looks import looking, off_zero, one_particle, plates_mixed_by
from .messenger_guides import as_program
from .noise import current_tape
from .programs import Program, check_same_kind
from .records import Run, Site
from .repeats import check_repeats
from .reruns import Reruns, RunsAgain
from .resolution import warn_of_scores_of_no_draw
from .rows import leaves_of
from .scopes import check_shared_names, devices_of, one_at_a_time
from .streams import Generators
from .terms import Layout, NeedsJoint, Recorded
from .views import Inputs, Views

MODES = 32  # the number of modes, and of kinds of arguments, for which the programs are checked
SIZES = 4  # the number of batch sizes per mode for which the programs are checked


class Binding(nn.Module):
    """The state of one loss for one model and guide: sites, plates, particles, and the estimators' state."""

    uncaptured = frozenset({"steps"})

    def __init__(self, elbo: Loss, model: Callable, guide: Callable):
        super().__init__()
        self.elbo, self.pair = elbo, Pair(model, guide, as_program(guide))
        self.arrangement = Arrangement(elbo, self.pair)
        self.chosen: dict[str, Estimator] = {}  # the estimators of the sites in the first call
        self.stand_ins: dict[Any, Estimator] = {}
        self.states = nn.ModuleDict()
        self.steps = 0
        self.mixed_plates: tuple[str, ...] = ()
        self.looks: set[tuple[Any, ...]] = set()  # modes and batch sizes in which the programs were checked
        self.compared: dict[tuple[Any, ...], set[tuple[Any, ...]]] = {}  # shapes at which particles were compared
        self.modules_met: list[nn.Module] = []
        self.switches: list[tuple[dict[str, Any], str]] = []  # attributes of modules that may steer the programs
        self.generators = Generators()
        self.runs_again = False  # if so, the programs' own noise is kept separate
        self.make_layout: Callable[..., Layout] = Layout
        self.checks_plates = True  # whether plates="check" checks the programs; False if they were checked before
        self.scored = False  # whether a factor, or a draw with a path, leaves a score term
        self.calls_autograd = False  # set when a run without gradients fails for this reason

    @property
    def model(self) -> Callable:
        return self.pair.model

    @property
    def guide(self) -> Callable:
        return self.pair.program

    @property
    def num_particles(self) -> int | None:
        return self.arrangement.num_particles

    @property
    def vectorized(self) -> bool:
        return self.arrangement.vectorized

    @property
    def lists_chains(self) -> bool:
        return self.arrangement.lists_chains

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
            self.arrangement = Arrangement(self.elbo, self.pair)
        if _handles_itself(self.guide):
            raise BadInput(
                f"the guide is {type(self.guide).__name__}, a handler and no program: pass a function or a module that "
                "draws the latents, such as an autoguide"
            )
        with one_at_a_time, looking(self.model, self.guide, *args) as met:
            if self.ready():
                return
            program = one_particle(
                self.model, self.guide, self.elbo.requested_nesting, self.arrangement.resolution.as_drawn
            )
            program.generators = Generators(devices_of(self.model, self.guide, *args), others=True)
            program.eliminates = False  # sites that are summed out are drawn once, as values for comparison
            seen = program.run(args, kwargs)
            self.modules_met = list(met)
            self.switches = [
                (vars(module), name)
                for module in dict.fromkeys(part for one in met for part in one.modules())
                for name, value in vars(module).items()
                if value is None or isinstance(value, (bool, str))
            ]
            self.generators = Generators(program.generators.devices, others=seen.noise.drew_elsewhere)
            with off_zero(program, args, kwargs, seen) as seen:
                program.eliminates = True
                self._study(program, seen, args, kwargs)

    def look(self, args: tuple, kwargs: Mapping[str, Any]) -> None:
        """Check for dependent rows within a plate, once in each mode and for each of the first batch sizes.

        A mode is what :meth:`_modes` and switches among the arguments say; numbers among them count as sizes.
        """
        if not self._needs_plates() or current_tape():
            return
        switches, numbers = self._steering(args, kwargs)
        mode = (*self._modes(), *switches)
        size = (*numbers, *[item.shape[:1] for item in (*args, *kwargs.values()) if isinstance(item, Tensor)])
        if (mode, size) in self.looks:
            return
        modes = [other for other, _ in self.looks]
        if modes.count(mode) < SIZES and (mode in modes or len(set(modes)) < MODES):
            nesting = self.arrangement.max_plate_nesting or self.elbo.requested_nesting
            with one_at_a_time:
                found = plates_mixed_by(
                    self.model, self.guide, args, kwargs, nesting, self.arrangement.resolution.as_drawn
                )
            if new := sorted(found.difference(self.mixed_plates)):
                self.mix(new)
        self.looks.add((mode, size))

    def compare(self, args: tuple, kwargs: Mapping[str, Any]) -> None:
        """Compare particles at once with single ones, in each mode, for other arguments, and the first shapes of these.

        Numbers among the arguments count as shapes.

        A later call may take another branch, or have rows where the particles are.
        """
        if not self.compared or not self.vectorized or current_tape():
            return
        structure, shapes = self._structure(args, kwargs)
        if structure not in self.compared and len(self.compared) >= MODES:
            return
        before = self.compared.setdefault(structure, set())
        # As many rows as particles may be mistaken for these, at any time.
        if shapes in before or (len(before) >= SIZES and not any(self.num_particles in shape for shape in shapes)):
            return
        with one_at_a_time, looking(self.model, self.guide, *args):
            arrangement = self.arrangement
            program = one_particle(
                self.model, self.guide, arrangement.max_plate_nesting, arrangement.resolution.as_drawn
            )
            program.generators = self.generators
            program.eliminates = False
            with off_zero(program, args, kwargs, program.run(args, kwargs)) as seen:
                arrangement.settle(self._make(), seen, self.chosen, args, kwargs)
        self.runs_again = self.runs_again or self._runs_again()
        before.add(shapes)

    def _structure(self, args: tuple, kwargs: Mapping[str, Any]) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
        """The mode and the kinds of the arguments, and the shapes of those that are tensors."""
        items = [*enumerate(args), *sorted(kwargs.items())]
        kinds = [(name, type(item), item.dtype if isinstance(item, Tensor) else None) for name, item in items]
        switches, numbers = self._steering(args, kwargs)
        shapes = [tuple(item.shape) for _, item in items if isinstance(item, Tensor)]
        return (*self._modes(), *switches, *kinds), (*numbers, *shapes)

    def _modes(self) -> list[Any]:
        """The training mode of the modules, and their other attributes that are true, false, a text or None."""
        values = [attributes.get(name) for attributes, name in self.switches]
        return [value if value is None or isinstance(value, (bool, str)) else type(value) for value in values]

    @staticmethod
    def _steering(args: tuple, kwargs: Mapping[str, Any]) -> tuple[list[Any], list[tuple[str]]]:
        """The arguments that may choose what the programs do: switches and texts, and numbers as texts."""
        switches, numbers = [], []
        for item in leaves_of([*args, *kwargs.items()]):
            if item is None or isinstance(item, (bool, str)):
                switches.append(item)
            elif isinstance(item, (int, float)):  # one may count the steps
                numbers.append((str(item),))
        return switches, numbers

    def _make(self) -> Callable[[], Program]:
        return partial(self.arrangement.program, self.steps, self.generators)

    def _runs_again(self) -> bool:
        return any(e.runs_again or (e.enumerates and not self.vectorized) for e in self.chosen.values())

    def _needs_plates(self) -> bool:
        """Whether anything is estimated per row: without surrogates and weights all terms are summed anyway."""
        if self.elbo.plates != "check" or not self.checks_plates:
            return False
        if self.elbo.target.weighs_rows or self.scored:
            return True
        return any(type(e).surrogate is not Estimator.surrogate or e.enumerates for e in self.chosen.values())

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
        if self.elbo.plates_by_default:
            announce("plates", plate=plates[0])
        self.mixed_plates = (*self.mixed_plates, *plates)
        self.arrangement.joint.update(name for name, estimator in self.chosen.items() if estimator.enumerates)

    def _study(self, program: Program, seen: Run, args: tuple, kwargs: Mapping[str, Any]) -> None:
        check_shared_names(self.pair.model, self.pair.guide)
        check_same_kind(seen)
        arrangement = self.arrangement
        chosen = arrangement.resolution.of_all(seen, partial(program.run, args, kwargs, with_model=False))
        arrangement.largest = max([1, *(bytes_of(site) for site in seen.sites)])
        if seen.eliminated:
            self._check_weight(seen.eliminated)
        arrangement.list_chains(program, seen, chosen, args, kwargs)
        needed = max([self.elbo.target.min_particles, *(estimator.min_particles for estimator in chosen.values())])
        self.chosen = chosen
        warn_of_scores_of_no_draw(seen, chosen)
        warn_of_undetermined_draws(seen)
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
        arrangement.max_plate_nesting = program.max_plate_nesting
        arrangement.num_particles = self.elbo.requested_particles or needed
        leading = arrangement.num_particles > 1 or any(e.enumerates or e.reruns for e in chosen.values())
        if arrangement.vectorized and leading:
            try:
                arrangement.settle(self._make(), seen, chosen, args, kwargs)
            except GumboError:
                arrangement.num_particles = None
                raise
            structure, shapes = self._structure(args, kwargs)
            self.compared = {structure: {shapes}}
        self.runs_again = self._runs_again()
        if self.runs_again:
            try:
                check_repeats(program, seen, self.modules_met, args, kwargs)
            except GumboError:
                arrangement.num_particles = None
                raise
        if self.elbo.begins_with is not None:
            self._begin_with(self.elbo.begins_with)

    def _begin_with(self, state: Mapping[str, Any]) -> None:
        try:
            self.load_state_dict(dict(state))
        except (RuntimeError, AttributeError, TypeError, ValueError, LookupError) as error:
            self.arrangement.num_particles = None
            said = " ".join(str(error).split())
            raise BadInput(f"the stored state of this loss does not fit these programs ({said})") from error

    def _check_weight(self, eliminated: Sequence[str]) -> None:
        """Refuse a weight of latent terms if a latent site has no term of its own."""
        if callable(self.elbo.kl_weight) or self.elbo.kl_weight != 1:
            raise UnsupportedSite(
                eliminated[0],
                ANY,
                "the model sums over it, so that it has no log p(z) − log q(z) for kl_weight to weight; leave"
                " kl_weight at 1, or draw the site in the guide (where 'enumerate' sums over it exactly)",
            )

    # Every call.

    def program(self) -> Program:
        return self.arrangement.program(self.steps, self.generators if self.runs_again else None)

    def layout(self) -> Layout:
        return self.make_layout(
            room=1 + self.arrangement.max_plate_nesting,
            num_particles=self.num_particles,
            kl_weight=at_step(self.elbo.kl_weight, self.steps),
            trust_plates=self.elbo.plates != "ignore",
            mixed_plates=self.mixed_plates,
        )

    def loss(self, args: tuple, kwargs: Mapping[str, Any]) -> Tensor:
        """The loss on these arguments: a scalar whose value is the objective and whose gradient is the estimator."""
        self.initialize(args, kwargs)
        self.look(args, kwargs)
        self.compare(args, kwargs)
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
            except (NeedsJoint, NeedsListing) as found:
                self.arrangement.revise(found)
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
            stacks=self.arrangement.stacks,
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


def bytes_of(site: Site) -> int:
    return site.log_prob.numel() * math.prod(site.fn.event_shape) * site.log_prob.element_size()


def _handles_itself(guide: Any) -> bool:
    return isinstance(pyro.poutine.unwrap(guide), pyro.poutine.messenger.Messenger)


def _key(site: str) -> str:
    return site.replace(".", "/")
