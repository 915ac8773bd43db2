"""ARM and DisARM against exact gradients, by exact integration over the uniforms behind every coin."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import pytest
import torch
from exact_means import exact_gradient, is_unbiased, mean_gradient
from programs import (
    COINS,
    DISCRETE,
    F64,
    ChainGuide,
    ChainModel,
    DiceGuide,
    DiceModel,
    Params,
    PlateGuide,
    PlateModel,
    gradient,
)
from uniforms import representative_uniforms
from ztest import misses

from gumbo.errors import BadInput, UnsupportedSite
from gumbo.inference import SiteELBO
from gumbo.inference.auditing.exact import mean_over_draws
from gumbo.inference.estimators import ARM, DisARM, Draw, coupled


def cells():
    for name in COINS:
        for word in ("arm", "disarm"):
            # One by one, ARM differs from DisARM in nothing but the weights.
            for vectorize in (False,) if DISCRETE[name].branches else (True, False)[: 1 + (word == "disarm")]:
                yield pytest.param(name, word, vectorize, id=f"{name}-{word}-{'vec' if vectorize else 'seq'}")


@pytest.mark.parametrize("name, word, vectorize", list(cells()))
def test_the_mean_over_all_uniforms_is_the_exact_gradient(listed_uniforms, name, word, vectorize):
    model, guide = DISCRETE[name].make()
    assert is_unbiased(word, model, guide, vectorize_particles=vectorize)


class ProbsGuide(Params):
    def __init__(self):
        super().__init__(p=0.3)

    def forward(self):
        pyro.sample("z", dist.Bernoulli(probs=self.p))


@pytest.mark.parametrize("word", ["arm", "disarm"])
def test_a_guide_may_speak_in_probabilities(listed_uniforms, word):
    assert is_unbiased(word, DISCRETE["one coin"].model(), ProbsGuide())


# Wrong on purpose: each must fail the very test that the right ones pass.


class MissingHalf(DisARM):
    def weigh(self, gap, value, partner, uniform, logits):
        return super().weigh(0.5 * gap, value, partner, uniform, logits)


class FlippedSign(DisARM):
    def weigh(self, gap, value, partner, uniform, logits):
        return super().weigh(gap, partner, value, uniform, logits)


class OtherUniform(ARM):
    """Takes the coin for 1[u > σ(−α)] where it is 1[u < σ(α)]."""

    def weigh(self, gap, value, partner, uniform, logits):
        return super().weigh(gap, value, partner, 1 - uniform, logits)


class CoupledRun(DisARM):
    """One run with the partners of all layers at once, shared by both, where each layer should have its own."""

    def __init__(self, first=None):
        self.first = first
        self.coupled = False

    def draw(self, fn, step, args=(), kwargs=None):
        if self.coupled:
            partner = (1 - self.uniform < fn.logits.detach().sigmoid()).to(fn.logits.dtype)
            self.partner = partner
            return Draw(partner, {"uniform": self.uniform})
        made = super().draw(fn, step, args, kwargs)
        self.uniform = made.extra["uniform"]
        return made

    def surrogate(self, view):
        if self.first is not None:  # the second layer, visited first, leaves its part to the first layer
            self.view = view
            return None
        second = self.second
        partner = (1 - view.draw.extra["uniform"] < view.parameter("logits").sigmoid()).to(view.value.dtype)
        second.coupled = True
        other = view.evaluate(Draw(partner.unsqueeze(0)))[0]
        second.coupled = False
        mine = self.weigh(view.cost - other, view.value, partner, None, view.parameter("logits").detach())
        later, logits = second.view, second.view.parameter("logits")
        theirs = self.weigh(later.cost - other, later.value, second.partner.expand_as(later.value), None, logits)
        return mine * view.parameter("logits") + theirs.detach() * logits


@pytest.mark.parametrize("estimator", [MissingHalf(), FlippedSign(), OtherUniform()], ids=repr)
@pytest.mark.parametrize("name", ["chain", "plate then global"])
def test_wrong_weights_fail_the_same_test(listed_uniforms, name, estimator):
    model, guide = DISCRETE[name].make()
    assert not is_unbiased(estimator, model, guide)


def test_one_coupled_run_over_two_layers_fails_the_same_test(monkeypatch):
    """The first layer's part stays right, since its partner's downstream has its own law; the second's does not."""
    model, guide = ChainModel(), ChainGuide()
    second = torch.stack([guide.b, guide.b + guide.c]).detach().sigmoid()
    cuts = torch.cat([second, 1 - second]).tolist()  # where the second coin turns, whatever the first one shows
    monkeypatch.setattr(coupled, "coin_uniforms", lambda probs: representative_uniforms(probs, cuts))
    assert is_unbiased("disarm", model, guide)
    first = CoupledRun()
    first.second = CoupledRun(first=first)
    mean = mean_gradient({"z1": first, "z2": first.second}, model, guide, vectorize_particles=False)
    error = dict(zip("uwabc", (mean - exact_gradient(model, guide)).tolist(), strict=True))
    assert all(abs(error[name]) < 1e-10 for name in "uwa")
    assert all(abs(error[name]) > 1e-3 for name in "bc")


