"""Faults that means over dimensions or over data hide: one marginal's shape, one datum in a hundred, mass left out."""

from __future__ import annotations

import math
import re

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch

from gumbo.inference import diagnose
from gumbo.inference.diagnosis.shapes import SHARES, shape_differences
from gumbo.inference.diagnosis.thresholds import PROBABILITY, SURE, single

QUICK = {"num_samples": 1000, "num_simulations": 40, "refine_steps": 0}
ROOT = 0.5**0.5
EULER = 0.5772156649015329


def marginal(kind, rows):
    """Distributions of mean 0 and standard deviation 1, except the skewed ones that are not."""
    zero = torch.zeros(rows).double()
    if kind == "normal":
        return dist.Normal(zero, 1.0)
    if kind == "laplace":
        return dist.Laplace(zero, ROOT)
    if kind == "gumbel":
        return dist.Gumbel(zero - EULER * math.sqrt(6) / math.pi, math.sqrt(6) / math.pi)
    weights, modes = torch.ones(rows, 2).double(), torch.tensor([-0.9, 0.9]).double().expand(rows, 2)
    return dist.MixtureSameFamily(dist.Categorical(weights), dist.Normal(modes, math.sqrt(0.19)))


def odd_one(kind, dims):
    """The data tell nothing of one dimension, so that its prior is its posterior."""

    def model(x):
        with pyro.plate("data", len(x)):
            pyro.sample("odd", marginal(kind, len(x)))
            z = pyro.sample("z", dist.Normal(torch.zeros(dims - 1).double(), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("odd", marginal(kind, len(x)))
            pyro.sample("z", dist.Normal(x / 2, ROOT).to_event(1))

    return model, guide


@pytest.mark.parametrize("dims", [5, 40])
@pytest.mark.parametrize(
    ("posterior", "guide", "alarms"),
    [
        ("bimodal", "normal", ["shape"]),
        ("normal", "bimodal", ["shape"]),
        ("laplace", "normal", ["shape"]),
        ("normal", "laplace", ["shape"]),
        ("normal", "normal", []),
        ("bimodal", "bimodal", []),
        ("gumbel", "gumbel", []),
    ],
)
def test_one_marginal_of_another_shape(dims, posterior, guide, alarms):
    data = 2**0.5 * torch.randn(25, dims - 1, generator=torch.Generator().manual_seed(0)).double()
    report = diagnose(odd_one(posterior, dims)[0], odd_one(guide, dims)[1], data, **QUICK)
    assert report.ok == (not alarms) and set(alarms) <= set(report.alarms), str(report)
    for verdict in ("shift", "width"):
        assert report[verdict].verdict == "ok", str(report)
    if alarms:
        assert "of odd" in report["shape"].text and report["shape"].value > report["shape"].threshold
    else:
        assert report["shape"].verdict == "ok" and report["shape"].value < 1e-6


def test_shape_is_that_of_the_marginals():
    """Of a Gumbel posterior under a Normal guide of the same mean and standard deviation, in closed form."""
    scale = math.sqrt(6) / math.pi
    posterior = torch.distributions.Gumbel(torch.tensor(-EULER * scale).double(), scale)
    normal = torch.distributions.Normal(torch.zeros(1).double(), 1.0)
    torch.manual_seed(0)
    draws = normal.sample((100_000,))
    weight = (posterior.log_prob(draws) - normal.log_prob(draws)).exp()
    found, error = shape_differences(draws.numpy()[None], weight.T.numpy(), np.zeros(1, dtype=bool))
    expected = posterior.cdf(normal.icdf(torch.tensor(SHARES))).numpy() - SHARES
    assert (np.abs(found[0, 0] - expected) < 4 * error[0, 0] + 1e-3).all() and (error < 0.01).all()


@pytest.mark.parametrize("family", [torch.distributions.Normal, torch.distributions.Gumbel])
def test_tolerated_shifts_and_widths_are_no_shapes(family):
    torch.manual_seed(0)
    guide, posterior = (family(*torch.tensor([place, size]).double()) for place, size in ((0.0, 1.0), (0.1, 1.1)))
    draws = guide.sample((2000, 1))
    weight = (posterior.log_prob(draws) - guide.log_prob(draws)).exp()
    found, error = shape_differences(draws.numpy()[None], weight.T.numpy(), np.zeros(1, dtype=bool))
    assert (np.abs(found) - 4 * error < 0.025).all()


def test_shapes_have_their_errors():
    rng = np.random.default_rng(0)
    values, weight = rng.standard_normal((4000, 400, 1)), rng.lognormal(0.0, 0.5, (4000, 400))
    found, error = shape_differences(values, weight, np.zeros(1, dtype=bool))
    assert np.abs(np.mean(found, 0)).max() < 4 * found.std() / 4000**0.5
    assert np.abs((found**2).mean((0, 1)) / (error**2).mean((0, 1)) - 1).max() < 0.15


def many_discrete(kind, wrong):
    """The data tell nothing of any of these latents; the guide is wrong in one of them."""
    laws = {
        "classes": (dist.Categorical, [0.45, 0.1, 0.45], [0.25, 0.5, 0.25]),
        "counts": (lambda p: dist.NegativeBinomial(p[0], p[1]), [4.0, 3 / 7], [400.0, 3 / 403]),
    }
    law, right, other = laws[kind]
    exact = torch.tensor(right).double().expand(30, len(right))

    def programs(parameters, y=None):
        parameters = parameters if kind == "classes" else parameters.T
        pyro.sample("k", law(parameters).to_event(1))
        if y is not None:
            with pyro.plate("data", len(y)):
                pyro.sample("y", dist.Normal(torch.zeros(()).double(), 1.0), obs=y)

    changed = exact.clone()
    if wrong:
        changed[7] = torch.tensor(other).double()
    return (lambda y: programs(exact, y)), (lambda y: programs(changed)), torch.zeros(5).double()


@pytest.mark.parametrize("rate", [3.0, 100.0])
def test_a_tolerated_shift_of_counts_is_no_shape(rate):
    torch.manual_seed(0)
    means = torch.tensor([rate, rate + 0.15 * rate**0.5]).double()
    guide, posterior = (torch.distributions.Poisson(mean) for mean in means)
    draws = guide.sample((4000, 1))
    weight = (posterior.log_prob(draws) - guide.log_prob(draws)).exp()
    found, error = shape_differences(draws.numpy()[None], weight.T.numpy(), np.ones(1, dtype=bool))
    assert (np.abs(found) - 4 * error < 0.025).all()


@pytest.mark.parametrize("wrong", [False, True])
@pytest.mark.parametrize("kind", ["classes", "counts"])
def test_one_discrete_marginal_with_the_right_mean(kind, wrong):
    report = diagnose(*many_discrete(kind, wrong), **QUICK)
    assert report.alarms == (["shape"] if wrong else []), str(report)
    assert "of k[7]" in report["shape"].text or not wrong


def few_wrong(dims, shift=0.0, scale=1.0, wrong=2):
    """A guide that is wrong in two of 200 data."""
    data = 2**0.5 * torch.randn(200, dims, generator=torch.Generator().manual_seed(1)).double()
    beyond = data[:, 0].sort().values[-wrong - 1]

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(dims).double(), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)

    def guide(x):
        bad = (x[:, :1] > beyond).double()
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x / 2 + shift * ROOT * bad, ROOT * scale**bad).to_event(1))

    return model, guide, data


