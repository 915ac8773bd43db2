"""The compiled step: the same numbers as the eager one on the same noise, and a refusal where it cannot be."""

from __future__ import annotations

import copy
import math
import random
from collections import OrderedDict, namedtuple
from functools import partial

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
import word_programs
from compiled_steps import F64, SHAPE, agree, data, normal_pair, steps_of
from pyro.nn import PyroModule
from torch import nn
from torch.optim.lr_scheduler import OneCycleLR
from torch.utils.checkpoint import checkpoint

from gumbo.errors import BadInput, GumboWarning, UnsupportedSite
from gumbo.guides import BernoulliGuide, CategoricalGuide, NormalGuide, guides
from gumbo.inference import SiteELBO, fit
from gumbo.inference.engine.noise import Noise, Tape
from gumbo.inference.engine.rows import Rows
from gumbo.inference.estimators import (
    Concrete,
    GumbelSoftmax,
    MovingAverage,
    Neural,
    ReinMax,
    Relax,
    ScoreFunction,
    SiteState,
    estimators,
)
from gumbo.inference.training.compile import step as compiled
from gumbo.inference.training.compile.backends import uncompiled
from gumbo.inference.training.compile.step import CompiledStep
from gumbo.inference.training.optimizers import make_optimizer
from gumbo.inference.training.schedules import Exponential, Linear
from gumbo.inference.training.steps import TorchStep
from gumbo.models import BernoulliVAE, CategoricalVAE, GaussianVAE, models


def coin_pair():
    model = BernoulliVAE(SHAPE, num_latents=3, hidden=(5,))
    return model, BernoulliGuide(model)


def layered_pair():
    model = models["sigmoid-belief-network"](SHAPE, **models["sigmoid-belief-network"].variants[-1])
    return model, guides["layered"](model)


def class_pair():
    model = CategoricalVAE(SHAPE, num_latents=2, num_classes=3, hidden=(5,))
    return model, CategoricalGuide(model)


PAIRS = {"normal": normal_pair, "coins": coin_pair, "classes": class_pair, "layers": layered_pair}


def fits(estimator, pair) -> bool:
    model, guide = pair()
    objective = "elbo" if "elbo" in estimator.objectives else "iwae"
    try:
        SiteELBO(estimator, objective=objective)(model, guide).initialize(data())
    except Exception:
        return False
    return True


def cases():
    for word, make in estimators.items():
        for name in PAIRS:
            objectives = sorted(make().objectives - {"rws"})
            for objective in objectives:
                marks = pytest.mark.slow if name == "layers" and objective != "elbo" else ()
                yield pytest.param(word, name, objective, id=f"{word}-{name}-{objective}", marks=marks)


@pytest.mark.parametrize("word, name, objective", list(cases()))
def test_what_is_captured_is_what_eager_does(word, name, objective):
    """Every registered estimator; a new one is enrolled by its name."""
    pair = PAIRS[name]
    if not fits(estimators[word](), pair):
        pytest.skip(f"{word} does not serve these sites")
    particles = max(2, estimators[word]().min_particles)
    loss = SiteELBO(word, objective=objective, num_particles=particles)
    agree(*steps_of(pair, loss), [data(dtype=F64), 1 - data(dtype=F64)], 1e-10)


def on_equal_draws(compiled, eager, batches, tolerance=1e-9):
    """As ``agree``, where programs also draw counts or Gamma variables: a graph takes these from torch's generator."""
    for number, x in enumerate(batches):
        mine = _seeded(lambda x=x: compiled(Rows(x)), number)

        def other(x=x):
            if compiled.noise is not None:
                compiled.noise.draw()
            with Tape(compiled.noise):
                return eager(Rows(x))

        assert mine == pytest.approx(_seeded(other, number), rel=tolerance)
        expected = eager.module.state_dict()
        for name, value in compiled.module.state_dict().items():
            if isinstance(value, torch.Tensor):
                torch.testing.assert_close(value, expected[name], rtol=tolerance, atol=tolerance, msg=name)


def masked_cells():
    for word, kind, quick in word_programs.cells():
        yield pytest.param(word, kind, id=f"{word}-{kind}", marks=() if quick else pytest.mark.slow)


@pytest.mark.filterwarnings("ignore:.*cuts off:gumbo.errors.GumboWarning")
@pytest.mark.parametrize("word, kind", list(masked_cells()))
def test_masked_and_subsampled_layers_are_captured(word, kind):
    """Every registered word on every kind of site that it serves; the compiled step is the eager one on equal noise."""
    loss = SiteELBO(word_programs.said(word), num_particles=2, plates="trust")
    batches = [word_programs.rows(4, seed) for seed in range(3)]
    make = make_optimizer("adam", 1e-2)[0]

    def compare():
        steps = []
        for step in (partial(CompiledStep, backend=uncompiled), TorchStep):
            torch.manual_seed(0)  # networks that the losses build
            steps.append(step(*word_programs.pair(kind), copy.deepcopy(loss), make, Rows(batches[0])))
        on_equal_draws(*steps, batches)

    if kind == "binomial" and word in ("enumerate", "local-expectation"):  # which ask it for its largest count
        with pytest.raises(BadInput, match="asks for the value of a tensor") as refusal:
            compare()
        assert "\n" not in str(refusal.value)
    else:
        compare()


class Chains(PyroModule):
    """A coin for each row, which the guide draws, and a chain that the model lists, or that the guide lists too."""

    def __init__(self, is_model, drawn):
        super().__init__()
        self.is_model, self.drawn = is_model, drawn
        name = "p" if is_model else "q"
        setattr(self, f"{name}_steps", torch.nn.Parameter(torch.tensor([[0.3, -0.2], [0.1, 0.4]])))
        setattr(self, f"{name}_coin", torch.nn.Parameter(torch.tensor(0.2)))

    def forward(self, x):
        steps, coin = (self.p_steps, self.p_coin) if self.is_model else (self.q_steps, self.q_coin)
        with pyro.plate("rows", len(x)):
            s = pyro.sample("s", dist.Bernoulli(logits=coin))
            z = torch.tensor(0)
            for i in pyro.markov(range(3)) if self.is_model or self.drawn else ():
                z = pyro.sample(f"z{i}", dist.Categorical(logits=steps[z]), infer={"enumerate": "parallel"})
                if self.is_model:
                    pyro.sample(f"x{i}", dist.Bernoulli(logits=z + coin * s), obs=x.flatten(1)[:, i])


