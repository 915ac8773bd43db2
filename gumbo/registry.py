"""Names for classes, so that tests, CLI and docs derive from one list."""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping
from typing import Generic, TypeVar

from .errors import BadInput, UnknownName

T = TypeVar("T")


class Registry(Mapping[str, T], Generic[T]):
    """An ordered map from names to things, filled by a decorator.

    >>> shapes = Registry("shape")
    >>> @shapes.register("round")
    ... class Round: ...
    >>> list(shapes), shapes["round"] is Round
    (['round'], True)

    A name with a dot in it is an import path (``mypkg.mymodule.MyClass``, or ``mypkg.mymodule:MyClass``), so that a
    class from somebody else's package needs no registration.
    """

    def __init__(self, kind: str):
        self.kind = kind
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
        if isinstance(name, str) and ("." in name or ":" in name):
            return import_object(name, self.kind)
        raise UnknownName(self.kind, name, self._items)

    def __contains__(self, name: object) -> bool:
        return name in self._items

    def __iter__(self) -> Iterator[str]:
        return iter(self._items)

    def __len__(self) -> int:
        return len(self._items)


def import_object(path: str, kind: str = "object"):
    """The object at ``package.module:name`` or ``package.module.name``."""
    module, _, attribute = path.partition(":") if ":" in path else path.rpartition(".")
    try:
        found = importlib.import_module(module)
    except ImportError as error:
        raise BadInput(f"{kind} {path!r}: cannot import {module!r} ({error})") from error
    try:
        for part in attribute.split("."):
            found = getattr(found, part)
    except AttributeError:
        raise BadInput(f"{kind} {path!r}: module {module!r} has no {attribute!r}") from None
    return found
