"""Chains summed out of a model: SiteELBO against stock TraceEnum_ELBO, and the growth of time with the length.

    python benchmarks/elimination.py [--lengths 50 100 200 400 500 800] [--rounds 9] [--float64]

A hidden Markov model with Normal observations, every state marked infer={"enumerate": "parallel"}, an empty guide. A
step is the loss and its gradient. Prints medians of interleaved steps, the ratio, milliseconds for each time step, and
the power of T that the time grows with, and writes them to benchmarks/results/elimination.json. Python's garbage
collection is off while a step is timed, as in timeit: its passes go over every object of the process.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import math
import statistics
from pathlib import Path

import pyro
import pyro.distributions as dist
import torch
from _timing import RESULTS, Rival, interleaved_turns, remember, spread, surroundings, write_json
from pyro.infer import TraceEnum_ELBO

from gumbo.inference import SiteELBO

ELBOS = ("SiteELBO", "TraceEnum_ELBO")


class HiddenMarkov(pyro.nn.PyroModule):
    def __init__(self, states: int):
        super().__init__()
        self.steps = torch.nn.Parameter(torch.randn(states, states))
        self.means = torch.nn.Parameter(3 * torch.randn(states))

    def forward(self, y):
        with pyro.plate("sequences", len(y)):
            z = 0
            for t in pyro.markov(range(y.shape[1])):
                logits = self.steps[z]
                z = pyro.sample(f"z{t}", dist.Categorical(logits=logits), infer={"enumerate": "parallel"})
                pyro.sample(f"y{t}", dist.Normal(self.means[z], 1.0), obs=y[:, t])


class Nothing(pyro.nn.PyroModule):
    def forward(self, y):
        pass


def step(loss, model, y):
    parameters = list(model.parameters())

    def run():
        for parameter in parameters:
            parameter.grad = None
        loss(y).backward()

    return run


@contextlib.contextmanager
def without_collection():
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def exponent(lengths: list[int], times: list[float]) -> float:
    """The power of T that the times grow with: the slope of a line through their logarithms."""
    return statistics.linear_regression([math.log(n) for n in lengths], [math.log(time) for time in times]).slope


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--lengths", type=int, nargs="+", default=[50, 100, 200, 400, 500, 800])
    parser.add_argument("--states", type=int, default=16)
    parser.add_argument("--sequences", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--float64", action="store_true")
    parser.add_argument("--out", type=Path, default=RESULTS / "elimination.json")
    options = parser.parse_args()
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64 if options.float64 else torch.float32)
    around = surroundings()
    steps, losses = {}, {}
    for length in options.lengths:
        y = 3 * torch.randn(options.sequences, length)
        for name, elbo in (("SiteELBO", SiteELBO()), ("TraceEnum_ELBO", TraceEnum_ELBO(max_plate_nesting=1))):
            torch.manual_seed(1)
            model = HiddenMarkov(options.states)
            loss = elbo(model, Nothing())
            losses[name, length] = loss(y).item()
            run = step(loss, model, y)
            steps[name, length] = Rival(lambda n, run=run: run(), without_collection)
    found = {key: spread(times) for key, times in interleaved_turns(steps, options.rounds, turn=1).items()}
    print(f"{around['machine']}, load {around['load']} at the start; medians of {options.rounds} interleaved steps")
    rows = []
    for length in options.lengths:
        ours, stock = (found[name, length]["median"] for name in ELBOS)
        rows.append({"T": length, **{name: found[name, length] for name in ELBOS}, "ratio": ours / stock})
        print(
            f"T = {length:4d}: SiteELBO {ours:8.1f} ms, TraceEnum_ELBO {stock:8.1f} ms, ratio {ours / stock:.2f};"
            f" {ours / length:.2f} and {stock / length:.2f} ms a time step;"
            f" losses {losses['SiteELBO', length]:.4f} and {losses['TraceEnum_ELBO', length]:.4f}"
        )
    powers = {}
    if len(options.lengths) > 1:
        powers = {
            name: exponent(options.lengths, [found[name, n]["median"] for n in options.lengths]) for name in ELBOS
        }
        said = ", ".join(f"{power:.2f} ({name})" for name, power in powers.items())
        print(f"time grows with T to the power of {said}")
    command = {"states": options.states, "sequences": options.sequences, "float64": options.float64}
    write_json(options.out, {"surroundings": around, **command, "rows": rows, "exponents": powers})
    ratios = {f"T = {row['T']}: SiteELBO ÷ TraceEnum_ELBO": row["ratio"] for row in rows}
    ratios |= {f"exponent of time in T, {name}": power for name, power in powers.items()}
    remember("elimination", ratios, around, options.out.parent)


if __name__ == "__main__":
    main()
