"""Estimators side by side in one program, under a KL weight, and in plates that cannot be trusted: still unbiased."""

from __future__ import annotations

import pytest
import torch
from exact_means import is_unbiased, mean_gradient
from programs import DISCRETE

MIXTURES = [
    # Antithetic pairs.
    ("one coin", "disarm", 2),
    ("plate", "arm", 2),
    ("chain", {"z1": "disarm", "z2": "rloo"}, 2),
    ("chain", {"z1": "score", "z2": "arm"}, 1),
    ("chain", {"z1": "disarm", "z2": "enumerate"}, 1),
    ("chain", {"z1": "enumerate", "z2": "disarm"}, 1),
    ("chain", {"z1": "arm", "z2": "local-expectation"}, 1),
    ("nested plates", {"o": "disarm", "z": "enumerate"}, 1),
    ("nested plates", {"o": "score", "z": "disarm"}, 1),
    # Coordinates changed one at a time.
    ("one coin", "local-expectation", 2),
    ("plate", "measure-valued", 2),
    ("chain", {"z1": "local-expectation", "z2": "rloo"}, 2),
    ("chain", {"z1": "measure-valued", "z2": "enumerate"}, 1),
    ("chain", {"z1": "enumerate", "z2": "local-expectation"}, 1),
    ("dice", {"y": "local-expectation", "c": "enumerate"}, 2),
    ("dice", {"y": "score", "c": "local-expectation"}, 1),
    ("nested plates", {"o": "local-expectation", "z": "enumerate"}, 1),
    ("nested plates", {"o": "score", "z": "measure-valued"}, 1),
    # Double control variates, and one-hot sites.
    ("chain", {"z1": "double-cv", "z2": "score"}, 2),
    ("chain", {"z1": "double-cv", "z2": "enumerate"}, 2),
    ("chain", {"z1": "enumerate", "z2": "double-cv"}, 2),
    ("dice", {"y": "double-cv", "c": "score"}, 2),
    ("nested plates", {"o": "double-cv", "z": "enumerate"}, 2),
]


@pytest.mark.parametrize("vectorize", [True, False], ids=["vec", "seq"])
@pytest.mark.parametrize("name, words, particles", MIXTURES, ids=str)
def test_estimators_mix(listed_uniforms, name, words, particles, vectorize):
    model, guide = DISCRETE[name].make()
    assert is_unbiased(words, model, guide, num_particles=particles, vectorize_particles=vectorize)


@pytest.mark.parametrize(
    "word, name",
    [
        ("disarm", "plate"),
        ("local-expectation", "masked event"),
        ("measure-valued", "masked event"),
        ("double-cv", "plate"),
    ],
)
def test_a_kl_weight_and_plates_that_cannot_be_trusted_are_served(listed_uniforms, word, name):
    model, guide = DISCRETE[name].make()
    assert is_unbiased(word, model, guide, plates="ignore")
    full, half, none = (mean_gradient(word, model, guide, kl_weight=beta) for beta in (1.0, 0.5, 0.0))
    assert torch.allclose(half, (full + none) / 2, rtol=0, atol=1e-10)
    assert not torch.allclose(full, none, atol=1e-3)
