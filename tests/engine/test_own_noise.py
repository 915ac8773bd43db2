"""Noise that programs draw outside of ``pyro.sample``: further runs repeat it, and the sites downstream draw anew."""

import itertools
import random

import numpy
import pyro
import pyro.distributions as dist
import pytest
import torch
from programs import F64, Params, gradient
from pyro.nn import PyroModule
from torch import nn
from ztest import misses

from gumbo.errors import UnsupportedSite
from gumbo.inference import SiteELBO
from gumbo.inference.auditing.exact import exact_elbo, mean_over_draws
from gumbo.inference.engine import streams
from gumbo.inference.engine.noise import Noise, Tape
from gumbo.inference.engine.streams import Generators, OwnNoise

TORCH = Generators()


class Masked(PyroModule):
    """Features after dropout, from torch's layer or drawn by hand."""

    def __init__(self, source="dropout"):
        super().__init__()
        self.source, self.layer, self.forced = source, nn.Dropout(0.5), None

    def forward(self, x):
        if self.forced is not None:
            return 2 * x * self.forced
        if self.source == "dropout":
            return self.layer(x)
        if self.source == "python":
            coins = torch.tensor([random.random() for _ in x], dtype=x.dtype)
        elif self.source == "numpy":
            coins = torch.as_tensor(numpy.random.rand(len(x)), dtype=x.dtype)
        else:
            coins = torch.rand(x.shape, dtype=x.dtype)
        return 2 * x * (coins < 0.5)


class CoinsGuide(Params):
    """Two layers of coins, both behind masks: z1 | mask, z2 | z1, mask'."""

    def __init__(self, source="dropout"):
        super().__init__(a=[0.9, -0.6], b=0.8, c=-0.7)
        self.first, self.second = Masked(source), Masked(source)

    def forward(self):
        z1 = pyro.sample("z1", dist.Bernoulli(logits=self.first(self.a).sum() + 0.2))
        shift = self.second(self.c.expand(1)).sum()
        pyro.sample("z2", dist.Bernoulli(logits=self.b * (2 * z1 - 1) + shift))


class CoinsModel(Params):
    def __init__(self, source="dropout"):
        super().__init__(w=[0.3, -0.5])
        self.mask = Masked(source)

    def forward(self):
        z1 = pyro.sample("z1", dist.Bernoulli(torch.tensor(0.3, dtype=F64)))
        z2 = pyro.sample("z2", dist.Bernoulli(torch.tensor(0.6, dtype=F64)))
        w = self.mask(self.w)
        x = torch.tensor(0.8, dtype=F64)
        pyro.sample("x", dist.Normal(w[0] * z1 + w[1] * z2 + z1 * z2 * w.sum(), 1.0), obs=x)


def masks(width):
    return [torch.tensor(bits, dtype=F64) for bits in itertools.product([0.0, 1.0], repeat=width)]


def exact_gradient(model, guide, cases=None):
    """The mean over every mask (or the masks of one case) and every value."""
    total = 0.0
    cases = cases or list(itertools.product(masks(2), masks(1), masks(2)))
    layers = [guide.first, guide.second, model.mask]
    for case in cases:
        for layer, mask in zip(layers, case, strict=True):
            layer.forced = mask
        with pyro.get_param_store().scope():
            total = total + gradient(-exact_elbo(model, guide), nn.ModuleList([model, guide]))
    for layer in layers:
        layer.forced = None
    return total / len(cases)


def bound(word, model, guide, **options):
    loss = SiteELBO(word, **options)(model, guide)
    loss.initialize()
    loss.binding.eval()  # statistics stand, the programs' layers stay in training mode
    return lambda: gradient(loss(), nn.ModuleList([model, guide]))


ONE_BY_ONE = pytest.mark.parametrize("options", [{}, {"vectorize_particles": False}], ids=["vectorized", "one by one"])


@pytest.fixture(params=["dropout", "rand", "numpy", "python"])
def given_noise(request, monkeypatch):
    """A pair whose first run of each gradient draws the same masks, and the exact gradient under these masks."""
    monkeypatch.setattr(streams, "_coming_seed", lambda state: 21)
    kept = Generators(others=True)
    with kept.kept():
        model, guide = CoinsModel(request.param), CoinsGuide(request.param)
        with OwnNoise(kept).entered():
            case = [(layer(torch.ones(n, dtype=F64)) > 0).to(F64) for layer, n in ((guide.first, 2), (guide.second, 1))]
            case.append((model.mask(torch.ones(2, dtype=F64)) > 0).to(F64))
        yield model, guide, exact_gradient(model, guide, [case])