@pytest.mark.parametrize("drawn", [False, True], ids=["in the model", "in the guide"])
@pytest.mark.parametrize(("word", "particles"), [("score", 1), ("rloo", 2)])
def test_sums_over_chains_are_captured(word, particles, drawn):
    loss = SiteELBO({"s": word}, num_particles=particles)
    pair = lambda: (Chains(True, drawn), Chains(False, drawn))  # noqa: E731
    agree(*steps_of(pair, loss), [data(dtype=F64), 1 - data(dtype=F64)], 1e-10)


class Counted(PyroModule):
    """A count in each row: the model's of a learnt slope, the guide's of a learnt rate."""

    def __init__(self, is_model):
        super().__init__()
        self.is_model = is_model
        setattr(self, "slope" if is_model else "rates", torch.nn.Parameter(torch.tensor([0.4, -0.2, 0.1])))

    def forward(self, x):
        with pyro.plate("data", len(x)):
            rate = x.new_ones(()) if self.is_model else (x.flatten(1)[:, :3] @ self.rates).exp()
            z = pyro.sample("z", dist.Poisson(rate))
            if self.is_model:
                pyro.sample("x", dist.Normal(z * self.slope[0], 1.0), obs=x.flatten(1)[:, 0])


@pytest.mark.parametrize("word", ["truncated-enumerate", "head-tail", "rloo"])
def test_sums_over_counts_are_captured(word):
    """Counts come from torch's own generator, in the graph too: the same seed draws the same ones."""
    compiled, eager = steps_of(lambda: (Counted(True), Counted(False)), SiteELBO(word, num_particles=2))
    for x in (data(dtype=F64), 1 - data(dtype=F64)):
        mine, other = (_seeded(lambda step=step, x=x: step(Rows(x, "x"))) for step in (compiled, eager))
        assert mine == pytest.approx(other, rel=1e-10)
    for a, b in zip(compiled.parameters.values(), eager.parameters.values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", ["normal", "layers"])
def test_reweighted_wake_sleep_is_captured(name):
    loss = SiteELBO(objective="rws", num_particles=3)
    agree(*steps_of(PAIRS[name], loss), [data(dtype=F64), 1 - data(dtype=F64)], 1e-10)


@pytest.mark.parametrize("name", ["normal", "layers"])
def test_the_log_variance_is_captured_with_the_bound_that_it_reports(name):
    compiled, eager = steps_of(PAIRS[name], SiteELBO(objective="log-variance+elbo", num_particles=3))
    agree(compiled, eager, [data(dtype=F64), 1 - data(dtype=F64)], 1e-10)
    assert compiled.reported()["elbo"] == pytest.approx(eager.reported()["elbo"], rel=1e-10)
    assert compiled.reported()["elbo"] < 0


@pytest.mark.parametrize("word, name", [("pathwise", "normal"), ("dreg", "normal"), ("rloo", "layers")])
@pytest.mark.parametrize("alpha", [0.4, 1.0])
def test_the_renyi_bound_is_captured(word, name, alpha):
    if (word, alpha) == ("dreg", 1.0):
        pytest.skip("at order 1 the words are those of the ELBO")
    loss = SiteELBO(word, objective="renyi", alpha=alpha, num_particles=3)
    agree(*steps_of(PAIRS[name], loss), [data(dtype=F64), 1 - data(dtype=F64)], 1e-10)


@pytest.mark.parametrize("word", ["score", "rloo", "straight-through", "relax"])
def test_particles_one_by_one_are_captured(word):
    loss = SiteELBO(word, num_particles=2, vectorize_particles=False)
    agree(*steps_of(coin_pair, loss), [data(dtype=F64)], 1e-10)


COOLING = Exponential(1.0, 0.1, 1e-2)
SCHEDULED = {
    "kl_weight": (SiteELBO("pathwise", kl_weight=Linear(200)), normal_pair),
    "kl_weight of rebar": (SiteELBO("rebar", kl_weight=Linear(200)), coin_pair),
    "gumbel-softmax": (SiteELBO(GumbelSoftmax(COOLING)), class_pair),
    "gumbel-rao": (SiteELBO(GumbelSoftmax(COOLING, hard=True, rao=3)), coin_pair),
    "reinmax": (SiteELBO(ReinMax(COOLING)), class_pair),
    "concrete": (SiteELBO(Concrete(COOLING, Exponential(2.0, 0.5, 1e-2))), coin_pair),
}


@pytest.mark.parametrize("loss, pair", SCHEDULED.values(), ids=SCHEDULED)
def test_schedules_go_on_in_the_graph(loss, pair):
    compiled, eager = steps_of(pair, loss)
    for first_step in (0 if "rebar" not in repr(loss) else 70, 100, 500):
        agree(compiled, eager, [data(dtype=F64)], 1e-10, first_step)


STATEFUL = {
    "average and network": SiteELBO(ScoreFunction(baseline=MovingAverage(0.5)), num_particles=2),
    "nvil": SiteELBO(ScoreFunction(baseline=Neural(hidden=4))),
    "relax": SiteELBO(Relax(hidden=4)),
    "relax and rebar": SiteELBO(Relax(hidden=4, rebar=True)),
    "iwae": SiteELBO(ScoreFunction(baseline=MovingAverage()), objective="iwae", num_particles=3),
}


@pytest.mark.parametrize("loss", STATEFUL.values(), ids=STATEFUL)
def test_the_state_of_baselines_moves(loss):
    compiled, eager = steps_of(coin_pair, loss)
    before = {name: value.clone() for name, value in compiled.module.binding.states.state_dict().items()}
    agree(compiled, eager, [data(dtype=F64)] * 4, 1e-9)
    after = compiled.module.binding.states.state_dict()
    assert any(not torch.equal(before[name], after[name]) for name in before)


OPTIMIZERS = {
    "adam": "adam",
    "adamw": "adamw",
    "sgd": "sgd",
    "rmsprop": "rmsprop",
    "weight decay": lambda p: torch.optim.Adam(p.values() if isinstance(p, dict) else p, lr=1e-2, weight_decay=0.1),
    "ascent": lambda p: torch.optim.Adam(p, lr=1e-2, maximize=True, weight_decay=0.1, betas=(0.5, 0.9)),
    "amsgrad": lambda p: torch.optim.Adam(p, lr=1e-2, amsgrad=True),
    "clipped": "clipped",
    "scheduled": "scheduled",
}


class Normalized(PyroModule):
    """A guide whose first layer is a BatchNorm, or calls torch's function with buffers of its own."""

    def __init__(self, function: bool):
        super().__init__()
        self.function, size = function, math.prod(SHAPE)
        if function:
            self.register_buffer("mean", torch.zeros(size))
            self.register_buffer("var", torch.ones(size))
        else:
            self.norm = nn.BatchNorm1d(size)
        self.layer = nn.Linear(size, 4)

    def forward(self, x):
        x = x.flatten(1)
        x = nn.functional.batch_norm(x, self.mean, self.var, training=True) if self.function else self.norm(x)
        loc, log_sd = self.layer(x).chunk(2, -1)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(loc, log_sd.exp()).to_event(1))


