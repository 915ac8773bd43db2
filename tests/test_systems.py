"""Each of `gumbo system`'s demonstrations, small: it runs, draws its picture, and shows what it claims to show."""

from __future__ import annotations

import json

import numpy as np
import pytest

from gumbo.experiments import systems
from gumbo.experiments.systems import SYSTEMS, System, system


def numbers(found):
    for value in found.values():
        yield from numbers(value) if isinstance(value, dict) else [value]


def shows_gumbel_max(found):
    assert found["log π + g"]["p-value"] > 0.001 > found["log π − g (the slip)"]["p-value"]


def shows_covariance(found):
    assert found["normal"]["gap to log p(x) (nats)"] > 1.0
    assert found["triangular-normal"]["gap to log p(x) (nats)"] < 0.5
    assert found["flow"]["gap to log p(x) (nats)"] < 0.5


def shows_natural_gradient(found):
    steps = found["mean-field Gaussian: steps to 1e-4 nats of the optimum"]
    assert steps.pop("natural gradient") <= 20 and set(steps.values()) == {"over 60"}
    losses = found["diabetes: last training loss (nats per datum)"]
    assert min(losses, key=losses.get) == "natural gradient"


def shows_policy(found):
    assert found["point at ink"]["E[f] under rloo"] > found["point at ink, blind"]["E[f] under rloo"] + 0.2


def shows_regression(found):
    # A Normal of mean 0 and sd 1 for all gives about −1.42.
    assert all(value > -1.35 for value in numbers(found))


def shows_nothing_yet(found):
    """Two epochs are too few for what these show; that they run and draw is what is tested."""


SHOWN = {
    "gumbel-max": shows_gumbel_max,
    "covariance": shows_covariance,
    "natural-gradient": shows_natural_gradient,
    "policy": shows_policy,
    "regression": shows_regression,
    "manifold": shows_nothing_yet,
    "warm-up": shows_nothing_yet,
}


@pytest.mark.parametrize("name", SYSTEMS)
def test_system(name, tmp_path):
    folder = tmp_path / "run"
    found = system(System(name, quick=True, epochs=1 if name in ("manifold", "warm-up") else None, folder=str(folder)))
    assert json.loads((folder / "results.json").read_text()) == found
    assert all(np.isfinite(value) for value in numbers(found) if isinstance(value, float))
    (picture,) = (folder / "plots").glob("*.png")
    assert picture.stat().st_size > 5_000
    SHOWN[name](found)


def test_mistakes_are_one_line(capsys):
    with pytest.raises(SystemExit) as caught:
        systems.main(["warmup"])
    assert caught.value.code == 2
    assert "did you mean 'warm-up'?" in capsys.readouterr().err
