"""Whether values that a program reads have changed: elements of containers, objects in objects, globals, closures."""

from __future__ import annotations

import sys
import sysconfig
from argparse import Namespace
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import lru_cache, partial
from types import CellType, CodeType, FunctionType, MethodType, ModuleType, SimpleNamespace
from typing import Any

import numpy as np
from torch import Tensor, nn

Same = Callable[[Any], bool]

UNDIVIDED = (int, float, complex, str, bytes, type(None), np.generic)  # values that hold no others
_LIBRARIES = {"builtins", "gumbo", "numpy", "pyro", "torch", *sys.stdlib_module_names} - {"__main__"}
_INSTALLED = tuple(sysconfig.get_paths()[name] for name in ("stdlib", "purelib", "platlib"))
_CACHED = type(lru_cache(abs))

LARGEST_ARRAY, MOST = 2**20, 2_000  # bytes of an array, and values in all: each is looked at before a step


def is_of_a_library(module_name: str | None) -> bool:
    """Whether a module is Python's or installed, and no part of the user's program.

    >>> is_of_a_library("torch.nn"), is_of_a_library("math"), is_of_a_library("my_program")
    (True, True, False)
    """
    root = (module_name or "").partition(".")[0]
    if root in _LIBRARIES:
        return True
    file = getattr(sys.modules.get(root), "__file__", None)
    return bool(file) and file.startswith(_INSTALLED)


def is_plain_object(value: Any) -> bool:
    """Whether a value is an instance of a class that no library defines, or a namespace, and no module."""
    if isinstance(value, (nn.Module, Tensor, type, ModuleType, FunctionType, MethodType)):
        return False
    if type(value) in (SimpleNamespace, Namespace):
        return True
    return not is_of_a_library(type(value).__module__) and (hasattr(value, "__dict__") or bool(_slots(value)))


class Contents:
    """Values with all that they hold, and whether something in them has changed since.

    Looked at are numbers, text, tensors (writes in place too), arrays of up to a MiB, functions, elements of lists,
    tuples, deques, sets and dictionaries, and attributes of namespaces and of objects whose class no library defines,
    with what its methods read. Not looked at are parameters, elements that a container gains (it may be a cache), and
    what lies beyond the first 2,000 values.

    >>> settings = {"factors": [1.0, 2.0]}
    >>> contents = Contents()
    >>> contents.add("settings", lambda: settings)
    >>> contents.changed()
    >>> settings["factors"][1] = 3.0
    >>> contents.changed()
    'settings'
    """

    def __init__(self):
        self._looks: list[tuple[str, Callable[[], Any], Same]] = []
        self._met: set[int] = set()
        self._kept: list[Any] = []  # an id names an object as long as it lives
        self._left = MOST

    def add(self, name: str, get: Callable[[], Any]) -> None:
        """Look at what a function returns, under a name for messages."""
        same = self._same(get())
        if same is not None:
            self._looks.append((name, get, same))

    def add_entries(self, held: Mapping[str, Any], names: Iterable[str], owner: str = "") -> None:
        """Look at entries of a mapping, such as the globals of a module or the attributes of an ``owner``."""
        for name in names:
            self.add(f"{owner}{'.' * bool(owner)}{name}", lambda name=name: held.get(name))

    def add_function(self, function: Any) -> None:
        """Look at the globals, closure and defaults that a function reads, and those of the functions that it calls."""
        if isinstance(function, partial):
            bound = function
            self.add(f"{_called(bound.func)} (a partial)", lambda: (bound.args, bound.keywords))
            function = bound.func
        function = _underlying(function)
        if function is None or id(function) in self._met or is_of_a_library(function.__module__):
            return
        self._meet(function)
        self.add(f"a default of {_called(function)}", lambda: (function.__defaults__, function.__kwdefaults__))
        names = set(_names_of(function.__code__))
        for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
            self._add_read(name, lambda cell=cell: _content_of(cell), names)
        for name in sorted(names & function.__globals__.keys()):
            self._add_read(name, lambda name=name: function.__globals__.get(name), names)

    def _add_read(self, name: str, get: Callable[[], Any], names: set[str]) -> None:
        """Look at a value that a function reads; of a module or a class, at the ``names`` that are in its code."""
        value = get()
        if isinstance(value, (ModuleType, type)):
            if not is_of_a_library(value.__name__ if isinstance(value, ModuleType) else value.__module__):
                for inner in sorted(names & vars(value).keys()):
                    self._add_read(f"{name}.{inner}", lambda inner=inner: vars(value).get(inner), set())
        else:
            self.add(name, get)

    def changed(self) -> str | None:
        """The name of a value that has changed since it was added; None if there is none."""
        return next((name for name, get, same in self._looks if not same(get())), None)

    def _meet(self, value: Any) -> None:
        self._met.add(id(value))
        self._kept.append(value)

    def _same(self, value: Any) -> Same | None:
        """A test whether a value is as it is now; None where it is not looked at."""
        self._left -= 1
        if self._left < 0:
            return None
        if isinstance(value, nn.Parameter):
            return None
        if isinstance(value, Tensor):
            version = value._version
            return lambda now: now is value and now._version == version
        if isinstance(value, UNDIVIDED):
            return lambda now: now is value or (type(now) is type(value) and now == value)
        if isinstance(value, np.ndarray):
            return _same_array(value) if value.dtype != object and value.nbytes <= LARGEST_ARRAY else None
        if isinstance(value, (set, frozenset)):
            elements = set(value)
            return lambda now: isinstance(now, (set, frozenset)) and elements <= now
        if isinstance(value, partial) or _underlying(value) is not None:
            self.add_function(value)
            return lambda now: now == value
        if id(value) in self._met:  # its content is looked at already
            return lambda now: now is value
        if isinstance(value, (list, tuple, deque, dict)):
            self._meet(value)
            return self._same_elements(value)
        if is_plain_object(value):
            self._meet(value)
            for one in own_classes(type(value)):
                for method in vars(one).values():
                    self.add_function(method)
            kind, same = type(value), self._same_elements(_attributes(value))
            return lambda now: type(now) is kind and same(_attributes(now))
        return None

    def _same_elements(self, held: Any) -> Same:
        kind = type(held)
        pairs = held.items() if isinstance(held, dict) else enumerate(held)
        parts = [(key, same) for key, value in list(pairs) if (same := self._same(value)) is not None]

        def same(now: Any) -> bool:
            if type(now) is not kind:
                return False
            try:
                return all(test(now[key]) for key, test in parts)
            except (KeyError, IndexError):
                return False

        return same


