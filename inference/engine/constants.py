"""What a captured graph treats as constant: the plain attributes of modules."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from ...errors import BadInput

ADVICE = "pass compile=False"


@contextmanager
def unmoved(module: nn.Module) -> Iterator[None]:
    """Restore the attributes of all modules within on exit; a change of a plain one is refused."""
    modules = list(module.modules())
    before = [dict(vars(one)) for one in modules]
    written = {id(t): t._version for kept in before for t in kept.values() if isinstance(t, Tensor)}
    try:
        yield
        for one, kept in zip(modules, before, strict=True):
            names = plain_attributes(one) | plain_attributes(one, kept)
            changed = sorted(name for name in names if _changed(one, kept, name, written))
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


_INTERNAL = set(vars(nn.Module())) - {"training"}


def plain_attributes(module: nn.Module, values: Mapping[str, Any] | None = None) -> set[str]:
    """Names of attributes that a graph treats as constants: numbers, strings, and tensors that are not buffers."""
    values = vars(module) if values is None else values
    plain = (int, float, complex, str, tuple, type(None), Tensor)
    # Read from the class: setting it on the instance has no effect; SiteState documents its meaning.
    skipped = _INTERNAL | frozenset(getattr(type(module), "uncaptured", ()))
    return {
        name
        for name, value in values.items()
        if isinstance(value, plain) and name not in skipped and not name.startswith("_pyro_")
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
    return isinstance(a, Tensor) or isinstance(b, Tensor) or bool(a != b)
