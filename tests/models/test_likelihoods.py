"""Likelihoods by word: they are laws over what data can be, and models that take the word keep their contract."""

from __future__ import annotations

import itertools

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn

from gumbo.errors import BadInput, UnknownName
from gumbo.models import BernoulliVAE, CategoricalVAE, ConvVAE, GaussianVAE, HierarchicalVAE, models
from gumbo.models.likelihoods import MultinomialCounts, Observation, likelihoods
from gumbo.testing import check_model

SMALL = {"bernoulli": 2, "poisson": 60, "negative-binomial": 400, "zero-inflated-poisson": 60}
SMALL |= {"zero-inflated-negative-binomial": 400, "categorical": 10}


@pytest.mark.parametrize("word", SMALL)
def test_a_likelihood_of_single_numbers_sums_to_one(word):
    torch.manual_seed(0)
    observation = Observation(word, (1,))
    law = observation(torch.randn(3, observation.outputs).double())
    values = torch.arange(SMALL[word], dtype=torch.float64)[:, None, None].expand(-1, 3, 1)
    assert torch.allclose(law.log_prob(values).exp().sum(0), torch.ones(3).double(), atol=1e-6)


@pytest.mark.parametrize("levels", [2, 5, 256])
def test_the_discretized_logistic_sums_to_one(levels):
    torch.manual_seed(0)
    observation = Observation("discretized-logistic", (1,), {"levels": levels})
    law = observation(3 * torch.randn(20, observation.outputs).double())
    values = torch.linspace(0, 1, levels, dtype=torch.float64)[:, None, None].expand(-1, 20, 1)
    assert torch.allclose(law.log_prob(values).exp().sum(0), torch.ones(20).double(), atol=1e-9)


def test_multinomial_counts_sum_to_one_over_an_event_of_any_shape():
    torch.manual_seed(0)
    law = MultinomialCounts(torch.randn(2, 2).double(), rank=2, total_count=3)
    every = [v for v in itertools.product(range(4), repeat=4) if sum(v) == 3]
    values = torch.tensor(every, dtype=torch.float64).unflatten(-1, (2, 2))
    assert torch.allclose(law.log_prob(values).exp().sum(), torch.ones(()).double())
    mean = (law.log_prob(values).exp()[:, None, None] * values).sum(0)
    assert torch.allclose(mean, law.mean)


def test_multinomial_counts_score_each_row_by_its_own_total():
    logits = torch.randn(2, 4, generator=torch.Generator().manual_seed(0))
    counts = torch.tensor([[1.0, 0.0, 2.0, 0.0], [5.0, 1.0, 0.0, 3.0]])
    found = MultinomialCounts(logits).log_prob(counts)
    expected = [
        dist.Multinomial(int(row.sum()), logits=one).log_prob(row) for one, row in zip(logits, counts, strict=True)
    ]
    assert torch.allclose(found, torch.stack(expected))


def test_an_impossible_number_that_does_not_occur_leaves_the_others_their_probability():
    logits = torch.tensor([0.3, -float("inf"), -0.2]).double().requires_grad_()
    counts = torch.tensor([2.0, 0.0, 1.0]).double()
    found = MultinomialCounts(logits).log_prob(counts)
    assert torch.allclose(found, dist.Multinomial(3, logits=logits).log_prob(counts))
    assert torch.autograd.grad(found, logits)[0].isfinite().all()
    assert MultinomialCounts(logits).log_prob(torch.tensor([2.0, 1.0, 0.0]).double()) == -float("inf")


def test_one_level_is_refused():
    with pytest.raises(BadInput, match="1 level: expected at least 0 and 1"):
        Observation("discretized-logistic", (1,), {"levels": 1})(torch.zeros(1, 2))


def test_multinomial_draws_of_given_totals_have_the_law_of_each_total():
    torch.manual_seed(0)
    logits = torch.randn(2, 2).double()
    counts = torch.tensor([[3.0, 0.0], [0.0, 1.0]], dtype=torch.float64)
    law = MultinomialCounts(logits).with_totals(counts)
    drawn = law.expand((2,)).sample((20_000,))
    assert (drawn.sum(-1) == counts.sum(-1)).all()
    for row, total in enumerate((3, 1)):
        for first in range(total + 1):
            chance = law.log_prob(torch.tensor([first, total - first]).double().expand(2, 2))[row].exp().item()
            share = (drawn[:, row, 0] == first).double().mean().item()
            assert abs(share - chance) < 4.5 * (chance * (1 - chance) / 20_000) ** 0.5
    assert torch.allclose(law.mean, counts.sum(-1, keepdim=True) * logits.softmax(-1))
    assert MultinomialCounts(logits).with_totals(torch.zeros(2, 2)).sample().sum() == 0


def test_zero_inflation_moves_mass_to_zero_alone():
    law, gate = torch.tensor([[0.7, 0.4]]), torch.tensor([[-0.3]])
    plain = Observation("negative-binomial", (1,))(law)
    inflated = Observation("zero-inflated-negative-binomial", (1,))(torch.cat([law, gate], -1))
    share, counts = gate.sigmoid().squeeze(), torch.arange(6.0)[:, None, None]
    expected = (1 - share) * plain.log_prob(counts).exp() + share * (counts.flatten(1) == 0)
    assert torch.allclose(inflated.log_prob(counts).exp(), expected, atol=1e-6)


