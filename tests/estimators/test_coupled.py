"""ARMS, CARMS and one-hot DisARM against exact gradients, by listing the joint law of every group of coupled coins."""

from __future__ import annotations

import itertools
import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from exact_means import exact_gradient, is_unbiased
from programs import COINS, DISCRETE, F64, DiceGuide, DiceModel, OneCoinGuide, OneCoinModel, Params, X, gradient
from ztest import misses

from gumbo.errors import BadInput, UnsupportedSite
from gumbo.inference import SiteELBO
from gumbo.inference.auditing.exact import mean_over_draws
from gumbo.inference.estimators import ARMS, CARMS, DisARM, coupled


def pattern_law(probs, count):
    """The probability of every pattern of ``count`` coupled coins, by inclusion and exclusion of the rarer side."""
    rare = torch.minimum(probs, 1 - probs)
    root = rare ** (1 / (count - 1))
    all_rare = [torch.ones_like(rare)]
    all_rare += [(s * root - s + 1).clamp(min=0.0) ** (count - 1) for s in range(1, count + 1)]

    def exactly(m):
        return sum((-1) ** t * math.comb(count - m, t) * all_rare[m + t] for t in range(count - m + 1))

    patterns = torch.tensor(list(itertools.product([0, 1], repeat=count)), dtype=probs.dtype)
    law = torch.stack([exactly(int(pattern.sum())) for pattern in patterns], -1).clamp(min=0.0)
    return patterns, law


def listed_coins(probs, count):
    """Coupled coins as one categorical draw of their pattern, which `mean_over_draws` lists."""
    patterns, law = pattern_law(probs, count)
    rare = patterns[dist.Categorical(probs=law).sample()]
    coins = torch.where((probs > 0.5).unsqueeze(-1), 1 - rare, rare)
    return list(coins.unbind(-1))


@pytest.fixture
def listed(monkeypatch):
    monkeypatch.setattr(coupled, "coupled_coins", listed_coins)


@pytest.mark.parametrize("count", [2, 3, 4, 6])
def test_the_law_of_a_group_is_a_law_with_the_right_margins(count):
    probs = torch.tensor([1e-3, 0.1, 0.3, 0.5, 0.65, 0.999], dtype=F64)
    patterns, law = pattern_law(probs, count)
    assert torch.allclose(law.sum(-1), torch.ones(len(probs), dtype=F64), rtol=0, atol=1e-12)
    rare = torch.minimum(probs, 1 - probs)
    assert torch.allclose(law @ patterns[:, 0], rare, rtol=0, atol=1e-12)
    assert torch.allclose(
        law @ (patterns[:, 0] * (1 - patterns[:, 1])),
        rare * (1 - rare) / coupled.pair_correction(probs, count),
        rtol=0,
        atol=1e-12,
    )
    assert (coupled.pair_correction(probs, count) < 1).all()  # they disagree more often than independent coins


@pytest.mark.parametrize("count", [3, 4])
@pytest.mark.parametrize("prob", [0.05, 0.4, 0.5, 0.8])
def test_groups_are_drawn_from_that_law(count, prob):
    """20,000 groups: a frequency is within 5 standard errors of its probability (all 96 together: 1 in 20,000)."""
    size = 20_000
    probs = torch.full((size,), prob, dtype=F64)
    coins = torch.stack(coupled.coupled_coins(probs, count), -1)
    rare = 1 - coins if prob > 0.5 else coins
    patterns, law = pattern_law(probs[:1], count)
    found = (rare.unsqueeze(1) == patterns).all(-1).double().mean(0)
    assert ((found - law[0]).abs() <= 5 * (law[0] * (1 - law[0]) / size).sqrt() + 1e-12).all()


def cells():
    # Triples and quadruples of two dependent layers are too many to list.
    for name in COINS:
        if name in ("chain", "global then plate"):
            continue
        for draws in (2, 3, 4):
            if draws > 2 and name not in ("one coin", "control flow", "plate"):
                continue
            for vectorize in (False,) if DISCRETE[name].branches else (True, False)[: 5 - draws]:
                yield pytest.param(name, draws, vectorize, id=f"{name}-{draws}-{'vec' if vectorize else 'seq'}")


@pytest.mark.parametrize("name, draws, vectorize", list(cells()))
def test_the_mean_over_every_group_of_coins_is_the_exact_gradient(listed, name, draws, vectorize):
    model, guide = DISCRETE[name].make()
    assert is_unbiased(ARMS(draws), model, guide, vectorize_particles=vectorize)


