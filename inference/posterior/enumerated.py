"""Discrete sites that the model enumerates and the guide leaves out: drawn from their exact conditional distribution.

The usual Pyro mixture marks its assignments ``infer={"enumerate": "parallel"}`` and guides the other latents only. The
guide is completed by p(discrete | the rest, data), which Pyro's tensor variable elimination gives exactly: so completed
it draws every latent, and each importance weight of a datum is the one with the discrete sites summed out.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.distributions.torch_distribution import TorchDistributionMixin
from pyro.infer.traceenum_elbo import _compute_model_factors, _find_ordinal
from pyro.ops import packed
from pyro.ops.contract import contract_to_tensor
from pyro.ops.rings import LogRing
from pyro.poutine.enum_messenger import EnumMessenger
from pyro.poutine.indep_messenger import IndepMessenger
from pyro.poutine.messenger import Messenger
from pyro.poutine.runtime import _PYRO_STACK
from pyro.poutine.trace_struct import Trace
from pyro.poutine.util import prune_subsample_sites, site_is_subsample

from ...errors import BadInput


def completed(model: Callable, guide: Callable, drawn: Trace, run: Trace) -> Callable:
    """``guide`` with the sites that the model enumerates and it lacks; itself where there are none.

    ``drawn`` is a trace of the guide, ``run`` one of the model at its latents.
    """
    left = {name: site for name, site in run.nodes.items() if name not in drawn and _enumerated(site)}
    for name, site in left.items():
        if not isinstance(site["fn"], _FAMILIES):
            raise BadInput(
                f"site {name!r} is enumerated in the model, and {type(site['fn']).__name__} is none of"
                f" {', '.join(family.__name__ for family in _FAMILIES)}: draw it in the guide"
            )
    return CompletedGuide(model, guide, tuple(left), _nesting(drawn, run)) if left else guide


_FAMILIES = (dist.Categorical, dist.Bernoulli, dist.OneHotCategorical)


def _enumerated(site: Mapping[str, Any]) -> bool:
    latent = site["type"] == "sample" and not site["is_observed"] and not site_is_subsample(site)
    return latent and site["infer"].get("enumerate") == "parallel"


def _subsamples(site: Mapping[str, Any]) -> bool:
    return site["type"] == "sample" and site_is_subsample(site)


def _nesting(*traces: Trace) -> int:
    """How many dimensions batches take: enumeration takes those to the left."""
    depths = [0]
    for trace in traces:
        for site in trace.nodes.values():
            if site["type"] == "sample" and not site_is_subsample(site):
                depths.append(len(site["fn"].batch_shape))
                depths += [-frame.dim for frame in site["cond_indep_stack"] if frame.vectorized]
    return max(depths)


class CompletedGuide:
    """A guide that goes on to draw the model's enumerated ``sites`` given what it drew, and the data.

    ``nesting`` is the number of batch dimensions of the two programs; one more is left to a plate of draws.
    """

    def __init__(self, model: Callable, guide: Callable, sites: tuple[str, ...], nesting: int):
        self.model, self.inner_program, self.sites, self.nesting = model, guide, sites, nesting

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        around = [handler for handler in _PYRO_STACK if isinstance(handler, IndepMessenger)]
        with poutine.trace() as drawn:
            found = self.inner_program(*args, **kwargs)
        values = {name: site["value"] for name, site in drawn.trace.nodes.items() if site["type"] == "sample"}
        # Plates that only the model has ask outside for their rows, once.
        lists = _Lists(first_available_dim=-2 - self.nesting)
        with _Aside(set()), poutine.trace() as listed, lists, _Given(values), _Along(around, set()):
            self.model(*args, **kwargs)
        values |= {name: site["value"] for name, site in listed.trace.nodes.items() if _subsamples(site)}
        listed = prune_subsample_sites(listed.trace)
        listed.compute_log_prob()
        listed.pack_tensors()
        with _Aside(set(self.sites)), _Conditional(listed, self.sites), _Given(values), _Along(around, set(self.sites)):
            self.model(*args, **kwargs)
        return found


class _Lists(EnumMessenger):
    """Enumeration that also runs under ``torch.vmap``, which knows no ``.data``."""

    def _pyro_post_sample(self, msg) -> None:
        if isinstance(msg["fn"], TorchDistributionMixin) and msg["value"] is not None:
            batch = msg["value"].shape[: msg["value"].dim() - msg["fn"].event_dim]
            named = msg["infer"].setdefault("_dim_to_id", {})
            named.update(self._param_dims.get(msg["name"], {}))
            self._value_dims[msg["name"]] = {
                dim: one for dim, one in named.items() if len(batch) >= -dim and batch[dim] > 1
            }


class _Given(Messenger):
    """Latent sites and plates' rows take the values given; to enumeration they are data."""

    def __init__(self, values: Mapping[str, torch.Tensor]):
        super().__init__()
        self.values = values

    def _pyro_sample(self, msg) -> None:
        if msg["name"] in self.values and not msg["is_observed"]:
            msg["value"] = self.values[msg["name"]]
            msg["done"] = site_is_subsample(msg)
            msg["is_observed"] = not msg["done"]


