"""The structure of a pair of programs: sites and their layouts, plates, rows, data."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import cached_property
from typing import Any, TypeVar

import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.poutine.trace_struct import Trace
from pyro.poutine.util import site_is_subsample

from ...errors import PROGRAM_ERRORS, BadInput, GumboError, GumboWarning, UnsupportedSite, first_line, rows_in_plates
from ..engine.auxiliary import REMEDY, undetermined
from ..engine.handlers import check_law, row_numbers
from ..engine.interventions import ChosenRows, GivenValues
from ..engine.looks import plates_mixed_by
from ..engine.messenger_guides import as_program
from ..engine.programs import check_observed, outside_plates
from ..engine.rows import Rows, about_arguments
from ..engine.scopes import device_of, quietly
from ..estimators._distributions import (
    describe,
    elementary,
    is_deterministic,
    support_of,
    why_other_draws,
    without_to_event,
)
from .checks import check_invertible
from .enumerated import completed
from .own_laws import why_not_own_law
from .points import moved_by_draws, points_of
from .sites import SiteLayout, discrete_values, has_rows, kind_of, lengths_of, why_undrawable
from .superfluous import superfluous_latents
from .vmapped import Seen, random_sites, scale_of, unmasked

Whole = TypeVar("Whole", bound="Survey")
# Their log-density is periodic, so that values a whole turn apart are the same value.
_ANGLES = (torch.distributions.VonMises, dist.SineBivariateVonMises, dist.SineSkewed)


class Survey:
    """A model and a guide on their arguments: sites, plates, rows, and which latents belong to one datum.

    Attributes:
        guide: the guide, completed by the sites that the model enumerates (``summed_out``).
        guide_sites, model_sites: the layout of each site, by name.
        sizes, full_sizes: the number of rows at hand in each plate, and the size of the whole plate that it scales to.
        swept: plates that are visited in blocks, with the rows per block.
        at_hand: subsampling plates that receive a batch instead, with its number of rows.
        row_ids: the index of each row, by plate.
        depth: the number of batch dimensions of the programs.
        transformed: sites that the latents determine, with a density of their own, as some reparameterizations of Pyro
            leave them.
        angles: latents whose values a whole turn apart are the same.
        undrawable: sites of the model whose distribution has no draws, and a phrase that says why.
        other_draws: sites of the model whose draws are of another law than their density, and why.
        unweighable: sites of the guide whose draws have no right importance weight, and why.
        points: latents at which the guide is a point, without a density, and what it does there.
        superfluous: sites of the guide with elements that the named site of the model masks, and on which nothing in
            it depends: log q leaves them out.
        scaled: sites with a `poutine.scale` of their own, as (program, name); empty where all sites have the same.
        scored: whether the data are scored, and not only drawn anew, so that they are checked.

    Raises:
        BadInput: programs that fail on the arguments, or a latent that only one program draws.
    """

    def __init__(
        self,
        model: Callable,
        guide: Callable,
        args: tuple,
        kwargs: Mapping[str, Any],
        latents_needed: bool = True,
        scored: bool = True,
    ):
        self.latents_needed, self.scored = latents_needed, scored
        self.model, self.guide, self.args, self.kwargs = model, as_program(guide), args, dict(kwargs)
        self.device = device_of(model, guide)
        self.row_ids: dict[str, torch.Tensor] = {}
        self.sizes: dict[str, int] = {}
        self.full_sizes: dict[str, int] = {}
        self.swept: dict[str, int] = {}
        self.at_hand: dict[str, torch.Tensor] = {}
        self.depth = 0
        self.summed_out: frozenset[str] = frozenset()
        self.transformed: frozenset[str] = frozenset()
        with quietly(model, guide, None):
            self._discover()

    def _discover(self) -> None:
        guide, model, rows, random = self._run_once()
        whole = completed(self.model, self.guide, guide, model)
        if whole is not self.guide:
            self.guide, self.summed_out = whole, frozenset(whole.sites)
            return self._discover()
        with ChosenRows(rows), suppress(*PROGRAM_ERRORS):  # of a model without gradients, which has no such sites
            self.transformed = moved_by_draws(lambda: self.model(*self.args, **self.kwargs), guide, model)
        self._find_plates(guide, model, rows, random)
        self.guide_sites = {name: self._layout(name, site) for name, site in random_sites(guide)}
        self.model_sites = {name: self._layout(name, site) for name, site in random_sites(model)}
        self._check(guide, model)
        self._find_latents(guide, model, rows)
        observed = [name for name, layout in self.model_sites.items() if layout.kind == "observed"]
        self.observed_values = {name: model.nodes[name]["value"].detach() for name in observed}
        masked = frozenset(name for name in self.model_sites if unmasked(model.nodes[name]) is not None)
        self.masked, self.masked_latents = masked & frozenset(observed), masked & self.supports.keys()
        self._find_scales(guide, model)
        self.superfluous = self._superfluous() if self.masked_latents else {}
        if self.scored:
            for name in observed:
                self._check_data(model.nodes[name])

    def _run_once(self) -> tuple[Trace, Trace, dict[str, torch.Tensor], Collection[str]]:
        """The traces of the guide, and of the model at its draws; the rows of the guide's plates; which were random."""
        subsamples = ChosenRows({})
        try:
            with rows_in_plates(), subsamples:
                guide = poutine.trace(self.guide).get_trace(*self.args, **self.kwargs)
            rows = {
                name: row_numbers(name, site["value"])
                for name, site in guide.nodes.items()
                if site["type"] == "sample" and site_is_subsample(site)
            }
            subsamples.rows = rows
            with subsamples, GivenValues({name: site["value"] for name, site in random_sites(guide)}):
                model = poutine.trace(self.model).get_trace(*self.args, **self.kwargs)
        except GumboError:
            raise
        except PROGRAM_ERRORS as error:
            self._check_arguments()
            said = f"{first_line(error, kind=True)}{about_arguments(error)}"
            raise BadInput(f"the programs fail on these arguments: {said}") from error
        for trace in (guide, model):
            for name, site in random_sites(trace):
                check_law(name, site["fn"])
        _check_order(guide, model)
        return guide, model, rows, subsamples.random

    def _find_plates(
        self, guide: Trace, model: Trace, rows: Mapping[str, torch.Tensor], random: Collection[str]
    ) -> None:
        """Sizes and rows of all plates, and the number of batch dimensions."""
        held = {name: site["value"] for name, site in random_sites(guide)}
        open_ended = lengths_of(guide, model)
        for trace in (guide, model):
            for name, site in trace.nodes.items():
                if not (site["type"] == "sample" and site_is_subsample(site)):
                    continue
                numbers = row_numbers(name, site["value"])
                if name not in self.at_hand:
                    self.row_ids[name] = numbers.detach().cpu()
                    if name in random:
                        self._look_for_rows(name, site["fn"], rows | {name: site["value"]}, held, model)
            for _, site in random_sites(trace):
                batch = len(site["fn"].batch_shape)
                frames = [-frame.dim for frame in site["cond_indep_stack"] if frame.vectorized]
                if kind_of(site) == "deterministic":
                    stack = {frame.dim: frame for frame in site["cond_indep_stack"] if frame.vectorized}
                    batch = len(self._deterministic_batch(site["value"], site["fn"].event_dim, stack))
                self.depth = max(self.depth, batch, *frames, 0)
                for frame in site["cond_indep_stack"]:
                    if frame.vectorized and frame.size == -1:
                        self.sizes[frame.name] = self.full_sizes[frame.name] = open_ended.get(frame.name, 1)
                    elif frame.vectorized:
                        swept = frame.name in random and frame.name not in self.at_hand
                        self.full_sizes[frame.name] = frame.full_size or frame.size
                        self.sizes[frame.name] = frame.full_size if swept else frame.size
                        if swept:
                            self.swept[frame.name] = frame.size
                            self.row_ids[frame.name] = torch.arange(frame.full_size)

    def _find_latents(self, guide: Trace, model: Trace, rows: Mapping[str, torch.Tensor]) -> None:
        """Supports of the latents, which of them the guide computes, and those at which it is a point."""
        # A site that the guide computes from its auxiliary draws cannot be fixed: with a rounding error in its value it
        # would have no density.
        auxiliary = self.guide_sites.keys() - self.model_sites.keys()
        self.computed = {name for name, layout in self.guide_sites.items() if layout.point and auxiliary}
        self.supports = {
            name: _support(name, model.nodes[name]["fn"], guide.nodes.get(name, {}).get("fn"))
            for name, layout in self.model_sites.items()
            if layout.kind == "latent"
        }
        latents = [name for name, layout in self.model_sites.items() if layout.kind == "latent"]
        self.angles = [name for name in latents if isinstance(elementary(model.nodes[name]["fn"]), _ANGLES)]
        drawn = [name for name, layout in self.model_sites.items() if layout.kind in ("latent", "observed")]
        undrawable = {name: why_undrawable(model.nodes[name]["fn"]) for name in drawn}
        self.undrawable = {name: reason for name, reason in undrawable.items() if reason is not None}
        reasons = {name: _why_other_draws(model.nodes[name]["fn"]) for name in drawn}
        self.other_draws = {name: reason for name, reason in reasons.items() if reason is not None}
        self.unweighable = {
            name: reason
            for name, layout in self.guide_sites.items()
            if layout.kind == "latent" and (reason := _why_other_draws(guide.nodes[name]["fn"])) is not None
        }
        self.unweighable |= dict.fromkeys(undetermined(guide.nodes, model.nodes), REMEDY)
        # Pyro masks or replaces the prior of what such a site is computed from, and corrects its density alone.
        said = "its reparameterization draws it from another law than its density"
        self.other_draws |= dict.fromkeys(sorted(self.transformed), said)
        for name in self.guide_sites:
            check_invertible(name, guide.nodes[name])
        with ChosenRows(rows):
            self.points = points_of(
                lambda: self.guide(*self.args, **self.kwargs), guide, self.supports, self.guide_sites, self.model_sites
            )

    def _superfluous(self) -> dict[str, str]:
        try:
            return superfluous_latents(self.model, self.guide, self.args, self.kwargs)
        except UnsupportedSite:
            raise
        except (GumboError, *PROGRAM_ERRORS):
            return {}  # a program that runs here and under no estimator

    def _find_scales(self, guide: Trace, model: Trace) -> None:
        """Which sites have a scale of their own, that of subsampling left out; one of all sites is none."""
        scales = {
            (program, name): torch.as_tensor(scale_of(site)).detach().double().cpu()
            for program, trace in (("guide", guide), ("model", model))
            for name, site in random_sites(trace)
            if kind_of(site) != "deterministic"
        }
        first = next(iter(scales.values()), None)
        common = all(torch.equal(scale, first) for scale in scales.values())
        self.scaled = [] if common else [key for key, scale in scales.items() if (scale != 1).any()]

    def _look_for_rows(self, plate: str, subsample: Any, rows: Mapping, held: Mapping, model: Trace) -> None:
        """Whether a subsampling plate receives a batch instead: then the batch has all available rows.

        This is so for programs called with a batch under ``plate(size=…, subsample_size=len(batch))``: no argument has
        all rows, one has the subsample's number of rows, and other indices give the same data.
        """
        full, size = subsample.size, subsample.subsample_size
        values = (*self.args, *self.kwargs.values())
        if any(has_rows(value, full) for value in values) or not any(has_rows(value, size) for value in values):
            return
        others = {**rows, plate: (rows[plate] + 1) % full}
        with ChosenRows(others), GivenValues(held):
            again = poutine.trace(self.model).get_trace(*self.args, **self.kwargs)
        same = [
            torch.equal(site["value"], model.nodes[name]["value"])
            for name, site in random_sites(again)
            if site["is_observed"] and name in model.nodes
        ]
        if all(same):
            self.at_hand[plate] = torch.arange(size)
            self.row_ids[plate] = torch.arange(size)

    def _check(self, guide: Trace, model: Trace) -> None:
        if not self.model_sites and not self.guide_sites:
            raise BadInput("model and guide have no sample sites, so that there is nothing to evaluate")
        for name, site in random_sites(guide):
            check_observed(name, site, model.nodes.get(name))
        latent = [name for name, layout in self.model_sites.items() if layout.kind == "latent"]
        drawn = [name for name, layout in self.guide_sites.items() if layout.kind == "latent"]
        for name in latent:
            if name not in drawn:
                raise BadInput(
                    f"site {name!r} is latent in the model but the guide does not draw it: add it to the guide, or mark"
                    " a discrete one infer={'enumerate': 'parallel'} in the model"
                )
        for name in drawn:
            auxiliary = guide.nodes[name]["infer"].get("is_auxiliary") or name in self.model_sites
            if name not in latent and not auxiliary:
                raise BadInput(
                    f"site {name!r} is drawn by the guide but is no latent of the model: remove it, rename it, or mark"
                    " it infer={'is_auxiliary': True}"
                )
        for name in latent:
            drawn_shape, fn = guide.nodes[name]["value"].shape, model.nodes[name]["fn"]
            try:
                torch.broadcast_shapes(drawn_shape, fn.batch_shape + fn.event_shape)
            except RuntimeError as error:
                raise BadInput(
                    f"site {name!r}: the guide's values have shape {tuple(drawn_shape)}, the model's distribution has "
                    f"{tuple(fn.batch_shape + fn.event_shape)}: give both the same"
                ) from error
        for layout in (*self.guide_sites.values(), *self.model_sites.values()):
            if layout.depth > self.depth:  # a value has more rows than its distribution and its plates
                raise outside_plates(layout.name, layout.sizes, layout.dims[0])
        if not latent and self.latents_needed:
            raise BadInput("the model has no latent site, so that there is no posterior")

    def _check_arguments(self) -> None:
        """Raise BadInput if data that no program takes are the cause of what went wrong."""
        Rows.of(self.args, self.kwargs).check("data")

    def _check_data(self, site: Mapping[str, Any]) -> None:
        """Raise BadInput for observed values that have no log-probability, and for NaN and infinity among the data."""
        value, shown = site["value"], unmasked(site)
        try:
            log_prob = Seen(site).log_prob
            wrong = not log_prob.isfinite().all()
            if value.is_floating_point():
                finite = value.isfinite() if shown is None else value.isfinite() | ~shown
                wrong = wrong or not finite.all()
        except ValueError:  # a value outside the support, which every run refuses
            wrong = True
        except PROGRAM_ERRORS as error:
            self._check_arguments()
            advice = "" if value.is_floating_point() else "; give floating-point numbers, as x.float() does"
            raise BadInput(
                f"site {site['name']!r}: {describe(site['fn'])} has no log-probability for data of {value.dtype} and "
                f"shape {tuple(value.shape)} ({first_line(error)}){advice}"
            ) from error
        if wrong:
            self._check_arguments()

    def _layout(self, name: str, site: Mapping[str, Any]) -> SiteLayout:
        fn, value = site["fn"], site["value"]
        kind = "transformed" if name in self.transformed and site["is_observed"] else kind_of(site)
        frames = {frame.dim: frame for frame in site["cond_indep_stack"] if frame.vectorized}
        if kind == "deterministic":
            batch = self._deterministic_batch(value, fn.event_dim, frames)
            event_dim = value.dim() - len(batch)
        elif kind == "factor":
            event_dim, batch = 1, tuple(fn.batch_shape)
        else:
            event_dim = fn.event_dim
            batch = tuple(torch.broadcast_shapes(fn.batch_shape, value.shape[: value.dim() - event_dim]))
        depth = len(batch)
        # A single draw under a plate without a size is not one draw per row.
        for dim in [dim for dim, frame in frames.items() if frame.size == -1 and -dim <= depth]:
            if batch[dim] != self.sizes[frames[dim].name]:
                del frames[dim]
        dims = [dim for dim in range(-depth, 0) if dim in frames or batch[dim] > 1]
        names = tuple(frames[dim].name if dim in frames else None for dim in dims)
        return SiteLayout(
            name,
            kind,
            tuple(dims),
            names,
            tuple(self.sizes.get(plate, batch[dim]) for plate, dim in zip(names, dims, strict=True)),
            tuple(value.shape[value.dim() - event_dim :]),
            depth,
            value.dtype,
            isinstance(without_to_event(fn), dist.Delta) and kind == "latent",
            discrete_values(fn) if kind in ("latent", "observed") else "",
        )

    @staticmethod
    def _deterministic_batch(value: torch.Tensor, event_dim: int, frames: Mapping[int, Any]) -> tuple[int, ...]:
        """The leading dimensions in plates; ``pyro.deterministic`` declares all dimensions as event dimensions."""
        if event_dim < value.dim():
            return tuple(value.shape[: value.dim() - event_dim])
        depth = max((-dim for dim in frames), default=0)
        leading = value.shape[:depth]
        fits = len(leading) == depth and all(frame.size in (-1, leading[depth + dim]) for dim, frame in frames.items())
        return tuple(leading) if fits else ()

    def divide(self, data_plates: str | Sequence[str] | None) -> None:
        """Determine the data plates, and the latents that are local to a datum."""
        observed = [layout for layout in self.model_sites.values() if layout.kind == "observed"]
        # Without observed sites, factors are the likelihood of a datum.
        observed = observed or [layout for layout in self.model_sites.values() if layout.kind == "factor"]
        self.latents = [name for name, layout in self.model_sites.items() if layout.kind == "latent"]
        self.observed = [layout.name for layout in observed if layout.kind == "observed"]
        self.evidence = "+".join(layout.name for layout in observed)
        common = frozenset.intersection(*[layout.plates for layout in observed]) if observed else frozenset()
        self.around_data = common
        depth_of = {
            plate: dim
            for layout in observed
            for plate, dim in zip(layout.names, layout.dims, strict=True)
            if plate is not None
        }
        if data_plates is None:
            with_latents = common & frozenset().union(*[self.model_sites[name].plates for name in self.latents])
            chosen = with_latents or common
        else:
            asked = (data_plates,) if isinstance(data_plates, str) else tuple(data_plates)
            for plate in asked:
                if plate not in common:
                    raise BadInput(
                        f"no plate {plate!r} encloses every observed site; those that do: "
                        f"{', '.join(sorted(common)) or 'none'}"
                    )
            chosen = frozenset(asked)
        self.data_plates = tuple(sorted(chosen, key=depth_of.__getitem__))
        wanted = set(self.data_plates)
        candidates = [name for name in self.latents if wanted and wanted <= self.model_sites[name].plates]
        self.local = [name for name in candidates if wanted <= self.guide_sites[name].plates]
        # The guide draws local latents jointly, or rows depend on each other: a datum has no weight of its own.
        self.tied = len(self.local) < len(candidates) or (
            bool(candidates) and (self._tied(candidates, wanted) or bool(wanted & self.mixed))
        )
        if self.tied:
            self.local = []
        self.shared = [name for name in self.latents if name not in self.local]
        self.weight_plates = self.data_plates if self.local else ()
        shared = [self.model_sites[name] for name in self.shared]
        inside = frozenset.intersection(*[layout.plates for layout in shared]) if shared else frozenset()
        self.shared_plates = tuple(plate for plate in self.data_plates if plate in inside)

    @cached_property
    def mixed(self) -> frozenset[str]:
        """The plates whose rows depend on each other, in the model or the guide."""
        try:
            with quietly(self.model, self.guide, None):
                return plates_mixed_by(self.model, self.guide, self.args, self.kwargs)
        except (GumboError, *PROGRAM_ERRORS):
            return frozenset()  # a program that runs here and under no estimator: its plates are believed

    def _tied(self, candidates: list[str], wanted: set[str]) -> bool:
        """Whether local latents come from one joint draw of all data, or share a factor."""
        auxiliary = [layout for name, layout in self.guide_sites.items() if name not in self.model_sites]
        inside = [layout for layout in auxiliary if wanted <= layout.plates]
        points = [name for name in candidates if self.guide_sites[name].point]
        factors = [layout for layout in self.model_sites.values() if layout.kind == "factor"]
        joined = any(not wanted <= layout.plates for layout in factors)
        return joined or len(inside) < len(auxiliary) and len(inside) < len(points)

    def with_rows(self: Whole, plate: str, count: int) -> Whole | None:
        """The same programs with ``count`` rows in a plate, for runs whose arguments are given; None if not known.

        Every site must have its rows in the plate or none, and the plate must hold the rows at hand.
        """
        before, full = self.sizes[plate], self.full_sizes[plate]
        at_hand = self.at_hand.keys() <= {plate}
        layouts = (*self.guide_sites.values(), *self.model_sites.values())
        loose = any(before in layout.shape[len(layout.names) :] or None in layout.names for layout in layouts)
        if self.swept or not at_hand or loose or (full != before and not self.at_hand) or self.summed_out:
            return None
        found = copy.copy(self)
        found.args, found.kwargs, found.observed_values = (), {}, {}
        found.sizes = {**self.sizes, plate: count}
        found.full_sizes = self.full_sizes if self.at_hand else {**self.full_sizes, plate: count}
        if plate in self.row_ids:
            found.row_ids = {**self.row_ids, plate: torch.arange(count)}
        if plate in self.at_hand:
            found.at_hand = {plate: torch.arange(count)}

        def resized(layout: SiteLayout) -> SiteLayout:
            sizes = zip(layout.names, layout.sizes, strict=True)
            return replace(layout, sizes=tuple(count if name == plate else size for name, size in sizes))

        found.guide_sites = {name: resized(layout) for name, layout in self.guide_sites.items()}
        found.model_sites = {name: resized(layout) for name, layout in self.model_sites.items()}
        return found

    def warn_of_weights(self, stacklevel: int) -> None:
        """Warn of sites of the guide whose density in the weights is not that of its draws of the latents."""
        for name, reason in self.unweighable.items():
            warnings.warn(
                f"the guide's site {name!r}: {reason}; importance weights, evidence and ELBO are wrong",
                GumboWarning,
                stacklevel=stacklevel + 1,
            )

    def outside_data(self) -> list[str]:
        """Sites that the guide draws outside the data plates."""
        wanted = set(self.data_plates)
        return [
            name
            for name, layout in self.guide_sites.items()
            if layout.kind == "latent" and not (wanted and wanted <= layout.plates)
        ]


def _why_other_draws(fn: Any) -> str | None:
    return why_other_draws(fn) or why_not_own_law(fn)


def _check_order(guide: Trace, model: Trace) -> None:
    """Raise BadInput for a model in the place of the guide."""
    seen, ours = (
        [name for name, site in random_sites(trace) if kind_of(site) == "observed"] for trace in (guide, model)
    )
    if seen and not ours:
        raise BadInput(
            f"the guide observes site {seen[0]!r} and the model observes none: pass the model first, then the guide"
        )


def _support(name: str, fn: Any, drawn_from: Any) -> Any:
    """The support of a latent's prior, or of the guide's law if the prior has none (``ZukoToPyro``).

    Raises BadInput where neither has one.
    """
    for law in (fn,) if drawn_from is None or is_deterministic(drawn_from) else (fn, drawn_from):
        with suppress(NotImplementedError):
            return law.support
        if (found := support_of(elementary(law))) is not None:
            return found
    raise BadInput(f"site {name!r}: its {describe(fn)} has no support; give the class one, such as constraints.real")
