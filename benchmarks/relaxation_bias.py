"""The exact bias of relaxations and straight-through estimators against temperature, where all codes can be listed.

    python benchmarks/relaxation_bias.py [--steps 0 600] [--out benchmarks/results/relaxation-bias.json]

A CategoricalVAE with 4 latents of 8 classes on the digits, trained by leave-one-out gradients for some steps, and then
held still. The gradient of the evidence lower bound with respect to the guide's logits is a sum over 4,096 codes. So is
the mean of an estimator whose path is a function of the code that it drew (reinmax, gapped-straight-through); for one
that takes further noise (gumbel-softmax, straight-through) two noises are drawn given each code, and their difference
gives the error of the mean.
Prints and keeps, for each estimator and temperature, the relative bias ‖E[g] − ∇‖/‖∇‖ and the relative standard
deviation (E‖g − E[g]‖²)^½/‖∇‖ of one draw, both over all data of the batch; ``rloo`` at two draws stands beside them.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path

import pyro
import pyro.distributions as dist
import torch
from _timing import RESULTS, machine
from pyro import poutine

from gumbo.experiments.data import load
from gumbo.guides import CategoricalGuide
from gumbo.inference import SiteELBO
from gumbo.inference.estimators import Draw, GappedStraightThrough, GumbelSoftmax, ReinMax
from gumbo.inference.estimators.relaxation import conditional_scores, noise, squash
from gumbo.models import CategoricalVAE
from gumbo.pictures import figure, save

TEMPERATURES = (0.1, 0.2, 0.35, 0.5, 0.7, 1.0, 1.4, 2.0, 3.0)
WORDS = {
    "gumbel-softmax": lambda t: GivenCode(t),
    "straight-through": lambda t: GivenCode(t, hard=True),
    "reinmax": ReinMax,
    "gapped-straight-through": GappedStraightThrough,
}
NOISY = ("gumbel-softmax", "straight-through")
FIGURE = Path(__file__).resolve().parents[1] / "docs" / "figures" / "relaxation-bias.png"


def trained(steps: int, latents: int = 4, classes: int = 8, seed: int = 0):
    """A model and a guide after some training, and a batch."""
    torch.manual_seed(seed)
    images = load("digits", binarize="static").train
    model = CategoricalVAE(tuple(images.shape[1:]), num_latents=latents, num_classes=classes, hidden=(64,))
    guide = CategoricalGuide(model)
    loss = SiteELBO("rloo", num_particles=4)(model, guide).initialize(images[:2])
    optimizer = torch.optim.Adam(loss.parameters(), lr=1e-3)
    for _ in range(steps):
        optimizer.zero_grad()
        loss(images[torch.randint(len(images), (64,))]).backward()
        optimizer.step()
    return model.double(), guide.double(), images.double()


def listed(logits: torch.Tensor, codes: torch.Tensor) -> dist.OneHotCategorical:
    """A distribution that draws the codes that it is given; a subclass would be another law to the estimators."""
    fn = dist.OneHotCategorical(logits=logits)
    fn.codes, fn.sample = codes, lambda sample_shape=(): codes
    return fn


class GivenCode(GumbelSoftmax):
    """Relaxed draws of which it is known what code they lean to."""

    def draw(self, fn, step, args=(), kwargs=None):
        fixed = fn.logits.detach()
        scores = conditional_scores(fixed, fn.codes, noise(fixed, True), True)
        soft = squash(scores + (fn.logits - fixed), self.temperature, True)
        return Draw(fn.codes + (soft - soft.detach()) if self.hard else soft)


class Problem:
    """The bound of one batch as a function of the guide's logits and of codes, relaxed or not."""

    def __init__(self, model, guide, x):
        self.model, self.x = model, x
        with pyro.get_param_store().scope():
            self.logits = poutine.trace(guide).get_trace(x).nodes["y"]["fn"].base_dist.logits.detach()
        latents, classes = self.logits.shape[1:]
        listed = torch.cartesian_prod(*[torch.arange(classes)] * latents)
        self.codes = torch.nn.functional.one_hot(listed, classes).to(self.logits).unsqueeze(1)
        self.log_q = (self.codes * self.logits.log_softmax(-1)).sum((-1, -2))  # (codes, data)

    def cost(self, y, logits):
        """log p(x, y) − log q(y) with both pmfs extended linearly, one number a draw and datum."""
        log_p = self.model.likelihood(y).log_prob(self.x) - math.log(y.shape[-1]) * y.sum((-1, -2))
        return log_p - (y * logits.log_softmax(-1)).sum((-1, -2))

    def exact(self):
        """The gradient with respect to the logits, ``(data, latents, classes)``."""
        with torch.no_grad():
            f = self.cost(self.codes.expand(-1, len(self.x), -1, -1), self.logits)
            q, pi = self.log_q.exp(), self.logits.softmax(-1)
            return torch.einsum("nb,nbij->bij", q * (f - (q * f).sum(0)), self.codes - pi)

    def paths(self, estimator):
        """One gradient for each code and datum."""
        leaf = self.logits.expand(len(self.codes), *self.logits.shape).clone().requires_grad_()
        fn = listed(leaf, self.codes.expand_as(leaf))
        (found,) = torch.autograd.grad(self.cost(estimator.draw(fn, 0).value, leaf).sum(), leaf)  # of the logits alone
        return found

    def leave_one_out(self):
        """Gradients of two draws, ½ (f − f̃)(y − ỹ), as many as there are codes."""
        with torch.no_grad():
            fn = dist.OneHotCategorical(logits=self.logits)
            one, other = (fn.sample((len(self.codes),)) for _ in range(2))
            gap = (self.cost(one, self.logits) - self.cost(other, self.logits))[..., None, None]
            return gap * (one - other) / 2


