"""Schedules, the KL warm-up and annealing they drive, active units, and free bits."""

from __future__ import annotations

import itertools
import math

import pyro
import pyro.distributions as dist
import pyro.poutine as poutine
import pytest
import torch
from pyro.infer import SVI, TraceMeanField_ELBO
from pyro.poutine.util import prune_subsample_sites

from gumbo.errors import BadInput, UnknownName, UnsupportedSite
from gumbo.guides import BernoulliGuide, FlowGuide, LayeredGuide, NormalGuide
from gumbo.inference import SiteELBO, fit
from gumbo.inference.estimators import GumbelSoftmax
from gumbo.inference.objectives.free_bits import FreeBitsBound
from gumbo.inference.posterior.activity import active_units
from gumbo.inference.training.free_bits import FreeBits
from gumbo.inference.training.schedules import (
    Constant,
    Cosine,
    Cyclical,
    Exponential,
    Linear,
    Step,
    end_of,
    parse_schedule,
    schedules,
)
from gumbo.models import BernoulliVAE, CategoricalVAE, GaussianVAE, HierarchicalVAE

SHAPE = (1, 4, 4)
EXAMPLES = [
    Constant(0.3),
    Exponential(1.0, 0.5, 1e-4),
    Linear(1000),
    Linear(10, 2.0, 0.5),
    Cyclical(100, 3, 0.7, 0.9),
    Cosine(100, 2.0, 0.5),
    Step(100, 0.1, 1e-6),
]


def images(rows=20):
    return torch.randint(2, (rows, *SHAPE)).float()


def test_annealing_follows_the_formula_and_keeps_its_floor():
    cooling = Exponential(1.3, 0.4, 3e-3)
    for step in (0, 1, 100, 392, 393, 394, 10_000):
        assert cooling(step) == pytest.approx(max(0.4, 1.3 * math.exp(-3e-3 * step)))
    assert cooling(392) > 0.4 == cooling(394)


def test_linear_reaches_its_end_and_stays():
    assert [Linear(4)(step) for step in range(6)] == [0.0, 0.25, 0.5, 0.75, 1.0, 1.0]
    assert [Linear(2, 2.0, 0.5)(step) for step in range(4)] == [2.0, 1.25, 0.5, 0.5]


def test_two_stages_change_at_the_step():
    assert [Step(2)(step) for step in range(4)] == [0.0, 0.0, 1.0, 1.0]
    assert Step(3, 0.1, 1e-6)(2) == 0.1 and end_of(Step(3, 0.1, 1e-6), 10) == 3


def test_a_cosine_goes_down_along_half_a_period():
    assert [Cosine(4, 3.0, 1.0)(step) for step in range(7)] == pytest.approx(
        [3.0, 2 + math.sqrt(0.5), 2.0, 2 - math.sqrt(0.5), 1.0, 1.0, 1.0]
    )


def test_cycles_start_anew_and_the_last_one_stays_up():
    weights = [Cyclical(40, cycles=4, ratio=0.5)(step) for step in range(60)]
    assert weights[:10] == pytest.approx([0.0, 0.2, 0.4, 0.6, 0.8, 1.0, 1.0, 1.0, 1.0, 1.0])
    assert weights[10:20] == pytest.approx(weights[:10]) and weights[30:40] == pytest.approx(weights[:10])
    assert set(weights[40:]) == {1.0}


@pytest.mark.parametrize("schedule", EXAMPLES, ids=repr)
def test_repr_rebuilds(schedule):
    assert parse_schedule(repr(schedule)) == schedule
    assert eval(repr(schedule)) == schedule
    assert parse_schedule(schedule) is schedule


def test_every_schedule_is_shown():
    assert {type(schedule) for schedule in EXAMPLES} == set(schedules.values())


