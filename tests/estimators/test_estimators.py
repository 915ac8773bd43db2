"""Estimators against exact gradients: every tuple of draws where it can be listed."""

from __future__ import annotations

import pytest
import torch
from exact_means import exact_gradient, mean_gradient
from programs import DISCRETE

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
