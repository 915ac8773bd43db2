"""gumbo's exceptions: each message is one line with the name of the object, the expected value and the remedy."""

from __future__ import annotations

import difflib
import signal
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

__all__ = [
    "BadInput",
    "CallsAutograd",
    "CannotVectorize",
    "GumboError",
    "GumboWarning",
    "Interrupted",
    "MeaningChanged",
    "Refusal",
    "TooFewParticles",
    "UnknownName",
    "UnsupportedSite",
]


class GumboError(Exception):
    """Base of all errors that gumbo raises deliberately; ``str(error)`` is one line."""

    def __init__(self, message: str):
        # Pyro recreates errors that pass through a trace, from their message and a table of shapes.
        super().__init__(" ".join(message.split("Trace Shapes:")[0].split()))


class BadInput(GumboError, ValueError):
    """Data, an argument or a file that cannot be used: a wrong shape, NaN, empty data."""


def did_you_mean(name: object, known: Iterable[str], before: str) -> str:
    """The question for the nearest known name, after the text ``before``; nothing if none is near.

    >>> did_you_mean("hiden", ["hidden", "latent_dim"], "; "), did_you_mean("depth", ["hidden"], "; ")
    ("; did you mean 'hidden'?", '')
    """
    close = difflib.get_close_matches(str(name), list(known), n=1)
    return f"{before}did you mean {close[0]!r}?" if close else ""


MOST_KNOWN = 14  # names that an error lists; of more it says where they are listed
MOST_ALTERNATIVES = 6
LISTED = {"model": "models", "guide": "guides", "estimator": "estimators", "objective": "objectives", "dataset": "data"}


def shortened(words: Sequence[str], most: int) -> str:
    """The first words, and how many more there are.

    >>> shortened(["rloo", "score", "arm"], 2)
    'rloo, score and 1 more'
    """
    more = f" and {len(words) - most} more" if len(words) > most else ""
    return ", ".join(words[:most]) + more


class UnknownName(GumboError, ValueError):
    """A word that is not in the registry.

    >>> raise UnknownName("estimator", "rlo0", ["rloo", "score"])
    Traceback (most recent call last):
    gumbo.errors.UnknownName: unknown estimator 'rlo0': did you mean 'rloo'? (known: rloo, score)
    """

    def __init__(self, kind: str, name: object = None, known: Iterable[str] = ()):
        if not known:
            super().__init__(kind)
            return
        known = sorted(known)
        said = f"known: {', '.join(known)}"
        if len(known) > MOST_KNOWN:
            said = (
                f"`gumbo list {LISTED[kind]}` shows all" if kind in LISTED else shortened(said.split(", "), MOST_KNOWN)
            )
        near = did_you_mean(name, known, before=": ")
        super().__init__(f"unknown {kind} {name!r}{near} ({said})")


# Errors that programs raise for arguments, dimensions or rows that they do not support; a NotImplementedError is a
# RuntimeError.
PROGRAM_ERRORS = (RuntimeError, ValueError, IndexError, TypeError, AssertionError)


@contextmanager
def rows_in_plates() -> Iterator[None]:
    """Turn Pyro's division by the size of an empty plate into a BadInput that says that the data are empty."""
    try:
        yield
    except ZeroDivisionError as error:
        if "size cannot be zero" not in str(error):
            raise
        raise BadInput("the data are empty: a plate has no rows, expected at least one") from error


def first_line(error: BaseException, kind: bool = False) -> str:
    """The first line of an error's message; its class name if there is none, and as a prefix with ``kind``.

    >>> first_line(ValueError("no rows\\nat all")), first_line(KeyError()), first_line(ValueError("no rows"), kind=True)
    ('no rows', 'KeyError', 'ValueError: no rows')
    """
    name, said = type(error).__name__, str(error).strip().splitlines()
    if not said:
        return name
    return f"{name}: {said[0]}" if kind else said[0]


def raised_here(error: BaseException) -> bool:
    """Whether this package's own code raised an error, or one that led to it; not a library that it calls.

    >>> raised_here(ValueError("never raised"))
    False
    """
    package, link = __name__.partition(".")[0], error
    while link is not None:
        frame = link.__traceback__
        while frame is not None and frame.tb_next is not None:
            frame = frame.tb_next
        if frame is not None and frame.tb_frame.f_globals.get("__name__", "").partition(".")[0] == package:
            return True
        link = link.__cause__ or link.__context__
    return False


PROGRAM = "(program)"  # used as the site when the whole program is refused
ANY = "any"  # used as the estimator when every one would be refused
DEFAULT = "default"  # used as the estimator when none is chosen


