"""docs/performance.md from what the benchmarks have written to benchmarks/results.

    python benchmarks/performance.py [--check]

Tables, ratios and verdicts come from the JSON files alone; a part whose file is missing says that it was not measured.
``--check`` writes nothing and fails if the page is not what the files give.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from _timing import HISTORY, RESULTS

PAGE = RESULTS.parent.parent / "docs" / "performance.md"
Facts = dict[str, Any]
NOT_MEASURED = "Not measured: `benchmarks/results/{file}` is missing."


def table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """A Markdown table; all columns but the first are numbers."""
    rule = ["---", *["---:"] * (len(heads) - 1)]
    return ["", *("| " + " | ".join(cells) + " |" for cells in (heads, rule, *rows)), ""]


def number(value: float | None, digits: int = 3) -> str:
    if value is None:
        return "–"
    return f"{value:.{digits}g}" if abs(value) < 10 ** (digits - 1) else f"{value:,.0f}"


def unique(values: Iterable) -> list:
    return list(dict.fromkeys(values))


def where(facts: Facts) -> str:
    load = facts.get("load")
    busy = "" if load is None else f"; load average {load} before the start"
    machine = facts["machine"].replace(" 1 threads,", " 1 thread,")  # as older results have it
    return f"{facts['device']}; {machine}{busy}"


# A step.

SAID = {
    "gaussian": "GaussianVAE 784–400–50–400–784, pathwise",
    "categorical": "CategoricalVAE, 20 latents of 10 classes, `rloo`, K = 4",
    "belief": "SigmoidBeliefNetwork, 200 coins, `disarm`",
}
RATIOS = (
    ("gumbo", "PyTorch by hand"),
    ("PyTorch by hand", "Pyro SVI"),
    ("gumbo", "Pyro SVI"),
    ("gumbo", "Pyro SVI, no validation"),
    ("gumbo, compiled", "PyTorch by hand"),
    ("gumbo, compiled", "PyTorch by hand, torch.compile"),
    ("gumbo, compiled", "Pyro SVI"),
    ("gumbo, compiled", "NumPyro, lax.scan"),
    ("gumbo, compiled", "JAX by hand, lax.scan"),
)
COMPILED, HAND = "gumbo, compiled", "PyTorch by hand"
# The rival that has the workload's own estimator.
SCANS = {"gaussian": "NumPyro, lax.scan", "categorical": "JAX by hand, lax.scan", "belief": "JAX by hand, lax.scan"}
CLAIMS = tuple(  # workload, ours, theirs, batch, at most
    (workload, ours, theirs, batch, most)
    for workload, scan in SCANS.items()
    for ours, theirs, bounds in (
        (COMPILED, scan, {32: 1.1, 128: 0.95, 512: 0.95}),
        (COMPILED, HAND, {32: 0.6, 128: 0.6}),
        ("gumbo", HAND, {128: 1.3}),
        ("gumbo", "Pyro SVI", {32: 0.6, 128: 0.6}),
    )
    for batch, most in bounds.items()
)


class Steps:
    """The rows of step.json, by workload, rival and batch."""

    def __init__(self, facts: Facts):
        self.facts = facts
        self.rows = {(row["workload"], row["rival"], row["batch"]): row for row in facts["rows"]}

    def batches(self, workload: str) -> list[int]:
        return unique(row["batch"] for row in self.facts["rows"] if row["workload"] == workload)

    def rivals(self, workload: str) -> list[str]:
        return unique(row["rival"] for row in self.facts["rows"] if row["workload"] == workload)

    def ratio(self, workload: str, ours: str, theirs: str, batch: int) -> float | None:
        pair = [self.rows.get((workload, rival, batch)) for rival in (ours, theirs)]
        return None if None in pair else pair[0]["median"] / pair[1]["median"]

    def table(self, workload: str) -> list[str]:
        batches = self.batches(workload)

        def cell(rival: str, batch: int) -> str:
            row = self.rows.get((workload, rival, batch))
            return "–" if row is None else f"{row['median']:.2f} ({row['q25']:.2f}–{row['q75']:.2f})"

        heads = ["ms a step", *(f"batch {batch}" for batch in batches)]
        return table(heads, [[rival, *(cell(rival, b) for b in batches)] for rival in self.rivals(workload)])

    def ratios(self, workload: str) -> list[str]:
        batches = self.batches(workload)
        rows = []
        for ours, theirs in RATIOS:
            found = [self.ratio(workload, ours, theirs, batch) for batch in batches]
            if any(value is not None for value in found):
                rows.append([f"{ours} ÷ {theirs}", *("–" if v is None else f"{v:.2f}" for v in found)])
        return table(["ratio of medians", *(f"batch {batch}" for batch in batches)], rows)

    def compiling(self) -> str:
        seconds = [row["first_turn_s"] for key, row in self.rows.items() if "compile" in key[1]]
        return f"{min(seconds):.0f}–{max(seconds):.0f} s" if seconds else ""


def verdicts(rows: Iterable[tuple[str, float | None, str, bool | None]]) -> list[str]:
    """What was asked, what was found, whether it holds."""
    said = {True: "yes", False: "**no**", None: "not measured"}
    return table(
        ["asked", "found", "holds"],
        [
            [asked + f" {bound}", "–" if found is None else f"{found:.3f}", said[holds]]
            for asked, found, bound, holds in rows
        ],
    )


def step_section(facts: Facts | None) -> list[str]:
    lines = ["## A step", ""]
    if facts is None:
        return [*lines, NOT_MEASURED.format(file="step.json"), ""]
    steps = Steps(facts)
    lines += [f"`python benchmarks/step.py --threads {facts['threads']}` on {where(facts)}.", "", STEP_PROSE, ""]
    for workload in unique(row["workload"] for row in facts["rows"]):
        lines += [f"### {SAID[workload]}", *steps.table(workload), *steps.ratios(workload)[1:]]
    asked = []
    for workload, ours, theirs, batch, most in CLAIMS:
        found = steps.ratio(workload, ours, theirs, batch)
        holds = None if found is None else found <= most
        asked.append((f"{workload}, batch {batch}: {ours} ÷ {theirs}", found, f"≤ {most}", holds))
    lines += ["### Targets", *verdicts(asked)]
    if steps.compiling():
        said = "To the end of the first turn of what torch compiles, from nothing (capture, compile, a few steps)"
        lines += [f"{said}: {steps.compiling()}.", ""]
    return lines


STEP_PROSE = """\
Each cell is the median over the rounds, with quartiles. All rivals of a row of batches live in one process and take
turns of 20 steps in every round, so that disturbances affect all equally; compare within a table rather than between
tables. Up to 23 November 2026 turns had 20, 5 and 3 steps at batch 32, 128 and 512: what a call of `lax.scan` costs was
spread over few steps, and gumbo ÷ NumPyro came out too low. All use the same cores: torch's threads are as many as the
cores, JAX's pool takes the cores that the process may use. Every rival takes the same batch again and again.

