"""KL by dimension, active units and mutual information against closed forms."""

from __future__ import annotations

import copy
import math
import pickle

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import (
    AutoDelta,
    AutoGuideList,
    AutoLaplaceApproximation,
    AutoMultivariateNormal,
    AutoNormal,
    AutoStructured,
)

from gumbo.errors import BadInput
from gumbo.guides import CategoricalGuide, RelaxedCategoricalGuide
from gumbo.inference import active_units, evaluate
from gumbo.inference.posterior.evaluation import Evaluation
from gumbo.inference.posterior.information import information
from gumbo.models import CategoricalVAE


def model(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(torch.zeros(2).double(), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(z.sum(-1), 1.0), obs=x)


def guide_of(slope, scale):
    def guide(x):
        with pyro.plate("data", len(x)):
            loc = torch.stack([slope * x, torch.zeros_like(x)], -1)
            pyro.sample("z", dist.Normal(loc, scale).to_event(1))

    return guide


X = torch.linspace(-3, 3, 80).double()


def test_kl_of_each_dimension_is_the_closed_form():
    found = evaluate(model, guide_of(0.5, 0.7), X, num_samples=10).information
    q = dist.Normal(torch.stack([0.5 * X, torch.zeros_like(X)], -1), 0.7)
    exact = torch.distributions.kl_divergence(q, dist.Normal(torch.zeros(2).double(), 1.0)).mean(0)
    assert torch.allclose(found.kl["z"], exact, atol=0.03)
    assert found.active_units["z"].tolist() == [True, False] == active_units(guide_of(0.5, 0.7), X)["z"].tolist()


@pytest.mark.parametrize(("slope", "scale"), [(0.5, 0.7), (0.0, 1.0), (100.0, 0.01)])
def test_mutual_information_is_that_of_the_mixture_over_rows(slope, scale):
    found = information(model, guide_of(slope, scale), X).mutual_information
    grid = torch.linspace(-3 * slope - 8 * scale, 3 * slope + 8 * scale, 40_001).double()
    mixture = torch.logsumexp(dist.Normal(slope * X[:, None], scale).log_prob(grid), 0) - math.log(len(X))
    entropy = -torch.trapezoid(mixture.exp() * mixture, grid)
    exact = entropy - 0.5 * math.log(2 * math.pi * math.e * scale**2)
    assert found == pytest.approx(float(exact), abs=0.15)
    assert found < math.log(len(X)) + 1e-9


def test_discrete_latents_and_a_relaxed_pair_judged_by_its_discrete_form():
    relaxed = CategoricalVAE((1, 2, 2), num_latents=2, num_classes=3, hidden=(5,), relaxed=True)
    relaxed_guide = RelaxedCategoricalGuide(relaxed, hidden=(5,))
    exact = CategoricalVAE((1, 2, 2), num_latents=2, num_classes=3, hidden=(5,))
    guide = CategoricalGuide(exact, hidden=(5,))
    exact.load_state_dict(relaxed.state_dict(), strict=False)
    guide.load_state_dict(relaxed_guide.state_dict(), strict=False)
    x = torch.bernoulli(torch.full((20, 1, 2, 2), 0.5))
    one, two = evaluate(relaxed, relaxed_guide, x).information, evaluate(exact, guide, x).information
    assert one.kl["y"].shape == (2,) and torch.equal(one.kl["y"], two.kl["y"])
    assert one.mutual_information == two.mutual_information
    assert one.as_dict()["kl"]["y"] == one.kl["y"].tolist()


def test_an_autoguide_has_the_kl_of_its_auxiliary_draws():
    guide = AutoNormal(model, init_scale=0.5)
    found = information(model, guide, X, num_samples=400)
    assert found.mutual_information is None and found.notes == {}
    loc, scale = guide.locs.z.detach(), guide.scales.z.detach()
    exact = torch.distributions.kl_divergence(dist.Normal(loc, scale), dist.Normal(torch.zeros(2).double(), 1.0))
    assert torch.allclose(found.kl["z"], exact.mean(0), atol=0.02)


def test_jointly_normal_guides_have_the_kl_of_their_marginals_and_say_so():
    spread = torch.tensor([[0.5, 0.3], [0.3, 0.4]]).double()

    def guide(x):
        with pyro.plate("data", len(x)):
            loc = torch.stack([x / 2, torch.zeros_like(x)], -1)
            pyro.sample("z", dist.MultivariateNormal(loc, spread))

    judged = evaluate(model, guide, X, num_samples=200)
    q = dist.Normal(torch.stack([X / 2, torch.zeros_like(X)], -1), spread.diagonal().sqrt())
    exact = torch.distributions.kl_divergence(q, dist.Normal(torch.zeros(2).double(), 1.0)).mean(0)
    assert torch.allclose(judged.kl["z"], exact, atol=0.03)
    assert "marginal" in judged.information.notes["z"]
    assert judged.kl["z"].sum() < judged.rate - 0.1  # what the two share is in the rate alone


def test_tied_coordinates_have_one_kl_and_joint_draws_one_for_all():
    def flow(x):
        with pyro.plate("data", len(x)):
            base = dist.Normal(torch.zeros(2).double(), 1.0).expand([len(x), 2]).to_event(1)
            pyro.sample("z", dist.TransformedDistribution(base, [dist.transforms.LowerCholeskyAffine(loc, tril)]))

    loc, tril = torch.zeros(2).double(), torch.tensor([[0.5, 0.0], [0.3, 0.4]]).double()
    exact = torch.distributions.kl_divergence(
        dist.MultivariateNormal(loc, scale_tril=tril), dist.MultivariateNormal(loc, torch.eye(2).double())
    )
    judged = evaluate(model, flow, X, num_samples=200)
    assert float(judged.kl["z"]) == pytest.approx(exact.item(), abs=0.03) == pytest.approx(judged.rate, abs=0.05)
    assert "one KL for the site" in judged.information.notes["z"]

    def two(x):
        a = pyro.sample("a", dist.Normal(torch.zeros(()).double(), 1.0))
        b = pyro.sample("b", dist.Normal(torch.zeros(()).double(), 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(a + b, 1.0), obs=x)

    judged = evaluate(two, AutoMultivariateNormal(two, init_scale=0.5), X, num_samples=1000)
    assert list(judged.kl) == ["a+b"] and "joint draw" in judged.information.notes["a+b"]
    assert float(judged.kl["a+b"]) / len(X) == pytest.approx(judged.rate, abs=0.01)


def test_it_is_found_once_and_only_when_asked():
    judged = evaluate(model, guide_of(0.5, 0.7), X, num_samples=2)
    assert "information" not in vars(judged) and "_ask" not in judged.as_dict()
    assert judged.information is judged.information
    assert judged.mutual_information == judged.information.mutual_information
    numbers = dict(judged.as_dict().items())
    assert Evaluation(**numbers) == judged
    with pytest.raises(BadInput, match="does not know its programs"):
        _ = Evaluation(**numbers).kl


def test_a_pickle_keeps_numbers_and_what_was_asked_for():
    judged = evaluate(model, guide_of(0.5, 0.7), X, num_samples=2)
    again = pickle.loads(pickle.dumps(judged))
    assert again == judged and torch.equal(again.values["elbo"], judged.values["elbo"])
    with pytest.raises(BadInput, match="a pickle leaves them behind"):
        _ = again.kl
    assert copy.deepcopy(judged).kl.keys() == pickle.loads(pickle.dumps(judged)).kl.keys() == {"z"}


def test_points_beside_a_distribution_have_no_kl():
    def two(x):
        a = pyro.sample("a", dist.Normal(torch.zeros(2).double(), 1.0).to_event(1))
        b = pyro.sample("b", dist.Normal(torch.zeros(()).double(), 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(a.sum(-1) + b, 1.0), obs=x)

    guide = AutoGuideList(two)
    guide.append(AutoNormal(pyro.poutine.block(two, expose=["a"])))
    guide.append(AutoDelta(pyro.poutine.block(two, expose=["b"])))
    found = information(two, guide, X)
    assert list(found.kl) == ["a"] and found.kl["a"].shape == (2,)
    assert found.notes == {"b": "the guide is a point, whose KL is infinite"}
    laplace = information(two, AutoLaplaceApproximation(two), X)
    assert laplace.kl == {} and set(laplace.notes) == {"a", "b"}


def test_a_structured_guide_has_the_kl_of_what_it_draws_together():
    guide = AutoStructured(model)
    judged = evaluate(model, guide, X[:5], num_samples=500)
    assert list(judged.kl) == ["z"] and "joint draw" in judged.information.notes["z"]
    assert float(judged.kl["z"]) / 5 == pytest.approx(judged.rate, abs=0.1)


@pytest.mark.parametrize("hides", ["both", "model"])
@pytest.mark.parametrize("event", [0, 1])
def test_masked_latents_have_no_divergence_and_no_activity(hides, event):
    """Every other row is masked; there the guide is far from the prior."""
    seen = torch.arange(80) % 2 == 0
    shape = (2,) * event

    def model(x):
        with pyro.plate("data", len(x)):
            with pyro.poutine.mask(mask=seen):
                z = pyro.sample("z", dist.Normal(torch.zeros(shape).double(), 1.0).to_event(event))
            loc = torch.where(seen, z.sum(-1) if event else z, 0.0)
            pyro.sample("x", dist.Normal(loc, 1.0), obs=x)

    def guide(x):
        loc = torch.where(seen, 0.3, 5.0 * x)
        loc = loc.unsqueeze(-1).expand(80, 2) if event else loc
        with pyro.plate("data", len(x)), pyro.poutine.mask(mask=seen if hides == "both" else True):
            pyro.sample("z", dist.Normal(loc, 0.7).to_event(event))

    found = evaluate(model, guide, X, num_samples=500)
    q = dist.Normal(torch.full((), 0.3).double(), 0.7)
    exact = torch.distributions.kl_divergence(q, dist.Normal(torch.zeros(()).double(), 1.0)) / 2
    assert torch.allclose(found.information.kl["z"], exact.expand(shape), atol=0.01)
    assert float(found.information.kl["z"].sum()) == pytest.approx(found.rate, abs=0.02)
    assert not found.information.active_units["z"].any()
    assert hides == "model" or not active_units(guide, X)["z"].any()


def test_the_direction_of_a_flat_circular_law_is_not_active():
    """Its draws are nearly uniform, whatever the direction that follows the data."""

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.VonMises(x, 1e-3 + 0 * x))

    assert not active_units(guide, X, threshold=0.5, num_samples=100)["z"].any()


MANY = torch.linspace(-3, 3, 700).double()


def own_parameters(x):
    loc = pyro.param("loc", torch.stack([0.5 * MANY, torch.zeros_like(MANY)], -1))
    with pyro.plate("data", len(x)) as i:
        pyro.sample("z", dist.Normal(loc[i], 0.7).to_event(1))


def test_parameters_for_each_datum_have_no_mutual_information_and_the_kl_of_all_data(param_store):
    """The rows cannot be chosen, and do not take their distribution along."""
    found = information(model, own_parameters, MANY)
    by_rows = information(model, guide_of(0.5, 0.7), MANY, num_data=700)
    assert found.mutual_information is None and by_rows.mutual_information is not None
    assert torch.equal(found.kl["z"], by_rows.kl["z"])
    assert evaluate(model, own_parameters, MANY[:50], num_samples=2).mutual_information is None


def test_the_plate_says_which_rows_are_chosen():
    """An argument with more rows than the data is passed whole, and the rows of the data move."""
    grid = torch.arange(900.0)
    by_grid = [
        lambda grid, x, program=program: program(x[: len(grid) - 200]) for program in (model, guide_of(0.5, 0.7))
    ]
    found = information(*by_grid, (grid, MANY), num_data=300, num_pairs=100)
    alone = information(model, guide_of(0.5, 0.7), MANY, num_data=300, num_pairs=100)
    assert torch.equal(found.kl["z"], alone.kl["z"]) and found.mutual_information == alone.mutual_information
