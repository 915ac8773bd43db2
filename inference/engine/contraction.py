"""Sums over products of log-factors with named dimensions, one variable at a time.

Pyro's contraction (``pyro.ops.contract``) determines which factors are joined in which plates; the ring here computes
the sums. Pyro's own ring leaves the log domain to multiply, so that a sum of tiny products rounds to a constant (below
e⁻⁸⁷ in float32): two states whose observations differ by a hundred nats suffice. One ``logsumexp`` per variable keeps
every finite value.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from pyro.ops.rings import LogRing
from torch import Tensor

Names = str  # a dimension is a character, as in ``pyro.ops.packed``
MEMORY_LIMIT = 4 * 2**30  # the default limit of one sum, in bytes


class TooLarge(Exception):
    """Raised for a sum that needs more memory than the limit."""

    def __init__(self, names: Names):
        super().__init__(names)
        self.names = names


class Memory:
    """The bytes that the enumerated values of one run hold until its gradient, and their limit.

    >>> memory = Memory(limit=1000)
    >>> memory.fits(800), memory.fits(300), memory.held
    (True, False, 1100)
    """

    def __init__(self, limit: float = math.inf):
        self.limit, self.held = limit, 0

    def fits(self, needed: int) -> bool:
        self.held += needed
        return self.held <= self.limit


@dataclass(frozen=True)
class Factor:
    """A factor in a step, and its layout there."""

    place: int
    order: tuple[int, ...] | None
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Step:
    """Factors that are joined, and the dimension of the result that is summed out; None for the last one."""

    factors: tuple[Factor, ...]
    axis: int | None
    names: Names
    numbers: int


@dataclass(frozen=True)
class Plan:
    """The steps of a sum, its result, the number of elements of all joined factors, and the names of the largest."""

    steps: tuple[Step, ...]
    names: Names
    numbers: int
    largest: Names


@lru_cache(maxsize=512)
def plan(factors: tuple[Names, ...], sizes: tuple[tuple[int, ...], ...], over: frozenset[str]) -> Plan:
    """The order in which ``over`` is summed out of a product: the variable with the smallest joint table first.

    >>> [step.numbers for step in plan(("a", "ab", "bc"), ((9,), (9, 9), (9, 9)), frozenset("abc")).steps]
    [81, 81, 9, 1]
    """
    size = {name: n for names, shape in zip(factors, sizes, strict=True) for name, n in zip(names, shape, strict=True)}
    held = dict(enumerate(factors))
    users: dict[str, set[int]] = {name: set() for name in over}
    for place, names in held.items():
        for name in over.intersection(names):
            users[name].add(place)

    def joined(places: Iterable[int]) -> Names:
        return "".join(sorted(set().union(*(held[place] for place in places))))

    def numbers(names: Iterable[str]) -> int:
        return math.prod(size[name] for name in names)

    def laid_out(place: int, names: Names) -> Factor:
        own = held[place]
        order = tuple(own.index(name) for name in names if name in own)
        return Factor(
            place, None if order == tuple(range(len(own))) else order, tuple(size[n] if n in own else 1 for n in names)
        )

    def step(places: Collection[int], summed: str | None) -> Step:
        names = joined(places)
        # Small factors are added first.
        ordered = sorted(places, key=lambda place: (numbers(held[place]), place))
        axis = None if summed is None else names.index(summed)
        left = names if summed is None else names.replace(summed, "")
        return Step(tuple(laid_out(place, names) for place in ordered), axis, left, numbers(names))

    steps: list[Step] = []
    total, largest = 0, ""
    waiting = [(numbers(joined(places)), name) for name, places in users.items() if places]
    heapq.heapify(waiting)
    while waiting:
        cost, name = heapq.heappop(waiting)
        if name not in users:
            continue
        now = numbers(joined(users[name]))
        if now != cost:
            heapq.heappush(waiting, (now, name))
            continue
        places = users.pop(name)
        steps.append(step(places, name))
        total += cost
        if cost > numbers(largest) or not largest:
            largest = joined(places)
        place = len(factors) + len(steps) - 1
        held[place] = steps[-1].names
        for old in places:
            del held[old]
        for other in over.intersection(steps[-1].names):
            users[other] -= places
            users[other].add(place)
            heapq.heappush(waiting, (numbers(joined(users[other])), other))
    steps.append(step(list(held), None))
    return Plan(tuple(steps), steps[-1].names, total + steps[-1].numbers, largest or steps[-1].names)


class SumProduct(LogRing):
    """Sums of products of probabilities in log space, for ``pyro.ops.contract``.

    It is exact up to rounding for any range of the factors, keeps a zero probability as −∞ with gradient zero, and
    raises :class:`TooLarge` before a sum that exceeds the limit of ``memory``.
    """

    def __init__(self, memory: Memory | None = None):
        super().__init__()
        self.memory = memory or Memory()

    def sumproduct(self, terms: Sequence[Any], dims: Collection[str]) -> Any:
        if len(terms) == 1 and not dims:
            return terms[0]
        names = tuple(term._pyro_dims for term in terms)
        found = plan(names, tuple(tuple(term.shape) for term in terms), frozenset(dims))
        # Memory for the gradient: the joined factor, and its exponentials during the sum.
        needed = 2 * found.numbers * terms[0].element_size()
        if not self.memory.fits(needed):
            raise TooLarge(found.largest)
        held: list[Tensor] = list(terms)
        for step in found.steps:
            total: Any = None
            for factor in step.factors:
                tensor = held[factor.place]
                if factor.order is not None:
                    tensor = tensor.permute(factor.order)
                if tensor.dim() != len(factor.shape):
                    tensor = tensor.reshape(factor.shape)
                total = tensor if total is None else total + tensor
            held.append(total if step.axis is None else log_sum(total, step.axis))
        result = held[-1]
        if result is terms[0]:
            result = result[...]
        result._pyro_dims = found.names  # type: ignore[attr-defined]
        return result

    def product(self, term: Any, ordinal: Collection[str]) -> Any:
        names = term._pyro_dims
        gone = [place for place, name in enumerate(names) if name in ordinal]
        if not gone:
            return term
        result = term.sum(gone)
        result._pyro_dims = "".join(name for name in names if name not in ordinal)
        return result


def laid_out(tensor: Tensor, own: Names, names: Names) -> Tensor:
    """A tensor with dimensions of the given names, of size 1 for names that it lacks.

    >>> laid_out(torch.zeros(2, 3), "ba", "abc").shape
    torch.Size([3, 2, 1])
    """
    ordered = tensor.permute([own.index(name) for name in names if name in own])
    sizes = iter(ordered.shape)
    return ordered.reshape([next(sizes) if name in own else 1 for name in names])


def log_sum(tensor: Tensor, dim: int) -> Tensor:
    """``logsumexp`` with gradient zero, not NaN, where every term is −∞; the sum is then a very low finite number.

    >>> x = torch.full((2,), -torch.inf, requires_grad=True)
    >>> log_sum(x, 0).backward()
    >>> x.grad.tolist(), impossible(log_sum(x, 0)).item()
    ([0.0, 0.0], -inf)
    """
    return tensor.clamp(min=_floor(tensor.dtype)).logsumexp(dim)


def impossible(tensor: Tensor) -> Tensor:
    """Replace the very low number by which :func:`log_sum` represents −∞ by −∞."""
    return torch.where(tensor <= _floor(tensor.dtype) / 2, -torch.inf, tensor)


def _floor(dtype: torch.dtype) -> float:
    """Below every log-probability, and far enough from the lowest float that many can be added."""
    return -1e30 if torch.finfo(dtype).max > 1e30 else float(torch.finfo(dtype).min) / 64