@ONE_BY_ONE
@pytest.mark.parametrize("word", ["local-expectation", "measure-valued", "muprop"])
def test_given_its_noise_the_mean_over_every_draw_is_exact(word, options, given_noise):
    model, guide, truth = given_noise
    assert torch.allclose(mean_over_draws(bound(word, model, guide, **options)), truth, atol=1e-10)


def test_given_its_noise_the_sum_over_paths_is_exact(given_noise):
    model, guide, truth = given_noise
    assert torch.allclose(bound("enumerate", model, guide, vectorize_particles=False)(), truth, atol=1e-10)


@ONE_BY_ONE
@pytest.mark.parametrize(
    "word",
    ["arm", "disarm", "rebar", "muprop", "local-expectation", "measure-valued", {"z1": "disarm", "z2": "enumerate"}],
    ids=str,
)
def test_all_runs_of_one_gradient_see_the_same_masks(word, options):
    torch.manual_seed(11)
    model, guide = CoinsModel(), CoinsGuide()
    draw = bound(word, model, guide, **options)
    layers, seen = [guide.first, guide.second, model.mask], set()
    for layer in layers:
        layer.layer.register_forward_hook(
            lambda module, inputs, output, layer=layer: seen.add((layers.index(layer), tuple((output != 0).tolist())))
        )
    found = set()
    for _ in range(12):
        seen.clear()
        draw()
        assert len(seen) == len(layers)
        found |= seen
    assert len(found) > len(layers)  # and the next gradient sees others


@pytest.mark.slow
def test_estimates_under_dropout_average_to_the_mean_over_masks():
    torch.manual_seed(12)
    model, guide = CoinsModel(), CoinsGuide()
    truth = exact_gradient(model, guide)
    draw = bound("disarm", model, guide)
    draws = torch.stack([draw() for _ in range(300)])
    assert not misses(draws, truth, resolves=1.5)


def test_an_upstream_draw_is_scored_under_the_mask_that_made_it():
    model, guide = CoinsModel(), CoinsGuide()
    loss = SiteELBO({"z1": "score", "z2": "enumerate"}, vectorize_particles=False)(model, guide)
    loss.initialize()
    for _ in range(10):
        with pyro.get_param_store().scope():
            ((first, second),) = loss.binding.program().runs((), {})
        assert torch.equal(first.guide_site("z1").log_prob, second.guide_site("z1").log_prob)
        total = first.guide_site("z2").score.exp() + second.guide_site("z2").score.exp()
        assert torch.allclose(total, torch.ones_like(total))


class NormalGuide(Params):
    def __init__(self):
        super().__init__(a=[0.9, -0.6], s=-0.5)
        self.mask = Masked()

    def forward(self):
        z1 = pyro.sample("z1", dist.Normal(self.mask(self.a).sum(), self.s.exp()))
        pyro.sample("z2", dist.Normal(self.mask(self.a)[0] + 0.5 * z1, 1.0))


class NormalModel(Params):
    def __init__(self):
        super().__init__(w=[0.7, -1.1])
        self.mask = Masked()

    def forward(self):
        z1 = pyro.sample("z1", dist.Normal(torch.zeros((), dtype=F64), 1.0))
        z2 = pyro.sample("z2", dist.Normal(0.5 * z1, 1.0))
        w = self.mask(self.w)
        pyro.sample("x", dist.Normal(w[0] * z1 + w[1] * z2, 1.0), obs=torch.tensor(0.8, dtype=F64))


@ONE_BY_ONE
@pytest.mark.parametrize(("word", "objective"), [("stl", "elbo"), ("dreg", "iwae")])
def test_second_runs_score_the_draws_that_were_made(word, objective, options):
    """The value is pathwise's on the same random numbers, and so is the gradient's mean."""
    model, guide = NormalModel(), NormalGuide()
    values, draws = {}, {}
    for name in ("pathwise", word):
        loss = SiteELBO(name, objective=objective, num_particles=2, **options)(model, guide)
        loss.initialize()
        loss.binding.runs_again = True
        torch.manual_seed(3)
        values[name] = [loss().item() for _ in range(5)]
        draws[name] = torch.stack([gradient(loss(), nn.ModuleList([model, guide])) for _ in range(60)])
    assert values[word] == pytest.approx(values["pathwise"], abs=1e-12)
    gap = draws[word] - draws["pathwise"]  # the same random numbers: paired
    assert torch.allclose(gap[:, :2], torch.zeros_like(gap[:, :2]), atol=1e-12)  # the model's
    if word == "stl":
        assert not misses(gap[:, 2:], torch.zeros(3, dtype=F64), resolves=3.0)


