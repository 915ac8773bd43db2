"""What other libraries take: ArviZ's converters by their argument names, and leave-one-out corrected for the guide."""

from __future__ import annotations

import inspect
import warnings

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import MCMC, NUTS, SVI, Predictive, Trace_ELBO
from pyro.infer.autoguide import AutoDelta, AutoNormal

from gumbo.errors import BadInput, GumboWarning, UnknownName
from gumbo.inference import diagnose, evaluate, from_pyro_svi, loo_approximate_posterior, predict, to_arviz
from gumbo.inference.posterior import _arviz

X = torch.linspace(-1.0, 2.0, 12).double()
ZERO, ONE = torch.zeros(()).double(), torch.ones(()).double()


def group(idata, name):
    return _arviz.dataset_of(idata, name)


def regression(t, y=None):
    slopes = pyro.sample("slopes", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    with pyro.plate("rows", len(t)):
        pyro.sample("y", dist.Normal(t @ slopes, 0.5), obs=y)


T = torch.stack([torch.ones(6), torch.linspace(-1, 1, 6)], -1)
Y = torch.tensor([0.1, 0.4, 0.2, 0.9, 1.1, 1.3])


@pytest.fixture
def svi(param_store):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made = SVI(regression, AutoNormal(regression), pyro.optim.Adam({"lr": 0.05}), loss=Trace_ELBO())
        for _ in range(20):
            made.step(T, Y)
    return made


def test_a_fitted_svi_converts_as_to_arviz_does(svi):
    idata = from_pyro_svi(svi, model_args=(T,), model_kwargs={"y": Y}, num_samples=40)
    assert set(_arviz.groups_of(idata)) == {"posterior", "sample_stats", "vi_stats", "observed_data", "constant_data"}
    known = to_arviz(regression, svi.guide, T, Y, num_samples=40)
    np.testing.assert_array_equal(group(idata, "posterior")["slopes"], group(known, "posterior")["slopes"])
    assert "khat" in group(idata, "vi_stats") or "khat_global" in group(idata, "vi_stats")


def test_true_draws_what_arviz_expects_to_be_given(svi):
    idata = from_pyro_svi(
        svi, model_args=(T, Y), prior=True, posterior_predictive=True, log_likelihood=True, num_samples=300
    )
    assert group(idata, "prior")["slopes"].shape == (1, 300, 2)
    assert group(idata, "prior_predictive")["y"].dims == ("chain", "draw", "rows")
    assert group(idata, "posterior_predictive")["y"].shape == group(idata, "log_likelihood")["y"].shape == (1, 300, 6)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of k̂: the guide is hardly trained
        found = _arviz.arviz().loo(idata)
    assert np.isfinite(float(getattr(found, "elpd", None) or found["elpd_loo"]))


def test_given_draws_get_the_names_of_the_programs_dimensions(svi):
    with torch.no_grad():
        prior = Predictive(regression, num_samples=20)(T)
        drawn = Predictive(regression, guide=svi.guide, num_samples=25)(T)
        ahead = Predictive(regression, guide=svi.guide, num_samples=25)(T[:2])
    idata = from_pyro_svi(
        svi,
        model_args=(T, Y),
        prior=prior,
        posterior_predictive={"y": drawn["y"]},
        predictions={"y": ahead["y"]},
        constant_data={"time": T[:, 1]},
        predictions_constant_data={"time": T[:2, 1]},
        coords={"rows": list("abcdef"), "term": ["intercept", "slope"]},
        dims={"slopes": ["term"], "time": ["rows"]},
        pred_dims={"time": ["later"]},
        num_samples=10,
    )
    assert list(group(idata, "prior")) == ["slopes"] and list(group(idata, "prior_predictive")) == ["y"]
    assert group(idata, "prior")["slopes"].dims == ("chain", "draw", "term") == group(idata, "posterior")["slopes"].dims
    np.testing.assert_array_equal(group(idata, "posterior_predictive")["y"][0], drawn["y"])
    assert group(idata, "posterior_predictive")["rows"].values.tolist() == list("abcdef")
    assert group(idata, "predictions")["y"].dims == ("chain", "draw", "rows")
    assert group(idata, "predictions")["rows"].values.tolist() == [0, 1]
    assert group(idata, "constant_data")["time"].dims == ("rows",)
    assert group(idata, "predictions_constant_data")["time"].dims == ("later",)


def test_latents_that_predictive_returns_beside_the_data_are_no_predictions(svi):
    with torch.no_grad():
        prior = Predictive(regression, num_samples=20)(T)
        drawn = Predictive(regression, guide=svi.guide, num_samples=20)(T)
    assert set(drawn) == set(prior) == {"slopes", "y"}
    given = {"prior": prior, "posterior_predictive": drawn}
    with_svi = from_pyro_svi(svi, model_args=(T, Y), num_samples=10, **given)
    alone = from_pyro_svi(posterior={"slopes": drawn["slopes"]}, **given)
    for idata in (with_svi, alone):
        assert list(group(idata, "prior")) == ["slopes"] and list(group(idata, "prior_predictive")) == ["y"]
        assert list(group(idata, "posterior_predictive")) == ["y"]


def test_dims_may_name_every_dimension_as_in_arviz():
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z.sum(-1), 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(torch.zeros(2), 0.7).to_event(1))

    pair = SVI(model, guide, pyro.optim.Adam({}), loss=Trace_ELBO())
    idata = from_pyro_svi(pair, model_args=(torch.ones(3),), dims={"z": ["school", "part"]}, num_samples=5)
    assert group(idata, "posterior")["z"].dims == ("chain", "draw", "school", "part")


