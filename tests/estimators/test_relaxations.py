"""Relaxed one-hots and coins against their defining formulas: straight-through, Rao-Blackwellized, ReinMax."""

from __future__ import annotations

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from torch import nn

from gumbo.errors import BadInput, UnsupportedSite
from gumbo.inference import SiteELBO
from gumbo.inference.estimators import Draw, GumbelSoftmax, ReinMax
from gumbo.inference.estimators.relaxation import conditional_scores, gumbel, harden, noise

F64 = torch.float64
LOGITS = torch.tensor([0.5, -0.3, 0.1, -1.2], dtype=F64)


def one_hots(fn):
    return torch.eye(fn.event_shape[-1], dtype=F64)


@pytest.mark.parametrize("one_hot", [True, False], ids=["one-hot", "coin"])
def test_perturbed_logits_given_the_draw_are_distributed_as_those_that_made_it(one_hot):
    """Their moments, draw by draw, are those of the perturbed logits that led to it."""
    count = 200_000
    logits = LOGITS.log_softmax(-1) if one_hot else torch.tensor([0.7, -1.5], dtype=F64)
    many = logits.expand(count, *logits.shape)
    scores = many + noise(many, one_hot)
    value = harden(scores, one_hot)
    again = conditional_scores(many, value, noise(many, one_hot), one_hot)
    assert torch.equal(harden(again, one_hot), value)
    for power in (1, 2):
        for given in (value, 1 - value):  # the scores of a coordinate, where it came up and where it did not
            left, right = given * scores**power, given * again**power
            error = ((left.var(0) + right.var(0)) / count).sqrt()
            assert ((left.mean(0) - right.mean(0)).abs() < 5 * error).all()


def test_the_derivative_of_perturbed_logits_given_the_draw_is_that_of_their_quantile():
    """P(z̃ ≤ s | b = 1) = P(0 < z ≤ s) / P(z > 0) for a coin, whose implicit derivative is dz̃/da."""
    a = torch.tensor(0.4, dtype=F64, requires_grad=True)
    for b in (0.0, 1.0):
        score = conditional_scores(a, torch.tensor(b, dtype=F64), torch.tensor(0.3, dtype=F64), one_hot=False)
        (path,) = torch.autograd.grad(score, a, retain_graph=True)
        s = score.detach().requires_grad_()
        below, one = torch.sigmoid(s - a), torch.sigmoid(a)
        cdf = (below - (1 - one)) / one if b else below / (1 - one)
        with_s, with_a = torch.autograd.grad(cdf, [s, a])
        assert math.isclose(path.item(), (-with_a / with_s).item(), rel_tol=1e-9)


# ReinMax.


def exact_expectation(cost, fn_of, logits):
    """The gradient of E[cost(b)] by listing the one-hots."""
    logits = logits.detach().requires_grad_()
    fn = fn_of(logits)
    values = one_hots(fn) if fn.event_shape else torch.tensor([0.0, 1.0], dtype=F64)
    total = sum(fn.log_prob(value).exp() * cost(value) for value in values)
    return torch.autograd.grad(total, logits)[0]


def mean_of_estimator(estimator, cost, fn_of, logits):
    """The mean of an estimator that draws nothing but the value, by listing the values."""
    logits = logits.detach().requires_grad_()
    fn = fn_of(logits)
    values = one_hots(fn) if fn.event_shape else torch.tensor([0.0, 1.0], dtype=F64)
    total = 0.0
    for value in values:
        given = fn_of(logits)
        given.sample = lambda *args, value=value, **kwargs: value.clone()
        draw = estimator.draw(given, 0).value
        assert torch.equal(draw.detach(), value)
        (gradient,) = torch.autograd.grad(cost(draw), logits)
        total = total + fn.log_prob(value).exp().detach() * gradient
    return total


def quadratic(y):
    weight = torch.arange(16, dtype=F64).reshape(4, 4).sin()
    return y @ weight @ y + (y * torch.tensor([0.3, -1.0, 2.0, 0.5], dtype=F64)).sum()


