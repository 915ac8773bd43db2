"""What identifies the data of a run, and its schedules: shapes and a checksum, and values at some steps."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from functools import partial
from types import FunctionType, MethodType
from typing import Any

import numpy as np
import torch

from ..engine.rows import Rows, leaves_of, pieces_of
from ..engine.stored_rows import StoredRows
from .optimizers import without_addresses


def fingerprint(rows: Rows) -> str:
    """A description of the data with a checksum, which differs between runs with different data."""
    if isinstance(rows, StoredRows):
        named = type(rows.source.dataset).__name__
        if rows.source.iterable:
            return named
        few = [value for batch in rows.samples() for _, value in batch.named()]
        return f"{named} of {len(rows)} rows {checksum(few):08x}"
    return f"{described(rows)} {checksum(value for _, value in rows.named()):08x}"


def checksum(values: Iterable[Any]) -> int:
    found = 0
    for value in values:
        for leaf in leaves_of(value):
            for content in _contents(leaf):
                found = zlib.crc32(content, found)
    return found


def _contents(leaf: object) -> Iterator[bytes | memoryview]:
    if isinstance(leaf, np.ndarray) and leaf.dtype.kind in "biufc":
        leaf = torch.as_tensor(leaf)
    if isinstance(leaf, torch.Tensor):
        for piece in pieces_of(leaf.detach()):
            content = piece.cpu().contiguous().flatten().view(torch.uint8)  # numpy lacks some of torch's types
            yield content.numpy().data
    else:
        yield without_addresses(leaf).encode()


def values_of_schedules(schedules: Iterable[tuple[str, Any]]) -> dict[str, list[float | None]]:
    """The values of functions of the step at some steps, by name: two functions have the same ``repr``.

    None stands for a step that a function does not take. Schedules with a ``repr`` of their own are left out.

    >>> values_of_schedules([("lr", lambda step: 1 / (1 + step)), ("kl_weight", 0.5)])["lr"][:3]
    [1.0, 0.5, 0.25]
    """

    def at(schedule: Callable[[int], float], step: int) -> float | None:
        with suppress(Exception):  # a list of values may end
            return float(schedule(step))
        return None

    functions = [(name, value) for name, value in schedules if isinstance(value, (FunctionType, MethodType, partial))]
    names = [name for name, _ in functions]
    return {
        name if names.count(name) == 1 else f"{name} {number}": [at(value, step) for step in _STEPS]
        for number, (name, value) in enumerate(functions)
    }


_STEPS = (0, 1, 3, 10, 30, 100, 1_000, 10_000)


def described(rows: Rows) -> str:
    """``(40, 1, 3, 3) float32, (40,) int64``."""

    def said(value: object) -> str:
        if isinstance(value, (torch.Tensor, np.ndarray)):
            return f"{tuple(value.shape)} {str(value.dtype).removeprefix('torch.')}"
        return repr(value) if value is None or isinstance(value, (bool, int, float)) else type(value).__name__

    return ", ".join(said(value) for _, value in rows.named()) or "no arguments"
