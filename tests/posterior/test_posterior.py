"""Draws as ArviZ takes them: groups, shapes, rows, and log-likelihoods held against closed forms."""

from __future__ import annotations

import math
import warnings
from datetime import date
from functools import partial

import numpy as np
import pandas
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.distributions import transforms
from pyro.distributions.testing.rejection_gamma import RejectionStandardGamma
from pyro.infer.autoguide import (
    AutoDelta,
    AutoDiagonalNormal,
    AutoIAFNormal,
    AutoLaplaceApproximation,
    AutoLowRankMultivariateNormal,
    AutoMultivariateNormal,
    AutoNormal,
    AutoNormalizingFlow,
    AutoStructured,
)
from pyro.infer.reparam import AutoReparam, LocScaleReparam, SplitReparam, TransformReparam
from pyro.infer.reparam.reparam import Reparam
from reading_rows import reading

from gumbo.errors import BadInput, GumboWarning, UnknownName, UnsupportedSite
from gumbo.guides import fitting, guides
from gumbo.inference import active_units, diagnose, evaluate, predict, summary, to_arviz
from gumbo.inference.posterior import _arviz, refits
from gumbo.inference.posterior.collection import GROUPS
from gumbo.inference.posterior.runner import Sweep
from gumbo.models import models

X = torch.linspace(-2, 2, 12).double()
NOISE = 0.3
EVIDENCE = dist.Normal(0.0, (1 + NOISE**2) ** 0.5).log_prob(X)


def group(idata, name):
    return _arviz.dataset_of(idata, name)


def normal_model(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(torch.zeros(()).double(), 1.0))
        pyro.deterministic("twice", 2 * z)
        pyro.sample("x", dist.Normal(z, NOISE), obs=x)


def normal_guide(scale=1.0, shift=0.0):
    var = 1 / (1 + 1 / NOISE**2)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x * var / NOISE**2 + shift * var**0.5, scale * var**0.5))

    return guide


# --- numbers ----------------------------------------------------------------------------------------------------------


def test_integrated_log_likelihood_is_the_evidence_where_conditional_ones_are_far_off():
    idata = to_arviz(normal_model, normal_guide(), X, num_samples=400)
    found = group(idata, "log_likelihood")["x"]
    assert found.dims == ("chain", "draw", "data")
    assert float(found.std("draw").max()) < 1e-12  # no global latent: the same for all draws
    np.testing.assert_allclose(found[0, 0], EVIDENCE, atol=1e-9)
    conditional = group(idata, "log_likelihood_conditional")["x"].mean(("chain", "draw"))
    assert float(conditional.sum()) > EVIDENCE.sum().item() + 5
    assert group(idata, "log_likelihood").attrs["constant_over_draws"] == 1


def test_integrated_log_likelihood_of_an_inexact_guide_is_within_its_error():
    idata = to_arviz(normal_model, normal_guide(1.3, 0.2), X, num_samples=4000)
    stats = group(idata, "vi_stats")
    total = group(idata, "log_likelihood")["x"][0, 0].sum()
    error = float((stats["log_evidence_se"] ** 2).sum() ** 0.5)
    assert abs(float(total) - EVIDENCE.sum().item()) < 4 * error < 0.2
    assert float(stats["elbo"].sum()) < float(total) - 0.5


def shared_mean(x):
    mu = pyro.sample("mu", dist.Normal(torch.zeros(()).double(), 1.0))
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(mu, 1.0))
        pyro.sample("x", dist.Normal(z, NOISE), obs=x)


def shared_mean_guide(x):
    mu = pyro.sample("mu", dist.Normal(torch.tensor(0.3).double(), 0.5))
    var = 1 / (1 + 1 / NOISE**2)
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(var * (mu + x / NOISE**2), 1.2 * var**0.5))


def test_given_global_latents_the_local_ones_are_integrated_out():
    idata = to_arviz(shared_mean, shared_mean_guide, X, num_samples=50, num_local_samples=2000)
    mu = torch.from_numpy(group(idata, "posterior")["mu"].values[0])
    exact = dist.Normal(mu[:, None], (1 + NOISE**2) ** 0.5).log_prob(X)
    found = group(idata, "log_likelihood")["x"].values[0]
    assert np.abs(found - exact.numpy()).max() < 0.15
    assert np.abs(found - exact.numpy()).mean() < 0.01
    stats = group(idata, "sample_stats")
    assert stats["log_weight"].dims == ("chain", "draw", "data")
    assert stats["log_q_global"].dims == ("chain", "draw")
    prior = dist.Normal(0.0, 1.0).log_prob(mu)
    np.testing.assert_allclose(stats["log_p_global"][0], prior, atol=1e-9)


def test_global_weights_come_from_the_integrated_likelihood():
    variance = 1 / (1 + len(X) / (1 + NOISE**2))
    mean = variance * X.sum() / (1 + NOISE**2)

    def guide(x):
        mu = pyro.sample("mu", dist.Normal(mean, variance**0.5))
        var = 1 / (1 + 1 / NOISE**2)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(var * (mu + x / NOISE**2), var**0.5))

    exact = group(to_arviz(shared_mean, guide, X, num_samples=400), "vi_stats")
    assert float(exact["khat_global"][0]) == 0.0
    assert float(exact["ess_global"][0]) == pytest.approx(400)
    wrong = group(to_arviz(shared_mean, shared_mean_guide, X, num_samples=400), "vi_stats")
    assert float(wrong["ess_global"][0]) < 350


def test_weights_and_kl_agree_with_evaluate():
    guide = normal_guide(1.3, 0.2)
    stats = group(to_arviz(normal_model, guide, X, num_samples=6000), "vi_stats")
    found = evaluate(normal_model, guide, X, num_samples=6000)
    assert float(stats["elbo"].mean()) == pytest.approx(found.elbo, abs=0.02)
    assert float(stats["log_evidence"].mean()) == pytest.approx(found.log_evidence, abs=0.01)
    assert float(stats["kl_z"][0]) == pytest.approx(found.rate, abs=0.02)
    assert bool(stats["active_z"][0]) == bool(active_units(guide, X)["z"])


def test_a_few_draws_do_not_make_a_dimension_active():
    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(torch.zeros(()).double(), 1.0))

    def active(x, draws):
        return bool(group(to_arviz(normal_model, guide, x, num_samples=draws), "vi_stats")["active_z"][0])

    assert not active(torch.linspace(-2, 2, 400).double(), 20)


def test_subsampled_scaled_and_masked_programs_report_plain_log_likelihoods():
    def model(x, scale, seen):
        z = pyro.sample("z", dist.Normal(torch.zeros(()).double(), 1.0))
        with pyro.plate("data", len(x)), pyro.poutine.scale(scale=scale), pyro.poutine.mask(mask=seen):
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x, scale, seen):
        pyro.sample("z", dist.Normal(torch.zeros(()).double(), 1.0))

    seen = torch.arange(len(X)) != 3
    with pytest.warns(GumboWarning, match="'x' has a scale of its own"):
        idata = to_arviz(model, guide, X, 7.0, seen, num_samples=30)
    z = torch.from_numpy(group(idata, "posterior")["z"].values[0])
    exact = dist.Normal(z[:, None], 1.0).log_prob(X) * seen
    np.testing.assert_allclose(group(idata, "log_likelihood")["x"][0], exact, atol=1e-9)
    total = exact.sum(-1) + dist.Normal(0.0, 1.0).log_prob(z)
    np.testing.assert_allclose(group(idata, "sample_stats")["log_p"][0], total, atol=1e-9)


# --- shapes, rows, names ----------------------------------------------------------------------------------------------

Y = torch.randn(3, 10, generator=torch.Generator().manual_seed(1)).double()
SIZE = 4


def two_deep(y, size=SIZE):
    mu = pyro.sample("mu", dist.Normal(torch.zeros(2).double(), 1.0).to_event(1))
    with pyro.plate("group", 3, dim=-2):
        a = pyro.sample("a", dist.Normal(mu[..., 0], 1.0))
        with pyro.plate("obs", 10, subsample_size=size, dim=-1) as rows:
            k = pyro.sample("k", dist.Categorical(torch.ones(3)))
            z = pyro.sample("z", dist.Normal(a, 1.0))
            pyro.sample("y", dist.Normal(z + k, 0.5), obs=y[:, rows])


def two_deep_guide(y, size=SIZE):
    pyro.sample("mu", dist.Normal(torch.zeros(2).double(), 0.2).to_event(1))
    with pyro.plate("group", 3, dim=-2):
        pyro.sample("a", dist.Normal(torch.zeros(()).double(), 0.3))
        with pyro.plate("obs", 10, subsample_size=size, dim=-1) as rows:
            pyro.sample("k", dist.Categorical(torch.ones(3)))
            pyro.sample("z", dist.Normal(y[:, rows], 0.1))


def test_plates_two_deep_and_a_subsampled_plate_visited_in_full():
    idata = to_arviz(two_deep, two_deep_guide, Y, num_samples=30, num_local_samples=5, dims={"mu": ["coef"]})
    posterior = group(idata, "posterior")
    assert {name: posterior[name].dims[2:] for name in posterior} == {
        "mu": ("coef",),
        "a": ("group",),
        "z": ("group", "obs"),
        "k": ("group", "obs"),
    }
    assert posterior.sizes["obs"] == 10 and list(posterior["obs"].values) == list(range(10))
    np.testing.assert_array_equal(group(idata, "observed_data")["y"], Y)
    # Each row was drawn around its own datum, so that no row landed at another's place.
    assert float(abs(posterior["z"].mean(("chain", "draw")) - Y.numpy()).max()) < 0.15
    assert group(idata, "log_likelihood")["y"].dims == ("chain", "draw", "group", "obs")
    assert posterior["k"].dtype.kind == "i" and set(np.unique(posterior["k"])) <= {0, 1, 2}


