"""MuProp, REBAR and RELAX: exact means where noise can be listed or integrated, z-tests where it cannot."""

from __future__ import annotations

import copy
import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from exact_means import exact_gradient, mean_gradient
from programs import DISCRETE, F64, DiceGuide, DiceModel, OneCoinGuide, OneCoinModel, Params, X, gradient
from pyro import poutine
from torch import nn
from ztest import misses

from gumbo.errors import BadInput, UnsupportedSite
from gumbo.guides import BernoulliGuide
from gumbo.inference import SiteELBO
from gumbo.inference.estimators import Draw, MuProp, Rebar, Relax
from gumbo.inference.estimators.relaxation import harden
from gumbo.models import BernoulliVAE


def normal(x, loc):
    return dist.Normal(loc, torch.tensor(1.0, dtype=F64)).log_prob(x)


# MuProp: nothing but discrete draws is random, so that they can be listed.


class DieGuide(Params):
    """A one-hot die above a vector of coins."""

    def __init__(self):
        super().__init__(a=[0.1, -0.4, 0.6], b=[[0.3, 0.2], [-0.5, 0.1], [0.0, 0.8]])

    def forward(self):
        y = pyro.sample("y", dist.OneHotCategorical(logits=self.a))
        pyro.sample("c", dist.Bernoulli(logits=y @ self.b).to_event(1))


class DieModel(Params):
    def __init__(self):
        super().__init__(w=[0.2, 1.0, -0.5])

    def forward(self):
        y = pyro.sample("y", dist.OneHotCategorical(logits=torch.zeros(3, dtype=F64)))
        c = pyro.sample("c", dist.Bernoulli(logits=torch.tensor([0.1, -0.3], dtype=F64)).to_event(1))
        pyro.sample("x", dist.Normal((y * self.w).sum(-1) * (1.0 + c[..., 0] - c[..., 1]), 1.0), obs=X[1])


MUPROP = {name: (case.model, case.guide, case.branches) for name, case in DISCRETE.items() if name != "dice"}
MUPROP["die and coins"] = (DieModel, DieGuide, False)


@pytest.mark.parametrize("vectorize", [True, False], ids=["vec", "seq"])
@pytest.mark.parametrize("name", list(MUPROP))
def test_the_mean_of_muprop_over_every_tuple_of_draws_is_the_exact_gradient(name, vectorize):
    model, guide, branches = MUPROP[name]
    if branches and vectorize:
        vectorize = None  # such a program takes one particle at a time, and K = 1 is one
    model, guide = model(), guide()
    mean = mean_gradient("muprop", model, guide, vectorize_particles=bool(vectorize))
    assert torch.allclose(mean, exact_gradient(model, guide), rtol=0, atol=1e-10)


@pytest.mark.parametrize("vectorize", [True, False], ids=["vec", "seq"])
@pytest.mark.parametrize("name", ["chain", "global then plate"])
@pytest.mark.parametrize("words", [("muprop", "score"), ("enumerate", "muprop"), ("muprop", "enumerate")])
def test_muprop_stands_beside_other_estimators(name, words, vectorize):
    model, guide = DISCRETE[name].make()
    sites = ("z1", "z2") if name == "chain" else ("g", "z")
    mean = mean_gradient(dict(zip(sites, words, strict=True)), model, guide, vectorize_particles=vectorize)
    assert torch.allclose(mean, exact_gradient(model, guide), rtol=0, atol=1e-10)


@pytest.mark.parametrize("name", ["plate", "plate then global"])
def test_muprop_with_plates_that_mix_their_rows(name):
    model, guide = DISCRETE[name].make()
    mean = mean_gradient("muprop", model, guide, plates="ignore")
    assert torch.allclose(mean, exact_gradient(model, guide), rtol=0, atol=1e-10)


class OffsetMuProp(MuProp):
    """Wrong on purpose: forgets to add back what the linear term takes away."""

    def surrogate(self, view):
        return super().surrogate(view) - view.sum_event(view.parameter("mean"))


def test_a_wrong_muprop_is_flagged():
    model, guide = OneCoinModel(), OneCoinGuide()
    mean = mean_gradient(OffsetMuProp(), model, guide)
    assert (mean - exact_gradient(model, guide)).abs().max() > 1e-2


class CountGuide(Params):
    def __init__(self):
        super().__init__(rate=0.7, loc=0.2)

    def forward(self):
        pyro.sample("n", dist.Poisson(self.rate.exp()))
        pyro.sample("z", dist.Normal(self.loc, 0.5))


