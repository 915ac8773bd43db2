"""Buffers of the programs that follow a schedule of the step."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch

from ...errors import BadInput
from ..engine.scopes import modules_of
from .schedules import Schedule, end_of, parse_schedule


class Annealing:
    """Sets buffers of model and guide before each step, for ``fit(anneal=…)``.

    Args:
        schedules: a schedule, its text or a number for each buffer; a name that both programs have means both.
        model, guide: the programs.

    Raises:
        BadInput: a name that no program has as a buffer of floating-point numbers, or a value that is no schedule.

    >>> from gumbo.models import AttendInferRepeat
    >>> model = AttendInferRepeat((1, 8, 8), num_steps=1)
    >>> Annealing({"success": "linear(10, 0.5, 0.1)"}, model, lambda x: None).before(5)
    >>> round(model.success.item(), 2)
    0.3
    """

    def __init__(self, schedules: Mapping[str, Schedule | str | float], model: Callable, guide: Callable):
        self.schedules = {name: parse_schedule(given) for name, given in schedules.items()}
        modules = modules_of(*(getattr(program, "__self__", program) for program in (model, guide)))
        self.places = {name: _places(name, modules) for name in self.schedules}

    def before(self, step: int) -> None:
        """Set the buffers for the step of that number, from 0."""
        for name, schedule in self.schedules.items():
            value = float(schedule(step))
            if not math.isfinite(value):
                raise BadInput(f"anneal: {schedule!r} of {name!r} is {value} at step {step}: expected a finite number")
            with torch.no_grad():
                for module, key in self.places[name]:
                    module.get_buffer(key).fill_(value)

    def settles(self, horizon: int) -> tuple[int, str]:
        """The step from which all are constant, and a description of the last one to end."""
        ends = [(end_of(one, horizon), f"anneal of {name} {one!r}") for name, one in self.schedules.items()]
        return max(ends, default=(0, ""))


def _places(name: str, modules: list[torch.nn.Module]) -> list[tuple[torch.nn.Module, str]]:
    """The modules that have a buffer of floating-point numbers of that name."""
    found = [dict(module.named_buffers()) for module in modules]
    places = [
        (module, name)
        for module, buffers in zip(modules, found, strict=True)
        if name in buffers and buffers[name].is_floating_point()
    ]
    if not places:
        known = sorted({one for buffers in found for one, buffer in buffers.items() if buffer.is_floating_point()})
        raise BadInput(
            f"anneal: model and guide have no buffer {name!r} of floating-point numbers; "
            f"theirs: {', '.join(known) or 'none'}"
        )
    return places
