"""The variables of the groups of log-likelihoods: observed sites, each with the factors that belong to its elements."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass

import torch
from pyro import poutine

from ...errors import PROGRAM_ERRORS, GumboError, GumboWarning
from ..engine.interventions import GivenValues
from ..engine.rows import Rows
from ..engine.scopes import quietly
from .alone import agree
from .runner import Pass, Sweep
from .sites import SiteLayout
from .vmapped import random_sites


@dataclass(frozen=True)
class Likelihood:
    """A variable: the log-probability of ``sites``, observed ones and factors, by element of its plates."""

    name: str
    sites: tuple[str, ...]
    plates: tuple[str | None, ...]
    sizes: tuple[int, ...]

    def log_prob(self, model: Pass) -> torch.Tensor:
        """``(count, *sizes)`` in nats."""
        first, *others = (
            model.log_prob(site, None if model.layouts[site].names == self.plates else self.plates)
            for site in self.sites
        )
        return sum(others, start=first)


def likelihoods_of(sweep: Sweep) -> list[Likelihood]:
    """One for each observed site; sites between which a factor cannot be divided share one, named ``x+y``.

    A factor belongs to the observed site whose plates it is in, and of several to that in the most plates. Without
    observed sites the factors in the data plates are the likelihood.
    """
    layouts = sweep.model_sites
    if not sweep.observed:
        inside = tuple(one.name for one in _factors(sweep) if set(sweep.data_plates) <= one.plates)
        sizes = tuple(sweep.sizes[plate] for plate in sweep.data_plates)
        return [Likelihood(sweep.evidence, inside, sweep.data_plates, sizes)] if sweep.data_plates else []
    together = {name: (name,) for name in sweep.observed}
    added: dict[str, str] = {}
    for factor in _factors(sweep):
        if owners := _owners(sweep, factor):
            joined = {one for owner in owners for one in together[owner]}
            ordered = tuple(name for name in sweep.observed if name in joined)
            together |= dict.fromkeys(ordered, ordered)
            added[factor.name] = ordered[0]
    found = []
    for sites in dict.fromkeys(together.values()):
        factors = tuple(name for name, owner in added.items() if owner in sites)
        first = layouts[sites[0]]
        names, sizes = first.names, first.sizes
        if len(sites) > 1:
            common = frozenset.intersection(*[layouts[site].plates for site in sites])
            names = tuple(name for name in names if name in common)
            sizes = tuple(sweep.sizes[name] for name in names)
        found.append(Likelihood("+".join(sites), (*sites, *factors), names, sizes))
    return found


def warn_of_shared_factors(sweep: Sweep) -> None:
    """Warn of factors that change with the data and belong to no single datum."""
    shared = factors_of_prior(sweep)
    for name in _changed_by_data(sweep, shared) if shared else ():
        warnings.warn(
            f"factor {name!r} depends on the data and is outside the plates of every observed site, so that "
            "log_likelihood leaves it out: put the term of each datum into the plate of its observed site",
            GumboWarning,
            stacklevel=5,
        )


def factors_of_prior(sweep: Sweep) -> list[str]:
    """The factors outside the plates of every observed site."""
    return [one.name for one in _factors(sweep) if sweep.observed and not _owners(sweep, one)]


def warn_of_ignored(model: Pass, groups: str, first: dict[str, torch.Tensor], told: set[str], stacklevel: int) -> None:
    """Warn, once each, of factors of an observed site that change with the latents: data drawn anew ignore them."""
    of_data = {one.name for one in _factors(model.sweep) if _owners(model.sweep, one)}
    for name in (set(changing_factors(model, first)) & of_data) - told:
        told.add(name)
        warnings.warn(
            f"factor {name!r} depends on the latents, and the data drawn in {groups} ignore it: they are wrong if it "
            "makes a truncated or censored law: write such a law as a distribution, or leave the draws out of groups",
            GumboWarning,
            stacklevel=stacklevel + 1,
        )


def masked_priors(sweep: Sweep) -> list[str]:
    """The latents whose prior is masked where the density depends on them: the model's draws do not follow it."""
    if not sweep.masked_latents or sweep.swept:
        return []
    found = []
    with quietly(sweep.model, sweep.guide, 0):
        _, model = sweep.run(1)
        values, drawn = {name: sweep.held(model, name) for name in sweep.latents}, sweep.model_run(1)
        for name in sorted(sweep.masked_latents):
            moved = values | {name: torch.where(model.shown(name), values[name], drawn.value(name))}
            ends = (run.joint_log_prob(()) for run in (model, sweep.model_run(1, fixed=moved)))
            if not agree(*ends, sweep.model_sites[name].dtype):
                found.append(name)
    return found


def changing_factors(model: Pass, first: dict[str, torch.Tensor] | None = None) -> list[str]:
    """The factors whose log-probability differs between the draws of a run, or from the ``first`` draw of all runs."""
    found, first = [], {} if first is None else first
    for name, layout in model.layouts.items():
        if layout.kind == "factor":
            value = model.log_prob(name)
            if not agree(first.setdefault(name, value[:1]).expand_as(value), value, layout.dtype):
                found.append(name)
    return found


def _factors(sweep: Sweep) -> list[SiteLayout]:
    return [layout for layout in sweep.model_sites.values() if layout.kind == "factor"]


def _owners(sweep: Sweep, factor: SiteLayout) -> list[str]:
    """The observed sites that a factor may belong to; none if it spans their elements."""
    found = [layout for name in sweep.observed if _holds(layout := sweep.model_sites[name], factor)]
    most = max((len(layout.names) for layout in found), default=0)
    return [layout.name for layout in found if len(layout.names) == most]


def _holds(site: SiteLayout, factor: SiteLayout) -> bool:
    if None in site.names:  # dimensions without a plate are told apart by their place
        return (site.dims, site.names, site.sizes) == (factor.dims, factor.names, factor.sizes)
    return bool(site.names) and site.plates <= factor.plates


def _changed_by_data(sweep: Sweep, names: Sequence[str]) -> list[str]:
    """Which of these sites have other log-probabilities for other rows of the arguments, or for fewer of them."""
    rows, changed = Rows.of(sweep.args, sweep.kwargs), set()
    if rows.whole or len(rows) < 2:
        return []
    with suppress(GumboError, *PROGRAM_ERRORS), quietly(sweep.model, sweep.guide, 0):
        guide = poutine.trace(sweep.guide).get_trace(*sweep.args, **sweep.kwargs)
        values = GivenValues({name: site["value"] for name, site in random_sites(guide)})
        with values:
            before = poutine.trace(sweep.model).get_trace(*sweep.args, **sweep.kwargs)
        for index in (torch.zeros(len(rows), dtype=torch.long), torch.arange(len(rows) - 1)):
            other = rows[index]
            with suppress(GumboError, *PROGRAM_ERRORS), values:
                after = poutine.trace(sweep.model).get_trace(*other.args, **other.kwargs)
                changed |= {name for name in names if not _same(before.nodes[name], after.nodes[name])}
    return [name for name in names if name in changed]


def _same(one: dict, other: dict) -> bool:
    return torch.equal(*(torch.as_tensor(site["fn"].log_prob(site["value"])).sum() for site in (one, other)))
