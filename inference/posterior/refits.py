"""Refitting a guide from new initial values, and the losses for it."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.nn import PyroModule
from pyro.poutine.messenger import Messenger
from torch import nn

from ...errors import BadInput, CannotVectorize
from ..elbo import SiteELBO
from ..engine.scopes import evaluating, modules_of, private_seed, private_store
from ..estimators._distributions import is_computed, is_deterministic
from .vmapped import random_sites


class Stored(Messenger):
    """Gives the parameters that programs have in the param store alone: a loss runs in a store of its own."""

    def __init__(self, *programs: object):
        super().__init__()
        store = pyro.get_param_store()
        own = {id(one) for module in modules_of(*programs) for one in module.parameters()}
        names = [name for name, value in store.named_parameters() if id(value) not in own]
        # A leaf as it is: `pyro.module` would put another tensor into its module.
        values = {name: store[name] for name in names}
        self.values = {name: value if value.is_leaf else value.detach() for name, value in values.items()}

    def _pyro_param(self, msg) -> None:
        if msg["name"] in self.values:
            msg["value"], msg["done"] = self.values[msg["name"]], True


def loss_of(estimators: Any, num_particles: int | None, model, guide, args: tuple, kwargs: Mapping[str, Any]) -> Any:
    """A loss with vectorized particles, or one by one for programs that cannot be vectorized."""
    try:
        return SiteELBO(estimators, num_particles=num_particles, vectorize_particles=True)(model, guide).initialize(
            *args, **kwargs
        )
    except CannotVectorize:
        elbo = SiteELBO(estimators, num_particles=num_particles, vectorize_particles=False)
        return elbo(model, guide).initialize(*args, **kwargs)


def _train(loss, guide, args, kwargs, steps: int, lr: float) -> None:
    trainable = [parameter for parameter in guide.parameters() if parameter.requires_grad]
    optimizer = torch.optim.Adam(trainable, lr=lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    with torch.enable_grad():
        for _ in range(steps):
            optimizer.zero_grad()
            value = loss(*args, **kwargs)
            if not torch.isfinite(value):
                raise BadInput(f"refitting the guide gave an ELBO of {-value.item()}")
            value.backward()
            optimizer.step()
            schedule.step()


def words(guide: Callable, args: tuple, kwargs: Mapping[str, Any]) -> dict[str, str]:
    """An estimator for each site: pathwise for sites with ``rsample``, leave-one-out otherwise."""
    with torch.no_grad(), private_seed(None, guide):
        trace = poutine.trace(guide).get_trace(*args, **kwargs)
    return {
        name: "pathwise" if site["fn"].has_rsample else "rloo"
        for name, site in random_sites(trace)
        if not site["is_observed"] and not is_computed(site) and not is_deterministic(site["fn"])
    }


@contextmanager
def evaluated(*programs: Any) -> Iterator[None]:
    """Put programs in evaluation mode, without gradients for their parameters."""
    thawed = [p for module in modules_of(*programs) for p in module.parameters() if p.requires_grad]
    with evaluating(*programs):
        try:
            for parameter in thawed:
                parameter.requires_grad_(False)
            yield
        finally:
            for parameter in thawed:
                parameter.requires_grad_(True)


def refitted(
    model: Callable,
    guide: Callable,
    args: tuple,
    kwargs: Mapping[str, Any],
    *,
    seed: int,
    steps: int = 1000,
    lr: float = 0.01,
) -> Callable:
    """A copy of ``guide`` fitted to the same model and data from other initial values; the model does not change.

    Layers are initialized anew; parameters outside layers start at their values plus N(0, 1/4) noise. Parameters that
    do not require a gradient keep their values.

    Raises:
        BadInput: a guide that is not a module, whose parameters cannot be separated from the model's; one without a
            parameter to train; one with parameters in the param store alone.
    """
    with private_store(model, guide), private_seed(seed, model, guide), evaluated(model):
        stored = Stored(model, guide)
        with torch.no_grad():
            run = poutine.trace(guide).get_trace(*args, **kwargs)  # a lazily built guide creates its parameters here
        if not isinstance(guide, nn.Module) or not any(True for _ in guide.parameters()):
            raise BadInput(
                "num_refits fits guides that are modules with parameters; for any other give refit=, a function from a"
                " seed to a fitted guide, or pass a sequence of fitted guides"
            )
        if left := [name for name, site in run.nodes.items() if site["type"] == "param" and name in stored.values]:
            raise BadInput(
                f"a refit trains the parameters of the guide's modules, and {left[0]!r} is in the param store alone:"
                " make it a PyroParam of a PyroModule, or give refit="
            )
        again = copy.deepcopy(guide)
        if not any(parameter.requires_grad for parameter in again.parameters()):
            raise BadInput(
                "a refit needs a parameter of the guide that requires a gradient: thaw those to train, or give refit="
            )
        _start_elsewhere(again)
        store = pyro.get_param_store()
        with store.scope({"params": {}, "constraints": {}}), stored:
            loss = loss_of(words(again, args, kwargs), 4, model, again, args, kwargs)
            _train(loss, again, args, kwargs, steps, lr)
    return again


def _start_elsewhere(guide: nn.Module) -> None:
    """Other initial values of the parameters that are trained."""
    fixed = [(parameter, parameter.clone()) for parameter in guide.parameters() if not parameter.requires_grad]
    with torch.no_grad():
        reset = {id(p) for module in guide.modules() for p in _reset(module)}
        for parameter in guide.parameters():
            if id(parameter) not in reset:
                parameter.add_(0.5 * torch.randn_like(parameter))
        for parameter, value in fixed:
            parameter.copy_(value)


def _reset(module: nn.Module) -> list[nn.Parameter]:
    if isinstance(module, PyroModule) and not isinstance(module, (nn.Linear, nn.Conv2d)):
        return []
    own = list(module.parameters(recurse=False))
    if not hasattr(module, "reset_parameters") or not any(parameter.requires_grad for parameter in own):
        return []
    module.reset_parameters()
    return own