def test_draws_alone_are_cut_into_chains():
    draws = torch.arange(24.0).reshape(8, 3)
    idata = from_pyro_svi(
        posterior={"z": draws}, prior={"x": draws, "z": draws}, posterior_predictive={"x": draws}, num_chains=2
    )
    assert group(idata, "posterior")["z"].shape == (2, 4, 3)
    np.testing.assert_array_equal(group(idata, "posterior")["z"][1, 0], draws[4])
    assert group(idata, "posterior")["z"].dims == ("chain", "draw", "z_dim_0")
    assert list(group(idata, "prior")) == ["z"] and list(group(idata, "prior_predictive")) == ["x"]


def test_the_arguments_are_those_of_arvizs_converters():
    ours = set(inspect.signature(from_pyro_svi).parameters)
    az = _arviz.arviz()
    theirs = set(inspect.signature(az.from_numpyro_svi if _arviz.is_datatree() else az.from_pyro).parameters)
    # NumPyro's SVI holds no parameters; the others of 1.x have no part in Pyro.
    assert theirs - ours <= {"svi_result", "index_origin", "extra_event_dims"}


def test_what_cannot_be_converted_is_one_line(svi):
    draws = {"z": torch.zeros(5, 2)}
    cases = [
        ((), {}, "nothing to convert"),
        ((regression,), {}, "svi is an object of class function: expected pyro.infer.SVI; .* to_arviz"),
        ((MCMC(NUTS(regression), num_samples=1),), {}, "class MCMC: expected .*from_pyro takes MCMC"),
        ((svi,), {"model_args": (T, Y), "posterior": draws}, "both given"),
        ((), {"posterior": draws, "num_chains": 2}, "the draws of 'z' have shape .*a multiple of num_chains"),
        ((), {"posterior": draws, "num_chains": 0}, "num_chains is 0"),
        ((), {"posterior": draws, "dims": {"z": ["a", "b"]}}, "dims for 'z' names 2 dimensions, but it has 1"),
        ((), {"posterior": draws, "dims": {"z": ["a"]}, "coords": {"a": [1]}}, "coords for 'a' has 1 values"),
        ((), {"prior": 3}, "prior is an object of class int"),
    ]
    for args, options, said in cases:
        with pytest.raises(BadInput, match=said) as caught:
            from_pyro_svi(*args, **options)
        assert "\n" not in str(caught.value)