class CountModel(Params):
    def __init__(self):
        super().__init__(w=0.3)

    def forward(self):
        n = pyro.sample("n", dist.Poisson(torch.tensor(1.5, dtype=F64)))
        z = pyro.sample("z", dist.Normal(torch.tensor(0.0, dtype=F64), 1.0))
        pyro.sample("x", dist.Normal(self.w * n + z, 1.0), obs=X[0])


def test_muprop_takes_counts_and_continuous_sites_and_beats_the_score():
    model, guide = CountModel(), CountGuide()
    modules = nn.ModuleList([guide])
    draws = {}
    for word in ("muprop", "score"):
        loss = SiteELBO(word, num_particles=50)(model, guide)
        draws[word] = torch.stack([gradient(loss(), modules) for _ in range(40)])
    with torch.no_grad():  # d/dη of −E[log p(n) + log p(z) + log p(x | n, z) − log q], in closed form but for lgamma
        rate, n = guide.rate.exp(), torch.arange(60, dtype=F64)
        q = dist.Poisson(rate).log_prob(n).exp()
        mean = model.w * n + guide.loc
        expected_x = normal(X[0], mean) - 0.5 * 0.25
        f = dist.Poisson(torch.tensor(1.5, dtype=F64)).log_prob(n) - dist.Poisson(rate).log_prob(n) + expected_x
        truth = torch.stack([-(q * f * (n - rate)).sum(), guide.loc - (X[0] - model.w * rate - guide.loc)])
    assert not misses(draws["muprop"], truth, resolves=0.3)
    assert (draws["muprop"].var(0) < draws["score"].var(0)).all()


# Programs in which R copies run side by side, each with parameters of its own: R independent gradients of one pass.


class Copies(Params):
    """Guide parameters repeated R times along the leftmost dimension."""

    values: dict = {}

    def __init__(self, copies: int = 1):
        super().__init__()
        for name, value in self.values.items():
            value = torch.tensor(value, dtype=F64)
            setattr(self, name, nn.Parameter(value.expand(copies, *value.shape).clone()))
        self.copies = copies

    def gradients(self, loss):
        """One row for each copy."""
        found = torch.autograd.grad(loss, [getattr(self, name) for name in self.values])
        return torch.cat([g.reshape(self.copies, -1) for g in found], dim=-1)


class CoinCopies(Copies):
    values = {"a": 0.4}

    def forward(self):
        with pyro.plate("copies", self.copies):
            pyro.sample("z", dist.Bernoulli(logits=self.a))


class ChainCopies(Copies):
    values = {"a": 0.4, "b": -0.2, "c": 0.9}

    def forward(self):
        with pyro.plate("copies", self.copies):
            z1 = pyro.sample("z1", dist.Bernoulli(logits=self.a))
            pyro.sample("z2", dist.Bernoulli(logits=self.b + self.c * z1))


class DieCopies(Copies):
    values = {"a": [0.1, -0.4, 0.6], "b": [[0.3, 0.2], [-0.5, 0.1], [0.0, 0.8]]}

    def forward(self):
        with pyro.plate("copies", self.copies):
            y = pyro.sample("y", dist.OneHotCategorical(logits=self.a))
            pyro.sample("c", dist.Bernoulli(logits=(y.unsqueeze(-2) @ self.b).squeeze(-2)).to_event(1))


class PlateThenGlobalCopies(Copies):
    values = {"a": [0.4, -0.7], "b": [-0.3], "c": [2.0]}

    def forward(self):
        copies = pyro.plate("copies", self.copies, dim=-2)
        with copies, pyro.plate("data", 2, dim=-1):
            z = pyro.sample("z", dist.Bernoulli(logits=self.a))
        with copies:
            pyro.sample("g", dist.Bernoulli(logits=self.b + self.c * z.mean(-1, keepdim=True)))


class Observed(Params):
    """The models of the guides above; a copy's likelihood is not quadratic in its draws."""

    def __init__(self, copies: int = 1):
        super().__init__()
        self.copies = copies


class CoinObserved(Observed):
    def forward(self):
        with pyro.plate("copies", self.copies):
            z = pyro.sample("z", dist.Bernoulli(logits=torch.tensor(-0.3, dtype=F64)))
            pyro.sample("x", dist.Normal((1.3 * z).exp(), 1.0), obs=X[0].expand(self.copies))


class ChainObserved(Observed):
    def forward(self):
        with pyro.plate("copies", self.copies):
            z1 = pyro.sample("z1", dist.Bernoulli(logits=torch.tensor(0.2, dtype=F64)))
            z2 = pyro.sample("z2", dist.Bernoulli(logits=0.5 * z1 - 0.4))
            pyro.sample("x", dist.Normal(-1.1 * z2 + 2.0 * z1 * z2, 1.0), obs=X[0].expand(self.copies))


