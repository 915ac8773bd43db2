"""Enumerated sites that the guide does not sample: their values are laid out, and summed out by variable elimination.

A chain or a tree of such sites has too many joint values to enumerate. Variables are summed out one at a time, each
from the few factors that contain it (Obermeyer et al. 2019, "Tensor variable elimination for plated factor graphs",
arXiv 1902.03210). The values of a site are along a dimension of their own, which other sites reuse where
``pyro.markov`` or a sequential plate separates them.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations, count
from typing import Any

import torch
from opt_einsum import get_symbol
from pyro.ops.contract import contract_tensor_tree
from pyro.poutine.util import site_is_subsample
from torch import Tensor

from ...errors import ANY, UnsupportedSite, first_line
from ..estimators._distributions import CATEGORICAL, coordinate_values, elementary, list_size, listed_support
from .contraction import Memory, SumProduct, TooLarge, impossible, laid_out
from .records import PARTICLES, Frame, Frames, Site
from .terms import NeedsJoint

MAX_DIMS = 60  # torch allows 64

Place = frozenset[tuple[str, int]]  # sequential plates by name, with the number of an element


def is_marked(msg: Mapping[str, Any]) -> bool:
    """Whether a statement of the model asks for enumeration.

    Raises UnsupportedSite for a mark that elimination does not support.
    """
    mark = msg["infer"].get("enumerate")
    if not mark or msg["is_observed"]:
        return False
    if mark != "parallel":
        raise UnsupportedSite(
            msg["name"],
            ANY,
            f"the guide does not draw it and the model marks it infer={{'enumerate': {mark!r}}}; mark it 'parallel', "
            "which sums over it exactly",
        )
    if msg["infer"].get("num_samples") is not None:
        raise UnsupportedSite(
            msg["name"],
            ANY,
            "infer={'num_samples': …} asks for draws of a site that the guide leaves out, which gives no exact sum;"
            " drop num_samples, or draw the site in the guide",
        )
    return True


@dataclass
class Listed:
    """An enumerated site whose values are along a dimension: the dimension and its number."""

    name: str
    dim: int
    number: int
    frames: Frames
    values: Tensor  # (L, *joint plates, *event)
    event_dim: int
    joint: bool


class Listing:
    """Lays out the values of a program's enumerated sites, and records the site of each dimension.

    The messenger that runs the program calls :meth:`enter` before a statement is drawn and :meth:`leave` after it.

    Args:
        first: enumerated values use the dimensions from here to the left.
        joint: sites whose values are enumerated jointly over their plates.
        nesting: the number of dimensions for plates.
        memory: the bytes that enumerated values hold in this run, and their limit.
        drawn: the sites that the guide draws; these take their draws. None in the guide, where :meth:`lay_out` is
            called for the sites to enumerate.
        before: the listing of the guide, for the model that runs after it.
        shares: whether sites in different elements of a sequential plate use the same dimension, and are invisible to
            each other. An element is identified by its number, so that a second loop over the plate sees the sites of
            the same element in the first.
    """

    def __init__(
        self,
        first: int,
        joint: Collection[str],
        nesting: int,
        memory: Memory | None = None,
        drawn: Collection[str] | None = None,
        before: Listing | None = None,
        shares: bool = True,
    ):
        self.shares = shares
        self.drawn, self.first, self.joint, self.nesting = drawn, first, joint, nesting
        self.memory = memory or Memory()
        self.given: dict[str, Listed] = before.listed if before is not None else {}
        self.by_number: list[Listed] = before.by_number if before is not None else []
        self.listed: dict[str, Listed] = {}
        self._start = min([first, *[listed.dim - 1 for listed in self.given.values()]])
        self._here: tuple[Place, bool] = (frozenset(), True)
        self.dims: dict[str, dict[int, int]] = {}  # by site: the sites of its dimensions
        self._values: dict[str, dict[int, int]] = {}  # the same for its value
        self._depths: dict[str, int] = {}
        # By sequential plates and elements of some of them: the dimensions in use there, during the run.
        self._loops: dict[frozenset[str], dict[Place, dict[int, int]]] = {}

    def enter(self, msg: Any) -> None:
        """Process a statement before it is drawn, and enumerate its values if the model asks for that."""
        if site_is_subsample(msg):
            return
        name, infer = msg["name"], msg["infer"]
        asked = self.drawn is not None and not msg["done"] and name not in self.drawn and is_marked(msg)
        if not (asked or self.by_number or self.drawn is None):  # it depends on no enumerated site: there is none yet
            self.dims[name] = {}
            if infer.get("_markov_scope") is not None:
                self._depths[name] = infer["_markov_depth"]
            return
        place = element_of(msg) if self.shares else frozenset()
        dims: dict[int, int] = {}
        for plates, by_element in self._loops.items():
            here = _within(place, plates)
            if len(here) == len(plates):
                self._see(name, dims, by_element.get(here, {}))
        scope = infer.get("_markov_scope")
        if scope is not None:
            for other, depth in scope.items():
                if self._depths.get(other) == depth:  # else its markov context has ended
                    self._see(name, dims, self._values.get(other, {}))
            self._depths[name] = infer["_markov_depth"]
        if name in self.given:
            self._see(name, dims, {self.given[name].dim: self.given[name].number})
        self.dims[name], self._here = dims, (place, scope is None)
        if asked:
            self.lay_out(msg)

    def _see(self, name: str, dims: dict[int, int], more: Mapping[int, int]) -> None:
        for dim, number in more.items():
            if dims.setdefault(dim, number) != number:
                one, other = (self.by_number[each].name for each in (dims[dim], number))
                if self.given:
                    raise NeedsListing(name)
                raise UnsupportedSite(
                    name,
                    ANY,
                    f"pyro.markov shows it {one!r} and {other!r}, which it hid from each other; raise history=",
                )

    def lay_out(self, msg: Any) -> None:
        """Give a site all of its values at once, along a dimension that no visible site uses."""
        dims, (place, lasting) = self.dims[msg["name"]], self._here
        taken = set(dims)
        if lasting:
            # A later statement may see both this site and the sites of the same element.
            for plates, by_element in self._loops.items():
                taken |= by_element.get(_within(place, plates), {}).keys()
        dim = self._start
        while dim in taken:
            dim -= 1
        name, fn = msg["name"], msg["fn"]
        if -dim > MAX_DIMS:
            raise UnsupportedSite(
                name,
                ANY,
                f"it sees {len(taken)} other enumerated sites, each with its own dimension, and torch has no more;"
                " put loops under pyro.markov, or make them a vectorized plate",
            )
        if len(fn.batch_shape) >= -dim and fn.batch_shape[dim] > 1:
            raise UnsupportedSite(
                name,
                ANY,
                "it depends on an enumerated site that pyro.markov hides from it; raise pyro.markov(…, history=…)",
            )
        joint = name in self.joint
        values = self._values_of(msg, joint)
        listed = Listed(
            name,
            dim,
            len(self.by_number),
            frozenset() if joint else plates_of(msg),
            values,
            fn.event_dim,
            joint,
        )
        # values is (L, *plates or nothing, *event); the rest of the dimensions to its right are 1.
        between = -dim - (values.dim() - fn.event_dim)
        laid = values.reshape(values.shape[:1] + (1,) * between + values.shape[1:])
        support = getattr(values, CATEGORICAL, None)
        if support is not None:
            setattr(laid, CATEGORICAL, support)
        self.listed[name] = listed
        self.by_number.append(listed)
        dims[dim] = listed.number
        if lasting:
            by_element = self._loops.setdefault(frozenset(plate for plate, _ in place), {})
            for size in range(len(place) + 1):
                for part in combinations(place, size):
                    by_element.setdefault(frozenset(part), {})[dim] = listed.number
        msg["value"] = laid
        msg["done"] = True

    def _values_of(self, msg: Any, joint: bool) -> Tensor:
        fn = msg["fn"]
        values = coordinate_values(fn)
        if isinstance(values, str):
            raise UnsupportedSite(
                msg["name"],
                ANY,
                f"the model marks it infer={{'enumerate': 'parallel'}}, and {values}; draw it in the guide",
            )
        if not joint and elementary(fn).event_shape == fn.event_shape:
            return values
        trailing = min(self.nesting, len(fn.batch_shape)) if joint else 0
        count, numbers = list_size(fn, values, trailing)
        if not self.memory.fits(2 * count * numbers * values.element_size()):
            raise too_large(self.memory, [msg["name"]])
        values = listed_support(fn, values, joint=trailing, limit=count)
        return values[(slice(None),) + (0,) * (len(fn.batch_shape) - trailing)]

    def leave(self, msg: Any) -> None:
        """Record the enumerated sites that a statement's value depends on."""
        name, value = msg["name"], msg["value"]
        if value is None or not self.dims.get(name):
            return
        batch = value.shape[: value.dim() - msg["fn"].event_dim]
        self._values[name] = {
            dim: number for dim, number in self.dims[name].items() if len(batch) >= -dim and batch[dim] > 1
        }


