"""Steps of this checkout beside those of another one: what a change costs or saves.

    python benchmarks/before_after.py OTHER/bin/python OTHER_CHECKOUT [--rounds 30] [--batch 32 128] [--threads 1]

``OTHER/bin/python`` is the interpreter of an environment in which the other checkout is installed. Two processes, one a
checkout, build the workloads of ``step.py`` and take turns, a few steps each. The ratio is this checkout over the other
one, the median over rounds of paired ratios, once of wall-clock time and once of the processes' own CPU time, which a
busy machine disturbs less.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve()


def serve(benchmarks: Path, threads: int) -> None:
    """Answer each line ``[workload, batch, steps]`` of standard input with ``[wall, cpu]`` seconds of our rivals."""
    sys.path.insert(0, str(benchmarks))
    import step
    import torch

    torch.set_num_threads(threads)
    rivals: dict[tuple[str, int], dict] = {}
    for line in sys.stdin:
        workload, batch, steps = json.loads(line)
        if (workload, batch) not in rivals:
            shape, x = step.WORKLOADS[workload], step.make_batch(batch, "cpu")
            ours = {step.EAGER: step.gumbo_rival, step.COMPILED: step.compiled_rival}
            rivals[workload, batch] = {name: make(shape, x, "cpu") for name, make in ours.items()}
        taken = {}
        for name, rival in rivals[workload, batch].items():
            with rival.around():
                start = time.perf_counter(), time.process_time()
                rival.steps(steps)
                taken[name] = time.perf_counter() - start[0], time.process_time() - start[1]
        print(json.dumps(taken), flush=True)


class Checkout:
    """A process that makes steps of one checkout."""

    def __init__(self, python: str, benchmarks: Path, threads: int):
        command = [python, str(HERE), "--serve", str(benchmarks), "--threads", str(threads)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def take(self, workload: str, batch: int, steps: int) -> dict[str, list[float]]:
        assert self.process.stdin and self.process.stdout
        self.process.stdin.write(json.dumps([workload, batch, steps]) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    def close(self) -> None:
        assert self.process.stdin
        self.process.stdin.close()
        self.process.wait()


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("other", nargs="*", help="the other checkout's interpreter, and the checkout")
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--batch", type=int, nargs="+", default=[32, 128])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--workloads", nargs="+", default=["gaussian", "categorical", "belief"])
    parser.add_argument("--serve", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.serve:
        return serve(options.serve, options.threads)
    if len(options.other) != 2:
        parser.error("give the other checkout's interpreter and the checkout")
    python, tree = options.other
    ours = Checkout(sys.executable, HERE.parent, options.threads)
    other = Checkout(python, Path(tree).resolve() / "benchmarks", options.threads)
    print(f"{'workload':12} {'batch':>5}  {'step':16} {'wall':>6} {'CPU':>6}   ms before, now")
    found: dict[str, float] = {}
    for workload in options.workloads:
        for batch in options.batch:
            steps = max(3, 640 // batch)
            pairs = [
                (other.take(workload, batch, steps), ours.take(workload, batch, steps))
                for _ in range(3 + options.rounds)
            ][3:]
            for name in pairs[0][1]:
                ratios = [statistics.median(now[name][k] / before[name][k] for before, now in pairs) for k in (0, 1)]
                times = [
                    1e3 / steps * statistics.median(turn[name][0] for turn in side) for side in zip(*pairs, strict=True)
                ]
                found[f"{workload}, batch {batch}: {name}, now ÷ before"] = ratios[0]
                cells = f"{ratios[0]:6.3f} {ratios[1]:6.3f}   {times[0]:.2f}, {times[1]:.2f}"
                print(f"{workload:12} {batch:5}  {name:16} {cells}", flush=True)
    ours.close(), other.close()
    from _timing import remember, surroundings  # a process that serves takes the other checkout's

    remember("before_after", found, surroundings())


if __name__ == "__main__":
    main(sys.argv[1:])