@pytest.mark.parametrize(
    "text, message",
    [
        ("lineal(10)", "did you mean 'linear'"),
        ("linear()", r"it takes linear\(steps, start, end\)"),
        ("linear(10, stop=3)", r"it takes linear\(steps, start, end\)"),
        ("linear(0)", "at least one step"),
        ("linear('a')", "cannot read the schedule"),
        ("__import__('os').getcwd()", "cannot read the schedule"),
        ("warm", "cannot read the schedule"),
        ("", "cannot read the schedule"),
        ("exponential(0.1, 0.5, 1)", "start ≥ floor > 0"),
        ("exponential(1, 0.5, -1)", "rate of at least 0"),
        ("cyclical(10, 20)", "at least one cycle"),
        ("cyclical(10, ratio=0)", r"ratio in \(0, 1\]"),
        ("-1", "at least 0"),
    ],
)
def test_mistakes_are_one_line(text, message):
    with pytest.raises((BadInput, UnknownName), match=message) as caught:
        parse_schedule(text)
    assert "\n" not in str(caught.value)


def test_fit_takes_schedules():
    """With the KL weight at zero for the whole run, the training objective is the reconstruction alone."""
    model = CategoricalVAE(SHAPE, num_latents=3, num_classes=4, hidden=(8,))
    from gumbo.guides import CategoricalGuide

    guide = CategoricalGuide(model)
    seen = []

    class Watched(Exponential):
        def __call__(self, step):
            seen.append((step, super().__call__(step)))
            return seen[-1][1]

    loss = SiteELBO(GumbelSoftmax(Watched(1.0, 0.5, 0.2)), kl_weight=Linear(4))
    fit(model, guide, images(16), loss=loss, epochs=2, batch_size=4, progress=False)
    temperatures = dict(seen)
    assert max(temperatures) == 7  # eight steps were taken
    assert all(value == max(0.5, math.exp(-0.2 * step)) for step, value in temperatures.items())


# --- active units -----------------------------------------------------------------------------------------------------


class Scaled(torch.nn.Module):
    """A model whose prior's scale is a buffer; it keeps the value of each call."""

    def __init__(self):
        super().__init__()
        self.register_buffer("prior_scale", torch.ones(()))
        self.register_buffer("count", torch.zeros((), dtype=torch.long))
        self.decoder_loc = torch.nn.Parameter(torch.zeros(()))
        self.seen = []

    def model(self, x):
        pyro.module("scaled", self)
        self.seen.append(round(self.prior_scale.item(), 6))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(self.decoder_loc, self.prior_scale))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(self, x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x / 2, 0.7))


ANNEALED = {"anneal": {"prior_scale": "linear(4, 1.0, 0.2)"}, "batch_size": 2, "progress": False}


def test_an_annealed_buffer_has_its_schedules_value_in_each_step():
    pair = Scaled()
    fit(pair.model, pair.guide, torch.ones(4), epochs=3, **ANNEALED)
    assert [value for value, _ in itertools.groupby(pair.seen)][-5:] == [1.0, 0.8, 0.6, 0.4, 0.2]
    assert pair.prior_scale.item() == pytest.approx(0.2)


def test_patience_waits_for_the_end_of_annealing():
    pair = Scaled()
    found = fit(pair.model, pair.guide, torch.ones(4), valid=torch.ones(4), epochs=9, patience=1, lr=1e-9, **ANNEALED)
    assert found.history[-1]["step"] >= 6 and found.stopped_early  # an epoch beyond the schedule's end


def test_an_annealed_run_resumes_to_the_same_bits_and_refuses_another_schedule(tmp_path):
    ends = []
    for name, parts in (("whole", (3,)), ("parts", (1, 3))):
        pair = Scaled()
        for epochs in parts:
            options = {"run_dir": tmp_path / name, "resume": epochs != parts[0]}
            fit(pair.model, pair.guide, torch.ones(4), valid=torch.ones(2), epochs=epochs, **ANNEALED, **options)
        ends.append((pair.decoder_loc.item(), pair.prior_scale.item()))
    assert ends[0] == ends[1]
    other = ANNEALED | {"anneal": {"prior_scale": "linear(4, 1.0, 0.3)"}}
    options = {"epochs": 4, "run_dir": tmp_path / "parts", "resume": True}
    with pytest.raises(BadInput, match="another configuration: anneal differ"):
        fit(pair.model, pair.guide, torch.ones(4), valid=torch.ones(2), **other | options)


