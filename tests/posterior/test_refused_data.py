"""Data and pairs of programs that have no posterior: one line, the same from every function."""

from __future__ import annotations

import math

import pyro
import pyro.distributions as dist
import pytest
import torch

from gumbo.errors import BadInput, GumboError, UnsupportedSite
from gumbo.inference import diagnose, evaluate, fit, predict, summary, to_arviz
from gumbo.inference.posterior import _arviz

X = torch.tensor([0.1, 0.2, 0.3])


def model(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def reading(x):
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(x / 2, 0.5))


def unread(x):
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(torch.zeros(len(x)), 0.5))


def coins(x):
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Bernoulli(logits=pyro.sample("z", dist.Normal(0.0, 1.0))), obs=x)


def loose(x):
    mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
    pyro.sample("x", dist.Normal(mean, 1.0), obs=x)


def mean_alone(x):
    pyro.sample("mean", dist.Normal(0.0, 0.4))


def bounded(x):
    sd = pyro.sample("sd", dist.Uniform(0.1, 10.0))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(0.0, sd), obs=x)


def wider(x):
    pyro.sample("sd", dist.Normal(1.0, 1.0))


SCORING = {
    "evaluate": evaluate,
    "to_arviz": lambda *pair: to_arviz(*pair, num_samples=300),
    "diagnose": lambda *pair: diagnose(*pair, num_samples=300, num_simulations=20, refine_steps=0),
}
ALL = {**SCORING, "predict": lambda *pair: predict(*pair, num_samples=300)}


def refusal(function, *pair) -> str:
    with pytest.raises(GumboError) as caught:
        function(*pair)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("name", SCORING)
@pytest.mark.parametrize("guide", [reading, unread])
@pytest.mark.parametrize("number", [math.nan, math.inf])
def test_numbers_that_are_none_are_refused_alike(name, guide, number):
    bad = X.clone()
    bad[1] = number
    assert "data: argument 0 holds NaN or infinity in 1 of 3 rows" in refusal(SCORING[name], model, guide, bad)


@pytest.mark.parametrize("name", ["to_arviz", "diagnose"])
def test_infinite_covariates_that_leave_no_likelihood_are_refused(name):
    """`evaluate`, which cuts the data, refuses any infinity."""

    def line(t, x):
        slope = pyro.sample("slope", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(slope * t, 1.0), obs=x)

    def slope(t, x):
        pyro.sample("slope", dist.Normal(2.0, 0.1))

    options = {} if name == "to_arviz" else {"num_simulations": 20, "refine_steps": 0}
    function = {"to_arviz": to_arviz, "diagnose": diagnose}[name]
    with pytest.raises(BadInput, match="argument 0 holds NaN or infinity in 1 of 3 rows"):
        function(line, slope, torch.tensor([1.0, math.inf, 2.0]), X, num_samples=300, **options)


def test_nan_is_refused_alike_in_predictions_and_keywords():
    bad = X.clone()
    bad[1] = math.nan
    for guide in (reading, unread):
        assert "argument 0 holds NaN or infinity in 1 of 3 rows" in refusal(ALL["predict"], model, guide, bad)
    with pytest.raises(BadInput, match="argument 'x' holds NaN or infinity in 1 of 3 rows"):
        to_arviz(model, unread, x=bad)


def test_nan_that_the_programs_mask_is_accepted():
    def masked(x):
        seen = ~x.isnan()
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0).mask(seen), obs=x.nan_to_num())

    bad = X.clone()
    bad[1] = math.nan
    assert to_arviz(masked, unread, bad, num_samples=20).observed_data["x"].isnull().sum() == 1


@pytest.mark.parametrize("name", SCORING)
def test_boolean_data_are_one_line(name):
    said = refusal(SCORING[name], model, unread, X > 0.15)
    assert "site 'x': Normal has no log-probability for data of torch.bool and shape (3,)" in said
    assert "x.float()" in said and "'x': Bernoulli" in refusal(SCORING[name], coins, unread, X > 0.15)


def test_a_law_without_a_density_is_not_taken_for_a_fault_of_the_data():
    one = dist.Normal(torch.zeros(1), 1.0).to_event(1)

    def chain(x):
        pyro.sample("x", dist.LinearHMM(one, torch.eye(1), one, torch.eye(1), one, duration=len(x)), obs=x[:, None])

    with pytest.raises(BadInput, match=r"'x': LinearHMM has no log-probability .* is not implemented\)$"):
        evaluate(chain, lambda x: None, X)


@pytest.mark.parametrize("name", SCORING)
def test_sparse_data_are_one_line(name):
    said = refusal(SCORING[name], model, unread, X.to_sparse())
    assert said == "data: argument 0 is a sparse tensor, of which no batch can be taken; pass x.to_dense()"
    assert "train: argument 0 is a sparse tensor" in refusal(fit, model, unread, X.to_sparse())


