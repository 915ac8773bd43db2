"""Masked elements of latents have no posterior: nothing is said of them, and the others are judged as without them."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine

from gumbo.inference import diagnose

X = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0])
SEEN = torch.tensor([True, True, False, True, False])
AWAY = 40.0 * (~SEEN)  # what a guide does where nothing is seen is no fault


def masked_pair(prior, likelihood, posterior, mask=SEEN):
    def model(x):
        with pyro.plate("data", len(x)), poutine.mask(mask=mask):
            z = pyro.sample("z", prior)
            pyro.sample("x", likelihood(z), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)), poutine.mask(mask=mask):
            pyro.sample("z", posterior(x))

    return model, guide


def normal(x):
    return dist.Normal(x / 2 + AWAY, 0.5**0.5)


EXACT = {
    "normal": (masked_pair(dist.Normal(0.0, 1.0), lambda z: dist.Normal(z, 1.0), normal), X),
    "positive": (
        masked_pair(
            dist.Gamma(2.0, 1.0), dist.Poisson, lambda x: dist.Gamma(torch.where(SEEN, 2 + x, 500.0), 2.0 * X**0)
        ),
        X,
    ),
    "binary": (
        masked_pair(
            dist.Bernoulli(0.5),
            lambda z: dist.Bernoulli(0.25 + 0.5 * z),
            lambda x: dist.Bernoulli(torch.where(SEEN, 0.25 + 0.5 * x, 1e-6)),
        ),
        torch.tensor([0.0, 1.0, 1.0, 0.0, 0.0]),
    ),
}


@pytest.mark.parametrize("name", EXACT)
def test_an_exact_guide_with_masked_latents_has_no_alarm(name):
    pair, x = EXACT[name]
    found = diagnose(*pair, x, num_samples=1000, num_simulations=200, progress=False)
    assert found.alarms == []
    assert found["missed-mass"].verdict == "ok" and found["calibration"].verdict == "ok"


def test_numbers_that_the_model_fills_in_are_not_judged():
    count, total = int(SEEN.sum()), X[SEEN].sum()

    def model(x):
        mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(mean, 1.0), obs=x, obs_mask=SEEN)

    def guide(x):
        mean = pyro.sample("mean", dist.Normal(total / (count + 1), (count + 1) ** -0.5))
        with pyro.plate("data", len(x)), poutine.mask(mask=~SEEN):
            pyro.sample("x_unobserved", dist.Normal(mean + 40.0 * SEEN, 1.0))

    found = diagnose(model, guide, X, num_samples=1000, progress=False)
    assert found.alarms == [] and found["missed-mass"].verdict == "ok"


def test_a_mask_within_the_event():
    seen = torch.tensor([[True, False], [True, True], [False, True]])

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, torch.ones(2)).mask(seen).to_event(1))
            pyro.sample("x", dist.Normal(z, 1.0).mask(seen).to_event(1), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(torch.where(seen, x / 2, 40.0), 0.5**0.5).mask(seen).to_event(1))

    found = diagnose(model, guide, torch.ones(3, 2), num_samples=1000, num_simulations=200, progress=False)
    assert found.alarms == [] and found["missed-mass"].verdict == "ok"


@pytest.mark.slow
def test_what_is_not_masked_is_judged_as_before():
    mask = torch.arange(40) < 4
    x = torch.linspace(0.5, 2.0, 40)

    def shifted(x):
        return dist.Normal(x / 2 + 0.7, 0.5)

    pair = masked_pair(dist.Normal(0.0, 1.0), lambda z: dist.Normal(z, 1.0), shifted, mask)
    found = diagnose(*pair, x, num_samples=2000, num_simulations=200, progress=False)
    assert {"shift", "calibration"} <= set(found.alarms)

    def one_mode(x):
        return dist.Normal(x.sqrt(), 0.05)

    pair = masked_pair(dist.Normal(0.0, 1.0), lambda z: dist.Normal(z**2, 0.1), one_mode, mask)
    assert "missed-mass" in diagnose(*pair, x, num_simulations=20, progress=False).alarms


def test_data_that_depend_on_a_masked_latent_are_not_searched():
    def model(x):
        with pyro.plate("data", len(x)):
            with poutine.mask(mask=SEEN):
                z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)), poutine.mask(mask=SEEN):
            pyro.sample("z", dist.Normal(x / 2, 0.5**0.5))

    found = diagnose(model, guide, X, num_samples=500, num_simulations=50, progress=False)
    assert found["missed-mass"].verdict == "cannot say" and "depends on masked latents" in str(found["missed-mass"])
