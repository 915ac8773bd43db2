"""The log-variance divergence: its value, its gradient beside rloo's, draws from elsewhere, and what fit reports."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import pytest
import torch
from exact_means import exact_gradient
from programs import DISCRETE, F64, ChainGuide, Params, PlateGuide, PlateModel, X, gradient
from torch import nn

from gumbo.errors import BadInput, UnsupportedSite
from gumbo.inference import SiteELBO, audit, fit
from gumbo.inference.auditing.exact import exact_iwae, mean_over_draws
from gumbo.inference.objectives.log_variance import LogVariance


def half_variance(log_weight, dim):
    """½ the sample variance by its formula, as a thing to be maximized."""
    count = log_weight.shape[dim]
    offset = log_weight - log_weight.sum(dim, keepdim=True) / count
    return -0.5 * offset.square().sum(dim, keepdim=True) / (count - 1)


class Frozen(nn.Module):
    """A program without a gradient."""

    def __init__(self, program):
        super().__init__()
        self.program = program

    def forward(self):
        with torch.no_grad():
            self.program()


def frozen(name):
    """A pair of which the guide learns, and the exact gradient of the ELBO by the guide's parameters."""
    learnable, guide = DISCRETE[name].make()
    model = Frozen(learnable)
    return model, guide, exact_gradient(learnable, guide)[sum(p.numel() for p in learnable.parameters()) :]


@pytest.mark.parametrize("vectorize", [True, False])
@pytest.mark.parametrize("name", ["one coin", "chain", "dice", "masked draw", "global then plate"])
def test_value_and_gradient_are_exact_over_every_pair_of_draws(name, vectorize):
    model, guide, exact = frozen(name)
    options = {"num_particles": 2, "vectorize_particles": vectorize, "plates": "ignore"}
    loss = SiteELBO(objective="log-variance", **options)(model, guide)
    assert loss.initialize().objective_name == "log-variance"
    with pyro.get_param_store().scope():
        value = -exact_iwae(model, guide, num_particles=2, bound=half_variance)
    assert torch.allclose(mean_over_draws(loss), value, rtol=0, atol=1e-10)
    assert torch.allclose(mean_over_draws(lambda: gradient(loss(), guide)), exact, rtol=0, atol=1e-10)


@pytest.mark.parametrize("vectorize", [True, False])
@pytest.mark.parametrize("num_particles", [2, 5])
@pytest.mark.parametrize("name", ["one coin", "plate", "masked event", "masked draw"])
def test_from_the_guides_own_draws_the_gradient_is_that_of_rloo(name, num_particles, vectorize):
    model, guide, _ = frozen(name)
    options = {"num_particles": num_particles, "vectorize_particles": vectorize}
    slopes = []
    for elbo in (SiteELBO(objective="log-variance", **options), SiteELBO("rloo", **options)):
        loss = elbo(model, guide)
        loss.initialize()
        torch.manual_seed(7)
        slopes.append(torch.stack([gradient(loss(), guide) for _ in range(20)]))
    assert slopes[0].abs().max() > 1e-3
    assert torch.allclose(*slopes, rtol=0, atol=1e-10)


class _OverK(LogVariance):
    """Wrong on purpose: the variance over K and not over K − 1."""

    def value(self, recorded):
        count = recorded.layout.num_particles
        return super().value(recorded) * (count - 1) / count


def test_a_variance_over_all_draws_is_caught():
    model, guide, exact = frozen("chain")
    loss = SiteELBO(objective=_OverK(), num_particles=2)(model, guide)
    assert (mean_over_draws(lambda: gradient(loss(), guide)) - exact).abs().max() > 1e-3


# The model.


def test_a_model_that_learns_is_refused_or_gets_the_bounds_gradient_by_name():
    model, guide = DISCRETE["chain"].make()
    both = nn.ModuleList([model, guide])
    with pytest.raises(BadInput, match=r"'log-variance' trains the guide only.*\('u'\): freeze.*'log-variance\+elbo'"):
        SiteELBO(objective="log-variance", num_particles=2)(model, guide)()
    loss = SiteELBO(objective="log-variance+elbo", num_particles=2)(model, guide)
    assert loss.initialize().objective_name == "log-variance+elbo"
    found = mean_over_draws(lambda: gradient(loss(), both))
    assert torch.allclose(found, exact_gradient(model, guide), rtol=0, atol=1e-10)


