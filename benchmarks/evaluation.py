"""What evaluation costs: ``evaluate`` and validation in ``fit`` against the same computation by hand in PyTorch.

    python benchmarks/evaluation.py [--rounds 7] [--threads 1] [--draws 1 10 100] [--importance 200] [--quick]

Two pairs on images of 784 binary numbers, at 1, 10 and 100 draws a datum, with fewer images where there are more draws:

- gaussian: GaussianVAE 784–200–200–50 with NormalGuide
- coins: BernoulliVAE of 200 coins, linear, with BernoulliGuide

The version by hand makes the same draws and returns the same four means and errors; the numbers are compared before
anything is timed. ``validation`` is the pass that ``fit(valid=…)`` makes after an epoch, ``compiled`` that of
``fit(valid=…, compile=True)``, after its first. ``--importance N`` also times 5,000 draws for N images, once, against
the matrix products of the same rows. All in the batches of ``evaluate``; times are those of the processor, of one
thread. Real images are taken where GUMBO_DATA names them, else random ones.

Written: results/evaluation.json, and a line of results/history.jsonl.
"""

from __future__ import annotations

import argparse
import functools
import math
import os
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from _by_hand import log_bernoulli, plain
from _timing import RESULTS, Rival, interleaved_turns, remember, spread, surroundings, use_cores, write_json
from torch import Tensor, nn

from gumbo.guides import BernoulliGuide, NormalGuide
from gumbo.inference import evaluate
from gumbo.inference.posterior.evaluation import Evaluator
from gumbo.inference.posterior.parts import Weighing
from gumbo.inference.training.compile.backends import inductor
from gumbo.inference.training.compile.capture import capture
from gumbo.models import BernoulliVAE, GaussianVAE

SHAPE = (1, 28, 28)
ROWS = {1: 10_000, 10: 2_000, 100: 500}
BATCH, PRIME = 256, 1_000_003


# By hand.


class ByHand(nn.Module, ABC):
    """Means and errors of the bound and of the importance-weighted evidence, batch by batch, in nats per datum.

    The noise is that of ``evaluate``: a seed for each batch of so many rows, and its draws turn by turn.
    """

    @abstractmethod
    def posterior(self, x: Tensor) -> Any:
        """What the draws of a batch have in common: the encoder runs once."""

    @abstractmethod
    def weight(self, x: Tensor, found: Any, count: int) -> Tensor:
        """log p(x, z) − log q(z | x) of ``count`` draws, ``(count, B)``."""

    @torch.no_grad()
    def forward(self, x: Tensor, rows: int, turns: list[int], seed: int = 0) -> dict[str, float]:
        elbos, evidences, of_draws, of_evidence, draws = [], [], 0.0, 0.0, sum(turns)
        for number, batch in enumerate(x.flatten(1).split(rows)):
            torch.manual_seed(seed + PRIME * number)
            found = self.posterior(batch)
            weight = torch.cat([self.weight(batch, found, count) for count in turns]).double()
            elbos.append(weight.mean(0))
            evidences.append(torch.logsumexp(weight, 0) - math.log(draws))
            if draws > 1:
                of_draws += weight.var(0).sum().item()
                of_evidence += (weight - evidences[-1]).exp().var(0).sum().item()
        said = {}
        for name, values, variance in (("elbo", elbos, of_draws), ("log_evidence", evidences, of_evidence)):
            value = torch.cat(values)
            said[name], said[f"{name}_se"] = value.mean().item(), value.std().item() / math.sqrt(len(value))
            said[f"{name}_mc_se"] = math.sqrt(variance / draws) / len(value)
        return said


class Gaussian(ByHand):
    def __init__(self, model: nn.Module, guide: nn.Module):
        super().__init__()
        self.decoder, self.encoder = plain(model.decoder), plain(guide.encoder, guide.encoder_heads["z"])
        self.min_sd = guide.min_sd

    def posterior(self, x: Tensor) -> tuple[Tensor, Tensor]:
        loc, raw = self.encoder(x).chunk(2, -1)
        return loc, F.softplus(raw) + self.min_sd

    def weight(self, x: Tensor, found: tuple[Tensor, Tensor], count: int) -> Tensor:
        loc, scale = found
        noise = torch.randn(count, *loc.shape)
        z = torch.addcmul(loc, noise, scale)
        rate = 0.5 * (z.square() - noise.square()).sum(-1) - scale.log().sum(-1)
        return log_bernoulli(self.decoder(z), x.expand(count, *x.shape)) - rate