def element_of(msg: Mapping[str, Any]) -> Place:
    """The elements of sequential plates that contain a statement; plates looped over twice continue to count."""
    return frozenset((f.name, (f.counter - 1) % f.size) for f in msg["cond_indep_stack"] if not f.vectorized)


def _within(place: Place, plates: frozenset[str]) -> Place:
    return frozenset(element for element in place if element[0] in plates)


def plates_of(msg: Mapping[str, Any]) -> Frames:
    """The vectorized plates that contain a statement, without the plate of the particles."""
    return frozenset([(f.name, f.dim, f.size) for f in msg["cond_indep_stack"] if f.vectorized and f.name != PARTICLES])


def subsampled(msg: Mapping[str, Any]) -> frozenset[tuple[str, int | None]]:
    """The plates of which only some elements are visited; an element of a sequential one by its number."""
    return frozenset(
        (f.name, None if f.vectorized else f.counter)
        for f in msg["cond_indep_stack"]
        if f.full_size not in (None, f.size)
    )


class NeedsListing(Exception):
    """Raised if a chain of the guide depends on other sites so that its joint values must be enumerated."""


@dataclass
class Term:
    """A factor of the sum: a site's log-probability without its scale, and the enumerated sites that it depends on."""

    site: Site
    tensor: Tensor
    known: Mapping[int, int]  # the enumerated site of each dimension
    numbers: tuple[int, ...]
    scale: Any
    parts: frozenset[tuple[str, int | None]]
    place: int


