"""What a captured graph treats as constant: attributes, layers, methods and hooks of modules."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from contextlib import contextmanager
from types import FunctionType, MethodType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from ...errors import BadInput
from .contents import UNDIVIDED, Contents, is_of_a_library, is_plain_object

ADVICE = "pass compile=False"


@contextmanager
def unmoved(module: nn.Module) -> Iterator[None]:
    """Restore the attributes of a module and its submodules on exit, and refuse changes that a graph would not repeat.

    Refused are a change of a plain attribute, and another tensor or number in the place of an element of a list or
    dictionary that a module holds.
    """
    modules = list(module.modules())
    before = [dict(vars(one)) for one in modules]
    held = [_held(one) for one in modules]
    written = {id(t): t._version for kept in before for t in kept.values() if isinstance(t, Tensor)}
    try:
        yield
        for one, kept, contents in zip(modules, before, held, strict=True):
            names = plain_attributes(one) | plain_attributes(one, kept)
            changed = sorted(name for name in names if _changed(one, kept, name, written))
            changed += sorted(name for name, (now, then) in contents.items() if _replaces(now, then))
            if changed:
                raise BadInput(
                    f"{type(one).__name__}.{changed[0]} changes as the program runs, and a captured graph would not see"
                    f" it: keep it in a buffer, name it in the class attribute 'uncaptured' if no result depends on it,"
                    f" or {ADVICE}"
                )
    finally:
        for one, kept in zip(modules, before, strict=True):
            vars(one).clear()
            vars(one).update(kept)
        for now, then in (pair for contents in held for pair in contents.values()):
            # A tensor of a graph that is being captured has no values.
            if _replaces(now, then) or any(isinstance(one, FakeTensor) for one in _elements(now).values()):
                now.clear()
                (now.extend if isinstance(now, list) else now.update)(then)


def _held(module: nn.Module) -> dict[str, tuple[Any, Any]]:
    """The lists and dictionaries among a module's own attributes by name, each with a copy."""
    skipped = _INTERNAL | frozenset(getattr(type(module), "uncaptured", ()))
    return {
        name: (value, value.copy())
        for name, value in vars(module).items()
        if type(value) in (list, dict) and name not in skipped and not name.startswith("_pyro_")
    }


def _elements(held: Any) -> Mapping[Any, Any]:
    return held if isinstance(held, dict) else dict(enumerate(held))


def _replaces(now: Any, before: Any) -> bool:
    """Whether a list or dictionary has another tensor or number in a place; one that grows may be a cache."""
    here, there = _elements(now), _elements(before)
    return any(
        isinstance(here.get(key), (Tensor, *UNDIVIDED)) and differs(here[key], value)
        for key, value in there.items()
        if key in here
    )


def called_with(module: nn.Module, replaced: dict[str, Tensor], *args: Any, **kwargs: Any) -> Any:
    """The result of a call with other parameters and buffers, by the names that they have in the module.

    It is `torch.func.functional_call` for modules that hold one network under two names, as a guide that draws from the
    model's own layers does: torch swaps its tensors once for each name, and restores what it swapped in first. As
    there, ``replaced`` holds the buffers that the call has put in place of the given ones.

    >>> both = nn.ModuleList([layer := nn.Linear(1, 1)] * 2)
    >>> weight = layer.weight
    >>> both.forward = lambda x: both[1](x)
    >>> called_with(both, {"0.weight": torch.zeros(1, 1), "0.bias": torch.ones(1)}, torch.ones(1))
    tensor([1.])
    >>> layer.weight is weight
    True
    """
    places = {
        f"{path}{'.' * bool(path)}{key}": tensor
        for path, part in module.named_modules()  # a module that has two names occurs once
        for held in (part._parameters, part._buffers)
        for key, tensor in held.items()
        if tensor is not None
    }
    given = {id(places[name]): value for name, value in replaced.items()}
    everywhere = {name: given[id(tensor)] for name, tensor in places.items() if id(tensor) in given}
    try:
        return torch.func.functional_call(module, everywhere, args, kwargs, tie_weights=False)
    finally:
        replaced.update({name: everywhere[name] for name in replaced})


_INTERNAL = set(vars(nn.Module())) - {"training"}


def plain_attributes(module: nn.Module, values: Mapping[str, Any] | None = None) -> set[str]:
    """Names of attributes that a graph treats as constants: numbers, strings, and tensors that are not buffers."""
    values = vars(module) if values is None else values
    # Read from the class: setting it on the instance has no effect; SiteState documents its meaning.
    skipped = _INTERNAL | frozenset(getattr(type(module), "uncaptured", ()))
    return {
        name
        for name, value in values.items()
        if isinstance(value, _PLAIN) and name not in skipped and not name.startswith("_pyro_")
    }


