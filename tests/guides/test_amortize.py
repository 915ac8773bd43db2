"""`amortize`: what it decides for programs of a user's own, what it refuses, and that its factorization is faithful."""

from __future__ import annotations

import itertools
import random
from contextlib import nullcontext

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from own_programs import PROGRAMS, gaussian_posterior
from pyro import poutine
from pyro.infer import SVI, Trace_ELBO, TraceEnum_ELBO, TraceGraph_ELBO
from torch import nn

from gumbo.errors import BadInput, UnknownName
from gumbo.guides import amortize
from gumbo.guides._conditionals import Family, _Counts
from gumbo.guides._encoders import GlobalHead, LocalHead, Recurrent
from gumbo.guides._inversion import faithful_inverse
from gumbo.guides._structure import reference
from gumbo.inference import SiteELBO, diagnose, evaluate, fit, predict, to_arviz
from gumbo.inference.engine.rows import Rows
from gumbo.inference.training.inspection import inspect_programs

WORDS = ("mean-field", "faithful", "full")


def made(model, *args, **options):
    return amortize(model, *args, quiet=True, **options)


# ---- the graph


def separated(prior, one: str, other: str, given: set[str]) -> bool:
    """Whether ``given`` separates two nodes of a directed graph (moral graph of the ancestors)."""
    kept, waiting = set(), [one, other, *given]
    while waiting:
        name = waiting.pop()
        if name not in kept:
            kept.add(name)
            waiting += prior[name]
    near = {name: set() for name in kept}
    for child in kept:
        for a, b in itertools.combinations([child, *prior[child]], 2):
            near[a].add(b)
            near[b].add(a)
    reached, waiting = set(), [one]
    while waiting:
        name = waiting.pop()
        if name not in reached and name not in given:
            reached.add(name)
            waiting += near[name]
    return other not in reached


def asserted(parents, name: str) -> set[str]:
    """The latent sites drawn before a site of which its factor says that it does not depend on them."""
    order = list(parents)
    return set(order[: order.index(name)]) - set(parents[name])


def test_two_children_stay_dependent_where_their_parent_is_drawn_last():
    prior = {"mu": [], "theta1": ["mu"], "theta2": ["mu"], "y1": ["theta1"], "y2": ["theta2"]}
    found = faithful_inverse(prior, ["y1", "y2"], order=["theta1", "theta2", "mu"])
    assert found.parents == {"theta1": (), "theta2": ("theta1",), "mu": ("theta1", "theta2")}
    blanket = {"theta1", "theta2"}
    assert found.observed["mu"] == () and set(found.parents["mu"]) == blanket


def test_v_structures_are_kept():
    prior = {"a": [], "b": [], "c": ["a", "b"], "d": []}
    parents = faithful_inverse(prior, ["c"]).parents
    assert {"a", "b"} == {"a"} | {"b"} and (parents["a"] == ("b",) or parents["b"] == ("a",))
    assert parents["d"] == () and all("d" not in above for above in parents.values())


@pytest.mark.parametrize("seed", range(30))
def test_no_independence_is_asserted_that_the_prior_does_not_imply(seed):
    draw = random.Random(seed)
    names = [f"z{place}" for place in range(6)] + ["x", "y"]
    prior = {
        name: [above for above in names[:place] if above[0] == "z" and draw.random() < 0.35]
        for place, name in enumerate(names)
    }
    order = draw.sample(names[:6], 6) if seed % 2 else None
    found = faithful_inverse(prior, ["x", "y"], order=order)
    for name, above in found.parents.items():
        given = {*above, "x", "y"}
        for other in asserted(found.parents, name):
            assert separated(prior, name, other, given), (name, other, found.parents)
        earlier = list(found.parents)[: list(found.parents).index(name)]
        for seen in {"x", "y"} - set(found.observed[name]):
            given = {*above, *found.observed[name]}
            assert separated(prior, name, seen, given), (name, seen, earlier)


def test_a_chain_stays_a_chain():
    prior = {"z0": [], "x0": ["z0"]}
    for t in range(1, 50):
        prior |= {f"z{t}": [f"z{t - 1}"], f"x{t}": [f"z{t}"]}
    parents = faithful_inverse(prior, [name for name in prior if name[0] == "x"]).parents
    assert all(above == (f"z{t - 1}",) for t in range(1, 50) for above in [parents[f"z{t}"]])