@dataclass
class Cost:
    """A term of the bound: a tensor with named dimensions, and the plates that it still has."""

    name: str
    tensor: Tensor
    names: str
    frames: Frames
    scale: Any
    place: int
    like: Site
    factors: tuple[str, ...] = ()


@dataclass
class Terms:
    """The factors of one run of a model to be summed, with the enumerated sites that they depend on."""

    listing: Listing
    room: int
    symbols: Symbols
    found: list[Term] = field(default_factory=list)
    zero: Tensor | None = None  # the log-probability of a site whose own is a factor
    scaled: dict[str, Tensor] = field(default_factory=dict)  # in the guide, log q with scales and masks

    @property
    def of_guide(self) -> bool:
        return self.listing.drawn is None

    def take(
        self, site: Site, msg: Mapping[str, Any], tensor: Tensor, place: int, scaled: Tensor | None = None
    ) -> bool:
        """Whether a site's log-probability is a factor; if so it is stored here.

        In the guide ``scaled`` is log q with its scale and mask.
        """
        listing = self.listing
        listed = listing.listed.get(site.name)
        left = [dim for dim in range(-tensor.dim(), listing.first + 1) if tensor.shape[dim] > 1]
        if listed is None and not left:
            return False
        if listed is None and scaled is not None:
            raise NeedsListing(site.name)  # a site of the guide that is drawn for each of the enumerated values
        known = listing.dims.get(site.name, {})
        for dim in left:
            if dim not in known:
                raise UnsupportedSite(
                    site.name,
                    ANY,
                    f"its log-probability {tuple(tensor.shape)} has dimension {dim} of its own, or one of an enumerated"
                    " site that pyro.markov hides from it; declare a plate, or raise pyro.markov(…, history=…)",
                )
        frames = site.frames
        if listed is not None and listed.joint:
            gone = [dim for _, dim, _ in frames if tensor.dim() >= -dim]
            tensor, frames = tensor.sum(gone, keepdim=True) if gone else tensor, frozenset()
            if scaled is not None and gone:
                scaled = scaled.sum(gone, keepdim=True)
        if scaled is not None:
            self.scaled[site.name] = scaled
        numbers = tuple(known[dim] for dim in left)
        if listed is not None and listed.number not in numbers:  # a site of one value
            numbers = (*numbers, listed.number)
        for number in numbers:
            if not listing.by_number[number].frames <= frames:
                raise NeedsJoint(listing.by_number[number].name)
        site.frames = frames
        self.found.append(Term(site, tensor, known, numbers, msg["scale"], subsampled(msg), place))
        if self.zero is None:
            self.zero = tensor.new_zeros((1,) * self.room)
        site.summed, site.log_prob = True, self.zero
        return True

    def at(self, values: Mapping[str, Tensor]) -> Iterator[tuple[Term, Tensor]]:
        """Each factor at these values of the enumerated sites, laid out along plates; without its scale."""
        listed = {each.name: each for each in self.listing.by_number}
        index = {name: self._index(listed[name], value) for name, value in values.items() if name in listed}
        for term in self.found:
            known = term.known
            tensor = term.tensor
            sizes = dict(zip(range(-tensor.dim(), 0), tensor.shape, strict=True))
            left = [dim for dim in range(-tensor.dim(), self.listing.first + 1) if sizes[dim] > 1]
            own = tensor.shape[-self.room :] if tensor.dim() >= self.room else tensor.shape
            tensor = tensor.reshape([sizes[dim] for dim in left] + [1] * (self.room - len(own)) + list(own))
            for dim in left:
                where = index[self.listing.by_number[known[dim]].name]
                rows = torch.broadcast_shapes(tensor.shape[-self.room :], where.shape)
                tensor = tensor.expand(tensor.shape[: -self.room] + rows)
                tensor = tensor.gather(0, where.expand((1, *tensor.shape[1 : -self.room], *rows))).squeeze(0)
            yield term, tensor

    def _index(self, listed: Listed, value: Tensor) -> Tensor:
        """The indices of these values among the enumerated ones, along ``room`` dimensions of plates."""
        own, event = listed.values.shape[1:], listed.event_dim
        laid = value.reshape((1,) * (self.room + event - value.dim()) + value.shape)
        same = laid == listed.values.reshape(listed.values.shape[:1] + (1,) * (laid.dim() - len(own)) + own)
        same = same.flatten(1 + self.room).all(-1) if event else same
        if listed.joint:
            same = same.flatten(1).all(-1).reshape(same.shape[:1] + (1,) * self.room)
        return same.to(torch.uint8).argmax(0)

    def own(self, term: Term) -> list[int]:
        """The model's enumerated sites that a factor depends on; the guide's are left to an expectation."""
        return [number for number in term.numbers if self.listing.by_number[number].name in self.listing.listed]

    def components(self) -> Iterator[list[Term]]:
        """Factors that share enumerated sites of the model, directly or through others."""
        leader = list(range(len(self.listing.by_number)))

        def root(number: int) -> int:
            while leader[number] != number:
                leader[number] = leader[leader[number]]
                number = leader[number]
            return number

        numbers = [self.own(term) for term in self.found] if self.listing.given else [t.numbers for t in self.found]
        for own in numbers:
            for number in own[1:]:
                leader[root(number)] = root(own[0])
        groups: dict[int, list[Term]] = {}
        for term, own in zip(self.found, numbers, strict=True):
            if own:
                groups.setdefault(root(own[0]), []).append(term)
        yield from groups.values()

    def summed(self) -> list[Cost]:
        """One cost for each component: the logarithm of its sum."""
        return [cost for terms in self.components() for cost in self._sum(terms)]

    def _sum(self, terms: list[Term]) -> Iterator[Cost]:
        names = [site.name for site in self._listed(terms)]
        _check_parts(terms, names)
        scale = _common_scale(terms, names)
        symbols = self.symbols
        tree: OrderedDict[frozenset[str], list[Tensor]] = OrderedDict()
        over: set[str] = set()
        for term in terms:
            packed = symbols.packed(term.tensor, term.known, term.site.frames)
            over.update(symbols.of_listed(number) for number in self.own(term))
            tree.setdefault(frozenset(symbols.of_frame(frame) for frame in term.site.frames), []).append(packed)
        ring = SumProduct(self.listing.memory)
        try:
            contracted = contract_tensor_tree(tree, over, ring=ring)
        except TooLarge as error:
            joined = [n for n in names if symbols.of_listed(self.listing.listed[n].number) in error.names]
            raise too_large(self.listing.memory, joined or names) from None
        except NotImplementedError as error:
            # Pyro raises this where plates cross: a site that is summed out in one plate depends on the other.
            apart = [site for site in self._listed(terms) if site.frames]
            if not apart:
                raise UnsupportedSite(names[-1], ANY, first_line(error)) from None
            raise NeedsJoint(apart[-1].name) from None
        first, place = terms[0].site, terms[-1].place
        name = f"sum over {_named(names)}"
        factors = tuple(term.site.name for term in terms)
        parts = [(ordinal, tensor) for ordinal, tensors in contracted.items() for tensor in tensors]
        for part, (ordinal, tensor) in enumerate(parts):
            log_prob = impossible(tensor)
            log_prob = log_prob if isinstance(scale, (int, float)) and scale == 1 else scale * log_prob
            frames = frozenset(symbols.frames[symbol] for symbol in ordinal)
            yield Cost(
                f"{name} ({part + 1})" if part else name,
                log_prob,
                tensor._pyro_dims,
                frames,
                scale,
                place,
                first,
                factors,
            )

    def laid_out(self, cost: Cost) -> Site:
        """A cost as a site, placed after the last of its factors."""
        log_prob = self.symbols.unpacked(cost.tensor, cost.names, self.room)
        made = Site(cost.name, cost.like.fn, cost.like.value, cost.frames, log_prob, scale=cost.scale)
        made.sums = cost.factors
        return made

    def _listed(self, terms: Sequence[Term]) -> list[Listed]:
        numbers = dict.fromkeys(number for term in terms for number in self.own(term))
        return [self.listing.by_number[number] for number in sorted(numbers)]


