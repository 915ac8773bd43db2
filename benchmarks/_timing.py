"""Interleaved timing of rival steps in one process, and the history of what was found."""

from __future__ import annotations

import contextlib
import json
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path

import torch

RESULTS = Path(__file__).resolve().parent / "results"
HISTORY = "history.jsonl"


def interleaved(steps: Mapping[str, Callable[[], object]], rounds: int, warm_up: int = 5) -> dict[str, list[float]]:
    """Milliseconds of each step, one after the other in every round, so that the machine's moods hit all alike."""
    rivals = {name: Rival(lambda n, step=step: step()) for name, step in steps.items()}
    return interleaved_turns(rivals, rounds, 1, warm_up)


@dataclass
class Rival:
    """``steps(n)`` makes n steps and waits for the device; ``around`` is entered outside of the clock.

    ``forget`` drops what a step leaves behind for the next one to drop: the gradients. ``seconds`` were spent before
    the first step, compiling.
    """

    steps: Callable[[int], object]
    around: Callable[[], contextlib.AbstractContextManager] = contextlib.nullcontext
    forget: Callable[[], object] = bool
    seconds: float = 0.0


def interleaved_turns(
    rivals: Mapping[str, Rival],
    rounds: int,
    turn: int,
    warm_up: int = 2,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Milliseconds a step of each rival, ``turn`` steps at a time, one rival after the other in every round."""
    times: dict[str, list[float]] = {name: [] for name in rivals}
    for number in range(warm_up + rounds):
        for name, rival in rivals.items():
            with rival.around():
                start = clock()
                rival.steps(turn)
                took = clock() - start
            if number >= warm_up:
                times[name].append(1e3 * took / turn)
    return times


def median(values: list[float]) -> float:
    return statistics.median(values)


def spread(values: list[float]) -> dict[str, float]:
    """Median, quartiles, fastest, and how many there are."""
    low, _, high = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else values * 3
    return {"median": median(values), "q25": low, "q75": high, "fastest": min(values), "rounds": len(values)}


def use_cores(number: int) -> None:
    """Run on so many cores: torch by its own setting, libraries loaded later (JAX) by the process's affinity."""
    if hasattr(os, "sched_setaffinity") and number < len(allowed := sorted(os.sched_getaffinity(0))):
        os.sched_setaffinity(0, allowed[-number:])
    torch.set_num_threads(number)


def device_name(device: str) -> str:
    if device.startswith("cuda"):
        return torch.cuda.get_device_name(device)
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":")[1].strip()
    return platform.processor() or platform.machine()


def machine() -> str:
    threads = torch.get_num_threads()
    return f"{platform.machine()}, {threads} thread{'s' if threads > 1 else ''}, torch {torch.__version__}"


def surroundings(device: str = "cpu") -> dict[str, object]:
    """What a result must be read with: the device, the machine, and how busy others kept it at the start."""
    load = round(os.getloadavg()[0], 1) if hasattr(os, "getloadavg") else None
    return {"device": device_name(device), "machine": machine(), "load": load}


def write_json(path: Path, found: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(found, indent=1) + "\n")


def commit() -> str:
    """The commit of the checkout, with ``+`` where tracked files differ from it; empty outside of one."""

    def git(*words: str) -> str:
        try:
            done = subprocess.run(["git", *words], cwd=RESULTS.parent, capture_output=True, text=True)
        except OSError:
            return ""
        return done.stdout.strip() if done.returncode == 0 else ""

    found = git("rev-parse", "--short", "HEAD")
    return found + ("+" if found and git("status", "--porcelain", "--untracked-files=no") else "")


def remember(
    benchmark: str, ratios: Mapping[str, float | None], facts: Mapping[str, object], folder: Path | None = None
) -> None:
    """Append a benchmark's ratios to the history in ``folder``, with date, commit, and the machine of ``facts``.

    A ratio is a time over a rival's in the same run, or an exponent of growth: of times, those of other machines say
    nothing. None is left out.
    """
    path = (folder or RESULTS) / HISTORY
    known = {name: round(value, 4) for name, value in ratios.items() if value is not None}
    where = {name: facts[name] for name in ("device", "machine", "load")}
    date = datetime.now(timezone.utc).isoformat(timespec="seconds")
    entry = {"date": date, "commit": commit(), "benchmark": benchmark, **where, "ratios": known}
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        file.write(json.dumps(entry, ensure_ascii=False) + "\n")
