"""Each of `gumbo system`'s demonstrations, small: it runs, draws its picture, and shows what it claims to show."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

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


def shows_semi_supervised(found):
    # Chance gives 0.1. Six epochs are too few for what the unlabelled images add.
    assert found["labelled"] == 100 and found["labelled"] + found["unlabelled"] == 1497
    for name in ("supervised", "enumerate", "gumbel-softmax", "rloo"):
        assert found[name]["test accuracy"] == found[name]["seed 0"] > 0.5


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
    "semi-supervised": shows_semi_supervised,
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


def test_labelled_images_are_balanced():
    y = torch.arange(10).repeat(20)
    chosen, others = systems.choose_labelled(y, 50, seed=0)
    assert y[chosen].bincount().tolist() == [5] * 10
    assert torch.cat([chosen, others]).sort().values.equal(torch.arange(200))
    assert not systems.choose_labelled(y, 50, seed=1)[0].equal(chosen)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--labels", "55"], "multiple of 10"),
        (["--labels", "100000"], "multiple of 10"),
        (["--seeds", "0"], "at least 1"),
    ],
)
def test_semi_supervised_refuses(options, said, tmp_path, capsys):
    with pytest.raises(SystemExit) as caught:
        systems.main(["semi-supervised", "--folder", str(tmp_path / "run"), *options])
    assert caught.value.code == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "error" in line.lower() or said in line]
    assert said in line


def test_mistakes_are_one_line(capsys):
    with pytest.raises(SystemExit) as caught:
        systems.main(["warmup"])
    assert caught.value.code == 2
    assert "did you mean 'warm-up'?" in capsys.readouterr().err
