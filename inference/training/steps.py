"""One training step of a loss: as a torch module, or as ``SVI.step`` makes it."""

from __future__ import annotations

import math
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import pyro
import pyro.poutine as poutine
import torch
from pyro.infer import ELBO
from pyro.ops.provenance import detach_provenance

from ...errors import BadInput
from ..engine.handlers import OfSamples
from ..engine.programs import in_support, observed_support
from ..engine.rows import Rows
from ..engine.scopes import kept_buffers, modules_of, owned_parameters, private_seed
from ..estimators._distributions import describe, has_tensors
from .fingerprints import checksum
from .optimizers import Updates
from .schedules import end_of


def outside_support(site: str, distribution: str) -> BadInput:
    return BadInput(
        f"site {site!r}: the data hold values outside the support of {distribution}; fix them, or take a likelihood "
        "that allows them"
    )


class _ObservedInSupport(OfSamples):
    """Refuses data outside a distribution's support: without validation their density is finite and meaningless.

    A tensor is checked once, until it or the support changes: a step with reruns has the same tensors again, and so
    has every step on all data at once.
    """

    def __init__(self):
        super().__init__()
        self.unchecked: frozenset[str] = frozenset()
        self.seen: dict[str, tuple[Any, ...]] = {}  # by site: what was found inside of its support

    def _pyro_post_sample(self, msg) -> None:
        support, value = observed_support(msg), msg["value"]
        if support is None or msg["name"] in self.unchecked:
            return
        before = self.seen.get(msg["name"])
        if before is not None and before[0] is support and before[1]() is value and before[2] == value._version:
            return
        inside = in_support(support, value)
        if inside is not None and not inside.all():
            raise outside_support(msg["name"], describe(msg["fn"]))
        if isinstance(value, torch.Tensor) and not has_tensors(support):
            self.seen[msg["name"]] = support, weakref.ref(value), value._version


class _UnsavedBuffers:
    """The buffers of both programs that ``state_dict`` leaves out (``persistent=False``), as far as a run changes them.

    Those that nothing has changed are constants, or data, that the programs make themselves: a checkpoint does not copy
    them.
    """

    def __init__(self, model: Callable, guide: Callable):
        pairs = (("model", model), ("guide", guide))
        self.programs = {prefix: one for prefix, program in pairs for one in modules_of(program)[:1]}
        # Torch does not count every write: F.batch_norm's to its running statistics is none.
        self.first: dict[str, torch.Tensor] = {}
        self._sums = {name: checksum([value]) for name, value in self.named()}

    def named(self) -> Iterator[tuple[str, torch.Tensor]]:
        return unsaved_buffers(self.programs)

    def state(self) -> dict[str, torch.Tensor]:
        """The changed buffers by name."""
        return {name: value.detach() for name, value in self.named() if self._sums.get(name) != checksum([value])}

    def load(self, state: Mapping[str, torch.Tensor]) -> None:
        load_unsaved(self.programs, state)

    def keep_first(self) -> None:
        """Keep what the buffers hold now, for `load_all`."""
        self.first = {name: value.detach().clone() for name, value in self.named()}

    def load_all(self, state: Mapping[str, torch.Tensor]) -> None:
        """Load a state, and put the buffers that nothing had changed then back to what `keep_first` kept."""
        self.load({**self.first, **state})


def unsaved_buffers(programs: Mapping[str, torch.nn.Module]) -> Iterator[tuple[str, torch.Tensor]]:
    """The buffers of programs that ``state_dict`` leaves out, by their names after the program's own."""
    for prefix, program in programs.items():
        for path, module in program.named_modules(prefix=prefix):
            for name in sorted(module._non_persistent_buffers_set):
                value = module._buffers.get(name)
                if value is not None and not torch.nn.parameter.is_lazy(value):
                    yield f"{path}.{name}", value