def test_a_summed_site_joins_its_neighbours():
    prior = {"a": [], "s": ["a"], "b": ["s"], "y": ["s"]}
    assert faithful_inverse(prior, ["y"], summed=["s"]).parents == {"a": (), "b": ("a",)}


def test_what_crosses_the_data_is_drawn_before_the_rows_of_the_data():
    """Drawn last, the means of a mixture would couple the assignments of all data."""
    prior = {"weights": [], "means": [], "z": ["weights"], "x": ["means", "z"]}
    plates = {"weights": (), "means": ("components",), "z": ("rows",), "x": ("rows",)}
    found = faithful_inverse(prior, ["x"], plates=plates)
    assert list(found.parents)[-1] == "z" and not found.coupled["z"]


def test_each_row_of_a_mixture_gets_an_assignment_from_its_own_data():
    def model(x):
        weights = pyro.sample("weights", dist.Dirichlet(torch.ones(2)))
        with pyro.plate("components", 2):
            means = pyro.sample("means", dist.Normal(torch.zeros(3), 5.0).to_event(1))
        with pyro.plate("rows", len(x)):
            z = pyro.sample("z", dist.Categorical(weights))
            pyro.sample("x", dist.Normal(means[z], 1.0).to_event(1), obs=x)

    guide = made(model, torch.randn(20, 3), hidden=(4,))
    decided = {decision.site: decision for decision in guide.decisions}["z"]
    assert (decided.scope, decided.reads, decided.estimator) == ("local", ("x",), "enumerate")


def test_new_rows_without_outcomes_are_predicted_from_the_global_draws():
    """What an encoder would read is what is asked for; the model draws the local latents of such rows."""

    def model(x, group, y=None):
        with pyro.plate("groups", 2):
            level = pyro.sample("level", dist.Normal(0.0, 10.0))
        with pyro.plate("rows", len(x)):
            own = pyro.sample("own", dist.Normal(0.0, 0.01))
            pyro.sample("y", dist.Normal(level[group] + x + own, 0.01), obs=y)

    x, group = torch.linspace(-1, 1, 8, dtype=torch.float64), torch.arange(8) % 2
    y = x + 3.0 * group
    guide = made(model, x, group, y, hidden=(4,))
    fit(model, guide, (x, group, y), epochs=80, lr=0.2, progress=False, batch_size=8)
    with pyro.get_param_store().scope():
        assert set(guide(x[:3], group[:3])) == {"level"}
    found = predict(model, guide, (x[:3] + 1.0, group[:3]), num_samples=200).predictions["y"]
    expected = x[:3] + 1.0 + 3.0 * group[:3]
    np.testing.assert_allclose(found.mean(["chain", "draw"]), expected, atol=0.15)


# ---- the twelve programs


@pytest.mark.parametrize("word", WORDS)
@pytest.mark.parametrize("name", PROGRAMS)
def test_twelve_programs_are_served_and_nothing_is_left_behind(name, word):
    own = PROGRAMS[name]
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()
    guide = made(own.model, *own.args, dependencies=word, hidden=(8,))
    assert torch.equal(before[0], torch.get_rng_state()) and before[1] == random.getstate()
    assert (before[2] == np.random.get_state()[1]).all()
    assert not list(pyro.get_param_store().keys())
    trace = poutine.trace(own.model).get_trace(*own.args)
    latent = {
        site
        for site, node in trace.nodes.items()
        if node["type"] == "sample" and not node["is_observed"] and "enumerate" not in node["infer"]
    }
    latent -= {site for site in latent if type(trace.nodes[site]["fn"]).__name__ == "_Subsample"}
    with pyro.get_param_store().scope():
        assert set(guide(*own.args)) == latent
        stock = (TraceEnum_ELBO if own.summed else Trace_ELBO)(max_plate_nesting=3)
        assert torch.isfinite(torch.tensor(stock.loss(own.model, guide, *own.args)))
    assert {decision.site for decision in guide.decisions} >= latent
    assert all(site in str(guide) for site in latent)


