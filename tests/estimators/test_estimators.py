"""Estimators against exact gradients: every tuple of draws where it can be listed."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import pytest
import torch
from exact_means import exact_gradient, mean_gradient
from programs import DISCRETE

from gumbo.errors import BadInput, UnknownName, UnsupportedSite
from gumbo.inference import Auto, SiteELBO
from gumbo.inference.engine.resolution import as_estimator
from gumbo.inference.estimators import ARMS, Fini, GumbelSoftmax, MovingAverage, Neural, ScoreFunction, estimators

VALUE_ONLY = ["score", "score-average", "nvil", "rloo", "enumerate"]


def cells():
    for name, case in DISCRETE.items():
        for word in VALUE_ONLY:
            for vectorize in (False,) if case.branches else (True, False):
                if not (case.large and word == "rloo"):
                    yield pytest.param(name, word, vectorize, id=f"{name}-{word}-{'vec' if vectorize else 'seq'}")


@pytest.mark.parametrize("name, word, vectorize", list(cells()))
def test_the_mean_over_every_tuple_of_draws_is_the_exact_gradient(name, word, vectorize):
    model, guide = DISCRETE[name].make()
    mean = mean_gradient(word, model, guide, vectorize_particles=vectorize)
    assert torch.allclose(mean, exact_gradient(model, guide), rtol=0, atol=1e-10)


def said(estimator) -> str:
    return repr(estimator)


CALLS = {
    "arms(draws=3)": ARMS(3),
    "fini(order=3)": Fini(3),
    "gumbel-softmax(temperature=0.5)": GumbelSoftmax(0.5),
    "straight-through(temperature=0.5)": GumbelSoftmax(0.5, hard=True),
    " gumbel-rao( rao=3 ) ": GumbelSoftmax(hard=True, rao=3),
    "score-average(decay=0.5)": ScoreFunction(baseline=MovingAverage(0.5)),
    "nvil(hidden=4)": ScoreFunction(baseline=Neural(hidden=4)),
    "auto(seconds=0.5, allow_biased=True)": Auto(seconds=0.5, allow_biased=True),
}


@pytest.mark.parametrize("text", CALLS)
def test_a_word_takes_its_options_in_a_call(text):
    assert said(as_estimator(text)) == said(CALLS[text])
    assert said(SiteELBO({"z": text}).given["z"]) == said(CALLS[text])


@pytest.mark.parametrize("word", list(estimators))
def test_every_word_may_be_called_without_options(word):
    assert said(as_estimator(f"{word}()")) == said(as_estimator(word))


@pytest.mark.parametrize(
    "text, error, says",
    [
        ("arms(3)", BadInput, "by name"),
        ("arms(draws=)", BadInput, "by name"),
        ("arms(draws=3", BadInput, "by name"),
        ("arms(draws=3) + arms()", BadInput, "by name"),
        ("arms(draws=__import__('os'))", BadInput, "by name"),
        ("arms(drws=3)", BadInput, "drws.*draws"),
        ("arms(draws=1)", BadInput, "at least 2"),
        ("rloo(draws=3)", BadInput, "'rloo.draws=3.'.*it takes none"),
        ("carm(draws=3)", UnknownName, "unknown estimator .carm."),
    ],
)
def test_a_call_that_cannot_be_meant_is_one_line(text, error, says):
    with pytest.raises(error, match=says) as caught:
        as_estimator(text)
    assert "\n" not in str(caught.value)


def empirical(atoms, log_weights):
    def model():
        z = pyro.sample("z", dist.Empirical(torch.tensor([0.0, 1.0]), torch.tensor([0.0, 0.5])))
        pyro.sample("x", dist.Normal(3 * z, 1.0), obs=torch.tensor(1.0))

    def guide():
        pyro.sample("z", dist.Empirical(atoms, log_weights))

    return model, guide


def test_atoms_that_an_empirical_repeats_are_listed_once():
    log_weights = torch.tensor([0.2, -0.3, 0.5], requires_grad=True)
    weights = log_weights.softmax(0)
    merged = torch.stack([weights[0] + weights[1], weights[2]]).log()
    found = []
    for atoms, given in ((torch.tensor([0.0, 0.0, 1.0]), log_weights), (torch.tensor([0.0, 1.0]), merged)):
        loss = SiteELBO("enumerate", vectorize_particles=False)(*empirical(atoms, given))()
        found.append(torch.cat([loss.detach()[None], *torch.autograd.grad(loss, log_weights, retain_graph=True)]))
    assert torch.allclose(*found, rtol=0, atol=1e-6)


def test_an_empirical_is_refused_where_all_its_values_must_be_scored_at_once():
    pair = empirical(torch.tensor([0.0, 1.0]), torch.zeros(2))
    with pytest.raises(UnsupportedSite, match="^site 'z' .* 'local-expectation': an Empirical scores"):
        SiteELBO("local-expectation")(*pair)()


def test_an_empirical_with_a_batch_has_no_common_atoms():
    def program(obs):
        with pyro.plate("data", 2):
            z = pyro.sample("z", dist.Empirical(torch.tensor([[0.0, 1.0, 2.0], [3.0, 1.0, 2.0]]), torch.zeros(2, 3)))
            if obs is not None:
                pyro.sample("x", dist.Normal(z, 1.0), obs=obs)

    with pytest.raises(UnsupportedSite, match="^site 'z' cannot take estimator 'enumerate': the atoms of an Empirical"):
        SiteELBO("enumerate")(lambda: program(torch.zeros(2)), lambda: program(None))()
