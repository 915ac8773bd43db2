"""Meanings that have changed: each is announced for one version, once in a process, where a program meets it."""

from __future__ import annotations

import warnings

from .errors import MeaningChanged
from .launcher import rank

VERSION = "0.1"  # of these announcements; they go with the next
CHANGES = {
    "log_evidence": "with global latents it is log p(all data) divided by their number; "
    "the mean predictive density of each datum, which it was, is log_predictive",
    "plates": "the default, 'check', found that the rows of plate {plate!r} depend on each other, and sums their "
    "terms, where the default was to trust that they are independent; plates='trust' is as before, and plates='check' "
    "chooses the new meaning without this warning",
}

_announced: set[str] = set()


class Default(str):
    """A default that has changed, which can be told from the same word given by the user."""


def announce(name: str, stacklevel: int = 1, **words: object) -> None:
    """Warn that the meaning of ``name`` has changed, the first time in this process.

    Args:
        name: a key of ``CHANGES``.
        stacklevel: of ``warnings.warn``, counted from the caller.
        words: what the text of the change names.
    """
    if name in _announced or rank() > 0:
        return
    _announced.add(name)
    text = CHANGES[name].format(**words)
    warnings.warn(MeaningChanged(f"the meaning of {name} changed in {VERSION}: {text}"), stacklevel=stacklevel + 1)
