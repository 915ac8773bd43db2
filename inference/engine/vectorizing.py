"""Whether a program means the same for many particles at once as for one alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ...errors import ANY, PROGRAM, CannotVectorize, GumboError, first_line
from ..estimators._base import Draw
from .programs import Misfit, Program
from .records import Run
from .scopes import evaluating


def check_at_once(program: Program, seen: Run, args: tuple, kwargs: Mapping[str, Any]) -> None:
    """Run many particles at once and hold one of them against a particle alone; ``seen`` is a run of one.

    Where noise of the programs' own has another shape in the two, modules are compared in evaluation mode.
    """
    try:
        ((run,),) = program.runs(args, kwargs)
    except Misfit as error:
        raise _fails_vectorized(error) from error
    except GumboError:
        raise
    except Exception as error:
        raise _fails_vectorized(error) from error
    try:
        check_vectorized(program, run, seen, args, kwargs)
    except NoisyProgram:
        with evaluating(program.model, program.guide):
            ((run,),) = program.runs(args, kwargs)
            try:
                check_vectorized(program, run, seen, args, kwargs)
            except NoisyProgram:
                raise does_not_vectorize(
                    PROGRAM, "two runs on the same draws differ, so that nothing can be compared"
                ) from None


def check_vectorized(program: Program, run: Run, seen: Run, args: tuple, kwargs: Mapping[str, Any]) -> None:
    """Replay one particle of a vectorized run on its own and compare what each site says of it."""
    alone = Program(
        program.model,
        program.guide,
        resolve=program.resolve,
        num_particles=1,
        max_plate_nesting=program.max_plate_nesting,
        vectorized=False,
        step=program.step,
        generators=program.generators,
    )
    alone.skips_unscored = True
    if (stray := _stray_dimension(program, run)) is not None:
        raise does_not_vectorize(*stray)
    fixed = _last_particle(run, seen, program.max_plate_nesting)
    # Gradients are on, for programs that call autograd inside.
    with torch.enable_grad():
        single = alone.run(args, kwargs, fixed=fixed, subsamples=dict(run.subsamples), noise=run.noise)
    difference = _difference(run, single, program.max_plate_nesting)
    if difference is None:
        return
    if run.noise.drew:  # perhaps in another shape, with which nothing can be compared
        raise NoisyProgram
    raise does_not_vectorize(*difference)


def _stray_dimension(program: Program, run: Run) -> tuple[str, str] | None:
    """The first site with a dimension to the left that belongs neither to particles nor to enumerated values.

    An ``unsqueeze`` moves the particles there, where they would be taken for more of them and summed.
    """
    known = {-1 - program.max_plate_nesting, *program.enum_dims.values()}
    for site in run.sites:
        shape = site.log_prob.shape
        for dim in range(-len(shape), -program.max_plate_nesting):
            if shape[dim] > 1 and dim not in known:
                return site.name, f"its log-probability {tuple(shape)} has dimension {dim} of its own"
    return None


class NoisyProgram(Exception):
    """A program whose layers draw noise of their own (dropout), so that two runs on the same draws differ."""


def _last(tensor: Tensor, event_dim: int, max_plate_nesting: int) -> Tensor:
    """The last particle, and the last of each enumerated value."""
    while tensor.dim() - event_dim > max_plate_nesting:
        tensor = tensor[-1]
    return tensor


def _last_particle(run: Run, seen: Run, max_plate_nesting: int) -> dict[str, Draw]:
    shapes = {site.name: site.value.shape for site in seen.guide}
    fixed = {}
    for site in run.guide:
        if site.latent:
            event_dim = site.fn.event_dim
            draw = site.draw.map(
                lambda t, e=event_dim: _last(t, e, max_plate_nesting).detach().requires_grad_(t.requires_grad)
            )
            shape = shapes.get(site.name, draw.value.shape)
            if draw.value.numel() == shape.numel():
                draw = draw.map(lambda t, s=shape: t.reshape(s))
            fixed[site.name] = draw
    return fixed


def _difference(run: Run, single: Run, max_plate_nesting: int) -> tuple[str, str] | None:
    """The first site that says one thing among K particles and another alone, and how."""
    for many, one in ((run.guide, single.guide), (run.model, single.model)):
        by_name = {site.name: site for site in one}
        for site in many:
            if site.name not in by_name:
                return site.name, "it is missing when a particle runs alone"
            if not (site.scored and by_name[site.name].scored):
                continue
            a = _last(site.log_prob.detach(), 0, max_plate_nesting)
            b = _last(by_name[site.name].log_prob.detach(), 0, max_plate_nesting)
            a, b = torch.broadcast_tensors(a, b)
            size = b[b.isfinite()].abs().max().item() if b.isfinite().any() else 0.0
            if not torch.allclose(a, b, rtol=0.0, atol=_tolerance(b) * (1 + size), equal_nan=True):
                gap = (a - b).abs().max().item()
                return site.name, f"its log-probability differs by {gap:.3g} between many at once and one alone"
    return None


def _tolerance(like: Tensor) -> float:
    if like.dtype == torch.float64:
        return 1e-9
    return 2e-3 if like.device.type == "cuda" or like.dtype != torch.float32 else 5e-5


def does_not_vectorize(site: str, reason: str) -> CannotVectorize:
    return CannotVectorize(
        site,
        ANY,
        f"the program does not vectorize over particles: {reason}; pass vectorize_particles=False,"
        " or let its layers accept leading dimensions",
    )


def _fails_vectorized(error: Exception) -> CannotVectorize:
    return does_not_vectorize(PROGRAM, f"with a leading dimension it fails with {first_line(error, kind=True)}")
