"""evaluate and gradient_moments against exact answers, and that neither leaves a trace."""

from __future__ import annotations

import itertools
import math
from functools import partial

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import Trace_ELBO, autoguide
from pyro.infer.autoguide import AutoMultivariateNormal, AutoNormal
from pyro.nn import PyroModule
from reading_rows import reading

from gumbo.errors import BadInput, GumboWarning, UnsupportedSite
from gumbo.guides import CategoricalGuide, NormalGuide, RelaxedCategoricalGuide
from gumbo.inference import SiteELBO, diagnose, evaluate, loo_approximate_posterior, make_loss, predict, to_arviz
from gumbo.inference.auditing.moments import gradient_draws, gradient_moments
from gumbo.inference.posterior import _arviz
from gumbo.inference.posterior.checks import Checks
from gumbo.inference.posterior.evaluation import Evaluation, Evaluator
from gumbo.inference.posterior.parts import Weighing, log_weights
from gumbo.inference.posterior.runner import Sweep
from gumbo.inference.posterior.vmapped import coins_log_prob
from gumbo.models import CategoricalVAE, GaussianVAE

X = torch.tensor([[0.3, -1.2], [1.0, 0.4], [-0.7, 0.1]], dtype=torch.float64)


def linear_model(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(torch.zeros(2).double(), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)


def posterior(scale=1.0, shift=0.0):
    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x / 2 + shift, scale * 0.5**0.5).to_event(1))

    return guide


def log_evidence(x):
    return dist.Normal(torch.zeros(2).double(), 2**0.5).log_prob(x).sum(-1)


def test_the_exact_posterior_gives_the_exact_evidence_with_one_draw():
    found = evaluate(linear_model, posterior(), X, num_samples=1)
    assert found.log_evidence == pytest.approx(log_evidence(X).mean().item(), abs=1e-12)
    assert found.elbo == pytest.approx(found.log_evidence, abs=1e-12)
    assert found.elbo == pytest.approx(-found.rate - found.distortion, abs=1e-12)
    spread = log_evidence(X).std().item() / math.sqrt(3)
    assert found.log_evidence_se == pytest.approx(spread, abs=1e-12)


def test_a_wrong_guide_loses_its_divergence_and_the_evidence_makes_it_up():
    scale, shift = 0.8, 0.3
    found = evaluate(linear_model, posterior(scale, shift), X, num_samples=20_000)
    p, q = dist.Normal(X / 2, 0.5**0.5), dist.Normal(X / 2 + shift, scale * 0.5**0.5)
    divergence = torch.distributions.kl_divergence(q, p).sum(-1).mean().item()
    rate = torch.distributions.kl_divergence(q, dist.Normal(torch.zeros(2).double(), 1.0)).sum(-1).mean().item()
    truth = log_evidence(X).mean().item()
    assert found.elbo == pytest.approx(truth - divergence, abs=0.02)
    assert found.rate == pytest.approx(rate, abs=0.02)
    assert found.log_evidence == pytest.approx(truth, abs=0.02)
    assert truth - divergence < truth - 0.1


@pytest.mark.parametrize("scale, shift, told", [(0.5**0.5, 0.0, False), (0.6, 0.0, False), (0.7, 1.5, True)])
def test_an_evidence_that_few_draws_decide_is_called_a_loose_bound(scale, shift, told):
    """The exact evidence is known: where nothing is told it is within 0.1 nats, else off by far more than its error."""
    x = torch.randn(200, 5, generator=torch.Generator().manual_seed(0)).double() * 2**0.5

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros_like(x), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x / 2 + shift, scale).to_event(1))

    exact = dist.Normal(0.0, 2**0.5).log_prob(x).sum(-1).mean().item()
    found = evaluate(model, guide, x, num_samples=100)
    assert ("loose lower bound" in str(found)) == told == (found.dominated > 0.5)
    if told:
        assert found.log_evidence < exact - 10 * found.log_evidence_mc_se
    else:
        assert found.log_evidence == pytest.approx(exact, abs=0.1)
    assert math.isnan(evaluate(model, guide, x, num_samples=9).dominated)


def test_discrete_evidence_is_the_sum_over_all_latents():
    model = CategoricalVAE((1, 2, 2), num_latents=2, num_classes=3, hidden=(5,)).double()
    guide = CategoricalGuide(model, hidden=(5,)).double()
    x = torch.bernoulli(torch.full((4, 1, 2, 2), 0.5)).double()
    eye = torch.eye(3).double()
    joint = [
        model.likelihood(torch.stack([eye[a], eye[b]]).expand(4, 2, 3)).log_prob(x) - math.log(9)
        for a, b in itertools.product(range(3), repeat=2)
    ]
    truth = torch.logsumexp(torch.stack(joint), 0).mean().item()
    assert evaluate(model, guide, x, num_samples=4000).log_evidence == pytest.approx(truth, abs=5e-3)


def test_a_relaxed_pair_is_judged_by_its_discrete_form():
    model = CategoricalVAE((1, 2, 2), num_latents=2, num_classes=3, hidden=(5,), relaxed=True)
    guide = RelaxedCategoricalGuide(model, hidden=(5,))
    discrete = CategoricalVAE((1, 2, 2), num_latents=2, num_classes=3, hidden=(5,))
    discrete_guide = CategoricalGuide(discrete, hidden=(5,))
    discrete.load_state_dict(model.state_dict(), strict=False)
    discrete_guide.load_state_dict(guide.state_dict(), strict=False)
    x = torch.ones(6, 1, 2, 2)
    before = torch.get_rng_state()
    assert evaluate(model, guide, x, seed=3) == evaluate(discrete, discrete_guide, x, seed=3)
    assert torch.equal(before, torch.get_rng_state())  # building the discrete form draws weights, aside
    with pytest.raises(BadInput, match=r"must define exact\(model\)"):
        evaluate(model, lambda x: guide(x), x)


def scaled(size):
    """The same programs where the batch counts as a subsample of ``size`` rows."""

    def model(x):
        with pyro.plate("data", size, subsample=torch.arange(len(x))):
            z = pyro.sample("z", dist.Normal(torch.zeros(2).double(), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)

    def guide(x):
        with pyro.plate("data", size, subsample=torch.arange(len(x))):
            pyro.sample("z", dist.Normal(x / 2, 0.5**0.5).to_event(1))

    return model, guide


def fixed(size):
    """The same programs with a plate whose size is written down."""

    def model(x):
        with pyro.plate("data", size):
            z = pyro.sample("z", dist.Normal(torch.zeros(2).double(), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)

    def guide(x):
        with pyro.plate("data", size):
            pyro.sample("z", dist.Normal(x / 2, 0.5**0.5).to_event(1))

    return model, guide


def nested(size):
    """The same programs with the two coordinates in a plate of their own, and the data plate outside it."""

    def model(x):
        with pyro.plate("data", len(x), dim=-2), pyro.plate("pixels", 2, dim=-1):
            z = pyro.sample("z", dist.Normal(torch.zeros(()).double(), 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x), dim=-2), pyro.plate("pixels", 2, dim=-1):
            pyro.sample("z", dist.Normal(x / 2, 0.5**0.5))

    return model, guide


@pytest.mark.parametrize("programs", [scaled(50), fixed(3), nested(3)], ids=["subsampled", "fixed", "nested"])
def test_numbers_are_per_datum_whatever_the_plates(programs):
    found = evaluate(*programs, X, num_samples=3)
    assert found.log_evidence == pytest.approx(log_evidence(X).mean().item(), abs=1e-12)
    assert found.elbo == pytest.approx(found.log_evidence, abs=1e-12)


def test_masks_enter_the_weights():
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2).double(), 1.0).to_event(1))
            with pyro.poutine.mask(mask=x[:, 0] > 0):
                pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)

    parts = log_weights(model, posterior(), X, num_samples=2)
    assert (parts["log_likelihood"][:, X[:, 0] <= 0] == 0).all()
    assert (parts["log_likelihood"][:, X[:, 0] > 0] != 0).all()


