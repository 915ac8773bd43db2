"""SiteELBO: one differentiable loss with an objective and a gradient estimator for each sample site."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import pyro
import torch
from pyro.infer.elbo import ELBO, ELBOModule
from pyro.nn import PyroModule
from torch import Tensor, nn

from ..changes import Default
from ..errors import BadInput, GumboWarning, UnknownName
from ..options import check_option, fits
from .engine.binding import Binding
from .engine.contraction import MEMORY_LIMIT
from .engine.resolution import as_estimator, check_particles
from .engine.scopes import Store, modules_of, networks_at_hand, one_at_a_time
from .estimators import Estimator, estimators
from .estimators._base import Chooser
from .objectives import Objective, as_objective

PLATES = ("check", "trust", "ignore")


class SiteELBO(ELBO):
    """A variational loss with a gradient estimator for each sample site.

    Args:
        estimators: a word (or :class:`Estimator`) for all sites, or a mapping from site names to words, where ``"*"``
            is the default for sites that the mapping does not name. The order of precedence is: the mapping's entry for
            the site, the site's own ``infer={"estimator": …}``, ``"*"``. A site without any word is pathwise if its
            distribution has ``rsample``. ``"auto"``, or :class:`~gumbo.inference.Auto`, selects the words by pilot runs
            in the first call.
        objective: ``"elbo"``; ``"iwae"``, the importance-weighted bound; ``"renyi"``, the bound of order
            ``alpha``; ``"rws"``, reweighted wake-sleep; ``"free-bits"``; ``"log-variance"`` and
            ``"log-variance+elbo"``; or an :class:`~gumbo.inference.objectives.Objective`.
        num_particles: K, the number of draws; None takes the smallest K that the estimators allow.
        vectorize_particles: True runs all K particles at once, in a plate to the left of all others; the first call
            replays particles alone, compares the log-probabilities, and refuses programs for which they differ; so does
            a later call in another mode, with other arguments, or with another shape of these (the first few shapes).
            False runs one particle after the other. None: vectorized where the comparison passes, otherwise one after
            the other with a warning.
        max_plate_nesting: the number of batch dimensions that plates use; None finds it in the first call.
        kl_weight: a factor for the terms of all latent sites, or a schedule, a function of the training step.
        plates: how to treat the assumption that the rows of a plate are independent. ``"check"`` changes the draws of
            groups of rows and tests whether the terms of the other rows change, in the first call and again in another
            mode or for the first few other batch sizes; a plate with dependent rows (BatchNorm, a mean over the plate)
            is summed under ``"elbo"`` and refused under the other objectives. The check can find dependence; it cannot
            prove independence. ``"trust"`` skips the check; ``"ignore"`` sums every plate. The default was ``"trust"``
            before: where this changes a gradient, :class:`~gumbo.errors.MeaningChanged` says so once.
        memory_limit: GiB that exact sums over enumerated sites of the model or the guide may take at once; more is
            refused before it is made.
        objective_options: options of an objective given as a word, as in ``objective="renyi", alpha=0.5``.

    Sites that the model marks ``infer={"enumerate": "parallel"}`` and the guide does not sample are summed out exactly
    by variable elimination; for chains under ``pyro.markov`` and for trees the time is linear in their length.

    The loss works in Pyro's idiom, ``SVI(model, guide, optim, loss=SiteELBO("rloo"))``, and in torch's:
    ``loss = SiteELBO("rloo")(model, guide)`` is a module, and ``loss(x).backward()`` gives the gradients. The value is
    −bound in nats, summed over the batch and scaled by the program's plates.

    Raises:
        UnknownName: a word that is not an estimator.
        UnsupportedSite: a site that its estimator, or the objective, does not support.
        CannotVectorize: a program whose log-probabilities change when K particles run at once.
        BadInput: any other invalid option, or an invalid program.

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
    max_alternatives = 64  # the largest number of particles × alternatives in one run; bounds memory

    def __init__(
        self,
        estimators: str | Estimator | Mapping[str, str | Estimator] = "default",
        *,
        objective: str | Objective = "elbo",
        num_particles: int | None = None,
        vectorize_particles: bool | None = None,
        max_plate_nesting: int | None = None,
        kl_weight: float | Callable[[int], float] = 1.0,
        plates: str = Default("check"),
        memory_limit: float = MEMORY_LIMIT / 2**30,
        **objective_options: Any,
    ):
        self.target = as_objective(objective, objective_options)
        if isinstance(max_plate_nesting, float) and max_plate_nesting == float("inf"):
            max_plate_nesting = None
        _check_settings(
            self.target, num_particles, vectorize_particles, max_plate_nesting, kl_weight, plates, memory_limit
        )
        self.objective, self.plates, self.kl_weight = self.target.name, plates, kl_weight
        self.plates_by_default = isinstance(plates, Default)
        self.memory_limit = memory_limit
        self.given: dict[str, Estimator] = {}
        self.otherwise: Estimator | None = None
        if isinstance(estimators, Mapping):
            self.given = {name: as_estimator(word) for name, word in estimators.items() if name != "*"}
            self.otherwise = as_estimator(estimators["*"]) if "*" in estimators else None
        elif not isinstance(estimators, str) or estimators != "default":
            self.otherwise = as_estimator(estimators)
        named = self._named()
        if named and not self.target.takes_estimators:
            first = next(iter(named.values()))
            raise BadInput(
                f"objective {self.objective!r} draws without gradients and takes no estimator, got {first.name!r}"
            )
        for site, estimator in named.items():
            check_particles(site, estimator, num_particles)
        if num_particles is not None and num_particles < self.target.min_particles:
            raise BadInput(
                f"objective {self.objective!r} needs num_particles ≥ {self.target.min_particles}, got {num_particles}"
            )
        self.requested_particles = num_particles
        self.requested_nesting = max_plate_nesting
        self._bindings: list[Binding] = []
        self._learnt: tuple[nn.ModuleDict, int] | None = None
        self.choice: Any = None  # the result of a Chooser, such as "auto"
        self.begins_with: Mapping[str, Any] | None = None  # state of an earlier training: step, baselines, networks
        super().__init__(
            num_particles=num_particles or 1,
            max_plate_nesting=float("inf") if self.requested_nesting is None else self.requested_nesting,
        )
        self.requested_vectorized = vectorize_particles
        self.vectorize_particles = vectorize_particles is not False

    def __call__(self, model: Callable, guide: Callable) -> SiteELBOModule:
        """A module whose ``forward`` takes the programs' arguments and returns the loss."""
        return SiteELBOModule(model, guide, self)

    def __repr__(self) -> str:
        words = {name: _said(estimator) for name, estimator in self._named().items()}
        said = words if self.given else words.get("*", "default")
        parts = [repr(said), f"objective={self.objective!r}"]
        parts += [f"{name}={value!r}" for name, value in self.target.options.items() if value is not None]
        parts.append(f"num_particles={self.requested_particles}")
        for name, value, usual in (
            ("vectorize_particles", self.requested_vectorized, None),
            ("max_plate_nesting", self.requested_nesting, None),
            ("kl_weight", self.kl_weight, 1.0),
            ("plates", self.plates, "check"),
            ("memory_limit", self.memory_limit, MEMORY_LIMIT / 2**30),
        ):
            if value != usual:
                parts.append(f"{name}={value!r}")
        return f"SiteELBO({', '.join(parts)})"

    def _named(self) -> dict[str, Estimator]:
        """The estimators that were given, by site; that of all other sites as ``*``."""
        return self.given if self.otherwise is None else {**self.given, "*": self.otherwise}

    @property
    def chooser(self) -> Chooser | None:
        """The first estimator that selects others (``auto``), or None."""
        return next((estimator for estimator in self._named().values() if isinstance(estimator, Chooser)), None)

    @property
    def undecided(self) -> bool:
        """Whether an estimator that selects others (``auto``) has not selected yet."""
        return self.chooser is not None

    def decided(self, model: Callable, guide: Callable, batches: Iterable) -> SiteELBO:
        """A copy of this loss with words selected on batches of ``(args, kwargs)``."""
        choice = self.chooser.choose(self, model, guide, batches)
        self.chooser.announce(choice)
        return self.decided_as(choice)

    def decided_as(self, choice: Any) -> SiteELBO:
        """A copy of this loss with the words of a selection, which both keep as ``choice``."""
        self.choice = choice
        found = self.settled_as(choice.words)
        found.choice = choice
        return found

    def changed(self, words: Mapping[str, str]) -> SiteELBO:
        """A copy of this loss, whose words were selected before, with other words at the same sites."""
        found = copy.copy(self)
        found.given = self.given | {name: as_estimator(word) for name, word in words.items()}
        found.choice, found._bindings = copy.copy(self.choice), []
        found.choice.words = dict(words)
        return found

    def settled_as(self, words: Mapping[str, str]) -> SiteELBO:
        """A copy of this loss with these words in place of the estimators that select others (``auto``)."""
        found = copy.copy(self)
        given = {name: e for name, e in self.given.items() if not isinstance(e, Chooser)}
        found.given = given | {name: as_estimator(word) for name, word in words.items()}
        found.otherwise = None if isinstance(self.otherwise, Chooser) else self.otherwise
        found._bindings = []
        for name, estimator in found.given.items():
            check_particles(name, estimator, self.requested_particles)
        return found

    def _get_trace(self, model, guide, args, kwargs):
        raise BadInput("SiteELBO makes no traces; use differentiable_loss, loss or loss_and_grads")

    def __getstate__(self) -> dict[str, Any]:
        # A copy is used with copies of the programs: it binds its state to the first pair that it is called with.
        used = sorted(self._bindings, key=Binding.has_state)
        # deepcopy drops the weak references that the param store attaches to parameters.
        learnt = (copy.deepcopy(used[-1].states), used[-1].steps) if used else self._learnt
        begins_with = None if used else self.begins_with
        return {**self.__dict__, "_bindings": [], "_learnt": learnt, "begins_with": begins_with}

    def _binding(self, model: Callable, guide: Callable) -> Binding:
        for binding in self._bindings:
            if binding.pair.model == model and binding.pair.guide == guide:
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
        """The loss as a differentiable scalar; the estimators' own parameters are kept in Pyro's param store."""
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
        if not self._binding(model, guide).steps:
            _warn_of_copies(model, guide)
        loss = self.differentiable_loss(model, guide, *args, **kwargs)
        if loss.requires_grad:
            loss.backward(retain_graph=self.retain_graph)
        return loss.item()

    def loss(self, model: Callable, guide: Callable, *args, **kwargs) -> float:
        """The loss as a number, without gradients; baselines and running statistics do not change."""
        with one_at_a_time, torch.no_grad():
            return self._binding(model, guide).loss(args, kwargs).item()


