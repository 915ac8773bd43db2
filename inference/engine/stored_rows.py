"""Rows that are not in memory: batches of a data set, read on demand."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from ...errors import BadInput
from .rows import Rows
from .sources import Source, is_source


class StoredRows(Rows):
    """The rows of a :class:`Source` as :class:`Rows`: an index reads a batch, ``args`` and ``kwargs`` read all rows.

    >>> data = torch.utils.data.TensorDataset(torch.arange(6.0))
    >>> rows = StoredRows(Source(data))
    >>> len(rows), rows[torch.tensor([4, 1])].args, rows[-2:].args
    (6, (tensor([4., 1.]),), (tensor([4., 5.]),))
    """

    def __init__(self, source: Source, device: torch.device | str = "cpu"):
        self.source, self.what, self.device = source, source.what, device
        self._all: Rows | None = None
        self._cut = frozenset()

    @property
    def args(self) -> tuple:  # type: ignore[override]
        return self._held().args

    @property
    def kwargs(self) -> dict[str, Any]:  # type: ignore[override]
        return self._held().kwargs

    @property
    def whole(self) -> bool:
        return False

    def _held(self) -> Rows:
        if self._all is None:
            self._all = Rows(self.source.held(), self.what).check().to(self.device)
        return self._all

    def cut(self) -> list[tuple[int | str, Any]]:
        return self._held().cut()

    def kept_whole(self) -> list[tuple[int | str, Any]]:
        return self._held().kept_whole()

    def tensors(self) -> list[torch.Tensor]:
        """Those of a few rows, as a sample of the data."""
        return [tensor for batch in self.samples() for tensor in batch.tensors()]

    def samples(self) -> Iterator[Rows]:
        """The first row, the last and a middle one."""
        if not self.source.iterable:
            for number in sorted({0, len(self) // 2, len(self) - 1}):
                yield self[number : number + 1]

    def check(self, what: str | None = None) -> Rows:
        """Return itself, after checking for a row; values are checked as they are read."""
        if not len(self):
            raise BadInput(f"{what or self.what} is empty: expected at least one row")
        return self

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: slice | torch.Tensor) -> Rows:
        numbers = range(*index.indices(len(self))) if isinstance(index, slice) else index.tolist()
        return self.made(self.source.batch(list(numbers)), len(numbers))

    def made(self, batch: object, count: int | None = None) -> Rows:
        """A batch as read, with ``count`` rows, checked and moved to the device."""
        rows = Rows(batch, self.what)
        if count is not None:
            rows.count_as(count)
        return rows.check().to(self.device)

    def to(self, device: torch.device | str) -> Rows:
        return StoredRows(self.source, device)

    def repeated(self, times: int) -> Rows:
        return self._held().repeated(times)


def rows_in(data: object, what: str = "data", streams: bool = False) -> Rows:
    """Data in any form as rows: those of a data set are read on demand, others are in memory.

    A stream, without random access, is read whole unless the caller accepts ``streams``.
    """
    if isinstance(data, StoredRows):
        return data
    if not is_source(data):
        return Rows(data, what)
    source = Source(data, what)
    if streams or not (source.iterable or source.whole_items):
        return StoredRows(source)
    return Rows(source.held(), what)


__all__ = ["StoredRows", "rows_in"]