def test_the_table_is_printed_once(capsys):
    own = PROGRAMS["global and local"]
    guide = amortize(own.model, *own.args)
    said = capsys.readouterr().out
    assert said == f"{guide}\n" and "rate" in said and "plate rows holds data" in said


def test_every_idiom_serves_it(param_store):
    own = PROGRAMS["global and local"]
    guide = made(own.model, *own.args, hidden=(8,))
    for loss in (Trace_ELBO(), TraceGraph_ELBO(), Trace_ELBO(num_particles=3, vectorize_particles=True), SiteELBO()):
        before = {name: value.clone() for name, value in guide.named_parameters()}
        svi = SVI(own.model, guide, pyro.optim.Adam({"lr": 1e-2}), loss=loss)
        svi.step(*own.args)
        svi.step(*own.args)
        assert all(not torch.equal(before[name], value) for name, value in guide.named_parameters())
        param_store.clear()
    for options in ({"num_particles": 4}, {"num_particles": 2, "vectorize_particles": False}):
        loss = SiteELBO(**options)(own.model, guide)
        loss(*own.args).backward()
        assert all(value.grad is not None for value in guide.parameters())


@pytest.mark.parametrize("name", [name for name, own in PROGRAMS.items() if own.summed])
def test_sites_that_the_model_sums_over_are_summed_beside_it(name, param_store):
    own = PROGRAMS[name]
    guide = made(own.model, *own.args, hidden=(8,))
    stock = TraceEnum_ELBO(max_plate_nesting=3)
    found = []
    for take in (lambda: SiteELBO()(own.model, guide)(*own.args), lambda: stock(own.model, guide)(*own.args)):
        pyro.set_rng_seed(3)
        value = take()
        value.backward()
        found.append((value.detach(), torch.cat([p.grad.flatten() for p in guide.parameters()])))
        guide.zero_grad()
    assert found[0][0] == pytest.approx(found[1][0].item(), rel=1e-5)
    assert torch.allclose(found[0][1], found[1][1], rtol=1e-3, atol=1e-4 * found[1][1].abs().max().item())


# ---- exactness


def chain(x, noise=0.3):
    z = torch.zeros(())
    for t in range(len(x)):
        z = pyro.sample(f"z{t}", dist.Normal(z, 1.0))
        pyro.sample(f"x{t}", dist.Normal(z, noise + 1.0), obs=x[t])


def hierarchy(x):
    mean = pyro.sample("mean", dist.Normal(0.0, 2.0))
    with pyro.plate("rows", len(x)):
        z = pyro.sample("z", dist.Normal(mean, 0.5))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def bound(model, guide, x, steps=500):
    """The bound after so many steps, with its standard error, in nats."""
    loss = SiteELBO(num_particles=8)(model, guide)
    loss.initialize(x)
    optimizer = torch.optim.Adam(loss.parameters(), lr=0.03)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        optimizer.zero_grad()
        loss(x).backward()
        optimizer.step()
        schedule.step()
    many = SiteELBO(num_particles=2000)(model, guide)
    with torch.no_grad():
        return -float(many(x))


def chain_evidence(x):
    covariance = torch.minimum(*torch.meshgrid(*[torch.arange(1.0, len(x) + 1)] * 2, indexing="ij")).double()
    return gaussian_posterior(covariance, torch.eye(len(x)).double(), 1.3, x.double(), [])[0]


def hierarchy_evidence(x):
    return float(dist.MultivariateNormal(torch.zeros(len(x)), 4.0 + 1.25 * torch.eye(len(x))).log_prob(x))


@pytest.mark.parametrize(
    ("model", "evidence", "rows"), [(chain, chain_evidence, 6), (hierarchy, hierarchy_evidence, 8)]
)
def test_faithful_closes_the_gap_of_mean_field_to_the_exact_evidence(model, evidence, rows):
    x = torch.linspace(-1.0, 2.0, rows)
    exact = evidence(x)
    gaps = {
        word: exact - bound(model, made(model, x, dependencies=word, hidden=(8,)), x)
        for word in ("mean-field", "faithful")
    }
    assert gaps["mean-field"] > 0.5
    assert gaps["faithful"] < 0.2 * gaps["mean-field"]


# ---- dependencies


