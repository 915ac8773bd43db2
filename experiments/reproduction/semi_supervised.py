"""Jang, Gu & Poole 2017, section 4.3: one sample of a label in place of a sum over all of them, 100 labels.

The time of a training step grows with the number of classes if the label is summed out, not if it is drawn.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gumbo.experiments.reproduction.cells import Cell, register

CLASSES = (5, 10, 20, 50, 100)
WORDS = ("enumerate", "gumbel-softmax", "straight-through", "rloo")
ALONE = "labels-alone"  # the classifier without the model
PUBLISHED = {10: 2.0, 100: 9.9}  # times faster, by number of classes
DRAWS = {"rloo": 2}
BATCH, TIMED, QUICK_TIMED = 100, 200, 3
LABELLED, TRAINED_ON = 100, 8000
ALPHA = 0.1  # times the number of data: the weight of a labelled image's classification loss
EPOCHS, QUICK_EPOCHS, QUICK_ROWS = 50, 1, 500
LR = 1e-3


@dataclass(frozen=True)
class StepTime(Cell):
    """Milliseconds of a training step on unlabelled images: ``value``, the median."""

    classes: int = 10
    estimator: str = "enumerate"

    def run(self, seed: int, steps: int, folder: Path, *, quick: bool = False, device: str = "cpu") -> dict[str, Any]:
        import torch

        torch.set_num_threads(1)
        began = time.perf_counter()
        steps = QUICK_TIMED if quick else steps
        generator = torch.Generator().manual_seed(seed)
        x = torch.bernoulli(torch.full((BATCH, 1, 28, 28), 0.13), generator=generator).to(device)
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            model, guide = pair(self.classes)
            loss = loss_of(self.estimator)(model.to(device), guide.to(device))
            loss(x)
            optimizer = torch.optim.Adam(loss.parameters(), lr=LR)
            took = []
            for _ in range(steps):
                start = clock(device)
                optimizer.zero_grad()
                loss(x).backward()
                optimizer.step()
                took.append(clock(device) - start)
        took = sorted(1000 * seconds for seconds in took)
        return {
            "value": took[len(took) // 2],
            "beside": {"least": took[0]},
            "steps": steps,
            "share": 1.0,
            "seconds": time.perf_counter() - began,
        }


def clock(device: str) -> float:
    import torch

    if device.startswith("cuda"):
        torch.cuda.synchronize()
    return time.perf_counter()


@dataclass(frozen=True)
class Accuracy(Cell):
    """Errors in per cent on 2,000 of the labelled digits, with 100 labels among the 8,000 others: ``value``."""

    estimator: str = "enumerate"

    def run(self, seed: int, steps: int, folder: Path, *, quick: bool = False, device: str = "cpu") -> dict[str, Any]:
        import torch

        torch.set_num_threads(1)
        began = time.perf_counter()
        images, labels = digits()
        order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
        train, test = order[:TRAINED_ON], order[TRAINED_ON:]
        if quick:
            train = train[:QUICK_ROWS]
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            seen = balanced(labels[train], LABELLED)
            model, guide = pair(10)
            model, guide = model.to(device), guide.to(device)
            x, few, y = images[train].to(device), images[train][seen].to(device), labels[train][seen].to(device)
            bound_of = self.bound(model, guide, x, few, y)
            bound_of(slice(BATCH))
            optimizer = torch.optim.Adam([*model.parameters(), *guide.parameters()], lr=LR)
            curve, step = [], 0
            per_epoch = len(x) // BATCH
            budget = QUICK_EPOCHS * per_epoch if quick else steps
            while step < budget:
                for rows in torch.randperm(len(x), device=device).split(BATCH)[:per_epoch]:
                    optimizer.zero_grad()
                    value = bound_of(rows)
                    (value + ALPHA * len(few) * guide.classification_loss(few, y)).backward()
                    optimizer.step()
                    step += 1
                curve.append({"step": step, "train": round(-value.item(), 3)})
            guide.eval()
            with torch.no_grad():
                guessed = guide.classify(images[test].to(device)).argmax(-1).cpu()
        wrong = (guessed != labels[test]).double()
        return {
            "value": 100 * wrong.mean().item(),
            "value_se": 100 * (wrong.std() / len(wrong) ** 0.5).item(),
            "steps": step,
            "share": step / self.steps,
            "seconds": time.perf_counter() - began,
            "progress": curve,
        }

    def bound(self, model, guide, x, few, y):
        """The negative bound over all data, divided by their number, given rows of x; every step sees all labels."""
        if self.estimator == ALONE:
            return lambda rows: x.new_zeros(())
        unlabelled, known = loss_of(self.estimator)(model, guide), loss_of("pathwise")(model, guide)
        return lambda rows: unlabelled(x[rows]) / BATCH + known(few, y=y) / len(x)


def pair(classes: int):
    from gumbo.guides import LabelConditionalGuide
    from gumbo.models import SemiSupervisedVAE

    model = SemiSupervisedVAE((1, 28, 28), num_classes=classes, latent_dim=32, hidden=(256, 128))
    return model, LabelConditionalGuide(model)


def loss_of(word: str):
    """The loss with ``word`` for the label and the pathwise gradient for the Normal latent."""
    from gumbo.inference import SiteELBO

    if word == "pathwise":
        return SiteELBO("pathwise")
    return SiteELBO({"y": word, "z": "pathwise"}, num_particles=DRAWS.get(word))


def digits():
    """The 10,000 labelled digits that are MNIST's test images, binarized at one half."""
    from gumbo.experiments.data import load

    data = load("mnist", binarize="static", splits=("test",))
    return data.test, data.labels["test"]


