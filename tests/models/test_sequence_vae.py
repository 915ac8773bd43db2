"""Autoencoders of tokens: a law over sequences, drawn as it is scored, and learned from words."""

from __future__ import annotations

import itertools

import pyro
import pytest
import torch

from gumbo.errors import BadInput
from gumbo.guides import NormalGuide
from gumbo.inference import SiteELBO, evaluate, fit
from gumbo.models import SequenceVAE

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
