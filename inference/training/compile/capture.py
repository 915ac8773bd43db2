"""Capture a loss as one graph of tensor operations, without Python.

A graph freezes what Python decided during the capture. Everything that may change from call to call is therefore an
input (parameters, buffers, the batch, noise, schedules), and what cannot be an input is refused.
"""

from __future__ import annotations

import random
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyro
import torch
from pyro.poutine.messenger import Messenger
from torch import Tensor, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    UnsupportedFakeTensorException,
)
from torch.distributions import transforms
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode
from torch.nn.modules.batchnorm import _NormBase
from torch.utils._python_dispatch import TorchDispatchMode

from ....errors import BadInput, GumboError, first_line
from ...elbo import SiteELBOModule
from ...engine import noise
from ...engine.constants import ADVICE, Place, called_with, unmoved
from ...engine.interventions import Unvalidated
from ...engine.noise import Noise, Tape
from ...engine.programs import in_support, observed_support
from ...engine.rows import Rows
from ...estimators._base import SiteState
from ...estimators._distributions import describe
from ..schedules import Schedule
from .arguments import filled, flat

Tensors = dict[str, Tensor]


@dataclass
class Outcome:
    """The result of one call of a loss: its value, the changed buffers, and which observed sites are in support."""

    loss: Tensor
    buffers: Tensors
    inside: Tensors


class TrainingStep:
    """A symbolic step number: schedules of it are inputs of the graph, and any other use is refused."""

    def __init__(self, value_of: Callable[[Schedule], Tensor]):
        self._value_of = value_of

    def at(self, schedule: Schedule) -> Tensor:
        """The schedule's value at the step at which the graph runs."""
        return self._value_of(schedule)

    def __add__(self, more: int) -> TrainingStep:
        return self

    def _refuse(self, *_: Any) -> Any:
        raise BadInput(
            f"an estimator uses the number of the step in a way that a captured graph would freeze; {ADVICE}"
        )

    __int__ = __float__ = __index__ = __bool__ = __mul__ = __rmul__ = __sub__ = __rsub__ = __radd__ = _refuse
    __truediv__ = __rtruediv__ = __floordiv__ = __mod__ = __pow__ = __rpow__ = __neg__ = _refuse
    __lt__ = __le__ = __gt__ = __ge__ = __eq__ = __ne__ = _refuse  # type: ignore[assignment]
    __hash__ = None  # type: ignore[assignment]


class _Support(Messenger):
    """Records whether the observed values are in the support of their distributions."""

    def __init__(self):
        super().__init__()
        self.inside: Tensors = {}

    def _pyro_post_sample(self, msg) -> None:
        support = observed_support(msg)
        inside = None if support is None else in_support(support, msg["value"])
        if inside is not None:
            self.inside[f"{msg['name']}\n{describe(msg['fn'])}"] = inside.all()


@contextmanager
def triangles_by_index() -> Iterator[None]:
    """Make torch's transforms fill triangular matrices by indices instead of by a mask.

    A mask is a tensor whose values determine a shape, which a graph cannot hold; the indices are constant.
    """

    def to_vector(mat: Tensor, diag: int = 0) -> Tensor:
        rows, columns = torch.tril_indices(mat.shape[-2], mat.shape[-1], diag, device=mat.device)
        return mat[..., rows, columns]

    def to_matrix(vec: Tensor, diag: int = 0) -> Tensor:
        size = vec.shape[-1]
        n = round((-(1 + 2 * diag) + ((1 + 2 * diag) ** 2 + 8 * size + 4 * abs(diag) * (diag + 1)) ** 0.5) / 2)
        rows, columns = torch.tril_indices(n, n, diag, device=vec.device)
        mat = vec.new_zeros(vec.shape[:-1] + (n, n))
        mat[..., rows, columns] = vec
        return mat

    before = transforms.tril_matrix_to_vec, transforms.vec_to_tril_matrix
    transforms.tril_matrix_to_vec, transforms.vec_to_tril_matrix = to_vector, to_matrix
    try:
        yield
    finally:
        transforms.tril_matrix_to_vec, transforms.vec_to_tril_matrix = before


