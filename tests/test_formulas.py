"""The formulas that gumbo stands on, number by number as in docs/formulas.md.

Each test shows that the right form is right, and that the slip one meets in print is wrong by the same yardstick.
Truth is a closed form, a quadrature or an exact sum, in float64; where draws are needed the seed is fixed, the
probability of a false alarm is stated (`ALARM`), and the slip is shown to be caught with overwhelming power.
"""

from __future__ import annotations

import itertools
import math
import re
from pathlib import Path

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
import torch.nn.functional as F
from pyro import poutine
from scipy.stats import chi2, ncx2
from torch.distributions import kl_divergence

from gumbo.errors import BadInput
from gumbo.experiments.data import load
from gumbo.guides import FlowGuide, LayeredGuide, NormalGuide, TriangularNormalGuide
from gumbo.inference import SiteELBO
from gumbo.inference.estimators import Concrete, GumbelSoftmax, Pathwise, ScoreFunction
from gumbo.inference.objectives._weights import power_mean
from gumbo.inference.posterior.evaluation import evaluate
from gumbo.inference.posterior.parts import log_weights
from gumbo.models import GaussianVAE, SigmoidBeliefNetwork

ALARM = 1e-6  # how often a right formula may fail a test on draws, were the seed not fixed


@pytest.fixture(autouse=True)
def float64():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.fixture(autouse=True)
def store(param_store):
    """Modules called as bare Pyro programs write into the param store."""


def normal_nodes(n: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Nodes and weights of Gauss's rule for N(0, 1): exact for polynomials up to degree 2n − 1."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(n)
    return torch.tensor(nodes), torch.tensor(weights / math.sqrt(2 * math.pi))


def expectation(f, loc, scale, n: int = 60) -> torch.Tensor:
    """E[f(z)] for z ~ N(loc, scale²), differentiable in both (through the nodes)."""
    nodes, weights = normal_nodes(n)
    return (weights * f(loc + scale * nodes)).sum()


def log_normal(z, loc=0.0, scale=1.0):
    return -0.5 * ((z - loc) / scale) ** 2 - torch.as_tensor(scale).log() - 0.5 * math.log(2 * math.pi)


def close(value, truth, tolerance: float = 1e-9) -> bool:
    return torch.allclose(torch.as_tensor(value), torch.as_tensor(truth), rtol=tolerance, atol=tolerance)


def leaf(*values: float) -> torch.Tensor:
    return torch.tensor(values if len(values) > 1 else values[0], requires_grad=True)


class FixedNormal(dist.Normal):
    """A Normal whose noise ε is chosen, so that an estimator can be averaged over a quadrature rule instead of luck."""

    noise = 0.0

    def rsample(self, sample_shape=()):
        return (self.loc + self.scale * FixedNormal.noise).expand(self._extended_shape(torch.Size(sample_shape)))

    def sample(self, sample_shape=()):
        return self.rsample(sample_shape).detach()


class FixedBernoulli(dist.Bernoulli):
    """A Bernoulli whose draw is chosen, so that an estimator can be averaged over all of them."""

    drawn = 0.0

    def sample(self, sample_shape=()):
        return torch.full(self._extended_shape(torch.Size(sample_shape)), FixedBernoulli.drawn)


def loss_and_gradient(model, guide, estimators, parameters, *args, **options) -> tuple[torch.Tensor, torch.Tensor]:
    """The negative bound of one draw, and the estimator's gradient with respect to the listed leaves."""
    loss = SiteELBO(estimators, **options)(model, guide)(*args)
    gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
    flat = [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, gradients, strict=True)]
    return loss.detach(), torch.cat([g.flatten() for g in flat])


def averaged_over_noise(model, guide, estimators, parameters, n: int = 12, **options):
    """E[loss] and E[gradient] of programs whose one latent is a FixedNormal."""
    total_loss, total_gradient = torch.zeros(()), 0.0
    for node, weight in zip(*normal_nodes(n), strict=True):
        FixedNormal.noise = node
        loss, gradient = loss_and_gradient(model, guide, estimators, parameters, **options)
        total_loss, total_gradient = total_loss + weight * loss, total_gradient + weight * gradient
    return total_loss, total_gradient


def p_value(counts: torch.Tensor, probabilities: torch.Tensor) -> float:
    """Pearson's χ² test that counts come from Categorical(probabilities)."""
    expected = probabilities * counts.sum()
    return float(chi2.sf(((counts - expected) ** 2 / expected).sum().item(), len(counts) - 1))


def power(n: int, truth: torch.Tensor, claimed: torch.Tensor) -> float:
    """How surely n draws from `truth` fail the χ² test of `claimed` at level ALARM."""
    shift = n * ((truth - claimed) ** 2 / claimed).sum().item()
    df = len(truth) - 1
    return float(ncx2.sf(chi2.isf(ALARM, df), df, shift))


def gumbels(*shape: int) -> torch.Tensor:
    return -torch.log(-torch.log(torch.rand(*shape)))


def counts_of(indices: torch.Tensor, classes: int) -> torch.Tensor:
    return torch.bincount(indices.flatten(), minlength=classes).double()


# 1. The gradient of an expectation ------------------------------------------------------------------------------------


def test_01_both_terms_are_needed():
    """f_θ(z) = θ z² under N(θ, 1): E = θ³ + θ, so the gradient is 3θ² + 1 = (θ² + 1) + 2θ²."""
    theta, z = torch.tensor(0.7), torch.linspace(-12, 14, 801)
    density_slope = torch.autograd.functional.jacobian(lambda t: log_normal(z, t).exp(), theta)
    through_f = expectation(lambda z: z**2, theta, 1.0)
    through_p = torch.trapezoid(theta * z**2 * density_slope, z)
    truth = 3 * theta**2 + 1
    assert close(through_f + through_p, truth)
    assert not close(through_f, truth, 0.1) and not close(through_p, truth, 0.1)


# 2. Pathwise ----------------------------------------------------------------------------------------------------------


def test_02_gradient_moves_inside_the_expectation():
    """E[sin z] = sin μ · exp(−σ²/2)."""
    loc, scale = leaf(0.4), leaf(1.3)
    found = torch.autograd.grad(expectation(torch.sin, loc, scale), (loc, scale))
    truth = torch.autograd.grad(loc.sin() * (-(scale**2) / 2).exp(), (loc, scale))
    assert close(torch.stack(found), torch.stack(truth))
    frozen = expectation(lambda z: z.detach().sin() * (z * 0 + 1), loc, scale)
    assert close(torch.stack(torch.autograd.grad(frozen, (loc, scale))), torch.zeros(2))


def conjugate(x: float = 1.7, sd: float = 0.8):
    """z ~ N(0, 1), x | z ~ N(z, sd²), q = N(μ, σ²): everything about it has a closed form."""
    loc, scale = leaf(0.3), leaf(0.6)

    def model():
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, sd), obs=torch.tensor(x))

    def guide():
        pyro.sample("z", FixedNormal(loc, scale))

    def reconstruction(loc, scale):
        return log_normal(torch.tensor(x), loc, sd) - scale**2 / (2 * sd**2)

    return model, guide, loc, scale, reconstruction


def kl_to_standard(loc, scale):
    return 0.5 * (loc**2 + scale**2 - (scale**2).log() - 1)


