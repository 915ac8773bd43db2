"""Models of counts: their densities against formulas by hand, and what reads their topics."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine

from gumbo.errors import BadInput, UnknownName
from gumbo.guides import MeanFieldGuide, NormalGuide
from gumbo.inference import SiteELBO, to_arviz
from gumbo.models import (
    LatentDirichletAllocation,
    NegativeBinomialVAE,
    PoissonVAE,
    ProdLDA,
    npmi,
    perplexity,
    top_words,
)

pytestmark = pytest.mark.usefixtures("param_store")
COUNTS = torch.tensor([[0.0, 2.0, 1.0, 5.0], [3.0, 0.0, 0.0, 1.0]])


def scored(model, x, **given):
    trace = poutine.trace(model).get_trace(x, **given)
    trace.compute_log_prob()
    return trace


def test_lda_sums_the_topic_of_each_word_out():
    """Word by word, each with its own topic, listed: the product over words is the multinomial less its coefficient."""
    torch.manual_seed(0)
    model = LatentDirichletAllocation((4,), num_topics=3, concentration=0.7)
    trace = scored(model, COUNTS)
    theta, topics = trace.nodes["theta"]["value"], model.topics()
    for row, counts in enumerate(COUNTS):
        words = [i for i, count in enumerate(counts) for _ in range(int(count))]
        by_word = sum(sum(theta[row, k] * topics[k, i] for k in range(3)).log() for i in words)
        ways = torch.lgamma(counts.sum() + 1) - torch.lgamma(counts + 1).sum()
        assert torch.isclose(trace.nodes["x"]["log_prob"][row], by_word + ways, atol=1e-4)
    prior = dist.Dirichlet(torch.full((3,), 0.7)).log_prob(theta)
    assert torch.allclose(trace.nodes["theta"]["log_prob"], prior)


def test_prod_lda_multiplies_its_experts():
    torch.manual_seed(0)
    model = ProdLDA((4,), num_topics=3)
    z = torch.randn(2, 3)
    logits = z.softmax(-1) @ model.decoder.weight.mT + model.decoder.bias
    expected = [dist.Multinomial(int(n.sum()), logits=one).log_prob(n) for n, one in zip(COUNTS, logits, strict=True)]
    assert torch.allclose(model.likelihood(z).log_prob(COUNTS), torch.stack(expected), atol=1e-4)


@pytest.mark.parametrize("kind", [LatentDirichletAllocation, ProdLDA])
def test_predicted_documents_are_as_long_as_the_given_ones(kind):
    torch.manual_seed(0)
    model = kind((4,), num_topics=2, hidden=(4,))
    guide = (NormalGuide if kind is ProdLDA else MeanFieldGuide)(model)
    drawn = to_arviz(model, guide, COUNTS, num_samples=5, seed=0)
    assert (drawn.posterior_predictive["x"].sum("x_dim_0") == COUNTS.sum(-1).numpy()).all()
    assert (model.sample_prior(3)["x"].sum(-1) == 100).all()


def test_lda_finds_the_topics_that_documents_were_drawn_from():
    torch.manual_seed(0)
    truth = torch.zeros(2, 6)
    truth[0, :3] = truth[1, 3:] = 1 / 3
    theta = dist.Dirichlet(torch.full((2,), 0.3)).sample((200,))
    x = dist.Multinomial(30, probs=theta @ truth).sample()
    model = LatentDirichletAllocation((6,), num_topics=2, hidden=(16,))
    guide = MeanFieldGuide(model)
    loss = SiteELBO("pathwise")(model, guide)
    optimizer = torch.optim.Adam([*model.parameters(), *guide.parameters()], lr=0.05)
    for _ in range(200):
        optimizer.zero_grad()
        loss(x).backward()
        optimizer.step()
    found = model.topics().detach()
    found = found if found[0, 0] > found[1, 0] else found.flip(0)
    assert (found - truth).abs().max() < 0.08


def test_negative_binomial_means_are_the_library_times_shares():
    torch.manual_seed(0)
    model = NegativeBinomialVAE((4,), latent_dim=2, hidden=(5,))
    given = {key: value for key, value in model.inputs(COUNTS).items() if key != "x"}
    assert torch.allclose(given["log_library"].exp().squeeze(-1), COUNTS.sum(-1))
    z = torch.randn(2, 2)
    law = model.likelihood(z, given["log_library"].exp())
    assert torch.allclose(law.mean.sum(-1), COUNTS.sum(-1), atol=1e-3)
    spread = law.mean + law.mean**2 / (model.decoder_log_total_count.exp() + 1e-3)
    assert torch.allclose(law.variance, spread, rtol=1e-4)


def test_a_latent_library_is_a_site_and_the_batch_moves_the_shares():
    torch.manual_seed(0)
    model = NegativeBinomialVAE((4,), latent_dim=2, hidden=(5,), library="latent", library_loc=3.0, num_batches=2)
    trace = scored(model, **model.inputs(COUNTS, torch.tensor([0, 1])))
    library = trace.nodes["library"]
    expected = dist.LogNormal(3.0, 1.0).log_prob(library["value"]).squeeze(-1)
    assert torch.allclose(library["log_prob"], expected)
    z, one = torch.zeros(2, 2), torch.ones(2, 1)
    first, second = model.likelihood(z, one, torch.eye(2)).mean
    assert not torch.allclose(first, second)
    with pytest.raises(BadInput, match="num_batches=2"):
        model.inputs(COUNTS, torch.tensor([0, 2]))
    with pytest.raises(UnknownName, match="observed"):
        NegativeBinomialVAE((4,), library="seen")


def test_encoders_of_counts_see_their_logarithms():
    model = NegativeBinomialVAE((4,), latent_dim=2, hidden=(5,), library="none")
    guide = NormalGuide(model, hidden=())
    assert torch.allclose(guide.features(COUNTS, {}), COUNTS.log1p())


@pytest.mark.parametrize("counts, mean", [("poisson", 1.0), ("binomial", 4.0), ("negative-binomial", 8.0)])
def test_latent_counts_have_the_prior_that_the_option_says(counts, mean):
    torch.manual_seed(0)
    model = PoissonVAE((3,), num_latents=2, hidden=(4,), counts=counts)
    z = model.sample_prior(4000)["z"]
    assert (z == z.floor()).all() and (z.mean() - mean).abs() < 5 * (mean * 2 / 8000) ** 0.5
    x = model.example(3)["x"]
    law = scored(pyro.poutine.condition(model, {"z": torch.ones(3, 2)}), x).nodes["z"]
    assert torch.allclose(law["log_prob"], law["fn"].log_prob(torch.ones(3, 2)))


def test_counts_are_asked_for():
    for model in (LatentDirichletAllocation((4,)), ProdLDA((4,)), NegativeBinomialVAE((4,), library="none")):
        with pyro.validation_enabled(True), pytest.raises(BadInput, match="counts"):
            model(COUNTS + 0.5)
    with pytest.raises(UnknownName, match="binomial"):
        PoissonVAE((4,), counts="gamma")


def test_perplexity_of_the_right_shares_is_the_words_entropy():
    shares = torch.tensor([0.5, 0.25, 0.125, 0.125])
    counts = torch.tensor([[8.0, 4.0, 2.0, 2.0], [4.0, 2.0, 1.0, 1.0]])
    log_prob = [dist.Multinomial(int(n.sum()), probs=shares).log_prob(n) for n in counts]
    found = perplexity(torch.stack(log_prob), counts)
    assert abs(found - 2**1.75) < 1e-4


def test_npmi_is_zero_for_words_that_are_independent():
    documents = torch.cartesian_prod(torch.tensor([0.0, 1.0]), torch.tensor([0.0, 2.0]))
    assert npmi(torch.tensor([[0.6, 0.4]]), documents).abs().max() < 1e-6
    with pytest.raises(BadInput, match="count is 1 of 2 words: expected at least two"):
        npmi(torch.tensor([[0.6, 0.4]]), documents, count=1)
    with pytest.raises(BadInput, match="3 words"):
        top_words(torch.ones(1, 2) / 2, ["a", "b", "c"])
