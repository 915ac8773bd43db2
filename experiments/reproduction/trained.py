"""Cells that train a model and a guide under one estimator."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gumbo.errors import BadInput
from gumbo.experiments.reproduction.cells import Cell

METRICS = {"nll": "−log p(x), importance-weighted", "negative-elbo": "−ELBO"}
VALID_ROWS = 1000  # of the validation images, to choose settings by
TEST_SEED = 1
QUICK_ROWS, QUICK_STEPS = 400, 8


@dataclass(frozen=True)
class TrainedCell(Cell):
    """A model and a guide that are trained under one estimator and judged on test data.

    Attributes:
        model, model_options, guide, guide_options: the pair, by their registered names.
        estimator: a word; ``particles`` its number of draws, ``objective`` what it estimates.
        lr: Adam's learning rate, a number or a schedule of the step in words, where ``{steps}`` stands for the budget.
        metric: what the paper reports, a key of ``METRICS``, in nats per datum; smaller is better.
    """

    model: str = ""
    guide: str = ""
    estimator: str = ""
    model_options: Mapping[str, Any] = field(default_factory=dict)
    guide_options: Mapping[str, Any] = field(default_factory=dict)
    particles: int | None = None
    objective: str = "elbo"
    temperature: str | None = None
    lr: str = "1e-3"
    batch_size: int = 100
    steps: int = 1_000_000
    metric: str = "nll"
    draws: int = 1000
    data: str = "binarized-mnist"

    def __post_init__(self):
        if self.metric not in METRICS:
            raise BadInput(
                f"cell {self.name!r}: metric {self.metric!r} is unknown: expected one of {', '.join(METRICS)}"
            )

    def run(self, seed: int, steps: int, folder: Path, *, quick: bool = False, device: str = "cpu") -> dict[str, Any]:
        if quick:
            return train_and_judge(self, seed, QUICK_STEPS, folder, rows=QUICK_ROWS, compile=False, device=device)
        return train_and_judge(self, seed, steps, folder, rows=None, compile=True, device=device)


def settings(cell: TrainedCell, seed: int, steps: int):
    """The cell as settings of ``gumbo train``, which knows how to build all of it."""
    from gumbo.experiments.train import Train

    return Train(
        model=cell.model,
        model_options=dict(cell.model_options),
        guide=cell.guide,
        guide_options=dict(cell.guide_options),
        estimator=cell.estimator,
        particles=cell.particles,
        objective=cell.objective,
        temperature=None if cell.temperature is None else cell.temperature.format(steps=steps),
        lr=cell.lr.format(steps=steps),
        data=cell.data,
        binarize=None,
        batch_size=cell.batch_size,
        seed=seed,
    )


def train_and_judge(
    cell: TrainedCell, seed: int, steps: int, folder: Path, *, rows: int | None, compile: bool, device: str
) -> dict[str, Any]:
    """Train one cell for so many steps, rounded to whole epochs, and judge it once on the test images.

    ``rows`` images are used of each part of the data; None takes all.
    """
    import torch

    from gumbo.experiments.train import build, inputs_of, learning_rate, load_data, make_loss
    from gumbo.inference import evaluate, fit

    torch.set_num_threads(1)
    config = settings(cell, seed, steps)
    data = load_data(config)
    model, guide = (program.to(device) for program in build(config, data.data_shape))
    train = inputs_of(model, data, "train", rows)
    per_epoch = len(train["x"]) // cell.batch_size
    epochs = max(1, round(steps / per_epoch))
    every = max(1, epochs // 50)  # points of the curve
    curve: list[dict[str, float]] = []
    began = time.perf_counter()
    result = fit(
        model,
        guide,
        train,
        loss=make_loss(config),
        optimizer=config.optimizer,
        lr=learning_rate(config),
        epochs=epochs,
        batch_size=cell.batch_size,
        seed=seed,
        run_dir=folder,
        resume=(folder / "checkpoints" / "last.pt").exists(),
        drop_last=True,
        checkpoint_every=every,
        compile=compile,
        progress=False,
    )
    seconds = time.perf_counter() - began
    curve = [
        {"step": int(numbers["epoch"] * per_epoch), "train": round(numbers[result.objective_name], 3)}
        for numbers in result.history
        if numbers["epoch"] % every == 0 or numbers["epoch"] == epochs
    ]
    shuffled = torch.randperm(len(data.test), generator=torch.Generator().manual_seed(TEST_SEED))[:rows]
    test = {name: value[shuffled].to(device) for name, value in inputs_of(model, data, "test").items()}
    found = evaluate(model, guide, test, num_samples=cell.draws if rows is None else 10, seed=seed)
    valid = evaluate(model, guide, inputs_of(model, data, "valid", rows or VALID_ROWS), num_samples=100, seed=seed)
    value = -found.log_evidence if cell.metric == "nll" else -found.elbo
    return {
        "value": value,
        "value_se": found.log_evidence_se if cell.metric == "nll" else found.elbo_se,
        "test": found.as_dict(),
        "valid": valid.as_dict(),
        "steps": epochs * per_epoch,
        "share": epochs * per_epoch / cell.steps,
        "seconds": seconds,
        "ms_per_step": result.ms_per_step,
        "curve": curve,
    }