@pytest.mark.parametrize("estimator", [Pathwise(), ScoreFunction()], ids=["pathwise", "score"])
def test_02_site_elbo_has_the_exact_mean_gradient(estimator):
    """Pathwise and score function differ in variance, not in their mean."""
    model, guide, loc, scale, reconstruction = conjugate()
    bound = reconstruction(loc, scale) - kl_to_standard(loc, scale)
    truth = -torch.stack(torch.autograd.grad(bound, (loc, scale)))
    loss, gradient = averaged_over_noise(model, guide, estimator, (loc, scale))
    assert close(loss, -bound) and close(gradient, truth)


# 3. The Normal sample -------------------------------------------------------------------------------------------------


def guide_with(sd: float, loc: float = 0.0, latent_dim: int = 1) -> NormalGuide:
    """A NormalGuide that answers N(loc, sd²) whatever it is shown."""
    guide = NormalGuide(GaussianVAE((2,), latent_dim=latent_dim, hidden=(4,)), hidden=(4,))
    head = guide.encoder_heads["z"]
    raw = math.log(math.expm1(sd - guide.min_sd))
    with torch.no_grad():
        head.weight.zero_()
        head.bias.copy_(torch.tensor([loc] * latent_dim + [raw] * latent_dim))
    return guide


def test_03_noise_is_scaled_by_the_standard_deviation():
    """The sample variance of n draws is σ² up to z·σ²·√(2/n); the slips' variances are (log σ²)² and σ⁴."""
    sd, n = 0.4, 20000
    z = guide_with(sd)(torch.zeros(n, 2))["z"]
    noise = torch.randn(n)
    slack = 4.9 * math.sqrt(2 / n)  # P(|N(0, 1)| > 4.9) < ALARM

    def has_the_variance(draws):
        return abs(draws.var() / sd**2 - 1) < slack

    log_variance = torch.tensor(sd**2).log()
    assert has_the_variance(z) and has_the_variance((log_variance / 2).exp() * noise)
    assert not has_the_variance(log_variance * noise)
    assert not has_the_variance(sd**2 * noise)


def test_03_density_belongs_to_the_sample():
    """The guide's draw and log q speak of one distribution; with a slip in the draw they would not."""
    guide = guide_with(0.4, loc=0.9)
    trace = poutine.trace(guide).get_trace(torch.zeros(3, 2))
    trace.compute_log_prob()
    epsilon = (trace.nodes["z"]["value"] - 0.9) / 0.4
    assert close(trace.nodes["z"]["log_prob"], (log_normal(epsilon) - math.log(0.4)).sum(-1))
    assert not close(trace.nodes["z"]["log_prob"], (log_normal(epsilon) - math.log(0.4**2)).sum(-1), 0.1)


# 4. KL to the standard Normal -----------------------------------------------------------------------------------------


def test_04_closed_form_has_the_half_and_sums_over_dimensions():
    loc, scale = torch.tensor([0.3, -1.2, 2.0]), torch.tensor([0.5, 1.0, 1.7])
    terms = loc**2 + scale**2 - (scale**2).log() - 1
    by_quadrature = sum(
        expectation(lambda z, m=m, s=s: log_normal(z, m, s) - log_normal(z), m, s)
        for m, s in zip(loc, scale, strict=True)
    )
    assert close(0.5 * terms.sum(), by_quadrature)
    assert close(0.5 * terms.sum(), kl_divergence(dist.Normal(loc, scale), dist.Normal(0.0, 1.0)).sum())
    assert not close(terms.sum(), by_quadrature, 0.1)
    assert not close(0.5 * terms.mean(), by_quadrature, 0.1)


def test_04_rate_of_a_vae_is_the_closed_form():
    """E[log q − log p] over draws of model and guide; without the ½ it is 40 standard errors away."""
    model, guide = GaussianVAE((2,), latent_dim=3, hidden=(4,)), guide_with(0.4, loc=0.9, latent_dim=3)
    parts = log_weights(model, guide, torch.zeros(1, 2), num_samples=8000)
    rate = (parts["log_q"] - parts["log_prior"]).flatten()
    error = rate.std() / math.sqrt(len(rate))
    truth = 3 * kl_to_standard(torch.tensor(0.9), torch.tensor(0.4))
    assert abs(rate.mean() - truth) < 4.9 * error
    assert abs(rate.mean() - 2 * truth) > 40 * error


def test_04_without_the_half_the_optimum_is_not_the_posterior():
    """The bound is stationary at the exact posterior N(x/(1+s²), s²/(1+s²)), the slip's is not."""
    model, guide, loc, scale, reconstruction = conjugate(x=1.7, sd=0.8)
    with torch.no_grad():
        loc.fill_(1.7 / (1 + 0.64))
        scale.fill_(math.sqrt(0.64 / (1 + 0.64)))
    slip = torch.autograd.grad(reconstruction(loc, scale) - 2 * kl_to_standard(loc, scale), (loc, scale))
    _, gradient = averaged_over_noise(model, guide, "pathwise", (loc, scale))
    assert close(gradient, torch.zeros(2))
    assert max(abs(g) for g in slip) > 0.5


def test_04_averaging_over_pixels_trains_a_beta_vae():
    """Pixels averaged and KL summed is 1/P of the β-VAE bound with β = P, not of the evidence lower bound."""
    pixels = 12
    model = GaussianVAE((pixels,), latent_dim=2, hidden=(8,), likelihood="normal", likelihood_sd=0.5)
    guide = NormalGuide(model, hidden=(8,))
    x = torch.randn(5, pixels)
    parameters = [*model.parameters(), *guide.parameters()]

    torch.manual_seed(1)
    trace = poutine.trace(guide).get_trace(x)
    trace.compute_log_prob()
    z = trace.nodes["z"]["value"]
    log_ratio = log_normal(z).sum() - trace.nodes["z"]["log_prob"].sum()
    slip = torch.autograd.grad(-(model.likelihood(z).log_prob(x).sum() / pixels + log_ratio), parameters)
    slip = torch.cat([g.flatten() for g in slip])

    torch.manual_seed(1)
    _, beta = loss_and_gradient(model, guide, "pathwise", parameters, x, kl_weight=float(pixels))
    torch.manual_seed(1)
    _, elbo = loss_and_gradient(model, guide, "pathwise", parameters, x)
    assert close(slip * pixels, beta)
    assert F.cosine_similarity(slip, elbo, dim=0) < 0.99


# 5. Reconstruction ----------------------------------------------------------------------------------------------------


def test_05_squared_error_is_a_normal_up_to_scale_and_constant():
    sd, pixels = 0.5, 6
    model = GaussianVAE((pixels,), latent_dim=2, hidden=(8,), likelihood="normal", likelihood_sd=sd)
    z, x = torch.randn(4, 2, requires_grad=True), torch.randn(4, pixels)
    log_p, squared = model.likelihood(z).log_prob(x), (model.decoder(z) - x).square().sum(-1)
    constant = -pixels / 2 * math.log(2 * math.pi * sd**2)
    assert close(log_p, -squared / (2 * sd**2) + constant, 1e-6)  # the model's buffers were made from a float32 log
    (by_density,) = torch.autograd.grad(log_p.sum(), z)
    (by_error,) = torch.autograd.grad(-squared.sum() / (2 * sd**2), z, retain_graph=False)
    assert close(by_density, by_error, 1e-6)


def test_05_bernoulli_pixels_are_summed():
    model = GaussianVAE((2, 3), latent_dim=2, hidden=(8,))
    z, x = torch.randn(4, 2), torch.randint(2, (4, 2, 3)).double()
    logits = model.decoder(z).unflatten(-1, (2, 3))
    log_p = model.likelihood(z).log_prob(x)
    each = -F.binary_cross_entropy_with_logits(logits, x, reduction="none")
    assert close(log_p, each.sum((-1, -2)))
    assert not close(log_p, each.mean((-1, -2)), 0.1)


