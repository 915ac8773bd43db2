"""Progress of a long run: a bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import TextIO, cast

from ...console import standard_error

# The number of lines that a run of any length prints without a terminal.
_PLAIN_LINES = 20


class Progress:
    """Shows nothing; the base class of progress displays. Use it as a context manager."""

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *error: object) -> None: ...

    def begin(self, words: str) -> None:
        """Called when the run starts or resumes."""

    def step(self, done: int) -> None:
        """Called after ``done`` steps in total."""

    def epoch(self, number: int, numbers: Mapping[str, float]) -> None:
        """Called at the end of an epoch with its ``numbers``."""


class Stages(Progress):
    """Lines that name the current stage, for operations that take long.

    ``enabled`` None prints after some seconds, True from the start, False never.
    """

    _patience, _every = 2.0, 5.0  # seconds before the first line, and between two lines of a stage

    def __init__(self, title: str, enabled: bool | None):
        self.title, self.enabled = title, enabled
        self.began = self.last = time.monotonic()
        self.words, self.steps, self.said = "", 0, True

    def stage(self, words: str, steps: int = 0) -> None:
        """Begin a stage of ``steps`` steps."""
        self.words, self.steps, self.said = words, steps, False
        if self.enabled or self._impatient():
            self._say(words)

    def step(self, done: int) -> None:
        now = time.monotonic()
        if (not self.said and self._impatient()) or (self.said and now - self.last > self._every):
            self._say(f"{self.words} {done}/{self.steps}" if self.steps else f"{self.words} {done}")

    def _impatient(self) -> bool:
        return self.enabled is not False and time.monotonic() - self.began > self._patience

    def _say(self, words: str) -> None:
        self.said, self.last = True, time.monotonic()
        if self.enabled is not False:
            print(f"{self.title}: {words}", file=standard_error(), flush=True)


def make_progress(enabled: bool, title: str, epochs: int, steps: int) -> Progress:
    """A bar if standard error is a terminal, plain lines if not, silence if not ``enabled``."""
    if not enabled:
        return Progress()
    return _Bar(title, steps) if standard_error().isatty() else _Lines(title, epochs)


def in_words(numbers: Mapping[str, float]) -> str:
    """``elbo -21.30  valid_elbo -22.01``: the main numbers of an epoch."""
    hidden = ("epoch", "step", "seconds")
    return "  ".join(
        f"{name} {value:{'.2g' if name == 'lr' else '.2f'}}" for name, value in numbers.items() if name not in hidden
    )


class _Lines(Progress):
    def __init__(self, title: str, epochs: int):
        self.title, self.epochs = title, epochs
        self.every = max(1, epochs // _PLAIN_LINES)

    def begin(self, words: str) -> None:
        print(f"{self.title}: {words}", file=standard_error(), flush=True)

    def epoch(self, number: int, numbers: Mapping[str, float]) -> None:
        if number % self.every == 0 or number == self.epochs:
            print(f"{self.title} epoch {number}/{self.epochs}  {in_words(numbers)}", file=standard_error(), flush=True)


class _Tenths(Progress):
    def __init__(self, title: str, steps: int):
        self.title, self.steps, self.said = title, steps, 0

    def step(self, done: int) -> None:
        if 10 * done // self.steps > self.said:
            self.said = 10 * done // self.steps
            print(f"{self.title} {done}/{self.steps}", file=standard_error(), flush=True)


def bar(enabled: bool, title: str, steps: int) -> Progress:
    """A progress bar on a terminal; elsewhere a line for each tenth of the steps."""
    if not enabled:
        return Progress()
    return _Bar(title, steps) if standard_error().isatty() else _Tenths(title, steps)


class _Bar(Progress):
    def __init__(self, title: str, steps: int):
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
        from rich.progress import Progress as RichProgress

        self.bar = RichProgress(
            TextColumn(title),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[words]}"),
            console=Console(file=cast(TextIO, standard_error())),
        )
        self.task = self.bar.add_task(title, total=steps, words="")
        self.shown = 0.0

    def __enter__(self) -> Progress:
        self.bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.bar.stop()

    def begin(self, words: str) -> None:
        self.bar.console.print(f"{self.bar.tasks[0].description}: {words}", highlight=False, soft_wrap=True)

    def step(self, done: int) -> None:
        # The bar is redrawn ten times a second; more frequent updates cost more than a small step.
        if (now := time.monotonic()) - self.shown > 0.1:
            self.bar.update(self.task, completed=done)
            self.shown = now

    def epoch(self, number: int, numbers: Mapping[str, float]) -> None:
        self.bar.update(self.task, completed=int(numbers["step"]), words=in_words(numbers))
