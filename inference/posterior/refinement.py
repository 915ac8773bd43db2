"""Refinement of a guide for given data: per-datum optimization within its family, and the gain in ELBO."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.poutine.messenger import Messenger
from pyro.poutine.trace_struct import Trace
from pyro.poutine.util import site_is_subsample
from torch import Tensor, nn
from torch.distributions import Distribution, Independent, constraints, transform_to

from ...errors import PROGRAM_ERRORS, BadInput, GumboError, UnsupportedSite
from ...options import holds_to_annotations
from ..engine.progress import Progress
from ..engine.rows import Rows
from ..engine.scopes import device_of, evaluating, private_seed, private_store
from ..estimators import Estimator
from ..estimators._distributions import is_computed, without_to_event
from .division import first_sweep
from .parts import exact_pair, log_weights
from .refits import Stored, loss_of, words
from .vmapped import random_sites

STEPS, RATE, PARTICLES = 200, 0.05, 8
_FEATURES = "/features"


class RefinedGuide(nn.Module):
    """A guide with a learned offset for each datum, added to the parameters of its distributions.

    A parameter of a site's distribution becomes T(T⁻¹(parameter) + offset), with T the map from the reals to the
    parameter's constraint. Offsets start at zero, where the refined guide equals the guide; dependences between sites
    are kept. A distribution without parameters of its own (a flow) is refined through the output of ``guide.encoder``.

    It is bound to its rows: call it with all of them, in their order. ``offsets`` are its own parameters; the guide's
    are shared and do not change. Made by `refine`.

    Args:
        guide: the guide, a module or a function.
        data: the rows, in any form that `evaluate` takes.
        shared: also refine latents outside the data plate.

    Raises:
        BadInput: no latent in a plate over the data, or plates of the same size that cannot be told apart.
        UnsupportedSite: a site without parameters that can be moved.
    """

    def __init__(self, guide: Callable, data: object, *, shared: bool = False):
        super().__init__()
        rows = Rows(data)
        self.guide = guide
        self.num_rows = len(rows)
        self.offsets = nn.ParameterDict()
        with torch.no_grad(), private_store(guide), private_seed(None, guide):
            trace = poutine.trace(guide).get_trace(*rows.args, **rows.kwargs)
            plates = set() if shared else _plates_of_data(guide, rows, trace)
        for name, site in random_sites(trace):
            if not _drawn(site) or not (shared or plates & _plates_of_size(site, self.num_rows)):
                continue
            own = own_parameters(site["fn"])
            if not own and not _has_encoder(guide):
                family = type(site["fn"]).__name__
                raise UnsupportedSite(name, "refinement", f"{family} has no parameters that can be moved")
            for key, (value, constraint) in own.items():
                free = transform_to(constraint).inv(value)
                self.offsets[f"{_as_key(name)}/{key}"] = nn.Parameter(torch.zeros_like(free).contiguous())
            if not own:
                with torch.no_grad(), _shifted_features(guide, None) as features, private_store(guide):
                    guide(*rows.args, **rows.kwargs)
                self.offsets[_FEATURES] = nn.Parameter(torch.zeros_like(features[0]))
        if not self.offsets:
            raise BadInput("the guide draws no latent in a plate over the data, so that no datum can be refined")

    @property
    def inner_program(self) -> Callable:
        """The guide, so that its modules count as this one's."""
        return self.guide

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        rows = len(Rows.of(args, kwargs))
        if rows != self.num_rows:
            raise BadInput(f"this guide is refined for {self.num_rows} data, and was given {rows}: give it the same")
        features = self.offsets.get(_FEATURES, None)
        with _Shift(self.offsets):
            if features is None:
                return self.guide(*args, **kwargs)
            with _shifted_features(self.guide, features):
                return self.guide(*args, **kwargs)


def _as_key(site: str) -> str:
    """A site's name as part of a parameter's name, which holds no dot: ``layer.weight`` is ``layer:weight``."""
    return site.replace(":", "::").replace(".", ":")


def _drawn(site: Mapping[str, Any]) -> bool:
    return not site["is_observed"] and not is_computed(site)


def _plates_of_size(site: Mapping[str, Any], rows: int) -> set[str]:
    """The site's plates that have that many rows."""
    batch = site["fn"].batch_shape
    frames = [frame for frame in site["cond_indep_stack"] if frame.vectorized]
    return {frame.name for frame in frames if -frame.dim <= len(batch) and batch[frame.dim] == rows}


