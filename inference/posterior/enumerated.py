"""Discrete sites that the model enumerates and the guide does not sample: draws from their exact conditional.

A usual Pyro mixture marks its assignments ``infer={"enumerate": "parallel"}`` and guides only the other latents. The
guide is completed by p(discrete | the rest, data), which Pyro's tensor variable elimination computes exactly: the
completed guide draws every latent, and a datum's importance weight equals the one with the discrete sites summed out.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.distributions.torch_distribution import TorchDistributionMixin
from pyro.ops import packed
from pyro.poutine.enum_messenger import EnumMessenger
from pyro.poutine.indep_messenger import IndepMessenger
from pyro.poutine.messenger import Messenger
from pyro.poutine.runtime import _ENUM_ALLOCATOR, _PYRO_STACK
from pyro.poutine.trace_struct import Trace
from pyro.poutine.util import prune_subsample_sites, site_is_subsample

from ...errors import BadInput
from ..engine.contraction import MEMORY_LIMIT, laid_out, log_sum
from ..engine.elimination import MAX_DIMS
from ..engine.interventions import GivenValues


def completed(model: Callable, guide: Callable, drawn: Trace, run: Trace) -> Callable:
    """``guide`` extended by the enumerated sites of the model that it lacks; ``guide`` itself if there are none.

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
    """The number of batch dimensions; enumeration uses those to the left."""
    depths = [0]
    for trace in traces:
        for site in trace.nodes.values():
            if site["type"] == "sample" and not site_is_subsample(site):
                depths.append(len(site["fn"].batch_shape))
                depths += [-frame.dim for frame in site["cond_indep_stack"] if frame.vectorized]
    return max(depths)


class CompletedGuide:
    """A guide that also draws the model's enumerated ``sites``, given its own draws and the data.

    Sites that the model names as ``left_open`` are no data, and these sites are not conditional on them.

    ``nesting`` is the number of batch dimensions of the two programs; one more is reserved for a plate of draws.
    """

    def __init__(self, model: Callable, guide: Callable, sites: tuple[str, ...], nesting: int):
        self.model, self.inner_program, self.sites, self.nesting = model, guide, sites, nesting
        self.width = 1  # numbers per value of a site during the computation of its conditional

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        around = [handler for handler in _PYRO_STACK if isinstance(handler, IndepMessenger)]
        with poutine.trace() as drawn:
            found = self.inner_program(*args, **kwargs)
        values = {name: site["value"] for name, site in drawn.trace.nodes.items() if site["type"] == "sample"}
        # Plates that only the model has request their rows from outer handlers, once.
        lists = _Lists(first_available_dim=-2 - self.nesting)
        with _Aside(set()), poutine.trace() as listed, lists, GivenValues(values, as_data=True), _Along(around, set()):
            self.model(*args, **kwargs)
        values |= {name: site["value"] for name, site in listed.trace.nodes.items() if _subsamples(site)}
        listed = prune_subsample_sites(listed.trace)
        for name in getattr(self.model, "left_open", ()):  # no data: their values are only draws
            listed.remove_node(name)
        listed.compute_log_prob()
        listed.pack_tensors()
        outside = {handler.name for handler in around}
        drawn_from = _Backwards(listed, self.sites)
        self.width = max(self.width, drawn_from.width)
        for name in drawn_from.order:
            site = listed.nodes[name]
            with _StandingWhere(site, outside):
                drawn_from.take(name, pyro.sample(name, drawn_from.conditional(name)))
        return found


class _Lists(EnumMessenger):
    """Enumeration that also runs under ``torch.vmap``, which does not support ``.data``."""

    def _pyro_sample(self, msg) -> None:
        if -_ENUM_ALLOCATOR.next_available_dim > MAX_DIMS:
            raise BadInput(
                f"site {msg['name']!r}: {len(_ENUM_ALLOCATOR.dim_to_id)} sites before it are enumerated in"
                " the model, and to draw them each needs a dimension, of which torch has no more; put loops under"
                " pyro.markov, make them a vectorized plate, or draw these sites in the guide"
            )
        super()._pyro_sample(msg)

    def _pyro_post_sample(self, msg) -> None:
        if isinstance(msg["fn"], TorchDistributionMixin) and msg["value"] is not None:
            batch = msg["value"].shape[: msg["value"].dim() - msg["fn"].event_dim]
            named = msg["infer"].setdefault("_dim_to_id", {})
            named.update(self._param_dims.get(msg["name"], {}))
            self._value_dims[msg["name"]] = {
                dim: one for dim, one in named.items() if len(batch) >= -dim and batch[dim] > 1
            }