def test_another_function_of_the_step_is_another_schedule(tmp_path):
    pair = Scaled()

    def run(end, **options):
        anneal = {"prior_scale": lambda step: max(1.0 - step, end)}
        fit(pair.model, pair.guide, torch.ones(4), run_dir=tmp_path, **ANNEALED | {"anneal": anneal} | options)

    run(0.5, epochs=1)
    with pytest.raises(BadInput, match="another configuration: schedules differ"):
        run(0.6, epochs=2, resume=True)
    run(0.5, epochs=2, resume=True)


@pytest.mark.parametrize(
    "anneal, message",
    [
        ({"scale": 1.0}, "no buffer 'scale' of floating-point numbers; theirs: prior_scale"),
        ({"count": 1.0}, "no buffer 'count'"),
        ({"prior_scale": "line(3)"}, "did you mean 'linear'"),
        ({"prior_scale": lambda step: float("nan")}, "is nan at step 0: expected a finite number"),
        (["prior_scale"], "anneal is list: expected a schedule for each buffer"),
    ],
)
def test_what_cannot_be_annealed_is_one_line(anneal, message):
    pair = Scaled()
    with pytest.raises((BadInput, UnknownName), match=message) as caught:
        fit(pair.model, pair.guide, torch.ones(4), epochs=1, **ANNEALED | {"anneal": anneal})
    assert "\n" not in str(caught.value)


def test_active_units_are_those_whose_mean_moves():
    x = torch.randn(2000)

    def guide(x):
        with pyro.plate("data", len(x)):
            # Variances of the means: 1, 0.0225, 0.0036 and 0.
            pyro.sample("z", dist.Normal(x.unsqueeze(-1) * torch.tensor([1.0, 0.15, 0.06, 0.0]), 1.0).to_event(1))

    assert active_units(guide, x)["z"].tolist() == [True, True, False, False]
    assert active_units(guide, x, threshold=0.001)["z"].tolist() == [True, True, True, False]
    assert active_units(guide, x, threshold=0.5)["z"].tolist() == [True, False, False, False]


def test_active_units_take_the_noise_of_draws_off():
    """Without closed-form means, ten draws of a unit of variance 1 scatter by 0.1: ten times the threshold."""

    class NoMean(dist.Normal):
        @property
        def mean(self):
            raise NotImplementedError

    def guide(x):
        with pyro.plate("data", len(x)):
            loc = torch.stack([x, 0 * x], -1)
            pyro.sample("z", NoMean(loc, 1.0).to_event(1))

    found = active_units(guide, torch.randn(4000), num_samples=10)
    assert found["z"].tolist() == [True, False]


def test_active_units_of_guides():
    x = images(30)
    model = GaussianVAE(SHAPE, latent_dim=3, hidden=(8,), likelihood="bernoulli")
    guide = NormalGuide(model)
    with torch.no_grad():
        guide.encoder_heads["z"].weight[1] = 0.0
        guide.encoder_heads["z"].weight[[0, 2]] *= 10
    before = torch.get_rng_state()
    assert active_units(guide, x)["z"].tolist() == [True, False, True]
    assert torch.equal(before, torch.get_rng_state()) and len(pyro.get_param_store()) == 0
    assert active_units(FlowGuide(model, transforms=1, flow_hidden=(8,)), x)["z"].shape == (3,)
    bits = BernoulliVAE(SHAPE, num_latents=5, hidden=(8,))
    assert active_units(BernoulliGuide(bits), x)["z"].shape == (5,)
    deep = HierarchicalVAE(SHAPE, **HierarchicalVAE.variants[0])
    found = active_units(LayeredGuide(deep), x)
    assert {name: tuple(units.shape) for name, units in found.items()} == {n: s.shape for n, s in deep.latents.items()}
    with pytest.raises(BadInput, match="at least two rows"):
        active_units(guide, x[:1])


