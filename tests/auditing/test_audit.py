"""The audit: right estimators pass it at the stated rate, wrong ones do not, and it leaves no trace."""

from __future__ import annotations

import math
import sys

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from matplotlib.text import Text
from programs import DISCRETE, F64, Params, X

from gumbo.errors import BadInput, GumboWarning, UnknownName
from gumbo.experiments.audit import main
from gumbo.inference import SiteELBO, audit, plot_audit, recommend
from gumbo.inference.auditing.bias import compare, holm
from gumbo.inference.auditing.directions import Directions
from gumbo.inference.auditing.moments import Moments
from gumbo.inference.auditing.plot import pareto_front
from gumbo.inference.auditing.recommendation import _reason
from gumbo.inference.auditing.reference import Reference
from gumbo.inference.auditing.sampler import _Stopwatch
from gumbo.inference.estimators import Baseline, GumbelSoftmax, LeaveOneOut, Pathwise, ScoreFunction
from gumbo.inference.objectives.evidence import EvidenceLowerBound
from gumbo.inference.objectives.importance import ImportanceWeightedBound

QUICK = {"num_samples": 150, "burn_in": 20}


def run(name, *words, **options):
    case = DISCRETE[name]
    options = QUICK | {"vectorize_particles": not case.branches} | options
    return audit(*case.make(), estimators=words[0] if isinstance(words[0], dict) else list(words), **options)


def verdicts(report):
    return {str(label): str(said) for label, said in zip(report.estimator.values, report.verdict.values, strict=True)}


# The test itself.


def moments_of(draws):
    """Moments of ``draws``, ``(n, elements)``, as of one parameter called p."""
    found = Moments({"p": draws[0]})
    for draw in draws:
        found.add({"p": draw})
    return found


def exact(mean, elements):
    return Reference("exact", {"p": torch.full((elements,), mean, dtype=F64)}, 0.0)


SAMPLERS = {
    "normal": (lambda *shape: torch.randn(*shape, dtype=F64) + 0.3, 0.3),
    "skewed": (lambda *shape: torch.empty(*shape, dtype=F64).exponential_(), 1.0),
    "heavy": (lambda *shape: torch.randn(*shape, dtype=F64).exp(), math.exp(0.5)),
    "one draw in a hundred": (lambda *shape: (torch.rand(*shape, dtype=F64) < 0.01).to(F64), 0.01),
    "seldom met at all": (lambda *shape: (torch.rand(*shape, dtype=F64) < 0.0005).to(F64), 0.0005),
}


@pytest.mark.parametrize("name", SAMPLERS)
def test_p_values_of_true_means_are_not_too_small(name):
    sample, mean = SAMPLERS[name]
    elements = 40_000
    p = compare(moments_of(sample(300, elements)), exact(mean, elements))["p"].p_value
    assert not p.isnan().any()
    # Three standard errors of a count above twice the rate: what skewness is left costs less than that.
    for rate in (1e-2, 1e-3, 1e-4):
        assert (p < rate).sum() <= 2 * rate * elements + 3 * math.sqrt(2 * rate * elements)
    assert (p < 1e-8).sum() == 0


@pytest.mark.parametrize("name", ["normal", "skewed", "heavy"])
def test_p_values_of_false_means_are_small(name):
    sample, mean = SAMPLERS[name]
    draws = sample(1000, 200)
    off = 8 * draws.std() / math.sqrt(1000)
    p = compare(moments_of(draws), exact(mean + float(off), 200))["p"].p_value
    assert (p < 1e-3).float().mean() > 0.9


def test_elements_that_never_move():
    still = torch.tensor([1.0, 0.0, 0.0], dtype=F64).expand(200, 3)
    p = compare(moments_of(still), exact(0.0, 3))["p"].p_value
    assert p.tolist() == [0.0, 1.0, 1.0]
    # Where others move, an offset may be owed to a draw that has not been met; a large one cannot.
    draws = torch.cat([torch.randn(200, 1, dtype=F64), torch.zeros(200, 2, dtype=F64)], 1)
    truth = Reference("exact", {"p": torch.tensor([0.0, 0.005, 0.5], dtype=F64)}, 0.0)
    p = compare(moments_of(draws), truth)["p"].p_value
    assert p[1] > 0.05 and p[2] < 1e-3


def test_rounding_is_no_bias():
    draws = torch.full((50, 1), 1.0)
    found = Moments({"p": draws[0]})
    for draw in draws:
        found.add({"p": draw.double()}, loss=100.0)
    assert compare(found, exact(1.0 + 1e-6, 1))["p"].p_value.item() == 1.0
    assert compare(found, exact(1.01, 1))["p"].p_value.item() == 0.0


def test_the_error_of_a_long_run_counts():
    draws = torch.randn(200, 5_000, dtype=F64)
    run_long = moments_of(torch.randn(200, 5_000, dtype=F64))
    truth = Reference("long run", {"p": run_long.central()["p"].mean}, 0.0, run_long)
    p = compare(moments_of(draws), truth)["p"].p_value
    assert abs((p < 0.05).double().mean() - 0.05) < 0.015
    pretended = Reference("exact", truth.gradient, 0.0)
    assert (compare(moments_of(draws), pretended)["p"].p_value < 0.05).double().mean() > 0.1


