"""Adam as a part of a captured graph."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator, Sequence, Sized
from typing import Any

import torch
from torch import Tensor

from ...engine.constants import Watch

BAKED = ("betas", "eps", "weight_decay", "amsgrad", "maximize", "decoupled_weight_decay")


class Adam:
    """Adam and AdamW (Kingma & Ba 2015, arXiv 1412.6980; Loshchilov & Hutter 2019) inside a graph.

    The state is that of torch's optimizer, under torch's names, so that eager steps and checkpoints share it.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, parameters: Sequence[Tensor]):
        self.optimizer, self.parameters = optimizer, list(parameters)
        self._held: list[Tensor] = []
        self._steps: list[int] = []
        groups = {id(p): number for number, group in enumerate(optimizer.param_groups) for p in group["params"]}
        self.group_of = [groups[id(parameter)] for parameter in self.parameters]
        for parameter, number in zip(self.parameters, self.group_of, strict=True):
            state, group = optimizer.state[parameter], optimizer.param_groups[number]
            if not state:  # as torch's own first step does
                on_device = group["fused"] or group["capturable"]
                where = parameter.device if on_device else torch.device("cpu")
                state["step"] = torch.zeros((), dtype=torch.float32, device=where)
                state["exp_avg"] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
                state["exp_avg_sq"] = torch.zeros_like(parameter, memory_format=torch.preserve_format)

    @classmethod
    def serving(cls, updates: Any, parameters: Sequence[Tensor]) -> Adam | None:
        """The optimizer as a part of the graph, or None where torch's own step is needed."""
        optimizer = getattr(updates, "optimizer", updates)
        if type(optimizer) not in (torch.optim.Adam, torch.optim.AdamW) or getattr(updates, "clip", None) is not None:
            return None
        if getattr(getattr(updates, "scheduler", None), "cycle_momentum", False):
            return None  # OneCycleLR and CyclicLR move the betas, which are constants of the graph
        if any(_hooks_of(optimizer)):
            return None
        for group in optimizer.param_groups:
            on_device = group["fused"] or group["capturable"] or not any(p.is_cuda for p in group["params"])
            if group["amsgrad"] or group["differentiable"] or not on_device or isinstance(group["lr"], Tensor):
                return None
        return cls(optimizer, parameters)

    def add_to(self, watch: Watch) -> None:
        """Watch the options that are constants of a graph."""
        for group in self.optimizer.param_groups:
            watch.add(group, [name for name in group if name in BAKED])
        for hooks in _hooks_of(self.optimizer):
            watch.add_size(hooks)

    def state(self) -> list[Tensor]:
        """Step counts and two moments for each parameter, from the optimizer's current state."""
        states = [self.optimizer.state[parameter] for parameter in self.parameters]
        return [state[name] for name in ("step", "exp_avg", "exp_avg_sq") for state in states]

    def forget(self) -> None:
        """Called before torch's optimizer makes a step of its own."""
        self._steps = []

    def count(self, steps: int = 1) -> None:
        """Called after the graph has made steps."""
        self._steps = [number + steps for number in self._steps]
        self.optimizer._opt_called = True  # schedulers check it, and warn of missing steps

    def numbers(self, ahead: int = 0) -> list[float]:
        """Three numbers for each parameter: learning rate / (1 − β₁ᵗ), 1 / √(1 − β₂ᵗ), and the learning rate.

        t is the number of the next step, or of the step that comes ``ahead`` steps after it. The numbers are computed
        outside the graph, which would compute them once for every element.
        """
        held = [self.optimizer.state[parameter]["step"] for parameter in self.parameters]
        if not self._steps or any(a is not b for a, b in zip(held, self._held, strict=True)):
            self._held, self._steps = held, [int(step) for step in held]
        found: dict[tuple[int, int], list[float]] = {}
        for key in set(zip(self.group_of, self._steps, strict=True)):
            group, step = self.optimizer.param_groups[key[0]], key[1] + 1 + ahead
            beta1, beta2 = group["betas"]
            found[key] = [float(group["lr"]) / (1 - beta1**step), 1 / math.sqrt(1 - beta2**step), float(group["lr"])]
        return [number for key in zip(self.group_of, self._steps, strict=True) for number in found[key]]

    def update(
        self,
        parameters: Sequence[Tensor],
        gradients: Sequence[Tensor],
        state: Sequence[Tensor],
        numbers: Tensor,
        good: Tensor | None,
    ) -> None:
        """One step in place, without effect where ``good`` is false; None where the step is known to be good."""
        steps, means, squares = parts(state, [len(parameters)] * 3)
        for i, (parameter, gradient) in enumerate(zip(parameters, gradients, strict=True)):
            group, (length, scale, rate) = (
                self.optimizer.param_groups[self.group_of[i]],
                numbers[3 * i : 3 * i + 3].unbind(),
            )
            (beta1, beta2), decay = group["betas"], group["weight_decay"]
            gradient = -gradient if group["maximize"] else gradient
            value = parameter
            if decay and _decoupled(self.optimizer, group):
                value = value * (1 - rate * decay)
            elif decay:
                gradient = gradient + decay * value
            mean = torch.lerp(means[i], gradient, 1 - beta1)
            square = beta2 * squares[i] + (1 - beta2) * gradient * gradient
            value = value - length * mean / (square.sqrt() * scale + group["eps"])
            for place, new in ((parameter, value), (means[i], mean), (squares[i], square), (steps[i], steps[i] + 1)):
                place.copy_(new if good is None else torch.where(good, new, place))

    def gradients(self, parameters: Sequence[Tensor], before: Sequence[Tensor]) -> list[Tensor]:
        """The gradients of the last step, computed from the change of the first moments since ``before``."""
        count = len(self.parameters)
        found = []
        for i, (value, old) in enumerate(zip(parameters, before[count : 2 * count], strict=True)):
            group = self.optimizer.param_groups[self.group_of[i]]
            beta = group["betas"][0]
            gradient = (self.optimizer.state[self.parameters[i]]["exp_avg"] - beta * old) / (1 - beta)
            if group["weight_decay"] and not _decoupled(self.optimizer, group):
                gradient = gradient - group["weight_decay"] * value
            found.append(-gradient if group["maximize"] else gradient)
        return found


def _hooks_of(optimizer: torch.optim.Optimizer) -> list[Sized]:
    """The hooks that run before and after a step of torch's."""
    everywhere = vars(sys.modules[torch.optim.Optimizer.__module__])
    own = [getattr(optimizer, f"_optimizer_step_{when}_hooks", {}) for when in ("pre", "post")]
    return own + [everywhere.get(f"_global_optimizer_{when}_hooks", {}) for when in ("pre", "post")]


def _decoupled(optimizer: torch.optim.Optimizer, group: dict[str, Any]) -> bool:
    return isinstance(optimizer, torch.optim.AdamW) or bool(group.get("decoupled_weight_decay"))


def end_of_step(optimizer: Any) -> None:
    """What follows a step of the optimizer that a graph has made: a scheduler of steps."""
    if getattr(optimizer, "every_step", False):
        optimizer.scheduler.step()


def parts(tensors: Sequence[Tensor], counts: Sequence[int]) -> Iterator[list[Tensor]]:
    start = 0
    for count in counts:
        yield list(tensors[start : start + count])
        start += count
