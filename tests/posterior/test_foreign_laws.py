"""Distributions of a user whose draws and density are of two laws are told, and right ones are not."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch.distributions import Transform, constraints

from gumbo.errors import GumboWarning
from gumbo.inference import evaluate
from gumbo.inference.posterior.own_laws import why_not_own_law

ZEROS = torch.zeros(4).double()


class Narrow(dist.Normal):
    def rsample(self, sample_shape=()):
        return self.loc + 0.5 * (super().rsample(torch.Size(sample_shape)) - self.loc)

    def sample(self, sample_shape=()):
        with torch.no_grad():
            return self.rsample(sample_shape)


class Beside(Narrow):
    def rsample(self, sample_shape=()):
        return dist.Normal.rsample(self, torch.Size(sample_shape)) + 0.5


class Exponential(Transform):
    domain, codomain, bijective, sign = constraints.real, constraints.positive, True, 1

    def _call(self, x):
        return x.exp()

    def _inverse(self, y):
        return y.log()

    def log_abs_det_jacobian(self, x, y):
        return x


class WithoutJacobian(Exponential):
    def log_abs_det_jacobian(self, x, y):
        return torch.zeros_like(x)


def through(transform):
    return dist.TransformedDistribution(dist.Normal(ZEROS, 1.0), [transform])


@pytest.mark.parametrize(
    "fn, says",
    [
        (Narrow(ZEROS, 1.0), "0.5 times the spread"),
        (Narrow(ZEROS, 1.0).to_event(1), "0.5 times the spread"),
        (Beside(ZEROS, 1.0), "beside the density"),
        (through(WithoutJacobian()), "log_abs_det_jacobian of WithoutJacobian"),
    ],
)
def test_two_laws_are_told(fn, says):
    assert says in (why_not_own_law(fn) or "")


LAWS = [
    (dist.Normal, 0.0, 1.0),
    (dist.Gamma, 0.01, 1.0),
    (dist.Gamma, 30.0, 1.0),
    (dist.Beta, 0.05, 0.05),
    (dist.Beta, 0.5, 3.0),
    (dist.Cauchy, 0.0, 1.0),
    (dist.StudentT, 1.5, 0.0, 1.0),
    (dist.Uniform, 0.0, 2.0),
    (dist.LogNormal, 0.0, 2.0),
    (dist.VonMises, 0.0, 2.0),
    (dist.Dirichlet, [0.01, 0.1, 1.0]),
    (dist.Poisson, 3.0),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("law", LAWS, ids=lambda law: law[0].__name__)
def test_one_law_is_not(law, dtype):
    family, *numbers = law
    own = type("Own", (family,), {"__module__": __name__})
    given = [torch.tensor(number, dtype=dtype) for number in numbers]
    assert why_not_own_law(own(*(one.expand(30, *one.shape) for one in given))) is None
    assert why_not_own_law(through(Exponential())) is None


def test_evaluate_warns():
    def model(x):
        m = pyro.sample("m", dist.Normal(ZEROS[0], 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(m, 1.0), obs=x)

    def guide(x):
        pyro.sample("m", Narrow(x.sum() / (1 + len(x)), (1 + len(x)) ** -0.5))

    with pytest.warns(GumboWarning, match="guide's site 'm': Narrow draws from another law .* 0.5 times the spread"):
        evaluate(model, guide, torch.linspace(-1, 2, 9).double(), num_samples=100)