def test_a_draw_of_a_global_latent_is_one_draw_in_all_blocks_of_rows():
    idata = to_arviz(two_deep, two_deep_guide, Y, num_samples=20, groups=["posterior", "log_likelihood_conditional"])
    found = group(idata, "posterior")
    exact = dist.Normal(
        torch.from_numpy((found["z"] + found["k"]).transpose("chain", "draw", "group", "obs").values), 0.5
    ).log_prob(Y)
    np.testing.assert_allclose(group(idata, "log_likelihood_conditional")["y"], exact, atol=1e-9)
    stats = group(to_arviz(two_deep, two_deep_guide, Y, num_samples=20), "sample_stats")
    mu = torch.from_numpy(found["mu"].values[0])
    a = torch.from_numpy(found["a"].values[0])
    exact = dist.Normal(0.0, 1.0).log_prob(mu).sum(-1) + dist.Normal(mu[:, :1], 1.0).log_prob(a).sum(-1)
    np.testing.assert_allclose(stats["log_p_global"][0], exact, atol=1e-9)


def test_blocks_change_nothing_but_the_draws():
    options = {"num_samples": 2000, "num_local_samples": 2, "groups": ["vi_stats"]}
    whole = to_arviz(two_deep, two_deep_guide, Y, 10, **options)
    blocks = to_arviz(two_deep, two_deep_guide, Y, 3, **options)
    for name in ("elbo", "kl_a", "kl_k"):
        np.testing.assert_allclose(group(whole, "vi_stats")[name], group(blocks, "vi_stats")[name], atol=0.5)
    sliced = group(to_arviz(normal_model, normal_guide(), X, batch_size=5, num_samples=50), "vi_stats")
    np.testing.assert_allclose(sliced["log_evidence"][0], EVIDENCE, atol=1e-9)
    assert float(sliced["kl_z"][0]) == pytest.approx(evaluate(normal_model, normal_guide(), X).rate, abs=0.1)


def test_a_global_latent_whose_guide_reads_the_rows_is_refused_in_blocks():
    def guide(x):
        mu = pyro.sample("mu", dist.Normal(x.mean(), 0.5))
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(mu, 1.0).expand([len(x)]) if mu.dim() == 0 else dist.Normal(mu, 1.0))

    with pytest.raises(BadInput, match="'mu' depends on its rows"):
        to_arviz(shared_mean, guide, X, batch_size=5, num_samples=10)


def test_every_group_is_made_and_restricted_and_thinned():
    idata = to_arviz(normal_model, normal_guide(), X, num_samples=40, thin={"posterior_predictive": 8})
    assert set(_arviz.groups_of(idata)) == set(GROUPS) - {"constant_data"}
    predictive = group(idata, "posterior_predictive")["x"]
    assert predictive.shape == (1, 5, 12) and list(predictive["draw"].values) == [0, 8, 16, 24, 32]
    prior = group(to_arviz(normal_model, normal_guide(), X, num_samples=800), "prior_predictive")["x"]
    assert float(prior.std()) == pytest.approx((1 + NOISE**2) ** 0.5, abs=0.05)
    assert _arviz.groups_of(to_arviz(normal_model, normal_guide(), X, num_samples=10, groups=["prior"])) == ["prior"]


def test_posterior_predictive_follows_the_drawn_latents():
    idata = to_arviz(normal_model, normal_guide(), X, num_samples=500)
    residual = group(idata, "posterior_predictive")["x"] - group(idata, "posterior")["z"]
    assert float(residual.std()) == pytest.approx(NOISE, abs=0.02)
    np.testing.assert_allclose(group(idata, "posterior")["twice"], 2 * group(idata, "posterior")["z"])


def test_constant_data_and_coordinates():
    def model(inputs, y):
        w = pyro.sample("w", dist.Normal(torch.zeros(2).double(), 1.0).to_event(1))
        with pyro.plate("rows", len(y)):
            pyro.sample("y", dist.Normal((inputs * w).sum(-1), 1.0), obs=y)

    def guide(inputs, y):
        pyro.sample("w", dist.Normal(torch.zeros(2).double(), 1.0).to_event(1))

    names = {"rows": list("abcd"), "feature": ["height", "width"]}
    dims = {"w": ["feature"], "inputs": ["feature"]}
    idata = to_arviz(
        model, guide, torch.ones(4, 2).double(), torch.zeros(4).double(), num_samples=20, coords=names, dims=dims
    )
    assert group(idata, "constant_data")["inputs"].dims == ("rows", "feature")
    assert "y" not in group(idata, "constant_data")
    assert list(group(idata, "posterior")["feature"].values) == ["height", "width"]
    assert list(group(idata, "log_likelihood")["rows"].values) == list("abcd")


def test_plates_and_arguments_of_awkward_names():
    def model(data, draw):
        with pyro.plate("data", len(data), dim=-2), pyro.plate("draw", 2, dim=-1):
            z = pyro.sample("z", dist.Normal(torch.zeros(()).double(), 1.0))
            pyro.sample("x", dist.Normal(z + data, 1.0), obs=draw)

    def guide(data, draw):
        with pyro.plate("data", len(data), dim=-2), pyro.plate("draw", 2, dim=-1):
            pyro.sample("z", dist.Normal(torch.zeros(()).double(), 1.0))

    idata = to_arviz(model, guide, torch.ones(3, 1).double(), torch.zeros(3, 2).double(), num_samples=10)
    assert group(idata, "posterior")["z"].dims == ("chain", "draw", "data", "draw_plate")
    assert list(group(idata, "constant_data")) == ["data_argument"]


def test_programs_that_do_not_vectorize_run_draw_by_draw():
    def model(x):
        z = pyro.sample("z", dist.Normal(torch.zeros(()).double(), 1.0))
        loc = 1.0 if z > 0.5 else -1.0
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(loc, 1.0), obs=x)

    def guide(x):
        pyro.sample("z", dist.Normal(torch.zeros(()).double(), 1.0))

    assert not Sweep(model, guide, (X,), {}).vectorized
    assert Sweep(normal_model, normal_guide(), (X,), {}).vectorized
    idata = to_arviz(model, guide, X, num_samples=30)
    z = torch.from_numpy(group(idata, "posterior")["z"].values[0])
    exact = dist.Normal(torch.where(z > 0.5, 1.0, -1.0)[:, None], 1.0).log_prob(X)
    np.testing.assert_allclose(group(idata, "log_likelihood")["x"][0], exact, atol=1e-6)


def test_a_program_that_would_mix_draws_along_a_plate_keeps_them_apart():
    def model(x):
        z = pyro.sample("z", dist.Normal(torch.zeros(()).double(), 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(z - z.mean(), 1.0), obs=x)

    def guide(x):
        pyro.sample("z", dist.Normal(torch.zeros(()).double(), 1.0))

    assert Sweep(model, guide, (X,), {}).mode == "lanes"
    idata = to_arviz(model, guide, X, num_samples=30)
    exact = dist.Normal(0.0, 1.0).log_prob(X).expand(30, -1)
    np.testing.assert_allclose(group(idata, "log_likelihood")["x"][0], exact, atol=1e-9)


COLUMNS = torch.linspace(-1, 1, 36).reshape(12, 3).double()


def columns_model(x):
    """``COLUMNS @ w`` takes one w at a time, a buffer is written in place, and a Beta has a draw of its own."""
    w = pyro.sample("w", dist.Normal(torch.zeros(3).double(), 1.0).to_event(1))
    p = pyro.sample("p", dist.Beta(torch.tensor(2.0).double(), 3.0))
    loc = torch.zeros(len(x)).double()
    for row in range(len(x)):
        loc[row] = COLUMNS[row] @ w
    pyro.deterministic("loc", loc)
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(loc, 1.0))
        pyro.sample("x", dist.Normal(z + p, NOISE), obs=x)


def columns_guide(x):
    w = pyro.sample("w", dist.Normal(torch.ones(3).double(), 0.3).to_event(1))
    pyro.sample("p", dist.Beta(torch.tensor(4.0).double(), 3.0))
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(COLUMNS @ w + x / 2, 0.4))


def test_programs_of_one_draw_at_a_time_run_on_many_at_once_by_vmap():
    sweep = Sweep(columns_model, columns_guide, (X,), {})
    assert sweep.mode == "lanes" and Sweep(columns_model, columns_guide, (X,), {}, mode="single").vectorized is False
    idata = to_arviz(columns_model, columns_guide, X, num_samples=60, num_local_samples=7)
    found, stats = group(idata, "posterior"), group(idata, "sample_stats")
    w, p, z = (torch.from_numpy(found[name].values[0]) for name in ("w", "p", "z"))
    assert len(torch.unique(w)) == w.numel() and len(torch.unique(p)) == 60 and len(torch.unique(z)) == z.numel()
    np.testing.assert_allclose(found["loc"].values[0], w @ COLUMNS.T, atol=1e-12)
    exact = dist.Normal(w @ COLUMNS.T, 1.0).log_prob(z) + dist.Normal(z + p[:, None], NOISE).log_prob(X)
    np.testing.assert_allclose(stats["log_p"][0], exact, atol=1e-9)
    exact = dist.Normal(w @ COLUMNS.T + X / 2, 0.4).log_prob(z)
    np.testing.assert_allclose(stats["log_q"][0], exact, atol=1e-9)
    exact = dist.Normal(torch.ones(3).double(), 0.3).log_prob(w).sum(-1)
    exact = exact + dist.Beta(torch.tensor(4.0).double(), 3.0).log_prob(p)
    np.testing.assert_allclose(stats["log_q_global"][0], exact, atol=1e-9)
    assert float(abs(found["p"].mean() - 4 / 7)) < 0.1


