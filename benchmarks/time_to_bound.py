"""Wall-clock to a test bound: the best estimator here against stock TraceGraph_ELBO with a baseline.

    GUMBO_DATA=… python benchmarks/time_to_bound.py [--epochs 24] [--seeds 0 1 2] [--threads 2] [--eager]
    GUMBO_DATA=… python benchmarks/time_to_bound.py --tune

A sigmoid belief network of 200 coins (one linear layer each way) on binarized MNIST, batches of 100. All rivals start
from the same weights, see the same batches, take their gradients in float32 with one fused Adam and with Pyro's
validation off, and are judged by the same evaluation on the test images. The stock runs once with its decaying average,
and once with a network that sees the image besides (Pyro lets one bring such a baseline). Its step is lighter than
``SVI.step``, which keeps one optimizer for each parameter. Ours is the step that ``fit(compile=True)`` makes, or with
``--eager`` the one that ``fit`` makes; what compiling took is reported beside. ``--data digits`` needs no files.

The rule, set beforehand: a target is the test bound that a stock run has reached after ``--epochs`` epochs (the best of
its evaluations, one an epoch). What counts is the time that each spent in training steps until an evaluation,
interpolated between two, is at the target. All take turns, an epoch of each stock against a fifth of one of ours, so
that the machine's moods hit all; ours goes on alone if it has not arrived by the end.

``--tune`` tries learning rates for both baselines of the stock (the bound on the validation images after ``--epochs``
epochs; after a third of them the worst is dropped) and estimators, particles and learning rates for ours (time to the
stock's best), with a seed of its own, and writes results/time-to-bound-tuning.json. Where that file is, the race takes
its winners; otherwise the settings below.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyro
import pyro.poutine as poutine
import torch
from _timing import RESULTS, surroundings, use_cores, write_json
from pyro.infer import TraceGraph_ELBO
from torch import Tensor, nn

from gumbo.experiments.data import load
from gumbo.guides import BernoulliGuide
from gumbo.inference import SiteELBO, evaluate
from gumbo.inference.engine.rows import Rows
from gumbo.inference.engine.scopes import denormals_flushed
from gumbo.inference.training.compile.step import CompiledStep
from gumbo.inference.training.optimizers import make_optimizer
from gumbo.inference.training.steps import TorchStep
from gumbo.models import SigmoidBeliefNetwork

BATCH, SHARE, TUNING_SEED = 100, 5, 100
STOCKS = {
    "decaying average": {"baseline": "decaying average", "lr": 3e-3},
    "network": {"baseline": "network", "lr": 3e-3},
}
OURS = {"estimator": "disarm", "particles": 2, "lr": 3e-3}
STOCK_CHOICES = [{"baseline": baseline, "lr": lr} for baseline in STOCKS for lr in (1e-3, 3e-3, 1e-2)]
OUR_CHOICES = [
    {"estimator": word, "particles": particles, "lr": lr}
    for word, particles in (
        ("disarm", 1),
        ("disarm", 2),
        ("disarm", 4),
        ("rloo", 4),
        ("rloo", 8),
        ("rloo", 16),
        ("nvil", 1),
        ("local-expectation", 1),
    )
    for lr in (3e-3, 1e-2)
]


class StockStep:
    """TraceGraph_ELBO with its decaying average, or with a network that sees the image, as Pyro's tutorial has it."""

    def __init__(self, model: nn.Module, guide: nn.Module, settings: dict[str, Any]):
        self.model, self.guide, self.loss = model, guide, TraceGraph_ELBO()
        self.options: dict[str, Any] = {"use_decaying_avg_baseline": True}
        self.network = None
        parameters = [*model.parameters(), *guide.parameters()]
        if settings["baseline"] == "network":
            pixels = math.prod(model.data_shape)
            self.network = nn.Sequential(nn.Flatten(), nn.Linear(pixels, 100), nn.Tanh(), nn.Linear(100, 1))
            self.network.append(nn.Flatten(0))
            parameters += self.network.parameters()
        self.optimizer = torch.optim.Adam(parameters, lr=settings["lr"], fused=True)
        self.store: dict[str, dict] = {"params": {}, "constraints": {}}

    @contextlib.contextmanager
    def around(self) -> Iterator[None]:
        with pyro.get_param_store().scope(self.store), pyro.validation_enabled(False), denormals_flushed():
            yield

    def __call__(self, x: Tensor) -> None:
        baseline = dict(self.options)
        if self.network is not None:
            baseline |= {"nn_baseline": self.network, "nn_baseline_input": x}
        self.optimizer.zero_grad(set_to_none=True)
        guide = poutine.infer_config(
            self.guide, config_fn=lambda site: {} if site["is_observed"] else {"baseline": baseline}
        )
        self.loss.loss_and_grads(self.model, guide, x)
        self.optimizer.step()


