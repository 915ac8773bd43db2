"""The mean that estimators expand a cost around is E[z], for each distribution of Pyro and torch that they accept."""

from __future__ import annotations

import inspect

import pyro
import pyro.distributions as dist
import pytest
import torch

from gumbo.errors import UnsupportedSite
from gumbo.inference import SiteELBO
from gumbo.inference.estimators.relaxation import mean_of, mean_why_not

ONE = torch.tensor([1.3, 0.6, 2.0], dtype=torch.float64)
LOC = torch.tensor([0.4, -1.0, 2.0], dtype=torch.float64)
PROBS = torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64)
SCALE = torch.tensor([[1.0, 0.0, 0.0], [0.5, 0.8, 0.0], [-0.3, 0.2, 1.2]], dtype=torch.float64)
COVARIANCE = SCALE @ SCALE.mT
HALF = torch.tensor(0.5, dtype=torch.float64)

WITH_MEAN = {
    "AVFMultivariateNormal": lambda d: d.AVFMultivariateNormal(LOC, SCALE, 0.1 * SCALE[:2].expand(2, 2, 3)),
    "AffineBeta": lambda d: d.AffineBeta(ONE, 2 * ONE, LOC, ONE),
    "AsymmetricLaplace": lambda d: d.AsymmetricLaplace(LOC, ONE, 1 + ONE),
    "Bernoulli": lambda d: d.Bernoulli(PROBS),
    "Beta": lambda d: d.Beta(ONE, 2 * ONE),
    "BetaBinomial": lambda d: d.BetaBinomial(ONE, 2 * ONE, 7),
    "Binomial": lambda d: d.Binomial(7, PROBS),
    "Chi2": lambda d: d.Chi2(3 * ONE),
    "ContinuousBernoulli": lambda d: d.ContinuousBernoulli(PROBS),
    "Delta": lambda d: d.Delta(LOC),
    "Dirichlet": lambda d: d.Dirichlet(ONE),
    "DirichletMultinomial": lambda d: d.DirichletMultinomial(ONE, 7),
    "Empirical": lambda d: d.Empirical(LOC, PROBS.log()),
    "Exponential": lambda d: d.Exponential(ONE),
    "ExtendedBetaBinomial": lambda d: d.ExtendedBetaBinomial(ONE, 2 * ONE, 14 * HALF),
    "ExtendedBinomial": lambda d: d.ExtendedBinomial(7, PROBS),
    "FisherSnedecor": lambda d: d.FisherSnedecor(3 * ONE, 9 + ONE),
    "Gamma": lambda d: d.Gamma(ONE, 2 * ONE),
    "GammaPoisson": lambda d: d.GammaPoisson(ONE, 2 * ONE),
    "GeneralizedPareto": lambda d: d.GeneralizedPareto(LOC, ONE, 0.1 * ONE),
    "Geometric": lambda d: d.Geometric(PROBS),
    "Gumbel": lambda d: d.Gumbel(LOC, ONE),
    "HalfNormal": lambda d: d.HalfNormal(ONE),
    "InverseGamma": lambda d: d.InverseGamma(4 + ONE, ONE),
    "Kumaraswamy": lambda d: d.Kumaraswamy(ONE, 2 * ONE),
    "LKJ": lambda d: d.LKJ(3, HALF),
    "Laplace": lambda d: d.Laplace(LOC, ONE),
    "LogNormal": lambda d: d.LogNormal(LOC, 0.5 * ONE),
    "Logistic": lambda d: d.Logistic(LOC, ONE),
    "LowRankMultivariateNormal": lambda d: d.LowRankMultivariateNormal(LOC, SCALE[:, :2], ONE),
    "MaskedMixture": lambda d: d.MaskedMixture(LOC > 0, dist.Normal(LOC, ONE), dist.Normal(3 + LOC, ONE)),
    "MixtureSameFamily": lambda d: d.MixtureSameFamily(dist.Categorical(PROBS), dist.Normal(LOC, ONE)),
    "Multinomial": lambda d: d.Multinomial(7, PROBS),
    "MultivariateNormal": lambda d: d.MultivariateNormal(LOC, COVARIANCE),
    "MultivariateStudentT": lambda d: d.MultivariateStudentT(6 * HALF, LOC, SCALE),
    "NanMaskedMultivariateNormal": lambda d: d.NanMaskedMultivariateNormal(LOC, COVARIANCE),
    "NanMaskedNormal": lambda d: d.NanMaskedNormal(LOC, ONE),
    "NegativeBinomial": lambda d: d.NegativeBinomial(3, PROBS),
    "Normal": lambda d: d.Normal(LOC, ONE),
    "OMTMultivariateNormal": lambda d: d.OMTMultivariateNormal(LOC, SCALE),
    "OneHotCategorical": lambda d: d.OneHotCategorical(PROBS),
    "OneHotCategoricalStraightThrough": lambda d: d.OneHotCategoricalStraightThrough(PROBS),
    "Pareto": lambda d: d.Pareto(ONE, 4 + ONE),
    "Poisson": lambda d: d.Poisson(ONE),
    "SoftAsymmetricLaplace": lambda d: d.SoftAsymmetricLaplace(LOC, ONE, 1 + ONE, 0.7 * ONE),
    "SoftLaplace": lambda d: d.SoftLaplace(LOC, ONE),
    "Stable": lambda d: d.Stable(1.9 * torch.ones_like(LOC), 0.8 * ONE.clamp(max=1), ONE, LOC),
    "StableWithLogProb": lambda d: d.StableWithLogProb(1.9 * torch.ones_like(LOC), 0.8 * ONE.clamp(max=1), ONE, LOC),
    "StudentT": lambda d: d.StudentT(6 * torch.ones_like(LOC), LOC, ONE),
    "Uniform": lambda d: d.Uniform(LOC, LOC + ONE),
    "Weibull": lambda d: d.Weibull(ONE, 1 + ONE),
    "Wishart": lambda d: d.Wishart(30 * HALF, COVARIANCE),
    "ZeroInflatedDistribution": lambda d: d.ZeroInflatedDistribution(dist.Poisson(ONE), gate=PROBS),
    "ZeroInflatedNegativeBinomial": lambda d: d.ZeroInflatedNegativeBinomial(3.0 * ONE, probs=PROBS, gate=PROBS),
    "ZeroInflatedPoisson": lambda d: d.ZeroInflatedPoisson(ONE, gate=PROBS),
}

