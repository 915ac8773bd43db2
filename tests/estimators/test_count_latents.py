"""Count latents under every estimator that serves them: exact means over all counts, and what becomes of the tail."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pyro
import pyro.distributions as dist
import pytest
import torch
from programs import F64, Params, gradient
from torch import nn

from gumbo.errors import GumboWarning, UnsupportedSite
from gumbo.inference import SiteELBO, audit, diagnose, evaluate, to_arviz
from gumbo.inference.engine.looks import refusals
from gumbo.inference.estimators import HeadTail, TruncatedEnumerate, estimators
from gumbo.inference.estimators.truncated import own_log_prob

OBSERVED = torch.tensor([2.3, 0.4], dtype=F64)


def family(name, a):
    """A count with few large values, of a real parameter."""
    p = torch.sigmoid(a)
    return {
        "poisson": lambda: dist.Poisson(a.exp()),
        "binomial": lambda: dist.Binomial(4, probs=p),
        "negative binomial": lambda: dist.NegativeBinomial(torch.tensor(3.0, dtype=F64), probs=0.2 * p),
        "geometric": lambda: dist.Geometric(probs=0.75 + 0.2 * p),
        "gamma poisson": lambda: dist.GammaPoisson(a.exp(), torch.tensor(2.0, dtype=F64)),
        "zero-inflated poisson": lambda: dist.ZeroInflatedPoisson(a.exp(), gate=torch.tensor(0.3, dtype=F64)),
        "zero-inflated negative binomial": lambda: dist.ZeroInflatedNegativeBinomial(
            torch.tensor(3.0, dtype=F64), probs=0.2 * p, gate=torch.tensor(0.3, dtype=F64)
        ),
    }[name]()


FAMILIES = [
    "poisson", "binomial", "negative binomial", "geometric", "gamma poisson", "zero-inflated poisson",
    "zero-inflated negative binomial",
]  # fmt: skip


class Model(Params):
    def __init__(self, name):
        super().__init__(w=0.6)
        self.family = name

    def forward(self):
        z = pyro.sample("z", family(self.family, torch.tensor(-0.4, dtype=F64)))
        pyro.sample("x", dist.Normal(self.w * z.sqrt(), 1.0), obs=OBSERVED[0])


class Guide(Params):
    def __init__(self, name):
        super().__init__(a=-0.9)
        self.family = name

    def forward(self):
        pyro.sample("z", family(self.family, self.a))


def pair(name):
    return Model(name), Guide(name)


def log_terms(model, guide, values):
    q = family(guide.family, guide.a).log_prob(values)
    p = family(guide.family, torch.tensor(-0.4, dtype=F64)).log_prob(values)
    return q, p + dist.Normal(model.w * values.sqrt(), 1.0).log_prob(OBSERVED[0]) - q


def counts_of(name, end):
    return torch.arange(5 if name == "binomial" else end, dtype=F64)


def exact(model, guide, end=60):
    q, f = log_terms(model, guide, counts_of(guide.family, end))
    return gradient(-(q.exp() * f).sum(), nn.ModuleList([model, guide]))


def listed_mean(word, model, guide, count, monkeypatch, end=16):
    """The mean gradient over every tuple of ``count`` draws, each put in the sampler's place."""
    loss = SiteELBO(word, num_particles=count, plates="trust")(model, guide)
    loss.initialize()
    loss.eval().initialize()  # each mode is looked at once
    values = counts_of(guide.family, end)
    q = log_terms(model, guide, values)[0].exp().detach()
    both, mean = nn.ModuleList([model, guide]), 0.0
    kind = type(family(guide.family, guide.a))
    for picked in itertools.product(range(len(values)), repeat=count):
        table = values[list(picked)]
        monkeypatch.setattr(kind, "sample", lambda self, shape=(), t=table: t.reshape(self.shape(shape)).clone())
        mean = mean + q[list(picked)].prod() * gradient(loss(), both)
    monkeypatch.undo()
    return mean


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("word", ["score", "score-average", "nvil", "head-tail", "measure-valued", "local-expectation"])
def test_one_draw_has_the_exact_mean_gradient(name, word, monkeypatch):
    model, guide = pair(name)
    if not estimators[word]().supports({"name": "z", "fn": family(name, guide.a)}):
        pytest.skip(f"{word} does not serve {name}")
    if word == "measure-valued":
        pytest.skip("it draws from further distributions: its own tests list them")
    found = listed_mean(word, model, guide, 1, monkeypatch, end=30)
    assert torch.allclose(found, exact(model, guide), rtol=0, atol=1e-9)


