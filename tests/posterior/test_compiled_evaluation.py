"""Evaluation through captured graphs: the numbers of eager runs on the same noise, or a reason why not."""

from __future__ import annotations

import copy

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.nn import PyroModule

from gumbo.errors import BadInput, GumboWarning
from gumbo.guides import BernoulliGuide, CategoricalGuide, NormalGuide, PriorGuide, RelaxedCategoricalGuide
from gumbo.inference import evaluate, fit
from gumbo.inference.engine.noise import Noise, Tape
from gumbo.inference.engine.rows import Rows
from gumbo.inference.engine.scopes import quietly
from gumbo.inference.posterior.checks import Checks
from gumbo.inference.posterior.evaluation import Evaluator
from gumbo.inference.posterior.graphs import Graphs, terms_of
from gumbo.inference.posterior.parts import Weighing
from gumbo.inference.posterior.runner import Sweep
from gumbo.inference.training.compile.backends import inductor, uncompiled
from gumbo.inference.training.compile.capture import capture
from gumbo.models import BernoulliVAE, CategoricalVAE, GaussianVAE, StructuredPrediction

SHAPE = (1, 4, 4)


def by_operations(function, examples):
    return uncompiled(capture(function, examples), examples)


def images(rows=40):
    generator = torch.Generator().manual_seed(1)
    return (torch.rand(rows, *SHAPE, generator=generator) < 0.4).float()


PAIRS = {
    "gaussian": (lambda: GaussianVAE(SHAPE, latent_dim=3, hidden=(5,)), NormalGuide),
    "coins": (lambda: BernoulliVAE(SHAPE, num_latents=6), BernoulliGuide),
    "categorical": (lambda: CategoricalVAE(SHAPE, num_latents=3, num_classes=4), CategoricalGuide),
}


def made(name):
    torch.manual_seed(3)
    model = PAIRS[name][0]()
    return model, PAIRS[name][1](model)


@pytest.fixture(params=list(PAIRS))
def pair(request):
    with torch.random.fork_rng():
        return made(request.param)


def both(model, guide, x, count, compiler=by_operations):
    """The terms by a graph and by an eager run, on the same noise."""
    sweep = Weighing(model, guide, x, count, None, None).sweep
    batch = Rows(x)
    with quietly(model, guide, 0):
        graphs = Graphs(sweep, "data", compiler)
        graphs.prepare(sweep, batch, count)
        state = torch.get_rng_state()
        found = graphs.run(batch, count)
        torch.set_rng_state(state)
        tape = Tape()
        with tape:
            terms_of(sweep, "data", (batch.args, batch.kwargs), count, len(x), Checks())
        noise = Noise(tape.requests)
        torch.set_rng_state(state)
        noise.draw()
        with Tape(noise), pyro.validation_enabled(False):
            expected = terms_of(sweep, "data", (batch.args, batch.kwargs), count, len(x), Checks())
    return found, expected


def test_a_graph_has_the_bits_of_an_eager_run_on_the_same_noise(pair):
    found, expected = both(*pair, images(), 5)
    assert torch.equal(found.parts, expected.parts) and found.valid and expected.valid
    assert found.parts.shape == (3, 5, 40) and found.parts.std(1).min() >= 0


@pytest.mark.slow
def test_a_compiled_graph_has_them_up_to_rounding():
    with torch.random.fork_rng():
        pair = made("gaussian")
    found, expected = both(*pair, images(), 5, lambda function, x: inductor(capture(function, x), x))
    torch.testing.assert_close(found.parts, expected.parts, rtol=1e-5, atol=1e-4)
    assert found.parts.std(1).max() > 0.1


@pytest.mark.parametrize("draws", [1, 300])
def test_a_compiled_evaluation_estimates_what_an_eager_one_does(pair, draws):
    x = images(64)
    eager = evaluate(*pair, x, num_samples=draws, batch_size=32)
    evaluator = Evaluator(*pair, x, num_samples=draws, batch_size=32, compiler=by_operations)
    found = evaluator()
    assert not evaluator.uncompiled and found == evaluator()
    if draws > 1:
        assert abs(found.elbo - eager.elbo) < 5 * eager.elbo_mc_se * 2**0.5
        assert found.values["elbo"].shape == (64,)
        assert found.elbo_mc_se == pytest.approx(eager.elbo_mc_se, rel=0.2)
    assert found.elbo == pytest.approx(-found.rate - found.distortion)