class DieObserved(Observed):
    def forward(self):
        with pyro.plate("copies", self.copies):
            y = pyro.sample("y", dist.OneHotCategorical(logits=torch.zeros(3, dtype=F64)))
            c = pyro.sample("c", dist.Bernoulli(logits=torch.tensor([0.1, -0.3], dtype=F64)).to_event(1))
            loc = (y * torch.tensor([0.2, 1.0, -0.5], dtype=F64)).sum(-1) * (1.0 + c[..., 0] - c[..., 1])
            with poutine.scale(scale=1.7):
                pyro.sample("x", dist.Normal(loc, 1.0), obs=X[1].expand(self.copies))
            pyro.factor("f", 0.8 * c[..., 0] * c[..., 1])


class PlateThenGlobalObserved(Observed):
    def forward(self):
        copies = pyro.plate("copies", self.copies, dim=-2)
        with copies:
            g = pyro.sample("g", dist.Bernoulli(logits=torch.tensor(0.1, dtype=F64)))
        with copies, pyro.plate("data", 2, dim=-1):
            z = pyro.sample("z", dist.Bernoulli(logits=torch.tensor(-0.3, dtype=F64)))
            pyro.sample("x", dist.Normal(0.9 * z - 2.0 * g, 1.0), obs=X.expand(self.copies, 2))
        with copies:  # outside the plate, so that its elements share this term
            pyro.factor("f", z[..., :1] * z[..., 1:])


COPIES = {
    "coin": (CoinObserved, CoinCopies),
    "chain": (ChainObserved, ChainCopies),
    "die and coins": (DieObserved, DieCopies),
    "plate then global": (PlateThenGlobalObserved, PlateThenGlobalCopies),
}


def trained(estimator, name, steps, copies=200, **options):
    """The state that a control variate has after some steps, the programs held still."""
    model, guide = (program(copies) for program in COPIES[name])
    loss = SiteELBO(estimator, num_particles=1, **options)(model, guide).initialize()
    if steps:
        optimizer = torch.optim.Adam(loss.binding.parameters(), lr=0.05)
        for _ in range(steps):
            optimizer.zero_grad()
            loss().backward()
            optimizer.step()
    return loss.binding.state_dict()


def replicates(estimator, name, steps=0, copies=30_000, **options):
    """Independent gradients of one copy, a row each."""
    model, guide = (program(copies) for program in COPIES[name])
    loss = SiteELBO(estimator, num_particles=1, **options)(model, guide).initialize()
    loss.binding.load_state_dict(trained(estimator, name, steps, **options))
    loss.eval()
    return guide.gradients(loss())


def truth(name):
    model, guide = (program(1) for program in COPIES[name])
    return exact_gradient(model, guide)


RESOLVES = 0.1  # in a gradient whose entries are some tenths, a factor of the log-odds


CELLS = [
    pytest.param(name, word, steps, id=f"{name}-{word if isinstance(word, str) else '+'.join(word)}-{steps}")
    for name, word, steps in [
        *((name, "rebar", steps) for name in COPIES for steps in (0, 15)),
        *((name, "relax", 15) for name in COPIES),
        ("chain", "relax", 0),
        ("chain", ("enumerate", "rebar"), 0),
        ("chain", ("rebar", "enumerate"), 0),
        ("die and coins", "relax+rebar", 15),
        ("plate then global", "relax+rebar", 15),
    ]
]


@pytest.mark.parametrize("name, word, steps", CELLS)
def test_the_mean_gradient_is_the_exact_one(name, word, steps):
    estimator = Relax(rebar=True) if word == "relax+rebar" else word
    if isinstance(word, tuple):
        estimator = dict(zip(("z1", "z2"), word, strict=True))
    assert not misses(replicates(estimator, name, steps), truth(name), resolves=RESOLVES)


class Same:
    """Wrong on purpose: z̃ is z itself, which fits the draw but was not drawn again."""

    def tied(self, view, logits):
        return self.free(view, logits)


class NoTiedPath:
    """Wrong on purpose: ∇c(z̃) is missing."""

    def path(self, view, logits, free_slope, tied_slope):
        return super().path(view, logits, free_slope, torch.zeros_like(tied_slope))


class FlippedPath:
    """Wrong on purpose: the sign of the pathwise terms."""

    def path(self, *given):
        return -super().path(*given)