def test_05_it_is_no_cross_entropy_between_q_and_p():
    """A cross-entropy H(q, p) is at least H(q); −E_q[log p(x|z)] is not, since p(x|z) is no density over z."""
    model = GaussianVAE((2,), latent_dim=1, hidden=(8,))
    with torch.no_grad():
        for parameter in model.decoder.parameters():
            parameter.mul_(0.1)  # a faint decoder: each pixel about a fair coin, whatever z
    x, grid = torch.tensor([0.0, 1.0]), torch.linspace(-12, 12, 4001)

    def log_likelihood(z):
        return model.likelihood(z.unsqueeze(-1)).log_prob(x.expand(len(z), 2)).detach()

    loc, scale = 0.0, 4.0
    entropy = dist.Normal(loc, scale).entropy()
    assert -expectation(lambda z: log_normal(z, 1.0, 2.0), loc, scale) > entropy
    assert -expectation(log_likelihood, loc, scale) < entropy - 0.5
    assert abs(torch.trapezoid(log_likelihood(grid).exp(), grid) - 1) > 0.5


# 6. The score function ------------------------------------------------------------------------------------------------


def averaged_over_coin(model, guide, estimators, logit) -> torch.Tensor:
    """E[gradient] with respect to the logit of a FixedBernoulli: an exact sum over its two values."""
    total = 0.0
    for value, probability in ((1.0, logit.sigmoid()), (0.0, (-logit).sigmoid())):
        FixedBernoulli.drawn = value
        total = total + probability.detach() * loss_and_gradient(model, guide, estimators, (logit,))[1]
    return total.squeeze()


def coin_bound(logit, log_joint) -> torch.Tensor:
    """Σ_z q(z) (log p(x, z) − log q(z)) of one coin."""
    probs = torch.stack([(-logit).sigmoid(), logit.sigmoid()])
    return (probs * (torch.stack([log_joint(0.0), log_joint(1.0)]) - probs.log())).sum()


def test_06_f_need_not_be_differentiable():
    """A Python branch on the draw has no derivative; the score function needs none."""
    logit, x = leaf(0.4), torch.tensor(1.5)

    def model():
        z = pyro.sample("z", dist.Bernoulli(0.3))
        loc = 1.0 if z > 0.5 else -1.0
        pyro.sample("x", dist.Normal(loc, 1.0), obs=x)

    def guide():
        pyro.sample("z", FixedBernoulli(logits=logit))

    def log_joint(z):
        return torch.tensor(math.log(0.3 if z else 0.7)) + log_normal(x, 2 * z - 1)

    (truth,) = torch.autograd.grad(-coin_bound(logit, log_joint), logit)
    assert abs(truth) > 0.1
    assert close(averaged_over_coin(model, guide, ScoreFunction(), logit), truth)


def test_06_f_that_depends_on_the_parameter_adds_its_own_gradient():
    """One parameter in model and guide: E[f ∇ log q] alone misses E[∇f]."""
    logit, x = leaf(0.4), torch.tensor(1.5)

    def model():
        z = pyro.sample("z", dist.Bernoulli(0.3))
        pyro.sample("x", dist.Normal(logit * (1 + z), 1.0), obs=x)

    def guide():
        pyro.sample("z", FixedBernoulli(logits=logit))

    def log_joint(z, location=logit):
        return torch.tensor(math.log(0.3 if z else 0.7)) + log_normal(x, location * (1 + z))

    (truth,) = torch.autograd.grad(-coin_bound(logit, log_joint), logit)
    frozen = coin_bound(logit, lambda z: log_joint(z, logit.detach()))
    (score_alone,) = torch.autograd.grad(-frozen, logit)
    assert close(averaged_over_coin(model, guide, ScoreFunction(), logit), truth)
    assert not close(score_alone, truth, 0.1)


def test_06_pathwise_is_blind_to_a_step():
    """d/dμ P(z > 0) is the density at 0; the derivative of the step itself is 0 everywhere."""
    loc = torch.tensor(0.4)
    z = torch.linspace(0, 14, 20001)
    score_function = torch.trapezoid((z - loc) * log_normal(z, loc).exp(), z)
    assert close(score_function, log_normal(torch.tensor(0.0), loc).exp(), 1e-6)
    moving = leaf(0.4)
    step = expectation(lambda z: (z > 0).double() + 0 * z, moving, 1.0)
    assert torch.autograd.grad(step, moving)[0] == 0


# 7. Gumbel-max --------------------------------------------------------------------------------------------------------

PI = torch.tensor([0.6, 0.25, 0.1, 0.05], dtype=torch.float64)


def sign_slip_probabilities(pi: torch.Tensor) -> torch.Tensor:
    """P(argmax_i log π_i + log(−log u_i) = i), exactly: the largest of independent exponentials with rates 1/π_i."""
    rates, found = 1 / pi, []
    for i in range(len(pi)):
        others = [j for j in range(len(pi)) if j != i]
        subsets = itertools.chain.from_iterable(itertools.combinations(others, k) for k in range(len(pi)))
        found.append(sum((-1) ** len(s) * rates[i] / (rates[i] + sum(rates[j] for j in s)) for s in subsets))
    return torch.stack([torch.as_tensor(p) for p in found])


def test_07_argmax_is_a_categorical_draw_by_quadrature():
    """P(argmax = i) = ∫ p(g) ∏_j F(g + log π_i − log π_j) dg, with the Gumbel law F(g) = exp(−exp(−g))."""
    g = torch.linspace(-6, 40, 200001)
    for i in range(len(PI)):
        shifted = g.unsqueeze(-1) + PI[i].log() - PI.log()
        others = [j for j in range(len(PI)) if j != i]
        law = (-(-shifted[:, others]).exp()).exp().prod(-1)
        assert close(torch.trapezoid((-g - (-g).exp()).exp() * law, g), PI[i], 1e-7)


def test_07_draws_pass_and_the_sign_slip_fails_the_same_test():
    """χ² on 20,000 draws; the sign slip is caught with certainty, and its own law is the exact one above."""
    n, u = 20000, torch.rand(20000, 4)
    right = (PI.log() - (-u.log()).log()).argmax(-1)
    slip = (PI.log() + (-u.log()).log()).argmax(-1)
    wrong = sign_slip_probabilities(PI)
    assert power(n, wrong, PI) > 1 - 1e-12
    assert p_value(counts_of(right, 4), PI) > ALARM
    assert p_value(counts_of(slip, 4), PI) < ALARM
    assert p_value(counts_of(slip, 4), wrong) > ALARM


def test_07_hard_draws_of_the_estimator_follow_pi():
    guide_site = dist.OneHotCategorical(PI).expand([20000])
    draws = GumbelSoftmax(hard=True).draw(guide_site, 0).value
    assert close(draws.sum(-1), torch.ones(20000)) and draws.max(-1).values.min() > 1 - 1e-12
    assert p_value(counts_of(draws.argmax(-1), 4), PI) > ALARM


def test_07_two_classes_hide_the_sign_slip():
    """With two classes the flipped sign is right by symmetry: a test of it needs three."""
    two = torch.tensor([0.8, 0.2])
    assert close(sign_slip_probabilities(two), two)
    assert not close(sign_slip_probabilities(PI), PI, 0.01)


