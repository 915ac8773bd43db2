"""Priors by word: their densities, their options, and the encoder that a VampPrior shares with its guide."""

from __future__ import annotations

import copy
import itertools
import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine

from gumbo.errors import BadInput, UnknownName
from gumbo.guides import CategoricalGuide, NormalGuide, VampGuide, fitting
from gumbo.inference import SiteELBO, fit
from gumbo.inference.estimators._distributions import LinearExtension
from gumbo.models import CategoricalVAE, GaussianVAE
from gumbo.models.priors import code_priors, priors
from gumbo.testing import check_guide, check_model

pytestmark = pytest.mark.usefixtures("param_store")
OPTIONS = {"vamp": {"components": 3}, "mixture": {"components": 3}, "flow": {"transforms": 1, "hidden": 4}}


def vae(prior="standard", **options):
    torch.manual_seed(0)
    return GaussianVAE((4,), latent_dim=2, hidden=(5,), prior=prior, prior_options=OPTIONS.get(prior), **options)


@pytest.mark.parametrize("word", list(priors))
def test_a_prior_integrates_to_one(word):
    model = vae(word).double()
    axis = torch.linspace(-9, 9, 361, dtype=torch.float64)
    z = torch.cartesian_prod(axis, axis)
    total = model.decoder_prior().log_prob(z).exp().sum() * (axis[1] - axis[0]) ** 2
    assert abs(total.item() - 1) < 2e-3


@pytest.mark.parametrize("word", ["mixture", "vamp", "flow"])
def test_a_model_with_the_prior_keeps_its_contract(word):
    model = vae(word)
    x = model.example(3)["x"]
    check_model(model, x)
    check_guide(NormalGuide(model), model, x)


def test_the_vamp_prior_is_the_mean_of_its_guides_posteriors():
    model = vae("vamp")
    guide = VampGuide(model)
    assert guide.encoder is model.decoder_prior.encoder and "vamp" in fitting(model)
    z = torch.randn(6, 2)
    posteriors = [
        poutine.trace(guide).get_trace(u.sigmoid()[None]).nodes["z"]["fn"].log_prob(z)
        for u in model.decoder_prior.pseudo_inputs
    ]
    assert torch.allclose(
        model.decoder_prior().log_prob(z), torch.stack(posteriors).logsumexp(0) - math.log(3), atol=1e-5
    )


def test_training_moves_the_one_encoder_of_prior_and_guide():
    model = vae("vamp")
    guide = VampGuide(model)
    before = copy.deepcopy(model.state_dict())
    x = model.example(16)["x"]
    fit(model, guide, x, epochs=2, batch_size=8, progress=False)
    assert guide.encoder is model.decoder_prior.encoder
    for name, value in model.state_dict().items():
        assert not torch.equal(value, before[name]), name


def test_the_shared_encoder_gets_the_gradient_of_both_of_its_uses():
    """Against the negative ELBO written by hand at the same noise."""
    model = vae("vamp").double()
    guide = VampGuide(model)
    x = torch.bernoulli(torch.full((3, 4), 0.5)).double()
    torch.manual_seed(5)
    loss = SiteELBO("pathwise")(model, guide)(x)
    torch.manual_seed(5)
    z = poutine.trace(guide).get_trace(x).nodes["z"]["value"]
    by_hand = -(
        model.decoder_prior().log_prob(z) + model.likelihood(z).log_prob(x) - model.decoder_prior.encoder(x).log_prob(z)
    ).sum()
    parameters = list(model.parameters())
    for a, b in zip(torch.autograd.grad(loss, parameters), torch.autograd.grad(by_hand, parameters), strict=True):
        assert torch.allclose(a, b, atol=1e-8)


def test_sticking_the_landing_drops_the_guides_score_and_not_the_priors():
    model = vae("vamp").double()
    guide = VampGuide(model)
    x = torch.bernoulli(torch.full((2, 4), 0.5)).double()
    parameters = list(model.decoder_prior.encoder.parameters())

    def mean(word):
        torch.manual_seed(7)
        loss = SiteELBO(word)(model, guide)
        rows = [
            torch.cat([g.flatten() for g in torch.autograd.grad(loss(x.repeat(2000, 1)), parameters)]) for _ in range(8)
        ]
        return torch.stack(rows)

    one, other = mean("pathwise"), mean("stl")
    direction = one.mean(0) / one.mean(0).norm()
    a, b = one @ direction, other @ direction
    error = ((a.var() + b.var()) / len(a)).sqrt()
    assert abs(a.mean() - b.mean()) < 5 * error and error < a.mean() / 20


def test_autoregressive_codes_sum_to_one_and_draw_what_they_score():
    torch.manual_seed(0)
    model = CategoricalVAE((4,), num_latents=2, num_classes=3, hidden=(5,), prior="autoregressive")
    prior = model.decoder_prior()
    every = torch.eye(3)[torch.tensor(list(itertools.product(range(3), repeat=2)))]
    probs = prior.log_prob(every).exp()
    assert abs(probs.sum().item() - 1) < 1e-5
    drawn = prior.sample((20_000,))
    share = (drawn[:, None] == every[None]).flatten(2).all(-1).float().mean(0)
    assert (share - probs).abs().max() < 5 * 0.5 / 20_000**0.5
    first = dist.OneHotCategorical(logits=prior.conditional_logits(every)[:, 0]).probs
    assert torch.allclose(first, first[:1].expand_as(first))  # the first position sees no other


def test_relaxed_codes_meet_the_autoregressive_prior_and_no_product_of_coins():
    torch.manual_seed(0)
    model = CategoricalVAE((4,), num_latents=2, num_classes=3, hidden=(5,), prior="autoregressive")
    prior, codes = model.decoder_prior(), torch.eye(3)[torch.tensor([[0, 2], [1, 1]])]
    assert torch.allclose(LinearExtension(prior.expand((2,))).log_prob(codes), prior.log_prob(codes))


@pytest.mark.parametrize("word", ["rloo", "enumerate", "gumbel-softmax", "straight-through", "reinmax"])
def test_estimators_of_codes_take_an_autoregressive_prior(word):
    torch.manual_seed(0)
    model = CategoricalVAE((4,), num_latents=2, num_classes=3, hidden=(5,), prior="autoregressive")
    guide = CategoricalGuide(model)
    with pyro.validation_enabled(True):
        SiteELBO(word)(model, guide)(model.example(3)["x"]).backward()
    for parameter in (*model.decoder_prior.parameters(), *guide.parameters()):
        assert parameter.grad.isfinite().all() and parameter.grad.any()


def test_unknown_priors_options_and_guides_are_refused():
    with pytest.raises(UnknownName, match="vamp"):
        GaussianVAE((4,), prior="vampire")
    with pytest.raises(BadInput, match="no option 'pseudo'; its options: components"):
        GaussianVAE((4,), prior="vamp", prior_options={"pseudo": 3})
    with pytest.raises(BadInput, match="components"):
        GaussianVAE((4,), prior="vamp", prior_options={"components": 0})
    with pytest.raises(BadInput, match="relaxed"):
        CategoricalVAE((4,), relaxed=True, prior="autoregressive")
    with pytest.raises(BadInput, match="no VampPrior"):
        VampGuide(vae())
    assert {"uniform", "independent", "autoregressive"} <= set(code_priors)