class OurStep:
    """The step that ``fit`` makes, compiled or not."""

    def __init__(self, model: nn.Module, guide: nn.Module, settings: dict[str, Any], x: Tensor, compiled: bool):
        loss = SiteELBO(settings["estimator"], num_particles=settings["particles"])
        kind = CompiledStep if compiled else TorchStep
        self.step = kind(model, guide, loss, make_optimizer("adam", settings["lr"])[0], Rows(x))

    @contextlib.contextmanager
    def around(self) -> Iterator[None]:
        with pyro.get_param_store().scope(), pyro.validation_enabled(False), denormals_flushed():
            yield

    def __call__(self, x: Tensor) -> None:
        self.step(Rows(x))


@dataclass
class Runner:
    """One rival along its training: steps made, seconds spent in them, and the bound at each evaluation."""

    model: nn.Module
    guide: nn.Module
    step: Any
    train: Tensor
    judge: Tensor
    seed: int
    steps: int = 0
    seconds: float = 0.0
    curve: list[dict[str, float]] = field(default_factory=list)

    def __post_init__(self):
        self.order = torch.empty(0)
        self.random = torch.Generator().manual_seed(self.seed)
        with torch.random.fork_rng():
            torch.manual_seed(self.seed)
            self.noise = torch.get_rng_state()
        self.look()

    @property
    def per_epoch(self) -> int:
        return len(self.train) // BATCH

    def go(self, steps: int) -> float:
        """So many steps, then an evaluation, which the clock does not see; returns the bound."""
        with torch.random.fork_rng(), self.step.around():
            torch.set_rng_state(self.noise)
            for _ in range(steps):
                position = self.steps % self.per_epoch
                if position == 0:
                    self.order = torch.randperm(len(self.train), generator=self.random)
                batch = self.train[self.order[position * BATCH : (position + 1) * BATCH]]
                start = time.perf_counter()
                self.step(batch)
                self.seconds += time.perf_counter() - start
                self.steps += 1
            self.noise = torch.get_rng_state()
        return self.look()

    def look(self) -> float:
        bound = evaluate(self.model, self.guide, self.judge, num_samples=1, batch_size=2000).elbo
        self.curve.append({"steps": self.steps, "seconds": self.seconds, "bound": bound})
        return bound

    @property
    def best(self) -> float:
        return max(point["bound"] for point in self.curve)

    def seconds_to(self, target: float) -> float | None:
        """Seconds of training until the bound was first at the target, between two evaluations by a straight line."""
        for before, after in zip(self.curve[:-1], self.curve[1:], strict=True):
            if after["bound"] >= target:
                part = (target - before["bound"]) / (after["bound"] - before["bound"])
                return before["seconds"] + max(part, 0.0) * (after["seconds"] - before["seconds"])
        return None


def make_runner(
    kind: str, settings: dict[str, Any], train: Tensor, judge: Tensor, seed: int, latents: int, compiled: bool = False
) -> Runner:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = SigmoidBeliefNetwork(tuple(train.shape[1:]), layers=(latents,))
        guide = BernoulliGuide(model)
        if kind == "stock":
            step = StockStep(model, guide, settings)
        else:
            step = OurStep(model, guide, settings, train[:BATCH], compiled)
    return Runner(model, guide, step, train, judge, seed)