class _Along(Messenger):
    """Puts sites that outer handlers do not see into the outer plates."""

    def __init__(self, around: list[IndepMessenger], shown: set[str]):
        super().__init__()
        self.around, self.shown = around, shown

    def _pyro_sample(self, msg) -> None:
        if msg["name"] not in self.shown and not site_is_subsample(msg):
            for plate in reversed(self.around):
                plate._process_message(msg)


class _Aside(Messenger):
    """Hides all sites from outer handlers except ``shown`` and plate rows that are not drawn yet."""

    def __init__(self, shown: set[str]):
        super().__init__()
        self.shown = shown

    def _pyro_sample(self, msg) -> None:
        msg["stop"] = msg["done"] if site_is_subsample(msg) else msg["name"] not in self.shown

    def _pyro_param(self, msg) -> None:
        msg["stop"] = True


class _StandingWhere(Messenger):
    """Gives a statement the plates, the scale and the mask of a site."""

    def __init__(self, site: Mapping[str, Any], outside: set[str]):
        super().__init__()
        self.site, self.outside = site, outside

    def _pyro_sample(self, msg) -> None:
        frames = tuple(frame for frame in self.site["cond_indep_stack"] if frame.name not in self.outside)
        msg["cond_indep_stack"] = (*frames, *msg["cond_indep_stack"])
        msg["scale"], msg["mask"] = self.site["scale"], self.site["mask"]


class _Factor(NamedTuple):
    """A log-factor with named dimensions, and the plates over which it is a product."""

    tensor: torch.Tensor
    names: str
    plates: frozenset[str]