# --- free bits --------------------------------------------------------------------------------------------------------


def test_free_bits_without_a_floor_are_the_mean_field_bound(param_store):
    model = GaussianVAE(SHAPE, latent_dim=3, hidden=(8,), likelihood="bernoulli", data_size=100)
    guide, x = NormalGuide(model), images()
    torch.manual_seed(1)
    ours = FreeBits(0.0).differentiable_loss(model, guide, x)
    torch.manual_seed(1)
    stock = TraceMeanField_ELBO().differentiable_loss(model, guide, x)
    torch.testing.assert_close(ours, stock)


def formula(floor, model, guide, x, num_particles):
    """Free bits on Pyro's own traces, particle by particle: −Σ log p(x | z) + Σ_j max(N floor, Σ_n KL)."""
    total = 0.0
    for _ in range(num_particles):
        drawn = poutine.trace(guide).get_trace(x)
        trace = prune_subsample_sites(poutine.trace(poutine.replay(model, trace=drawn)).get_trace(x))
        trace.compute_log_prob()
        for name, site in trace.nodes.items():
            if site["type"] == "sample" and site["is_observed"]:
                total = total - site["log_prob_sum"]
            elif site["type"] == "sample":
                kl = torch.distributions.kl_divergence(drawn.nodes[name]["fn"].base_dist, site["fn"].base_dist)
                total = total + site["scale"] * len(x) * kl.mean(0).clamp(min=floor).sum()
    return total / num_particles


@pytest.mark.parametrize("num_particles", [1, 3])
def test_free_bits_are_one_number_as_a_loss_and_as_an_objective(num_particles, param_store):
    model = HierarchicalVAE(SHAPE, **HierarchicalVAE.variants[0], data_size=100)
    guide, x = LayeredGuide(model), images()
    torch.manual_seed(1)
    as_loss = FreeBits(0.2, num_particles=num_particles).loss(model, guide, x)
    bound = FreeBitsBound(0.2)
    torch.manual_seed(1)
    as_objective = SiteELBO(objective=bound, num_particles=num_particles, vectorize_particles=False)(model, guide)(x)
    torch.manual_seed(1)
    exact = formula(0.2, model, guide, x, num_particles)
    assert as_loss == as_objective.item() == pytest.approx(exact.item(), rel=1e-6)
    torch.manual_seed(1)
    assert as_loss > FreeBits(0.0, num_particles=num_particles).loss(model, guide, x)  # the floor is active


class StackedModel(pyro.nn.PyroModule):
    """z around y: its KL depends on the draw of y, and differs from particle to particle."""

    def forward(self, x):
        with pyro.plate("data", len(x)):
            y = pyro.sample("y", dist.Normal(torch.zeros(()), 1.0))
            pyro.sample("z", dist.Normal(y, 1.0))
            pyro.sample("x", dist.Normal(0.0, 1.0), obs=x)


class StackedGuide(pyro.nn.PyroModule):
    def forward(self, x):
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(x, 0.5))
            pyro.sample("z", dist.Normal(x, 1.0))


@pytest.mark.parametrize("vectorize", [True, False])
def test_each_particle_has_a_floor_of_its_own(vectorize, param_store):
    x, floor = torch.tensor([0.1, 0.9]), torch.tensor(0.1)
    loss = SiteELBO(objective=FreeBitsBound(0.1), num_particles=2, vectorize_particles=vectorize)
    loss = loss(StackedModel(), StackedGuide())
    loss(x)  # which checks that particles may run together
    torch.manual_seed(3)
    found = loss(x)
    torch.manual_seed(3)
    if vectorize:
        y = torch.randn(2, 2)
    else:
        y = torch.stack([torch.randn(2, 2)[0] for _ in range(2)])
    y = x + 0.5 * y
    kl_y = (math.log(2.0) + (0.25 + x**2) / 2 - 0.5).mean().clamp(min=floor)
    kl_z = ((x - y) ** 2 / 2).mean(-1).clamp(min=floor).mean()
    assert found.item() == pytest.approx((2 * (kl_y + kl_z) - dist.Normal(0.0, 1.0).log_prob(x).sum()).item(), rel=1e-5)