# --- leave-one-out ----------------------------------------------------------------------------------------------------


def mean_of_all(x):
    mean = pyro.sample("mean", dist.Normal(ZERO, 2 * ONE))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(mean, ONE), obs=x)


def wrong_guide(x):
    """Half a standard deviation off, and a third too wide."""
    sd = (0.25 + len(x)) ** -0.5
    pyro.sample("mean", dist.Normal(x.sum() * sd**2 + 0.5 * sd, 1.3 * sd))


def exact_densities(x, variance=1.0):
    """log p(x_n | all others) under a Normal mean of prior variance 4."""
    found = []
    for n in range(len(x)):
        rest = torch.cat([x[:n], x[n + 1 :]])
        posterior = 1 / (0.25 + len(rest) / variance)
        centre = posterior * rest.sum() / variance
        found.append(dist.Normal(centre, (posterior + variance) ** 0.5).log_prob(x[n]).item())
    return np.array(found)


def total(found):
    return float(getattr(found, "elpd", None) or found["elpd_loo"])


def densities(found):
    return np.asarray(found.elpd_i if hasattr(found, "elpd_i") else found.loo_i)


def test_leave_one_out_is_that_of_the_posterior_and_not_of_the_guide():
    idata = to_arviz(mean_of_all, wrong_guide, X, num_samples=20_000)
    exact = exact_densities(X)
    found = loo_approximate_posterior(idata, pointwise=True)
    # 20,000 draws: the weights' relative error is about 1 %, that of each density about a thousandth.
    np.testing.assert_allclose(densities(found), exact, atol=0.006)
    assert total(found) == pytest.approx(exact.sum(), abs=0.03)
    assert abs(total(_arviz.arviz().loo(idata)) - exact.sum()) > 0.1
    assert float(np.asarray(found.pareto_k).max()) < 0.7 and found.n_data_points == len(X)


def test_local_latents_are_integrated_out_and_other_draws_thinned():
    def model(x):
        mean = pyro.sample("mean", dist.Normal(ZERO, 2 * ONE))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(mean, ONE))
            pyro.sample("x", dist.Normal(z, ONE), obs=x)

    def guide(x):
        sd = (0.25 + len(x) / 2) ** -0.5
        mean = pyro.sample("mean", dist.Normal(x.sum() / 2 * sd**2 + 0.5 * sd, 1.3 * sd))
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal((x + mean) / 2, 0.5**0.5))  # exact given the mean

    idata = to_arviz(model, guide, X, num_samples=8000, thin={"log_likelihood": 2}, num_local_samples=2)
    found = loo_approximate_posterior(idata, pointwise=True)
    np.testing.assert_allclose(densities(found), exact_densities(X, 2.0), atol=0.012)


@pytest.mark.filterwarnings("ignore:The inplace keyword")  # ArviZ 0.x's own, of pandas
def test_the_result_can_be_compared():
    idata = to_arviz(mean_of_all, wrong_guide, X, num_samples=500)
    found = loo_approximate_posterior(idata, pointwise=True)
    assert len(_arviz.arviz().compare({"one": found, "same": found})) == 2