def balanced(labels, count: int):
    """Indices of ``count`` rows, equally many of each class, or all of a class that has fewer."""
    import torch

    order = torch.randperm(len(labels))
    return torch.cat([order[labels[order] == k][: count // 10] for k in range(10)])


def conclude(found: Sequence[dict[str, Any]]) -> list[str]:
    """How many times faster a step is with one sample than with the sum, and the errors beside those of the labels."""
    times: dict[tuple[int, str], list[float]] = {}
    for numbers in found:
        if "classes" in numbers["cell"]:
            key = numbers["cell"]["classes"], numbers["cell"]["estimator"]
            times.setdefault(key, []).append(numbers["value"])
    mean = {key: sum(values) / len(values) for key, values in times.items()}
    said = []
    for classes in CLASSES:
        if {(classes, "enumerate"), (classes, "gumbel-softmax")} <= mean.keys():
            ratio = mean[classes, "enumerate"] / mean[classes, "gumbel-softmax"]
            theirs = f"; published {PUBLISHED[classes]:g}" if classes in PUBLISHED else ""
            said.append(
                f"{classes} classes: a step with Gumbel-softmax is {ratio:.1f} times as fast as the sum{theirs}."
            )
    return said + _errors(found)


def _errors(found: Sequence[dict[str, Any]]) -> list[str]:
    from gumbo.experiments.compare import mean_and_error

    errors: dict[str, list[float]] = {}
    for numbers in found:
        if "classes" not in numbers["cell"]:
            errors.setdefault(numbers["cell"]["estimator"], []).append(numbers["value"])
    alone = errors.pop(ALONE, [])
    if min(map(len, [alone, *errors.values()])) < 2 or not errors:
        return []
    mean, error = mean_and_error(alone)
    rows = ((word, *mean_and_error(values)) for word, values in errors.items())
    more = [f"{word} {ours - mean:+.1f} ± {(se**2 + error**2) ** 0.5:.1f}" for word, ours, se in rows]
    return [f"Errors with the labels alone: {mean:.1f} ± {error:.1f} %; points more with {', '.join(more)}."]


def cells() -> list[Cell]:
    times: list[Cell] = [
        StepTime(f"{classes}-classes/{word}", steps=TIMED, classes=classes, estimator=word)
        for classes in CLASSES
        for word in WORDS
    ]
    budget = EPOCHS * TRAINED_ON // BATCH
    return times + [Accuracy(f"accuracy/{word}", steps=budget, estimator=word) for word in (ALONE, *WORDS)]


register(
    "semi-supervised",
    "Jang, Gu & Poole 2017, arXiv 1611.01144, section 4.3",
    "The model M2 of Kingma et al. 2014 with 32 Normal latents, batch 100. Speed: milliseconds of a training step on "
    "unlabelled images with so many classes. Accuracy: errors in per cent on 2,000 of MNIST's 10,000 test digits after "
    "50 passes over the 8,000 others, 100 of which have labels, ten of each class; the paper has all of MNIST. "
    "The loss of the classifier at each of these 100 counts 800 times, a tenth of the number of images.",
    cells,
    value="ms a step, and errors in %; smaller is better",
    conclude=conclude,
)