FAMILIES = {
    "normal": lambda w: dist.Normal(w, 1.0),
    "gamma": lambda w: dist.Gamma(w.exp(), 1.0),
    "beta": lambda w: dist.Beta(w.exp(), torch.tensor(2.0)),
    "dirichlet": lambda w: dist.Dirichlet(torch.ones(3) + w.exp()),
    "poisson": lambda w: dist.Poisson(5 * w.exp()),
    "categorical": lambda w: dist.Categorical(logits=torch.ones(40) + w),
    "one-hot": lambda w: dist.OneHotCategorical(logits=torch.ones(40) + w),
    "binomial": lambda w: dist.Binomial(40, logits=w),
    "multinomial": lambda w: dist.Multinomial(40, logits=torch.ones(3) + w),
    "lognormal": lambda w: dist.LogNormal(w, 1.0),
    "student": lambda w: dist.StudentT(4.0, w, 1.0),
    "cauchy": lambda w: dist.HalfCauchy(w.exp()),
    "exponential": lambda w: dist.Exponential(w.exp()),
    "laplace": lambda w: dist.Laplace(w, 1.0),
    "uniform": lambda w: dist.Uniform(-w.exp(), 1.0),
    "mvn": lambda w: dist.MultivariateNormal(w.expand(2), torch.eye(2)),
    "mixture": lambda w: dist.MixtureSameFamily(dist.Categorical(torch.ones(2)), dist.Normal(w.expand(2), 1.0)),
    "von-mises": lambda w: dist.VonMises(w, 3.0),
    "lkj": lambda w: dist.LKJCholesky(2, w.exp()),
}


def vmap_fills_by_mask():
    """As the density of a multinomial does; torch 2.4 refuses it."""

    def fill(x):
        x = x.clone()
        x[x > 0] = 0.0
        return x

    try:
        torch.vmap(fill)(torch.ones(2, 3))
    except RuntimeError:
        return False
    return True


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_draws_anew_in_every_lane_with_its_own_density(name):
    family = FAMILIES[name]

    def model(x):
        w = pyro.sample("w", dist.Normal(torch.zeros(()), 0.1))
        assert w.dim() == 0  # takes no plate of draws
        pyro.sample("u", family(w))
        pyro.sample("x", dist.Normal(w, 1.0).expand([len(x)]).to_event(1), obs=x)

    def guide(x):
        w = pyro.sample("w", dist.Normal(torch.zeros(()), 0.1))
        pyro.sample("u", family(w))

    x = X.float()
    one_by_one = {"von-mises", "lkj"} | (set() if vmap_fills_by_mask() else {"multinomial"})
    assert Sweep(model, guide, (x,), {}).mode == ("single" if name in one_by_one else "lanes")
    idata = to_arviz(model, guide, x, num_samples=60, groups=["posterior", "sample_stats"])
    u, w = (torch.from_numpy(group(idata, "posterior")[name].values[0]) for name in ("u", "w"))
    flat = u.double().reshape(60, -1)
    assert len(torch.unique(flat, dim=0)) > 10
    exact = torch.stack([family(one).log_prob(value).sum() for one, value in zip(w, u, strict=True)])
    found = torch.from_numpy(group(idata, "sample_stats")["log_q"].values[0]) - dist.Normal(0.0, 0.1).log_prob(w)
    np.testing.assert_allclose(found, exact, atol=1e-3)


def test_samplers_that_vmap_cannot_run_draw_one_by_one():
    def model(x):
        w = pyro.sample("w", dist.Normal(torch.zeros(3).double(), 0.1).to_event(1))
        p = pyro.sample("p", dist.BetaBinomial(torch.tensor(2.0).double(), 6.0, 40))
        a = pyro.sample("a", dist.VonMises(w[0], 3.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.VonMises(a + 0 * p + COLUMNS @ w, NOISE), obs=x)

    def guide(x):
        pyro.sample("w", dist.Normal(torch.zeros(3).double(), 0.1).to_event(1))
        pyro.sample("p", dist.Binomial(40, torch.tensor(0.5).double()))
        pyro.sample("a", dist.Normal(torch.zeros(()).double(), 0.5))

    assert Sweep(model, guide, (X,), {}).mode == "lanes"
    idata = to_arviz(model, guide, X, num_samples=200)
    prior, predictive = group(idata, "prior"), group(idata, "posterior_predictive")["x"].values
    p = prior["p"].values
    assert abs(p.mean() - 10) < 4 * p.std() / 200**0.5 and np.unique(prior["a"]).size == 200
    assert predictive.shape == (1, 200, len(X)) and np.unique(predictive).size == predictive.size


def test_draws_outside_the_support_are_named():
    def model(x):
        w = pyro.sample("w", dist.HalfNormal(torch.ones(3)).to_event(1))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(COLUMNS.float() @ w, 1.0), obs=x.float())

    def guide(x):
        pyro.sample("w", dist.Normal(torch.zeros(3), 1.0).to_event(1))

    with pytest.raises(BadInput, match="'w' has a value outside the support"):
        to_arviz(model, guide, X, num_samples=50)


AUTOGUIDES = [
    AutoNormal,
    AutoDiagonalNormal,
    AutoMultivariateNormal,
    AutoDelta,
    AutoLowRankMultivariateNormal,
    AutoLaplaceApproximation,
    AutoIAFNormal,
]


@pytest.mark.parametrize("auto", AUTOGUIDES)
def test_autoguides(auto):
    idata = to_arviz(shared_mean, auto(shared_mean), X, num_samples=20, num_local_samples=4)
    assert group(idata, "posterior")["z"].shape == (1, 20, 12)
    weight = group(idata, "sample_stats")["log_weight"]
    # A guide that draws all data jointly has a weight of the whole; the others one for each datum.
    joint = auto not in (AutoNormal, AutoDelta)
    assert weight.dims == (("chain", "draw") if joint else ("chain", "draw", "data"))
    assert ("log_likelihood" in _arviz.groups_of(idata)) == (not joint)


def test_what_a_guide_computes_from_auxiliary_draws_keeps_its_density(param_store):
    """A matrix product may round otherwise for one draw than for many, and a point's density is 0 beside the point."""

    def model(x):
        w = pyro.sample("w", dist.Normal(torch.zeros(3), 1.0).to_event(1))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(w.sum(-1, keepdim=w.dim() > 1), 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x.float())

    guide = AutoStructured(model)
    guide(X)
    with torch.no_grad():
        for parameter in guide.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)) * 0.1)
    assert Sweep(model, guide, (X,), {}).vectorized
    weight = group(to_arviz(model, guide, X, num_samples=50, groups=["sample_stats"]), "sample_stats")["log_weight"]
    assert np.isfinite(weight).all()
    nested = Sweep(shared_mean, AutoNormal(shared_mean), (X,), {})
    assert nested.local == ["z"] and nested.shared == ["mu"]
    stats = group(to_arviz(shared_mean, AutoNormal(shared_mean), X, num_samples=30), "vi_stats")
    assert np.isfinite(stats["khat_global"]).all()  # its density is known by itself


def with_latents():
    return [
        pytest.param(name, number, id=f"{name}-{number}")
        for name, cls in models.items()
        for number, variant in enumerate(cls.variants)
        if cls(**{"data_shape": (1, 8, 8), **variant}).latents
    ]


@pytest.mark.parametrize("name, variant", with_latents())
def test_every_model_of_the_collection(name, variant):
    model = models[name](**{"data_shape": (1, 8, 8), **models[name].variants[variant]})
    guide = guides[fitting(model)[0]](model)
    inputs = model.example(3)
    idata = to_arviz(model, guide, num_samples=6, num_local_samples=2, **inputs)
    posterior = group(idata, "posterior")
    for site, latent in model.latents.items():
        assert posterior[site].shape[-len(latent.shape) :] == latent.shape
        assert np.isfinite(posterior[site]).all()
    assert np.isfinite(group(idata, "sample_stats")["log_weight"]).all()


PLACES = torch.linspace(-2, 2, 120).double()


def own_parameters(x):
    loc = pyro.param("loc", PLACES / 2)
    with pyro.plate("data", len(x)) as i:
        pyro.sample("z", dist.Normal(loc[i], 0.5**0.5))


