"""Common parts of the systems: registry, settings, and data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from gumbo.errors import BadInput
from gumbo.experiments._runs import RunFolder
from gumbo.registry import Registry

systems: Registry[type[System]] = Registry("system")


@dataclass
class System:
    """Run one of the systems, a small demonstration with a picture and its numbers; each has its own options.

    Args:
        quick: a small run, for a first look and for tests.
        seed: initial weights, batches and noise.
        folder: the run folder; by default ./runs/<system>-<time>.
        trust: import the import paths in the config.yaml of a run, given as `--config`.
    """

    quick: bool = False
    seed: int = 0
    folder: str | None = None
    trust: bool = False

    def measure(self, run: RunFolder) -> dict[str, Any]:
        """The numbers by name; the picture goes to ``run.plots``."""
        raise TypeError(f"{type(self).__name__} must define measure(run)")

    def number(self, option: str, usual: int, quick: int) -> int:
        """An option that counts something, at least 1; the default is the usual number or that of a quick run."""
        given = getattr(self, option)
        if given is None:
            return quick if self.quick else usual
        if given < 1:
            raise BadInput(f"{option} is {given}: expected at least 1")
        return given

    @property
    def name(self) -> str:
        """Its registered name."""
        return next(name for name, known in systems.items() if known is type(self))


def images(name: str):
    """Binarized training images; of MNIST the test images, since the training images are often missing."""
    from gumbo.experiments.data import load

    if name == "mnist":
        return load("mnist", binarize="static", splits=["test"]).test
    return load(name, binarize="static").train


def clear_store() -> None:
    import pyro

    pyro.clear_param_store()


def diabetes():
    """scikit-learn's 442 patients: ten measurements, and the disease's progress a year later; standardized."""
    import torch
    from sklearn.datasets import load_diabetes

    x, y = load_diabetes(return_X_y=True)
    x, y = torch.as_tensor(x), torch.as_tensor(y).unsqueeze(-1)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(20130))
    x, y = (x - x.mean(0)) / x.std(0), (y - y.mean()) / y.std()
    return (x[order[:342]], y[order[:342]]), (x[order[342:]], y[order[342:]])
