"""Estimators on a layer of 200 coins, or its twins: variance of the gradient, time a step, and their product.

    GUMBO_DATA=… python benchmarks/bernoulli_layer.py [--layer coins|one-hot|poisson] [--steps 0 500 1500] [--settle 0]
                                                      [--draws 100] [--only WORD …] [--times FILE] [--out FILE]

A nonlinear autoencoder on binarized MNIST, batch 50: 200 Bernoulli latents, 20 one-hot ones of 10 classes, or 200
Poisson ones. Model and guide are trained with leave-one-out gradients; all baselines and control variates live through
the same training, see every batch and take their own optimizer steps, as they would if they were in charge. At each
stop everything is held still, every estimator draws gradients of the guide on one fresh batch, and full steps are timed
one after the other in every round. The last column is the factor by which variance × time is below that of Pyro's
TraceGraph_ELBO with its decaying-average baseline. ``--times FILE`` takes the milliseconds from what an earlier run on
an idle machine (``--steps 0 --draws 4 --rounds 25 --out FILE``) has written. ``--settle 100`` lets baselines and
control variates see 100 batches at the initial parameters, before the first stop.

    python benchmarks/bernoulli_layer.py --page FILE …

measures nothing and writes what earlier runs have left in FILE … as the tables of
experiments/results/second-wave-layers.md, below its findings.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import json
import pathlib
import re

import pyro
import torch
from _timing import interleaved, machine, median

from gumbo.experiments.data import load
from gumbo.guides import BernoulliGuide, CategoricalGuide, MeanFieldGuide
from gumbo.inference import SiteELBO, make_loss
from gumbo.inference.estimators import ARMS, CARMS, Fini
from gumbo.models import BernoulliVAE, CategoricalVAE, PoissonVAE
from gumbo.tables import digits, markdown

PAGE = pathlib.Path(__file__).resolve().parent.parent / "experiments" / "results" / "second-wave-layers.md"
TABLES = "<!-- Tables: python benchmarks/bernoulli_layer.py --page -->\n"

REFERENCE = "trace-graph+baseline"
COMMON = {
    REFERENCE: (REFERENCE, 1),
    "score-average": ("score-average", 1),
    "nvil": ("nvil", 1),
    "rloo K=2": ("rloo", 2),
    "rloo K=4": ("rloo", 4),
    "rloo K=8": ("rloo", 8),
    "double-cv K=2": ("double-cv", 2),
    "double-cv K=4": ("double-cv", 4),
    "double-cv K=8": ("double-cv", 8),
}
PAIRS = {"disarm": ("disarm", 1), "disarm K=2": ("disarm", 2), "disarm K=4": ("disarm", 4)}
RODEO = {"rodeo K=2": ("rodeo", 2), "rodeo K=4": ("rodeo", 4)}
RELAXED = {"muprop": ("muprop", 1), "rebar": ("rebar", 1), "relax": ("relax", 1)}
COINS = {
    "trace": ("trace", 1),
    "trace-graph": ("trace-graph", 1),
    "score": ("score", 1),
    **COMMON,
    **PAIRS,
    "arm": ("arm", 1),
    "arms, 3 draws": (ARMS(3), 1),
    "arms, 4 draws": (ARMS(4), 1),
    "arms, 8 draws": (ARMS(8), 1),
    **RODEO,
    "local-expectation": ("local-expectation", 1),
    "measure-valued": ("measure-valued", 1),
    **RELAXED,
}
CLASSES = {
    **COMMON,
    **PAIRS,
    "carms, 4 draws": (CARMS(4), 1),
    "carms, 8 draws": (CARMS(8), 1),
    **RODEO,
    "local-expectation": ("local-expectation", 1),
    **RELAXED,
    "reinmax (biased)": ("reinmax", 1),
    "gapped-straight-through (biased)": ("gapped-straight-through", 1),
}
COUNTS = {
    **COMMON,
    "muprop": ("muprop", 1),
    "measure-valued": ("measure-valued", 1),
    "fini 2 (biased)": (Fini(2), 1),
    "fini 3 (biased)": (Fini(3), 1),
}
LAYERS = {
    "coins": (COINS, lambda shape, options: BernoulliVAE(shape, num_latents=options.num_latents), BernoulliGuide),
    "one-hot": (
        CLASSES,
        lambda shape, options: CategoricalVAE(shape, num_latents=20, num_classes=10),
        CategoricalGuide,
    ),
    "poisson": (COUNTS, lambda shape, options: PoissonVAE(shape, num_latents=options.num_latents), MeanFieldGuide),
}


class Ours:
    """One of our estimators, with its own state along a training run that others drive."""

    def __init__(self, word, particles, model, guide, x):
        self.model, self.guide = model, guide
        self.loss = make_loss(word, num_particles=particles)(model, guide)
        self.own = []
        if hasattr(self.loss, "initialize"):
            self.loss.initialize(x)
            self.own = list(self.loss.binding.parameters())
        self.optimizer = torch.optim.Adam(self.own, lr=1e-3) if self.own else None

    def backward(self, x):
        self.loss(x).backward()

    def live(self, x):
        """A training step of baselines and control variates alone."""
        if hasattr(self.loss, "binding") and len(self.loss.binding.states):
            loss = self.loss(x)  # statistics move here, and what is learnt by the optimizer below
            if self.optimizer:
                loss.backward()
                self.optimizer.step()
                self.optimizer.zero_grad()

    @contextlib.contextmanager
    def still(self):
        self.loss.eval()
        yield
        self.loss.train()


class Stock:
    """A loss of Pyro's that calls backward itself and keeps its baseline in the param store."""

    def __init__(self, word, particles, model, guide, x):
        self.model, self.guide, self.loss = model, guide, make_loss(word, num_particles=particles)
        self.store = {"params": {}, "constraints": {}}
        self.fixed = False

    def backward(self, x):
        kept = {name: dict(self.store[name]) for name in self.store}
        with pyro.get_param_store().scope(self.store):
            self.loss.loss_and_grads(self.model, self.guide, x)
        if self.fixed:
            self.store = kept

    def live(self, x):
        if "baseline" in REFERENCE and isinstance(self.loss, type(make_loss(REFERENCE))):
            self.backward(x)

    @contextlib.contextmanager
    def still(self):
        self.fixed = True
        yield
        self.fixed = False