def relu_gradients(count, units, generator):
    """Gradients of a layer whose units are seldom on, ``(count, units)``, and their exact mean."""
    slope = torch.randn(units, dtype=F64, generator=generator)
    bias = -2.5 * torch.rand(units, dtype=F64, generator=generator)
    z, error = torch.randn(2, count, 1, dtype=F64, generator=generator)
    grid = torch.linspace(-8, 8, 4001, dtype=F64)[:, None]
    weights = (-(grid**2) / 2).exp() / (-(grid**2) / 2).exp().sum()
    mean = (weights * (slope * grid + bias).relu()).sum(0)
    return (slope * z + bias).relu() * (1 + error), mean


@pytest.mark.parametrize("count", [20, 50, 100])
def test_gradients_that_are_seldom_nonzero_convict_nobody(count):
    generator = torch.Generator().manual_seed(count)
    convicted, layers, families = 0, 2, 100
    for _ in range(families):
        p_values = []
        for _ in range(layers):
            draws, mean = relu_gradients(count, 64, generator)
            p_values.append(compare(moments_of(draws), Reference("exact", {"p": mean}, 0.0))["p"].p_value)
        convicted += bool((holm(torch.cat(p_values)) < 0.05).any())
    # Binomial(100, 0.05) exceeds 11 with probability 0.004.
    assert convicted <= 11


def test_a_bias_too_thin_for_single_elements_shows_along_directions():
    truth = {"p": torch.full((2000,), 0.03, dtype=F64)}
    directions = Directions(truth)
    found = {}
    for name, factor in (("right", 1.0), ("half", 0.5)):
        moments = Moments({"p": truth["p"]}, directions)
        for _ in range(400):
            moments.add({"p": torch.randn(2000, dtype=F64) + factor * truth["p"]})
        found[name] = compare(moments, Reference("exact", truth, 0.0, directions=directions))
    assert holm(found["half"]["p"].p_value).min() > 0.05
    assert found["half"]["p (directions)"].p_value[0] < 1e-6 and found["half"]["(gradient)"].p_value.item() < 1e-6
    for name in ("p (directions)", "(gradient)"):
        assert holm(found["right"][name].p_value).min() > 0.05


def test_holm():
    assert holm(torch.tensor([0.5, 0.004, 0.02], dtype=F64)).tolist() == [0.5, 0.012, 0.04]


def test_moments_are_those_of_the_draws():
    draws = torch.randn(50, 3, dtype=F64).exp() + 100.0
    found = moments_of(draws).central()["p"]
    centred = draws - draws.mean(0)
    for power, value in ((3, found.third), (4, found.fourth)):
        assert torch.allclose(value, (centred**power).mean(0), rtol=1e-10)
    assert torch.allclose(found.mean, draws.mean(0)) and torch.allclose(found.variance, draws.var(0), rtol=1e-10)


# Right estimators.


@pytest.mark.slow
def test_right_estimators_are_flagged_no_oftener_than_stated():
    reports = [run("one coin", "score", "rloo", num_samples=40, burn_in=0, seed=seed, alpha=0.2) for seed in range(25)]
    # Binomial(25, 0.2) exceeds 11 with probability 0.002.
    assert sum(bool(report.any_flagged.any()) for report in reports) <= 11
    assert min(report.p_value.min().item() for report in reports) < 1.0


@pytest.mark.parametrize("name", ["plate then global", "masked event", "control flow"])
def test_right_estimators_pass(name):
    report = run(name, "score", "score-average", "rloo", "enumerate")
    assert set(verdicts(report).values()) == {"ok"}
    assert report.attrs["reference_is_exact"] and report.sel(estimator="enumerate").total_variance == 0.0
    assert not report.bias.isnull().any() and not report.p_value.isnull().any()


def test_numbers_are_those_of_the_gradient():
    report = run("one coin", "score", num_samples=800).sel(estimator="score", parameter="guide.a")
    q = torch.sigmoid(torch.tensor(0.4, dtype=F64))

    def cost(z):
        z = torch.tensor(z, dtype=F64)
        log_p = dist.Bernoulli(logits=torch.tensor(-0.3, dtype=F64)).log_prob(z)
        log_p = log_p + dist.Normal(0.7 * z, 1.0).log_prob(X[0])
        return dist.Bernoulli(q).log_prob(z) - log_p

    on, off = cost(1.0) * (1 - q), -cost(0.0) * q
    mean = (q * on + (1 - q) * off).item()
    variance = (q * on**2 + (1 - q) * off**2).item() - mean**2
    assert report.worst_reference.item() == pytest.approx(mean, abs=1e-12)
    assert report.variance.item() == pytest.approx(variance, rel=0.1)
    assert report.bias_error.item() == pytest.approx(math.sqrt(variance / 800), rel=0.1)
    assert report.signal_to_noise.item() == pytest.approx(abs(mean) / variance**0.5, rel=0.1)


class SeldomOn(pyro.nn.PyroModule):
    """A decoder whose ReLU units are off at most draws."""

    def __init__(self):
        super().__init__()
        self.hidden, self.out = torch.nn.Linear(2, 24), torch.nn.Linear(24, 3)
        with torch.no_grad():
            self.hidden.weight.normal_()
            self.hidden.bias.fill_(-2.5)

    def forward(self, x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            loc = self.out(self.hidden(z).relu())
            pyro.sample("x", dist.Normal(loc, 1.0).to_event(1), obs=x)


class LinearGuide(pyro.nn.PyroModule):
    def __init__(self):
        super().__init__()
        self.encoder = torch.nn.Linear(3, 4)

    def forward(self, x):
        loc, log_scale = self.encoder(x).chunk(2, -1)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(loc, log_scale.exp()).to_event(1))


