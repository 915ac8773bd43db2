"""Fini against exact sums over counts: exact for polynomials up to its order, and for no more."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import pytest
import torch
from programs import F64, Params, gradient

from gumbo.errors import BadInput, UnsupportedSite
from gumbo.inference import SiteELBO
from gumbo.inference.estimators import Fini, counts

VALUES = torch.arange(400, dtype=F64)
FAMILIES = {
    "Poisson": (lambda a: dist.Poisson(a.exp()), 0.4, VALUES),
    "Binomial": (lambda a: dist.Binomial(7, logits=a), -0.6, VALUES[:8]),
    "NegativeBinomial": (lambda a: dist.NegativeBinomial(2.5, logits=a), -0.3, VALUES),
    "Geometric": (lambda a: dist.Geometric(logits=a), 0.5, VALUES),
}


def listed(fn, values):
    """The distribution, which draws all of these values at once."""
    fn.sample = lambda *shape: values
    return fn


def mean_of(estimator, family, cost):
    """The gradient that the estimator gives on average, and the exact one, for E[cost(z)]."""
    make, start, values = FAMILIES[family]
    a = torch.tensor(start, dtype=F64, requires_grad=True)
    many = a.expand(len(values))
    q = make(a).log_prob(values).exp()
    (exact,) = torch.autograd.grad((q * cost(values)).sum(), a, retain_graph=True)
    draw = estimator.draw(listed(make(many), values), 0)
    assert torch.equal(draw.value.detach(), values)
    (found,) = torch.autograd.grad((q.detach() * cost(draw.value)).sum(), a)
    return found, exact


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("order", [1, 2, 3, 4, 5])
def test_polynomials_up_to_the_order_are_exact_and_no_more(family, order):
    for degree in range(1, order + 2):
        found, exact = mean_of(Fini(order), family, lambda z, degree=degree: ((z - 1.3) / 3) ** degree)
        assert torch.isclose(found, exact, rtol=1e-8) == (degree <= order), degree


class NoSlant(Fini):
    """Wrong on purpose: the weight's mean alone, which is order 1."""

    def draw(self, fn, step, args=(), kwargs=None):
        return Fini(1).draw(fn, step, args, kwargs)


class OtherFamily(Fini):
    """Wrong on purpose: the weights of a Poisson for every family."""

    def draw(self, fn, step, args=(), kwargs=None):
        kept, counts.curvature = counts.curvature, lambda fn: 0.0
        try:
            return super().draw(fn, step, args, kwargs)
        finally:
            counts.curvature = kept


@pytest.mark.parametrize("wrong", [NoSlant(2), OtherFamily(2)], ids=repr)
def test_wrong_weights_fail_the_same_test(wrong):
    found, exact = mean_of(wrong, "NegativeBinomial", lambda z: z.square())
    assert not torch.isclose(found, exact, rtol=1e-2)


def test_weights_are_those_of_the_closed_forms():
    z = torch.arange(9, dtype=F64)
    rate, p, r = (torch.tensor(number, dtype=F64) for number in (1.7, 0.3, 2.5))
    # Per log rate, and per logit of the probability: ∂μ/∂η is the mean, n p (1 − p), and r p/(1 − p).
    assert torch.allclose(rate * counts.path_weight(z, rate, 0.0, 2), (z + rate) / 2)
    binomial = 8 * p * (1 - p) * counts.path_weight(z, 8 * p, torch.tensor(-1 / 8, dtype=F64), 2)
    assert torch.allclose(binomial, 8 * p / 2 + (1 - 2 * p) * z / 2)
    negative = r * p / (1 - p) * counts.path_weight(z, r * p / (1 - p), 1 / r, 2)
    assert torch.allclose(negative, r * p / 2 + (1 + p) * z / 2)
    for curve in (torch.tensor(-1 / 8, dtype=F64), torch.tensor(0.0, dtype=F64), torch.tensor(0.4, dtype=F64)):
        mean = torch.tensor(1.7, dtype=F64)
        variance, first, second = mean + curve * mean**2, 1 + 2 * curve * mean, 2 * curve
        c = (2 * variance * second - first**2) / (6 * variance * (2 + second))
        y = z - mean
        third = 1 - c + (0.5 - c) * first * y / variance + c * y**2 / variance
        assert torch.allclose(counts.path_weight(z, mean, curve, 3), third, rtol=1e-10)


