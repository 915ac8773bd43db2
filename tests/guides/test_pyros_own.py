"""Pyro's guides that run the model, join sites or mix parts: served wherever a guide is taken."""

from __future__ import annotations

import logging

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.contrib.easyguide import EasyGuide
from pyro.contrib.zuko import ZukoToPyro
from pyro.infer import Trace_ELBO, TraceEnum_ELBO
from pyro.infer.autoguide import (
    AutoDelta,
    AutoDiscreteParallel,
    AutoGuideList,
    AutoHierarchicalNormalMessenger,
    AutoMultivariateNormal,
    AutoNormal,
    AutoNormalMessenger,
    AutoRegressiveMessenger,
    AutoStructured,
)
from pyro.poutine import block
from pyroapi import pyro as named
from torch import nn

from gumbo.errors import BadInput, UnsupportedSite
from gumbo.inference import SiteELBO, audit, diagnose, evaluate, fit, predict, to_arviz

T = torch.linspace(-1.0, 1.0, 8).double()
Y = 1.5 * T + 0.2


@pytest.fixture(autouse=True)
def doubles(param_store, caplog):
    """In double precision, and without Pyro's remarks on plates."""
    caplog.set_level(logging.WARNING)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


def line(t, y=None):
    tau = pyro.sample("tau", dist.LogNormal(0.0, 0.5))
    pyro.deterministic("twice", 2 * tau)
    w = pyro.sample("w", dist.Normal(torch.zeros(2), tau.unsqueeze(-1)).to_event(1))
    pyro.factor("soft", -(w**2).sum(-1))
    with pyro.plate("data", len(t)):
        pyro.sample("y", dist.Normal(w[..., 0] * t + w[..., 1], 1.0), obs=y)


def gated(t, y=None):
    k = pyro.sample("k", dist.Bernoulli(0.5))
    w = pyro.sample("w", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(t)):
        pyro.sample("y", dist.Normal(w * t + k, 0.5), obs=y)


class Easy(EasyGuide):
    def __init__(self, model):
        super().__init__(model)
        self.loc, self.log_scale = nn.Parameter(torch.zeros(3)), nn.Parameter(torch.full((3,), -1.0))

    def guide(self, t, y=None):
        group = self.group(match="tau|w")
        group.sample("both", dist.Normal(self.loc, self.log_scale.exp()).to_event(1))


class EasyParts(EasyGuide):
    def __init__(self, model):
        super().__init__(model)
        self.loc = nn.Parameter(torch.zeros(2))

    def guide(self, t, y=None):
        self.map_estimate("tau")
        pyro.sample("w", dist.Normal(self.loc, 0.3).to_event(1))


class Part(pyro.nn.PyroModule):
    def __init__(self):
        super().__init__()
        self.loc = nn.Parameter(torch.zeros(2))

    def forward(self, t, y=None):
        return {"w": pyro.sample("w", dist.Normal(self.loc, 0.3).to_event(1))}


def listed(model, *parts):
    guide = AutoGuideList(model)
    for part in parts:
        guide.append(part)
    return guide


GUIDES = {
    "AutoNormalMessenger": (line, AutoNormalMessenger),
    "AutoHierarchicalNormalMessenger": (line, AutoHierarchicalNormalMessenger),
    "AutoRegressiveMessenger": (line, AutoRegressiveMessenger),
    "AutoStructured": (line, AutoStructured),
    "AutoStructured with dependencies": (
        line,
        lambda model: AutoStructured(
            model, conditionals={"tau": "normal", "w": "mvn"}, dependencies={"w": {"tau": "linear"}}
        ),
    ),
    "a list of two families": (
        line,
        lambda model: listed(
            model, AutoNormal(block(model, expose=["tau"])), AutoMultivariateNormal(block(model, expose=["w"]))
        ),
    ),
    "a list with a point": (
        line,
        lambda model: listed(model, AutoDelta(block(model, expose=["tau"])), AutoNormal(block(model, expose=["w"]))),
    ),
    "a list with a program": (line, lambda model: listed(model, AutoNormal(block(model, expose=["tau"])), Part())),
    "a list with a messenger": (
        line,
        lambda model: listed(
            model, AutoNormalMessenger(block(model, expose=["tau"])), AutoNormal(block(model, expose=["w"]))
        ),
    ),
    "a list with a discrete part": (
        gated,
        lambda model: listed(
            model, AutoNormal(block(model, expose=["w"])), AutoDiscreteParallel(block(model, expose=["k"]))
        ),
    ),
    "EasyGuide": (line, Easy),
    "EasyGuide in parts": (line, EasyParts),
}


