"""The arguments of a batch, for a graph: its tensors are inputs, and everything else is a constant."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterable, Iterator, Mapping, MutableMapping, Sequence
from typing import Any

import numpy as np
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from ....errors import GumboWarning
from ...engine.rows import Rows

_PLAIN = (int, bool, str, bytes, type(None))


def flat(batch: Rows) -> list[Tensor]:
    """The tensors of a batch, keywords in the order of their names, those in lists, tuples and mappings too.

    They are contiguous: compiled code reads with the strides of the captured batch.
    """
    found: list[Tensor] = []
    for value in (*batch.args, *(batch.kwargs[name] for name in sorted(batch.kwargs))):
        if isinstance(value, Tensor):
            found.append(value.contiguous())
        else:
            found += [tensor.contiguous() for tensor in _tensors(value)]
    return found


def filled(batch: Rows, tensors: Sequence[Tensor]) -> tuple[tuple, dict[str, Any]]:
    """The arguments of a batch with its tensors replaced, in the order of :func:`flat`."""
    left = iter(tensors)
    args = tuple(_filled(value, left) for value in batch.args)
    return args, {name: _filled(batch.kwargs[name], left) for name in sorted(batch.kwargs)}


def shape_of(batch: Rows) -> list[Any]:
    """What a graph of a batch holds as constants: shapes, names, and all values that are no tensors.

    Two batches with equal lists may run by the same graph.
    """
    found: list[Any] = [*batch.kwargs]
    for _, value in batch.named():
        found.append((value.shape, value.dtype) if isinstance(value, Tensor) else _key(value))
    return found


class Taken:
    """Whether a graph takes a batch: whether it has the shapes and values that the graph holds as constants.

    A batch that differs only by values that are no tensors gives a warning, once.

    Attributes: ``first``, the batch that the graph was captured for, and its ``shape``.
    """

    def __init__(self, first: Rows):
        self._warned = False
        self.of(first)

    def of(self, first: Rows) -> None:
        """The graph is now that of another batch."""
        self.first, self.shape = first, shape_of(first)

    def __call__(self, batch: Rows) -> bool:
        if shape_of(batch) == self.shape:
            return True
        if not self._warned and (name := self._other_value(batch)) is not None:
            self._warned = True
            warnings.warn(
                f"compile: argument {name if isinstance(name, int) else repr(name)} of the programs has other values"
                " than in the first batch, and a graph holds all but tensors as constants: such batches run"
                " uncompiled; give what changes from batch to batch as a tensor",
                GumboWarning,
                stacklevel=2,
            )
        return False

    def _other_value(self, batch: Rows) -> int | str | None:
        """The position or name of an argument by whose values alone, not by shapes, a batch differs from the first."""
        here, there = dict(batch.named()), dict(self.first.named())
        shapes = [[(tensor.shape, tensor.dtype) for tensor in flat(one)] for one in (batch, self.first)]
        if here.keys() != there.keys() or shapes[0] != shapes[1]:
            return None
        return next((name for name in here if _key(here[name]) != _key(there[name])), None)


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif (parts := _parts(value)) is not None:
        for part in parts:
            yield from _tensors(part)


def _parts(value: Any) -> Iterable[Any] | None:
    """The elements of a container that :func:`_filled` can make again; None for any other value."""
    if isinstance(value, PackedSequence):
        # The batch sizes are read by Python, and decide how a network runs.
        return (value.data, value.sorted_indices, value.unsorted_indices)
    if isinstance(value, MutableMapping):
        return value.values()
    return value if isinstance(value, (list, tuple)) else None


def _filled(value: Any, left: Iterator[Tensor]) -> Any:
    if isinstance(value, Tensor):
        return next(left)
    if (parts := _parts(value)) is None:
        return value
    made = [_filled(part, left) for part in parts]
    if isinstance(value, PackedSequence):
        return PackedSequence(made[0], value.batch_sizes, *made[1:])
    if isinstance(value, MutableMapping):
        again = copy.copy(value)
        again.update(zip(value, made, strict=True))
        return again
    if isinstance(value, tuple):
        return type(value)(*made) if hasattr(value, "_fields") else tuple(made)
    again = copy.copy(value)
    again[:] = made
    return again


def _key(value: Any) -> Any:
    """What a graph holds of a value as a constant, to be compared by ``==``."""
    kind = type(value)
    if isinstance(value, Tensor):
        return (value.shape, value.dtype)
    if kind in _PLAIN:
        return (kind, value)
    if kind is float:
        return (kind, value.hex())  # NaN is itself, and -0.0 is not 0.0
    if isinstance(value, PackedSequence):
        return (kind, value.batch_sizes.tolist(), *map(_key, _parts(value) or ()))
    if isinstance(value, (np.ndarray, np.generic)):
        return (kind, value.dtype.str, value.shape, value.tobytes()) if value.dtype.kind != "O" else _Same(value)
    if isinstance(value, Mapping) and _parts(value) is not None:
        return (kind, [*map(_key, value)], [*map(_key, value.values())])
    if (parts := _parts(value)) is not None:
        return (kind, [*map(_key, parts)])
    return _Same(value)


class _Same:
    """A value that equals the same object, and objects of its class that compare equal to it."""

    def __init__(self, value: Any):
        self.value = value

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, _Same) or type(self.value) is not type(other.value):
            return False
        if self.value is other.value:
            return True
        try:
            return bool(self.value == other.value)
        except Exception:  # a comparison that gives many answers, as of tensors in a dataclass
            return False

    __hash__ = None  # type: ignore[assignment]
