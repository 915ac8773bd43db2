"""Estimators against exact gradients: every tuple of draws where it can be listed."""

from __future__ import annotations

import pytest
import torch
from exact_means import exact_gradient, mean_gradient
from programs import DISCRETE

from gumbo.errors import BadInput, UnknownName
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
