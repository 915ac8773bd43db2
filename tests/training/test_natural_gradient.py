"""Fisher-vector products, conjugate gradients, and the natural gradient against Adam."""

from __future__ import annotations

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch.distributions import Bernoulli, Categorical, Independent, MultivariateNormal, Normal, kl_divergence

from gumbo.errors import BadInput
from gumbo.guides import BernoulliGuide, FlowGuide, LayeredGuide, NormalGuide, TriangularNormalGuide
from gumbo.inference.training.natural_gradient import (
    NaturalGradient,
    conjugate_gradients,
    fisher_product,
    guide_distributions,
)
from gumbo.models import BernoulliVAE, GaussianVAE, HeteroscedasticRegression, SigmoidBeliefNetwork


def leaf(*values):
    return torch.tensor(values, dtype=torch.float64, requires_grad=True)


def matrix(product, size):
    return torch.stack([product(row) for row in torch.eye(size, dtype=torch.float64)])


def test_fisher_of_a_normal_is_its_closed_form():
    loc, scale = leaf(0.3, -1.0), leaf(0.5, 2.0)
    product = fisher_product(lambda: Normal(loc, scale), [loc, scale])
    expected = torch.diag(torch.cat([scale**-2, 2 * scale**-2])).detach()
    torch.testing.assert_close(matrix(product, 4), expected, rtol=1e-12, atol=1e-12)


def test_fisher_of_logits_is_the_covariance_of_the_choice():
    logits = leaf(0.3, -1.0, 0.7)
    p = logits.detach().softmax(-1)
    found = matrix(fisher_product(lambda: Categorical(logits=logits), [logits]), 3)
    torch.testing.assert_close(found, torch.diag(p) - torch.outer(p, p), rtol=1e-10, atol=1e-12)
    found = matrix(fisher_product(lambda: Independent(Bernoulli(logits=logits), 1), [logits]), 3)
    s = logits.detach().sigmoid()
    torch.testing.assert_close(found, torch.diag(s * (1 - s)), rtol=1e-10, atol=1e-12)


def test_fisher_of_a_network_is_that_of_its_scores(param_store):
    """E[score scoreᵀ] of the outputs y, by listing: a network of two Bernoulli outputs over three rows."""
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.Tanh(), torch.nn.Linear(3, 2)).double()
    x = torch.randn(3, 2, dtype=torch.float64)
    parameters = list(net.parameters())
    size = sum(p.numel() for p in parameters)
    found = matrix(fisher_product(lambda: Bernoulli(logits=net(x)), parameters), size)
    expected = torch.zeros_like(found)
    for row in range(3):
        for y in (torch.tensor(bits, dtype=torch.float64) for bits in ([0, 0], [0, 1], [1, 0], [1, 1])):
            log_prob = Bernoulli(logits=net(x[row])).log_prob(y).sum()
            score = torch.cat([g.flatten() for g in torch.autograd.grad(log_prob, parameters)])
            expected += log_prob.exp().detach() * torch.outer(score, score)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


def test_conjugate_gradients_solve_in_as_many_steps_as_eigenvalues():
    torch.manual_seed(1)
    root = torch.randn(6, 6, dtype=torch.float64)
    spd, b = root @ root.T + torch.eye(6), torch.randn(6, dtype=torch.float64)
    calls = []

    def product(v):
        calls.append(v)
        return spd @ v

    torch.testing.assert_close(conjugate_gradients(product, b, iterations=12), torch.linalg.solve(spd, b))
    assert len(calls) <= 8
    few = conjugate_gradients(lambda v: spd @ v, b, iterations=2)
    assert not torch.allclose(few, torch.linalg.solve(spd, b))
    assert not conjugate_gradients(product, torch.zeros(6, dtype=torch.float64)).any()


