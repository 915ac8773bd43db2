"""Every latent family is a guide family: the guides that serve it, and the estimators that it admits."""

from __future__ import annotations

import math

import pytest
import torch

from gumbo.errors import BadInput
from gumbo.guides import MeanFieldGuide, fitting, guides
from gumbo.inference import SiteELBO
from gumbo.inference.engine.looks import refusals
from gumbo.models import Expectation, GaussianMixtureVAE, GaussianVAE
from gumbo.models.families import families
from gumbo.testing import check_guide

SCORE = {"score", "score-average", "nvil", "rloo"}
SMOOTH = {"pathwise", "stl"}
# What must serve each family at least; further estimators may.
ADMITS = {
    "log-normal": SCORE | SMOOTH,
    "gamma": SCORE | SMOOTH,
    "beta": SCORE | SMOOTH,
    "dirichlet": SCORE | SMOOTH,
    "von-mises": SCORE,
    "poisson": SCORE | {"measure-valued", "muprop"},
    "negative-binomial": SCORE,
    "binomial": SCORE | {"enumerate", "local-expectation"},
}


def pair(family):
    torch.manual_seed(0)
    model = Expectation((3,), lambda z, x: -(z - 0.4).square().sum(-1), family=family, shape=(3,))
    return model, MeanFieldGuide(model)


@pytest.mark.parametrize("family", ADMITS)
def test_the_guide_of_a_family_keeps_its_contract(family):
    model, guide = pair(family)
    check_guide(guide, model, torch.rand(3, 3))


@pytest.mark.parametrize("family", ADMITS)
def test_the_estimators_that_a_family_admits_give_a_gradient(family):
    model, guide = pair(family)
    x = torch.rand(4, 3)
    refused = refusals(model, guide, x=x)
    assert {word for word in ADMITS[family] if refused[word]} == set()
    for word in ADMITS[family]:
        guide.zero_grad()
        SiteELBO(word)(model, guide)(x).backward()
        for name, parameter in guide.named_parameters():
            assert parameter.grad.isfinite().all() and parameter.grad.any(), (word, name)


@pytest.mark.parametrize("family", ADMITS)
def test_the_standard_member_of_a_family_lies_in_its_support(family):
    model, _ = pair(family)
    torch.manual_seed(1)
    draws = model.sample_prior(200, x=torch.rand(200, 3))["z"]
    assert families[family].support.check(draws).all()


def test_the_nearly_uniform_angle_is_uniform():
    angle = families["von-mises"].standard(pair("von-mises")[0].latents["z"], torch.zeros(()).double())
    at = torch.linspace(-math.pi, math.pi, 50, dtype=torch.float64)[:, None].expand(-1, 3)
    assert torch.allclose(angle.log_prob(at), torch.tensor(-3 * math.log(2 * math.pi)).double(), atol=1e-3)


def test_every_registered_family_has_a_guide():
    for family in families:
        model = Expectation((3,), family=family, shape=(3,))
        assert [name for name in fitting(model) if name != "unconditional"], family


def test_mixed_families_are_served_and_a_single_one_by_its_own_guide(param_store):
    mixed = GaussianMixtureVAE((2,), num_components=3, latent_dim=2, hidden=(4,))
    assert set(MeanFieldGuide(mixed)(torch.ones(2, 2))) == {"y", "z"}
    with pytest.raises(BadInput, match="the guide 'normal' serves"):
        MeanFieldGuide(GaussianVAE((2,), hidden=(4,)))
    assert "mean-field" in guides
