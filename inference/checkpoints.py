"""Files that are whole or not there: checkpoints that load without running code."""

from __future__ import annotations

import os
import pickle
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import torch

from ..errors import BadInput


def write_whole(path: Path, write: Callable[[BinaryIO], None]) -> None:
    """Write a file beside its place, force it to disk, then move it there: a reader sees the old one or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, partial = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".partial")
    try:
        with os.fdopen(handle, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException:
        os.unlink(partial)
        raise


def save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Tensors and plain values, written whole."""
    write_whole(path, lambda file: torch.save(state, file))


def load_checkpoint(path: Path, device: torch.device | str = "cpu") -> dict[str, Any]:
    """What :func:`save_checkpoint` wrote, without unpickling code; BadInput if the file is missing or damaged."""
    try:
        return torch.load(path, map_location=device, weights_only=True)
    except FileNotFoundError:
        raise BadInput(f"no checkpoint at {path}: start the run without resume") from None
    except (RuntimeError, EOFError, pickle.UnpicklingError, ValueError) as error:
        raise BadInput(f"{path} is not a checkpoint that can be read ({type(error).__name__}): remove it") from error