def test_reinmax_is_exact_for_a_quadratic_cost_and_straight_through_is_not():
    found = mean_of_estimator(ReinMax(), quadratic, lambda a: dist.OneHotCategorical(logits=a), LOGITS)
    exact = exact_expectation(quadratic, lambda a: dist.OneHotCategorical(logits=a), LOGITS)
    assert torch.allclose(found, exact, rtol=0, atol=1e-12)
    # To first order, f'(b) times the Jacobian of softmax, it is not.
    first = 0.0
    for value in torch.eye(4, dtype=F64):
        y, a = value.clone().requires_grad_(), LOGITS.clone().requires_grad_()
        (slope,) = torch.autograd.grad(quadratic(y), y)
        probs = a.softmax(-1)
        first = first + (value * probs).sum().detach() * torch.autograd.grad((slope * probs).sum(), a)[0]
    assert (first - exact).abs().max() > 0.05
    found = mean_of_estimator(ReinMax(order=1), quadratic, lambda a: dist.OneHotCategorical(logits=a), LOGITS)
    assert torch.allclose(found, first, rtol=0, atol=1e-12)
    with pytest.raises(BadInput, match="order is 3"):
        ReinMax(order=3)


def test_reinmax_is_exact_for_a_quadratic_cost_of_a_coin_and_biased_for_a_quartic():
    logits = torch.tensor(0.6, dtype=F64)
    for power, exact in ((1, True), (2, True), (4, False)):

        def cost(b, power=power):
            return 3.0 * (b - 0.3) ** power

        found = mean_of_estimator(ReinMax(), cost, lambda a: dist.Bernoulli(logits=a), logits)
        truth = exact_expectation(cost, lambda a: dist.Bernoulli(logits=a), logits)
        assert math.isclose(found.item(), truth.item(), abs_tol=1e-12) is exact


def test_reinmax_follows_its_algorithm_at_another_temperature():
    """Liu et al. 2023, algorithm 2, written out with detached pieces."""
    torch.manual_seed(0)
    a = LOGITS.clone().requires_grad_()
    torch.manual_seed(5)
    draw = ReinMax(temperature=1.3).draw(dist.OneHotCategorical(logits=a), 0).value
    b = draw.detach()
    (found,) = torch.autograd.grad(quadratic(draw), a)
    first = a.softmax(-1)
    half = (b + (a / 1.3).softmax(-1)) / 2
    half = ((half.log() - a).detach() + a).softmax(-1)
    second = 2 * half - first / 2
    (expected,) = torch.autograd.grad(quadratic(second - second.detach() + b), a)
    assert torch.allclose(found, expected, rtol=0, atol=1e-12)


# Straight-through, and its mean given the draw.


def straight_through_gradients(estimator, cost, fn_of, logits, count):
    a = logits.expand(count, *logits.shape).clone().requires_grad_()
    return torch.autograd.grad(cost(estimator.draw(fn_of(a), 0).value).sum(), a)[0]


@pytest.mark.parametrize("one_hot", [True, False], ids=["one-hot", "coin"])
def test_gumbel_rao_has_the_mean_of_straight_through_and_less_variance(one_hot):
    count = 60_000

    def cost(y):
        return (2.0 * y[..., 0] - y[..., 1]).exp() if one_hot else (1.5 * y).exp()

    def fn_of(a):
        return dist.OneHotCategorical(logits=a) if one_hot else dist.Bernoulli(logits=a)

    logits = LOGITS if one_hot else torch.tensor(0.6, dtype=F64)
    plain = straight_through_gradients(GumbelSoftmax(0.5, hard=True), cost, fn_of, logits, count)
    variances = [plain.var(0)]
    for rao in (1, 8):
        averaged = straight_through_gradients(GumbelSoftmax(0.5, hard=True, rao=rao), cost, fn_of, logits, count)
        error = ((plain.var(0) + averaged.var(0)) / count).sqrt()
        assert ((averaged.mean(0) - plain.mean(0)).abs() < 5 * error).all()
        variances.append(averaged.var(0))
    assert torch.allclose(variances[0], variances[1], rtol=0.15)  # as the draw's own noise
    assert (variances[2] < 0.9 * variances[0]).all()


