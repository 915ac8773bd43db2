"""Steps of two processes against steps of one, eager and compiled, on batches of the same size.

    python benchmarks/processes.py [--workload gaussian] [--batches 128 1024] [--starts 4] [--rounds 6] [--turn 20]

Two processes of one thread each are started, several times, since times differ more between starts than within one. In
every round both make steps of the whole batch, each with half of its rows, and then the first one makes steps of the
whole batch alone while the other one waits. The ratio is the median over all rounds of the single process's time over
that of the two: 2 is what halves of the work give. What the machine allows is measured beside: both processes make
steps of half a batch and exchange nothing ("apart"), and one makes them while the other waits ("half"). Their ratios
bound that of the two from above. Written: results/processes.json, and a line of results/history.jsonl.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from _timing import RESULTS, remember, surroundings, write_json


def worker(workload: str, size: int, rounds: int, turn: int) -> dict[str, list[float]]:
    """Milliseconds a step, by who makes it: in one of the two processes."""
    import step as steps
    import torch
    import torch.distributed as dist

    from gumbo.inference.engine.rows import Rows
    from gumbo.inference.training.compile.processes import CompiledProcessStep
    from gumbo.inference.training.compile.step import CompiledStep
    from gumbo.inference.training.data_parallel import ProcessStep
    from gumbo.inference.training.distributed import Processes
    from gumbo.inference.training.optimizers import make_optimizer
    from gumbo.inference.training.steps import TorchStep

    torch.set_num_threads(1)
    processes = Processes.join("cpu")
    assert processes is not None
    kind, batch, half = steps.WORKLOADS[workload], Rows(steps.make_batch(size)), Rows(steps.make_batch(size // 2))

    def made(step: Any, batch: Any, *more: Any) -> tuple[Any, Any]:
        return step(*steps.make_pair(kind), kind.ours(), make_optimizer("adam", 1e-4)[0], batch, *more), batch

    halves = {"eager": made(TorchStep, half), "compiled": made(CompiledStep, half)}
    together = {
        "eager, two": made(ProcessStep, batch, processes, 0),
        "compiled, two": made(CompiledProcessStep, batch, processes, 0),
    } | {f"{name}, apart": step for name, step in halves.items()}
    alone = {"eager, one": made(TorchStep, batch), "compiled, one": made(CompiledStep, batch)}
    alone |= {f"{name}, half": step for name, step in halves.items()}
    alone = alone if processes.main else {}
    times: dict[str, list[float]] = {name: [] for name in (*together, *alone)}

    def turns(step: Any, batch: Any) -> float:
        began, steps_made = time.perf_counter(), []
        while len(steps_made) < turn:
            step.stretch(iter([batch] * (turn - len(steps_made))), steps_made, turn - len(steps_made))
        return 1e3 * (time.perf_counter() - began) / turn

    for _ in range(rounds + 2):
        for name, step in together.items():
            dist.barrier()
            times[name].append(turns(*step))
        dist.barrier()
        for name, step in alone.items():
            times[name].append(turns(*step))
        dist.barrier()
    return {name: taken[2:] for name, taken in times.items()}


def on_two(options: argparse.Namespace, size: int) -> dict[str, list[float]]:
    """What the main process of two finds."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    common = os.environ | {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}
    common |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    command = [sys.executable, __file__, "--worker", str(size), "--workload", options.workload]
    command += ["--rounds", str(options.rounds), "--turn", str(options.turn)]
    started = [
        subprocess.Popen(command, env=common | {"RANK": str(rank), "LOCAL_RANK": str(rank)}, stdout=subprocess.PIPE)
        for rank in range(2)
    ]
    said = [process.communicate()[0] for process in started]
    if any(process.returncode for process in started):
        raise SystemExit("a process failed; see above")
    return json.loads(said[0].splitlines()[-1])


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workload", default="gaussian")
    parser.add_argument("--batches", type=int, nargs="+", default=[128, 1024])
    parser.add_argument("--starts", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=6, help="of each start")
    parser.add_argument("--turn", type=int, default=20, help="steps in a row")
    parser.add_argument("--worker", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help="the folder of the JSON files")
    options = parser.parse_args(arguments)
    if options.worker:
        print(json.dumps(worker(options.workload, options.worker, options.rounds, options.turn)))
        return
    found: dict[str, Any] = surroundings() | {"workload": options.workload, "rows": []}
    ratios = {}
    for size in options.batches:
        starts = [on_two(options, size) for _ in range(options.starts)]
        times = {name: [one for start in starts for one in start[name]] for name in starts[0]}
        row: dict[str, Any] = {"batch": size, "ms": {name: statistics.median(taken) for name, taken in times.items()}}
        for kind in ("eager", "compiled"):
            for beside in ("two", "apart", "half"):
                pairs = zip(times[f"{kind}, one"], times[f"{kind}, {beside}"], strict=True)
                ratio = statistics.median(one / other for one, other in pairs)
                row[kind if beside == "two" else f"{kind}, {beside}"] = ratio
                ratios[f"{options.workload} {size}: {kind}, one process ÷ {beside}"] = ratio
        found["rows"].append(row)
        print(json.dumps(row), flush=True)
    write_json((options.out or RESULTS) / "processes.json", found)
    remember("processes", ratios, found, options.out)


if __name__ == "__main__":
    main()