@pytest.mark.parametrize("num_samples", [20, pytest.param(50, marks=pytest.mark.slow)])
def test_sparse_gradients_of_a_right_estimator_pass_at_few_draws(num_samples):
    for seed in range(3):
        torch.manual_seed(seed)
        report = audit(
            SeldomOn(), LinearGuide(), torch.randn(4, 3), estimators=["pathwise"], num_samples=num_samples,
            burn_in=0, seed=seed,
        )  # fmt: skip
        assert not report.any_flagged.any(), verdicts(report)


def test_too_few_gradients_give_no_verdict():
    report = run("plate", "score", "rloo", "enumerate", num_samples=10, burn_in=0, num_particles=2, alpha=1e-12)
    said = verdicts(report)
    assert said["score"].startswith("cannot say: at 10 gradients") and "draw about" in said["score"]
    assert said["enumerate"] == "ok" and report.detectable_bias.sel(estimator="enumerate") < 1e-3
    label, reason = recommend(report.sel(estimator=["score"]))
    assert label == "score" and "too few gradients" in reason
    assert recommend(report)[0] == "enumerate"


# Wrong estimators.


class SelfIncluded(Baseline):
    """The mean over all particles, the one at hand included: a factor (K − 1)/K too small."""

    min_particles = 2

    def __call__(self, view):
        return view.cost.mean(view.particle_dim, keepdim=True)


class Flipped(ScoreFunction):
    def surrogate(self, view):
        return -super().surrogate(view)


class HalfMissing(ScoreFunction):
    """Forgets every second element of a plate."""

    def surrogate(self, view):
        kept = torch.arange(view.log_prob.shape[-1]) % 2 == 0
        return super().surrogate(view) * kept


class Stretched(SiteELBO):
    """Without variance, and a hundredth too long."""

    def differentiable_loss(self, *args, **kwargs):
        return 1.01 * super().differentiable_loss(*args, **kwargs)


WRONG = {
    "self-included": ScoreFunction(baseline=SelfIncluded()),
    "flipped": Flipped(LeaveOneOut()),
    "half missing": HalfMissing(LeaveOneOut()),
    "stretched": Stretched("enumerate"),
}


def test_estimators_that_are_wrong_on_purpose_are_flagged():
    said = verdicts(run("plate", WRONG | {"right": "rloo"}, num_samples=300))
    assert said.pop("right") == "ok"
    assert all(words.startswith("flagged: declared unbiased") for words in said.values()), said


@pytest.mark.parametrize(
    ("name", "words"), [("control flow", ["trace-graph"]), ("plate then global", ["trace", "trace-enum"])]
)
def test_stock_estimators_are_flagged_where_they_are_biased(name, words):
    report = run(name, *words, "score-average", num_samples=200)
    said = verdicts(report)
    assert said.pop("score-average") == "ok"
    assert all(verdict.startswith("flagged") for verdict in said.values()), said
    if name == "control flow":
        assert report.max_z.sel(estimator="trace-graph") > 10
    else:
        assert "invalid dependency" in report.warnings.sel(estimator="trace-enum").item()


def test_relaxed_estimators_are_held_against_the_discrete_gradient():
    report = run("one coin", "gumbel-softmax", "concrete", "rloo", num_samples=400)
    assert verdicts(report) == {"gumbel-softmax": "biased", "concrete": "biased", "rloo": "ok"}
    assert (report.relative_bias.sel(estimator=["gumbel-softmax", "concrete"]) > 0.1).all()
    label, reason = recommend(report)
    assert label == "rloo" and "gumbel-softmax" in reason and "%" in reason


# References.


class NormalGuide(Params):
    def __init__(self):
        super().__init__(loc=0.5, log_scale=-0.4)

    def forward(self):
        pyro.sample("z", dist.Normal(self.loc, self.log_scale.exp()))


def normal_model():
    z = pyro.sample("z", dist.Normal(torch.zeros((), dtype=F64), 1.0))
    pyro.sample("x", dist.Normal(z, 1.0), obs=X[1])


class FlippedPath(Pathwise):
    def draw(self, fn, step, args=(), kwargs=None):
        made = super().draw(fn, step, args, kwargs)
        made.value = 2 * made.value.detach() - made.value
        return made


def test_a_long_run_stands_in_where_nothing_can_be_listed():
    estimators = {"pathwise": "pathwise", "score": "score", "stl": "stl", "flipped": FlippedPath()}
    report = audit(normal_model, NormalGuide(), estimators=estimators, **QUICK)
    assert report.attrs["reference"].startswith("long run of 300 draws") and not report.attrs["reference_is_exact"]
    said = verdicts(report)
    assert said.pop("flipped").startswith("flagged") and set(said.values()) == {"ok"}
    scale = math.exp(-0.4)
    truth = {"guide.loc": 2 * 0.5 + 0.8, "guide.log_scale": 2 * scale**2 - 1}
    for name, value in truth.items():
        found = report.worst_reference.sel(estimator="pathwise", parameter=name).item()
        assert abs(found - value) < 5 * report.reference_error.sel(parameter=name).item()


def test_the_reference_can_be_named():
    report = run("one coin", "score", reference="rloo")
    assert "rloo" in report.attrs["reference"] and verdicts(report) == {"score": "ok"}
    with pytest.raises(BadInput, match="long-run"):
        audit(normal_model, NormalGuide(), estimators=["score"], reference="exact", **QUICK)


