"""The check whether many particles at once have the log-probabilities of single ones."""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import pyro
import torch
from torch import Tensor

from ...errors import ANY, PROGRAM, CannotVectorize, GumboError, UnsupportedSite, first_line
from ..estimators._base import Draw
from ..estimators._distributions import is_deterministic, is_discrete
from .elimination import NeedsListing
from .mixing import another_value
from .programs import Misfit, Program
from .records import Run, Site
from .scopes import evaluating
from .streams import OwnNoise
from .terms import NeedsJoint, summed_to

FEW = 4  # up to so many particles, each is compared; of more, the first and the last


def check_at_once(program: Program, seen: Run, args: tuple, kwargs: Mapping[str, Any]) -> None:
    """Run many particles at once and compare some of them with single particles; ``seen`` is a run of one.

    Where the programs' own noise has another shape in the two, modules are compared in evaluation mode.
    """
    try:
        ((run,),) = program.runs(args, kwargs)
    except Misfit as error:
        raise _fails_vectorized(error) from error
    except (GumboError, NeedsJoint, NeedsListing):
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
    """Replay particles of a vectorized run alone and compare the log-probabilities of each site.

    A statement that reads another particle's value is not detected where the two values are equal. Discrete sites are
    therefore set to other values too.
    """
    if (stray := _stray_dimension(program, run)) is not None:
        raise does_not_vectorize(*stray)
    particles, last = -1 - program.max_plate_nesting, program.num_particles - 1
    some = range(last) if last < FEW else range(1)
    _compare(program, run, seen, args, kwargs, [*_places(program), *({particles: i} for i in some)])
    names = [site.name for site in run.guide if _repeats_values(program, site)] if last else []
    if not names:
        return
    forced = copy.copy(program)
    forced.skips_unscored = True
    forced.resolve = lambda msg: None if msg["name"] in names else program.resolve(msg)
    for fixed in _other_draws(program, run, names):
        try:
            with pyro.validation_enabled(False), torch.enable_grad():
                again = forced.run(args, kwargs, fixed=fixed, subsamples=dict(run.subsamples), noise=run.noise)
                _compare(forced, again, seen, args, kwargs, [{}, {particles: 0}])
        except (CannotVectorize, NoisyProgram):
            raise
        except Exception:  # at values that were not drawn, a program may fail, alone as well
            return


def _compare(
    program: Program, run: Run, seen: Run, args: tuple, kwargs: Mapping[str, Any], places: Sequence[Mapping[int, int]]
) -> None:
    alone = copy.copy(program)
    alone.num_particles, alone.vectorized, alone.skips_unscored = 1, False, True
    for place in places:
        fixed = _one_of(run, seen, program.max_plate_nesting, place)
        # Gradients are enabled for programs that call autograd inside.
        with torch.enable_grad():
            single = alone.run(args, kwargs, fixed=fixed, subsamples=dict(run.subsamples), noise=run.noise)
        difference = _difference(run, single, program.max_plate_nesting, place)
        if difference is None:
            continue
        if run.noise.drew:  # possibly in another shape, which prevents a comparison
            raise NoisyProgram
        raise does_not_vectorize(*difference)


def _repeats_values(program: Program, site: Site) -> bool:
    """Whether particles draw a site each for itself, from values that they may have in common."""
    if not site.latent or site.settled or site.enum_dim is not None or not is_discrete(site.fn):
        return False
    along = -1 - program.max_plate_nesting - site.fn.event_dim
    return site.value.dim() >= -along and site.value.shape[along] == program.num_particles


def _other_draws(program: Program, run: Run, names: Collection[str]) -> Iterator[dict[str, Draw]]:
    """The draws of a run with other values of some sites: those of the first particle for all, then for half of them.

    The other half has other values, so that the first and the last particle differ in every element.
    """
    for differ in (False, True):
        fixed = {}
        for site in run.guide:
            # A Delta is computed anew: its point may follow the other values.
            if not site.latent or site.enum_dim is not None or is_deterministic(site.fn):
                continue
            fixed[site.name] = site.draw.map(lambda t: t.detach().requires_grad_(t.requires_grad))
            if site.name in names:
                along = -1 - program.max_plate_nesting - site.fn.event_dim
                value = site.value.detach().narrow(along, 0, 1).expand(site.value.shape).clone()
                if differ:
                    half = program.num_particles // 2
                    other = another_value(replace(site, value=value))
                    value.narrow(along, half, program.num_particles - half).copy_(
                        other.narrow(along, half, program.num_particles - half)
                    )
                fixed[site.name] = Draw(value)
        yield fixed