@pytest.mark.parametrize("name", FAMILIES)
def test_two_draws_have_the_exact_mean_gradient(name, monkeypatch):
    model, guide = pair(name)
    found = listed_mean("rloo", model, guide, 2, monkeypatch, end=13)
    assert torch.allclose(found, exact(model, guide), rtol=0, atol=1e-5)  # what lies beyond 12 is left out


def test_every_family_is_served_by_the_words_of_counts():
    for name in FAMILIES:
        model, guide = pair(name)
        served = {word for word, reason in refusals(model, guide).items() if not reason}
        assert {"score", "score-average", "nvil", "rloo"} <= served
        assert ("enumerate" in served) == (name == "binomial") != ("head-tail" in served)
        assert ("truncated-enumerate" in served) == ("head-tail" in served)


class _DrawnBaseline(HeadTail):
    """Wrong on purpose: f at the draw is subtracted, which depends on the draw, and the tail vanishes."""

    def surrogate(self, view):
        return super().surrogate(view) + view.sum_event(
            torch.where(view.value >= self.values, 1.0, 0.0) * 0.3 * own_log_prob(view)
        )


class _NoTail(HeadTail):
    """Wrong on purpose: the head alone."""

    def surrogate(self, view):
        return super().surrogate(replace(view, draw=view.draw.map(lambda value: value.clamp(max=self.values - 1))))


@pytest.mark.parametrize("wrong", [_DrawnBaseline, _NoTail])
def test_a_head_without_its_tail_is_caught(wrong, monkeypatch):
    model, guide = pair("poisson")
    model.w.data.fill_(3.0)
    right = listed_mean(HeadTail(2), model, guide, 1, monkeypatch, end=30)
    assert torch.allclose(right, exact(model, guide), rtol=0, atol=1e-9)
    found = listed_mean(wrong(2), model, guide, 1, monkeypatch, end=30)
    assert (found - exact(model, guide)).abs().max() > 1e-3


# The head alone.


@pytest.mark.parametrize("vectorize", [True, False])
@pytest.mark.parametrize("name", [name for name in FAMILIES if name != "binomial"])
def test_a_long_head_is_the_whole_and_a_short_one_says_what_it_cuts(name, vectorize):
    model, guide = pair(name)
    both = nn.ModuleList([model, guide])
    whole = SiteELBO(TruncatedEnumerate(40), vectorize_particles=vectorize)(model, guide)
    assert torch.allclose(gradient(whole(), both), exact(model, guide), rtol=0, atol=1e-9)
    assert whole.objective_name == "truncated-elbo"
    short = TruncatedEnumerate(2, tolerance=1.0)
    loss = SiteELBO(short, vectorize_particles=vectorize)(model, guide)
    value = loss()
    q, f = log_terms(model, guide, torch.arange(2.0, dtype=F64))
    head = q.softmax(0)  # the guide, given that the count is 0 or 1
    assert torch.allclose(-value, (head * (f + q - q.log_softmax(0))).sum(), rtol=0, atol=1e-10)
    assert short.cut_mass["z"] == pytest.approx(1 - q.exp().sum().item(), abs=1e-12)
    assert (gradient(value, both) - exact(model, guide)).abs().max() > 1e-4