def test_programs_with_noise_of_their_own_have_no_exact_gradient():
    def model():
        z = pyro.sample("z", dist.Bernoulli(torch.tensor(0.5, dtype=F64)))
        noise = torch.randn((), dtype=F64)
        pyro.sample("x", dist.Normal(noise * z, 1.0), obs=X[0])

    guide = DISCRETE["one coin"].guide()
    report = audit(model, guide, estimators=["rloo"], vectorize_particles=False, **QUICK)
    assert not report.attrs["reference_is_exact"] and verdicts(report) == {"rloo": "ok"}


def test_many_values_are_listed_with_plates_in_parallel():
    class Guide(Params):
        def __init__(self):
            super().__init__(a=[0.1 * i - 0.5 for i in range(12)])

        def forward(self):
            with pyro.plate("data", 12):
                pyro.sample("z", dist.Bernoulli(logits=self.a))

    def model():
        with pyro.plate("data", 12):
            z = pyro.sample("z", dist.Bernoulli(torch.tensor(0.5, dtype=F64)))
            pyro.sample("x", dist.Normal(z, 1.0), obs=torch.zeros(12, dtype=F64))

    report = audit(model, Guide(), estimators=["rloo"], kl_weight=0.5, **QUICK)
    assert report.attrs["reference"] == "exact (every value, plates in parallel)" and verdicts(report) == {"rloo": "ok"}


def test_a_weighted_elbo_is_held_against_its_own_gradient():
    report = run("chain", "score-average", SiteELBO("rloo"), "trace", kl_weight=0.3)
    said = list(verdicts(report).values())
    assert said[0] == "ok" and said[1].startswith("refused") and said[2].startswith("refused")


def test_subsampled_rows_are_held():
    class Guide(Params):
        def __init__(self):
            super().__init__(a=[0.4, -0.7, 0.2, 1.0])

        def forward(self):
            with pyro.plate("data", 4, subsample_size=2) as rows:
                pyro.sample("z", dist.Bernoulli(logits=self.a[rows]))

    def model():
        with pyro.plate("data", 4, subsample_size=2) as rows:
            z = pyro.sample("z", dist.Bernoulli(torch.tensor(0.3, dtype=F64)))
            pyro.sample("x", dist.Normal(z, 1.0), obs=torch.arange(4, dtype=F64)[rows])

    report = audit(model, Guide(), estimators=["rloo", "trace"], **QUICK)
    assert report.attrs["reference_is_exact"] and verdicts(report) == {"rloo": "ok", "trace": "ok"}


@pytest.mark.parametrize("name", ["chain", "plate"])
def test_the_importance_weighted_bound(name):
    said = verdicts(
        run(name, {"rloo": "rloo", "score": "score", "flipped": Flipped(), "trace": "trace"}, objective="iwae",
            num_particles=2, num_samples=150)
    )  # fmt: skip
    assert said["rloo"] == said["score"] == "ok"
    assert said["flipped"].startswith("flagged") and said["trace"].startswith("refused")


def test_the_exact_bound_of_a_plate_is_that_of_its_elements():
    class Half(Params):
        def __init__(self, row):
            super().__init__(a=[0.4, -0.7][row])
            self.row = row

        def forward(self):
            pyro.sample("z", dist.Bernoulli(logits=self.a))

        def model(self):
            z = pyro.sample("z", dist.Bernoulli(logits=torch.tensor(-0.3, dtype=F64)))
            pyro.sample("x", dist.Normal(0.7 * z, 1.0), obs=X[self.row])

    options = {"objective": "iwae", "num_particles": 3, "num_samples": 10, "estimators": ["rloo"], "burn_in": 0}
    whole = audit(*DISCRETE["plate"].make(), **options)
    halves = [audit(half.model, half, **options) for half in (Half(0), Half(1))]
    norms = [half.reference_norm.sel(parameter="guide.a").item() for half in halves]
    assert whole.reference_norm.sel(parameter="guide.a").item() == pytest.approx(math.hypot(*norms), abs=1e-12)
    assert whole.attrs["reference_loss"] == pytest.approx(sum(half.attrs["reference_loss"] for half in halves))


@pytest.mark.slow
def test_a_value_of_ones_own_is_not_held_against_the_bound_that_it_inherits():
    class HalvedBound(ImportanceWeightedBound):
        name = "halved-iwae"

        def accepts(self, estimator):
            return "iwae" in estimator.objectives

        def value(self, recorded):
            return super().value(recorded) / 2

    options = {"num_particles": 2, "num_samples": 400, "burn_in": 0}
    found = run("one coin", {"rloo": "rloo", "score": "score"}, objective=HalvedBound(), **options)
    assert not found.attrs["reference_is_exact"]


@pytest.mark.slow
def test_an_objective_of_somebodys_own_is_held_against_a_long_run():
    class Halved(EvidenceLowerBound):
        name = "halved"

        def accepts(self, estimator):
            return super().accepts(estimator) or "elbo" in estimator.objectives

        def value(self, recorded):
            return super().value(recorded) / 2

    words = {"rloo": "rloo", "score": "score", "flipped": Flipped()}
    whole, half = run("one coin", words), run("one coin", words, objective=Halved(), num_samples=400)
    assert whole.attrs["reference_is_exact"] and not half.attrs["reference_is_exact"]
    assert half.attrs["objective"] == "halved" and set(half.objective_name.values) == {"halved"}
    error = half.attrs["reference_total_error"]
    assert 0 < error < 0.1 * whole.attrs["reference_total_norm"]
    assert half.attrs["reference_total_norm"] == pytest.approx(whole.attrs["reference_total_norm"] / 2, abs=4 * error)
    said = verdicts(half)
    assert said["rloo"] == said["score"] == "ok" and said["flipped"].startswith("flagged")
    with pytest.raises(BadInput, match="'halved' has no exact gradient by enumeration"):
        run("one coin", words, objective=Halved(), reference="exact")