def _places(program: Program) -> list[dict[int, int]]:
    """Positions along the dimensions of enumerated values: the last of all, and combinations of first and last.

    A statement that moves one dimension onto another (an ``unsqueeze``, a sum) is not detected where both are at the
    same position. Any two dimensions differ in one of these; the particles' dimension is at the last in all.
    """
    dims = sorted(program.enum_dims.values(), reverse=True)
    bits = range(len(dims).bit_length())
    mixtures = [{dim: 0 for i, dim in enumerate(dims, start=1) if i >> bit & 1} for bit in bits]
    return [{}, *mixtures]


def check_listed(
    program: Program, seen: Run, args: tuple, kwargs: Mapping[str, Any], chains: Collection[str] = ()
) -> tuple[str, str, list[str]] | None:
    """Compare the log-probabilities of each statement at all enumerated values with those at single values.

    The values are those of ``seen``, in which the model drew its enumerated sites and the guide its ``chains``, and
    others. Rows of a plate take different values, so that dependence between rows is detected too.

    Returns:
        The first statement that differs, how, and the enumerated sites that it depends on; None if all agree.
    """
    for changed in (False, True):
        sites = [site for site in seen.model if site.name in seen.eliminated]
        sites += [site for site in seen.guide if site.name in chains]
        values = {site.name: _other_values(site) if changed else site.value.detach() for site in sites}
        found = _listed_difference(program, seen, values, args, kwargs)
        if found is not None and program.generators is not None and found[3].drew:
            # Layers with random noise draw it in another shape for many values.
            with evaluating(program.model, program.guide):
                found = _listed_difference(program, seen, values, args, kwargs)
        if found is not None:
            return found[:3]
    return None


def _other_values(site: Site) -> Tensor:
    """Other values for half of a site's elements."""
    other = another_value(site)
    batch = site.value.shape[: site.value.dim() - site.fn.event_dim]
    half = torch.rand(batch, device=site.value.device) < 0.5 if batch else torch.tensor(True, device=site.value.device)
    return torch.where(half.reshape(half.shape + (1,) * site.fn.event_dim), other, site.value)


def _listed_difference(
    program: Program, seen: Run, values: Mapping[str, Tensor], args: tuple, kwargs: Mapping[str, Any]
) -> tuple[str, str, list[str], OwnNoise] | None:
    draws = {site.name: Draw(values.get(site.name, site.value.detach())) for site in seen.guide if site.latent}
    options: dict[str, Any] = {"fixed": draws, "subsamples": dict(seen.subsamples)}
    program.eliminates = False
    try:
        plain = program.run(args, kwargs, values=values, **options)
    finally:
        program.eliminates = True
    try:
        listed = program.run(args, kwargs, noise=plain.noise, **options)
    except (GumboError, NeedsJoint, NeedsListing):
        raise
    except (RuntimeError, ValueError, IndexError, TypeError, AssertionError) as error:
        names = ", ".join(map(repr, list(values)[:3]))
        raise UnsupportedSite(
            next(iter(values)),
            ANY,
            f"where the values of {names} lie along dimensions to the left the model fails with"
            f" {first_line(error, kind=True)}; {_LISTED_ADVICE}",
        ) from error
    by_name = {site.name: site for site in plain.model}
    in_guide = {site.name: site for site in plain.guide}
    at_all = [(terms.of_guide, *found) for terms in listed.terms for found in terms.at(values)]
    for of_guide, term, at_values in at_all:
        other = (in_guide if of_guide else by_name).get(term.site.name)
        if other is None:
            return term.site.name, "it is missing where its values are single ones", _depends(term, listed), plain.noise
        if other.score is not None:
            expected = summed_to(other.score, other.frames, term.site.frames)
        else:
            at_values, expected = term.scale * at_values, other.log_prob
        gap = _gap(at_values.detach(), expected.detach())
        if gap is not None:
            return (
                term.site.name,
                f"its log-probability differs by {gap:.3g} between all values at once and single ones",
                _depends(term, listed),
                plain.noise,
            )
    for site in listed.model:  # sites without a dimension of enumerated values
        other = by_name.get(site.name)
        gap = None if site.summed or other is None else _gap(site.log_prob.detach(), other.log_prob.detach())
        if gap is not None:
            reason = f"its log-probability differs by {gap:.3g} between all values at once and single ones"
            return site.name, reason, list(values), plain.noise
    return None


def _depends(term: Any, run: Run) -> list[str]:
    return [run.terms[0].listing.by_number[number].name for number in term.numbers]