def _warn_of_copies(*programs: Callable) -> None:
    """Warn of parameters of layers of which Pyro's store trains a copy, so that the layers stay as they are."""
    inside = (part for one in modules_of(*programs) if isinstance(one, PyroModule) for part in one.named_modules())
    for path, part in inside:
        for name, one in part._parameters.items() if not isinstance(part, PyroModule) else ():
            if one is not None and not nn.parameter.is_lazy(one) and one.requires_grad and not one.is_contiguous():
                warnings.warn(
                    f"parameter '{path}.{name}' is not contiguous in memory: Pyro's param store trains a copy of it,"
                    " and the layer keeps its values; lay it out by .contiguous(), or train it by fit",
                    GumboWarning,
                    stacklevel=4,
                )


def _check_settings(
    target: Objective,
    num_particles: Any,
    vectorize_particles: Any,
    max_plate_nesting: Any,
    kl_weight: Any,
    plates: Any,
    memory_limit: Any,
) -> None:
    """Raise BadInput for a setting of `SiteELBO` that is out of range, or that its objective does not take."""
    if not isinstance(plates, str) or plates not in PLATES:
        raise UnknownName("plates", plates, PLATES)
    if not fits(num_particles, int | None):
        raise BadInput(f"num_particles must be a positive integer or None, got {num_particles!r}")
    if not fits(max_plate_nesting, int | None, 0):
        raise BadInput(f"max_plate_nesting must be an integer of at least 0 or None, got {max_plate_nesting!r}")
    check_option("vectorize_particles", vectorize_particles, bool | None)
    if not fits(kl_weight, float | Callable, 0):
        raise BadInput(f"kl_weight must be a number ≥ 0 or a schedule, got {kl_weight!r}")
    if not target.takes_kl_weight and (callable(kl_weight) or kl_weight != 1):
        raise BadInput(
            f"kl_weight is not defined for objective {target.name!r}, which needs the whole of log p − log q;"
            f" leave it at 1, or take objective='elbo', got {kl_weight!r}"
        )
    if not fits(memory_limit, float, 0):
        raise BadInput(f"memory_limit must be a number of GiB ≥ 0, got {memory_limit!r}")