- *PyTorch by hand*: the same networks and the same estimator without Pyro (`benchmarks/_by_hand.py`),
  `Adam(fused=True)`, no look at the loss. Its gradients are compared with gumbo's on the same noise before anything
  is timed. *torch.compile*: the loss of the same, compiled for its shape.
- *Pyro SVI*: `SVI.step` with `pyro.optim.Adam` on the same programs. It has no leave-one-out baseline and no
  antithetic pairs, so the discrete rows run what it has: TraceGraph_ELBO, with 4 particles in parallel for the
  categorical model (as many runs of the decoder), with 1 for the belief network (DisARM runs the decoder twice).
- *gumbo*: the step that `fit` makes, which reads the loss as a number at each step and checks the data's support;
  *compiled*: stretches of `fit(compile=True)`, which reads the losses of a turn together.
- *NumPyro*: its own SVI, step by step under `jit`, or whole turns under `lax.scan`; Trace_ELBO, and TraceGraph_ELBO
  (without a baseline) for the discrete models. *JAX by hand*: `rloo` and `disarm`, which NumPyro lacks, with
  gradients equal to the PyTorch version's for equal noise. The targets compare with the rival that has the same
  estimator: NumPyro's TraceGraph_ELBO runs the belief network's decoder once, DisARM twice."""


# Where the time goes.


def profile_section(facts: Facts | None) -> list[str]:
    lines = ["## The gap to NumPyro", ""]
    if facts is None:
        return [*lines, NOT_MEASURED.format(file="profile.json"), ""]
    lines += [f"`python benchmarks/step.py --profile` on {where(facts)}.", "", PROFILE_PROSE]
    profiles = facts["profiles"]
    kinds = unique(kind for one in profiles for rival in one["rivals"].values() for kind in rival["kinds"])
    libraries = unique(said for one in profiles for said in one["products"])
    for workload in unique(one["workload"] for one in profiles):
        of_it = [one for one in profiles if one["workload"] == workload]
        rows = [
            [
                f"{rival}, batch {one['batch']}",
                f"{found['ms']:.2f}",
                *(f"{found['kinds'][kind]:.2f}" if kind in found["kinds"] else "–" for kind in kinds),
                number(found["operations"]),
            ]
            for one in of_it
            for rival, found in one["rivals"].items()
        ]
        lines += ["", f"### Where the time goes: {SAID[workload]}"]
        lines += table(["ms a step", "all", *kinds, "torch's operations"], rows)
        rows = [
            [
                f"batch {one['batch']}",
                *(f"{one['products'][said]:.2f}" if said in one["products"] else "–" for said in libraries),
            ]
            for one in of_it
        ]
        lines += ["The step's matrix products alone, by library:", *table(["ms", *libraries], rows)]
    return [*lines, TRIED, ""]


PROFILE_PROSE = """\
The times of a kind are those of its operations under torch's profiler; *Python and dispatch* is what is left of a step
without the profiler. A compiled step has its gradients and Adam's update in the same loops."""
TRIED = """\
What was tried, and what it gave:

- MKL, which `torch.mm` calls, takes up to 1.6 times as long as oneDNN for the same float32 products on some machines,
  and as long on others; the tables above say which kind this one is. A compiled step therefore measures both on its own
  shapes and keeps the choice. Eager steps run the layers as they are: oneDNN is reached by an operation that torch does
  not publish. Without it an eager Gaussian step at batch 128 takes 23 % more where oneDNN is the faster one.
- Where oneDNN is faster, how it is called matters as much (CPU time, batch 32, versions in turns in one process): a
  step's graph takes 2,731 μs with an operation of ours in Python around oneDNN's, 2,315 with oneDNN's called by the
  generated code, and 3,054 with MKL. A 32 × 784 by 784 × 400 product takes 437 μs by MKL, 329 by oneDNN, and 217 by
  oneDNN with the two matrices in turned roles, so that the smaller one is packed; the weight's gradient 357, 297, and
  173 with both matrices laid out by rows.
- What torch wraps around its generated code takes 118 μs of a step of 1,813 at batch 32; it is called directly where
  that gives the same bits. A stretch of steps ÷ NumPyro's `lax.scan`, CPU time in turns on one core of a busy
  machine: 1.57 before all this, 1.18 after (median of 21 rounds; 1.01 for the shortest of each), of which the graph
  alone is 1.07.
- Adam inside of the graph, with its corrections computed outside: computed within, they are powers in double
  precision, once for every vector of the loop, and cost more than the whole of the fused eager Adam.
- What remains at small batches is the graph: its products, and the loops of Adam's update, which read and write every
  parameter and two moments, as NumPyro's do. The rest is Python between two calls of the graph. It runs with cold
  caches and counts many times its own time, so that noise, numbers and batches are made for several steps at once.
  The tables of this section are of turns of three steps, those of [a step](#a-step) of up to twenty."""