def _plates_of_data(guide: Callable, rows: Rows, trace: Trace) -> set[str]:
    """The plates of the data's size, without those whose size does not follow the data where another's does.

    Raises:
        BadInput: several plates of that size, in a guide that cannot be run on fewer rows to tell them apart.
    """
    sites = [site for _, site in random_sites(trace) if _drawn(site)]
    found = {name for site in sites for name in _plates_of_size(site, len(rows))}
    following: set[str] = set()
    if found and not rows.whole and len(rows) > 1:
        fewer = rows[torch.arange(len(rows) - 1)]
        with suppress(GumboError, *PROGRAM_ERRORS):
            shorter = poutine.trace(guide).get_trace(*fewer.args, **fewer.kwargs)
            again = [site for _, site in random_sites(shorter) if _drawn(site)]
            following = {name for site in again for name in _plates_of_size(site, len(fewer))}
    if found & following:
        return found & following
    if len({frozenset(s["name"] for s in sites if name in _plates_of_size(s, len(rows))) for name in found}) > 1:
        raise BadInput(
            f"plates {', '.join(sorted(found))} have as many elements as there are data ({len(rows)}), and the guide "
            "does not tell which holds the data: give another number of rows, or refine all latents by shared=True"
        )
    return found


def _has_encoder(guide: Callable) -> bool:
    return isinstance(getattr(guide, "encoder", None), nn.Module)


def can_refine(guide: Callable, data: object) -> bool:
    """Whether every site of the guide has parameters, or encoder features, that can be refined."""
    rows = Rows(data)
    with private_store(guide), private_seed(None, guide), torch.no_grad():
        trace = poutine.trace(guide).get_trace(*rows.args, **rows.kwargs)
    fns = [site["fn"] for _, site in random_sites(trace) if not site["is_observed"]]
    flows = [_has_encoder(guide) and not isinstance(without_to_event(fn), (dist.Delta, dist.Unit)) for fn in fns]
    return bool(fns) and all(own_parameters(fn) or flow for fn, flow in zip(fns, flows, strict=True))


def refine(
    model: Callable,
    guide: Callable,
    data: object,
    *,
    steps: int = STEPS,
    lr: float = RATE,
    estimator: str | Estimator | Mapping[str, str | Estimator] | None = None,
    num_particles: int | None = PARTICLES,
    seed: int | None = 0,
    shared: bool = False,
    progress: Progress | None = None,
) -> RefinedGuide:
    """Optimize a guide for each datum separately, from the amortized values; model and guide do not change.

    Semi-amortized inference: Kim et al. 2018, arXiv:1802.02550; Hjelm et al. 2016, arXiv:1511.06382. All rows are
    optimized at once, on the ELBO of the given rows.

    Args:
        model: the Pyro model.
        guide: its guide, a module or a function.
        data: the rows, in any form that `evaluate` takes.
        steps: number of Adam steps.
        lr: initial learning rate, which decreases to zero along a cosine.
        estimator: a word, an estimator, or a mapping of sites to either, as for `SiteELBO`. None: pathwise for sites
            with ``rsample``, leave-one-out (``rloo``) otherwise.
        num_particles: draws per step; None takes the smallest number that the estimators allow.
        seed: of the draws; None draws from the current random state.
        shared: also refine latents outside the data plate.
        progress: called after each step.

    Returns:
        A `RefinedGuide` for these rows.

    Raises:
        BadInput: data or settings that cannot be used, or a bound that is not finite.
        UnsupportedSite: a site without parameters, or one that the estimator does not support.

    >>> from gumbo.guides import NormalGuide
    >>> from gumbo.models import GaussianVAE
    >>> model = GaussianVAE((1, 4, 4), latent_dim=2, hidden=(8,), likelihood="bernoulli")
    >>> x = torch.ones(3, 1, 4, 4)
    >>> refined = refine(model, NormalGuide(model, hidden=(8,)), x, steps=5)
    >>> {name: tuple(offset.shape) for name, offset in refined.offsets.items()}
    {'z/loc': (3, 2), 'z/scale': (3, 2)}
    """
    if steps < 0 or not lr > 0:
        raise BadInput(f"refine: steps={steps} and lr={lr}: expected at least 0 steps and a positive learning rate")
    rows = Rows(data).check("data").to(device_of(model, guide))
    return refined_for(
        model,
        guide,
        rows,
        steps=steps,
        lr=lr,
        estimator=estimator,
        num_particles=num_particles,
        seed=seed,
        shared=shared,
        progress=progress,
    )