def test_batches_and_seeds():
    model = GaussianVAE((1, 2, 2), latent_dim=2, hidden=(4,))
    guide = NormalGuide(model, hidden=(4,))
    x = torch.bernoulli(torch.full((10, 1, 2, 2), 0.5))
    one = evaluate(model, guide, x, num_samples=3, batch_size=4, seed=1)
    assert one == evaluate(model, guide, x, num_samples=3, batch_size=4, seed=1)
    assert one != evaluate(model, guide, x, num_samples=3, batch_size=4, seed=2)
    assert evaluate(model, guide, {"x": x}, num_samples=3, batch_size=4, seed=1) == one
    assert one.num_data == 10


def test_evaluation_leaves_everything_as_it_was(param_store):
    model = GaussianVAE((1, 2, 2), latent_dim=2, hidden=(4,))
    guide = NormalGuide(model, hidden=(4,))
    x = torch.ones(5, 1, 2, 2)
    clean = evaluate(model, guide, x)
    param_store.setdefault("decoder$$$0.weight", torch.full((4, 2), 9.0))  # left by another model of that name
    guide.encoder.eval()
    before = torch.get_rng_state()
    assert evaluate(model, guide, x) == clean
    assert torch.equal(before, torch.get_rng_state())
    assert list(param_store.keys()) == ["decoder$$$0.weight"]
    assert (model.training, guide.training, guide.encoder.training) == (True, True, False)
    assert all(parameter.grad is None for parameter in (*model.parameters(), *guide.parameters()))


def test_parameters_of_plain_functions_are_seen(param_store):
    def guide(x):
        loc = pyro.param("loc", torch.zeros(2).double())
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(loc.expand(len(x), 2), 1.0).to_event(1))

    param_store["loc"] = torch.full((2,), 40.0).double()
    assert evaluate(linear_model, guide, X, num_samples=2).rate > 1000


def refused(match, model=linear_model, guide=None, data=X, **options):
    with pytest.raises(BadInput, match=match) as error:
        evaluate(model, posterior() if guide is None else guide, data, **options)
    assert "\n" not in str(error.value)


def grid_first(grid, x):
    linear_model(x)


def time_first(x):
    with pyro.plate("data", x.shape[1]):
        z = pyro.sample("z", dist.Normal(torch.zeros(()).double(), 1.0))
        for t in range(len(x)):
            pyro.sample(f"x{t}", dist.Normal(z, 1.0), obs=x[t])


def time_first_posterior(x):
    with pyro.plate("data", x.shape[1]):
        pyro.sample("z", dist.Normal(x.sum(0) / (1 + len(x)), (1 + len(x)) ** -0.5))