@pytest.mark.parametrize("function", [False, True], ids=["module", "function"])
def test_running_statistics_move_with_the_graph(function):
    def pair():
        return GaussianVAE(SHAPE, latent_dim=2, hidden=(5,)), Normalized(function)

    compiled, eager = steps_of(pair, SiteELBO("pathwise"))
    first = [buffer.clone() for buffer in compiled.module.buffers()]
    agree(compiled, eager, [data(dtype=F64), 1 - data(dtype=F64)], 1e-10)
    assert any(not torch.equal(a, b) for a, b in zip(first, compiled.module.buffers(), strict=True))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_makes_torchs_own_steps(name):
    made = {
        "clipped": lambda: make_optimizer("adam", 1e-2, clip_norm=0.5)[0],
        "scheduled": lambda: make_optimizer("adam", Linear(10, start=1e-1, end=1e-3))[0],
    }.get(name, lambda: make_optimizer(OPTIMIZERS[name], 1e-2)[0])()
    compiled, eager = steps_of(normal_pair, SiteELBO("pathwise"), made)
    agree(compiled, eager, [data(dtype=F64), 1 - data(dtype=F64)] * 3, 1e-9)


def test_adam_is_in_the_graph_and_its_state_is_torchs():
    compiled, eager = steps_of(normal_pair, SiteELBO("pathwise"))
    assert compiled.inside is not None and steps_of(normal_pair, SiteELBO("pathwise"), "sgd")[0].inside is None
    agree(compiled, eager, [data(dtype=F64)] * 3, 1e-10)
    mine, others = (step.optimizer.state_dict()["optimizer"]["state"] for step in (compiled, eager))
    assert mine.keys() == others.keys()
    for key, state in others.items():
        for name, value in state.items():
            torch.testing.assert_close(mine[key][name], value, rtol=1e-9, atol=1e-12)
    saved = copy.deepcopy(compiled.optimizer.state_dict())
    compiled.optimizer.load_state_dict(saved)
    eager.optimizer.load_state_dict(copy.deepcopy(saved))
    agree(compiled, eager, [data(dtype=F64)] * 2, 1e-9)


