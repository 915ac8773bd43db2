"""Seconds from calling ``fit(compile=True)`` to the end of its first step, at the first and the second start.

    python benchmarks/start.py [--workloads gaussian belief] [--batch 128] [--threads 1]

Each start is a process of its own; the compiled kernels are in torch's cache after the first, in a folder that is empty
at the beginning. Imports of torch's compiler are made before the clock starts. The capture of the programs as a graph
is made afresh at every start. Written: results/start.json, and a line of results/history.jsonl.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from _timing import RESULTS, remember, surroundings, use_cores, write_json


def start(workload: str, batch: int) -> dict[str, float]:
    """One start in this process: seconds in all, and of the capture."""
    import step

    for name in ("torch._dynamo", "torch._inductor.compile_fx", "torch._inductor.codegen.cpp"):
        importlib.import_module(name)
    from gumbo.inference import fit
    from gumbo.inference.training.compile import step as compiled

    seconds: dict[str, float] = {}
    capture, stretch = compiled.capture, compiled.CompiledStep.stretch

    def timed(*arguments: Any) -> Any:
        began = time.perf_counter()
        try:
            return capture(*arguments)
        finally:
            seconds["capture"] = time.perf_counter() - began

    def first(self: Any, *arguments: Any) -> None:
        stretch(self, *arguments)
        seconds.setdefault("to the first step", time.perf_counter() - began)

    compiled.capture, compiled.CompiledStep.stretch = timed, first
    model, guide = step.make_pair(step.WORKLOADS[workload])
    # One batch, one epoch: the first stretch of steps is a single step.
    data, loss = step.make_batch(batch), step.WORKLOADS[workload].ours()
    began = time.perf_counter()
    fit(model, guide, data, loss=loss, epochs=1, batch_size=batch, compile=True, progress=False)
    return seconds


def in_a_process(workload: str, batch: int, threads: int, cache: str) -> dict[str, float]:
    command = [sys.executable, __file__, "--once", workload, "--batch", str(batch), "--threads", str(threads)]
    environment = os.environ | {"TORCHINDUCTOR_CACHE_DIR": cache}
    done = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workloads", nargs="+", default=["gaussian", "belief"])
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--once", help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help="the folder of the JSON files")
    options = parser.parse_args(arguments)
    use_cores(options.threads)
    if options.once:
        print(json.dumps(start(options.once, options.batch)))
        return
    found: dict[str, Any] = surroundings() | {"threads": options.threads, "batch": options.batch, "rows": []}
    for workload in options.workloads:
        with tempfile.TemporaryDirectory(prefix="start-") as cache:
            starts = [in_a_process(workload, options.batch, options.threads, cache) for _ in range(2)]
        found["rows"].append({"workload": workload, "starts": starts})
        said = ", then ".join(f"{one['to the first step']:.1f} s (capture {one['capture']:.1f})" for one in starts)
        print(f"{workload}, batch {options.batch}: {said}", flush=True)
    write_json((options.out or RESULTS) / "start.json", found)
    ratios = {
        f"{row['workload']}: second start ÷ first": row["starts"][1]["to the first step"]
        / row["starts"][0]["to the first step"]
        for row in found["rows"]
    }
    remember("start", ratios, found, options.out)


if __name__ == "__main__":
    main()