def chosen_rows(x, rows):
    with pyro.plate("data", len(x), subsample=rows) as i:
        z = pyro.sample("z", dist.Normal(torch.zeros(2).double(), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x[i])


def chosen_posterior(x, rows):
    with pyro.plate("data", len(x), subsample=rows) as i:
        pyro.sample("z", dist.Normal(x[i] / 2, 0.5**0.5).to_event(1))


def in_time(x):
    covariance = torch.eye(len(x)).double() + 1
    return dist.MultivariateNormal(torch.zeros(len(x)).double(), covariance).log_prob(x.T)


LONG = torch.linspace(-2, 2, 600).double().reshape(300, 2)
SOME = torch.tensor([3, 7, 1, 15])
MANY = torch.arange(299, -1, -1)
PLATES_OF_OTHER_ROWS = [
    *(
        (grid_first, lambda grid, x: posterior()(x), (torch.zeros(n), x), log_evidence(x))
        for n in (2, 50, 2000)
        for x in (X, LONG)
    ),
    (time_first, time_first_posterior, LONG[:9], in_time(LONG[:9])),
    (time_first, time_first_posterior, LONG.T, in_time(LONG.T)),
    *(
        (chosen_rows, chosen_posterior, (LONG[:n], rows), log_evidence(LONG[rows]))
        for n, rows in ((20, SOME), (300, SOME), (300, MANY))
    ),
]


@pytest.mark.parametrize("model, guide, data, truth", PLATES_OF_OTHER_ROWS)
@pytest.mark.parametrize("options", [{}, {"batch_size": 2}, {"plate": "data"}], ids=str)
def test_the_data_are_those_of_the_plate_whatever_rows_the_first_tensor_has(model, guide, data, truth, options):
    found = evaluate(model, guide, data, num_samples=3, **options)
    assert found.num_data == len(truth)
    assert found.log_evidence == pytest.approx(truth.mean().item(), abs=1e-12)
    assert found.values["elbo"].tolist() == pytest.approx(truth.tolist(), abs=1e-9)


@pytest.mark.slow
def test_a_compiled_evaluation_has_the_data_of_the_plate():
    found = evaluate(time_first, time_first_posterior, LONG[:9], num_samples=3, compile=True)
    assert found.values["elbo"].tolist() == pytest.approx(in_time(LONG[:9]).tolist(), abs=1e-9)


def test_rows_of_a_later_argument_come_in_batches():
    grid = torch.zeros(2000)
    weighing = Weighing(grid_first, lambda grid, x: posterior()(x), (grid, LONG), 1, 100, None)
    assert weighing.size == 100 and [len(part["log_q"][0]) for part in weighing.pieces(0)] == [100, 100, 100]


def test_global_latents_are_spread_over_the_plate():
    x, reached = LONG[:20, 0], []

    def model(grid, x):
        mu = pyro.sample("mu", dist.Normal(torch.zeros(()).double(), 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(mu, 1.0), obs=x)

    def guide(grid, x):
        pyro.sample("mu", dist.Normal(x.sum() / (1 + len(x)), (1 + len(x)) ** -0.5))

    for rows in (5, 50):
        found = evaluate(model, guide, {"grid": torch.zeros(rows), "x": x}, num_samples=20)
        reached.append((found.num_data, found.elbo))
    truth = pytest.approx(in_time(x[:, None]).item() / 20, abs=1e-12)
    assert reached == [(20, truth), (20, truth)]


@pytest.mark.parametrize("plate, size", [("rows", 10), ("columns", 6), (None, 10)])
def test_either_of_two_crossed_plates_can_be_the_data(plate, size):
    x = LONG[:30].reshape(10, 6)

    def model(x):
        mu = pyro.sample("mu", dist.Normal(torch.zeros(()).double(), 1.0))
        with pyro.plate("rows", 10, dim=-2), pyro.plate("columns", 6, dim=-1):
            pyro.sample("x", dist.Normal(mu, 1.0), obs=x)

    def guide(x):
        pyro.sample("mu", dist.Normal(x.sum() / 61, 61**-0.5))

    found = evaluate(model, guide, x, num_samples=3, plate=plate)
    truth = in_time(x.reshape(60, 1)).item() / size
    assert found.num_data == size and found.elbo == pytest.approx(truth, abs=1e-12)


def test_what_cannot_be_judged_is_refused_in_one_line():
    def global_latent(x):
        w = pyro.sample("w", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(w.double().expand(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)

    def global_guide(x):
        pyro.sample("w", dist.Normal(0.0, 1.0))
        posterior()(x)

    bad = X.clone()
    bad[1, 0] = math.nan
    refused("'w' is latent in the model but the guide", model=global_latent)
    refused("'w' is drawn by the guide but is no latent", guide=global_guide)
    refused("NaN or infinity in 1 of 3 rows", data=bad)
    refused("data is empty", data=X[:0])
    refused("the programs fail on these arguments", data=[1.0])
    refused("num_samples is 0", num_samples=0)
    refused("no plate 'rows' encloses every observed site; those that do: data", plate="rows")
    model, guide = nested(2)
    refused("data, pixels all fit the data: name one with plate=", model=model, guide=guide, data=X[:2])
    found = evaluate(model, guide, X[:2], plate="data")
    assert found.log_evidence == pytest.approx(log_evidence(X[:2]).mean().item(), abs=1e-12)


@pytest.mark.parametrize("data_size, batch_size", [(None, 256), (None, 2), (7, 256)])
def test_global_latents_are_spread_over_the_data(data_size, batch_size):
    """y = w + noise under q(w) = N(m, s): bound, rate and predictive density have closed forms."""
    y, loc, scale = X[:, 0], torch.tensor(0.4).double(), torch.tensor(0.3).double()

    def plate(y):
        rows = None if data_size is None else torch.arange(len(y))
        return pyro.plate("data", data_size or len(y), subsample=rows)

    def model(y):
        w = pyro.sample("w", dist.Normal(torch.zeros(()).double(), 1.0))
        with plate(y):
            pyro.sample("y", dist.Normal(w, 1.0), obs=y)

    def guide(y):
        pyro.sample("w", dist.Normal(loc, scale))

    found = evaluate(model, guide, y, num_samples=400, batch_size=batch_size)
    rate = torch.distributions.kl_divergence(dist.Normal(loc, scale), dist.Normal(0.0, 1.0)) / (data_size or 3)
    distortion = -(dist.Normal(loc, 1.0).log_prob(y) - scale**2 / 2).mean()
    assert found.rate == pytest.approx(rate.item(), abs=0.02)
    assert found.distortion == pytest.approx(distortion.item(), abs=0.05)
    assert found.elbo == pytest.approx(-found.rate - found.distortion, abs=1e-9)
    predictive = dist.Normal(loc, (1 + scale**2).sqrt()).log_prob(y).mean()
    assert found.log_predictive == pytest.approx(predictive.item(), abs=0.05)


def subsampling(size, own=True):
    """mu ~ N(0, 1), z_i ~ N(mu, 1), x_i ~ N(z_i, 1/2), seven rows at a time; q(mu) is exact, q(z_i | mu) nearly so."""

    def model(x):
        mu = pyro.sample("mu", dist.Normal(torch.zeros(()).double(), 1.0)) if own else torch.zeros(()).double()
        with pyro.plate("data", len(x), subsample_size=size) as rows:
            z = pyro.sample("z", dist.Normal(mu, 1.0))
            pyro.sample("x", dist.Normal(z, 0.5), obs=x[rows])

    def guide(x):
        variance = 1 / (1 + len(x) / 1.25)
        loc = dist.Normal(variance * x.sum() / 1.25, variance**0.5)
        mu = pyro.sample("mu", loc) if own else torch.zeros(()).double()
        with pyro.plate("data", len(x), subsample_size=size) as rows:
            pyro.sample("z", dist.Normal(0.2 * (mu + 4 * x[rows]), 0.2**0.5))

    return model, guide


ROWS = torch.linspace(-2, 2, 33).double()


def test_a_subsampled_plate_is_visited_in_full():
    model, guide = subsampling(7, own=False)
    found = evaluate(model, guide, ROWS, num_samples=3)
    truth = dist.Normal(0.0, torch.tensor(1.25).double().sqrt()).log_prob(ROWS)
    assert found.num_data == 33
    assert found.log_evidence == pytest.approx(truth.mean().item(), abs=1e-9)
    assert found.elbo == pytest.approx(found.log_evidence, abs=1e-9)
    covariance = 1.25 * torch.eye(33).double() + 1
    whole = dist.MultivariateNormal(torch.zeros(33).double(), covariance).log_prob(ROWS).item()
    for size, batch_size in ((7, 256), (33, 256), (7, 10)):  # batches would change q(mu): all rows are seen at once
        found = evaluate(*subsampling(size), ROWS, num_samples=50, batch_size=batch_size)
        # The guide is exact: the bound of all data is the evidence, whatever is drawn.
        assert 33 * found.elbo == pytest.approx(whole, abs=1e-8)
        assert found.elbo == pytest.approx(-found.rate - found.distortion, abs=1e-9)
    kl = found.kl
    assert kl["z"].shape == () and float(kl["mu"]) > 1


def test_a_batch_under_a_plate_of_more_rows_is_a_batch():
    def model(x):
        with pyro.plate("data", 500, subsample_size=len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2).double(), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)

    def guide(x):
        with pyro.plate("data", 500, subsample_size=len(x)):
            pyro.sample("z", dist.Normal(x / 2, 0.5**0.5).to_event(1))

    found = evaluate(model, guide, X, num_samples=3)
    assert found.num_data == 3 and found.log_evidence == pytest.approx(log_evidence(X).mean().item(), abs=1e-12)
    posterior_draws = _arviz.dataset_of(to_arviz(model, guide, X, num_samples=5), "posterior")
    assert list(posterior_draws["data"].values) == [0, 1, 2]


def test_a_model_without_latents_has_its_likelihood():
    def model(x):
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(torch.zeros(2).double(), 1.0).to_event(1), obs=x)

    found = evaluate(model, lambda x: None, X, num_samples=2)
    truth = dist.Normal(torch.zeros(2).double(), 1.0).log_prob(X).sum(-1).mean().item()
    assert found.elbo == pytest.approx(truth, abs=1e-12) and found.log_evidence == pytest.approx(truth, abs=1e-12)
    assert found.rate == 0.0


def whole_model(x):
    """The observations are one site: no plate tells the data apart."""
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(torch.zeros(2).double(), 1.0).to_event(1))
    pyro.sample("x", dist.Normal(z, 1.0).to_event(2), obs=x)


def one_by_one_model(x):
    for i in pyro.plate("data", len(x)):
        z = pyro.sample(f"z{i}", dist.Normal(torch.zeros(2).double(), 1.0).to_event(1))
        pyro.sample(f"x{i}", dist.Normal(z, 1.0).to_event(1), obs=x[i])


def one_by_one_guide(x):
    for i in pyro.plate("data", len(x)):
        pyro.sample(f"z{i}", dist.Normal(x[i] / 2, 0.5**0.5).to_event(1))


@pytest.mark.parametrize(
    "model, guide", [(whole_model, posterior()), (one_by_one_model, one_by_one_guide)], ids=["event", "sequential"]
)
def test_without_a_data_plate_the_whole_is_spread_over_the_rows(model, guide):
    found = evaluate(model, guide, X, num_samples=4)
    assert found.log_evidence == pytest.approx(log_evidence(X).mean().item(), abs=1e-12)
    assert found.elbo == pytest.approx(found.log_evidence, abs=1e-12)
    assert found.num_data == 3 and found.log_evidence_se < 1e-12 > found.elbo_se


def test_a_joint_draw_of_all_latents_has_one_weight():
    guide = AutoMultivariateNormal(linear_model, init_scale=0.9)
    found = evaluate(linear_model, guide, X, num_samples=4000)
    error = found.log_evidence_se
    assert found.elbo + 0.01 < found.log_evidence
    assert abs(found.log_evidence - log_evidence(X).mean().item()) < 4 * error < 0.3


def test_rows_that_the_guide_reads_together_are_not_cut_into_batches():
    x = torch.linspace(-1, 2, 300).double()

    def model(x):
        mu = pyro.sample("mu", dist.Normal(torch.zeros(()).double(), 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(mu, 1.0), obs=x)

    def guide(x):
        pyro.sample("mu", dist.Normal(x.sum() / (1 + len(x)), (1 + len(x)) ** -0.5))

    covariance = torch.eye(300).double() + 1
    whole = dist.MultivariateNormal(torch.zeros(300).double(), covariance).log_prob(x).item()
    assert 300 * evaluate(model, guide, x, num_samples=20).elbo == pytest.approx(whole, abs=1e-8)


def pooled(x):
    """An exact guide of rows with the mean of SORTED, which reads its whole batch."""
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(x / 2 + x.mean() - SORTED.mean(), 0.5**0.5))


def by_position(x):
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(SORTED[: len(x)] / 2, 0.5**0.5))


SORTED = torch.linspace(-2, 2, 3000).double()


@pytest.mark.parametrize("guide", [pooled, by_position])
@pytest.mark.parametrize("batch_size", [None, 100])
def test_a_row_that_other_rows_of_its_batch_change_is_judged_among_all(guide, batch_size):
    found = evaluate(linear_model_of_one, guide, SORTED, num_samples=1, batch_size=batch_size)
    assert found.elbo == pytest.approx(dist.Normal(0.0, 2**0.5).log_prob(SORTED).mean().item(), abs=1e-7)


def after(x):
    """The next row."""
    return torch.cat([x[1:], x.new_zeros(1)])


def before(x):
    return torch.cat([x.new_zeros(1), x[:-1]])


def still_to_come(x):
    return 0.05 * (x.flip(0).cumsum(0).flip(0) - x)


def from_the_end(x):
    return SORTED[-len(x) :]


def far_ahead(x):
    return torch.cat([x[100:], x.new_zeros(min(100, len(x)))])


def long_before(x):
    return torch.cat([x.new_zeros(min(1000, len(x))), x[:-1000]])


OTHER_ROWS = [after, before, still_to_come, from_the_end, far_ahead, long_before]