@pytest.mark.parametrize("vectorize", [True, False], ids=["vec", "seq"])
@pytest.mark.parametrize(
    "words",
    [
        {"z1": ARMS(2), "z2": ARMS(2)},
        {"z1": ARMS(3), "z2": "score"},
        {"z1": ARMS(4), "z2": "score"},
        {"z1": "score", "z2": ARMS(4)},
        {"z1": ARMS(3), "z2": "enumerate"},
        {"z1": "enumerate", "z2": ARMS(3)},
    ],
    ids=str,
)
def test_two_layers_share_what_is_upstream_and_draw_their_own_downstream(listed, words, vectorize):
    model, guide = DISCRETE["chain"].make()
    assert is_unbiased(words, model, guide, vectorize_particles=vectorize)


class TwoDiceGuide(Params):
    """A one-hot die and another that depends on it."""

    def __init__(self):
        super().__init__(a=[0.1, -0.4, 0.6], b=[[0.3, 0.2], [-0.5, 0.1], [0.0, 0.8]])

    def forward(self):
        y = pyro.sample("y", dist.OneHotCategorical(logits=self.a))
        pyro.sample("c", dist.OneHotCategorical(logits=y @ self.b))


class TwoDiceModel(Params):
    def __init__(self):
        super().__init__(w=[0.2, 1.0, -0.5])

    def forward(self):
        y = pyro.sample("y", dist.OneHotCategorical(logits=torch.zeros(3, dtype=F64)))
        c = pyro.sample("c", dist.OneHotCategorical(logits=torch.tensor([0.1, -0.3], dtype=F64)))
        pyro.sample("x", dist.Normal((y * self.w).sum(-1) * (1.0 + c[..., 1]), 1.0), obs=X[1])


ONE_HOT = [
    ({"y": "disarm", "c": "score"}, False),
    ({"y": "disarm", "c": "disarm"}, True),
    ({"y": CARMS(2), "c": CARMS(2)}, False),
    ({"y": "score", "c": CARMS(3)}, False),
    ({"y": "score", "c": CARMS(4)}, True),
    ({"y": CARMS(3), "c": "enumerate"}, True),
    pytest.param({"y": CARMS(3), "c": "score"}, True, marks=pytest.mark.slow),
    pytest.param({"y": CARMS(4), "c": "enumerate"}, True, marks=pytest.mark.slow),
]


@pytest.mark.parametrize("words, vectorize", ONE_HOT, ids=str)
def test_one_hot_draws_through_coins_in_a_row(listed, words, vectorize):
    model, guide = TwoDiceModel(), TwoDiceGuide()
    assert is_unbiased(words, model, guide, vectorize_particles=vectorize)


def test_a_class_that_cannot_be_and_one_that_must():
    logits = torch.tensor([0.3, -math.inf, 0.7, -math.inf], dtype=F64)
    probs = coupled.sticks(logits.log_softmax(-1).clamp(min=-1e4)).sigmoid()
    chances = coupled.reached(probs.new_zeros(3)) * 0
    running = 1.0
    for i, p in enumerate(probs):
        chances[i], running = running * p, running * (1 - p)
    chances[3] = running
    assert torch.allclose(chances, logits.softmax(-1), rtol=0, atol=1e-12)
    draw = CARMS(3).draw(dist.OneHotCategorical(logits=logits.expand(500, 4)), 0)
    for value in (draw.value, *draw.extra.values()):
        assert torch.equal(value.sum(-1), torch.ones(500, dtype=F64)) and value[:, [1, 3]].sum() == 0


@pytest.mark.parametrize("estimator", [DisARM(), CARMS(2), CARMS(3)], ids=repr)
def test_a_single_class_has_no_coins(estimator):
    """Its draw is certain, and its gradient zero."""
    logits = torch.zeros(5, 1, dtype=F64, requires_grad=True)

    def program():
        with pyro.plate("rows", 5):
            pyro.sample("z", dist.OneHotCategorical(logits=logits))

    loss = SiteELBO(estimator).differentiable_loss(program, program)
    assert loss == 0 and torch.autograd.grad(loss, logits)[0].eq(0).all()


# Where two must be one.


def same_draws(one, other, make, **options):
    found = []
    for estimator in (one, other):
        model, guide = make()
        loss = SiteELBO(estimator, num_particles=3, **options)(model, guide).initialize()
        torch.manual_seed(4)
        found.append(torch.stack([gradient(loss(), torch.nn.ModuleList([model, guide])) for _ in range(5)]))
    return torch.allclose(*found, rtol=0, atol=1e-12)


@pytest.mark.parametrize("vectorize", [True, False])
def test_pairs_are_disarm_draw_by_draw(vectorize):
    make = DISCRETE["chain"].make
    assert same_draws(ARMS(2), DisARM(), make, vectorize_particles=vectorize)
    assert same_draws(CARMS(2), DisARM(), lambda: (TwoDiceModel(), TwoDiceGuide()), vectorize_particles=vectorize)
    assert not same_draws(ARMS(3), DisARM(), make, vectorize_particles=vectorize)