def load_unsaved(programs: Mapping[str, torch.nn.Module], state: Mapping[str, torch.Tensor]) -> None:
    """Put values into buffers that ``state_dict`` leaves out, by the names of :func:`unsaved_buffers`."""
    now = dict(unsaved_buffers(programs))
    for name, value in state.items():
        if name in now and now[name].shape == value.shape and now[name].dtype == value.dtype:
            with torch.no_grad():
                now[name].copy_(value)  # in place: a graph may hold this tensor
            continue
        prefix, *path, own = name.split(".")
        module = programs[prefix].get_submodule(".".join(path))
        device = now[name].device if name in now else value.device
        module.register_buffer(own, value.to(device), persistent=False)


class Step(ABC):
    """One training step, called with a batch; returns the loss. A loss that is not finite changes nothing.

    Attributes: ``parameters`` by name, ``optimizer``. ``state()`` is everything that steps change, except the optimizer
    and torch's generators, as tensors and plain values; after ``load(state)`` a new step continues as this one.

    Pyro's own validation checks every value of every step and costs a tenth of the time or more. The first batch runs
    under it, as the caller has set it; after that ``check_data`` has the data checked, and the caller handles a loss
    that is not finite. ``validate`` keeps Pyro's validation on.
    """

    validate = False
    check_data = True
    unchecked: frozenset[str] = frozenset()  # sites whose distribution has validate_args=False
    note = ""  # a remark for the progress lines
    compiler: Callable[..., Any] | None = None  # for functions of tensors, where the step is compiled
    code_between = True  # whether code of others runs between the steps of a stretch
    failed_on: Rows | None = None  # the batch whose step raised an error, where it is not the last one
    _look: _ObservedInSupport | None = None
    _frozen: frozenset[str] = frozenset()  # the parameters that did not learn when the optimizer was made
    _strides: Mapping[str, tuple[int, ...]] = {}  # of the parameters when training began
    parameters: dict[str, torch.nn.Parameter]
    optimizer: Updates
    loss: ELBO
    _unsaved: _UnsavedBuffers

    @abstractmethod
    def __call__(self, batch: Rows) -> float: ...

    def stretch(self, batches: Iterator[Rows], made: list[tuple[Rows, float]], most: int) -> None:
        """Steps up to the next point where somebody looks: here one; at most ``most``, and none without a batch.

        Each batch is added to ``made`` with its loss. The last loss may be one that is not finite, no other.
        """
        if (batch := next(batches, None)) is not None:
            made.append((batch, self(batch)))

    def _begin_with(self, model: Callable, guide: Callable, make_optimizer: Callable) -> None:
        """Record the parameters and buffers with which training begins, and make the optimizer."""
        self.parameters = self.current_parameters()
        self._unsaved = _UnsavedBuffers(model, guide)
        _refuse_store_parameters(self.parameters.values())
        self._frozen = frozenset(name for name, p in self.parameters.items() if not p.requires_grad)
        self._strides = {name: p.stride() for name, p in self.parameters.items()}
        self.optimizer = make_optimizer({name: p for name, p in self.parameters.items() if p.requires_grad})

    @abstractmethod
    def state(self) -> dict[str, Any]: ...

    @abstractmethod
    def load(self, state: Mapping[str, Any]) -> None: ...

    def keep_first_buffers(self) -> None:
        """Called before the first step of a run whose best epoch is put back."""
        self._unsaved.keep_first()

    def load_best(self, best: Mapping[str, Any]) -> None:
        """Put the parameters and buffers of the best epoch back."""
        self.load({"module": best["module"], "store": {}})
        if "buffers" in best:  # earlier versions did not keep them
            self._unsaved.load_all(best["buffers"])

    def _owned(self) -> set[int]:
        """The identities of the parameters that the optimizer has."""
        optimizer = getattr(self.optimizer, "optimizer", self.optimizer)
        return {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}

    def stopped(self) -> list[str]:
        """The parameters that the optimizer has and that do not learn now: frozen since training began."""
        owned = self._owned()
        return [name for name, one in self.parameters.items() if id(one) in owned and not one.requires_grad]

    def stop(self, names: Iterable[str]) -> None:
        """Freeze the parameters of :meth:`stopped` of another step."""
        for name in names:
            self.parameters[name].requires_grad_(False)

    def check_parameters(self) -> None:
        """Raise BadInput if the programs have, or train, other parameters than the optimizer was made for."""
        owned = self._owned()
        for name, parameter in self.current_parameters().items():
            if self.parameters.get(name) is not parameter:
                raise BadInput(
                    f"parameter {name!r} is new since training began, and the optimizer does not train it: replace"
                    " layers before fit, or write new values into the parameters that there are"
                )
            if name in self._frozen and parameter.requires_grad and id(parameter) not in owned:
                raise BadInput(
                    f"parameter {name!r} was frozen when training began, and the optimizer does not have it: let it"
                    " learn when fit begins and freeze it in on_epoch, or call fit again"
                )
            if self.compiler is not None and parameter.stride() != self._strides.get(name, parameter.stride()):
                raise BadInput(
                    f"parameter {name!r} has another order in memory than when training began, and compiled steps read"
                    " it in that one: write new values by copy_, or pass compile=False"
                )

    @abstractmethod
    def current_parameters(self) -> dict[str, torch.nn.Parameter]:
        """The parameters that the programs have now, by name."""

    def reported(self) -> dict[str, float]:
        """Further values that the objective reported for the last batch, in nats, summed like the loss."""
        return {}

    def settles(self, horizon: int) -> tuple[int, str]:
        """The step from which the loss's schedules are constant, and a description of the last one to end.

        Schedules are evaluated up to the ``horizon``.
        """
        begun = int((getattr(self.loss, "begins_with", None) or {}).get("_extra_state", {}).get("steps", 0))
        ends = [(end_of(value, begun + horizon) - begun, f"{name} {value!r}") for name, value in self.schedules()]
        step, words = max(ends, default=(0, ""))
        return max(step, 0), words

    def schedules(self) -> list[tuple[str, Callable[[int], float]]]:
        """The schedules of the loss and of its estimators, each with its option's name."""
        loss = self.loss
        estimators = [*getattr(loss, "given", {}).values(), getattr(loss, "otherwise", None), *self.chosen()]
        held = [("kl_weight", getattr(loss, "kl_weight", None))]
        held += [pair for estimator in estimators for pair in getattr(estimator, "__dict__", {}).items()]
        return [(name, value) for name, value in held if callable(value) and name.endswith(("weight", "temperature"))]

    def chosen(self) -> list[Any]:
        """The estimators that sites of the programs name."""
        return []

    @contextmanager
    def checks(self) -> Iterator[None]:
        if self.validate:
            yield
            return
        if not (self.check_data and pyro.infer.util.is_validation_enabled()):
            with pyro.validation_enabled(False):
                yield
            return
        if self._look is None:
            self._look = _ObservedInSupport()
        self._look.unchecked = self.unchecked
        with pyro.validation_enabled(False), self._look:
            yield


