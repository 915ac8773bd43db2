"""What Pyro's validation refuses in a run of the programs, found in less time."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch.distributions import Distribution, constraints
from torch.distributions.utils import lazy_property

from ...errors import ANY, UnsupportedSite
from ..engine.programs import element_support, in_support
from ..estimators._distributions import elementary, parts_of
from .vmapped import validates


class Checks:
    """Whether parameters and values of sites satisfy their constraints.

    Unlike Pyro's validation it reads a tensor once, until it is written to; of ``held``, tensors that live as long as
    the checks, each part is read once too. NaN is left to the log-probability, which is then NaN: a constraint that
    only refuses NaN is skipped. So are sites whose distribution has ``validate_args=False``, once `learn` has met them.
    """

    def __init__(self, held: Iterable[torch.Tensor] = ()):
        self._skipped: dict[str, frozenset[str]] = {}
        self._held = {_storage(tensor) for tensor in held} - {None}
        self._good: dict[tuple, tuple[Any, Any, int]] = {}  # by place: constraint, tensor and version

    def learn(self, program: str, sites: Iterable[Mapping[str, Any]]) -> None:
        """Note the sites of a program's validated run whose distribution has ``validate_args=False``."""
        if program not in self._skipped:
            self._skipped[program] = frozenset(site["name"] for site in sites if not validates(site["fn"]))

    def passes(self, program: str, site: Mapping[str, Any], drawn: Mapping[str, Any] | None = None) -> bool:
        """Whether the site's parameters and its value satisfy their constraints.

        The value may have been drawn at another site, ``drawn``: it is then in the support of that distribution.
        """
        return all(self._holds(*one) for one in self._conditions(program, site, drawn))

    def tensors(
        self, program: str, site: Mapping[str, Any], drawn: Mapping[str, Any] | None = None
    ) -> Iterator[torch.Tensor]:
        """The same as tensors, without a look at a number: each is true where a constraint is satisfied."""
        for _, constraint, value in self._conditions(program, site, drawn):
            inside = in_support(constraint, value)
            if inside is not None:
                yield inside

    def _conditions(
        self, program: str, site: Mapping[str, Any], drawn: Mapping[str, Any] | None
    ) -> Iterator[tuple[tuple[str, ...], Any, torch.Tensor]]:
        """Place, constraint and value of what can be wrong at a site."""
        name = site["name"]
        if name in self._skipped.get(program, ()):
            return
        inside = None if drawn is None else element_support(drawn["fn"])
        found = [
            ((program, name, f"{place}.{key}"), constraint, value)
            for place, one in enumerate(_within(site["fn"]))
            for key, constraint, value in _parameters(one)
        ]
        support = element_support(site["fn"])
        if support is None or support is not inside:
            found.append(((name, "value"), support, site["value"]))
        for place, constraint, value in found:
            while isinstance(constraint, constraints.independent):
                constraint = constraint.base_constraint
            if constraint is not None and not isinstance(constraint, _ANY_NUMBER) and isinstance(value, torch.Tensor):
                yield place, constraint, value

    def _holds(self, key: tuple[str, ...], constraint: Any, value: torch.Tensor) -> bool:
        held = _storage(value) in self._held
        mark = (value.data_ptr(), value.shape, value.stride()) if held else value
        where, version = (*key, mark) if held else key, None if value.is_inference() else value._version
        before = self._good.get(where)
        if before is not None and before[0] is constraint and (held or before[1] is value) and before[2] == version:
            return True
        inside = in_support(constraint, value)
        if inside is not None and not bool(inside.all()):
            return False
        if version is not None:
            self._good[where] = constraint, mark, version
        return True


def check_invertible(name: str, site: Mapping[str, Any]) -> None:
    """Raise UnsupportedSite for a flow that scores its own last draw only: given draws are scored as well."""
    fn = elementary(site["fn"])
    if site["is_observed"] or not isinstance(fn, torch.distributions.TransformedDistribution):
        return
    value = site["value"].detach().clone()  # Pyro knows a cached draw by its identity
    with torch.no_grad():
        for transform in reversed(list(parts_of(fn.transforms))):
            try:
                value = transform.inv(value)
            except KeyError:  # how Pyro's flows without an inverse say so
                raise UnsupportedSite(
                    name,
                    ANY,
                    f"{type(transform).__name__} has no inverse, so that only its own last draw can be scored: take a"
                    " flow that has one, such as affine_autoregressive, affine_coupling or spline",
                ) from None


def _storage(tensor: torch.Tensor) -> int | None:
    return tensor.untyped_storage().data_ptr() if tensor.layout is torch.strided else None


_ANY_NUMBER = type(constraints.real)


def _within(fn: Any) -> Iterator[Distribution]:
    """A distribution and those that it is made of."""
    if isinstance(fn, Distribution):
        yield fn
        for part in vars(fn).values():
            yield from _within(part)


def _parameters(fn: Distribution) -> Iterator[tuple[str, Any, Any]]:
    """Name, constraint and value of each parameter that the distribution was made with."""
    for name, constraint in fn.arg_constraints.items():
        derived = name not in vars(fn) and isinstance(getattr(type(fn), name, None), lazy_property)
        if not derived and not constraints.is_dependent(constraint):
            yield name, constraint, getattr(fn, name, None)
