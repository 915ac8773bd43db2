"""Docstrings name each argument of a public class or function in ``Args:``, and no other."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import re
from collections.abc import Callable, Iterator

import pytest

PACKAGES = (
    "gumbo",
    "gumbo.models",
    "gumbo.guides",
    "gumbo.inference",
    "gumbo.inference.estimators",
    "gumbo.inference.objectives",
    "gumbo.testing",
)
# Each class has its own list of options, which the command line and the pages show.
OWN = ("gumbo.models", "gumbo.guides")


def section(owner: object, title: str) -> set[str]:
    """The names in a section of a docstring: those before the first colon of its least indented lines."""
    found = re.search(rf"^{title}:\n((?:    .*\n|\n)+)", (inspect.getdoc(owner) or "") + "\n", re.MULTILINE)
    lines = found[1].splitlines() if found else []
    heads = (line[4:].partition(": ")[0] for line in lines if re.match(r"    [*\w]", line))
    return {name.strip(" *") for head in heads for name in head.split(",")}


def parameters(call: Callable) -> set[str]:
    return set(inspect.signature(call).parameters) - {"self"}


def constructor(cls: type) -> type | None:
    """The class that defines the constructor of ``cls``, or None where that is torch's or Python's."""
    home = next(base for base in cls.__mro__ if "__init__" in vars(base))
    return None if home.__module__.partition(".")[0] in ("torch", "builtins") else home


def faults(value: type | Callable, own: bool) -> tuple[set[str], set[str]]:
    """The arguments that are named nowhere, and the names of what is no argument.

    Where ``own`` is false, a class may leave its options to the docstring of the base that takes them.
    """
    if not isinstance(value, type):
        return parameters(value) - section(value, "Args"), section(value, "Args") - parameters(value)
    home = constructor(value)
    taken = parameters(home.__init__) if home else set()
    named = section(value, "Args")
    if dataclasses.is_dataclass(value):  # its fields are also what is read
        return taken - named - section(value, "Attributes"), named - taken
    bases = [] if own or home is None else value.__mro__[: value.__mro__.index(home) + 1]
    return taken - named.union(*(section(base, "Args") for base in bases)), named - taken


def public() -> Iterator[tuple[str, str]]:
    """The package and the name of each public class and function; an exception's arguments are its maker's."""
    seen = set()
    for package in PACKAGES:
        home = importlib.import_module(package)
        for name in home.__all__:
            value = getattr(home, name)
            error = isinstance(value, type) and issubclass(value, BaseException)
            if (inspect.isclass(value) or inspect.isfunction(value)) and not error and id(value) not in seen:
                seen.add(id(value))
                yield package, name


@pytest.mark.parametrize(("package", "name"), list(public()))
def test_the_arguments_are_those_that_the_docstring_names(package, name):
    missing, unknown = faults(getattr(importlib.import_module(package), name), own=package in OWN)
    assert not missing, f"{name}: not in Args: {sorted(missing)}"
    assert not unknown, f"{name}: in Args and no argument: {sorted(unknown)}"


@pytest.mark.parametrize("registry", ["models.models", "guides.guides", "inference.estimators.estimators"])
def test_registered_classes_name_their_options(registry):
    package, _, word = f"gumbo.{registry}".rpartition(".")
    classes = [found for found in getattr(importlib.import_module(package), word).values() if isinstance(found, type)]
    assert len(classes) > 15
    assert {cls.__name__: faults(cls, own=package in OWN) for cls in classes if any(faults(cls, package in OWN))} == {}


def of_two(first: int, *rest: int, last: int = 0) -> int:
    """A sum.

    Args:
        first: a number.
        rest, end: numbers: some,
            in two lines.

    Returns:
        first: the sum.
    """
    return first + sum(rest) + last


class Base:
    """A base.

    Args:
        size: a number.
    """

    def __init__(self, size: int):
        self.size = size


class Inherits(Base):
    """Another size."""


class Widens(Base):
    """Another size."""

    def __init__(self, size: int, width: int):
        super().__init__(size)


def test_an_argument_that_is_named_nowhere_is_seen():
    assert faults(of_two, own=True) == ({"last"}, {"end"})
    assert faults(Inherits, own=False) == (set(), set())
    assert faults(Inherits, own=True) == ({"size"}, set())
    assert faults(Widens, own=False) == ({"size", "width"}, set())