def a_penalty(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(torch.zeros(()).double(), 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)
    pyro.factor("penalty", -((z - z.mean()) ** 2).sum())


ALONE = reading(torch.zeros_like)
DEPENDENT_ROWS = {
    "the row before": reading(lambda x: torch.cat([x.new_zeros(1), x[:-1]])),
    "the row after": reading(lambda x: torch.cat([x[1:], x.new_zeros(1)])),
    "rows far ahead": reading(lambda x: torch.cat([x[50:], x.new_zeros(min(len(x), 50))])),
    "all later rows": reading(lambda x: x.flip(0).cumsum(0).flip(0) - x),
    "all rows": reading(lambda x: x.mean().expand(len(x))),
    "a table": reading(lambda x: PLACES[: len(x)]),
    "a table from its end": reading(lambda x: PLACES[-len(x) :]),
    "parameters": (ALONE[0], own_parameters),
    "a penalty": (a_penalty, ALONE[1]),
}


@pytest.mark.parametrize("case", DEPENDENT_ROWS)
@pytest.mark.parametrize("batch_size", [1, 7, 119])
def test_rows_that_do_not_stand_alone_are_not_passed_in_batches(case, batch_size, param_store):
    with pytest.raises(BadInput, match="leave out batch_size") as error:
        to_arviz(*DEPENDENT_ROWS[case], PLACES, batch_size=batch_size, num_samples=2)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("batch_size", [1, 7, 119])
def test_rows_that_stand_alone_are_passed_in_batches(batch_size):
    found = group(to_arviz(*ALONE, PLACES, batch_size=batch_size, num_samples=3), "vi_stats")
    truth = dist.Normal(0.0, 2**0.5).log_prob(PLACES).numpy()
    assert np.allclose(found["log_evidence"].values[0], truth, atol=1e-9)


# --- chains -----------------------------------------------------------------------------------------------------------


def test_chains_are_guides_fitted_independently():
    idata = to_arviz(normal_model, [normal_guide(), normal_guide(shift=3.0)], X, num_samples=300)
    assert group(idata, "posterior").sizes["chain"] == 2
    shown = summary(idata, var_names=["z"])
    name = next(name for name in shown.columns if "r_hat" in name or "rhat" in name)
    assert shown[name].astype(float).min() > 1.3
    assert shown["khat"].max() > 0.0 and len(shown) == 12


def test_one_chain_has_no_r_hat_and_shows_k_hat_of_its_datum():
    idata = to_arviz(normal_model, normal_guide(0.5), X, num_samples=500)
    shown = summary(idata, var_names="z")
    assert "mean" in shown and not [
        name for name in shown if "hat" in name and name != "khat" or name.startswith("ess")
    ]
    np.testing.assert_array_equal(shown["khat"], group(idata, "vi_stats")["khat"][0].values.round(3))


def test_refits_start_elsewhere_and_leave_the_model_alone(monkeypatch):
    monkeypatch.setattr(refits, "refitted", partial(refits.refitted, steps=30))
    guide = AutoNormal(shared_mean)
    with pyro.get_param_store().scope():
        guide(X)
    idata = to_arviz(shared_mean, guide, X, num_samples=50, num_refits=2, groups=["posterior"])
    assert group(idata, "posterior").sizes["chain"] == 2
    own = [float(group(idata, "posterior")["mu"][chain].std()) for chain in range(2)]
    assert abs(own[0] - own[1]) > 1e-3
    with pytest.raises(BadInput, match="refit="):
        to_arviz(normal_model, normal_guide(), X, num_samples=10, num_refits=2)


class LinearGuide(torch.nn.Module):
    """The posterior of ``normal_model`` under a shift of its prior, if nothing but ``line`` is trained."""

    def __init__(self, stored: bool = False):
        super().__init__()
        self.line, self.stored = torch.nn.Linear(1, 1).double(), stored
        self.embedding = torch.nn.Linear(1, 1).double().requires_grad_(False)
        self.scale = torch.nn.Parameter(torch.tensor(0.5).double().sqrt(), requires_grad=False)
        for layer, values in ((self.line, (0.5, 1.0)), (self.embedding, (1.0, 0.0))):
            for parameter, value in zip(layer.parameters(), values, strict=True):
                torch.nn.init.constant_(parameter, value)

    def forward(self, x):
        loc = self.line(self.embedding(x.unsqueeze(-1))).squeeze(-1)
        if self.stored:
            loc = loc * pyro.param("factor", torch.ones(()).double())
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(loc, self.scale))