@pytest.mark.parametrize("others", OTHER_ROWS)
@pytest.mark.parametrize("batch_size", [None, 10, 1, 2999])
def test_a_row_that_reads_other_rows_of_the_data_is_judged_among_all(others, batch_size):
    found = evaluate(*reading(others), SORTED, num_samples=2, batch_size=batch_size)
    truth = dist.Normal(others(SORTED), 2**0.5).log_prob(SORTED).mean().item()
    assert found.log_evidence == pytest.approx(truth, abs=1e-10)


def test_rows_that_stand_alone_come_in_batches():
    model = GaussianVAE((1, 2, 3), latent_dim=2, hidden=(5,))
    x = torch.rand(3000, 1, 2, 3).round()
    assert Weighing(model, NormalGuide(model), x, 1, None, None).size < 3000
    assert Weighing(linear_model_of_one, normal(), SORTED, 1, 100, None).size == 100


def test_rows_that_depend_on_each_other_have_one_weight():
    size = 5
    x = torch.linspace(-1, 1, size).double()
    pairs = torch.eye(size).double() + torch.eye(size).double().roll(1, 0)  # each row of x has two rows of z
    covariance = torch.eye(size).double() + pairs @ pairs.T

    def model(x):
        with pyro.plate("data", size):
            z = pyro.sample("z", dist.Normal(torch.zeros(size).double(), 1.0))
            pyro.sample("x", dist.Normal(z + z.roll(1, -1), 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", size):
            pyro.sample("z", dist.Normal(x / 3, 0.6))

    exact = dist.MultivariateNormal(torch.zeros(size).double(), covariance).log_prob(x).item()
    found = evaluate(model, guide, x, num_samples=40_000)
    assert abs(size * found.log_evidence - exact) < 4 * size * found.log_evidence_mc_se < 0.2
    assert Weighing(model, guide, x, 1, None, None).one_weight == "latents"
    drawn = _arviz.dataset_of(to_arviz(model, guide, x, num_samples=200), "vi_stats")
    assert "log_evidence" not in drawn or drawn["log_evidence"].size == 1


# --- masks


SEEN = torch.tensor([True, True, False, True, False])
HALF_SEEN = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0]).double()


def half_seen(x):
    mu = pyro.sample("mu", dist.Normal(torch.zeros(()).double(), 1.0))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(mu, 1.0), obs=x, obs_mask=SEEN)


def exact_of_half(x, masked=True):
    mu = pyro.sample("mu", dist.Normal(x[SEEN].sum() / 4, 0.5))
    with pyro.plate("data", len(x)), poutine.mask(mask=~SEEN if masked else True):
        pyro.sample("x_unobserved", dist.Normal(mu, 1.0))


def automatic_of_half(x):
    """AutoNormal around the exact posterior, so wide that weights can be trusted."""
    guide = AutoNormal(half_seen, init_scale=1.2)
    guide(x)
    with torch.no_grad():
        guide.locs.mu.fill_(x[SEEN].sum() / 4)
        guide.locs.x_unobserved.fill_(x[SEEN].sum() / 4)
    return guide


def joint_of_half(x):
    guide = AutoMultivariateNormal(half_seen)
    guide(x)
    return guide


@pytest.mark.parametrize(
    "make", [lambda x: exact_of_half, lambda x: partial(exact_of_half, masked=False), automatic_of_half]
)
def test_elements_that_the_model_alone_masks_are_no_latents(make, param_store):
    """Their log q stays in SiteELBO, as in Pyro, where it adds to the bound without an end."""
    guide, seen = make(HALF_SEEN), HALF_SEEN[SEEN]
    exact = dist.MultivariateNormal(torch.zeros(3).double(), torch.eye(3).double() + 1).log_prob(seen).item()
    found = evaluate(half_seen, guide, HALF_SEEN, num_samples=20_000)
    assert abs(5 * found.log_evidence - exact) < max(5 * 4 * found.log_evidence_mc_se, 1e-9) < 0.2
    assert found.elbo < found.log_evidence + 1e-9


def test_elements_that_only_the_model_masks_cannot_be_told_apart_in_a_joint_draw(param_store):
    with pytest.raises(UnsupportedSite, match="'x_unobserved': the model masks some of its elements"):
        evaluate(half_seen, joint_of_half(HALF_SEEN), HALF_SEEN)


def test_a_masked_latent_on_which_data_depend_has_a_flat_prior():
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(()).double(), 1.0).mask(False))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x, 1.0))

    assert evaluate(model, guide, HALF_SEEN, num_samples=5).log_evidence == pytest.approx(0.0, abs=1e-9)


# --- scales


def test_a_scale_of_all_sites_is_none():
    plain = evaluate(linear_model, posterior(1.2), X, num_samples=50)
    for scale in (1 / len(X), torch.tensor(3.0)):
        found = evaluate(poutine.scale(linear_model, scale), poutine.scale(posterior(1.2), scale), X, num_samples=50)
        assert (found.elbo, found.log_evidence) == (plain.elbo, plain.log_evidence)


def tempered(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(torch.zeros(2).double(), 1.0).to_event(1))
        with poutine.scale(scale=4.0):
            pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)


def test_a_scale_of_the_likelihood_is_kept_and_said():
    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(4 * x / 5, 0.2**0.5).to_event(1))

    found = evaluate(tempered, guide, X, num_samples=2)
    assert found.log_evidence == pytest.approx(found.elbo, abs=1e-9)  # the exact posterior of the tempered model
    with pytest.warns(GumboWarning, match="site 'x' has a scale of its own in the model"):
        to_arviz(tempered, guide, X, num_samples=10)


def test_a_scale_of_log_q_has_no_evidence():
    found = evaluate(linear_model, poutine.scale(posterior(1.2), 2.0), X, num_samples=50)
    assert math.isnan(found.log_evidence) and "scales log q of 'z'" in found.reason


def test_a_guide_that_observes_the_data_is_refused():
    with pytest.raises(UnsupportedSite, match="site 'x': model and guide both observe it"):
        evaluate(linear_model, linear_model, X)


# --- evidence with global latents


def regression(scale, classes=False):
    """y = X w + noise (or logits X w) of 30 rows, and a Normal guide with ``scale`` times the exact (or Laplace) sd."""
    generator = torch.Generator().manual_seed(4)
    inputs = torch.randn(30, 2, generator=generator).double()
    noise = torch.rand(30, generator=generator).double()
    w = torch.tensor([1.0, -0.5]).double()
    y = (noise < torch.sigmoid(inputs @ w)).double() if classes else inputs @ w + noise - 0.5
    likelihood = (lambda loc: dist.Bernoulli(logits=loc)) if classes else (lambda loc: dist.Normal(loc, 0.5))
    mean = torch.zeros(2).double()
    for _ in range(30 if classes else 1):  # Newton's steps to the mode
        slope = 1 / (1 + torch.exp(-inputs @ mean)) if classes else inputs @ mean / 0.25
        curvature = slope * (1 - slope) if classes else torch.full((30,), 4.0).double()
        precision = inputs.T @ (curvature[:, None] * inputs) + torch.eye(2).double()
        gradient = inputs.T @ ((y if classes else y / 0.25) - slope) - mean
        mean = mean + torch.linalg.solve(precision, gradient)

    def model(inputs, y):
        w = pyro.sample("w", dist.Normal(torch.zeros(2).double(), 1.0).to_event(1))
        with pyro.plate("data", len(y)):
            pyro.sample("y", likelihood((inputs * w).sum(-1)), obs=y)

    def guide(inputs, y):
        pyro.sample("w", dist.MultivariateNormal(mean, scale**2 * precision.inverse()))

    return model, guide, (inputs, y)


def quadrature(data):
    """log p(y) of the logistic regression over a grid that holds all of the prior's and the likelihood's mass."""
    inputs, y = data
    grid = torch.linspace(-7, 7, 701).double()
    w = torch.cartesian_prod(grid, grid)
    joint = dist.Normal(0.0, 1.0).log_prob(w).sum(-1)
    for row, label in zip(inputs, y, strict=True):
        joint = joint + dist.Bernoulli(logits=w @ row).log_prob(label)
    return (torch.logsumexp(joint, 0) + 2 * torch.log(grid[1] - grid[0])).item()


