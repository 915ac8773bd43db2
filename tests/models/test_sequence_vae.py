"""Autoencoders of tokens: a law over sequences, drawn as it is scored, and learned from words."""

from __future__ import annotations

import itertools

import pyro
import pytest
import torch

from gumbo.errors import BadInput
from gumbo.guides import NormalGuide, TokenPolicy, fitting
from gumbo.inference import SiteELBO, evaluate, fit
from gumbo.models import Expectation, SequenceVAE

pytestmark = pytest.mark.usefixtures("param_store")


def test_sequences_sum_to_one_and_are_drawn_as_they_are_scored():
    torch.manual_seed(0)
    model = SequenceVAE((3,), vocabulary=2, latent_dim=2, rnn_hidden=4)
    law = model.likelihood(torch.randn(2, 2))
    every = torch.tensor(list(itertools.product([0.0, 1.0], repeat=3)))
    probs = law.log_prob(every.unsqueeze(1).expand(-1, 2, -1)).exp()
    assert torch.allclose(probs.sum(0), torch.ones(2), atol=1e-5)
    drawn = law.sample((20_000,))
    share = (drawn.unsqueeze(0) == every[:, None, None]).all(-1).float().mean(1)
    assert (share - probs).abs().max() < 5 * 0.5 / 20_000**0.5


def test_a_token_changes_what_follows_and_nothing_before():
    torch.manual_seed(0)
    model = SequenceVAE((3,), vocabulary=3, latent_dim=2, rnn_hidden=4)
    law = model.likelihood(torch.randn(1, 2))
    one, other = (law._steps(torch.tensor([[0.0, token, 2.0]]), torch.Size((1,)))[1] for token in (0.0, 1.0))
    same = (one == other).all(-1)[0]
    assert same[0] and same[1] and not same[2]


def test_training_learns_which_words_there_are():
    torch.manual_seed(0)
    x = torch.tensor([[0.0, 1.0, 0.0, 1.0], [2.0, 2.0, 1.0, 1.0]]).repeat(50, 1)
    model = SequenceVAE((4,), vocabulary=3, latent_dim=2, rnn_hidden=16, hidden=(16,))
    guide = NormalGuide(model)
    fit(model, guide, x, loss=SiteELBO("pathwise"), lr=2e-2, batch_size=100, epochs=60, progress=False)
    found = evaluate(model, guide, x[:2], num_samples=50)
    assert found.log_evidence > -0.9  # two words alike are log 1/2 each
    drawn = model.sample_prior(200)["x"]
    known = (drawn.unsqueeze(1) == x[:2]).all(-1).any(-1).float().mean()
    assert known > 0.85


def test_what_is_no_token_is_refused():
    model = SequenceVAE((3,), vocabulary=3)
    with pyro.validation_enabled(True), pytest.raises(BadInput, match="0 to 2: set vocabulary"):
        model(torch.full((2, 3), 3.0))


# --- rewards -------------------------------------------------------------------------------------------------------


def bigrams(tokens, x):
    """A reward for each pair of neighbours, from a fixed table."""
    table = torch.tensor([[0.0, 1.0, -1.0], [0.5, 0.0, 2.0], [1.0, -2.0, 0.0]]).to(tokens)
    return torch.einsum("...lv,vw,...lw->...", tokens[..., :-1, :], table, tokens[..., 1:, :])


def writer(reward=bigrams, length=3, **options):
    torch.manual_seed(0)
    sizes = {"vocabulary": 3, "latent_dim": 1, "rnn_hidden": 5} | options
    model = SequenceVAE((1,), reward=reward, length=length, **sizes).double()
    policy = TokenPolicy(model).double()
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model, policy


def at_noise(program, z):
    """The program at a value of its noise, whose own terms are left out."""
    return pyro.poutine.block(pyro.poutine.condition(program, data={"z": z}), hide=["z"])


def law_of(program, prefix, z, length=3):
    """Every sequence ``(S, L, V)`` with its probability ``(S, B)`` under a generator at ``z``, by formulas."""
    every = torch.tensor(list(itertools.product(range(3), repeat=length)))
    one_hot = torch.nn.functional.one_hot(every, 3).to(z)
    state, rnn, output = (getattr(program, f"{prefix}_{part}") for part in ("state", "rnn", "output"))
    found = []
    for tokens in one_hot:
        h, before, log_p = state(z).tanh(), z.new_zeros(len(z), 3), z.new_zeros(len(z))
        for token in tokens:
            h = rnn(before, h)
            log_p = log_p + output(h).log_softmax(-1) @ token
            before = token.expand(len(z), -1)
        found.append(log_p)
    return one_hot, torch.stack(found).exp()