def _said(estimator: Estimator) -> str:
    """The estimator's word if the registry has it, else its repr with all options."""
    return estimator.name if estimator.name in estimators else repr(estimator)


class SiteELBOModule(ELBOModule):
    """A loss bound to a model and a guide: a module from the programs' arguments to a differentiable scalar.

    Its parameters are those of the model, the guide, and the baselines and control variates; the latter exist after
    :meth:`initialize` or the first call.
    """

    uncaptured = frozenset({"_kept", "_own", "_keeps"})

    def __init__(self, model: Callable, guide: Callable, elbo: SiteELBO):
        super().__init__(model, guide, elbo)
        self.binding = Binding(elbo, model, guide)
        self.__dict__["_own"] = {}  # parameters by id(); the reference keeps the id from being reused
        self.__dict__.update(_kept=None, _keeps=False)

    def __getstate__(self) -> dict[str, Any]:
        # The kept store belongs to the original's parameters, which a copy may replace or share.
        return {**self.__dict__, "_kept": None, "_own": {}}

    def initialize(self, *args, **kwargs) -> SiteELBOModule:
        """Build lazily built networks without a change of random state; returns itself."""
        with self._own_store():
            self.binding.initialize(args, kwargs)
            self.binding.look(args, kwargs)
            self.binding.compare(args, kwargs)
        return self

    @property
    def objective_name(self) -> str:
        """The name of the objective: ``elbo``, ``iwae``, ``rws``, or a name of its own (relaxed or weighted)."""
        return self.binding.objective_name()

    def forward(self, *args, **kwargs) -> Tensor:
        if self._kept is None:
            with self._own_store():
                return self.binding.loss(args, kwargs)
        with self._own_store(), networks_at_hand(self.model, self.guide):
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
        """A separate param store for the duration of a call, so that parameter names cannot clash."""
        with one_at_a_time:
            store = self._kept or Store()
            self.__dict__["_kept"] = None  # what a failed call leaves is not kept
            with store:
                yield
            if not all(map(self._own.__contains__, map(id, store.params.values()))):
                self._look_up(store.params)
            self.__dict__["_kept"] = store if self._keeps else None

    def _look_up(self, stored: Mapping[str, Tensor]) -> None:
        """Check that every parameter in the store belongs to a module; runs only after an unknown parameter appears."""
        self.__dict__["_own"] = {id(parameter): parameter for parameter in nn.Module.parameters(self)}
        # Registering every parameter again at each call costs as much as a small layer. But a PyroParam reads the
        # store's value before its own, so that with a kept store a value that the user replaced would be undone.
        self.__dict__["_keeps"] = not any(getattr(module, "_pyro_params", None) for module in self.modules())
        for name, parameter in stored.items():
            if id(parameter) not in self._own:
                plain = name.replace("$$$", ".")
                named = nn.Module.named_parameters(self)
                if any(own.endswith(f".{plain}") and not one.is_contiguous() for own, one in named):
                    raise BadInput(
                        f"parameter {plain!r} is not contiguous in memory, so that Pyro's param store holds a copy of"
                        " it, which would be trained in its place: lay it out by .contiguous(), or train it by fit"
                    )
                raise BadInput(
                    f"pyro.param {name!r} is not a parameter of model or guide as modules, and loss.parameters()"
                    " would miss it: make it a PyroParam of a PyroModule, or train through pyro.infer.SVI"
                )