def test_a_graph_sees_changed_parameters_and_is_made_again_for_changed_attributes():
    with torch.random.fork_rng():
        model, guide = made("gaussian")
    x = images()
    evaluator = Evaluator(model, guide, x, num_samples=3, compiler=by_operations)
    first, graphs = evaluator(), evaluator._weighing.graphs
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1)
    moved, made_before = evaluator(), graphs.made
    guide.min_sd = 2.0
    wider = evaluator()
    fresh = Evaluator(model, guide, x, num_samples=3, compiler=by_operations)()
    assert first != moved != wider == fresh
    assert (made_before, graphs.made) == (1, 2)


class Global(PyroModule):
    def forward(self, x):
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(mu, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)


class Local(PyroModule):
    def __init__(self, drawn=lambda z: z, stored=False):
        super().__init__()
        self.scale, self.drawn, self.stored = torch.nn.Parameter(torch.ones(())), drawn, stored

    def forward(self, x):
        scale = pyro.param("a scale", torch.ones(())) if self.stored else self.scale
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(self.drawn(z), scale), obs=x)


def guide(x):
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(x / 2, 0.7))


def global_guide(x):
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal((x + mu) / 2, 0.7))


def looks(z):
    return z if float(z.abs().max()) >= 0 else -z


@pytest.mark.parametrize(
    ("model", "guide", "reason"),
    [
        (Global(), global_guide, "not every site is in the plate over the data"),
        (Local(drawn=looks), guide, "asks for the value of a tensor"),
        (Local(stored=True), guide, "'a scale' is kept in Pyro's param store"),
    ],
    ids=["global", "value", "store"],
)
def test_what_no_graph_stands_for_runs_eagerly_with_the_reason(model, guide, reason):
    x = torch.randn(30, generator=torch.Generator().manual_seed(0))
    with pyro.get_param_store().scope():
        if getattr(model, "stored", False):
            pyro.param("a scale", torch.ones(()))
        evaluator = Evaluator(model, guide, x, num_samples=20, compiler=by_operations)
        found = evaluator()
        assert reason in evaluator.uncompiled
        assert found.elbo == evaluate(model, guide, x, num_samples=20).elbo


def test_a_graph_refuses_what_an_eager_run_refuses():
    with torch.random.fork_rng():
        pair = made("gaussian")
    x = images()
    Evaluator(*pair, x, num_samples=2, compiler=by_operations)()
    x[11, 0, 1, 2] = 0.5
    said = []
    for compiler in (None, by_operations):
        with pytest.raises((BadInput, ValueError)) as error:
            Evaluator(*pair, x, num_samples=2, compiler=compiler)()
        said.append(str(error.value))
    assert said[0] == said[1]


def test_parameters_that_leave_their_constraint_are_refused_by_a_graph_made_before():
    model = Local()
    x = torch.randn(30, generator=torch.Generator().manual_seed(0))
    evaluator = Evaluator(model, guide, x, num_samples=4, compiler=by_operations)
    evaluator()
    with torch.no_grad():
        model.scale.fill_(-1.0)
    with pytest.raises((BadInput, ValueError), match="GreaterThan"):
        evaluator()


def test_validation_of_a_compiled_fit_is_compiled_and_follows_training(monkeypatch, capsys):
    monkeypatch.setattr("gumbo.inference.training.compile.step.inductor", uncompiled)
    captured = []
    before = Graphs._capture
    monkeypatch.setattr(Graphs, "_capture", lambda self, *args: captured.append(args) or before(self, *args))
    histories = []
    for compile in (False, True):
        with torch.random.fork_rng():
            pair = made("gaussian")
        with torch.random.fork_rng():
            found = fit(
                *pair, images(64), valid=images(40), valid_samples=4, epochs=3, batch_size=16, compile=compile, lr=0.01
            )
        histories.append([numbers["valid_elbo"] for numbers in found.history])
    assert len(captured) == 1
    # Normal noise has the same bits in one large draw: the passes differ by training's rounding only.
    assert histories[1] == pytest.approx(histories[0], abs=0.3)
    assert histories[1][0] == pytest.approx(histories[0][0], abs=1e-4)
    assert "uncompiled" not in capsys.readouterr().err


