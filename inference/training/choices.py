"""The selections of ``auto`` in a run: made before the first step, stored in the run folder, repeated on schedule."""

from __future__ import annotations

import json
from itertools import islice
from pathlib import Path
from typing import Any

from torch import nn

from ...errors import BadInput
from ...files import write_whole
from ..elbo import SiteELBO
from ..engine.rows import Rows
from .batches import Batches
from .distributed import Processes
from .steps import TorchStep

FILE = "estimators.json"


class Choices:
    """The selections of one run, the entries of ``estimators.json``: words by site, measurements, and the step.

    With several ``processes`` the main one measures, and all use its selection. A resumed run keeps the stored ones.
    """

    def __init__(self, loss: SiteELBO, folder: Path | None, processes: Processes | None, speaks: bool):
        self.loss, self.processes, self.speaks = loss, processes, speaks
        self.chooser: Any = loss.chooser
        self.path = None if folder is None else folder / FILE
        self.made: list[dict[str, Any]] = []

    def settle(self, model: nn.Module, guide: nn.Module, batches: Batches, resume: bool, compiled: bool) -> SiteELBO:
        """The loss with its words selected: stored ones, or new ones from the first batches."""
        if self.chooser.again and (compiled or self.processes is not None):
            raise BadInput("auto(again=…) changes estimators in one eager process: leave again out, or compile=True")
        if resume and self.path is not None and self.path.exists():
            self.made = self._read()
        else:
            first = list(islice(batches.of_epoch(1), self.chooser.batches))
            self.made = [self._choose(model, guide, first, 0)]
        return self._loss(self.made[0])

    def before(self, number: int, batch: Rows, step: TorchStep) -> None:
        """Select again where the schedule asks for it, before step ``number`` (from 0)."""
        if number == 0 or number not in self.chooser.again or any(found["step"] == number for found in self.made):
            return
        found = self._choose(step.module.model, step.module.guide, [batch], number)
        changed = found["words"] != self.made[-1]["words"]
        self.made.append(found)
        self.write()
        if changed:
            step.change(self._loss(found))

    def keep_until(self, number: int) -> None:
        """Drop selections made after the step to resume from; the run makes the same ones again."""
        self.made = [found for found in self.made if found["step"] in range(max(number, 1))]

    def write(self) -> None:
        if self.path is not None and self.speaks_for_all:
            text = json.dumps(self.made, indent=1)
            write_whole(self.path, lambda file: file.write(text.encode()))

    @property
    def speaks_for_all(self) -> bool:
        return self.processes is None or self.processes.main

    def _choose(self, model: nn.Module, guide: nn.Module, batches: list[Rows], number: int) -> dict[str, Any]:
        def choose() -> dict[str, Any]:
            choice = self.chooser.choose(self.loss, model, guide, [(batch.args, batch.kwargs) for batch in batches])
            choice.step = number
            return choice.as_dict()

        found = choose() if self.processes is None else self.processes.from_main(choose)
        if self.speaks:
            self.chooser.announce(self.chooser.recall(found))
        return found

    def _loss(self, found: dict[str, Any]) -> SiteELBO:
        return self.loss.decided_as(self.chooser.recall(found))

    def _read(self) -> list[dict[str, Any]]:
        try:
            found = json.loads(self.path.read_text(encoding="utf-8"))
            if found and all(isinstance(one["words"], dict) and isinstance(one["step"], int) for one in found):
                return found
        except (OSError, ValueError, KeyError, TypeError):
            pass
        raise BadInput(f"{self.path} does not say which estimators the run took: fix it, or take another run_dir")