def test_gumbel_rao_averages_relaxed_gradients_given_the_draw():
    """Paulus et al. 2021: f'(b) times the mean Jacobian of softmax((log π + g)/τ) over g given b, here at fixed g."""
    a = LOGITS.log_softmax(-1).requires_grad_()
    torch.manual_seed(1)
    draw = GumbelSoftmax(0.5, hard=True, rao=5).draw(dist.OneHotCategorical(logits=a), 0).value
    (found,) = torch.autograd.grad(quadratic(draw), a)
    torch.manual_seed(1)
    b = harden(a.detach() + gumbel(a.detach()), True)
    assert torch.equal(b, draw.detach())
    scores = conditional_scores(a.detach().expand(5, 4), b, gumbel(a.detach().expand(5, 4)), True)
    y = b.clone().requires_grad_()
    (slope,) = torch.autograd.grad(quadratic(y), y)
    expected = 0.0
    for s in scores:
        p = (s / 0.5).softmax(-1)
        expected = expected + (p * (slope - (p * slope).sum())) / 0.5 / 5
    expected = expected - expected.sum() * a.detach().exp()  # a is normalized once more by the distribution
    assert torch.allclose(found, expected, rtol=0, atol=1e-12)


# In programs.


class Guide(pyro.nn.PyroModule):
    def __init__(self, dtype=F64):
        super().__init__()
        self.a = nn.Parameter(torch.tensor([[0.4, -0.7], [0.1, 0.3]], dtype=dtype))
        self.b = nn.Parameter(torch.zeros(2, 3, dtype=dtype))

    def forward(self):
        with pyro.plate("data", 2):
            z = pyro.sample("z", dist.Bernoulli(logits=self.a).to_event(1))
            with poutine.mask(mask=torch.tensor([True, False])):
                pyro.sample("y", dist.OneHotCategorical(logits=z @ self.b))


def model():
    with pyro.plate("data", 2):
        z = pyro.sample("z", dist.Bernoulli(logits=torch.zeros(2)).to_event(1))
        with poutine.mask(mask=torch.tensor([True, False])):
            y = pyro.sample("y", dist.OneHotCategorical(logits=torch.zeros(3)))
        pyro.sample("x", dist.Normal(z.sum(-1) + y[..., 0], 1.0), obs=torch.tensor([0.3, -0.8]))


@pytest.mark.parametrize("word", ["gumbel-rao", "reinmax", "straight-through"])
@pytest.mark.parametrize("vectorize", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_the_value_is_the_discrete_bound_and_the_gradient_is_finite(word, vectorize, dtype):
    guide = Guide(dtype)
    loss = SiteELBO(word, num_particles=3, vectorize_particles=vectorize)(model, guide)
    for _ in range(3):
        value = loss()
        value.backward()
    assert value.isfinite() and loss.objective_name == "elbo"
    assert all(p.grad.isfinite().all() and p.grad.abs().max() > 0 for p in guide.parameters())


@pytest.mark.parametrize("temperature", [1e-2, 1e-6])
def test_cold_relaxations_stay_finite(temperature):
    guide = Guide(torch.float32)
    loss = SiteELBO(GumbelSoftmax(temperature, hard=True, rao=4), num_particles=2)(model, guide)
    loss().backward()
    assert all(p.grad.isfinite().all() for p in guide.parameters())


def test_what_is_refused():
    with pytest.raises(BadInput, match="hard=True"):
        GumbelSoftmax(rao=3)
    with pytest.raises(BadInput, match="whole number"):
        GumbelSoftmax(hard=True, rao=-1)
    with pytest.raises(BadInput, match="temperature"):
        ReinMax(temperature=-1.0)

    def poisson():
        pyro.sample("n", dist.Poisson(torch.tensor(2.0)))

    for word in ("reinmax", "gumbel-rao"):
        with pytest.raises(UnsupportedSite, match="OneHotCategorical or Bernoulli"):
            SiteELBO(word)(poisson, poisson)()


def test_a_draw_keeps_its_shape_under_event_and_plate():
    fn = dist.OneHotCategorical(logits=torch.zeros(5, 3, 4)).to_event(1)
    for estimator in (ReinMax(), GumbelSoftmax(hard=True, rao=2)):
        draw = estimator.draw(fn, 0)
        assert isinstance(draw, Draw) and draw.value.shape == (5, 3, 4)
        assert torch.equal(draw.value.sum(-1), torch.ones(5, 3))
