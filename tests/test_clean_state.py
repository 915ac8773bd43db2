"""The fixture `clean_state` fails a test that leaves the process changed, and only that test."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

# Each body is one test; after it comes one that looks whether the damage reached it.
POLLUTERS = {
    "param_store": "pyro.param('left', torch.ones(2))",
    "param_value": "pyro.param('there', torch.ones(2)); pyro.get_param_store()['there'] = torch.zeros(2)",
    "default_dtype": "torch.set_default_dtype(torch.float64)",
    "default_device": "torch.set_default_device('meta')",
    "pyro_validation": "pyro.enable_validation(False)",
    "torch_validation": "torch.distributions.Distribution.set_default_validate_args(False)",
    "settings": "pyro.settings.set(module_local_params=True)",
    "threads": "torch.set_num_threads(2)",
    "deterministic": "torch.use_deterministic_algorithms(True)",
    "cudnn": "torch.backends.cudnn.deterministic = True",
    "grad_mode": "torch.set_grad_enabled(False)",
    "open_handler": "pyro.poutine.trace().__enter__()",
    "directory": "os.chdir('/')",
}

HARMLESS = {
    "seeds": "pyro.set_rng_seed(1); torch.rand(3); np.random.rand(3); random.random()",
    "nothing": "pass",
    "scoped": "with pyro.get_param_store().scope(): pyro.param('p', torch.ones(2))",
    "settings_context": "with pyro.settings.context(module_local_params=True): pass",
}

PRELUDE = """
import os, random
import numpy as np
import pyro, torch
import pytest

state = None

def stream():
    return torch.rand(1).item(), np.random.rand(), random.random()

def randomness():
    return torch.get_rng_state().tolist(), np.random.get_state()[1].tolist(), random.getstate()

@pytest.fixture(scope="module", autouse=True)
def restored():
    before = randomness()
    yield
    assert randomness() == before, "the random state from before the tests is lost"

def test_start():
    global state
    state = stream()
"""

SCOPED = """
def test_fixture_scoped(param_store):
    pyro.param("inside", torch.ones(1))
    assert "inside" in param_store

def test_data(shared_data):
    shared_data("no_such_file.npz")

@pytest.mark.slow
def test_marked_slow():
    raise AssertionError("ran without --slow")

def test_end():
    assert state == stream(), "tests start from different random states"
    assert torch.get_default_dtype() == torch.float32 and torch.is_grad_enabled() and torch.get_num_threads() == 1
    assert not pyro.settings.get("module_local_params") and pyro.settings.get("validate_infer")
    assert not list(pyro.get_param_store())
"""


@pytest.fixture(scope="module")
def report(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("polluters")
    conftest = Path(__file__).with_name("conftest.py").read_text()
    (folder / "conftest.py").write_text(conftest)
    (folder / "pytest.ini").write_text("[pytest]\nmarkers =\n    slow: takes long\n")
    bodies = "".join(f"\ndef test_{name}():\n    {body}\n" for name, body in (POLLUTERS | HARMLESS).items())
    (folder / "test_polluters.py").write_text(PRELUDE + bodies + SCOPED)
    command = [sys.executable, "-m", "pytest", "-rA", "-p", "no:cacheprovider", "-p", "no:xdist", str(folder)]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300)
    assert done.returncode == 1, done.stdout + done.stderr
    return done.stdout


def outcomes(report: str) -> dict[str, set[str]]:
    """{test name: the words of the summary lines about it}; a failing teardown is an ERROR beside the PASSED."""
    found: dict[str, set[str]] = {}
    for word, name in re.findall(r"^(PASSED|FAILED|ERROR|SKIPPED) \S*::test_(\w+)", report, flags=re.M):
        found.setdefault(name, set()).add(word)
    return found


@pytest.mark.parametrize("name", POLLUTERS)
def test_pollution_fails(report, name):
    assert outcomes(report)[name] == {"PASSED", "ERROR"}


@pytest.mark.parametrize("name", [*HARMLESS, "fixture_scoped", "start"])
def test_clean_test_passes(report, name):
    assert outcomes(report)[name] == {"PASSED"}


def test_damage_is_undone_and_random_states_are_set_and_restored(report):
    assert outcomes(report)["end"] == {"PASSED"}, report


def test_failure_names_what_was_left(report):
    assert "left changed: torch default dtype: torch.float32 -> torch.float64" in report
    assert "pyro.settings 'module_local_params': False -> True" in report
    assert "use the fixture `param_store`" in report


def test_slow_and_missing_data_are_skipped_with_a_reason(report):
    assert "slow: give --slow to run it" in report
    assert "needs no_such_file.npz" in report
