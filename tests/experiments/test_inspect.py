"""``gumbo inspect`` after ``gumbo train``: files, pictures, verdicts, and refusals in one line."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from gumbo.errors import BadInput, UnknownName
from gumbo.experiments import cli, inspect_posterior, train
from gumbo.experiments.posterior_plots import coordinates, one_datum
from gumbo.inference import to_arviz
from gumbo.inference.posterior import _arviz
from gumbo.models import models

# ArviZ, h5netcdf and matplotlib deprecate parts of each other.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")

QUICK = {"num_data": 6, "num_samples": 120, "num_simulations": 20, "refine_steps": 5}
RUNS = {
    "normal": {"model": "gaussian-vae", "model_options": {"latent_dim": 2, "hidden": [8]}},
    "one-hot, trained relaxed": {
        "model": "categorical-vae",
        "model_options": {"num_latents": 2, "num_classes": 3, "hidden": [8], "relaxed": True},
    },
    "two layers": {
        "model": "sigmoid-belief-network",
        "model_options": models["sigmoid-belief-network"].variants[1],
        "estimator": "rloo",
    },
}


def trained(folder, settings):
    config = train.Train(**settings, epochs=1, batch_size=400, importance_samples=2, folder=str(folder))
    train.train(config)
    return str(folder)


@pytest.mark.parametrize("name", RUNS)
def test_inspect_writes_the_posterior_its_verdicts_and_pictures(name, tmp_path, capsys):
    run = trained(tmp_path / "run", RUNS[name])
    capsys.readouterr()
    found = inspect_posterior.inspect(inspect_posterior.Inspect(run, **QUICK))
    idata = _arviz.load(tmp_path / "run" / "posterior.nc")
    posterior = _arviz.dataset_of(idata, "posterior")
    assert posterior.sizes["draw"] == 120 and posterior.sizes["data"] == 6
    if "one-hot" in name:
        assert set(np.unique(posterior["y"])) == {0.0, 1.0}  # the discrete pair, not the relaxed one
    expected = {"forest", "trace", "pair", "khat", "posterior_predictive", "calibration", "latent_space"}
    pictures = {path.stem for path in (tmp_path / "run" / "plots").glob("*.png")}
    assert expected <= pictures
    saved = json.loads((tmp_path / "run" / "diagnosis.json").read_text())
    assert saved["alarms"] == found["alarms"] and set(saved["alarms"]) <= set(saved["verdicts"])
    said = capsys.readouterr().out
    assert said.strip() == (tmp_path / "run" / "diagnosis.txt").read_text().strip()


def test_inspect_refuses_in_one_line(tmp_path, capsys):
    with pytest.raises(UnknownName, match="split"):
        inspect_posterior.inspect(inspect_posterior.Inspect(str(tmp_path), split="tests"))
    with pytest.raises(BadInput, match="not a run folder"):
        inspect_posterior.inspect(inspect_posterior.Inspect(str(tmp_path)))
    with pytest.raises(SystemExit):
        cli.main(["inspect", str(tmp_path / "nowhere")])
    assert capsys.readouterr().err.count("\n") == 1


def test_pictures_show_one_datum_and_what_varies_most():
    model = models["gaussian-vae"]((1, 4, 4), latent_dim=3, hidden=(4,))

    def guide(x):
        import pyro
        import pyro.distributions as dist

        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(torch.zeros(3), torch.tensor([0.1, 2.0, 1.0])).to_event(1))

    inputs = model.example(4)
    posterior = _arviz.dataset_of(to_arviz(model, guide, num_samples=50, **inputs), "posterior")
    shown = coordinates(one_datum(posterior), 2)
    assert list(shown) == ["z[0, 1]", "z[0, 2]"] and shown["z[0, 1]"].shape == (1, 50)
