"""Chains summed out of a model: SiteELBO against stock TraceEnum_ELBO, and the growth of time with the length.

    python benchmarks/elimination.py [--lengths 5 50 500] [--states 16] [--sequences 1] [--rounds 9] [--float64]

A hidden Markov model with Normal observations, every state marked infer={"enumerate": "parallel"}, an empty guide. A
step is the loss and its gradient. Prints medians of interleaved steps, the ratio, and milliseconds for each time step.
"""

from __future__ import annotations

import argparse

import pyro
import pyro.distributions as dist
import torch
from _timing import interleaved, machine, median
from pyro.infer import TraceEnum_ELBO

from gumbo.inference import SiteELBO


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


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--lengths", type=int, nargs="+", default=[5, 50, 500])
    parser.add_argument("--states", type=int, default=16)
    parser.add_argument("--sequences", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--float64", action="store_true")
    options = parser.parse_args()
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64 if options.float64 else torch.float32)
    print(machine())
    for length in options.lengths:
        y = 3 * torch.randn(options.sequences, length)
        steps, losses = {}, {}
        for name, elbo in (("SiteELBO", SiteELBO()), ("TraceEnum_ELBO", TraceEnum_ELBO(max_plate_nesting=1))):
            torch.manual_seed(1)
            model = HiddenMarkov(options.states)
            loss = elbo(model, Nothing())
            losses[name] = loss(y).item()
            steps[name] = step(loss, model, y)
        times = {name: median(found) for name, found in interleaved(steps, options.rounds, warm_up=2).items()}
        ours, stock = times["SiteELBO"], times["TraceEnum_ELBO"]
        print(
            f"T = {length:4d}: SiteELBO {ours:8.1f} ms, TraceEnum_ELBO {stock:8.1f} ms, ratio {ours / stock:.2f};"
            f" {ours / length:.2f} and {stock / length:.2f} ms a time step;"
            f" losses {losses['SiteELBO']:.4f} and {losses['TraceEnum_ELBO']:.4f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
