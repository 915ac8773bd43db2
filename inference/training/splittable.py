"""Checks whether a model and guide can be split by rows, and whether a loss is a sum over the parts."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import pyro
import torch
from pyro.infer import ELBO, Trace_ELBO, TraceMeanField_ELBO
from torch import Tensor, nn

from ...errors import PROGRAM, BadInput, GumboError, UnsupportedSite, first_line
from ..elbo import SiteELBO, SiteELBOModule
from ..engine.looks import looking, off_zero, one_particle
from ..engine.programs import Program
from ..engine.records import Run, Site
from ..engine.rows import Rows
from ..engine.scopes import evaluating
from ..estimators._base import Draw, Estimator
from ..estimators._distributions import has_score_term
from ..stock import TraceEnumELBO


@dataclass(frozen=True)
class Study:
    """What splitting needs to know of a program: the plate over the rows, and whether it scales by their number."""

    plate: str
    scaled: bool
    run: Run

    def has_rows(self, site: Site) -> bool:
        return any(name == self.plate for name, _, _ in site.frames)


def study(model: nn.Module, guide: nn.Module, batch: Rows) -> Study:
    """Find the plate over the rows, and check that the terms of a row do not depend on other rows.

    The programs run on all rows, and on a part of them with the same draws; all log-probabilities are compared.

    Raises :class:`~gumbo.errors.BadInput` where no plate has the size of the rows, and
    :class:`~gumbo.errors.UnsupportedSite` where a site or a layer such as BatchNorm mixes rows.
    """
    for program in (model, guide):
        for name, module in program.named_modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                raise UnsupportedSite(
                    f"layer {name!r} ({type(module).__name__}) mixes the rows of a batch, which several processes hold "
                    "in parts: use LayerNorm or GroupNorm, or one process"
                )
    if len(batch) < 2:
        raise BadInput("a batch of 1 row cannot be split over several processes: raise batch_size, or use one process")
    part = batch[: len(batch) // 2 + 1] if len(batch) > 2 else batch[:1]
    sizes = len(batch), len(part)
    with pyro.get_param_store().scope({"params": {}, "constraints": {}}), looking(model, guide, *batch.args):
        program = one_particle(model, guide)
        first = program.run(batch.args, batch.kwargs)
        with off_zero(program, batch.args, batch.kwargs, first) as full:
            if full.eliminated:  # a first run draws the sites that later runs sum out
                full = program.run(batch.args, batch.kwargs, fixed=_draws(full))
            plate = _plate_over_rows(full, _on_part(program, part, sizes, None), sizes)
            found = Study(plate, False, full)
            fixed = {site.name: _first_rows(site, plate, sizes) for site in full.guide if site.random}
            some = _on_part(program, part, sizes, fixed)
            found = Study(plate, _scaled(found, some, sizes), full)
            difference = _difference(found, full, some, sizes)
            if difference is not None:
                # Layers with random noise (dropout) differ between any two runs: compare without it.
                with evaluating(model, guide):
                    full = program.run(batch.args, batch.kwargs, fixed=_draws(full))
                    some = _on_part(program, part, sizes, fixed)
                    difference = _difference(found, full, some, sizes)
    if difference is not None:
        raise UnsupportedSite(
            difference,
            reason="its log-probability of a row depends on other rows, and several processes hold a part of the "
            "rows each: keep the rows apart, or use one process",
        )
    _refuse_late_sites(found)
    return found


def _draws(run: Run) -> dict[str, Draw]:
    return {site.name: Draw(site.value) for site in run.guide if site.random}


def _on_part(program: Program, part: Rows, sizes: tuple[int, int], fixed: dict[str, Draw] | None) -> Run:
    try:
        return program.run(part.args, part.kwargs, fixed=fixed)
    except GumboError:
        raise
    except (RuntimeError, ValueError, IndexError) as error:
        raise BadInput(
            f"model and guide take {sizes[0]} rows and not {sizes[1]} of them ({first_line(error)}): several processes "
            "hold a part of a batch each, so the plate over the rows must follow their number"
        ) from error


def _plate_over_rows(full: Run, part: Run, sizes: tuple[int, int]) -> str:
    whole, some = (
        {name for site in run.sites for name, _, count in site.frames if count == size}
        for run, size in zip((full, part), sizes, strict=True)
    )
    names = sorted(whole & some)
    if len(names) != 1:
        found = f"these do: {', '.join(names)}" if names else "none does"
        raise BadInput(
            f"several processes split a batch along the one plate that has as many elements as there are rows; {found}"
        )
    return names[0]


def _first_rows(site: Site, plate: str, sizes: tuple[int, int]) -> Draw:
    """The draws of the first rows; a draw outside the plate is unchanged."""
    for name, dim, _ in site.frames:
        along = dim - site.fn.event_dim
        if name == plate and site.value.dim() >= -along and site.value.shape[along] == sizes[0]:
            return Draw(site.value.narrow(along, 0, sizes[1]))
    return Draw(site.value)


def _scaled(found: Study, part: Run, sizes: tuple[int, int]) -> bool:
    """Whether the scale of the rows' terms is inverse to their number, as for a subsample."""
    answers = set()
    for site, other in _pairs(found.run, part):
        if not found.has_rows(site) or site.settled:
            continue
        whole, some = (_number(each.scale) for each in (site, other))
        if whole is None or some is None or whole == 0.0:
            continue
        if math.isclose(whole, some, rel_tol=1e-6):
            answers.add(False)
        elif math.isclose(whole * sizes[0], some * sizes[1], rel_tol=1e-6):
            answers.add(True)
        else:
            raise UnsupportedSite(
                site.name, reason=f"its scale is {whole} for {sizes[0]} rows and {some} for {sizes[1]}"
            )
    if len(answers) > 1:
        raise UnsupportedSite(
            PROGRAM, reason=f"some sites in plate {found.plate!r} are scaled by the number of rows and others are not"
        )
    return answers == {True}


