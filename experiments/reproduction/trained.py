"""Cells that train a model and a guide under one estimator."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from gumbo.errors import BadInput
from gumbo.experiments.reproduction.cells import Cell
from gumbo.files import append_line

METRICS = {
    "nll": "−log p(x), importance-weighted",
    "negative-elbo": "−ELBO",
    "training-loss": "−ELBO on training data",
}
Pair = tuple[str, Mapping[str, Any], str, Mapping[str, Any]]  # a model and a guide by name, each with its options
VALID_ROWS = 1000  # of the validation images, to choose settings by
TEST_SEED = 1
TRAIN_ROWS = 5000  # of the training images, for papers that report the training loss
PAYS = 1000  # draws from which a compiled evaluation takes less time than it takes to compile
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
        bounds: draws of further importance-weighted bounds on the test data, reported beside.
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


def cosine(rate: str) -> str:
    """A learning rate that decays from ``rate`` to a hundredth of it over the budget.

    >>> cosine("1e-3")
    'cosine({steps}, 1e-3, 1e-05)'
    """
    return f"cosine({{steps}}, {rate}, {float(rate) / 100:g})"


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
        **{"lr": cosine("1e-3"), **settings},
    )


def settings(cell: TrainedCell, seed: int, steps: int):
    """The settings of ``gumbo train`` that train the cell."""
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


@dataclass(frozen=True)
class Trained:
    """A cell after training: its programs, its data, the numbers of the training, and the bound on validation images.

    ``train`` and ``held_out`` are the arguments of the programs; ``numbers`` is part of what ``run`` returns.
    """

    model: Any
    guide: Any
    data: Any
    train: Mapping[str, Any]
    held_out: Mapping[str, Any]
    numbers: dict[str, Any]


def train(
    cell: TrainedCell, seed: int, steps: int, folder: Path, *, rows: int | None, compile: bool, device: str
) -> Trained:
    """Train one cell for ``steps`` steps, rounded to whole epochs; the test images are not looked at.

    ``rows`` is the number of images used of each split; None takes all.
    """
    import torch

    from gumbo.experiments.train import build, inputs_of, learning_rate, load_data, make_loss
    from gumbo.inference import evaluate, fit
    from gumbo.inference.auditing.moments import gradient_moments
    from gumbo.inference.training.checkpoints import Checkpoints

    torch.set_num_threads(1)
    config = settings(cell, seed, steps)
    data = load_data(config)
    model, guide = (program.to(device) for program in build(config, data.data_shape))
    images = inputs_of(model, data, "train", rows)
    per_epoch = len(images["x"]) // cell.batch_size
    epochs = max(1, round(steps / per_epoch))
    every = max(1, epochs // 50)  # points of the curve
    held_out = inputs_of(model, data, "valid", rows or VALID_ROWS)
    held_out = {name: value.to(device) for name, value in held_out.items()}
    folder.mkdir(parents=True, exist_ok=True)

    def judge() -> dict[str, Any]:
        point = {"valid": evaluate(model, guide, held_out, num_samples=1, seed=seed).elbo}
        if cell.variance:
            batch = {name: value[: cell.batch_size].to(device) for name, value in images.items()}
            draws = VARIANCE_DRAWS if rows is None else QUICK_DRAWS
            moments = gradient_moments(model, guide, make_loss(config), batch, num_samples=draws)
            point["variance"] = moments.total_variance
        return point

    curve = Curve(folder / "points.jsonl", every, epochs, judge, timed_by=clock_of(device), warms_up=compile)
    began = time.perf_counter()
    result = fit(
        model,
        guide,
        images,
        loss=make_loss(config),
        optimizer=config.optimizer,
        lr=learning_rate(config),
        epochs=epochs,
        batch_size=cell.batch_size,
        seed=seed,
        run_dir=folder,
        resume=Checkpoints(folder / "checkpoints").exist(),
        drop_last=True,
        checkpoint_every=every,
        compile=compile,
        progress=False,
        on_epoch=curve.look,
    )
    seconds = time.perf_counter() - began
    losses = {int(numbers["epoch"]): numbers[result.objective_name] for numbers in result.history}
    lap, points = curve.points(losses, per_epoch)
    numbers = {
        "valid": evaluate(model, guide, held_out, num_samples=100, seed=seed).as_dict(),
        "steps": epochs * per_epoch,
        "share": epochs * per_epoch / cell.steps,
        "seconds": seconds,
        "ms_per_step": 1000 * lap / per_epoch,
        "curve": points,
    }
    return Trained(model, guide, data, images, held_out, numbers)


def train_and_judge(
    cell: TrainedCell, seed: int, steps: int, folder: Path, *, rows: int | None, compile: bool, device: str
) -> dict[str, Any]:
    """Train one cell and evaluate it once on the test images; arguments as for :func:`train`."""
    import torch

    from gumbo.experiments.train import inputs_of
    from gumbo.inference import evaluate

    found = train(cell, seed, steps, folder, rows=rows, compile=compile, device=device)
    pair = found.model, found.guide
    shuffled = torch.randperm(len(found.data.test), generator=torch.Generator().manual_seed(TEST_SEED))[:rows]
    inputs = inputs_of(found.model, found.data, "test").items()
    images = {name: value[shuffled].to(device) for name, value in inputs}
    draws = cell.draws if rows is None else 10
    test = judged = evaluate(*pair, images, num_samples=draws, seed=seed, compile=compile and draws >= PAYS)
    if cell.metric == "training-loss":
        some = {name: value[:TRAIN_ROWS].to(device) for name, value in found.train.items()}
        judged = evaluate(*pair, some, num_samples=10, seed=seed)
    by_weights = cell.metric == "nll"
    beside = {
        f"{draws}-draw bound": -evaluate(*pair, images, num_samples=draws, seed=seed).log_evidence
        for draws in cell.bounds
    }
    return {
        "value": -judged.log_evidence if by_weights else -judged.elbo,
        "value_se": judged.log_evidence_se if by_weights else judged.elbo_se,
        "beside": beside,
        "test": test.as_dict(),
        **found.numbers,
    }


def clock_of(device: str) -> Callable[[], float]:
    """The one thread's own time, since other programs share the machine; the wall's where a GPU works."""
    return time.perf_counter if device.startswith("cuda") else time.process_time


class Curve:
    """The learning curve of a run, kept in a file so that an interrupted run goes on with it.

    Args:
        path: the file, one JSON line a point.
        every: epochs between two points.
        epochs: the number of epochs; the last is a point too.
        judge: the numbers of a point.
        timed_by: a clock in seconds.
        warms_up: whether the first epoch of a process also compiles, and so tells nothing of an epoch's time.
    """

    def __init__(
        self,
        path: Path,
        every: int,
        epochs: int,
        judge: Callable[[], dict[str, Any]],
        *,
        timed_by: Callable[[], float],
        warms_up: bool,
    ):
        self.path, self.every, self.epochs, self.judge, self.clock = path, every, epochs, judge, timed_by
        self.skips = warms_up
        self.laps: list[float] = []  # seconds of the epochs since the last point
        self.started = timed_by()

    def look(self, numbers: dict[str, float]) -> None:
        """Take the time of an epoch that has ended, and judge it if it is a point's."""
        epoch = int(numbers["epoch"])
        if not self.skips:
            self.laps.append(self.clock() - self.started)
        self.skips = False
        if epoch % self.every == 0 or epoch == self.epochs:
            lap = median(self.laps) if self.laps else None
            append_line(self.path, json.dumps({"epoch": epoch, "epoch_seconds": lap, **self.judge()}))
            self.laps.clear()
        self.started = self.clock()

    def points(self, losses: Mapping[int, float], per_epoch: int) -> tuple[float, list[dict[str, float]]]:
        """Seconds of an epoch (NaN if no epoch was timed), and the points: step, seconds of training, numbers."""
        lines = self.path.read_text(encoding="utf-8").splitlines()
        looked = {point.pop("epoch"): point for point in map(json.loads, lines)}
        laps = {epoch: point.pop("epoch_seconds") for epoch, point in looked.items()}
        known = [lap for lap in laps.values() if lap is not None]
        usual = median(known) if known else math.nan
        found, spent, before = [], 0.0, 0
        for epoch, point in sorted(looked.items()):
            lap = laps[epoch]
            spent += (usual if lap is None else lap) * (epoch - before)
            before = epoch
            numbers = {"step": epoch * per_epoch, "seconds": round(spent, 3), "train": round(losses[epoch], 3)}
            found.append(numbers | {name: round(value, 4) for name, value in point.items()})
        return usual, found