@pytest.mark.parametrize(
    ("dims", "shift", "scale", "wrong", "alarms"),
    [
        pytest.param(1, 1.0, 1.0, 2, {"shift"}, id="off by one sd"),
        pytest.param(3, 1.0, 1.0, 2, {"shift"}, id="off by one sd, 3 dimensions"),
        pytest.param(10, 1.0, 1.0, 2, {"gap"}, id="off by one sd, 10 dimensions"),
        pytest.param(3, 5.0, 1.0, 2, {"gap"}, id="off by five sd"),
        pytest.param(2, 0.0, 3.0, 2, {"width"}, id="three times too wide"),
        pytest.param(1, 0.5, 1.0, 2, set(), id="off by half an sd"),
        pytest.param(2, 0.0, 1.0, 0, set(), id="exact"),
    ],
)
def test_few_wrong_data_of_many(dims, shift, scale, wrong, alarms):
    model, guide, data = few_wrong(dims, shift, scale, wrong)
    report = diagnose(model, guide, data, **QUICK)
    found = set(report.alarms) - {"calibration"}
    assert alarms <= found and bool(found) == bool(alarms), str(report)
    for name in alarms:
        assert re.search("; in [12] of 200 it is", report[name].text), str(report[name])


@pytest.mark.parametrize("dims", [1, 4, 40])
def test_the_limit_of_single_data_is_that_of_normal_differences(dims):
    rng = np.random.default_rng(0)
    size = np.sqrt((rng.standard_normal((500, 200, dims)) ** 2).mean(-1))
    often = (size > single(200, np.array(dims))).any(1).mean()
    assert often <= SURE + 4 * math.sqrt(SURE / 500)


def truncated(width, dims, rows):
    """A Normal posterior under a Uniform guide: the weights are bounded, and say nothing of what is outside."""
    data = 2**0.5 * torch.randn(rows, dims, generator=torch.Generator().manual_seed(2)).double()

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(dims).double(), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Uniform(x / 2 - width * ROOT, x / 2 + width * ROOT).to_event(1))

    return model, guide, data


@pytest.mark.parametrize(("width", "dims", "rows"), [(1.4, 1, 15), (1.7, 1, 1), (1.4, 3, 15)])
def test_mass_outside_a_bounded_guide_is_missed(width, dims, rows):
    report = diagnose(*truncated(width, dims, rows), **QUICK)
    assert "missed-mass" in report.alarms, str(report)
    outside = -dims * math.log(math.erf(width / 2**0.5))
    assert report["missed-mass"].value == pytest.approx(outside, abs=0.07)