WRONG = [
    pytest.param(type(wrong.__name__, (wrong, right), {})(), id=f"{wrong.__name__}-{right.__name__}")
    for wrong in (Same, NoTiedPath, FlippedPath)
    for right in (Rebar, Relax)
]


@pytest.mark.parametrize("estimator", WRONG)
def test_wrong_estimators_are_flagged(estimator):
    # An untrained RELAX has a constant for its control variate, which nothing can spoil.
    assert misses(replicates(estimator, "coin", steps=30), truth("coin"), resolves=RESOLVES)


def test_counting_a_shared_term_once_for_each_element_would_be_flagged(monkeypatch):
    from gumbo.inference.estimators import control_variates

    once = control_variates.cost_between
    monkeypatch.setattr(control_variates, "cost_between", lambda *a, **k: (lambda c: (c[0], c[0].sum()))(once(*a, **k)))

    class Guide(PlateThenGlobalCopies):
        def forward(self):
            with pyro.plate("copies", self.copies, dim=-2), pyro.plate("data", 2, dim=-1):
                pyro.sample("z", dist.Bernoulli(logits=self.a + 0.0 * (self.b + self.c)))

    class Model(Observed):
        def forward(self):
            copies = pyro.plate("copies", self.copies, dim=-2)
            with copies, pyro.plate("data", 2, dim=-1):
                z = pyro.sample("z", dist.Bernoulli(logits=torch.tensor(-0.3, dtype=F64)))
            with copies:
                pyro.factor("f", 2.0 * z[..., :1] * z[..., 1:])

    monkeypatch.setitem(COPIES, "shared", (Model, Guide))
    assert misses(replicates("rebar", "shared"), truth("shared"), resolves=RESOLVES)
    monkeypatch.setattr(control_variates, "cost_between", once)
    assert not misses(replicates("rebar", "shared"), truth("shared"), resolves=RESOLVES)


# One coin: the noise is a point of the unit square, over which the gradient can be integrated.


class Scripted:
    """Takes its noise from outside."""

    def script(self, made_by, again):
        self._noise = made_by, again
        return self

    def draw(self, fn, step, args=(), kwargs=None):
        made_by, again = self._noise
        return Draw(harden(fn.logits.detach() + made_by, False), {"made_by": made_by, "again": again})


def unit_square(probability, points):
    """Nodes u, v and weights on the unit square, cut where the coin turns."""
    nodes, weights = (torch.tensor(found, dtype=F64) for found in np.polynomial.legendre.leggauss(points))
    nodes, weights = (nodes + 1) / 2, weights / 2
    cut = 1 - probability
    u = torch.cat([nodes * cut, cut + nodes * probability])
    weight = torch.cat([weights * cut, weights * probability])
    return u.repeat_interleave(points), nodes.repeat(2 * points), (weight[:, None] * weights).flatten()


@pytest.mark.parametrize("right", [Rebar, Relax], ids=["rebar", "relax"])
@pytest.mark.parametrize("wrong", [None, Same, NoTiedPath, FlippedPath])
def test_the_integral_over_the_noise_of_one_coin_is_the_exact_gradient(right, wrong):
    state = trained(right(), "coin", steps=30)
    u, v, weight = unit_square(torch.sigmoid(torch.tensor(CoinCopies.values["a"], dtype=F64)), points=80)
    bases = (Scripted, right) if wrong is None else (Scripted, wrong, right)
    estimator = type("Estimator", bases, {})().script(u.logit(), v.logit())
    model, guide = CoinObserved(len(u)), CoinCopies(len(u))
    loss = SiteELBO(estimator, num_particles=1)(model, guide)
    estimator.script(u[0].logit(), v[0].logit())
    loss.initialize()
    estimator.script(u.logit(), v.logit())
    loss.binding.load_state_dict(state)
    loss.eval()
    gap = ((weight[:, None] * guide.gradients(loss())).sum(0) - truth("coin")).abs().max()
    assert gap < 1e-6 if wrong is None else gap > 1e-2


# What upstream is reparameterized gets its gradient through the coin's logits.


class NormalThenCoinCopies(Copies):
    values = {"m": 0.3, "a": 0.4, "c": 0.9}

    def forward(self):
        with pyro.plate("copies", self.copies):
            y = pyro.sample("y", dist.Normal(self.m, 1.0))
            pyro.sample("z", dist.Bernoulli(logits=self.a + self.c * y))


class NormalThenCoinObserved(Observed):
    def forward(self):
        with pyro.plate("copies", self.copies):
            y = pyro.sample("y", dist.Normal(torch.tensor(0.0, dtype=F64), 1.0))
            z = pyro.sample("z", dist.Bernoulli(logits=torch.tensor(-0.3, dtype=F64)))
            pyro.sample("x", dist.Normal(y + 1.5 * z, 1.0), obs=X[0].expand(self.copies))


