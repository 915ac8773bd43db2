"""Names of dimensions and their coordinates, from plates, data and the user."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import date, datetime, time
from typing import Any

import numpy as np
import torch

from ...errors import BadInput
from .collection import Array, Collection, as_array
from .runner import Sweep

OF_ARVIZ = ("chain", "draw")
COPIED = 2**25  # bytes: larger data are views


def _listed(name: str, values: Any) -> np.ndarray:
    try:
        listed = np.asarray(values)
    except (TypeError, ValueError, RuntimeError):  # ragged, or a tensor that requires grad
        listed = np.asarray(None)
    nested = (one for one in values if isinstance(one, (tuple, list))) if isinstance(values, Iterable) else iter(())
    for first in nested:  # a MultiIndex has tuples too, which no file holds
        said = ", ".join(map(str, first))
        raise BadInput(
            f"coords for {name!r} has {len(first)} values for one element, {first!r}: expected one, such as {said!r}"
        )
    if listed.ndim != 1:
        raise BadInput(
            f"coords for {name!r} is {type(values).__name__}: expected one value for each element, in a list"
        )
    if listed.dtype == object and listed.size and all(type(value) is date for value in listed):
        return np.array([datetime.combine(value, time()) for value in listed], dtype=object)  # files hold times alone
    return listed


def numbered(coords: Mapping[str, Any], dim: str, numbers: np.ndarray) -> np.ndarray:
    """The coordinates of chains or draws: those that are given, or their numbers."""
    values = _listed(dim, coords[dim]) if dim in coords else numbers
    if len(values) != len(numbers):
        raise BadInput(f"coords for {dim!r} has {len(values)} values, but the dimension has {len(numbers)}")
    return values


def check_names(
    sweep: Sweep,
    coords: Mapping[str, Sequence],
    dims: Mapping[str, Sequence[str]],
    elsewhere: Mapping[str, Sequence[str]] | None = None,
) -> None:
    """Raise BadInput for a site called as a dimension of ArviZ's, and for names that belong to nothing.

    ``elsewhere`` are the dimensions of variables that are no part of the programs, by variable.
    """
    elsewhere = elsewhere or {}
    for name in sweep.model_sites:
        if name in OF_ARVIZ:
            raise BadInput(f"site {name!r} has the name of a dimension of ArviZ's data: give the site another name")
    variables = {*sweep.model_sites, *sweep.guide_sites, *_arguments(sweep.model, sweep.args, sweep.kwargs), *elsewhere}
    for name in dims:
        if name not in variables:
            raise BadInput(f"dims names {name!r}, which is no site and no argument: expected one of {_few(variables)}")
    named = {one for names in (*dims.values(), *elsewhere.values()) for one in names} | {*sweep.sizes, *OF_ARVIZ}
    for name in coords:
        variable, found, _ = name.rpartition("_dim_")
        if name not in named and not (found and variable in variables):
            raise BadInput(
                f"coords names {name!r}, which is no dimension: expected a plate or a name from dims, of {_few(named)}"
            )


def _few(names: Iterable[str]) -> str:
    return ", ".join(sorted(names)[:10])


class Naming:
    """Dimension names and coordinates: plates and row numbers, and the user's names for other dimensions."""

    def __init__(self, sweep: Sweep, coords: Mapping[str, Sequence], dims: Mapping[str, Sequence[str]]):
        self.sweep, self.dims = sweep, dict(dims)
        self.coords = {plate: sweep.row_ids[plate].numpy() for plate in sweep.row_ids if plate in sweep.sizes}
        self.coords |= {name: _listed(name, values) for name, values in coords.items()}
        # A plate that is called as a dimension of ArviZ's has another name there, and the coordinates are the plate's.
        self.of_arviz = {name: self.coords[name] for name in OF_ARVIZ if name in coords and name not in sweep.sizes}

    def variable(self, array: Array, collection: Collection) -> Any:
        """An ``xarray.DataArray`` around the numbers."""
        names = self._names_of(array)
        head = {}
        if array.by_draw:
            head["chain"] = numbered(self.of_arviz, "chain", np.arange(collection.chains))
            head["draw"] = numbered(self.of_arviz, "draw", np.arange(collection.num_samples))[:: array.every]
        data = _counted(array)
        if array.constant:
            data = np.broadcast_to(data, collection.full_shape(array))
            # Copied unless large; otherwise a read-only view.
            data = data.copy() if data.nbytes < COPIED else data
        made = self._made(data, names, head)
        if array.layout is not None and array.layout.values:
            made.attrs["values"] = array.layout.values
        return made

    def _made(self, data: np.ndarray, names: Sequence[str], head: Mapping[str, np.ndarray]) -> Any:
        import xarray

        coords = dict(head)
        for name, size in zip(names, data.shape[len(head) :], strict=True):
            values = self.coords.get(name, np.arange(size))
            if len(values) != size:
                raise BadInput(f"coords for {name!r} has {len(values)} values, but the dimension has {size}")
            coords[_free(name)] = values
        return xarray.DataArray(data, dims=[*head, *map(_free, names)], coords=coords)

    def _names_of(self, array: Array) -> list[str]:
        if array.layout is not None or None not in array.plates:
            return self._names(array.name, array.plates, array.shape) if array.layout else list(array.plates)
        # Log-probabilities of a site have the dimensions of its values, without the event.
        layout = self.sweep.model_sites[array.name]
        return self._names(array.name, layout.names, layout.shape)[: len(array.plates)]

    def _names(self, variable: str, plates: Sequence[str | None], shape: Sequence[int]) -> list[str]:
        """Plate names; for other dimensions the user's names, or ``variable_dim_0``, ``variable_dim_1``, …"""
        free = len(shape) - len([plate for plate in plates if plate is not None])
        given = list(self.dims.get(variable, ()))
        if len(given) == len(shape) and free != len(shape):
            return given
        if len(given) > free:
            raise BadInput(f"dims for {variable!r} names {len(given)} dimensions, but it has {free} beside its plates")
        others = iter(given + [f"{variable}_dim_{place}" for place in range(len(given), free)])
        named = [plate if plate is not None else next(others) for plate in plates]
        return named + list(others)

    def constants(self, args: tuple, kwargs: Mapping, observed: Iterable[np.ndarray]) -> dict[str, Any]:
        """Dense tensor arguments of the model that no site observes, in all rows."""
        found = {}
        for name, value in _arguments(self.sweep.model, args, kwargs).items():
            if (
                not isinstance(value, torch.Tensor)
                or value.layout is not torch.strided
                or any(value.shape == seen.shape and np.array_equal(as_array(value), seen) for seen in observed)
            ):
                continue
            plates = [p for p in self.sweep.data_plates if value.dim() and self.sweep.sizes[p] == len(value)][:1]
            names = self._names(name, [*plates], tuple(value.shape))
            # A variable cannot have the name of one of its dimensions.
            label = f"{name}_argument" if name in self.sweep.sizes else name
            found[label] = self._made(as_array(value), names, {})
        return found

    def statistics(self, found: Mapping[str, tuple[Sequence[str], np.ndarray]]) -> dict[str, Any]:
        """Numbers ``(chain, *plates, *others)`` with dimension names."""
        made = {}
        for name, (names, data) in found.items():
            head = {"chain": numbered(self.of_arviz, "chain", np.arange(data.shape[0]))}
            made[name] = self._made(data, names, head)
        return made

    def event_names(self, site: str, count: int) -> list[str]:
        layout = self.sweep.model_sites[site]
        names = self._names(site, layout.names, layout.shape)
        return names[len(layout.names) : len(layout.names) + count]


