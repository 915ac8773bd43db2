"""Atomic writes of files and lines."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

from .errors import GumboError


def cannot_write(path: Path, error: OSError) -> GumboError:
    """A one-line error for a full disk, a folder without write access, a file in place of a folder."""
    said = os.strerror(error.errno) if error.errno else error.strerror or error  # HDF5's own text has many lines
    return GumboError(f"cannot write {path}: {said}; what was written before is still there")


def write_whole(
    path: Path,
    write: Callable[[BinaryIO], object],
    *,
    shared: bool = False,
    before_move: Callable[[], object] | None = None,
) -> None:
    """Write a file under a temporary name, sync it, then rename it: a reader sees the old file or the new one.

    Args:
        path: the file; its folder is created.
        write: called with the open binary file.
        shared: whether several processes may write the file at once, each under a temporary name of its own. Otherwise
            the temporary name is fixed: the next attempt overwrites what a killed run left.
        before_move: called when the new file is on disk, before it replaces the old one.

    Raises:
        GumboError: the disk is full, or the file cannot be written; no partial file is left.
    """
    with _replacement(path, shared) as partial:
        with open(partial, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        if before_move is not None:
            before_move()


def write_by_name(path: Path, write: Callable[[Path], object], size: int = 0) -> None:
    """Like :func:`write_whole` for a library that opens the file itself, as HDF5 does.

    Args:
        path: the file; its folder is created.
        write: called with the temporary name.
        size: bytes that must be free before: HDF5 crashes on a disk that becomes full.

    Raises:
        GumboError: the disk is full, or the file cannot be written; no partial file is left.
    """
    with _replacement(path, shared=True) as partial:
        if shutil.disk_usage(path.parent).free < size:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write(partial)
        _sync(partial, os.O_RDWR)


@contextlib.contextmanager
def _replacement(path: Path, shared: bool) -> Iterator[Path]:
    """The temporary name of a file that takes the place of ``path`` at the end, or is removed at an error."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial" if shared else f".{path.name}.partial")
    try:
        partial.parent.mkdir(parents=True, exist_ok=True)
        yield partial
        os.replace(partial, path)
        _sync_folder(path.parent)
    except OSError as error:
        _remove(partial)
        raise cannot_write(path, error) from error
    except BaseException:
        _remove(partial)
        raise


def append_line(path: Path, line: str) -> None:
    """Append one line in one write, so that lines of several processes do not mix.

    Raises:
        GumboError: the file cannot be written; a partial line (full disk) is removed.
    """
    content = line.encode() + b"\n"
    try:
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
    except OSError as error:
        raise cannot_write(path, error) from error
    try:
        before = os.fstat(handle).st_size
        try:
            written = os.write(handle, content)
            if written < len(content):
                # Writing the rest raises the error of the full disk.
                written += os.write(handle, content[written:])
            if written < len(content):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            if os.fstat(handle).st_size < before + len(content):  # else another process has written since
                os.ftruncate(handle, before)
            raise cannot_write(path, error) from error
    finally:
        os.close(handle)


def _remove(path: Path) -> None:
    with contextlib.suppress(OSError):  # without write access there is no partial file
        path.unlink(missing_ok=True)


def _sync_folder(folder: Path) -> None:
    """Sync a folder, so that a renaming survives a power cut, if the system supports it."""
    if hasattr(os, "O_DIRECTORY"):
        _sync(folder, os.O_DIRECTORY)


def _sync(path: Path, flags: int) -> None:
    handle = os.open(path, flags)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
