"""Terms whose gradient has the right mean, and whose second derivatives do not."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...errors import BadInput


class _Once(torch.autograd.Function):
    """A gradient as it is; BadInput where it is differentiated."""

    generate_vmap_rule = True

    @staticmethod
    def forward(gradient: Tensor, *sources: Tensor) -> Tensor:
        return gradient.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        """Nothing is kept: the backward pass only refuses."""

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        raise BadInput(
            "a gradient of this loss is differentiated again, and the estimator of a site gives first derivatives only:"
            " use 'pathwise' or 'enumerate' at the sites whose parameters need second derivatives"
        )


def first_order(result: Tensor, *sources: Tensor) -> Tensor:
    """The tensor ``result``, of whose gradient a derivative for what ``sources`` depend on raises BadInput.

    ``sources`` are tensors with their graphs.

    >>> x = torch.tensor(2.0, requires_grad=True)
    >>> total = first_order(x - x.detach(), x) + x**3
    >>> torch.autograd.grad(total, x)[0]
    tensor(13.)
    """
    known = [source for source in sources if source.requires_grad]
    if result.requires_grad and known:
        result.register_hook(lambda gradient: _Once.apply(gradient, *known) if torch.is_grad_enabled() else None)
    return result
