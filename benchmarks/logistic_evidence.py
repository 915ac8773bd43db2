"""The evidence and the in-sample predictive density of a Bayesian logistic regression, which docs/posteriors.md quotes.

    python benchmarks/logistic_evidence.py

300 data, 10 weights with standard Normal priors, a full-covariance Normal guide. Nats are of all data together.
"""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import torch
from pyro.infer.autoguide import AutoMultivariateNormal

from gumbo.inference import evaluate, fit

N, WIDTH = 300, 10


def model(x, y):
    w = pyro.sample("w", dist.Normal(torch.zeros(WIDTH), 1.0).to_event(1))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Bernoulli(logits=(x * w).sum(-1)), obs=y)


def main() -> dict[str, float]:
    torch.manual_seed(0)
    x = torch.randn(N, WIDTH)
    y = torch.bernoulli(torch.sigmoid(x @ torch.randn(WIDTH)))
    guide = AutoMultivariateNormal(model, init_scale=0.1)
    fit(model, guide, (x, y), epochs=2000, batch_size=N, lr=1e-2, seed=0, progress=False)
    found = evaluate(model, guide, (x, y), num_samples=4000, seed=0)
    numbers = {
        "ELBO": N * found.elbo,
        "log evidence": N * found.log_evidence,
        "its error by the draws": N * found.log_evidence_mc_se,
        "k-hat": float(found.khat),
        "in-sample log predictive": N * found.log_predictive,
    }
    for name, value in numbers.items():
        print(f"{name:26} {value:10.2f}")
    return numbers


if __name__ == "__main__":
    main()
