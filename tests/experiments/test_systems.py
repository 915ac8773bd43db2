"""Each of `gumbo system`'s demonstrations, small: it runs, draws its picture, and shows what it claims to show."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from gumbo.experiments.system import main, system
from gumbo.experiments.systems import systems
from gumbo.experiments.systems.semi_supervised import choose_labelled


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


@pytest.mark.parametrize("name", systems)
def test_system(name, tmp_path):
    folder = tmp_path / "run"
    options = {"epochs": 1} if name in ("manifold", "warm-up") else {}
    found = system(systems[name](quick=True, folder=str(folder), **options))
    assert json.loads((folder / "results.json").read_text()) == found
    assert all(np.isfinite(value) for value in numbers(found) if isinstance(value, float))
    (picture,) = (folder / "plots").glob("*.png")
    assert picture.stat().st_size > 5_000
    SHOWN[name](found)


def test_labelled_images_are_balanced():
    y = torch.arange(10).repeat(20)
    chosen, others = choose_labelled(y, 50, seed=0)
    assert y[chosen].bincount().tolist() == [5] * 10
    assert torch.cat([chosen, others]).sort().values.equal(torch.arange(200))
    assert not choose_labelled(y, 50, seed=1)[0].equal(chosen)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--labels", "55"], "multiple of 10"),
        (["--labels", "100000"], "multiple of 10"),
        (["--seeds", "0"], "at least 1"),
        (["--epochs", "0"], "epochs is 0: expected at least 1"),
    ],
)
def test_semi_supervised_refuses(options, said, tmp_path, capsys):
    with pytest.raises(SystemExit) as caught:
        main(["semi-supervised", "--folder", str(tmp_path / "run"), *options])
    assert caught.value.code == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "error" in line.lower() or said in line]
    assert said in line


def test_mistakes_are_one_line(capsys):
    with pytest.raises(SystemExit) as caught:
        main(["warmup"])
    assert caught.value.code == 2
    assert "did you mean 'warm-up'?" in capsys.readouterr().err


@pytest.mark.parametrize("option", [["--data", "mnist"], ["--labels", "5"], ["--seeds", "2"]])
def test_an_option_that_a_system_does_not_have_is_refused(option, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as caught:
        main(["covariance", *option])
    said = capsys.readouterr().err
    assert caught.value.code == 2 and said.count("\n") == 1 and option[0].lstrip("-") in said
    assert not list(tmp_path.iterdir())


def test_a_new_system_is_one_class(tmp_path, capsys, monkeypatch):
    from dataclasses import dataclass

    from gumbo.experiments.systems import System

    monkeypatch.setattr(systems, "_items", dict(systems._items))

    @systems.register("toy")
    @dataclass
    class Toy(System):
        """A toy.

        Args:
            size: how large it is.
        """

        size: int = 1

        def measure(self, run):
            return {"size": float(self.size)}

    main(["--help"])
    assert "toy" in capsys.readouterr().out and "A toy." in (Toy.__doc__ or "")
    main(["toy", "--size", "3", "--folder", str(tmp_path / "run")])
    assert json.loads((tmp_path / "run" / "results.json").read_text()) == {"size": 3.0}
    main(["toy", "--config", str(tmp_path / "run" / "config.yaml"), "--folder", str(tmp_path / "again")])
    assert json.loads((tmp_path / "again" / "results.json").read_text()) == {"size": 3.0}
