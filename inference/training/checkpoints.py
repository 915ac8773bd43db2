"""Checkpoints: written atomically, verified by a checksum, and read without running code."""

from __future__ import annotations

import hashlib
import io
import os
import pickle
import warnings
import zipfile
from collections import Counter, OrderedDict
from pathlib import Path
from typing import Any

import torch

from ..._version import __version__
from ...errors import BadInput, GumboWarning, first_line
from ...files import write_whole

FORMAT = 1  # increases when the format changes incompatibly in either direction

# A checkpoint is what torch.save writes, a zip archive, with this and a SHA-256 of all before it as the archive's
# comment: torch does not compare the archive's own checksums when it loads.
_SEAL = b"gumbo checkpoint sha256 "
_SEALED = len(_SEAL) + 64

# What torch reads with weights_only=True.
_CONTAINERS = (dict, OrderedDict, Counter, list, tuple, set, torch.Size)
_VALUES = (torch.Tensor, torch.nn.Parameter, torch.dtype, torch.device, bool, int, float, complex, str, bytes)


class DamagedCheckpoint(BadInput):
    """A file whose content differs from what was written."""


def _keep(path: Path, name: Path) -> None:
    """Give a file a second name by a hard link; without hard links, rename it."""
    second = name.with_name(f".{name.name}.partial")
    second.unlink(missing_ok=True)
    try:
        os.link(path, second)
    except OSError:
        os.replace(path, name)
    else:
        os.replace(second, name)
        second.unlink(missing_ok=True)  # replace() leaves it where both names are the same file


