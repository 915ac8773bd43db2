"""Double control variates against exact gradients, by listing every pair of draws."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import pytest
import torch
from exact_means import exact_gradient, is_unbiased
from programs import DISCRETE, F64, ChainGuide, CurvedModel, OneCoinGuide, Params, X, gradient
from torch import nn
from ztest import misses

from gumbo.errors import BadInput, UnsupportedSite
from gumbo.inference import SiteELBO
from gumbo.inference.engine import terms
from gumbo.inference.estimators import DoubleControlVariates
from gumbo.inference.estimators.double_control_variates import Coefficients

SERVED = [name for name, case in DISCRETE.items() if name != "dice" and not case.large]


def cells():
    for name in SERVED:
        for vectorize in (False,) if DISCRETE[name].branches else (True, False):
            yield pytest.param(name, vectorize, id=f"{name}-{'vec' if vectorize else 'seq'}")


@pytest.mark.parametrize("name, vectorize", list(cells()))
def test_the_mean_over_every_pair_of_draws_is_the_exact_gradient(name, vectorize):
    model, guide = DISCRETE[name].make()
    assert is_unbiased("double-cv", model, guide, vectorize_particles=vectorize)


class FittedHere(DoubleControlVariates):
    """Wrong on purpose: its coefficients are the best for the draws at hand."""

    def coefficients(self, view, parts):
        fitted = Coefficients(view.cost, 0.0)
        fitted.observe(view, parts)
        return fitted.read()


class OwnSlope(DoubleControlVariates):
    """Wrong on purpose: the slope at a particle's own draw stands in its own linear term."""

    def surrogate(self, view):
        own = view.find_slope
        view.find_slope = lambda: own().flip(view.particle_dim - view.event_dim)  # with two particles, the other's
        return super().surrogate(view)


class NoPath(DoubleControlVariates):
    """Wrong on purpose: what the linear term takes away is not given back."""

    def surrogate(self, view):
        slope, mean = view.slope, view.parameter("mean")
        flipped = slope.flip(view.particle_dim - view.event_dim)
        return super().surrogate(view) - view.sum_event(flipped * mean)


@pytest.mark.parametrize("wrong", [FittedHere(), OwnSlope(), NoPath()], ids=repr)
def test_wrong_twins_fail_the_same_test(wrong):
    model, guide = DISCRETE["masked event"].make() if isinstance(wrong, FittedHere) else (CurvedModel(), ChainGuide())
    assert not is_unbiased(wrong, model, guide)


def test_it_is_unbiased_where_the_cost_is_far_from_linear():
    assert is_unbiased("double-cv", CurvedModel(), ChainGuide())


class VectorGuide(Params):
    def __init__(self):
        super().__init__(a=[0.4, -0.7, 1.3])

    def forward(self):
        with pyro.plate("data", 2):
            pyro.sample("z", dist.Bernoulli(logits=self.a.expand(2, 3)).to_event(1))


class LinearModel(Params):
    """A cost linear in the coins, as log p and log q of them are: with both coefficients one it is known exactly."""

    def forward(self):
        with pyro.plate("data", 2):
            z = pyro.sample("z", dist.Bernoulli(logits=torch.tensor([0.2, 0.0, -1.0], dtype=F64)).to_event(1))
            pyro.factor("f", (z * torch.tensor([2.0, -1.0, 0.5], dtype=F64)).sum(-1))


def curved_model():
    with pyro.plate("data", 2):
        z = pyro.sample("z", dist.Bernoulli(logits=torch.tensor([0.2, 0.0, -1.0], dtype=F64)).to_event(1))
        pyro.sample("x", dist.Normal((z * torch.tensor([1.0, -0.6, 0.5], dtype=F64)).sum(-1), 0.4), obs=X)


class BothOne(DoubleControlVariates):
    def coefficients(self, view, parts):
        return torch.ones(2, dtype=F64).unbind()


def test_before_anything_is_learnt_it_is_leave_one_out():
    found = []
    for word in ("double-cv", "rloo"):
        guide = VectorGuide()
        loss = SiteELBO(word, num_particles=3)(curved_model, guide).initialize().eval()
        torch.manual_seed(2)
        found.append(torch.stack([gradient(loss(), guide) for _ in range(4)]))
    assert torch.allclose(*found, rtol=0, atol=1e-12)


@pytest.mark.parametrize("particles", [2, 3])
def test_a_linear_cost_leaves_no_variance(particles):
    model, guide = LinearModel(), VectorGuide()
    loss = SiteELBO(BothOne(), num_particles=particles)(model, guide).initialize()
    exact = exact_gradient(model, guide)
    for _ in range(6):
        assert torch.allclose(gradient(loss(), guide), exact, rtol=0, atol=1e-9)


def variance(word, model, guide, settle):
    torch.manual_seed(0)
    loss = SiteELBO(word, num_particles=2)(model, guide).initialize()
    for _ in range(settle):
        loss()
    loss.eval()
    return torch.stack([gradient(loss(), guide) for _ in range(300)]).var(0).sum()


