"""Published tables as cells that can be trained again: one file a table, and an import line here."""

from __future__ import annotations

from gumbo.experiments.reproduction import (
    arm,
    gumbel_softmax,
    iwae,
    orderings,
    posteriors,
    question,
    reinmax,
    semi_supervised,
    toy,
    two_hundred_coins,
)
from gumbo.experiments.reproduction.cells import Cell, Table, tables

__all__ = [
    "Cell",
    "Table",
    "arm",
    "gumbel_softmax",
    "iwae",
    "orderings",
    "posteriors",
    "question",
    "reinmax",
    "semi_supervised",
    "tables",
    "toy",
    "two_hundred_coins",
]