def test_what_cannot_be_meant_is_one_line():
    with pytest.raises(BadInput, match="'log-variance' needs num_particles ≥ 2, got 1"):
        SiteELBO(objective="log-variance", num_particles=1)
    with pytest.raises(BadInput, match="takes no estimator, got 'rloo'"):
        SiteELBO("rloo", objective="log-variance")
    with pytest.raises(BadInput, match=r"'log-variance\+elbo' has no option 'proposal'"):
        SiteELBO(objective="log-variance+elbo", proposal=lambda: None)
    with pytest.raises(BadInput, match="LogVariance: proposal is 3"):
        SiteELBO(objective="log-variance", proposal=3)
    model, guide, _ = frozen("one coin")
    loss = SiteELBO(objective="log-variance")(model, guide)  # its own minimum
    loss.initialize()
    assert loss.binding.num_particles == 2


# Draws from elsewhere.


def flat():
    pyro.sample("z1", dist.Bernoulli(torch.tensor(0.7, dtype=F64)))
    pyro.sample("z2", dist.Bernoulli(torch.tensor(0.2, dtype=F64)))


@pytest.mark.parametrize("vectorize", [True, False])
def test_draws_of_a_proposal_are_averaged_under_it(vectorize):
    """Over every pair of draws of the proposal: Σ r(z₁) r(z₂) ½ var(log q − log p), and its slope with r held still."""
    model, guide, of_elbo = frozen("chain")
    values = torch.cartesian_prod(*[torch.tensor([0.0, 1.0], dtype=F64)] * 2)
    r = torch.stack([(0.7 if a else 0.3) * (0.2 if b else 0.8) * torch.ones((), dtype=F64) for a, b in values])

    def log_weight(z):
        conditioned = pyro.condition(guide, {"z1": z[0], "z2": z[1]})
        of_q = pyro.poutine.trace(conditioned).get_trace().log_prob_sum()
        of_p = pyro.poutine.trace(pyro.condition(model, {"z1": z[0], "z2": z[1]})).get_trace().log_prob_sum()
        return of_p - of_q

    with pyro.get_param_store().scope():
        listed = torch.stack([log_weight(z) for z in values])
    pairs = torch.cartesian_prod(torch.arange(4), torch.arange(4))
    exact = -(r[pairs].prod(1) * half_variance(listed[pairs], 1).squeeze(1)).sum()
    loss = SiteELBO(objective="log-variance", proposal=flat, num_particles=2, vectorize_particles=vectorize)(
        model, guide
    )
    loss.initialize()
    assert torch.allclose(mean_over_draws(loss), exact, rtol=0, atol=1e-10)
    found = mean_over_draws(lambda: gradient(loss(), guide))
    assert torch.allclose(found, gradient(exact, guide), rtol=0, atol=1e-10)
    assert (found - of_elbo).abs().max() > 1e-3  # another divergence than the ELBO's


class _Posterior(Params):
    def __init__(self):
        super().__init__(a=0.0)

    def forward(self):
        pyro.sample("z", dist.Bernoulli(logits=self.a))


def test_at_the_posterior_every_draw_of_any_proposal_gives_zero():
    model, _, _ = frozen("one coin")
    guide = _Posterior()
    likelihood = dist.Normal(0.7 * torch.tensor([0.0, 1.0], dtype=F64), 1.0).log_prob(X[0])
    guide.a.data.fill_((-0.3 + likelihood[1] - likelihood[0]).item())

    def proposal():
        pyro.sample("z", dist.Bernoulli(torch.tensor(0.9, dtype=F64)))

    loss = SiteELBO(objective="log-variance", proposal=proposal, num_particles=4)(model, guide)
    for _ in range(5):
        value = loss()
        assert value.abs().item() < 1e-20 and gradient(value, guide).abs().max() < 1e-10


