"""Interleaved timing of rival steps in one process."""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Callable, Mapping

import torch


def interleaved(steps: Mapping[str, Callable[[], object]], rounds: int, warm_up: int = 5) -> dict[str, list[float]]:
    """Milliseconds of each step, one after the other in every round, so that the machine's moods hit all alike."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(warm_up + rounds):
        for name, step in steps.items():
            start = time.perf_counter()
            step()
            if turn >= warm_up:
                times[name].append(1e3 * (time.perf_counter() - start))
    return times


def median(values: list[float]) -> float:
    return statistics.median(values)


def machine() -> str:
    return f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}"
