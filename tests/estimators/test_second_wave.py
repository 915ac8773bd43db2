"""What `audit` says of the newer words, and of each of them made wrong on purpose; masks, subsamples and two layers."""

from __future__ import annotations

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from programs import DISCRETE, F64, Params

from gumbo.inference import SiteELBO, audit
from gumbo.inference.estimators import ARMS, CARMS, DisARM, DoubleControlVariates, MeasureValued, Rodeo, estimators
from gumbo.inference.estimators._coordinates import gains


class Coupled:
    """Wrong on purpose: a correction for the correlation of coupled draws that is too small."""

    def surrogate(self, view):
        return 0.6 * super().surrogate(view)


class Forgetful:
    """Wrong on purpose: what the linear model takes away from the score is not given back."""

    def surrogate(self, view):
        slope = view.slope
        theirs = slope.sum(view.particle_dim - view.event_dim, keepdim=True) - slope
        return super().surrogate(view) - view.sum_event(theirs * view.parameter("mean"))


def made_wrong(how, right):
    return type(how.__name__, (how, right), {})()


RIVALS = {
    "coins": (
        ["double-cv", "rodeo", "arms"],
        [
            made_wrong(Forgetful, DoubleControlVariates),
            made_wrong(Forgetful, Rodeo),
            made_wrong(Coupled, ARMS),
        ],
    ),
    "classes": (["double-cv", "rodeo", "carms", "disarm"], [made_wrong(Coupled, CARMS), made_wrong(Coupled, DisARM)]),
}


class ClassGuide(Params):
    def __init__(self):
        super().__init__(a=[[0.1, -0.4, 0.6], [1.0, 0.2, -0.3]])

    def forward(self):
        with pyro.plate("data", 2):
            pyro.sample("y", dist.OneHotCategorical(logits=self.a))


class ClassModel(Params):
    def __init__(self):
        super().__init__(w=[0.2, 2.0, -1.5])

    def forward(self):
        with pyro.plate("data", 2):
            y = pyro.sample("y", dist.OneHotCategorical(logits=torch.zeros(3, dtype=F64)))
            pyro.sample("x", dist.Normal((y * self.w).sum(-1), 0.5), obs=torch.tensor([0.3, 1.1], dtype=F64))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["coins", "classes"])
def test_the_audit_clears_them_and_convicts_them_made_wrong(kind):
    right, wrong = RIVALS[kind]
    model, guide = DISCRETE["plate"].make() if kind == "coins" else (ClassModel(), ClassGuide())
    named = {word: word for word in right} | {f"wrong {i}": estimator for i, estimator in enumerate(wrong)}
    report = audit(model, guide, estimators=named, num_samples=250, burn_in=5, seed=1)
    said = {
        str(name): str(verdict) for name, verdict in zip(report.estimator.values, report.verdict.values, strict=True)
    }
    assert all(said[word] == "ok" for word in right), said
    assert all(said[f"wrong {i}"].startswith("flagged") for i in range(len(wrong))), said


class SiteGuide(Params):
    """One site of any law with a real parameter."""

    def __init__(self, law, start):
        super().__init__(a=start)
        self.law = law

    def forward(self):
        pyro.sample("z", self.law(self.a))


class PriorModel(Params):
    """The same law before, and a cost that is a polynomial of the site, or is not."""

    def __init__(self, law, start, cost):
        super().__init__(w=0.6)
        self.law, self.start, self.cost = law, torch.tensor(start, dtype=F64), cost

    def forward(self):
        z = pyro.sample("z", self.law(self.start))
        pyro.factor("f", self.w * self.cost(z))


THREE = torch.tensor(3.0, dtype=F64)
LAWS = {
    "Poisson": lambda a: dist.Poisson(a.exp()),
    "Binomial": lambda a: dist.Binomial(4, logits=a),
    "NegativeBinomial": lambda a: dist.NegativeBinomial(THREE, logits=a - 1),
    "Geometric": lambda a: dist.Geometric(logits=a + 1),
    "Gamma": lambda a: dist.Gamma(THREE, a.exp()),
}


class FewerFailures(MeasureValued):
    """Wrong on purpose: the count is compared at the draw, where one more failure is due."""

    def surrogate(self, view):
        gain = gains(view, (view.value + 1).unsqueeze(0))[0]
        name = "rate" if isinstance(view.fns[0], dist.Gamma) else "probs"
        return view.sum_event(gain * view.parameter(name))


class Backwards(MeasureValued):
    """Wrong on purpose: the two densities are exchanged."""

    def surrogate(self, view):
        return -super().surrogate(view)


