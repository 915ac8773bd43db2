"""Data as arguments of programs: the convention of ``fit``, ``evaluate``, ``to_arviz``, ``diagnose`` and ``audit``.

A tuple, named or not, holds the positional arguments, a mapping the keywords, anything else is the single argument;
wrap an argument that is itself a tuple or a mapping in a tuple. N is the number of rows of the first tensor (or NumPy
array) among the arguments. All tensors and arrays with N rows are cut into batches; everything else (a PackedSequence,
None, a number, a list, a tensor with another number of rows) is passed whole. Where no plate around all observed sites
has N rows, ``evaluate`` takes the number from the plate. A torch Dataset or DataLoader provides its rows. The programs
receive an array of numbers as a tensor over the same memory, or over the same file if it is memory-mapped.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol, TypeVar

import numpy as np
import torch
from torch.nn.utils.rnn import PackedSequence

from ...arrays import readable, refuse_table
from ...errors import BadInput
from .sources import Source, is_source

Found = TypeVar("Found")


class ProcessGroup(Protocol):
    """The interface of a process group for sharing rows; ``training.distributed.Processes`` implements it."""

    @property
    def rank(self) -> int: ...

    @property
    def world_size(self) -> int: ...

    def gather(self, thing: Found) -> list[Found]: ...

    def together(self, action: Callable[[], Found]) -> Found: ...


def arguments_of(data: object) -> tuple[tuple, dict[str, Any]]:
    """``(args, kwargs)`` of a program for data in any form.

    >>> arguments_of((1, 2)), arguments_of({"x": 1}), arguments_of(([1],)), arguments_of(None)
    (((1, 2), {}), ((), {'x': 1}), (([1],), {}), ((None,), {}))
    """
    if isinstance(data, Rows):
        return data.args, data.kwargs
    if is_source(data):
        data = Source(data).held()
    if isinstance(data, Mapping):
        return (), dict(data)
    if isinstance(data, tuple) and not isinstance(data, PackedSequence):  # a tuple in Python, one argument here
        return tuple(data), {}
    return (data,), {}


def given_arguments(args: tuple, kwargs: Mapping[str, Any]) -> tuple[tuple, dict[str, Any]]:
    """``(args, kwargs)`` of a program from the arguments of a function with ``*args, **kwargs``.

    One positional argument is data in any form; several are the program's own arguments. Keywords go with either.

    >>> given_arguments(((1, 2),), {"n": 3}) == given_arguments((1, 2), {"n": 3}) == ((1, 2), {"n": 3})
    True
    """
    kwargs = {name: readable(value, name) for name, value in kwargs.items()}
    positional, keywords = (args, {}) if len(args) != 1 else arguments_of(args[0])
    positional = tuple(readable(value, index) for index, value in enumerate(positional))
    keywords = {name: readable(value, name) for name, value in keywords.items()}
    if twice := sorted(keywords.keys() & kwargs.keys()):
        raise BadInput(f"argument {twice[0]!r} is given twice, in the mapping and as a keyword")
    return positional, {**keywords, **kwargs}


def about_arguments(error: BaseException) -> str:
    """A hint on the convention where a program was called with arguments that it does not take.

    >>> about_arguments(TypeError("model() takes 1 positional argument but 2 were given"))
    '; a tuple holds the positional arguments and a mapping the keywords: pass (data,) if data are one argument'
    """
    mistaken = ("positional argument", "keyword argument")
    if not isinstance(error, TypeError) or not any(words in str(error) for words in mistaken):
        return ""
    return "; a tuple holds the positional arguments and a mapping the keywords: pass (data,) if data are one argument"


class Rows:
    """Data as arguments of a program, of which some have a row for each datum.

    Attributes: ``args`` and ``kwargs``; ``whole`` says that no argument has rows, so that all data are one batch (of
    length 1).

    >>> rows = Rows({"x": torch.zeros(3, 2), "y": torch.arange(3), "scale": torch.ones(2), "mask": None})
    >>> batch = rows[torch.tensor([2, 0])]
    >>> len(rows), batch.kwargs["y"].tolist(), batch.kwargs["scale"].shape, batch.kwargs["mask"]
    (3, [2, 0], torch.Size([2]), None)
    """

    def __init__(self, data: object, what: str = "data"):
        self.what = what
        self._hold(*arguments_of(data))
        if isinstance(data, Rows):
            self._cut, self._length = data._cut, data._length

    def without_gradients(self) -> Rows:
        """The same rows, detached where they are cut; raises BadInput for rows that hold what could be learned."""
        for name, value in self.cut():
            if isinstance(value, torch.nn.Parameter) or getattr(value, "grad_fn", None) is not None:
                raise BadInput(
                    f"{self.what}: argument {name!r} requires gradients, which no batch passes on; pass x.detach()"
                )
        return self._map(lambda value: value.detach() if isinstance(value, torch.Tensor) else value)

    @classmethod
    def of(cls, args: Sequence, kwargs: Mapping[str, Any]) -> Rows:
        """The arguments of a call, positional and keyword."""
        rows = cls(())
        rows._hold(tuple(args), dict(kwargs))
        return rows

    def _hold(self, args: tuple, kwargs: dict[str, Any]) -> None:
        self.args = tuple(readable(value, index, self.what) for index, value in enumerate(args))
        self.kwargs = {name: readable(value, name, self.what) for name, value in kwargs.items()}
        counts = {name: len(value) for name, value in self.named() if is_array(value)}
        self._length = next(iter(counts.values()), None)
        self._cut = frozenset(name for name, count in counts.items() if count == self._length)

    def count_as(self, rows: int) -> None:
        """Set the number of rows, where the first axis of the first tensor is another one (a padded sequence)."""
        self._length = rows
        self._cut = frozenset(name for name, value in self.named() if is_array(value) and len(value) == rows)

    def counted_as(self, rows: int) -> Rows:
        """The same arguments, of which those with so many rows are cut; one batch if there is none.

        >>> rows = Rows((torch.zeros(5), torch.zeros(3, 5)))
        >>> len(rows), len(rows.counted_as(3)), rows.counted_as(2).whole
        (5, 3, True)
        """
        found = Rows.of(self.args, self.kwargs)
        found.what = self.what
        found.count_as(rows)
        if not found._cut:
            found._length = None
        return found

    @property
    def whole(self) -> bool:
        return self._length is None

    def named(self) -> Iterator[tuple[int | str, Any]]:
        """Positions and keywords with their values."""
        yield from enumerate(self.args)
        yield from self.kwargs.items()

    def cut(self) -> list[tuple[int | str, Any]]:
        """Those with a row for each datum."""
        return [(name, value) for name, value in self.named() if name in self._cut]

    def kept_whole(self) -> list[tuple[int | str, Any]]:
        """Those that every batch receives whole."""
        return [(name, value) for name, value in self.named() if name not in self._cut]

    def tensors(self) -> list[torch.Tensor]:
        """Every tensor among the arguments."""
        return [value for _, value in self.named() if isinstance(value, torch.Tensor)]

    def check(self, what: str | None = None) -> Rows:
        """Return itself, after checking for at least one row, and for dense and finite values."""
        what = what or self.what
        if self.whole:
            for name, value in self.named():
                refuse_table(value, name, what)
        for name, value in self.cut():
            if isinstance(value, torch.Tensor) and value.layout is not torch.strided:
                raise BadInput(
                    f"{what}: argument {name!r} is a sparse tensor, of which no batch can be taken; pass x.to_dense()"
                )
        if not len(self):
            raise BadInput(f"{what} is empty: expected at least one row")
        for name, value in self.cut():
            tensor = torch.as_tensor(value) if is_numeric(value) else None
            bad = _rows_not_finite(tensor) if tensor is not None and tensor.is_floating_point() else 0
            if bad:
                raise BadInput(
                    f"{what}: argument {name!r} holds NaN or infinity in {bad} of {len(self)} rows; fix them"
                )
        return self

    @property
    def data(self) -> object:
        """The rows in the form in which they were given."""
        if self.kwargs:
            return self.kwargs
        alone = len(self.args) == 1 and arguments_of(self.args[0]) == ((self.args[0],), {})
        return self.args[0] if alone else self.args

    def __len__(self) -> int:
        return 1 if self._length is None else self._length

    def __getitem__(self, index: slice | torch.Tensor) -> Rows:
        def rows(value):
            return value[index.numpy() if isinstance(index, torch.Tensor) and isinstance(value, np.ndarray) else index]

        return self._map(rows)

    def split(self, size: int) -> list[Rows]:
        """Batches of ``size`` rows, views of these; the last may have fewer. All arguments with rows are tensors."""
        parts = {name: value.split(size) for name, value in self.cut()}
        found = []
        for number in range(-(-len(self) // size)):
            batch = Rows.__new__(Rows)
            batch.what, batch._cut = self.what, self._cut
            batch.args = tuple(parts[i][number] if i in parts else value for i, value in enumerate(self.args))
            batch.kwargs = {k: parts[k][number] if k in parts else value for k, value in self.kwargs.items()}
            batch._length = min(size, len(self) - number * size)
            found.append(batch)
        return found

    def to(self, device: torch.device | str) -> Rows:
        """Move every tensor to the device, inside lists, tuples and mappings too."""
        return self._map(lambda value: _moved(value, device), of_all=True)

    def repeated(self, times: int) -> Rows:
        """Each row ``times`` times: all rows, then all rows again."""

        def again(value):
            if isinstance(value, np.ndarray):
                return np.concatenate([value] * times)
            return value.repeat(times, *[1] * (value.dim() - 1))

        return self._map(again)

    def _map(self, change: Callable[[Any], Any], of_all: bool = False) -> Rows:
        changed = Rows((), self.what)
        made = {name: change(value) if of_all or name in self._cut else value for name, value in self.named()}
        changed.args = tuple(made[place] for place in range(len(self.args)))
        changed.kwargs = {name: made[name] for name in self.kwargs}
        changed._cut = self._cut
        changed._length = next(
            (len(made[name]) for name in made if name in self._cut), self._length if of_all else None
        )
        return changed


def spaced(length: int, count: int) -> torch.Tensor:
    """The numbers of ``count`` evenly spaced rows of ``length``, the first and the last included.

    >>> spaced(10, 4).tolist(), spaced(2**24 + 4, 2).tolist() == [0, 2**24 + 3]
    ([0, 3, 6, 9], True)
    """
    # In float32 numbers beyond 2²⁴ are rounded, to one beyond the last for some lengths.
    return torch.linspace(0, length - 1, count, dtype=torch.float64).round().long()


_AT_ONCE = 2**24  # numbers that are processed together, which bounds memory


def pieces_of(tensor: torch.Tensor) -> Iterator[torch.Tensor]:
    """A tensor in pieces along its first axis, each small, for data in files."""
    size = max(1, _AT_ONCE // max(1, tensor[:1].numel())) if tensor.dim() and len(tensor) else 1
    yield from tensor.split(size) if tensor.dim() else (tensor,)


def _rows_not_finite(tensor: torch.Tensor) -> int:
    """The number of rows with NaN or infinity."""
    count = 0
    for piece in pieces_of(tensor):
        if not torch.isfinite(piece.sum()):  # one pass without a copy; finite numbers may overflow
            count += int((~torch.isfinite(piece)).reshape(len(piece), -1).any(1).sum())
    return count


def is_array(value: object) -> bool:
    """Whether a value is a tensor or an array with a first axis."""
    if isinstance(value, torch.Tensor):
        return value.dim() > 0
    return isinstance(value, np.ndarray) and value.ndim > 0


def is_numeric(value: object) -> bool:
    """Whether a value is a tensor, or an array that torch can hold."""
    return isinstance(value, torch.Tensor) or (isinstance(value, np.ndarray) and value.dtype.kind in "biuf")


def leaves_of(value: Any) -> Iterator[Any]:
    """The leaves of a value, inside lists, tuples and mappings too."""
    if isinstance(value, Mapping):
        for name, one in value.items():
            yield name
            yield from leaves_of(one)
    elif isinstance(value, (list, tuple)):
        for one in value:
            yield from leaves_of(one)
    else:
        yield value


def _moved(value: Any, device: torch.device | str) -> Any:
    if isinstance(value, (torch.Tensor, PackedSequence)):
        # Copies from page-locked memory run asynchronously.
        return value.to(device, non_blocking=torch.device(device).type == "cuda" and value.is_pinned())
    if type(value) in (list, tuple):
        return type(value)(_moved(one, device) for one in value)
    if type(value) is dict:
        return {name: _moved(one, device) for name, one in value.items()}
    return value
