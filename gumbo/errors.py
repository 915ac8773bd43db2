"""What gumbo raises: each message is one line that names the thing, what was expected and what to do."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class GumboError(Exception):
    """Any error that gumbo raises on purpose; ``str(error)`` is one line."""

    def __init__(self, message: str):
        super().__init__(" ".join(message.split()))


class BadInput(GumboError, ValueError):
    """Data, an argument or a file that cannot be used: a wrong shape, NaN, nothing at all."""


class UnknownName(GumboError, ValueError):
    """A word that the registry does not hold.

    >>> raise UnknownName("estimator", "rlo0", ["rloo", "score"])
    Traceback (most recent call last):
    gumbo.errors.UnknownName: unknown estimator 'rlo0': did you mean 'rloo'? (known: rloo, score)
    """

    def __init__(self, kind: str, name: object, known: Iterable[str]):
        known = sorted(known)
        close = difflib.get_close_matches(str(name), known, n=1)
        hint = f"did you mean {close[0]!r}? " if close else ""
        super().__init__(f"unknown {kind} {name!r}: {hint}(known: {', '.join(known)})")


class UnsupportedSite(GumboError, ValueError):
    """A site that an estimator or an objective cannot serve.

    Attributes: ``site``, ``estimator`` and ``reason`` as strings; ``alternatives``, the estimators that would do.
    """

    def __init__(self, site: str, estimator: str, reason: str, alternatives: Iterable[str] = ()):
        self.site, self.estimator, self.reason = site, estimator, reason
        self.alternatives = tuple(alternatives)
        advice = f"; would do: {', '.join(self.alternatives)}" if self.alternatives else ""
        super().__init__(f"site {site!r} cannot take estimator {estimator!r}: {reason}{advice}")


class CannotVectorize(UnsupportedSite):
    """A program that does not mean the same for K particles at once as for one."""