@pytest.mark.parametrize("word", ["rebar", "relax", "muprop"])
def test_a_reparameterized_site_upstream_gets_its_gradient(monkeypatch, word):
    monkeypatch.setitem(COPIES, "normal", (NormalThenCoinObserved, NormalThenCoinCopies))
    guide = NormalThenCoinCopies()
    nodes, weights = (torch.tensor(found, dtype=F64) for found in np.polynomial.hermite_e.hermegauss(60))
    y, weights = guide.m + nodes, weights / weights.sum()
    bound = normal(y, 0.0) - normal(nodes, 0.0)
    for z in (0.0, 1.0):
        z = torch.tensor(z, dtype=F64)
        q = dist.Bernoulli(logits=guide.a + guide.c * y).log_prob(z)
        log_p = dist.Bernoulli(logits=torch.tensor(-0.3, dtype=F64)).log_prob(z) + normal(X[0], y + 1.5 * z)
        bound = bound + q.exp() * (log_p - q)
    exact = torch.cat(torch.autograd.grad(-(weights * bound).sum(), [guide.m, guide.a, guide.c]))
    draws = replicates({"z": word, "y": "pathwise"}, "normal", steps=0 if word == "muprop" else 30)
    assert not misses(draws, exact, resolves=RESOLVES)


# Particles.


@pytest.mark.parametrize("word", ["rebar", "relax", "muprop"])
@pytest.mark.parametrize("name", ["chain", "plate then global", "masked event"])
def test_one_particle_means_the_same_vectorized_or_not(name, word):
    found = []
    for vectorize in (True, False):
        model, guide = DISCRETE[name].make()
        torch.manual_seed(3)
        loss = SiteELBO(word, num_particles=1, vectorize_particles=vectorize)(model, guide).initialize()
        optimizer = torch.optim.Adam(loss.parameters(), lr=0.05)
        torch.manual_seed(4)
        for _ in range(3):
            optimizer.zero_grad()
            loss().backward()
            optimizer.step()
        found.append(torch.cat([p.detach().flatten() for p in loss.parameters()]))
    assert torch.allclose(*found, rtol=0, atol=1e-9)


@pytest.mark.parametrize("right", [Rebar, Relax], ids=["rebar", "relax"])
def test_particles_average_what_single_ones_give(right):
    class Queued(right):
        def draw(self, fn, step, args=(), kwargs=None):
            taken, self._queue = self._queue[: max(fn.logits.numel(), 1)], self._queue[max(fn.logits.numel(), 1) :]
            made_by, again = torch.tensor(taken, dtype=F64).reshape(*fn.logits.shape, 2).unbind(-1)
            return Draw(harden(fn.logits.detach() + made_by, False), {"made_by": made_by, "again": again})

    noise = [[0.3, -0.8], [-1.4, 0.2], [0.9, 1.1]]
    state = trained(right(), "coin", steps=30)

    def gradients(rows, vectorize):
        estimator, modules = Queued(), (OneCoinModel(), OneCoinGuide())
        loss = SiteELBO(estimator, num_particles=len(rows), vectorize_particles=vectorize)(*modules)
        estimator._queue = [[0.1, 0.1]] * 20
        loss.initialize()
        loss.binding.load_state_dict(state)
        loss.eval().initialize()  # each mode is looked at once
        estimator._queue = list(rows)
        return gradient(loss(), nn.ModuleList(modules))

    alone = torch.stack([gradients([row], True) for row in noise]).mean(0)
    assert torch.allclose(gradients(noise, True), alone, rtol=0, atol=1e-10)
    assert torch.allclose(gradients(noise, False), alone, rtol=0, atol=1e-10)


# The control variate's own parameters.


class EncodedCopies(Copies):
    """A guide whose logits come in from outside, as from an encoder that the caller owns."""

    values = {"a": 0.4}

    def forward(self, outside):
        with pyro.plate("copies", self.copies):
            pyro.sample("z", dist.Bernoulli(logits=self.a * outside))


class EncodedObserved(Observed):
    def forward(self, outside):
        with pyro.plate("copies", self.copies):
            z = pyro.sample("z", dist.Bernoulli(logits=-0.3 * outside))
            pyro.sample("x", dist.Normal((1.3 * z).exp() + self.w * outside, 1.0), obs=X[0].expand(self.copies))

    def __init__(self, copies):
        super().__init__(copies)
        self.w = nn.Parameter(torch.tensor(0.3, dtype=F64))