def test_the_prior_may_be_the_proposal():
    model, guide, _ = frozen("plate")
    loss = SiteELBO(objective="log-variance", proposal=model, num_particles=3)(model, guide)
    assert loss().item() > 0


def test_a_proposal_draws_what_the_guide_draws():
    model, guide, _ = frozen("chain")

    def half():
        pyro.sample("z1", dist.Bernoulli(torch.tensor(0.7)))

    def more():
        flat()
        pyro.sample("z3", dist.Bernoulli(torch.tensor(0.7)))

    def wide():
        pyro.sample("z1", dist.Bernoulli(torch.tensor(0.7)))
        pyro.sample("z2", dist.Bernoulli(torch.full((3,), 0.7)).to_event(1))

    for proposal, said in (
        (half, "'z2'.*the guide draws it and the proposal does not"),
        (more, "'z3'.*the proposal draws it and the guide does not"),
        (wide, "'z2'.*cannot score its value"),
    ):
        with pytest.raises((UnsupportedSite, BadInput), match=said):
            SiteELBO(objective="log-variance", proposal=proposal, num_particles=2)(model, guide)()


# What is said of a run.


class Rows(Params):
    def forward(self, x):
        with pyro.plate("data", 40, subsample_size=len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros((), dtype=F64), 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)


class RowsGuide(Params):
    def __init__(self):
        super().__init__(slope=0.5, log_scale=-0.5 * 0.6931471805599453)  # the posterior of each row

    def forward(self, x):
        with pyro.plate("data", 40, subsample_size=len(x)):
            pyro.sample("z", dist.Normal(self.slope * x, self.log_scale.exp()))


def test_fit_reports_the_elbo_beside_the_divergence():
    x = torch.linspace(-2, 2, 40, dtype=F64)
    evidence = dist.Normal(0.0, 2**0.5).log_prob(x).mean().item()
    result = fit(Rows(), RowsGuide(), x, loss=SiteELBO(objective="log-variance"), epochs=1, batch_size=10, lr=1e-9)
    numbers = result.history[-1]
    assert result.objective_name == "log-variance"
    assert numbers["elbo"] == pytest.approx(evidence, abs=1e-6)  # at the posterior each draw says so
    assert numbers["log-variance"] == pytest.approx(0.0, abs=1e-6)
    assert "elbo=" in repr(result)
    guide = RowsGuide()
    guide.slope.data.fill_(-0.5)
    result = fit(Rows(), guide, x, loss=SiteELBO(objective="log-variance", num_particles=8), epochs=25, lr=0.05)
    assert result.history[-1]["elbo"] == pytest.approx(evidence, abs=0.1)
    assert result.history[-1]["elbo"] > result.history[0]["elbo"] + 0.5
    assert result.history[-1]["log-variance"] > result.history[0]["log-variance"] + 0.5


def test_a_frozen_model_stays_frozen():
    """Pyro's param store asks for the gradient of whatever a PyroModule registers."""
    model, guide = PlateModel().requires_grad_(False), PlateGuide()
    fit(model, guide, (), loss=SiteELBO(objective="log-variance", num_particles=2), epochs=2, lr=0.1)
    assert not next(nn.Module.parameters(model)).requires_grad and next(nn.Module.parameters(model)).item() == 0.7
    assert next(nn.Module.parameters(guide))[0].item() != 0.4


def test_the_audit_holds_it_against_the_elbos_gradient():
    model, guide = PlateModel(), PlateGuide()
    losses = {"log-variance": SiteELBO(objective="log-variance+elbo", num_particles=2), "rloo": "rloo"}
    report = audit(model, guide, estimators=losses, num_samples=150, num_particles=2, burn_in=0)
    assert report.verdict.values.tolist() == ["ok", "ok"]
    assert report.total_variance.values[0] == pytest.approx(report.total_variance.values[1], rel=1e-6)
    other = {"flat": SiteELBO(objective=LogVariance(ChainGuide()), num_particles=2)}
    assert "this audit another objective" in audit(model, guide, estimators=other, num_samples=10).verdict.item()