def relative(problem, exact, first, second):
    """Relative bias with its standard error, and the relative standard deviation of one draw."""
    size, weight = exact.norm().item(), problem.log_q.exp()[..., None, None]
    mean = (weight * (first + second) / 2).sum(0)
    error = (weight * (first - second) / 2).square().sum().item()
    variance = (weight * (first - mean).square()).sum().item()
    squared = (mean - exact).square().sum().item() - error  # what chance alone adds is taken off
    return {
        "bias": math.sqrt(max(squared, 0.0)) / size,
        "error": math.sqrt(error) / size,
        "std": math.sqrt(variance) / size,
    }


def measure(problem):
    exact = problem.exact()
    rows = []
    for word, make in WORDS.items():
        for temperature in TEMPERATURES:
            twice = [problem.paths(make(temperature)) for _ in range(2 if word in NOISY else 1)]
            row = relative(problem, exact, twice[0], twice[-1])
            rows.append({"estimator": word, "temperature": temperature, **row})
    variance = (problem.leave_one_out() - exact).square().mean(0).sum().item()
    std = math.sqrt(variance) / exact.norm().item()
    rows.append({"estimator": "rloo K=2", "temperature": None, "bias": 0.0, "error": 0.0, "std": std})
    return rows


def plot(stops, path):
    """Bias above, spread below; where chance hides the bias a triangle stands at twice its error."""
    made, axes = figure(2, len(stops), figsize=(4.2 * len(stops), 6.4), sharex=True, squeeze=False)
    for column, (steps, rows) in enumerate(stops.items()):
        above, below = axes[0][column], axes[1][column]
        for number, word in enumerate(WORDS):
            mine = [row for row in rows if row["estimator"] == word]
            seen = [row for row in mine if row["bias"] > 2 * row["error"]]
            hidden = [row for row in mine if row not in seen]
            at = [row["temperature"] for row in seen]
            bars = [row["error"] for row in seen]
            above.errorbar(at, [row["bias"] for row in seen], yerr=bars, marker="o", ms=3, color=f"C{number}")
            bounds = [2 * row["error"] for row in hidden]
            above.plot([row["temperature"] for row in hidden], bounds, "v", ms=5, color=f"C{number}", mfc="none")
            spread = [row["std"] for row in mine]
            below.plot([row["temperature"] for row in mine], spread, "-o", ms=3, color=f"C{number}", label=word)
        other = next(row for row in rows if row["estimator"] == "rloo K=2")
        below.axhline(other["std"], color="gray", ls=":", label="rloo, two draws")
        above.set(xscale="log", yscale="log", ylabel="relative bias", title=f"after {steps} steps")
        below.set(xscale="log", yscale="log", ylabel="relative std of one draw", xlabel="temperature")
    axes[1][0].legend(fontsize=7)
    return save(made, path)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, nargs="+", default=[0, 600])
    parser.add_argument("--data-count", type=int, default=4)
    parser.add_argument("--out", type=Path, default=RESULTS / "relaxation-bias.json")
    parser.add_argument("--figure", type=Path, default=FIGURE)
    options = parser.parse_args()
    stops = {}
    for steps in options.steps:
        model, guide, images = trained(steps)
        torch.manual_seed(1)
        stops[steps] = measure(Problem(model, guide, images[: options.data_count]))
        print(f"\nafter {steps} steps\n{'estimator':<26}{'temperature':>12}{'bias':>9}{'± error':>9}{'std':>9}")
        for row in stops[steps]:
            temperature = "" if row["temperature"] is None else f"{row['temperature']:g}"
            print(
                f"{row['estimator']:<26}{temperature:>12}{row['bias']:>9.3f}{row['error']:>9.3f}{row['std']:>9.2f}",
                flush=True,
            )
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps({"machine": machine(), "stops": stops}, indent=1) + "\n")
    print(plot(stops, options.figure))


if __name__ == "__main__":
    main()