class Coins(ByHand):
    def __init__(self, model: nn.Module, guide: nn.Module):
        super().__init__()
        self.decoder, self.encoder = plain(model.decoder), plain(guide.encoder, guide.encoder_heads["z"])
        self.prior = model.decoder_prior_logits

    def posterior(self, x: Tensor) -> Tensor:
        return self.encoder(x)

    def weight(self, x: Tensor, logits: Tensor, count: int) -> Tensor:
        logits = logits.expand(count, *logits.shape)
        z = torch.bernoulli(logits.sigmoid())
        log_p = log_bernoulli(self.prior.expand_as(z), z) + log_bernoulli(self.decoder(z), x.expand(count, *x.shape))
        return log_p - log_bernoulli(logits, z)


@dataclass(frozen=True)
class Pair:
    said: str
    make: Callable[[], tuple[nn.Module, nn.Module]]
    by_hand: Callable[[nn.Module, nn.Module], ByHand]


def gaussian() -> tuple[nn.Module, nn.Module]:
    model = GaussianVAE(SHAPE, latent_dim=50, hidden=(200, 200))
    return model, NormalGuide(model)


def coins() -> tuple[nn.Module, nn.Module]:
    model = BernoulliVAE(SHAPE, num_latents=200, nonlinear=False)
    return model, BernoulliGuide(model)


PAIRS = {
    "gaussian": Pair("GaussianVAE 784–200–200–50", gaussian, Gaussian),
    "coins": Pair("BernoulliVAE of 200 coins, linear", coins, Coins),
}


def images(rows: int) -> Tensor:
    """Binarized test images if there are data, else random ones."""
    if "GUMBO_DATA" in os.environ:
        from gumbo.experiments.data import load

        return load("binarized-mnist", splits=("test",)).test[:rows]
    return (torch.rand(rows, *SHAPE, generator=torch.Generator().manual_seed(1)) < 0.3).float()


# Measuring.


def check_same_numbers(name: str, draws: int) -> None:
    """Raise unless both give the same numbers for the same draws, up to rounding."""
    model, guide = made(name)
    x = images(BATCH + 44)
    ours = evaluate(model, guide, x, num_samples=draws).as_dict()
    theirs = PAIRS[name].by_hand(model, guide)(x, *division(model, guide, x, draws))
    for key, value in theirs.items():
        if draws > 1 or not key.endswith("mc_se"):
            assert math.isclose(ours[key], value, rel_tol=1e-4), f"{name}: {key} is {ours[key]}, by hand {value}"


def made(name: str) -> tuple[nn.Module, nn.Module]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return PAIRS[name].make()


def division(model: nn.Module, guide: nn.Module, x: Tensor, draws: int) -> tuple[int, list[int]]:
    """The rows of a batch of ``evaluate``, and its draws turn by turn."""
    weighing = Weighing(model, guide, x, draws, None, None)
    return weighing.size, weighing.turns


def compiler(function: Callable[..., list[Tensor]], examples: list[Tensor]) -> Callable[..., list[Tensor]]:
    return inductor(capture(function, examples), examples)


def rivals_of(name: str, draws: int, x: Tensor) -> dict[str, Rival]:
    model, guide = made(name)
    by_hand = PAIRS[name].by_hand(model, guide)
    rows, turns = division(model, guide, x, draws)
    validation = Evaluator(model, guide, x, num_samples=draws, num_local_samples=1)
    compiled = Evaluator(model, guide, x, num_samples=draws, num_local_samples=1, compiler=compiler)
    compiled()
    assert not compiled.uncompiled, compiled.uncompiled

    def times(action: Callable[[], object]) -> Rival:
        return Rival(lambda n: [action() for _ in range(n)])

    return {
        "by hand": times(lambda: by_hand(x, rows, turns)),
        "evaluate": times(lambda: evaluate(model, guide, x, num_samples=draws)),
        "validation": times(lambda: validation(0, None, False)),
        "compiled": times(lambda: compiled(0, None, False)),
        "products": times(lambda: products(by_hand, len(x), rows, turns)),
    }


