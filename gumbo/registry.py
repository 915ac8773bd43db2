"""Registries of classes by name, the single source for tests, CLI and docs."""

from __future__ import annotations

import ast
import functools
import importlib
import inspect
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Generic, TypeVar

from .errors import BadInput, UnknownName

__all__ = ["Registry"]

T = TypeVar("T")


_LIBRARIES = ("torch", "torchvision", "numpy", "scipy", "sklearn", "xarray", "arviz", "matplotlib", "joblib", "yaml")


class Registry(Mapping[str, T], Generic[T]):
    """An ordered map from names to objects, filled by a decorator.

    >>> shapes = Registry("shape")
    >>> @shapes.register("round")
    ... class Round: ...
    >>> list(shapes), shapes["round"] is Round
    (['round'], True)

    A name with a dot is an import path (``mypkg.mymodule.MyClass``, or ``mypkg.mymodule:MyClass``), so that a class of
    another package needs no registration. ``expected`` checks the imported object, and returns the expected kind if it
    is of another.
    """

    def __init__(self, kind: str, expected: Callable[[Any], str] | None = None):
        self.kind, self.expected = kind, expected
        self._items: dict[str, T] = {}

    def register(self, name: str, item: T | None = None):
        def enrol(item: T) -> T:
            if name in self._items and self._items[name] is not item:
                raise BadInput(f"{self.kind} {name!r} is registered twice")
            self._items[name] = item
            return item

        return enrol if item is None else enrol(item)

    def __getitem__(self, name: str) -> T:
        if name in self._items:
            return self._items[name]
        if is_import_path(name):
            return self._of_kind(name)
        raise UnknownName(self.kind, name, self._items)

    def _of_kind(self, path: str) -> T:
        found: Any = import_object(path, self.kind, own=self.expected is not None)
        if self.expected is not None and (wanted := self.expected(found)):
            raise BadInput(f"{self.kind} {path!r} is {describe(found)}: expected {wanted}")
        return found

    def __contains__(self, name: object) -> bool:
        return name in self._items

    def __iter__(self) -> Iterator[str]:
        return iter(self._items)

    def __len__(self) -> int:
        return len(self._items)


def is_import_path(name: object) -> bool:
    """Whether a name is an import path, not a name in a registry.

    Options in a call are not part of the name.

    >>> is_import_path("mypkg:Mine(decay=0.5)"), is_import_path("double-cv(decay=0.5)")
    (True, False)
    """
    return isinstance(name, str) and any(mark in name.partition("(")[0] for mark in ".:")


def name_and_options(kind: str, text: str) -> tuple[str, dict[str, Any]]:
    """The name and the options of ``name(option=value, …)``, whose values are Python literals; a bare name has none.

    >>> name_and_options("estimator", "gumbel-softmax(temperature=0.5)"), name_and_options("estimator", "rloo")
    (('gumbel-softmax', {'temperature': 0.5}), ('rloo', {}))

    Raises BadInput for other texts.
    """
    name, opened, rest = text.partition("(")
    if not opened:
        return text, {}
    problem = BadInput(f"{kind} {text!r} is not {name.strip()}(option=value, …): its options are given by name")
    try:
        call = ast.parse(f"call({rest.strip()}", mode="eval").body
        if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Name) or call.args:
            raise problem
        return name.strip(), {str(keyword.arg): ast.literal_eval(keyword.value) for keyword in call.keywords}
    except (SyntaxError, ValueError) as error:
        raise problem from error


def import_object(path: str, kind: str = "object", own: bool = True):
    """The object at ``package.module:name`` or ``package.module.name``.

    Raises BadInput if it does not exist, if its module fails, and, with ``own``, if it is part of Python's standard
    library, such as ``os.system``.
    """
    module, _, attribute = path.partition(":") if ":" in path else path.rpartition(".")
    if not all(part.isidentifier() for part in (*module.split("."), *attribute.split("."))):
        raise BadInput(f"{kind} {path!r} is no import path: expected package.module:name")
    if own and _is_pythons(module):
        raise BadInput(f"{kind} {path!r} is part of Python's library, which holds no {kind}: name one of your own")
    try:
        found = importlib.import_module(module)
    except ImportError as error:
        raise BadInput(f"{kind} {path!r}: cannot import {module!r} ({error})") from error
    except (Exception, SystemExit) as error:
        raise BadInput(f"{kind} {path!r}: {module!r} fails when imported ({type(error).__name__}: {error})") from error
    try:
        for part in attribute.split("."):
            found = getattr(found, part)
    except (AttributeError, ImportError):
        raise BadInput(f"{kind} {path!r}: module {module!r} has no {attribute!r}") from None
    if own and _is_pythons(home_of(found)):
        raise BadInput(f"{kind} {path!r} is {describe(found)} of Python's library: name one of your own")
    return found


def home_of(thing: Any) -> str:
    """The module in which a function or class is defined, inside any ``functools.partial``; "" for another object."""
    while isinstance(thing, functools.partial):
        thing = thing.func
    thing = getattr(thing, "__func__", thing)
    return str(getattr(thing, "__module__", None) or "") if callable(thing) else ""


def is_librarys(found: Any) -> bool:
    """Whether a function or class belongs to a library whose objects are no programs, loaders or estimators."""
    return home_of(found).split(".")[0] in _LIBRARIES


def takes(function: Callable[..., Any], count: int, only: bool = True) -> bool:
    """Whether a function has that many named positional parameters and, if ``only`` these, needs no others.

    >>> takes(lambda folder, splits: {}, 2), takes(print, 2), takes(lambda *args: {}, 2), takes(lambda *args: {}, 0)
    (True, False, False, False)
    """
    try:
        parameters = list(inspect.signature(function).parameters.values())
    except (TypeError, ValueError):
        return False
    if not count and any(p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD) for p in parameters):
        return False
    places = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    needed = [p for p in parameters if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    alone = not only or set(map(id, needed)) <= set(map(id, places[:count]))
    return len(places) >= count and alone


def _is_pythons(module: str) -> bool:
    return module.split(".")[0] in sys.stdlib_module_names


def describe(thing: Any) -> str:
    """A short description of an object.

    >>> describe(print), describe(int), describe(3)
    ('the function print', 'the class int', 'an object of class int')
    """
    if isinstance(thing, type):
        return f"the class {thing.__name__}"
    if type(thing).__name__ == "module":
        return f"the module {thing.__name__}"
    name = getattr(thing, "__name__", None)
    return f"an object of class {type(thing).__name__}" if name is None else f"the function {name}"
