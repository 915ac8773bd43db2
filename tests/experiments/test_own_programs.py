"""`gumbo train --model mypkg:model --guide amortize`: any Pyro program, trained and reopened by the command line."""

from __future__ import annotations

import json
import sys

import pytest

from gumbo.errors import BadInput
from gumbo.experiments import cli
from gumbo.experiments._programs import OwnProgram, amortized, own_model
from gumbo.experiments.train import Train, build
from gumbo.models import models

PROGRAM = """
import pyro
import pyro.distributions as dist
import torch
from pyro.nn import PyroModule

WEIGHT = torch.linspace(-1.0, 1.0, 128).reshape(2, 64)


def model(x):
    with pyro.plate("rows", len(x)):
        z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        pyro.sample("x", dist.Bernoulli(logits=z @ WEIGHT).to_event(1), obs=x.flatten(1))


class Module(PyroModule):
    def __init__(self, width: int = 2):
        super().__init__()
        self.decoder = torch.nn.Linear(width, 64)
        self.width = width

    def forward(self, images, labels=None):
        with pyro.plate("rows", len(images)):
            z = pyro.sample("z", dist.Normal(torch.zeros(self.width), 1.0).to_event(1))
            pyro.sample("images", dist.Bernoulli(logits=self.decoder(z)).to_event(1), obs=images.flatten(1))


def nothing():
    pass
"""
QUICK = ["--epochs=1", "--importance_samples=2", "--guide_options.hidden=[8]"]


@pytest.fixture
def written(tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text(PROGRAM)
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    sys.modules.pop("mine", None)


@pytest.mark.parametrize("name", ["mine:model", "mine:Module"])
def test_a_program_by_import_path_is_trained_and_evaluated_again(name, written, capsys, param_store):
    cli.main(["train", "--model", name, "--guide", "amortize", "--folder", "run", *QUICK])
    found = json.loads((written / "run" / "results.json").read_text())
    assert found["test"]["elbo"] < 0 and found["config"]["guide"] == "amortize"
    capsys.readouterr()
    with pytest.raises(SystemExit):
        cli.main(["evaluate", "run", "--importance_samples=2"])
    assert "--trust" in capsys.readouterr().err
    cli.main(["evaluate", "run", "--importance_samples=2", "--trust"])
    again = json.loads((written / "run" / "evaluation-test.json").read_text())
    assert again["elbo"] == pytest.approx(found["test"]["elbo"], abs=1e-4)


def test_a_model_of_the_collection_may_take_it_too():
    asked = Train(model="gaussian-vae", guide="amortize", model_options={"hidden": [4], "latent_dim": 2})
    _, guide = build(asked, (1, 8, 8))
    assert list(guide.parents) == ["z"] and "convolution" in str(guide)


@pytest.mark.parametrize(
    ("asked", "says"),
    [
        ({"model": "mine:nothing"}, "takes no argument"),
        ({"model": "mine:model", "model_options": {"width": 3}}, "leave model_options out"),
        ({"model": "mine:Module", "model_options": {"widht": 3}}, "no option 'widht'"),
        ({"model": "mine:model", "guide_options": {"sizes": 3}}, "its options: hidden, dependencies, order"),
    ],
)
def test_what_cannot_be_meant_is_one_line(asked, says, written):
    with pytest.raises(BadInput, match=says) as caught:
        build(Train(guide="amortize", **asked), (1, 8, 8))
    assert "\n" not in str(caught.value)


def test_the_guide_is_amortize_where_none_is_named(written):
    own = own_model(models, "mine:model")
    assert isinstance(own, type(lambda: None)) and own_model(models, "gaussian-vae") is None
    model, guide = build(Train(model="mine:model"), (1, 8, 8))
    assert isinstance(model, OwnProgram) and list(model.latents) == ["z"] == list(guide.parents)
    assert callable(amortized)
