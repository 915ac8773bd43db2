"""The check whether the rows of a plate are independent, as the plate declares.

A layer such as BatchNorm, or a mean over a plate, makes rows dependent that ``pyro.plate`` declares independent. The
terms of one row are then not the whole cost of its draw.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pyro
import torch
from torch import Tensor

from ...errors import BadInput
from ..estimators._base import Draw, detached_draw
from ..estimators._distributions import coordinate_values, elementary
from .programs import Program
from .records import Frame, Run, Site


def mixed_plates(program: Program, args: tuple, kwargs: Mapping[str, Any]) -> frozenset[str]:
    """The names of the plates in which a change of one row's draws changes another row's terms.

    The draws of the first, the last and a random row are changed, with all other draws and the programs' own noise
    fixed; then again with all other draws replaced. Every other row's log-probabilities are compared bit for bit. The
    check can find dependence; it cannot prove independence: a program may combine rows at other values, or other rows.

    Args:
        program: one particle of the programs without estimators, with their own noise separate. The run changes random
            state and buffers: the caller restores them.
        args, kwargs: the programs' arguments.
    """
    first = program.run(args, kwargs)
    drawn = {site.name: site for site in first.guide if site.latent and not site.settled}
    plates = sorted({frame for site in drawn.values() for frame in site.frames if frame[2] > 1})
    if not plates:
        return frozenset()

    program.skips_unscored = True  # some flows cannot score a value that they did not draw

    def again(draws: Mapping[str, Tensor]) -> Run | None:
        fixed = {name: Draw(value.detach().clone()) for name, value in draws.items()}
        try:
            # With another draw upstream, a value may be outside its distribution's support.
            with pyro.validation_enabled(False):
                return program.run(args, kwargs, fixed=fixed, subsamples=dict(first.subsamples), noise=first.noise)
        except BadInput:
            return None

    values = {name: site.value.detach() for name, site in drawn.items()}
    others = {name: another_value(site) for name, site in drawn.items()}
    found: set[str] = set()
    # Rows that depend on each other at some values only (a product of Bernoullis) show in one of the directions.
    for here, there in ((values, others), (others, values)):
        as_drawn = again(here)
        for plate in plates:
            if plate[0] in found:
                continue
            for row in sorted({0, plate[2] - 1, int(torch.randint(plate[2], ()))}):
                changed = {name: _with_row(drawn[name], here[name], there[name], plate, row) for name in drawn}
                # Some kernels are not deterministic; their differences are ignored.
                if _reaches(again(changed), as_drawn, plate, row, None) and _reaches(
                    again(changed), as_drawn, plate, row, again(here)
                ):
                    found.add(plate[0])
                    break
    return frozenset(found)


def another_value(site: Site) -> Tensor:
    """For every element of a site another value in its distribution's support, if there is one."""
    fn, value = site.fn, site.value.detach()
    listed = coordinate_values(fn)
    if isinstance(listed, str):
        return _redrawn(fn, value)
    element_dim = listed.dim() - 1
    base = elementary(fn)
    log_q = base.log_prob(listed.reshape(listed.shape[:1] + (1,) * len(base.batch_shape) + listed.shape[1:])).detach()
    coordinates = value.shape[: value.dim() - element_dim]
    # The elementary distribution of an expanded one has fewer batch dimensions.
    log_q = log_q.reshape(log_q.shape[:1] + (1,) * (1 + len(coordinates) - log_q.dim()) + log_q.shape[1:])
    log_q = log_q.expand(listed.shape[:1] + coordinates)
    here = value == listed.reshape(listed.shape[:1] + (1,) * len(coordinates) + listed.shape[1:])
    here = here.flatten(-element_dim).all(-1) if element_dim else here
    log_q = log_q.masked_fill(here, -torch.inf)
    best = log_q.max(0)
    possible = best.values > -torch.inf
    return torch.where(possible.reshape(coordinates + (1,) * element_dim), listed[best.indices].to(value.dtype), value)


def _redrawn(fn: Any, value: Tensor, tries: int = 8) -> Tensor:
    other = value
    for _ in range(tries):
        drawn = detached_draw(fn).value.expand(value.shape)
        same = (other == value).reshape(value.shape[: value.dim() - fn.event_dim] + (-1,)).all(-1)
        other = torch.where(same.reshape(same.shape + (1,) * fn.event_dim), drawn, other)
    return other


def _with_row(site: Site, value: Tensor, other: Tensor, plate: Frame, row: int) -> Tensor:
    along = plate[1] - site.fn.event_dim
    if plate not in site.frames or value.dim() < -along or value.shape[along] != plate[2]:
        return value
    value = value.clone()
    value.select(along, row).copy_(other.select(along, row))
    return value


def _reaches(changed: Run | None, as_drawn: Run | None, plate: Frame, row: int, repeated: Run | None) -> bool:
    """Whether a change of one row changes another row's terms, beyond the differences of a repetition."""
    if changed is None or as_drawn is None:
        return False
    _, dim, size = plate
    for which in ("guide", "model"):
        after = {site.name: site.log_prob.detach() for site in getattr(changed, which)}
        twice = {site.name: site.log_prob.detach() for site in getattr(repeated or as_drawn, which)}
        for site in getattr(as_drawn, which):
            before = site.log_prob.detach()
            a, b = after.get(site.name), twice.get(site.name)
            if plate not in site.frames or before.shape[dim] != size:
                continue
            if a is None or b is None or not a.shape == b.shape == before.shape:
                continue  # the site exists for some draws only
            rows = torch.arange(size, device=before.device) != row
            gap = _gap(a, before).transpose(dim, -1)[..., rows]
            if gap.numel() and (gap > 10 * _gap(b, before).max()).any():
                return True
    return False


def _gap(a: Tensor, b: Tensor) -> Tensor:
    """The difference of two terms; zero for equal infinities, and for two NaNs."""
    same = (a == b) | (a.isnan() & b.isnan())
    return torch.where(same, torch.zeros_like(a), torch.nan_to_num((a - b).abs(), nan=torch.inf))