def test_a_large_cut_is_warned_of_and_the_word_is_called_biased():
    model, guide = pair("poisson")
    with pytest.warns(GumboWarning, match=r"site 'z': truncated-enumerate cuts off 0\.06.* beyond 1: raise"):
        SiteELBO(TruncatedEnumerate(2))(model, guide)()
    assert not estimators["truncated-enumerate"]().unbiased and estimators["head-tail"]().unbiased
    report = audit(
        model, guide, estimators={"cut": TruncatedEnumerate(2, tolerance=1.0), "whole": TruncatedEnumerate(40)},
        num_samples=20, burn_in=0, reference=TruncatedEnumerate(40),
    )  # fmt: skip
    assert report.verdict.sel(estimator="cut").item() == "biased"
    assert not report.unbiased.sel(estimator="cut").item()


def test_what_is_no_endless_count_is_refused():
    def program():
        pyro.sample("z", dist.Normal(0.0, 1.0))

    for word in ("truncated-enumerate", "head-tail"):
        assert "no distribution over the counts" in refusals(program, program)[word]
    model, guide = pair("binomial")
    with pytest.raises(UnsupportedSite, match="are finitely many: take 'enumerate' or 'local-expectation'"):
        SiteELBO("head-tail")(model, guide)()


# Two sites, plates, masks.


class Layered(Params):
    """A count in each row, masked in the second, and another that depends on it."""

    def __init__(self, is_model):
        super().__init__(**({"c": [-0.6, -0.2], "d": 0.3} if is_model else {"a": [-0.1, 0.3], "b": 0.3}))
        self.is_model = is_model

    def forward(self):
        rate, slope = (self.c, self.d) if self.is_model else (self.a, self.b)
        with pyro.plate("data", 2), pyro.poutine.mask(mask=torch.tensor([True, False])):
            z = pyro.sample("z", dist.Poisson(rate.exp()))
            y = pyro.sample("y", dist.Geometric(logits=1.5 + slope * z))
            if self.is_model:
                pyro.sample("x", dist.Normal(z.sqrt() + 0.5 * y, 1.0), obs=OBSERVED)


def test_the_tail_is_drawn_without_bias_at_two_dependent_sites():
    """z-tests against a long head: 6 elements, |z| < 4.5, a family-wise error rate below 5e-5."""
    torch.manual_seed(2)
    model, guide = Layered(True), Layered(False)
    both = nn.ModuleList([model, guide])
    truth = gradient(SiteELBO(TruncatedEnumerate(25))(model, guide)(), both)
    loss = SiteELBO(HeadTail(2), num_particles=150)(model, guide)
    draws = torch.stack([gradient(loss(), both) for _ in range(60)])
    error = draws.std(0) / len(draws) ** 0.5
    z = (draws.mean(0) - truth)[error > 0] / error[error > 0]
    assert z.abs().max() < 4.5 and (error > 0).sum() >= 3


# Afterwards.


def test_a_posterior_of_counts_is_drawn_evaluated_and_diagnosed():
    class Rows(Params):
        def __init__(self, is_model):
            super().__init__(a=[0.2, 0.5, -0.3, 0.1, 0.0, 0.4])
            self.is_model = is_model

        def forward(self, x):
            with pyro.plate("data", len(x)):
                rate = torch.ones((), dtype=F64) if self.is_model else self.a.exp()
                z = pyro.sample("z", dist.Poisson(rate))
                if self.is_model:
                    pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    x = torch.tensor([0.1, 2.0, 0.4, 1.1, 0.8, 1.9], dtype=F64)
    model, guide = Rows(True), Rows(False)
    idata = to_arviz(model, guide, x, num_samples=50)
    drawn = idata.posterior["z"].values
    assert drawn.shape == (1, 50, 6) and (drawn == drawn.round()).all() and (drawn >= 0).all()
    counts = torch.arange(60, dtype=F64)
    evidence = (dist.Poisson(torch.ones((), dtype=F64)).log_prob(counts) + dist.Normal(counts, 1.0).log_prob(
        x[:, None])).logsumexp(1).mean().item()  # fmt: skip
    found = evaluate(model, guide, x, num_samples=2000)
    assert found.elbo < evidence + 0.05 and found.log_evidence == pytest.approx(evidence, abs=0.05)
    assert diagnose(model, guide, x, num_samples=200) is not None