class Refusal(str):
    """Why a site is not supported: the text of the reason, with the site and the estimator.

    ``why_not`` of an estimator returns one, or a plain string, or None; :meth:`error` makes the exception.

    Attributes: ``reason``; ``site`` and ``estimator`` as names, or "" and ``"any"``; ``alternatives``, the estimators
    that support the site.

    >>> refusal = Refusal("it needs a Bernoulli site", site="z", estimator="arm")
    >>> str(refusal), refusal.site
    ("site 'z': it needs a Bernoulli site", 'z')
    >>> Refusal("it needs a Bernoulli site").about("z", "arm", ["pathwise"]).error().alternatives
    ('pathwise',)
    """

    reason: str
    site: str
    estimator: str
    alternatives: tuple[str, ...]

    def __new__(cls, reason: str, site: str = "", estimator: str = ANY, alternatives: Iterable[str] = ()):
        reason = getattr(reason, "reason", reason)
        made = super().__new__(cls, f"site {site!r}: {reason}" if site else reason)
        made.reason, made.site, made.estimator, made.alternatives = reason, site, estimator, tuple(alternatives)
        return made

    def about(self, site: str, estimator: str = ANY, alternatives: Iterable[str] = ()) -> Refusal:
        """The same reason for a site and an estimator."""
        return Refusal(self.reason, site, estimator, alternatives)

    def error(self) -> UnsupportedSite:
        """The exception for this reason."""
        return UnsupportedSite(self.site or PROGRAM, self.estimator, self.reason, self.alternatives)


class UnsupportedSite(GumboError, ValueError):
    """A site that an estimator or an objective does not support.

    Attributes: ``site``, ``estimator`` and ``reason`` as strings; ``alternatives``, the estimators that support it.

    >>> raise UnsupportedSite("z", "arm", "it needs a Bernoulli site", ["pathwise"])
    Traceback (most recent call last):
    gumbo.errors.UnsupportedSite: site 'z' cannot take estimator 'arm': it needs a Bernoulli site; would do: pathwise
    """

    def __init__(self, site: str, estimator: str = ANY, reason: str = "", alternatives: Iterable[str] = ()):
        if not reason:
            site, reason = PROGRAM, site
        self.site, self.estimator, self.reason = site, estimator, reason
        self.alternatives = tuple(alternatives)
        named = estimator not in (ANY, DEFAULT)
        what = f"site {site!r} cannot take estimator {estimator!r}" if named else f"site {site!r}"
        if site == "*":  # the word for all sites that have none of their own, refused before a site is seen
            what = f"estimator {estimator!r}"
        advice = f"; would do: {shortened(self.alternatives, MOST_ALTERNATIVES)}" if self.alternatives else ""
        if len(self.alternatives) > MOST_ALTERNATIVES:
            advice += " (`gumbo list estimators` shows all)"
        if estimator == DEFAULT:
            advice = ""  # the reason names one
        super().__init__(f"{reason}{advice}" if site == PROGRAM else f"{what}: {reason}{advice}")

    @property
    def refusal(self) -> Refusal:
        """The reason as a value, for tables."""
        return Refusal(self.reason, "" if self.site == PROGRAM else self.site, self.estimator, self.alternatives)


class TooFewParticles(UnsupportedSite, BadInput):
    """Too few particles for an estimator that compares particles."""


class CannotVectorize(UnsupportedSite):
    """A program whose log-probabilities change when K particles run at once."""


class CallsAutograd(BadInput):
    """A program that computes derivatives as it runs, of a tensor that has no gradient in this run."""


class GumboWarning(UserWarning):
    """gumbo's warnings; ``str(warning)`` is one line."""


class MeaningChanged(GumboWarning, FutureWarning):
    """The meaning of a name has changed; warned for one version, once in a process, where a program meets the change.

    >>> import warnings
    >>> warnings.filterwarnings("ignore", category=MeaningChanged)  # for programs that know
    """


class Interrupted(KeyboardInterrupt):
    """A run that a signal has stopped, after it was saved; ``str(error)`` is one line with the command to resume.

    Attributes: ``signal``, the signal's number; ``where``, the epoch and step as text; ``status``, the exit status of a
    process that ends because of it.

    >>> error = Interrupted(signal.SIGTERM, "epoch 3, step 120", "; saved")
    >>> str(error), error.status
    ('interrupted by SIGTERM at epoch 3, step 120; saved', 143)
    """

    def __init__(self, number: int, where: str = "", advice: str = ""):
        super().__init__(f"interrupted by {signal.Signals(number).name}{where and f' at {where}'}{advice}")
        self.signal, self.where, self.status = number, where, 128 + number
