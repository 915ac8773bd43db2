"""The compiler of the training step for other functions of tensors."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor


def compiler() -> Callable[[Callable[..., list[Tensor]], list[Tensor]], Callable[..., list[Tensor]]]:
    """Makes a fast function of a function of tensors and examples of them; loads torch's compiler, which is slow."""
    from . import step
    from .capture import capture

    return lambda function, examples: step.inductor(capture(function, examples), examples)