def values(loss, guide, runs: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Losses and gradients (all parameters together) of so many calls."""
    found, slopes = [], []
    parameters = [parameter for parameter in guide.parameters() if parameter.requires_grad]
    for _ in range(runs):
        value = loss(T, Y)
        found.append(value.detach())
        slopes.append(torch.cat([g.flatten() for g in torch.autograd.grad(value, parameters)]))
    return torch.stack(found), torch.stack(slopes)


@pytest.mark.parametrize(("model", "make"), GUIDES.values(), ids=GUIDES)
def test_value_and_gradient_have_the_mean_of_pyros_own_elbo(model, make):
    torch.manual_seed(0)
    guide = make(model)
    guide(T, Y)
    with torch.no_grad():
        for parameter in guide.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    stock = TraceEnum_ELBO if model is gated else Trace_ELBO
    theirs = stock(num_particles=40, vectorize_particles=True, max_plate_nesting=1)(model, guide)
    ours = SiteELBO(num_particles=40)(model, guide).initialize(T, Y)
    runs = 40
    for one, other in zip(values(ours, guide, runs), values(theirs, guide, runs), strict=True):
        error = ((one.var(0) + other.var(0)) / runs).sqrt()
        assert (error < 0.5).all()  # else nothing would be found out
        assert ((one.mean(0) - other.mean(0)).abs() <= 4.5 * error + 1e-9).all()


@pytest.mark.parametrize(("model", "make"), GUIDES.values(), ids=GUIDES)
def test_fit_evaluate_to_arviz_and_predict_take_it(model, make):
    torch.manual_seed(0)
    guide = make(model)
    before = fit(model, guide, (T, Y), epochs=1, lr=0.05, progress=False).history[0]["elbo"]
    after = fit(model, guide, (T, Y), epochs=40, lr=0.05, progress=False).history
    assert sum(numbers["elbo"] for numbers in after[-10:]) / 10 > before
    judged = evaluate(model, guide, (T, Y), num_samples=200)
    stock = TraceEnum_ELBO if model is gated else Trace_ELBO
    elbo = -stock(num_particles=2000, vectorize_particles=True, max_plate_nesting=1)(model, guide)(T, Y).item() / len(T)
    assert abs(judged.elbo - elbo) < 6 * judged.elbo_mc_se + 1e-6
    drawn = to_arviz(model, guide, T, Y, num_samples=20, groups=["posterior"]).posterior
    assert set(drawn) == ({"k", "w"} if model is gated else {"tau", "w", "twice"})
    rows = T[:3] + 5
    if hasattr(guide, "get_posterior"):
        with pytest.raises(BadInput, match="only the shape counts"):
            predict(model, guide, rows, num_samples=5)
        assert not hasattr(guide.locs, "y")
        rows = (rows, torch.zeros(3))
    assert predict(model, guide, rows, num_samples=5).predictions["y"].shape == (1, 5, 3)


@pytest.mark.parametrize("name", ["AutoNormalMessenger", "AutoStructured", "a list of two families", "EasyGuide"])
def test_diagnose_and_audit_take_it(name):
    torch.manual_seed(0)
    model, make = GUIDES[name]
    guide = make(model)
    fit(model, guide, (T, Y), epochs=100, lr=0.05, progress=False)
    report = diagnose(model, guide, T, Y, num_samples=200, num_simulations=20, refine_steps=2)
    assert report.verdicts
    table = audit(model, guide, T, Y, estimators=["pathwise", "trace"], num_samples=100)
    assert set(table["estimator"].values) >= {"pathwise", "trace"}


def test_a_messenger_guide_has_parameters_per_datum_too():
    def local(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    guide = AutoNormalMessenger(local)
    fit(local, guide, T, epochs=2, batch_size=8, progress=False)
    assert evaluate(local, guide, T, num_samples=5).num_data == 8
    for rows in (T, T[:3]):
        with pytest.raises(BadInput, match="parameters per datum"):
            predict(local, guide, rows, num_samples=5)
    with pytest.raises(BadInput, match="each row"):
        fit(local, AutoNormalMessenger(local), T, epochs=1, batch_size=4, progress=False)


def test_what_cannot_be_served_is_one_line_with_what_would_do():
    guide = AutoRegressiveMessenger(line)
    with pytest.raises(UnsupportedSite, match="would do: pathwise, rloo") as found:
        fit(line, guide, (T, Y), loss="disarm", progress=False)
    assert "\n" not in str(found.value)

    class Loose(EasyGuide):
        def guide(self, t, y=None):
            loc = pyro.param("loc", torch.zeros(3))
            self.group(match=".*").sample("all", dist.Normal(loc, 0.1).to_event(1))

    with pytest.raises(BadInput, match="PyroParam") as found:  # torch's idiom; fit and SVI take it as it is
        SiteELBO()(line, Loose(line))(T, Y)
    assert "\n" not in str(found.value)
    assert fit(line, Loose(line), (T, Y), epochs=1, progress=False).epochs == 1


class Coded(nn.Module):
    """A code of which a law, of the prior or the guide, has no draw but by its call, and no support."""

    def __init__(self, wrapped):
        super().__init__()
        self.wrapped, self.loc, self.prior_loc = wrapped, nn.Parameter(torch.zeros(2)), nn.Parameter(torch.ones(2))

    def law(self, part, loc):
        if self.wrapped == part:
            return ZukoToPyro(torch.distributions.Independent(torch.distributions.Normal(loc, 0.5), 1))
        return dist.Normal(loc, 0.5).to_event(1)

    def model(self, y):
        pyro.module("prior", self)
        with pyro.plate("data", len(y)):
            z = pyro.sample("z", self.law("prior", self.prior_loc))
            pyro.sample("y", dist.Normal(z.sum(-1), 1.0), obs=y)

    def guide(self, y):
        pyro.module("prior", self)
        with pyro.plate("data", len(y)):
            pyro.sample("z", self.law("guide", self.loc + y[:, None]))


@pytest.mark.parametrize("wrapped", ["prior", "guide"])
def test_a_law_that_draws_by_its_call_alone_is_served(wrapped):
    """Pyro's wrapper of zuko's flows: it had no draw under any word, and no posterior as a prior."""
    found = []
    for parts in (Coded(None), Coded(wrapped)):
        for word in ("default", "stl", "score", "rloo"):
            pyro.clear_param_store()
            pyro.set_rng_seed(3)
            loss = SiteELBO(word, num_particles=2).differentiable_loss(parts.model, parts.guide, Y)
            found.append(torch.cat([loss.detach().reshape(1), *torch.autograd.grad(loss, list(parts.parameters()))]))
        pyro.set_rng_seed(3)
        found.append(torch.tensor([evaluate(parts.model, parts.guide, Y, num_samples=20).elbo] * 5))
        to_arviz(parts.model, parts.guide, Y, num_samples=20)
    assert torch.allclose(torch.stack(found[:5]), torch.stack(found[5:]), rtol=1e-9)


@pytest.mark.parametrize(
    "use",
    [
        lambda model, guide: SiteELBO().loss(model, guide, Y),
        lambda model, guide: fit(model, guide, Y, epochs=1, progress=False),
        lambda model, guide: evaluate(model, guide, Y),
    ],
)
def test_an_autoguide_that_cannot_be_built_says_the_same_when_used_again(use):
    """Pyro takes it for built after the first call, and the second missed a parameter."""

    def model(y):
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Normal(0.0, 1.0), obs=y)

    guide = AutoMultivariateNormal(model)
    for _ in range(2):
        with pytest.raises((RuntimeError, BadInput), match="found no latent variables"):
            use(model, guide)


def test_a_guide_may_close_over_what_has_no_value_or_no_attributes():
    """Autoguides are looked for among the values of its names: pyroapi raises for any attribute it lacks."""

    def guide(t, y):
        if t is None:
            return later
        with named.plate("data", len(y)):
            return named.sample("z", dist.Normal(0.0, 1.0))

    if Y is None:
        later = None

    def model(t, y):
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Normal(pyro.sample("z", dist.Normal(0.0, 1.0)), 1.0), obs=y)

    assert SiteELBO().loss(model, guide, T, Y) > 0 > evaluate(model, guide, (T, Y), num_samples=20).elbo
