"""RODEO against exact gradients, by listing every pair of draws with a network that says something."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import pytest
import torch
from exact_means import exact_gradient
from programs import DISCRETE, F64, ChainGuide, CurvedModel, Params, X, gradient

from gumbo.errors import UnsupportedSite
from gumbo.inference import SiteELBO
from gumbo.inference.auditing.exact import mean_over_draws
from gumbo.inference.estimators import Rodeo
from gumbo.inference.estimators.stein import Surrogate

SERVED = ["one coin", "control flow", "chain", "plate"]


def told(estimator, model, guide, **options):
    """A loss whose networks are as training might leave them: far from the zero that they start at."""
    loss = SiteELBO(estimator, **options)(model, guide).initialize()
    torch.manual_seed(0)
    for parameter in loss.binding.states.parameters():
        torch.nn.init.normal_(parameter)
    for _ in range(3):
        loss()
    return loss.eval()


def is_unbiased(estimator, model, guide, **options):
    loss = told(estimator, model, guide, **options)
    both = torch.nn.ModuleList([model, guide])
    mean = mean_over_draws(lambda: gradient(loss(), both))
    return torch.allclose(mean, exact_gradient(model, guide), rtol=0, atol=1e-10)


def cells():
    for name in SERVED:
        for vectorize in (False,) if DISCRETE[name].branches else (True, False)[: 1 + (name == "chain")]:
            yield pytest.param(name, vectorize, id=f"{name}-{'vec' if vectorize else 'seq'}")


@pytest.mark.parametrize("name, vectorize", list(cells()))
def test_the_mean_over_every_pair_of_draws_is_the_exact_gradient(name, vectorize):
    model, guide = DISCRETE[name].make()
    assert is_unbiased("rodeo", model, guide, vectorize_particles=vectorize)


class EventGuide(Params):
    def __init__(self):
        super().__init__(a=[0.4, -0.7], b=[0.1, -0.4, 0.6])

    def forward(self):
        pyro.sample("z", dist.Bernoulli(logits=self.a).to_event(1))
        pyro.sample("y", dist.OneHotCategorical(logits=self.b))


class EventModel(Params):
    def __init__(self):
        super().__init__(w=[0.2, 1.0, -0.5])

    def forward(self):
        z = pyro.sample("z", dist.Bernoulli(logits=torch.zeros(2, dtype=F64)).to_event(1))
        y = pyro.sample("y", dist.OneHotCategorical(logits=torch.zeros(3, dtype=F64)))
        pyro.sample("x", dist.Normal(((y * self.w).sum(-1) * (1.0 + z[..., 0]) - z[..., 1]).exp(), 1.0), obs=X[1])


@pytest.mark.parametrize("words", [{"z": "rodeo", "y": "enumerate"}, {"z": "enumerate", "y": "rodeo"}], ids=str)
def test_vectors_of_coins_and_one_hot_sites_are_served(words):
    assert is_unbiased(words, EventModel(), EventGuide(), num_particles=2)


def test_three_particles_take_each_others_models():
    assert is_unbiased("rodeo", *DISCRETE["one coin"].make(), num_particles=3)


class NoReplacement(Rodeo):
    """Wrong on purpose: h at the draw is taken away and its expectation is not given back."""

    def own_term(self, view, found):
        here, contrast = super().own_term(view, found)
        return here, torch.zeros_like(contrast)


class OwnModel(Rodeo):
    """Wrong on purpose: h at the draw is made of the particle's own cost and slope."""

    def own_term(self, view, found):
        return self.neighbours(view, view.cost, torch.zeros_like(view.cost), found.slope, found.value)


class OwnBaseline(Rodeo):
    """Wrong on purpose: the baseline has the particle's own neighbours in it."""

    def baseline_term(self, view, found):
        return super().baseline_term(view, found).flip(view.particle_dim)


@pytest.mark.parametrize("wrong", [NoReplacement(), OwnModel(), OwnBaseline()], ids=repr)
def test_wrong_twins_fail_the_same_test(wrong):
    assert is_unbiased("rodeo", CurvedModel(), ChainGuide())
    assert not is_unbiased(wrong, CurvedModel(), ChainGuide())


class WideGuide(Params):
    def __init__(self):
        super().__init__(a=[0.4, -0.7, 1.3, 0.0, -0.2, 0.6])

    def forward(self):
        with pyro.plate("data", 40):
            pyro.sample("z", dist.Bernoulli(logits=self.a.expand(40, 6)).to_event(1))


class WideModel(Params):
    """A cost that bends, which no linear model tells."""

    def forward(self):
        with pyro.plate("data", 40):
            z = pyro.sample("z", dist.Bernoulli(logits=torch.zeros(6, dtype=F64)).to_event(1))
            total = (z * torch.tensor([1.0, -0.6, 0.5, 0.8, -0.9, 0.7], dtype=F64)).sum(-1)
            pyro.sample("x", dist.Normal(total.exp(), 1.0), obs=torch.tensor(0.3, dtype=F64).expand(40))


@pytest.mark.slow
def test_training_the_network_lowers_the_variance_and_moves_nothing_else():
    """200 draws know a variance to 10 %."""
    torch.manual_seed(0)
    model, guide = WideModel(), WideGuide()

    def variance(loss):
        loss.eval()
        found = torch.stack([gradient(loss(), guide) for _ in range(200)]).var(0).sum()
        loss.train()
        return found

    def settled(word, steps):
        loss = SiteELBO(word, num_particles=2)(model, guide).initialize()
        own = list(loss.binding.parameters())
        optimizer = torch.optim.Adam(own, lr=0.02) if own else None
        for _ in range(steps):
            value = loss()
            if optimizer:
                optimizer.zero_grad()
                value.backward()
                optimizer.step()
        return variance(loss)

    double, rodeo, plain = settled("double-cv", 120), settled("rodeo", 120), settled("rloo", 0)
    assert rodeo < 0.8 * double and rodeo < 0.5 * plain, (rodeo, double, plain)


def test_the_network_receives_its_gradient_and_gives_none_away():
    model, guide = WideModel(), WideGuide()
    loss = SiteELBO("rodeo")(model, guide).initialize()
    torch.manual_seed(1)
    loss().backward()
    state = loss.binding.states["z"]
    assert isinstance(state, Surrogate) and state.net[-1].weight.grad.abs().max() > 0
    with_training = guide.a.grad.clone()
    guide.a.grad = None
    other = SiteELBO("rodeo")(model, guide).initialize().eval()
    torch.manual_seed(1)
    other().backward()
    assert torch.allclose(guide.a.grad, with_training, rtol=0, atol=1e-10)
    assert all(p.grad is None or p.grad.abs().max() == 0 for p in other.binding.parameters())


def test_untrained_it_is_double_cv():
    found = []
    for word in ("rodeo", "double-cv"):
        model, guide = DISCRETE["chain"].make()
        loss = SiteELBO(word, num_particles=3)(model, guide).initialize()
        torch.manual_seed(2)
        found.append(torch.stack([gradient(loss(), torch.nn.ModuleList([model, guide])) for _ in range(4)]))
    assert torch.allclose(*found, rtol=0, atol=1e-12)


def test_other_families_are_refused_by_name():
    def program():
        pyro.sample("n", dist.Poisson(1.0))

    with pytest.raises(UnsupportedSite, match="'n'.*rodeo.*Bernoulli and OneHotCategorical.*Poisson"):
        SiteELBO("rodeo")(program, program)()
