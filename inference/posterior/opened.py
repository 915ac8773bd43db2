"""Models whose sites without a value are to be predicted: those that nothing observes and the guide leaves out."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from pyro import poutine
from pyro.poutine.messenger import Messenger

from ...errors import BadInput
from ..engine.row_parameters import sites_of
from ..engine.scopes import quietly


class OpenedModel:
    """A model whose sites without a value count as observed at one draw, so that they can be predicted."""

    def __init__(self, model: Callable, values: Mapping[str, torch.Tensor]):
        self.inner_program, self.left_open = model, dict(values)
        program = model.forward if isinstance(model, torch.nn.Module) else model
        self.__signature__ = inspect.signature(program)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with _Observed(self.left_open):
            return self.inner_program(*args, **kwargs)


class _Observed(Messenger):
    def __init__(self, values: Mapping[str, torch.Tensor]):
        super().__init__()
        self.values = values

    def _pyro_sample(self, msg) -> None:
        if msg["name"] not in self.values or msg["is_observed"]:
            return
        value = self.values[msg["name"]]
        for frame in msg["cond_indep_stack"]:
            dim = frame.dim - msg["fn"].event_dim if frame.vectorized else 0
            if frame.vectorized and 0 < frame.size < (value.shape[dim] if -dim <= value.dim() else 0):
                value = value.narrow(dim, 0, frame.size)
        msg["value"], msg["is_observed"] = value, True


def opened_model(model: Callable, guide: Callable, args: tuple, kwargs: Mapping[str, Any]) -> Callable:
    """The model, in which the sites without a value that the guide does not sample count as sites to be predicted.

    Raises BadInput where an observation depends on such a site and on an enumerated one, which is drawn given it.
    """
    with quietly(model, guide, 0):
        drawn = poutine.trace(guide).get_trace(*args, **kwargs)
        free = poutine.replay(model, trace=drawn)
        run = poutine.trace(free).get_trace(*args, **kwargs)
    absent = [site for site in sites_of(run) if not site["is_observed"] and site["name"] not in drawn]
    left = {site["name"]: site["value"].detach() for site in absent if not _is_enumerated(site)}
    enumerated = [site["name"] for site in absent if _is_enumerated(site)]
    if left and enumerated:
        open_sites = _moved_by(left, free, model, guide, args, kwargs)
        for name in sorted(open_sites.keys() & _moved_by(enumerated, free, model, guide, args, kwargs).keys()):
            raise BadInput(
                f"site {open_sites[name]!r} has no value, and enumerated sites are drawn given {name!r}, which depends"
                " on it: let the guide draw it, or leave out the observation"
            )
    return OpenedModel(model, left) if left else model


def _is_enumerated(site: Mapping[str, Any]) -> bool:
    return site["infer"].get("enumerate") == "parallel"


def _moved_by(
    names: Iterable[str], free: Callable, model: Callable, guide: Callable, args: tuple, kwargs: Mapping[str, Any]
) -> dict[str, str]:
    """Observed sites that depend on sites without a value, each with the first such site that it depends on.

    Each site gets draws of other runs, with all other draws held; a coin may show the same side several times.
    """

    def run(seed: int, held: Mapping[str, torch.Tensor]) -> dict[str, Any]:
        with quietly(model, guide, seed):
            trace = poutine.trace(poutine.condition(free, data=dict(held))).get_trace(*args, **kwargs)
            return {
                site["name"]: (site["value"], site["fn"].log_prob(site["value"]) if site["is_observed"] else None)
                for site in sites_of(trace)
            }

    first = run(0, {})
    values = {name: value for name, (value, log_prob) in first.items() if log_prob is None}
    found: dict[str, str] = {}
    for seed in range(1, _TRIES + 1):
        other = run(seed, {})
        for name in names:
            if name not in values or name not in other or torch.equal(other[name][0], values[name]):
                continue
            for site, (value, log_prob) in run(0, values | {name: other[name][0]}).items():
                if log_prob is not None and site in first and site not in values:
                    before, density = first[site]
                    if not (torch.equal(value, before) and torch.equal(log_prob, density)):
                        found.setdefault(site, name)
    return found


_TRIES = 8