# The start of a compiled run.


def start_section(facts: Facts | None) -> list[str]:
    lines = ["## The start of a compiled run", ""]
    if facts is None:
        return [*lines, NOT_MEASURED.format(file="start.json"), ""]
    lines += [f"`python benchmarks/start.py --threads {facts['threads']}` on {where(facts)}.", "", START_PROSE]
    rows, asked = [], []
    for row in facts["rows"]:
        first, second = row["starts"]
        whole = second["to the first step"]
        cells = [f"{first['to the first step']:.1f}", f"{whole:.1f}", f"{second['capture']:.2f}"]
        rows.append([f"{row['workload']}, batch {facts['batch']}", *cells, f"{100 * second['capture'] / whole:.0f} %"])
        asked.append((f"{row['workload']}: seconds of the second start", whole, "≤ 5", whole <= 5))
    heads = ["seconds to the end of the first step", "first start", "second start", "of it capture", "share of capture"]
    return [*lines, *table(heads, rows), "### Targets of the start", *verdicts(asked)]


START_PROSE = """\
From calling `fit(compile=True)` to the end of its first step, imports not counted. The second start takes the compiled
kernels from torch's own cache; capture, lowering and the comparison with an eager step run afresh."""


# Two processes.


def processes_section(facts: Facts | None) -> list[str]:
    lines = ["## Two processes", ""]
    if facts is None:
        return [*lines, NOT_MEASURED.format(file="processes.json"), ""]
    lines += [f"`python benchmarks/processes.py` on {where(facts)}; {facts['workload']}.", "", PROCESSES_PROSE]
    rows, asked = [], []
    for row in facts["rows"]:
        for kind in ("eager", "compiled"):
            one, two = (f"{row['ms'][f'{kind}, {number}']:.1f}" for number in ("one", "two"))
            bounds = [f"{row[f'{kind}, {beside}']:.2f}" for beside in ("apart", "half")]
            rows.append([f"{kind}, batch {row['batch']:,}", one, two, f"{row[kind]:.2f}", *bounds])
        if row["batch"] in FASTER:
            least = FASTER[row["batch"]]
            asked.append((f"eager, batch {row['batch']:,}", row["eager"], f"≥ {least}", row["eager"] >= least))
    heads = ["step", "one process, ms", "two processes, ms", "times faster", "two, no message", "half a batch alone"]
    return [*lines, *table(heads, rows), "### Targets of two processes", *verdicts(asked)]


