"""The check whether the rows of a plate are independent, as the plate declares.

A layer such as BatchNorm, or a mean over a plate, makes rows dependent that ``pyro.plate`` declares independent. The
terms of one row are then not the whole cost of its draw.
"""

from __future__ import annotations

import itertools
import math
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

FEW_ROWS, BLENDS = 8, 2  # plates of so few rows are changed from so many further pairs of draws


def mixed_plates(program: Program, first: Run, args: tuple, kwargs: Mapping[str, Any]) -> frozenset[str]:
    """The names of the plates in which a change of one row's draws changes another row's terms.

    The draws of some rows are changed, with all other draws and the programs' own noise fixed; then again with all
    other draws replaced, and for plates of few rows from further draws. The log-probabilities of the rows that are not
    changed are compared bit for bit. The rows are the first, the last, a random one, and groups such that for any two
    rows one of them has the first and not the second. The check can find dependence; it cannot prove independence: a
    program may combine rows at other values.

    Args:
        program: one particle of the programs without estimators, with their own noise separate. The run changes random
            state and buffers: the caller restores them.
        first: a run of it, whose draws are changed.
        args, kwargs: the programs' arguments.
    """
    drawn = {site.name: site for site in first.guide if site.random}
    plates = sorted({frame for site in drawn.values() for frame in site.frames if frame[2] > 1})
    if not plates:
        return frozenset()

    program.skips_unscored = True  # some flows cannot score a value that they did not draw
    program.redraws_misfits = True  # a plate may have another size at other draws
    # Other plates may have another size at other draws.
    rows = {frame[0] for frame in first.partial_plates} | first.partial_loops
    subsamples = {name: chosen for name, chosen in first.subsamples.items() if name in rows}

    def again(draws: Mapping[str, Tensor]) -> Run | None:
        fixed = {name: Draw(value.detach().clone()) for name, value in draws.items()}
        try:
            # With another draw upstream, a value may be outside its distribution's support.
            with pyro.validation_enabled(False):
                return program.run(args, kwargs, fixed=fixed, subsamples=dict(subsamples), noise=first.noise)
        except BadInput:
            return None

    values = {name: site.value.detach() for name, site in drawn.items()}
    others = {name: another_value(site) for name, site in drawn.items()}
    groups = {plate: _groups(plate[2]) for plate in plates}
    found: set[str] = set()
    # Rows that depend on each other at some values only (a product of Bernoullis) show in one of the directions. Few
    # rows have few values, which may all be others in both; they are changed from further ones too.
    pairs = [(values, others), *(_blend(drawn, values, others) for _ in range(BLENDS))]
    directions = [way for pair in pairs for way in (pair, pair[::-1])]
    for number, (here, there) in enumerate(directions):
        left = [plate for plate in plates if plate[0] not in found and (number < 2 or plate[2] <= FEW_ROWS)]
        if not left:
            continue
        as_drawn = again(here)
        # Sites that exist at these draws only are drawn now; a repetition keeps their draws.
        new = {} if as_drawn is None else _drawn(as_drawn)
        for plate in left:
            if plate[0] in found:  # as another frame of the same name
                continue
            for rows in groups[plate]:
                changed = {name: _with_rows(drawn[name], here[name], there[name], plate, rows) for name in drawn}
                same = {name for name in changed if name not in new or new[name].shape == changed[name].shape}
                changed = {**new, **{name: changed[name] for name in same}}
                # Some kernels are not deterministic; their differences are ignored.
                if _reaches(again(changed), as_drawn, plate, rows, None) and _reaches(
                    again(changed), as_drawn, plate, rows, again({**here, **new})
                ):
                    found.add(plate[0])
                    break
    return frozenset(found)


