"""Estimators against exact gradients: every tuple of draws where it can be listed."""

from __future__ import annotations

import pyro
import pytest
import torch
from programs import DISCRETE, gradient

from gumbo.inference import SiteELBO
from gumbo.inference.exact import exact_elbo, mean_over_draws

VALUE_ONLY = ["score", "score-average", "nvil", "rloo", "enumerate"]


def exact_gradient(model, guide):
    with pyro.get_param_store().scope():
        return gradient(-exact_elbo(model, guide), torch.nn.ModuleList([model, guide]))


def mean_gradient(estimator, model, guide, **options):
    """E[gradient] over every tuple of draws, with whatever state a few training steps leave."""
    loss = SiteELBO(estimator, **options)(model, guide)
    loss.initialize()
    for _ in range(3):
        loss()
    loss.eval()
    return mean_over_draws(lambda: gradient(loss(), torch.nn.ModuleList([model, guide])))


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