FASTER = {128: 1.0, 1024: 1.8}
PROCESSES_PROSE = """\
Two processes of one thread each with half of a batch, against one process of one thread with the whole batch; in turns.
On one machine the gradients are summed in memory that the processes share; the history below begins with gloo. Two
bounds of the ratio stand beside: two processes that exchange nothing, and half a batch while the other process waits.
What the second lacks to 2 is Adam for all parameters and the cost of a call; what the first lacks to the second is what
two processes take from each other, memory and caches; the rest is the message, and waiting for the other process."""


# Evaluation.


def evaluation_section(facts: Facts | None) -> list[str]:
    lines = ["## Evaluation", ""]
    if facts is None:
        return [*lines, NOT_MEASURED.format(file="evaluation.json"), ""]
    weighted = facts.get("importance")
    options = f"--threads {facts['threads']}" + (f" --importance {weighted['rows']}" if weighted else "")
    lines += [
        f"`python benchmarks/evaluation.py {options}` on {where(facts)}.",
        "",
        EVALUATION_PROSE,
    ]
    rows, asked = [], []
    for row in facts["rows"]:
        rivals = ("by hand", "evaluate", "validation", "compiled", "products")
        cells = [f"{row['rivals'][rival]['median']:.1f}" for rival in rivals]
        ratios = [f"{row['ratios'][rival]:.2f}" for rival in ("evaluate", "validation", "compiled")]
        rows.append([f"{row['pair']}, {row['draws']} draws, {row['rows']:,} images", *cells, *ratios])
        for kind in ("validation", "compiled"):
            found = row["ratios"][kind]
            asked.append((f"{row['pair']}, draws: {row['draws']}: {kind} ÷ by hand", found, "≤ 1.3", found <= 1.3))
    heads = ["CPU ms", "by hand", "`evaluate`", "validation", "compiled", "products"]
    heads += [f"{rival} ÷ by hand" for rival in ("`evaluate`", "validation", "compiled")]
    lines += table(heads, rows)
    if weighted:
        for kind, ratio in (("`evaluate`", weighted["ratio"]), ("compiled", weighted["compiled ratio"])):
            said = f"{weighted['draws']:,} draws of {weighted['rows']:,} images: {kind} ÷ products"
            asked.append((said, ratio, "≤ 1.5", ratio <= 1.5))
    return [*lines, "### Targets of evaluation", *verdicts(asked)]