def _blend(
    drawn: Mapping[str, Site], values: Mapping[str, Tensor], others: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Each element from one of two sets of values at random, and from the other one."""
    one, two = {}, {}
    for name, site in drawn.items():
        event = site.fn.event_dim
        half = torch.rand(values[name].shape[: values[name].dim() - event]) < 0.5
        half = half.to(values[name].device).reshape(half.shape + (1,) * event)
        one[name] = torch.where(half, values[name], others[name])
        two[name] = torch.where(half, others[name], values[name])
    return one, two


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


def _drawn(run: Run) -> dict[str, Tensor]:
    return {site.name: site.value for site in run.guide if site.random}


def _groups(size: int) -> list[Tensor]:
    """Groups of rows to change, as booleans ``(size,)``: single rows, and a family that separates any two rows.

    A row's number is coded by a choice of half of m places, and each place has a group of the rows that choose it. No
    code holds another one, so that among any two rows each is in a group that lacks the other (Sperner 1928).
    """
    singles = sorted({0, size - 1, int(torch.randint(size, ()))})
    places = next(m for m in itertools.count(1) if math.comb(m, m // 2) >= size)
    if size <= len(singles) + places:
        return list(torch.eye(size, dtype=torch.bool))
    rows = torch.zeros(size, places, dtype=torch.bool)
    codes = itertools.islice(itertools.combinations(range(places), places // 2), size)
    rows[torch.arange(size).unsqueeze(-1), torch.tensor(list(codes))] = True
    family = rows[torch.randperm(size)].T
    return [torch.arange(size) == row for row in singles] + [group for group in family if group.any()]


def _with_rows(site: Site, value: Tensor, other: Tensor, plate: Frame, rows: Tensor) -> Tensor:
    along = plate[1] - site.fn.event_dim
    if plate not in site.frames or value.dim() < -along or value.shape[along] != plate[2]:
        return value
    return torch.where(rows.to(value.device).reshape((-1,) + (1,) * (-along - 1)), other, value)


def _reaches(changed: Run | None, as_drawn: Run | None, plate: Frame, group: Tensor, repeated: Run | None) -> bool:
    """Whether a change of some rows changes another row's terms, beyond the differences of a repetition."""
    if changed is None or as_drawn is None:
        return False
    rows = ~group
    for which in ("guide", "model"):
        runs = (as_drawn, changed, repeated or as_drawn)
        before, after, twice = (_by_row(getattr(run, which), plate) for run in runs)
        alone = []  # terms of one run only, or of another shape: a site or an inner plate's element that came or went
        for name in before.keys() | after.keys():
            terms = [found.get(name) for found in (before, after, twice)]
            if any(term is None for term in terms) or len({term.shape for term in terms}) > 1:
                alone.append(name)
                continue
            was, now, again = terms
            gap = _gap(now, was)[..., rows.to(was.device)]
            if gap.numel() and (gap > 10 * _gap(again, was).max()).any():
                return True
        if alone:
            # The total, since a term that is masked, or has only another name, leaves the rows as they were.
            was, now, again = (_total(found, alone, plate[2]) for found in (before, after, twice))
            rounding = 1e-5 * _total({name: term.abs() for name, term in before.items()}, alone, plate[2])
            if (_gap(now, was) > 10 * _gap(again, was).max() + torch.nan_to_num(rounding))[rows].any():
                return True
    return False


def _by_row(sites: list[Site], plate: Frame) -> dict[str, Tensor]:
    """The terms of the sites in a plate, by name, with the plate's rows as the last dimension."""
    found = {}
    for site in sites:
        dims = [dim for name, dim, size in site.frames if name == plate[0] and size == plate[2]]
        if dims and site.log_prob.shape[dims[0]] == plate[2]:
            found[site.name] = site.log_prob.detach().transpose(dims[0], -1)
    return found


def _total(terms: Mapping[str, Tensor], names: list[str], size: int) -> Tensor:
    rows = [terms[name].reshape(-1, size).sum(0).to("cpu", torch.float64) for name in names if name in terms]
    return torch.stack(rows).sum(0) if rows else torch.zeros(size, dtype=torch.float64)


def _gap(a: Tensor, b: Tensor) -> Tensor:
    """The difference of two terms; zero for equal infinities, and for two NaNs."""
    same = (a == b) | (a.isnan() & b.isnan())
    return torch.where(same, torch.zeros_like(a), torch.nan_to_num((a - b).abs(), nan=torch.inf))
