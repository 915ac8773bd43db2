"""Local expectations and measure-valued derivatives against exact gradients: coordinates changed one at a time."""

from __future__ import annotations

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from exact_means import exact_gradient, is_unbiased, mean_gradient
from programs import COINS, DISCRETE, F64, DiceGuide, DiceModel, Params, PlateModel, X, gradient
from ztest import misses

from gumbo.errors import BadInput, UnsupportedSite
from gumbo.inference import SiteELBO
from gumbo.inference.estimators import LocalExpectation, MeasureValued, _coordinates, measure_valued


def cells():
    for word, names in (("local-expectation", [*COINS, "dice"]), ("measure-valued", COINS)):
        for name in names:
            for vectorize in (False,) if DISCRETE[name].branches else (True, False):
                yield pytest.param(name, word, vectorize, id=f"{name}-{word}-{'vec' if vectorize else 'seq'}")


@pytest.mark.parametrize("name, word, vectorize", list(cells()))
def test_the_mean_over_every_tuple_of_draws_is_the_exact_gradient(name, word, vectorize):
    model, guide = DISCRETE[name].make()
    assert is_unbiased(word, model, guide, vectorize_particles=vectorize)


# Programs that join what a plate keeps apart.


class PlateGuide2(Params):
    """Coins in two plates, and, if asked, one for each row that depends on all of its row."""

    def __init__(self, tail=False):
        super().__init__(a=[[0.4, -0.7], [0.2, 1.1]], b=-0.3, c=2.0)
        self.tail = tail

    def forward(self):
        outer, inner = pyro.plate("outer", 2, dim=-2), pyro.plate("inner", 2, dim=-1)
        with outer, inner:
            z = pyro.sample("z", dist.Bernoulli(logits=self.a))
        if self.tail:
            with outer:
                pyro.sample("g", dist.Bernoulli(logits=self.b + self.c * z.mean(-1, keepdim=True)))


class JoiningModel(Params):
    """The likelihood joins the inner plate (``rows``), or both, though every latent of it lies inside."""

    def __init__(self, rows=True, tail=False):
        super().__init__(w=0.9)
        self.rows, self.tail = rows, tail

    def forward(self):
        outer, inner = pyro.plate("outer", 2, dim=-2), pyro.plate("inner", 2, dim=-1)
        with outer, inner:
            z = pyro.sample("z", dist.Bernoulli(logits=torch.tensor(-0.3, dtype=F64)))
        if self.tail:
            with outer:
                g = pyro.sample("g", dist.Bernoulli(logits=torch.tensor(0.2, dtype=F64)))
                pyro.sample("x", dist.Normal(self.w * g, 1.0), obs=X.unsqueeze(-1))
        elif self.rows:
            with outer:
                pyro.sample("x", dist.Normal(self.w * z.prod(-1, keepdim=True), 0.5), obs=X.unsqueeze(-1))
        else:
            both = z.prod(-1, keepdim=True).prod(-2, keepdim=True)
            pyro.factor("f", 3.0 * self.w * (both if both.dim() > 2 else both.reshape(())))


JOINING = {
    "a later coin joins the inner plate": lambda: (JoiningModel(tail=True), PlateGuide2(tail=True)),
    "the likelihood joins the inner plate": lambda: (JoiningModel(), PlateGuide2()),
    "a factor joins both plates": lambda: (JoiningModel(rows=False), PlateGuide2()),
}


def joining_cells():
    for name in JOINING:
        for word in ("local-expectation", "measure-valued"):
            for vectorize in (True, False):
                yield pytest.param(name, word, vectorize, id=f"{name}-{word}-{'vec' if vectorize else 'seq'}")


@pytest.mark.parametrize("name, word, vectorize", list(joining_cells()))
def test_elements_that_a_later_statement_joins_are_changed_one_at_a_time(name, word, vectorize):
    model, guide = JOINING[name]()
    words = {"z": word, "*": "enumerate"}  # the later coin, if there is one: listing its draws takes too long
    assert is_unbiased(words, model, guide, vectorize_particles=vectorize)