def _counted(array: Array) -> np.ndarray:
    """The numbers of a variable, with integers for a discrete site: ArviZ plots only integers as counts."""
    data = array.data
    if array.layout is None or not array.layout.discrete or data.dtype.kind != "f":
        return data
    if np.isnan(data).any():
        return data  # masked values are NaN
    counts = data.astype(np.int32)
    return counts if np.array_equal(counts, data) else data


def _free(name: str) -> str:
    """A plate's name as a dimension name; ``chain`` and ``draw`` belong to ArviZ."""
    return f"{name}_plate" if name in OF_ARVIZ else name


def _arguments(program: Callable, args: tuple, kwargs: Mapping) -> dict[str, Any]:
    """Arguments by their names in the program's signature."""
    target = program.forward if isinstance(program, torch.nn.Module) else program
    try:
        bound = inspect.signature(target).bind(*args, **kwargs)
    except (TypeError, ValueError):
        return {f"argument_{place}": value for place, value in enumerate(args)} | dict(kwargs)
    named: dict[str, Any] = {}
    for name, value in bound.arguments.items():
        kind = bound.signature.parameters[name].kind
        if kind is inspect.Parameter.VAR_POSITIONAL:
            named |= {f"{name}_{place}": one for place, one in enumerate(value)}
        elif kind is inspect.Parameter.VAR_KEYWORD:
            named |= value
        else:
            named[name] = value
    return named
