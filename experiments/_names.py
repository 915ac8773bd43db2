"""The names among an experiment's settings, and which of them a command may import.

A name is registered, or it is an import path. Importing a path runs code, so that a path is accepted only if the user
gives it: on this command line, in their own settings file, or in Python. The paths in a run folder are data of its
author, and are accepted with ``--trust``.
"""

from __future__ import annotations

import importlib
import json
import os
import shlex
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

from gumbo.errors import BadInput
from gumbo.registry import Registry, describe, import_object, is_import_path, is_librarys

T = TypeVar("T")

# The settings, of any experiment, that contain names.
NAMES = (
    "model",
    "guide",
    "estimator",
    "estimators",
    "objective",
    "objective_options",
    "data",
    "args",
    "optimizer",
    "model_options",
    "guide_options",
)


def named(registry: Registry[T], name: str) -> T:
    """The object of a name: the lookup of models, guides, estimators and data sets for every verb.

    Import paths are also searched in the current folder, last and only here, so that a stray ``random.py`` shadows
    nothing.
    """
    with current_folder_importable():
        return registry[name]


def named_objective(word: str, options: Mapping[str, Any]) -> Any:
    """The objective of that word or import path with its options; options that are import paths are imported."""
    from gumbo.inference.objectives import as_objective

    paths = {name: text for name, text in options.items() if isinstance(text, str) and is_import_path(text)}
    found = {name: imported(text, f"option {name!r} of the objective") for name, text in paths.items()}
    with current_folder_importable():
        return as_objective(word, {**options, **found})


def imported(path: str, kind: str) -> Any:
    """The object at an import path without a registry, such as the function of ``--args``."""
    with current_folder_importable():
        return import_object(path, kind)


@contextmanager
def current_folder_importable() -> Iterator[None]:
    """Inside, import paths are also searched in the current folder, after all other places."""
    here = os.getcwd()
    importlib.invalidate_caches()  # a module may be new
    sys.path.append(here)
    try:
        yield
    finally:
        for place in reversed(range(len(sys.path))):
            if sys.path[place] == here:
                del sys.path[place]
                break


def program(registry: Registry[Any], name: str) -> Callable[..., Any]:
    """A registered class, or the object of an import path if it may be a Pyro program or make one.

    Raises BadInput for other objects: neither a function nor a module, or part of Python's, torch's or another
    library's own code.
    """
    if not is_import_path(name):
        return registry[name]
    found = imported(name, registry.kind)
    wanted = "a Pyro program: a function, a module, or a class of modules"
    if not callable(found) or (isinstance(found, type) and not _makes_modules(found)) or is_librarys(found):
        raise BadInput(f"{registry.kind} {name!r} is {describe(found)}: expected {wanted}")
    return found


def _makes_modules(found: type) -> bool:
    import torch

    return issubclass(found, torch.nn.Module)


def import_paths(settings: Mapping[str, Any]) -> dict[str, str]:
    """The import paths among an experiment's settings, each with the setting that names it.

    >>> settings = {"model": "gaussian-vae", "data": "shutil.rmtree", "estimator": {"z": "mypkg:Mine"}, "lr": "1.0"}
    >>> sorted(import_paths(settings).items())
    [('mypkg:Mine', 'estimator'), ('shutil.rmtree', 'data')]
    """
    return {text: name for name in NAMES for text in _texts(settings.get(name)) if is_import_path(text)}


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for part in value.values():
            yield from _texts(part)
    elif isinstance(value, (list, tuple)):
        for part in value:
            yield from _texts(part)


def refuse_untrusted(settings: Mapping[str, Any], source: object, own: Mapping[str, Any] | None = None) -> None:
    """Raise BadInput if settings of a run folder have an import path that the user's ``own`` settings lack.

    ``own`` is None where the command has no options for them; otherwise the error names every option that is missing.
    """
    given = import_paths(own or {})
    left = {path: setting for path, setting in import_paths(settings).items() if path not in given}
    if not left:
        return
    flags = dict.fromkeys(_flag(setting, settings[setting]) for setting in left.values())
    advice = "" if own is None else f"name {' '.join(flags)} on this command, or "
    named = ", ".join(f"{setting} {path!r}" for path, setting in left.items())
    paths = "an import path" if len(left) == 1 else "import paths"
    raise BadInput(
        f"{source} names {named}, {paths}, and a run folder is data: nothing is imported; {advice}add --trust "
        "(in Python trust=True) if you trust who wrote it"
    )


def _flag(setting: str, value: Any) -> str:
    """The option of the command line that gives a setting this value."""
    return f"--{setting} {value if isinstance(value, str) else shlex.quote(json.dumps(value))}"


# Prefix of an import path from a run folder while the settings of a command are merged; a path that still has it at the
# end was not given by the user. A character of the private use area, with which no import path can begin.
_MARK = "\ue000"


def marked(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of a run folder with marked import paths, which the user's own values replace.

    The settings carry no trust of their own.
    """
    changed = {name: _mapped(settings[name], _mark) for name in NAMES if name in settings}
    return {name: value for name, value in (dict(settings) | changed).items() if name != "trust"}


def unmarked(settings: Mapping[str, Any], trust: bool) -> dict[str, Any]:
    """The settings of a command without marks; raises BadInput for a remaining mark without trust."""
    bare = {name: _mapped(settings[name], lambda text: text.removeprefix(_MARK)) for name in NAMES if name in settings}
    if not trust:
        own = {name: [text for text in _texts(settings[name]) if not text.startswith(_MARK)] for name in bare}
        refuse_untrusted(bare, "the run's config.yaml", own)
    return {**settings, **bare}


def _mark(text: str) -> str:
    return _MARK + text if is_import_path(text) else text


def _mapped(value: Any, change: Callable[[str], str]) -> Any:
    if isinstance(value, str):
        return change(value)
    if isinstance(value, Mapping):
        return {key: _mapped(part, change) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [_mapped(part, change) for part in value]
    return value