CIRCULAR = {
    "VonMises": lambda d: d.VonMises(LOC, ONE),
    "ProjectedNormal": lambda d: d.ProjectedNormal(LOC),
    "SineBivariateVonMises": lambda d: d.SineBivariateVonMises(LOC, -LOC, ONE, 2 * ONE, correlation=0.4 * ONE),
    "a mixture of VonMises": lambda d: d.MixtureSameFamily(dist.Categorical(PROBS), dist.VonMises(LOC, ONE)),
    "ZeroInflated VonMises": lambda d: dist.ZeroInflatedDistribution(dist.VonMises(LOC, ONE), gate=PROBS),
    "a choice of VonMises": lambda d: dist.MaskedMixture(LOC > 0, dist.VonMises(LOC, ONE), dist.Normal(LOC, ONE)),
}

WITHOUT_A_NUMBER = {"Categorical", "OrderedLogistic", "Cauchy", "HalfCauchy"}  # their mean is NaN or infinite
WRAPPERS = {"ExpandedDistribution", "Independent", "MaskedDistribution"}
WITHOUT_DRAWS = {"LogNormalNegativeBinomial"}
LIBRARIES = {"pyro": dist, "torch": torch.distributions}


def those_of(library):
    """The names of a library's distributions that define a mean."""
    for name, kind in vars(LIBRARIES[library]).items():
        if inspect.isclass(kind) and issubclass(kind, torch.distributions.Distribution):
            owner = next(base for base in kind.__mro__ if "mean" in vars(base))
            if owner is not torch.distributions.Distribution:
                yield name


def cases(of):
    return [(library, name) for library in LIBRARIES for name in of if name in set(those_of(library))]


def test_every_distribution_with_a_mean_is_tested_here():
    known = WITH_MEAN.keys() | CIRCULAR.keys() | WITHOUT_A_NUMBER | WRAPPERS | WITHOUT_DRAWS
    assert {name for library in LIBRARIES for name in those_of(library)} <= known


@pytest.mark.filterwarnings("ignore:Singular sample")  # torch's own, of a Wishart
@pytest.mark.parametrize(("library", "name"), cases(WITH_MEAN))
def test_the_mean_is_the_mean_of_draws(library, name):
    fn = WITH_MEAN[name](LIBRARIES[library])
    assert mean_why_not({"fn": fn}) is None
    drawn = torch.stack([fn.sample() for _ in range(4000)]) if name == "Empirical" else fn.sample((60_000,))
    error = (drawn.double().mean(0) - mean_of(fn)).abs()
    assert (error <= 5 * drawn.double().std(0) / len(drawn) ** 0.5 + 1e-9).all()


@pytest.mark.parametrize("name", CIRCULAR)
@pytest.mark.parametrize("library", LIBRARIES)
def test_a_direction_is_no_mean(library, name):
    fn = CIRCULAR[name](LIBRARIES[library] if hasattr(LIBRARIES[library], name) else dist)
    error = (fn.sample((20_000,)).mean(0) - mean_of(fn)).abs()
    assert error.max() > 0.05
    assert "is a direction and not the expectation" in str(mean_why_not({"fn": fn}))


def test_muprop_runs_at_a_direction_downstream():
    """There the mean is only a place to run at: the gradient at a coin is exact whatever the place."""
    logit = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)

    def model():
        coin = pyro.sample("coin", dist.Bernoulli(HALF))
        angle = pyro.sample("angle", dist.VonMises(coin, ONE[0]))
        pyro.factor("f", angle.sin())

    def guide():
        coin = pyro.sample("coin", dist.Bernoulli(logits=logit))
        pyro.sample("angle", dist.VonMises(coin - 2.0, ONE[0]))

    angle = torch.linspace(-torch.pi, torch.pi, 20_001, dtype=torch.float64)
    costs = []
    for coin in torch.eye(2, dtype=torch.float64)[1]:
        q, p = (dist.VonMises(coin - shift, ONE[0]).log_prob(angle) for shift in (2.0, 0.0))
        costs.append(torch.trapezoid(q.exp() * (q - p - angle.sin()), angle))
    probs = torch.stack([1 - logit.sigmoid(), logit.sigmoid()])
    loss = (probs * (torch.stack(costs) + probs.log())).sum()
    (exact,) = torch.autograd.grad(loss, logit)
    elbo = SiteELBO({"coin": "muprop", "angle": "rloo"}, num_particles=4000)
    (found,) = torch.autograd.grad(elbo.differentiable_loss(model, guide), logit)
    assert found.item() == pytest.approx(exact.item(), abs=0.03)


def test_muprop_names_the_law_whose_mean_is_a_direction():
    def program():
        pyro.sample("z", dist.VonMises(LOC[0], ONE[0]))

    with pytest.raises(UnsupportedSite, match="'muprop': the mean of VonMises is a direction"):
        SiteELBO("muprop").loss(program, program)