def test_a_compiled_fit_says_once_why_its_validation_is_not_compiled(monkeypatch, capsys):
    monkeypatch.setattr("gumbo.inference.training.compile.step.inductor", uncompiled)
    monkeypatch.setattr(
        Graphs, "_capture", lambda self, *args: (_ for _ in ()).throw(BadInput("the reason that is given"))
    )
    with torch.random.fork_rng():
        pair = made("gaussian")
        fit(*pair, images(64), valid=images(40), valid_samples=2, epochs=2, batch_size=16, compile=True)
    assert capsys.readouterr().err.count("validation runs uncompiled: the reason that is given") == 1


def test_a_relaxed_pair_is_not_compiled_again_for_every_evaluation():
    with torch.random.fork_rng():
        model = CategoricalVAE(SHAPE, num_latents=2, num_classes=3, relaxed=True)
        evaluator = Evaluator(model, RelaxedCategoricalGuide(model), images(), num_samples=2, compiler=by_operations)
    assert evaluator() == evaluator() and "made anew for every evaluation" in evaluator.uncompiled


def test_evaluate_compiles_where_it_is_asked_to_and_warns_where_it_cannot(monkeypatch):
    made_of = []
    monkeypatch.setattr(
        "gumbo.inference.training.compile.backends.inductor", lambda *args: made_of.append(args) or uncompiled(*args)
    )
    with torch.random.fork_rng():
        pair = made("gaussian")
    x = images()
    found = evaluate(*pair, x, num_samples=5, compile=True)
    assert len(made_of) == 1
    assert found.elbo == pytest.approx(evaluate(*pair, x, num_samples=5).elbo, abs=1e-4)
    rows = torch.randn(30, generator=torch.Generator().manual_seed(0))
    with pytest.warns(GumboWarning, match="evaluate runs uncompiled: .*not every site is in the plate"):
        evaluate(Global(), global_guide, rows, num_samples=5, compile=True)


# Batches.


@pytest.mark.parametrize("rows", [8, 13])
def test_sites_found_on_a_few_rows_are_laid_out_as_those_of_a_batch(pair, rows):
    x = images(rows)
    few, whole = (Sweep(*pair, (part,), {}, latents_needed=False) for part in (x[:7], x))
    found = few.with_rows("data", rows)
    for kind in ("guide_sites", "model_sites", "sizes", "full_sizes", "latents", "observed", "data_plates", "depth"):
        assert getattr(found, kind) == getattr(whole, kind), kind
    assert few.sizes["data"] == 7


def test_sites_that_may_follow_the_number_of_rows_are_looked_at_again():
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(7), 1.0).to_event(1))  # as many as the few rows
            pyro.sample("x", dist.Normal(z.sum(-1), 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x[:, None] / 8 * torch.ones(7), 0.9).to_event(1))

    x = torch.randn(20, generator=torch.Generator().manual_seed(0))
    assert Sweep(model, guide, (x[:7],), {}).with_rows("data", 20) is None
    assert evaluate(model, guide, x, num_samples=3, batch_size=9).num_data == 20


def test_batches_are_large_for_few_draws_and_of_equal_length():
    with torch.random.fork_rng():
        pair = made("gaussian")
    x = images(3000)
    sizes = {draws: Weighing(*pair, x, draws, None, None).size for draws in (1, 100, 10**6)}
    assert sizes == {1: 1000, 100: 750, 10**6: 64}
    assert Weighing(*pair, x, 1, 256, None).size == 256


def test_a_copy_of_a_fitted_pair_is_evaluated_with_its_own_parameters():
    with torch.random.fork_rng():
        pair = made("gaussian")
    other = copy.deepcopy(pair)
    with torch.no_grad():
        for parameter in other[0].parameters():
            parameter.mul_(0.5)
    x = images()
    values = [Evaluator(*each, x, num_samples=3, compiler=by_operations)().elbo for each in (pair, other, pair)]
    assert values[0] == values[2] != values[1]


def test_a_guide_that_draws_from_the_models_own_layers_is_evaluated():
    """One network under two names: what the capture puts in its place must not stay there."""
    torch.manual_seed(0)
    model = StructuredPrediction((1, 4, 4), layers=[3, 3])
    guide, given = PriorGuide(model), model.example(20)
    before = list(model.parameters())
    evaluator = Evaluator(model, guide, given, num_samples=20, batch_size=20, compiler=by_operations)
    found, eager = evaluator(0), evaluate(model, guide, given, num_samples=20, batch_size=20, seed=0)
    assert not evaluator.uncompiled and abs(found.elbo - eager.elbo) < 4 * (found.elbo_mc_se + eager.elbo_mc_se)
    assert all(one is other for one, other in zip(model.parameters(), before, strict=True))
