"""`predict`: draws for new data in ArviZ's group `predictions`, from guides that can know something of them."""

from __future__ import annotations

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import config_enumerate
from pyro.infer.autoguide import AutoDelta, AutoGuideList, AutoMultivariateNormal, AutoNormal
from pyro.poutine import block

from gumbo.errors import BadInput
from gumbo.guides import guides
from gumbo.inference import fit, predict, refine
from gumbo.inference.posterior import _arviz
from gumbo.models import models

NOISE = 0.5
ONE = torch.ones(()).double()
T = torch.linspace(-1.0, 1.0, 20).double()
Y = 1.5 * T + 0.2
NEW = torch.tensor([2.0, -3.0, 0.5]).double()


def line(t, y=None):
    w = pyro.sample("w", dist.Normal(torch.zeros(2).double(), 1.0).to_event(1))
    with pyro.plate("data", len(t)):
        mean = pyro.deterministic("mean", w[..., :1] * t + w[..., 1:])
        pyro.sample("y", dist.Normal(mean, NOISE), obs=y)


def line_posterior():
    design = torch.stack([T, torch.ones_like(T)], 1)
    covariance = torch.linalg.inv(torch.eye(2).double() + design.T @ design / NOISE**2)
    return covariance @ design.T @ Y / NOISE**2, covariance


def line_guide(t, y=None):
    mean, covariance = line_posterior()
    pyro.sample("w", dist.MultivariateNormal(mean, covariance))


def variable(found, name="y", group="predictions"):
    return _arviz.dataset_of(found, group)[name]


def within(values: np.ndarray, mean: float, variance: float) -> bool:
    """Mean and variance of independent Normal draws, each within five standard errors."""
    count = len(values)
    return (
        abs(values.mean() - mean) < 5 * (variance / count) ** 0.5
        and abs(values.var() - variance) < 5 * variance * (2 / count) ** 0.5
    )


def test_a_regression_predicts_at_new_covariates_what_the_closed_form_does():
    mean, covariance = line_posterior()
    found = predict(line, line_guide, NEW, num_samples=4000)
    drawn = variable(found)
    assert drawn.dims == ("chain", "draw", "data") and drawn.shape == (1, 4000, 3)
    for row, t in enumerate(NEW):
        design = torch.stack([t, torch.ones(()).double()])
        spread = float(design @ covariance @ design)
        assert within(drawn.values[0, :, row], float(design @ mean), spread + NOISE**2)
        assert within(variable(found, "mean").values[0, :, row], float(design @ mean), spread)
    constant = variable(found, "t", "predictions_constant_data")
    assert constant.dims == ("data",) and np.array_equal(constant.values, NEW.numpy())
    assert set(_arviz.groups_of(found)) == {"predictions", "predictions_constant_data"}


def test_a_value_for_what_is_predicted_gives_its_shape_alone():
    left_out = predict(line, line_guide, NEW, num_samples=50)
    given = predict(line, line_guide, (NEW, torch.full((3,), 1e6).double()), num_samples=50)
    assert abs(variable(given).values).max() < 100
    assert "y" not in _arviz.dataset_of(given, "predictions_constant_data")
    assert variable(left_out).shape == variable(given).shape


@pytest.mark.parametrize("batch_size", [None, 2])
def test_batches_of_rows_share_the_global_draws(batch_size):
    drawn = variable(predict(line, line_guide, NEW, num_samples=200, batch_size=batch_size), "mean").values[0]
    slope = (drawn[:, 0] - drawn[:, 1]) / 5
    assert np.allclose(drawn[:, 2], drawn[:, 0] - 1.5 * slope)


def test_the_same_seed_draws_the_same_and_guides_are_chains():
    one, two = (predict(line, line_guide, NEW, num_samples=20, seed=3) for _ in range(2))
    assert np.array_equal(variable(one).values, variable(two).values)
    chains = variable(predict(line, [line_guide, line_guide], NEW, num_samples=20, coords={"data": [7, 8, 9]}))
    assert chains.shape == (2, 20, 3) and list(chains["data"].values) == [7, 8, 9]
    assert not np.array_equal(chains.values[0], chains.values[1])


