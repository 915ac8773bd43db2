"""One file and one registration add a model, guide, estimator, family or objective: everything else picks it up."""

from __future__ import annotations

import importlib.util
import sys
import warnings

import pytest

from gumbo.errors import BadInput
from gumbo.experiments import listing
from gumbo.guides import fitting, guides
from gumbo.inference import SiteELBO, audit, fit
from gumbo.inference.estimators import estimators
from gumbo.inference.objectives import objectives
from gumbo.models import Latent, models
from gumbo.models.families import families
from gumbo.testing import check_estimator, check_guide, check_model, check_objective

REGISTRIES = (models, guides, estimators, families, objectives)

MODEL = '''
import math

import pyro
import pyro.distributions as dist
from torch import nn

from gumbo.models import GenerativeModel, Latent, models


@models.register("toy")
class Toy(GenerativeModel):
    """Two Normal latents, and Normal data around a linear map of them."""

    def __init__(self, data_shape):
        super().__init__(data_shape)
        self.latents = {"z": Latent("normal", (2,))}
        self.decoder = nn.Linear(2, math.prod(self.data_shape))

    def forward(self, x=None, *, batch_size=1):
        with self.data_plate(x, batch_size):
            zeros = self.decoder.bias.new_zeros(2)
            z = pyro.sample("z", dist.Normal(zeros, 1.0).to_event(1))
            mean = self.decoder(z).unflatten(-1, self.data_shape)
            return pyro.sample("x", dist.Normal(mean, 1.0).to_event(len(self.data_shape)), obs=x)
'''

GUIDE = '''
from gumbo.guides import guides
from gumbo.guides._base import FactorizedGuide
from gumbo.models.families import distribution


@guides.register("toy")
class ToyGuide(FactorizedGuide):
    """Normals of standard deviation at least 1/10."""

    families = ("normal",)

    def distribution(self, latent, output):
        return distribution(latent, output, min_sd=0.1)
'''

ESTIMATOR = '''
from gumbo.inference.estimators import estimators
from gumbo.inference.estimators._base import Estimator, detached_draw, score_why_not


@estimators.register("toy")
class Toy(Estimator):
    """The score function, with nothing taken off its cost."""

    log_q = "value"

    def why_not(self, site):
        return score_why_not(site)

    def draw(self, fn, step, args=(), kwargs=None):
        return detached_draw(fn, args, kwargs)

    def surrogate(self, view):
        return view.cost * view.log_prob
'''

FAMILY = """
import pyro.distributions as dist
from torch.distributions import constraints
from torch.nn.functional import softplus

from gumbo.models.families import Family, families


def make(latent, output, *, min_sd=1e-4, **_):
    rank = len(latent.shape)
    loc, raw = output.unflatten(-1, (2, *latent.shape)).unbind(-1 - rank)
    return dist.Laplace(loc, softplus(raw) + min_sd).to_event(rank)


def standard(latent, zero):
    return dist.Laplace(zero.expand(latent.shape), 1.0).to_event(len(latent.shape))


families.register("toy", Family(constraints.real, make, standard, outputs=2))
"""


OBJECTIVE = '''
from gumbo.inference.objectives import objectives
from gumbo.inference.objectives.evidence import EvidenceLowerBound


@objectives.register("toy")
class ToyBound(EvidenceLowerBound):
    """Twice the evidence lower bound."""

    name = "toy"

    def accepts(self, estimator):
        return "elbo" in estimator.objectives

    def value(self, recorded):
        return 2 * super().value(recorded)
'''


@pytest.fixture
def add(tmp_path):
    """`add(source)` imports a file of its own with that source; what it registers is forgotten afterwards."""
    before = [dict(registry._items) for registry in REGISTRIES]

    def run(source):
        path = tmp_path / "addition.py"
        path.write_text(source)
        spec = importlib.util.spec_from_file_location("addition", path)
        sys.modules["addition"] = module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)

    yield run
    sys.modules.pop("addition", None)
    for registry, items in zip(REGISTRIES, before, strict=True):
        registry._items = items


def pair(guide=None, shape=(1, 4, 4)):
    model = models["toy"](shape)
    return model, guides[guide or fitting(model)[0]](model)


def listed():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return listing.catalogue(["toy"])