@pytest.mark.slow
def test_it_varies_less_than_leave_one_out_and_its_coefficients_help():
    """300 draws know a variance to some 10 %."""
    guide = VectorGuide()
    plain, fresh, settled = (
        variance(word, curved_model, guide, settle)
        for word, settle in (("rloo", 0), ("double-cv", 0), ("double-cv", 60))
    )
    assert settled < 0.7 * plain
    assert settled < 1.1 * fresh


@pytest.mark.parametrize("name", ["control flow", "item"])
def test_where_the_program_is_not_differentiable_it_is_leave_one_out(name):
    found = []
    for word in ("double-cv", "rloo"):
        model, guide = DISCRETE[name].make()
        loss = SiteELBO(word, num_particles=3, vectorize_particles=False, kl_weight=0.0)(model, guide).initialize()
        torch.manual_seed(2)
        found.append(torch.stack([gradient(loss(), guide) for _ in range(4)]))
    assert torch.allclose(*found, rtol=0, atol=1e-12)


def test_no_program_runs_again():
    runs = []
    guide = VectorGuide()

    def model():
        runs.append(1)
        curved_model()

    loss = SiteELBO("double-cv", num_particles=3)(model, guide).initialize()
    runs.clear()
    loss().backward()
    assert len(runs) == 1
    slow = SiteELBO("double-cv", num_particles=3, vectorize_particles=False)(model, guide).initialize()
    runs.clear()
    slow().backward()
    assert len(runs) == 3


def test_the_slope_that_it_sees_is_that_of_the_whole_cost():
    """Of log p(x, z) − log q(z), the last of which is counted and not differentiated in the objective."""
    seen = []

    class Seeing(DoubleControlVariates):
        def surrogate(self, view):
            seen.append((view.slope, view.value.detach()))
            return super().surrogate(view)

    guide = VectorGuide()
    SiteELBO(Seeing(), num_particles=2)(curved_model, guide)()
    slope, value = seen[0]
    z = value.clone().requires_grad_()
    weights = torch.tensor([1.0, -0.6, 0.5], dtype=F64)
    f = (torch.tensor([0.2, 0.0, -1.0], dtype=F64) * z).sum() - (guide.a.detach() * z).sum()
    f = f + dist.Normal((z * weights).sum(-1), 0.4).log_prob(X).sum()
    assert torch.allclose(slope, torch.autograd.grad(f, z)[0], rtol=0, atol=1e-10)


def test_what_it_learns_stands_in_the_state_and_moves_in_training_only():
    guide = VectorGuide()
    loss = SiteELBO("double-cv")(curved_model, guide).initialize()
    loss.eval()
    before = {name: value.clone() for name, value in loss.binding.states.state_dict().items()}
    loss()
    with torch.no_grad():
        loss.train()()
    assert all(torch.equal(value, before[name]) for name, value in loss.binding.states.state_dict().items())
    loss()
    after = loss.binding.states.state_dict()
    assert set(after) == {"z.gram", "z.cross"} and all(not torch.equal(after[name], before[name]) for name in after)
    again = SiteELBO("double-cv")(curved_model, VectorGuide()).initialize()
    again.load_state_dict(loss.state_dict())
    found = []
    for one in (loss, again):
        torch.manual_seed(3)
        found.append(gradient(one(), one.guide))
    assert torch.equal(*found)


def test_what_is_refused():
    with pytest.raises(BadInput, match="at least 2|2 particles|num_particles"):
        SiteELBO("double-cv", num_particles=1)
    with pytest.raises(BadInput, match="decay"):
        DoubleControlVariates(decay=1.5)
    with pytest.raises(UnsupportedSite, match=r"'c'.*double-cv.*Categorical.*OneHotCategorical"):
        SiteELBO({"y": "score", "c": "double-cv"})(*DISCRETE["dice"].make()).initialize()

    def normal():
        pyro.sample("z", dist.Normal(0.0, 1.0))

    with pytest.raises(UnsupportedSite, match="discrete"):
        SiteELBO("double-cv")(normal, normal)()
    with pytest.raises((UnsupportedSite, BadInput), match="iwae"):
        SiteELBO("double-cv", objective="iwae")(curved_model, VectorGuide()).initialize()


def test_a_program_that_leaves_torch_by_numpy_is_told_so():
    def model():
        z = pyro.sample("z", dist.Bernoulli(torch.tensor(0.5, dtype=F64)))
        pyro.factor("f", torch.as_tensor(2.0 * z.numpy(), dtype=F64))

    with pytest.raises(BadInput, match=r"numpy\(\).*'rloo'"):
        SiteELBO("double-cv", vectorize_particles=False)(model, OneCoinGuide())()


class CountGuide(Params):
    def __init__(self):
        super().__init__(r=0.4)

    def forward(self):
        with pyro.plate("data", 2000):
            pyro.sample("z", dist.Poisson(self.r.exp().expand(2000)))


