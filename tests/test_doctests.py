"""Every example in a docstring runs: one test a module, over all packages of gumbo."""

from __future__ import annotations

import doctest
import importlib
import pkgutil
import types
from importlib.util import find_spec

import pyro
import pytest

ROOMS = ("gumbo", "gumbo.models", "gumbo.guides", "gumbo.inference", "gumbo.experiments")
FLAGS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE


def modules() -> list[str]:
    """The names of all modules; the rooms are mapped into gumbo, so each is asked for its own folder."""
    names, waiting = set(), list(ROOMS)
    while waiting:
        package = waiting.pop()
        names.add(package)
        for found in pkgutil.iter_modules(find_spec(package).submodule_search_locations):
            (waiting.append if found.ispkg else names.add)(f"{package}.{found.name}")
    return sorted(names)


def run_doctests(module: types.ModuleType) -> doctest.TestResults:
    """Run the examples of a module with a param store of their own each; failures print their whole story."""
    runner = doctest.DocTestRunner(optionflags=FLAGS)
    for example in doctest.DocTestFinder().find(module):
        with pyro.get_param_store().scope():
            pyro.set_rng_seed(0)
            runner.run(example)
    return doctest.TestResults(runner.failures, runner.tries)


@pytest.mark.parametrize("name", modules())
def test_doctests(name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    result = run_doctests(importlib.import_module(name))
    assert result.failed == 0, capsys.readouterr().out


def test_every_room_is_walked():
    walked = modules()
    for package in (*ROOMS, "gumbo.inference.training.compile"):
        assert package in walked
        assert any(name.startswith(package + ".") for name in walked), package


def test_a_wrong_example_is_seen(capsys):
    module = types.ModuleType("wrong")
    exec('def half(x):\n    """\n    >>> half(2.0)\n    2.0\n    """\n    return x / 2', module.__dict__)
    assert run_doctests(module) == (1, 1)
    assert "half(2.0)" in capsys.readouterr().out


def test_examples_do_not_see_each_others_params():
    module = types.ModuleType("leaky")
    module.__doc__ = """
    >>> import pyro, torch
    >>> "left" in pyro.get_param_store()
    False
    >>> _ = pyro.param("left", torch.ones(1))
    """
    module.__test__ = {"again": module.__doc__}
    assert run_doctests(module) == (0, 6)
    assert "left" not in pyro.get_param_store()
