"""Walks over a grid: moves, returns, and policy gradients against forward marginals and listed walks."""

from __future__ import annotations

import itertools

import pytest
import torch
from pyro import poutine

from gumbo.errors import BadInput
from gumbo.guides import GridPolicy, LayeredGuide
from gumbo.inference import SiteELBO
from gumbo.inference.auditing.exact import exact_elbo
from gumbo.models import Expectation, GridWorld

pytestmark = pytest.mark.usefixtures("param_store")


def pair(steps=3):
    torch.manual_seed(0)
    model = GridWorld(height=2, width=2, steps=steps).double()
    guide = GridPolicy(model).double()
    torch.nn.init.normal_(guide.encoder_logits)
    return model, guide


def walked(actions):
    """The returns of a walk on the grid of 2 x 2, by hand."""
    row = column = total = 0
    for action in actions:
        if (row, column) != (1, 1):
            down, right = ((-1, 0), (1, 0), (0, -1), (0, 1))[action]
            row, column = min(max(row + down, 0), 1), min(max(column + right, 0), 1)
        total += 0 if (row, column) == (1, 1) else -1
    return total


@pytest.mark.parametrize("steps", [1, 3, 5])
def test_forward_marginals_are_the_sum_over_listed_walks(steps):
    model, guide = pair(steps)
    walks = torch.tensor(list(itertools.product(range(4), repeat=steps)))
    values = {f"a{t + 1}": torch.eye(4).double()[walks[:, t]] for t in range(steps)}
    trace = poutine.trace(poutine.condition(guide, values)).get_trace(torch.ones(len(walks), 1).double())
    trace.compute_log_prob()
    probs = sum(trace.nodes[name]["log_prob"] for name in values).exp()
    returns = torch.tensor([walked(walk) for walk in walks.tolist()]).double()
    assert torch.isclose(probs.sum(), torch.ones(()).double())
    listed, marginal = probs @ returns, model.expected_return(guide.encoder_logits)
    assert torch.isclose(listed, marginal)
    one, other = (torch.autograd.grad(value, guide.encoder_logits)[0] for value in (listed, marginal))
    assert torch.allclose(one, other)
    model_trace = poutine.trace(poutine.condition(model, values)).get_trace(torch.ones(len(walks), 1).double())
    assert torch.equal(model_trace.nodes["_RETURN"]["value"], returns)


def test_enumeration_at_kl_weight_zero_is_the_exact_policy_gradient():
    model, guide = pair(3)
    x = torch.ones(1, 1).double()
    loss = SiteELBO("enumerate", kl_weight=0)(model, guide)(x)
    exact = -model.expected_return(guide.encoder_logits)
    assert torch.isclose(loss, exact)
    one, other = (torch.autograd.grad(value, guide.encoder_logits)[0] for value in (loss, exact))
    assert torch.allclose(one, other)


@pytest.mark.parametrize("word", ["score", "rloo"])
def test_the_mean_policy_gradient_is_the_exact_one(word):
    model, guide = pair(3)
    exact = torch.autograd.grad(-model.expected_return(guide.encoder_logits), guide.encoder_logits)[0].flatten()
    loss = SiteELBO(word, kl_weight=0, num_particles=2)(model, guide)
    x = torch.ones(2000, 1).double()
    found = torch.stack([torch.autograd.grad(loss(x) / len(x), guide.encoder_logits)[0].flatten() for _ in range(15)])
    error = found.std(0) / len(found) ** 0.5
    misses = (found.mean(0) - exact).abs() / error.clamp(min=1e-12)
    assert misses[exact.abs() > 1e-9].max() < 6 and error.max() < exact.abs().max() / 5


def test_a_reward_weighs_no_action_after_it():
    """The last action cannot change the first reward: with all others zero its gradient is exactly zero."""
    model, guide = pair(3)
    model.rewards.zero_()
    loss = SiteELBO("score", kl_weight=0)(model, guide)
    x = torch.ones(50, 1).double()
    assert not torch.autograd.grad(loss(x), guide.encoder_logits)[0].any()
    trace = poutine.trace(guide).get_trace(x)
    seen = poutine.trace(poutine.replay(model, trace=trace)).get_trace(x)
    order = [name for name in seen.nodes if name.startswith(("a", "reward"))]
    assert order == ["a1", "reward1", "a2", "reward2", "a3", "reward3"]


def test_the_optimum_is_the_shortest_way():
    assert GridWorld(height=3, width=4, steps=9).optimum() == -4.0
    assert GridWorld(height=3, width=4, steps=2).optimum() == -2.0  # too short to arrive


def test_other_guides_serve_and_other_models_do_not():
    model, _ = pair(2)
    assert LayeredGuide(model).double()(torch.ones(3, 1).double())["a2"].shape == (3, 4)
    assert torch.isfinite(exact_elbo(model, LayeredGuide(model).double(), torch.ones(1, 1).double()))
    with pytest.raises(BadInput, match="no grid world"):
        GridPolicy(Expectation((1,), family="categorical", shape=(4,)))
    with pytest.raises(BadInput, match="nowhere to go"):
        GridWorld(height=1, width=1)