@pytest.mark.slow
@pytest.mark.parametrize("law", LAWS)
def test_the_audit_clears_measure_valued_derivatives_of_every_family_and_convicts_wrong_ones(law):
    make = LAWS[law]
    model, guide = PriorModel(make, -0.3, torch.sin), SiteGuide(make, 0.2)
    rivals = {"right": "measure-valued", "backwards": Backwards()}
    if law in ("NegativeBinomial", "Geometric"):
        rivals["one too few"] = FewerFailures()
    report = audit(model, guide, estimators=rivals, reference="rloo", num_samples=800, seed=2)
    said = {str(name): str(report.verdict.sel(estimator=name).item()) for name in rivals}
    assert said.pop("right") == "ok"
    assert all(verdict.startswith("flagged") for verdict in said.values()), said


@pytest.mark.slow
@pytest.mark.parametrize("law", ["Poisson"])
@pytest.mark.parametrize(
    "cost, verdict",
    [(torch.square, "no bias seen"), (lambda z: torch.cos(3 * z), "biased")],
)
def test_the_audit_sees_the_bias_of_fini_where_the_cost_is_no_polynomial(law, cost, verdict):
    """At the prior itself, so that log p − log q, which is none either, has no part in the cost."""
    make = LAWS[law]
    model, guide = PriorModel(make, 0.2, cost), SiteGuide(make, 0.2)
    report = audit(model, guide, estimators=["fini", "rloo"], reference="rloo", num_samples=800, seed=0)
    assert report.verdict.sel(estimator="fini").item() == verdict
    assert not report.unbiased.sel(estimator="fini").item()


@pytest.mark.slow
def test_the_audit_sees_the_bias_of_the_gapped_straight_through_estimator():
    report = audit(ClassModel(), ClassGuide(), estimators=["gapped-straight-through", "carms"], num_samples=500, seed=1)
    assert report.verdict.sel(estimator="gapped-straight-through").item() == "biased"
    assert report.verdict.sel(estimator="carms").item() == "ok"


def layer_of(one_hot, logits):
    return dist.OneHotCategorical(logits=logits) if one_hot else dist.Bernoulli(logits=logits).to_event(1)


class LayeredGuide(Params):
    """Two dependent sites in a subsampled plate, the second masked for some rows."""

    def __init__(self, one_hot):
        super().__init__(a=[0.4, -0.7, 0.2], b=[0.3, -0.2, 0.9])
        self.one_hot = one_hot

    def forward(self, x):
        with pyro.plate("data", 12, subsample_size=4):
            z = pyro.sample("z", layer_of(self.one_hot, self.a.expand(4, 3)))
            with pyro.poutine.mask(mask=torch.tensor([True, False, True, True])):
                pyro.sample("y", layer_of(self.one_hot, self.b + z.flip(-1)))


class LayeredModel(Params):
    def __init__(self, one_hot):
        super().__init__(u=[0.5, -0.2, 0.8], w=[-0.3, 0.6, 0.1])
        self.one_hot = one_hot

    def forward(self, x):
        with pyro.plate("data", 12, subsample_size=4):
            z = pyro.sample("z", layer_of(self.one_hot, torch.zeros(4, 3, dtype=F64)))
            with pyro.poutine.mask(mask=torch.tensor([True, False, True, True])):
                y = pyro.sample("y", layer_of(self.one_hot, torch.zeros(4, 3, dtype=F64) + 0.5 * z))
            pyro.sample("x", dist.Normal((self.u * z).sum(-1) - (self.w * y).sum(-1), 1.0), obs=x)


CELLS = [
    (word, one_hot)
    for word in ("double-cv", "rodeo", "arms", "carms", "disarm", "gapped-straight-through")
    for one_hot in (True, False)
    if estimators[word]().supports({"name": "z", "fn": layer_of(one_hot, torch.zeros(3, dtype=F64))})
]


@pytest.mark.parametrize("word, one_hot", CELLS)
@pytest.mark.parametrize("vectorize", [True, False], ids=["vec", "seq"])
def test_masks_subsamples_and_two_layers_have_one_meaning_either_way(word, one_hot, vectorize):
    """A plate of 4 of 12 counts threefold: the value is the bound of all, and every parameter of it has a gradient."""
    x = torch.tensor([0.3, -0.8, 1.0, 0.1], dtype=F64)
    model, guide = LayeredModel(one_hot), LayeredGuide(one_hot)
    loss = SiteELBO(word, num_particles=2, vectorize_particles=vectorize)(model, guide).initialize(x)
    torch.manual_seed(0)
    values = [loss(x) for _ in range(12)]
    torch.stack(values).sum().backward()
    for parameter in (*model.parameters(), *guide.parameters()):
        assert parameter.grad.isfinite().all() and parameter.grad.abs().max() > 0
    reference = SiteELBO("rloo", num_particles=200)(model, guide)
    mean, spread = torch.stack(values).mean().item(), torch.stack(values).std().item()
    with torch.no_grad():
        assert abs(mean - reference(x).item()) < 6 * spread / math.sqrt(12)