@pytest.mark.parametrize("classes", [False, True], ids=["linear", "logistic"])
def test_evidence_of_a_regression_is_that_of_all_data(classes):
    model, guide, data = regression(1.15, classes)
    inputs, y = data
    covariance = inputs @ inputs.T + 0.25 * torch.eye(30).double()
    normal = dist.MultivariateNormal(torch.zeros(30).double(), covariance)
    truth = quadrature(data) if classes else normal.log_prob(y).item()
    found = evaluate(model, guide, data, num_samples=4000)
    assert abs(30 * found.log_evidence - truth) < 4 * 30 * found.log_evidence_mc_se < 0.1
    assert found.log_evidence_se == found.log_evidence_mc_se and found.khat < 0.7 and not found.reason
    assert 30 * found.elbo < truth
    # The in-sample predictive density is another number, and the larger one.
    assert 30 * found.log_predictive > truth + 1
    assert "k̂ of the weights behind log p(x) is" in str(found)


def test_an_exact_guide_of_global_latents_needs_few_draws():
    model, guide, data = regression(1.0)
    inputs, y = data
    covariance = inputs @ inputs.T + 0.25 * torch.eye(30).double()
    truth = dist.MultivariateNormal(torch.zeros(30).double(), covariance).log_prob(y).item()
    found = evaluate(model, guide, data, num_samples=5)
    assert 30 * found.log_evidence == pytest.approx(truth, abs=1e-8) and found.khat == 0


@pytest.mark.parametrize("scale", [0.15, 1.15])
def test_weights_that_cannot_be_trusted_say_nothing(scale):
    model, guide, data = regression(scale)
    found = evaluate(model, guide, data, num_samples=2000 if scale < 1 else 20)
    assert math.isnan(found.log_evidence) and math.isnan(found.log_evidence_se)
    said = "above 0.70 for 2000 draws; the ELBO is a lower bound" if scale < 1 else "20 draws are too few"
    assert said in found.reason and f"cannot say: {found.reason}" in " ".join(str(found).split())
    assert max(map(len, str(found).splitlines())) <= 80
    assert math.isfinite(found.log_predictive) and "log predictive" in str(found)


def test_a_draw_that_the_model_excludes_does_not_hide_weights_that_cannot_be_trusted():
    """Its log-weight is −∞: as a size of rounding errors it would make all weights equal, with a k̂ of 0."""

    def model(x):
        z = pyro.sample("z", dist.Normal(torch.zeros(()).double(), 3.0))
        pyro.factor("allowed", torch.where(z <= 1.5, 0.0, -math.inf))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def narrow(x):
        pyro.sample("z", dist.Normal(torch.tensor(0.7).double(), 0.35))

    x = torch.tensor([0.1, -0.4, 0.2, 0.3]).double()
    found = evaluate(model, narrow, x, num_samples=2000)
    assert found.khat > 0.8 and math.isnan(found.log_evidence) and found.elbo == -math.inf
    draws = to_arviz(model, narrow, x, num_samples=2000, groups=["vi_stats"])
    assert draws.vi_stats["khat"].item() > 0.6


def shared(scale, guide_scale=1.0, rows=7):
    """mu ~ N(0, 1), z_i ~ N(mu, 1), x_i ~ N(z_i, 1/2); q(mu) and q(z_i | mu) with ``scale`` times the exact sd."""
    model, _ = subsampling(rows)

    def guide(x):
        variance = 1 / (1 + len(x) / 1.25)
        mu = pyro.sample("mu", dist.Normal(variance * x.sum() / 1.25, guide_scale * variance**0.5))
        with pyro.plate("data", len(x), subsample_size=rows) as index:
            pyro.sample("z", dist.Normal(0.2 * (mu + 4 * x[index]), scale * 0.2**0.5))

    return model, guide


@pytest.mark.parametrize("rows", [33, 7], ids=["whole", "blocks"])
def test_local_latents_are_integrated_inside_each_draw_of_the_global_ones(rows):
    truth = dist.MultivariateNormal(torch.zeros(33).double(), 1.25 * torch.eye(33).double() + 1).log_prob(ROWS).item()
    found = evaluate(*shared(1.2, 1.2, rows), ROWS, num_samples=600, num_local_samples=100)
    assert abs(33 * found.log_evidence - truth) < 4 * 33 * found.log_evidence_mc_se < 0.5
    assert found.num_local_samples == 100
    assert "600 draws of the global latents, 100 of the local ones for each" in str(found)
    # One draw of 33 local latents for each global one leaves weights that k̂ does not trust.
    joint = evaluate(*shared(0.5, 1.2, rows), ROWS, num_samples=600, num_local_samples=1)
    assert joint.num_local_samples == 1 and math.isnan(joint.log_evidence) and "k̂" in joint.reason
    with pytest.raises(BadInput, match="num_local_samples is 0"):
        evaluate(*shared(1.0), ROWS, num_local_samples=0)


def test_a_global_latent_drawn_given_local_ones_has_one_weight_with_them():
    def model(x):
        mu = pyro.sample("mu", dist.Normal(torch.zeros(()).double(), 1.0))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(mu, 1.0))
            pyro.sample("x", dist.Normal(z, 0.5), obs=x)

    def guide(x):
        # The exact posterior, the other way round: z all given x by its marginal, then mu given z.
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.9 * x, 0.6))
        pyro.sample("mu", dist.Normal(z.sum(-1) / (1 + len(x)), (1 + len(x)) ** -0.5))

    x = torch.tensor([0.3, -0.5]).double()
    truth = dist.MultivariateNormal(torch.zeros(2).double(), 1.25 * torch.eye(2).double() + 1).log_prob(x).item()
    found = evaluate(model, guide, x, num_samples=4000)
    assert found.num_local_samples == 1
    assert abs(2 * found.log_evidence - truth) < 4 * 2 * found.log_evidence_mc_se < 0.2


def test_a_discrete_global_latent_has_weights_of_few_values():
    def model(x):
        k = pyro.sample("k", dist.Bernoulli(torch.tensor(0.3).double()))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(k, 1.0), obs=x)

    def guide(x):
        pyro.sample("k", dist.Bernoulli(torch.tensor(0.6).double()))

    x = X[:, 0]
    by_k = [dist.Normal(k, 1.0).log_prob(x).sum() + math.log(p) for k, p in ((0.0, 0.7), (1.0, 0.3))]
    truth = torch.logsumexp(torch.stack(by_k), 0).item()
    found = evaluate(model, guide, x, num_samples=3000)
    assert math.isnan(found.khat) and not found.reason
    assert abs(3 * found.log_evidence - truth) < 4 * 3 * found.log_evidence_mc_se < 0.2


def test_a_point_has_no_evidence_and_a_batch_not_that_of_all():
    def model(y, size=3):
        w = pyro.sample("w", dist.Normal(torch.zeros(()).double(), 1.0))
        with pyro.plate("data", size, subsample=torch.arange(len(y))):
            pyro.sample("y", dist.Normal(w, 1.0), obs=y)

    def point(y):
        pyro.sample("w", dist.Delta(torch.tensor(0.2).double()))

    found = evaluate(model, point, X[:, 0], num_samples=3)
    assert math.isnan(found.log_evidence) and "a point at 'w'" in found.reason
    found = evaluate(lambda y: model(y, 9), lambda y: pyro.sample("w", dist.Normal(0.1, 0.5)), X[:, 0])
    assert math.isnan(found.log_evidence) and "the 3 rows are a batch of more" in found.reason


def two_means(x):
    a = pyro.sample("a", dist.Normal(0.0, 1.0))
    b = pyro.sample("b", dist.LogNormal(0.0, 1.0))
    p = pyro.sample("p", dist.Dirichlet(torch.ones(3)))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal((a + b + p[..., 0])[..., None] if p.dim() > 1 else a + b + p[0], 1.0), obs=x)


def in_parts(first, *sites):
    def made(model):
        guide = autoguide.AutoGuideList(model)
        guide.append(first(pyro.poutine.block(model, expose=list(sites))))
        guide.append(autoguide.AutoNormal(pyro.poutine.block(model, hide=list(sites)), init_scale=0.1))
        return guide

    return made


def structured(**kinds):
    return lambda model: autoguide.AutoStructured(model, conditionals={"b": "normal", "p": "normal", **kinds})