def ordinary(x):
    a = pyro.sample("a", dist.Normal(0.0, 1.0))
    b = pyro.sample("b", dist.Normal(a, 1.0))
    pyro.sample("x", dist.Normal(b, 1.0), obs=x)


def by_item(x):
    a = pyro.sample("a", dist.Normal(0.0, 1.0))
    b = pyro.sample("b", dist.Normal(float(a), 1.0))
    pyro.sample("x", dist.Normal(b, 1.0), obs=x)


def by_numpy(x):
    a = pyro.sample("a", dist.Normal(0.0, 1.0))
    b = pyro.sample("b", dist.Normal(torch.from_numpy(np.asarray(a.detach().numpy() * 1.0)), 1.0))
    pyro.sample("x", dist.Normal(b, 1.0), obs=x)


def in_place(x):
    kept = torch.zeros(2)
    kept[0] = pyro.sample("a", dist.Normal(0.0, 1.0))
    b = pyro.sample("b", dist.Normal(kept[0], 1.0))
    pyro.sample("x", dist.Normal(b, 1.0), obs=x)


def by_branch(x):
    a = pyro.sample("a", dist.Normal(0.0, 1.0))
    b = pyro.sample("b", dist.Normal(1.0 if a > 0 else -1.0, 1.0))
    pyro.sample("x", dist.Normal(b, 1.0), obs=x)


@pytest.mark.parametrize("model", [ordinary, by_item, by_numpy, in_place, by_branch])
def test_dependencies_are_found_where_value_tracking_is_lost(model):
    guide = made(model, torch.tensor(0.3))
    assert guide.parents == {"a": (), "b": ("a",)}
    assert any("perturbation" in note for note in guide.notes) == (model is not ordinary)


def test_dependencies_may_be_given():
    own = PROGRAMS["global and local"]
    guide = made(own.model, *own.args, dependencies={"rate": ["mean"]})
    assert guide.parents == {"mean": (), "spread": (), "rate": ("mean",)}


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"dependencies": {"rate": ["men"]}}, "'men', which is no latent site"),
        ({"dependencies": {"rate": ["mean"], "mean": ["rate"]}}, "cycle"),
        ({"dependencies": "faithfull"}, "did you mean 'faithful'"),
        ({"dependencies": 3}, "expected a word"),
        ({"hidden": (0,)}, "sizes of layers"),
        ({"encoder": "mlp"}, "expected a torch module"),
        ({"encoder": {"rates": nn.Identity()}}, "'rates', which is no latent site"),
        ({"order": ["mean"]}, "each latent site once"),
        ({"order": ["rate", "mean", "spread"], "dependencies": "full"}, "leave it out"),
        ({"encoder": nn.Flatten(0)}, "a row for each element of plate rows"),
    ],
)
def test_options_that_cannot_be_meant_are_one_line(options, says):
    own = PROGRAMS["global and local"]
    with pytest.raises((BadInput, UnknownName), match=says) as caught:
        made(own.model, *own.args, **options)
    assert "\n" not in str(caught.value)


# ---- refusals


def comes_and_goes(x):
    a = pyro.sample("a", dist.Normal(0.0, 1.0))
    b = pyro.sample("b", dist.Normal(0.0, 1.0)) if a > 0 else a
    pyro.sample("x", dist.Normal(b, 1.0), obs=x)


def moving_support(x):
    a = pyro.sample("a", dist.LogNormal(0.0, 1.0))
    b = pyro.sample("b", dist.Uniform(0.0, a))
    pyro.sample("x", dist.Normal(b, 1.0), obs=x)


def moving_shape(x):
    n = int(pyro.sample("a", dist.Poisson(3.0)))
    b = pyro.sample("b", dist.Normal(torch.zeros(n + 1), 1.0).to_event(1))
    pyro.sample("x", dist.Normal(b.sum(), 1.0), obs=x)


def a_multinomial(x):
    a = pyro.sample("a", dist.Multinomial(5, torch.ones(3)))
    pyro.sample("x", dist.Normal(a.sum(), 1.0), obs=x)


def a_delta(x):
    a = pyro.sample("a", dist.Delta(torch.tensor(1.0)))
    b = pyro.sample("b", dist.Normal(a, 1.0))
    pyro.sample("x", dist.Normal(b, 1.0), obs=x)