@pytest.mark.slow
def test_programs_that_take_no_particles_at_once_are_audited_one_by_one_and_it_is_said_once():
    matrix = torch.tensor([[0.3, -1.0], [1.2, 0.4], [0.1, 0.8]], dtype=F64)

    class Guide(Params):
        def __init__(self):
            super().__init__(loc=0.4)

        def forward(self):
            pyro.sample("w", dist.Normal(self.loc.expand(2), 1.0).to_event(1))

    def model():
        w = pyro.sample("w", dist.Normal(torch.zeros(2, dtype=F64), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(matrix @ w, 1.0).to_event(1), obs=torch.ones(3, dtype=F64))

    words = ["pathwise", "stl", "trace"]
    with pytest.warns(GumboWarning, match="particles are run one by one .*; here for pathwise, stl$") as caught:
        report = audit(model, Guide(), estimators=words, num_particles=2, **QUICK)
    assert len(caught) == 1 and caught[0].filename == __file__
    assert verdicts(report) == dict.fromkeys(words, "ok")
    for options in ({"num_particles": 1}, {"num_particles": 2, "vectorize_particles": False}):
        audit(model, Guide(), estimators=["pathwise", "trace"], **QUICK | {"num_samples": 20} | options)
    refused = audit(model, Guide(), estimators=["pathwise"], num_particles=2, vectorize_particles=True, **QUICK)
    assert verdicts(refused)["pathwise"].startswith("refused")


# What can be audited, and what is refused.


def function_model(x):
    z = pyro.sample("z", dist.Bernoulli(pyro.param("p", torch.tensor(0.3), constraint=dist.constraints.unit_interval)))
    pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def function_guide(x):
    pyro.sample("z", dist.Bernoulli(logits=pyro.param("a", torch.tensor(0.4))))


def test_functions_with_params(param_store):
    report = audit(function_model, function_guide, X[0].float(), estimators=["rloo", "trace-graph"], **QUICK)
    assert verdicts(report) == {"rloo": "ok", "trace-graph": "ok"}
    assert set(report.parameter.values) == {"guide.a", "model.p"} and not list(param_store)
    assert dict(zip(report.parameter.values, report.sites.values, strict=True)) == {"guide.a": "z", "model.p": "z"}
    # Values that the store already holds are those that are judged.
    fresh = report.reference_norm.sel(parameter="guide.a").item()
    held = pyro.param("a", torch.tensor(2.0))
    again = audit(function_model, function_guide, x=X[0].float(), estimators="rloo", **QUICK)
    assert abs(again.reference_norm.sel(parameter="guide.a").item() - fresh) > 0.01
    assert list(param_store) == ["a"] and held.grad is None and held.item() == 2.0


def test_parameters_are_attributed_to_sites():
    report = run("dice", "rloo", num_samples=10)
    assert dict(zip(report.parameter.values, report.sites.values, strict=True)) == {
        "model.w": "x",
        "guide.a": "y",
        "guide.b": "c",
    }
    assert set(report.groupby("sites").sum().sites.values) == {"x", "y", "c"}
    assert report.size.values.tolist() == [3, 3, 6]


def test_refusals_are_rows():
    report = run("plate", "pathwise", "rloo", "score", num_particles=1)
    said = verdicts(report)
    assert said["pathwise"] == "refused: site 'z': Bernoulli has no reparameterized sampler (rsample)"
    assert said["rloo"].startswith("refused: ") and "num_particles" in said["rloo"] and said["score"] == "ok"
    assert (
        report.total_variance.sel(estimator="pathwise").isnull() and not report.flagged.sel(estimator="pathwise").any()
    )
    assert recommend(report)[0] == "score"
    assert recommend(run("plate", "pathwise", "trace-meanfield"))[0] is None


@pytest.mark.parametrize(
    ("module", "said"), [("gumbo.x", "failed: NotImplementedError: not yet"), ("x", "refused: not yet")]
)
def test_a_fault_of_our_own_is_no_refusal(module, said):
    class Broken(ScoreFunction):
        pass

    exec("def surrogate(self, view):\n    raise NotImplementedError('not yet')", names := {"__name__": module})
    Broken.surrogate = names["surrogate"]
    assert verdicts(run("one coin", {"broken": Broken(), "score": "score"}, num_samples=50))["broken"] == said


def test_gradients_that_are_not_finite_are_told():
    class Broken(ScoreFunction):
        def surrogate(self, view):
            return super().surrogate(view) * math.inf

    said = verdicts(run("one coin", {"broken": Broken(), "score": "score"}, num_samples=50))
    assert said == {"broken": "failed: 50 of 50 gradients are not finite", "score": "ok"}


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"estimators": ["rlo0"]}, UnknownName, "rloo"),
        ({"estimators": []}, BadInput, "empty"),
        ({"estimators": ["rloo", "rloo"]}, BadInput, "twice"),
        ({"estimators": ["rloo"], "num_samples": 3}, BadInput, "num_samples"),
        ({"estimators": ["rloo"], "alpha": 0.0}, BadInput, "alpha"),
        ({"estimators": ["rloo"], "objective": "iwae"}, BadInput, "num_particles"),
        ({"estimators": ["rloo"], "objective": "rws"}, BadInput, "takes no estimator"),
        ({"estimators": ["rloo"], "objective": "evidence"}, UnknownName, "objective"),
        ({"estimators": ["rloo"], "kl_weight": lambda step: 1.0}, BadInput, "kl_weight.*expected a finite number"),
    ],
)
def test_mistakes_are_one_line(options, error, words):
    with pytest.raises(error, match=words) as caught:
        audit(*DISCRETE["one coin"].make(), **options)
    assert "\n" not in str(caught.value)