def own_classes(kind: type) -> list[type]:
    """A class and its bases that no library defines."""
    return [one for one in kind.__mro__ if not is_of_a_library(one.__module__)]


def _slots(value: Any) -> list[str]:
    found = [getattr(one, "__slots__", ()) for one in type(value).__mro__]
    return [name for names in found for name in ([names] if isinstance(names, str) else names)]


def _attributes(value: Any) -> dict[str, Any]:
    """The attributes of an object, those in slots too."""
    slots = {name: getattr(value, name) for name in _slots(value) if name != "__weakref__" and hasattr(value, name)}
    return {**slots, **getattr(value, "__dict__", {})}


def _called(function: Any) -> str:
    return getattr(function, "__qualname__", type(function).__name__)


def _same_array(array: np.ndarray) -> Same:
    before, missing = array.copy(), array.dtype.kind in "fc"

    def same(now: Any) -> bool:
        if not isinstance(now, np.ndarray) or now.dtype != before.dtype:
            return False
        return bool(np.array_equal(now, before, equal_nan=missing))

    return same


def closed_over(program: object) -> list[Any]:
    """The values of the variables that a function or a method closes over; None for one that is not assigned yet."""
    return [_content_of(cell) for cell in getattr(getattr(program, "__func__", program), "__closure__", None) or ()]


def _content_of(cell: CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # nothing is in it yet
        return None


def _underlying(value: Any) -> FunctionType | None:
    """The Python function of a function, a method, a property, or a cached function; None of anything else."""
    if isinstance(value, (staticmethod, classmethod, MethodType)):
        value = value.__func__
    elif isinstance(value, property):
        value = value.fget
    elif isinstance(value, _CACHED):
        value = value.__wrapped__
    return value if isinstance(value, FunctionType) else None


def _names_of(code: CodeType) -> Iterator[str]:
    """Names of globals and attributes in a function's code, and in that of functions within."""
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _names_of(constant)