class Symbols:
    """A character for each plate, each enumerated site, and each dimension of particles and of the guide's values."""

    def __init__(self, first: int):
        self.first = first
        self.symbols: dict[Any, str] = {}
        self.frames: dict[str, Frame] = {}
        self.dims: dict[str, int] = {}

    def _of(self, key: Any, dim: int | None = None) -> str:
        symbol = self.symbols.get(key)
        if symbol is None:
            symbol = self.symbols[key] = get_symbol(len(self.symbols))
            if dim is not None:
                self.dims[symbol] = dim
        return symbol

    def of_frame(self, frame: Frame) -> str:
        symbol = self._of(frame, frame[1])
        self.frames[symbol] = frame
        return symbol

    def of_listed(self, number: int) -> str:
        return self._of(number)

    def packed(self, tensor: Tensor, known: Mapping[int, int], frames: Frames) -> Any:
        plates = {frame[1]: frame for frame in frames}
        names = ""
        for dim, size in zip(range(-tensor.dim(), 0), tensor.shape, strict=True):
            if size == 1:
                continue
            if dim <= self.first:
                names += self.of_listed(known[dim])
            elif dim in plates:
                names += self.of_frame(plates[dim])
            else:
                names += self._of(("dim", dim), dim)
        tensor = tensor.squeeze() if len(names) < tensor.dim() else tensor[...]
        tensor._pyro_dims = names
        return tensor

    def unpacked(self, tensor: Tensor, names: str, room: int) -> Tensor:
        dims = [self.dims[name] for name in names]
        order = sorted(range(len(dims)), key=dims.__getitem__)
        shape = [1] * max(room, *(-dim for dim in dims), 0)
        for dim, size in zip(dims, tensor.shape, strict=True):
            shape[dim] = size
        return tensor.permute(order).reshape(shape)