def refined_for(
    model: Callable,
    guide: Callable,
    rows: Rows,
    *,
    steps: int,
    lr: float = RATE,
    estimator: Any = None,
    num_particles: int | None = PARTICLES,
    seed: int | None = 0,
    shared: bool = False,
    progress: Progress | None = None,
) -> RefinedGuide:
    """`refine` for rows that were checked before."""
    progress = progress or Progress()
    with private_store(model, guide), private_seed(seed, model, guide), evaluating(model, guide):
        refined = RefinedGuide(guide, rows, shared=shared)
        offsets = list(refined.offsets.values())
        optimizer = torch.optim.Adam(offsets, lr=lr)
        falling = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(1, steps))
        chosen = words(guide, rows.args, rows.kwargs) if estimator is None else estimator
        stored = Stored(model, guide)
        with stored:
            loss = loss_of(chosen, num_particles, model, refined, rows.args, rows.kwargs)
        with torch.enable_grad(), stored:
            for step in range(steps):
                progress.step(step)
                value = loss(*rows.args, **rows.kwargs)
                if not torch.isfinite(value):
                    raise BadInput(f"refining the guide gave an ELBO of {-value.item()}")
                # autograd.grad leaves the .grad of the model's and the guide's parameters unchanged.
                slopes = torch.autograd.grad(value, offsets, allow_unused=True)
                for offset, slope in zip(offsets, slopes, strict=True):
                    offset.grad = slope
                optimizer.step()
                falling.step()
    return refined


@dataclass(frozen=True)
class Refinement:
    """Per-datum bounds in nats, ``(N,)`` each: of the amortized guide, and of the guide refined for each datum.

    ``gap`` is their difference. If the steps suffice to reach each datum's optimum, it is the amortization gap.
    """

    amortized: Tensor
    refined: Tensor

    @property
    def gap(self) -> Tensor:
        return self.refined - self.amortized


@holds_to_annotations()
def refinement_gap(
    model: Callable,
    guide: Callable,
    data: object,
    *,
    steps: int = STEPS,
    lr: float = RATE,
    estimator: str | Estimator | Mapping[str, str | Estimator] | None = None,
    num_particles: int | None = PARTICLES,
    num_samples: int = 100,
    batch_size: int = 256,
    seed: int = 0,
) -> Refinement:
    """The gain in ELBO on each datum by refinement, an estimate of the amortization gap.

    Cremer, Li & Duvenaud 2018, "Inference suboptimality in variational autoencoders", arXiv:1801.03558. A relaxed pair
    is evaluated in its discrete form.

    Args:
        model, guide, data, steps, lr, estimator, num_particles: as in `refine`.
        num_samples: draws per datum for each bound.
        batch_size: rows that are refined at once; all, where rows do not have the same terms without the others.
        seed: of the refinement; the bounds use other draws.

    Returns:
        A `Refinement`, with bounds in nats ``(N,)``.

    Raises:
        BadInput, UnsupportedSite: as `refine` and `evaluate`.

    >>> from gumbo.guides import NormalGuide
    >>> from gumbo.models import GaussianVAE
    >>> model = GaussianVAE((1, 4, 4), latent_dim=2, hidden=(8,), likelihood="bernoulli")
    >>> found = refinement_gap(model, NormalGuide(model, hidden=(8,)), torch.ones(3, 1, 4, 4), steps=50, num_samples=20)
    >>> found.gap.shape, bool(found.gap.mean() > 0)
    (torch.Size([3]), True)
    """
    if batch_size < 1:
        raise BadInput(f"batch_size is {batch_size}: expected at least 1")
    rows = Rows(data).check("data")
    with private_seed(None, model, guide):
        model, guide = exact_pair(model, guide)
    before, after = [], []
    size = len(rows)
    if batch_size < len(rows):
        counted, found, *_ = first_sweep(model, guide, rows, batch_size, None, num_samples)
        size = found if len(counted) == len(rows) else size
    for start in range(0, len(rows), size):
        batch = rows[start : start + size]
        refined = refine(
            model, guide, batch, steps=steps, lr=lr, estimator=estimator, num_particles=num_particles, seed=seed
        )
        for bounds, program in ((before, guide), (after, refined)):
            # Other draws than those of the optimization, which would favour the refined guide.
            bounds.append(_bounds(model, program, batch, num_samples, seed + 1))
    return Refinement(torch.cat(before), torch.cat(after))


