"""SiteELBO: an objective and an estimator for each site, as one differentiable scalar."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import pyro
import torch
from pyro.infer.elbo import ELBO, ELBOModule
from torch import Tensor, nn

from ..errors import (
    ANY,
    PROGRAM,
    BadInput,
    CallsAutograd,
    CannotVectorize,
    GumboError,
    GumboWarning,
    TooFewParticles,
    UnknownName,
    UnsupportedSite,
)
from ..options import check_option, fits
from .engine import objectives
from .engine.mixing import mixed_plates
from .engine.noise import current_tape, drawn_twice
from .engine.programs import (
    Misfit,
    NoisyProgram,
    Program,
    Run,
    Site,
    check_same_kind,
    check_vectorized,
    does_not_vectorize,
    evaluating,
    kept_buffers,
    modules_met,
)
from .engine.scopes import devices_of, one_at_a_time
from .engine.streams import Generators
from .estimators import (
    Enumerate,
    Estimator,
    GumbelSoftmax,
    MovingAverage,
    Pathwise,
    ScoreFunction,
    SiteView,
    estimators,
)
from .estimators._base import Draw, at_step, detached_draw, pad_left
from .estimators._distributions import describe, has_score_term, is_deterministic
from .estimators.relaxation import Mean
from .objectives import Objective, Recorded, as_objective

OBJECTIVES = ("elbo", "iwae", "rws")
PLATES = ("check", "trust", "ignore")
SIZES = 4  # for so many batch sizes in each mode the programs are looked at


def as_estimator(word: str | Estimator) -> Estimator:
    """The estimator that a word names, or the estimator itself.

    >>> as_estimator("rloo")
    ScoreFunction(baseline=LeaveOneOut())
    """
    if isinstance(word, Estimator):
        return word
    if isinstance(word, type) and issubclass(word, Estimator):
        return word()
    if not isinstance(word, str):
        raise BadInput(f"an estimator is a word or an Estimator, got {word!r}")
    found = estimators[word]()
    if not isinstance(found, Estimator):
        raise BadInput(f"{word!r} names {found!r}, which is not an Estimator")
    return found


class _Default(Estimator):
    """Stands for `pathwise where there is an rsample`, so that the error can say what to do."""

    name = "default"  # type: ignore[assignment]

    def why_not(self, site: Mapping[str, Any]) -> str | None:
        return f"{describe(site['fn'])} has no reparameterized sampler, so that no estimator is the default: name one"


class _RunsAgain(Exception):
    """An estimator runs the programs again whose noise was not kept apart in the first run."""


class _Detached(Estimator):
    """Draws without a gradient, for objectives that need none through their draws."""

    def draw(self, fn: Any, step: int, args: tuple = (), kwargs: Mapping[str, Any] | None = None) -> Draw:
        return detached_draw(fn, args, kwargs)


class SiteELBO(ELBO):
    """A variational objective whose gradient goes through each site as one word says.

    Args:
        estimators: one word (or :class:`Estimator`) for all sites, or a mapping from site names to words, where
            ``"*"`` stands for the sites that it does not name. Where a mapping does not name a site, the site's own
            ``infer={"estimator": …}`` speaks first, then ``"*"``; a site that nothing names is pathwise if it can be.
        objective: ``"elbo"``; ``"iwae"``, the importance-weighted bound; ``"rws"``, reweighted wake-sleep.
        num_particles: K; None is the estimators' own minimum.
        vectorize_particles: True runs all K at once, in a plate to the left of all others; the first call replays one
            of them alone, compares, and refuses programs that mean another thing so. False runs one after the other.
            None: at once where that comparison allows it, otherwise one after the other, with a warning.
        max_plate_nesting: how deep plates nest; None finds it in the first call.
        kl_weight: a factor for all latent terms, or a schedule, a function of the training step.
        plates: what to think of the promise that the rows of a plate are independent. ``"check"`` changes the draws of
            a row and looks whether another row's terms change, in the first call and again in another mode or for
            another batch size; a plate whose rows are mixed (by BatchNorm, by a mean over it) is summed under
            ``"elbo"`` and refused under the other objectives. This can find mixing, and cannot prove that there is
            none. ``"trust"`` skips the check; ``"ignore"`` sums every plate.

    It serves Pyro's idiom, ``SVI(model, guide, optim, loss=SiteELBO("rloo"))``, and torch's:
    ``loss = SiteELBO("rloo")(model, guide)`` is a module, ``loss(x).backward()``. The value is a loss, −bound, in nats,
    summed over the batch and scaled as the program's plates say.

    Raises:
        UnknownName: a word that is not an estimator.
        UnsupportedSite: a site that its estimator, or the objective, cannot serve.
        CannotVectorize: a program that means another thing for K particles at once.
        BadInput: anything else that cannot be meant.

    >>> import pyro.distributions as dist
    >>> def model():
    ...     z = pyro.sample("z", dist.Bernoulli(0.5))
    ...     pyro.sample("x", dist.Normal(z, 1.0), obs=torch.tensor(0.3))
    >>> class Guide(pyro.nn.PyroModule):
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.logit = nn.Parameter(torch.zeros(()))
    ...     def forward(self):
    ...         pyro.sample("z", dist.Bernoulli(logits=self.logit))
    >>> loss = SiteELBO("enumerate")(model, Guide())
    >>> round(loss().item(), 4)
    1.0639
    """

    differentiable = True
    max_alternatives = 64  # how many particles × alternatives are run at once, which bounds memory

    def __init__(
        self,
        estimators: str | Estimator | Mapping[str, str | Estimator] = "default",
        *,
        objective: str | Objective = "elbo",
        num_particles: int | None = None,
        vectorize_particles: bool | None = None,
        max_plate_nesting: int | None = None,
        kl_weight: float | Callable[[int], float] = 1.0,
        plates: str = "check",
    ):
        self.target = as_objective(objective)
        if not isinstance(plates, str) or plates not in PLATES:
            raise UnknownName("plates", plates, PLATES)
        if not fits(num_particles, int | None):
            raise BadInput(f"num_particles must be a positive integer or None, got {num_particles!r}")
        if isinstance(max_plate_nesting, float) and max_plate_nesting == float("inf"):
            max_plate_nesting = None
        if not fits(max_plate_nesting, int | None, 0):
            raise BadInput(f"max_plate_nesting must be an integer of at least 0 or None, got {max_plate_nesting!r}")
        check_option("vectorize_particles", vectorize_particles, bool | None)
        if not fits(kl_weight, float | Callable, 0):
            raise BadInput(f"kl_weight must be a number ≥ 0 or a schedule, got {kl_weight!r}")
        if not self.target.takes_kl_weight and (callable(kl_weight) or kl_weight != 1):
            raise BadInput(
                f"kl_weight is not defined for objective {self.target.name!r}, which needs the whole of log p − log q;"
                f" leave it at 1, or take objective='elbo', got {kl_weight!r}"
            )
        self.objective, self.plates, self.kl_weight = self.target.name, plates, kl_weight
        self.given: dict[str, Estimator] = {}
        self.otherwise: Estimator | None = None
        if isinstance(estimators, Mapping):
            self.given = {name: as_estimator(word) for name, word in estimators.items() if name != "*"}
            self.otherwise = as_estimator(estimators["*"]) if "*" in estimators else None
        elif not isinstance(estimators, str) or estimators != "default":
            self.otherwise = as_estimator(estimators)
        named = [*self.given.values(), *([self.otherwise] if self.otherwise else [])]
        if named and not self.target.takes_estimators:
            raise BadInput(
                f"objective {self.objective!r} draws without gradients and takes no estimator, got {named[0].name!r}"
            )
        for site, estimator in [*self.given.items(), *([("*", self.otherwise)] if self.otherwise else [])]:
            _check_particles(site, estimator, num_particles)
        self.requested_particles = num_particles
        self.requested_nesting = max_plate_nesting
        self._bindings: list[Binding] = []
        self._learnt: tuple[nn.ModuleDict, int] | None = None
        super().__init__(
            num_particles=num_particles or 1,
            max_plate_nesting=float("inf") if self.requested_nesting is None else self.requested_nesting,
        )
        self.requested_vectorized = vectorize_particles
        self.vectorize_particles = vectorize_particles is not False

    def __call__(self, model: Callable, guide: Callable) -> SiteELBOModule:
        """A module that maps the programs' arguments to the loss."""
        return SiteELBOModule(model, guide, self)

    def __repr__(self) -> str:
        words = {name: _said(estimator) for name, estimator in self.given.items()}
        if self.otherwise is not None:
            words["*"] = _said(self.otherwise)
        said = words if self.given else words.get("*", "default")
        parts = [repr(said), f"objective={self.objective!r}", f"num_particles={self.requested_particles}"]
        for name, value, usual in (
            ("vectorize_particles", self.requested_vectorized, None),
            ("max_plate_nesting", self.requested_nesting, None),
            ("kl_weight", self.kl_weight, 1.0),
            ("plates", self.plates, "check"),
        ):
            if value != usual:
                parts.append(f"{name}={value!r}")
        return f"SiteELBO({', '.join(parts)})"

    def _get_trace(self, model, guide, args, kwargs):
        raise BadInput("SiteELBO keeps its own records; use differentiable_loss, loss or loss_and_grads")

    def __getstate__(self) -> dict[str, Any]:
        # A copy is used with copies of the programs, so that it goes on with the first pair that it meets.
        used = sorted(self._bindings, key=Binding.has_state)
        # The param store hangs weak references on parameters, which copies are free of.
        learnt = (copy.deepcopy(used[-1].states), used[-1].steps) if used else self._learnt
        return {**self.__dict__, "_bindings": [], "_learnt": learnt}

    def _binding(self, model: Callable, guide: Callable) -> Binding:
        for binding in self._bindings:
            if binding.model == model and binding.guide == guide:
                return binding
        if any(binding.has_state() for binding in self._bindings):
            raise BadInput(
                "this SiteELBO keeps baselines for another model and guide; make a new SiteELBO for this pair"
            )
        binding = Binding(self, model, guide)
        if self._learnt is not None:
            binding.states, binding.steps = self._learnt
            self._learnt = None
        self._bindings = [*self._bindings[-3:], binding]
        return binding

    def differentiable_loss(self, model: Callable, guide: Callable, *args, **kwargs) -> Tensor:
        """The loss as a differentiable scalar; parameters live in Pyro's param store."""
        with one_at_a_time:
            binding = self._binding(model, guide)
            loss = binding.loss(args, kwargs)
            for name, parameter in binding.named_parameters():
                stored = pyro.param(f"gumbo.{name}", parameter)
                if stored is not parameter:
                    raise BadInput(
                        f"the param store already holds gumbo.{name} of another SiteELBO; clear it, or use one loss a"
                        " store"
                    )
        return loss

    def loss_and_grads(self, model: Callable, guide: Callable, *args, **kwargs) -> float:
        """The loss as a number; gradients are added to ``.grad`` of the parameters."""
        loss = self.differentiable_loss(model, guide, *args, **kwargs)
        if loss.requires_grad:
            loss.backward(retain_graph=self.retain_graph)
        return loss.item()

    def loss(self, model: Callable, guide: Callable, *args, **kwargs) -> float:
        """The loss as a number, without gradients; no statistics move."""
        with one_at_a_time, torch.no_grad():
            return self._binding(model, guide).loss(args, kwargs).item()