@pytest.mark.parametrize("alpha", [0.0, 0.7])
def test_the_objective_is_the_expected_reward_less_the_divergence_from_the_model(alpha):
    """With every token listed and the policy's noise given, value and gradient are those of the sum over sequences."""
    model, policy = writer()
    z, x = torch.randn(4, 1).double(), torch.ones(4, 1).double()
    given = at_noise(model, z), at_noise(policy, z)
    words = dict.fromkeys(model.tokens, "enumerate")
    loss = SiteELBO(words, kl_weight=alpha).differentiable_loss(*given, x)
    tokens, q = law_of(policy, "encoder", z)
    _, p = law_of(model, "decoder", z)
    exact = (q * (bigrams(tokens, x).unsqueeze(-1) - alpha * (q.log() - p.log()))).sum()
    assert torch.isclose(-loss, exact)
    leaves = [*policy.parameters()]
    pairs = zip(torch.autograd.grad(-loss, leaves), torch.autograd.grad(exact, leaves), strict=True)
    assert all(torch.allclose(one, other, atol=1e-9) for one, other in pairs)


def test_a_baseline_lowers_the_variance_and_keeps_the_mean():
    model, policy = writer(lambda tokens, x: 5 + bigrams(tokens, x))
    z, x = torch.zeros(10, 1).double(), torch.ones(10, 1).double()
    given = at_noise(model, z), at_noise(policy, z)
    tokens, q = law_of(policy, "encoder", z)
    leaves = [*policy.parameters()]
    exact = torch.autograd.grad((q * (5 + bigrams(tokens, x).unsqueeze(-1))).sum(), leaves)
    exact = torch.cat([part.flatten() for part in exact])
    direction, spread = exact / exact.norm(), {}
    for word in ("score", "rloo"):
        torch.manual_seed(1)
        loss = SiteELBO(dict.fromkeys(model.tokens, word), kl_weight=0, num_particles=4)
        draws = []
        for _ in range(60):
            gradient = torch.autograd.grad(-loss.differentiable_loss(*given, x), leaves)
            draws.append(torch.cat([part.flatten() for part in gradient]) @ direction)
        draws = torch.stack(draws)
        spread[word] = draws.var()
        assert abs(draws.mean() - exact.norm()) < 4 * draws.std() / 60**0.5, word
    assert spread["rloo"] < 0.2 * spread["score"]


@pytest.mark.slow
@pytest.mark.parametrize("word", ["nvil", "gumbel-softmax"])
def test_a_policy_learns_to_count(word):
    torch.manual_seed(0)
    model = SequenceVAE((1,), vocabulary=3, latent_dim=2, rnn_hidden=12, reward="counting", length=4)
    policy, rows = TokenPolicy(model), torch.ones(40, 1)
    loss = SiteELBO({"z": "pathwise", "*": word}, kl_weight=0, num_particles=2)(model, policy)
    loss.initialize(rows)
    optimizer = torch.optim.Adam(loss.parameters(), lr=0.03)
    for _ in range(50):
        optimizer.zero_grad()
        loss(rows).backward()
        optimizer.step()
    drawn = policy(torch.ones(500, 1))
    tokens = torch.stack([drawn[site] for site in model.tokens], -2)
    assert model.reward(tokens, None).mean() > 2  # of at most 3; one of a fresh policy


def test_a_model_of_likelihood_goes_on_with_a_reward():
    """The state of one loads into the other, and the policy starts with the law of the trained generator."""
    torch.manual_seed(0)
    sizes = {"vocabulary": 3, "latent_dim": 2, "rnn_hidden": 6}
    learned = SequenceVAE((4,), **sizes)
    rewarded = SequenceVAE((4,), reward="counting", **sizes)
    rewarded.load_state_dict(learned.state_dict())
    policy, z = TokenPolicy(rewarded), torch.randn(5, 2)
    drawn = pyro.poutine.condition(policy, data={"z": z})(torch.ones(5, 4))
    tokens = torch.stack([drawn[site] for site in rewarded.tokens], -2)
    trace = pyro.poutine.trace(pyro.poutine.condition(rewarded, data=drawn)).get_trace(torch.ones(5, 4))
    trace.compute_log_prob()
    by_sites = sum(trace.nodes[site]["log_prob"] for site in rewarded.tokens)
    assert torch.allclose(by_sites, learned.likelihood(z).log_prob(tokens.argmax(-1)), atol=1e-5)


def test_rewards_lengths_and_other_models_are_refused():
    with pytest.raises(BadInput, match="goes with a reward"):
        SequenceVAE((3,), length=2)
    with pytest.raises(BadInput, match=r"f\(z, x\) is \(2, 3\), expected a number for each row, \(2,\)"):
        SequenceVAE((1,), vocabulary=3, reward=lambda t, x: t.sum(-1), length=3)(torch.ones(2, 1))
    assert "token-policy" in fitting(SequenceVAE((1,), reward="counting", length=3))
    with pytest.raises(BadInput, match="no sequence VAE with a reward"):
        TokenPolicy(Expectation((1,)))
    with pytest.raises(BadInput, match="no sequence VAE with a reward"):
        TokenPolicy(SequenceVAE((3,)))
