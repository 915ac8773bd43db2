"""``gumbo inspect`` after ``gumbo train``: files, pictures, verdicts, and refusals in one line."""

from __future__ import annotations

import errno
import json
import os
import re
import tempfile

import numpy as np
import pytest
import torch

from gumbo.errors import BadInput, UnknownName
from gumbo.experiments import cli, inspect_posterior, posterior_plots, train
from gumbo.experiments.posterior_plots import coordinates, one_datum
from gumbo.guides import CombinerGuide
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
    assert set(_arviz.dataset_of(idata, "prior_sbc").dims) >= {"chain", "draw"}
    if "one-hot" in name:
        assert set(np.unique(posterior["y"])) == {0.0, 1.0}  # the discrete pair, not the relaxed one
    expected = {"forest", "trace", "pair", "khat", "posterior_predictive", "calibration", "latent_space"}
    pictures = {path.stem for path in (tmp_path / "run" / "plots").glob("*.png")}
    assert expected <= pictures
    verdict = re.search(r'class="verdict">(.*?)</p>', text := (tmp_path / "run" / "report.html").read_text())[1]
    assert all(name in verdict for name in (*found["alarms"], *found["cannot_say"]))  # the whole sentence
    assert (
        text.index("Verdicts") < text.index("<h2>The training</h2>") < text.index("the true ELBO on the test data is")
    )
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


@pytest.mark.parametrize("verb", ["inspect", "evaluate"])
def test_a_folder_that_cannot_be_written_is_told_before_the_work(verb, tmp_path, capsys, monkeypatch):
    run = trained(tmp_path / "run", RUNS["normal"])

    def refuse(dir):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(dir))

    monkeypatch.setattr(tempfile, "TemporaryFile", refuse)
    monkeypatch.setattr("gumbo.experiments.evaluate.build", lambda *_: pytest.fail("the work began"))
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        cli.main([verb, run])
    said = capsys.readouterr().err
    assert stop.value.code == 1 and said.count("\n") == 1 and f"cannot write {run}: Read-only" in said


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


def axes_of(monkeypatch, draw, *args):
    """The axes of what a function draws, instead of its file."""
    made = []
    monkeypatch.setattr(posterior_plots, "save", lambda figure, path: made.append(figure))
    draw(None, *args)
    return made[0].axes


def test_counts_are_binned_by_whole_numbers():
    counts = np.random.default_rng(0).poisson(40.0, 1000).astype(float)
    edges = posterior_plots.bins(counts, 1)
    assert len(set(np.diff(edges).round(9))) == 1 and (edges * 2 % 2 == 1).all()
    assert edges[0] < counts.min() and edges[-1] > counts.max() and len(edges) <= 32
    means = counts / 64  # means over 64 pixels are whole numbers of sixty-fourths
    np.testing.assert_allclose(posterior_plots.bins(means, 64) * 64, edges)
    assert len(posterior_plots.bins(np.random.default_rng(0).normal(size=100), 1)) == 31


def test_pictures_of_zeros_and_ones(monkeypatch):
    import xarray

    draws = np.zeros((1, 200, 3))
    draws[0, np.arange(200), np.arange(200) % 3 % 2] = 1.0
    posterior = xarray.Dataset({"y": (("chain", "draw", "class"), draws)}, attrs={"local": ""})
    (axis,) = axes_of(monkeypatch, posterior_plots.forest, posterior)
    assert sorted(round(bar.get_width(), 2) for bar in axis.patches) == sorted(draws[0].mean(0).round(2))
    assert "probabilities" in axis.get_title() and axis.get_xlim() == (0.0, 1.0)
    labels = np.array([0, 1, 1, 0])
    means = xarray.Dataset(
        {"z": (("chain", "draw", "data", "dim"), np.random.default_rng(0).normal(size=(1, 9, 4, 2)))}
    )
    (axis,) = axes_of(monkeypatch, posterior_plots.latent_space, means, ["z"], labels)
    assert [text.get_text() for text in axis.get_legend().get_texts()] == ["0", "1"]