def _changed(module: nn.Module, before: Mapping[str, Any], name: str, written: Mapping[int, int]) -> bool:
    now = vars(module).get(name)
    if differs(now, before.get(name)) or (name in vars(module)) != (name in before):
        return True
    return isinstance(now, Tensor) and now._version != written[id(now)]


def differs(a: Any, b: Any) -> bool:
    """Whether two values of a plain attribute differ."""
    if a is b:
        return False
    try:
        return isinstance(a, Tensor) or isinstance(b, Tensor) or bool(a != b)
    except (RuntimeError, ValueError):  # tuples of tensors or arrays
        return True


class Watch:
    """Whether anything has changed that a graph of a module holds as a constant.

    Watched are plain attributes, those of the module's class, layers, parameters as objects, hooks, and methods that
    the instance replaces; of programs that no library defines also what :class:`.contents.Contents` looks at in their
    attributes, and in the globals and closures that their methods read.

    Args:
        module: with all modules in it; None begins with nothing.
    """

    def __init__(self, module: nn.Module | None = None):
        self._values: list[tuple[Mapping[str, Any], Any, Any, int]] = []
        self._sizes: list[tuple[Sized, int]] = []
        self._names: list[tuple[nn.Module, int, set[str]]] = []
        self._contents = Contents()
        self._layouts: list[tuple[Callable[[], Iterable[Tensor]], list[tuple]]] = []
        for one in module.modules() if module is not None else ():
            kept, names = vars(one), _watched_names(one)
            self._names.append((one, len(kept), names))
            self.add(kept, names)
            for held in (one._modules, one._parameters, *(kept[name] for name in _HOOKS)):
                self.add_size(held)
                self.add(held, held, in_place=False)
            owners = _own_classes(type(one))
            for owner in owners:
                self.add(vars(owner), _plain_names(vars(owner)))
                self._contents.add_entries(vars(owner), _containers(vars(owner)))
                for value in vars(owner).values():
                    self._contents.add_function(value)
            for value in kept.values():
                self._contents.add_function(value)
            skipped = _INTERNAL | frozenset(getattr(type(one), "uncaptured", ()))
            held = _containers(kept) if owners else [name for name in kept if is_plain_object(kept[name])]
            self._contents.add_entries(kept, [name for name in held if name not in skipped])

    def add(self, held: Mapping[str, Any], names: Any, in_place: bool = True) -> None:
        """Watch entries of a mapping; where ``in_place``, tensors for writes too."""
        self._values += [(held, name, held[name], _version(held[name]) if in_place else 0) for name in names]

    def add_layouts(self, tensors: Callable[[], Iterable[Tensor]]) -> None:
        """Watch types, shapes and strides of the tensors that a function returns, and their number."""
        self._layouts.append((tensors, _layouts_of(tensors())))

    def add_size(self, held: Sized) -> None:
        """Watch how many entries a container has."""
        self._sizes.append((held, len(held)))

    def sees_a_change(self) -> bool:
        for held, name, value, version in self._values:
            now = held.get(name)
            if (now is not value and differs(now, value)) or (version and now._version + 1 != version):
                return True
        if any(len(held) != size for held, size in self._sizes):
            return True
        if any(len(vars(one)) != size and _watched_names(one) != names for one, size, names in self._names):
            return True
        if any(_layouts_of(tensors()) != before for tensors, before in self._layouts):
            return True
        return self._contents.changed()


_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_PLAIN = (int, float, complex, str, tuple, type(None), Tensor)


def _watched_names(module: nn.Module) -> set[str]:
    functions = {name for name, value in vars(module).items() if isinstance(value, (FunctionType, MethodType))}
    return plain_attributes(module) | functions


def _own_classes(kind: type) -> list[type]:
    """The classes of a module that no library defines."""
    return [one for one in kind.__mro__ if not is_of_a_library(one.__module__)]


def _containers(held: Mapping[str, Any]) -> list[str]:
    """The names of entries that are not plain values but may contain some."""
    return [
        name
        for name, value in held.items()
        if not name.startswith(("__", "_pyro_"))
        and (isinstance(value, (list, tuple, dict, set, frozenset, np.ndarray)) or is_plain_object(value))
    ]


def _plain_names(held: Mapping[str, Any]) -> list[str]:
    return [name for name, value in held.items() if isinstance(value, _PLAIN) and not name.startswith("__")]


def _layouts_of(tensors: Iterable[Tensor]) -> list[tuple]:
    return [(tensor.dtype, tensor.shape, tensor.stride(), tensor.device) for tensor in tensors]


def _version(value: Any) -> int:
    """How often a tensor was written in place, plus one; 0 for other values."""
    return value._version + 1 if isinstance(value, Tensor) else 0