class Program:
    """A bound loss as a function of all its inputs.

    Args:
        module: the loss, in training mode.
        batch: rows of the shape to capture.

    Attributes:
        batch: these rows.
        noise: the noise that one call needs.
        schedules: the schedules that a call reads, in their order.
        used: the names of the parameters that receive a gradient.
        moving: the names of the buffers that a call changes.
        checked: the observed sites (and their distributions) whose support can be checked.
        replaced: the attributes of modules that a call replaces by other objects.
    """

    def __init__(self, module: SiteELBOModule, batch: Rows):
        self.module = module
        self.num_tensors = len(flat(batch))
        self.batch = batch  # for its values other than tensors, which are constants of the graph
        self.schedules: list[Schedule] = []
        self.replaced: set[Place] = set()
        self._places = self._find_buffers()
        self._like = next(iter(self.parameters().values()), torch.empty(()))
        self.moving: list[str] | None = None  # until a run on real tensors has shown them
        before = _python_randomness()
        tape = Tape()
        outcome, gradients = self.call_and_differentiate(self.parameters(), self.buffers(), flat(batch), tape)
        if before != _python_randomness():
            raise BadInput(
                "the program draws from Python's or NumPy's random numbers, and a captured graph would repeat the first"
                f" draws for ever: draw from torch, or {ADVICE}"
            )
        self.noise = Noise(tape.requests)
        self.used = [name for name, gradient in gradients.items() if gradient is not None]
        self.moving = list(outcome.buffers)
        self.checked = list(outcome.inside)

    def parameters(self) -> Tensors:
        return dict(self.module.named_parameters())

    def buffers(self) -> Tensors:
        """The current buffers; their locations are cached, since every step asks for them."""
        return {name: places[key] for name, (places, key) in self._places.items()}

    def _find_buffers(self) -> dict[str, tuple[dict[str, Tensor], str]]:
        found = {}
        modules = dict(self.module.named_modules())
        for name, _ in self.module.named_buffers():
            path, _, key = name.rpartition(".")
            found[name] = (modules[path]._buffers, key)
        return found

    @property
    def step(self) -> int:
        return self.module.binding.steps

    def scheduled(self, step: int | None = None) -> list[float]:
        """The values of the schedules at a step, by default the current one."""
        step = self.step if step is None else step
        return [float(schedule(step)) for schedule in self.schedules]

    def call(
        self,
        parameters: Tensors,
        buffers: Tensors,
        batch: Sequence[Tensor],
        tape: Tape,
        scalars: Sequence[Tensor] | None = None,
    ) -> Outcome:
        """The loss, without side effects on the module; ``scalars`` default to the schedules' values at this step."""
        args, kwargs = filled(self.batch, batch)
        copies = {name: buffer.clone() for name, buffer in buffers.items()}
        versions = {name: copy._version for name, copy in copies.items()}
        swapped = {**parameters, **copies}
        support = _Support()
        now = self.step
        step = TrainingStep(lambda schedule: self._value_of(schedule, scalars, now))
        with (
            undisturbed(self.module, step, self.replaced),
            pyro.validation_enabled(False),
            Unvalidated(),
            triangles_by_index(),
            tape,
            support,
        ):
            loss = called_with(self.module, swapped, *args, **kwargs)
        moved = {
            name: swapped[name].detach()
            for name, copy in copies.items()
            if swapped[name] is not copy or copy._version != versions[name] or self._moves(name, buffers[name], copy)
        }
        return Outcome(loss, moved, support.inside)

    def _moves(self, name: str, before: Tensor, after: Tensor) -> bool:
        """Whether a call writes to a buffer, where torch does not count the write: F.batch_norm is such a call."""
        if self.moving is not None:
            return name in self.moving
        path = name.rpartition(".")[0]
        return isinstance(self.module.get_submodule(path), _NormBase) or not torch.equal(before, after)

    def call_and_differentiate(
        self, parameters: Tensors, buffers: Tensors, batch: Sequence[Tensor], tape: Tape, scalars=None
    ) -> tuple[Outcome, dict[str, Tensor | None]]:
        """The loss and its gradients, None where the loss does not depend on a parameter."""
        learns = {name for name, parameter in self.parameters().items() if parameter.requires_grad}
        leaves = {name: value.detach().requires_grad_(name in learns) for name, value in parameters.items()}
        outcome = self.call(leaves, buffers, batch, tape, scalars)
        wanted = {name: leaf for name, leaf in leaves.items() if name in learns}
        if not outcome.loss.requires_grad:
            return outcome, dict.fromkeys(wanted)
        gradients = torch.autograd.grad(outcome.loss, list(wanted.values()), allow_unused=True)
        outcome.loss = outcome.loss.detach()
        return outcome, dict(zip(wanted, gradients, strict=True))

    def _value_of(self, schedule: Schedule, scalars: Sequence[Tensor] | None, now: int) -> Tensor:
        number = next((i for i, other in enumerate(self.schedules) if other is schedule), None)
        if number is None:
            self.schedules.append(schedule)
            number = len(self.schedules) - 1
        if scalars is not None:
            return scalars[number]
        return self.tensor(float(schedule(now)))

    @property
    def dtype(self) -> torch.dtype:
        return self._like.dtype

    @property
    def device(self) -> torch.device:
        return self._like.device

    def tensor(self, values: float | list[float] | list[list[float]]) -> Tensor:
        """Numbers with the dtype and device of the parameters."""
        return torch.tensor(values, dtype=self.dtype, device=self.device)