class TorchStep(Step):
    """One step in torch's idiom: the loss is a module, and its ``state_dict`` is the whole state."""

    def __init__(self, model, guide, loss: ELBO, make_optimizer, batch: Rows):
        self.module, self.loss, self.batch = loss(model, guide), loss, batch
        with private_seed(None, model, guide), kept_buffers(model, guide):
            if hasattr(self.module, "initialize"):
                self.module.initialize(*batch.args, **batch.kwargs)
            else:
                self.module(*batch.args, **batch.kwargs)
        self.module.train()
        self._begin_with(model, guide, make_optimizer)

    def current_parameters(self) -> dict[str, torch.nn.Parameter]:
        return dict(self.module.named_parameters())

    def __call__(self, batch: Rows) -> float:
        self.optimizer.zero_grad(set_to_none=True)
        with self.checks():
            value = self.module(*batch.args, **batch.kwargs)
        if math.isfinite(number := value.item()):
            value.backward()
            self.optimizer.step()
        return number

    def reported(self) -> dict[str, float]:
        binding = getattr(self.module, "binding", None)
        return {} if binding is None else {name: value.item() for name, value in binding.reported().items()}

    def chosen(self) -> list[Any]:
        return list(getattr(getattr(self.module, "binding", None), "chosen", {}).values())

    def state(self) -> dict[str, Any]:
        choice = getattr(self.module.elbo, "choice", None)
        kept = {} if choice is None else {"choice": dict(choice.words)}
        return {"module": self.module.state_dict(), "buffers": self._unsaved.state(), "store": {}, **kept}

    def load(self, state: Mapping[str, Any]) -> None:
        elbo = self.module.elbo
        if "choice" in state and elbo.choice is not None and state["choice"] != elbo.choice.words:
            self.change(elbo.changed(state["choice"]))
        self.module.load_state_dict(state["module"])
        self._unsaved.load(state.get("buffers", {}))  # none in an earlier checkpoint

    def change(self, loss: ELBO) -> None:
        """Continue with another loss of the same programs, whose estimators have no parameters."""
        before, model, guide = self.module.binding, self.module.model, self.module.guide
        module = loss(model, guide)
        with private_seed(None, model, guide), kept_buffers(model, guide):
            module.initialize(*self.batch.args, **self.batch.kwargs)
        module.train()
        if dict(module.named_parameters()).keys() != self.parameters.keys():
            raise BadInput("an estimator with parameters of its own cannot be put in the place of another in mid-run")
        module.binding.steps = before.steps
        for name, estimator in module.binding.chosen.items():
            if name in before.chosen and repr(estimator) == repr(before.chosen[name]):
                key = name.replace(".", "/")
                if key in before.states:
                    module.binding.states[key] = before.states[key]
        self.module, self.loss = module, loss