DEGENERATE = {
    "AutoDelta": autoguide.AutoDelta,
    "AutoLaplaceApproximation": autoguide.AutoLaplaceApproximation,
    "AutoDelta of one": in_parts(autoguide.AutoDelta, "a"),
    "AutoLaplaceApproximation of two": in_parts(autoguide.AutoLaplaceApproximation, "a", "p"),
    "AutoStructured with a point": structured(a="delta"),
}
DISTRIBUTIONS = {
    "AutoNormal": autoguide.AutoNormal,
    "AutoDiagonalNormal": autoguide.AutoDiagonalNormal,
    "AutoMultivariateNormal": autoguide.AutoMultivariateNormal,
    "AutoLowRankMultivariateNormal": autoguide.AutoLowRankMultivariateNormal,
    "AutoIAFNormal": autoguide.AutoIAFNormal,
    "AutoStructured": structured(a="normal"),
    "list": in_parts(autoguide.AutoMultivariateNormal, "a", "p"),
    "messenger": autoguide.AutoNormalMessenger,
}


@pytest.mark.parametrize("make", [*DEGENERATE.values(), *DISTRIBUTIONS.values()], ids=[*DEGENERATE, *DISTRIBUTIONS])
def test_a_guide_that_is_a_point_at_one_of_its_latents_has_no_evidence(make, param_store):
    guide, data = make(two_means), X[:, 0].float()
    guide(data)
    found = evaluate(two_means, guide, data, num_samples=20)
    idata = to_arviz(two_means, guide, data, num_samples=20)
    known = not math.isnan(float(_arviz.dataset_of(idata, "vi_stats")["log_evidence"][0]))
    if make in DISTRIBUTIONS.values():
        assert known and "no density" not in found.reason
        return
    assert "no density; neither is the ELBO a bound" in found.reason and "\n" not in found.reason
    assert math.isnan(found.log_evidence) and math.isnan(found.khat) and math.isfinite(found.elbo) and not known
    with pytest.raises(BadInput, match="the guide is a point at"):
        loo_approximate_posterior(idata)
    report = diagnose(two_means, guide, data, num_samples=100, progress=False)
    assert {report[name].verdict for name in ("khat", "ess", "gap")} == {"cannot say"}


@pytest.mark.slow
def test_errors_of_the_draws_are_those_of_repeated_evaluations():
    model, guide, data = regression(1.1)
    cases = [(linear_model, posterior(0.8, 0.3), X), (model, guide, data), (*shared(1.1, 1.1, 33), ROWS)]
    for case in cases:
        runs = [evaluate(*case, num_samples=200, num_local_samples=20, seed=seed) for seed in range(25)]
        for name in ("elbo", "rate", "distortion", "log_evidence", "log_predictive"):
            drawn = torch.tensor([getattr(run, name) for run in runs])
            said = torch.tensor([getattr(run, f"{name}_mc_se") for run in runs]).square().mean().sqrt()
            # Standard deviations of 25 runs are within these factors with probability 0.999.
            assert 0.55 < (drawn.std() / said).item() < 1.5, (name, drawn.std(), said)


def test_the_spread_of_the_data_is_not_the_error_of_the_draws():
    found = evaluate(linear_model, posterior(), X, num_samples=50)
    assert found.log_evidence_se > 0.05 and found.log_evidence_mc_se < 1e-9
    assert found.values["log_evidence"].shape == (3,)
    assert torch.allclose(found.values["log_evidence"], log_evidence(X), atol=1e-9)


def test_two_guides_are_compared_datum_by_datum():
    better = evaluate(linear_model, posterior(), X, num_samples=400)
    worse = evaluate(linear_model, posterior(0.9), X, num_samples=400, seed=1)
    found = better.compare(worse)["elbo"]
    divergence = torch.distributions.kl_divergence(dist.Normal(0.0, 0.9), dist.Normal(0.0, 1.0)).item() * 2
    assert abs(found.mean - divergence) < 4 * found.mc_se < 0.05
    assert found.se < better.elbo_se / 10  # the data differ by much more than the guides
    assert better.compare(better)["log_evidence"].mean == 0
    with pytest.raises(BadInput, match="different data"):
        better.compare(evaluate(linear_model, posterior(), X.flip(0), num_samples=2))
    with pytest.raises(BadInput, match="another Evaluation"):
        better.compare(0.3)


# --- gradients at fixed parameters


class Coin(pyro.nn.PyroModule):
    """q(z) = Bernoulli(sigmoid(logit)) of one coin for each datum."""

    def __init__(self):
        super().__init__()
        self.logit = torch.nn.Parameter(torch.tensor(0.4, dtype=torch.float64))

    def forward(self, x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Bernoulli(logits=self.logit.expand(len(x))))


class CoinModel(pyro.nn.PyroModule):
    def __init__(self):
        super().__init__()
        self.shift = torch.nn.Parameter(torch.tensor(1.5, dtype=torch.float64))

    def forward(self, x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Bernoulli(torch.tensor(0.3, dtype=torch.float64)).expand([len(x)]))
            pyro.sample("x", dist.Normal(self.shift * z, 1.0), obs=x)


Y = torch.tensor([0.2, 1.9], dtype=torch.float64)


def exact_score_moments():
    """Mean and variance of −f(z) ∇log q(z), f the log-weight, by listing both values of each coin.

    Pyro leaves out the direct gradient of −log q, whose expectation is zero.
    """
    logit, p = torch.tensor(0.4).double(), torch.sigmoid(torch.tensor(0.4).double())
    mean, variance = 0.0, 0.0
    for y in Y:
        values, weights = [], []
        for z, prob in ((0.0, 1 - p), (1.0, p)):
            z = torch.tensor(z).double()
            f = dist.Bernoulli(0.3).log_prob(z) + dist.Normal(1.5 * z, 1.0).log_prob(y)
            f = f - dist.Bernoulli(logits=logit).log_prob(z)
            score = z - p
            values.append(-f * score)
            weights.append(prob)
        first = sum(w * v for w, v in zip(weights, values, strict=True))
        mean += first
        variance += sum(w * (v - first) ** 2 for w, v in zip(weights, values, strict=True))
    return mean.item(), variance.item()


@pytest.mark.slow
@pytest.mark.parametrize("word", ["trace", "trace-graph"])
def test_moments_of_the_score_estimator_are_the_enumerated_ones(word):
    mean, variance = exact_score_moments()
    moments = gradient_moments(CoinModel(), Coin(), make_loss(word), Y, num_samples=4000)
    assert list(moments.mean) == ["guide.logit"]
    assert moments.mean["guide.logit"].dtype == torch.float64
    assert abs(moments.mean["guide.logit"].item() - mean) < 4.5 * moments.error["guide.logit"].item()
    assert moments.total_variance == pytest.approx(variance, rel=0.15)
    assert moments.signal_to_noise == pytest.approx(abs(mean) / variance**0.5, rel=0.3)


def test_streamed_moments_are_those_of_the_stacked_draws():
    options = {"num_samples": 12, "seed": 4, "which": "all"}
    draws = list(gradient_draws(CoinModel(), Coin(), Trace_ELBO(), Y, **options))
    moments = gradient_moments(CoinModel(), Coin(), Trace_ELBO(), Y, **options)
    assert set(moments.mean) == {"guide.logit", "model.shift"}
    for name in moments.mean:
        stacked = torch.stack([draw[name] for draw in draws])
        assert torch.allclose(moments.mean[name], stacked.mean(0), atol=1e-12)
        assert torch.allclose(moments.variance[name], stacked.var(0), atol=1e-12)


@pytest.mark.parametrize("word", ["trace", "trace-graph+baseline", "score-average", "rloo"])
def test_drawing_gradients_leaves_everything_as_it_was(word, param_store):
    model, guide = CoinModel(), Coin()
    guide.logit.grad = torch.tensor(7.0).double()
    loss = make_loss(word)
    before = torch.get_rng_state()
    for draw in gradient_draws(model, guide, loss, Y, num_samples=3, burn_in=2):
        assert torch.equal(before, torch.get_rng_state())  # between draws too
        assert not param_store
        assert guide.logit.grad.item() == 7.0
        assert draw["guide.logit"].shape == (1,)
    assert model.shift.grad is None
    assert guide.logit.item() == 0.4
    assert param_store == {} or not param_store
    again = [d["guide.logit"] for d in gradient_draws(model, guide, loss, Y, num_samples=3, burn_in=2)]
    twice = [d["guide.logit"] for d in gradient_draws(model, guide, loss, Y, num_samples=3, burn_in=2)]
    assert all(torch.equal(a, b) for a, b in zip(again, twice, strict=True))


