"""What a cell of a published table is, and how it is trained and judged."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from gumbo.errors import BadInput
from gumbo.registry import Registry

METRICS = {"nll": "−log p(x), importance-weighted", "negative-elbo": "−ELBO"}
VALID_ROWS = 1000  # of the validation images, for the curve; all of them judge the end
TEST_SEED = 1

tables: Registry[Table] = Registry("table")


@dataclass(frozen=True)
class Cell:
    """One entry of a published table: what is trained, and the number that the paper has for it.

    Attributes:
        name: the cell within its table, as ``nonlinear/disarm``.
        model, model_options, guide, guide_options: the pair, by their registered names.
        estimator: a word; ``particles`` its number of draws, ``objective`` what it estimates.
        lr: Adam's learning rate, a number or a schedule of the step in words, where ``{steps}`` stands for the budget.
        steps: the paper's budget, in steps of ``batch_size``.
        metric: what the paper reports, a key of ``METRICS``, in nats per datum; smaller is better.
        published: the paper's number, None for a column of our own.
    """

    name: str
    model: str
    guide: str
    estimator: str
    published: float | None = None
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


@dataclass(frozen=True)
class Table:
    """A published table: its source, and its cells in the paper's order."""

    name: str
    source: str
    note: str
    cells: tuple[Cell, ...]

    def chosen(self, patterns: Sequence[str]) -> list[Cell]:
        """The cells whose names match one of the patterns (``nonlinear/*``); all of them if there is no pattern."""
        from fnmatch import fnmatch

        for pattern in patterns:
            if not any(fnmatch(cell.name, pattern) for cell in self.cells):
                known = ", ".join(cell.name for cell in self.cells)
                raise BadInput(f"table {self.name!r} has no cell {pattern!r}: its cells are {known}")
        return [cell for cell in self.cells if not patterns or any(fnmatch(cell.name, p) for p in patterns)]


def register(name: str, source: str, note: str, cells: Callable[[], Sequence[Cell]]) -> Table:
    """Make a table known under its name."""
    table = Table(name, source, note, tuple(cells()))
    tables.register(name, table)
    return table


def settings(cell: Cell, seed: int, steps: int):
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


def run_cell(
    cell: Cell,
    seed: int,
    steps: int,
    folder: Path,
    *,
    rows: int | None = None,
    compile: bool = True,
    device: str = "cpu",
) -> dict[str, Any]:
    """Train one cell and judge it once on the test images; an interrupted one goes on where it was.

    Args:
        cell: what to train.
        seed: of weights, batches and noise.
        steps: how many steps, rounded to whole epochs.
        folder: where the run keeps its checkpoints.
        rows: train and judge on so many images only (a trial); None takes all.
        compile: whether the step is compiled.
        device: where to compute.

    Returns:
        The numbers of the cell, as its JSON file holds them.
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
        "cell": asdict(cell),
        "seed": seed,
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