def shifted_prior(x):
    loc = pyro.param("loc", torch.zeros(()).double())
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(loc, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def test_refits_keep_what_the_fit_does_not_train():
    with pyro.get_param_store().scope({"params": {}, "constraints": {}}):
        pyro.param("loc", torch.tensor(2.0).double())
        guide = LinearGuide()
        again = refits.refitted(shifted_prior, guide, (X,), {}, seed=0, steps=600, lr=0.05)
        for name in ("scale", "embedding.weight", "embedding.bias"):
            assert torch.equal(again.get_parameter(name), guide.get_parameter(name)), name
        assert evaluate(shifted_prior, again, X).elbo == pytest.approx(evaluate(shifted_prior, guide, X).elbo, abs=1e-3)


@pytest.mark.parametrize("case, message", [("stored", "'factor' is in the param store alone"), ("frozen", "thaw")])
def test_refits_that_cannot_train_the_guide_are_refused(case, message):
    with pyro.get_param_store().scope({"params": {}, "constraints": {}}):
        guide = LinearGuide(stored=case == "stored")
        if case == "stored":
            guide(X)
        else:
            guide.requires_grad_(False)
        with pytest.raises(BadInput, match=message):
            refits.refitted(shifted_prior, guide, (X,), {}, seed=0, steps=2)


# --- ArviZ itself -----------------------------------------------------------------------------------------------------


def test_dates_as_coordinates_are_written(tmp_path):
    """As times: no file holds a ``datetime.date``."""
    days = [date(2020, 1, 1 + row) for row in range(len(X))]
    idata = to_arviz(line, AutoNormal(line), X, X, num_samples=5, groups=["observed_data"], coords={"rows": days})
    _arviz.save(idata, tmp_path / "posterior.nc")
    found = group(_arviz.load(tmp_path / "posterior.nc"), "observed_data")["y"].coords["rows"].values
    assert found.astype("datetime64[D]").tolist() == days


def test_netcdf_round_trip(tmp_path):
    idata = to_arviz(two_deep, two_deep_guide, Y, num_samples=20, num_local_samples=3)
    _arviz.save(idata, tmp_path / "posterior.nc")
    again = _arviz.load(tmp_path / "posterior.nc")
    assert set(_arviz.groups_of(again)) == set(_arviz.groups_of(idata))
    for name in _arviz.groups_of(idata):
        for variable, values in group(idata, name).items():
            np.testing.assert_array_equal(group(again, name)[variable], values)
            assert group(again, name)[variable].dims == values.dims
    assert group(again, "posterior").attrs["local"] == group(idata, "posterior").attrs["local"]


def line(x, y):
    a = pyro.sample("a", dist.Normal(torch.zeros(()).double(), 1.0))
    b = pyro.sample("b", dist.Normal(torch.zeros(()).double(), 1.0))
    with pyro.plate("rows", len(y)):
        pyro.sample("y", dist.Normal(a + b * x, 1.0), obs=y)


def line_guide(x, y):
    design = torch.stack([torch.ones_like(x), x], -1)
    variance = torch.linalg.inv(torch.eye(2).double() + design.T @ design)
    mean = variance @ design.T @ y
    a = pyro.sample("a", dist.Normal(mean[0], variance[0, 0].sqrt()))
    slope = variance[0, 1] / variance[0, 0]
    pyro.sample("b", dist.Normal(mean[1] + slope * (a - mean[0]), (variance[1, 1] - slope * variance[0, 1]).sqrt()))


@pytest.fixture(scope="module")
def line_draws():
    x = torch.linspace(-1, 1, 25).double()
    y = 0.5 + x + torch.randn(25, generator=torch.Generator().manual_seed(0)).double()
    return to_arviz(line, line_guide, x, y, num_samples=400)


@pytest.fixture
def quiet():
    """Warnings of ArviZ and its dependencies about themselves are not what is tested."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", module="gumbo")
        warnings.filterwarnings("ignore", category=FutureWarning)
        warnings.filterwarnings("ignore", category=DeprecationWarning)
        warnings.filterwarnings("ignore", category=PendingDeprecationWarning)
        yield


def test_loo_and_compare_take_the_integrated_log_likelihood(line_draws, quiet):
    az = _arviz.arviz()
    found = az.loo(line_draws, pointwise=True)
    assert float(found.pareto_k.max()) < 0.7
    log_likelihood = group(line_draws, "log_likelihood")["y"].values[0]
    waic = np.log(np.exp(log_likelihood).mean(0)).sum() - log_likelihood.var(0, ddof=1).sum()
    assert float(getattr(found, "elpd_loo", getattr(found, "elpd", math.nan))) == pytest.approx(waic, abs=0.5)
    assert len(az.compare({"one": line_draws, "same": line_draws})) == 2
    az.loo_pit(line_draws, **({} if _arviz.is_datatree() else {"y": "y"}))
    pit = az.plot_khat(found)
    assert pit is not None


def test_plots(line_draws, quiet):
    import matplotlib.pyplot as plt

    az = _arviz.arviz()
    names = ["plot_forest", "plot_trace", "plot_pair", "plot_ppc_dist" if _arviz.is_datatree() else "plot_ppc"]
    names.append("plot_dist" if _arviz.is_datatree() else "plot_posterior")
    for name in names:
        getattr(az, name)(line_draws)
        plt.close("all")


# --- what cannot be ---------------------------------------------------------------------------------------------------


def coins(x):
    p = pyro.sample("p", dist.Beta(torch.tensor(1.0), torch.tensor(1.0)))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Bernoulli(p), obs=x)


def coins_guide(x):
    pyro.sample("p", dist.Beta(1 + x.sum(), 1 + len(x) - x.sum()))


@pytest.mark.parametrize("ones", [0, 5, 14])
def test_counts_are_integers_and_drawn_as_such(ones, quiet):
    x = torch.zeros(15)
    x[:ones] = 1
    idata = to_arviz(coins, coins_guide, x, num_samples=100, seed=0)
    for name in ("observed_data", "posterior_predictive", "prior_predictive"):
        assert group(idata, name)["x"].dtype.kind == "i"
    assert group(idata, "posterior")["p"].dtype.kind == "f"
    az = _arviz.arviz()
    warnings.filterwarnings("ignore", message=".*look (binary|discrete)")  # advice to take another plot
    (az.plot_ppc_dist if _arviz.is_datatree() else az.plot_ppc)(idata)


def test_a_value_that_never_varies_has_a_summary_without_a_warning():
    def model(x):
        b = pyro.sample("b", dist.Bernoulli(torch.tensor(0.5)))
        pyro.sample("x", dist.Normal(b, 1.0), obs=x)

    def guide(x):
        pyro.sample("b", dist.Bernoulli(torch.tensor(1.0)))

    idata = to_arviz(model, guide, torch.tensor(0.4), num_samples=20, num_refits=2, refit=lambda *_: guide)
    found = summary(idata)
    assert found.loc["b", "mean"] == 1


def test_classes_have_a_mode_and_its_probability_and_no_mean():
    """Of one-hot, index and binary sites; counts keep mean and interval."""
    probs = torch.tensor([[0.1, 0.7, 0.2], [0.6, 0.2, 0.2]])

    def program(x=None):
        with pyro.plate("data", 2):
            pyro.sample("one", dist.OneHotCategorical(probs).mask(torch.tensor(True)))
            pyro.sample("index", dist.Categorical(probs))
            pyro.sample("coin", dist.Bernoulli(probs[:, 0]))
            count = pyro.sample("count", dist.Poisson(probs[:, 1]))
            if x is not None:
                pyro.sample("x", dist.Normal(count, 1.0), obs=x)

    idata = to_arviz(lambda x: program(x), lambda x: program(), torch.zeros(2), num_samples=4_000)
    found = summary(idata)
    assert list(found.index) == [f"{name}[{row}]" for name in ("one", "index", "coin", "count") for row in (0, 1)]
    for name in ("one", "index"):
        assert found.loc[[f"{name}[0]", f"{name}[1]"], "mode"].tolist() == [1, 0]
        assert found.loc[f"{name}[0]", ["mean", "sd"]].isna().all()
        assert abs(found.loc[f"{name}[0]", "probability"] - 0.7) < 4 * (0.7 * 0.3 / 4_000) ** 0.5 + 5e-4
    assert found.loc["coin[1]", "mode"] == 1 and found.loc["coin[1]", "mean"] == found.loc["coin[1]", "probability"]
    counts = found.loc[["count[0]", "count[1]"]]
    assert counts["mode"].isna().all() and counts.notna()[["mean", "sd"]].all().all()
    assert found.columns[-1] == "khat"
    assert list(summary(idata, var_names="one").columns) == ["mode", "probability", "khat"]
    both = summary(to_arviz(lambda x: program(x), [lambda x: program()] * 2, torch.zeros(2), num_samples=50))
    r_hat = next(name for name in both.columns if name in ("r_hat", "R̂", "rhat"))
    assert both.loc[["one[0]", "index[0]"], r_hat].isna().all() and both.loc["count[0]", r_hat] > 0


DISCRETE = {"categorical", "bernoulli", "poisson", "binomial", "negative-binomial", "geometric"}


def discrete_forms():
    """Every variant of every registered model that draws or sums out classes, binary values or counts."""
    for name, cls in models.items():
        for number, variant in enumerate(cls.variants or ({},)):
            model = cls((1, 8, 8), **variant)
            if model.summed or DISCRETE & {latent.family for latent in model.latents.values()}:
                yield pytest.param(cls, variant, id=f"{name}-{number}")


@pytest.mark.parametrize("cls, variant", list(discrete_forms()))
def test_each_row_of_the_summary_of_a_discrete_latent_has_a_meaning(cls, variant):
    """Of every registered model: mode and probability of classes, no row for one indicator of a one-hot vector."""
    torch.manual_seed(0)
    model = cls((1, 8, 8) if cls is models["expectation"] else (1, 4, 4), **variant)
    guide = guides[fitting(model)[0]](model)
    idata = to_arviz(model, guide, num_samples=10, groups=["posterior"], **model.example(2))
    draws, found = group(idata, "posterior"), summary(idata)
    kinds = {name: draws[name].attrs.get("values", "") for name in draws.data_vars}
    assert set(kinds.values()) - {""}
    sizes = {
        name: draws[name][0, 0].size // (draws[name].shape[-1] if kinds[name] == "one-hot" else 1) for name in kinds
    }
    assert len(found) == sum(sizes.values())
    start = 0
    for name, kind in kinds.items():
        rows, start = found.iloc[start : start + sizes[name]], start + sizes[name]
        assert all(label.split("[")[0] == name for label in rows.index)
        meant = {"one-hot": {"mode", "probability"}, "classes": {"mode", "probability"}}.get(kind, set())
        meant = {"mean", "mode", "probability"} if kind == "binary" else meant or {"mean", "sd"}
        shown = {column for column in rows if rows[column].notna().any()}
        assert meant <= shown and rows[sorted(meant)].notna().all(axis=None)
        if "mode" in meant:
            values = draws[name].argmax(draws[name].dims[-1]) if kind == "one-hot" else draws[name]
            first = values.values.reshape(10, -1)[:, 0]
            assert shown == meant and rows["mode"].dtype == "Int64"
            assert (
                rows["probability"].iloc[0] == (first == rows["mode"].iloc[0]).mean() == np.bincount(first).max() / 10
            )


def test_chains_that_name_a_class_differently_say_so():
    """Two fits of a mixture with their labels exchanged, and a coin on which both agree."""

    def model(x):
        with pyro.plate("data", len(x)):
            y = pyro.sample("y", dist.OneHotCategorical(torch.ones(2) / 2))
            pyro.sample("coin", dist.Bernoulli(torch.tensor(0.5)))
            pyro.sample("x", dist.Normal(y[..., 0], 1.0), obs=x)

    def guide(order, x):
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.OneHotCategorical(torch.tensor([0.9, 0.1])[order]))
            pyro.sample("coin", dist.Bernoulli(torch.tensor(0.9)))

    fits = [partial(guide, [0, 1]), partial(guide, [1, 0])]
    found = summary(to_arviz(model, fits, torch.zeros(2), num_samples=100))
    assert found["chains_agree"].tolist() == [0.5, 0.5, 1.0, 1.0]
    assert "chains_agree" not in summary(to_arviz(model, fits[0], torch.zeros(2), num_samples=100))


def test_bad_input_is_one_line():
    def undrawn(x):
        with pyro.plate("data", len(x)):
            pass

    def changing(x):
        if pyro.sample("z", dist.Bernoulli(torch.tensor(0.5).double())) > 0:
            pyro.sample("w", dist.Normal(torch.zeros(()).double(), 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(torch.zeros(()).double(), 1.0), obs=x)

    guide = pyro.poutine.block(changing, hide=["x"])

    cases = [
        ({"guide": undrawn}, "'z' is latent in the model but the guide does not draw it"),
        ({"num_samples": 1}, "num_samples is 1"),
        ({"groups": ["posteriors"]}, "did you mean 'posterior'"),
        ({"thin": {"prior": 0}}, "thin is 0 for prior"),
        ({"data_plates": "rows"}, "no plate 'rows'"),
        ({"coords": {"data": [1, 2]}}, "coords for 'data' has 2 values"),
        ({"dims": {"z": ["a", "b"]}}, "dims for 'z' names 2 dimensions"),
        ({"coords": torch.zeros(2)}, "to_arviz: coords is .*: expected a mapping"),
        ({"coords": {"data": 3}}, "coords for 'data' is int: expected one value for each element"),
        (
            {"coords": {"data": [("a", 1)] * 3}},
            r"2 values for one element, \('a', 1\): expected one, such as 'a, 1'",
        ),
        ({"coords": {"data": pandas.MultiIndex.from_tuples([("a", 1)] * 3)}}, "coords for 'data' has 2 values for one"),
        ({"dims": True}, "to_arviz: dims is True: expected a mapping"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"num_samples": 10**9}, "memory_limit"),
        ({"guide": []}, "empty"),
    ]
    for options, said in cases:
        options = {"guide": normal_guide(), "num_samples": 5, **options}
        with pytest.raises((BadInput, UnknownName), match=said) as caught:
            to_arviz(normal_model, options.pop("guide"), X, **options)
        assert "\n" not in str(caught.value)
    with pytest.raises(BadInput, match="sites vary between draws"):
        for seed in range(8):
            to_arviz(changing, guide, X, num_samples=20, seed=seed)


def test_what_is_needed_is_said_before_the_start(capsys):
    to_arviz(normal_model, normal_guide(), X, num_samples=20, progress=True)
    said = capsys.readouterr().err
    assert "the draws need" in said.splitlines()[0] and "posterior" in said and "to_arviz 1/1" in said
    to_arviz(normal_model, normal_guide(), X, num_samples=20)
    assert capsys.readouterr().err == ""


def test_a_seed_does_not_bring_back_the_noise_of_training():
    torch.manual_seed(0)
    trained_on = torch.randn(12)
    idata = to_arviz(
        prior_like, pyro.poutine.block(prior_like, hide=["x"]), X, num_samples=5, seed=0, groups=["posterior"]
    )
    assert not np.isin(group(idata, "posterior")["z"].values, trained_on.numpy()).any()


def prior_like(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(torch.zeros(()), 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x.float())


def test_nothing_is_left_behind_and_the_seed_decides():
    before = torch.get_rng_state()
    one, two, other = (to_arviz(normal_model, normal_guide(), X, num_samples=20, seed=seed) for seed in (3, 3, 4))
    assert torch.equal(before, torch.get_rng_state())
    np.testing.assert_array_equal(group(one, "posterior")["z"], group(two, "posterior")["z"])
    assert (group(one, "posterior")["z"] != group(other, "posterior")["z"]).any()


@pytest.mark.slow
def test_sixty_thousand_data_stay_within_memory():
    """60,000 data, 50 latents, 200 draws: in batches, thinned where a group would be huge."""
    import json
    import subprocess
    import sys

    code = """
import json, resource, torch, pyro, pyro.distributions as dist
from gumbo.inference import to_arviz
x = torch.randn(60_000, 20)
decoder = torch.randn(50, 20)
def model(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(torch.zeros(50), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(z @ decoder, 1.0).to_event(1), obs=x)
def guide(x):
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(x @ decoder.T / 50, 0.5).to_event(1))
groups = ["posterior", "log_likelihood", "sample_stats", "posterior_predictive", "vi_stats"]
idata = to_arviz(model, guide, x, num_samples=200, batch_size=1000, groups=groups, thin={"posterior_predictive": 100})
print(json.dumps([resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, list(idata.posterior["z"].shape)]))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, done.stderr
    gib, shape = json.loads(done.stdout)
    assert shape == [1, 200, 60_000, 50] and gib < 3.3
    assert "the draws need 2.4" in done.stderr.splitlines()[0], done.stderr


# --- plates without a size --------------------------------------------------------------------------------------------


def sizeless(global_mean):
    """As Pyro's VAE examples: the plate has no size, and each site brings its rows by its own shape."""

    def model(x):
        mean = pyro.sample("mean", dist.Normal(x.new_zeros(2), 1.0).to_event(1)) if global_mean else 0.0
        with pyro.plate("data"):
            z = pyro.sample("z", dist.Normal(mean + x.new_zeros(len(x), 2), 1.0).to_event(1))
            pyro.deterministic("twice", 2 * z)
            pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)

    def guide(x):
        mean = 0.0
        if global_mean:
            precision = 1 + len(x) / 2
            mean = pyro.sample("mean", dist.Normal(x.sum(0) / 2 / precision, precision**-0.5).to_event(1))
        with pyro.plate("data"):
            pyro.sample("z", dist.Normal((mean + x) / 2, 0.5**0.5).to_event(1))

    return model, guide


