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
from torch import nn

from ...errors import BadInput, CannotVectorize
from ..elbo import SiteELBO
from ..engine.progress import Progress
from ..engine.scopes import evaluating, modules_of, private_seed, private_store
from ..estimators._distributions import is_computed, is_deterministic
from .vmapped import random_sites


def loss_of(estimators: Any, num_particles: int | None, model, guide, args: tuple, kwargs: Mapping[str, Any]) -> Any:
    """A loss with vectorized particles, or one by one for programs that cannot be vectorized."""
    try:
        return SiteELBO(estimators, num_particles=num_particles, vectorize_particles=True)(model, guide).initialize(
            *args, **kwargs
        )
    except CannotVectorize:
        elbo = SiteELBO(estimators, num_particles=num_particles, vectorize_particles=False)
        return elbo(model, guide).initialize(*args, **kwargs)


def _train(loss, guide, args, kwargs, steps: int, lr: float, progress: Progress | None = None) -> None:
    trainable = [parameter for parameter in guide.parameters() if parameter.requires_grad]
    optimizer = torch.optim.Adam(trainable, lr=lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    with torch.enable_grad():
        for step in range(steps):
            (progress or Progress()).step(step)
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

    Layers are initialized anew; parameters outside layers start at their values plus N(0, 1/4) noise. Raises BadInput
    for a guide that is not a module, whose parameters cannot be separated from the model's.
    """
    with private_store(model, guide), private_seed(seed, model, guide), evaluated(model):
        with torch.no_grad():
            guide(*args, **kwargs)  # a lazily built guide creates its parameters here
        if not isinstance(guide, nn.Module) or not any(True for _ in guide.parameters()):
            raise BadInput(
                "num_refits fits guides that are modules with parameters; for any other give refit=, a function from a"
                " seed to a fitted guide, or pass a sequence of fitted guides"
            )
        again = copy.deepcopy(guide)
        with torch.no_grad():
            reset = {id(p) for module in again.modules() for p in _reset(module)}
            for parameter in again.parameters():
                if id(parameter) not in reset:
                    parameter.add_(0.5 * torch.randn_like(parameter))
        store = pyro.get_param_store()
        with store.scope({"params": {}, "constraints": {}}):
            loss = loss_of(words(again, args, kwargs), 4, model, again, args, kwargs)
            _train(loss, again, args, kwargs, steps, lr)
    return again


def _reset(module: nn.Module) -> list[nn.Parameter]:
    if isinstance(module, PyroModule) and not isinstance(module, (nn.Linear, nn.Conv2d)):
        return []
    if not hasattr(module, "reset_parameters"):
        return []
    module.reset_parameters()
    return list(module.parameters(recurse=False))