@pytest.mark.parametrize("family", [AutoNormal, AutoMultivariateNormal, AutoDelta])
def test_autoguides_of_global_latents_predict_any_number_of_rows(family, param_store):
    guide = family(line)
    fit(line, guide, (T, Y), epochs=2, progress=False)
    for rows in (NEW, NEW[:1], torch.zeros(len(T)).double()):
        assert variable(predict(line, guide, rows, num_samples=10)).shape == (1, 10, len(rows))


def local(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(torch.zeros(()).double(), 1.0))
        pyro.sample("x", dist.Normal(z, NOISE), obs=x)


def local_guide(x):
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(x / (1 + NOISE**2), NOISE / (1 + NOISE**2) ** 0.5))


def test_a_guide_that_reads_the_data_reconstructs_new_rows():
    drawn = variable(predict(local, local_guide, NEW, num_samples=4000), "x").values[0]
    variance = NOISE**2 / (1 + NOISE**2) + NOISE**2
    for row, x in enumerate(NEW):
        assert within(drawn[:, row], float(x) / (1 + NOISE**2), variance)


@pytest.mark.parametrize("name", ["gaussian-vae", "categorical-vae", "conditional-vae", "structured-prediction"])
def test_the_collections_pairs_predict_new_rows(name):
    model = models[name](data_shape=(1, 4, 4), **models[name].variants[0])
    word = {"categorical-vae": "categorical", "structured-prediction": "bernoulli"}.get(name, "normal")
    inputs = {"x": torch.bernoulli(torch.full((5, *model.data_shape), 0.5))}
    inputs |= {key: torch.zeros(5, *shape) for key, shape in model.conditions.items()}
    found = predict(model, guides[word](model), inputs, num_samples=6)
    assert variable(found, "x").shape == (1, 6, 5, *model.data_shape)
    assert set(np.unique(variable(found, "x").values)) <= {0, 1} or name == "gaussian-vae"
    for key in model.conditions:
        assert key in _arviz.dataset_of(found, "predictions_constant_data")


def test_a_program_without_latents_predicts_too():
    model = models["neural-classifier"](data_shape=(1, 4, 4), **models["neural-classifier"].variants[0])
    found = predict(model, guides["none"](model), torch.zeros(5, 1, 4, 4), num_samples=6)
    assert variable(found, model.observed[0]).shape[:3] == (1, 6, 5)


@config_enumerate
def mixture(x):
    means = pyro.sample("means", dist.Normal(torch.zeros(2).double(), 10.0).to_event(1))
    with pyro.plate("data", len(x)):
        which = pyro.sample("which", dist.Categorical(torch.tensor([0.5, 0.5]).double()))
        pyro.sample("x", dist.Normal(means[which], 0.1), obs=x)


def test_enumerated_assignments_of_new_rows_are_drawn_from_their_exact_conditional():
    def guide(x):
        pyro.sample("means", dist.Normal(torch.tensor([-5.0, 5.0]).double(), 1e-3).to_event(1))

    found = predict(mixture, guide, torch.tensor([5.0, -5.0, 5.0]).double(), num_samples=20)
    assert (variable(found, "which").values == [1, 0, 1]).all()
    assert (np.sign(variable(found, "x").values) == [1, -1, 1]).all()


# --- sites without a value --------------------------------------------------------------------------------------------

PROGRAMS = {  # how the programs take many draws: along a plate, by vmap, one by one
    "plates": lambda w: w.sum(-1),
    "lanes": lambda w: w.reshape(2).sum(),
    "single": lambda w: w.reshape(2).sum().item(),
}
LEFT_OPEN = {
    "Normal": dist.Normal(torch.tensor(1.0).double(), 2.0),
    "Gamma": dist.Gamma(torch.tensor(2.0).double(), 1.0),
    "Beta": dist.Beta(torch.tensor(2.0).double(), 3.0),
    "Bernoulli": dist.Bernoulli(torch.tensor(0.3).double()),
    "Poisson": dist.Poisson(torch.tensor(3.0).double()),
    "Binomial": dist.Binomial(5, torch.tensor(0.3).double()),
}