def changed_together(monkeypatch):
    kept = _coordinates.gains

    def gains(view, *rest):
        view.find_joined = tuple
        return kept(view, *rest)

    monkeypatch.setattr(measure_valued, "gains", gains)


@pytest.mark.parametrize("make", [DISCRETE["plate then global"].make, *JOINING.values()])
def test_changing_joined_elements_together_fails_the_same_test(make, monkeypatch):
    model, guide = make()
    words = {"z": "measure-valued", "*": "enumerate"}
    assert is_unbiased(words, model, guide)
    changed_together(monkeypatch)
    assert not is_unbiased(words, model, guide)


@pytest.mark.parametrize("name, runs", [("plate", 1), ("global then plate", 1), ("plate then global", 2)])
def test_a_plate_costs_one_run_a_value_unless_it_is_joined(name, runs, monkeypatch):
    counts = []
    kept = _coordinates.Draw
    monkeypatch.setattr(_coordinates, "Draw", lambda value: counts.append(len(value)) or kept(value))
    model, guide = DISCRETE[name].make()
    words = {"z": "local-expectation", "*": "score"}
    SiteELBO(words, num_particles=3)(model, guide)()
    assert counts == [runs]


class WideGuide(Params):
    """70 coins, more than are laid out at once; where they are independent the likelihood is nearly so too."""

    def __init__(self):
        super().__init__(a=0.4)

    def forward(self):
        pyro.sample("z", dist.Bernoulli(logits=self.a.expand(70)).to_event(1))


@pytest.mark.parametrize("word", ["local-expectation", "measure-valued"])
def test_many_coordinates_come_in_pieces(word):
    """A likelihood linear in the coins: every draw gives the same gradient, Σᵢ p(1 − p)(wᵢ − log odds + prior's)."""

    def model():
        z = pyro.sample("z", dist.Bernoulli(logits=torch.zeros(70, dtype=F64)).to_event(1))
        pyro.factor("f", (z * torch.arange(70, dtype=F64)).sum(-1))

    guide = WideGuide()
    loss = SiteELBO(word, num_particles=3)(model, guide)
    p = torch.tensor(0.4, dtype=F64).sigmoid().item()
    expected = -p * (1 - p) * (sum(range(70)) - 70 * 0.4)
    assert gradient(loss(), guide).item() == pytest.approx(expected, rel=1e-12)


# One coordinate summed over is exact, whatever the family.


class OneSiteGuide(Params):
    def __init__(self, make, **values):
        super().__init__(**values)
        self.make = make

    def forward(self):
        pyro.sample("z", self.make(self))


class OneSiteModel(Params):
    def __init__(self, prior):
        super().__init__()
        self.prior = prior

    def forward(self):
        z = pyro.sample("z", self.prior)
        weights = torch.tensor([0.3, -1.0, 0.8], dtype=F64)
        total = z @ weights if self.prior.event_shape else z.to(F64)
        pyro.sample("x", dist.Normal(total.sin(), 1.0), obs=X[0])


FINITE = {
    "Bernoulli": (dist.Bernoulli(torch.tensor(0.3, dtype=F64)), lambda g: dist.Bernoulli(logits=g.a), 0.4),
    "Categorical": (
        dist.Categorical(torch.ones(3, dtype=F64) / 3),
        lambda g: dist.Categorical(logits=g.a),
        [0.1, -0.5, 0.3],
    ),
    "OneHotCategorical": (
        dist.OneHotCategorical(torch.ones(3, dtype=F64) / 3),
        lambda g: dist.OneHotCategorical(logits=g.a),
        [0.1, -0.5, 0.3],
    ),
    "Binomial": (
        dist.Binomial(4, torch.tensor(0.3, dtype=F64)),
        lambda g: dist.Binomial(4, logits=g.a),
        0.4,
    ),
}


