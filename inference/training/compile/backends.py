"""What runs a captured graph: torch's compiler, CUDA graphs, or torch operation by operation."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from ....errors import BadInput, first_line
from ...engine.constants import ADVICE
from .capture import asks_for_a_value

# No autotuning; draws that are not inputs come from torch's generators, whose state a checkpoint holds.
OPTIONS = {"fallback_random": True, "size_asserts": False, "max_autotune": False, "triton.cudagraphs": False}


class Replay:
    """A compiled function recorded as a CUDA graph, so that a step is one launch.

    A recording uses the tensors that it was made with: parameters and all tensors changed in place are these, and the
    batch, at the positions ``fresh``, is copied into the recorded inputs. A new recording is made after a tensor is
    replaced (as by ``load_state_dict`` of an optimizer).
    """

    def __init__(self, run: Callable, fresh: range, mutable: Callable[[], list[Tensor]]):
        self.run, self.fresh, self.mutable = run, fresh, mutable
        self.addresses: list[int] = []

    def __call__(self, *inputs: Tensor) -> list[Tensor]:
        addresses = [tensor.data_ptr() for i, tensor in enumerate(inputs) if i not in self.fresh]
        if addresses != self.addresses:
            self._record(inputs)
            self.addresses = addresses
        for i in self.fresh:
            self.inputs[i].copy_(inputs[i], non_blocking=True)
        self.graph.replay()
        return self.outputs

    def _record(self, inputs: Sequence[Tensor]) -> None:
        self.inputs = [t.clone() if i in self.fresh else t.detach() for i, t in enumerate(inputs)]
        mutable = self.mutable()
        before = [tensor.clone() for tensor in mutable]
        device = self.inputs[-1].device
        aside = torch.cuda.Stream(device)
        aside.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(aside), torch.random.fork_rng(devices=[device]):
            for _ in range(3):  # kernels and libraries are loaded outside the recording
                self.run(*self.inputs)
        torch.cuda.current_stream(device).wait_stream(aside)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.outputs = self.run(*self.inputs)
        for tensor, value in zip(mutable, before, strict=True):
            tensor.copy_(value)


def inductor(graph: torch.fx.GraphModule, inputs: Sequence[Tensor]) -> Callable[..., list[Tensor]]:
    """The graph as machine code; raises BadInput without a compiler, or if it fails."""
    from torch._inductor import compile as compile_graph

    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")  # torch's own, about how it compiles
            # Torch runs some graphs as it compiles them, such as those of torch.utils.checkpoint: on copies.
            run = compile_graph(graph, [_copied(tensor) for tensor in inputs], options=OPTIONS)
            run = _generated_code(run, inputs)
    except Exception as error:
        if any(
            word in f"{type(error).__name__} {error}"
            for word in ("InvalidCxxCompiler", "No working C++", "TritonMissing")
        ):
            raise BadInput(
                f"compile=True needs a C++ compiler (g++ or clang), and Triton on CUDA; install it, or {ADVICE}"
            ) from error
        if graph.meta.get("asks at") and any(word in type(error).__name__ for word in ("DataDependent", "OutputShape")):
            raise asks_for_a_value(graph.meta["asks at"]) from error
        raise BadInput(
            f"compile: torch's compiler fails on this program ({first_line(error, kind=True)}); {ADVICE}"
        ) from error
    return run


def _copied(tensor: Tensor) -> Tensor:
    """A copy with the same strides, which ``clone`` changes where elements share memory or lie apart."""
    if tensor.layout != torch.strided or not tensor.numel():
        return tensor.clone()
    span = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.as_strided((span,), (1,)).clone().as_strided(tensor.shape, tensor.stride())


def _generated_code(run: Callable[..., list[Tensor]], inputs: Sequence[Tensor]) -> Callable[..., list[Tensor]]:
    """The function that torch generated, without what torch wraps around it; both are run, and must do the same.

    The wrapping serves gradients and aliases, which this graph does not have, and takes as long as a small layer. Where
    the function is not found, or does something else, ``run`` is returned.
    """

    def tried(function: Callable[..., list[Tensor]]) -> list[Tensor]:
        copies = [_copied(tensor) for tensor in inputs]
        with torch.random.fork_rng(devices={tensor.device for tensor in inputs if tensor.is_cuda}):
            torch.manual_seed(0)
            return [*function(*copies), *copies]

    expected = tried(run)  # lazy parts are built here
    held = dict(_closures(run))
    generated = next((getattr(one, "current_callable", None) for one in held.values() if _is_generated(one)), None)
    if generated is None:
        return run
    constants = held.get("params_buffers_flat", [])  # tensors of the graph itself come first

    def called(*given: Tensor) -> list[Tensor]:
        return generated([*constants, *given])

    try:
        found = tried(called)
    except Exception:  # it takes other arguments
        return run
    alike = len(found) == len(expected) and all(map(_same_bits, found, expected))
    return called if alike else run


def _closures(function: Any, depth: int = 6) -> Iterator[tuple[str, Any]]:
    """What a function's closure holds by name, and what the functions in it hold."""
    names = getattr(getattr(function, "__code__", None), "co_freevars", ())
    for name, cell in zip(names, getattr(function, "__closure__", None) or (), strict=True):
        try:
            held = cell.cell_contents
        except ValueError:  # nothing is in it yet
            continue
        yield name, held
        if depth:
            yield from _closures(held, depth - 1)


def _is_generated(value: Any) -> bool:
    return type(value).__name__ == "CompiledFxGraph"


def _same_bits(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and bool(((one == other) | (one.isnan() & other.isnan())).all())


def uncompiled(graph: torch.fx.GraphModule, inputs: Sequence[Tensor]) -> Callable[..., list[Tensor]]:
    """The graph run operation by operation, for tests of the capture."""
    return graph