@pytest.mark.parametrize("layout", [torch.strided, torch.jagged])
@pytest.mark.parametrize("name", ALL)
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_nested_data_are_one_line(name, layout):
    nested = torch.nested.nested_tensor([X, X[:2]], layout=layout)
    assert refusal(ALL[name], model, unread, nested) == (
        "data: argument 0 is a nested tensor, of which no batch can be taken; pass "
        "torch.nested.to_padded_tensor(x, 0.0), and the lengths as an argument of its own"
    )


def test_a_sparse_argument_that_no_site_observes_is_served():
    design = torch.tensor([[1.0, 0.0], [0.0, 2.0], [0.0, 0.0]])

    def sparse_regression(covariates, y=None):
        w = pyro.sample("w", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        with pyro.plate("data", 3):
            pyro.sample("y", dist.Normal((covariates @ w.unsqueeze(-1)).squeeze(-1), 1.0), obs=y)

    def weights(covariates, y=None):
        pyro.sample("w", dist.Normal(torch.tensor([1.0, -1.0]), 0.1).to_event(1))

    idata = to_arviz(sparse_regression, weights, design.to_sparse(), X, num_samples=3)
    w = torch.tensor(_arviz.dataset_of(idata, "posterior")["w"].values[0])
    found = _arviz.dataset_of(idata, "log_likelihood")["y"].values[0]
    expected = dist.Normal(w @ design.T, 1.0).log_prob(X)
    assert found.ravel().tolist() == pytest.approx(expected.ravel().tolist(), abs=1e-5)
    assert "constant_data" not in _arviz.groups_of(idata)
    drawn = predict(sparse_regression, weights, design.to_sparse(), X, num_samples=3)
    assert _arviz.dataset_of(drawn, "predictions")["y"].shape == (1, 3, 3)


def test_numbers_that_numpy_lacks_are_in_single_precision():
    x = X.bfloat16()
    idata = to_arviz(model, reading, x, num_samples=4)
    observed, drawn = (_arviz.dataset_of(idata, name) for name in ("observed_data", "posterior"))
    assert observed["x"].values.tolist() == x.float().tolist()
    z = torch.tensor(drawn["z"].values)
    assert z.dtype == torch.float32 and torch.equal(z, z.bfloat16().float())
    assert _arviz.dataset_of(predict(model, reading, x, num_samples=4), "predictions")["x"].dtype == "float32"


@pytest.mark.parametrize("name", ALL)
def test_rows_without_a_plate_are_refused_as_fit_refuses_them(name):
    with pytest.raises(UnsupportedSite) as caught:
        ALL[name](loose, mean_alone, X)
    guide = pyro.infer.autoguide.AutoNormal(loose)
    assert str(caught.value) == refusal(lambda: fit(loose, guide, X, epochs=1, batch_size=3, progress=False))


@pytest.mark.parametrize("name", ALL)
def test_a_guide_with_a_wider_support_than_the_models_names_the_site(name):
    assert "site 'sd' has a value outside the support" in refusal(ALL[name], bounded, wider, X)


@pytest.mark.parametrize("name", ALL)
def test_a_parameter_that_a_later_draw_makes_invalid_is_one_line(name):
    def exact(x):
        pyro.sample("sd", dist.Normal(1.0, 1.0))

    def of_any_sign(x):
        sd = pyro.sample("sd", dist.Normal(1.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(0.0, sd), obs=x)

    assert "site 'x': ValueError: Expected parameter scale" in refusal(ALL[name], of_any_sign, exact, X)


@pytest.mark.parametrize("name", ALL)
def test_programs_in_the_wrong_order_are_refused(name):
    said = refusal(ALL[name], reading, model, X)
    assert said == "the guide observes site 'x' and the model observes none: pass the model first, then the guide"


def test_a_summary_of_something_else_is_one_line():
    for thing in (None, 3, {"posterior": X}):
        said = refusal(summary, thing)
        assert f"idata is an object of class {type(thing).__name__}: expected what to_arviz returns" in said


def test_a_distribution_without_shapes_is_refused_by_name():
    class Histogram(dist.Distribution):
        """Weights without shapes, as the marginals of Pyro's RSA examples are."""

        def sample(self):
            return torch.tensor(1.0)

        def log_prob(self, value):
            return -value.abs()

    def shapeless(x):
        z = pyro.sample("z", dist.Bernoulli(0.5))
        pyro.sample("x", Histogram(), obs=x[0] + z)

    def coin(x):
        pyro.sample("z", dist.Bernoulli(0.5))

    for function in (evaluate, to_arviz, diagnose):
        said = refusal(function, shapeless, coin, X)
        assert "site 'x': Histogram has no batch_shape and event_shape" in said