def race(stocks: dict[str, Runner], ours: Runner, epochs: int) -> dict[str, Any]:
    """By turns until the stocks have had their epochs and ours is at their bounds (or has had as many steps)."""
    turn = max(1, ours.per_epoch // SHARE)
    for epoch in range(1, epochs + 1):
        said = [f"{name}: {stock.seconds:.1f} s, {stock.go(stock.per_epoch):.2f}" for name, stock in stocks.items()]
        here = ours.go(turn)
        if epoch % 4 == 0 or epoch == epochs:
            print(f"    {epoch} epochs, {'; '.join(said)}; ours: {ours.steps} steps, {ours.seconds:.1f} s, {here:.2f}")
            sys.stdout.flush()
    highest = max(stock.best for stock in stocks.values())
    while ours.best < highest and ours.steps < epochs * ours.per_epoch:
        ours.go(turn)
    found: dict[str, Any] = {"stocks": {}, "ours": told(ours)}
    found["ours"]["compiling"] = getattr(ours.step.step, "seconds", 0.0)
    for name, stock in stocks.items():
        theirs, mine = stock.seconds_to(stock.best), ours.seconds_to(stock.best)
        faster = None if mine is None else theirs / mine
        found["stocks"][name] = told(stock) | {"seconds": theirs, "our_seconds": mine, "times_faster": faster}
    return found


def told(runner: Runner) -> dict[str, Any]:
    ms = 1e3 * runner.seconds / max(runner.steps, 1)
    return {"best": runner.best, "steps": runner.steps, "ms": ms, "curve": runner.curve}


def tune(train: Tensor, valid: Tensor, epochs: int, latents: int, compiled: bool) -> dict[str, Any]:
    found: dict[str, Any] = {"epochs": epochs, "stock": [], "ours": []}
    for baseline in STOCKS:
        tried = [settings for settings in STOCK_CHOICES if settings["baseline"] == baseline]
        runners = [(make_runner("stock", settings, train, valid, TUNING_SEED, latents), settings) for settings in tried]
        for epoch in range(1, epochs + 1):
            for runner, _ in runners:
                runner.go(runner.per_epoch)
            if epoch in (max(1, epochs // 3), epochs):
                for runner, settings in runners:
                    print(f"  stock {settings}: {runner.best:.2f} nats after {epoch} epochs, {runner.seconds:.1f} s")
                    sys.stdout.flush()
                runners.sort(key=lambda entry: -entry[0].best)
                dropped = [] if epoch == epochs else runners[2:]
                for runner, settings in runners if epoch == epochs else dropped:
                    found["stock"].append(settings | {"bound": runner.best, "epochs": epoch})
                runners = [entry for entry in runners if entry not in dropped]
    target, fastest = max(entry["bound"] for entry in found["stock"]), math.inf
    for settings in OUR_CHOICES:
        runner = make_runner("ours", settings, train, valid, TUNING_SEED, latents, compiled)
        while runner.best < target and runner.steps < runner.per_epoch * epochs and runner.seconds < 3 * fastest:
            runner.go(max(1, runner.per_epoch // 2))
        seconds = runner.seconds_to(target)
        fastest = min(fastest, seconds or math.inf)
        found["ours"].append(settings | {"bound": runner.best, "seconds": seconds, "steps": runner.steps})
        said = "not reached" if seconds is None else f"{seconds:.2f} s"
        ms = 1e3 * runner.seconds / runner.steps
        print(f"  ours {settings}: {said} to {target:.2f} ({runner.best:.2f}, {runner.steps} steps, {ms:.2f} ms each)")
        sys.stdout.flush()
    return found


def chosen(folder: Path) -> tuple[dict[str, dict[str, Any]], dict[str, Any]]:
    """The settings of both sides: the tuning's winners where it has been run."""
    path = folder / "time-to-bound-tuning.json"
    if not path.exists():
        return STOCKS, OURS
    tuning = json.loads(path.read_text())

    def settings(entry: dict[str, Any], names: dict[str, Any]) -> dict[str, Any]:
        return {name: entry[name] for name in names}

    stocks = {}
    for baseline, usual in STOCKS.items():
        best = max((e for e in tuning["stock"] if e["baseline"] == baseline), key=lambda entry: entry["bound"])
        stocks[baseline] = settings(best, usual)
    reached = [entry for entry in tuning["ours"] if entry["seconds"] is not None]
    return stocks, settings(min(reached, key=lambda entry: entry["seconds"]), OURS) if reached else OURS


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", default="binarized-mnist")
    parser.add_argument("--epochs", type=int, default=24)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--latents", type=int, default=200)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="cores that all rivals get")
    parser.add_argument("--eager", action="store_true", help="ours without compiling")
    parser.add_argument("--tune", action="store_true", help="find settings for both sides on the validation images")
    parser.add_argument("--out", type=Path, help="the folder of the JSON files")
    options = parser.parse_args(arguments)
    use_cores(options.threads)
    images = load(options.data, binarize="static")
    facts = surroundings() | {"data": options.data, "latents": options.latents, "compiled": not options.eager}
    folder = options.out or RESULTS
    if options.tune:
        found = tune(images.train, images.valid, options.epochs, options.latents, not options.eager)
        write_json(folder / "time-to-bound-tuning.json", facts | found)
        return
    chosen_stocks, chosen_ours = chosen(folder)
    facts |= {"stocks": chosen_stocks, "ours": chosen_ours, "epochs": options.epochs, "batch": BATCH}
    runs: list[dict[str, Any]] = []
    for seed in options.seeds:
        print(f"  seed {seed}", flush=True)
        start = (images.train, images.test, seed, options.latents)
        stocks = {name: make_runner("stock", settings, *start) for name, settings in chosen_stocks.items()}
        runs.append(
            {"seed": seed} | race(stocks, make_runner("ours", chosen_ours, *start, not options.eager), options.epochs)
        )
        write_json(folder / "time-to-bound.json", facts | {"runs": runs})
        for name, stock in runs[-1]["stocks"].items():
            reached = "not reached" if stock["our_seconds"] is None else f"{stock['our_seconds']:.2f} s"
            faster = "" if stock["times_faster"] is None else f": {stock['times_faster']:.1f} times faster"
            print(f"  stock with {name}: {stock['best']:.2f} nats in {stock['seconds']:.1f} s, ours {reached}{faster}")
            sys.stdout.flush()


if __name__ == "__main__":
    main()