@pytest.mark.parametrize("law", LEFT_OPEN.values(), ids=LEFT_OPEN)
@pytest.mark.parametrize("way", PROGRAMS)
def test_a_site_left_open_that_no_latent_moves_has_its_own_value_in_every_draw(way, law):
    def model(t, y=None):
        w = pyro.sample("w", dist.Normal(torch.zeros(2).double(), 1.0).to_event(1))
        mean = PROGRAMS[way](w)
        with pyro.plate("groups", 2, dim=-2), pyro.plate("data", len(t), dim=-1):
            s = pyro.sample("s", law)
            pyro.sample("y", dist.Normal(mean + t + 3 * s, 0.1), obs=y)

    def guide(t, y=None):
        pyro.sample("w", dist.Normal(torch.ones(2).double(), 0.01).to_event(1))

    count = 500 if way == "single" else 4000
    found = predict(model, guide, NEW, num_samples=count)
    open_site, follower = variable(found, "s").values[0], variable(found).values[0]
    assert open_site.shape == (count, 2, 3)
    mean, variance = float(law.mean), float(law.variance)
    for cell in open_site.reshape(count, -1).T:
        assert abs(cell.mean() - mean) < 5 * (variance / count) ** 0.5
        assert abs(cell.var() / variance - 1) < (0.5 if way == "single" else 0.2)
    left = follower - 2 - NEW.numpy() - 3 * open_site
    assert abs(left).max() < 1 and abs(np.corrcoef(open_site.reshape(count, -1).T) - np.eye(6)).max() < 0.25


@pytest.mark.parametrize("given", [False, True])
def test_an_observation_that_no_latent_moves_is_drawn_alike_with_and_without_a_value(given):
    def coins(t, y=None):
        pyro.sample("w", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(t)):
            pyro.sample("y", dist.Bernoulli(0.5), obs=y)

    def guide(t, y=None):
        pyro.sample("w", dist.Normal(1.0, 0.01))

    found = predict(coins, guide, (torch.ones(6), torch.zeros(6)) if given else torch.ones(6), num_samples=1000)
    assert (abs(variable(found).values[0].mean(0) - 0.5) < 5 * 0.5 / 1000**0.5).all()


def test_draws_of_a_vector_left_open_are_not_mistaken_for_rows():
    def model(x, y=None):  # two draws of `s` beside each other would pass for a matrix
        pyro.sample("w", dist.Normal(torch.zeros(()).double(), 1.0))
        s = pyro.sample("s", dist.Normal(torch.zeros(2).double(), 1.0).to_event(1))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(x @ s, 0.01), obs=y)

    def guide(x, y=None):
        pyro.sample("w", dist.Normal(torch.zeros(()).double(), 1.0))

    x = torch.tensor([[1.0, 2.0], [3.0, 4.0]]).double()
    found = predict(model, guide, x, num_samples=300)
    assert abs(variable(found).values[0] - variable(found, "s").values[0] @ x.numpy().T).max() < 0.1


@pytest.mark.parametrize("given", [False, True])
def test_blocks_of_a_subsampled_plate_share_a_site_left_open_outside_it(given):
    def model(t, y=None):
        pyro.sample("w", dist.Normal(torch.zeros(()).double(), 1.0))
        s = pyro.sample("s", dist.Normal(torch.zeros(()).double(), 1.0))
        with pyro.plate("data", 7, subsample_size=3) as rows:
            pyro.sample("y", dist.Normal(s, 0.01), obs=None if y is None else y[rows])

    def guide(t, y=None):
        pyro.sample("w", dist.Normal(torch.zeros(()).double(), 1.0))

    rows = torch.zeros(7).double()
    found = predict(model, guide, (rows, rows) if given else rows, num_samples=200)
    assert abs(variable(found).values[0] - variable(found, "s").values[0][:, None]).max() < 0.1


