"""How often `diagnose` errs: alarms on guides that are right, and oks on guides that are wrong.

    python benchmarks/diagnosis_errors.py --seeds 20

Each case is diagnosed with as many seeds; the table says in how many of them a verdict is an alarm, and in how many it
cannot say. Exact and nearly exact guides must raise none; the others must raise some alarm in every run.
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Callable

import pyro
import pyro.distributions as dist
import torch

from gumbo.inference import diagnose

GENERATOR = torch.Generator().manual_seed(0)
ZERO, ONE = torch.zeros(()).double(), torch.ones(()).double()
Y = torch.linspace(-0.5, 1.5, 20).double()
SD = (1 / (1 + len(Y))) ** 0.5
X = torch.linspace(-2.5, 2.5, 15).double()
INPUTS = torch.randn(40, 8, generator=GENERATOR).double()
WEIGHT = torch.randn(8, generator=GENERATOR).double()
SIGNED = INPUTS @ WEIGHT + 0.05 * torch.randn(40, generator=GENERATOR).double()
COVARIANCE = torch.linalg.inv(torch.eye(8).double() + INPUTS.T @ INPUTS / 0.05**2)
CENTER = COVARIANCE @ (INPUTS.T @ SIGNED) / 0.05**2
HUNDRED = torch.randn(100, generator=GENERATOR).double()


def one_mean(y):
    m = pyro.sample("m", dist.Normal(ZERO, ONE))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(m, 1.0), obs=y)


def mean_guide(scale: float, shift: float = 0.0) -> Callable:
    return lambda y: pyro.sample("m", dist.Normal(Y.sum() * SD**2 + shift * SD, scale * SD))


def bounded_guide(y):
    pyro.sample("m", dist.Uniform(Y.sum() * SD**2 - 1.4 * SD, Y.sum() * SD**2 + 1.4 * SD))


def local(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(ZERO, ONE))
        pyro.sample("x", dist.Normal(z, ONE), obs=x)


def local_guide(scale: float, shift: float | torch.Tensor = 0.0) -> Callable:
    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x / 2 + shift * 0.5**0.5, scale * 0.5**0.5))

    return guide


def regression(absolute: bool) -> Callable:
    def model(y):
        w = pyro.sample("w", dist.Normal(torch.zeros(8).double(), 1.0).to_event(1))
        mean = (INPUTS @ w.unsqueeze(-1)).squeeze(-1)
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Normal(mean.abs() if absolute else mean, 0.05), obs=y)

    return model


def one_mode(y):
    pyro.sample("w", dist.MultivariateNormal(CENTER, COVARIANCE))


def hundred(x):
    z = pyro.sample("z", dist.Normal(torch.zeros(100).double(), 1.0).to_event(1))
    pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)


def hundred_guide(scale: float) -> Callable:
    return lambda x: pyro.sample("z", dist.Normal(HUNDRED / 2, scale * 0.5**0.5).to_event(1))


GUMBEL = dist.Gumbel(ZERO, ONE)


def forty(x):
    pyro.sample("s", GUMBEL)
    z = pyro.sample("z", dist.Normal(torch.zeros(39).double(), 1.0).to_event(1))
    pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)


def symmetric_guide(x):
    pyro.sample("s", dist.Normal(GUMBEL.mean, GUMBEL.stddev))
    pyro.sample("z", dist.Normal(HUNDRED[:39] / 2, 0.5**0.5).to_event(1))


SHARES, CENTRES = torch.tensor([0.2, 0.3, 0.5]).double(), torch.tensor([0.0, 2.0, 4.0]).double()
LOGITS = SHARES.log() + dist.Normal(CENTRES, 1.0).log_prob(2 + X[:, None])


def three_classes(x):
    with pyro.plate("data", len(x)):
        k = pyro.sample("k", dist.Categorical(SHARES))
        pyro.sample("x", dist.Normal(CENTRES[k], 1.0), obs=x)


def class_guide(sharpness: float) -> Callable:
    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("k", dist.Categorical(logits=sharpness * LOGITS))

    return guide


RIGHT = {
    "one mean, exact": (one_mean, mean_guide(1.0), Y),
    "one mean, sd 1.05 times": (one_mean, mean_guide(1.05), Y),
    "one mean, sd 1/1.05 times": (one_mean, mean_guide(1 / 1.05), Y),
    "15 data, exact": (local, local_guide(1.0), X),
    "15 data, sd 1/1.05 times": (local, local_guide(1 / 1.05), X),
    "100 independent, sd 1/1.05 times": (hundred, hundred_guide(1 / 1.05), HUNDRED),
    "regression, d = 8, exact": (regression(False), one_mode, SIGNED),
    "15 data of three classes, exact": (three_classes, class_guide(1.0), 2 + X),
}
WRONG = {
    "one mean, sd 1/4": (one_mean, mean_guide(0.25), Y),
    "one mean, sd 1/4, off by one sd": (one_mean, mean_guide(0.25, 1.0), Y),
    "one mean, sd 4 times": (one_mean, mean_guide(4.0), Y),
    "one mean, off by five sd": (one_mean, mean_guide(1.0, 5.0), Y),
    "15 data, sd 1/4": (local, local_guide(0.25), X),
    "|regression|, d = 8, one mode of two": (regression(True), one_mode, SIGNED.abs()),
    "one mean, uniform within 1.4 sd": (one_mean, bounded_guide, Y),
    "100 data, one off by one sd": (local, local_guide(1.0, (torch.arange(100) == 7).double()), HUNDRED),
    "40 dimensions, one skewed, a Normal of its mean and sd": (forty, symmetric_guide, HUNDRED[:39]),
    "15 data of three classes, the likeliest alone": (three_classes, class_guide(1e4), 2 + X),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--num_samples", type=int, default=2000)
    parser.add_argument("--num_simulations", type=int, default=100)
    parser.add_argument("--only", default="", help="cases whose name contains this")
    config = parser.parse_args()
    print(f"{config.seeds} seeds, {config.num_samples} draws; a verdict's count is of the runs")
    for title, cases in (("right", RIGHT), ("wrong", WRONG)):
        for name, (model, guide, data) in cases.items():
            if config.only not in name:
                continue
            alarms: Counter[str] = Counter()
            silent: Counter[str] = Counter()
            runs = 0
            for seed in range(config.seeds):
                report = diagnose(
                    model,
                    guide,
                    data,
                    num_samples=config.num_samples,
                    num_simulations=config.num_simulations,
                    seed=seed,
                    refine_steps=0,
                    progress=False,
                )
                alarms.update(report.alarms)
                silent.update(report.cannot_say)
                runs += not report.ok
            print(f"{title}: {name}: some alarm in {runs} of {config.seeds}")
            print(f"    alarms {dict(alarms)}\n    cannot say {dict(silent)}", flush=True)


if __name__ == "__main__":
    main()