def test_another_shape_and_the_steps_that_look_at_values_run_eagerly():
    compiled, eager = steps_of(normal_pair, SiteELBO("pathwise"))
    for rows in (4, 3, 4, 2, 4):
        x = data(rows, dtype=F64)
        if rows == 4:
            mine = compiled(Rows(x, "x"))
            with Tape(compiled.noise):
                other = eager(Rows(x, "x"))
        else:
            mine, other = (_seeded(lambda step=step, x=x: step(Rows(x, "x"))) for step in (compiled, eager))
        assert mine == pytest.approx(other, rel=1e-10)
    assert compiled.module.binding.steps == eager.module.binding.steps == 5
    for a, b in zip(compiled.parameters.values(), eager.parameters.values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


def _seeded(make, seed=3):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return make()


@pytest.mark.slow
def test_rebar_probes_the_programs_at_the_calls_it_always_does(monkeypatch):
    from gumbo.inference.estimators import control_variates

    torch.manual_seed(0)
    compiled, _ = steps_of(coin_pair, SiteELBO("rebar"))
    probed, check = [], control_variates.check_continuous
    number = 0

    def noted(view, *args):
        probed.append(number)
        check(view, *args)

    monkeypatch.setattr(control_variates, "check_continuous", noted)
    while number < 70:
        number += 1
        compiled(Rows(data(dtype=F64), "x"))
    assert probed == [1, 2, 4, 8, 16, 32, 64]


class Looking(SiteState):
    """A state that counts its calls and looks at a value in the third of them."""

    uncaptured = frozenset({"count"})

    def __init__(self):
        super().__init__()
        self.count, self.blind, self.seen = 0, False, []

    def looks_at_values(self, step):
        return step == 2

    def continue_from(self, step):
        self.count = step

    def stop_looking(self):
        self.count = 99


class LookingScore(ScoreFunction):
    def make_state(self, site, inputs):
        return Looking()

    def surrogate(self, view):
        view.state.count += 1
        if view.state.count == 3:
            view.state.seen.append(float(view.cost.sum()))
        return super().surrogate(view)


def test_an_estimator_of_others_says_when_its_state_looks_at_values():
    torch.manual_seed(0)
    compiled, _ = steps_of(coin_pair, SiteELBO(LookingScore()))
    (state,) = compiled.module.binding.states.values()
    state.seen.clear()
    for _ in range(5):
        compiled(Rows(data(dtype=F64), "x"))
    assert len(state.seen) == 1 and compiled.captures == 1


def test_a_program_of_others_may_name_what_a_graph_need_not_see():
    class Counting(BernoulliVAE):
        calls = 0

        def forward(self, x):
            self.calls += 1
            return super().forward(x)

    def pair():
        torch.manual_seed(0)
        model = Counting(SHAPE, num_latents=3, hidden=(5,))
        return model, BernoulliGuide(model)

    with pytest.raises(BadInput, match="Counting.calls.*uncaptured"):
        steps_of(pair, SiteELBO("score"))
    Counting.uncaptured = frozenset({"calls"})
    agree(*steps_of(pair, SiteELBO("score")), [data(dtype=F64)], 1e-10)


class Jumps(BernoulliVAE):
    """Takes coins for what they are not: a step, which no relaxation can follow."""

    def likelihood(self, z):
        return super().likelihood((z > 0.5).to(z.dtype))


def test_a_jump_is_found_as_without_compiling():
    model = Jumps(SHAPE, num_latents=3, hidden=(5,))
    guide = BernoulliGuide(model)
    step = CompiledStep(model, guide, SiteELBO("rebar"), make_optimizer("adam", 1e-2)[0], Rows(data(), "x"), uncompiled)
    with pytest.raises(UnsupportedSite, match="not continuous"):
        step(Rows(data(), "x"))


# --- noise ----------------------------------------------------------------------------------------------------------


def draws():
    half = torch.full((20_000,), 0.25)
    three = torch.tensor([0.2, 0.3, 0.5]).expand(20_000, 3)
    return {
        "bernoulli": (lambda: torch.bernoulli(half), 0.25, 0.25 * 0.75),
        "bernoulli in place": (lambda: torch.empty(20_000).bernoulli_(0.25), 0.25, 0.25 * 0.75),
        "uniform": (lambda: torch.rand(20_000), 0.5, 1 / 12),
        "uniform between": (lambda: torch.empty(20_000).uniform_(2, 5), 3.5, 9 / 12),
        "normal": (lambda: torch.randn(20_000), 0.0, 1.0),
        "normal of both": (lambda: torch.normal(half, 2 * half), 0.25, 0.25),
        "normal of a size": (lambda: torch.normal(1.0, 3.0, (20_000,)), 1.0, 9.0),
        "exponential": (lambda: torch.empty(20_000).exponential_(2.0), 0.5, 0.25),
        "multinomial": (lambda: torch.multinomial(three, 1).float(), 1.3, 0.61),
        "multinomial again": (lambda: torch.multinomial(three[0], 20_000, replacement=True).float(), 1.3, 0.61),
        "without replacement": (lambda: torch.multinomial(three, 3).float(), 1.0, 2 / 3),
        "integers": (lambda: torch.randint(1, 5, (20_000,)).float(), 2.5, 1.25),
        "permutation": (lambda: torch.randperm(20_000).float(), 9999.5, (20_000**2 - 1) / 12),
        "dropout": (lambda: torch.nn.functional.dropout(torch.ones(20_000), 0.2), 1.0, 0.25),
    }


@pytest.mark.parametrize("name", draws())
def test_noise_gives_the_same_distributions(name):
    """Mean and variance within six standard errors, and the same draws for the same noise."""
    draw, mean, variance = draws()[name]
    tape = Tape()
    with tape:
        found = draw()
    assert len(tape.requests) == 1
    assert found.shape == draw().shape and found.dtype == draw().dtype
    assert abs(found.mean().item() - mean) <= 6 * (variance / 20_000) ** 0.5
    assert found.var().item() == pytest.approx(variance, rel=0.1)
    noise = Noise(tape.requests)
    noise.draw()
    with Tape(noise):
        first = draw()
    with Tape(noise):
        assert torch.equal(first, draw())


def test_a_generator_of_the_programs_own_is_refused():
    with Tape(), pytest.raises(BadInput, match="generator of its own"):
        torch.rand(2, generator=torch.Generator())


# --- what is refused, and what is seen ------------------------------------------------------------------------------


class Changed(GaussianVAE):
    """A model that does one thing that a graph cannot keep."""

    def __init__(self, trick):
        super().__init__(SHAPE, latent_dim=2, hidden=(5,))
        self.trick, self.factor, self.calls_made = trick, 1.0, 0
        self.table = torch.ones(())
        self.held, self.named = [torch.zeros(())], {"mean": torch.zeros(())}

    def likelihood(self, z):
        return self.trick(self, z, super().likelihood)


def branches(model, z, likelihood):
    return likelihood(z if z.sum() > 0 else -z)


def reads(model, z, likelihood):
    return likelihood(z * (2.0 if z.abs().max().item() > 1 else 1.0))


def counts(model, z, likelihood):
    model.calls_made += 1
    return likelihood(z / model.calls_made)


def keeps(model, z, likelihood):
    model.last = z
    return likelihood(z)


def writes(model, z, likelihood):
    model.table.mul_(0.5)
    return likelihood(z * model.table)


def counts_by_name(model, z, likelihood):
    model.named["calls"] = model.named.get("calls", 0) + 1
    return likelihood(z / model.named["calls"])


def replaces(model, z, likelihood):
    model.held[0] = model.held[0] + z.detach().mean()
    return likelihood(z + model.held[0])


def replaces_by_name(model, z, likelihood):
    model.named["mean"] = model.named["mean"] + z.detach().mean()
    return likelihood(z + model.named["mean"])


def rolls_python(model, z, likelihood):
    return likelihood(z * (1 + random.random()))


def rolls_numpy(model, z, likelihood):
    return likelihood(z * (1 + np.random.rand()))


GENERATOR = np.random.default_rng(0)


def rolls_a_numpy_generator(model, z, likelihood):
    return likelihood(z * (1 + GENERATOR.random()))


def draws_more_now_and_then(model, z, likelihood):
    model.trick.__dict__["calls"] = calls = model.trick.__dict__.get("calls", 0) + 1
    return likelihood(z + (torch.randn_like(z) if calls % 2 else 0.0))


def leaves_torch(model, z, likelihood):
    return likelihood(z + torch.from_numpy(np.asarray(z.detach().numpy())))


REFUSED = {
    branches: "asks for the value of a tensor.*z if z.sum\\(\\) > 0",
    reads: "asks for the value of a tensor.*item\\(\\) > 1",
    counts: "Changed.calls_made changes as the program runs",
    writes: "Changed.table changes as the program runs",
    keeps: "Changed.last changes as the program runs",
    replaces: "Changed.held changes as the program runs",
    replaces_by_name: "Changed.named changes as the program runs",
    counts_by_name: "Changed.named changes as the program runs",
    rolls_python: "random numbers",
    rolls_numpy: "random numbers",
    rolls_a_numpy_generator: "differs from the eager one",
    draws_more_now_and_then: "draws other things",
    leaves_torch: "fails without values.*numpy",
}


def compiled_of(model, guide=None, loss=None, x=None):
    x = data() if x is None else x
    guide = NormalGuide(model) if guide is None else guide
    loss = SiteELBO("pathwise") if loss is None else loss
    return CompiledStep(model, guide, loss, make_optimizer("adam", 1e-2)[0], Rows(x, "x"), uncompiled)


@pytest.mark.parametrize("trick", REFUSED, ids=lambda trick: trick.__name__)
def test_what_a_graph_cannot_keep_is_refused_in_one_line(trick):
    model = Changed(trick)
    with pytest.raises(BadInput, match=REFUSED[trick]) as refused:
        compiled_of(model)
    assert "\n" not in str(refused.value) and "compile=False" in str(refused.value)
    held = [*vars(model).values(), *model.held, *model.named.values()]
    assert not any("Fake" in type(value).__name__ for value in held)


def test_a_cache_that_fills_as_the_program_runs_is_a_constant():
    def caches(model, z, likelihood):
        if len(z) not in model.named:
            model.named[len(z)] = torch.full((), 0.5)
        return likelihood(z * model.named[len(z)])

    model = Changed(caches)
    agree(*steps_of(lambda: (model, NormalGuide(model)), SiteELBO("pathwise")), [data(dtype=F64)], 1e-9)
    assert all(type(value) is torch.Tensor for value in model.named.values())


@pytest.mark.parametrize("name", ["calls", "steps", "_own", "_kept", "_keeps"])
@pytest.mark.parametrize("begun", [True, False])
def test_a_counter_of_a_program_is_refused_whatever_its_name(name, begun):
    def counts(model, z, likelihood):
        setattr(model, name, getattr(model, name, 0) + 1)
        return likelihood(z * getattr(model, name))

    model = Changed(counts)
    if begun:
        setattr(model, name, 0)
    with pytest.raises(BadInput, match=f"Changed.{name} changes as the program runs"):
        compiled_of(model)


VALUES = {
    "item\\(\\)": lambda model, z, likelihood: likelihood(z * z.sum().item()),
    "tolist\\(\\)": lambda model, z, likelihood: likelihood(z + sum(z.sum(-1).tolist())),
    "z\\[z > 0\\]": lambda model, z, likelihood: likelihood(z + z[z > 0].sum()),
}


@pytest.mark.parametrize("words", VALUES)
def test_what_only_the_compiler_refuses_is_named_with_its_line(words):
    model = Changed(VALUES[words])
    with pytest.raises(BadInput, match=f"asks for the value of a tensor.*at test_compiled.py:.*{words}") as refused:
        CompiledStep(
            model, NormalGuide(model), SiteELBO("pathwise"), make_optimizer("adam", 1e-2)[0], Rows(data(), "x")
        )
    assert "\n" not in str(refused.value)


def test_an_estimator_that_reads_the_step_is_refused():
    class Odd(GumbelSoftmax):
        def draw(self, fn, step, args=(), kwargs=None):
            return super().draw(fn, step, args, kwargs) if step % 2 else super().draw(fn, step)

    with pytest.raises(BadInput, match="number of the step"):
        compiled_of(*class_pair(), SiteELBO(Odd()))


def test_stock_losses_are_refused():
    from pyro.infer import Trace_ELBO

    with pytest.raises(BadInput, match="gumbo's own ELBOs, not Trace_ELBO"):
        compiled_of(*normal_pair(), Trace_ELBO())


def test_nothing_is_left_of_capturing():
    model, guide = normal_pair()
    before = [dict(vars(module)) for program in (model, guide) for module in program.modules()]
    values = [parameter.clone() for program in (model, guide) for parameter in program.parameters()]
    random_state = torch.get_rng_state()
    step = compiled_of(model, guide)
    assert torch.equal(random_state, torch.get_rng_state()) and step.module.binding.steps == 0
    after = [dict(vars(module)) for program in (model, guide) for module in program.modules()]
    assert [one.keys() for one in before] == [one.keys() for one in after]
    for a, b in zip(values, (p for program in (model, guide) for p in program.parameters()), strict=True):
        assert torch.equal(a, b) and b.grad is None


def scaled(model, z, likelihood):
    return likelihood(z * model.factor * model.table)


def test_a_changed_attribute_is_captured_anew():
    torch.manual_seed(0)
    model = Changed(scaled)
    step = compiled_of(model)
    step(Rows(data(), "x"))
    assert step.captures == 1
    model.factor = 0.0
    step(Rows(data(), "x"))
    assert step.captures == 2
    before = model.decoder[0].weight.clone()
    moments = step.optimizer.optimizer.state[model.decoder[0].weight]
    moments["exp_avg"].zero_()
    step(Rows(data(), "x"))  # z is multiplied by zero, so that this weight has no gradient
    assert torch.equal(before, model.decoder[0].weight)
    model.table.fill_(0.5)  # written in place
    step(Rows(data(), "x"))
    assert step.captures == 3
    for number in range(5):
        model.factor = float(number + 2)
        step(Rows(data(), "x"))
    model.factor = 99.0
    with pytest.raises(BadInput, match="changes so often"):
        step(Rows(data(), "x"))


@pytest.mark.filterwarnings("ignore:.*was not registered in the param store")
@pytest.mark.parametrize("compile", [False, True])
def test_a_parameter_that_was_frozen_at_first_is_refused_and_one_that_learned_may_rest(compile, monkeypatch):
    monkeypatch.setattr(compiled, "inductor", uncompiled)
    seen, (model, guide) = [], normal_pair()
    weight = model.decoder[-1].weight

    def rest(numbers):
        seen.append(weight.detach().clone())
        weight.requires_grad_(numbers["epoch"] != 1)

    options = {"batch_size": 4, "compile": compile, "progress": False}
    fit(model, guide, data(), epochs=3, on_epoch=rest, **options)
    assert torch.equal(seen[0], seen[1]) and not torch.equal(seen[1], seen[2])
    weight.requires_grad_(False)
    with pytest.raises(BadInput, match="'model.decoder.2.weight' was frozen when training began.*let it learn") as said:
        fit(model, guide, data(), epochs=2, on_epoch=lambda _: weight.requires_grad_(True), **options)
    assert "\n" not in str(said.value)


def test_a_parameter_that_moves_in_memory_is_refused_where_steps_are_compiled(monkeypatch):
    monkeypatch.setattr(compiled, "inductor", uncompiled)
    model, guide = normal_pair()

    def turn(numbers):
        weight = model.decoder[-1].weight
        weight.data = weight.data.t().contiguous().t()

    with pytest.raises(BadInput, match="^parameter 'model.decoder.2.weight' has another order in memory.*by copy_"):
        fit(model, guide, data(), epochs=2, batch_size=4, compile=True, on_epoch=turn, progress=False)


class Turned(PyroModule):
    """A mean with a complex parameter."""

    def __init__(self, dtype=torch.complex64):
        super().__init__()
        self.turn = nn.Parameter(torch.tensor([1, 2], dtype=dtype), requires_grad=dtype.is_complex)

    def forward(self, x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(len(x)), 1.0))
            pyro.sample("x", dist.Normal(z[:, None] + self.turn.abs(), 1.0).to_event(1), obs=x)