@pytest.mark.parametrize("estimator", [Rebar(), Relax(), Relax(rebar=True)], ids=["rebar", "relax", "relax+rebar"])
def test_nothing_leaks_between_the_control_variate_and_the_programs(estimator):
    outside = torch.full((50,), 1.1, dtype=F64, requires_grad=True)
    loss = SiteELBO(estimator, num_particles=1)(EncodedObserved(50), EncodedCopies(50)).initialize(outside)
    optimizer = torch.optim.Adam(loss.binding.parameters(), lr=0.05)
    for _ in range(5):
        optimizer.zero_grad()
        loss(outside).backward()
        optimizer.step()
    programs = [*loss.model.parameters(), *loss.guide.parameters(), outside]
    own = list(loss.binding.parameters())

    def gradients():
        torch.manual_seed(0)
        for p in programs + own:
            p.grad = None
        loss(outside).backward()
        return [p.grad for p in programs], [p.grad for p in own]

    loss.eval()
    state = copy.deepcopy(loss.binding.states.state_dict())
    without, still = gradients()
    kept = loss.binding.states.state_dict()
    assert all(torch.equal(kept[name], item) for name, item in state.items())
    assert all(g is None for g in still)
    loss.train()
    with_its_loss, trains = gradients()
    assert all(g is not None and g.abs().max() > 0 for g in trains)
    assert all(torch.allclose(a, b, rtol=0, atol=1e-12) for a, b in zip(with_its_loss, without, strict=True))


@pytest.mark.parametrize("right", [Rebar, Relax], ids=["rebar", "relax"])
def test_the_control_variate_descends_the_squared_gradient(right):
    """Its gradient is that of |gradient of the logits|², here by differences, in units of the cost's variance."""
    copies = 64
    made_by, again = (torch.rand(copies, dtype=F64).clamp(0.01, 0.99).logit() for _ in range(2))
    estimator = type("Estimator", (Scripted, right), {})().script(made_by[:1], again[:1])
    loss = SiteELBO(estimator, num_particles=1)(CoinObserved(copies), CoinCopies(copies)).initialize()
    estimator.script(made_by, again)
    with torch.no_grad():
        for p in loss.binding.parameters():
            p.add_(0.1 * torch.randn_like(p))
    before = copy.deepcopy(loss.binding.state_dict())
    loss().backward()
    unit = loss.binding.states["z"].variance.item()
    loss.binding.load_state_dict(before)
    loss.eval()

    def squared():
        return loss.guide.gradients(loss()).square().sum().item()

    for p in loss.binding.parameters():
        analytic, flat = p.grad.flatten()[0].item(), p.data.view(-1)
        numeric = 0.0
        for sign in (1, -1):
            flat[0] += sign * 1e-5
            numeric += sign * squared() / 2e-5 / unit
            flat[0] -= sign * 1e-5
        assert math.isclose(analytic, numeric, rel_tol=1e-4, abs_tol=1e-6)


def test_its_parameters_are_the_losses_and_are_saved():
    loss = SiteELBO({"z1": "rebar", "z2": "relax"})(*DISCRETE["chain"].make())
    with pytest.raises(BadInput, match="initialize"):
        list(loss.parameters())
    loss.initialize()
    names = dict(loss.named_parameters())
    assert {"binding.states.z1.strength", "binding.states.z1.log_temperature", "binding.states.z2.net.0.weight"} <= set(
        names
    )
    assert {f"binding.states.z1.{name}" for name in ("strength", "log_temperature", "mean")} <= set(loss.state_dict())
    with torch.no_grad():
        assert torch.isfinite(loss())


@pytest.mark.parametrize("target", [0.45, 0.499])
def test_the_toy_has_less_variance_than_the_score(monkeypatch, target):
    """E[(b − t)²] at p = ½: the whole cost is the factor, the KL term being left out."""

    class Toy(Observed):
        def forward(self):
            with pyro.plate("copies", self.copies):
                z = pyro.sample("z", dist.Bernoulli(logits=torch.tensor(0.0, dtype=F64)))
                pyro.factor("f", (z - target) ** 2)

    class FairCoin(CoinCopies):
        values = {"a": 0.0}

    monkeypatch.setitem(COPIES, "toy", (Toy, FairCoin))
    variance = {}
    for word, steps in {"score": 0, "rebar": 40, "relax": 40}.items():
        draws = replicates(word, "toy", steps, copies=20_000, kl_weight=0.0)
        assert not misses(draws, torch.tensor([-(1 - 2 * target) / 4], dtype=F64), resolves=0.01)
        variance[word] = draws.var().item()
    assert variance["rebar"] < 0.2 * variance["score"]
    assert variance["relax"] < 0.2 * variance["score"]