def test_a_word_outranks_the_marks_of_sites():
    class Marked(Params):
        def __init__(self):
            super().__init__(a=0.4)

        def forward(self):
            pyro.sample("z", dist.Bernoulli(logits=self.a), infer={"estimator": "gumbel-softmax"})

    model = DISCRETE["one coin"].model()
    report = audit(model, Marked(), estimators={"word": "rloo", "marks": {}}, **QUICK)
    assert report.unbiased.values.tolist() == [True, False]
    report = run("chain", {"mixed": {"z1": "rloo", "z2": GumbelSoftmax()}})
    assert report.unbiased.values.tolist() == [False]


def test_nothing_is_left_behind():
    class Guide(Params):
        def __init__(self):
            super().__init__(a=[0.4, -0.7])
            self.norm = torch.nn.BatchNorm1d(1, affine=False).double()

        def forward(self):
            self.norm(torch.randn(4, 1, dtype=F64))
            with pyro.plate("data", 2):
                pyro.sample("z", dist.Bernoulli(logits=self.a))

    model, guide = DISCRETE["plate"].model(), Guide()
    guide.a.grad = torch.tensor([1.0, 2.0], dtype=F64)
    model.eval()
    before = {name: value.clone() for name, value in guide.state_dict().items()}
    stream = torch.get_rng_state()
    loss = SiteELBO("score-average")
    audit(
        model,
        guide,
        estimators={"a": loss, "b": "trace-graph+baseline", "c": "nvil", "d": "pathwise"},
        num_samples=20,
        burn_in=5,
    )
    assert torch.equal(torch.get_rng_state(), stream)
    assert guide.training and guide.norm.training and not model.training
    assert guide.a.grad.tolist() == [1.0, 2.0] and model.w.grad is None
    assert all(torch.equal(value, before[name]) for name, value in guide.state_dict().items())
    assert not loss._bindings


def test_the_same_seed_gives_the_same_numbers_whatever_stands_beside():
    alone = run("chain", "rloo", seed=3).sel(estimator="rloo")
    beside = run("chain", "score-average", "rloo", seed=3).sel(estimator="rloo")
    assert alone.variance.values.tolist() == beside.variance.values.tolist()
    assert alone.bias.values.tolist() == beside.bias.values.tolist()


def test_the_dataset_is_stored_and_drawn(tmp_path):
    import xarray

    report = run("plate", "rloo", "enumerate", "gumbel-softmax", "trace", "pathwise")
    report.to_netcdf(tmp_path / "audit.nc", engine="h5netcdf")
    with xarray.open_dataset(tmp_path / "audit.nc", engine="h5netcdf") as again:
        assert again.verdict.values.tolist() == report.verdict.values.tolist()
        assert again.attrs["reference"] == "exact (every value)" and again.attrs["seed"] == 0
    plot_audit(report, tmp_path / "audit.png")
    assert (tmp_path / "audit.png").stat().st_size > 10_000
    made = plot_audit(report)
    said = [text.get_text() for legend in made.legends for text in legend.get_texts()]
    assert len(said) == len(set(said)) and not any(axis.get_legend() for axis in made.axes)
    long = report.assign_attrs(
        reference="long run of 1200 draws of SiteELBO({'z': 'pathwise'}, objective='elbo', num_particles=16)"
    )
    assert "…" not in plot_audit(long).get_suptitle()
    width, height = plot_audit(report, narrow=True).get_size_inches()
    assert width < 5 < height
    label, reason = recommend(report)
    assert label == "enumerate" and "no variance" in reason
    assert report.evaluations.sel(estimator=["rloo", "enumerate", "trace"]).values.tolist() == [2.0, 2.0, 1.0]


def test_names_in_the_picture_cover_no_other_name_and_no_point():
    import xarray

    close = np.linspace(1.0, 1.2, 12)  # a dozen points that touch each other, and two far away
    numbers = {
        "seconds": np.array([*close, 4.0, 1.0]) / 1e3,
        "total_variance": np.array([*(1e3 * close**2), 1e3, 1e-2]),
        "total_bias": np.zeros(14),
        "total_bias_error": np.ones(14),
        "verdict": ["ok", "biased"] * 7,
    }
    names = [f"estimator-{number}" for number in range(14)]
    report = xarray.Dataset(
        {name: ("estimator", values) for name, values in numbers.items()},
        coords={"estimator": names},
        attrs={"reference_total_norm": 1.0},
    )
    axis = plot_audit(report).axes[1]
    axis.figure.draw_without_rendering()
    boxes = [Text.get_window_extent(text) for text in axis.texts]
    assert sorted(text.get_text() for text in axis.texts) == sorted(names)
    for number, box in enumerate(boxes):
        inner = box.padded(-2)
        assert not any(inner.overlaps(other.padded(-2)) for other in boxes[:number])
        points = axis.transData.transform(np.column_stack([1e3 * numbers["seconds"], numbers["total_variance"]]))
        assert not any(inner.contains(*point) for point in points)