# The uniforms that they really draw.


@pytest.mark.parametrize("word", ["arm", "disarm"])
@pytest.mark.parametrize("name", ["chain", "plate then global"])
def test_with_their_own_uniforms_the_mean_is_right_too(name, word):
    """z-tests of 100 draws at 1,000 independent pairs; a bias of 0.05 would be seen with power 0.99."""
    model, guide = DISCRETE[name].make()
    loss = SiteELBO(word, num_particles=1000)(model, guide).initialize()
    both = torch.nn.ModuleList([model, guide])
    draws = torch.stack([gradient(loss(), both) for _ in range(100)])
    assert not misses(draws, exact_gradient(model, guide), resolves=0.05)


class CoinThenNormalGuide(Params):
    def __init__(self):
        super().__init__(a=0.4, m=-0.2, s=1.1)

    def forward(self):
        z = pyro.sample("z", dist.Bernoulli(logits=self.a))
        pyro.sample("w", dist.Normal(self.m + self.s * z, 0.8))


class CoinThenNormalModel(Params):
    def __init__(self):
        super().__init__(v=0.7)

    def forward(self):
        z = pyro.sample("z", dist.Bernoulli(logits=torch.tensor(-0.3, dtype=F64)))
        w = pyro.sample("w", dist.Normal(torch.zeros((), dtype=F64), 1.0))
        pyro.sample("x", dist.Normal(w + self.v * z, 1.0), obs=torch.tensor(0.9, dtype=F64))


def coin_then_normal_loss(model, guide):
    """−ELBO up to a constant: Gaussian integrals for each side of the coin."""
    total = 0.0
    for z in (torch.zeros((), dtype=F64), torch.ones((), dtype=F64)):
        mean = guide.m + guide.s * z
        f = -(mean.square() + (0.9 - mean - model.v * z).square()) / 2
        f = f + dist.Bernoulli(logits=torch.tensor(-0.3, dtype=F64)).log_prob(z)
        log_q = dist.Bernoulli(logits=guide.a).log_prob(z)
        total = total + log_q.exp() * (f - log_q)
    return -total


@pytest.mark.parametrize("word", ["arm", "disarm"])
def test_a_pathwise_site_may_follow(word):
    """z-test of 100 draws at 1,000 independent pairs; a bias of 0.05 would be seen with power 0.99."""
    model, guide = CoinThenNormalModel(), CoinThenNormalGuide()
    both = torch.nn.ModuleList([model, guide])
    loss = SiteELBO({"z": word, "w": "pathwise"}, num_particles=1000)(model, guide).initialize()
    draws = torch.stack([gradient(loss(), both) for _ in range(100)])
    assert not misses(draws, gradient(coin_then_normal_loss(model, guide), both), resolves=0.05)


# Variance.


class ToyGuide(Params):
    def __init__(self):
        super().__init__(a=0.0)

    def forward(self):
        pyro.sample("z", dist.Bernoulli(logits=self.a).mask(False))


