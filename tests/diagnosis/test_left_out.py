"""Discrete guides that leave out values, and faults in one of many dimensions: alarms that the weights do not raise."""

from __future__ import annotations

import math

import pyro
import pyro.distributions as dist
import pytest
import torch

from gumbo.inference import diagnose

PRIOR, MEANS = torch.tensor([0.2, 0.3, 0.5]).double(), torch.tensor([0.0, 2.0, 4.0]).double()
X = torch.tensor([0.0, 1.0, 2.0, 3.0, 4.0, 1.5, 2.5, 3.5]).double()
LOGITS = PRIOR.log() + dist.Normal(MEANS, 1.0).log_prob(X[:, None])
WITHOUT_ONE = LOGITS + torch.tensor([0.0, -1e9, 0.0])
QUICK = {"num_simulations": 40, "refine_steps": 0}


def mixture(kind):
    """The class of each datum as a number or as a one-hot vector."""

    def model(x):
        with pyro.plate("data", len(x)):
            k = pyro.sample("k", kind(logits=PRIOR.log()))
            mean = k @ MEANS if kind is dist.OneHotCategorical else MEANS[k]
            pyro.sample("x", dist.Normal(mean, 1.0), obs=x)

    return model


def classes(kind, logits):
    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("k", kind(logits=logits))

    return guide


@pytest.mark.parametrize("kind", [dist.Categorical, dist.OneHotCategorical])
@pytest.mark.parametrize(
    ("logits", "fires"),
    [(LOGITS, False), (LOGITS * 1e4, True), (WITHOUT_ONE, True)],
    ids=["exact", "argmax", "without"],
)
def test_values_that_a_guide_leaves_out_alarm(kind, logits, fires):
    report = diagnose(mixture(kind), classes(kind, logits), X, **QUICK)
    assert report["missed-mass"].verdict == ("alarm" if fires else "ok"), str(report)
    assert report.ok == (not fires)
    if fires:  # the largest share of a datum's posterior that the guide has no draw of
        shares = LOGITS.softmax(-1)
        kept = shares * (logits.softmax(-1) > 1e-3)
        assert report["missed-mass"].value == pytest.approx(-kept.sum(-1).log().min().item(), abs=1e-6)


@pytest.mark.parametrize(("share", "fires"), [(0.0, True), (1.0, True), (0.75, False)])
def test_a_global_coin_that_never_falls_alarms(share, fires):
    def model(y):
        b = pyro.sample("b", dist.Bernoulli(torch.tensor(0.5).double()))
        pyro.sample("y", dist.Bernoulli(torch.where(b > 0, 0.75, 0.25)), obs=y)

    report = diagnose(model, lambda y: pyro.sample("b", dist.Bernoulli(torch.tensor(share).double())), ONE, **QUICK)
    assert report["missed-mass"].verdict == ("alarm" if fires else "ok")
    if fires:
        assert report["missed-mass"].value == pytest.approx(-math.log(0.25 if share == 0 else 0.75), abs=1e-6)


ONE = torch.ones(()).double()


def test_several_discrete_latents_cannot_be_called_ok():
    """Two coins that agree: from either side no single move leads to the other."""

    def model(y):
        a = pyro.sample("a", dist.Bernoulli(ONE / 2))
        b = pyro.sample("b", dist.Bernoulli(torch.where(a > 0, ONE - 1e-9, 1e-9 * ONE)))
        pyro.sample("y", dist.Normal(b, 10.0), obs=y)

    def guide(y):
        pyro.sample("a", dist.Bernoulli(1e-9 * ONE))
        pyro.sample("b", dist.Bernoulli(1e-9 * ONE))

    found = diagnose(model, guide, ONE, **QUICK)["missed-mass"]
    assert found.verdict == "cannot say" and "one at a time" in found.text


def test_classes_beside_a_global_latent_cannot_be_called_ok():
    def model(x):
        shift = pyro.sample("shift", dist.Normal(0.0 * ONE, 1e-3))
        with pyro.plate("data", len(x)):
            k = pyro.sample("k", dist.Categorical(PRIOR))
            pyro.sample("x", dist.Normal(MEANS[k] + shift, 1.0), obs=x)

    def guide(x, logits=LOGITS):
        pyro.sample("shift", dist.Normal(0.0 * ONE, 1e-3))
        with pyro.plate("data", len(x)):
            pyro.sample("k", dist.Categorical(logits=logits))

    found = diagnose(model, guide, X, **QUICK)["missed-mass"]
    assert found.verdict == "cannot say" and "shift were not searched" in found.text
    found = diagnose(model, lambda x: guide(x, WITHOUT_ONE), X, **QUICK)["missed-mass"]
    assert found.verdict == "alarm"


@pytest.mark.parametrize("place", [1, 64])
@pytest.mark.parametrize(("shift", "wide", "alarm"), [(1.0, 1.0, "shift"), (0.0, 3.0, "width")])
def test_a_fault_in_one_of_many_dimensions_alarms(place, shift, wide, alarm):
    size = 100
    y = torch.randn(5, size, generator=torch.Generator().manual_seed(0)).double() + 1

    def model(y):
        w = pyro.sample("w", dist.Normal(torch.zeros(size).double(), 1.0).to_event(1))
        with pyro.plate("data", 5):
            pyro.sample("y", dist.Normal(w, 1.0).to_event(1), obs=y)

    def guide(y):
        mean, sd = y.sum(0) / 6, torch.full((size,), 6**-0.5).double()
        mean[place] += shift * 6**-0.5
        sd[place] *= wide
        pyro.sample("w", dist.Normal(mean, sd).to_event(1))

    report = diagnose(model, guide, y, num_samples=2000, **QUICK)
    assert alarm in report.alarms and f"w[{place}]" in report[alarm].text
