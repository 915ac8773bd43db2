"""How time and memory of a step grow: with particles, rows, sites, latents, and what more processes give.

    python benchmarks/scaling.py [--rounds 15] [--threads 2] [--quick] [--only sites particles …]

Each series runs along one axis, all else fixed; its points take turns. The exponent is the slope of log time (and of
log memory) against log size over the larger half of the points, so that what a step costs at any size does not flatter
it. Memory is the growth of the process's peak over what it held before the step (Linux; elsewhere left out).

- particles: rloo on a BernoulliVAE of 200 coins, batch 32, K = 2 … 64
- batch: the same at K = 4, 16 … 1,024 rows
- latents: coins of a BernoulliVAE, 50 … 1,600, under rloo, disarm and local-expectation
- sites: a chain of 10 … 400 coins, each drawn given the one before, under score, rloo (K = 4) and stock TraceGraph_ELBO
- values: a one-hot latent of 4 … 256 values, summed over by enumerate and by local-expectation, batch 32
- processes: seconds of ``gumbo compare --quick`` with 1, 2, … worker processes

Written: results/scaling.json, and a line of results/history.jsonl.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from _timing import RESULTS, Rival, interleaved_turns, remember, spread, surroundings, use_cores, write_json
from pyro.infer import SVI, TraceGraph_ELBO
from torch import nn

from gumbo.guides import BernoulliGuide, CategoricalGuide
from gumbo.inference import SiteELBO
from gumbo.inference.engine.rows import Rows
from gumbo.inference.engine.scopes import denormals_flushed
from gumbo.inference.training.optimizers import make_optimizer
from gumbo.inference.training.steps import TorchStep
from gumbo.models import BernoulliVAE, CategoricalVAE

PATIENCE = 2.0  # seconds: a step that takes longer is taken once


def torch_step(programs: Callable[[], tuple[Any, Any]], loss: Callable[[], SiteELBO], *args: torch.Tensor) -> Rival:
    """The step that ``fit`` makes, one at a time."""
    rows = Rows(args)
    step = TorchStep(*programs(), loss(), make_optimizer("adam", 1e-4)[0], rows)
    return Rival(lambda n: [step(rows) for _ in range(n)], denormals_flushed, step.optimizer.zero_grad)


def stock_step(programs: Callable[[], tuple[Any, Any]]) -> Rival:
    model, guide = programs()
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 1e-4}), loss=TraceGraph_ELBO())
    store: dict[str, dict] = {"params": {}, "constraints": {}}
    return Rival(lambda n: [svi.step() for _ in range(n)], lambda: pyro.get_param_store().scope(store))


# The series: for each, a title, the axis, and for each rival its sizes and how a point is made.


def coins_vae(latents: int) -> tuple[Any, Any]:
    model = BernoulliVAE((1, 28, 28), num_latents=latents)
    return model, BernoulliGuide(model)


def one_hot_vae(values: int) -> tuple[Any, Any]:
    model = CategoricalVAE((1, 28, 28), num_latents=1, num_classes=values)
    return model, CategoricalGuide(model)


def images(rows: int) -> torch.Tensor:
    return (torch.rand(rows, 1, 28, 28) < 0.3).float()


class Chain(pyro.nn.PyroModule):
    """A chain of coins, each leaning to the side of the one before; as a model it also has an observation.

    ``name`` is its parameter's: in Pyro's param store model and guide must not share one.
    """

    def __init__(self, sites: int, name: str, observed: bool):
        super().__init__()
        self.name, self.observed = name, observed
        self.register_parameter(name, nn.Parameter(torch.full((sites,), 0.3)))

    def forward(self):
        z = torch.zeros(())
        for site, lean in enumerate(getattr(self, self.name).unbind()):
            z = pyro.sample(f"z{site}", dist.Bernoulli(logits=lean * (2 * z - 1)))
        if self.observed:
            pyro.sample("x", dist.Normal(z, 1.0), obs=torch.tensor(0.3))


def chain(sites: int) -> tuple[Any, Any]:
    return Chain(sites, "decoder_lean", observed=True), Chain(sites, "encoder_lean", observed=False)


def ours(word: str, particles: int | None = None) -> Callable[[], SiteELBO]:
    return lambda: SiteELBO(word, num_particles=particles)


@dataclass
class Series:
    """One axis: its sizes, and for each rival how the step at a size is made (and up to which size)."""

    said: str
    sizes: tuple[int, ...]
    rivals: dict[str, Callable[[int], Rival]]
    up_to: dict[str, int] = field(default_factory=dict)

    def sizes_of(self, rival: str, sizes: Sequence[int]) -> list[int]:
        return [size for size in sizes if size <= self.up_to.get(rival, size)]


def vae_step(word: str, particles: int | None, rows: int, latents: int = 200) -> Rival:
    return torch_step(lambda: coins_vae(latents), ours(word, particles), images(rows))


SERIES = {
    "particles": Series(
        "particles K, rloo, BernoulliVAE of 200 coins, batch 32",
        (2, 4, 8, 16, 32, 64),
        {"rloo": lambda size: vae_step("rloo", size, 32)},
    ),
    "batch": Series(
        "rows of a batch, rloo with K = 4, BernoulliVAE of 200 coins",
        (16, 32, 64, 128, 256, 512, 1024),
        {"rloo": lambda size: vae_step("rloo", 4, size)},
    ),
    "latents": Series(
        "coins of a BernoulliVAE, batch 32",
        (50, 100, 200, 400, 800, 1600),
        {
            "rloo, K = 4": lambda size: vae_step("rloo", 4, 32, size),
            "disarm": lambda size: vae_step("disarm", 1, 32, size),
            "local-expectation": lambda size: vae_step("local-expectation", 1, 32, size),
        },
        {"local-expectation": 400},
    ),
    "sites": Series(
        "coins of a chain, one site after the other",
        (10, 25, 50, 100, 200, 400),
        {
            "score": lambda size: torch_step(lambda: chain(size), ours("score")),
            "rloo, K = 4": lambda size: torch_step(lambda: chain(size), ours("rloo", 4)),
            "stock TraceGraph_ELBO": lambda size: stock_step(lambda: chain(size)),
        },
    ),
    "values": Series(
        "values of one one-hot latent that is summed over, batch 32",
        (4, 8, 16, 32, 64, 128, 256),
        {
            word: lambda size, word=word: torch_step(lambda: one_hot_vae(size), ours(word), images(32))
            for word in ("enumerate", "local-expectation")
        },
    ),
}


# Measuring.


def status(key: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key):
            return int(line.split()[1])
    raise KeyError(key)


def peak_growth(rival: Rival) -> float | None:
    """MiB by which one step raises the process's memory at its peak; None where that cannot be read."""
    rival.forget()
    gc.collect()
    try:
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
    except (OSError, AttributeError):
        return None
    before = status("VmRSS")
    with rival.around():
        rival.steps(1)
    return (status("VmHWM") - before) / 1024


