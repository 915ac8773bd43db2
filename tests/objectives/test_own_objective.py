"""A new objective is one file with one registration: SiteELBO trains with it, and unknown words name the known ones."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import pytest
import torch
from additions import OBJECTIVE, additions
from exact_means import exact_gradient
from programs import F64, OneCoinGuide, OneCoinModel, gradient
from torch import nn

from gumbo.errors import BadInput, Refusal, UnknownName, UnsupportedSite
from gumbo.inference import SiteELBO, fit
from gumbo.inference.auditing.exact import exact_elbo, mean_over_draws
from gumbo.inference.engine.looks import refusals
from gumbo.inference.estimators import Pathwise, ScoreFunction
from gumbo.inference.objectives import Objective, as_objective, objectives


@pytest.fixture
def double(tmp_path):
    with additions(tmp_path) as add:
        yield add(OBJECTIVE)


@pytest.mark.parametrize("word", ["score", "rloo", "enumerate", "local-expectation"])
def test_a_registered_objective_has_its_value_and_gradient(double, word):
    model, guide = OneCoinModel(), OneCoinGuide()
    for objective in ("toy", double.ToyBound, double.ToyBound()):
        loss = SiteELBO(word, objective=objective)(model, guide)
        mean = mean_over_draws(lambda loss=loss: gradient(loss(), nn.ModuleList([model, guide])))
        assert torch.allclose(mean, 2 * exact_gradient(model, guide), rtol=0, atol=1e-10)
        assert loss.objective_name == "toy"
    with pyro.get_param_store().scope():
        assert torch.allclose(mean_over_draws(loss), -2 * exact_elbo(model, guide), rtol=0, atol=1e-10)


def test_fit_trains_with_a_registered_objective(double):
    class Model(pyro.nn.PyroModule):
        def forward(self, x):
            with pyro.plate("data", len(x)):
                z = pyro.sample("z", dist.Normal(torch.zeros((), dtype=F64), 1.0))
                pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    class Guide(pyro.nn.PyroModule):
        def __init__(self):
            super().__init__()
            self.loc = nn.Parameter(torch.tensor(0.0, dtype=F64))

        def forward(self, x):
            with pyro.plate("data", len(x)):
                pyro.sample("z", dist.Normal(self.loc * x, 0.7))

    guide = Guide()
    x = torch.randn(32, dtype=F64)
    fit(Model(), guide, x, loss=SiteELBO("pathwise", objective="toy"), epochs=20, lr=0.05)
    assert guide.loc.item() == pytest.approx(0.5, abs=0.2)


def test_what_an_objective_does_not_take_is_one_line(double):
    with pytest.raises(BadInput, match="kl_weight is not defined for objective 'toy'"):
        SiteELBO(objective="toy", kl_weight=0.5)
    with pytest.raises(
        UnknownName, match=r"unknown objective 'iwea': did you mean 'iwae'\? \(known: elbo, free-bits, iwae.*, toy"
    ):
        SiteELBO(objective="iwea")


@pytest.mark.parametrize("word", ["elbo", "iwae", "rws"])
def test_words_name_objectives(word):
    assert isinstance(as_objective(word), Objective) and as_objective(word).name == word
    assert SiteELBO(objective=word).objective == word


def test_a_refusal_is_one_type_from_estimator_to_error():
    def program():
        pyro.sample("z", dist.Bernoulli(torch.tensor(0.5)))

    site = {"name": "z", "fn": dist.Bernoulli(torch.tensor(0.5))}
    of_estimator, of_table = Pathwise().refusal(site), refusals(program, program)["pathwise"]
    with pytest.raises(UnsupportedSite) as raised:
        SiteELBO("pathwise").loss(program, program)
    for refusal in (of_estimator, of_table, raised.value.refusal):
        assert isinstance(refusal, Refusal)
        assert (refusal.site, refusal.estimator, refusal.reason) == ("z", "pathwise", of_estimator.reason)
    assert "rloo" in raised.value.refusal.alternatives
    assert ScoreFunction().refusal(site) is None and refusals(program, program)["score"] == ""
    assert objectives["iwae"]().refusal(Pathwise(drop_score=True)).reason == "it is not derived for objective 'iwae'"