_LISTED_ADVICE = (
    "index with pyro.ops.indexing.Vindex, let layers accept leading dimensions, raise pyro.markov(…, history=…) where"
    " an earlier site is read, or draw these sites in the guide"
)


def _stray_dimension(program: Program, run: Run) -> tuple[str, str] | None:
    """The first site with a leading dimension of neither particles nor enumerated values.

    An ``unsqueeze`` moves the particles there, where they would be counted as further particles and summed.
    """
    particles = -1 - program.max_plate_nesting
    known = {particles, *program.enum_dims.values()}
    for site in run.sites:
        shape = site.log_prob.shape
        for dim in range(-len(shape), -program.max_plate_nesting):
            size = 1 if dim != particles else program.num_particles
            if shape[dim] not in (1, size) and (dim == particles or dim not in known):
                return site.name, f"its log-probability {tuple(shape)} has dimension {dim} of its own"
    return None


class NoisyProgram(Exception):
    """Raised for layers with random noise (dropout), so that two runs on the same draws differ."""


def _at(tensor: Tensor, event_dim: int, max_plate_nesting: int, place: Mapping[int, int]) -> Tensor:
    """One particle at the given positions of particles and enumerated values, by default the last ones."""
    while (batch := tensor.dim() - event_dim) > max_plate_nesting:
        tensor = tensor[min(place.get(-batch, -1), len(tensor) - 1)]
    return tensor


def _one_of(run: Run, seen: Run, max_plate_nesting: int, place: Mapping[int, int]) -> dict[str, Draw]:
    shapes = {site.name: site.value.shape for site in seen.guide}
    fixed = {}
    for site in run.guide:
        # A Delta is computed anew: that of one particle may be rounded otherwise, and has no density beside its point.
        if site.latent and not is_deterministic(site.fn):
            event_dim = site.fn.event_dim
            draw = site.draw.map(
                lambda t, e=event_dim: _at(t, e, max_plate_nesting, place).detach().requires_grad_(t.requires_grad)
            )
            shape = shapes.get(site.name, draw.value.shape)
            if draw.value.numel() == shape.numel():
                draw = draw.map(lambda t, s=shape: t.reshape(s))
            elif site.enum_dim is not None:  # enumerated values have no plate dimensions, a single draw has
                draw = draw.map(lambda t, s=shape: t.expand(s))
            fixed[site.name] = draw
    return fixed


def _difference(run: Run, single: Run, max_plate_nesting: int, place: Mapping[int, int]) -> tuple[str, str] | None:
    """The first site whose log-probability differs between K particles and a single one, and how."""
    for many, one in ((run.guide, single.guide), (run.model, single.model)):
        by_name = {site.name: site for site in one}
        for site in many:
            if site.name not in by_name:
                return site.name, "it is missing when a particle runs alone"
            if not (site.scored and by_name[site.name].scored):
                continue
            a = _at(site.log_prob.detach(), 0, max_plate_nesting, place)
            b = _at(by_name[site.name].log_prob.detach(), 0, max_plate_nesting, {})
            gap = _gap(a, b)
            if gap is not None:
                return site.name, f"its log-probability differs by {gap:.3g} between many at once and one alone"
    return None


def _gap(a: Tensor, b: Tensor) -> float | None:
    """The difference of two tensors; None if it is rounding error."""
    tolerance = max(_tolerance(a), _tolerance(b))
    a, b = torch.broadcast_tensors(a.double(), b.double())
    size = b[b.isfinite()].abs().max().item() if b.isfinite().any() else 0.0
    if torch.allclose(a, b, rtol=0.0, atol=tolerance * (1 + size), equal_nan=True):
        return None
    return (a - b).abs().max().item()


def _tolerance(like: Tensor) -> float:
    if like.dtype == torch.float64:
        return 1e-9
    return 2e-3 if like.device.type == "cuda" or like.dtype != torch.float32 else 5e-5


def differs_listed(site: str, reason: str, listed: Sequence[str]) -> UnsupportedSite:
    names = ", ".join(map(repr, listed[:3]))
    return UnsupportedSite(site, ANY, f"{reason} of {names}, so that no sum over these is right; {_LISTED_ADVICE}")


def does_not_vectorize(site: str, reason: str) -> CannotVectorize:
    return CannotVectorize(
        site,
        ANY,
        f"the program does not vectorize over particles: {reason}; pass vectorize_particles=False,"
        " or let its layers accept leading dimensions",
    )


def _fails_vectorized(error: Exception) -> CannotVectorize:
    return does_not_vectorize(PROGRAM, f"with a leading dimension it fails with {first_line(error, kind=True)}")
