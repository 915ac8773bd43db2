"""A lock for run folders: one process at a time writes into a folder."""

from __future__ import annotations

import contextlib
import os
import threading
import warnings
from pathlib import Path

from ...errors import BadInput, GumboWarning
from ...files import cannot_write

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

NAME = ".lock"

_held: dict[Path, tuple[int, int]] = {}  # this process's locks: thread id and open file by folder


def _leave_to_parent() -> None:
    """Drop the parent's locks in a forked process (a data worker), so that none outlives the parent."""
    for _, file in _held.values():
        with contextlib.suppress(OSError):
            os.close(file)
    _held.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_leave_to_parent)


class FolderInUse(BadInput):
    """A run folder that another fit writes into; ``owner`` is its process, as text."""

    def __init__(self, message: str, owner: str = "another process"):
        super().__init__(message)
        self.owner = owner


class FolderLock:
    """A lock on a run folder, which the system releases when the process ends.

    The thread that holds it may acquire it again (``gumbo train`` holds it around ``fit``): only the first releases it.

    Args:
        folder: the run folder; it is created if missing.
    """

    def __init__(self, folder: Path):
        self.folder = folder.absolute()
        self._mine = False

    def acquire(self) -> None:
        """Lock the folder; raises FolderInUse if another process or thread holds it, GumboError if it is read-only."""
        thread = threading.get_ident()
        if self.folder in _held:
            if _held[self.folder][0] == thread:
                return
            owner = "another fit in this process"
            raise FolderInUse(f"{self.folder} is in use by {owner}: wait, or take another folder", owner)
        file = self._locked()
        _held[self.folder] = thread, file
        self._mine = True

    def _locked(self) -> int:
        path = self.folder / NAME
        while True:
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise cannot_write(path, error) from error
            try:
                file = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
            except OSError as error:
                if not self.folder.exists():  # its last holder has removed it, empty
                    continue
                raise cannot_write(path, error) from error
            try:
                _lock(file)
            except BlockingIOError:
                owner = os.read(file, 100).decode("ascii", "replace").strip() or "another process"
                os.close(file)
                raise FolderInUse(
                    f"{self.folder} is in use by {owner}, which writes into it: wait for it, or take another folder",
                    owner,
                ) from None
            except OSError as error:
                warnings.warn(
                    f"{self.folder} cannot be locked ({error.strerror}): see that no other process writes into it",
                    GumboWarning,
                    stacklevel=3,
                )
            # The previous holder may have removed the file between the opening and the locking.
            if _is_at(file, path):
                with contextlib.suppress(OSError):  # a full disk
                    os.ftruncate(file, 0)
                    os.write(file, f"process {os.getpid()}".encode())
                return file
            os.close(file)

    def release(self) -> None:
        """Release the lock, if this object acquired it."""
        if not self._mine:
            return
        self._mine = False
        if self.folder not in _held:
            return  # a forked process's copy
        _, file = _held.pop(self.folder)
        with contextlib.suppress(OSError):  # the folder may be gone
            (self.folder / NAME).unlink()
        os.close(file)

    def __enter__(self) -> FolderLock:
        self.acquire()
        return self

    def __exit__(self, *error: object) -> None:
        self.release()


def _lock(file: int) -> None:
    if fcntl is not None:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return
    import msvcrt

    try:
        msvcrt.locking(file, msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined]
    except OSError as error:
        raise BlockingIOError from error


def _is_at(file: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file), os.stat(path))
    except FileNotFoundError:
        return False


__all__ = ["FolderInUse", "FolderLock"]