def test_sites_downstream_of_a_replaced_draw_do_not_get_the_numbers_that_made_it():
    """Were they handed on, what is drawn downstream would depend on the upstream draw's own noise."""
    seen = []

    def model():
        z = pyro.sample("z", dist.Bernoulli(0.5))
        u = pyro.sample("u", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z * u, 1.0), obs=torch.tensor(0.1))

    class Guide(Params):
        def __init__(self):
            super().__init__(a=0.0)
            self.layer = nn.Dropout(0.5)

        def forward(self):
            self.layer(torch.ones(3))
            pyro.sample("z", dist.Bernoulli(logits=self.a.float()))
            seen.append(pyro.sample("u", dist.Normal(0.0, 1.0)).item())

    torch.manual_seed(5)
    loss = SiteELBO({"z": "disarm", "u": "score"})(model, Guide())
    loss.initialize()
    pairs, firsts = [], []
    for _ in range(250):
        seen.clear()
        loss()
        first, second = seen
        pairs.append(first * second)
        firsts.append(first)
    assert abs(sum(pairs)) / len(pairs) ** 0.5 < 4  # independent standard Normal variables
    assert abs(sum(a * b for a, b in zip(firsts, firsts[1:], strict=False))) / len(firsts) ** 0.5 < 4


@pytest.mark.parametrize("word", ["arm", "local-expectation", "rebar", "rloo", "pathwise"])
def test_programs_without_noise_keep_their_random_numbers(word):
    """Every draw comes from the caller's generator, as it would if nothing were kept apart."""

    class Guide(Params):
        def __init__(self):
            super().__init__(a=0.3)

        def forward(self):
            fn = dist.Normal(self.a, 1.0) if word == "pathwise" else dist.Bernoulli(logits=self.a)
            pyro.sample("z", fn)

    def model():
        fn = dist.Normal(0.0, 1.0) if word == "pathwise" else dist.Bernoulli(torch.tensor(0.5, dtype=F64))
        z = pyro.sample("z", fn)
        pyro.sample("x", dist.Normal(z, 1.0), obs=torch.tensor(0.1))

    found = []
    for apart in (True, False):
        loss = SiteELBO(word)(model, Guide())
        loss.initialize()
        program = loss.binding.program()
        program.generators = TORCH if apart else None
        torch.manual_seed(1)
        with pyro.get_param_store().scope():
            program.runs((), {})
        found.append(torch.rand(()).item())
    assert found[0] == found[1]


def test_noise_is_new_in_each_run_that_is_not_a_repetition():
    torch.manual_seed(2)
    masks = set()
    for _ in range(20):
        noise = OwnNoise(TORCH)
        with noise.entered():
            mask = torch.rand(3)
        assert noise.drew
        with noise.entered():
            with noise.aside():
                torch.rand(1)
            assert torch.equal(mask, torch.rand(3))
        assert noise.fits
        masks.add(tuple(mask.tolist()))
    assert len(masks) == 20


def test_a_tape_repeats_the_noise_of_bodies_and_not_that_of_sites():
    def twice(tape):
        with tape:
            noise = OwnNoise(TORCH)
            with noise.entered():
                first = torch.rand(2)
                with noise.aside():
                    site = torch.randn(2)
            with noise.entered():
                again = torch.rand(2)
                with noise.aside():
                    other = torch.randn(2)
        return first, again, site, other

    tape = Tape()
    first, again, site, other = twice(tape)
    assert torch.equal(first, again) and not torch.equal(site, other)
    noise = Noise(tape.requests)
    noise.draw()
    first, again, site, other = twice(Tape(noise))
    assert torch.equal(first, again) and not torch.equal(site, other)