PAIRS = torch.linspace(-1, 2, 14).double().reshape(7, 2)


@pytest.mark.parametrize("batch_size", [3, 256])
def test_a_plate_without_a_size_is_as_long_as_the_rows_in_it(batch_size):
    truth = dist.Normal(0.0, torch.tensor(2.0).double().sqrt()).log_prob(PAIRS).sum(-1)
    found = evaluate(*sizeless(False), PAIRS, num_samples=3, batch_size=batch_size)
    assert found.log_evidence == pytest.approx(truth.mean().item(), abs=1e-12)
    assert found.elbo == pytest.approx(found.log_evidence, abs=1e-12)
    idata = to_arviz(*sizeless(False), PAIRS, num_samples=20, batch_size=min(batch_size, 7))
    assert (
        group(idata, "posterior")["z"].dims[2:] == ("data", "z_dim_0") and group(idata, "posterior").sizes["data"] == 7
    )
    assert group(idata, "posterior")["twice"].dims[2:] == ("data", "twice_dim_0")
    np.testing.assert_allclose(group(idata, "log_likelihood")["x"][0, 0], truth, atol=1e-9)


def test_given_a_global_latent_a_plate_without_a_size_has_local_ones():
    covariance = torch.eye(7).double() * 2 + 1
    whole = dist.MultivariateNormal(torch.zeros(7).double(), covariance).log_prob(PAIRS.T).sum().item()
    assert 7 * evaluate(*sizeless(True), PAIRS, num_samples=5).elbo == pytest.approx(whole, abs=1e-9)
    idata = to_arviz(*sizeless(True), PAIRS, num_samples=20)
    mean = torch.from_numpy(group(idata, "posterior")["mean"].values[0])
    exact = dist.Normal(mean[:, None], torch.tensor(2.0).double().sqrt()).log_prob(PAIRS).sum(-1)
    np.testing.assert_allclose(group(idata, "log_likelihood")["x"][0], exact, atol=1e-9)


def test_what_is_drawn_once_under_a_plate_without_a_size_is_shared():
    def model(x):
        with pyro.plate("data"):
            s = pyro.sample("s", dist.Normal(torch.zeros(()).double(), 1.0))
            pyro.sample("x", dist.Normal(s, 1.0), obs=x)

    def guide(x):
        with pyro.plate("data"):
            pyro.sample("s", dist.Normal(x.sum() / (1 + len(x)), (1 + len(x)) ** -0.5))

    whole = dist.MultivariateNormal(torch.zeros(12).double(), torch.eye(12).double() + 1).log_prob(X).item()
    assert 12 * evaluate(model, guide, X, num_samples=5).elbo == pytest.approx(whole, abs=1e-9)
    idata = to_arviz(model, guide, X, num_samples=20)
    assert group(idata, "posterior")["s"].dims == ("chain", "draw")
    assert group(idata, "log_likelihood")["x"].dims == ("chain", "draw", "data")


# --- masks, events, priors --------------------------------------------------------------------------------------------


def masked(how, draw=None):
    """Rows 3 and 7 are hidden by a mask of the program, of the distribution, or of each coordinate."""
    seen = torch.ones(12, dtype=torch.bool)
    seen[[3, 7]] = False

    def model(x):
        z = pyro.sample("z", dist.Normal(torch.zeros(()).double(), 1.0))
        if draw == "one by one":
            z = torch.tensor(float(z)).double()
        elif draw == "lanes":
            z = z + 0 * z.expand(5, 1)[0, 0]  # takes one draw at a time
        with pyro.plate("data", 12):
            if how == "program":
                with pyro.poutine.mask(mask=seen):
                    pyro.sample("x", dist.Normal(z, 1.0), obs=x)
            elif how == "distribution":
                pyro.sample("x", dist.Normal(z, 1.0).expand([12]).mask(seen), obs=x)
            elif how == "count":
                with pyro.poutine.mask(mask=seen):
                    pyro.sample("x", dist.Categorical(logits=torch.zeros(4).double()), obs=x)
            else:
                fn = dist.Normal(z, 1.0).expand([12, 2]).mask(torch.stack([seen, ~seen], -1)).to_event(1)
                pyro.sample("x", fn, obs=torch.stack([x, x], -1))

    def guide(x):
        pyro.sample("z", dist.Normal(torch.zeros(()).double(), 1.0))

    return model, guide, seen.numpy()


@pytest.mark.parametrize("how", ["program", "distribution", "count", "coordinates"])
@pytest.mark.parametrize("draw", [None, "lanes", "one by one"])
def test_what_a_mask_hides_is_nan_in_the_groups_of_data(how, draw):
    model, guide, seen = masked(how, draw)
    hidden = np.stack([~seen, seen], -1) if how == "coordinates" else ~seen
    x = torch.full((12,), 2) if how == "count" else X
    idata = to_arviz(model, guide, x, num_samples=8)
    for name in ("observed_data", "posterior_predictive", "prior_predictive"):
        found = group(idata, name)["x"].values
        np.testing.assert_array_equal(np.isnan(found), np.broadcast_to(hidden, found.shape))
    assert not np.isnan(group(idata, "log_likelihood")["x"]).any()
    assert "constant_data" not in _arviz.groups_of(idata) or how == "coordinates"


def test_dims_name_the_events_of_an_observed_site():
    def model(x):
        w = pyro.sample("w", dist.Normal(torch.zeros(3).double(), 1.0).to_event(1))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(w, 1.0).to_event(1), obs=x)

    def guide(x):
        pyro.sample("w", dist.Normal(torch.zeros(3).double(), 1.0).to_event(1))

    names = {"dims": {"x": ["column"], "w": ["column"]}, "coords": {"column": ["a", "b", "c"]}}
    idata = to_arviz(model, guide, COLUMNS, num_samples=20, **names)
    for name in ("observed_data", "posterior_predictive", "prior_predictive"):
        assert group(idata, name)["x"].dims[-2:] == ("data", "column")
        assert list(group(idata, name)["column"].values) == ["a", "b", "c"]
    for name in ("log_likelihood", "log_likelihood_conditional"):
        assert group(idata, name)["x"].dims == ("chain", "draw", "data")


@pytest.mark.parametrize("groups", [None, ["constant_data"]])
def test_data_under_a_subsampled_plate_are_not_repeated(groups):
    def model(x, scale):
        z = pyro.sample("z", dist.Normal(torch.zeros(()).double(), 1.0))
        with pyro.plate("data", len(x), subsample_size=5) as rows:
            pyro.sample("x", dist.Normal(z, scale[rows]), obs=x[rows])

    def guide(x, scale):
        pyro.sample("z", dist.Normal(torch.zeros(()).double(), 1.0))

    idata = to_arviz(model, guide, X, torch.ones(12).double(), num_samples=10, groups=groups)
    assert list(group(idata, "constant_data")) == ["scale"]


def test_log_prior_is_that_of_each_latent_by_draw(quiet):
    idata = to_arviz(two_deep, two_deep_guide, Y, num_samples=40, num_local_samples=3)
    prior, drawn = group(idata, "log_prior"), group(idata, "posterior")
    assert {name: prior[name].dims for name in prior} == dict.fromkeys(("mu", "a", "k", "z"), ("chain", "draw"))
    mu = torch.from_numpy(drawn["mu"].values[0])
    a = torch.from_numpy(drawn["a"].values[0])
    z = torch.from_numpy(drawn["z"].transpose("chain", "draw", "group", "obs").values[0])
    np.testing.assert_allclose(prior["mu"][0], dist.Normal(0.0, 1.0).log_prob(mu).sum(-1), atol=1e-9)
    np.testing.assert_allclose(prior["a"][0], dist.Normal(mu[:, :1], 1.0).log_prob(a).sum(-1), atol=1e-9)
    np.testing.assert_allclose(prior["z"][0], dist.Normal(a[..., None], 1.0).log_prob(z).sum((-1, -2)), atol=1e-9)
    np.testing.assert_allclose(prior["k"][0], -30 * math.log(3), rtol=1e-6)


def test_arviz_takes_the_log_prior_for_power_scaling(line_draws, quiet):
    az = _arviz.arviz()
    assert set(group(line_draws, "log_prior")) == set(group(line_draws, "posterior"))
    if _arviz.is_datatree():
        found = az.psense_summary(line_draws)
    else:
        found = az.psens(line_draws, component="prior")
    assert len(found)