def test_a_report_shows_its_table():
    import xarray

    report = run("plate", "rloo", "gumbel-softmax", "trace-graph+baseline", "pathwise", num_samples=40)
    assert isinstance(report, xarray.Dataset)
    lines = repr(report).splitlines()
    assert max(map(len, lines)) <= 80 and len(lines) < 25
    rows = [line.split()[:2] for line in lines]
    assert not any("…" in line for line in lines)
    assert ["rloo", "ok"] in rows and ["trace-graph+baseline", "ok"] in rows
    assert any(line.startswith("pathwise: refused: site 'z'") for line in lines)
    assert any(line.startswith(f"recommended: {recommend(report)[0]}") for line in lines)
    share = report.detectable_bias.sel(estimator="rloo").item()
    assert share > 0.01 and any(line.startswith("rloo") and f" ≥ {share:.1%} " in line for line in lines)
    assert any(line.startswith("ok is not exact: ") for line in lines)
    # What is no whole audit shows as any dataset does.
    assert "<xarray." in repr(report.sel(estimator="rloo")) and "<xarray." in repr(report[["bias"]])


# The verb.


def test_the_verb_on_a_users_programs(tmp_path, monkeypatch, capsys):
    import xarray

    (tmp_path / "coins_of_a_user.py").write_text(
        "import pyro, torch, pyro.distributions as dist\n"
        "def model(x):\n"
        "    z = pyro.sample('z', dist.Bernoulli(torch.tensor(0.3)))\n"
        "    pyro.sample('x', dist.Normal(1.0 if z > 0.5 else -1.0, 1.0), obs=x)\n"
        "def guide(x):\n"
        "    pyro.sample('z', dist.Bernoulli(logits=pyro.param('a', torch.tensor(0.4))))\n"
        "def arguments():\n"
        "    return {'x': torch.tensor(0.3)}\n"
        "def broken(x):\n"
        "    raise KeyError('no such thing')\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", [*sys.path])
    words = ["--estimators", "score-average", "trace-graph", "pathwise", "--num_samples", "200", "--one_by_one"]
    pair = ["coins_of_a_user:model", "coins_of_a_user:guide", "--args", "coins_of_a_user:arguments"]
    main([*pair, *words, "--folder", "found"])
    said = capsys.readouterr().out
    assert "reference: exact (every value)" in said and "recommended: score-average; " in said
    assert "trace-graph: flagged: declared unbiased" in said and "pathwise: refused: site 'z'" in said
    table = (tmp_path / "found" / "table.md").read_text()
    assert "| score-average | ok |" in table and "## Variance by site" in table
    assert (tmp_path / "found" / "plots" / "audit.png").exists() and (tmp_path / "found" / "config.yaml").exists()
    with xarray.open_dataset(tmp_path / "found" / "audit.nc", engine="h5netcdf") as report:
        assert report.verdict.sel(estimator="score-average") == "ok"
    with pytest.raises(SystemExit) as stop:
        main(["coins_of_a_user:broken", *pair[1:], *words, "--folder", "broken"])
    error = capsys.readouterr().err.splitlines()[-1]
    assert (
        stop.value.code == 2 and error.startswith("gumbo audit: error: the programs cannot run") and "KeyError" in error
    )


def test_the_verb_takes_a_word_for_each_site(tmp_path, monkeypatch, capsys):
    (tmp_path / "gated_of_a_user.py").write_text(
        "import pyro, torch, pyro.distributions as dist\n"
        "def model():\n"
        "    gate = pyro.sample('gate', dist.Bernoulli(torch.tensor(0.3)))\n"
        "    z = pyro.sample('z', dist.Normal(gate, 1.0))\n"
        "    pyro.sample('x', dist.Normal(z, 1.0), obs=torch.tensor(0.3))\n"
        "def guide():\n"
        "    pyro.sample('gate', dist.Bernoulli(logits=pyro.param('a', torch.tensor(0.4))))\n"
        "    pyro.sample('z', dist.Normal(pyro.param('b', torch.tensor(0.4)), 1.0))\n"
    )
    monkeypatch.chdir(tmp_path)
    words = ["--estimators", "score", "{gate: enumerate, z: pathwise}", "--num_samples", "60", "--folder", "found"]
    main(["gated_of_a_user:model", "gated_of_a_user:guide", *words])  # as the README has it, from the current folder
    said = capsys.readouterr().out
    assert "gate=enumerate, z=p" in said and "\nscore " in said
    assert str(tmp_path) not in sys.path