def test_free_bits_refuse_what_has_no_such_bound(param_store):
    model = GaussianVAE(SHAPE, latent_dim=2, hidden=(8,), likelihood="bernoulli")
    guide, x = NormalGuide(model), images()
    with pytest.raises(UnsupportedSite, match="'rloo': its draws are not reparameterized.*use 'pathwise'"):
        SiteELBO("rloo", objective="free-bits").loss(model, guide, x)
    with pytest.raises(UnsupportedSite, match="'stl': it changes log q"):
        SiteELBO("stl", objective="free-bits").loss(model, guide, x)
    with pytest.raises(BadInput, match="kl_weight is not defined for objective 'free-bits'"):
        SiteELBO(objective="free-bits", kl_weight=0.5)
    with pytest.raises(UnsupportedSite, match="site 'z'.*it is masked"):
        FreeBits(0.1).loss(poutine.mask(model, mask=torch.ones(len(x)) > 0), guide, x)

    def with_factor(x):
        pyro.factor("extra", torch.zeros(()), has_rsample=True)
        return guide(x)

    with pytest.raises(UnsupportedSite, match="site 'extra'"):
        FreeBits(0.1).loss(model, with_factor, x)


def test_a_dimension_below_the_floor_costs_the_floor_and_gets_no_gradient(param_store):
    model = GaussianVAE(SHAPE, latent_dim=2, hidden=(8,), likelihood="bernoulli")
    guide, x = NormalGuide(model, hidden=(8,)), images()
    head = guide.encoder_heads["z"]
    with torch.no_grad():
        model.decoder[0].weight.zero_()  # nothing but the KL depends on z
        head.weight[[0, 2]] = 0.0
        head.bias[[0, 2]] = torch.tensor([0.1, math.log(math.expm1(1.0))])  # KL of about 0.005 nats
        head.bias[1] = 3.0  # KL of about 4.5 nats and more
    torch.manual_seed(1)
    free = FreeBits(0.3).differentiable_loss(model, guide, x)
    gradient = torch.autograd.grad(free, head.bias)[0]
    torch.manual_seed(1)
    plain = FreeBits(0.0).differentiable_loss(model, guide, x)
    assert (free - plain).item() == pytest.approx(20 * (0.3 - 0.005), rel=1e-2)
    assert gradient[0] == gradient[2] == 0 and gradient[1].abs() > 1
    assert torch.autograd.grad(plain, head.bias)[0][0].abs() > 0.5


def test_free_bits_train_in_both_idioms_and_refuse_in_one_line(param_store):
    model = GaussianVAE(SHAPE, latent_dim=2, hidden=(8,), likelihood="bernoulli")
    guide, x = NormalGuide(model), images()
    result = fit(model, guide, x, loss=FreeBits(0.1, num_particles=2), epochs=2, batch_size=10, progress=False)
    assert result.objective_name == "free-bits-elbo"
    before = guide.encoder_heads["z"].weight.clone()
    SVI(model, guide, pyro.optim.Adam({"lr": 1e-2}), loss=FreeBits(0.1)).step(x)
    assert not torch.equal(before, guide.encoder_heads["z"].weight)
    bits = BernoulliVAE(SHAPE, num_latents=5, hidden=(8,))
    with pytest.raises(UnsupportedSite, match="not reparameterized"):
        FreeBits(0.1).loss(bits, BernoulliGuide(bits), x)
    with pytest.raises(UnsupportedSite, match="no closed form"):
        FreeBits(0.1).loss(model, FlowGuide(model, transforms=1, flow_hidden=(8,)), x)
    with pytest.raises(BadInput, match="the floor is -1"):
        FreeBits(-1)