def _check_parts(terms: Sequence[Term], names: Sequence[str]) -> None:
    """Refuse a sum that spans a subsampled plate: a sum over part of its elements does not estimate the full sum."""
    for term in terms[1:]:
        odd = term.parts ^ terms[0].parts
        if odd:
            plate = min(name for name, _ in odd)
            raise UnsupportedSite(
                names[0],
                ANY,
                f"it is summed over outside the subsampled plate {plate!r}, and a part of the data does not estimate"
                " such a sum over all of it; run the plate in full, or draw the site in the guide",
            )


def _common_scale(terms: Sequence[Term], names: Sequence[str]) -> Any:
    first = terms[0].scale
    for term in terms:
        scale = term.scale
        if isinstance(scale, Tensor) and scale.numel() > 1:
            raise UnsupportedSite(
                term.site.name, ANY, f"{names[0]!r} is summed over in it, and its scale is no single number"
            )
        if scale is first:
            continue
        if isinstance(scale, Tensor) or isinstance(first, Tensor):
            same = float(scale) == float(first)
        else:
            same = scale == first
        if not same:
            raise UnsupportedSite(
                term.site.name,
                ANY,
                f"its scale is {float(scale):.6g} where that of {terms[0].site.name!r} is {float(first):.6g}, and both"
                f" are joined by the sum over {names[0]!r}, which has one scale; scale them alike",
            )
    return first


def _named(names: Sequence[str]) -> str:
    return f"{', '.join(map(repr, names[:3]))}{', …' if len(names) > 3 else ''}"


