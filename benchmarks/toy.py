"""The toy of the field: the gradient of E[(b − t)²] for one coin of probability ½, under every estimator.

    python benchmarks/toy.py [--draws 1000] [--settle 300]

f = (b − t)² enters as a factor of the model, and the KL weight 0 leaves E[f] alone. Learned baselines and control
variates take ``--settle`` optimizer steps first, the coin held still. Prints mean and variance of the derivative with
respect to the coin's logit beside the exact derivative, p (1 − p) Δ with Δ = f(1) − f(0), and the closed-form variance
of a leave-one-out pair: Δ/2 where the two coins differ, and 0 elsewhere, so Δ²/16.
"""

from __future__ import annotations

import argparse

import pyro
import pyro.distributions as dist
import torch
from pyro.nn import PyroModule
from torch import nn

from gumbo.errors import UnsupportedSite
from gumbo.inference import SiteELBO
from gumbo.inference.estimators import estimators

PAIRS = {"rloo": 2}


class Guide(PyroModule):
    def __init__(self):
        super().__init__()
        self.encoder_logit = nn.Parameter(torch.zeros((), dtype=torch.float64))

    def forward(self, copies, t):
        with pyro.plate("copies", copies):
            pyro.sample("b", dist.Bernoulli(logits=self.encoder_logit))


def model(copies, t):
    with pyro.plate("copies", copies):
        b = pyro.sample("b", dist.Bernoulli(torch.tensor(0.5, dtype=torch.float64)))
        pyro.factor("reward", (b - t) ** 2)


def draws_of(word, t, count, settle):
    """Independent draws of the derivative of E[f] with respect to the logit."""
    guide = Guide()
    loss = SiteELBO(word, kl_weight=0.0, num_particles=PAIRS.get(word))(model, guide).initialize(1, t)
    own = list(loss.binding.parameters())
    optimizer = torch.optim.Adam(own, lr=1e-2) if own else None
    for _ in range(settle if len(loss.binding.states) else 0):
        loss(64, t).backward()
        if optimizer:
            optimizer.step()
        loss.zero_grad()
    loss.eval()
    found = []
    for _ in range(count):
        (gradient,) = torch.autograd.grad(-loss(1, t), list(guide.parameters()))
        found.append(gradient)
    return torch.stack(found)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--draws", type=int, default=1000)
    parser.add_argument("--settle", type=int, default=300)
    options = parser.parse_args()
    torch.set_num_threads(1)
    for t in (0.45, 0.499):
        gap = (1 - t) ** 2 - t**2
        print(f"\nt = {t}: exact derivative {0.25 * gap:.6f}; leave-one-out pair in closed form {gap**2 / 16:.3e}")
        print(f"{'estimator':<20}{'mean':>12}{'± error':>12}{'variance':>12}")
        for word in estimators:
            torch.manual_seed(0)
            try:
                found = draws_of(word, t, options.draws, options.settle)
            except UnsupportedSite:
                continue
            error = found.std() / len(found) ** 0.5
            print(f"{word:<20}{found.mean():>12.6f}{error:>12.1e}{found.var():>12.3e}", flush=True)


if __name__ == "__main__":
    main()
