"""One file and one registration add a model, guide, estimator, family or objective: everything else picks it up."""

from __future__ import annotations

import warnings

import pytest
from additions import ESTIMATOR, FAMILY, GUIDE, MODEL, OBJECTIVE, additions

from gumbo.errors import BadInput
from gumbo.experiments import listing
from gumbo.guides import fitting, guides
from gumbo.inference import SiteELBO, audit, fit
from gumbo.models import Latent, models
from gumbo.testing import check_estimator, check_guide, check_model, check_objective


@pytest.fixture
def add(tmp_path):
    with additions(tmp_path) as run:
        yield run


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
        (
            "return 2 * elbo_value(recorded.groups, recorded.layout, recorded.view)",
            "return elbo_value(recorded.groups, recorded.layout, recorded.view).square()",
            "is no sum over rows|has another mean",
        ),
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