def a_simplex_of_one(x):
    a = pyro.sample("a", dist.Dirichlet(torch.ones(1)))
    pyro.sample("x", dist.Normal(a.sum(), 1.0), obs=x)


def observes_nothing(x):
    pyro.sample("a", dist.Normal(0.0, 1.0))


def has_no_latents(x):
    pyro.sample("x", dist.Normal(0.0, 1.0), obs=x)


def fails(x):
    raise KeyError("no such column")


@pytest.mark.parametrize(
    ("model", "says"),
    [
        (comes_and_goes, "latent site 'b' is in .* of 20 draws from the prior"),
        (moving_support, "the support of latent site 'b' depends on other sites' values"),
        (moving_shape, "latent site 'b' has event shape"),
        (a_multinomial, "site 'a' .*Multinomial"),
        (a_delta, r"latent site 'a' is a Delta.*pyro\.deterministic\('a', value\)"),
        (a_simplex_of_one, r"latent site 'a' \(Dirichlet\) of event shape \[1\] has no free number"),
        (observes_nothing, "observes nothing"),
        (has_no_latents, "no latent sites"),
        (fails, "the model fails on these arguments .KeyError"),
        (3, "expected a Pyro program"),
    ],
)
def test_what_no_guide_can_serve_is_refused_in_one_line(model, says):
    with pytest.raises(BadInput, match=says) as caught:
        made(model, torch.tensor(0.3))
    assert "\n" not in str(caught.value)


# ---- families


SUPPORTS = {
    "real": lambda: dist.Normal(torch.zeros(3), 1.0).to_event(1),
    "positive": lambda: dist.Gamma(2.0, torch.ones(3)).to_event(1),
    "half": lambda: dist.HalfCauchy(torch.ones(())),
    "simplex": lambda: dist.Dirichlet(torch.ones(4)),
    "interval": lambda: dist.Uniform(torch.tensor([-1.0, 2.0]), torch.tensor([1.0, 5.0])).to_event(1),
    "matrix": lambda: dist.Normal(torch.zeros(2, 3), 1.0).to_event(2),
    "simplex rows": lambda: dist.Dirichlet(torch.ones(2, 3)).to_event(1),
    "cholesky": lambda: dist.LKJCholesky(3, 1.0),
    "one-hot": lambda: dist.OneHotCategorical(torch.ones(3)),
    "one-hot rows": lambda: dist.OneHotCategorical(torch.ones(2, 3)).to_event(1),
    "categorical": lambda: dist.Categorical(torch.ones(3)),
    "binomial": lambda: dist.Binomial(4, torch.tensor(0.3)),
    "many": lambda: dist.Binomial(1000, torch.tensor(0.3)),
    "uniform integers": lambda: dist.Binomial(torch.tensor([2.0, 5.0]), torch.tensor(0.3)).to_event(1),
    "poisson": lambda: dist.Poisson(torch.tensor(3.0)),
    "positive counts": lambda: Trials(torch.tensor(0.6)),
    "geometric": lambda: dist.Geometric(torch.tensor([0.3, 0.5])).to_event(1),
    "bool": lambda: dist.Bernoulli(torch.tensor(0.3)),
    "bools": lambda: dist.Bernoulli(torch.full((2, 3), 0.3)).to_event(2),
    "von mises": lambda: dist.VonMises(0.0, torch.tensor(1.0)),
    "improper": lambda: dist.ImproperUniform(dist.constraints.positive, (), ()),
}


class Trials(dist.Geometric):
    """The number of trials up to the first success: 1, 2, …"""

    support = dist.constraints.positive_integer

    def sample(self, sample_shape=()):
        return super().sample(sample_shape) + 1

    def log_prob(self, value):
        return dist.Geometric(self.probs, validate_args=False).log_prob(value - 1)


def test_counts_that_start_above_zero_have_the_moments_of_their_law():
    counts = _Counts(2, torch.tensor([1.5, 4.0]).double(), torch.tensor([0.3, -1.0]).double())
    values = torch.arange(2.0, 400.0).double().unsqueeze(-1)
    chances = counts.log_prob(values).exp()
    mean = (chances * values).sum(0)
    for found, exact in (
        (chances.sum(0), torch.ones(2).double()),
        (counts.mean, mean),
        (counts.variance, (chances * (values - mean).square()).sum(0)),
    ):
        assert torch.allclose(found, exact, rtol=1e-9)