class TooMuchMemory(UnsupportedSite):
    """A sum over enumerated sites that needs more memory than the limit."""


def too_large(memory: Memory, names: Sequence[str]) -> TooMuchMemory:
    said = ", ".join([repr(name) for name in names[:6]] + ["…"] * (len(names) > 6))
    return TooMuchMemory(
        names[0],
        ANY,
        f"summing over {said} needs {_bytes(memory.held)} at once, more than the limit of {_bytes(memory.limit)}; put"
        " chains under pyro.markov, take a smaller batch or fewer particles, draw some of these sites in the guide"
        " ('rloo'), or raise SiteELBO(memory_limit=…)",
    )


def _bytes(number: float) -> str:
    for power, unit in ((4, "TiB"), (3, "GiB"), (2, "MiB"), (1, "KiB")):
        if number >= 1024**power:
            return f"{number / 1024**power:.3g} {unit}"
    return f"{number:.0f} bytes"


def expected(model: Terms, guide: Terms, kl_weight: Any) -> list[Cost]:
    """The terms of both programs, in expectation over the sites that the guide enumerates; one cost per set of plates.

    ``guide.found`` holds log q of these sites. From the last of them to the first, the terms that depend on a site are
    added up, weighted by its probabilities and summed over its values: in time linear in their number for a chain.
    """
    symbols, listing = model.symbols, guide.listing
    costs: list[tuple[Tensor, str, Frames]] = []
    for cost in model.summed():
        costs.append((cost.tensor, cost.names, cost.frames))
    for term in model.found:
        if not model.own(term):
            weight = term.scale * (kl_weight if term.site.latent else 1.0)
            tensor = symbols.packed(term.tensor, term.known, term.site.frames)
            costs.append((weight * tensor, tensor._pyro_dims, term.site.frames))
    log_q: dict[int, tuple[Tensor, str]] = {}
    for term in guide.found:
        tensor = symbols.packed(term.tensor, term.known, term.site.frames)
        log_q[listing.listed[term.site.name].number] = tensor, tensor._pyro_dims
        tensor = symbols.packed(guide.scaled[term.site.name], term.known, term.site.frames)
        costs.append((-kl_weight * tensor, tensor._pyro_dims, term.site.frames))
    first = guide.found[0].site
    place = max([term.place for term in model.found], default=-1)
    held, numbers = dict(enumerate(costs)), count(len(costs))
    users: dict[str, set[int]] = {symbols.of_listed(number): set() for number in log_q}
    for number, (_, names, _) in held.items():
        for symbol in users.keys() & set(names):
            users[symbol].add(number)
    for number in sorted(log_q, reverse=True):
        symbol = symbols.of_listed(number)
        logits, of_q = log_q[number]
        by_plates: dict[Frames, list[tuple[Tensor, str]]] = {}
        for used in sorted(users.pop(symbol)):
            tensor, names, frames = held.pop(used)
            for other in users.keys() & set(names):
                users[other].discard(used)
            by_plates.setdefault(frames, []).append((tensor, names))
        for frames, terms in by_plates.items():
            names = "".join(sorted(set(of_q).union(*(own for _, own in terms))))
            total: Any = sum(laid_out(tensor, own, names) for tensor, own in terms)
            needed = 2 * total.numel() * total.element_size()
            if not listing.memory.fits(needed):
                raise too_large(listing.memory, list(listing.listed))
            probabilities = laid_out(logits, of_q, names).exp()
            # Impossible values contribute zero although their log-probability is −∞, which must not reach q's gradient.
            possible = torch.where(probabilities > 0, total, torch.zeros_like(total))
            left, names = (probabilities * possible).sum(names.index(symbol)), names.replace(symbol, "")
            made = next(numbers)
            held[made] = left, names, frames
            for other in users.keys() & set(names):
                users[other].add(made)
    named = _named([listing.by_number[number].name for number in sorted(log_q)])
    together: dict[Frames, list[tuple[Tensor, str]]] = {}
    for tensor, names, frames in held.values():
        together.setdefault(frames, []).append((tensor, names))
    found = []
    for part, (frames, terms) in enumerate(together.items()):
        names = "".join(sorted(set().union(*(own for _, own in terms))))
        total = sum(laid_out(tensor, own, names) for tensor, own in terms)
        name = f"expectation over {named}" + (f" ({part + 1})" if part else "")
        found.append(Cost(name, total, names, frames, 1.0, place, first))
    return found
