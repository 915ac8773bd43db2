"""Training batches as a function of seed, epoch and number, so that a run can resume at any of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from ...errors import BadInput
from ..engine.rows import Rows

TRANSFORMED = "transform's result"
AHEAD = 2**22  # numbers that are selected at once
_PRIME = 1_000_003  # keeps the streams of neighbouring seeds, epochs and batches apart


class Batches:
    """The batches of every epoch, without state.

    ``(seed, epoch)`` determines the order of an epoch; with ``in_order``, and for a single batch of all rows, it is the
    order of the rows. ``(seed, epoch, number)`` determines what ``transform`` draws for a batch.

    >>> batches = Batches(Rows(torch.arange(5.0)), batch_size=2, seed=0)
    >>> [batch.args[0].tolist() for batch in batches.of_epoch(1)] == [b.args[0].tolist() for b in batches.of_epoch(1)]
    True
    >>> len(list(batches.of_epoch(1, done=2))), batches.per_epoch
    (1, 3)
    """

    def __init__(
        self,
        rows: Rows,
        batch_size: int,
        seed: int,
        drop_last: bool = False,
        transform: Callable[[Any, torch.Generator], Any] | None = None,
        device: torch.device | str = "cpu",
    ):
        self.rows, self.batch_size, self.seed = rows, batch_size, seed
        self.transform, self.device = transform, torch.device(device)
        self.in_order = False
        self._generator = torch.Generator()
        self.per_epoch = self._open(drop_last)

    note = ""  # a remark on the order for the progress lines
    resumable = True
    _moves_ahead = True  # whether batches without a transform are on their device when they are read

    @property
    def show_other_rows(self) -> bool:
        """Whether a later epoch may have rows that the first did not."""
        return self.transform is not None or (self.per_epoch or 0) * self.batch_size < len(self.rows)

    @property
    def runs_code(self) -> bool:
        """Whether making a batch runs code of the user's."""
        return self.transform is not None

    def of_epoch(self, epoch: int, done: int = 0) -> Iterator[Rows]:
        """The batches of an epoch after the first ``done``."""
        order = torch.randperm(len(self.rows), generator=self._seeded(self.seed * _PRIME + epoch))
        if self.in_order or self.batch_size >= len(self.rows):
            # A program may hold other data of the same rows in a closure.
            order = torch.arange(len(self.rows))
        pieces = order.split(self.batch_size)[done : self.per_epoch]
        jobs = [(index, self._seed_of(epoch, number)) for number, index in enumerate(pieces, done)]
        for (index, seed), rows in zip(jobs, self._read(jobs), strict=True):
            yield self._made(rows, len(index), seed)

    def first(self) -> Rows:
        """A batch for initialization."""
        index = torch.arange(min(self.batch_size, len(self.rows)))
        return self._made(next(iter(self._read([(index, self.seed)]))), len(index), self.seed)

    def state(self) -> dict[str, Any]:
        """The order's state for a checkpoint: none, since the seed determines it."""
        return {}

    def load(self, state: dict[str, Any]) -> None:
        """Restore the order from a checkpoint."""

    def close(self) -> None:
        """Stop workers that read ahead."""

    def _open(self, drop_last: bool) -> int | None:
        """Prepare for reading; returns the number of batches of an epoch, None if it is unknown."""
        number = len(self.rows) / self.batch_size
        return math.floor(number) if drop_last else math.ceil(number)

    def _read(self, jobs: Sequence[tuple[torch.Tensor, int]]) -> Iterator[Rows]:
        """The rows of the batches, selected for several of them at once."""
        held = [value for _, value in self.rows.cut()]
        row = sum(math.prod(value.shape[1:]) for value in held)
        # A part of a selection has the layout of a batch that is selected alone only where rows lie one by one.
        plain = all(isinstance(value, torch.Tensor) and value.is_contiguous() for value in held)
        several = max(1, AHEAD // max(1, row * self.batch_size)) if plain else 1
        for start in range(0, len(jobs), several):
            indices = [index for index, _ in jobs[start : start + several]]
            selected = self.rows[torch.cat(indices)]
            if self.transform is None:  # it sees batches that are not moved
                selected = selected.to(self.device)
            yield from selected.split(self.batch_size) if len(indices) > 1 else [selected]

    def _made(self, rows: Rows, count: int, seed: int) -> Rows:
        batch = rows
        if self.transform is not None:
            batch = Rows(self.transform(batch.data, self._seeded(seed)), TRANSFORMED)
            if len(batch) < count:
                raise BadInput(f"{TRANSFORMED} has {len(batch)} rows for a batch of {count}: expected a row for each")
        return batch if self._moves_ahead and self.transform is None else batch.to(self.device)

    def _seed_of(self, epoch: int, number: int) -> int:
        return (self.seed * _PRIME + epoch) * _PRIME + number + 1

    def _seeded(self, seed: int) -> torch.Generator:
        return self._generator.manual_seed(seed % 2**63)