def test_07_inequalities_are_independent_only_given_the_first_noise():
    """P(1 beats 2 and 1 beats 3) is π₁ of three, not the product of the two probabilities."""
    pi = torch.tensor([0.5, 0.3, 0.2])
    g = torch.linspace(-6, 40, 200001)
    density = (-g - (-g).exp()).exp()
    beats = [(-(-(g + pi[0].log() - pi[j].log())).exp()).exp() for j in (1, 2)]
    both, first, second = (torch.trapezoid(density * law, g) for law in (beats[0] * beats[1], *beats))
    assert close(both, pi[0], 1e-7)
    assert close(first, pi[0] / (pi[0] + pi[1]), 1e-7) and close(second, pi[0] / (pi[0] + pi[2]), 1e-7)
    assert both - first * second > 0.03


# 8. Gumbel-softmax ----------------------------------------------------------------------------------------------------


def soft_draws(temperature: float, n: int = 20000, logits: torch.Tensor | None = None) -> torch.Tensor:
    logits = PI.log().expand(n, 4) if logits is None else logits
    return GumbelSoftmax(temperature).draw(dist.OneHotCategorical(logits=logits), 0).value


@pytest.mark.parametrize("temperature", [0.1, 1.0, 10.0])
def test_08_argmax_follows_pi_at_every_temperature(temperature):
    assert p_value(counts_of(soft_draws(temperature).argmax(-1), 4), PI) > ALARM


def test_08_concrete_draws_the_same_law():
    fn = dist.OneHotCategorical(PI).expand([20000])
    draws = Concrete(0.5).draw(fn, 0).value
    assert p_value(counts_of(draws.argmax(-1), 4), PI) > ALARM


def test_08_limits_of_the_temperature():
    cold, hot = soft_draws(1e-3, 2000), soft_draws(1e4, 2000)
    # A near tie of the two largest scores is what keeps a cold draw from a corner.
    assert (cold.max(-1).values > 1 - 1e-6).double().mean() > 0.98
    assert abs(hot - 0.25).max() < 1e-2


def test_08_noise_belongs_to_the_logits():
    """Added to probabilities it draws from softmax(π): close to uniform, whatever π says."""
    n, noise = 20000, gumbels(20000, 4)
    slip = counts_of((PI + noise).argmax(-1), 4)
    assert power(n, PI.softmax(0), PI) > 1 - 1e-12
    assert p_value(counts_of((PI.log() + noise).argmax(-1), 4), PI) > ALARM
    assert p_value(slip, PI) < ALARM and p_value(slip, PI.softmax(0)) > ALARM


def test_08_without_noise_nothing_is_drawn():
    """softmax(log π / τ) is one point, and its argmax is always the mode."""
    slip = (PI.log() / 0.5).softmax(-1).expand(20000, 4)
    draws = soft_draws(0.5)
    assert slip.var(0).max() < 1e-30 and draws.var(0).min() > 1e-3
    assert p_value(counts_of(slip.argmax(-1), 4), PI) < ALARM


def test_08_gradients_vanish_or_explode_when_it_is_too_cold():
    """At τ = 0.01 almost every draw has no gradient and a few have a huge one; at τ = 1 it is at most ¼."""

    def sizes(temperature):
        logits = PI.log().expand(20000, 4).clone().requires_grad_()
        (gradient,) = torch.autograd.grad(soft_draws(temperature, logits=logits)[:, 0].sum(), logits)
        return gradient.abs().max(-1).values

    cold, mild = sizes(0.01), sizes(1.0)
    assert (cold < 1e-6).double().mean() > 0.8 and cold.max() > 20
    assert (mild < 1e-6).double().mean() < 1e-3 and mild.max() <= 0.25
    assert cold.var() > 50 * mild.var()


# 9. Annealing ---------------------------------------------------------------------------------------------------------


def annealed(step: int, start: float = 1.0, floor: float = 0.5, rate: float = 1e-3) -> float:
    return max(floor, start * math.exp(-rate * step))


def test_09_temperature_decays_to_its_floor():
    assert annealed(0) == 1.0
    assert close(annealed(101) / annealed(100), math.exp(-1e-3))
    reached = math.log(1.0 / 0.5) / 1e-3
    assert annealed(math.floor(reached)) > 0.5 and annealed(math.ceil(reached)) == annealed(10**6) == 0.5


def test_09_estimator_draws_at_the_scheduled_temperature():
    fn = dist.OneHotCategorical(PI)
    for step in (0, 300, 5000):
        torch.manual_seed(2)
        scheduled = GumbelSoftmax(annealed).draw(fn, step).value
        torch.manual_seed(2)
        assert close(scheduled, GumbelSoftmax(annealed(step)).draw(fn, 0).value)


# 10. Change of variables ----------------------------------------------------------------------------------------------


def test_10_log_determinant_is_subtracted():
    """z = sinh ε: the density of z integrates to one; with the sign turned it does not."""
    z = torch.cat([-torch.linspace(8, 0, 40001).sinh(), torch.linspace(0, 8, 40001).sinh()[1:]])
    epsilon = z.asinh()
    log_determinant = epsilon.cosh().log()
    right = torch.trapezoid((log_normal(epsilon) - log_determinant).exp(), z)
    slip = torch.trapezoid((log_normal(epsilon) + log_determinant).exp(), z)
    forgotten = torch.trapezoid(log_normal(epsilon).exp(), z)
    assert close(right, 1.0, 1e-6) and abs(slip - 1) > 0.5 and abs(forgotten - 1) > 0.5


def test_10_determinant_of_the_whole_jacobian():
    """Two coupled dimensions, against the law of z taken apart as p(z₁) p(z₂ | z₁)."""
    epsilon = torch.tensor([0.3, -1.1])

    def g(e):
        return torch.stack([2 * e[0] + 1, (e[0] / 2).exp() * e[1] + e[0] ** 2])

    z, jacobian = g(epsilon), torch.autograd.functional.jacobian(g, epsilon)
    by_change = log_normal(epsilon).sum() - torch.linalg.slogdet(jacobian).logabsdet
    first = (z[0] - 1) / 2
    taken_apart = log_normal(z[0], 1.0, 2.0) + log_normal(z[1], first**2, (first / 2).exp())
    assert close(by_change, taken_apart)


def test_10_normal_guide_subtracts_log_sigma():
    guide = NormalGuide(GaussianVAE((3,), latent_dim=2, hidden=(4,)), hidden=(4,))
    x = torch.rand(5, 3).round()
    trace = poutine.trace(guide).get_trace(x)
    trace.compute_log_prob()
    normal, z = trace.nodes["z"]["fn"].base_dist, trace.nodes["z"]["value"]
    epsilon = (z - normal.loc) / normal.scale
    assert close(trace.nodes["z"]["log_prob"], (log_normal(epsilon) - normal.scale.log()).sum(-1))
    assert not close(trace.nodes["z"]["log_prob"], (log_normal(epsilon) + normal.scale.log()).sum(-1), 0.05)