def variance_of(arm, x, draws):
    """Trace of the covariance of the guide's gradient, and its signal-to-noise ratio."""
    parameters = list(arm.guide.parameters())
    mean = square = 0.0
    torch.manual_seed(1)
    with arm.still():
        for _ in range(draws):
            for parameter in parameters:
                parameter.grad = None
            arm.backward(x)
            gradient = torch.cat([p.grad.flatten() for p in parameters]).double()
            mean, square = mean + gradient / draws, square + gradient.square() / draws
    variance = ((square - mean.square()).sum() * draws / (draws - 1)).item()
    signal = max((mean.square().sum() - variance / draws).item(), 0.0)
    return variance, (signal / variance) ** 0.5 if variance else float("inf")


def measure(arms, x, draws, rounds, known):
    rows = []
    for name, arm in arms.items():
        variance, snr = variance_of(arm, x, draws)
        rows.append({"estimator": name, "variance": variance, "snr": snr})
    kept = copy.deepcopy({name: arm.loss.state_dict() for name, arm in arms.items() if isinstance(arm, Ours)})
    stores = {name: {k: dict(v) for k, v in arm.store.items()} for name, arm in arms.items() if isinstance(arm, Stock)}

    def step(arm):
        def run():
            arm.model.zero_grad()
            arm.guide.zero_grad()
            arm.backward(x)

        return run

    times = known or interleaved({name: step(arm) for name, arm in arms.items()}, rounds)
    for name, arm in arms.items():
        if isinstance(arm, Ours):
            arm.loss.load_state_dict(kept[name])
            arm.loss.zero_grad()
        else:
            arm.store = stores[name]
    for row in rows:
        row["ms"] = times[row["estimator"]] if known else median(times[row["estimator"]])
        row["variance x ms"] = row["variance"] * row["ms"]
    stock = next(row["variance x ms"] for row in rows if row["estimator"] == REFERENCE)
    for row in rows:
        row["better than stock"] = stock / row["variance x ms"]
    return rows


def model_runs(estimator):
    """Runs of the model in a step, for a word whose name gives them: K, two for each of K pairs, draws."""
    number = re.search(r"(?:K=|, )(\d+)", estimator)
    if estimator.split()[0] == "disarm":
        return 2 * int(number[1] if number else 1)
    return int(number[1]) if number else None