def _said(estimator: Estimator) -> str:
    """The word of an estimator as the word makes it, and otherwise all that it was given."""
    return estimator.name if estimator.name in estimators else repr(estimator)


def _check_particles(site: str, estimator: Estimator, num_particles: int | None) -> None:
    if num_particles is not None and num_particles < estimator.min_particles:
        raise TooFewParticles(
            site,
            estimator.name,
            f"it needs num_particles ≥ {estimator.min_particles}, got {num_particles}",
            [word for word, make in estimators.items() if make().min_particles <= num_particles],
        )


class Binding(nn.Module):
    """What one loss has found out about one model and guide: sites, plates, particles, and the estimators' state."""

    uncaptured = frozenset({"steps"})

    def __init__(self, elbo: SiteELBO, model: Callable, guide: Callable):
        super().__init__()
        # Kept outside of torch's registration: whoever owns the binding owns the programs' parameters.
        self.__dict__.update(elbo=elbo, model=model, guide=guide, known={}, joint=set(), enum_dims={}, chosen={})
        self.stand_ins: dict[Any, Estimator] = {}
        self.states = nn.ModuleDict()
        self.steps = 0
        self.num_particles: int | None = None
        self.max_plate_nesting: int | None = None
        self.mixed_plates: tuple[str, ...] = ()
        self.__dict__.update(looks=set(), modules_met=[])
        self.generators = Generators()
        self.stacks = True  # whether many alternatives of a draw are run at once
        self.runs_again = False  # once it does, the programs' own noise is kept apart
        self.make_layout: Callable[..., objectives.Layout] = objectives.Layout
        self.apart = False  # whether particles, and enumerated values, are run one by one
        self.scored = False  # whether a factor, or a draw with a path, leaves a score term
        self.calls_autograd = False  # found out when a run without gradients fails for it

    def has_state(self) -> bool:
        return len(self.states) > 0

    def get_extra_state(self) -> dict[str, int]:
        return {"steps": self.steps}

    def set_extra_state(self, state: dict[str, int]) -> None:
        self.steps = int(state["steps"])

    # Which estimator a site takes.

    def resolve(self, msg: Mapping[str, Any]) -> Estimator:
        """The estimator of a site, checked once for each kind of distribution that the site shows."""
        key = (msg["name"], type(msg["fn"]))
        if key not in self.known:
            self.known[key] = self._choose(msg)
        return self.known[key]

    def _as_drawn(self, msg: Mapping[str, Any]) -> Estimator | None:
        """For a look at the programs: what is to be drawn without a path is, since a simulator may ask for that."""
        try:
            return _Detached() if self.resolve(msg).log_q == "value" else None
        except GumboError:  # said later, when all sites are known
            return None

    def _choose(self, msg: Mapping[str, Any]) -> Estimator:
        elbo, name, fn = self.elbo, msg["name"], msg["fn"]
        infer = msg["infer"]
        if not elbo.target.takes_estimators:
            return _Detached()
        if name in elbo.given:
            estimator = elbo.given[name]
        elif infer.get("estimator") is not None:
            estimator = as_estimator(infer["estimator"])
        elif infer.get("enumerate"):
            estimator = Enumerate()
        elif infer.get("baseline"):
            estimator = _honoured_baseline(name, infer["baseline"])
        elif elbo.otherwise is not None:
            estimator = elbo.otherwise
        elif getattr(fn, "has_rsample", False):
            estimator = estimators["pathwise"]()
        else:
            estimator = _Default()
        refusal = estimator.refusal({"name": name, "fn": fn, "infer": infer, "is_observed": False})
        refusal = elbo.target.refusal(estimator) if refusal is None else refusal
        if refusal is not None:
            raise refusal.about(name, estimator.name, self.alternatives(msg)).error()
        _check_particles(name, estimator, elbo.requested_particles)
        if estimator.enumerates and elbo.plates == "ignore":
            self.joint.add(name)
        return estimator

    def alternatives(self, msg: Mapping[str, Any]) -> list[str]:
        made = {word: make() for word, make in estimators.items()}
        return [
            word for word, estimator in made.items() if self.elbo.target.accepts(estimator) and estimator.supports(msg)
        ]

    # The first call.

    def ready(self) -> bool:
        return self.num_particles is not None

    def initialize(self, args: tuple, kwargs: Mapping[str, Any]) -> None:
        """Run the programs once to see their sites, leaving random streams and statistics as they were."""
        if self.ready():
            return
        if _handles_itself(self.guide):
            raise BadInput(
                "a guide that runs the model itself (AutoMessenger) cannot be given estimators; use stock ELBOs"
            )
        with one_at_a_time, looking(self.model, self.guide, *args) as met:
            if self.ready():
                return
            program = one_particle(self.model, self.guide, self.elbo.requested_nesting, self._as_drawn)
            program.generators = Generators(devices_of(self.model, self.guide, *args), others=True)
            seen = program.run(args, kwargs)
            self.__dict__["modules_met"] = list(met)
            self.generators = Generators(program.generators.devices, others=seen.noise.drew_elsewhere)
            self._study(program, seen, args, kwargs)

    def look(self, args: tuple, kwargs: Mapping[str, Any]) -> None:
        """Look for rows that are mixed within a plate, once in each mode and for each of the first batch sizes."""
        if not self._needs_plates() or current_tape():
            return
        mode = tuple(module.training for module in self.modules_met)
        size = tuple(item.shape[:1] for item in (*args, *kwargs.values()) if isinstance(item, Tensor))
        if (mode, size) in self.looks:
            return
        if sum(mode == other for other, _ in self.looks) < SIZES:
            nesting = self.max_plate_nesting or self.elbo.requested_nesting
            with one_at_a_time:
                found = plates_mixed_by(self.model, self.guide, args, kwargs, nesting, self._as_drawn)
            if new := sorted(found.difference(self.mixed_plates)):
                self._mixed(new)
        self.looks.add((mode, size))

    def _needs_plates(self) -> bool:
        """Whether anything is estimated row by row: without surrogates and weights all terms are summed anyway."""
        weighs = (type(e).surrogate is not Estimator.surrogate or e.enumerates for e in self.chosen.values())
        return self.elbo.plates == "check" and (self.elbo.target.weighs_rows or self.scored or any(weighs))

    def _mixed(self, plates: list[str]) -> None:
        """Rows of these plates turned out to be mixed: from now on they are summed."""
        what = f"a change of one row's draw changes other rows of plate {plates[0]!r}"
        if self.elbo.target.weighs_rows:
            raise UnsupportedSite(
                PROGRAM,
                ANY,
                f"{what} (a layer such as BatchNorm mixes them), so that a weight for each row means nothing under"
                f" objective {self.elbo.objective!r}; pass plates='ignore' for one weight for all rows, or"
                " plates='trust'",
            )
        if self.looks and any(estimator.lazy_parameters for estimator in self.chosen.values()):
            raise BadInput(
                f"{what} in this mode or for this batch size, and a network was built for rows that are kept apart:"
                " call loss.initialize(x) in training mode, or pass plates='ignore'"
            )
        self.mixed_plates = (*self.mixed_plates, *plates)
        self.joint.update(name for name, estimator in self.chosen.items() if estimator.enumerates)

    def _study(self, program: Program, seen: Run, args: tuple, kwargs: Mapping[str, Any]) -> None:
        check_shared_names(self.model, self.guide)
        check_same_kind(seen)
        latent = [site for site in seen.guide if site.latent]
        names = {site.name for site in latent}
        for name in self.elbo.given:
            if name not in names:
                known = ", ".join(sorted(names)) or "none"
                raise BadInput(
                    f"the estimators name a site {name!r} that the guide does not sample (its sites: {known})"
                )
        chosen = {}
        for site in latent:
            if not is_deterministic(site.fn):
                message = {"name": site.name, "fn": site.fn, "infer": site.infer}
                site.estimator = chosen[site.name] = self.resolve(message)
        if any(estimator.together for estimator in chosen.values()):
            for site in seen.guide:
                if site.factor:
                    word = next(estimator.name for estimator in chosen.values() if estimator.together)
                    reason = "a factor with has_rsample=False is a score term, which has no path"
                    raise UnsupportedSite(site.name, word, reason, ["pathwise"])
        for name, estimator in chosen.items():
            if any(other.together for other in chosen.values()) and not estimator.together:
                word = next(other.name for other in chosen.values() if other.together)
                raise UnsupportedSite(name, estimator.name, f"where one site takes {word!r}, every site must", [word])
        needed = max([estimator.min_particles for estimator in chosen.values()], default=1)
        self.__dict__["chosen"] = chosen
        self.scored = any(site.factor or (site.latent and has_score_term(site.fn)) for site in seen.guide)
        self.look(args, kwargs)
        trusted = self.elbo.plates != "ignore"
        layout = objectives.Layout(
            1 + program.max_plate_nesting, 1, trust_plates=trusted, mixed_plates=self.mixed_plates
        )
        for site in latent:
            if site.name in chosen:
                self._state(site, partial(self._inputs, [seen], site, layout, args, kwargs))
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

    def _settle(self, seen: Run, args: tuple, kwargs: Mapping[str, Any]) -> None:
        """Find out what the programs take at once: particles and alternatives, enumerated values only, or nothing."""
        reruns = any(estimator.reruns for estimator in self.chosen.values())
        try:
            # Two particles stand for alternatives, which are run in another such dimension.
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
            f"{why}; {what} are run one by one (vectorize_particles=False does so without this warning)",
            GumboWarning,
            stacklevel=2,
        )

    def _check(self, seen: Run, args: tuple, kwargs: Mapping[str, Any], num_particles: int) -> None:
        program = self.program()
        program.num_particles, program.generators = num_particles, self.generators
        try:
            ((run,),) = program.runs(args, kwargs)
        except Misfit as error:
            raise _fails_vectorized(error) from error
        except GumboError:
            raise
        except Exception as error:
            raise _fails_vectorized(error) from error
        try:
            check_vectorized(program, run, seen, args, kwargs)
        except NoisyProgram:
            with evaluating(self.model, self.guide):
                ((run,),) = program.runs(args, kwargs)
                try:
                    check_vectorized(program, run, seen, args, kwargs)
                except NoisyProgram:
                    raise does_not_vectorize(
                        PROGRAM, "two runs on the same draws differ, so that nothing can be compared"
                    ) from None

    @property
    def vectorized(self) -> bool:
        """Whether leading dimensions are in use; a single particle with nothing enumerated has none to speak of."""
        return self.elbo.vectorize_particles and not self.apart

    def program(self) -> Program:
        return Program(
            self.model,
            self.guide,
            resolve=self.resolve,
            num_particles=self.num_particles,
            max_plate_nesting=self.max_plate_nesting,
            vectorized=self.vectorized,
            joint=self.joint,
            enum_dims=self.enum_dims,
            step=self.steps,
            generators=self.generators if self.runs_again else None,
        )

    # Every call.

    @property
    def enumerating(self) -> bool:
        return any(estimator.enumerates for estimator in self.chosen.values())

    def layout(self) -> objectives.Layout:
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
            except objectives.NeedsJoint as mixed:
                # A later site mixes what the plate keeps apart: from now on its elements are enumerated together.
                if mixed.site in self.joint:
                    raise UnsupportedSite(
                        mixed.site, "enumerate", "a later plate mixes its values in a way that cannot be enumerated"
                    ) from None
                self.joint.add(mixed.site)
            except _RunsAgain:
                self.runs_again = True
            if before:
                self.generators.restore(before)
        if moving:
            self.steps += 1
        return -value if torch.is_grad_enabled() else -value.detach()

    def _value(self, program: Program, layout: objectives.Layout, moving: bool, args, kwargs) -> Tensor:
        objective = self.elbo.target.refined(self.chosen)
        groups = program.runs(args, kwargs, with_model=objective.runs_model)
        self._freeze_paths(program, groups, args, kwargs)

        if not any(run.sites for paths in groups for run in paths):
            return torch.zeros(())

        def view(rows, log_prob, cost, bound) -> SiteView:
            return self._view(rows, log_prob, cost, bound, layout, moving, args, kwargs)

        again = partial(self._cut, program, groups, args, kwargs)
        return objective.value(Recorded(groups, layout, view, again))

    def _freeze_paths(self, program: Program, groups: list[list[Run]], args, kwargs) -> None:
        """Where log q is to be differentiated through values only, take it from a second run with frozen parameters."""
        for paths in groups:
            for run in paths:
                sites = [site for site in run.guide if site.estimator is not None and site.estimator.log_q == "path"]
                if not sites:
                    continue
                again = program.run(
                    args,
                    kwargs,
                    fixed={site.name: site.draw for site in run.guide if site.latent},
                    subsamples=run.subsamples,
                    choices=dict(run.choices),
                    noise=run.noise,
                    with_model=False,
                    around_guide=frozen([self.guide], run.guide_params.values()),
                )
                for site in sites:
                    site.log_prob = again.guide_site(site.name).log_prob

    def _cut(self, program: Program, groups: list[list[Run]], args, kwargs) -> list[list[Run]]:
        """The same runs with their values cut from the graph, and with the guide's parameters frozen."""

        def again(run: Run) -> Run:
            leaves = {
                site.name: site.draw.map(lambda t: t.detach().requires_grad_(t.requires_grad))
                for site in run.guide
                if site.latent
            }
            still = frozen([self.guide], run.guide_params.values())
            options = {"fixed": leaves, "subsamples": run.subsamples, "noise": run.noise}
            return program.run(args, kwargs, around_guide=still, **options)

        return [[again(run) for run in paths] for paths in groups]

    def _view(self, rows, log_prob, cost, bound, layout, moving, args, kwargs) -> SiteView:
        site = rows[0].site
        runs = [row.run for row in rows]
        inputs = partial(self._inputs, runs, site, layout, args, kwargs)
        draws = [_laid_out(row.site, layout.room) for row in rows]
        return SiteView(
            name=site.name,
            fns=[row.site.fn for row in rows],
            draw=_join_draws(draws, layout.room + site.fn.event_dim),
            log_prob=log_prob,
            cost=cost,
            particle_dim=-layout.room,
            num_particles=cost.shape[-layout.room],
            step=self.steps,
            state=self._state(site, inputs),
            training=moving,
            bound=bound,
            inputs=inputs,
            evaluate=partial(self._evaluate, rows, layout, args, kwargs),
            find_joined=partial(objectives.joined_dims, runs, site.name, layout),
            mean=partial(layout.mean, site),
            drawn_twice=drawn_twice,
        )

    def _state(self, site: Site, inputs: Callable[[], list[Tensor]]) -> nn.Module | None:
        """The module of a site's estimator; one is made for a site that the first call did not meet."""
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

    def _inputs(
        self, runs: list[Run], site: Site, layout: objectives.Layout, args: tuple, kwargs: Mapping[str, Any]
    ) -> list[Tensor]:
        """What is known before a site draws, laid out as ``(…, K or 1, *plates, features)``."""
        room = layout.room
        weighted = self.elbo.target.weighs_rows
        frames = objectives.common_frames(runs, layout) if weighted else layout.frames(site)
        found = [torch.ones((1,) * room + (1,), dtype=site.log_prob.dtype, device=site.log_prob.device)]
        sizes = {dim: size for _, dim, size in frames}
        depth = max((-dim for dim in sizes), default=0)
        rows = tuple(sizes.get(dim, 1) for dim in range(-depth, 0))
        for item in (*args, *kwargs.values()):
            if isinstance(item, Tensor) and depth and tuple(item.shape[:depth]) == rows:
                found.append(pad_left(item.detach().reshape(rows + (-1,)), room + 1))
        for name in [other.name for other in runs[0].guide[: _index(runs[0], site.name)] if other.latent]:
            others = [run.guide_site(name) for run in runs]
            if others[0].frames <= frames:
                values = [_features(_laid_out(other, room).value.detach(), other.fn.event_dim) for other in others]
                found.append(values[0] if len(values) == 1 else torch.cat(values, dim=-room - 1))
        return [tensor.to(found[0].dtype) for tensor in found]

    def _evaluate(
        self, rows, layout, args, kwargs, draw: Draw, downstream: str = "draw", differentiable: bool = False
    ) -> Tensor | tuple[Tensor, Tensor]:
        """The cost at a site for alternative draws of it; see :class:`SiteView`."""
        totals: list[Tensor] = []
        costs = self._costs(rows, layout, args, kwargs, draw, downstream, differentiable, totals)
        return (costs, torch.stack(totals).sum()) if differentiable else costs

    def _costs(
        self, rows, layout, args, kwargs, draw: Draw, downstream: str, differentiable: bool, totals: list[Tensor]
    ) -> Tensor:
        run, site = rows[0].run, rows[0].site
        program = self.program()
        count = draw.value.shape[0]
        stand_in = partial(_stand_in, site.name, downstream, self.stand_ins)
        event_dim = site.fn.event_dim

        def costs(run: Run, alternative: Draw) -> Tensor:
            upstream = run.guide[: _index(run, site.name)]
            fixed = {other.name: other.draw.map(Tensor.detach) for other in upstream if other.latent}
            fixed[site.name] = alternative
            if run.noise is None:
                raise _RunsAgain
            options = {"subsamples": run.subsamples, "fixed": fixed, "stand_in": stand_in, "noise": run.noise}

            def evaluated() -> tuple[Tensor, Tensor]:
                again = program.paths(args, kwargs, **options)
                paths = [program.run(args, kwargs, **options)] if program.vectorized else list(again)
                return objectives.cost_at(site.name, paths, layout)

            cost, total = evaluated() if differentiable else self._without_gradients(evaluated)
            totals.append(total)
            return cost

        frozen_all = frozen([self.model, self.guide], [*run.guide_params.values(), *run.model_params.values()])
        with frozen_all if differentiable else nullcontext():
            if not program.vectorized:
                return torch.stack(
                    [
                        layout.join(
                            [
                                costs(row.run, _picked(draw, a, k, row.site, layout.room, event_dim))
                                for k, row in enumerate(rows)
                            ]
                        )
                        for a in range(count)
                    ]
                )
            # Alternatives stand to the left of everything, enumerated sites included.
            width = 1 + layout.room + len(self.enum_dims)
            if count == 1 or run.noise.drew or not self.stacks:
                # Nothing stands to the left, so the value gets the shape that the program itself gave it.
                # One that was spread over the enumerated values upstream keeps their dimensions.
                # Noise of the programs' own would have another shape for many alternatives than for the draw.
                shape = site.draw.value.shape
                found = []
                same = draw.value[0].numel() == shape.numel()
                for a in range(count):
                    found.append(costs(run, draw.map(lambda t, a=a: t[a].reshape(shape) if same else t[a])))
                    if not same and not run.noise.fits:
                        raise UnsupportedSite(
                            site.name,
                            site.estimator.name,
                            "the programs draw noise of their own (dropout), in another shape where the draw is spread"
                            " over the values enumerated upstream; pass vectorize_particles=False",
                        )
                return torch.stack([pad_left(cost, width - 1) for cost in found]) if count > 1 else found[0][None]
            at_once = max(1, self.elbo.max_alternatives // self.num_particles)
            found = []
            for part in range(0, count, at_once):
                piece = draw.map(lambda t, p=part: t[p : p + at_once])
                piece = piece.map(
                    lambda t: t.reshape(t.shape[:1] + (1,) * (width - (t.dim() - event_dim)) + t.shape[1:])
                )
                cost = costs(run, piece)
                size = piece.value.shape[0]
                if cost.dim() < width or cost.shape[0] != size:
                    cost = pad_left(cost, width).expand((size,) + (-1,) * (width - 1))
                found.append(cost.reshape(cost.shape[:1] + cost.shape[1:]))
            return torch.cat(found)

    def _without_gradients(self, evaluate: Callable[[], tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        """What ``evaluate`` returns, run without gradients unless the programs themselves ask for some."""
        if not self.calls_autograd:
            try:
                with torch.no_grad():
                    return evaluate()
            except CallsAutograd:
                self.calls_autograd = True
        with torch.enable_grad():
            cost, total = evaluate()
        return cost.detach(), total.detach()

    def objective_name(self) -> str:
        return self.elbo.target.value_name(self.chosen, self.elbo.kl_weight)


@contextmanager
def looking(model: Callable, guide: Callable, *args: Any) -> Iterator[Collection[nn.Module]]:
    """A run that is only looked at: random streams and buffers are as they were before.

    Gradients are recorded even where the caller has none, since only they show a support that moves. Gives the modules
    that take part, also those that plain functions call.
    """
    generators = Generators(devices_of(model, guide, *args), others=True)
    with generators.kept(), kept_buffers(model, guide), modules_met() as met, torch.enable_grad():
        yield met


def one_particle(
    model: Callable,
    guide: Callable,
    max_plate_nesting: int | None = None,
    resolve: Callable[[Any], Estimator | None] = lambda msg: None,
) -> Program:
    """A model and a guide as they were written, without estimators; ``resolve`` may say how a site draws."""
    return Program(
        model,
        guide,
        resolve=resolve,
        num_particles=1,
        max_plate_nesting=max_plate_nesting,
        vectorized=False,
    )


def plates_mixed_by(
    model: Callable,
    guide: Callable,
    args: tuple,
    kwargs: Mapping[str, Any],
    max_plate_nesting: int | None = None,
    resolve: Callable[[Any], Estimator | None] = lambda msg: None,
) -> frozenset[str]:
    """The plates whose rows a pair of programs is found to mix, at their present parameters and in their present mode.

    >>> import pyro.distributions as dist
    >>> def guide():
    ...     with pyro.plate("data", 3):
    ...         pyro.sample("z", dist.Bernoulli(torch.full((3,), 0.5)))
    >>> def model():
    ...     with pyro.plate("data", 3):
    ...         z = pyro.sample("z", dist.Bernoulli(torch.full((3,), 0.5)))
    ...         pyro.sample("x", dist.Normal(z - z.mean(), 1.0), obs=torch.zeros(3))
    >>> sorted(plates_mixed_by(model, guide, (), {}))
    ['data']
    """
    with looking(model, guide, *args):
        program = one_particle(model, guide, max_plate_nesting, resolve)
        program.generators = Generators(devices_of(model, guide, *args), others=True)
        return mixed_plates(program, args, kwargs)


def refusals(model: Callable, guide: Callable, *args: Any, **kwargs: Any) -> dict[str, str]:
    """For each estimator's word why it cannot serve all sites of a pair, empty if it can; one run of the programs.

    >>> import pyro.distributions as dist
    >>> program = lambda: pyro.sample("z", dist.Normal(0.0, 1.0))
    >>> refusals(program, program)["arm"]
    "site 'z': antithetic pairs need a Bernoulli site, this one is Normal"
    >>> refusals(program, program)["rloo"]
    ''
    """
    with pyro.get_param_store().scope(), looking(model, guide, *args):
        seen = one_particle(model, guide).run(args, kwargs)
    sites = [site for site in seen.guide if site.latent and not is_deterministic(site.fn)]
    found = {}
    for word, make in estimators.items():
        estimator = make()
        of_sites = (estimator.refusal({"name": site.name, "fn": site.fn}) for site in sites)
        found[word] = next((refusal for refusal in of_sites if refusal is not None), "")
    return found


class SiteELBOModule(ELBOModule):
    """A loss bound to a model and a guide: a module from the programs' arguments to a differentiable scalar.

    Parameters are those of model, guide and, once :meth:`initialize` (or a first call) has seen the sites, of the
    baselines and control variates.
    """

    uncaptured = frozenset({"_kept", "_own", "_keeps"})

    def __init__(self, model: Callable, guide: Callable, elbo: SiteELBO):
        super().__init__(model, guide, elbo)
        self.binding = Binding(elbo, model, guide)
        self.__dict__["_own"] = {}  # parameters by identity, held so that no identity is given to another tensor
        self.__dict__.update(_kept=None, _keeps=False)

    def __getstate__(self) -> dict[str, Any]:
        # A copy has other parameters than the store that is kept here, or shares its programs with the original.
        return {**self.__dict__, "_kept": None, "_own": {}}

    def initialize(self, *args, **kwargs) -> SiteELBOModule:
        """Build what is built lazily, without touching random streams; returns itself."""
        with self._own_store():
            self.binding.initialize(args, kwargs)
            self.binding.look(args, kwargs)
        return self

    @property
    def objective_name(self) -> str:
        """What the value is: ``elbo``, ``iwae``, ``rws``, or under its own name a relaxed or weighted objective."""
        return self.binding.objective_name()

    def forward(self, *args, **kwargs) -> Tensor:
        with self._own_store(), networks_at_hand(self.model, self.guide) if self._kept else nullcontext():
            return self.binding.loss(args, kwargs)

    def named_parameters(self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True):
        if not self.binding.ready() and self._lazy():
            raise BadInput("this loss builds networks when it sees data: call loss.initialize(x) before .parameters()")
        return super().named_parameters(prefix, recurse, remove_duplicate)

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False):
        if not self.binding.ready() and any(key.startswith("binding.states.") for key in state_dict):
            raise BadInput(
                "this loss keeps baselines that it builds when it sees data: call loss.initialize(x) before"
                " .load_state_dict(…)"
            )
        return super().load_state_dict(state_dict, strict, assign)

    def _lazy(self) -> bool:
        named = [*self.elbo.given.values(), *([self.elbo.otherwise] if self.elbo.otherwise else [])]
        return any(getattr(estimator, "lazy_parameters", False) for estimator in named)

    @contextmanager
    def _own_store(self) -> Iterator[None]:
        """A param store of its own for the duration of a call: modules hold the parameters, names cannot clash."""
        store = pyro.get_param_store()
        with one_at_a_time, store.scope(self._kept or {"params": {}, "constraints": {}}) as state:
            yield
            if not all(id(parameter) in self._own for parameter in store._params.values()):
                self._look_up(store._params)
        self.__dict__["_kept"] = state if self._keeps else None

    def _look_up(self, stored: Mapping[str, Tensor]) -> None:
        """Whose parameters the store holds; called only when something unknown shows, since a step is short."""
        self.__dict__["_own"] = {id(parameter): parameter for parameter in nn.Module.parameters(self)}
        # Registering every parameter anew at each call costs as much as a small layer. But a PyroParam takes the
        # store's value over its own, so that where there is one, a value replaced in between would come back.
        self.__dict__["_keeps"] = not any(getattr(module, "_pyro_params", None) for module in self.modules())
        for name, parameter in stored.items():
            if id(parameter) not in self._own:
                raise BadInput(
                    f"pyro.param {name!r} is not a parameter of model or guide as modules, and loss.parameters()"
                    " would miss it: make it a PyroParam of a PyroModule, or train through pyro.infer.SVI"
                )


@contextmanager
def networks_at_hand(*programs: Any) -> Iterator[None]:
    """Programs whose class says ``plain_networks = True`` find their networks without a statement for each parameter.

    To be used where the param store knows the parameters already. Other programs keep Pyro's way, which registers all
    parameters of a network at every mention of it, since a handler of theirs may listen to that.
    """
    plain = [program for program in programs if getattr(type(program), "plain_networks", False)]
    found = [(vars(program), program._modules) for program in plain]
    for attributes, networks in found:
        attributes.update(networks)
    try:
        yield
    finally:
        for attributes, networks in found:
            for name in networks:
                attributes.pop(name, None)


def _stand_in(
    name: str, downstream: str, known: dict[Any, Estimator], msg: Mapping[str, Any], estimator: Estimator, fixed: bool
) -> Estimator:
    """The estimator that a site takes in a second run: its own, a relaxation, or its mean; ``known`` once found."""
    if downstream == "draw" or (fixed and msg["name"] != name):
        return estimator
    key = (msg["name"], describe(msg["fn"]), downstream)
    if key in known:
        return known[key]
    site = {"name": msg["name"], "fn": msg["fn"]}
    for other in (GumbelSoftmax(), Pathwise()) if downstream == "soft" else (Mean(),):
        # The path of a rejection sampler jumps where another proposal is accepted.
        if other.supports(site) and not (downstream == "soft" and has_score_term(msg["fn"])):
            known[key] = other
            return other
    raise UnsupportedSite(
        msg["name"],
        estimator.name,
        f"an estimator upstream differentiates through it, and {describe(msg['fn'])} cannot be relaxed",
    )


def _index(run: Run, name: str) -> int:
    return next(i for i, site in enumerate(run.guide) if site.name == name)


def _laid_out(site: Site, room: int) -> Draw:
    """A site's draw with dimensions for particles and plates, whether or not it was run with them."""
    return site.draw.map(lambda t: pad_left(t, room + site.fn.event_dim))


def _features(value: Tensor, event_dim: int) -> Tensor:
    return value.flatten(-event_dim) if event_dim else value.unsqueeze(-1)


def _join_draws(draws: list[Draw], dims: int) -> Draw:
    if len(draws) == 1:
        return draws[0]
    extra = {name: torch.cat([draw.extra[name] for draw in draws], dim=-dims) for name in draws[0].extra}
    return Draw(torch.cat([draw.value for draw in draws], dim=-dims), extra)


def _picked(draw: Draw, alternative: int, particle: int, site: Site, room: int, event_dim: int) -> Draw:
    """One alternative of one particle, shaped as that particle drew it when it ran alone."""
    shape = site.draw.value.shape
    return draw.map(lambda t: t[alternative].select(-room - event_dim, particle).reshape(shape))


@contextmanager
def frozen(programs: list[Any], params: Any) -> Iterator[None]:
    """No gradient is recorded for parameters; values that flow through the programs keep theirs."""
    leaves: dict[int, Tensor] = {}
    for program in programs:
        if isinstance(program, nn.Module):
            leaves.update({id(p): p for p in nn.Module.parameters(program)})
    for value in params:
        leaf = value.unconstrained() if hasattr(value, "unconstrained") else value
        if isinstance(leaf, Tensor) and leaf.is_leaf:
            leaves[id(leaf)] = leaf
    thawed = [leaf for leaf in leaves.values() if leaf.requires_grad]
    try:
        for leaf in thawed:
            leaf.requires_grad_(False)
        with warnings.catch_warnings():
            # Pyro says of every frozen parameter that it does not register it, which is the point.
            warnings.filterwarnings("ignore", message=".*was not registered in the param store")
            yield
    finally:
        for leaf in thawed:
            leaf.requires_grad_(True)


def check_shared_names(model: Any, guide: Any) -> None:
    """Two networks of one name share one entry of the param store and silently train as one."""
    if not (isinstance(model, pyro.nn.PyroModule) and isinstance(guide, pyro.nn.PyroModule)):
        return
    mine = dict(nn.Module.named_parameters(model, prefix=model._pyro_name))
    for name, parameter in nn.Module.named_parameters(guide, prefix=guide._pyro_name):
        if name in mine and mine[name] is not parameter:
            raise BadInput(
                f"model and guide both have a parameter called {name!r}, which Pyro's param store would take for one;"
                " rename one of the modules"
            )


def _of_the_dimensions(error: GumboError) -> bool:
    """Whether a run with leading dimensions failed for these, as far as its error can tell."""
    if isinstance(error, CannotVectorize):
        return True
    if isinstance(error, UnsupportedSite):
        return error.estimator == ANY
    return isinstance(error, BadInput) and not isinstance(error, CallsAutograd)


def _honoured_baseline(name: str, options: Mapping[str, Any]) -> Estimator:
    """What TraceGraph_ELBO's own marks ask for, as an estimator."""
    unknown = {key for key, value in options.items() if value is not None} - {
        "use_decaying_avg_baseline",
        "baseline_beta",
    }
    if unknown:
        raise UnsupportedSite(
            name,
            "score",
            f"its infer={{'baseline': …}} asks for {sorted(unknown)[0]!r}; say it as"
            " ScoreFunction(baseline=…) for this site",
        )
    if not options.get("use_decaying_avg_baseline"):
        return ScoreFunction()
    return ScoreFunction(baseline=MovingAverage(decay=options.get("baseline_beta", 0.9)))


def _handles_itself(guide: Any) -> bool:
    return isinstance(pyro.poutine.unwrap(guide), pyro.poutine.messenger.Messenger)


def _key(site: str) -> str:
    return site.replace(".", "/")


def _fails_vectorized(error: Exception) -> CannotVectorize:
    first = str(error).splitlines()[0] if str(error) else ""
    return does_not_vectorize(PROGRAM, f"with a leading dimension it fails with {type(error).__name__}: {first}")