class _Along(Messenger):
    """Sites that handlers outside will not see stand in the plates outside all the same."""

    def __init__(self, around: list[IndepMessenger], shown: set[str]):
        super().__init__()
        self.around, self.shown = around, shown

    def _pyro_sample(self, msg) -> None:
        if msg["name"] not in self.shown and not site_is_subsample(msg):
            for plate in reversed(self.around):
                plate._process_message(msg)


class _Aside(Messenger):
    """Handlers outside see only the sites ``shown``, and plates' rows that are yet to be drawn."""

    def __init__(self, shown: set[str]):
        super().__init__()
        self.shown = shown

    def _pyro_sample(self, msg) -> None:
        msg["stop"] = msg["done"] if site_is_subsample(msg) else msg["name"] not in self.shown

    def _pyro_param(self, msg) -> None:
        msg["stop"] = True


class _SumOut(LogRing):
    """Sums over products of log-factors, one dimension after the other, by operations that ``torch.vmap`` knows."""

    def sumproduct(self, terms, dims):
        left = [(term, term._pyro_dims) for term in terms]
        over = set(dims)
        while over:
            # The dimension whose factors share the fewest others goes first.
            dim = min(sorted(over), key=lambda one: len({name for _, names in left for name in names if one in names}))
            over.remove(dim)
            joined, names = _product([(term, names) for term, names in left if dim in names])
            summed = torch.logsumexp(joined, names.index(dim))
            left = [(term, names) for term, names in left if dim not in names] + [(summed, names.replace(dim, ""))]
        found, names = _product(left)
        found._pyro_dims = names
        return found


def _product(terms: list[tuple[torch.Tensor, str]]) -> tuple[torch.Tensor, str]:
    """The sum of log-factors whose dimensions have names."""
    names = "".join(sorted(set("".join(dims for _, dims in terms))))
    total: Any = 0.0
    for term, dims in terms:
        ordered = term.permute([dims.index(name) for name in names if name in dims])
        sizes = iter(ordered.shape)
        total = total + ordered.reshape([next(sizes) if name in dims else 1 for name in names])
    return total, names


class _Conditional(Messenger):
    """Each enumerated site in turn gets its distribution given those before it, the others summed out.

    Obermeyer et al. 2019, "Tensor variable elimination for plated factor graphs", arXiv:1902.03210.
    """

    def __init__(self, listed: Trace, sites: tuple[str, ...]):
        super().__init__()
        self.listed, self.sites = listed, sites
        _, self.factors, _, self.summed, _ = _compute_model_factors(listed, Trace())

    def _pyro_sample(self, msg) -> None:
        if msg["name"] not in self.sites:
            return
        seen = self.listed.nodes[msg["name"]]
        dim = seen["infer"]["_enumerate_dim"]
        logits = contract_to_tensor(
            self.factors,
            self.summed,
            target_ordinal=_find_ordinal(self.listed, seen),
            target_dims={seen["infer"]["_enumerate_symbol"]},
            ring=_SumOut(),
        )
        logits = packed.unpack(logits, self.listed.symbol_to_dim)
        logits = logits.unsqueeze(-1).transpose(-1, dim - 1)
        while logits.dim() > 1 and logits.shape[0] == 1:
            logits = logits.squeeze(0)
        fn = msg["fn"]
        if isinstance(fn, dist.Bernoulli):
            msg["fn"] = dist.Bernoulli(logits=logits[..., 1] - logits[..., 0])
        else:
            msg["fn"] = type(fn)(logits=logits)

    def _pyro_post_sample(self, msg) -> None:
        if msg["name"] not in self.sites:
            return
        seen = self.listed.nodes[msg["name"]]["infer"]
        value = msg["value"]
        if isinstance(msg["fn"], dist.OneHotCategorical):
            value = value.argmax(-1)
        value = packed.pack(value.long(), seen["_dim_to_symbol"])
        for terms in self.factors.values():
            for place, term in enumerate(terms):
                if seen["_enumerate_symbol"] in term._pyro_dims:
                    terms[place] = packed.gather(term, value, seen["_enumerate_symbol"])
        self.summed.remove(seen["_enumerate_symbol"])