class TurnedGuide(PyroModule):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(2, 1)

    def forward(self, x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(self.layer(x)[:, 0], 1.0))


def test_complex_parameters_train_and_are_refused_by_name_where_steps_are_compiled():
    model, x = Turned(), torch.ones(8, 2)
    before = model.turn.detach().clone()
    fit(model, TurnedGuide(), x, epochs=1, progress=False)
    assert not torch.equal(model.turn, before)
    for frozen, remedy in ((False, "compiled: pass compile=False"), (True, "make it a buffer, or pass compile=False")):
        model.turn.requires_grad_(not frozen)
        with pytest.raises(BadInput, match=rf"^parameter 'model.turn' is complex, and complex.*{remedy}$"):
            fit(model, TurnedGuide(), x, epochs=1, compile=True, progress=False)


@pytest.mark.slow
def test_a_step_under_autocast_is_compared_with_the_rounding_of_its_products():
    x = torch.randn(64, 5, generator=torch.Generator().manual_seed(0))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = GaussianVAE((5,), latent_dim=2, hidden=(8,), likelihood="normal")
        guide = NormalGuide(model, hidden=(8,))
    with torch.autocast("cpu", torch.bfloat16):
        found = fit(model, guide, x, epochs=1, batch_size=32, compile=True, progress=False)
    assert math.isfinite(found.history[-1]["elbo"])