@pytest.mark.parametrize("word", ["trace-graph+baseline", "score-average"])
def test_a_baseline_needs_its_burn_in(word):
    x = Y + 30.0  # a large constant cost, which a baseline takes away once it has seen it
    first = gradient_moments(CoinModel(), Coin(), make_loss(word), x, num_samples=10)
    later = gradient_moments(CoinModel(), Coin(), make_loss(word), x, num_samples=10, burn_in=100)
    assert later.total_variance < first.total_variance / 3


def test_a_module_of_a_loss_keeps_its_own_baseline():
    model, guide = CoinModel(), Coin()
    module = make_loss("score-average")(model, guide)
    module(Y).backward()
    state = {name: value.clone() for name, value in module.state_dict().items() if isinstance(value, torch.Tensor)}
    gradient_moments(model, guide, module, Y, num_samples=5)
    assert all(torch.equal(state[name], module.state_dict()[name]) for name in state)


def test_gradients_that_cannot_be_drawn():
    with pytest.raises(BadInput, match='expected "guide" or "all"'):
        list(gradient_draws(CoinModel(), Coin(), Trace_ELBO(), Y, which="models"))
    with pytest.raises(BadInput, match="at least 2 draws"):
        gradient_moments(CoinModel(), Coin(), Trace_ELBO(), Y, num_samples=1)
    with pytest.raises(BadInput, match="guide has no parameter"):
        list(gradient_draws(linear_model, posterior(), Trace_ELBO(), X))


def test_parameters_met_first_among_many_draws(param_store):
    """vmap cannot register a parameter in the store: programs of others, with weights and layers of their own."""

    class Model(PyroModule):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.tensor(0.5))

        def forward(self, x):
            with pyro.plate("data", len(x)):
                z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
                logits = z.mean(-1, keepdim=True) - self.weight
                pyro.sample("x", dist.Bernoulli(logits=logits.expand(-1, 9)).to_event(1), obs=x)

    class Guide(PyroModule):
        def __init__(self):
            super().__init__()
            self.loc = torch.nn.Linear(9, 2)

        def forward(self, x):
            with pyro.plate("data", len(x)):
                pyro.sample("z", dist.Normal(self.loc(x), 1.0).to_event(1))

    model, guide, x = Model(), Guide(), torch.ones(10, 9)
    assert evaluate(model, guide, x, num_samples=10).elbo < 0
    assert not len(param_store)


# --- batches that Pyro's validation does not see


def bounded():
    """z is positive in the model; the guide's draws for data above 5 are not."""

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.HalfNormal(1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Uniform(-3.0 * (x > 5), 1 - 3.0 * (x > 5)))

    return model, guide


def counted(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Bernoulli(logits=z), obs=x)


def linear_model_of_one(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def normal(scale=lambda x: 1.0):
    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(0.0 * x, scale(x)))

    return guide


BITS = torch.tensor([0.0, 1.0, 1.0, 0.0, 1.0, 0.0])


@pytest.mark.parametrize(
    "model, guide, data, match",
    [
        (*bounded(), torch.tensor([0.0, 1.0, 9.0, 3.0, 4.0, 5.0]), "'z' has a value outside the support"),
        (counted, normal(), torch.tensor([0.0, 1.0, 0.5, 0.0, 1.0, 1.0]), "'x' has a value outside the support"),
        (linear_model_of_one, normal(lambda x: 1 - x), torch.tensor([0.0, 0.5, 3.0, 0.0, 0.5, 0.0]), "parameter scale"),
    ],
    ids=["prior", "data", "parameter"],
)
def test_what_validation_refuses_is_refused_in_every_batch_and_run(model, guide, data, match):
    with pytest.raises((BadInput, ValueError), match=match):
        evaluate(model, guide, data, num_samples=3, batch_size=2)


def test_a_site_without_validation_is_not_checked():
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Bernoulli(logits=z, validate_args=False), obs=x)

    assert math.isfinite(evaluate(model, normal(), BITS / 2, num_samples=3, batch_size=2).elbo)


def test_checks_look_at_held_data_once_and_again_after_a_write():
    data = BITS.clone()
    checks = Checks([data])
    site = {"name": "x", "type": "sample", "fn": dist.Bernoulli(torch.full((2,), 0.5)), "value": data[2:4]}
    assert checks.passes("model", site)
    data[3] = 0.5
    assert not checks.passes("model", site | {"value": data[2:4]})