def test_two_classes_are_a_coin():
    """One-hot draws of two classes have one stick, whose logit is the log odds of the first class."""
    logits = torch.tensor([0.9, 0.2], dtype=F64).log_softmax(-1)
    assert coupled.sticks(logits).item() == pytest.approx(0.7)
    torch.manual_seed(0)
    die = CARMS(4).draw(dist.OneHotCategorical(logits=logits.expand(50, 2)), 0)
    torch.manual_seed(0)
    coin = ARMS(4).draw(dist.Bernoulli(logits=torch.full((50, 1), 0.7, dtype=F64)), 0)
    assert torch.equal(die.value[:, :1], coin.value) and torch.equal(
        die.extra["partner3"][:, :1], coin.extra["partner3"]
    )


# Wrong on purpose: each must fail the very test that the right ones pass.


@pytest.mark.parametrize("draws", [2, 3, 4])
def test_leaving_out_the_correlation_of_a_pair_fails_the_same_test(listed, monkeypatch, draws):
    monkeypatch.setattr(coupled, "pair_correction", lambda probs, count: torch.ones_like(probs))
    assert not is_unbiased(ARMS(draws), *DISCRETE["one coin"].make())
    assert draws > 2 or not is_unbiased({"y": CARMS(draws), "c": "enumerate"}, TwoDiceModel(), TwoDiceGuide())


def test_counting_coins_that_were_not_reached_fails_the_same_test(listed, monkeypatch):
    """Such a coin is averaged out: taking it for one that shows 0, as the one-hot value does, is biased."""

    def naive(value, other, probs, correction, one_hot):
        return (value - other)[..., :-1] * correction

    monkeypatch.setattr(coupled, "contrast", naive)
    assert not is_unbiased({"y": CARMS(2), "c": "enumerate"}, TwoDiceModel(), TwoDiceGuide())


def test_a_group_drawn_by_its_own_law_but_corrected_by_another_fails_the_same_test(listed, monkeypatch):
    right = coupled.pair_correction
    monkeypatch.setattr(coupled, "pair_correction", lambda probs, count: right(probs, 2))
    assert not is_unbiased(ARMS(3), *DISCRETE["one coin"].make())


# The coins that they really draw.


@pytest.mark.parametrize("word, name", [(ARMS(3), "chain"), (ARMS(4), "plate then global"), (CARMS(3), "two dice")])
def test_with_their_own_noise_the_mean_is_right_too(word, name):
    """z-tests of 60 draws at 1,000 independent groups; a bias of 0.05 would be seen with power 0.99."""
    model, guide = (TwoDiceModel(), TwoDiceGuide()) if name == "two dice" else DISCRETE[name].make()
    loss = SiteELBO(word, num_particles=1000)(model, guide).initialize()
    both = torch.nn.ModuleList([model, guide])
    draws = torch.stack([gradient(loss(), both) for _ in range(60)])
    assert not misses(draws, exact_gradient(model, guide), resolves=0.05)


def exact_variance(estimator, model, guide, **options):
    loss = SiteELBO(estimator, **options)(model, guide).initialize()
    mean = mean_over_draws(lambda: gradient(loss(), guide))
    return mean_over_draws(lambda: (gradient(loss(), guide) - mean).square().sum()).item()


@pytest.mark.parametrize("count", [2, 3, 4])
def test_a_group_varies_less_than_as_many_independent_draws(listed, count):
    model = OneCoinModel()
    ours = exact_variance(ARMS(count), model, OneCoinGuide())
    theirs = exact_variance("rloo", model, OneCoinGuide(), num_particles=count)
    assert ours < 0.9 * theirs


def test_what_is_declared_and_what_is_refused():
    assert ARMS().unbiased and ARMS(3).evaluations(2, 2) == 10 and CARMS(2).evaluations(3) == 6
    assert SiteELBO(ARMS(2), num_particles=1).requested_particles == 1
    with pytest.raises(BadInput, match="draws"):
        ARMS(1)
    with pytest.raises(UnsupportedSite, match=r"'y'.*arms.*Bernoulli.*OneHotCategorical"):
        SiteELBO("arms")(DiceModel(), DiceGuide()).initialize()
    with pytest.raises(UnsupportedSite, match=r"'z'.*carms.*OneHotCategorical.*Bernoulli"):
        SiteELBO("carms")(*DISCRETE["one coin"].make()).initialize()
    with pytest.raises((UnsupportedSite, BadInput), match="iwae"):
        SiteELBO("arms", objective="iwae")(*DISCRETE["plate"].make()).initialize()
