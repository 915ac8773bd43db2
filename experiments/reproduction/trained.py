"""Cells that train a model and a guide under one estimator."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gumbo.errors import BadInput
from gumbo.experiments.reproduction.cells import Cell
from gumbo.files import append_line

METRICS = {
    "nll": "−log p(x), importance-weighted",
    "negative-elbo": "−ELBO",
    "training-loss": "−ELBO on training data",
}
COSINE = "cosine({steps}, 1e-3, 1e-5)"
Pair = tuple[str, Mapping[str, Any], str, Mapping[str, Any]]  # a model and a guide by name, each with its options
VALID_ROWS = 1000  # of the validation images, to choose settings by
TEST_SEED = 1
TRAIN_ROWS = 5000  # of the training images, for what a paper reports of them
VARIANCE_DRAWS, QUICK_DRAWS = 20, 3
QUICK_ROWS, QUICK_STEPS = 400, 8


@dataclass(frozen=True)
class TrainedCell(Cell):
    """A model and a guide that are trained under one estimator and judged on test data.

    Attributes:
        model, model_options, guide, guide_options: the pair, by their registered names.
        estimator: a word; ``particles`` its number of draws, ``objective`` what it estimates.
        lr: the learning rate, a number or a schedule of the step in words, where ``{steps}`` stands for the budget.
        metric: what the paper reports, a key of ``METRICS``, in nats per datum; smaller is better.
        bounds: draws of further importance-weighted bounds on the test data, which stand beside.
        variance: whether the total variance of the guide's gradient is measured at the points of the curve.
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
    optimizer: str = "adam"
    bounds: tuple[int, ...] = ()
    variance: bool = False

    def __post_init__(self):
        if self.metric not in METRICS:
            raise BadInput(
                f"cell {self.name!r}: metric {self.metric!r} is unknown: expected one of {', '.join(METRICS)}"
            )

    def run(self, seed: int, steps: int, folder: Path, *, quick: bool = False, device: str = "cpu") -> dict[str, Any]:
        if quick:
            return train_and_judge(self, seed, QUICK_STEPS, folder, rows=QUICK_ROWS, compile=False, device=device)
        return train_and_judge(self, seed, steps, folder, rows=None, compile=True, device=device)


def cell_of(
    pair: Pair, name: str, published: float | None, estimator: str, particles: int | None, **settings: Any
) -> TrainedCell:
    """The cell of a table that trains one pair of programs under many estimators; ``settings`` are further fields."""
    model, model_options, guide, guide_options = pair
    return TrainedCell(
        name,
        published,
        model=model,
        model_options=model_options,
        guide=guide,
        guide_options=guide_options,
        estimator=estimator,
        particles=particles,
        **{"lr": COSINE, **settings},
    )


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
        optimizer=cell.optimizer,
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
    from gumbo.inference.auditing.moments import gradient_moments

    torch.set_num_threads(1)
    config = settings(cell, seed, steps)
    data = load_data(config)
    model, guide = (program.to(device) for program in build(config, data.data_shape))
    train = inputs_of(model, data, "train", rows)
    per_epoch = len(train["x"]) // cell.batch_size
    epochs = max(1, round(steps / per_epoch))
    every = max(1, epochs // 50)  # points of the curve
    loss = make_loss(config)
    held_out = inputs_of(model, data, "valid", rows or VALID_ROWS)
    held_out = {name: value.to(device) for name, value in held_out.items()}
    points = folder / "points.jsonl"  # of an interrupted run, too
    folder.mkdir(parents=True, exist_ok=True)

    def look(numbers: dict[str, float]) -> None:
        epoch = int(numbers["epoch"])
        if epoch % every and epoch != epochs:
            return
        point = {"epoch": epoch, "valid": evaluate(model, guide, held_out, num_samples=1, seed=seed).elbo}
        if cell.variance:
            batch = {name: value[: cell.batch_size].to(device) for name, value in train.items()}
            draws = VARIANCE_DRAWS if rows is None else QUICK_DRAWS
            point["variance"] = gradient_moments(
                model, guide, make_loss(config), batch, num_samples=draws
            ).total_variance
        append_line(points, json.dumps(point))

    began = time.perf_counter()
    result = fit(
        model,
        guide,
        train,
        loss=loss,
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
        on_epoch=look,
    )
    seconds = time.perf_counter() - began
    lines = points.read_text().splitlines() if points.exists() else []
    looked = {point.pop("epoch"): point for point in map(json.loads, lines)}
    curve: list[dict[str, float]] = []
    spent = 0.0  # in steps; looking at the validation data takes no training time
    for numbers in result.history:
        spent += numbers.get("ms_per_step", 0.0) * per_epoch / 1000
        epoch = int(numbers["epoch"])
        if epoch % every == 0 or epoch == epochs:
            point = {"step": epoch * per_epoch, "seconds": round(spent, 3)}
            point["train"] = round(numbers[result.objective_name], 3)
            curve.append(point | {name: round(value, 4) for name, value in looked.get(epoch, {}).items()})
    shuffled = torch.randperm(len(data.test), generator=torch.Generator().manual_seed(TEST_SEED))[:rows]
    test = {name: value[shuffled].to(device) for name, value in inputs_of(model, data, "test").items()}
    found = evaluate(model, guide, test, num_samples=cell.draws if rows is None else 10, seed=seed)
    valid = evaluate(model, guide, held_out, num_samples=100, seed=seed)
    judged = found
    if cell.metric == "training-loss":
        some = {name: value[:TRAIN_ROWS].to(device) for name, value in train.items()}
        judged = evaluate(model, guide, some, num_samples=10, seed=seed)
    by_weights = cell.metric == "nll"
    beside = {
        f"{draws}-draw bound": -evaluate(model, guide, test, num_samples=draws, seed=seed).log_evidence
        for draws in cell.bounds
    }
    return {
        "value": -judged.log_evidence if by_weights else -judged.elbo,
        "value_se": judged.log_evidence_se if by_weights else judged.elbo_se,
        "beside": beside,
        "test": found.as_dict(),
        "valid": valid.as_dict(),
        "steps": epochs * per_epoch,
        "share": epochs * per_epoch / cell.steps,
        "seconds": seconds,
        "ms_per_step": result.ms_per_step,
        "curve": curve,
    }