def test_a_compiled_step_repeats_the_mask():
    from gumbo.inference.engine.rows import Rows
    from gumbo.inference.training.compile.backends import uncompiled
    from gumbo.inference.training.compile.step import CompiledStep

    class Guide(PyroModule):
        def __init__(self):
            super().__init__()
            self.inner, self.layer = nn.Linear(3, 2), nn.Dropout(0.5)

        def forward(self, x):
            with pyro.plate("data", len(x)):
                pyro.sample("z", dist.Bernoulli(logits=self.layer(self.inner(x))).to_event(1))

    class Model(PyroModule):
        def __init__(self):
            super().__init__()
            self.net = nn.Linear(2, 3)

        def forward(self, x):
            with pyro.plate("data", len(x)):
                z = pyro.sample("z", dist.Bernoulli(torch.full((2,), 0.4)).expand([len(x), 2]).to_event(1))
                pyro.sample("x", dist.Normal(self.net(z), 1.0).to_event(1), obs=x)

    torch.manual_seed(4)
    x = torch.randn(4, 3)
    model, guide = Model(), Guide()
    for word in ("disarm",):
        step = CompiledStep(
            model, guide, SiteELBO(word), lambda p: torch.optim.SGD(p.values(), lr=0.0), Rows(x), backend=uncompiled
        )
        loss = step.module

        # Both draw the same noise: the graph's buffers, and a tape's.
        for _ in range(3):
            step.noise.draw()
            expected, _ = step.program.call_and_differentiate(
                step.program.parameters(), step.program.buffers(), [x], Tape(step.noise)
            )
            loss = step.run(*step._inputs(Rows(x)))[0][0]
            assert torch.allclose(loss, expected.loss)
        kinds = [request.kind for request in step.noise.requests]
        # One mask, coins for the draw, and none for the second run of the guide and the model.
        assert kinds == ["uniform"] * 2


def test_a_stream_that_a_handler_puts_in_place_for_a_site_is_drawn_from():
    """As for sites that several processes draw alike."""
    common = torch.Generator().manual_seed(5).get_state()
    noise, drawn = OwnNoise(TORCH), []
    with TORCH.kept():
        for _ in range(2):
            with noise.entered():
                torch.rand(2)
                body = torch.get_rng_state()
                torch.set_rng_state(common)
                with noise.aside():
                    drawn.append(torch.rand(1).item())
                torch.set_rng_state(body)
    assert drawn == [torch.rand(1, generator=torch.Generator().manual_seed(5)).item()] * 2


class Unsteady(Params):
    """A guide whose logits change from run to run, by noise of a generator of its own or by a counter."""

    def __init__(self, source):
        super().__init__(a=0.3)
        self.source, self.runs = source, 0
        self.torch, self.numpy = torch.Generator().manual_seed(5), numpy.random.default_rng(5)
        self.register_buffer("statistic", torch.zeros((), dtype=F64))

    def shift(self):
        self.runs += 1
        if self.source == "torch":
            return torch.randn((), generator=self.torch, dtype=F64)
        if self.source == "numpy":
            return torch.as_tensor(self.numpy.standard_normal(), dtype=F64)
        if self.source == "every second run":
            return torch.tensor(2.0 * (self.runs % 2), dtype=F64)
        if self.source == "every third run":
            return torch.tensor(2.0 * (self.runs % 3 == 0), dtype=F64)
        if self.source == "first run":
            return torch.tensor(2.0 * (self.runs == 1), dtype=F64)
        if self.source == "buffer":
            self.statistic.mul_(0.9).add_(0.5)
            return self.statistic.clone()
        return torch.randn((), dtype=F64)

    def forward(self):
        scale = min(1.0, (1 + self.runs) / 50) if self.source == "scale" else 1.0
        with pyro.poutine.scale(scale=scale):
            pyro.sample("z", dist.Bernoulli(logits=self.a + self.shift()))


def coin_of_one():
    z = pyro.sample("z", dist.Bernoulli(torch.tensor(0.3, dtype=F64)))
    pyro.sample("x", dist.Normal(2 * z, 1.0), obs=torch.tensor(1.5, dtype=F64))


@pytest.mark.parametrize("source", ["torch", "numpy", "every second run", "every third run"])
@pytest.mark.parametrize("word", ["arm", "disarm", "local-expectation", "measure-valued"])
def test_a_guide_that_no_second_run_repeats_is_refused_where_it_runs_again(word, source):
    loss = SiteELBO(word)(coin_of_one, Unsteady(source))
    for _ in range(2):
        with pytest.raises(UnsupportedSite, match="in a second run at the same draws") as refused:
            loss()
        assert "\n" not in str(refused.value)
    assert SiteELBO("score")(coin_of_one, Unsteady(source))().isfinite()


@pytest.mark.parametrize("source", ["global", "first run", "buffer", "scale"])
def test_global_noise_running_statistics_and_schedules_are_no_reason_to_refuse(source):
    assert SiteELBO("local-expectation")(coin_of_one, Unsteady(source))().isfinite()
