"""Optimizers by word, by Pyro's classes, or by a callable."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable

import pyro.optim
import torch

from ..errors import BadInput, UnknownName

OPTIMIZERS: dict[str, type[torch.optim.Optimizer]] = {
    "adam": torch.optim.Adam,
    "adamax": torch.optim.Adamax,
    "adamw": torch.optim.AdamW,
    "nadam": torch.optim.NAdam,
    "radam": torch.optim.RAdam,
    "rmsprop": torch.optim.RMSprop,
    "sgd": torch.optim.SGD,
}


def make_optimizer(optimizer, lr: float) -> tuple[Callable[..., torch.optim.Optimizer], str]:
    if isinstance(optimizer, str):
        if optimizer not in OPTIMIZERS:
            raise UnknownName("optimizer", optimizer, OPTIMIZERS)
        if not lr > 0:
            raise BadInput(f"lr is {lr}: expected a positive number")
        return lambda parameters: _fused(OPTIMIZERS[optimizer], parameters, lr), f"{optimizer}(lr={lr})"
    if isinstance(optimizer, pyro.optim.PyroOptim):
        make, options = optimizer.pt_optim_constructor, optimizer.pt_optim_args
        if not isinstance(options, dict):
            raise BadInput("a pyro.optim optimizer whose arguments are a function of the parameter is for SVI, not fit")
        return lambda parameters: make(parameters, **options), f"{make.__name__}({options})"
    if callable(optimizer):
        keywords = getattr(optimizer, "keywords", {})
        return optimizer, f"{getattr(getattr(optimizer, 'func', optimizer), '__name__', 'optimizer')}({keywords})"
    raise BadInput(
        f"optimizer is {type(optimizer).__name__}: expected a word ({', '.join(OPTIMIZERS)}) or an optimizer"
    )


def _fused(kind: type[torch.optim.Optimizer], parameters: Iterable[torch.nn.Parameter], lr: float):
    """One kernel for all parameters where torch has it: on a small network many kernels cost as much as a layer."""
    parameters = list(parameters)
    if "fused" in inspect.signature(kind).parameters:
        try:
            return kind(parameters, lr=lr, fused=True)
        except RuntimeError:  # not for this device or dtype
            pass
    return kind(parameters, lr=lr)
