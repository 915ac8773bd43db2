"""Every registered word on two dependent sites, masked rows and a subsampled plate: one meaning in either mode."""

from __future__ import annotations

import functools
import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from programs import F64, gradient
from pyro.nn import PyroModule
from torch import nn
from word_programs import KINDS, SHORTER, cells, pair, rows, said, width

from gumbo.errors import UnsupportedSite
from gumbo.inference import Auto, SiteELBO
from gumbo.inference.estimators import ScoreFunction, estimators

X = rows(3)
COUNT = 24
BOUND = 8.0  # standard errors: with 23 degrees of freedom 5e-8 a number, of which there are 20 in each of 200 means
LIST = {"poisson": "truncated-enumerate(values=8)", "negative binomial": "truncated-enumerate(values=8)"}
LIST["geometric"] = LIST["poisson"]


def draws(loss, both, count):
    loss.initialize(X)
    for _ in range(2):
        loss(X)
    loss.eval()
    return torch.stack([gradient(loss(X), both) for _ in range(count)])


@functools.cache
def truth(kind):
    """The mean gradient and its standard error: a sum over every value, or many draws along the path."""
    model, guide = pair(kind)
    both = nn.ModuleList([model, guide])
    if kind in ("gamma", "normals"):
        with torch.random.fork_rng():
            torch.manual_seed(5)
            found = draws(SiteELBO("pathwise", num_particles=500)(model, guide), both, 40)
        return found.mean(0), found.std(0) / math.sqrt(len(found))
    exact = gradient(SiteELBO(LIST.get(kind, "enumerate"))(model, guide)(X), both)
    return exact, torch.zeros_like(exact)


def far(mean, error, other, others_error) -> float:
    """The largest distance in standard errors, none of which is taken for less than a fifth of the usual one.

    An element that few draws move may have an error of its own that is far too small.
    """
    usual = (error.square() + others_error.square()).mean().sqrt()
    floor = 1e-4 * (1 + other.abs()) + 0.2 * usual
    return ((mean - other).abs() / (error.square() + others_error.square() + floor.square()).sqrt()).max().item()


def both_ways(make, kind, **options):
    """Mean gradients and their errors: 24 draws, of many particles at once and of two in turn."""
    model, guide = pair(kind)
    both, found = nn.ModuleList([model, guide]), []
    for particles, vectorize in ((40, True), (2, False)):
        torch.manual_seed(3)
        loss = SiteELBO(make(), num_particles=particles, vectorize_particles=vectorize, **options)(model, guide)
        each = draws(loss, both, COUNT)
        assert each.isfinite().all() and each.abs().max(0).values.min() > 0, "a parameter without a gradient"
        found.append((each.mean(0), each.std(0) / math.sqrt(COUNT)))
    return found


def params(enumerates=False):
    for word, kind, quick in cells():
        if estimators[word]().enumerates == enumerates:
            yield pytest.param(word, kind, id=f"{word}-{kind}", marks=() if quick else pytest.mark.slow)


@pytest.mark.parametrize("word, kind", list(params()))
def test_masks_subsamples_and_dependent_sites_have_one_meaning_either_way(word, kind):
    at_once, in_turn = both_ways(lambda: said(word), kind)
    assert far(*at_once, *in_turn) < BOUND
    estimator = estimators[word]()
    if estimator.unbiased and estimator.objective_name() == "elbo":
        for found in (at_once, in_turn):
            assert far(*found, *truth(kind)) < BOUND


