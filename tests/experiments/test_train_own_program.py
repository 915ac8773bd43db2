"""`gumbo train --model mypkg:model --guide amortize`: any Pyro program, trained and reopened by the command line."""

from __future__ import annotations

import json
import math
import sys

import pytest
import yaml

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
GUIDE = """
import pyro
import torch
from torch import nn

from gumbo.guides import Guide
from gumbo.models.families import distribution, families, num_outputs


class Mine(Guide):
    families = tuple(families)

    def __init__(self, model, width: int = 4):
        super().__init__(model, hidden=[width])
        sizes = {site: num_outputs(latent) for site, latent in self.latents.items()}
        self.encoder_heads = nn.ModuleDict({site: nn.Linear(self.encoder.size, size) for site, size in sizes.items()})

    def forward(self, x, **conditions):
        with self.data_plate(x):
            seen = self.features(x, conditions)
            laws = {site: distribution(one, self.encoder_heads[site](seen)) for site, one in self.latents.items()}
            return {site: pyro.sample(site, law) for site, law in laws.items()}


class Nothing(nn.Module):
    def forward(self, x, **conditions):
        return {}


def make(model, width: int = 4):
    return Mine(model, width) if model.latents else Nothing()


def forgotten(model):
    Mine(model)


def data():
    torch.manual_seed(0)
    lengths = torch.tensor([1, 2, 3, 4] * 2)
    x = torch.bernoulli(torch.full((8, 1, 4, 4), 0.5)) * (torch.arange(4) < lengths[:, None])[:, None, :, None]
    return {split: (x, lengths) for split in ("train", "valid", "test")}
"""
SECOND_WAVE = [
    "attend-infer-repeat", "deep-markov-model", "hidden-markov-model", "switching-state-space", "prod-lda",
    "latent-dirichlet-allocation", "poisson-def", "poisson-vae", "negative-binomial-vae", "vector-quantized-vae",
    "sequence-vae", "grid-world",
]  # fmt: skip
QUICK_MODELS = ("attend-infer-repeat", "hidden-markov-model", "grid-world")
QUICK = ["--epochs=1", "--importance_samples=2", "--guide_options.hidden=[8]"]


def folder_of(source):
    """A fixture: the working folder, with that source as the file mine.py."""

    @pytest.fixture
    def folder(tmp_path, monkeypatch):
        (tmp_path / "mine.py").write_text(source)
        monkeypatch.chdir(tmp_path)
        yield tmp_path
        sys.modules.pop("mine", None)

    return folder


written, own_guide = folder_of(PROGRAM), folder_of(GUIDE)


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


@pytest.mark.parametrize(
    ("name", "path"),
    [
        pytest.param(name, path, marks=[] if name in QUICK_MODELS else pytest.mark.slow)
        for number, name in enumerate(SECOND_WAVE)
        for path in ("mine:make", "mine.Mine")[: 1 + (number == 0)]
    ],
)
def test_a_guide_of_the_users_own_is_trained_on_each_model_of_the_second_wave(name, path, own_guide, capsys):
    """From a file of the working folder, a class or a function of the model, with its own option."""
    options = models[name].variants[0]
    latents = models[name]((1, 4, 4), **options).latents.values()
    discrete = any(one.family in ("bernoulli", "categorical", "poisson") for one in latents)
    words = ["--estimator=rloo", "--particles=2"] if discrete else ["--estimator=default"]
    settings = {"model": name, "guide": path, "data": "mine:data", "model_options": dict(options)}
    settings |= {"guide_options": {"width": 3}, "epochs": 1, "batch_size": 4, "importance_samples": 2}
    if name == "attend-infer-repeat":
        settings["anneal"] = {"success": "linear(4, 0.5, 0.1)"}
    (own_guide / "settings.yaml").write_text(yaml.safe_dump(json.loads(json.dumps(settings))))
    cli.main(["train", "--config", "settings.yaml", "--folder", "run", *words])
    found = json.loads((own_guide / "run" / "results.json").read_text())
    assert math.isfinite(found["test"]["elbo"]) and found["config"]["guide"] == path
    cli.main(["evaluate", "run", "--importance_samples=2", "--trust"])
    again = json.loads((own_guide / "run" / "evaluation-test.json").read_text())
    assert again["elbo"] == pytest.approx(found["test"]["elbo"], abs=1e-4)


def test_a_function_that_makes_no_guide_is_one_line(own_guide):
    small = {"latent_dim": 2, "hidden": [4]}
    with pytest.raises(BadInput, match="guide 'mine:forgotten' makes an object of class NoneType: expected a module"):
        build(Train(guide="mine:forgotten", model_options=small), (1, 4, 4))
    with pytest.raises(BadInput, match="guide 'mine:make' has no option 'depth'; its options: width"):
        build(Train(guide="mine:make", model_options=small, guide_options={"depth": 2}), (1, 4, 4))


def test_a_model_of_the_collection_may_take_it_too():
    asked = Train(model="gaussian-vae", guide="amortize", model_options={"hidden": [4], "latent_dim": 2})
    _, guide = build(asked, (1, 8, 8))
    assert list(guide.parents) == ["z"] and "convolution" in str(guide)


def test_a_guide_in_place_of_a_function_that_makes_one_is_told_apart(written):
    with pytest.raises(BadInput, match="cannot be made: TypeError: .*; --guide names a function that makes a guide"):
        build(Train(model="mine:model", guide="mine:model"), (1, 8, 8))  # a program of rows, as a guide's is


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