@pytest.mark.parametrize("word", list(likelihoods))
def test_a_model_with_the_likelihood_keeps_its_contract(word):
    torch.manual_seed(0)
    model = GaussianVAE((1, 2, 2), latent_dim=2, hidden=(5,), likelihood=word)
    check_model(model, model.example(3)["x"])


@pytest.mark.parametrize(
    "name", ["bernoulli-vae", "categorical-vae", "gaussian-mixture-vae", "hierarchical-vae", "semi-supervised-vae"]
)
def test_counts_are_a_choice_of_each_model(name, param_store):
    torch.manual_seed(0)
    model = models[name]((3,), likelihood="zero-inflated-negative-binomial", **models[name].variants[0])
    x = model.example(3)["x"]
    with pyro.validation_enabled(True):
        assert torch.isfinite(pyro.poutine.trace(model).get_trace(x).log_prob_sum())
    assert type(model)(**model.config).observation.word == "zero-inflated-negative-binomial"


@pytest.mark.parametrize("word", ["zero-inflated-negative-binomial", "categorical", "heteroscedastic-normal"])
@pytest.mark.parametrize(
    "name", ["sigmoid-belief-network", "structured-prediction", "deep-markov-model", "hidden-markov-model"]
)
def test_layers_and_sequences_take_every_likelihood(name, word):
    torch.manual_seed(0)
    options = (
        {"latent_dim": 6, "transition_hidden": 8} if name == "deep-markov-model" else {}
    )  # rectifiers not all dead
    model = models[name]((1, 4, 4), likelihood=word, **{**models[name].variants[-1], **options})
    given = model.example(3)
    check_model(model, given.pop("x"), **given)


def test_a_masked_step_of_counts_counts_for_nothing():
    """By the likelihood of the valid steps alone, whatever stands in the padding."""
    torch.manual_seed(0)
    for name in ("deep-markov-model", "hidden-markov-model"):
        model = models[name]((3, 2), likelihood="poisson", **models[name].variants[0])
        mask = torch.tensor([[1.0, 1.0, 0.0], [1.0, 0.0, 0.0]])
        x = torch.poisson(torch.full((2, 3, 2), 2.0))
        with torch.no_grad(), pyro.get_param_store().scope():
            trace = pyro.poutine.trace(model).get_trace(x, mask=mask)
            other = x + 7 * (1 - mask).unsqueeze(-1)
            again = pyro.poutine.trace(pyro.poutine.replay(model, trace)).get_trace(other, mask=mask)
        assert torch.isclose(trace.log_prob_sum(), again.log_prob_sum())
        drawn = model.example(4)
        assert (drawn["x"] * (1 - drawn["mask"]).unsqueeze(-1) == 0).all()


def test_convolutions_give_each_output_of_the_likelihood_its_maps():
    torch.manual_seed(0)
    model = ConvVAE((2, 4, 4), channels=(3,), likelihood="discretized-logistic", likelihood_options={"levels": 4})
    check_model(model, model.example(3)["x"])


def test_the_sd_of_a_normal_likelihood_is_an_option_too():
    model = GaussianVAE((2,), hidden=(4,), likelihood="normal", likelihood_options={"sd": 0.25})
    assert model.likelihood(torch.zeros(1, 50)).base_dist.scale.unique() == 0.25
    model = HierarchicalVAE((2,), likelihood="normal", likelihood_options={"sd": 0.25})
    assert model.likelihood(torch.zeros(1, 32)).base_dist.scale.unique() == 0.25


@pytest.mark.parametrize(
    "word, bad, says",
    [
        ("poisson", 0.5, "counts"),
        ("poisson", -1.0, "counts"),
        ("multinomial", 1.5, "counts"),
        ("categorical", 10.0, "0 to 9"),
        ("discretized-logistic", 0.123, "levels"),
        ("bernoulli", 0.5, "zeros and ones"),
    ],
)
def test_data_that_the_likelihood_gives_no_probability_are_refused(word, bad, says, param_store):
    model = GaussianVAE((2,), hidden=(4,), likelihood=word)
    with pyro.validation_enabled(True), pytest.raises(BadInput, match=says):
        model(torch.full((2, 2), bad))


def test_unknown_words_and_options_are_refused():
    with pytest.raises(UnknownName, match="poisson"):
        GaussianVAE((2,), likelihood="poison")
    with pytest.raises(BadInput, match="no option 'levels'; its options: none"):
        CategoricalVAE((2,), likelihood="poisson", likelihood_options={"levels": 3})
    with pytest.raises(BadInput, match="levels"):
        CategoricalVAE((2,), likelihood="discretized-logistic", likelihood_options={"levels": 0.5})


def test_the_slope_of_leaky_relu_can_be_set_and_the_guide_mirrors_it():
    from gumbo.guides import BernoulliGuide

    model = BernoulliVAE((4,), num_latents=3, hidden=(5,), activation="leaky-relu(0.3)")
    for network in (model, BernoulliGuide(model)):
        slopes = {layer.negative_slope for layer in network.modules() if isinstance(layer, nn.LeakyReLU)}
        assert slopes == {0.3}
    for wrong in ("leaky-relu(x)", "relu(0.3)", "leaky-relu(0.3", "leaky-relu()"):
        with pytest.raises(BadInput, match="take a number"):
            BernoulliVAE((4,), activation=wrong)