def memory(series: Series, sizes: Sequence[int], patience: float) -> dict[str, list[float | None]]:
    """MiB a step at each size, up to the first that takes over ``patience`` s."""
    found: dict[str, list[float | None]] = {}
    for rival, make in series.rivals.items():
        found[rival], took = [], 0.0
        for size in series.sizes_of(rival, sizes):
            if took < patience:
                point = make(size)
                start = time.perf_counter()
                with point.around():
                    point.steps(1)
                took = time.perf_counter() - start
            found[rival].append(peak_growth(point) if took < patience else None)
    return found


def memory_in_child(name: str, arguments: Sequence[str]) -> dict[str, list[float | None]]:
    """The same in a process whose allocator gives back at once what is freed, so that none of it is hidden."""
    thrifty = {"PYTHONMALLOC": "malloc", "MALLOC_MMAP_THRESHOLD_": "32768", "MALLOC_TRIM_THRESHOLD_": "0"}
    command = [sys.executable, __file__, "--memory", "--only", name, *arguments]
    done = subprocess.run(command, env=os.environ | thrifty, check=True, capture_output=True, text=True)
    return json.loads(done.stdout)


def exponent(sizes: Sequence[int], values: Sequence[float]) -> float | None:
    """The slope of log value against log size over the larger half of the sizes, by least squares."""
    half = len(sizes) // 2
    x, y = ([math.log(number) for number in numbers[half:]] for numbers in (sizes, values))
    return statistics.linear_regression(x, y).slope if len(x) > 1 else None


