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
LABELLED, TRAINED_ON = 100, 50_000
ALPHA = 0.1  # times the number of data: the weight of a labelled image's classification loss
EPOCHS, QUICK_EPOCHS, QUICK_ROWS = 50, 1, 500
LR = 1e-3
ERRORS = {"enumerate": 7.4, "gumbel-softmax": 7.6, "straight-through": 6.4}  # of the paper, quoted from memory
MOST_APART = 0.06  # mean distance of binarized pixels from gray ones; of other digits of the same class it is 0.12


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
    """Errors in per cent on the test digits that have no label in training: ``value``."""

    estimator: str = "enumerate"

    def run(self, seed: int, steps: int, folder: Path, *, quick: bool = False, device: str = "cpu") -> dict[str, Any]:
        import torch

        from gumbo.inference.engine.scopes import devices_of, random_states, set_random_states
        from gumbo.inference.training.checkpoints import Checkpoints

        torch.set_num_threads(1)
        x, images, labels = (values.to(device) for values in digits())
        if quick:
            x = x[:QUICK_ROWS]
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            seen = balanced(labels, LABELLED)
            unseen = torch.ones(len(labels), dtype=torch.bool, device=device).index_fill(0, seen, False)
            few, y = images[seen], labels[seen]
            model, guide = (module.to(device) for module in pair(10))
            bound_of = self.bound(model, guide, x, few, y)
            bound_of(slice(BATCH))
            optimizer = torch.optim.Adam([*model.parameters(), *guide.parameters()], lr=LR)
            parts = {"model": model, "guide": guide, "optimizer": optimizer}
            kept = Checkpoints(folder)
            step, before, curve = 0, 0.0, []
            if kept.exist():
                state = kept.load(device)
                step, before, curve = state["step"], state["seconds"], state["curve"]
                for name, part in parts.items():
                    part.load_state_dict(state[name])
                set_random_states(state["random"], devices_of(model))
            began = time.perf_counter()
            budget = QUICK_EPOCHS * len(x) // BATCH if quick else steps
            while step < budget:
                total = 0.0
                batches = torch.randperm(len(x)).split(BATCH)[: budget - step]
                for rows in batches:
                    optimizer.zero_grad()
                    value = bound_of(rows.to(device))
                    (value + ALPHA * len(few) * guide.classification_loss(few, y)).backward()
                    optimizer.step()
                    total += value.item()
                step += len(batches)
                with torch.no_grad():
                    wrong = guide.classify(images[unseen]).argmax(-1).ne(labels[unseen]).double().mean().item()
                curve.append({"step": step, "train": round(-total / len(batches), 3), "error": 100 * wrong})
                seconds = before + time.perf_counter() - began
                noise = random_states(devices_of(model))
                states = {name: part.state_dict() for name, part in parts.items()}
                kept.save(states | {"step": step, "seconds": seconds, "curve": curve, "random": noise})
        value = curve[-1]["error"]
        return {
            "value": value,
            "value_se": (value * (100 - value) / unseen.sum().item()) ** 0.5,
            "steps": step,
            "share": step / self.steps,
            "seconds": before + time.perf_counter() - began,
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
    """Training images of binarized MNIST, its test images, and the labels of these, from MNIST's own test digits.

    The test images are sorted by digit, and in the order of MNIST within a digit.
    """
    from gumbo.errors import BadInput
    from gumbo.experiments.data import load

    data, gray = load("binarized-mnist", splits=("train", "test")), load("mnist", splits=("test",))
    order = gray.labels["test"].argsort(stable=True)
    if (data.test - gray.test[order]).abs().mean() > MOST_APART:
        raise BadInput(
            "the test images of binarized-mnist are not those of mnist, sorted by label; get both files again"
        )
    return data.train, data.test, gray.labels["test"][order]


def balanced(labels, count: int):
    """Indices of ``count`` rows, equally many of each class, or all of a class that has fewer."""
    import torch

    order = torch.randperm(len(labels)).to(labels.device)
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
    from gumbo.experiments.compare import cell, decimals, mean_and_error

    errors: dict[str, list[float]] = {}
    for numbers in found:
        if "classes" not in numbers["cell"]:
            errors.setdefault(numbers["cell"]["estimator"], []).append(numbers["value"])
    said = []
    for word, values in errors.items():
        theirs = f" (published {ERRORS[word]:g})" if word in ERRORS else ""
        said.append(f"{word} {cell(mean_and_error(values), decimals)}{theirs}")
    return [f"Errors in %: {', '.join(said)}."] if said else []


def cells() -> list[Cell]:
    times: list[Cell] = [
        StepTime(f"{classes}-classes/{word}", steps=TIMED, classes=classes, estimator=word)
        for classes in CLASSES
        for word in WORDS
    ]
    budget = EPOCHS * TRAINED_ON // BATCH
    return times + [Accuracy(f"accuracy/{word}", ERRORS.get(word), budget, word) for word in (ALONE, *WORDS)]


register(
    "semi-supervised",
    "Jang, Gu & Poole 2017, arXiv 1611.01144, section 4.3",
    "The model M2 of Kingma et al. 2014 with 32 Normal latents, batch 100. Speed: milliseconds of a training step on "
    "unlabelled images with so many classes. Accuracy: errors in per cent on 9,900 test digits of binarized MNIST "
    "after 50 passes over its 50,000 training images, which have no labels; the other 100 test digits have labels, ten "
    "of each class. The loss of the classifier at each of these counts 5,000 times, a tenth of the number of images. "
    "The paper has other networks; its errors are quoted from memory.",
    cells,
    value="ms a step, and errors in %; smaller is better",
    conclude=conclude,
)