@pytest.mark.parametrize("flow", ["maf", "nsf"])
def test_10_flow_guide_subtracts_its_log_determinant(flow):
    """log q of a flow's draws, against the Jacobian that autograd finds for ε as a function of z."""
    guide = FlowGuide(GaussianVAE((3,), latent_dim=2, hidden=(4,)), flow=flow, transforms=2, flow_hidden=(8,))
    trace = poutine.trace(guide).get_trace(torch.rand(5, 3).round())
    trace.compute_log_prob()
    fn, z = trace.nodes["z"]["fn"], trace.nodes["z"]["value"].detach()
    epsilon = fn.dist.transform(z)
    # Row b of the noise depends on row b of z alone, so the sum over rows keeps the Jacobians apart.
    jacobian = torch.autograd.functional.jacobian(lambda z: fn.dist.transform(z).sum(0), z).movedim(1, 0)
    log_determinant = -torch.linalg.slogdet(jacobian).logabsdet  # of ∂z/∂ε
    assert log_determinant.abs().max() > 0.05
    assert close(trace.nodes["z"]["log_prob"], log_normal(epsilon).sum(-1) - log_determinant, 1e-6)
    assert not close(trace.nodes["z"]["log_prob"], log_normal(epsilon).sum(-1) + log_determinant, 0.01)


# 11. The evidence lower bound -----------------------------------------------------------------------------------------


def test_11_evidence_is_bound_plus_gap():
    x, sd = 1.7, 0.8
    model, guide, loc, scale, _ = conjugate(x, sd)
    posterior = dist.Normal(x / (1 + sd**2), sd / math.sqrt(1 + sd**2))
    log_evidence = log_normal(torch.tensor(x), 0.0, math.sqrt(1 + sd**2))
    loss, _ = averaged_over_noise(model, guide, "pathwise", (loc, scale))
    gap = kl_divergence(dist.Normal(loc, scale), posterior)
    assert gap > 0.1 and close(-loss + gap, log_evidence)


def test_11_bound_is_tight_at_the_posterior_for_every_draw():
    x, sd = 1.7, 0.8
    model, guide, loc, scale, _ = conjugate(x, sd)
    with torch.no_grad():
        loc.fill_(x / (1 + sd**2))
        scale.fill_(sd / math.sqrt(1 + sd**2))
    for noise in (-2.0, 0.1, 1.5):
        FixedNormal.noise = noise
        loss, _ = loss_and_gradient(model, guide, "pathwise", (loc, scale))
        assert close(-loss, log_normal(torch.tensor(x), 0.0, math.sqrt(1 + sd**2)))


def test_11_evidence_is_maximized():
    """A step down the loss raises Σ log p(x), a step the other way (argmin of Σ log p) lowers it without end."""
    x, shift = torch.tensor([1.7, 0.2, 2.6]), leaf(0.0)

    def evidence(shift):
        return log_normal(x, shift, math.sqrt(2.0)).sum()

    def model():
        with pyro.plate("data", 3):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z + shift, 1.0), obs=x)

    def guide():
        with pyro.plate("data", 3):
            pyro.sample("z", FixedNormal((x - shift.detach()) / 2, math.sqrt(0.5)))

    _, gradient = averaged_over_noise(model, guide, "pathwise", (shift,))
    (truth,) = torch.autograd.grad(-evidence(shift), shift)
    assert close(gradient, truth)
    assert evidence(shift - 0.1 * gradient) > evidence(shift) > evidence(shift + 0.1 * gradient)
    assert evidence(torch.tensor(1e3)) < -1e5


# 12. The marginal likelihood ------------------------------------------------------------------------------------------

JOINT = torch.tensor([0.10, 0.02, 0.20], dtype=torch.float64)  # p(x, z) of z = 0, 1, 2 at the x that was seen
PROPOSAL = torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64)


def expected_log_mean_weight(draws: int) -> float:
    """E[log (1/L) Σ w_l] by summing over every tuple of draws."""
    weights, total = JOINT / PROPOSAL, 0.0
    for tuple_ in itertools.product(range(3), repeat=draws):
        index = list(tuple_)
        total += float(PROPOSAL[index].prod() * weights[index].mean().log())
    return total


def test_12_bound_tightens_with_the_number_of_draws():
    bounds = [expected_log_mean_weight(draws) for draws in (1, 2, 3, 5, 8)]
    elbo = (PROPOSAL * (JOINT / PROPOSAL).log()).sum()
    assert close(bounds[0], elbo)
    assert bounds == sorted(bounds) and bounds[-1] < math.log(JOINT.sum())
    assert math.log(JOINT.sum()) - bounds[-1] < 0.2 * (math.log(JOINT.sum()) - bounds[0])
    # The mean weight itself has no bias: the logarithm makes the bound.
    assert close((PROPOSAL * JOINT / PROPOSAL).sum(), JOINT.sum())


@pytest.mark.parametrize("draws", [1, 4])
def test_12_evaluate_averages_weights_inside_the_logarithm(draws):
    """`evaluate` over many equal rows against the exact expectation; averaging outside gives the ELBO at every L."""
    conditional, rows = JOINT / JOINT.sum(), 4000

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Categorical(conditional))
            pyro.sample("x", dist.Normal(z * 0.0, 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Categorical(PROPOSAL))

    found = evaluate(model, guide, torch.zeros(rows), num_samples=draws)
    constant = -0.5 * math.log(2 * math.pi) - math.log(JOINT.sum())
    truth = expected_log_mean_weight(draws) + constant
    assert abs(found.log_evidence - truth) < 4.9 * found.log_evidence_se
    assert abs(found.elbo - expected_log_mean_weight(1) - constant) < 4.9 * found.elbo_se
    if draws == 1:
        assert close(found.log_evidence, found.elbo)
    else:
        assert found.log_evidence - found.elbo > 20 * found.log_evidence_se


# 13. KL warm-up -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
def test_13_weight_multiplies_the_kl_alone(beta):
    model, guide, loc, scale, reconstruction = conjugate()
    loss, gradient = averaged_over_noise(model, guide, "pathwise", (loc, scale), kl_weight=beta)
    bound = reconstruction(loc, scale) - beta * kl_to_standard(loc, scale)
    assert close(loss, -bound)
    assert close(gradient, -torch.stack(torch.autograd.grad(bound, (loc, scale))))


def test_13_schedule_raises_the_weight_step_by_step():
    """One loss called again and again: step t has weight β_t, from the reconstruction alone to the full bound."""
    model, guide, loc, scale, _ = conjugate()
    FixedNormal.noise = 0.7
    loss = SiteELBO("pathwise", kl_weight=lambda step: min(1.0, step / 4))(model, guide)
    with_none, _ = loss_and_gradient(model, guide, "pathwise", (loc, scale), kl_weight=0.0)
    with_all, _ = loss_and_gradient(model, guide, "pathwise", (loc, scale))
    losses = torch.stack([loss().detach() for _ in range(6)])
    betas = torch.tensor([0.0, 0.25, 0.5, 0.75, 1.0, 1.0])
    assert close(losses, with_none + betas * (with_all - with_none)) and with_all != with_none


def trained(weight_of, steps: int = 400) -> list[dict[str, float]]:
    """z ~ N(0, 1), x | z ~ N(w z, ½²), q = N(a x, v), data of variance 4: ascent on the exact bound."""
    w, a, log_v = (torch.tensor(v, requires_grad=True) for v in (0.05, 0.5, -1.0))
    optimizer, path = torch.optim.SGD([w, a, log_v], lr=0.02), []
    for step in range(steps):
        v = log_v.exp()
        reconstruction = -(4 * (1 - w * a) ** 2 + w**2 * v) / (2 * 0.25)
        kl = 0.5 * (4 * a**2 + v - log_v - 1)
        path.append({"kl": kl.item(), "bound": (reconstruction - kl).item()})
        optimizer.zero_grad()
        (weight_of(step) * kl - reconstruction).backward()
        optimizer.step()
    return path


def test_13_early_on_the_bound_rises_by_driving_the_kl_to_zero():
    """Against a decoder that does not yet listen (w = 0) the KL shrinks; it is its negative that grows."""
    loc, log_scale = leaf(1.0), leaf(-1.0)
    optimizer, kls, bounds = torch.optim.SGD([loc, log_scale], lr=0.1), [], []

    def model():
        pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(0.0, 1.0), obs=torch.tensor(0.5))

    def guide():
        pyro.sample("z", FixedNormal(loc, log_scale.exp()))

    for _ in range(60):
        loss, gradient = averaged_over_noise(model, guide, "pathwise", (loc, log_scale), n=4)
        loc.grad, log_scale.grad = gradient
        kls.append(kl_to_standard(loc, log_scale.exp()).item())
        bounds.append(-loss.item())
        optimizer.step()
    assert kls == sorted(kls, reverse=True) and kls[-1] < 1e-3 < kls[0]
    assert bounds == sorted(bounds)


