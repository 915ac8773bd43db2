"""The records of a run: ``metrics.jsonl``, and scalars for TensorBoard."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from ...errors import BadInput
from ...files import append_line, write_whole


class Metrics:
    """``metrics.jsonl``: one line per epoch, written when the epoch ends."""

    def __init__(self, folder: Path):
        self.path = folder / "metrics.jsonl"

    def rewrite(self, history: Sequence[Mapping[str, float]]) -> None:
        """Replace all lines by these; otherwise epochs after the checkpoint would occur twice."""
        lines = "".join(json.dumps(numbers) + "\n" for numbers in history)
        write_whole(self.path, lambda file: file.write(lines.encode()))

    def append(self, numbers: Mapping[str, float]) -> None:
        """Append one line or nothing: a partial line (full disk) is removed, and GumboError is raised."""
        append_line(self.path, json.dumps(numbers))


class Scalars:
    """Every number of an epoch as a TensorBoard scalar over training steps, under ``<run_dir>/tensorboard``.

    Needs the package ``tensorboard``; raises BadInput with the install command. ``after`` is the step that the run
    resumes from: TensorBoard drops the later entries of an interrupted run.
    """

    def __init__(self, folder: Path, after: int | None):
        self.writer = _summary_writer()(
            str(folder / "tensorboard"), purge_step=None if after is None else after + 1, flush_secs=10
        )

    def epoch(self, numbers: Mapping[str, float]) -> None:
        for name, value in numbers.items():
            if name not in ("epoch", "step"):
                self.writer.add_scalar(name, value, int(numbers["step"]))
        self.writer.flush()

    def close(self) -> None:
        self.writer.close()


def _summary_writer():
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise BadInput('tensorboard=True needs the package tensorboard: pip install -e ".[tensorboard]"') from error
    return SummaryWriter


def require_tensorboard() -> None:
    """Raise BadInput where TensorBoard is missing, before the first epoch."""
    _summary_writer()