def test_leave_one_out_refuses_in_one_line(param_store):
    def local(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(ZERO, ONE))
            pyro.sample("x", dist.Normal(z, ONE), obs=x)

    def local_guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x / 2, 0.7 * ONE))

    def two(x):
        mean = pyro.sample("mean", dist.Normal(ZERO, ONE))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(mean, ONE), obs=x)
            pyro.sample("y", dist.Normal(mean, ONE), obs=x)

    point = AutoDelta(mean_of_all)
    cases = [
        ((local, local_guide), {}, {}, BadInput, 'every latent is local.*vi_stats\\["log_evidence"\\]'),
        ((mean_of_all, wrong_guide), {"groups": ["posterior"]}, {}, BadInput, "no group 'log_likelihood'"),
        ((two, wrong_guide), {}, {}, BadInput, "log_likelihood has 2 variables: name one of x, y"),
        ((two, wrong_guide), {}, {"var_name": "z"}, UnknownName, "unknown var_name 'z'"),
        ((mean_of_all, point), {}, {}, BadInput, "a point at mean"),
    ]
    for pair, made, options, kind, said in cases:
        idata = to_arviz(*pair, X, num_samples=100, **made)
        with pytest.raises(kind, match=said) as caught:
            loo_approximate_posterior(idata, **options)
        assert "\n" not in str(caught.value)
    assert np.isfinite(total(loo_approximate_posterior(to_arviz(two, wrong_guide, X, num_samples=200), "y")))


# --- factors that are part of a datum's likelihood --------------------------------------------------------------------


def positive_mass(mean):
    return dist.Normal(-mean, ONE).cdf(-ZERO).log()  # of a Normal of this mean


def truncated(x):
    """Each datum's normalizer is a factor, in a plate inside that of the data."""
    mean = pyro.sample("mean", dist.Normal(ZERO, 2 * ONE))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(mean, ONE), obs=x)
        with pyro.plate("halves", 2):
            pyro.factor("norm", -positive_mass(mean).expand(*mean.shape[:-1], len(x)) / 2)


def censored(x):
    """Data above 1 are only known to be so: their density is masked, their probability a factor."""
    mean = pyro.sample("mean", dist.Normal(ZERO, 2 * ONE))
    above = x > 1
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(mean, ONE).mask(~above), obs=x)
        pyro.factor("above", torch.where(above, positive_mass(mean - 1), ZERO))


def of_two_sites(x):
    mean = pyro.sample("mean", dist.Normal(ZERO, 2 * ONE))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(mean, ONE), obs=x)
        pyro.sample("y", dist.Normal(-mean, ONE), obs=x)
        pyro.factor("both", mean * x)


def without_a_plate(x):
    mean = pyro.sample("mean", dist.Normal(ZERO, 2 * ONE))
    pyro.sample("x", dist.Normal(mean, ONE).expand([len(x)]), obs=x)
    pyro.factor("tilt", mean * x)


def factors_alone(x):
    mean = pyro.sample("mean", dist.Normal(ZERO, 2 * ONE))
    with pyro.plate("data", len(x)):
        pyro.factor("x", dist.Normal(mean, ONE).log_prob(x))
        pyro.factor("tilt", mean * x)


def penalized(x):
    mean = pyro.sample("mean", dist.Normal(ZERO, 2 * ONE))
    pyro.factor("penalty", -(mean**2))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(mean, ONE), obs=x)


def normal(x, mean):
    return dist.Normal(mean, ONE).log_prob(x)


WITH_FACTORS = {
    "truncated": (truncated, "x", lambda x, mean: normal(x, mean) - positive_mass(mean)),
    "censored": (censored, "x", lambda x, mean: torch.where(x > 1, positive_mass(mean - 1), normal(x, mean))),
    "two sites": (of_two_sites, "x+y", lambda x, mean: normal(x, mean) + normal(x, -mean) + mean * x),
    "without a plate": (without_a_plate, "x", lambda x, mean: normal(x, mean) + mean * x),
    "alone": (factors_alone, "x+tilt", lambda x, mean: normal(x, mean) + mean * x),
    "of the prior": (penalized, "x", normal),
}


@pytest.mark.parametrize("name", ["log_likelihood", "log_likelihood_conditional"])
@pytest.mark.parametrize(("model", "variable", "exact"), WITH_FACTORS.values(), ids=WITH_FACTORS)
def test_a_factor_of_a_datum_is_part_of_its_log_likelihood(model, variable, exact, name):
    x = X.abs() if model is truncated else X
    idata = to_arviz(model, wrong_guide, x, num_samples=50, groups=["posterior", name])
    found = group(idata, name)
    assert list(found.data_vars) == [variable] and found[variable].dims[2:] == (
        ("x_dim_0",) if model is without_a_plate else ("data",)
    )
    means = torch.as_tensor(group(idata, "posterior")["mean"].values[0])[:, None]
    np.testing.assert_allclose(found[variable].values[0], exact(x, means), rtol=1e-12)