STEPS = 40
SERIES = 0.9 * (torch.arange(STEPS) >= 18).double()
SERIES = SERIES + 0.8 * torch.randn(STEPS, generator=torch.Generator().manual_seed(3)).double()
LEVELS = 0.9 * (torch.arange(STEPS)[None] >= torch.arange(STEPS)[:, None]).double()
CHANGE = torch.softmax(dist.Normal(LEVELS, 0.8).log_prob(SERIES).sum(-1), 0)


def change_point(y):
    at = pyro.sample("at", dist.Categorical(torch.ones(STEPS).double()))
    with pyro.plate("data", STEPS):
        pyro.sample("y", dist.Normal(LEVELS[at], 0.8), obs=y)


@pytest.mark.parametrize("share", [0.0, 0.2])
def test_times_that_a_guide_of_a_change_leaves_out(share):
    seldom = CHANGE.argsort()
    left = seldom[CHANGE[seldom].cumsum(0) < share]
    kept = CHANGE.clone()
    kept[left] = 1e-12
    report = diagnose(change_point, lambda y: pyro.sample("at", dist.Categorical(kept)), SERIES, **QUICK)
    assert report.alarms == (["missed-mass"] if share else []), str(report)


CLASSES = torch.softmax(0.5 * torch.randn(400, generator=torch.Generator().manual_seed(4)), 0).double()


def many_classes(x):
    with pyro.plate("data", len(x)):
        k = pyro.sample("k", dist.Categorical(CLASSES))
        pyro.sample("x", dist.Normal(0.01 * k, 1.0), obs=x)


@pytest.mark.parametrize("kept", [400, 250])
def test_rare_classes_are_absent_from_the_draws_of_an_exact_guide_too(kept):
    """Each of 400 classes holds a quarter of a percent: many of them are never drawn."""

    def guide(x):
        logits = CLASSES.log() + dist.Normal(0.01 * torch.arange(400), 1.0).log_prob(x[:, None])
        logits = torch.where(torch.arange(400) < kept, logits, logits - 30.0)
        with pyro.plate("data", len(x)):
            pyro.sample("k", dist.Categorical(logits=logits))

    report = diagnose(many_classes, guide, torch.tensor([1.0, 2.5]).double(), **QUICK)
    assert ("missed-mass" in report.alarms) == (kept < 400), str(report)


@pytest.mark.parametrize(("width", "word"), [(1.4, "alarm"), (None, "ok")])
def test_guides_with_bounds_that_follow_the_data_are_calibrated(width, word):
    """Other data move the bounds beyond the guide's draws, which a distribution refuses."""

    def above(x):
        t = pyro.sample("t", dist.Pareto(torch.ones(()).double(), 2.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Uniform(torch.zeros(()).double(), t, validate_args=False), obs=x)

    def exact(x):
        pyro.sample("t", dist.Pareto(x.max().clamp(min=1.0), 2.0 + len(x)))

    data = torch.tensor([0.3, 1.2, 2.0, 0.7]).double()
    programs = truncated(width, 1, 15) if width else (above, exact, data)
    report = diagnose(*programs, **QUICK | {"num_simulations": 200})
    assert report["calibration"].verdict == word, str(report)
    assert report.ok == (word == "ok"), str(report)


@pytest.mark.parametrize("seed", range(4))
def test_data_that_are_drawn_again_do_not_make_a_guide_blind(seed):
    def coins(y):
        p = pyro.sample("p", dist.Beta(torch.tensor(0.3).double(), 3.0))
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Bernoulli(p), obs=y)

    def exact(y):
        pyro.sample("p", dist.Beta(0.3 + y.sum(), 3.0 + len(y) - y.sum()))

    report = diagnose(coins, exact, torch.tensor([0.0, 0.0, 1.0]).double(), seed=seed, **QUICK)
    assert report.ok and report["calibration"].verdict == "ok", str(report)


@pytest.mark.parametrize(("skewness", "beyond"), [(0.7, False), (0.8, True)])
def test_the_limit_of_shape_is_a_skewness_of_eight_tenths(skewness, beyond):
    from scipy import stats

    draws = stats.norm.ppf((np.arange(100_000) + 0.5) / 100_000)
    shape = 4 / skewness**2
    posterior = stats.gamma(shape, loc=-(shape**0.5), scale=shape**-0.5)  # of mean 0 and standard deviation 1
    order = np.random.default_rng(0).permutation(len(draws))  # for the groups of draws behind the error
    values = draws[order][None, :, None]
    weight = (posterior.pdf(draws) / stats.norm.pdf(draws))[order][None]
    difference, _ = shape_differences(values, weight, np.array([False]))
    assert (abs(difference).max() > PROBABILITY) == beyond
