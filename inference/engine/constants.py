"""What a captured graph treats as constant: attributes, layers, methods and hooks of modules."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sized
from contextlib import contextmanager
from types import FunctionType, MethodType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from ...errors import BadInput
from .contents import Contents, is_plain_object, own_classes

ADVICE = "pass compile=False"


Place = tuple[int, str]  # an attribute of a module: the module's id, and the name


@contextmanager
def unmoved(module: nn.Module, replaced: set[Place]) -> Iterator[None]:
    """Restore the attributes of a module and its submodules on exit, and refuse changes that a graph would not repeat.

    Refused are a change of a plain attribute, and of what :class:`.contents.Contents` looks at in the programs. Other
    attributes that now are another object, such as a distribution that the program keeps for its user, are added to
    ``replaced``.
    """
    modules = list(module.modules())
    before = [dict(vars(one)) for one in modules]
    held = [_held(one) for one in modules]
    written = {id(t): t._version for kept in before for t in kept.values() if isinstance(t, Tensor)}
    contents = contents_of(module)
    try:
        yield
        for one, kept in zip(modules, before, strict=True):
            replaced.update((id(one), name) for name, value in vars(one).items() if value is not kept.get(name))
            names = plain_attributes(one) | plain_attributes(one, kept)
            if changed := sorted(name for name in names if _changed(one, kept, name, written)):
                raise _moves(f"{type(one).__name__}.{changed[0]}")
        if (changed := contents.changed()) is not None:
            raise _moves(changed)
    finally:
        for one, kept in zip(modules, before, strict=True):
            vars(one).clear()
            vars(one).update(kept)
        for now, then in (pair for pairs in held for pair in pairs):
            # A tensor of a graph that is being captured has no values; a cache may have gained one.
            if any(isinstance(one, FakeTensor) for one in (now.values() if isinstance(now, dict) else now)):
                now.clear()
                (now.update if isinstance(now, dict) else now.extend)(then)


def _moves(name: str) -> BadInput:
    return BadInput(
        f"{name} changes as the program runs, and a captured graph would not see it: keep it in a buffer, name it in"
        f" the class attribute 'uncaptured' if no result depends on it, or {ADVICE}"
    )


def _held(module: nn.Module) -> list[tuple[Any, Any]]:
    """The lists and dictionaries among a module's own attributes, each with a copy."""
    return [
        (value, dict(value) if isinstance(value, dict) else list(value))
        for name, value in vars(module).items()
        if isinstance(value, (list, dict, deque)) and _is_watched(module, name)
    ]


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


_INTERNAL = frozenset(vars(nn.Module())) - {"training"}


def plain_attributes(module: nn.Module, values: Mapping[str, Any] | None = None) -> set[str]:
    """Names of attributes that a graph treats as constants: numbers, strings, and tensors that are not buffers."""
    values = vars(module) if values is None else values
    return {name for name, value in values.items() if isinstance(value, _PLAIN) and _is_watched(module, name)}


def _is_watched(module: nn.Module, name: str) -> bool:
    # Read from the class: setting it on the instance has no effect; SiteState documents its meaning.
    uncaptured = getattr(type(module), "uncaptured", ())
    return name not in _INTERNAL and name not in uncaptured and not name.startswith("_pyro_")


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
        replaced: attributes that the programs replace as they run, which are not watched; :func:`unmoved` finds them.
    """

    def __init__(self, module: nn.Module | None = None, replaced: Collection[Place] = ()):
        self._values: list[tuple[Mapping[str, Any], Any, Any, int]] = []
        self._sizes: list[tuple[Sized, int]] = []
        self._names: list[tuple[nn.Module, int, set[str]]] = []
        self._contents = contents_of(module)
        self._layouts: list[tuple[Callable[[], Iterable[Tensor]], list[tuple]]] = []
        self._replaced = replaced
        for one in module.modules() if module is not None else ():
            kept, names = vars(one), self._watched_names(one)
            self._names.append((one, len(kept), names))
            self.add(kept, names)
            for held in (one._modules, one._parameters, *(kept[name] for name in _HOOKS)):
                self.add_size(held)
                self.add(held, held, in_place=False)

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
        if any(len(vars(one)) != size and self._watched_names(one) != names for one, size, names in self._names):
            return True
        if any(_layouts_of(tensors()) != before for tensors, before in self._layouts):
            return True
        return self._contents.changed() is not None

    def _watched_names(self, module: nn.Module) -> set[str]:
        found = plain_attributes(module)
        found |= {name for name, value in vars(module).items() if isinstance(value, (FunctionType, MethodType))}
        if own_classes(type(module)):
            others = {name for name in vars(module) if _is_watched(module, name)}
            found |= {name for name in others if (id(module), name) not in self._replaced}
        return found


_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_PLAIN = (int, float, complex, str, tuple, type(None), Tensor)


def contents_of(module: nn.Module | None) -> Contents:
    """What the programs among a module and its submodules read in containers, objects, globals and closures."""
    found = Contents()
    for one in module.modules() if module is not None else ():
        kept, owners = vars(one), own_classes(type(one))
        for owner in owners:
            found.add_entries(vars(owner), [*_plain_names(vars(owner)), *_containers(vars(owner))], owner.__name__)
            for value in vars(owner).values():
                found.add_function(value)
        for value in kept.values():
            found.add_function(value)
        held = _containers(kept) if owners else [name for name in kept if is_plain_object(kept[name])]
        found.add_entries(kept, [name for name in held if _is_watched(one, name)], type(one).__name__)
    return found


def _containers(held: Mapping[str, Any]) -> list[str]:
    """The names of entries that are not plain values but may contain some."""
    return [
        name
        for name, value in held.items()
        if not name.startswith(("__", "_pyro_"))
        and (isinstance(value, (list, tuple, deque, dict, set, frozenset, np.ndarray)) or is_plain_object(value))
    ]


def _plain_names(held: Mapping[str, Any]) -> list[str]:
    return [name for name, value in held.items() if isinstance(value, _PLAIN) and not name.startswith("__")]


def _layouts_of(tensors: Iterable[Tensor]) -> list[tuple]:
    return [(tensor.dtype, tensor.shape, tensor.stride(), tensor.device) for tensor in tensors]


def _version(value: Any) -> int:
    """How often a tensor was written in place, plus one; 0 for other values."""
    return value._version + 1 if isinstance(value, Tensor) else 0
