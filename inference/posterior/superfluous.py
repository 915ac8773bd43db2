"""Latents of which the model masks elements that the guide does not: log q has terms that log p lacks."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from ...errors import ANY, UnsupportedSite
from ..engine.looks import looking, one_particle
from ..engine.mixing import another_value
from ..engine.programs import Program
from ..engine.records import Run, Site
from ..engine.scopes import devices_of
from ..engine.streams import Generators
from ..estimators._base import Draw
from .vmapped import unmasked


def superfluous_latents(model: Callable, guide: Callable, args: tuple, kwargs: Mapping[str, Any]) -> dict[str, str]:
    """Sites of the guide with elements that the model masks and nothing in it depends on, and the model's sites.

    Such elements are no latents of the model, as those of ``x_unobserved`` where ``pyro.sample(…, obs_mask=…)`` has an
    observation: log q leaves them out. Where something depends on them, the mask is an improper prior, and log q stays.

    Raises:
        UnsupportedSite: log q of such elements cannot be told from that of others.
    """
    with looking(model, guide, *args):
        program = one_particle(model, guide)
        program.generators = Generators(devices_of(model, guide, *args), others=True)
        return _superfluous(program, program.run(args, kwargs), args, kwargs)


def _superfluous(program: Program, seen: Run, args: tuple, kwargs: Mapping[str, Any]) -> dict[str, str]:
    found: dict[str, str] = {}
    drawn = {site.name: site.value.detach() for site in seen.guide if site.latent}
    auxiliary = any(name not in seen.model_statements for name in drawn)
    for site in seen.guide:
        if not site.latent or (hidden := _hidden_by_the_model_alone(site, seen)) is None:
            continue
        if site.settled and not auxiliary:
            continue  # a point: there is no log q
        if _reaches_the_model(program, seen, site, hidden, drawn, args, kwargs):
            continue
        event_dim = site.fn.event_dim
        shown = unmasked(seen.model_statements[site.name])
        parts = event_dim and bool((hidden.flatten(-event_dim).any(-1) & shown.flatten(-event_dim).any(-1)).any())
        # AutoNormal draws each element without its constraint, and computes the site from it.
        source = next((one for one in seen.guide if one.name == f"{site.name}_unconstrained"), None)
        apart = not site.settled or (source is not None and source.fn.batch_shape == site.fn.batch_shape)
        if parts or not apart:
            raise UnsupportedSite(
                site.name,
                ANY,
                "the model masks some of its elements, nothing depends on them, and the guide draws them together with"
                " others, so that log q has terms that log p lacks; draw them one by one in the guide, masked as in the"
                " model (pyro.poutine.mask)",
            )
        found[site.name] = site.name
        if site.settled:
            found[source.name] = site.name
    return found


def _hidden_by_the_model_alone(site: Site, seen: Run) -> Tensor | None:
    """The numbers of a latent's value that the model masks and the guide does not; None if there are none."""
    met = seen.model_statements.get(site.name)
    shown = None if met is None else unmasked(met)
    if shown is None:
        return None
    mine = unmasked(seen.statements[site.name])
    hidden = ~shown if mine is None else ~shown & mine
    return hidden if hidden.any() else None


def _reaches_the_model(
    program: Program,
    seen: Run,
    site: Site,
    hidden: Tensor,
    drawn: Mapping[str, Tensor],
    args: tuple,
    kwargs: Mapping[str, Any],
) -> bool:
    """Whether other values of these elements change a term of the model."""
    value = drawn[site.name]
    other = value + 1 if site.settled else another_value(site)
    changed = torch.where(hidden, other.expand(hidden.shape), value.expand(hidden.shape)).reshape(hidden.shape)
    terms = []
    for values in (drawn, {**drawn, site.name: changed}):
        fixed = {name: Draw(each.clone()) for name, each in values.items()}
        run = program.run(args, kwargs, fixed=fixed, subsamples=dict(seen.subsamples), noise=seen.noise)
        terms.append({one.name: one.log_prob.detach() for one in run.model})
    before, after = terms
    return before.keys() != after.keys() or any(
        term.shape != after[name].shape or not torch.equal(term, after[name]) for name, term in before.items()
    )
