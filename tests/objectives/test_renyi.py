"""The Rényi bound: its value and gradients over every tuple of draws, and the two objectives that it lies between."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import pytest
import torch
from numpy.polynomial.hermite_e import hermegauss
from programs import DISCRETE, F64, Params, PlateGuide, PlateModel, X, gradient
from torch import nn

from gumbo.errors import BadInput, UnsupportedSite
from gumbo.inference import SiteELBO, audit
from gumbo.inference.auditing.exact import exact_iwae, mean_over_draws
from gumbo.inference.auditing.reference import exact_bound
from gumbo.inference.auditing.sampler import Stage, set_aside
from gumbo.inference.objectives import as_objective
from gumbo.inference.objectives._weights import Bound, power_mean
from gumbo.inference.objectives.doubly import DoublyReparameterizedBound
from gumbo.inference.objectives.renyi import RenyiBound

ORDERS = [0.0, 0.4, 1.0, 1.7]


def by_definition(alpha):
    """The bound as a function of log weights, written as the formula is."""

    def bound(log_weight, dim):
        if alpha == 1:
            return log_weight.mean(dim, keepdim=True)
        return ((1 - alpha) * log_weight).exp().mean(dim, keepdim=True).log() / (1 - alpha)

    return bound


def listed(model, guide, alpha):
    with pyro.get_param_store().scope():
        return exact_iwae(model, guide, num_particles=2, bound=by_definition(alpha))


def renyi(word, alpha, **options):
    return SiteELBO(word, objective="renyi", alpha=alpha, **{"num_particles": 2} | options)


@pytest.mark.parametrize("vectorize", [True, False])
@pytest.mark.parametrize("alpha", ORDERS)
@pytest.mark.parametrize("word", ["score", "score-average", "nvil", "rloo"])
@pytest.mark.parametrize("name", ["one coin", "chain"])
def test_score_gradients_are_exact_over_every_pair_of_draws(name, word, alpha, vectorize):
    model, guide = DISCRETE[name].make()
    both = nn.ModuleList([model, guide])
    exact = listed(model, guide, alpha)
    loss = renyi(word, alpha, vectorize_particles=vectorize)(model, guide)
    for _ in range(3):
        loss()
    loss.eval()
    assert loss.objective_name == "renyi"
    assert torch.allclose(mean_over_draws(lambda: gradient(loss(), both)), gradient(-exact, both), rtol=0, atol=1e-10)
    assert torch.allclose(mean_over_draws(loss), -exact, rtol=0, atol=1e-10)


class _IwaeSignal(RenyiBound):
    """Wrong on purpose: the leave-one-out terms come from the bound of order 0."""

    def value(self, recorded):
        own = Bound.leave_one_out
        try:
            Bound.leave_one_out = lambda self: self.value().expand_as(self.log_weight)  # includes the draw itself
            return super().value(recorded)
        finally:
            Bound.leave_one_out = own


def test_a_baseline_that_includes_its_own_draw_is_caught():
    model, guide = DISCRETE["chain"].make()
    both = nn.ModuleList([model, guide])
    loss = SiteELBO("rloo", objective=_IwaeSignal(0.4), num_particles=2)(model, guide)
    found = mean_over_draws(lambda: gradient(loss(), both))
    assert (found - gradient(-listed(model, guide, 0.4), both)).abs().max() > 1e-3


@pytest.mark.parametrize(("name", "alpha"), [("plate", 0.4), ("plate", 1.7), ("masked event", 0.4)])
def test_rows_have_bounds_of_their_own_under_masks_and_scales(name, alpha):
    model, guide = DISCRETE[name].make()
    both = nn.ModuleList([model, guide])
    with set_aside(model, guide, 0):
        stage = Stage(model, guide, (), {})
        with stage.held():
            exact = exact_bound(stage, 2, RenyiBound(alpha))
            want = gradient(exact, both)
    loss = renyi("rloo", alpha)(model, guide)
    assert torch.allclose(mean_over_draws(lambda: gradient(loss(), both)), want, rtol=0, atol=1e-10)
    together = renyi("rloo", alpha, plates="ignore")(model, guide)  # one weight for both rows is another bound
    assert (mean_over_draws(lambda: gradient(together(), both)) - want).abs().max() > 1e-3


class NormalModel(Params):
    def __init__(self):
        super().__init__(w=0.8)

    def forward(self):
        with pyro.plate("data", 2):
            z1 = pyro.sample("z1", dist.Normal(torch.zeros((), dtype=F64), 1.0))
            z2 = pyro.sample("z2", dist.Normal(self.w * z1, 1.0))
            pyro.sample("x", dist.Normal(z1 + z2, 1.0), obs=X)


class NormalGuide(Params):
    def __init__(self):
        super().__init__(a=[0.2, -0.6], s=-0.3, b=0.6, t=-0.1)

    def forward(self):
        with pyro.plate("data", 2):
            z1 = pyro.sample("z1", dist.Normal(self.a, self.s.exp()))
            pyro.sample("z2", dist.Normal(self.b * z1, self.t.exp()))


def alike(first, second, pair):
    """Value and gradient of two losses at one seed."""
    model, guide = pair
    found = []
    for elbo in (first, second):
        loss = elbo(model, guide)
        loss.initialize()
        torch.manual_seed(3)
        value = loss()
        found.append((value.detach(), gradient(value, nn.ModuleList([model, guide]))))
    (value, slope), (other, its) = found
    assert slope.abs().max() > 1e-3
    return torch.allclose(value, other, rtol=0, atol=1e-10) and torch.allclose(slope, its, rtol=0, atol=1e-10)


@pytest.mark.parametrize("vectorize", [True, False])
@pytest.mark.parametrize("word", ["pathwise", "dreg", "rloo", "score-average"])
def test_order_zero_is_iwae_draw_by_draw(word, vectorize):
    pair = (NormalModel(), NormalGuide()) if word in ("pathwise", "dreg") else DISCRETE["dice"].make()
    options = {"num_particles": 3, "vectorize_particles": vectorize}
    assert alike(renyi(word, 0.0, **options), SiteELBO(word, objective="iwae", **options), pair)
    assert not alike(renyi(word, 0.3, **options), SiteELBO(word, objective="iwae", **options), pair)


@pytest.mark.parametrize("word", ["pathwise", "stl", "rloo", "enumerate", "gumbel-softmax"])
def test_order_one_is_the_elbo_draw_by_draw(word):
    pair = (NormalModel(), NormalGuide()) if word in ("pathwise", "stl") else DISCRETE["plate"].make()
    assert alike(renyi(word, 1.0, num_particles=3), SiteELBO(word, num_particles=3), pair)


@pytest.mark.parametrize("alpha", [1 - 1e-12, 1 + 1e-12])
def test_near_order_one_nothing_is_lost_to_rounding(alpha):
    pair = NormalModel(), NormalGuide()
    assert alike(renyi("pathwise", alpha, num_particles=3), SiteELBO("pathwise", num_particles=3), pair)
    model, guide = DISCRETE["chain"].make()
    both = nn.ModuleList([model, guide])
    loss = renyi("rloo", alpha)(model, guide)
    found = mean_over_draws(lambda: gradient(loss(), both))
    assert torch.allclose(found, gradient(-listed(model, guide, 1), both), rtol=0, atol=1e-10)


@pytest.mark.parametrize("alpha", [0.0, 0.3, 0.9, 1.0, 2.5])
def test_far_weights_neither_overflow_nor_lose_their_slopes(alpha):
    log_weight = torch.tensor([[-900.0, -3.0, 2.0], [0.1, 0.2, 0.15]], dtype=F64, requires_grad=True)
    value = power_mean(log_weight, -1, alpha)
    (slope,) = torch.autograd.grad(value.sum(), log_weight)
    assert value.isfinite().all()
    assert torch.allclose(slope, ((1 - alpha) * log_weight).softmax(-1), rtol=0, atol=1e-12)
    single = power_mean(log_weight.float(), -1, alpha)
    assert torch.allclose(single.double(), value, rtol=1e-5, atol=1e-5)


def test_a_draw_that_cannot_be_has_weight_zero():
    log_weight = torch.tensor([-torch.inf, 0.7], dtype=F64)
    halved = power_mean(log_weight, 0, 0.5)
    assert halved.item() == pytest.approx(2 * (torch.tensor(0.35).exp() / 2).log().item(), abs=1e-6)
    assert power_mean(log_weight, 0, 2.0).item() == -torch.inf


# Paths, by quadrature.


class _Noise(dist.Normal):
    """A Normal whose noise is given, so that its draws run through the nodes of a rule."""

    noise = torch.zeros(())

    def rsample(self, sample_shape=()):
        shape = self._extended_shape(torch.Size(sample_shape))
        noise = _Noise.noise if len(shape) == 2 else _Noise.noise[0]  # a look at the program takes one particle
        return (self.loc + self.scale * noise).expand(shape)

    def expand(self, batch_shape, _instance=None):
        return _Noise(self.loc.expand(batch_shape), self.scale.expand(batch_shape), validate_args=False)


class RuleModel(Params):
    """Each node of the rule has a parameter of its own, so that its share of the gradient can be weighed."""

    def __init__(self, nodes):
        super().__init__(w=[0.8] * nodes)

    def forward(self):
        with pyro.plate("nodes", len(self.w)):
            z = pyro.sample("z", dist.Normal(torch.zeros((), dtype=F64), 1.0))
            pyro.sample("x", dist.Normal(self.w * z, 0.7), obs=X[0].expand(len(self.w)))


class RuleGuide(Params):
    def __init__(self, nodes):
        super().__init__(a=[0.4] * nodes, s=[-0.3] * nodes)

    def forward(self):
        with pyro.plate("nodes", len(self.a)):
            pyro.sample("z", _Noise(self.a, self.s.exp()))


@pytest.fixture
def rule(monkeypatch):
    """Functions of a loss, and of an order: the mean gradient over two draws, by w, a and s."""
    points, weights = (torch.tensor(part) for part in hermegauss(40))
    weights = weights / weights.sum()
    pairs = torch.cartesian_prod(points, points).T
    both = torch.cartesian_prod(weights, weights).prod(1)
    monkeypatch.setattr(_Noise, "noise", pairs)

    def found(loss):
        model, guide = RuleModel(len(both)), RuleGuide(len(both))
        slopes = gradient(loss(model, guide)(), nn.ModuleList([model, guide]))
        return slopes.reshape(3, -1) @ both

    def exact(alpha):
        w, a, s = leaves = torch.tensor([0.8, 0.4, -0.3], dtype=F64, requires_grad=True).unbind()
        z = a + s.exp() * pairs
        log_weight = (
            dist.Normal(torch.zeros((), dtype=F64), 1.0).log_prob(z)
            + dist.Normal(w * z, 0.7).log_prob(X[0])
            - dist.Normal(a, s.exp()).log_prob(z)
        )
        bound = (both * by_definition(alpha)(log_weight, 0)).sum()
        return torch.stack(torch.autograd.grad(-bound, leaves))

    return found, exact


@pytest.mark.parametrize("alpha", [0.0, 0.4, 1.7])
@pytest.mark.parametrize("word", ["pathwise", "dreg"])
def test_paths_have_the_gradient_of_the_bound_by_quadrature(rule, word, alpha):
    found, exact = rule
    loss = renyi(word, alpha, plates="trust", vectorize_particles=True)
    assert torch.allclose(found(loss), exact(alpha), rtol=0, atol=1e-6)


def test_the_factor_of_order_zero_is_wrong_at_another(rule, monkeypatch):
    found, exact = rule
    monkeypatch.setattr(RenyiBound, "refined", lambda self, chosen: DoublyReparameterizedBound(0.0))
    loss = renyi("dreg", 0.4, plates="trust", vectorize_particles=True)
    assert (found(loss) - exact(0.4)).abs().max() > 1e-3


# What is refused, and what is said.


def test_a_negative_order_is_no_lower_bound_and_refused():
    with pytest.raises(BadInput, match="alpha is -0.5: a negative order gives no lower bound"):
        SiteELBO("rloo", objective="renyi", alpha=-0.5)
    with pytest.raises(BadInput, match="alpha"):
        SiteELBO("rloo", objective="renyi", alpha=float("nan"))


def test_an_option_that_the_objective_has_not_is_named():
    with pytest.raises(BadInput, match=r"'elbo' has no option 'alpha' \(it has none\), and SiteELBO has none"):
        SiteELBO("rloo", alpha=0.5)
    with pytest.raises(BadInput, match=r"'renyi' has no option 'num_particle' \(its options: alpha\)"):
        SiteELBO("rloo", objective="renyi", num_particle=2)
    with pytest.raises(BadInput, match="is made already: give 'alpha' to RenyiBound"):
        SiteELBO("rloo", objective=RenyiBound(0.5), alpha=0.2)
    with pytest.raises(BadInput, match="kl_weight is not defined for objective 'renyi'"):
        SiteELBO("rloo", objective="renyi", kl_weight=0.5)


def test_the_order_is_part_of_what_a_loss_says():
    loss = renyi("rloo", 0.25)
    assert repr(loss) == "SiteELBO('rloo', objective='renyi', alpha=0.25, num_particles=2)"
    assert as_objective("renyi", {"alpha": 0.25}).said == "renyi(alpha=0.25)"


def test_a_latent_outside_a_subsampled_plate_has_no_bound_of_its_own():
    def model(x):
        mean = pyro.sample("mean", dist.Bernoulli(torch.tensor(0.5)))
        with pyro.plate("data", 6, subsample_size=2) as rows:
            pyro.sample("x", dist.Normal(mean, 1.0), obs=x[rows])

    def guide(x):
        pyro.sample("mean", dist.Bernoulli(torch.tensor(0.4)))
        pyro.plate("data", 6, subsample_size=2)

    with pytest.raises(UnsupportedSite, match="'mean'.*subsampled plate 'data'"):
        renyi("rloo", 0.5).loss(model, guide, torch.zeros(6))
    assert renyi("rloo", 1.0).loss(model, guide, torch.zeros(6)) > 0  # the ELBO has


def test_the_audit_judges_estimators_of_the_bound():
    model, guide = PlateModel(), PlateGuide()
    options = {"num_samples": 400, "num_particles": 2, "burn_in": 0}
    report = audit(model, guide, estimators=["rloo", "disarm"], objective=RenyiBound(0.5), **options)
    assert report.verdict.sel(estimator="rloo").item() == "ok"
    assert "not derived for objective 'renyi'" in report.verdict.sel(estimator="disarm").item()
    assert report.attrs["objective"] == "renyi(alpha=0.5)"
    assert report.attrs["reference"] == "exact (every tuple of values)"
    with pytest.raises(BadInput, match="objective 'renyi' depends on K"):
        audit(model, guide, estimators=["rloo"], objective="renyi")