@pytest.mark.filterwarnings("ignore:.*was not registered in the param store")
@pytest.mark.parametrize("loss", ["pathwise", "trace"])
def test_whole_numbers_among_the_parameters_are_a_layers_or_refused_by_name(loss):
    with pytest.raises(BadInput, match=r"^parameter 'turn' is torch.int64, and Pyro has .* by register_buffer$"):
        fit(Turned(torch.int64), TurnedGuide(), torch.ones(8, 2), loss=loss, epochs=1, progress=False)
    guide = TurnedGuide()
    guide.layer.register_parameter("counts", nn.Parameter(torch.arange(3), requires_grad=False))
    fit(Turned(), guide, torch.ones(8, 2), loss=loss, epochs=1, progress=False)
    assert guide.layer.counts.tolist() == [0, 1, 2]


@pytest.mark.parametrize("compile", [False, True])
def test_a_parameter_that_the_optimizer_does_not_have_is_refused(compile, monkeypatch):
    monkeypatch.setattr(compiled, "inductor", uncompiled)
    model, guide = normal_pair()

    def replace(numbers):
        model.decoder[-1] = nn.Linear(5, math.prod(SHAPE))

    with pytest.raises(BadInput, match="parameter 'model.decoder.2.weight' is new since training began"):
        fit(model, guide, data(), epochs=2, batch_size=4, compile=compile, on_epoch=replace, progress=False)


@pytest.mark.filterwarnings("ignore:.*was not registered in the param store")
def test_a_frozen_parameter_is_seen():
    model, guide = normal_pair()
    step = compiled_of(model, guide)
    step(Rows(data(), "x"))
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    before = [parameter.clone() for parameter in model.parameters()]
    moved = [parameter.clone() for parameter in guide.parameters()]
    step(Rows(data(), "x"))
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(moved, guide.parameters(), strict=True))


def test_a_loss_that_is_not_finite_moves_no_parameter():
    model, guide = normal_pair()
    step = compiled_of(model, guide)
    step.check_data = False
    before = [parameter.clone() for parameter in step.parameters.values()]
    assert not torch.isfinite(torch.tensor(step(Rows(data() * float("nan"), "x"))))
    assert all(torch.equal(a, b) for a, b in zip(before, step.parameters.values(), strict=True))
    assert all(
        torch.equal(step.optimizer.optimizer.state[p]["step"], torch.tensor(0.0)) for p in step.inside.parameters
    )
    assert torch.isfinite(torch.tensor(step(Rows(data(), "x"))))
    assert not any(torch.equal(a, b) for a, b in zip(before, step.parameters.values(), strict=True))


def test_data_outside_the_support_are_refused():
    step = compiled_of(*normal_pair())
    with pytest.raises(BadInput, match="'x': the data hold values outside the support of Bernoulli"):
        step(Rows(data() + 0.5, "x"))