def test_a_step_is_the_damped_inverse_times_the_gradient():
    loc, scale = leaf(0.3, -1.0), leaf(0.5, 2.0)
    before = torch.cat([loc, scale]).detach().clone()
    optimizer = NaturalGradient([loc, scale], lr=0.5, damping=0.1)
    kl_divergence(Normal(loc, scale), Normal(torch.zeros(2).double(), 1.0)).sum().backward()
    gradient = torch.cat([loc.grad, scale.grad])
    optimizer.step(lambda: Normal(loc, scale))
    fisher = torch.cat([before[2:] ** -2, 2 * before[2:] ** -2])
    expected = before - 0.5 * gradient / (fisher + 0.1)
    torch.testing.assert_close(torch.cat([loc, scale]).detach(), expected, rtol=1e-9, atol=1e-12)


def test_the_trust_region_bounds_the_divergence():
    loc = leaf(10.0)
    scale = torch.ones(1, dtype=torch.float64)
    optimizer = NaturalGradient([loc], damping=0.0, max_kl=0.02)
    (loc.square() / 2).sum().backward()
    optimizer.step(lambda: Normal(loc, scale))
    assert kl_divergence(Normal(10.0, 1.0), Normal(loc, scale)).item() == pytest.approx(0.02)


# --- against Adam -----------------------------------------------------------------------------------------------------


def steps_until(done, step, limit):
    for number in range(1, limit + 1):
        step()
        if done():
            return number
    return math.inf


def mean_field(method):
    """Steps until a mean-field Gaussian is within 1e-4 nats of its known optimum for an ill-conditioned target."""
    precision = torch.diag(torch.tensor([100.0, 1.0, 0.01], dtype=torch.float64))
    precision[0, 1] = precision[1, 0] = 5.0
    target = MultivariateNormal(torch.tensor([1.0, -2.0, 3.0], dtype=torch.float64), precision_matrix=precision)
    loc, log_scale = leaf(0.0, 0.0, 0.0), leaf(0.0, 0.0, 0.0)

    def q():
        return Normal(loc, log_scale.exp())

    def loss():
        return kl_divergence(MultivariateNormal(loc, torch.diag(log_scale.exp().square())), target)

    best = -0.5 * (torch.logdet(precision) - precision.diagonal().log().sum())
    if method == "natural":
        optimizer = NaturalGradient([loc, log_scale], lr=0.7, damping=1e-8, max_kl=1.0)
    else:
        optimizer = torch.optim.Adam([loc, log_scale], lr=method)

    def step():
        optimizer.zero_grad()
        loss().backward()
        optimizer.step(q) if method == "natural" else optimizer.step()

    return steps_until(lambda: loss().item() - best.item() < 1e-4, step, 600)


def test_natural_gradient_reaches_a_known_optimum_in_far_fewer_steps_than_adam():
    natural = mean_field("natural")
    adam = min(mean_field(lr) for lr in (0.1, 0.3, 1.0))
    assert natural <= 20 and adam >= 5 * natural, (natural, adam)


def regression(method, steps):
    """The mean negative log-likelihood of heteroscedastic regression after so many full-batch steps."""
    torch.manual_seed(3)
    x = torch.linspace(-2, 2, 100, dtype=torch.float64).unsqueeze(-1)
    y = torch.sin(2 * x) + (0.05 + 0.3 * (x > 0)) * torch.randn_like(x)
    model = HeteroscedasticRegression((1,), hidden=(10,), activation="tanh").double()
    if method == "natural":
        optimizer = NaturalGradient(model.parameters(), damping=0.1, iterations=30, max_kl=5.0)
    else:
        optimizer = torch.optim.Adam(model.parameters(), lr=method)
    for _ in range(steps):
        optimizer.zero_grad()
        loss = -model.likelihood(x).log_prob(y).sum()
        loss.backward()
        optimizer.step(lambda: model.likelihood(x)) if method == "natural" else optimizer.step()
    return -model.likelihood(x).log_prob(y).mean().item()