def _bounds(model: Callable, guide: Callable, batch: Rows, num_samples: int, seed: int) -> Tensor:
    parts = log_weights(model, guide, batch, num_samples=num_samples, batch_size=len(batch), seed=seed)
    weights = parts["log_prior"] + parts["log_likelihood"] - parts["log_q"] + parts["log_global"]
    return weights.mean(0)


# --- distributions with moved parameters


def own_parameters(fn: Distribution) -> dict[str, tuple[Tensor, Any]]:
    """A distribution's parameters, under any ``to_event``, with their constraints; empty if they cannot be refined.

    >>> {name: value for name, (value, _) in own_parameters(dist.Normal(torch.zeros(1), 2.0).to_event(1)).items()}
    {'loc': tensor([0.]), 'scale': tensor([2.])}
    """
    base = _base(fn)
    found = {}
    for name, value in ({} if base is None else _arguments(base)).items():
        constraint = base.arg_constraints.get(name)
        moves = isinstance(value, Tensor) and value.is_floating_point() and constraint is not None
        if moves and not constraint.is_discrete and constraint is not constraints.dependent:
            found[name] = (value, constraint)
    return found


_RELAXED = (torch.distributions.RelaxedOneHotCategorical, torch.distributions.RelaxedBernoulli)
_WRAPPED = (torch.distributions.TransformedDistribution, dist.MaskedDistribution, dist.Delta, dist.Unit)


def _base(fn: Any) -> Any:
    """The distribution under Independent; None for other wrappers."""
    fn = without_to_event(fn)
    if isinstance(fn, _RELAXED):
        return fn
    return None if isinstance(fn, _WRAPPED) or hasattr(fn, "base_dist") else fn


def _arguments(base: Any) -> dict[str, Any]:
    """Arguments that rebuild a distribution; of equivalent parametrizations, logits and triangular factors."""
    if isinstance(base, _RELAXED):
        return {"temperature": base.temperature, "logits": base.logits}
    if isinstance(base, torch.distributions.Beta):
        return {"concentration1": base.concentration1, "concentration0": base.concentration0}
    names = dict(base.arg_constraints)  # of the instance: a property in some classes
    for kept, others in (("logits", ("probs",)), ("scale_tril", ("covariance_matrix", "precision_matrix"))):
        if kept in names:
            names = {name: one for name, one in names.items() if name not in others}
    found = {name: getattr(base, name) for name in names}
    return found | ({"total_count": base.total_count} if hasattr(base, "total_count") else {})


def shifted(fn: Any, offsets: Mapping[str, Tensor]) -> Any:
    """The same distribution with offsets added to its unconstrained parameters."""
    if isinstance(fn, Independent):
        return dist.Independent(shifted(fn.base_dist, offsets), fn.reinterpreted_batch_ndims)
    arguments = _arguments(fn)
    for name, (value, constraint) in own_parameters(fn).items():
        if name in offsets:
            map_to = transform_to(constraint)
            arguments[name] = map_to(map_to.inv(value) + offsets[name])
    return type(fn)(**arguments)


class _Shift(Messenger):
    """Adds offsets to the parameters of each site that has them."""

    def __init__(self, offsets: Mapping[str, Tensor]):
        super().__init__()
        self.by_site: dict[str, dict[str, Tensor]] = {}
        for key, offset in offsets.items():
            site, _, name = key.rpartition("/")
            if site:
                self.by_site.setdefault(site, {})[name] = offset

    def _pyro_sample(self, msg) -> None:
        offsets = self.by_site.get(_as_key(msg["name"]))
        if offsets is not None and not msg["is_observed"] and not site_is_subsample(msg):
            msg["fn"] = shifted(msg["fn"], offsets)


@contextmanager
def _shifted_features(guide: Any, offset: Tensor | None) -> Iterator[list[Tensor]]:
    """Add an offset to the output of ``guide.encoder``; the yielded list collects the original output."""
    seen: list[Tensor] = []

    def hook(module, inputs, output):
        seen.append(output)
        return output if offset is None else output + offset

    handle = guide.encoder.register_forward_hook(hook)
    try:
        yield seen
    finally:
        handle.remove()


__all__ = ["Refinement", "RefinedGuide", "refine", "refinement_gap"]