@pytest.mark.parametrize("size", [3, 8])
@pytest.mark.parametrize("family", [dist.LKJCholesky, dist.LKJ])
def test_correlation_matrices_are_drawn_at_any_precision(family, size):
    for dtype in (torch.float32, torch.float64):

        def model(x):
            matrix = pyro.sample("matrix", family(size, x.new_ones(())))
            tril = matrix if family is dist.LKJCholesky else torch.linalg.cholesky(matrix)
            with pyro.plate("data", len(x)):
                pyro.sample("x", dist.MultivariateNormal(x.new_zeros(size), scale_tril=tril), obs=x)

        x = torch.eye(size, dtype=dtype)
        options = {"num_samples": 50, "groups": ["posterior"]}  # draws of the prior are of another law
        found = group(to_arviz(model, AutoNormal(model), x, **options), "posterior")["matrix"]
        assert found.shape == (1, 50, size, size)
        own = pyro.poutine.block(model, hide=["x"])
        with pytest.warns(GumboWarning, match="the guide's site 'matrix': LKJ.* draws from another law"):
            found = to_arviz(model, own, x, **options)
        assert group(found, "posterior")["matrix"].shape == (1, 50, size, size)


def test_data_without_a_row_are_refused_in_one_line():
    def model(x):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        with pyro.plate("rows", max(len(x), 1)):
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x):
        pyro.sample("z", dist.Normal(0.0, 1.0))

    with pytest.raises(BadInput, match=r"site 'x' has batch shape \(0,\) where its plates have \(1,\) rows") as caught:
        to_arviz(model, guide, torch.zeros(0), num_samples=4)
    assert "\n" not in str(caught.value)


# --- bad input of the posterior's functions


def _one_row(name="z"):
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample(name, dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample(name, dist.Normal(x / 2, 0.7))

    return model, guide


@pytest.mark.parametrize("name", ["draw", "chain"])
def test_a_site_with_the_name_of_arvizs_dimension_is_refused(name):
    with pytest.raises(BadInput, match=f"site '{name}' has the name of a dimension"):
        to_arviz(*_one_row(name), X[:3], num_samples=10)


def _two_sizes(x):
    a = pyro.sample("a", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    b = pyro.sample("b", dist.Normal(torch.zeros(3), 1.0).to_event(1))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(a.sum() + b.sum(), 1.0), obs=x)


def _prior_of_two_sizes(x):
    pyro.sample("a", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    pyro.sample("b", dist.Normal(torch.zeros(3), 1.0).to_event(1))


@pytest.mark.parametrize(
    "dims, message",
    [
        ({"a": ["part"], "b": ["part"]}, "dimension 'part' has 2 elements in 'a' and 3 in 'b'"),
        ({"a": ["a"]}, "'a' is a variable, and a dimension of 'a'"),
        ({"a": ["b"]}, "'b' is a variable, and a dimension of 'a'"),
    ],
)
def test_names_of_dimensions_that_xarray_would_fill_up_or_drop_are_refused(dims, message):
    with pytest.raises(BadInput, match=message):
        to_arviz(_two_sizes, _prior_of_two_sizes, X.float(), num_samples=4, dims=dims)


def test_chains_and_draws_have_the_coordinates_that_are_given():
    names = {"chain": ["first"], "draw": [10, 20, 30, 40]}
    idata = to_arviz(*_one_row(), X[:3], num_samples=4, coords=names, thin={"posterior_predictive": 2})
    for name in ("posterior", "sample_stats", "vi_stats"):
        assert group(idata, name)["chain"].values.tolist() == ["first"]
    assert group(idata, "posterior")["draw"].values.tolist() == [10, 20, 30, 40]
    assert group(idata, "posterior_predictive")["draw"].values.tolist() == [10, 30]
    found = group(predict(*_one_row(), X[:3], num_samples=4, coords=names), "predictions")
    assert found["draw"].values.tolist() == [10, 20, 30, 40]
    with pytest.raises(BadInput, match="coords for 'chain' has 2 values, but the dimension has 1"):
        to_arviz(*_one_row(), X[:3], num_samples=4, coords={"chain": [0, 1]})


@pytest.mark.skipif(not _arviz.is_datatree(), reason="a DataTree takes no slash in a name")
def test_a_slash_in_a_name_is_refused_in_one_line():
    with pytest.raises(BadInput, match="'part/z' has a slash"):
        to_arviz(*_one_row("part/z"), X[:3], num_samples=4)


def test_names_that_belong_to_nothing_are_refused():
    with pytest.raises(BadInput, match="coords names 'dada'"):
        to_arviz(*_one_row(), X[:3], num_samples=10, coords={"dada": [1, 2, 3]})
    with pytest.raises(BadInput, match="dims names 'y'"):
        to_arviz(*_one_row(), X[:3], num_samples=10, dims={"y": ["unit"]})
    with pytest.raises(BadInput, match="dims names 'y'"):
        predict(*_one_row(), X[:3], num_samples=10, dims={"y": ["unit"]})
    idata = to_arviz(*_one_row(), X[:3], num_samples=10)
    with pytest.raises(UnknownName, match="variable 'foo'"):
        summary(idata, var_names=["foo"])


@pytest.mark.parametrize("made", [to_arviz, diagnose, evaluate, predict])
def test_empty_data_are_refused(made):
    with pytest.raises(BadInput, match="empty"):
        made(*_one_row(), torch.zeros(0))


@pytest.mark.parametrize("made", [to_arviz, diagnose, evaluate])
def test_values_of_another_shape_are_refused(made):
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z.sum(-1), 1.0), obs=x)

    with pytest.raises(BadInput, match=r"site 'z': the guide's values have shape \(3,\)"):
        made(model, _one_row()[1], X[:3].float())


def test_the_evidence_of_a_datum_says_which_latents_are_given():
    def model(x):
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(mu, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x):
        mu = pyro.sample("mu", dist.Normal(0.0, 0.5))
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal((mu + x) / 2, 0.7))

    stats = group(to_arviz(model, guide, X.float(), num_samples=20), "vi_stats")
    assert stats["elbo"].attrs["given"] == stats["log_evidence"].attrs["given"] == "mu"
    assert "given" not in group(to_arviz(*_one_row(), X.float(), num_samples=20), "vi_stats")["elbo"].attrs


# --- sites that poutine.reparam leaves --------------------------------------------------------------------------------


def of_mean(z, x):
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def centred(x):
    of_mean(pyro.sample("z", dist.Normal(x.new_zeros(()), 2.0)), x)


def halves(centering):
    """The sites of LocScaleReparam for a Normal(0, 2), by hand."""
    scale = 2.0**centering

    def model(x):
        z = pyro.sample("z_decentered", dist.Normal(x.new_zeros(()), scale))
        of_mean(pyro.deterministic("z", 2.0 ** (1 - centering) * z), x)

    return model, lambda x: pyro.sample("z_decentered", dist.Normal(x.mean() / 2, 0.4))


def positive(x):
    of_mean(pyro.sample("z", dist.LogNormal(x.new_zeros(()), 0.5)), x)


def positive_by_hand(x):
    of_mean(pyro.deterministic("z", pyro.sample("z_base", dist.Normal(x.new_zeros(()), 0.5)).exp()), x)


def both_by_hand(x):
    """What AutoReparam makes of ``positive`` before its centring is trained."""
    z = pyro.sample("z_base_decentered", dist.Normal(x.new_zeros(()), 0.5**0.5))
    of_mean(pyro.deterministic("z", pyro.deterministic("z_base", 0.5**0.5 * z).exp()), x)


def both_guide(x):
    pyro.sample("z_base_decentered", dist.Normal(x.mean() / 2, 0.3))


