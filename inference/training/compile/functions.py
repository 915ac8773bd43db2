"""The compiler of the training step for other functions of tensors."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor


def compiler() -> Callable[[Callable[..., list[Tensor]], list[Tensor]], Callable[..., list[Tensor]]]:
    """A compiler: it makes a fast function of a function of tensors and examples of these tensors.

    The call loads torch's compiler, which takes seconds.
    """
    from . import backends
    from .capture import capture

    return lambda function, examples: backends.inductor(capture(function, examples), examples)