def test_prior_draws_that_do_not_follow_a_factor_are_announced():
    with pytest.warns(GumboWarning, match="factor 'penalty' depends on the latents, and the draws of prior and"):
        to_arviz(penalized, wrong_guide, X, num_samples=20)
    to_arviz(penalized, wrong_guide, X, num_samples=20, groups=["posterior", "posterior_predictive"])

    def constant(x):
        mean = pyro.sample("mean", dist.Normal(ZERO, 2 * ONE))
        pyro.factor("constant", -ONE)
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(mean, ONE), obs=x)

    to_arviz(constant, wrong_guide, X, num_samples=20)


@pytest.mark.parametrize("model", [truncated, censored])
def test_data_that_are_drawn_without_their_factor_are_announced(model):
    for name in ("posterior_predictive", "prior_predictive"):
        with pytest.warns(GumboWarning, match=f"the data drawn in {name} ignore it: they are wrong if"):
            to_arviz(model, wrong_guide, X.abs(), num_samples=20, groups=[name])
    with pytest.warns(GumboWarning, match="the data drawn in predictions ignore it"):
        predict(model, wrong_guide, X.abs(), num_samples=20)
    to_arviz(model, wrong_guide, X.abs(), num_samples=20, groups=["posterior", "prior", "log_likelihood"])

    def weighted(x):
        """A constant of each row changes no law."""
        mean = pyro.sample("mean", dist.Normal(ZERO, 2 * ONE))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(mean, ONE), obs=x)
            pyro.factor("weight", x)

    to_arviz(weighted, wrong_guide, X, num_samples=20)
    predict(weighted, wrong_guide, X, num_samples=20)


@pytest.mark.parametrize("read", [True, False])
def test_draws_of_a_masked_prior_are_announced(read):
    """A flat prior is drawn as if it were not masked; an element that nothing reads has no prior."""

    def model(x):
        mean = pyro.sample("mean", dist.Normal(ZERO, 2 * ONE).mask(False))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(mean if read else ZERO, ONE), obs=x)

    def guide(x):
        pyro.sample("mean", dist.Normal(x.mean(), len(x) ** -0.5).mask(read))

    if not read:
        to_arviz(model, guide, X, num_samples=20)
        return
    with pytest.warns(GumboWarning, match="the prior of site 'mean' is masked, and the draws of prior and prior_pred"):
        to_arviz(model, guide, X, num_samples=20)
    to_arviz(model, guide, X, num_samples=20, groups=["posterior", "posterior_predictive"])


@pytest.mark.parametrize("observed", [True, False])
def test_draws_of_faulty_samplers_are_announced(observed):
    laws = {True: dist.SineBivariateVonMises(ZERO, ZERO, ONE, ONE, ONE / 2), False: dist.LKJCholesky(3, ONE)}

    def model(x):
        pyro.sample("mean", dist.Normal(ZERO, ONE))
        pyro.sample("odd", laws[observed], obs=x if observed else None)
        pyro.sample("x", dist.Normal(ZERO, ONE).expand([2]).to_event(1), obs=x)

    def guide(x):
        pyro.sample("mean", dist.Normal(ZERO, ONE))
        if not observed:
            pyro.sample("odd", dist.Delta(torch.eye(3).double(), event_dim=2))

    if observed:
        with pytest.warns(GumboWarning, match="draws from another law .*; predictions hold such draws"):
            predict(model, guide, X[:2], num_samples=10)
    groups = {"prior", "prior_predictive"} | ({"posterior_predictive"} if observed else set())
    for name in ("prior", "prior_predictive", "posterior_predictive"):
        if name in groups:
            with pytest.warns(GumboWarning, match=f"site 'odd': .* draws from another law .*; {name} hold such draws"):
                to_arviz(model, guide, X[:2], num_samples=10, groups=[name])
        else:
            to_arviz(model, guide, X[:2], num_samples=10, groups=[name])