class Subsampled(PyroModule):
    """Ten rows of data that it holds itself, four of them seen at a time."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(()))
        self.register_buffer("rows", torch.arange(10.0))

    def forward(self):
        with pyro.plate("rows", 10, subsample_size=4) as index:
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(self.weight * z, 1.0), obs=self.rows[index])


class SubsampledGuide(PyroModule):
    def __init__(self):
        super().__init__()
        self.loc = torch.nn.Parameter(torch.zeros(10))

    def forward(self):
        with pyro.plate("rows", 10, subsample_size=4) as index:
            pyro.sample("z", dist.Normal(self.loc[index], 1.0))


def test_a_subsampled_plate_shows_other_rows_at_every_step():
    batch = Rows.__new__(Rows)
    batch.args, batch.kwargs = (), {}
    step = CompiledStep(
        Subsampled(), SubsampledGuide(), SiteELBO("pathwise"), make_optimizer("sgd", 1e-4)[0], batch, uncompiled
    )
    moved = set()
    for _ in range(30):
        before = step.module.guide.loc.detach().clone()
        step(batch)
        rows = (step.module.guide.loc.detach() != before).nonzero().flatten().tolist()
        assert len(rows) == 4
        moved |= set(rows)
    assert moved == set(range(10))


# --- the compiler ---------------------------------------------------------------------------------------------------


def test_no_compiler_is_one_line(monkeypatch):
    import torch._inductor as inductor_of_torch

    class InvalidCxxCompiler(RuntimeError):
        pass

    def fails(*_, **__):
        raise InvalidCxxCompiler("No working C++ compiler found in\nlist")

    monkeypatch.setattr(inductor_of_torch, "compile", fails)
    with pytest.raises(BadInput, match="needs a C\\+\\+ compiler") as refused:
        CompiledStep(*normal_pair(), SiteELBO("pathwise"), make_optimizer("adam", 1e-2)[0], Rows(data(), "x"))
    assert "\n" not in str(refused.value)


COMPILED = {"pathwise": (normal_pair, F64, 1e-10), "rloo": (class_pair, torch.float32, 1e-5)}


@pytest.mark.parametrize("word", ["pathwise", pytest.param("rloo", marks=pytest.mark.slow)])
def test_machine_code_does_what_eager_does(word):
    pair, dtype, tolerance = COMPILED[word]
    loss = SiteELBO(word, num_particles=2)
    compiled, eager = steps_of(pair, loss, dtype=dtype, backend=None)
    assert compiled.seconds > 0 and "compiled in" in compiled.note
    for step in (compiled, eager):
        step.module.binding.steps = 100
    x = Rows(data(dtype=dtype), "x")
    mine = compiled(x)
    with Tape(compiled.noise):
        assert mine == pytest.approx(eager(x), rel=tolerance)
    mine, others = (step.optimizer.optimizer.state for step in (compiled, eager))
    for a, b in zip(compiled.parameters.values(), eager.parameters.values(), strict=True):
        gap = (mine[a]["exp_avg"] - others[b]["exp_avg"]).norm() / others[b]["exp_avg"].norm()
        assert gap <= tolerance


@pytest.mark.slow
@pytest.mark.parametrize("word, name, objective", list(cases()))
def test_machine_code_of_every_estimator(word, name, objective):
    if not fits(estimators[word](), PAIRS[name]):
        pytest.skip(f"{word} does not serve these sites")
    loss = SiteELBO(word, objective=objective, num_particles=max(2, estimators[word]().min_particles))
    agree(*steps_of(PAIRS[name], loss, backend=None), [data(dtype=F64), 1 - data(dtype=F64)], 1e-8)


class Scaled(PyroModule):
    """A model whose arguments beside the data may have any form; its guide takes the same ones."""

    def __init__(self):
        super().__init__()
        self.mean = nn.Parameter(torch.zeros(3, dtype=F64))

    def forward(self, x, *rest, **named):
        shift = sum(self.numbers((rest, named)))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(self.mean + shift, 1.0).to_event(1), obs=x)

    def numbers(self, value):
        if isinstance(value, nn.utils.rnn.PackedSequence):
            return [value.data.sum(), float(len(value.batch_sizes))]
        if isinstance(value, (dict, list, tuple)):
            parts = value.values() if isinstance(value, dict) else value
            return [number for part in parts for number in self.numbers(part)]
        if isinstance(value, torch.Tensor):
            return [value]
        return [len(value) if isinstance(value, str) else float(value or 0)]


class NoLatents(PyroModule):
    def forward(self, x, *rest, **named):
        pass


def changing(make):
    """A transform that adds something else to each batch: ``make`` of a number from 0 to 1."""
    return lambda batch, generator: make(batch, torch.rand((), generator=generator, dtype=F64))


Pair = namedtuple("Pair", ["scale", "word"])
NESTED = {
    "dict": lambda batch, u: {"x": batch, "extra": {"a": u, "b": {"c": 2 * u}}},
    "list": lambda batch, u: (batch, [u, 2 * u], "word"),
    "tuple": lambda batch, u: (batch, (u, 3.0)),
    "ordered": lambda batch, u: (batch, OrderedDict(b=u, a=2 * u)),
    "named": lambda batch, u: (batch, Pair(u, "w"), None, True),
    "packed": lambda batch, u: (batch, nn.utils.rnn.pack_sequence([u.repeat(3), u.repeat(2)])),
}
CONSTANTS = {
    "float": lambda batch, u: (batch, u.item()),
    "keyword": lambda batch, u: {"x": batch, "scale": u.item()},
    "in a list": lambda batch, u: (batch, [u.item()]),
    "in a dict": lambda batch, u: {"x": batch, "scale": {"a": [u.item()], "b": u}},
    "string": lambda batch, u: (batch, "w" * int(100 * u)),
    "none": lambda batch, u: (batch, None if u < 0.5 else 1),
    "array": lambda batch, u: (batch, u.numpy()),
}


def of_both(make, monkeypatch, stretch=True):
    """The parameters and losses of an eager fit and of a compiled one, and how many batches ran uncompiled."""
    monkeypatch.setattr(compiled, "inductor", uncompiled)
    eager_steps = []
    call = TorchStep.__call__
    monkeypatch.setattr(TorchStep, "__call__", lambda step, batch: eager_steps.append(type(step)) or call(step, batch))
    found = []
    for compile in (False, True):
        model = Scaled()
        options = {"batch_size": 4, "epochs": 3, "lr": 0.05, "progress": False, "transform": changing(make)}
        options |= {} if stretch else {"checkpoint_steps": 1}
        result = fit(model, NoLatents(), torch.arange(36, dtype=F64).view(12, 3) / 36, compile=compile, **options)
        found.append([*(line["elbo"] for line in result.history), *model.mean.tolist()])
    return *found, sum(kind is CompiledStep for kind in eager_steps)


@pytest.mark.parametrize("kind", NESTED)
@pytest.mark.parametrize("stretch", [True, False])
def test_tensors_in_containers_are_inputs_of_the_graph(kind, stretch, monkeypatch):
    eager, compiled, uncompiled_steps = of_both(NESTED[kind], monkeypatch, stretch)
    assert compiled == pytest.approx(eager, rel=1e-12) and uncompiled_steps == 0


@pytest.mark.parametrize("kind", CONSTANTS)
def test_a_batch_with_other_constants_runs_uncompiled_and_one_warning_says_so(kind, monkeypatch):
    with pytest.warns(GumboWarning, match="(argument 1|'scale').*other values.*as a tensor") as seen:
        eager, compiled, uncompiled_steps = of_both(CONSTANTS[kind], monkeypatch)
    assert compiled == pytest.approx(eager, rel=1e-12)
    assert uncompiled_steps and len(seen) == 1


def test_constants_that_stay_what_they_are_run_compiled(monkeypatch):
    kept = {"a": 1.5, "b": ["x", None, math.nan], "c": np.ones(2), "d": object()}

    def make(batch, u):
        return {"x": batch, "u": u, "scale": {**kept, "c": np.ones(2), "b": ["x", None, float("nan")]}}

    monkeypatch.setattr(Scaled, "numbers", lambda model, value: [value[1]["u"] * value[1]["scale"]["a"]])
    eager, compiled, uncompiled_steps = of_both(make, monkeypatch)
    assert compiled == pytest.approx(eager, rel=1e-12) and uncompiled_steps == 0


class Checkpointed(PyroModule):
    """A network that is computed again in the backward pass, and one that is not."""

    def __init__(self, again):
        super().__init__()
        self.again, self.net = again, nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3))
        self.register_buffer("seen", torch.zeros(3))
        self.register_buffer("unsaved", torch.zeros(3), persistent=False)

    def forward(self, x):
        mean = checkpoint(self.net, x, use_reentrant=False) if self.again else self.net(x)
        self.seen, self.unsaved = self.seen + x.mean(0), self.unsaved + 1
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(mean, 1.0).to_event(1), obs=x)


@pytest.mark.parametrize("every", ["step", "epoch"])
@pytest.mark.parametrize("cycle_momentum", [True, False])
def test_a_scheduler_that_moves_the_betas_does_so_in_compiled_steps(cycle_momentum, every, monkeypatch):
    monkeypatch.setattr(compiled, "inductor", uncompiled)
    found = []
    for compile in (False, True):
        model = Scaled()
        make = partial(OneCycleLR, max_lr=0.1, total_steps=40, cycle_momentum=cycle_momentum)
        options = {"scheduler": make, "scheduler_every": every, "optimizer": torch.optim.AdamW, "compile": compile}
        x = torch.arange(36, dtype=F64).view(12, 3)
        result = fit(model, NoLatents(), x, batch_size=4, epochs=12, progress=False, **options)
        found.append([*(line["elbo"] for line in result.history), *model.mean.tolist()])
    assert found[1] == pytest.approx(found[0], rel=1e-9)


@pytest.mark.slow
@pytest.mark.parametrize("again", [False, True])
@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
def test_making_the_graph_moves_nothing(again, optimizer):
    torch.manual_seed(0)
    model = Checkpointed(again).to(F64)
    x = torch.randn(6, 3, dtype=F64)
    kept = {name: value.clone() for name, value in (*model.named_parameters(), *model.named_buffers())}
    step, eager = steps_of(lambda: (model, NoLatents()), SiteELBO(), optimizer, backend=None, x=x)
    for name, value in (*model.named_parameters(), *model.named_buffers()):
        assert torch.equal(value, kept[name]), name
    assert all(not value.any() for state in step.optimizer.optimizer.state.values() for value in state.values())
    for _ in range(3):
        assert step(Rows(x, "x")) == pytest.approx(eager(Rows(x, "x")), rel=1e-12)
    agree(step, eager, [x, -x], 1e-10)


def fitted(epochs, run_dir=None, resume=False, word="score-average", **options):
    torch.manual_seed(0)
    model, guide = coin_pair()
    x = data(30)
    settings = {
        "loss": SiteELBO(word, kl_weight=Linear(20), num_particles=2),
        "batch_size": 8,
        "lr": 1e-2,
        "progress": False,
    }
    result = fit(
        model, guide, x, valid=x[:5], epochs=epochs, compile=True, run_dir=run_dir, resume=resume, **settings, **options
    )
    return result, [parameter.detach().clone() for parameter in (*model.parameters(), *guide.parameters())]


def same_numbers(result):
    return [{k: v for k, v in line.items() if k not in ("seconds", "ms_per_step")} for line in result.history]


def resumes(tmp_path, word):
    whole, expected = fitted(4, word=word)
    fitted(2, tmp_path / word, word=word)
    found, parameters = fitted(4, tmp_path / word, resume=True, word=word)
    assert same_numbers(found) == same_numbers(whole)
    assert all(torch.equal(a, b) for a, b in zip(parameters, expected, strict=True))


@pytest.mark.parametrize("word", ["score-average", "rebar", "enumerate"])
def test_a_captured_run_resumes_to_the_same_bits(word, tmp_path, monkeypatch):
    monkeypatch.setattr("gumbo.inference.training.compile.step.inductor", uncompiled)
    resumes(tmp_path, word)


@pytest.mark.slow
@pytest.mark.parametrize("word", ["score-average", "rebar"])
def test_a_compiled_run_resumes_to_the_same_bits(word, tmp_path):
    resumes(tmp_path, word)


def test_fit_says_how_long_it_compiled(monkeypatch, capsys):
    monkeypatch.setattr("gumbo.inference.training.compile.step.inductor", uncompiled)
    fit(*normal_pair(), data(8), batch_size=4, epochs=1, compile=True)
    assert "compiled in" in capsys.readouterr().err


def test_fit_refuses_what_a_compiled_step_cannot_do():
    with pytest.raises(BadInput, match="validate and compile|leave one of them out"):
        fit(*normal_pair(), data(8), epochs=1, compile=True, validate=True)
    with pytest.raises(BadInput, match="gumbo's own ELBOs"):
        fit(*normal_pair(), data(8), epochs=1, compile=True, loss="trace")
    with pytest.raises(BadInput, match="asks for the value of a tensor"):
        model = Changed(branches)
        fit(model, NormalGuide(model), data(8), epochs=1, compile=True)


@pytest.mark.slow
@pytest.mark.parametrize("word", ["rloo", "rebar"])
def test_a_network_under_two_names_keeps_its_parameters(word, monkeypatch):
    """A guide that draws from the model's own layers: what the capture puts in their place must not stay there."""
    monkeypatch.setattr(compiled, "inductor", uncompiled)
    torch.manual_seed(0)
    model = models["structured-prediction"]((1, 4, 4), layers=[3, 3])
    guide, given = guides["prior"](model), model.example(20)
    before = list(model.parameters())
    fit(model, guide, given, loss=word, epochs=3, batch_size=10, compile=True, progress=False, seed=0)
    assert all(one is other for one, other in zip(model.parameters(), before, strict=True))
    assert all(type(parameter) is torch.nn.Parameter for parameter in before)