def _number(scale: Any) -> float | None:
    if isinstance(scale, Tensor):
        return scale.item() if scale.numel() == 1 else None
    return float(scale)


def _pairs(full: Run, part: Run) -> Iterator[tuple[Site, Site]]:
    for sites, others in ((full.guide, part.guide), (full.model, part.model)):
        named = {other.name: other for other in others}
        for site in sites:
            if site.name not in named:
                raise UnsupportedSite(site.name, reason="it exists for some batch sizes only")
            yield site, named[site.name]


def _difference(found: Study, full: Run, part: Run, sizes: tuple[int, int]) -> str | None:
    """The first site whose log-probability changes when the batch has fewer rows."""
    for site, other in _pairs(full, part):
        if site.settled:
            continue
        want, got = site.log_prob.detach(), other.log_prob.detach()
        for name, dim, _ in site.frames:
            if name == found.plate:
                want = want.narrow(dim, 0, sizes[1]) if want.shape[dim] == sizes[0] else want
                got = got * (sizes[1] / sizes[0]) if found.scaled else got
        want, got = torch.broadcast_tensors(want, got)
        finite = want[want.isfinite()]
        size = finite.abs().max().item() if finite.numel() else 0.0
        tolerance = (1e-9 if want.dtype == torch.float64 else 1e-4) * (1 + size)
        if not torch.allclose(want, got, rtol=0.0, atol=tolerance, equal_nan=True):
            return site.name
    return None


def _refuse_late_sites(found: Study) -> None:
    """A site outside the plate that follows draws of rows may depend on all of them."""
    for sites in (found.run.guide, found.run.model):
        met = None
        for site in sites:
            if found.has_rows(site):
                met = met or (site.name if site.random else None)
            elif met is not None and not site.settled:
                raise UnsupportedSite(
                    site.name,
                    reason=f"it is outside plate {found.plate!r} and after site {met!r} in it, so that it may "
                    "depend on rows that another process holds: sample it before the plate, or use one process",
                )