def test_13_warm_up_keeps_the_latent_in_use_early():
    """At the same early step the warmed-up run holds more KL than the plain one, and both end at one bound."""
    plain, warmed = trained(lambda step: 1.0), trained(lambda step: min(1.0, step / 200))
    assert min(point["kl"] for point in plain[:30]) < plain[0]["kl"]
    assert warmed[20]["kl"] > 1.2 * plain[20]["kl"]
    assert close(plain[-1]["bound"], warmed[-1]["bound"], 0.01)


# 14. Covariance -------------------------------------------------------------------------------------------------------


def test_14_lower_triangular_factor_gives_its_covariance():
    """Over the sigma points ±√D e_i, whose mean is 0 and covariance I, L ε has covariance L Lᵀ exactly."""
    factor, loc = torch.tensor([[1.2, 0.0], [-0.7, 0.5]]), torch.tensor([0.3, -1.0])
    points = math.sqrt(2) * torch.cat([torch.eye(2), -torch.eye(2)])
    z = loc + points @ factor.T
    covariance = (z - loc).T @ (z - loc) / len(z)
    normal = dist.MultivariateNormal(loc, scale_tril=factor)
    assert (
        close(z.mean(0), loc) and close(covariance, factor @ factor.T) and close(covariance, normal.covariance_matrix)
    )
    epsilon = torch.linalg.solve_triangular(factor, (z - loc).T, upper=False).T
    assert close(normal.log_prob(z), log_normal(epsilon).sum(-1) - factor.diagonal().log().sum())
    transposed = points @ factor
    assert not close(transposed.T @ transposed / len(z), factor @ factor.T, 0.1)


def test_14_normal_guide_is_diagonal():
    guide = guide_with(0.4, latent_dim=3)
    z, n = guide(torch.zeros(20000, 2))["z"], 20000
    correlation = torch.corrcoef(z.T) - torch.eye(3)
    assert correlation.abs().max() < 5.2 / math.sqrt(n)


def test_14_triangular_guide_has_its_factor_s_covariance():
    """Whitened by L the draws are uncorrelated with unit variance; by Lᵀ, or by the diagonal alone, they are not."""
    model = GaussianVAE((2,), latent_dim=3, hidden=(4,))
    guide, n = TriangularNormalGuide(model, hidden=(4,)), 20000
    with torch.no_grad():
        guide.encoder_heads["z"].bias.normal_()
    trace = poutine.trace(guide).get_trace(torch.zeros(n, 2))
    trace.compute_log_prob()
    fn, z = trace.nodes["z"]["fn"], trace.nodes["z"]["value"]
    factor, centred = fn.scale_tril[0], z - fn.loc
    epsilon = torch.linalg.solve_triangular(factor, centred.T, upper=False).T

    def is_white(draws):
        return (torch.cov(draws.T) - torch.eye(3)).abs().max() < 5.3 * math.sqrt(2 / n)

    assert is_white(epsilon) and not is_white(centred / factor.diagonal())
    assert not is_white(torch.linalg.solve_triangular(factor.T, centred.T, upper=True).T)
    assert close(trace.nodes["z"]["log_prob"], log_normal(epsilon).sum(-1) - factor.diagonal().log().sum())


def test_14_diagonal_cannot_match_a_correlated_posterior():
    """The best diagonal q has σ_i² = 1/(Σ⁻¹)_ii and a gap that a full factor closes."""
    covariance = torch.tensor([[1.0, 0.9], [0.9, 1.0]])
    posterior = dist.MultivariateNormal(torch.zeros(2), covariance)
    best = covariance.inverse().diagonal() ** -0.5
    gap = kl_divergence(dist.MultivariateNormal(torch.zeros(2), scale_tril=best.diag()), posterior)
    assert close(gap, -0.5 * math.log(1 - 0.9**2))
    full = dist.MultivariateNormal(torch.zeros(2), scale_tril=torch.linalg.cholesky(covariance))
    assert close(kl_divergence(full, posterior), 0.0)


# 15. Fisher matrix and natural gradient -------------------------------------------------------------------------------