def toy(target):
    def model():
        z = pyro.sample("z", dist.Bernoulli(torch.tensor(0.5, dtype=F64)).mask(False))
        pyro.factor("f", -(z - target).square())

    return model


def exact_moments(word, model, guide, num_particles):
    loss = SiteELBO(word, num_particles=num_particles)(model, guide).initialize()
    draw = lambda: gradient(loss(), guide)  # noqa: E731
    mean = mean_over_draws(draw)
    return mean.item(), (mean_over_draws(lambda: draw().square()) - mean.square()).item()


@pytest.mark.parametrize("target", [0.45, 0.499])
def test_on_the_toy_disarm_varies_less_than_leave_one_out(listed_uniforms, target):
    """E[(b − t)²] at p = ½: leave-one-out has variance Δ²/16, Δ = f(1) − f(0); a pair always disagrees and has none."""
    model, guide = toy(target), ToyGuide()
    gap = (1 - target) ** 2 - target**2
    mean, variance = exact_moments("rloo", model, guide, 2)
    assert mean == pytest.approx(gap / 4, abs=1e-12) and variance == pytest.approx(gap**2 / 16, abs=1e-12)
    for particles in (1, 2):
        mean, variance = exact_moments("disarm", model, guide, particles)
        assert mean == pytest.approx(gap / 4, abs=1e-12) and variance == pytest.approx(0.0, abs=1e-12)


@pytest.mark.parametrize("logit", [-2.0, -0.5, 0.0, 1.5])
def test_at_two_runs_disarm_varies_no_more_than_leave_one_out(listed_uniforms, logit):
    guide = ToyGuide()
    guide.a.data.fill_(logit)
    ours, theirs = exact_moments("disarm", toy(0.45), guide, 1), exact_moments("rloo", toy(0.45), guide, 2)
    assert ours[0] == pytest.approx(theirs[0], abs=1e-12)
    assert ours[1] <= theirs[1] + 1e-12


def test_arm_varies_as_its_closed_form_says_and_more_than_disarm():
    """Δ² E[(½ − u)²] − (Δ/4)² = Δ²/48 at p = ½; 400 draws of 100 pairs know it to 7 %, and 30 % are allowed."""
    guide, gap = ToyGuide(), 0.1
    loss = SiteELBO("arm", num_particles=100)(toy(0.45), guide).initialize()
    draws = torch.stack([gradient(loss(), guide) for _ in range(400)])
    assert (draws.var() * 100).item() == pytest.approx(gap**2 / 48, rel=0.3)


# Contract.


def test_other_families_are_refused_by_name():
    with pytest.raises(UnsupportedSite, match=r"'y'.*arm.*Bernoulli.*OneHotCategorical.*would do: rloo, enumerate"):
        SiteELBO("arm")(DiceModel(), DiceGuide()).initialize()
    with pytest.raises(UnsupportedSite, match=r"'c'.*disarm.*Bernoulli or OneHotCategorical.*Categorical.*score"):
        SiteELBO("disarm")(DiceModel(), DiceGuide()).initialize()


def test_the_importance_weighted_bound_is_refused():
    with pytest.raises((UnsupportedSite, BadInput), match="iwae"):
        SiteELBO("arm", objective="iwae")(PlateModel(), PlateGuide()).initialize()


def test_costs_and_declarations():
    assert ARM().evaluations(3, 2) == DisARM().evaluations(3, 2) == 9
    assert DisARM().unbiased and DisARM().min_particles == 1 and not DisARM().needs_relaxed_model


def test_values_carry_no_gradient_and_keep_their_type():
    for dtype in (torch.float32, torch.float64):
        logits = torch.randn(3, 2, dtype=dtype, requires_grad=True)
        draw = DisARM().draw(dist.Bernoulli(logits=logits).to_event(1), 0)
        assert draw.value.dtype == dtype and draw.value.shape == (3, 2) and not draw.value.requires_grad
        assert ((draw.value == 0) | (draw.value == 1)).all()