@pytest.mark.slow
def test_natural_gradient_is_ahead_of_adam_on_heteroscedastic_regression():
    natural = regression("natural", 40)
    adam = min(regression(lr, 40) for lr in (0.003, 0.01, 0.03, 0.1))
    assert natural < adam - 0.1, (natural, adam)


# --- guides -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "model, guide",
    [
        (GaussianVAE((1, 4, 4), latent_dim=2, hidden=(4,), likelihood="bernoulli"), NormalGuide),
        (GaussianVAE((1, 4, 4), latent_dim=2, hidden=(4,), likelihood="bernoulli"), TriangularNormalGuide),
        (BernoulliVAE((1, 4, 4), num_latents=3, hidden=(4,)), BernoulliGuide),
        (SigmoidBeliefNetwork((1, 4, 4), layers=(3, 2)), LayeredGuide),
    ],
)
def test_any_guide_with_a_kl(model, guide, param_store):
    guide = guide(model)
    x = torch.randint(2, (5, 1, 4, 4)).float()
    parameters = list(guide.parameters())
    product = fisher_product(guide_distributions(guide, x), parameters)
    size = sum(p.numel() for p in parameters)
    u, v = torch.randn(size), torch.randn(size)
    assert (u @ product(u)).item() > 0
    assert (u @ product(v)).item() == pytest.approx((v @ product(u)).item(), rel=1e-3, abs=1e-4)  # symmetric
    optimizer = NaturalGradient(parameters, lr=0.1, damping=0.1)
    before = torch.cat([p.detach().flatten() for p in parameters])
    sum(fn.log_prob(fn.sample()).sum() for fn in guide_distributions(guide, x)()).backward()
    optimizer.step(guide_distributions(guide, x))
    assert not torch.equal(before, torch.cat([p.detach().flatten() for p in parameters]))
    assert len(pyro.get_param_store()) == 0


def test_a_guide_that_keeps_its_parameters_in_the_store_is_measured_at_their_values():
    def guide(x):
        loc = pyro.param("loc", torch.zeros(2).double())
        scale = pyro.param("scale", torch.ones(2).double(), constraint=dist.constraints.positive)
        with pyro.plate("rows", len(x)):
            pyro.sample("z", dist.Normal(loc, scale).to_event(1))

    x = torch.zeros(3)
    with pyro.get_param_store().scope():
        guide(x)
        pyro.get_param_store()["loc"], pyro.get_param_store()["scale"] = leaf(2.0, -1.0), leaf(0.5, 2.0)
        parameters = [value for _, value in pyro.get_param_store().named_parameters()]
        found = matrix(fisher_product(guide_distributions(guide, x), parameters), 4)
    # Pyro keeps the logarithm of the scale.
    expected = torch.diag(torch.tensor([3 / 0.25, 3 / 4.0, 6.0, 6.0]).double())
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_mistakes_are_one_line():
    model = GaussianVAE((1, 4, 4), latent_dim=2, hidden=(4,), likelihood="bernoulli")
    x = torch.zeros(3, 1, 4, 4)
    flow = FlowGuide(model, transforms=1, flow_hidden=(4,))
    with pytest.raises(BadInput, match="torch has no KL for FlowDistribution"):
        fisher_product(guide_distributions(flow, x), list(flow.parameters()))
    loc, other = leaf(0.0), leaf(1.0)
    with pytest.raises(BadInput, match=r"parameter 1 of shape \(1,\) does not move the distributions"):
        fisher_product(lambda: Normal(loc, 1.0), [loc, other])
    with pytest.raises(BadInput, match="depend on none of the parameters"):
        fisher_product(lambda: Normal(0.0, 1.0), [loc])
    with pytest.raises(BadInput, match="no parameter has a gradient"):
        NaturalGradient([loc]).step(lambda: Normal(loc, 1.0))
    with pytest.raises(BadInput, match="damping is -1"):
        NaturalGradient([loc], damping=-1)