def separately(programs, count):
    """The draws of z that separate runs of the guide make, ``count`` at a time."""
    model, guide = programs
    sweep = Sweep(model, guide, (X[:, 0],), {})
    found = []
    for size in (count, count, count // 2):
        found.append(next(sweep.over_rows(size))[1].value("z"))
    return torch.cat(found)


def hierarchy(own_noise=False, independent=False):
    """A guide with two sites, of which the second depends on the draw of the first unless ``independent``."""

    def model(x):
        with pyro.plate("data", len(x)):
            w = pyro.sample("w", dist.Normal(torch.zeros(()).double(), 1.0))
            z = pyro.sample("z", dist.Normal(w, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x):
        guide.runs += 1
        with pyro.plate("data", len(x)):
            shift = torch.randn(len(x)).double() if own_noise else 0.0
            w = pyro.sample("w", dist.Normal(x + shift, 1.0))
            pyro.sample("z", dist.Normal(x if independent else w, 0.5))

    guide.runs = 0
    return model, guide


@pytest.mark.parametrize(
    "options, runs", [({"independent": True}, 1), ({}, 3), ({"own_noise": True, "independent": True}, 10)]
)
def test_draws_of_several_turns_are_those_of_separate_runs_of_the_guide(options, runs):
    """A guide is run once for all turns only where its distributions are the same for all draws."""
    model, guide = programs = hierarchy(**options)
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(7)
        expected = separately(programs, 4)
        sweep = Sweep(model, guide, (X[:, 0],), {})
        torch.manual_seed(7)
        guide.runs = 0
        found = list(sweep.turns([4, 4, 2]))
    assert guide.runs == runs
    assert torch.equal(torch.cat([run.value("z") for _, _, run, _ in found]), expected)
    joint = torch.cat([run.joint_log_prob(("data",)) for _, _, run, _ in found])
    again = [dist.Normal(run.value("w"), 0.5).log_prob(run.value("z")) for _, _, run, _ in found]
    if options == {}:
        w = torch.cat([dist.Normal(X[:, 0], 1.0).log_prob(run.value("w")) for _, _, run, _ in found])
        assert torch.allclose(joint, torch.cat(again) + w)


def test_evaluations_are_equal_where_numbers_are_unknown_in_both():
    numbers = dict.fromkeys(("elbo", "log_evidence", "rate", "distortion"), 1.0)
    errors = {f"{name}_se": 0.5 for name in numbers}
    found, again, other = (
        Evaluation(**numbers, **errors, num_data=3, num_samples=1, khat=khat) for khat in (float("nan"), math.nan, 0.1)
    )
    assert found == again and hash(found) == hash(again)
    assert found != other and found != numbers


def test_an_evaluator_follows_the_parameters():
    model = GaussianVAE((1, 2, 2), latent_dim=2, hidden=(4,))
    guide = NormalGuide(model, hidden=(4,))
    x = torch.bernoulli(torch.full((10, 1, 2, 2), 0.5))
    evaluator = Evaluator(model, guide, x, num_samples=3, batch_size=4)
    assert evaluator(1) == evaluate(model, guide, x, num_samples=3, batch_size=4, seed=1)
    with torch.no_grad():
        for parameter in (*model.parameters(), *guide.parameters()):
            parameter.add_(0.1)
    assert evaluator(1) == evaluate(model, guide, x, num_samples=3, batch_size=4, seed=1)
    relaxed = CategoricalVAE((1, 2, 2), num_latents=2, num_classes=3, hidden=(5,), relaxed=True)
    relaxed_guide = RelaxedCategoricalGuide(relaxed, hidden=(5,))
    evaluator = Evaluator(relaxed, relaxed_guide, x, num_samples=3)
    evaluator(1)
    with torch.no_grad():
        for parameter in (*relaxed.parameters(), *relaxed_guide.parameters()):
            parameter.add_(0.1)
    assert evaluator(1) == evaluate(relaxed, relaxed_guide, x, num_samples=3, seed=1)


def test_progress_is_shown_where_it_is_asked_for(capsys):
    evaluate(linear_model, posterior(), X, num_samples=2)
    assert capsys.readouterr().err == ""
    evaluate(linear_model, posterior(), X, num_samples=2, progress=True)
    assert "evaluate 1/1" in capsys.readouterr().err


@pytest.mark.parametrize(
    "shape, rank", [((3, 4, 5), 1), ((4, 5), 1), ((2, 3, 4, 5), 2), ((1, 4, 5), 2), ((4, 1, 5), 2)]
)
@pytest.mark.parametrize("lacks", [0, 1])
def test_coins_in_three_passes_have_their_log_probability(shape, rank, lacks):
    generator = torch.Generator().manual_seed(0)
    logits = (30 * torch.randn(shape, generator=generator)).double()
    value = torch.rand(shape[lacks:], generator=generator).round().double()
    fn = dist.Bernoulli(logits=logits).to_event(rank)
    torch.testing.assert_close(coins_log_prob(fn, value), fn.log_prob(value), rtol=1e-13, atol=1e-12)
    with pytest.raises(ValueError, match="within the support"):
        coins_log_prob(fn, value + 0.5)
    relaxed = dist.Bernoulli(logits=logits, validate_args=False).to_event(rank)
    torch.testing.assert_close(coins_log_prob(relaxed, value / 2), relaxed.log_prob(value / 2), rtol=1e-13, atol=1e-12)


def test_other_sites_keep_their_own_log_probability():
    logits = torch.zeros(3, 4)
    for fn in (dist.Bernoulli(logits=logits), dist.Bernoulli(probs=logits + 0.5).to_event(1), dist.Delta(logits)):
        assert coins_log_prob(fn, torch.ones(3, 4)) is None
    assert coins_log_prob(dist.Bernoulli(logits=logits).to_event(1).mask(False), torch.ones(3, 4)) is None
    assert coins_log_prob(dist.Bernoulli(logits=logits).to_event(1), torch.ones(2, 3, 4)) is None
    assert coins_log_prob(dist.Bernoulli(logits=logits).to_event(1), torch.ones(3, 4).double()) is None


def test_coins_in_three_passes_run_under_vmap():
    logits = torch.linspace(-2, 2, 5)
    values = torch.eye(5)[:3]

    def one(value):
        return coins_log_prob(dist.Bernoulli(logits=logits, validate_args=False).to_event(1), value)

    torch.testing.assert_close(torch.vmap(one)(values), dist.Bernoulli(logits=logits).to_event(1).log_prob(values))


def test_an_autoguide_that_was_never_called_is_set_up_on_all_rows(param_store):
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(()).double(), 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    guide = AutoNormal(model)
    assert evaluate(model, guide, torch.linspace(-1, 1, 300).double(), num_samples=2).num_data == 300
    assert guide.locs.z.shape == (300,)


def guide_of_two_parts(x):
    """N(±1, 1) with equal shares, the sign drawn as an auxiliary coin."""
    sign = pyro.sample("sign", dist.Bernoulli(x.new_tensor(0.5)), infer={"is_auxiliary": True})
    pyro.sample("z", dist.Normal(2 * sign - 1, 1.0))


def guide_of_a_noisy_sum(x):
    """N(x / 2, 1/2), the posterior, as a Delta at the sum of two auxiliary draws."""
    parts = pyro.sample("parts", dist.Normal(x / 4, 0.5).expand([2]).to_event(1), infer={"is_auxiliary": True})
    pyro.sample("z", dist.Delta(parts.sum(-1)))


@pytest.mark.parametrize("guide, name", [(guide_of_two_parts, "sign"), (guide_of_a_noisy_sum, "parts")])
def test_auxiliary_draws_that_the_latents_do_not_determine_are_warned_of(guide, name):
    def model(x):
        z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    x = torch.tensor(0.7, dtype=torch.float64)
    said = f"the guide's site '{name}': the latents do not determine it"
    for work in (evaluate, partial(to_arviz, groups=["posterior"])):
        with pytest.warns(GumboWarning, match=said):
            work(model, guide, x, num_samples=20)
    with pytest.warns(GumboWarning, match=f"{said}.*the objective is no bound"):
        SiteELBO("rloo", vectorize_particles=False).loss(model, guide, x)


def test_an_auxiliary_draw_that_the_model_has_too_leaves_the_evidence_exact():
    def model(x):
        z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
        pyro.sample("sign", dist.Bernoulli(logits=2 * z), infer={"is_auxiliary": True})
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    x = torch.tensor(0.7, dtype=torch.float64)
    # log q(z, sign) − log r(sign | z) is log q(z) here: the coin's posterior under the guide has the logits 2 z.
    points = torch.linspace(-12, 12, 4001, dtype=torch.float64)
    density = dist.Normal(0.0, 1.0).log_prob(points) + dist.Normal(points, 1.0).log_prob(x)
    log_q = torch.logsumexp(torch.stack([dist.Normal(at, 1.0).log_prob(points) for at in (-1.0, 1.0)]), 0) - math.log(2)
    bound = torch.trapezoid(log_q.exp() * (density - log_q), points).item()
    found = evaluate(model, guide_of_two_parts, x, num_samples=20_000)
    assert abs(found.elbo - bound) < 4 * found.elbo_mc_se
    assert found.log_evidence == pytest.approx(dist.Normal(0.0, 2**0.5).log_prob(x).item(), abs=0.05)
    assert SiteELBO("rloo", num_particles=20_000).loss(model, guide_of_two_parts, x) == pytest.approx(-bound, abs=0.05)


@pytest.mark.parametrize("verb", [evaluate, to_arviz, diagnose, predict])
def test_programs_without_sites_are_refused(verb):
    def empty():
        pass

    with pytest.raises(BadInput, match="model and guide have no sample sites"):
        verb(empty, empty, *([()] if verb is evaluate else []))


# --- a model that changes between two evaluations -----------------------------------------------------------------


def grows(stage, x, program):
    """A latent more."""
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", program(0.0))
        more = pyro.sample("more", program(z)) if stage else 0.0
        if program is unit_normal:
            pyro.sample("x", dist.Normal(z + more, 1.0), obs=x)


def is_labelled(stage, x, program):
    """A latent that is given."""
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", program(0.0))
        if program is unit_normal:
            label = pyro.sample("label", dist.Normal(z, 1.0), obs=x.sign() if stage else None)
            pyro.sample("x", dist.Normal(z + label, 1.0), obs=x)
        elif not stage:
            pyro.sample("label", program(z))


def gains_a_factor(stage, x, program):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", program(0.0))
        if program is unit_normal:
            if stage:
                pyro.factor("more", -z.square())
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def loses_its_plate(stage, x, program):
    if stage:
        z = pyro.sample("z", program(0.0).expand([len(x)]).to_event(1))
        if program is unit_normal:
            pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)
    else:
        gains_a_factor(0, x, program)


def turns_its_plates(stage, x, program):
    with pyro.plate("pair", 2, dim=-2 if stage else -1), pyro.plate("data", len(x), dim=-1 if stage else -2):
        z = pyro.sample("z", program(0.0))
        if program is unit_normal:
            pyro.sample("x", dist.Normal(z, 1.0), obs=x.expand(2, len(x)) if stage else x[:, None].expand(len(x), 2))


def unit_normal(mean):
    return dist.Normal(mean, 1.0)


def narrower(mean):
    return dist.Normal(0.5 * mean + 0.1, 0.8)


@pytest.mark.parametrize("program", [grows, is_labelled, gains_a_factor, loses_its_plate, turns_its_plates])
def test_a_model_that_changes_between_two_evaluations_is_judged_as_it_is_now(program):
    stage, x = [0], torch.linspace(-1.0, 1.0, 7)

    def model(x):
        program(stage[0], x, unit_normal)

    def guide(x):
        program(stage[0], x, narrower)

    evaluator = Evaluator(model, guide, x, num_samples=4)
    before = evaluator()
    stage[0] = 1
    now = evaluator()
    assert now.elbo != before.elbo or program is loses_its_plate
    assert now == evaluate(model, guide, x, num_samples=4, seed=0)