@pytest.mark.parametrize("word, kind", list(params(enumerates=True)))
def test_sums_over_masked_and_subsampled_rows_are_the_same_either_way(word, kind):
    """One by one, rows are listed jointly, so that there are two of them; where even these are too many it is said."""
    model, guide = pair(kind)
    both, found = nn.ModuleList([model, guide]), []
    for vectorize in (True, False):
        loss = SiteELBO(said(word), vectorize_particles=vectorize)(model, guide)
        try:
            found.append(gradient(loss(X[:2]), both))
        except UnsupportedSite as refusal:
            assert (kind, vectorize) == ("binomial", False) and "more than the limit" in str(refusal)
            return
    assert found[0].abs().min() > 0 and torch.allclose(*found, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("vectorize", [True, False])
def test_auto_chooses_where_rows_are_masked_and_subsampled(vectorize):
    model, guide = pair("coins")
    chooser = Auto(draws=8, candidates=["score", "rloo"], quiet=True)
    elbo = SiteELBO(chooser, num_particles=40 if vectorize else 2, vectorize_particles=vectorize)
    found = draws(elbo(model, guide), nn.ModuleList([model, guide]), COUNT)
    assert elbo.choice.words == {"z": "rloo", "y": "rloo"}
    assert far(found.mean(0), found.std(0) / math.sqrt(COUNT), *truth("coins")) < BOUND


OBJECTIVES = {
    "renyi": {"objective": "renyi", "alpha": 0.5},
    "renyi at order 1": {"objective": "renyi", "alpha": 1.0},
    "log-variance+elbo": {"objective": "log-variance+elbo"},
}


@pytest.mark.parametrize("kind", ["coins", "poisson"])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_objectives_have_one_meaning_either_way(name, kind):
    make = (lambda: "default") if name == "log-variance+elbo" else (lambda: "rloo")
    at_once, in_turn = both_ways(make, kind, **OBJECTIVES[name])
    if name == "renyi":  # K is part of what is estimated
        model, guide = pair(kind)
        torch.manual_seed(4)
        loss = SiteELBO("rloo", num_particles=2, vectorize_particles=True, **OBJECTIVES[name])(model, guide)
        each = draws(loss, nn.ModuleList([model, guide]), COUNT)
        assert far(each.mean(0), each.std(0) / math.sqrt(COUNT), *in_turn) < BOUND
    else:
        for found in (at_once, in_turn):
            assert far(*found, *truth(kind)) < BOUND


class Shrunk(ScoreFunction):
    """Wrong on purpose: a quarter of the gradient is lost."""

    def __init__(self):
        super().__init__(baseline=estimators["rloo"]().baseline)

    min_particles = 2

    def surrogate(self, view):
        return 0.75 * super().surrogate(view)


@pytest.mark.parametrize("kind", ["coins", "poisson"])
def test_a_quarter_less_of_the_gradient_would_be_seen(kind):
    model, guide = pair(kind)
    for estimator, wrong in (("rloo", False), (Shrunk(), True)):
        torch.manual_seed(3)
        each = draws(SiteELBO(estimator, num_particles=200)(model, guide), nn.ModuleList([model, guide]), COUNT)
        assert (far(each.mean(0), each.std(0) / math.sqrt(COUNT), *truth(kind)) > BOUND) == wrong


class Narrow(PyroModule):
    """Parameters of one width; products of elements, unlike those of matrices, take numbers of another width too."""

    def __init__(self, kind, name, dtype):
        super().__init__()
        self.kind = kind
        self.own = nn.ParameterDict({name: torch.full((2, width(kind)), 0.3, dtype=dtype)})

    def latents(self):
        (own,) = self.own.values()
        z = pyro.sample("z", KINDS[self.kind](own[0]))
        return own, z, pyro.sample("y", KINDS[self.kind](own[1] * torch.tanh(z)))


class NarrowGuide(Narrow):
    def forward(self):
        self.latents()


class NarrowModel(Narrow):
    def forward(self):
        own, z, y = self.latents()
        pyro.sample("x", dist.Normal((own[0] * z + own[1] * y).sum(-1), 1.0), obs=torch.tensor(0.4, dtype=own.dtype))


def first_kinds():
    """Each word of the ELBO on the first kind of site that it serves."""
    return dict(reversed([(word, kind) for word, kind, _ in cells()]))


@pytest.mark.parametrize("vectorize", [True, False])
@pytest.mark.parametrize("dtypes", [(F64, torch.float32), (torch.float32, F64)], ids=["narrow guide", "narrow model"])
@pytest.mark.parametrize("word, kind", list(first_kinds().items()))
def test_model_and_guide_may_have_floats_of_two_widths(word, kind, dtypes, vectorize):
    model, guide = NarrowModel(kind, "decoder", dtypes[0]), NarrowGuide(kind, "encoder", dtypes[1])
    with torch.random.fork_rng():
        torch.manual_seed(3)
        loss = SiteELBO(said(word), vectorize_particles=vectorize)(model, guide)
        loss.initialize()
        loss().backward()
    for parameter in (*model.parameters(), *guide.parameters()):
        assert parameter.grad.isfinite().all()


@pytest.mark.parametrize("word, kind", list(first_kinds().items()))
def test_a_loss_of_which_nothing_learns_has_a_value(word, kind):
    with torch.random.fork_rng():
        torch.manual_seed(3)
        loss = SiteELBO(said(word))(*pair(kind))
        loss.initialize(X)
        loss.requires_grad_(False)
        assert loss(X).isfinite()


def test_every_word_of_the_elbo_is_enrolled():
    enrolled = {word for word, _, _ in cells()}
    assert enrolled == {word for word, make in estimators.items() if "elbo" in make().objectives}
    assert set(SHORTER) <= enrolled
