"""Fitting a guide once more: each datum's own parameters around an amortized guide, or the whole from a new start."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.nn import PyroModule
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from torch import nn
from torch.distributions import constraints, transform_to

from ...errors import BadInput, CannotVectorize
from ..elbo import SiteELBO
from ..engine.progress import Progress
from ..engine.scopes import modes_kept, modules_of, private_seed, private_store
from ..estimators._distributions import is_deterministic
from .runner import Sweep, random_sites


class Refined(nn.Module):
    """A guide whose every site has parameters of its own beside those that the guide computes.

    A parameter of a site's distribution becomes T(T⁻¹(parameter) + offset), T the map from the reals to where the
    parameter lives, the offset zero at first and as large as the parameter: so each datum has its own, and what a site
    takes from those before it stays. ``offsets`` are all that is to be trained. Kim et al. 2018, arXiv:1802.02550.
    """

    def __init__(self, guide: Callable, args: tuple, kwargs: Mapping[str, Any]):
        super().__init__()
        self.__dict__["guide"] = guide
        self.offsets = nn.ParameterDict()
        with torch.no_grad():
            trace = poutine.trace(guide).get_trace(*args, **kwargs)
        for name, site in random_sites(trace):
            if not site["is_observed"]:
                for parameter, (value, _) in own_parameters(site["fn"]).items():
                    self.offsets[_key(name, parameter)] = nn.Parameter(torch.zeros_like(value).contiguous())

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        with _Offset(self.offsets):
            return self.guide(*args, **kwargs)


class _Offset(Messenger):
    def __init__(self, offsets: nn.ParameterDict):
        super().__init__()
        self.offsets = offsets

    def _pyro_sample(self, msg) -> None:
        if not msg["is_observed"] and not site_is_subsample(msg):
            shift = {
                parameter: self.offsets[_key(msg["name"], parameter)]
                for parameter in own_parameters(msg["fn"])
                if _key(msg["name"], parameter) in self.offsets
            }
            if shift:
                msg["fn"] = shifted(msg["fn"], shift)


def _key(site: str, parameter: str) -> str:
    return f"{site}|{parameter}".replace(".", "/")


def _base(fn: Any) -> Any:
    """The distribution under Independent and plates' expansions; None if it is under something else."""
    while isinstance(fn, torch.distributions.Independent):
        fn = fn.base_dist
    wrapped = (torch.distributions.TransformedDistribution, dist.MaskedDistribution, dist.Delta, dist.Unit)
    return None if isinstance(fn, wrapped) or hasattr(fn, "base_dist") else fn


# Of several ways to say the same thing, the first that is there counts.
_ALTERNATIVES = (("logits", "probs"), ("scale_tril", "covariance_matrix", "precision_matrix"))


def _arguments(base: Any) -> dict[str, torch.Tensor]:
    """What a distribution can be built from again."""
    if isinstance(base, torch.distributions.OneHotCategorical):
        return {"logits": base.logits}
    if isinstance(base, torch.distributions.Beta):
        return {"concentration1": base.concentration1, "concentration0": base.concentration0}
    given = {name: base.__dict__[name] for name in base.arg_constraints if name in base.__dict__}
    for names in _ALTERNATIVES:
        for name in [name for name in names if name in given][1:]:
            del given[name]
    return given


def own_parameters(fn: Any) -> dict[str, tuple[torch.Tensor, Any]]:
    """A distribution's parameters and where they live: empty where they cannot be moved."""
    base = _base(fn)
    if base is None:
        return {}
    found = {}
    for name, value in _arguments(base).items():
        constraint = base.arg_constraints[name]
        moves = isinstance(value, torch.Tensor) and value.is_floating_point() and not constraint.is_discrete
        if moves and constraint is not constraints.dependent:
            found[name] = (value, constraint)
    return found


def shifted(fn: Any, shift: Mapping[str, torch.Tensor]) -> Any:
    """The distribution with its parameters moved in unconstrained space."""
    if isinstance(fn, torch.distributions.Independent):
        return dist.Independent(shifted(fn.base_dist, shift), fn.reinterpreted_batch_ndims)
    arguments = _arguments(fn)
    for name, (value, constraint) in own_parameters(fn).items():
        if name in shift:
            map_to = transform_to(constraint)
            arguments[name] = map_to(map_to.inv(value) + shift[name])
    return type(fn)(**arguments)


def can_refine(sweep: Sweep) -> bool:
    """Whether every site that the guide draws has parameters that can be moved."""
    if sweep.summed_out:
        return False  # what completes the guide is exact, and has no parameters
    with private_store(sweep.model, sweep.guide), private_seed(None, sweep.model, sweep.guide), torch.no_grad():
        trace = poutine.trace(sweep.guide).get_trace(*sweep.args, **sweep.kwargs)
    sites = [site for _, site in random_sites(trace) if not site["is_observed"]]
    return bool(sites) and all(own_parameters(site["fn"]) for site in sites)


def refine(
    model: Callable,
    guide: Callable,
    args: tuple,
    kwargs: Mapping[str, Any],
    *,
    steps: int = 300,
    lr: float = 0.05,
    num_particles: int = 8,
    seed: int | None = 0,
    progress: Progress | None = None,
) -> Refined:
    """The best guide of its family for these very data, found from ``guide`` by ``steps`` of Adam on the ELBO.

    Neither model nor guide is changed. Sites without a pathwise gradient take leave-one-out score-function gradients.
    """
    with private_store(model, guide), private_seed(seed, model, guide), evaluated(model, guide):
        refined = Refined(guide, args, kwargs)
        loss = loss_of(words(guide, args, kwargs), num_particles, model, refined, args, kwargs)
        _train(loss, refined, args, kwargs, steps, lr, progress)
    return refined


def loss_of(estimators: Any, num_particles: int | None, model, guide, args: tuple, kwargs: Mapping[str, Any]) -> Any:
    """A loss with its particles at once, or one by one for programs that take no particle dimension."""
    try:
        return SiteELBO(estimators, num_particles=num_particles)(model, guide).initialize(*args, **kwargs)
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
    """An estimator for each site: pathwise where there is an rsample, leave-one-out where not."""
    with torch.no_grad(), private_seed(None, guide):
        trace = poutine.trace(guide).get_trace(*args, **kwargs)
    return {
        name: "pathwise" if site["fn"].has_rsample else "rloo"
        for name, site in random_sites(trace)
        if not site["is_observed"] and not site["infer"].get("_deterministic") and not is_deterministic(site["fn"])
    }


@contextmanager
def evaluated(*programs: Any) -> Iterator[None]:
    """Programs in evaluation mode, none of whose parameters asks for a gradient."""
    thawed = [p for module in modules_of(*programs) for p in module.parameters() if p.requires_grad]
    with modes_kept(*programs):
        for module in modules_of(*programs):
            module.eval()
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
    """A copy of ``guide`` fitted to the same model and data from other initial values; the model stays as it is.

    Layers draw their weights anew; parameters that are not a layer's start where they stand plus N(0, 1/4) noise.
    Raises BadInput for a guide that is not a module, whose parameters cannot be told from the model's.
    """
    with private_store(model, guide), private_seed(seed, model, guide), evaluated(model):
        with torch.no_grad():
            guide(*args, **kwargs)  # a lazily built guide has parameters only now
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