@pytest.mark.parametrize("vectorize", [True, False])
@pytest.mark.parametrize("family", FINITE)
def test_one_coordinate_is_exact_at_every_draw(family, vectorize):
    prior, make, start = FINITE[family]
    model, guide = OneSiteModel(prior), OneSiteGuide(make, a=start)
    loss = SiteELBO("local-expectation", num_particles=2, vectorize_particles=vectorize)(model, guide)
    exact = exact_gradient(model, guide)
    for _ in range(5):
        assert torch.allclose(gradient(loss(), guide), exact, rtol=0, atol=1e-12)


def test_a_value_that_cannot_be_drawn_counts_for_nothing():
    model = OneSiteModel(dist.Categorical(torch.tensor([0.5, 0.5, 0.0], dtype=F64)))
    start = [0.1, -0.5, -math.inf]
    guide = OneSiteGuide(lambda g: dist.Categorical(logits=g.a), a=start)
    found = gradient(SiteELBO("local-expectation")(model, guide)(), guide)
    small = OneSiteModel(dist.Categorical(torch.tensor([0.5, 0.5], dtype=F64)))
    exact = exact_gradient(small, OneSiteGuide(lambda g: dist.Categorical(logits=g.a), a=start[:2]))
    assert torch.allclose(found, torch.cat([exact, torch.zeros(1, dtype=F64)]), rtol=0, atol=1e-12)


# Normal and Poisson draws: z-tests at K = 1, where a plate of 2,000 equal elements makes the repetitions.

SIZE = 2000


class NormalGuide(Params):
    """Two coordinates of each datum, and, if asked, a coin that joins all data."""

    def __init__(self):
        super().__init__(m=[0.5, -1.0], s=[-0.3, 0.4])

    def forward(self):
        with pyro.plate("data", SIZE):
            pyro.sample("z", dist.Normal(self.m.expand(SIZE, 2), self.s.exp().expand(SIZE, 2)).to_event(1))


