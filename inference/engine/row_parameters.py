"""Parameters of row positions, such as those of a guide with parameters for each datum."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Any

import pyro
import torch
from pyro.poutine.messenger import Messenger
from pyro.poutine.trace_struct import Trace
from pyro.poutine.util import site_is_subsample
from torch import Tensor, nn

from ...errors import BadInput
from ..estimators._distributions import is_computed
from .looks import pair_of_traces
from .messenger_guides import as_program
from .rows import Rows
from .scopes import modules_of, owned_parameters


def traces_of(model: Callable, guide: Callable, batch: Rows) -> tuple[Trace, Trace]:
    """One run of the guide, and of the model at its draws."""
    with _OwnParameters():
        return pair_of_traces(model, as_program(guide), batch.args, batch.kwargs)


class _OwnParameters(Messenger):
    """Gives a network registered by ``pyro.module`` its own parameters, not another network's from the store."""

    def __init__(self):
        super().__init__()
        self._given: dict[str, nn.Parameter] = {}

    def _pyro_param(self, msg) -> None:
        store, name = pyro.get_param_store(), msg["name"]
        given = msg["args"][1] if len(msg["args"]) > 1 else None
        if not isinstance(given, nn.Parameter):
            return
        if self._given.setdefault(name, given) is not given:
            raise BadInput(
                f"two networks register a parameter {name.replace('$$$', '.')!r}: in Pyro's param store they would "
                "train as one; give pyro.module another name for one of them"
            )
        if store._params.get(name, given) is not given:
            del store[name]


def sites_of(trace: Trace) -> Iterator[Mapping[str, Any]]:
    """The random sites of a run, without the row indices of plates."""
    for site in trace.nodes.values():
        # AutoStructured's prototype has empty sites.
        if site.get("type") == "sample" and not site_is_subsample(site):
            yield site


def positional_parameter(model: Callable, guide: Callable, batch: Rows, seed: int) -> str | None:
    """A parameter with separate elements for each position in the batch, whatever row is there.

    The terms of several rows are differentiated. Elements that only one row's terms depend on belong to the row; if the
    same elements are used after the rows are permuted, they belong to the position. A plate that happens to have the
    size of the batch, as that of three groups on three rows, does not have its rows.
    """
    found = _positional(model, guide, batch, seed, frozenset())
    fixed = _fixed_plates(model, guide, batch) if found is not None else None
    return _positional(model, guide, batch, seed, fixed) if fixed else found


def _fixed_plates(model: Callable, guide: Callable, batch: Rows) -> frozenset[str]:
    """Plates of the batch's size that keep it on a row more; none if the programs do not run on that."""
    with suppress(Exception):
        more = batch[torch.arange(len(batch) + 1) % len(batch)]
        stacks = [site["cond_indep_stack"] for trace in traces_of(model, guide, more) for site in sites_of(trace)]
        sizes = {frame.name: frame.full_size or frame.size for stack in stacks for frame in stack}
        return frozenset(name for name, size in sizes.items() if size == len(batch))
    return frozenset()


def _positional(model: Callable, guide: Callable, batch: Rows, seed: int, fixed: frozenset[str]) -> str | None:
    if batch.whole or len(batch) < 2:
        return None
    for module in modules_of(model, guide):
        module.eval()
    found: dict[str, list[Tensor]] | None = None
    for turn in range(3):
        torch.manual_seed(seed + turn)
        turned = batch[torch.arange(len(batch)).roll(turn)]
        supports = _supports(model, guide, turned, fixed)
        if found is None:
            found = {name: by_row for name, by_row in supports.items() if _disjoint(by_row)}
        else:
            found = {
                name: by_row
                for name, by_row in found.items()
                if all(torch.equal(a, b) for a, b in zip(by_row, supports[name], strict=True))
            }
        if not found:
            return None
    return next(iter(found))


def _supports(model: Callable, guide: Callable, batch: Rows, fixed: frozenset[str]) -> dict[str, list[Tensor]]:
    """For some rows, the elements of each parameter that the row's log-probabilities depend on."""
    traces = traces_of(model, guide, batch)
    size = len(batch)
    total: Tensor | None = None
    for trace in traces:
        for site in sites_of(trace):
            frames = [one for one in site["cond_indep_stack"] if one.vectorized and one.name not in fixed]
            frame = next((one for one in frames if one.size == size), None)
            if frame is None or is_computed(site):
                continue
            terms = site["fn"].log_prob(site["value"])
            if terms.dim() < -frame.dim or terms.shape[frame.dim] != size:
                continue
            others = [dim for dim in range(-terms.dim(), 0) if dim != frame.dim]
            terms = terms.sum(others) if others else terms
            total = terms if total is None else total + terms
    known: dict[str, Tensor] = dict(owned_parameters(model, guide))
    owned = {id(leaf) for leaf in known.values()}
    known |= {name: leaf for name, leaf in pyro.get_param_store()._params.items() if id(leaf) not in owned}
    leaves = {name: leaf for name, leaf in known.items() if leaf.requires_grad and leaf.numel() >= size}
    if total is None or not total.requires_grad or not leaves:
        return {}
    rows = sorted({0, 1, size // 2, size - 1})
    found: dict[str, list[Tensor]] = {name: [] for name in leaves}
    for row in rows:
        slopes = torch.autograd.grad(total[row], list(leaves.values()), retain_graph=True, allow_unused=True)
        for (name, leaf), slope in zip(leaves.items(), slopes, strict=True):
            found[name].append(torch.zeros_like(leaf, dtype=torch.bool) if slope is None else slope != 0)
    return found


def _disjoint(supports: Sequence[Tensor]) -> bool:
    """Whether at least two rows have elements, and no element belongs to two rows."""
    together = torch.stack(list(supports)).flatten(1)
    return int(together.any(1).sum()) > 1 and int(together.sum(0).max()) < 2
