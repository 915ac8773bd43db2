"""Latents at which the guide is a point: their draws have no density, and the guide's weights estimate no evidence."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from typing import Any

import torch
from pyro import poutine
from pyro.poutine.trace_struct import Trace
from torch.distributions import biject_to

from ...errors import PROGRAM_ERRORS
from ..engine.interventions import GivenValues
from ..estimators._distributions import is_computed, observes_itself
from .sites import SiteLayout
from .vmapped import random_sites

_REDRAWS = 8  # a discrete draw may fall on the same value again


def points_of(
    run: Callable[[], Any],
    guide: Trace,
    supports: Mapping[str, Any],
    guide_sites: Mapping[str, SiteLayout],
    model_sites: Mapping[str, SiteLayout],
) -> dict[str, str]:
    """The latents at which the guide is a point; for each a phrase that continues "the guide …".

    A latent that the guide computes from auxiliary draws, as ``AutoNormal`` does, has the density of these draws. It is
    not a point if it changes with them, and if they have at least as many numbers as all latents computed from them.
    ``run`` runs the guide as ``guide`` was traced.
    """
    fixed = [name for name, one in guide_sites.items() if one.point and name in supports]
    # Where the model is a point too, as at a Delta prior, the guide is right.
    fixed = [name for name in fixed if not (model_sites[name].discrete or model_sites[name].point)]
    auxiliary = [
        name
        for name, one in guide_sites.items()
        if name not in model_sites and one.kind == "latent" and not one.point and not guide.nodes[name]["is_observed"]
    ]
    values = {name: site["value"].detach() for name, site in random_sites(guide)}
    held = {name: values[name] for name in values.keys() & supports.keys() - set(fixed)}
    smooth: set[str] = set()
    redrawn: set[str] = set()
    used = 0
    if fixed and auxiliary:
        with suppress(*PROGRAM_ERRORS):  # of a guide without gradients
            smooth, used = _with_gradients(run, fixed, held, {name: values[name] for name in auxiliary})
        redrawn = _redrawn(run, [name for name in fixed if name not in smooth], held)
    found = [name for name in fixed if name not in smooth | redrawn]
    numbers = sum(_free(supports[name], values[name]) for name in smooth)
    if not found and not redrawn and used < numbers:
        names = ", ".join(repr(name) for name in fixed[:5])
        what = f"computes {names}, of {numbers} dimensions, from {used} random numbers, which leaves no density"
        return dict.fromkeys(fixed, what)
    return {name: f"is a point at {name!r}, which has no density" for name in found}


def moved_by_draws(run: Callable[[], Any], guide: Trace, model: Trace) -> frozenset[str]:
    """The observed points with a density that the draws determine, as ``SplitReparam`` or ``NeuTraReparam`` leave them.

    A point that stays where it is under other draws is data, with a density of the program's own. ``run`` runs the
    model as ``model`` was traced, at the draws of ``guide``.
    """
    names = [name for name, site in random_sites(model) if observes_itself(site) and not is_computed(site)]
    if not names:
        return frozenset()
    values = {name: site["value"].detach().clone() for name, site in random_sites(guide)}
    leaves = [value.requires_grad_() for value in values.values() if value.is_floating_point()]
    found = set()
    with torch.enable_grad(), GivenValues(values):
        again = poutine.trace(run).get_trace()
        for name in names:
            value, before = again.nodes[name]["value"], model.nodes[name]["value"]
            if not torch.equal(value, before):  # the model draws it, as under ``ConjugateReparam``
                found.add(name)
            elif value.requires_grad and leaves:
                slopes = torch.autograd.grad(value.sum(), leaves, retain_graph=True, allow_unused=True)
                found |= {name} if any(slope is not None for slope in slopes) else set()
    return frozenset(found)


def _with_gradients(
    run: Callable[[], Any],
    names: Iterable[str],
    held: Mapping[str, torch.Tensor],
    auxiliary: Mapping[str, torch.Tensor],
) -> tuple[set[str], int]:
    """The sites with a gradient in auxiliary draws, and how many numbers these draws have."""
    moved = {name: value.clone().requires_grad_() for name, value in auxiliary.items() if value.is_floating_point()}
    found: set[str] = set()
    used: set[str] = set()
    if moved:
        with torch.enable_grad(), GivenValues({**held, **moved}):
            again = poutine.trace(run).get_trace()
            sums = {name: again.nodes[name]["value"].sum() for name in names}
        for name, total in sums.items():
            if total.requires_grad:
                slopes = torch.autograd.grad(total, list(moved.values()), allow_unused=True, retain_graph=True)
                reached = {one for one, slope in zip(moved, slopes, strict=True) if slope is not None}
                found |= {name} if reached else set()
                used |= reached
    return found, sum(moved[name].numel() for name in used)


def _redrawn(run: Callable[[], Any], names: list[str], held: Mapping[str, torch.Tensor]) -> set[str]:
    """The sites whose values change between runs in which the other latents of the model do not."""
    found: set[str] = set()
    first: Trace | None = None
    for _ in range(_REDRAWS if names else 0):
        with GivenValues(held):
            again = poutine.trace(run).get_trace()
        first = first or again
        found |= {name for name in names if not torch.equal(first.nodes[name]["value"], again.nodes[name]["value"])}
        if len(found) == len(names):
            break
    return found


def _free(support: Any, value: torch.Tensor) -> int:
    """The number of dimensions in which a value can move."""
    with suppress(*PROGRAM_ERRORS):
        return biject_to(support).inv(value).numel()
    return 0
