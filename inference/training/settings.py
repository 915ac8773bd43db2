"""The options of ``fit`` as one dataclass: checked once, and compared with those of a stored run."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from numbers import Integral, Real
from pathlib import Path
from typing import Any

import numpy as np
import pyro.optim
import torch
from pyro.infer import ELBO

from ...errors import BadInput, UnknownName
from .compile.products import FASTEST, LIBRARIES
from .metrics import require_tensorboard
from .schedules import Schedule

WHOLE = ("epochs", "batch_size", "valid_samples", "checkpoint_every")
WHOLE_OR_NONE = ("checkpoint_steps", "patience")
FUNCTIONS = ("transform", "on_epoch")
# The options that decide a run's numbers. The others (length, checkpoints, output) may differ in a resumed run.
DECIDING = ("batch_size", "seed", "valid_samples", "compile", "until")
# Those that decide when processes talk to each other.
COMMON = ("epochs", "patience", "restore_best", "checkpoint_every", "checkpoint_steps", "checkpoint_minutes", "resume")


@dataclass(frozen=True)
class FitSettings:
    """The options of :func:`~gumbo.inference.fit`, whose documentation describes them."""

    loss: ELBO | str = "default"
    optimizer: str | pyro.optim.PyroOptim | Callable[..., torch.optim.Optimizer] = "adam"
    lr: float | Schedule = 1e-3
    scheduler: Callable[[torch.optim.Optimizer], Any] | None = None
    scheduler_every: str = "epoch"
    clip_norm: float | None = None
    clip_value: float | None = None
    epochs: int = 10
    batch_size: int = 128
    seed: int = 0
    run_dir: str | Path | None = None
    resume: bool = False
    patience: int | None = None
    until: str | None = None
    restore_best: bool = False
    drop_last: bool | None = None
    transform: Callable[[Any, torch.Generator], Any] | None = None
    valid_samples: int = 10
    checkpoint_every: int = 1
    checkpoint_steps: int | None = None
    checkpoint_minutes: float | None = None
    tensorboard: bool = False
    validate: bool = False
    compile: bool = False
    products: str = FASTEST
    progress: bool = True
    title: str = "fit"
    on_epoch: Callable[[dict[str, float]], None] | None = None
    anneal: Mapping[str, Schedule | str | float] | None = None

    @classmethod
    def of(cls, given: Mapping[str, Any]) -> FitSettings:
        """The settings among a function's arguments; other arguments are left out.

        >>> FitSettings.of({"epochs": np.int64(3), "train": None}).epochs
        3
        """
        return cls(**{item.name: given[item.name] for item in fields(cls) if item.name in given}).checked()

    @property
    def folder(self) -> Path | None:
        """The run folder, if one was asked for."""
        return None if self.run_dir is None else Path(self.run_dir)

    def checked(self) -> FitSettings:
        """The same settings with plain Python numbers, after every option is checked.

        Raises:
            BadInput: an option that cannot be used, or two that exclude each other.
        """
        for name in (*WHOLE, *WHOLE_OR_NONE):
            value = getattr(self, name)
            if not (is_whole(value) and 1 <= value < 2**63) and not (value is None and name in WHOLE_OR_NONE):
                raise BadInput(f"{name} is {value!r}: expected at least 1, a whole number")
        if self.until not in (None, "converged"):
            raise UnknownName("until", self.until, ("converged",))
        if self.until is not None and self.restore_best:
            raise BadInput("until='converged' gives averaged iterates and restore_best those of an epoch: choose one")
        if self.until is not None and (callable(self.lr) or self.scheduler is not None):
            raise BadInput(
                "until='converged' needs a constant learning rate: under a decreasing one the iterates always look "
                "stationary; leave out lr schedules and scheduler"
            )
        minutes = self.checkpoint_minutes
        if minutes is not None and not (isinstance(minutes, Real) and not isinstance(minutes, bool) and minutes > 0):
            raise BadInput(f"checkpoint_minutes is {minutes!r}: expected a positive number")
        if not (is_whole(self.seed) and 0 <= self.seed < 2**64):
            raise BadInput(
                f"seed is {self.seed!r}: expected a whole number that torch.manual_seed takes, at least 0, below 2**64"
            )
        if self.run_dir is not None:
            _refuse_folder(self.run_dir)
        for name in FUNCTIONS:
            value = getattr(self, name)
            if value is not None and not callable(value):
                raise BadInput(f"{name} is {type(value).__name__}: expected a function")
        if self.anneal is not None and not isinstance(self.anneal, Mapping):
            raise BadInput(
                f"anneal is {type(self.anneal).__name__}: expected a schedule for each buffer, as in "
                "{'success': 'linear(1000, 0.5, 0.1)'}"
            )
        if self.run_dir is None and self.resume:
            raise BadInput("resume=True needs the run_dir of the run to resume")
        if self.run_dir is None and self.tensorboard:
            raise BadInput("tensorboard=True needs a run_dir")
        if self.tensorboard:
            require_tensorboard()
        if self.compile and self.validate:
            raise BadInput("validate=True looks at values, which compile=True cannot: leave one of them out")
        if self.products not in LIBRARIES:
            raise UnknownName("products", self.products, LIBRARIES)
        if self.products != FASTEST and not self.compile:
            raise BadInput(f"products={self.products!r} chooses the library of a compiled step: pass compile=True")
        # JSON and checkpoints do not take NumPy integers.
        whole = {name: getattr(self, name) for name in (*WHOLE, *WHOLE_OR_NONE, "seed")}
        return replace(self, **{name: None if value is None else int(value) for name, value in whole.items()})

    def deciding(self) -> dict[str, Any]:
        """Plain values of the options that decide a run's numbers; a folder with other values is refused."""
        transform = self.transform
        named = None if transform is None else getattr(transform, "__qualname__", type(transform).__name__)
        every = None if self.scheduler is None else self.scheduler_every
        return {name: getattr(self, name) for name in DECIDING} | {"transform": named, "scheduler_every": every}

    def common(self) -> dict[str, Any]:
        """Plain values of the other options that must be the same in all processes of a run."""
        return {name: getattr(self, name) for name in COMMON} | {"use of run_dir": self.run_dir is not None}


def is_whole(value: object) -> bool:
    """Whether a value is an integer, Python's or NumPy's; a bool is not.

    >>> is_whole(np.int64(3)), is_whole(3.0), is_whole(True)
    (True, False, False)
    """
    return isinstance(value, Integral) and not isinstance(value, (bool, np.bool_))


def _refuse_folder(run_dir: object) -> None:
    """Raise BadInput for a value that no file system accepts as a folder name."""
    if not isinstance(run_dir, (str, os.PathLike)):
        raise BadInput(f"run_dir is {type(run_dir).__name__}: expected a path")
    if not os.fspath(run_dir):
        raise BadInput("run_dir is '': expected a path, such as 'runs/first'; '.' is the current folder")
    if os.path.isfile(run_dir):  # False for a name that no system takes
        raise BadInput(f"run_dir is {str(run_dir)!r}, a file: expected a folder")
    try:
        os.lstat(Path(run_dir) / "checkpoints")
    except ValueError as error:
        raise BadInput(f"run_dir is {str(run_dir)!r}: expected a valid path ({error})") from error
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:
            raise BadInput(f"run_dir has a name that is too long for this file system: {str(run_dir)!r}") from error