@torch.no_grad()
def products(by_hand: ByHand, count: int, rows: int, turns: list[int]) -> None:
    """The matrix products of an evaluation alone: the encoder for each row, the decoder for each draw of it."""
    for size in [len(one) for one in torch.empty(count).split(rows)]:
        runs = [(by_hand.encoder, size), *((by_hand.decoder, size * turn) for turn in turns)]
        for network, count in runs:
            for layer in network:
                if isinstance(layer, nn.Linear):
                    torch.addmm(layer.bias, _zeros(count, layer.in_features), layer.weight.T)


@functools.cache
def _zeros(*shape: int) -> Tensor:
    return torch.zeros(shape)


def measure(name: str, draws: int, rows: int, rounds: int) -> dict[str, Any]:
    check_same_numbers(name, draws)
    rivals = rivals_of(name, draws, images(rows))
    times = interleaved_turns(rivals, rounds, 1, warm_up=1, clock=time.thread_time)
    found = {rival: spread(values) for rival, values in times.items()}
    hand = found["by hand"]["median"]
    ratios = {rival: one["median"] / hand for rival, one in found.items() if rival != "by hand"}
    return {"pair": name, "draws": draws, "rows": rows, "rivals": found, "ratios": ratios}


def measure_importance(name: str, rows: int, draws: int) -> dict[str, Any]:
    """Seconds of an importance-weighted evaluation, against its matrix products, a few batches at a time."""
    rivals = rivals_of(name, draws, images(rows))
    seconds: dict[str, float] = {}
    for rival in ("products", "evaluate", "compiled"):
        start = time.thread_time()
        rivals[rival].steps(1)
        seconds[rival] = time.thread_time() - start
    return {
        "pair": name,
        "draws": draws,
        "rows": rows,
        "seconds": seconds,
        "ratio": seconds["evaluate"] / seconds["products"],
        "compiled ratio": seconds["compiled"] / seconds["products"],
    }


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--draws", type=int, nargs="+", default=list(ROWS))
    parser.add_argument("--pairs", nargs="+", choices=PAIRS, default=list(PAIRS))
    parser.add_argument("--importance", type=int, default=0, metavar="N", help="also 5,000 draws for N images")
    parser.add_argument("--quick", action="store_true", help="300 images, 2 rounds")
    parser.add_argument("--out", type=Path, help="the folder of the JSON files")
    options = parser.parse_args(arguments)
    use_cores(options.threads)
    found: dict[str, Any] = surroundings() | {"threads": options.threads, "rows": []}
    print(f"{found['device']}; {found['machine']}; load {found['load']}")
    for name in options.pairs:
        for draws in options.draws:
            rows = 300 if options.quick else ROWS.get(draws, 500)
            one = measure(name, draws, rows, 2 if options.quick else options.rounds)
            found["rows"].append(one)
            ms = ", ".join(f"{rival} {value['median']:.1f} ms" for rival, value in one["rivals"].items())
            ratios = ", ".join(f"{rival} {value:.2f}" for rival, value in one["ratios"].items())
            print(f"{PAIRS[name].said}, {draws} draws, {rows} images: {ms}; ÷ by hand: {ratios}", flush=True)
    if options.importance:
        one = found["importance"] = measure_importance("gaussian", options.importance, 5_000)
        said = ", ".join(f"{rival} {value:.1f} s" for rival, value in one["seconds"].items())
        ratios = f"{one['ratio']:.2f}, {one['compiled ratio']:.2f}"
        print(f"{one['draws']} draws of {one['rows']} images: {said}; ratios {ratios}", flush=True)
    write_json((options.out or RESULTS) / "evaluation.json", found)
    remember("evaluation", ratios_of(found), found, options.out)


def ratios_of(found: dict[str, Any]) -> dict[str, float]:
    """The ratios of a run, by name."""
    ratios = {
        f"{row['pair']}, {row['draws']} draws: {rival} ÷ by hand": value
        for row in found["rows"]
        for rival, value in row["ratios"].items()
        if rival != "products"
    }
    if "importance" in found:
        one = found["importance"]
        ratios[f"{one['draws']} draws: evaluate ÷ products"] = one["ratio"]
        ratios[f"{one['draws']} draws: compiled ÷ products"] = one["compiled ratio"]
    return ratios


if __name__ == "__main__":
    main()
