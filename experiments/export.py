"""``gumbo export RUN``: the trained programs as safetensors, with their settings."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gumbo.errors import BadInput
from gumbo.experiments._command import run_command
from gumbo.experiments._loading import exported_shape, load, parameters_of, safetensors, save_weights
from gumbo.experiments._runs import WEIGHTS, RunFolder


@dataclass
class Export:
    """Write a run's parameters as safetensors, with the config of its programs; `gumbo.load` reads both.

    Args:
        run: the run's folder.
        folder: the target; by default export/ in the run's folder.
        best: load the parameters of the best epoch instead of the last.
        trust: import the import paths in the run's config.yaml; such code runs with your rights.
    """

    run: str
    folder: str | None = None
    best: bool = False
    trust: bool = False


def export(config: Export) -> dict[str, Any]:
    """Writes ``model.safetensors``, ``config.yaml`` and ``metrics.jsonl``; returns their paths."""
    safetensors()  # a missing package is reported before anything is read
    found = load(config.run, trust=config.trust, best=config.best or None)
    target = Path(config.folder) if config.folder is not None else Path(config.run) / "export"
    if config.folder == "" or "\0" in str(target):
        raise BadInput(f"folder is {config.folder!r}: expected the name of a folder")
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise BadInput(f"{target} exists and is not an empty folder: name another one with --folder")
    try:
        target.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BadInput(f"cannot create {target}: {error.strerror}") from error
    run = RunFolder(target)
    of_best = config.best or found.settings.patience is not None
    exported = RunFolder(Path(config.run))
    unsaved = [] if exported_shape(exported) is not None else sorted(parameters_of(exported, of_best)[1])
    save_weights(found, target / WEIGHTS, unsaved, parameters="best" if of_best else "last")
    run.write_config("train", found.settings, resume=None, folder=None)
    for numbers in found.metrics:
        run.append_metrics(numbers)
    print(f"gumbo export: {WEIGHTS} and config.yaml in {target}", file=sys.stderr)
    return {"weights": str(target / WEIGHTS), "config": str(target / "config.yaml")}


def main(argv: Sequence[str] | None = None, prog: str = "gumbo export") -> None:
    run_command(Export, export, argv, prog)


if __name__ == "__main__":
    main()