def test_counts_are_served():
    """60 draws of 2,000 data: a bias of 0.05 would be seen with power 0.99."""

    def model():
        with pyro.plate("data", 2000):
            z = pyro.sample("z", dist.Poisson(torch.tensor(1.5, dtype=F64)))
            pyro.factor("f", (0.5 * z).sin())

    guide = CountGuide()
    loss = SiteELBO("double-cv")(model, guide).initialize()
    draws = torch.stack([gradient(loss(), guide) / 2000 for _ in range(60)])
    z = torch.arange(60, dtype=F64)
    q = dist.Poisson(guide.r.exp())
    f = dist.Poisson(torch.tensor(1.5, dtype=F64)).log_prob(z) + (0.5 * z).sin() - q.log_prob(z)
    assert not misses(draws, gradient(-(q.log_prob(z).exp() * f).sum(), guide), resolves=0.05)


class TwoLayers(nn.Module):
    """Coins above coins, with networks between them."""

    def __init__(self):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.decoder = nn.Linear(3, 2).double()
            self.encoder, self.encoder_top = nn.Linear(2, 3).double(), nn.Linear(3, 3).double()

    def model(self, x):
        with pyro.plate("data", len(x)):
            y = pyro.sample("y", dist.Bernoulli(logits=torch.zeros(3, dtype=F64)).to_event(1))
            z = pyro.sample("z", dist.Bernoulli(logits=y - 0.5).to_event(1))
            pyro.sample("x", dist.Normal(self.decoder(z).tanh(), 1.0).to_event(1), obs=x)

    def guide(self, x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Bernoulli(logits=self.encoder(x)).to_event(1))
            pyro.sample("y", dist.Bernoulli(logits=self.encoder_top(z)).to_event(1))


ROWS = torch.tensor([[0.3, -1.0], [0.8, 0.1]], dtype=F64)


def gradient_of(words, networks, **options):
    with pyro.get_param_store().scope():
        elbo = SiteELBO(words, num_particles=3, kl_weight=0.7, **options)
        torch.manual_seed(0)
        loss = elbo.differentiable_loss
        found = [gradient(loss(networks.model, networks.guide, ROWS), networks) for _ in range(4)]
    return torch.stack(found)


WORDS = {"double-cv": "double-cv", "rodeo": "rodeo", "mixed": {"z": "double-cv", "y": "rloo"}}


@pytest.mark.parametrize("vectorize", [True, False])
@pytest.mark.parametrize("words", WORDS.values(), ids=WORDS)
def test_slopes_that_come_with_the_models_gradient_change_no_number(words, vectorize, monkeypatch):
    found = gradient_of(words, TwoLayers(), vectorize_particles=vectorize)
    monkeypatch.setattr(terms, "with_slopes", lambda total, *_: (total, {}))
    apart = gradient_of(words, TwoLayers(), vectorize_particles=vectorize)
    torch.testing.assert_close(found, apart, rtol=1e-10, atol=1e-12)
    assert apart.abs().sum() > 1


def passes_through_the_model(word):
    networks, backward = TwoLayers(), []

    def note(out):
        out.register_hook(lambda _: backward.append(1))

    with pyro.get_param_store().scope():
        elbo = SiteELBO(word, num_particles=3)
        elbo.differentiable_loss(networks.model, networks.guide, ROWS)  # what is looked at once
        networks.decoder.register_forward_hook(lambda _, inputs, out: note(out))
        elbo.differentiable_loss(networks.model, networks.guide, ROWS).backward()
    return len(backward)


@pytest.mark.parametrize("word", ["double-cv", "rodeo"])
def test_the_model_is_differentiated_once(word, monkeypatch):
    """As under ``rloo``; before, once more for the slope."""
    assert passes_through_the_model("rloo") == passes_through_the_model(word) == 1
    monkeypatch.setattr(terms, "with_slopes", lambda total, *_: (total, {}))
    assert passes_through_the_model(word) == 2


def test_a_gradient_that_a_hook_changes_is_changed_once():
    found = []
    for share in (1.0, 0.5):
        networks = TwoLayers()
        networks.decoder.weight.register_hook(lambda gradient, share=share: share * gradient)
        with pyro.get_param_store().scope():
            torch.manual_seed(0)
            SiteELBO("double-cv").differentiable_loss(networks.model, networks.guide, ROWS).backward()
        found.append(networks.decoder.weight.grad)
    assert torch.allclose(found[1], 0.5 * found[0]) and found[0].abs().sum() > 0


def test_a_second_derivative_of_what_was_differentiated_is_refused():
    networks = TwoLayers()
    with pyro.get_param_store().scope():
        loss = SiteELBO("double-cv").differentiable_loss(networks.model, networks.guide, ROWS)
        (slope,) = torch.autograd.grad(loss, networks.decoder.weight, create_graph=True)
        with pytest.raises(BadInput, match="first derivatives only"):
            slope.sum().backward()