# What is refused, and what is not.


class Choosing(Params):
    """Relaxed draws cannot index."""

    def __init__(self):
        super().__init__(w=[0.7, -0.6])

    def forward(self):
        z = pyro.sample("z", dist.Bernoulli(logits=torch.tensor(-0.3, dtype=F64)))
        pyro.sample("x", dist.Normal(self.w[z.long()], 1.0), obs=X[0])


class Rejecting(Choosing):
    def forward(self):
        z = pyro.sample("z", dist.Bernoulli(logits=torch.tensor(-0.3, dtype=F64)))
        if not bool(((z == 0) | (z == 1)).all()):
            raise ValueError("z must be binary")
        pyro.sample("x", dist.Normal(z, 1.0), obs=X[0])


class Steep(Choosing):
    def forward(self):
        z = pyro.sample("z", dist.Bernoulli(logits=torch.tensor(-0.3, dtype=F64)))
        pyro.sample("x", dist.Normal(torch.relu(z - 0.37) + torch.tanh(60 * (z - 0.61)), 1.0), obs=X[0])


@pytest.mark.parametrize(
    "model", [DISCRETE["control flow"].model, DISCRETE["item"].model, Choosing, Rejecting], ids=lambda m: m.__name__
)
@pytest.mark.parametrize("estimator", [Rebar(), Relax(rebar=True)], ids=["rebar", "relax+rebar"])
def test_a_model_that_jumps_between_relaxed_values_is_refused(model, estimator):
    loss = SiteELBO(estimator, num_particles=1)(model(), OneCoinGuide())
    with pytest.raises(UnsupportedSite) as refused:
        loss()
    assert refused.value.site == "z" and "relax" in refused.value.alternatives


@pytest.mark.parametrize("model", [Steep, DISCRETE["buffer"].model], ids=lambda m: m.__name__)
def test_a_steep_model_is_not(model):
    loss = SiteELBO("rebar", num_particles=1)(model(), OneCoinGuide())
    for _ in range(8):
        assert loss().isfinite()


class Shaped(Params):
    """Two coins through a rectifier network, which has a kink a unit, and then through what ``last`` makes of it."""

    def __init__(self, last, dtype):
        super().__init__()
        self.last, self.dtype = last, dtype
        self.into = torch.randn(2, 6, dtype=dtype)
        self.bias, self.out = torch.randn(6, dtype=dtype), torch.randn(6, 9, dtype=dtype)

    def forward(self):
        z = pyro.sample("z", dist.Bernoulli(logits=torch.zeros(2, dtype=self.dtype)).to_event(1))
        h = torch.relu(z @ self.into + self.bias) @ self.out
        at = z[..., 0].clamp(0.0, 1.0)
        pyro.sample("x", dist.Normal(h + self.last(at), 1.0).to_event(1), obs=torch.zeros(9, dtype=self.dtype))


class TwoCoins(Params):
    def __init__(self, dtype):
        super().__init__()
        self.logits = nn.Parameter(torch.randn(2, dtype=dtype))

    def forward(self):
        pyro.sample("z", dist.Bernoulli(logits=self.logits).to_event(1))


def probe(last, seed, dtype, steps=1):
    torch.manual_seed(seed)
    loss = SiteELBO("rebar", num_particles=1)(Shaped(last(torch.rand(()).item()), dtype), TwoCoins(dtype))
    for _ in range(steps):
        loss()


CONTINUOUS = {
    "kinks": lambda c: lambda z: 0.0,
    "a late kink": lambda c: lambda z: 30 * torch.relu(z - 0.98 * c)[..., None],
    "steep": lambda c: lambda z: torch.sigmoid(1e4 * (z - 0.1 - 0.8 * c))[..., None],
    "steep at several": lambda c: lambda z: sum(torch.sigmoid(200 * (z - c * k / 4)) for k in (1, 2, 3))[..., None],
}
BROKEN = {
    "jump": lambda c: lambda z: (z > 0.05 + 0.9 * c).to(z.dtype)[..., None],
    "jumps": lambda c: lambda z: ((7 + c) * z).round()[..., None] / 4,
    "no derivative": lambda c: lambda z: (1 + c) * z.detach()[..., None],
    "half a derivative": lambda c: lambda z: (1 + c) * (z + z.detach())[..., None],
}


