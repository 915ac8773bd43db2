"""Labels of few images only: M2 and its classifier."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any

from gumbo.errors import BadInput
from gumbo.experiments._runs import RunFolder
from gumbo.experiments.systems._base import System, systems


@systems.register("semi-supervised")
@dataclass
class SemiSupervised(System):
    """M2 with few labels under three estimators of the missing label, against its classifier on those labels alone.

    Args:
        data: the training images; of mnist only the test split is read.
        epochs: training epochs; by default 30, and 6 under `--quick`.
        seeds: number of seeds, from `seed` on; by default 3, and 1 under `--quick`.
        labels: number of labels, equally many of each class.
    """

    data: str = "digits"
    epochs: int | None = None
    seeds: int | None = None
    labels: int = 100

    def measure(self, run: RunFolder) -> dict[str, Any]:
        """The numbers; the picture goes to the run folder."""
        import statistics

        from gumbo.experiments.plots import colors, figure, save

        epochs, seeds = self.number("epochs", usual=30, quick=6), self.number("seeds", usual=3, quick=1)
        recipe = Recipe(first=8, epochs=epochs)
        if self.quick:
            recipe = Recipe(first=3, epochs=epochs, hidden=(64,), batch_size=100)
        (x, y), test = labelled_images(self.data)
        curves: dict[str, list[list[float]]] = {name: [] for name in LABELS}
        for seed in range(self.seed, self.seed + seeds):
            labelled, rest = choose_labelled(y, self.labels, seed)
            for name in LABELS:
                curve = learn_labels(name, x[labelled], y[labelled], x[rest], test, recipe, seed)
                print(f"{name}, seed {seed}: test accuracy {curve[-1]:.3f}", file=sys.stderr)
                curves[name].append(curve)
        found: dict[str, Any] = {"labelled": len(labelled), "unlabelled": len(rest), "tested on": len(test[1])}
        for name, of_seed in curves.items():
            last = [curve[-1] for curve in of_seed]
            found[name] = {"test accuracy": statistics.fmean(last)}
            found[name] |= {f"seed {self.seed + place}": accuracy for place, accuracy in enumerate(last)}
        made, axis = figure(figsize=(7, 4))
        for name, color in colors(list(curves)).items():
            for place, curve in enumerate(curves[name]):
                axis.plot(range(1, len(curve) + 1), curve, color=color, linewidth=1, label=None if place else name)
        axis.axvline(recipe.first, color="black", linewidth=0.8, linestyle=":", label="unlabelled images join")
        axis.set(title=f"{len(labelled)} labels, {len(rest)} images without", xlabel="epoch", ylabel="test accuracy")
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.legend(fontsize=8)
        save(made, run.plots / "semi_supervised.png")
        return found


@dataclass(frozen=True)
class Recipe:
    """The training of the semi-supervised system: first on labelled images alone, so that the label means the class."""

    first: int
    epochs: int
    ramp: int = 2
    hidden: tuple[int, ...] = (256, 128)
    latent_dim: int = 5
    batch_size: int = 200
    lr: float = 3e-3
    alpha: float = 10.0
    temperature: float = 0.3


# The classifier on labelled images alone, and the estimators of M2's missing label.
LABELS = ("supervised", "enumerate", "gumbel-softmax", "rloo")


def labelled_images(name: str):
    """Gray training images and binary test images, each with labels; of MNIST its test images, 8,000/2,000."""
    import torch

    from gumbo.experiments.data import load

    data = load("mnist-test" if name == "mnist" else name)
    if not data.labels:
        raise BadInput(f"semi-supervised needs labels, and {name} has none: try digits or mnist")
    x, y = torch.cat([data.train, data.valid]), torch.cat([data.labels["train"], data.labels["valid"]])
    test = torch.bernoulli(data.test, generator=torch.Generator().manual_seed(1))
    return (x, y), (test, data.labels["test"])


def choose_labelled(y, count: int, seed: int):
    """Indices of ``count`` images to label, equally many of each class, and of all the others."""
    import torch

    classes = y.unique()
    each, left = divmod(count, len(classes))
    if left or each < 1 or each > torch.bincount(y)[classes].min():
        raise BadInput(
            f"labels must be a multiple of {len(classes)}, the number of classes, that each class can give; got {count}"
        )
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(seed))
    chosen = torch.cat([order[y[order] == label][:each] for label in classes])
    others = torch.ones(len(y), dtype=torch.bool)
    others[chosen] = False
    return chosen, others.nonzero().squeeze(-1)


def learn_labels(name: str, x, y, unlabelled, test, recipe: Recipe, seed: int) -> list[float]:
    """Test accuracy of q(y | x) after each epoch, trained on the bounds and α times its cross-entropy."""
    import torch

    from gumbo.guides import LabelConditionalGuide
    from gumbo.inference import SiteELBO
    from gumbo.inference.estimators import GumbelSoftmax
    from gumbo.models import SemiSupervisedVAE

    torch.manual_seed(seed)
    model = SemiSupervisedVAE(x.shape[1:], int(y.max()) + 1, recipe.latent_dim, hidden=recipe.hidden, activation="relu")
    guide = LabelConditionalGuide(model)
    seen = SiteELBO()(model, guide)
    word = {"supervised": "enumerate", "gumbel-softmax": GumbelSoftmax(recipe.temperature)}.get(name, name)
    unseen = SiteELBO({"y": word, "z": "pathwise"}, num_particles=4 if name == "rloo" else None)(model, guide)
    optimizer = torch.optim.Adam([*model.parameters(), *guide.parameters()], lr=recipe.lr)
    accuracy = []
    for epoch in range(recipe.epochs):
        weight = min(1.0, max(0, epoch + 1 - recipe.first) / recipe.ramp)
        for batch in torch.randperm(len(unlabelled)).split(recipe.batch_size):
            few = torch.randperm(len(x))[: recipe.batch_size // 4]
            few_x, few_y = torch.bernoulli(x[few]), y[few]
            loss = recipe.alpha * guide.classification_loss(few_x, few_y)
            if name != "supervised":
                loss = loss + seen(few_x, y=few_y) / len(few)
                if weight:
                    loss = loss + weight * unseen(torch.bernoulli(unlabelled[batch])) / len(batch)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        with torch.no_grad():
            accuracy.append((guide.classify(test[0]).argmax(-1) == test[1]).float().mean().item())
    return accuracy