@pytest.mark.parametrize("size", [2, 3])
def test_a_guide_that_draws_from_another_law_than_its_density_is_announced(size):
    """LKJCholesky is right in two dimensions."""

    def model(x):
        root = pyro.sample("root", dist.LKJCholesky(size, 2 * ONE))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.MultivariateNormal(torch.zeros(size).double(), scale_tril=root), obs=x)

    def guide(x):
        pyro.sample("root", dist.LKJCholesky(size, 2 * ONE))

    x, quick = torch.eye(size).double(), {"num_simulations": 20, "refine_steps": 0, "num_samples": 100}
    for asked in (
        lambda: evaluate(model, guide, x, num_samples=10),
        lambda: to_arviz(model, guide, x, num_samples=10, groups=["posterior"]),
        lambda: diagnose(model, guide, x, **quick),
    ):
        if size == 2:
            asked()
        else:
            with pytest.warns(
                GumboWarning, match="the guide's site 'root': .* importance weights, evidence and ELBO are wrong"
            ):
                asked()


@pytest.mark.parametrize("model", [truncated, censored])
def test_leave_one_out_of_data_with_factors_is_that_of_quadrature(model):
    x = X.abs() if model is truncated else X
    grid = torch.linspace(-6, 6, 20_001).double()[:, None]
    terms = WITH_FACTORS[model.__name__][2](x, grid)
    posterior = (dist.Normal(ZERO, 2 * ONE).log_prob(grid) + terms.sum(1, keepdim=True)).softmax(0)
    exact = -(posterior * (-terms).exp()).sum(0).log()
    centre = (posterior * grid).sum()
    spread = (posterior * (grid - centre) ** 2).sum().sqrt()

    def guide(x):
        pyro.sample("mean", dist.StudentT(8 * ONE, centre, 1.1 * spread))

    groups = ["posterior", "log_likelihood", "sample_stats"]
    found = loo_approximate_posterior(to_arviz(model, guide, x, num_samples=20_000, groups=groups), pointwise=True)
    np.testing.assert_allclose(densities(found), exact, atol=0.02)


def test_observed_sites_without_a_factor_keep_their_own_log_likelihood():
    def model(x):
        mean = pyro.sample("mean", dist.Normal(ZERO, 2 * ONE))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(mean, ONE), obs=x)
            with pyro.plate("again", 3):
                pyro.sample("y", dist.Normal(mean, ONE), obs=x.expand(3, -1))
                pyro.factor("tilt", mean * x)

    idata = to_arviz(model, wrong_guide, X, num_samples=20, groups=["posterior", "log_likelihood"])
    found, means = group(idata, "log_likelihood"), torch.as_tensor(group(idata, "posterior")["mean"].values[0])
    np.testing.assert_allclose(found["x"].values[0], normal(X, means[:, None]), rtol=1e-12)
    tilted = normal(X, means[:, None, None]) + means[:, None, None] * X
    np.testing.assert_allclose(found["y"].values[0], tilted.expand(-1, 3, -1), rtol=1e-12)


@pytest.mark.parametrize("term", [lambda mean, x: (mean * x).sum(-1), lambda mean, x: -len(x) * positive_mass(mean)])
def test_a_factor_that_spans_the_data_is_left_out_with_a_warning(term):
    def model(x):
        mean = pyro.sample("mean", dist.Normal(ZERO, 2 * ONE))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(mean, ONE), obs=x)
        pyro.factor("norm", term(mean, x))

    with pytest.warns(GumboWarning, match="factor 'norm' depends on the data and is outside the plates"):
        to_arviz(model, wrong_guide, X, num_samples=20, groups=["log_likelihood"])