class ReadsInOrder(PyroModule):
    """q(z given x) by a recurrent layer over the rows of x."""

    def __init__(self, layer: type[nn.RNNBase]):
        super().__init__()
        self.layer, self.mean = layer(5, 4, batch_first=True), nn.Linear(4, 2)

    def forward(self, x):
        hidden, _ = self.layer(x)
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", dist.Normal(self.mean(hidden[:, -1]), 0.5).to_event(1))


class WritesInOrder(PyroModule):
    def __init__(self):
        super().__init__()
        self.weights = nn.Linear(2, 15)

    def forward(self, x):
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            mean = self.weights(z).reshape(*z.shape[:-1], 3, 5)
            pyro.sample("x", dist.Normal(mean, 1.0).to_event(2), obs=x)


@pytest.mark.parametrize("layer", [nn.LSTM, pytest.param(nn.GRU, marks=pytest.mark.slow)])
def test_recurrent_layers_compile_and_train_as_without(layer):
    x, ends = torch.randn(32, 3, 5, generator=torch.Generator().manual_seed(0)), []
    enabled = torch._C._get_mkldnn_enabled()
    for compile in (False, True):
        torch.manual_seed(0)
        model, guide = WritesInOrder(), ReadsInOrder(layer)
        fit(model, guide, x, loss="pathwise", epochs=2, batch_size=16, progress=False, compile=compile)
        ends.append(torch.cat([p.detach().flatten() for p in (*model.parameters(), *guide.parameters())]))
    assert torch.allclose(*ends, atol=1e-5) and torch._C._get_mkldnn_enabled() == enabled
