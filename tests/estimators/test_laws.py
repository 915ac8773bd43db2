"""Laws draw as they score, and paths have the score's gradient; laws of torch and Pyro that do not are refused."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn

from gumbo.errors import UnsupportedSite
from gumbo.inference import SiteELBO
from gumbo.inference.estimators import Pathwise, score_why_not

F64 = torch.float64
ROUNDS, DRAWS = 30, 1500


def t(*numbers):
    return torch.tensor(numbers if len(numbers) > 1 else numbers[0], dtype=F64)


TRIL = torch.tensor([[0.7, 0.0], [0.2, 0.8]], dtype=F64)
LOCS = torch.tensor([[1.0, 0.7], [-1.0, 0.3], [0.2, 0.2]], dtype=F64)

LAWS = {
    "AffineBeta": lambda a, b: dist.AffineBeta(a, b, t(-1.0), t(3.0)),
    "AsymmetricLaplace": lambda a, b: dist.AsymmetricLaplace(a, b, a),
    "Beta": dist.Beta,
    "BetaBinomial": lambda a, b: dist.BetaBinomial(a, b, 6),
    "ContinuousBernoulli": lambda a, b: dist.ContinuousBernoulli(logits=a - b),
    "ContinuousBernoulli at 1/2": lambda a, b: dist.ContinuousBernoulli(logits=(a - a.detach()) * b),
    "DirichletMultinomial": lambda a, b: dist.DirichletMultinomial(torch.stack([a, b, a]), 6),
    "Dirichlet": lambda a, b: dist.Dirichlet(torch.stack([a, b, a])),
    "DiscreteHMM": lambda a, b: dist.DiscreteHMM(
        torch.stack([a, b]), torch.stack([a, b, b, a]).reshape(2, 2), dist.Normal(t(0.0, 1.0), b), duration=3
    ),
    "FoldedDistribution": lambda a, b: dist.FoldedDistribution(dist.Normal(a, b)),
    "Gamma": dist.Gamma,
    "GammaPoisson": dist.GammaPoisson,
    "GaussianHMM": lambda a, b: dist.GaussianHMM(
        dist.Normal(a.reshape(1), 1.0).to_event(1),
        torch.eye(1, dtype=F64),
        dist.Normal(torch.zeros(1, dtype=F64), b).to_event(1),
        torch.eye(1, dtype=F64),
        dist.Normal(torch.zeros(1, dtype=F64), t(1.0)).to_event(1),
        duration=3,
    ),
    "Gumbel": dist.Gumbel,
    "Kumaraswamy": dist.Kumaraswamy,
    "LKJCholesky of two": lambda a, b: dist.LKJCholesky(2, a + b),
    "Logistic": dist.Logistic,
    "LowRankMultivariateNormal": lambda a, b: dist.LowRankMultivariateNormal(
        torch.stack([a, b]), torch.stack([b, a]).reshape(2, 1), torch.stack([a, a])
    ),
    "MixtureOfDiagNormals": lambda a, b: dist.MixtureOfDiagNormals(a * LOCS, b * LOCS.abs(), LOCS[:, 1]),
    "MixtureSameFamily": lambda a, b: dist.MixtureSameFamily(
        dist.Categorical(logits=torch.stack([a, b])), dist.Normal(torch.stack([b, -a]), b)
    ),
    "MultivariateStudentT": lambda a, b: dist.MultivariateStudentT(4 + a, torch.stack([a, b]), b * TRIL),
    "NegativeBinomial": lambda a, b: dist.NegativeBinomial(a, logits=-b),
    "OneOneMatching": lambda a, b: dist.OneOneMatching(a * TRIL),
    "OrderedLogistic": lambda a, b: dist.OrderedLogistic(a, torch.stack([-b, a, a + b])),
    "ProjectedNormal": lambda a, b: dist.ProjectedNormal(torch.stack([a, -b, a])),
    "SineSkewed": lambda a, b: dist.SineSkewed(
        dist.VonMises(torch.stack([a, b]), t(2.0)).to_event(1), torch.stack([a, -b]) / 3
    ),
    "SkewLogistic": lambda a, b: dist.SkewLogistic(a, b, a),
    "SoftAsymmetricLaplace": lambda a, b: dist.SoftAsymmetricLaplace(a, b, a, b),
    "SoftLaplace": dist.SoftLaplace,
    "StudentT": lambda a, b: dist.StudentT(3 + a, a, b),
    "VonMises": dist.VonMises,
    "Weibull": dist.Weibull,
    "ZeroInflatedPoisson": lambda a, b: dist.ZeroInflatedPoisson(a, gate=b / 2),
}

OTHER_DRAWS = {
    "LKJCholesky": lambda a, b: dist.LKJCholesky(3, a + b),
    "LKJ": lambda a, b: dist.LKJ(3, a + b),
    "SineBivariateVonMises": lambda a, b: dist.SineBivariateVonMises(a, b, 2 * a, 2 * b, correlation=a / 3),
    "CoalescentTimes": lambda a, b: dist.CoalescentTimes(t(0.0, 0.1, 0.3), rate=a + b),
}


def terms(value):
    flat = value.to(F64).reshape(len(value), -1)
    return (1.3 * flat[:, 0] + 0.4 * flat[:, -1]).cos()


def in_errors(found):
    return (found.mean(0) / (found.std(0) / len(found) ** 0.5).clamp_min(1e-12)).abs().max().item()


def scores_and_paths(make):
    """By rounds of draws: the mean score, and the gradient of E[cos] by paths, if any, less that by scores."""
    pyro.set_rng_seed(0)
    a, b = t(0.8).requires_grad_(), t(1.1).requires_grad_()

    def slope(total):
        found = torch.autograd.grad(total, [a, b], retain_graph=True, allow_unused=True)
        return torch.stack([t(0.0) if one is None else one for one in found])

    scores, differences = [], []
    for _ in range(ROUNDS):
        fn = make(a, b)
        with torch.no_grad():
            drawn = fn.sample((DRAWS,))
        log_prob, value = make(a, b).log_prob(drawn), terms(drawn)
        scores.append(slope(log_prob.mean()))
        if fn.has_rsample:
            again = Pathwise().draw(make(a, b).expand_by((DRAWS,)), 0).value
            by_score = slope(((value - value.mean()) * log_prob).sum() / (DRAWS - 1))
            differences.append(slope(terms(again).mean()) - by_score)
    return torch.stack(scores), torch.stack(differences) if differences else None


@pytest.mark.parametrize("name", LAWS)
def test_the_mean_score_is_zero_and_paths_have_its_gradient(name):
    fn = LAWS[name](t(0.8), t(1.1))
    assert score_why_not({"fn": fn}) is None
    scores, differences = scores_and_paths(LAWS[name])
    assert in_errors(scores) < 5
    if differences is not None:
        assert Pathwise().why_not({"fn": fn}) is None
        assert in_errors(differences) < 5


@pytest.mark.parametrize("name", OTHER_DRAWS)
def test_laws_that_draw_from_another_are_refused(name):
    """They are refused as long as the fault is there: the mean of their score is far from zero."""
    assert in_errors(scores_and_paths(OTHER_DRAWS[name])[0]) > 10
    a = nn.Parameter(t(0.8))

    def program():
        pyro.sample("z", OTHER_DRAWS[name](a, t(1.1)))

    with pytest.raises(UnsupportedSite, match=r"'z' cannot take estimator 'rloo': .* a fault of (torch|Pyro)"):
        SiteELBO("rloo").loss(program, program)


@pytest.mark.parametrize("objective", ["rws", "log-variance+elbo"])
@pytest.mark.parametrize("name", OTHER_DRAWS)
def test_objectives_that_take_no_word_refuse_them_too(name, objective):
    a = nn.Parameter(t(0.8))

    def program():
        pyro.sample("z", OTHER_DRAWS[name](a, t(1.1)))

    with pytest.raises(UnsupportedSite, match=r"'z': .* a fault of (torch|Pyro)"):
        SiteELBO(objective=objective, num_particles=2).loss(program, program)


@pytest.mark.parametrize("options", [{}, {"estimators": "score"}, {"estimators": "rloo"}, {"objective": "rws"}])
@pytest.mark.parametrize(
    ("make", "family"),
    [
        (lambda logits: dist.RelaxedBernoulliStraightThrough(t(0.7), logits=logits).to_event(1), "Bernoulli"),
        (lambda logits: dist.RelaxedOneHotCategoricalStraightThrough(t(0.7), logits=logits), "OneHotCategorical"),
    ],
)
def test_rounded_draws_that_are_scored_before_rounding_are_refused(make, family, options):
    """A detached draw has lost the number that its density is of: the gradient was 0.62 for 0.13, or NaN."""
    logits = nn.Parameter(t(0.3, -0.2))

    def program():
        pyro.sample("z", make(logits))

    with pytest.raises(UnsupportedSite, match=f"gives its rounded one; take {family} with the word"):
        SiteELBO(**options, num_particles=2).loss(program, program)


def test_coalescent_times_at_rate_one_are_drawn_as_they_are_scored():
    assert score_why_not({"fn": dist.CoalescentTimes(t(0.0, 0.1, 0.3))}) is None


@pytest.mark.parametrize("word", ["pathwise", "stl"])
@pytest.mark.parametrize("kind", [dist.MixtureOfDiagNormals, dist.MixtureOfDiagNormalsSharedCovariance])
def test_paths_through_the_weights_of_mixtures_are_refused(kind, word):
    logits = nn.Parameter(torch.zeros(3, dtype=F64))
    scale = torch.ones_like(LOCS if kind is dist.MixtureOfDiagNormals else LOCS[0])

    def program():
        pyro.sample("z", kind(LOCS, scale, logits))

    with pytest.raises(UnsupportedSite, match="with respect to component_logits is wrong, a fault of Pyro"):
        SiteELBO(word).loss(program, program)
    SiteELBO("rloo").loss(program, program)
    logits.requires_grad_(False)
    SiteELBO(word).loss(program, program)


def test_the_path_of_a_continuous_coin_begins_at_its_usual_initial_value():
    """A guide that begins at p = 1/2 stayed there: torch's draw has no derivative in a thousandth around it."""
    pyro.set_rng_seed(1)

    class Guide(pyro.nn.PyroModule):
        def __init__(self):
            super().__init__()
            self.logit = nn.Parameter(t(0.0))

        def forward(self):
            pyro.sample("z", dist.ContinuousBernoulli(logits=self.logit))

    def model():
        z = pyro.sample("z", dist.Uniform(t(0.0), t(1.0)))
        pyro.factor("f", 3 * z)

    loss = SiteELBO("pathwise", num_particles=4000)(model, Guide())
    loss().backward()
    # E[3 z] has the derivative 3 Var[z] = 1/4, and KL to the uniform law none.
    assert loss.guide.logit.grad.item() == pytest.approx(-0.25, abs=0.01)
