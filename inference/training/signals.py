"""SIGINT and SIGTERM, delayed until a run is at a step boundary."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from ...errors import Interrupted

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interrupts:
    """Inside, a first SIGINT or SIGTERM is recorded in ``pending``; a second one raises KeyboardInterrupt at once.

    Handlers are installed in the main thread only, and the previous handlers are restored on exit; a signal that the
    process ignores stays ignored. A signal that is pending on exit is raised as :class:`Interrupted`.
    """

    def __init__(self, enabled: bool = True):
        self.enabled = enabled and threading.current_thread() is threading.main_thread()
        self.pending: int | None = None
        self._before: dict[int, object] = {}
        self._at_once = self._ignored = False

    def __enter__(self) -> Interrupts:
        if self.enabled:
            for number in _SIGNALS:
                if signal.getsignal(number) not in (signal.SIG_IGN, None):
                    self._before[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]
        if kind is None:
            self.check()

    def check(self) -> None:
        """Raise Interrupted if a signal is pending."""
        if self.pending is not None:
            raise Interrupted(self.pending)

    @contextmanager
    def at_once(self) -> Iterator[None]:
        """Inside, a signal raises Interrupted immediately: for long work without side effects."""
        self.check()
        self._at_once = True
        try:
            yield
        finally:
            self._at_once = False

    @contextmanager
    def ignored(self) -> Iterator[None]:
        """Inside, further signals are ignored: for saving after the first."""
        self._ignored = True
        try:
            yield
        finally:
            self._ignored = False

    def _receive(self, number: int, frame: object) -> None:
        if self._ignored:
            return
        if self.pending is not None:
            raise KeyboardInterrupt
        self.pending = number
        if self._at_once:
            raise Interrupted(number)