def kl_from(old: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    return kl_divergence(dist.Categorical(logits=old), dist.Categorical(logits=logits))


def test_15_fisher_is_the_hessian_of_the_kl_at_the_old_parameters():
    """For a categorical in its logits it is diag(π) − π πᵀ = E[∇log p ∇log pᵀ]; elsewhere the Hessian is another."""
    old = torch.tensor([0.2, -1.0, 0.7])
    pi = old.softmax(0)
    hessian = torch.autograd.functional.hessian(lambda t: kl_from(old, t), old)
    scores = torch.autograd.functional.jacobian(lambda t: t.log_softmax(0), old)
    assert close(hessian, pi.diag() - torch.outer(pi, pi))
    assert close(hessian, (pi.unsqueeze(-1) * scores).T @ scores)
    normal_old = torch.tensor([0.3, -0.2])

    def normal(t):
        return dist.Normal(t[0], t[1].exp())

    def normal_kl(t):
        return kl_divergence(normal(normal_old), normal(t))

    fisher = torch.diag(torch.stack([(-2 * normal_old[1]).exp(), torch.tensor(2.0)]))
    assert close(torch.autograd.functional.hessian(normal_kl, normal_old), fisher)
    assert not close(torch.autograd.functional.hessian(normal_kl, normal_old + 0.5), fisher, 0.1)


def test_15_conjugate_gradients_need_products_only():
    """Solve (G + damping) x = g for a small network through double backward, against the dense matrix."""
    net, x, damping = torch.nn.Linear(4, 3), torch.randn(20, 4), 1e-2
    parameters = torch.nn.utils.parameters_to_vector(net.parameters()).detach()
    old = net(x).detach()

    def kl(flat):
        weight, bias = flat[:12].view(3, 4), flat[12:]
        return kl_from(old, x @ weight.T + bias).mean()

    def product(vector):
        flat = parameters.clone().requires_grad_()
        (slope,) = torch.autograd.grad(kl(flat), flat, create_graph=True)
        return torch.autograd.grad(slope @ vector, flat)[0] + damping * vector

    gradient = torch.randn(15)
    solution, residual = torch.zeros(15), gradient.clone()
    direction = residual.clone()
    for _ in range(30):
        if residual.norm() < 1e-13:
            break
        image = product(direction)
        step = residual @ residual / (direction @ image)
        solution, reduced = solution + step * direction, residual - step * image
        direction, residual = reduced + (reduced @ reduced) / (residual @ residual) * direction, reduced
    dense = torch.autograd.functional.hessian(kl, parameters) + damping * torch.eye(15)
    assert close(solution, torch.linalg.solve(dense, gradient), 1e-6)


def test_15_natural_gradient_does_not_depend_on_the_coordinates():
    """Scale a parameter and the plain step changes, the natural one does not (to first order in the step)."""
    old, goal = torch.tensor([0.2, -1.0, 0.7]), torch.tensor([0.1, 0.6, 0.3])
    scaling = torch.tensor([1.0, 5.0, 0.2])

    def step(scale, natural):
        theta = (old / scale).requires_grad_()
        (gradient,) = torch.autograd.grad(-(goal * (theta * scale).log_softmax(0)).sum(), theta)
        fisher = torch.autograd.functional.hessian(lambda t: kl_from(old, t * scale), theta.detach())
        move = torch.linalg.pinv(fisher) @ gradient if natural else gradient
        return ((theta.detach() - 1e-6 * move) * scale).softmax(0)

    one = torch.ones(3)
    change = (step(one, True) - old.softmax(0)).norm()
    assert (step(scaling, True) - step(one, True)).norm() < 1e-4 * change
    assert (step(scaling, False) - step(one, False)).norm() > change


# 16. Heteroscedastic output -------------------------------------------------------------------------------------------


def test_16_network_recovers_mean_and_spread():
    """y ~ N(2x, softplus(3x − 1.5)²) on [0, 1]: the two heads find both; one σ for all x is worse."""
    x = torch.linspace(0, 1, 400).unsqueeze(-1)
    nodes, weights = normal_nodes(8)
    spread = F.softplus(3 * x - 1.5)
    y = 2 * x + spread * nodes  # (400, 8): the law of y at each x by its nodes, no luck involved
    net = torch.nn.Linear(1, 2)
    optimizer = torch.optim.LBFGS(net.parameters(), max_iter=500, line_search_fn="strong_wolfe")

    def predict():
        loc, raw = net(x).split(1, -1)
        return loc, F.softplus(raw)

    def loss():
        optimizer.zero_grad()
        value = -(weights * dist.Normal(*predict()).log_prob(y)).sum(-1).mean()
        value.backward()
        return value

    optimizer.step(loss)
    loc, scale = (output.detach() for output in predict())
    assert close(loc, 2 * x, 1e-3) and close(scale, spread, 1e-3)
    _, one_scale, one_loss = fit_constant_spread(x, y, weights)
    assert (one_scale - spread).abs().max() > 0.3 and one_loss - loss().detach() > 0.05


def fit_constant_spread(x, y, weights):
    """Least squares with one σ: the maximum-likelihood answer when the spread may not depend on x."""
    design = torch.cat([torch.ones_like(x), x], -1)
    loc = design @ torch.linalg.lstsq(design, (weights * y).sum(-1, keepdim=True)).solution
    scale = (weights * (y - loc) ** 2).sum(-1).mean().sqrt()
    loss = -(weights * dist.Normal(loc, scale).log_prob(y)).sum(-1).mean()
    return loc, scale, loss


def test_16_a_spread_without_softplus_is_no_spread():
    raw = torch.linspace(-30, 30, 101)
    assert F.softplus(raw).min() > 0 and raw.min() < 0
    with pytest.raises(ValueError, match="scale"):
        dist.Normal(0.0, raw)


# 17. Binarized images -------------------------------------------------------------------------------------------------


def test_17_static_and_dynamic_binarization_differ():
    """A threshold gives the same image every time; a draw per epoch has the gray level as its mean."""
    gray = load("digits", dtype=torch.float64).train
    static = load("digits", binarize="static", dtype=torch.float64)
    dynamic = load("digits", binarize="dynamic", dtype=torch.float64)
    epochs = 400
    static_mean, dynamic_mean = (
        torch.stack([data.transform(data.train) for _ in range(epochs)]).mean(0) for data in (static, dynamic)
    )
    assert close(static_mean, (gray >= 0.5).double())
    # Hoeffding: a mean of 400 coins is off by 0.18 with probability 2 exp(−2·400·0.18²) ≈ 1e-11; over 83,008 pixels
    # that is still less than ALARM.
    assert (dynamic_mean - gray).abs().max() < 0.18 < (static_mean - gray).abs().max()
    assert abs((dynamic_mean - gray).mean()) < 1e-3 < abs((static_mean - gray).mean())


def test_17_logits_keep_what_probabilities_lose():
    """In float32 a sure pixel's probability rounds to 1 and its log-probability of the other value to −∞."""
    model = GaussianVAE((1,), latent_dim=1, hidden=(4,)).float()
    with torch.no_grad():
        model.decoder[-1].weight.zero_()
        model.decoder[-1].bias.fill_(40.0)
    z, x = torch.zeros(1, 1, dtype=torch.float32), torch.zeros(1, 1, dtype=torch.float32)
    probability = model.decoder(z).sigmoid()
    assert close(model.likelihood(z).log_prob(x), torch.tensor([-40.0], dtype=torch.float32), 1e-6)
    assert probability == 1 and (1 - probability).log() == -math.inf


def test_17_bernoulli_is_a_law_over_bits_not_over_gray_levels():
    """Over {0, 1} it sums to one; over [0, 1] the same expression integrates to less, so grays have no likelihood."""
    logit, grid = torch.tensor(1.3), torch.linspace(0, 1, 10001)
    bits = torch.tensor([0.0, 1.0])
    assert close(dist.Bernoulli(logits=logit).log_prob(bits).exp().sum(), 1.0)
    grays = dist.Bernoulli(logits=logit, validate_args=False).log_prob(grid).exp()
    assert torch.trapezoid(grays, grid) < 0.6
    with pytest.raises(BadInput, match="zeros and ones"):
        GaussianVAE((2,), latent_dim=1, hidden=(4,))(torch.tensor([[0.5, 1.0]]))


# 18. Structured posteriors --------------------------------------------------------------------------------------------

EDGES = torch.tensor([[0.02, 0.9], [0.8, 0.97]], dtype=torch.float64)  # p(x = 1 | a, b): either cause suffices


def alarm():
    a = pyro.sample("a", dist.Bernoulli(0.2))
    b = pyro.sample("b", dist.Bernoulli(0.3))
    return pyro.sample("x", dist.Bernoulli(EDGES[a.long(), b.long()]))


def log_prob_of(program, **values) -> torch.Tensor:
    data = {name: torch.tensor(value) for name, value in values.items()}
    return poutine.trace(poutine.condition(program, data)).get_trace().log_prob_sum()


def table_of(program, **fixed) -> torch.Tensor:
    pairs = itertools.product((0.0, 1.0), repeat=2)
    return torch.stack([log_prob_of(program, a=a, b=b, **fixed) for a, b in pairs]).exp().view(2, 2)


def test_18_model_factorizes_over_the_graph():
    joint = {x: table_of(alarm, x=x) for x in (0.0, 1.0)}
    assert close(joint[0.0].sum() + joint[1.0].sum(), 1.0)
    assert close(joint[1.0][1, 0], 0.2 * 0.7 * 0.8)


def test_18_a_parent_closes_the_gap_that_mean_field_leaves():
    """Causes of one effect are dependent given it: q(a) q(b | a) is exact, no product q(a) q(b) is."""
    posterior = table_of(alarm, x=1.0)
    posterior = posterior / posterior.sum()
    of_a, of_b_given_a = posterior.sum(1)[1], posterior[:, 1] / posterior.sum(1)

    def structured():
        a = pyro.sample("a", dist.Bernoulli(of_a))
        pyro.sample("b", dist.Bernoulli(of_b_given_a[a.long()]))

    def gap(q):
        return (q * (q / posterior).log()).sum()

    assert close(table_of(structured), posterior) and close(gap(table_of(structured)), 0.0)
    grid = torch.linspace(0.01, 0.99, 99)
    products = [torch.outer(torch.stack([1 - a, a]), torch.stack([1 - b, b])) for a in grid for b in grid]
    assert min(gap(q) for q in products) > 0.05


def test_18_layered_guide_is_a_product_of_conditionals():
    """Over all values of its four bits q sums to one, its layers depend on each other, and the parents' order rules."""
    guide = LayeredGuide(SigmoidBeliefNetwork((3,), layers=(2, 2)), hidden=(4,))
    with torch.no_grad():
        net = guide.encoder_sites["z2"][0]
        net.weight.zero_()
        net.weight[:, :2] = 3 * torch.eye(2)  # the parents' values come first among the inputs
        net.bias.fill_(-1.5)
    bits = torch.cartesian_prod(*[torch.tensor([0.0, 1.0])] * 4)
    x = torch.tensor([[1.0, 0.0, 1.0]]).expand(16, 3)
    trace = poutine.trace(poutine.condition(guide, {"z1": bits[:, :2], "z2": bits[:, 2:]})).get_trace(x)
    trace.compute_log_prob()
    first, second = (trace.nodes[site]["log_prob"].view(4, 4) for site in ("z1", "z2"))
    joint = (first + second).exp()
    assert close(joint.sum(), 1.0) and close(joint.sum(1), first[:, 0].exp())
    assert close(second.exp().sum(1), torch.ones(4))
    product = torch.outer(joint.sum(1), joint.sum(0))
    assert (joint * (joint / product).log()).sum() > 0.05


# 31: the Rényi bound.


def test_31_renyi_bound_falls_with_its_order_and_a_negative_one_bounds_nothing():
    prior, posterior_odds, q = 0.5, 3.0, 0.2  # z ~ Bernoulli(prior), p(x | z) such that the posterior is 3 : 1
    log_p = torch.tensor([math.log((1 - prior) * 0.2), math.log(prior * 0.2 * posterior_odds)])
    log_q = torch.tensor([math.log(1 - q), math.log(q)])
    evidence = log_p.logsumexp(0)

    def bound(alpha, count):
        tuples = torch.cartesian_prod(*[torch.arange(2)] * count)
        return (log_q[tuples].sum(1).exp() * power_mean((log_p - log_q)[tuples], 1, alpha).squeeze(1)).sum()

    values = [bound(alpha, 4) for alpha in (0.0, 0.3, 0.9999, 1.0, 1.5, 3.0)]
    assert all(a > b for a, b in itertools.pairwise(values)) and values[0] < evidence
    elbo = (log_q.exp() * (log_p - log_q)).sum()
    assert close(bound(1.0, 4), elbo) and close(bound(1 - 1e-9, 4), elbo, 1e-8)
    assert bound(-2.0, 4) > evidence + 0.05
    with pytest.raises(BadInput, match="no lower bound"):
        SiteELBO(objective="renyi", alpha=-2.0)


# 32: the log-variance divergence.


def test_32_half_the_variance_of_the_log_ratio_has_the_gradient_of_the_kl():
    log_p = torch.log_softmax(torch.tensor([0.3, -1.0, 0.8]), 0) - 2.0  # three values, an evidence of e⁻²
    logits = leaf(0.1, 0.4, -0.7)
    pairs = torch.cartesian_prod(torch.arange(3), torch.arange(3))

    def mean_slope(over):
        log_q = logits.log_softmax(0)
        weight = log_q.detach()[pairs].sum(1).exp()
        offset = (log_q - log_p)[pairs]
        variance = (offset - offset.mean(1, keepdim=True)).square().sum(1) / over
        return torch.autograd.grad((weight * variance / 2).sum(), logits)[0]

    kl = (logits.softmax(0) * (logits.log_softmax(0) - log_p)).sum()
    (truth,) = torch.autograd.grad(kl, logits)
    assert close(mean_slope(1), truth)
    assert not close(mean_slope(2), truth, 1e-2) and close(2 * mean_slope(2), truth)


# ----------------------------------------------------------------------------------------------------------------------


# 41: elimination.


def _chain(y, steps, means, mask=None, scale=1.0):
    def model():
        z = 0
        with poutine.scale(scale=scale):
            for t in pyro.markov(range(len(y))):
                with poutine.mask(mask=torch.tensor(mask is None or mask[t])):
                    z = pyro.sample(f"z{t}", dist.Categorical(steps[z]), infer={"enumerate": "parallel"})
                    pyro.sample(f"y{t}", dist.Normal(means[z], 1.0), obs=y[t])

    return -SiteELBO()(model, lambda: None)()


def test_41_a_chain_is_summed_out_state_by_state():
    steps, means, y = (
        torch.tensor([[0.7, 0.3], [0.2, 0.8]]),
        torch.tensor([-1.0, 60.0]),
        torch.tensor([0.5, 59.0, 60.5]),
    )
    paths = [
        sum(steps[(0, *z)[t], z[t]].log() + dist.Normal(means[z[t]], 1.0).log_prob(y[t]) for t in range(3))
        for z in itertools.product(range(2), repeat=3)
    ]
    assert close(_chain(y, steps, means), torch.stack(paths).logsumexp(0))
    products = sum(path.float().exp() for path in [one - 200.0 for one in paths])
    assert products == 0.0  # what is multiplied in float32 is gone


def test_41_masks_lie_within_the_sum_and_scales_outside():
    steps, means, y = torch.tensor([[0.7, 0.3], [0.2, 0.8]]), torch.tensor([-1.0, 1.0]), torch.tensor([0.5, 0.1, -0.5])
    two, three = _chain(y[:2], steps, means), _chain(y, steps, means)
    assert close(_chain(y, steps, means, mask=[True, True, False]), two)
    masked_state = two + math.log(2)  # log K for a state whose own term is masked
    assert not close(masked_state, two)
    assert close(_chain(y, steps, means, scale=3.0), 3 * three)


# 33: counts without an end.


def test_33_a_head_and_a_drawn_tail_make_the_whole():
    counts, end = torch.arange(60.0), 2
    rate = leaf(1.3)
    f = (counts - 2.5).square().sqrt() + counts
    log_q = torch.distributions.Poisson(rate).log_prob(counts)
    (truth,) = torch.autograd.grad((log_q.exp() * f).sum(), rate, retain_graph=True)

    def mean(reference, tail=True):
        """The mean over draws z, of which the reference may depend: ``reference[z]`` for each."""
        slopes = torch.stack([torch.autograd.grad(term, rate, retain_graph=True)[0] for term in log_q])
        q = log_q.exp().detach()
        head = ((q * slopes)[:end] * (f[:end] - reference[:, None])).sum(1)
        drawn = torch.where(counts >= end, (f - reference) * slopes, torch.zeros(()))
        return (q * (head + (drawn if tail else 0.0))).sum()

    start = f[0].expand(60)
    assert close(mean(start), truth)
    assert not close(mean(start, tail=False), truth, 1e-2) and not close(mean(f), truth, 1e-2)


def test_docs_name_every_test_and_no_other():
    page = (Path(__file__).resolve().parents[1] / "docs" / "formulas.md").read_text()
    here = set(re.findall(r"^def (test_\d\d_\w+)", Path(__file__).read_text(), flags=re.M))
    assert set(re.findall(r"`(test_\d\d_\w+)`", page)) == here