@pytest.mark.parametrize("word", ["double-cv", "muprop", "head-tail", "truncated-enumerate"])
def test_words_of_counts_serve_counts(word):
    def model(x):
        with pyro.plate("rows", len(x)):
            n = pyro.sample("n", dist.Poisson(torch.tensor(2.0)))
            pyro.sample("x", dist.Normal(n, 1.0), obs=x)

    x = torch.linspace(0.0, 3.0, 4)
    guide = made(model, x, hidden=(4,))
    assert SiteELBO(word)(model, guide)(x).isfinite()


@pytest.mark.parametrize("local", [False, True])
@pytest.mark.parametrize("word", ["mean-field", "faithful"])
@pytest.mark.parametrize("support", SUPPORTS)
def test_a_family_by_support_draws_and_scores_values_of_the_site(support, word, local):
    def model(x):
        fn = SUPPORTS[support]()
        rows = pyro.plate("rows", len(x))
        with rows if local else nullcontext():
            z = pyro.sample("z", fn)
        flat = z.reshape(*z.shape[: z.dim() - fn.event_dim], -1).float()
        with rows:
            pyro.sample("x", dist.Normal(flat @ torch.arange(1.0, flat.shape[-1] + 1), 1.0), obs=x)

    x = torch.linspace(0.0, 2.0, 4)
    guide = made(model, x, dependencies=word, hidden=(4,))
    with pyro.get_param_store().scope():
        traced = poutine.trace(guide).get_trace(x)
        replayed = poutine.trace(poutine.replay(model, traced)).get_trace(x)
    node, other = traced.nodes["z"], replayed.nodes["z"]
    assert node["fn"].event_shape == other["fn"].event_shape and node["fn"].batch_shape == other["fn"].batch_shape
    assert node["value"].dtype == other["fn"].sample().dtype if support != "improper" else True
    with pyro.validation_enabled():
        traced.compute_log_prob()
        replayed.compute_log_prob()
    assert torch.isfinite(traced.log_prob_sum()) and torch.isfinite(replayed.log_prob_sum())
    value = SiteELBO(num_particles=8)(model, guide)(x)
    value.backward()
    assert torch.isfinite(value) and any(p.grad is not None and p.grad.abs().sum() > 0 for p in guide.parameters())


# ---- fitting


def test_fit_evaluate_and_words_for_discrete_sites():
    def model(x):
        with pyro.plate("rows", len(x)):
            which = pyro.sample("which", dist.Categorical(torch.tensor([0.3, 0.7])))
            pyro.sample("x", dist.Normal(torch.tensor([-2.0, 2.0])[which], 1.0), obs=x)

    x = torch.cat([torch.full((15,), -2.0), torch.full((35,), 2.0)]) + 0.3 * torch.randn(50)
    guide = made(model, x, hidden=(8,))
    assert guide.decisions[0].estimator == "enumerate"
    fit(model, guide, x, epochs=100, lr=0.05, batch_size=50, progress=False)
    exact = torch.stack(
        [dist.Normal(loc, 1.0).log_prob(x) + torch.tensor(p).log() for loc, p in ((-2.0, 0.3), (2.0, 0.7))]
    ).logsumexp(0)
    assert abs(float(exact.mean()) - evaluate(model, guide, x, num_samples=50).elbo) < 0.02
    assert SiteELBO("rloo", num_particles=2)(model, guide)(x).isfinite()


@pytest.mark.slow
def test_a_compiled_step_takes_it():
    own = PROGRAMS["global and local"]
    guide = made(own.model, *own.args, hidden=(4,))
    before = {name: value.clone() for name, value in guide.named_parameters()}
    fit(own.model, guide, *own.args, epochs=3, batch_size=25, compile=True, progress=False)
    assert all(not torch.equal(before[name], value) for name, value in guide.named_parameters())