def write_page(files, page):
    """Write the tables of these files below the findings of the page."""
    tables = []
    for file in files:
        said = json.loads(file.read_text())
        for steps, rows in said["stops"].items():
            plain = {
                model_runs(row["estimator"]): row["variance"] for row in rows if row["estimator"].startswith("rloo")
            }
            tables.append(f"## {said['layer']}, after {steps} steps\n")
            cells = [
                [
                    f"`{row['estimator']}`",
                    *(f"{row[name]:.3g}" for name in ("variance", "snr", "ms", "variance x ms")),
                    digits(row["variance"] / plain[runs]) if (runs := model_runs(row["estimator"])) in plain else "",
                ]
                for row in rows
            ]
            heads = [
                "estimator",
                "variance",
                "SNR",
                "ms a step",
                "variance × ms",
                "variance ÷ `rloo`, equal model runs",
            ]
            tables.append("\n".join(markdown(heads, cells)) + "\n")
    findings = page.read_text().partition(TABLES)[0] if page.exists() else ""
    page.write_text(findings + TABLES + "\n" + "\n".join(tables))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layer", choices=LAYERS, default="coins")
    parser.add_argument("--steps", type=int, nargs="+", default=[0, 500, 1500])
    parser.add_argument("--draws", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--batch-size", type=int, default=50)
    parser.add_argument("--num-latents", type=int, default=200)
    parser.add_argument("--data", default="binarized-mnist")
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--settle", type=int, default=0, help="steps of the arms alone, before training starts")
    parser.add_argument("--only", nargs="*", help="words of estimators; all by default")
    parser.add_argument("--times", type=pathlib.Path, help="what an earlier run wrote, for its milliseconds")
    parser.add_argument("--out", type=pathlib.Path)
    parser.add_argument("--page", type=pathlib.Path, nargs="+", metavar="FILE", help="write the tables of these files")
    options = parser.parse_args()
    if options.page:
        return write_page(options.page, options.out or PAGE)
    torch.manual_seed(0)
    train = load(options.data, binarize="static").train
    rivals, make_model, make_guide = LAYERS[options.layer]
    model = make_model(tuple(train.shape[1:]), options)
    guide = make_guide(model)
    driver = SiteELBO("rloo", num_particles=4)(model, guide).initialize(train[:2])
    optimizer = torch.optim.Adam(driver.parameters(), lr=options.lr)
    fresh, train = train[: options.batch_size], train[options.batch_size :]
    arms = {
        name: (Stock if str(word).startswith("trace-graph") else Ours)(word, particles, model, guide, fresh)
        for name, (word, particles) in rivals.items()
        if not options.only or name.split()[0].rstrip(",") in (*options.only, REFERENCE)
    }

    def train_once(move):
        rows = torch.randint(len(train), (options.batch_size,))
        for arm in arms.values():
            arm.live(train[rows])
        optimizer.zero_grad()
        if move:
            driver(train[rows]).backward()
            optimizer.step()

    for _ in range(options.settle):
        train_once(move=False)
    known = None
    if options.times:
        earlier = next(iter(json.loads(options.times.read_text())["stops"].values()))
        known = {row["estimator"]: row["ms"] for row in earlier}
    found, done = {}, 0
    for stop in sorted(options.steps):
        for _ in range(done, stop):
            train_once(move=True)
        done = stop
        found[stop] = measure(arms, fresh, options.draws, options.rounds, known)
        print(f"\n{options.layer}: after {stop} steps ({options.data}, batch {options.batch_size}; {machine()})")
        print(f"{'estimator':<34}{'variance':>12}{'SNR':>9}{'ms':>9}{'var x ms':>12}{'x better':>12}")
        for row in found[stop]:
            print(
                f"{row['estimator']:<34}{row['variance']:>12.4g}{row['snr']:>9.3f}{row['ms']:>9.2f}"
                f"{row['variance x ms']:>12.4g}{row['better than stock']:>12.4g}",
                flush=True,
            )
        if options.out:
            options.out.write_text(json.dumps({"machine": machine(), "layer": options.layer, "stops": found}, indent=1))


if __name__ == "__main__":
    main()