EVALUATION_PROSE = """\
*By hand* is the same computation in PyTorch on the same noise, whose numbers are compared before anything is timed;
*validation* is the pass of `fit(valid=…)`, which finds the structure of the programs once and not at each epoch;
*compiled* is that of `fit(valid=…, compile=True)` after its first; times are those of the processor, of one thread;
*products* are the matrix products alone. Gaussian: a GaussianVAE 784–200–200–50. Coins: a BernoulliVAE of 200 coins,
linear."""


# How it grows.


def scaling_section(facts: Facts | None) -> list[str]:
    lines = ["## How time and memory grow", ""]
    if facts is None:
        return [*lines, NOT_MEASURED.format(file="scaling.json"), ""]
    lines += [f"`python benchmarks/scaling.py` on {where(facts)}.", "", SCALING_PROSE, ""]
    for series in facts["series"].values():
        lines += [f"### {series['said'][0].upper()}{series['said'][1:]}"]
        sizes = unique(size for row in series["rivals"].values() for size in row["sizes"])
        rows = []
        for rival, row in series["rivals"].items():
            ms = dict(zip(row["sizes"], row["ms"], strict=True))
            mib = dict(zip(row["sizes"], row["mib"], strict=True))
            times = [number(ms[size]["median"]) if size in ms else "–" for size in sizes]
            rows.append([f"{rival}, ms", *times, number(row["exponent"], 2)])
            held = [number(mib.get(size)) for size in sizes]
            rows.append([f"{rival}, MiB", *held, number(row["memory_exponent"], 2)])
        lines += table(["", *map(str, sizes), "exponent"], rows)
    if sites := facts["series"].get("sites"):
        asked = []
        for rival, row in sites["rivals"].items():
            if "stock" not in rival:
                asked.append(
                    (f"{row['sizes'][-1]} sequential sites, {rival}: exponent of time", row["exponent"], "≤ 1.1")
                )
        lines += ["### Targets", *verdicts([(a, found, bound, found <= 1.1) for a, found, bound in asked])]
    if (processes := facts.get("processes")) and len(processes["jobs"]) > 1:
        first = processes["seconds"][0]
        rows = [
            [str(jobs), f"{seconds:.1f}", f"{first / seconds:.2f}"]
            for jobs, seconds in zip(processes["jobs"], processes["seconds"], strict=True)
        ]
        lines += [f"### {processes['said'][0].upper()}{processes['said'][1:]}"]
        lines += table(["processes", "seconds", "times faster"], rows)
    return lines


SCALING_PROSE = """\
Milliseconds are medians of a step; the points of a table took turns. The exponent is the slope of log time, or log
memory, against log size over the larger half of the sizes. Memory is what one step adds to the process at its peak,
gradients included (Linux; an allocator set to give back at once what is freed); a step of more than two seconds is
taken once, without its memory."""


# Time to a bound.