def trains(model, guide, word):
    x = model.example(8)["x"]
    return fit(model, guide, x, loss=word, epochs=2, batch_size=4, seed=0)


def test_a_model(add):
    add(MODEL)
    model, guide = pair()
    x = model.example(4)["x"]
    check_model(model, x)
    check_guide(guide, model, x)
    found = listed()
    assert found["models"]["toy"]["latents"] == {"z": {"family": "normal", "shape": [2]}}
    valid = {(row["guide"], row["estimator"]) for row in found["combinations"] if not row["reason"]}
    assert {("normal", "pathwise"), ("triangular-normal", "stl"), ("normal", "trace")} <= valid
    assert trains(model, guide, "pathwise").history


def test_a_guide(add):
    add(MODEL + GUIDE)
    assert "toy" in fitting(models["toy"]((1, 4, 4)))
    model, guide = pair("toy")
    check_guide(guide, model, model.example(4)["x"])
    found = listed()
    assert found["guides"]["toy"]["families"] == ["normal"]
    assert any(
        row["guide"] == "toy" and row["estimator"] == "rloo" and not row["reason"] for row in found["combinations"]
    )
    assert trains(model, guide, "pathwise").history


def test_an_estimator(add):
    add(MODEL + ESTIMATOR)
    check_estimator("toy")
    model, guide = pair("normal")
    assert any(row["estimator"] == "toy" and not row["reason"] for row in listed()["combinations"])
    x = model.example(2)["x"]
    report = audit(model, guide, x, estimators=["pathwise", "toy"], num_samples=20, seed=0)
    assert "toy" in report.estimator.values.tolist()
    assert trains(model, guide, "toy").history


def test_a_family(add):
    with pytest.raises(BadInput, match="latent family 'toy' is unknown"):
        Latent("toy", (2,))
    add(MODEL.replace('"normal"', '"toy"').replace("dist.Normal(zeros", "dist.Laplace(zeros") + FAMILY)
    model, guide = pair()
    x = model.example(4)["x"]
    check_model(model, x)
    check_guide(guide, model, x)
    found = listed()
    assert found["models"]["toy"]["latents"]["z"]["family"] == "toy"
    assert "toy" in found["guides"]["unconditional"]["families"]
    assert not [
        row["reason"]
        for row in found["combinations"]
        if (row["guide"], row["estimator"]) == ("unconditional", "stl") and row["reason"]
    ]
    report = audit(model, guide, x, estimators=["pathwise", "rloo"], num_samples=20, seed=0)
    assert len(report.estimator) == 2
    assert trains(model, guide, "pathwise").history


def test_an_objective(add):
    add(MODEL + OBJECTIVE)
    check_objective("toy")
    found = listing.catalogue(kinds=["objectives"])["objectives"]
    assert found["toy"]["summary"] == "Twice the evidence lower bound."
    assert {"pathwise", "rloo"} <= set(found["toy"]["estimators"]) and "dreg" not in found["toy"]["estimators"]
    model, guide = pair("normal")
    x = model.example(2)["x"]
    report = audit(model, guide, x, estimators=["pathwise", "rloo"], objective="toy", num_samples=20, seed=0)
    plain = audit(model, guide, x, estimators=["pathwise"], num_samples=20, seed=0)
    assert report.attrs["objective"] == "toy" and report.estimator.values.tolist() == ["pathwise", "rloo"]
    spreads = [each.variance.sel(estimator="pathwise").values for each in (report, plain)]
    assert spreads[0] == pytest.approx(4 * spreads[1], rel=1e-4)  # the same draws
    assert trains(model, guide, SiteELBO("pathwise", objective="toy")).history


@pytest.mark.parametrize(
    ("right", "wrong", "words"),
    [
        ("2 * super().value(recorded)", "super().value(recorded).square()", "is no sum over rows|has another mean"),
        (
            "    def accepts",
            "    def refusal(self, _):\n        return 'no'\n\n    def accepts",
            "accepts and refusal disagree",
        ),
        ('name = "toy"', 'name = "toy"\n    takes_kl_weight = 1', "must declare takes_kl_weight as a bool"),
    ],
)
def test_an_objective_that_breaks_its_word_is_caught(right, wrong, words, add):
    add(OBJECTIVE.replace(right, wrong))
    with pytest.raises(AssertionError, match=words):
        check_objective("toy")
