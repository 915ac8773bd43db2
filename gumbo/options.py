"""Checks of constructor options against their annotations."""

from __future__ import annotations

import collections.abc
import functools
import inspect
import math
import types
import typing
from collections import ChainMap
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import lru_cache
from numbers import Integral, Real
from typing import Any, TypeVar

from .errors import BadInput, did_you_mean

Call = TypeVar("Call", bound=Callable[..., Any])

SIMPLE = (int, float, bool, str, type(None))
KINDS = (collections.abc.Mapping, collections.abc.Callable)
LARGEST = 2**31 - 1  # the largest size; torch's own limits are similar


class ConstructorSignature:
    """``__signature__`` of a class whose ``__new__`` takes whatever its ``__init__`` takes; instances have none.

    Python 3.10 and Sphinx take the signature of a class from ``__new__`` where any base has one.

    >>> class Size:
    ...     __signature__ = ConstructorSignature()
    ...     def __new__(cls, *args, **kwargs): return super().__new__(cls)
    ...     def __init__(self, width: int): ...
    >>> list(inspect.signature(Size).parameters), hasattr(Size(1), "__signature__")
    (['width'], False)
    """

    def __get__(self, instance: Any, owner: Any) -> inspect.Signature:
        if instance is not None:  # it may be callable, with a signature of its own
            raise AttributeError("__signature__")
        if owner.__init__ is object.__init__:
            return inspect.Signature()
        signature = inspect.signature(owner.__init__)
        return signature.replace(parameters=[*signature.parameters.values()][1:])


class Checked:
    """Base of classes whose constructors check their options against the annotations.

    ``int`` and ``float`` are finite numbers (not bool), ``Sequence[int]`` is a sequence of them, ``str``, ``bool`` and
    ``X | None`` have their usual meaning; classes are checked by ``isinstance``, and other annotations are left to the
    class. In the collection's own constructors an ``int`` is a size, at least 1, and a ``float`` a scale, above 0,
    unless ``_ranges`` sets another minimum.
    """

    # The minimum of options that may be less than a size or scale; -inf if the class itself checks the range.
    _ranges: typing.ClassVar[Mapping[str, float]] = {}
    # Options that the class checks itself.
    _unchecked: typing.ClassVar[tuple[str, ...]] = ()
    __signature__ = ConstructorSignature()

    def __new__(cls, *args, **kwargs):
        check_options(cls, args, kwargs)
        return super().__new__(cls)


def with_options(instance: object) -> str:
    """The name of an instance's class with its options: the attributes without a leading underscore, sorted."""
    options = ", ".join(f"{name}={value!r}" for name, value in sorted(vars(instance).items()) if name[:1] != "_")
    return f"{type(instance).__name__}({options})"