def save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Write tensors and plain values with a checksum; ``torch.load(path, weights_only=True)`` also reads the file.

    Raises GumboError where the file cannot be written.
    """
    parts = _sealed(state)
    write_whole(path, lambda file: file.writelines(parts))


def load_checkpoint(path: Path, device: torch.device | str = "cpu") -> dict[str, Any]:
    """Read what :func:`save_checkpoint` wrote, without unpickling code.

    Raises BadInput for a file that is missing, damaged, of another format, or that holds anything but tensors and plain
    values.
    """
    path = Path(path)
    try:
        if path.exists() and not path.is_file():
            raise BadInput(f"{path} is no file: expected a checkpoint")
        content = path.read_bytes()
    except FileNotFoundError:
        raise BadInput(f"no checkpoint at {path}: the run has saved nothing, or its files were moved") from None
    except (OSError, MemoryError) as error:
        raise BadInput(f"cannot read {path}: {getattr(error, 'strerror', None) or type(error).__name__}") from error
    if not _seal_holds(content):
        raise _why_not(path, content)
    state = _load(path, content, device)
    written = state.pop("gumbo", None) if isinstance(state, dict) else None
    if not isinstance(written, dict) or not {"format", "version"} <= set(written):
        raise DamagedCheckpoint(f"{path} is no checkpoint of gumbo, although its checksum holds")
    if written["format"] != FORMAT:
        raise BadInput(
            f"{path} has checkpoint format {written['format']}, of gumbo {written['version']}, and gumbo {__version__} "
            f"reads format {FORMAT}: go on with gumbo {written['version']}, or start again in another folder"
        )
    return state


def _sealed(state: dict[str, Any]) -> tuple[bytes, bytes]:
    """The archive and its seal."""
    _refuse_objects(state, "state")
    buffer = io.BytesIO()
    torch.save({**state, "gumbo": {"format": FORMAT, "version": __version__}}, buffer)
    buffer.seek(-2, io.SEEK_END)
    buffer.write(_SEALED.to_bytes(2, "little"))  # the length of the archive's comment
    content = buffer.getvalue()  # not a view of the buffer, which an interruption may free before the view
    return content, _SEAL + hashlib.sha256(content).hexdigest().encode()


def _refuse_objects(value: Any, name: str) -> None:
    """Raise BadInput for a value that could be written but not read without running code."""
    if isinstance(value, (dict, list, tuple, set)):
        if type(value) not in _CONTAINERS:
            raise BadInput(f"{name} is a {type(value).__name__}, which a checkpoint cannot hold: make it plain")
        named = value.items() if isinstance(value, dict) else enumerate(value)
        for key, part in named:
            _refuse_objects(part, f"{name}[{key!r}]")
    elif not (value is None or type(value) in _VALUES):
        raise BadInput(
            f"{name} is a {type(value).__name__}, which a checkpoint cannot hold: expected tensors and plain values"
        )


def _seal_holds(content: bytes) -> bool:
    return content[-_SEALED:] == _SEAL + hashlib.sha256(memoryview(content)[:-_SEALED]).hexdigest().encode()


def _load(path: Path, content: bytes, device: torch.device | str) -> Any:
    if why := _unfolds(content):
        raise DamagedCheckpoint(f"{path} is damaged: {why}")
    try:
        state = torch.load(io.BytesIO(content), map_location=device, weights_only=True)
    except pickle.UnpicklingError as error:
        raise BadInput(f"{path} holds more than tensors and plain values, which could run code: not loaded") from error
    except Exception as error:  # torch raises errors of any type on a broken archive
        said = first_line(error, kind=True)
        raise DamagedCheckpoint(f"{path} is damaged: torch cannot read it ({said})") from error
    if _parts(state, _MANY) > _MANY:
        raise DamagedCheckpoint(f"{path} is damaged: a few values of it unfold to more than {_MANY}")
    return state


_MANY = 5_000_000  # values in a checkpoint, tensors counted as one


def _unfolds(content: bytes) -> str:
    """What is wrong with a zip archive that is broken or expands beyond its own size; "" for a valid one.

    ``torch.save`` does not compress; a compressed archive is foreign, and a few kilobytes could expand to
    gigabytes.
    """
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            entries = archive.infolist()
    except Exception as error:  # zipfile raises errors of any type on a broken archive
        return f"it is no zip archive ({error})"
    if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
        return "it is compressed, which torch.save does not do"
    if sum(entry.file_size for entry in entries) > len(content):
        return "its parts are larger than the file"
    return ""


def _parts(value: Any, most: int) -> int:
    """The number of values in a container, with repetitions; counting stops beyond ``most``."""
    count, waiting = 0, [value]
    while waiting and count <= most:
        value = waiting.pop()
        count += 1
        if isinstance(value, dict):
            waiting += value.values()
        elif isinstance(value, (list, tuple, set)):
            waiting += value
    return count


def _why_not(path: Path, content: bytes) -> BadInput:
    """What is wrong with a file whose checksum does not match."""
    damaged = DamagedCheckpoint(f"{path} is damaged: its checksum does not hold")
    if _unfolds(content):
        return damaged
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            if archive.testzip() is not None:
                return damaged
        state = _load(path, content, "cpu")
    except DamagedCheckpoint:
        return damaged
    except BadInput as error:
        return error
    except Exception:  # zipfile and torch raise errors of any type on a broken archive
        return damaged
    if isinstance(state, dict) and "gumbo" in state:
        return damaged
    return BadInput(
        f"{path} has no format number and no checksum: it was written by an earlier gumbo than any whose checkpoints "
        "can be read, or by something else; start again in another folder"
    )


class Checkpoints:
    """``last.pt``, the one before it as ``previous.pt``, and ``best.pt``, in one folder."""

    def __init__(self, folder: Path):
        self.last, self.previous, self.best = (folder / f"{name}.pt" for name in ("last", "previous", "best"))
        self._last_is_good = True

    def exist(self) -> bool:
        return self.last.exists() or self.previous.exists()

    def save(self, state: dict[str, Any]) -> None:
        """Write ``last.pt`` and rename the previous one to ``previous.pt``; at every moment one of them is complete."""
        parts = _sealed(state)

        def keep() -> None:
            if self._last_is_good and self.last.exists():
                _keep(self.last, self.previous)

        write_whole(self.last, lambda file: file.writelines(parts), before_move=keep)
        self._last_is_good = True

    def save_best(self, state: dict[str, Any]) -> None:
        save_checkpoint(self.best, state)

    def load(self, device: torch.device | str = "cpu") -> dict[str, Any]:
        """The last checkpoint; if it is damaged or missing, the one before it, with a :class:`GumboWarning`.

        Raises BadInput where neither can be read, or where the last one is intact and cannot be loaded.
        """
        try:
            if self.last.exists() or not self.previous.exists():
                return load_checkpoint(self.last, device)
            trouble = f"{self.last} is missing"
        except DamagedCheckpoint as error:
            trouble = str(error)
            self._last_is_good = False  # so that save() does not overwrite the good one
        if not self.previous.exists():
            raise BadInput(f"{trouble}, and there is no {self.previous.name} beside it: start again in another folder")
        try:
            state = load_checkpoint(self.previous, device)
        except BadInput as error:
            raise BadInput(f"{trouble}, and {error}: start again in another folder") from error
        warnings.warn(f"{trouble}; going on from {self.previous.name}, the one before it", GumboWarning, stacklevel=2)
        return state
