"""Discrete guides that leave out values, and faults in one of many dimensions: alarms that the weights do not raise."""

from __future__ import annotations

import math

import pyro
import pyro.distributions as dist
import pytest
import torch

from gumbo.inference import diagnose
from gumbo.inference.diagnosis.target import Target, summing_out
from gumbo.inference.engine.scopes import quietly
from gumbo.inference.posterior.runner import Sweep

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


CENTRES = torch.tensor([-2.0, 2.0]).double()
GROUPS = CENTRES.repeat(30) + 0.6 * torch.randn(60, generator=torch.Generator().manual_seed(3)).double()


def labelled(marked):
    """A mixture whose assignments are enumerated; ``marked`` components have priors that tell them apart."""

    def model(x):
        weights = pyro.sample("weights", dist.Dirichlet(5 * torch.ones(2).double()))
        with pyro.plate("components", 2):
            centres = pyro.sample("centres", dist.Normal(CENTRES if marked else 0 * CENTRES, 0.5 if marked else 4.0))
        with pyro.plate("data", len(x)):
            k = pyro.sample("k", dist.Categorical(weights), infer={"enumerate": "parallel"})
            pyro.sample("x", dist.Normal(centres[k], 0.6), obs=x)

    return model


def one_labelling(x, marked, jointly):
    """The Laplace approximation of the posterior near one labelling; ``jointly`` computes all from one draw."""
    group = (x.unsqueeze(-1) - CENTRES).abs().argmin(-1)
    count = torch.bincount(group, minlength=2).double()
    sums = torch.zeros(2).double().index_add(0, group, x)
    precision = count / 0.36 + (4 if marked else 1 / 16)
    centres = (sums / 0.36 + (4 * CENTRES if marked else 0)) / precision
    made = dist.Normal(centres, precision**-0.5)
    pyro.sample("weights", dist.Dirichlet(5 + count))
    if jointly:
        drawn = pyro.sample("_all", made.to_event(1), infer={"is_auxiliary": True})
        made = dist.Delta(drawn, log_density=0.0)
    with pyro.plate("components", 2):
        pyro.sample("centres", made)


@pytest.mark.parametrize("jointly", [False, True])
@pytest.mark.parametrize("marked", [False, True])
def test_one_labelling_of_a_mixture_with_enumerated_assignments(marked, jointly):
    """Without marks either labelling has half of the evidence; k̂ does not see it."""

    def guide(x):
        return one_labelling(x, marked, jointly)

    report = diagnose(labelled(marked), guide, GROUPS, num_simulations=20, refine_steps=0)
    found = report["missed-mass"]
    assert report["khat"].verdict == "ok", str(report)
    if marked:
        assert found.verdict == "ok", str(found)
    else:
        assert found.verdict == "alarm" and found.value == pytest.approx(math.log(2), abs=0.15), str(found)
        assert "change places" in found.advice


def test_sums_over_enumerated_assignments_are_exact_at_any_centres():
    """Also far from the data, where the guide never draws."""
    model = labelled(True)

    def guide(x):
        return one_labelling(x, True, True)

    with quietly(model, guide, 0):
        sweep = Sweep(model, guide, (GROUPS,), {})
        target = Target(sweep, ["weights", "centres"], (), {}, summing_out(sweep, {}))
        free = 2 * torch.randn(7, 1, 3, generator=torch.Generator().manual_seed(0)).double()
        prior, likelihood = target(free)
    values = target.values(free)
    each = dist.Normal(values["centres"][:, None], 0.6).log_prob(GROUPS[:, None]) + values["weights"].log()[:, None]
    torch.testing.assert_close(likelihood[:, 0], each.logsumexp(-1).sum(-1))
    jacobian = target.maps["weights"].log_abs_det_jacobian(free[:, 0, :1], values["weights"])
    exact = dist.Dirichlet(5 * torch.ones(2).double()).log_prob(values["weights"]) + jacobian
    torch.testing.assert_close(prior[:, 0], exact + dist.Normal(CENTRES, 0.5).log_prob(values["centres"]).sum(-1))


@pytest.mark.parametrize("right", [True, False])
def test_a_continuous_latent_of_a_datum_is_searched_with_its_class_summed_out(right):
    """x = |z| or so, under a prior of two classes: the guide has the posterior's right mode, or both."""
    x = torch.tensor([1.0, 1.5, 2.0]).double()

    def model(x):
        with pyro.plate("data", len(x)):
            k = pyro.sample("k", dist.Categorical(torch.ones(2).double()), infer={"enumerate": "parallel"})
            z = pyro.sample("z", dist.Normal(2.0 * k - 1, ONE))
            pyro.sample("x", dist.Normal(z.abs(), 0.1 * ONE), obs=x)

    def guide(x):
        # Both classes together are a mixture of Normals with 1/2 (φ(z − 1) + φ(z + 1)), symmetric in z.
        at = torch.linspace(0.01, 4, 4000).double()
        prior = torch.logaddexp(dist.Normal(ONE, 1.0).log_prob(at), dist.Normal(-ONE, 1.0).log_prob(at))
        share = (dist.Normal(at, 0.1).log_prob(x[:, None]) + prior).softmax(-1)
        mean = (share * at).sum(-1)
        sd = 1.05 * (share * (at - mean[:, None]) ** 2).sum(-1).sqrt()
        halves = torch.tensor([0.5, 0.5] if right else [1 - 1e-9, 1e-9]).double()
        modes = dist.Normal(torch.stack([mean, -mean], -1), sd[:, None])
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.MixtureSameFamily(dist.Categorical(halves), modes))

    found = diagnose(model, guide, x, num_simulations=20, refine_steps=0)["missed-mass"]
    assert found.verdict == ("ok" if right else "alarm"), str(found)
    if not right:
        assert found.value == pytest.approx(math.log(2), abs=0.1)


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