@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_extreme_means_give_finite_paths(order, dtype):
    for fn in (
        dist.Poisson(torch.tensor([0.0, 1e-8, 1e5], dtype=dtype).requires_grad_()),
        dist.Binomial(4, probs=torch.tensor([0.0, 1e-8, 1.0], dtype=dtype).requires_grad_()),
        dist.NegativeBinomial(3.0, logits=torch.tensor([-40.0, 0.0, 12.0], dtype=dtype).requires_grad_()),
    ):
        draw = Fini(order).draw(fn, 0).value
        assert draw.isfinite().all() and draw.dtype == dtype and torch.equal(draw.detach(), draw.detach().round())
        leaf = fn.rate if isinstance(fn, dist.Poisson) else fn._param
        assert torch.autograd.grad(draw.sum(), leaf)[0].isfinite().all()


class CountGuide(Params):
    """Counts above counts, in a plate, the second masked for some rows."""

    def __init__(self):
        super().__init__(a=[0.3, -0.2], b=0.5)

    def forward(self, x):
        with pyro.plate("data", 6, subsample_size=3, dim=-1):
            n = pyro.sample("n", dist.Poisson(self.a.exp().expand(3, 2)).to_event(1))
            with pyro.poutine.mask(mask=torch.tensor([True, False, True])):
                pyro.sample("m", dist.NegativeBinomial(2.0, logits=self.b - 0.1 * n.sum(-1)))


def count_model(x):
    with pyro.plate("data", 6, subsample_size=3, dim=-1):
        n = pyro.sample("n", dist.Poisson(torch.ones(2, dtype=F64)).to_event(1))
        with pyro.poutine.mask(mask=torch.tensor([True, False, True])):
            m = pyro.sample("m", dist.Poisson(torch.tensor(2.0, dtype=F64)))
        pyro.sample("x", dist.Normal(0.5 * n.sum(-1) - 0.2 * m, 1.0), obs=x)


@pytest.mark.parametrize("vectorize", [True, False])
@pytest.mark.parametrize("order", [2, 3])
def test_the_value_is_the_discrete_bound_and_the_gradient_is_finite(order, vectorize):
    guide = CountGuide()
    loss = SiteELBO(Fini(order), num_particles=3, vectorize_particles=vectorize)(count_model, guide)
    for _ in range(3):
        loss(torch.tensor([0.3, -0.8, 1.0], dtype=F64)).backward()
    assert loss.objective_name == "elbo"
    assert all(p.grad.isfinite().all() and p.grad.abs().max() > 0 for p in guide.parameters())


class PoissonGuide(Params):
    def __init__(self):
        super().__init__(a=0.0)

    def forward(self):
        with pyro.plate("data", 2000):
            pyro.sample("n", dist.Poisson(self.a.exp().expand(2000)))


def test_at_the_posterior_no_draw_has_a_gradient():
    def model():
        with pyro.plate("data", 2000):
            pyro.sample("n", dist.Poisson(torch.ones(2000, dtype=F64)))

    guide = PoissonGuide()
    assert gradient(SiteELBO("fini")(model, guide)(), guide).abs().max() < 1e-10


@pytest.mark.parametrize("family", FAMILIES)
def test_for_a_cost_that_is_no_polynomial_the_bias_shrinks_with_the_order(family):
    errors = []
    for order in (1, 2, 3, 4):
        found, exact = mean_of(Fini(order), family, lambda z: (-0.25 * z).exp())
        errors.append((found - exact).abs().item())
    assert errors[0] > 1.5 * errors[1] > 2 * errors[2] > 2 * errors[3] > 1e-9


def test_what_is_refused():
    def refused(fn, match, word="fini"):
        def program():
            pyro.sample("n", fn)

        with pytest.raises(UnsupportedSite, match=match):
            SiteELBO(word)(program, program)()

    refused(dist.Normal(0.0, 1.0), "Poisson, Binomial, NegativeBinomial and Geometric only, not for Normal")
    refused(dist.BetaBinomial(1.0, 2.0, 5), "not for BetaBinomial")
    refused(dist.Binomial(1, 0.4), "reach 2", Fini(3))
    refused(dist.NegativeBinomial(torch.tensor(2.0, requires_grad=True), 0.4), "total_count.*learnt")
    with pytest.raises(BadInput, match="order"):
        Fini(0)