class NormalModel(Params):
    def __init__(self):
        super().__init__(w=0.8)

    def forward(self):
        with pyro.plate("data", SIZE):
            z = pyro.sample("z", dist.Normal(torch.zeros(2, dtype=F64), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(self.w * z.sum(-1), 1.0), obs=torch.tensor(0.7, dtype=F64).expand(SIZE))


def normal_loss(model, guide):
    """−ELBO of one datum up to a constant, by Gaussian integrals."""
    mean, variance = guide.m, (2 * guide.s).exp()
    prior = -(mean.square() + variance).sum() / 2
    data = -((0.7 - model.w * mean.sum()).square() + model.w**2 * variance.sum()) / 2
    return -(prior + data + guide.s.sum())


def normal_draws(estimator, count=60, **options):
    model, guide = NormalModel(), NormalGuide()
    both = torch.nn.ModuleList([model, guide])
    loss = SiteELBO(estimator, **options)(model, guide).initialize()
    return torch.stack([gradient(loss(), both) / SIZE for _ in range(count)]), gradient(normal_loss(model, guide), both)


@pytest.mark.parametrize("vectorize", [True, False])
def test_normal_derivatives_are_unbiased(vectorize):
    """60 draws of 2,000 data: a bias of 0.1 in any of the five parameters would be seen with power 0.99."""
    draws, exact = normal_draws("measure-valued", vectorize_particles=vectorize)
    assert not misses(draws, exact, resolves=0.1)


class NoNegativePart(MeasureValued):
    """Forgets f(μ − σw): the location's derivative keeps its positive half only."""

    def surrogate(self, view):
        kept, view.evaluate = view.evaluate, lambda draw: _without_second(kept(draw), view.cost)
        return super().surrogate(view)


def _without_second(costs, base):
    costs = costs.clone()
    costs[1::3] = base
    return costs


class Flipped(MeasureValued):
    def surrogate(self, view):
        return -super().surrogate(view)


@pytest.mark.parametrize("estimator", [NoNegativePart(), Flipped()], ids=repr)
def test_wrong_normal_derivatives_fail_the_same_test(estimator):
    draws, exact = normal_draws(estimator)
    assert misses(draws, exact, resolves=0.1)


def test_a_scale_alone_or_a_location_alone_may_learn():
    for fixed in ("m", "s"):
        guide = NormalGuide()
        getattr(guide, fixed).requires_grad_(False)
        model = NormalModel()
        loss = SiteELBO("measure-valued")(model, guide).initialize()
        both = torch.nn.ModuleList([model, guide])
        draws = torch.stack([gradient(loss(), both) / SIZE for _ in range(60)])
        assert not misses(draws, gradient(normal_loss(model, guide), both), resolves=0.1)


class PoissonGuide(Params):
    def __init__(self):
        super().__init__(r=0.6)

    def forward(self):
        with pyro.plate("data", SIZE):
            pyro.sample("z", dist.Poisson(self.r.exp().expand(SIZE)))


class PoissonModel(Params):
    def __init__(self):
        super().__init__(w=0.5)

    def forward(self):
        with pyro.plate("data", SIZE):
            z = pyro.sample("z", dist.Poisson(torch.tensor(1.4, dtype=F64)))
            pyro.sample("x", dist.Normal(self.w * z, 1.0), obs=torch.tensor(0.9, dtype=F64).expand(SIZE))


def poisson_loss(model, guide):
    """−ELBO of one datum as a sum over the counts up to 60; what is left out is below 1e-40."""
    z = torch.arange(61, dtype=F64)
    log_q = dist.Poisson(guide.r.exp()).log_prob(z)
    f = dist.Poisson(torch.tensor(1.4, dtype=F64)).log_prob(z)
    f = f + dist.Normal(model.w * z, 1.0).log_prob(torch.tensor(0.9, dtype=F64))
    return -(log_q.exp() * (f - log_q)).sum()


def poisson_draws(estimator):
    model, guide = PoissonModel(), PoissonGuide()
    both = torch.nn.ModuleList([model, guide])
    loss = SiteELBO(estimator)(model, guide).initialize()
    draws = torch.stack([gradient(loss(), both) / SIZE for _ in range(60)])
    return draws, gradient(poisson_loss(model, guide), both)


def test_poisson_derivatives_are_unbiased():
    """60 draws of 2,000 data: a bias of 0.1 would be seen with power 0.99."""
    draws, exact = poisson_draws("measure-valued")
    assert not misses(draws, exact, resolves=0.1)
    assert misses(poisson_draws(Flipped())[0], exact, resolves=0.1)


# Binomial, negative binomial, Geometric and Gamma draws: the same test with the exact answer as a sum or a quadrature.

GRID = torch.linspace(1e-6, 60, 200_001, dtype=F64)
MEASURES = {
    "Binomial": (lambda a: dist.Binomial(5, logits=a), 0.4, torch.arange(6, dtype=F64), 1.0),
    "NegativeBinomial": (lambda a: dist.NegativeBinomial(2.5, logits=a), -0.4, torch.arange(200, dtype=F64), 1.0),
    "Geometric": (lambda a: dist.Geometric(logits=a), 0.3, torch.arange(200, dtype=F64), 1.0),
    "Gamma": (lambda a: dist.Gamma(1.7, a.exp()), 0.3, GRID, (GRID[1] - GRID[0]).item()),
}


class CountedGuide(Params):
    """Two coordinates of each datum, of one parameter."""

    def __init__(self, make, start):
        super().__init__(a=start)
        self.make = make

    def forward(self):
        with pyro.plate("data", SIZE):
            pyro.sample("z", self.make(self.a.expand(SIZE, 2)).to_event(1))


class CountedModel(Params):
    def __init__(self, make):
        super().__init__(w=0.4)
        self.make = make

    def forward(self):
        with pyro.plate("data", SIZE):
            z = pyro.sample("z", self.make(torch.zeros(SIZE, 2, dtype=F64)).to_event(1))
            pyro.factor("f", (self.w * z).sin().sum(-1))


def counted_draws(estimator, family, count=40):
    make, start, values, width = MEASURES[family]
    guide, model = CountedGuide(make, start), CountedModel(make)
    both = torch.nn.ModuleList([model, guide])
    loss = SiteELBO(estimator)(model, guide).initialize()
    draws = torch.stack([gradient(loss(), both) / SIZE for _ in range(count)])
    log_q = make(guide.a).log_prob(values)
    f = make(torch.zeros((), dtype=F64)).log_prob(values) + (model.w * values).sin() - log_q
    return draws, gradient(-2 * width * (log_q.exp() * f).sum(), both)


@pytest.mark.parametrize("family", MEASURES)
def test_derivatives_of_counts_and_of_rates_are_unbiased(family):
    """40 draws of 2,000 data: a bias of 0.2 would be seen with power 0.99."""
    draws, exact = counted_draws("measure-valued", family)
    assert not misses(draws, exact, resolves=0.2)
    assert misses(counted_draws(Flipped(), family)[0], exact, resolves=0.2)


def test_a_law_of_one_failure_too_few_fails_the_same_test(monkeypatch):
    """The law of r failures, where the derivative has that of r + 1."""
    kept = measure_valued.gains

    def at_the_draw(view, alternatives):
        return kept(view, torch.stack([view.value, view.value + 1]))

    monkeypatch.setattr(measure_valued, "gains", at_the_draw)
    draws, exact = counted_draws("measure-valued", "Geometric")
    assert misses(draws, exact, resolves=0.2)


class TrialsGuide(Params):
    def __init__(self):
        super().__init__(a=0.4)

    def forward(self):
        pyro.sample("z", dist.Binomial(3, logits=self.a))


def test_leaving_one_trial_out_is_unbiased_over_every_tuple_of_draws(monkeypatch):
    model = OneSiteModel(dist.Binomial(3, torch.tensor(0.3, dtype=F64)))
    guide = TrialsGuide()

    def sample(self, sample_shape=()):
        values = torch.arange(4, dtype=F64)
        return values[
            dist.Categorical(logits=dist.Binomial(3, logits=self.logits.unsqueeze(-1)).log_prob(values)).sample()
        ]

    monkeypatch.setattr(torch.distributions.Binomial, "sample", sample)

    def coin(turn):
        return lambda probs: torch.where((probs > 0) & (probs < 1), dist.Bernoulli(turn(probs)).sample(), probs)

    monkeypatch.setattr(measure_valued, "coin", coin(lambda probs: probs))
    assert is_unbiased("measure-valued", model, guide, num_particles=1)
    monkeypatch.setattr(measure_valued, "coin", coin(lambda probs: 1 - probs))
    assert not is_unbiased("measure-valued", model, guide, num_particles=1)


@pytest.mark.parametrize(
    "fn, what",
    [
        (dist.Gamma(torch.tensor(2.0, requires_grad=True), 1.0), "concentration"),
        (dist.NegativeBinomial(torch.tensor(2.0, requires_grad=True), 0.5), "total_count"),
        (dist.Beta(2.0, torch.tensor(1.0, requires_grad=True)), "Bernoulli, Poisson, Binomial.* only, not of Beta"),
    ],
    ids=["gamma", "negative binomial", "beta"],
)
def test_derivatives_that_cannot_be_drawn_exactly_are_refused(fn, what):
    def program():
        pyro.sample("z", fn)

    with pytest.raises(UnsupportedSite, match=what):
        SiteELBO("measure-valued")(program, program)()


class NormalThenCoinGuide(Params):
    """Normal draws in a plate, then a coin outside of it that depends on all of them."""

    def __init__(self):
        super().__init__(m=[0.4, -0.7], s=-0.2, b=-0.3, c=2.0)

    def forward(self):
        with pyro.plate("data", 2):
            z = pyro.sample("z", dist.Normal(self.m, self.s.exp()))
        pyro.sample("g", dist.Bernoulli(logits=self.b + self.c * z.mean(-1, keepdim=z.dim() > 1)))


class NormalThenCoinModel(Params):
    def __init__(self):
        super().__init__(w=0.9)

    def forward(self):
        g = pyro.sample("g", dist.Bernoulli(logits=torch.tensor(0.1, dtype=F64)))
        with pyro.plate("data", 2):
            z = pyro.sample("z", dist.Normal(torch.tensor(-0.3, dtype=F64), 1.0))
            pyro.sample("x", dist.Normal(self.w * z - 2.0 * g, 1.0), obs=X)


def normal_then_coin_loss(model, guide, nodes=41):
    """−ELBO by Gauss–Hermite quadrature over both draws and a sum over the coin."""
    import numpy as np

    points, weights = (torch.tensor(a, dtype=F64) for a in np.polynomial.hermite_e.hermegauss(nodes))
    weights = weights / weights.sum()
    noise = torch.cartesian_prod(points, points)
    weight = torch.cartesian_prod(weights, weights).prod(-1)
    z = guide.m + guide.s.exp() * noise
    log_q = dist.Normal(guide.m, guide.s.exp()).log_prob(z).sum(-1)
    total = 0.0
    for g in (torch.zeros((), dtype=F64), torch.ones((), dtype=F64)):
        coin = dist.Bernoulli(logits=guide.b + guide.c * z.mean(-1)).log_prob(g)
        f = dist.Normal(torch.tensor(-0.3, dtype=F64), 1.0).log_prob(z).sum(-1)
        f = f + dist.Normal(model.w * z - 2.0 * g, 1.0).log_prob(X).sum(-1)
        f = f + dist.Bernoulli(logits=torch.tensor(0.1, dtype=F64)).log_prob(g)
        total = total + (weight * coin.exp() * (f - log_q - coin)).sum()
    return -total


@pytest.mark.slow
def test_normal_draws_that_a_later_coin_joins_are_changed_one_at_a_time():
    """z-test of 100 draws at 64 particles; a bias of 0.2 in any parameter would be seen with power 0.99."""
    model, guide = NormalThenCoinModel(), NormalThenCoinGuide()
    both = torch.nn.ModuleList([model, guide])
    loss = SiteELBO({"z": "measure-valued", "g": "enumerate"}, num_particles=64)(model, guide).initialize()
    draws = torch.stack([gradient(loss(), both) for _ in range(100)])
    assert not misses(draws, gradient(normal_then_coin_loss(model, guide), both), resolves=0.2)


# Contract.


def test_other_families_are_refused_by_name():
    with pytest.raises(
        UnsupportedSite, match=r"'y'.*measure-valued.*of Bernoulli, Poisson.* Normal only, not of OneHotCategorical"
    ):
        SiteELBO("measure-valued")(DiceModel(), DiceGuide()).initialize()
    with pytest.raises(UnsupportedSite, match=r"'z'.*local-expectation.*Normal has no finite support"):
        SiteELBO("local-expectation")(NormalModel(), NormalGuide()).initialize()


@pytest.mark.parametrize("word", ["local-expectation", "measure-valued"])
def test_the_importance_weighted_bound_is_refused(word):
    with pytest.raises((UnsupportedSite, BadInput), match="iwae"):
        SiteELBO(word, objective="iwae")(PlateModel(), DISCRETE["plate"].guide()).initialize()


def test_alternatives_that_do_not_broadcast_are_run_one_by_one():
    model, guide = DISCRETE["control flow"].make()
    found = mean_gradient("local-expectation", model, guide, vectorize_particles=True)
    torch.testing.assert_close(found, exact_gradient(model, guide), atol=1e-10, rtol=0)


def test_costs_and_declarations():
    assert LocalExpectation().evaluations(3, 2) == MeasureValued().evaluations(3, 2) == 9
    for estimator in (LocalExpectation(), MeasureValued()):
        assert estimator.unbiased and estimator.reruns and estimator.min_particles == 1


@pytest.mark.parametrize("word", ["local-expectation", "measure-valued", "arm", "disarm"])
def test_the_model_sees_nothing_but_values_that_the_site_can_take(word):
    class Strict(Params):
        def forward(self):
            with pyro.plate("data", 2):
                z = pyro.sample("z", dist.Bernoulli(logits=torch.tensor(-0.3, dtype=F64)))
                assert ((z == 0) | (z == 1)).all() and not z.requires_grad
                pyro.sample("x", dist.Normal(z, 1.0), obs=X)

    SiteELBO(word, num_particles=2)(Strict(), DISCRETE["plate"].guide())().backward()


class RowsGuide(Params):
    def __init__(self):
        super().__init__(a=[0.4, -0.7])

    def forward(self):
        with pyro.plate("data", 2, subsample_size=1) as rows:
            pyro.sample("z", dist.Bernoulli(logits=self.a[rows]))


class RowsModel(Params):
    def forward(self):
        with pyro.plate("data", 2, subsample_size=1) as rows:
            z = pyro.sample("z", dist.Bernoulli(logits=torch.tensor(-0.3, dtype=F64)))
            pyro.sample("x", dist.Normal(z, 1.0), obs=X[rows])


@pytest.mark.parametrize("word", ["local-expectation", "measure-valued"])
def test_alternatives_see_the_rows_that_were_drawn(word):
    """One coin a row: its gradient is exact, so the row drawn has twice the full one (its scale) and the other none."""
    full = exact_gradient(FullRowsModel(), DISCRETE["plate"].guide())
    model, guide = RowsModel(), RowsGuide()
    loss = SiteELBO(word)(model, guide)
    seen = set()
    for _ in range(20):
        found = gradient(loss(), guide)
        row = int(found[1] != 0)
        seen.add(row)
        expected = torch.zeros(2, dtype=F64)
        expected[row] = 2 * full[row]
        assert torch.allclose(found, expected, rtol=0, atol=1e-12)
    assert seen == {0, 1}


class FullRowsModel(Params):
    def forward(self):
        with pyro.plate("data", 2):
            z = pyro.sample("z", dist.Bernoulli(logits=torch.tensor(-0.3, dtype=F64)))
            pyro.sample("x", dist.Normal(z, 1.0), obs=X)


@pytest.mark.parametrize("word", ["local-expectation", "measure-valued", "arm", "disarm"])
def test_single_precision_stays_single(word):
    class Guide(pyro.nn.PyroModule):
        def __init__(self):
            super().__init__()
            self.a = torch.nn.Parameter(torch.tensor([30.0, -30.0, 0.3]))

        def forward(self):
            pyro.sample("z", dist.Bernoulli(logits=self.a).to_event(1))

    def model():
        z = pyro.sample("z", dist.Bernoulli(torch.full((3,), 0.5)).to_event(1))
        pyro.sample("x", dist.Normal(z.sum(-1), 1.0), obs=torch.tensor(0.3))

    guide = Guide()
    loss = SiteELBO(word, num_particles=4)(model, guide)()
    loss.backward()
    assert loss.dtype == guide.a.grad.dtype == torch.float32 and guide.a.grad.isfinite().all()


@pytest.mark.parametrize("word", ["local-expectation", "measure-valued", "arm", "disarm"])
def test_a_loss_without_gradients_costs_one_run(word):
    runs = []
    model, guide = DISCRETE["chain"].make()
    model.register_forward_pre_hook(lambda *_: runs.append(1))
    loss = SiteELBO(word)(model, guide).initialize()
    for context, expected in ((torch.no_grad(), 1), (torch.enable_grad(), 3)):
        runs.clear()
        with context:
            loss()
        assert len(runs) == expected
