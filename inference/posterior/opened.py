"""Models whose sites without a value are to be predicted: those that nothing observes and the guide leaves out."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from pyro import poutine
from pyro.poutine.messenger import Messenger

from ..engine.row_parameters import sites_of
from ..engine.scopes import quietly


class OpenedModel:
    """A model whose sites without a value count as observed at one draw, so that they can be predicted."""

    def __init__(self, model: Callable, values: Mapping[str, torch.Tensor]):
        self.inner_program, self.left_open = model, dict(values)
        program = model.forward if isinstance(model, torch.nn.Module) else model
        self.__signature__ = inspect.signature(program)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with _Observed(self.left_open):
            return self.inner_program(*args, **kwargs)


class _Observed(Messenger):
    def __init__(self, values: Mapping[str, torch.Tensor]):
        super().__init__()
        self.values = values

    def _pyro_sample(self, msg) -> None:
        if msg["name"] not in self.values or msg["is_observed"]:
            return
        value = self.values[msg["name"]]
        for frame in msg["cond_indep_stack"]:
            dim = frame.dim - msg["fn"].event_dim if frame.vectorized else 0
            if frame.vectorized and 0 < frame.size < (value.shape[dim] if -dim <= value.dim() else 0):
                value = value.narrow(dim, 0, frame.size)
        msg["value"], msg["is_observed"] = value, True


def opened_model(model: Callable, guide: Callable, args: tuple, kwargs: Mapping[str, Any]) -> Callable:
    """The model with sites that have no value and that the guide does not sample as predicted sites."""
    with quietly(model, guide, 0):
        drawn = poutine.trace(guide).get_trace(*args, **kwargs)
        run = poutine.trace(poutine.replay(model, trace=drawn)).get_trace(*args, **kwargs)
    left = {
        site["name"]: site["value"].detach()
        for site in sites_of(run)
        if not site["is_observed"] and site["name"] not in drawn and site["infer"].get("enumerate") != "parallel"
    }
    return OpenedModel(model, left) if left else model
