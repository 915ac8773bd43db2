"""A Poisson VAE on binarized MNIST under each estimator for counts: the bound that is reached in so many steps.

    GUMBO_DATA=… python benchmarks/poisson_estimators.py [--seeds 3] [--epochs 3] [--num-latents 20] [--only WORD …]

The network of He & Wu (2026): encoder and decoder 784–200–200, LeakyReLU 0.3, prior Poisson(1), Adam, batch 100. Every
word makes the same number of steps from the same weights. A result is written as it comes to
benchmarks/results/poisson-estimators.json; what stands there for the same settings is not run again. The table goes to
benchmarks/results/poisson-estimators.md. Runs on one thread.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path
from typing import Any

import torch
from _timing import RESULTS, machine

from gumbo.experiments.data import load
from gumbo.guides import MeanFieldGuide
from gumbo.inference import evaluate, fit, make_loss
from gumbo.models import PoissonVAE
from gumbo.tables import markdown

# word: draws a step
WORDS = {
    "fini": 1,
    "rloo": 4,
    "score-average": 1,
    "measure-valued": 1,
}
OUT = RESULTS / "poisson-estimators.json"
ROWS = 2000  # of the training data, on which bounds are taken, as in the paper's table


def run(word: str, seed: int, options: argparse.Namespace, data: Any) -> dict[str, Any]:
    torch.manual_seed(seed)
    model = PoissonVAE(tuple(data.train.shape[1:]), num_latents=options.num_latents)
    guide = MeanFieldGuide(model)
    began = time.perf_counter()
    found = fit(
        model, guide, data.train, loss=make_loss(word, num_particles=WORDS[word]), lr=1e-3, batch_size=100,
        epochs=options.epochs, seed=seed, compile=options.compile, progress=False,
    )  # fmt: skip
    took = time.perf_counter() - began
    bound = evaluate(model, guide, data.train[:ROWS], num_samples=10).values["elbo"].mean().item()
    made = {"word": word, "seed": seed, "epochs": options.epochs, "num_latents": options.num_latents}
    return {**made, "train": bound, "ms": found.ms_per_step, "seconds": took, "machine": machine()}


def several(values: list[float]) -> str:
    """Mean and standard error."""
    numbers = torch.tensor(values, dtype=torch.float64)
    return f"{numbers.mean():.2f}" + (f" ± {numbers.std() / math.sqrt(len(numbers)):.2f}" if len(numbers) > 1 else "")


def table(kept: list[dict[str, Any]], options: argparse.Namespace) -> list[str]:
    rows, mine = [], [r for r in kept if (r["epochs"], r["num_latents"]) == (options.epochs, options.num_latents)]
    for word, particles in WORDS.items():
        own = [r for r in mine if r["word"] == word]
        if own:
            mean = several([r["train"] for r in own])
            others = {r["seed"]: r["train"] for r in mine if r["word"] == "rloo"}
            gaps = [r["train"] - others[r["seed"]] for r in own if r["seed"] in others]
            ms = sorted(r["ms"] for r in own)[len(own) // 2]
            rows.append([f"`{word}`", str(particles), mean, several(gaps) if gaps else "", str(len(own)), f"{ms:.1f}"])
    rows.sort(key=lambda row: -float(row[2].split()[0]))
    steps = options.epochs * 500
    return [
        "# A Poisson VAE on binarized MNIST, by estimator",
        "",
        f"`python benchmarks/poisson_estimators.py --seeds {options.seeds} --epochs {options.epochs} --num-latents"
        f" {options.num_latents}`: {options.num_latents}",
        f"Poisson latents, {steps} steps of 100 images each; ELBO in nats per image over {ROWS} of them, 10 draws,",
        f"mean ± standard error over seeds ({machine()}; shared with other work, so that ms say little).",
        "",
        *markdown(["estimator", "draws", "train ELBO", "less that of rloo, seed by seed", "seeds", "ms a step"], rows),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--num-latents", type=int, default=20)
    parser.add_argument("--compile", action="store_true", help="compiled steps, which pay from some thousands on")
    parser.add_argument("--only", nargs="*", default=list(WORDS), choices=list(WORDS))
    parser.add_argument("--out", type=Path, default=OUT)
    options = parser.parse_args()
    torch.set_num_threads(1)
    data = load("binarized-mnist", binarize="static")
    kept = json.loads(options.out.read_text()) if options.out.exists() else []
    for seed in range(options.seeds):
        for word in options.only:
            same = {"word": word, "seed": seed, "epochs": options.epochs, "num_latents": options.num_latents}
            if any(same.items() <= result.items() for result in kept):
                continue
            kept.append(run(word, seed, options, data))
            options.out.write_text(json.dumps(kept, indent=1) + "\n")
            options.out.with_suffix(".md").write_text("\n".join(table(kept, options)) + "\n")
            print(json.dumps(kept[-1]), flush=True)
    print("\n".join(table(kept, options)))


if __name__ == "__main__":
    main()
