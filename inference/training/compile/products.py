"""Matrix products through oneDNN in captured graphs, where it is measured to be faster than torch's default library."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch import library as operations

from ....errors import BadInput, UnknownName

FASTEST, TORCH, ONEDNN = LIBRARIES = ("fastest", "torch", "onednn")

# Below this many multiplications the two libraries are equally fast, and the longer call into oneDNN dominates.
SMALLEST = 2**20
# oneDNN must save this share of the time: its operation is not public, so that a tie goes to torch.
GAIN = 0.1
# With fewer rows to sum over, packing a transposed matrix takes longer than the product.
SHORT = 64


def choose_library(asked: str, programs: Iterable[nn.Module], rows: int, device: torch.device | str) -> str:
    """The library for the products of a compiled step: ``"torch"`` or ``"onednn"``.

    Args:
        asked: one of them, or ``"fastest"``, which measures the products of these programs on this machine.
        programs: modules, whose parameters give the sizes.
        rows: of a batch.
        device: of the programs. oneDNN serves the CPU.

    Raises:
        UnknownName: another word.
        BadInput: oneDNN is asked for and cannot be used.

    >>> choose_library("fastest", [nn.Linear(3, 2)], 8, "cpu")
    'torch'
    """
    if asked not in LIBRARIES:
        raise UnknownName("products", asked, LIBRARIES)
    usable = torch.backends.mkldnn.is_available() and torch.device(device).type == "cpu"
    if asked == ONEDNN and not usable:
        raise BadInput("products='onednn' needs a torch with oneDNN and programs on the CPU; pass products='torch'")
    if asked != FASTEST:
        return asked
    sizes = {
        (rows, *parameter.shape)
        for program in programs
        for parameter in program.parameters()
        if not nn.parameter.is_lazy(parameter) and parameter.dim() == 2 and parameter.dtype == torch.float32
    }
    large = frozenset(size for size in sizes if size[0] * size[1] * size[2] >= SMALLEST)
    return _faster(large, torch.get_num_threads()) if usable and large else TORCH


@lru_cache(maxsize=64)
def _faster(sizes: frozenset[tuple[int, int, int]], threads: int) -> str:
    """The library that takes less time for the products of these layers; ``threads`` are those of the measurement."""
    times = [_times_of(*size) for size in sizes]
    torchs, onednns = (sum(one[library] for one in times) for library in (TORCH, ONEDNN))
    return ONEDNN if onednns < (1 - GAIN) * torchs else TORCH


def _times_of(rows: int, outputs: int, inputs: int) -> dict[str, float]:
    """Seconds for the products of a layer, forwards and backwards, by library."""
    # Without random numbers: the choice must not move torch's generators.
    weight, x, slope = (torch.full(shape, 0.5) for shape in ((outputs, inputs), (rows, inputs), (rows, outputs)))
    forwards, turned = (weight, x) if rows < outputs else (x, weight), slope.t().contiguous()
    return fastest_of(
        {
            TORCH: lambda: (x.mm(weight.t()), slope.mm(weight), slope.t().mm(x)),
            ONEDNN: lambda: (by_onednn(*forwards), by_onednn(slope, weight.t()), by_onednn(turned, x.t())),
        }
    )


def fastest_of(rivals: dict[str, Callable[[], object]]) -> dict[str, float]:
    """The shortest time of each in seconds, taken in turns; the first round loads kernels and does not count."""
    found: dict[str, list[float]] = {name: [] for name in rivals}
    with torch.no_grad():
        for _ in range(8):
            for name, run in rivals.items():
                start = time.perf_counter()
                run()
                found[name].append(time.perf_counter() - start)
    return {name: min(times[1:]) for name, times in found.items()}


def by_onednn(a: Tensor, w: Tensor, b: Tensor | None = None) -> Tensor:
    """``a @ w.T + b``."""
    return torch.ops.mkldnn._linear_pointwise.default(a, w, b, "none", [], "")


@lru_cache(maxsize=1)
def _operation() -> tuple[Any, Any]:
    """``a @ w.T`` by oneDNN, as an operation that torch's compiler does not rewrite.

    The compiler supports oneDNN's own operation for constant weights only. Its code calls that operation without a
    detour through Python.
    """
    fragment = operations.Library("gumbo", "FRAGMENT")
    fragment.define("product(Tensor a, Tensor w) -> Tensor")
    fragment.impl("product", by_onednn, "CPU")

    @operations.register_fake("gumbo::product", lib=fragment)
    def shape(a: Tensor, w: Tensor) -> Tensor:
        return a.new_empty(a.shape[0], w.shape[0])

    return torch.ops.gumbo.product.default, fragment  # the operation exists as long as the fragment


@lru_cache(maxsize=1)
def _teach_the_compiler() -> None:
    """Tell torch's compiler how to make our operation."""
    from torch._inductor import ir
    from torch._inductor.lowering import fallback_handler, register_lowering

    call = fallback_handler(torch.ops.mkldnn._linear_pointwise.default, add_to_fallback_set=False)

    def row_by_row(matrix: Any) -> Any:
        return ir.ExternKernel.require_stride_order(ir.ExternKernel.realize_input(matrix), (1, 0))

    @register_lowering(_operation()[0], type_promotion_kind=None)
    def lowered(a: Any, w: Any) -> Any:
        # oneDNN copies a first matrix that lies otherwise; a loop of the compiler does it faster, or for nothing.
        w = row_by_row(w) if int(w.get_size()[1]) < SHORT else w
        return call(row_by_row(a), w, None, "none", [], "")


def through_onednn(graph: torch.fx.GraphModule) -> torch.fx.GraphModule:
    """Replace large float32 products on the CPU by oneDNN's, in place in the graph; equal up to rounding."""
    _teach_the_compiler()
    aten, product = torch.ops.aten, _operation()[0]
    for node in list(graph.graph.nodes):
        if node.target is aten.mm.default:
            bias, (a, b) = None, node.args
        elif node.target is aten.addmm.default and not node.kwargs:
            bias, a, b = node.args
        else:
            continue
        left, right = a.meta["val"], b.meta["val"]
        large = left.shape[0] * left.shape[1] * right.shape[1] >= SMALLEST
        if not (large and left.dtype == torch.float32 and left.device.type == "cpu"):
            continue
        # oneDNN packs the second matrix of a product of rows with rows: let it be the smaller one.
        turned = left.shape[0] < right.shape[1] and left.stride(1) == 1 and right.stride(0) == 1
        with graph.graph.inserting_before(node):
            rows = graph.graph.call_function(aten.permute.default, (b, [1, 0]))
            found = graph.graph.call_function(product, (rows, a) if turned else (a, rows))
            if turned:
                found = graph.graph.call_function(aten.permute.default, (found, [1, 0]))
            if bias is not None:
                found = graph.graph.call_function(aten.add.Tensor, (found, bias))
            if turned:  # what follows may count on the rows' order
                contiguous = {"memory_format": torch.contiguous_format}
                found = graph.graph.call_function(aten.clone.default, (found,), contiguous)
        found.meta = dict(node.meta)
        node.replace_all_uses_with(found)
        graph.graph.erase_node(node)
    graph.recompile()
    return graph