def bound_section(facts: Facts | None, tuning: Facts | None) -> list[str]:
    lines = ["## Time to a bound", ""]
    if facts is None:
        return [*lines, NOT_MEASURED.format(file="time-to-bound.json"), ""]
    command = "python benchmarks/time_to_bound.py" + (
        "" if facts["data"] == "binarized-mnist" else f" --data {facts['data']}"
    )
    lines += [f"`GUMBO_DATA=… {command} --epochs {facts['epochs']}` on {where(facts)}.", ""]
    prose = BOUND_PROSE.format(
        latents=facts["latents"], data=facts["data"], batch=facts["batch"], epochs=facts["epochs"]
    )
    compiled = "compiled" if facts["compiled"] else "not compiled"
    lines += [prose, "", f"Ours: {settings(facts['ours'])}, {compiled}."]
    asked = []
    for name in facts["stocks"]:
        runs = [(run, run["stocks"][name]) for run in facts["runs"]]
        rows = [
            [
                str(run["seed"]),
                f"{stock['best']:.2f}",
                f"{stock['seconds']:.1f}",
                "not reached" if stock["our_seconds"] is None else f"{stock['our_seconds']:.2f}",
                "–" if stock["times_faster"] is None else f"{stock['times_faster']:.1f}",
                f"{stock['ms']:.2f}",
                f"{run['ours']['ms']:.2f}",
                f"{run['ours']['best']:.2f}",
            ]
            for run, stock in runs
        ]
        heads = ["seed", "target, nats", "stock, s", "ours, s", "times faster"]
        heads += ["stock, ms a step", "ours, ms a step", "our best"]
        lines += ["", f"Against TraceGraph_ELBO, {settings(facts['stocks'][name])}:", *table(heads, rows)[:-1]]
        found = [stock["times_faster"] for _, stock in runs]
        least = None if None in found else min(found)
        if name == "decaying average":
            holds = least is not None and least >= 5
            asked.append(
                ("times faster than stock with its decaying average, least of the seeds:", least, "≥ 5", holds)
            )
        if least is not None:
            lines += ["", f"Median of the seeds: {statistics.median(found):.1f} times faster."]
    if facts["compiled"]:
        seconds = ", ".join(f"{run['ours']['compiling']:.1f}" for run in facts["runs"])
        lines += ["", f"Capturing and compiling our step took {seconds} s more, once; it is not in these times."]
        if counted := with_compiling(facts):
            lines[-1] += f" With it counted, the least of all the factors above is {min(counted):.1f}."
    lines += verdicts(asked)
    if tuning:
        lines += ["### Tuning", "", TUNING_PROSE.format(epochs=tuning["epochs"])]
        best = sorted(tuning["stock"], key=lambda entry: -entry["bound"])
        rows = [[settings(e), f"{e['bound']:.2f}", str(e["epochs"])] for e in best]
        lines += table(["stock", "validation bound, nats", "epochs"], rows)
        reached = [entry for entry in tuning["ours"] if entry["seconds"] is not None]
        reached.sort(key=lambda entry: entry["seconds"])
        others = [settings(entry) for entry in tuning["ours"] if entry["seconds"] is None]
        rows = [[settings(e), f"{e['seconds']:.2f}", str(e["steps"])] for e in reached]
        lines += table(["ours", "seconds to the stock's best", "steps"], rows)
        if others:
            lines += [f"Given up at three times the fastest so far: {'; '.join(others)}.", ""]
    return lines


def with_compiling(facts: Facts) -> list[float]:
    """How many times faster ours is with the compiling counted; empty if a target was not reached."""
    pairs = [(run["ours"]["compiling"], stock) for run in facts["runs"] for stock in run["stocks"].values()]
    if any(stock["our_seconds"] is None for _, stock in pairs):
        return []
    return [stock["seconds"] / (stock["our_seconds"] + compiling) for compiling, stock in pairs]


def settings(entry: Facts) -> str:
    if "baseline" in entry:
        network = " and a network that sees the image" if entry["baseline"] == "network" else ""
        return f"decaying average{network}, lr {entry['lr']:g}"
    return f"`{entry['estimator']}`, K = {entry['particles']}, lr {entry['lr']:g}"


BOUND_PROSE = """\
A sigmoid belief network of {latents} coins, one linear layer each way, on {data}, batches of {batch}; our best against
stock TraceGraph_ELBO with a baseline: its decaying average, and besides with a network that sees the image, which
the user supplies. All start from the same weights, take one fused Adam (lighter than `SVI.step`, which keeps an
optimizer for each parameter), have Pyro's validation off, and are judged by the same evaluation on the test images. The
rule, set beforehand: a target is the best test bound of a stock run's first {epochs} epochs, evaluated once per epoch;
what counts is the time spent in training steps until an evaluation is at the target. All are timed in turns.
"""
TUNING_PROSE = """\
Learning rates for both baselines of the stock by the bound on the validation images after {epochs} epochs (the worst
dropped after a third of them); estimators, particles and learning rates for ours by the time to the stock's best there.
A seed of its own; the race above takes the winners."""


# The history.

BARS = "▁▂▃▄▅▆▇█"


def curve(values: Sequence[float]) -> str:
    """Numbers as a row of bars, on a logarithmic scale from the smallest to the largest.

    >>> curve([1.0, 2.0, 4.0])
    '▁▅█'
    """
    low, high = math.log(min(values)), math.log(max(values))
    span = high - low or 1.0
    return "".join(BARS[round((math.log(value) - low) / span * (len(BARS) - 1))] for value in values)