def test_a_function_model_is_given_no_modules_of_its_guide():
    own = PROGRAMS["global and local"]
    guide = made(own.model, *own.args, hidden=(4,))
    found = inspect_programs(own.model, guide, Rows(own.args[0]), 0)
    assert not dict(found.model.named_parameters()) and found.guide is guide


# ---- plates


def rows_model(x, size=None):
    """Rows of a larger data set, drawn here where ``size`` says how many."""
    mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
    with pyro.plate("rows", len(x), subsample_size=size) as index:
        z = pyro.sample("z", dist.Normal(mean, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x[index])


def test_a_subsampled_plate_shows_model_and_guide_the_same_rows():
    x = torch.linspace(-3.0, 3.0, 40)
    guide = made(rows_model, x, 8, hidden=(4,), dependencies="mean-field")
    with pyro.get_param_store().scope():
        traced = poutine.trace(guide).get_trace(x, 8)
        model = poutine.trace(poutine.replay(rows_model, traced)).get_trace(x, 8)
        rows = traced.nodes["rows"]["value"]
        whole = poutine.trace(guide).get_trace(x)
    assert torch.equal(rows, model.nodes["rows"]["value"]) and len(rows) == 8
    assert traced.nodes["z"]["scale"] == model.nodes["z"]["scale"] == 5.0
    assert torch.allclose(traced.nodes["z"]["fn"].mean, whole.nodes["z"]["fn"].mean[rows])
    draws = torch.stack([SiteELBO()(rows_model, guide)(x, 8).detach() for _ in range(200)])
    full = torch.stack([SiteELBO()(rows_model, guide)(x).detach() for _ in range(200)])
    assert abs(draws.mean() - full.mean()) < 4 * (draws.var() / 200 + full.var() / 200).sqrt()


def test_a_plate_without_a_size_is_served():
    def model(x):
        with pyro.plate("rows", dim=-1):
            z = pyro.sample("z", dist.Normal(torch.zeros(len(x)), 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    x = torch.linspace(0.0, 1.0, 5)
    guide = made(model, x, hidden=(4,))
    assert guide.decisions[0].scope == "local"
    with pyro.get_param_store().scope():
        assert guide(x)["z"].shape == (5,) and guide(x[:3])["z"].shape == (3,)
        assert Trace_ELBO().loss(model, guide, x[:3]) > 0


def sequences(x, seen):
    """Sequences of other lengths: a latent for each, steps of which some are seen."""
    with pyro.plate("rows", len(x), dim=-2):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        with pyro.plate("steps", x.shape[1], dim=-1), poutine.mask(mask=seen):
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def test_masks_and_other_lengths_leave_a_row_its_posterior():
    x, seen = torch.randn(6, 9), torch.arange(9) < torch.tensor([9, 4, 7, 1, 5, 9]).unsqueeze(1)
    guide = made(sequences, x, seen, hidden=(4,))
    assert any("set encoder" in decision.encoder for decision in guide.decisions)

    def locs(x, seen):
        with pyro.get_param_store().scope():
            return poutine.trace(guide).get_trace(x, seen).nodes["z"]["fn"].mean.flatten()

    padded = torch.where(seen, x, float("nan"))
    assert torch.allclose(locs(x, seen), locs(padded, seen))
    assert torch.allclose(locs(x[:2], seen[:2]), locs(x, seen)[:2])
    assert torch.allclose(locs(x[1:2, :4], seen[1:2, :4]), locs(x, seen)[1:2], atol=1e-5)


def test_a_recurrent_encoder_is_blind_to_padding():
    def model(x, seen):
        with pyro.plate("rows", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            fn = dist.Normal(z.unsqueeze(-1).unsqueeze(-1), 1.0).expand([len(x), *x.shape[1:]])
            pyro.sample("x", fn.mask(seen.unsqueeze(-1)).to_event(2), obs=x)

    x, seen = torch.randn(3, 8, 2), torch.ones(3, 8, dtype=torch.bool)
    guide = made(model, x, seen, hidden=(4,))
    assert any("recurrent" in decision.encoder for decision in guide.decisions)
    with pyro.get_param_store().scope():
        assert guide(x[:, :5], seen[:, :5])["z"].shape == (3,)
    states, ends = Recurrent(2, 3)(x, seen)
    assert states.shape == (3, 8, 6) and ends.shape == (3, 6)
    network = Recurrent(2, 3)
    short = network(x[:, :5], None)[1]
    assert torch.allclose(network(x, torch.arange(8).expand(3, 8) < 5)[1], short, atol=1e-6)


def test_missing_values_that_the_model_fills_in_are_drawn_and_masked():
    def model(x, seen):
        with pyro.plate("rows", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x, obs_mask=seen)

    x, seen = torch.randn(6), torch.tensor([True, False, True, True, False, True])
    guide = made(model, x, seen, hidden=(4,))
    assert set(guide.parents) == {"z", "x_unobserved"} and ("z",) in guide.parents.values()
    with pyro.get_param_store().scope():
        traced = poutine.trace(guide).get_trace(x, seen)
        traced.compute_log_prob()
    assert (traced.nodes["x_unobserved"]["log_prob"][seen] == 0).all()
    assert (traced.nodes["x_unobserved"]["log_prob"][~seen] != 0).all()


def test_images_are_read_by_convolutions_and_a_scale_around_a_site_is_kept():
    def model(x):
        with pyro.plate("rows", len(x)):
            with poutine.scale(scale=0.5):
                z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z.sum(-1)[..., None, None, None], 1.0).expand(x.shape).to_event(3), obs=x)

    x = torch.randn(5, 1, 8, 8)
    guide = made(model, x)
    assert any("convolution" in decision.encoder for decision in guide.decisions)
    with pyro.get_param_store().scope():
        assert poutine.trace(guide).get_trace(x).nodes["z"]["scale"] == 0.5


@pytest.mark.parametrize("argument", ["other", "length"])
def test_arguments_that_the_guide_was_not_built_for_are_one_line(argument, param_store):
    own = PROGRAMS["missing data"]
    x, seen = own.args
    guide = made(own.model, x, seen, hidden=(4,))
    if argument == "other":
        guide.__dict__["_model"] = (PROGRAMS["factor model"].model,)
        with pytest.raises(BadInput, match="not observed on these arguments"):
            guide(x)
    else:
        with pytest.raises(BadInput, match="not observed on these arguments"):
            guide(x[:, :4], seen[:, :4])


def test_posterior_tools_take_it():
    own = PROGRAMS["global and local"]
    guide = made(own.model, *own.args, hidden=(4,))
    found = to_arviz(own.model, guide, *own.args, num_samples=20)
    assert found.posterior["rate"].sizes["draw"] == 20 and found.posterior["rate"].shape[-1] == 25
    report = diagnose(own.model, guide, *own.args, num_samples=200, num_simulations=20, refine_steps=0, progress=False)
    assert report.alarms  # it is not fitted


@pytest.mark.parametrize("head", ["global", "local"])
def test_a_parent_that_is_far_out_moves_the_mean_and_not_the_scale(head):
    """Scales that followed their parents without bound made the fit of a chain of twelve steps diverge."""
    family = Family("Normal, real", 1, 2, False, (), 1)
    if head == "global":
        made = GlobalHead(family, [1], 1, (4,), torch.zeros(1, 1))
        torch.nn.init.ones_(made.weight)
        near, far = (made(torch.full((1, 1), at)) for at in (1e3, 1e6))
    else:
        made = LocalHead(family, 2, 1, (4,), torch.zeros(1))
        near, far = (made(torch.ones(1, 2), torch.full((1, 1), at)) for at in (1e3, 1e6))
    assert torch.allclose(near[..., 1], far[..., 1]) and (near[..., 0] - far[..., 0]).abs() > 1e3


LAWS = {
    "gamma-poisson": lambda one: dist.GammaPoisson(one, one),
    "beta-binomial": lambda one: dist.BetaBinomial(one, one, 5),
    "independent": lambda one: dist.Normal(one, one).to_event(1),
    "lognormal": lambda one: dist.LogNormal(one, one),
    "mixture": lambda one: dist.MixtureSameFamily(dist.Categorical(one), dist.Normal(one, one)),
}


@pytest.mark.parametrize("law", LAWS.values(), ids=LAWS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_reference_value_has_the_dtype_of_the_parameters(law, dtype):
    assert reference({"fn": law(torch.ones(2, dtype=dtype))}).dtype == dtype