def capture(function: Callable[..., Any], inputs: Sequence[Tensor]) -> torch.fx.GraphModule:
    """The graph of a function of tensors, captured without computing it.

    Raises BadInput, naming the line, where Python reads the value of a tensor.
    """
    asked = _Asked()

    def watched(*tensors: Tensor) -> Any:
        with asked:
            return function(*tensors)

    def traced() -> torch.fx.GraphModule:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's own, about how it captures
            return make_fx(watched, tracing_mode="fake", _allow_non_fake_inputs=True)(*inputs)

    try:
        graph = traced()
        if any(node.target is torch.ops.aten.mkldnn_rnn_layer.default for node in graph.graph.nodes):
            # inductor has no code for this operation: take the LSTM as the plain operations that it consists of.
            with _without_onednn():
                graph = traced()
    except Exception as error:
        raise _explained(error, asked.line) from error
    for name, value in vars(graph).items():
        if isinstance(value, nn.Parameter):
            raise BadInput(f"the graph holds a parameter {name!r} as a constant, so that it would not train; {ADVICE}")
    graph.meta["asks at"] = asked.line
    return graph


@contextmanager
def _without_onednn() -> Iterator[None]:
    before = torch._C._get_mkldnn_enabled()
    torch._C._set_mkldnn_enabled(False)  # torch.backends.mkldnn.flags also sets what warns without an Intel GPU
    try:
        yield
    finally:
        torch._C._set_mkldnn_enabled(before)


class _Asked(TorchDispatchMode):
    """Records the first line that reads a value, or makes a shape from values: such code fails to compile."""

    line: str | None = None

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if self.line is None and _depends_on_values(func, args):
            stack = traceback.extract_stack()
            start = max(i for i, frame in enumerate(stack) if (frame.filename, frame.name) == (__file__, "watched"))
            self.line = _innermost(stack[start + 1 :], torch, pyro, sys.modules[__package__])
        return func(*args, **(kwargs or {}))


def _depends_on_values(func: Any, args: Sequence[Any]) -> bool:
    if func is torch.ops.aten.index.Tensor:  # integer indices fix the shape, a mask's values change it
        return any(index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1])
    if torch.Tag.data_dependent_output not in func.tags and torch.Tag.dynamic_output_shape not in func.tags:
        return False
    return not args or getattr(args[0], "constant", None) is None  # Python constants are known


_ASKED = (
    DataDependentOutputException,
    DynamicOutputShapeException,
    GuardOnDataDependentSymNode,
    UnsupportedFakeTensorException,
)


def _explained(error: BaseException, asked_at: str | None) -> BaseException:
    """The error as one line if it comes from the capture; otherwise unchanged.

    ``asked_at`` is the line that `_Asked` recorded.
    """
    found: BaseException | None = error
    while found is not None and not _asks(found):
        found = found.__cause__ or found.__context__
    if found is not None:
        return asks_for_a_value(asked_at or _line_of(found))
    if isinstance(error, GumboError):
        return error
    reason = f"fails without values ({first_line(error, kind=True)})"
    return BadInput(f"compile: the program {reason}, at {_line_of(error)}; {ADVICE}")


def _asks(error: BaseException) -> bool:
    # Torch 2.4 lets tolist() give Python a symbol, and fails where the symbol is used.
    return isinstance(error, _ASKED) or "is not tracked with proxy" in str(error)


def _line_of(error: BaseException) -> str:
    return _innermost(traceback.extract_tb(error.__traceback__), torch, pyro, sys.modules[__package__])


def asks_for_a_value(line: str) -> BadInput:
    """The refusal of a program that reads a value at this line."""
    return BadInput(
        "compile: the program asks for the value of a tensor, and a captured graph would decide the same for ever, at"
        f" {line}; {ADVICE}"
    )


def _innermost(frames: Sequence[traceback.FrameSummary], *packages: Any) -> str:
    """The innermost line outside these packages."""
    folders = [Path(package.__file__).parent for package in packages if package.__file__]
    outside = [
        frame
        for frame in frames
        # A random operation of the program passes through the tape, whose lines are not the program's.
        if frame.filename != noise.__file__ and not any(Path(frame.filename).is_relative_to(f) for f in folders)
    ]
    if not outside:
        return "an unknown line"
    frame = outside[-1]
    return f"{Path(frame.filename).name}:{frame.lineno} `{frame.line}`"


@contextmanager
def undisturbed(module: SiteELBOModule, step: Any, replaced: set[Place]) -> Iterator[None]:
    """A call without effects on the modules; see :func:`unmoved`."""
    with unmoved(module, replaced):
        module.__dict__.update(_kept=None, _own={}, _keeps=False)
        module.binding.steps = step
        for state in module.binding.states.values():
            if isinstance(state, SiteState):
                state.stop_looking()
        yield


def _python_randomness() -> tuple[Any, ...]:
    numpy = sys.modules.get("numpy")
    state = () if numpy is None else numpy.random.get_state()
    return random.getstate(), *(item.tobytes() if hasattr(item, "tobytes") else item for item in state)
