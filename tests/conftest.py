"""What every test gets: its own random seed, and a failure if it leaves the process other than it found it."""

from __future__ import annotations

import hashlib
import os
import random
import time
from pathlib import Path

# Read by matplotlib when it is imported, here or in a subprocess, so that tests which draw nothing do not load it.
os.environ.setdefault("MPLBACKEND", "Agg")

import numpy as np
import pyro
import pytest
import torch
from pyro.poutine.runtime import _PYRO_STACK

SEED = 20130  # Kingma & Welling's year and a zero; any number would do

# Many small tests on few cores: threads cost more than they give.
torch.set_num_threads(1)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slow", action="store_true", help="also run the tests marked slow")
    parser.addoption(
        "--tenth",
        metavar="COMMIT",
        help="run a tenth of the tests, chosen by a commit's hash, for three minutes",
    )


MOST_WORKERS = 4  # a worker takes most of a gigabyte


@pytest.hookimpl(optionalhook=True)  # the suite also runs without the plugin, on one core
def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """The whole suite runs on all cores; chosen files or tests in this process, where a debugger can stop them."""
    chosen = config.args_source is pytest.Config.ArgsSource.ARGS or config.option.keyword or config.option.usepdb
    return 0 if chosen else min(MOST_WORKERS, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 2)


TENTH_SECONDS = 180


def is_in_tenth(commit: str, test: str) -> bool:
    """Whether a test is among the tenth that a commit runs: about every test comes up within a few dozen commits."""
    return int(hashlib.sha256(f"{commit} {test}".encode()).hexdigest(), 16) % 10 == 0


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.config.getoption("--tenth") and time.monotonic() - item.config.stash[BEGAN] > TENTH_SECONDS:
        pytest.skip(f"the {TENTH_SECONDS} seconds of --tenth are over")


BEGAN = pytest.StashKey[float]()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if commit := config.getoption("--tenth"):
        config.stash[BEGAN] = time.monotonic()
        chosen = [item for item in items if is_in_tenth(commit, item.nodeid)]
        config.hook.pytest_deselected(items=[item for item in items if item not in chosen])
        items[:] = chosen
    if not config.getoption("--slow"):
        for item in items:
            if item.get_closest_marker("slow"):
                item.add_marker(pytest.mark.skip(reason="slow: give --slow to run it"))


def global_state() -> dict[str, object]:
    """Everything a test must leave as it was, by the name that the failure gives it."""
    store = pyro.get_param_store()
    return {
        "Pyro param store": {name: id(store._params[name]) for name in sorted(store._params)},
        "Pyro effect-handler stack": len(_PYRO_STACK),
        **{f"pyro.settings {name!r}": value for name, value in pyro.settings.get().items()},
        "torch default dtype": torch.get_default_dtype(),
        "torch default device": str(torch.get_default_device()),
        "torch grad mode": torch.is_grad_enabled(),
        "torch anomaly mode": torch.is_anomaly_enabled(),
        "torch threads": torch.get_num_threads(),
        "torch float32 matmul precision": torch.get_float32_matmul_precision(),
        "torch deterministic algorithms": torch.are_deterministic_algorithms_enabled(),
        "torch deterministic warn-only": torch.is_deterministic_algorithms_warn_only_enabled(),
        "cudnn deterministic": torch.backends.cudnn.deterministic,
        "cudnn benchmark": torch.backends.cudnn.benchmark,
        "working directory": os.getcwd(),
    }


def restore(state: dict[str, object], store_state: dict) -> None:
    """Put back what a failing test changed, so that only that test fails."""
    pyro.clear_param_store()
    pyro.get_param_store().set_state(store_state)
    del _PYRO_STACK[state["Pyro effect-handler stack"] :]
    settings = (name for name in state if name.startswith("pyro.settings"))
    pyro.settings.set(**{name.split("'")[1]: state[name] for name in settings})
    torch.set_default_dtype(state["torch default dtype"])
    # None, not "cpu": an explicit default device installs a function mode that slows every call.
    torch.set_default_device(None if state["torch default device"] == "cpu" else state["torch default device"])
    torch.set_grad_enabled(state["torch grad mode"])
    torch.set_anomaly_enabled(state["torch anomaly mode"])
    torch.set_num_threads(state["torch threads"])
    torch.set_float32_matmul_precision(state["torch float32 matmul precision"])
    torch.use_deterministic_algorithms(
        state["torch deterministic algorithms"], warn_only=state["torch deterministic warn-only"]
    )
    torch.backends.cudnn.deterministic = state["cudnn deterministic"]
    torch.backends.cudnn.benchmark = state["cudnn benchmark"]
    os.chdir(state["working directory"])


@pytest.fixture(autouse=True)
def clean_state():
    """Seed the test, and fail it if it leaves any of `global_state` changed.

    Set up before every other fixture of the test and taken down after it, so what `monkeypatch`, `param_store` or
    another fixture puts back in time is no fault.
    """
    randomness = torch.get_rng_state(), np.random.get_state(), random.getstate()
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    before, store_state = global_state(), pyro.get_param_store().get_state()
    pyro.set_rng_seed(SEED)
    yield
    torch.set_rng_state(randomness[0])
    torch.cuda.set_rng_state_all(cuda)
    np.random.set_state(randomness[1])
    random.setstate(randomness[2])
    after = global_state()
    if after != before:
        restore(before, store_state)
        changed = "; ".join(
            f"{name}: {before[name]} -> {after[name]}" for name in before if after[name] != before[name]
        )
        advice = " (use the fixture `param_store` where the SVI idiom is meant to fill it)"
        pytest.fail(f"left changed: {changed}{advice if 'param store' in changed else ''}", pytrace=False)


@pytest.fixture
def param_store():
    """A param store of the test's own: what stock `SVI`, or a bare call of a `PyroModule`, writes into goes with it."""
    with pyro.get_param_store().scope():
        yield pyro.get_param_store()


@pytest.fixture
def shared_data():
    """`shared_data("binarized_mnist.npz")` is that file under `GUMBO_DATA`; the test is skipped where it is missing."""

    def find(name: str) -> Path:
        folder = os.environ.get("GUMBO_DATA")
        if not folder:
            pytest.skip(f"needs {name}: set GUMBO_DATA to the folder that holds it")
        path = Path(folder) / name
        if not path.exists():
            pytest.skip(f"needs {name}, which is not under GUMBO_DATA")
        return path

    return find