def test_the_verb_refuses_numbers_before_it_makes_a_folder(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for option, value in (("num_samples", "2"), ("burn_in", "-1"), ("reference", "rlo0"), ("alpha", "2")):
        with pytest.raises(SystemExit):
            main(["bernoulli-vae", "bernoulli", "--data", "digits", f"--{option}", value])
        assert capsys.readouterr().err.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_the_verb_on_the_collection(tmp_path, capsys):
    options = ["--model_options.num_latents=3", "--model_options.hidden=[8]", "--data", "digits", "--batch_size", "3"]
    words = ["--estimators", "rloo", "enumerate", "--num_samples", "60"]
    main(["bernoulli-vae", "bernoulli", *options, *words, "--folder", str(tmp_path / "found")])
    said = capsys.readouterr().out
    assert "recommended: enumerate" in said and "flagged" not in said


@pytest.mark.parametrize("form", ["counts", "splits"])
def test_the_verb_takes_data_of_ones_own_as_they_are(form, tmp_path, monkeypatch, capsys):
    (tmp_path / "own_counts.py").write_text(
        "import numpy as np\n"
        "def counts():\n    return np.arange(160.0).reshape(40, 4) % 7\n"
        "def splits(folder, splits):\n    return {s: (np.arange(160.0).reshape(10, 4, 4) % 7, None) for s in splits}\n"
    )
    monkeypatch.chdir(tmp_path)
    options = ["--model_options.likelihood=poisson", "--model_options.hidden=[4]", "--data", f"own_counts:{form}"]
    main(["gaussian-vae", "normal", *options, "--estimators", "pathwise", "--num_samples", "20", "--folder", "found"])
    assert "recommended: pathwise" in capsys.readouterr().out
    sys.modules.pop("own_counts", None)


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["bernoulli-vae", "bernoulli"], "give --data"),
        (["bernoulli-vea", "bernoulli", "--data", "digits"], "did you mean 'bernoulli-vae'?"),
        (["nowhere:model", "nowhere:guide"], "cannot import 'nowhere'"),
        (["bernoulli-vae", "bernoulli", "--data", "digits", "--estimators", "rlo0"], "did you mean 'rloo'?"),
        (["bernoulli-vae", "bernoulli", "--data", "digits", "--args", "m:f"], "give one of them"),
        (["bernoulli-vae"], "guide"),
    ],
)
def test_the_verb_tells_mistakes_in_one_line(argv, words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", [*sys.path])
    with pytest.raises(SystemExit) as stop:
        main(argv)
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.count("\n") == 1 and words in error
    assert not list(tmp_path.iterdir())


def test_pareto_front():
    cost, variance = torch.tensor([[3.0, 1.0, 2.0, 1.0], [1.0, 4.0, 4.0, 9.0]]).numpy()
    assert pareto_front(cost, variance).tolist() == [1, 0]


# --- a reference of paths where the cost steps


class StepGuide(Params):
    def __init__(self):
        super().__init__(loc=0.4, raw=-0.3)

    def forward(self):
        pyro.sample("z", dist.Normal(self.loc, self.raw.exp()))


def step_model(steps):
    def model():
        z = pyro.sample("z", dist.Normal(torch.zeros((), dtype=F64), 1.0))
        loc = 2.0 * (z > 0) if steps else 2.0 * z
        pyro.sample("x", dist.Normal(loc, 1.0), obs=torch.tensor(1.5, dtype=F64))

    return model


@pytest.mark.slow
def test_a_reference_of_paths_gives_way_where_the_cost_steps():
    words = ["pathwise", "rloo", "measure-valued"]
    report = audit(step_model(True), StepGuide(), estimators=words, num_samples=1000)
    said = verdicts(report)
    assert said["rloo"] == said["measure-valued"] == "ok" and said["pathwise"].startswith("flagged")
    assert "from which pathwise gradients differ" in report.attrs["reference"]
    guide = StepGuide()
    loc, scale, x = guide.loc, guide.raw.exp(), torch.tensor(1.5, dtype=F64)
    up = dist.Normal(torch.zeros((), dtype=F64), 1.0).cdf(loc / scale)
    kl = torch.distributions.kl_divergence(
        torch.distributions.Normal(loc, scale), torch.distributions.Normal(0.0 * loc, 1.0)
    )
    bound = up * dist.Normal(2.0, 1.0).log_prob(x) + (1 - up) * dist.Normal(0.0, 1.0).log_prob(x) - kl
    exact = torch.autograd.grad(-bound, [guide.loc, guide.raw])
    norm = math.hypot(*(float(value) for value in exact))
    assert report.attrs["reference_total_norm"] == pytest.approx(norm, abs=4 * report.attrs["reference_total_error"])


@pytest.mark.slow
def test_a_reference_of_paths_stays_where_the_cost_is_smooth_and_another_word_is_wrong():
    class Wrong(ScoreFunction):
        def surrogate(self, view):
            return super().surrogate(view) * 1.5

    report = audit(
        step_model(False), StepGuide(), estimators={"wrong": Wrong(), "pathwise": "pathwise"}, num_samples=1000
    )
    said = verdicts(report)
    assert said["wrong"].startswith("flagged") and said["pathwise"] == "ok"
    assert "pathwise" in report.attrs["reference"] and "differ" not in report.attrs["reference"]


@pytest.mark.parametrize(("other", "says"), [(1.02, "as much as stl"), (2.6, "2.6 times below stl")])
def test_a_recommendation_says_how_far_the_next_one_is(other, says):
    assert _reason("rloo", [1.0, other], 0, ["rloo", "stl"], unsure=False).endswith(f"not flagged, {says}")


@pytest.mark.parametrize("passed, processor, seconds", [(5.0, 1.0, 1.0), (1.0, 2.0, 1.0)], ids=["busy", "two threads"])
def test_a_step_takes_no_longer_because_others_have_the_processor(passed, processor, seconds, monkeypatch):
    clocks = {"perf_counter": iter([10.0, 10.0 + passed]), "process_time": iter([3.0, 3.0 + processor])}
    for name, times in clocks.items():
        monkeypatch.setattr(f"time.{name}", lambda times=times: next(times))
    assert _Stopwatch([torch.ones(())]).seconds() == seconds