@pytest.mark.parametrize("shared", [True, False])
def test_a_site_left_open_of_an_observation_that_enumerated_sites_are_drawn_given_is_refused(shared):
    """Given one draw of the open site, the enumerated one would have that draw's posterior: here it is a mixture."""

    @config_enumerate
    def model(t, y=None):
        pyro.sample("w", dist.Normal(torch.zeros(()).double(), 1.0))
        with pyro.plate("data", len(t)):
            s = pyro.sample("s", dist.Normal(torch.zeros(()).double(), 1.0))
            z = pyro.sample("z", dist.Bernoulli(torch.tensor(0.3).double()))
            pyro.sample("y", dist.Normal(t + 2 * z + (s if shared else 0), 0.1), obs=y)
            pyro.sample("later", dist.Normal(s + z, 0.1))

    def guide(t, y=None):
        pyro.sample("w", dist.Normal(torch.zeros(()).double(), 1.0))

    given = NEW, NEW + torch.tensor([0.0, 2.0, 2.0]).double()
    if shared:
        with pytest.raises(BadInput, match="'s' has no value, and enumerated sites are drawn given 'y'") as error:
            predict(model, guide, given, num_samples=2)
        assert "\n" not in str(error.value)
    else:
        found = predict(model, guide, given, num_samples=200)
        assert (variable(found, "z").values[0] == [0, 1, 1]).all()
    open_to_all = predict(model, guide, NEW, num_samples=2000)
    assert (abs(variable(open_to_all, "z").values[0].mean(0) - 0.3) < 5 * (0.21 / 2000) ** 0.5).all()


def test_enumerated_sites_of_an_observation_left_open_are_drawn_from_their_prior():
    @config_enumerate
    def model(t, y=None):
        pyro.sample("w", dist.Normal(torch.zeros(()).double(), 1.0))
        with pyro.plate("data", len(t)):
            z = pyro.sample("z", dist.Bernoulli(torch.tensor(0.3).double()))
            pyro.sample("y", dist.Normal(t + 10 * z, 0.1), obs=y)

    def guide(t, y=None):
        pyro.sample("w", dist.Normal(torch.zeros(()).double(), 1.0))

    found = predict(model, guide, NEW, num_samples=2000)
    z, y = variable(found, "z").values[0], variable(found).values[0]
    assert (abs(z.mean(0) - 0.3) < 5 * (0.21 / 2000) ** 0.5).all()
    assert abs(y - NEW.numpy() - 10 * z).max() < 1


def test_a_markov_chain_is_forecast_from_its_observed_steps():
    moves = torch.tensor([[0.9, 0.1], [0.4, 0.6]]).double()

    def model(x):
        with pyro.plate("series", len(x)):
            z = torch.tensor(0)
            for t in pyro.markov(range(4)):
                z = pyro.sample(f"z{t}", dist.Categorical(moves[z]), infer={"enumerate": "parallel"})
                pyro.sample(f"x{t}", dist.Normal(10.0 * z, ONE), obs=x[:, t] if t < 2 else None)

    seen = torch.tensor([[0.0, 10.0], [10.0, 0.0]]).double()
    found = predict(model, lambda x: None, seen, num_samples=4000)
    state = torch.eye(2).double()[[1, 0]]
    for step in range(4):
        drawn = variable(found, f"z{step}").values[0]
        if step < 2:
            assert (drawn == seen[:, step].numpy() / 10).all()
            continue
        state = state @ moves
        exact = state[:, 1].numpy()
        assert (abs(drawn.mean(0) - exact) < 5 * (0.25 / 4000) ** 0.5).all()
        assert abs(variable(found, f"x{step}").values[0] - 10 * drawn).max() < 6