def test_pictures_of_classes_show_the_probability_of_each(monkeypatch):
    """An index of a class has no mean; titles of many sites stay within the picture."""
    torch.manual_seed(0)
    model = models["switching-state-space"]((1, 4, 4), **models["switching-state-space"].variants[0])
    guide = CombinerGuide(model)
    idata = to_arviz(model, guide, num_samples=40, groups=["posterior"], **model.example(4))
    draws = _arviz.dataset_of(idata, "posterior")
    shown = posterior_plots.with_indicators(draws)
    classes = int(draws["s1"].max()) + 1
    assert shown["s1"].dims == ("chain", "draw", "data", "s1_class") and shown["z1"].equals(draws["z1"])
    for one in range(classes):
        assert (shown["s1"].values[..., one] == (draws["s1"].values == one)).all()
    assert set(coordinates(one_datum(shown), 99)) >= {f"s1[0, {one}]" for one in range(classes)}
    names = shown.attrs["local"].split(",")
    (axis,) = axes_of(monkeypatch, posterior_plots.latent_space, shown, names, None)
    assert " … " in axis.get_title() and ", 8 sites" in axis.get_title()
    (axis,) = axes_of(monkeypatch, posterior_plots.forest, shown)
    assert max(map(len, axis.get_title().splitlines())) < 60


def test_of_many_observed_sites_a_few_are_drawn(monkeypatch):
    import xarray

    data = np.random.default_rng(0).normal(size=(1, 5, 6, 2))
    drawn = xarray.Dataset({f"x{t}": (("chain", "draw", "data", "dim"), data) for t in range(1, 31)})
    observed = drawn.isel(chain=0, draw=0)
    shown = [axis.get_title() for axis in axes_of(monkeypatch, posterior_plots.predictive, observed, drawn)]
    assert shown == [f"posterior predictive of x{t}" for t in (1, 9, 17, 25)]


def test_the_picture_of_khat_is_of_the_draws_of_the_verdict(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(posterior_plots, "pareto", lambda path, stats, *said: drawn.append(stats) or path)
    run = trained(tmp_path / "run", RUNS["normal"])
    reports = []
    diagnose = __import__("gumbo.inference", fromlist=["diagnose"]).diagnose
    monkeypatch.setattr("gumbo.inference.diagnose", lambda *a, **k: reports.append(diagnose(*a, **k)) or reports[-1])
    inspect_posterior.inspect(inspect_posterior.Inspect(run, **QUICK))
    assert drawn[0] is reports[0].vi_stats


SCOPED = """
import pyro
import pyro.distributions as dist
import torch


def data():
    return torch.linspace(-1, 1, 40).reshape(20, 2)


def model(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("inner/z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)
"""


def test_a_name_that_no_file_can_hold_is_one_line_before_the_diagnosis(tmp_path, capsys, monkeypatch):
    (tmp_path / "scoped_program.py").write_text(SCOPED)
    monkeypatch.syspath_prepend(tmp_path)
    run = {"model": "scoped_program:model", "data": "scoped_program:data", "guide_options": {"hidden": [4]}}
    folder = trained(tmp_path / "run", run)
    capsys.readouterr()
    with pytest.raises(BadInput, match="the name 'inner/z.*' has a slash, which .* takes for a group") as said:
        inspect_posterior.inspect(inspect_posterior.Inspect(folder, trust=True, **QUICK))
    assert "\n" not in str(said.value) and "diagnose" not in capsys.readouterr().err
    assert not (tmp_path / "run" / "posterior.nc").exists()


def test_a_folder_of_a_locale_without_utf8_is_inspected(tmp_path):
    named = tmp_path / "gr\udcc3\udcb6n"  # what Python makes of grön there
    trained(tmp_path / "run", RUNS["normal"])
    (tmp_path / "run").rename(named)
    inspect_posterior.inspect(inspect_posterior.Inspect(str(named), **QUICK))
    assert "the posterior of grön" in (named / "report.html").read_text(encoding="utf-8")
