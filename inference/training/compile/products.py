"""Matrix products through oneDNN, for captured graphs and eager layers, where torch's default library is slow."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch import library as operations

# Below this many multiplications the two libraries are equally fast, and the longer call into oneDNN dominates; eager
# code also passes through Python.
SMALLEST = 2**20
SMALLEST_EAGER = 2**22


@lru_cache(maxsize=1)
def mkl_is_slow() -> bool:
    """Whether torch's products use MKL on a processor that is not Intel's, where MKL takes slower code paths."""
    if not (torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available()):
        return False
    try:
        return "AuthenticAMD" in Path("/proc/cpuinfo").read_text()
    except OSError:
        return False


def _by_onednn(a: Tensor, w: Tensor, b: Tensor | None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise.default(a, w, b, "none", [], "")


@lru_cache(maxsize=1)
def _operation():
    """``a @ w.T + b`` by oneDNN, as an operation that torch's compiler does not rewrite.

    The compiler supports oneDNN's own operation for constant weights only.
    """
    fragment = operations.Library("gumbo", "FRAGMENT")
    fragment.define("linear(Tensor a, Tensor w, Tensor? b) -> Tensor")
    fragment.impl("linear", _by_onednn, "CPU")

    @operations.register_fake("gumbo::linear", lib=fragment)
    def shape(a: Tensor, w: Tensor, b: Tensor | None) -> Tensor:
        return a.new_empty(a.shape[0], w.shape[0])

    return torch.ops.gumbo.linear.default, fragment  # the operation exists as long as the fragment


def through_onednn(graph: torch.fx.GraphModule) -> torch.fx.GraphModule:
    """Replace large float32 products on the CPU by oneDNN's, in place in the graph; equal up to rounding."""
    aten = torch.ops.aten
    for node in list(graph.graph.nodes):
        if node.target is aten.mm.default:
            bias, (a, b) = None, node.args
        elif node.target is aten.addmm.default and not node.kwargs:
            bias, a, b = node.args
        else:
            continue
        left, right = a.meta["val"], b.meta["val"]
        large = left.shape[0] * left.shape[1] * right.shape[1] >= SMALLEST
        vector = bias is None or bias.meta["val"].dim() == 1
        if not (large and vector and left.dtype == torch.float32 and left.device.type == "cpu"):
            continue
        with graph.graph.inserting_before(node):
            turned = graph.graph.call_function(aten.permute.default, (b, [1, 0]))
            turned.meta["val"] = right.permute(1, 0)
            product = graph.graph.call_function(_operation()[0], (a, turned, bias))
            product.meta = dict(node.meta)
        node.replace_all_uses_with(product)
        graph.graph.erase_node(node)
    graph.recompile()
    return graph


class _Linear(torch.autograd.Function):
    """``a @ w.T + b`` by oneDNN; its gradients use the same function, so that they can be differentiated again."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, w: Tensor, b: Tensor | None) -> Tensor:
        ctx.save_for_backward(a, w)
        return _by_onednn(a, w, b)

    @staticmethod
    def backward(ctx: Any, *slopes: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        (slope,), (a, w) = slopes, ctx.saved_tensors
        for_a, for_w, for_b = ctx.needs_input_grad
        return (
            _Linear.apply(slope, w.t(), None) if for_a else None,
            _Linear.apply(slope.t(), a.t(), None) if for_w else None,
            slope.sum(0) if for_b else None,
        )


def _linear(layer: nn.Linear, x: Tensor) -> Tensor:
    """``nn.Linear``, through oneDNN where that is faster."""
    weight = layer.weight
    plain = type(x) is Tensor and x.dtype == weight.dtype == torch.float32 and x.device.type == "cpu"
    large = x.dim() > 1 and x.numel() * weight.shape[0] >= SMALLEST_EAGER
    # Function transforms (vmap, capture) and autocast need torch's own operations.
    if plain and large and not torch._C._are_functorch_transforms_active() and not torch.is_autocast_enabled("cpu"):
        return _Linear.apply(x.reshape(-1, x.shape[-1]), weight, layer.bias).unflatten(0, x.shape[:-1])
    return nn.functional.linear(x, weight, layer.bias)


def linear_layers(programs: Iterable[nn.Module]) -> list[nn.Linear]:
    """The layers that :func:`layers_through_onednn` changes; none where torch's own products are fast."""
    if not mkl_is_slow():
        return []
    layers = (layer for program in programs for layer in program.modules())
    return [layer for layer in layers if type(layer) is nn.Linear and "forward" not in vars(layer)]


@contextmanager
def layers_through_onednn(layers: list[nn.Linear]) -> Iterator[None]:
    """Compute large float32 products of these layers, and of their gradients, by oneDNN; equal up to rounding."""
    for layer in layers:
        vars(layer)["forward"] = partial(_linear, layer)
    try:
        yield
    finally:
        for layer in layers:
            vars(layer).pop("forward", None)