# --- guides with parameters per datum ---------------------------------------------------------------------------------


def per_datum(x):
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(pyro.param("loc", torch.zeros(20).double()), 1.0))


def per_datum_of_its_own_size(x):
    with pyro.plate("data", 20):
        pyro.sample("z", dist.Normal(pyro.param("loc", torch.zeros(20).double()), 1.0))


def autoguide():
    guide = AutoNormal(local)
    guide(T)
    return guide


def autoguides():
    guide = AutoGuideList(local)
    guide.append(AutoNormal(block(local, hide=["x"])))
    guide(T)
    return guide


GUIDES = {
    "autoguide": autoguide,
    "autoguides": autoguides,
    "parameters": lambda: per_datum,
    "a plate of its own": lambda: per_datum_of_its_own_size,
    "refined": lambda: refine(local, local_guide, T, steps=2),
}


@pytest.mark.parametrize("rows", [1, 3, 20, 30])
@pytest.mark.parametrize("make", GUIDES.values(), ids=GUIDES)
def test_a_guide_with_parameters_per_datum_is_refused_for_any_number_of_new_rows(make, rows, param_store):
    guide = make()
    pyro.param("loc", torch.zeros(20).double())
    with pytest.raises(BadInput) as found:
        predict(local, guide, torch.linspace(0, 1, rows).double(), num_samples=5)
    said = str(found.value)
    assert "\n" not in said and "parameters per datum" in said and "new rows" in said


LEVELS = torch.tensor([1.0, 2.0, 3.0]).double()


def of_levels(level, y=None):
    with pyro.plate("levels", 3):
        a = pyro.sample("a", dist.Normal(torch.zeros(()).double(), 1.0))
    with pyro.plate("data", len(level)):
        pyro.sample("y", dist.Normal(a[..., level], 0.01), obs=y)


def levels_guide(level, y=None):
    with pyro.plate("levels", 3):
        pyro.sample("a", dist.Normal(pyro.param("loc", LEVELS), 0.01))


@pytest.mark.parametrize("level", [[2], [2, 0], [2, 2, 0], [2, 0, 1, 1]], ids=len)
def test_as_many_rows_as_a_plate_of_parameters_are_predicted(level, param_store):
    found = variable(predict(of_levels, levels_guide, torch.tensor(level), num_samples=2000)).values[0]
    for row, place in enumerate(level):
        assert within(found[:, row], LEVELS[place].item(), 2e-4)


def test_a_model_that_only_computes_from_its_latents_is_predicted():
    def computed(t):
        w = pyro.sample("w", dist.Normal(torch.zeros(()).double(), 1.0))
        with pyro.plate("data", len(t)):
            pyro.deterministic("line", w * t)

    def of_two(t):
        pyro.sample("w", dist.Normal(torch.tensor(2.0).double(), 0.1))

    found = predict(computed, of_two, NEW, num_samples=50)
    slopes = variable(found, "line").values[0] / NEW.numpy()
    np.testing.assert_allclose(slopes, slopes[:, :1].repeat(len(NEW), 1))
    assert len(set(slopes[:, 0])) == 50 and within(slopes[:, 0], 2.0, 0.01)


def test_what_cannot_be_predicted_is_said_in_one_line():
    def nothing(t):
        pyro.sample("w", dist.Normal(0.0, 1.0))

    for model, guide, rows, words in (
        (nothing, nothing, NEW, "no site to predict"),
        (line, line_guide, torch.zeros(3, 4, 5), "fail"),
        (line, [], NEW, "empty"),
    ):
        with pytest.raises(BadInput, match=words) as found:
            predict(model, guide, rows, num_samples=5)
        assert "\n" not in str(found.value)
    with pytest.raises(BadInput, match="memory_limit"):
        predict(line, line_guide, NEW, num_samples=1000, memory_limit=1e-6)
    with pytest.raises(BadInput, match="num_samples"):
        predict(line, line_guide, NEW, num_samples=0)