def refuse(loss: ELBO, module: nn.Module, found: Study) -> None:
    """Refuse a loss whose weights or costs span all rows in a way that a sum of gradients cannot give."""
    if isinstance(loss, SiteELBO) and isinstance(module, SiteELBOModule):
        _refuse_site_elbo(loss, module.binding.chosen, found, module.binding.vectorized)
    else:
        _refuse_stock(loss, found)


def _refuse_site_elbo(loss: SiteELBO, chosen: Mapping[str, Estimator], found: Study, vectorized: bool) -> None:
    outside = [site.name for site in found.run.sites if not site.settled and not found.has_rows(site)]
    if not loss.target.sums_over_rows:
        raise UnsupportedSite(
            f"objective {loss.objective!r} is not known to be a sum over rows, and several processes add their"
            " gradients up: take objective='elbo', or use one process"
        )
    if loss.target.weighs_rows:
        if loss.plates == "ignore":
            raise UnsupportedSite(
                f"objective {loss.objective!r} with plates='ignore' has one weight for all rows, which several "
                "processes hold in parts: use one process"
            )
        if outside:
            raise UnsupportedSite(
                outside[0],
                reason=f"it is outside plate {found.plate!r}, so that under objective {loss.objective!r} one "
                "weight spans the rows of all processes: take objective='elbo', or use one process",
            )
    for site in found.run.guide:
        if site.factor or (not site.settled and site.latent and has_score_term(site.fn)):
            raise UnsupportedSite(site.name, reason="it has a score term of its own (score_parts): use one process")
    with_rows = {site.name for site in found.run.model if found.has_rows(site)}
    for site in found.run.model:
        if not found.has_rows(site) and with_rows.intersection(site.sums):
            raise UnsupportedSite(
                found.run.eliminated[0],
                reason=f"the model sums over it outside plate {found.plate!r}, and the sum is no sum over the rows that"
                " several processes hold in parts: use one process, or draw it in the guide",
            )
    local = {site.name for site in found.run.guide if found.has_rows(site)}
    mixing = [site.name for site in found.run.model if site.settled and not site.latent and not found.has_rows(site)]
    for name, estimator in chosen.items():
        weighs = type(estimator).surrogate is not Estimator.surrogate
        reason = None
        if name not in local:
            if weighs and estimator.needs_relaxed_model:
                reason = f"it is outside plate {found.plate!r}, and the slope of its cost spans all processes"
        elif estimator.enumerates and not vectorized:
            reason = "without vectorized particles the rows of all processes are enumerated together"
        elif (weighs or estimator.enumerates) and loss.plates == "ignore":
            reason = "with plates='ignore' its cost spans the rows of all processes"
        elif weighs and mixing and _comes_after_rows(mixing[0], found):
            reason = f"deterministic site {mixing[0]!r} outside plate {found.plate!r} may mix the rows of all processes"
        if reason is not None:
            raise UnsupportedSite(name, estimator.name, f"{reason}; use one process, or another estimator")


def _comes_after_rows(name: str, found: Study) -> bool:
    for site in found.run.model:
        if site.name == name:
            return False
        if site.latent and found.has_rows(site):
            return True
    return False


def _refuse_stock(loss: ELBO, found: Study) -> None:
    outside = [site.name for site in found.run.sites if not site.settled and not found.has_rows(site)]
    drawn = [
        site.name
        for site in found.run.guide
        if site.random and found.has_rows(site) and not getattr(site.fn, "has_rsample", False)
    ]
    name = type(loss).__name__
    if type(loss) not in (Trace_ELBO, TraceMeanField_ELBO, TraceEnumELBO):
        raise UnsupportedSite(
            f"{name} is not known to be a sum over rows, and several processes add their gradients up: use SiteELBO "
            "or its words, or one process"
        )
    if outside and (type(loss) is TraceEnumELBO or drawn):
        raise UnsupportedSite(
            outside[0],
            reason=f"it is outside plate {found.plate!r}, and {name} multiplies its terms into the costs of rows "
            "that several processes hold in parts: take an estimator of SiteELBO, or use one process",
        )
