"""Gradients through families beyond coins and Normals, against sums and integrals over a fine grid."""

from __future__ import annotations

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from programs import F64, Params, gradient
from torch import nn

from gumbo.inference import SiteELBO

COPIES, CALLS = 2000, 25
BOUND = 5.0  # standard errors; with at most 5 elements a test, a false alarm has probability below 3e-6


class Family(Params):
    """One site z, with q and p as functions of the module, and x ~ N(mean of z, 1)."""

    def __init__(self, q, p, loc, grid, **start):
        super().__init__(**start)
        self.q, self.p, self.loc, self.grid = q, p, loc, grid

    def guide(self, copies):
        with pyro.plate("copies", copies):
            pyro.sample("z", self.q(self))

    def model(self, copies):
        with pyro.plate("copies", copies):
            z = pyro.sample("z", self.p())
            pyro.sample("x", dist.Normal(self.loc(self, z), 1.0), obs=torch.full((copies,), 0.7, dtype=F64))

    def exact(self):
        """−ELBO as a sum over the grid."""
        z, weight = self.grid
        q = self.q(self)
        log_q = q.log_prob(z)
        f = self.p().log_prob(z) + dist.Normal(self.loc(self, z), 1.0).log_prob(torch.tensor(0.7, dtype=F64)) - log_q
        return -(weight * log_q.exp() * f).sum()


def interval(low, high, count=20001):
    edges = torch.linspace(low, high, count + 1, dtype=F64)
    return (edges[1:] + edges[:-1]) / 2, (high - low) / count


def simplex(count=600):
    a, step = interval(0.0, 1.0, count)
    x, y = torch.meshgrid(a, a, indexing="ij")
    inside = x + y < 1 - step / 2
    z = torch.stack([x[inside], y[inside], 1 - x[inside] - y[inside]], -1)
    return z, torch.full((len(z),), step**2, dtype=F64)


def one(*values):
    return torch.tensor(values if len(values) > 1 else values[0], dtype=F64)


FAMILIES = {
    "gamma": lambda: Family(
        lambda m: dist.Gamma(m.a.exp(), m.b.exp()),
        lambda: dist.Gamma(one(2.0), one(1.0)),
        lambda m, z: m.w * z,
        interval(0.0, 40.0, 200001),
        a=0.9,
        b=0.3,
        w=0.4,
    ),
    "beta": lambda: Family(
        lambda m: dist.Beta(m.a.exp(), m.b.exp()),
        lambda: dist.Beta(one(2.0), one(2.0)),
        lambda m, z: m.w * z,
        interval(0.0, 1.0),
        a=0.9,
        b=1.2,
        w=1.4,
    ),
    "dirichlet": lambda: Family(
        lambda m: dist.Dirichlet(m.a.exp()),
        lambda: dist.Dirichlet(one(2.0, 2.0, 2.0)),
        lambda m, z: m.w * z[..., 0] - 0.5 * z[..., 1],
        simplex(),
        a=[1.2, 1.0, 1.4],
        w=1.4,
    ),
    "negative binomial": lambda: Family(
        lambda m: dist.NegativeBinomial(one(3.0), logits=m.a),
        lambda: dist.NegativeBinomial(one(2.0), logits=one(-0.5)),
        lambda m, z: m.w * z,
        (torch.arange(200, dtype=F64), 1.0),
        a=-0.8,
        w=0.4,
    ),
    "poisson": lambda: Family(
        lambda m: dist.Poisson(m.a.exp()),
        lambda: dist.Poisson(one(1.5)),
        lambda m, z: m.w * z,
        (torch.arange(60, dtype=F64), 1.0),
        a=0.3,
        w=0.4,
    ),
}
CONTINUOUS = ("gamma", "beta", "dirichlet")
CELLS = [(name, word) for name in CONTINUOUS for word in ("pathwise", "stl", "rloo")]
CELLS += [(name, word) for name in ("negative binomial", "poisson") for word in ("score", "score-average", "rloo")]
CELLS += [("poisson", "measure-valued")]


def misses(loss, modules, exact):
    draws = torch.stack([gradient(loss() / COPIES, modules) for _ in range(CALLS)])
    error = draws.std(0) / math.sqrt(CALLS)
    return ((draws.mean(0) - exact).abs() / error).max()


@pytest.mark.parametrize("name, word", CELLS)
def test_the_mean_gradient_is_the_exact_one(name, word, param_store):
    torch.manual_seed(2)
    family = FAMILIES[name]()
    elbo, exact = SiteELBO(word), gradient(family.exact(), family)
    assert misses(lambda: elbo.differentiable_loss(family.model, family.guide, COPIES), family, exact) < BOUND


class MixtureGuide(Params):
    """A die, then a Normal given what it shows."""

    def __init__(self):
        super().__init__(a=[0.1, -0.4, 0.6], m=[-0.5, 0.3, 1.0], s=[-0.3, 0.1, -0.6])

    def forward(self, copies):
        with pyro.plate("copies", copies):
            y = pyro.sample("y", dist.OneHotCategorical(logits=self.a))
            pyro.sample("z", dist.Normal((y * self.m).sum(-1), (y * self.s).sum(-1).exp()))


class MixtureModel(Params):
    def __init__(self):
        super().__init__(w=0.8, c=[-1.0, 0.0, 1.5])

    def forward(self, copies):
        with pyro.plate("copies", copies):
            y = pyro.sample("y", dist.OneHotCategorical(logits=torch.zeros(3, dtype=F64)))
            z = pyro.sample("z", dist.Normal((y * self.c).sum(-1), 1.0))
            pyro.sample("x", dist.Normal(self.w * z, 1.0), obs=torch.full((copies,), 0.7, dtype=F64))


def exact_mixture(model, guide):
    noise, weight = interval(-9.0, 9.0, 4001)
    normal = dist.Normal(torch.zeros((), dtype=F64), 1.0)
    weight = weight * normal.log_prob(noise).exp()
    total, log_q = 0.0, guide.a.log_softmax(-1)
    for k in range(3):
        z = guide.m[k] + guide.s[k].exp() * noise
        f = (
            -math.log(3)
            + dist.Normal(model.c[k], 1.0).log_prob(z)
            + dist.Normal(model.w * z, 1.0).log_prob(torch.tensor(0.7, dtype=F64))
            - log_q[k]
            - dist.Normal(guide.m[k], guide.s[k].exp()).log_prob(z)
        )
        total = total + log_q[k].exp() * (weight * f).sum()
    return -total


@pytest.mark.parametrize("second", ["pathwise", "stl", "rloo", "measure-valued"])
@pytest.mark.parametrize("first", ["rloo", "enumerate", "local-expectation", "score-average"])
def test_a_category_then_a_normal_given_it(first, second):
    torch.manual_seed(3)
    model, guide = MixtureModel(), MixtureGuide()
    both = nn.ModuleList([model, guide])
    loss = SiteELBO({"y": first, "z": second})(model, guide)
    assert misses(lambda: loss(COPIES), both, gradient(exact_mixture(model, guide), both)) < BOUND