def check_options(cls: type, args: tuple, kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a constructor by name, with defaults; the constructor itself reports missing ones.

    Raises BadInput, with the names of the class and the option, for an invalid value.
    """
    if cls.__init__ is object.__init__:
        if args or kwargs:
            raise BadInput(f"{cls.__name__} takes no options")
        return {}
    signature = inspect.signature(cls.__init__)
    try:
        # Partial: a copy or an unpickled object passes no arguments here.
        bound = signature.bind_partial(None, *args, **kwargs)
    except TypeError as error:
        known = ", ".join(list(signature.parameters)[1:]) or "none"
        raise BadInput(f"{cls.__name__}: {error}; its options: {known}") from error
    hints = _hints(cls.__init__)
    ours = (getattr(cls.__init__, "__module__", None) or "").startswith("gumbo.")
    unchecked = getattr(cls, "_unchecked", ())
    ranges = ChainMap(*(vars(base).get("_ranges", {}) for base in cls.__mro__))
    for name, value in list(bound.arguments.items())[1:]:
        if name in hints and name not in unchecked:
            check_option(f"{cls.__name__}: {name}", value, hints[name], ranges.get(name) if ours else -math.inf)
    bound.apply_defaults()
    return dict(list(bound.arguments.items())[1:])


def holds_to_annotations(*left_out: str) -> Callable[[Call], Call]:
    """A decorator that checks a function's numbers, switches, words, mappings and functions against their annotations.

    The function itself checks the ranges of numbers, and its other arguments.
    """

    def decorate(function: Call) -> Call:
        signature, hints = inspect.signature(function), _hints(function)
        plain = {
            name: hints[name]
            for name, parameter in signature.parameters.items()
            if parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
            and name not in left_out
            and all(hint in SIMPLE or typing.get_origin(hint) in KINDS for hint in _choices(hints.get(name, Any)))
        }

        @functools.wraps(function)
        def called(*args, **kwargs):
            for name in plain.keys() & kwargs.keys():
                if name == "seed":
                    if kwargs[name] is not None:
                        check_seed(kwargs[name])
                else:
                    check_option(f"{function.__name__}: {name}", kwargs[name], plain[name], -math.inf)
                if isinstance(kwargs[name], Integral) and not isinstance(kwargs[name], int):
                    kwargs[name] = int(kwargs[name])  # NumPy's overflow in sums
            return function(*args, **kwargs)

        return called  # type: ignore[return-value]

    return decorate


@lru_cache(maxsize=1024)
def _hints(function: Callable[..., Any]) -> dict[str, Any]:
    """The annotations of a function as types, without those that are not checked."""
    while hasattr(function, "__wrapped__"):
        function = function.__wrapped__
    found = {}
    for name, hint in getattr(function, "__annotations__", {}).items():
        if isinstance(hint, str):
            try:
                hint = eval(hint, getattr(function, "__globals__", {}))
            except Exception:  # a name that only a type checker knows
                continue
        found[name] = hint
    return found


def check_option(who: str, value: Any, hint: Any, least: float | None = None) -> None:
    """Raise BadInput unless ``value`` matches the annotation ``hint`` and its numbers are at least ``least``.

    Args:
        who: the class and the option, for the message.
        value: the value.
        hint: a type, as in ``int``, ``Sequence[int]`` or ``float | None``.
        least: the smallest number allowed; None for the default of a size (1) or a scale (above 0).

    >>> check_option("Mine: width", 3, int)
    >>> check_option("Mine: widths", [3, float("nan")], Sequence[int])
    Traceback (most recent call last):
    gumbo.errors.BadInput: Mine: widths is [3, nan]: expected a sequence of whole numbers of at least 1
    """
    if not fits(value, hint, least):
        wanted = " or ".join(dict.fromkeys(_words(one, least) for one in _choices(hint)))
        if isinstance(value, Integral) and int(value) > LARGEST:
            wanted += f", and at most {LARGEST}"
        raise BadInput(f"{who} is {_short(value)}: expected {wanted}")


def check_known(who: str, given: Iterable[str], known: Iterable[str]) -> None:
    """Raise BadInput for the first name among ``given`` that is none of the ``known`` options.

    >>> check_known("prior 'flow'", ["hiden"], ["flow", "hidden"])
    Traceback (most recent call last):
    gumbo.errors.BadInput: prior 'flow' has no option 'hiden'; its options: flow, hidden; did you mean 'hidden'?
    """
    known = list(known)
    for name in given:
        if name not in known:
            near = did_you_mean(name, known, "; ")
            raise BadInput(f"{who} has no option {name!r}; its options: {', '.join(known) or 'none'}{near}")


def check_seed(seed: Any) -> None:
    """Raise BadInput unless torch's generators take the seed.

    >>> check_seed(2**64)
    Traceback (most recent call last):
    gumbo.errors.BadInput: seed is 18446744073709551616: expected a whole number of at least 0, below 2**64
    """
    if not (_is_number(seed) and isinstance(seed, Integral) and 0 <= int(seed) < 2**64):
        raise BadInput(f"seed is {_short(seed)}: expected a whole number of at least 0, below 2**64")


def check_numbers(settings: Mapping[str, Any]) -> None:
    """Raise BadInput for NaN, infinity, or a number too large for a size."""
    for name, value in settings.items():
        if name == "seed":
            check_seed(value)
        elif isinstance(value, float) and not math.isfinite(value):
            raise BadInput(f"{name} is {value}: expected a finite number")
        elif isinstance(value, int) and abs(value) > LARGEST:
            raise BadInput(f"{name} is {value}: expected at most {LARGEST}")
        elif isinstance(value, list):
            for one in value:
                check_numbers({name: one})


def _choices(hint: Any) -> tuple[Any, ...]:
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return tuple(part for one in typing.get_args(hint) for part in _choices(one))
    return (hint,)


def fits(value: Any, hint: Any, least: float | None = None) -> bool:
    """Whether ``value`` matches the annotation; the arguments are those of :func:`check_option`."""
    hints = _choices(hint)
    if len(hints) > 1:
        return any(fits(value, one, least) for one in hints)
    origin, parts = typing.get_origin(hint), typing.get_args(hint)
    if hint is None or hint is type(None):
        return value is None
    if hint is bool:
        return isinstance(value, bool) or type(value).__name__ in ("bool_", "bool")
    if hint is int:
        return (
            _is_number(value)
            and isinstance(value, Integral)
            and (1 if least is None else least) <= int(value) <= LARGEST
        )
    if hint is float:
        return _is_number(value) and math.isfinite(value) and (value > 0 if least is None else value >= least)
    if origin is collections.abc.Sequence:
        if isinstance(value, (str, bytes)) or not isinstance(value, Sequence):
            return False
        return all(fits(one, parts[0], least) for one in value)
    if origin is collections.abc.Mapping:
        if not isinstance(value, Mapping):
            return False
        return all(fits(key, parts[0], least) and fits(one, parts[1], least) for key, one in value.items())
    if origin is collections.abc.Callable:
        return callable(value)
    return hint is Any or not isinstance(hint, type) or isinstance(value, hint)


def _is_number(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


def _words(hint: Any, least: float | None) -> str:
    origin, parts = typing.get_origin(hint), typing.get_args(hint)
    if hint is None or hint is type(None):
        return "None"
    if hint is bool:
        return "True or False"
    if hint is int:
        bound = 1 if least is None else least
        return "a whole number" + ("" if bound == -math.inf else f" of at least {bound:g}")
    if hint is float:
        bound = "" if least == -math.inf else " above 0" if least is None else f" of at least {least:g}"
        return f"a finite number{bound}"
    if origin is collections.abc.Sequence:
        return "a sequence of " + _words(parts[0], least).removeprefix("a ").replace("number", "numbers", 1)
    if origin is collections.abc.Mapping:
        return f"a mapping from {_words(parts[0], least)} to {_words(parts[1], least)}"
    if origin is collections.abc.Callable:
        return "a function"
    if hint is str:
        return "a string"
    return f"a {hint.__name__}" if isinstance(hint, type) else "another value"


def _short(value: Any) -> str:
    try:
        text = " ".join(repr(value).split())
    except Exception:
        text = f"a {type(value).__name__}"
    return text if len(text) <= 60 else f"{text[:57]}…"


__all__ = [
    "Checked",
    "check_known",
    "check_numbers",
    "check_option",
    "check_options",
    "check_seed",
    "fits",
    "holds_to_annotations",
]