def local(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(x.new_zeros(()), 2.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def local_by_hand(x):
    with pyro.plate("data", len(x)):
        z = pyro.deterministic("z", 2 * pyro.sample("z_decentered", dist.Normal(x.new_zeros(()), 1.0)))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def local_guide(x):
    with pyro.plate("data", len(x)):
        pyro.sample("z_decentered", dist.Normal(x / 3, 0.4))


def base_guide(x):
    pyro.sample("z_base", dist.Normal(x.mean() / 2, 0.3))


REPARAMETRISED = {
    "non-centred": (centred, lambda: {"z": LocScaleReparam(0.0)}, *halves(0.0)),
    "half-centred": (centred, lambda: {"z": LocScaleReparam(0.5)}, *halves(0.5)),
    "transform": (positive, lambda: {"z": TransformReparam()}, positive_by_hand, base_guide),
    "auto": (positive, AutoReparam, both_by_hand, both_guide),
    "local": (local, lambda: {"z": LocScaleReparam(0.0)}, local_by_hand, local_guide),
}


@pytest.mark.parametrize("case", REPARAMETRISED.values(), ids=REPARAMETRISED)
def test_a_reparametrised_site_is_a_deterministic_one(case, param_store):
    model, config, by_hand, guide = case
    ours, theirs = (
        to_arviz(program, guide, X, num_samples=30, seed=0) for program in (poutine.reparam(model, config()), by_hand)
    )
    assert set(_arviz.groups_of(ours)) == set(_arviz.groups_of(theirs))
    for name in _arviz.groups_of(theirs):
        assert set(group(ours, name).data_vars) == set(group(theirs, name).data_vars), name
        for variable, array in group(theirs, name).data_vars.items():
            np.testing.assert_allclose(group(ours, name)[variable], array, rtol=1e-6, err_msg=f"{name}/{variable}")
    assert "z" in group(ours, "posterior") and set(group(ours, "observed_data").data_vars) == {"x"}
    found, wanted = (
        evaluate(program, guide, X, num_samples=20, seed=0) for program in (poutine.reparam(model, config()), by_hand)
    )
    assert str(found) == str(wanted)


class Shifted(Reparam):
    """A base draw of another law, whose density the site corrects, as NeuTraReparam does."""

    def apply(self, msg):
        base = pyro.sample(f"{msg['name']}_base", dist.Normal(torch.zeros(()), 1.0).mask(False))
        value = base + 1
        return {"fn": dist.Delta(value, msg["fn"].log_prob(value)), "value": value, "is_observed": True}


def vector(x):
    z = pyro.sample("z", dist.Normal(x.new_zeros(2), 2.0).to_event(1))
    of_mean(z.sum(-1), x)


def vector_by_hand(x):
    parts = [pyro.sample(f"z_split_{i}", dist.Normal(x.new_zeros(1), 2.0).to_event(1)) for i in range(2)]
    of_mean(pyro.deterministic("z", torch.cat(parts, -1), event_dim=1).sum(-1), x)


def vector_guide(x):
    for i in range(2):
        pyro.sample(f"z_split_{i}", dist.Normal(x.mean().expand(1) / 4, 0.4).to_event(1))


def shifted_by_hand(x):
    of_mean(pyro.deterministic("z", pyro.sample("z_base", dist.Normal(x.new_zeros(()) - 1, 2.0)) + 1), x)


def local_shifted_by_hand(x):
    with pyro.plate("data", len(x)):
        z = pyro.deterministic("z", 1 + pyro.sample("z_base", dist.Normal(x.new_zeros(()) - 1, 2.0)))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def local_base_guide(x):
    with pyro.plate("data", len(x)):
        pyro.sample("z_base", dist.Normal(x / 3, 0.4))


WEIGHED = {
    "split": (vector, lambda: {"z": SplitReparam([1, 1], -1)}, vector_by_hand, vector_guide),
    "another base": (centred, lambda: {"z": Shifted()}, shifted_by_hand, base_guide),
    "local": (local, lambda: {"z": Shifted()}, local_shifted_by_hand, local_base_guide),
    "a point": (centred, lambda: {"z": Shifted()}, shifted_by_hand, lambda x: pyro.sample("z_base", dist.Delta(x[0]))),
}


@pytest.mark.parametrize("case", WEIGHED.values(), ids=WEIGHED)
def test_a_reparametrised_site_with_a_density_is_no_data(case, param_store):
    """Its density is a part of the prior."""
    model, config, by_hand, guide = case
    programs = poutine.reparam(model, config()), by_hand
    groups = ["posterior", "observed_data", "log_likelihood", "sample_stats", "posterior_predictive", "log_prior"]
    ours, theirs = (to_arviz(program, guide, X, num_samples=30, seed=0, groups=groups) for program in programs)
    for name in groups[:-1]:
        assert set(group(ours, name).data_vars) == set(group(theirs, name).data_vars), name
        for variable, array in group(theirs, name).data_vars.items():
            if name != "posterior_predictive":
                np.testing.assert_allclose(group(ours, name)[variable], array, rtol=1e-5, err_msg=f"{name}/{variable}")
    assert "z" in group(ours, "posterior") and set(group(ours, "observed_data").data_vars) == {"x"}
    ours, theirs = (group(found, "log_prior").to_array().sum("variable") for found in (ours, theirs))
    np.testing.assert_allclose(ours, theirs, rtol=1e-5)
    found, wanted = (evaluate(program, guide, X, num_samples=20, seed=0) for program in programs)
    for name in ("elbo", "rate", "distortion"):
        assert getattr(found, name) == pytest.approx(getattr(wanted, name), rel=1e-5)


@pytest.mark.parametrize("density", [0.0, -1.5])
def test_a_delta_that_observes_data_stays_data(density):
    """Data at another tensor's point, and data with a likelihood that the program computes."""

    def model(x):
        z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
        with pyro.plate("data", len(x)):
            point = x if density else x.clone()
            pyro.sample("x", dist.Delta(point, z * density + x.new_zeros(len(x))), obs=x)

    idata = to_arviz(model, lambda x: pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0)), X, num_samples=10)
    found = group(idata, "posterior")["z"].values[0]
    np.testing.assert_array_equal(group(idata, "observed_data")["x"], X)
    np.testing.assert_allclose(
        group(idata, "log_likelihood")["x"].values[0], np.broadcast_to(found[:, None] * density, (10, len(X)))
    )


def flat(x):
    of_mean(pyro.sample("z", dist.ImproperUniform(dist.constraints.real, (), ())), x)


def test_an_improper_prior_leaves_out_the_draws_from_it():
    def guide(x):
        pyro.sample("z", dist.Normal(x.mean(), len(x) ** -0.5))

    with pytest.warns(
        GumboWarning, match="site 'z': nothing can be drawn from its ImproperUniform; prior and prior_predictive are"
    ):
        idata = to_arviz(flat, guide, X, num_samples=10)
    assert not {"prior", "prior_predictive"} & set(_arviz.groups_of(idata))
    # The guide is the posterior under a flat prior, so that all weights are the evidence.
    evidence = dist.Normal(X.mean(), 1.0).log_prob(X).sum() + 0.5 * math.log(2 * math.pi / len(X))
    np.testing.assert_allclose(group(idata, "sample_stats")["log_weight"], evidence.expand(1, 10), atol=1e-9)
    to_arviz(flat, guide, X, num_samples=10, groups=["posterior", "log_likelihood"])  # without a warning


class DensityAlone(dist.TorchDistribution):
    """A likelihood of a user's own, without a sampler."""

    arg_constraints, support = {}, dist.constraints.real

    def __init__(self, loc):
        self.loc = loc
        super().__init__(loc.shape, validate_args=False)

    def expand(self, batch_shape, _instance=None):
        return type(self)(self.loc.expand(batch_shape))

    def log_prob(self, value):
        return dist.Normal(self.loc, 1.0).log_prob(value)


class WithoutSupport(DensityAlone):
    @property
    def support(self):
        raise NotImplementedError


def chain_of_unknown_length(loc):
    logits = loc.new_zeros(2, 2)
    return dist.DiscreteHMM(logits[0], logits, dist.Normal(loc[..., None, None] + logits[0], 1.0))


@pytest.mark.parametrize("law", [DensityAlone, WithoutSupport, chain_of_unknown_length])
def test_data_of_a_density_alone_leave_out_the_draws_of_them(law, param_store):
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(len(x)), 1.0))
            pyro.sample("x", law(z), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x.new_zeros(len(x)), 1.0))

    x = X if law is not chain_of_unknown_length else X[:, None].expand(-1, 3)
    with pytest.warns(GumboWarning, match="site 'x': nothing can be drawn from its .*_predictive are left out"):
        idata = to_arviz(model, guide, x, num_samples=10)
    assert {"posterior", "prior"} <= set(_arviz.groups_of(idata))
    assert not {"posterior_predictive", "prior_predictive"} & set(_arviz.groups_of(idata))
    with pytest.raises(BadInput, match="site 'x': nothing can be drawn from its"):
        predict(model, guide, x, num_samples=10)
    assert "nothing can be drawn" in diagnose(model, guide, x, num_samples=100).skipped["calibration"]


def test_the_fault_of_a_users_draw_is_named(param_store):
    class Faulty(DensityAlone):
        def sample(self, sample_shape=()):
            return self.loc @ self.loc[1:]

    def guide(x):
        with pyro.plate("data", len(x)):
            return pyro.sample("z", dist.Normal(x.new_zeros(len(x)), 1.0))

    def model(x):
        pyro.sample("x", Faulty(guide(x)).to_event(1), obs=x)

    with pytest.raises(BadInput, match="site 'x': a draw from its Faulty fails: RuntimeError: "):
        predict(model, guide, X, num_samples=10)


@pytest.mark.parametrize("verb", [evaluate, to_arviz, diagnose])
def test_a_latent_without_numbers_changes_nothing(verb):
    def program(with_empty, x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros_like(x), 1.0))
            if with_empty:
                pyro.sample("empty", dist.Normal(x.new_zeros(len(x), 0), 1.0).to_event(1))
        return z

    def model(x, with_empty=True):
        z = program(with_empty, x)
        with pyro.plate("rows", len(x)):
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    found = [
        verb(partial(model, with_empty=empty), partial(program, empty), X, num_samples=100, seed=0)
        for empty in (True, False)
    ]
    if verb is to_arviz:
        assert group(found[0], "posterior")["empty"].shape == (1, 100, len(X), 0)
        found = [float(group(one, "sample_stats")["log_weight"].sum()) for one in found]
        assert found[0] == found[1]
    elif verb is evaluate:
        assert found[0].elbo == found[1].elbo


@pytest.mark.parametrize("verb", [evaluate, to_arviz])
def test_laws_without_a_support(verb):
    def model(x, law=lambda x: dist.Gamma(torch.ones_like(x), 1.0)):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", law(x))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", RejectionStandardGamma(x.abs() + 1))

    verb(model, guide, X, num_samples=10)
    with pytest.raises(BadInput, match="site 'z': its WithoutSupport has no support"):
        verb(partial(model, law=WithoutSupport), guide, X, num_samples=10)


@pytest.mark.parametrize("kind", [transforms.block_autoregressive, transforms.planar])
@pytest.mark.parametrize("verb", [evaluate, to_arviz, diagnose])
def test_a_flow_without_an_inverse_is_named(verb, kind, param_store):
    def model(x):
        of_mean(pyro.sample("z", dist.Normal(x.new_zeros(2), 2.0).to_event(1)).sum(), x)

    guide = AutoNormalizingFlow(model, partial(transforms.iterated, 1, kind))
    guide(X.float())
    said = rf"site '_Auto.*_latent'.*{kind.__name__.replace('_', '')} has no inverse.*take a flow that has one"
    with pytest.raises(UnsupportedSite, match=f"(?i){said}"):
        verb(model, guide, X.float(), num_samples=100)
