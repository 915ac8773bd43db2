"""Matrix products of a captured graph through oneDNN, where the library that torch calls by itself is slow."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

# Below so many multiplications the two libraries are even, and oneDNN's longer way to a call decides.
SMALLEST = 2**20


@lru_cache(maxsize=1)
def mkl_is_slow() -> bool:
    """Whether torch's products go through MKL on a processor that is not Intel's, where it takes its slower paths."""
    if not (torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available()):
        return False
    try:
        return "AuthenticAMD" in Path("/proc/cpuinfo").read_text()
    except OSError:
        return False


@lru_cache(maxsize=1)
def _operation():
    """``a @ w.T + b`` by oneDNN, as an operation that torch's compiler leaves alone.

    The compiler knows oneDNN's own operation, but only for weights that never change.
    """
    library = torch.library.Library("gumbo", "FRAGMENT")
    library.define("linear(Tensor a, Tensor w, Tensor? b) -> Tensor")
    by_onednn = torch.ops.mkldnn._linear_pointwise.default
    library.impl("linear", lambda a, w, b: by_onednn(a, w, b, "none", [], ""), "CPU")

    @torch.library.register_fake("gumbo::linear", lib=library)
    def shape(a: Tensor, w: Tensor, b: Tensor | None) -> Tensor:
        return a.new_empty(a.shape[0], w.shape[0])

    return torch.ops.gumbo.linear.default, library  # the library lives as long as its operation is wanted


def through_onednn(graph: torch.fx.GraphModule) -> torch.fx.GraphModule:
    """The graph with its large float32 products on the CPU handed to oneDNN; changed in place, equal up to rounding."""
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
