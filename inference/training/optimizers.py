"""Optimizers by word, by Pyro's classes, or by a callable, with gradient clipping and learning-rate schedules."""

from __future__ import annotations

import functools
import inspect
import re
import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from pyro.optim.lr_scheduler import PyroLRScheduler
from pyro.optim.optim import PyroOptim
from pyro.params.param_store import normalize_param_name
from torch.nn import Parameter
from torch.nn.utils import clip_grad_norm_, clip_grad_value_
from torch.optim.lr_scheduler import LambdaLR, LRScheduler, ReduceLROnPlateau

from ...errors import BadInput, UnknownName
from ...options import fits
from .schedules import Schedule

OPTIMIZERS: dict[str, type[torch.optim.Optimizer]] = {
    "adam": torch.optim.Adam,
    "adamax": torch.optim.Adamax,
    "adamw": torch.optim.AdamW,
    "nadam": torch.optim.NAdam,
    "radam": torch.optim.RAdam,
    "rmsprop": torch.optim.RMSprop,
    "sgd": torch.optim.SGD,
}

Named = Mapping[str, Parameter]


class Updates:
    """A torch optimizer with gradient clipping before its step and a learning-rate schedule after it.

    Attributes: ``optimizer``; ``scheduler`` and ``clip``, each of which may be None; ``groups``, the optimizer's class
    and options before the first step, and ``started_as``, the scheduler's.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        clip: Callable[[], object] | None = None,
        scheduler: LRScheduler | ReduceLROnPlateau | None = None,
        every_step: bool = False,
        groups: str = "",
    ):
        self.optimizer, self.clip, self.scheduler, self.every_step = optimizer, clip, scheduler, every_step
        self.started_as = "" if scheduler is None else f"{type(scheduler).__name__}({_plain(scheduler.state_dict())})"
        self.groups = groups
        self.zero_grad = optimizer.zero_grad
        self._orders: dict[int, tuple[int, ...]] = {}  # the strides that gradients and state had at the last step

    def step(self) -> None:
        if self.clip is not None:
            self.clip()
        self._lay_alike()
        self.optimizer.step()
        if self.every_step:
            self.scheduler.step()

    def _lay_alike(self) -> None:
        """Give gradients and state the strides of their parameters: fused kernels pair elements by place in memory."""
        for group in self.optimizer.param_groups:
            for parameter in group["params"] if group.get("fused") else ():
                gradient, order = parameter.grad, parameter.stride()
                if gradient is None or gradient.layout is not torch.strided:
                    continue
                if gradient.stride() != order:
                    parameter.grad = laid_as(parameter, gradient)
                if self._orders.get(id(parameter)) != order:
                    if not is_dense(parameter):
                        raise BadInput(
                            f"a parameter of shape {tuple(parameter.shape)} has the strides {order}, with gaps or "
                            "repeats in memory, which fused optimizers do not follow: make it contiguous, or pass an "
                            "optimizer with fused=False"
                        )
                    self._lay_state(parameter)
                    self._orders[id(parameter)] = order

    def _lay_state(self, parameter: Parameter) -> None:
        state = self.optimizer.state.get(parameter, {})
        for name, value in state.items():
            if isinstance(value, torch.Tensor) and value.shape == parameter.shape:
                state[name] = laid_as(parameter, value)

    def end_epoch(self, loss: float) -> None:
        """Advance a scheduler that steps by the epoch; ``loss`` is the metric of ReduceLROnPlateau."""
        if self.scheduler is None or self.every_step:
            return
        with warnings.catch_warnings():
            # A run resumed at the end of an epoch has made no step yet in this process.
            warnings.filterwarnings("ignore", message="Detected call of `lr_scheduler.step")
            self.scheduler.step(*([loss] if isinstance(self.scheduler, ReduceLROnPlateau) else []))

    @property
    def lr(self) -> float | None:
        """The learning rate of the first parameter group, if it is scheduled."""
        return None if self.scheduler is None else float(self.optimizer.param_groups[0]["lr"])

    def state_dict(self) -> dict[str, Any]:
        scheduler = None if self.scheduler is None else self.scheduler.state_dict()
        return {"optimizer": self.optimizer.state_dict(), "scheduler": scheduler}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        options = [set(group) for group in self.optimizer.param_groups]
        self.optimizer.load_state_dict(state["optimizer"])
        for before, group in zip(options, self.optimizer.param_groups, strict=True):
            if lacking := sorted(before - set(group)):
                raise ValueError(f"its optimizer is no {type(self.optimizer).__name__}: it has no {lacking[0]}")
            for parameter in group["params"]:  # the run that was saved may have had other strides
                self._lay_state(parameter)
        if self.scheduler is not None:
            self.scheduler.load_state_dict(state["scheduler"])


def make_optimizer(
    optimizer: object,
    lr: float | Schedule,
    clip_norm: float | None = None,
    clip_value: float | None = None,
    scheduler: Callable[[torch.optim.Optimizer], Any] | None = None,
    scheduler_every: str = "epoch",
    store_names: Mapping[int, str] | None = None,
) -> tuple[Callable[[Named], Updates], str]:
    """A function from named parameters to their :class:`Updates`, and a description that identifies the optimizer.

    ``store_names`` are the names of parameters in Pyro's store by their ``id``, for the functions of pyro.optim.
    Raises UnknownName for an unknown word, and BadInput for an invalid optimizer or number.
    """
    for name, value in (("clip_norm", clip_norm), ("clip_value", clip_value)):
        if not fits(value, float | None):
            raise BadInput(f"{name} is {value!r}: expected a positive number")
    if not callable(lr) and not fits(lr, float):
        raise BadInput(f"lr is {lr!r}: expected a positive number, or a schedule of the step")
    base = 1.0 if callable(lr) else lr
    if inspect.isfunction(optimizer) and optimizer.__module__.startswith("pyro.optim"):
        function = optimizer  # pyro.optim.Adam itself, not what it makes
        optimizer = _built(lambda: function({"lr": base}))
    make, words = _maker(optimizer, base, without_addresses(lr), store_names or {})
    schedule = _scheduler(optimizer, lr, scheduler, scheduler_every, words)
    single = optimizer.pt_clip_args if isinstance(optimizer, PyroOptim) else {}
    if callable(single):
        raise BadInput("fit does not take a pyro.optim optimizer whose clip_args are a function: pass a dictionary")

    def updates(parameters: Named) -> Updates:
        made = _built(lambda: make(parameters))
        _refuse_arguments(made)
        groups = _described(made)  # before a scheduler, which describes itself, has changed them
        clip = _clip(list(parameters.values()), clip_norm, clip_value, single)
        return Updates(made, clip, *schedule(made), groups)

    clips = {"clip_norm": clip_norm, "clip_value": clip_value} | ({"of each parameter": single} if single else {})
    return updates, words + "".join(f", {name} {value}" for name, value in clips.items() if value is not None)


def _scheduler(
    optimizer: object, lr: float | Schedule, scheduler: Callable | None, every: str, words: str
) -> Callable[[torch.optim.Optimizer], tuple[Any, bool]]:
    """A function from the torch optimizer to its scheduler, and whether the scheduler steps at every training step."""
    if every not in ("epoch", "step"):
        raise UnknownName("scheduler_every", every, ("epoch", "step"))
    if scheduler is not None and (callable(lr) or isinstance(optimizer, PyroLRScheduler)):
        raise BadInput(f"{words} has a schedule, and scheduler= is given as well: leave one of them out")
    if callable(lr):
        if not isinstance(optimizer, (str, type)):
            raise BadInput(f"{words} brings a learning rate of its own, which lr= cannot schedule: use scheduler=")
        # The optimizer's own rate is 1, so that LambdaLR's factor is the learning rate.
        scheduler, every = functools.partial(LambdaLR, lr_lambda=lr), "step"
    elif isinstance(optimizer, PyroLRScheduler):
        scheduler = functools.partial(optimizer.pt_scheduler_constructor, **optimizer.kwargs)
    if scheduler is None:
        return lambda made: (None, False)

    def schedule(made: torch.optim.Optimizer) -> tuple[Any, bool]:
        scheduled = _built(lambda: scheduler(made))
        if not isinstance(scheduled, (LRScheduler, ReduceLROnPlateau)):
            raise BadInput(f"scheduler made a {type(scheduled).__name__}: expected one of torch.optim.lr_scheduler")
        if every == "step" and isinstance(scheduled, ReduceLROnPlateau):
            raise BadInput("ReduceLROnPlateau judges by epochs: pass scheduler_every='epoch'")
        return scheduled, every == "step"

    return schedule


def _maker(
    optimizer: Any, lr: float, lr_said: str, store_names: Mapping[int, str]
) -> tuple[Callable[[Named], Any], str]:
    """A function from named parameters to a torch optimizer, and a description of it."""
    if isinstance(optimizer, str):
        if optimizer not in OPTIMIZERS:
            raise UnknownName("optimizer", optimizer, OPTIMIZERS)
        return lambda named: _fused(OPTIMIZERS[optimizer], named.values(), lr), f"{optimizer}(lr={lr_said})"
    if isinstance(optimizer, PyroOptim):
        make, options = optimizer.pt_optim_constructor, optimizer.pt_optim_args
        if callable(options):
            return lambda named: make(
                _groups(optimizer, named, store_names)
            ), f"{make.__name__}({without_addresses(options)})"
        return lambda named: make(list(named.values()), **options), f"{make.__name__}({dict(sorted(options.items()))})"
    if isinstance(optimizer, type) and issubclass(optimizer, torch.optim.Optimizer):
        takes_lr = "lr" in inspect.signature(optimizer).parameters
        options = {"lr": lr} if takes_lr else {}
        words = f"{optimizer.__name__}({f'lr={lr_said}' if takes_lr else ''})"
        return lambda named: optimizer(list(named.values()), **options), words
    if callable(optimizer):
        keywords = dict(sorted(getattr(optimizer, "keywords", {}).items()))
        name = getattr(getattr(optimizer, "func", optimizer), "__name__", "optimizer")
        return lambda named: optimizer(list(named.values())), f"{name}({keywords})"
    raise BadInput(
        f"optimizer is {type(optimizer).__name__}: expected a word ({', '.join(OPTIMIZERS)}), a torch optimizer's "
        "class, a function of the parameters that makes one, or a pyro.optim optimizer"
    )


def _groups(optimizer: PyroOptim, named: Named, store_names: Mapping[int, str]) -> list[dict[str, Any]]:
    """A parameter group for each parameter, with the arguments that Pyro assigns to its name in the param store."""
    if optimizer.pt_optim_args_argc != 1:
        raise BadInput("a pyro.optim optimizer's function of the parameter must take one argument, the name")
    return [
        {"params": [parameter], **optimizer.pt_optim_args(_name_in_store(name, parameter, store_names))}
        for name, parameter in named.items()
    ]


def _name_in_store(name: str, parameter: Parameter, store_names: Mapping[int, str]) -> str:
    """The name that Pyro's SVI gives a parameter; one that is not in the store (a baseline's) keeps its own."""
    if id(parameter) in store_names:
        return normalize_param_name(store_names[id(parameter)])
    return re.sub(r"^(model|guide)\.|_unconstrained$", "", name)


def _fused(kind: type[torch.optim.Optimizer], parameters: Iterable[Parameter], lr: float):
    """A fused optimizer where torch has one: on a small network, separate kernels cost as much as a layer."""
    parameters = list(parameters)
    # Torch takes complex parameters and those with gaps here, and fails or misreads them in the first step.
    serves = all(is_dense(parameter) and not parameter.is_complex() for parameter in parameters)
    if serves and "fused" in inspect.signature(kind).parameters:
        try:
            return kind(parameters, lr=lr, fused=True)
        except RuntimeError:  # not for this device or dtype
            pass
    return kind(parameters, lr=lr)


def is_dense(tensor: torch.Tensor) -> bool:
    """Whether the elements of a tensor lie one by one in memory, in any order."""
    return torch.empty_like(tensor).stride() == tensor.stride()


def laid_as(like: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """``value`` with the strides of ``like``, which has its shape: a copy unless it has them already.

    >>> laid_as(torch.zeros(2, 3).t(), torch.zeros(3, 2)).stride()
    (1, 3)
    """
    if value.stride() == like.stride():
        return value
    return torch.empty_like(like, dtype=value.dtype, device=value.device).copy_(value.detach())


def _clip(
    parameters: list[Parameter], norm: float | None, value: float | None, single: Mapping[str, float]
) -> Callable[[], object] | None:
    """The function that clips gradients before a step; ``single`` limits each parameter alone, as Pyro does."""
    if norm is None and value is None and not single:
        return None

    def clip() -> None:
        for parameter in parameters if single else ():
            PyroOptim._clip_grad(parameter, **single)
        if norm is not None:
            clip_grad_norm_(parameters, norm)
        if value is not None:
            clip_grad_value_(parameters, value)

    return clip


def _built(make: Callable[[], Any]) -> Any:
    try:
        return make()
    except BadInput:
        raise
    except (TypeError, ValueError, AssertionError, KeyError) as error:
        raise BadInput(f"the optimizer or its schedule cannot be made: {error}") from error


def _refuse_arguments(made: object) -> None:
    if not isinstance(made, torch.optim.Optimizer):
        raise BadInput(f"optimizer made a {type(made).__name__}: expected a torch optimizer")
    for name, parameter in inspect.signature(made.step).parameters.items():
        if parameter.default is parameter.empty and parameter.kind is parameter.POSITIONAL_OR_KEYWORD:
            raise BadInput(f"{type(made).__name__}'s step needs {name!r}, which fit does not give: take another")


_HOW = ("params", "foreach", "fused", "capturable", "differentiable")  # how an optimizer computes, not what


def _described(optimizer: torch.optim.Optimizer) -> str:
    """The class and the options of each group of parameters, the same for the same training on any device.

    Options at their defaults are left out, since another version of torch may have more of them.
    """
    taken = inspect.signature(type(optimizer)).parameters
    said: list[list[Any]] = []
    for group in optimizer.param_groups:
        names = sorted(name for name in group if name in taken and name not in _HOW)
        options = {name: _number(group[name]) for name in names if name == "lr" or group[name] != taken[name].default}
        if said and said[-1][1] == options:
            said[-1][0] += 1
        else:
            said.append([1, options])
    words = [f"{count} × {options}" if count > 1 else f"{options}" for count, options in said]
    return f"{type(optimizer).__name__}({', '.join(words)})"


def _number(value: Any) -> Any:
    """A plain value: tensors of one number as numbers, and what is no option that a run could compare by its class."""
    if isinstance(value, torch.Tensor):
        return value.tolist()
    if isinstance(value, (tuple, list)):
        return tuple(map(_number, value))
    return value if isinstance(value, (bool, int, float, str, type(None))) else type(value).__name__


def _plain(state: Mapping[str, Any]) -> str:
    return without_addresses(dict(sorted(state.items())))


def without_addresses(value: object) -> str:
    """``repr`` without memory addresses, which differ between processes."""
    return re.sub(r" at 0x[0-9a-f]+", "", repr(value))