class StoreStep(Step):
    """One step as ``SVI.step`` makes it, for losses that take gradients themselves and keep state in the param store.

    One optimizer serves the programs' own parameters: through ``SVI``, each update of TraceGraph's decaying average
    counts as a new parameter and leaves another optimizer behind.
    """

    def __init__(self, model, guide, loss: ELBO, make_optimizer, batch: Rows):
        self.model, self.guide, self.loss = model, guide, loss
        look = poutine.trace(param_only=True)
        with private_seed(None, model, guide), kept_buffers(model, guide), torch.no_grad(), look:
            guide_trace = poutine.trace(guide).get_trace(*batch.args, **batch.kwargs)
            poutine.replay(model, trace=guide_trace)(*batch.args, **batch.kwargs)
        model.train()
        guide.train()
        self._begin_with(model, guide, make_optimizer)

    def current_parameters(self) -> dict[str, torch.nn.Parameter]:
        return owned_parameters(self.model, self.guide)

    def __call__(self, batch: Rows) -> float:
        self.optimizer.zero_grad(set_to_none=True)
        with self.checks():
            number = float(self.loss.loss_and_grads(self.model, self.guide, *batch.args, **batch.kwargs))
        if math.isfinite(number):
            self.optimizer.step()
        return number

    def state(self) -> dict[str, Any]:
        owned = {id(parameter) for parameter in self.parameters.values()}
        kept = {name: value for name, value in pyro.get_param_store().named_parameters() if id(value) not in owned}
        module = {f"model.{name}": value for name, value in self.model.state_dict().items()}
        module |= {f"guide.{name}": value for name, value in self.guide.state_dict().items()}
        # TraceGraph's averages carry provenance wrappers.
        store = {name: detach_provenance(v).detach().clone() for name, v in kept.items()}
        return {"module": module, "buffers": self._unsaved.state(), "store": store}

    def load(self, state: Mapping[str, Any]) -> None:
        for prefix, program in (("model.", self.model), ("guide.", self.guide)):
            program.load_state_dict(
                {key.removeprefix(prefix): value for key, value in state["module"].items() if key.startswith(prefix)}
            )
        self._unsaved.load(state.get("buffers", {}))
        for name, value in state["store"].items():
            pyro.get_param_store()[name] = value


def _refuse_store_parameters(owned) -> None:
    ids = {id(parameter) for parameter in owned}
    for name, value in pyro.get_param_store().named_parameters():
        if id(value) not in ids:
            raise BadInput(
                f"pyro.param {name!r} belongs to no module, so its training would be lost with the run: make it a "
                "PyroParam of the model or the guide"
            )