@pytest.mark.parametrize("dtype", [torch.float32, F64])
@pytest.mark.parametrize("last", CONTINUOUS)
def test_no_kink_and_no_slope_is_taken_for_a_jump(last, dtype):
    for seed in range(10):
        probe(CONTINUOUS[last], seed, dtype)


@pytest.mark.parametrize("seed", [20112, 20113, 20130, 20133, 20135])
def test_a_network_of_many_kinks_is_continuous(seed):
    torch.manual_seed(seed)
    model = BernoulliVAE((1, 3, 3), num_latents=2, hidden=(6,)).double()
    loss = SiteELBO("rebar")(model, BernoulliGuide(model).double())
    for _ in range(2):
        assert loss((torch.rand(2, 1, 3, 3) > 0.5).double()).isfinite()


@pytest.mark.parametrize("dtype", [pytest.param(torch.float32, marks=pytest.mark.slow), F64])
@pytest.mark.parametrize("last", BROKEN)
def test_a_jump_among_kinks_is_found(last, dtype):
    for seed in range(4):
        with pytest.raises(UnsupportedSite, match="not continuous"):
            probe(BROKEN[last], seed, dtype, steps=8)


def test_a_site_downstream_that_cannot_be_relaxed_is_refused():
    for word in ("rebar", "muprop"):
        loss = SiteELBO({"y": word, "c": "score"})(DiceModel(), DiceGuide())
        with pytest.raises(UnsupportedSite, match="'c'.*relax"):
            loss()
    SiteELBO({"y": "relax", "c": "score"})(DiceModel(), DiceGuide())().backward()
    for word in ("rebar", "relax"):
        with pytest.raises(UnsupportedSite, match="OneHotCategorical or Bernoulli"):
            SiteELBO({"y": "score", "c": word})(DiceModel(), DiceGuide())()


@pytest.mark.parametrize("word", ["rebar", "relax", "muprop", "gumbel-rao", "reinmax"])
@pytest.mark.parametrize("dtype", [torch.float32, F64])
@pytest.mark.parametrize("particles", [1, 3])
def test_extreme_logits_stay_finite(word, dtype, particles):
    class Guide(pyro.nn.PyroModule):
        def __init__(self):
            super().__init__()
            self.a = nn.Parameter(torch.tensor([90.0, -90.0, 0.0, -1e3], dtype=dtype))
            self.b = nn.Parameter(torch.tensor([200.0, 0.0, -math.inf], dtype=dtype))

        def forward(self):
            pyro.sample("z", dist.Bernoulli(logits=self.a).to_event(1))
            pyro.sample("y", dist.OneHotCategorical(logits=self.b))

    def model():
        z = pyro.sample("z", dist.Bernoulli(logits=torch.zeros(4, dtype=dtype)).to_event(1))
        y = pyro.sample("y", dist.OneHotCategorical(logits=torch.zeros(3, dtype=dtype)))
        pyro.sample("x", dist.Normal(z.sum(-1) + y[..., 0], 1.0), obs=torch.tensor(0.3, dtype=dtype))

    loss = SiteELBO(word, num_particles=particles)(model, Guide())
    loss.initialize()
    for _ in range(3):
        value = loss()
        value.backward()
        assert value.dtype == dtype and value.isfinite()
    assert all(p.grad is None or p.grad.isfinite().all() for p in loss.parameters())


def test_bad_options_are_refused():
    for make in (lambda: Rebar(temperature=0.0), lambda: Relax(temperature=lambda step: 1.0)):
        with pytest.raises(BadInput, match="temperature"):
            make()


@pytest.mark.parametrize("word", ["nvil", "relax", "rebar"])
def test_a_single_cost_has_no_spread_and_is_no_reason_to_leap(word):
    """The first step of one particle at one site without plates: what is learnt gets a slope of ordinary size."""

    def model():
        z = pyro.sample("z", dist.Bernoulli(torch.tensor(0.5, dtype=torch.float64)))
        pyro.sample("x", dist.Normal(z, 1.0), obs=torch.tensor(20.0, dtype=torch.float64))

    class Guide(pyro.nn.PyroModule):
        def __init__(self):
            super().__init__()
            self.logit = torch.nn.Parameter(torch.tensor(0.3, dtype=torch.float64))

        def forward(self):
            pyro.sample("z", dist.Bernoulli(logits=self.logit))

    guide = Guide()
    loss = SiteELBO(word)(model, guide).initialize()
    for _ in range(3):
        loss.zero_grad()
        loss().backward()
        learnt = [p.grad for p in loss.parameters() if p is not guide.logit and p.grad is not None]
        assert learnt and all(grad.abs().max() < 1e3 for grad in learnt)
