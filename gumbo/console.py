"""Standard error as a stream that cannot stop a run, and a standard output whose reader may leave."""

from __future__ import annotations

import contextlib
import io
import os
import sys
from collections.abc import Iterator
from typing import Any, TextIO


class Forgiving:
    """A text stream that ignores write errors.

    Args:
        stream: where to write; None (standard error of a process started without one) writes nothing.

    >>> import io
    >>> closed = io.StringIO()
    >>> closed.close()
    >>> print("lost", file=Forgiving(closed), flush=True)
    """

    def __init__(self, stream: TextIO | None):
        self.stream = stream

    def write(self, text: str) -> int:
        if self.stream is not None:
            try:
                self.stream.write(text)
            except UnicodeEncodeError:
                self.write(text.encode("ascii", "backslashreplace").decode())
            except (OSError, ValueError):  # ValueError: it is closed
                pass
        return len(text)

    def flush(self) -> None:
        if self.stream is not None:
            with contextlib.suppress(OSError, ValueError):
                self.stream.flush()

    def isatty(self) -> bool:
        try:
            return self.stream is not None and self.stream.isatty()
        except (OSError, ValueError):
            return False

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


def standard_error() -> Forgiving:
    """The stream for progress output."""
    return Forgiving(sys.stderr)


@contextlib.contextmanager
def forgiving() -> Iterator[None]:
    """Run a command whose standard error cannot stop it, and whose standard output accepts every character.

    Missing file descriptors are opened on the null device, so that no file opened later gets the number of standard
    error. Without a standard output what is printed is dropped.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            with contextlib.suppress(OSError):
                os.open(os.devnull, os.O_RDWR)
    before, sys.stderr = sys.stderr, Forgiving(sys.stderr)  # type: ignore[assignment]
    output = sys.stdout
    if output is None:
        sys.stdout = Forgiving(None)  # type: ignore[assignment]
    if isinstance(sys.stdout, io.TextIOWrapper):
        with contextlib.suppress(ValueError):  # it is closed
            sys.stdout.reconfigure(errors="backslashreplace")
    try:
        yield
    finally:
        sys.stdout, sys.stderr = output, before


@contextlib.contextmanager
def until_reader_leaves() -> Iterator[None]:
    """End the process with status 1 when the reader of standard output closes the pipe, as ``| head`` does."""
    try:
        try:
            yield
        finally:
            if sys.stdout is not None:
                sys.stdout.flush()
    except BrokenPipeError:
        # Python flushes once more at exit.
        with contextlib.suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(1) from None
