"""What a table and its cells are."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from gumbo.errors import BadInput, did_you_mean
from gumbo.registry import Registry

tables: Registry[Table] = Registry("table")


@dataclass(frozen=True)
class Cell:
    """One entry of a table: what is run, and the number that a paper has for it.

    Attributes:
        name: the cell within its table, as ``nonlinear/disarm``.
        published: the paper's number, None for a column of our own.
        steps: the budget in steps, the paper's where there is one.
    """

    name: str
    published: float | None = None
    steps: int = 1

    @abstractmethod
    def run(self, seed: int, steps: int, folder: Path, *, quick: bool = False, device: str = "cpu") -> dict[str, Any]:
        """Run the cell, or go on with an interrupted run of it.

        Args:
            seed: of weights, batches and noise.
            steps: the budget.
            folder: where the run may keep its checkpoints.
            quick: a trial on as little as shows that it runs.
            device: where to compute.

        Returns:
            ``value``, the number beside the published one; ``steps`` and ``share``, of the paper's budget;
            ``seconds``; ``beside``, further numbers by the heads of their columns; whatever else the file shall hold.
        """


@dataclass(frozen=True)
class Table:
    """A published table: its source, what its numbers are, and its cells in the paper's order.

    ``metric`` is what the number of a cell estimates, and ``value`` its unit. ``conclude`` turns the finished cells
    into sentences, for a table that answers a question.
    """

    name: str
    source: str
    note: str
    cells: tuple[Cell, ...]
    value: str = "nats per datum, smaller is better"
    metric: str = ""
    conclude: Callable[[Sequence[dict[str, Any]]], list[str]] | None = None

    @property
    def ours(self) -> str:
        """What the number of a cell is, with its unit."""
        return f"{self.metric}, {self.value}" if self.metric else self.value

    def chosen(self, patterns: Sequence[str]) -> list[Cell]:
        """The cells whose names match one of the patterns (``nonlinear/*``); all of them if there is no pattern."""
        for pattern in patterns:
            if not any(fnmatch(cell.name, pattern) for cell in self.cells):
                names = [cell.name for cell in self.cells]
                near = did_you_mean(pattern, names, "; ")
                raise BadInput(f"table {self.name!r} has no cell {pattern!r}: its cells are {', '.join(names)}{near}")
        return [cell for cell in self.cells if not patterns or any(fnmatch(cell.name, p) for p in patterns)]


def register(name: str, source: str, note: str, cells: Callable[[], Sequence[Cell]], **options: Any) -> Table:
    """Make a table known under its name; ``options`` are further fields of :class:`Table`."""
    table = Table(name, source, note, tuple(cells()), **options)
    tables.register(name, table)
    return table
