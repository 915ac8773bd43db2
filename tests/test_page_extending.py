"""The files of docs/extending.md run as they stand, and the command line takes what they define by import path."""

from __future__ import annotations

import json
import math
import re
import runpy
import sys
from pathlib import Path

import pytest

from gumbo.experiments import cli
from gumbo.experiments.data import datasets
from gumbo.guides import guides
from gumbo.inference.estimators import estimators
from gumbo.inference.objectives import objectives
from gumbo.models import models
from gumbo.models.families import families
from gumbo.models.likelihoods import likelihoods
from gumbo.models.priors import priors

PAGE = Path(__file__).resolve().parents[1] / "docs" / "extending.md"
FILES = dict(re.findall(r"```py\n# (\w+\.py)\n(.*?)```", PAGE.read_text(), re.DOTALL))


@pytest.fixture
def written(tmp_path, monkeypatch):
    """The page's files in the current folder; what they register is taken back."""
    registries = (models, families, likelihoods, priors, guides, estimators, objectives, datasets)
    before = [(registry, dict(registry._items)) for registry in registries]
    for name, body in FILES.items():
        (tmp_path / name).write_text(body)
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    for registry, items in before:
        registry._items.clear()
        registry._items.update(items)
    for name in FILES:
        sys.modules.pop(name.removesuffix(".py"), None)


def test_the_page_has_a_file_for_each_kind():
    assert list(FILES) == ["mymodel.py", "myparts.py", "myguide.py", "myestimator.py", "myobjective.py", "mydata.py"]


@pytest.mark.parametrize("name", FILES)
def test_a_file_runs_as_it_stands(name, written, param_store):
    runpy.run_path(name, run_name="__main__")


def test_the_command_line_takes_a_function_that_makes_a_guide(written, capsys, param_store):
    quick = ["--data", "digits", "--epochs=1", "--batch_size=400", "--importance_samples=2", "--folder", "run"]
    cli.main(["train", "--guide", "myguide:make", *quick])
    assert math.isfinite(json.loads((written / "run" / "results.json").read_text())["test"]["elbo"])


def test_the_command_line_takes_a_prior_and_a_likelihood_by_import_path(written, capsys, param_store):
    parts = ["--model_options.prior=myparts:LaplacePrior", "--model_options.likelihood=myparts:EXPONENTIAL"]
    quick = ["--data", "digits", "--epochs=1", "--batch_size=400", "--importance_samples=2", "--folder", "run"]
    cli.main(["train", *parts, *quick])
    assert math.isfinite(json.loads((written / "run" / "results.json").read_text())["test"]["elbo"])


def test_the_command_line_takes_them_by_import_path(written, capsys, param_store):
    names = [
        "--model",
        "mymodel:PoissonVAE",
        "--guide",
        "myguide:LaplaceGuide",
        "--estimator",
        "myestimator:ClippedScore",
    ]
    options = ["--model_options.latent_dim=2", "--model_options.hidden=4", "--importance_samples=2", "--epochs=1"]
    data = ["--data", "mydata:counts", "--binarize=null", "--folder", "run"]
    cli.main(["train", *names, *options, *data])
    found = json.loads((written / "run" / "results.json").read_text())
    assert math.isfinite(found["test"]["elbo"]) and "log p(x)" in capsys.readouterr().out