class _Backwards:
    """The distribution of each enumerated site given the sites drawn before it, with the others summed out.

    Sites are summed out one at a time: those in more plates first, and among these the last of the program first; the
    joined factors hold each site's distribution given the remaining sites. Draws in the opposite order have the exact
    joint distribution, in time linear in the number of sites for a chain or a tree (forward filtering, backward
    sampling; Obermeyer et al. 2019, arXiv:1902.03210).
    """

    def __init__(self, listed: Trace, sites: tuple[str, ...]):
        self.listed = listed
        for name in {*sites} - {*listed.nodes}:
            raise BadInput(
                f"site {name!r} is enumerated in the model in some runs only, as in a loop over a part of a plate's"
                " elements: loop over all of them, or make the plate a vectorized one"
            )
        self.symbols = {name: listed.nodes[name]["infer"]["_enumerate_symbol"] for name in sites}
        self.plates = {name: self._plates(listed.nodes[name]) for name in sites}
        place = {name: number for number, name in enumerate(listed.nodes) if name in self.symbols}
        self.order = sorted(sites, key=lambda name: (len(self.plates[name]), place[name]))
        self.values: dict[str, torch.Tensor] = {}  # by symbol, with dimension names
        self.joined: dict[str, _Factor] = {}
        self.width = 1
        self._sum_out()

    def _plates(self, site: Mapping[str, Any]) -> frozenset[str]:
        return frozenset(
            self.listed.plate_to_symbol[frame.name] for frame in site["cond_indep_stack"] if frame.vectorized
        )

    def _factors(self) -> list[_Factor]:
        of_symbol = {symbol: name for name, symbol in self.symbols.items()}
        found = []
        for name, site in self.listed.nodes.items():
            if site["type"] != "sample":
                continue
            log_prob = site["packed"]["unscaled_log_prob"]
            if name not in self.symbols:
                log_prob = packed.scale_and_mask(log_prob, mask=site["packed"]["mask"])
            names, plates = log_prob._pyro_dims, self._plates(site)
            for symbol in set(names) & set(of_symbol):
                if not self.plates[of_symbol[symbol]] <= plates:
                    raise BadInput(
                        f"site {name!r} depends on {of_symbol[symbol]!r}, which the model enumerates in a plate that"
                        f" {name!r} is not in, so its elements are dependent: draw {of_symbol[symbol]!r} in the guide"
                    )
            if name in self.symbols or set(names) & set(of_symbol):
                found.append(_Factor(log_prob, names, plates))
        return found

    def _sum_out(self) -> None:
        factors = dict(enumerate(self._factors()))
        users: dict[str, set[int]] = {symbol: set() for symbol in self.symbols.values()}
        of_symbol = {symbol: name for name, symbol in self.symbols.items()}

        def keep(number: int, factor: _Factor) -> None:
            factors[number] = factor
            for symbol in users.keys() & set(factor.names):
                users[symbol].add(number)

        for number, factor in list(factors.items()):
            keep(number, factor)
        for name in reversed(self.order):
            symbol, plates = self.symbols[name], self.plates[name]
            mine = []
            for number in sorted(users.pop(symbol)):
                factor = factors.pop(number)
                for other in users.keys() & set(factor.names):
                    users[other].discard(number)
                    if not self.plates[of_symbol[other]] <= plates:
                        raise BadInput(
                            f"sites {name!r} and {of_symbol[other]!r} are enumerated in the model, are in plates that"
                            " cross, and share a term, so that all their elements are dependent: draw one in the guide"
                        )
                mine.append(_over(factor, factor.plates - plates))
            if not mine:  # a site of one value
                continue
            joined = _product(mine, plates)
            self.width = max(self.width, math.prod(_sizes(joined)[one] for one in joined.names if one in of_symbol))
            needed = 2 * joined.tensor.numel() * joined.tensor.element_size()
            if needed > MEMORY_LIMIT:
                raise BadInput(
                    f"site {name!r}, which the model enumerates, depends on so many others that its conditional needs"
                    f" {needed / 2**30:.3g} GiB: put chains under pyro.markov, take fewer rows, or draw it in the guide"
                )
            self.joined[name] = joined
            left = log_sum(joined.tensor, joined.names.index(symbol))
            keep(len(self.joined) + len(self.listed.nodes), _Factor(left, joined.names.replace(symbol, ""), plates))

    def conditional(self, name: str) -> Any:
        """The distribution of a site given the values of the sites before it in ``order``."""
        fn, symbol = self.listed.nodes[name]["fn"], self.symbols[name]
        if name not in self.joined:
            return fn
        tensor, names, _ = self.joined[name]
        for other in self.values:
            if other in names:
                tensor, names = _at(tensor, names, other, *self.values[other])
        logits = tensor.movedim(names.index(symbol), -1)
        dims = [self.listed.symbol_to_dim[one] for one in names.replace(symbol, "")]
        order = sorted(range(len(dims)), key=dims.__getitem__)
        shape = [1] * -min(dims, default=0)
        for place, dim in enumerate(dims):
            shape[dim] = logits.shape[place]
        logits = logits.permute(*order, -1).reshape(*shape, logits.shape[-1])
        if isinstance(fn, dist.Bernoulli):
            return dist.Bernoulli(logits=logits[..., 1] - logits[..., 0])
        return type(fn)(logits=logits)

    def take(self, name: str, value: torch.Tensor) -> None:
        """Record the value of a site, drawn or given."""
        if isinstance(self.listed.nodes[name]["fn"], dist.OneHotCategorical):
            value = value.argmax(-1)
        names = "".join(
            self.listed.nodes[name]["infer"]["_dim_to_symbol"][dim - value.dim()]
            for dim, size in enumerate(value.shape)
            if size > 1
        )
        self.values[self.symbols[name]] = value.long().squeeze(), names


def _sizes(factor: _Factor) -> dict[str, int]:
    return dict(zip(factor.names, factor.tensor.shape, strict=True))


def _over(factor: _Factor, plates: frozenset[str]) -> _Factor:
    """The product over the elements of the given plates."""
    gone = [place for place, name in enumerate(factor.names) if name in plates]
    tensor = factor.tensor.sum(gone) if gone else factor.tensor
    return _Factor(tensor, "".join(name for name in factor.names if name not in plates), factor.plates - plates)


def _product(factors: list[_Factor], plates: frozenset[str]) -> _Factor:
    names = "".join(sorted(set("".join(factor.names for factor in factors))))
    total: Any = 0.0
    for factor in factors:
        total = total + laid_out(factor.tensor, factor.names, names)
    return _Factor(total, names, plates)


def _at(tensor: torch.Tensor, names: str, symbol: str, index: torch.Tensor, of_index: str) -> tuple[torch.Tensor, str]:
    """The factor at the values ``index`` of a site."""
    others = "".join(sorted(set(names.replace(symbol, "")) | set(of_index)))
    tensor, index = laid_out(tensor, names, symbol + others), laid_out(index, of_index, symbol + others)
    shape = torch.broadcast_shapes(tensor.shape[1:], index.shape[1:])
    return tensor.expand(-1, *shape).gather(0, index.expand(1, *shape)).squeeze(0), others