def measure(series: Series, rounds: int, sizes: Sequence[int], patience: float) -> dict[str, Any]:
    """Milliseconds at every point; one whose first step takes over ``patience`` s has that step only."""
    points: dict[tuple[str, int], Rival] = {}
    times: dict[tuple[str, int], list[float]] = {}
    for rival, make in series.rivals.items():
        for size in series.sizes_of(rival, sizes):
            point = make(size)
            with point.around():
                start = time.perf_counter()
                point.steps(1)
                took = time.perf_counter() - start
            if took > patience:
                times[rival, size] = [1e3 * took]
            else:
                points[rival, size] = point
    times |= interleaved_turns(points, rounds, 1, warm_up=1)
    found: dict[str, Any] = {"said": series.said, "rivals": {}}
    for rival in series.rivals:
        mine = series.sizes_of(rival, sizes)
        spreads = [spread(times[rival, size]) for size in mine]
        slope = exponent(mine, [one["median"] for one in spreads])
        found["rivals"][rival] = {"sizes": mine, "ms": spreads, "exponent": slope}
    return found


def with_memory(found: dict[str, Any], mib: Mapping[str, list[float | None]]) -> dict[str, Any]:
    for rival, row in found["rivals"].items():
        known = [(size, held) for size, held in zip(row["sizes"], mib[rival], strict=True) if held]
        slope = exponent(*zip(*known, strict=True)) if known else None
        row |= {"mib": mib[rival], "memory_exponent": slope}
    return found


def measure_processes(jobs: Sequence[int]) -> dict[str, Any]:
    """Seconds of the quick comparison, start to end, with so many worker processes."""
    seconds = []
    for number in jobs:
        with tempfile.TemporaryDirectory() as folder:
            command = [sys.executable, "-m", "gumbo", "compare", "--quick", "--jobs", str(number)]
            start = time.perf_counter()
            subprocess.run([*command, "--folder", f"{folder}/run"], check=True, capture_output=True)
            seconds.append(time.perf_counter() - start)
    return {"said": "worker processes of `gumbo compare --quick`", "jobs": list(jobs), "seconds": seconds}


# What is shown.


def show(found: dict[str, Any]) -> None:
    print(f"\n{found['said']}")
    for rival, row in found["rivals"].items():
        said = "  ".join(f"{size}: {one['median']:.4g}" for size, one in zip(row["sizes"], row["ms"], strict=True))
        print(f"  {rival:<24} ms       {said}   exponent {number(row['exponent'])}")
        said = "  ".join(f"{size}: {number(one)}" for size, one in zip(row["sizes"], row["mib"], strict=True))
        print(f"  {'':<24} MiB      {said}   exponent {number(row['memory_exponent'])}", flush=True)


def number(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}"


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="cores to use")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--only", nargs="+", choices=[*SERIES, "processes"], default=[*SERIES, "processes"])
    parser.add_argument("--quick", action="store_true", help="the smaller half of each series, 3 rounds, no processes")
    parser.add_argument("--memory", action="store_true", help="only print the memory of the series, as JSON")
    parser.add_argument("--out", type=Path, help="the folder of the JSON file")
    options = parser.parse_args(arguments)
    use_cores(options.threads)
    torch.manual_seed(0)

    def sizes(name: str) -> tuple[int, ...]:
        every = SERIES[name].sizes
        return every[: len(every) // 2] if options.quick else every

    if options.memory:
        print(json.dumps(memory(SERIES[options.only[0]], sizes(options.only[0]), PATIENCE)))
        return
    found: dict[str, Any] = surroundings() | {"series": {}}
    print(f"{found['device']}; {found['machine']}")
    for name in options.only:
        if name in SERIES:
            timed = measure(SERIES[name], 3 if options.quick else options.rounds, sizes(name), PATIENCE)
            child = ["--threads", str(options.threads), *(["--quick"] if options.quick else [])]
            found["series"][name] = with_memory(timed, memory_in_child(name, child))
            show(found["series"][name])
        elif not options.quick:
            found["processes"] = measure_processes([1 << power for power in range(options.threads.bit_length())])
            for jobs, seconds in zip(found["processes"]["jobs"], found["processes"]["seconds"], strict=True):
                print(f"  gumbo compare --quick --jobs {jobs}: {seconds:.1f} s", flush=True)
        write_json((options.out or RESULTS) / "scaling.json", found)
    remember("scaling", exponents_of(found), found, options.out)


def exponents_of(found: Mapping[str, Any]) -> dict[str, float | None]:
    """The exponents of a run, by name."""
    exponents = {}
    for series, one in found["series"].items():
        for rival, row in one["rivals"].items():
            exponents[f"{series}, {rival}: exponent of time"] = row["exponent"]
            exponents[f"{series}, {rival}: exponent of memory"] = row["memory_exponent"]
    return exponents


if __name__ == "__main__":
    main()