def history_section(entries: list[Facts]) -> list[str]:
    lines = ["## History", ""]
    if not entries:
        return [*lines, NOT_MEASURED.format(file="history.jsonl"), ""]
    lines += [HISTORY_PROSE]
    for benchmark in unique(entry["benchmark"] for entry in entries):
        mine = [entry for entry in entries if entry["benchmark"] == benchmark]
        rows, once = [], 0
        for name in unique(name for entry in mine for name in entry["ratios"]):
            values = [entry["ratios"][name] for entry in mine if entry["ratios"].get(name, 0) > 0]
            once += len(values) == 1
            if len(values) > 1:
                ends = (values[0], values[-1], min(values), max(values))
                rows.append([name, curve(values), *(f"{value:.2f}" for value in ends)])
        dates = " to ".join(unique(f"{mine[at]['date'][:10]} ({mine[at]['commit']})" for at in (0, -1)))
        more = f" Of {once} further ratios there is one run." if once else ""
        lines += [f"### Runs of {benchmark}.py", "", f"Runs: {len(mine)}, {dates}.{more}"]
        lines += table(["", "runs", "first", "last", "least", "most"], rows) if rows else [""]
    return lines


HISTORY_PROSE = """\
Every run of a benchmark appends its date, commit, machine and ratios to `benchmarks/results/history.jsonl`. Ratios are
of times in one run, or exponents of growth; a bar is a run, from the first to the last, on a logarithmic scale of its
own in each row. Runs on busy machines and on other processors are among them: the file says which."""


# A GPU.


NO_GPU = """\
Not measured without a GPU. `python benchmarks/step.py --device cuda` writes `benchmarks/results/step-cuda.json`,
and this page then shows it."""


def cuda_section(facts: Facts | None) -> list[str]:
    lines = ["## On a GPU", ""]
    if facts is None:
        return [*lines, NO_GPU, ""]
    steps = Steps(facts)
    lines += [f"`python benchmarks/step.py --device cuda` on {where(facts)}.", ""]
    for workload in unique(row["workload"] for row in facts["rows"]):
        lines += [f"### {SAID[workload]}, on the GPU", *steps.table(workload), *steps.ratios(workload)[1:]]
    found = steps.ratio("gaussian", "Pyro SVI", "gumbo, compiled", 128)
    holds = None if found is None else found >= 10
    return [*lines, *verdicts([("gaussian, batch 128: Pyro SVI ÷ gumbo, compiled", found, "≥ 10", holds)])]


HEAD = """\
# Performance

Made by `python benchmarks/performance.py` from the files in `benchmarks/results`, which the commands below write.
Times are from one machine on one day; compare ratios, which are of implementations timed in turns in one process."""


def lines_of(path: Path) -> list[Facts]:
    """The entries of the history."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def page(folder: Path = RESULTS) -> str:
    def read(name: str) -> Facts | None:
        path = folder / name
        return json.loads(path.read_text()) if path.exists() else None

    sections = [
        [HEAD, ""],
        step_section(read("step.json")),
        profile_section(read("profile.json")),
        start_section(read("start.json")),
        evaluation_section(read("evaluation.json")),
        processes_section(read("processes.json")),
        scaling_section(read("scaling.json")),
        bound_section(read("time-to-bound.json"), read("time-to-bound-tuning.json")),
        cuda_section(read("step-cuda.json")),
        history_section(lines_of(folder / HISTORY)),
    ]
    text = "\n".join(line for section in sections for line in section)
    while "\n\n\n" in text:
        text = text.replace("\n\n\n", "\n\n")
    return text.rstrip() + "\n"


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--results", type=Path, default=RESULTS, help="the folder of the JSON files")
    parser.add_argument("--page", type=Path, default=PAGE)
    options = parser.parse_args(arguments)
    text = page(options.results)
    if not options.check:
        options.page.write_text(text)
    elif not options.page.exists() or options.page.read_text() != text:
        sys.exit(f"{options.page} is not what {options.results} gives: run python benchmarks/performance.py")


if __name__ == "__main__":
    main()
