"""The :class:`SiteView` objects of one call."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ...errors import BadInput
from ..estimators import SiteView
from ..estimators._base import Draw, pad_left
from .noise import drawn_twice
from .records import Run, Site
from .terms import Layout, Row, common_frames, joined_dims

StateOf = Callable[[Site, Callable[[], list[Tensor]]], "nn.Module | None"]


@dataclass
class Inputs:
    """The information available before a site draws: the programs' arguments and upstream values.

    Attributes:
        layout, args, kwargs: those of the call.
        weighted: whether an importance weight, and not a cost, is predicted from it.
    """

    layout: Layout
    args: tuple
    kwargs: Mapping[str, Any]
    weighted: bool

    def __call__(self, runs: list[Run], site: Site) -> list[Tensor]:
        """The inputs, each as ``(…, K or 1, *plates, features)``."""
        room = self.layout.room
        frames = common_frames(runs, self.layout) if self.weighted else self.layout.frames(site)
        found = [torch.ones((1,) * room + (1,), dtype=site.log_prob.dtype, device=site.log_prob.device)]
        sizes = {dim: size for _, dim, size in frames}
        depth = max((-dim for dim in sizes), default=0)
        rows = tuple(sizes.get(dim, 1) for dim in range(-depth, 0))
        for item in (*self.args, *self.kwargs.values()):
            if isinstance(item, Tensor) and depth and tuple(item.shape[:depth]) == rows:
                found.append(pad_left(item.detach().reshape(rows + (-1,)), room + 1))
        for name in [other.name for other in runs[0].upstream(site.name) if other.latent and not other.summed]:
            others = [run.guide_site(name) for run in runs]
            if others[0].frames <= frames:
                values = [_features(_laid_out(other, room).value.detach(), other.fn.event_dim) for other in others]
                found.append(_joined(values, -room - 1, name))
        return [tensor.to(found[0].dtype) for tensor in found]


@dataclass
class Views:
    """Makes the :class:`SiteView` of each site.

    Attributes:
        inputs: the information available before a site draws.
        evaluate: the cost of other draws, ``Reruns.evaluate``.
        state_of: the module of a site's estimator.
        step: number of earlier training steps.
        moving: whether statistics may change.
    """

    inputs: Inputs
    evaluate: Callable[..., Any]
    state_of: StateOf
    step: Any
    moving: bool

    def __call__(self, rows: list[Row], log_prob: Tensor | None, cost: Tensor, bound: Any) -> SiteView:
        layout, site = self.inputs.layout, rows[0].site
        runs = [row.run for row in rows]
        inputs = partial(self.inputs, runs, site)
        draws = [_laid_out(row.site, layout.room) for row in rows]
        return SiteView(
            name=site.name,
            fns=[row.site.fn for row in rows],
            draw=_join_draws(draws, layout.room + site.fn.event_dim, site.name),
            log_prob=log_prob,
            cost=cost,
            particle_dim=-layout.room,
            num_particles=cost.shape[-layout.room],
            step=self.step,
            state=self.state_of(site, inputs),
            training=self.moving,
            bound=bound,
            inputs=inputs,
            evaluate=partial(self.evaluate, rows),
            find_joined=partial(joined_dims, runs, site.name, layout),
            mean=partial(layout.mean, site),
            drawn_twice=drawn_twice,
            find_slope=partial(_slope, rows, layout.room + site.fn.event_dim) if site.estimator.takes_slope else None,
        )


def _slope(rows: list[Row], dims: int) -> Tensor:
    """The derivative of the cost with respect to the draws; zero where it does not exist."""
    if all(row.slope is not None for row in rows):
        return _as_slope([row.slope for row in rows], dims)
    leaves = [row.site.draw.value for row in rows]
    with torch.enable_grad():  # also if the caller disabled gradients
        total = sum((row.once for row in rows if row.once is not None), start=leaves[0].new_zeros(()))
    found: list[Tensor | None] = [None] * len(leaves)
    if total.requires_grad:
        found = list(torch.autograd.grad(total, leaves, retain_graph=True, allow_unused=True))
    slopes = [torch.zeros_like(at) if slope is None else slope for at, slope in zip(leaves, found, strict=True)]
    return _as_slope(slopes, dims)


def _as_slope(slopes: list[Tensor], dims: int) -> Tensor:
    laid_out = [pad_left(torch.nan_to_num(slope, posinf=0.0, neginf=0.0), dims).detach() for slope in slopes]
    return laid_out[0] if len(laid_out) == 1 else torch.cat(laid_out, dim=-dims)


def _laid_out(site: Site, room: int) -> Draw:
    """A site's draw with dimensions for particles and plates, whether or not it ran with them."""
    return site.draw.map(lambda t: pad_left(t, room + site.fn.event_dim))


def _features(value: Tensor, event_dim: int) -> Tensor:
    return value.flatten(-event_dim) if event_dim else value.unsqueeze(-1)


def _join_draws(draws: list[Draw], dims: int, name: str) -> Draw:
    if len(draws) == 1:
        return draws[0]
    extra = {key: _joined([draw.extra[key] for draw in draws], -dims, name) for key in draws[0].extra}
    return Draw(_joined([draw.value for draw in draws], -dims, name), extra)


def _joined(tensors: list[Tensor], dim: int, name: str) -> Tensor:
    if len(tensors) == 1:
        return tensors[0]
    try:
        return torch.cat(tensors, dim=dim)
    except RuntimeError as error:
        shapes = sorted({tuple(tensor.shape[dim:]) for tensor in tensors})
        raise BadInput(
            f"site {name!r} has another shape in every particle ({shapes[0]} and {shapes[-1]}), so that they cannot be"
            " joined; take num_particles=1"
        ) from error
