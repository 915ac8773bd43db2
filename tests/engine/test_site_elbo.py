"""SiteELBO against Pyro's own ELBOs, in both idioms, and against the behaviours that it must not have."""

from __future__ import annotations

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from programs import DISCRETE, F64, ChainGuide, ChainModel, OneCoinGuide, OneCoinModel, Params, X, gradient
from pyro.infer import SVI, Trace_ELBO, config_enumerate
from pyro.infer.autoguide import AutoDelta, AutoDiagonalNormal, AutoNormal
from pyro.nn import PyroModule
from pyro.poutine.messenger import Messenger
from torch import nn
from torch.distributions.transforms import (
    AffineTransform,
    ComposeTransform,
    ExpTransform,
    PowerTransform,
    SigmoidTransform,
)

from gumbo.errors import BadInput, CannotVectorize, GumboWarning, TooFewParticles, UnknownName, UnsupportedSite
from gumbo.guides import CategoricalGuide, NormalGuide
from gumbo.inference import SiteELBO
from gumbo.inference.auditing.exact import exact_elbo, exact_iwae, mean_over_draws
from gumbo.inference.estimators import (
    Baseline,
    Concrete,
    Enumerate,
    Estimator,
    GumbelSoftmax,
    LeaveOneOut,
    MovingAverage,
    ScoreFunction,
)
from gumbo.inference.estimators._distributions import support_moves
from gumbo.models import CategoricalVAE, GaussianVAE


def both(*modules):
    return nn.ModuleList(modules)


def exact_gradient(model, guide):
    with pyro.get_param_store().scope():
        return gradient(-exact_elbo(model, guide), both(model, guide))


@pytest.fixture
def x():
    return (torch.rand(6, 1, 4, 4, generator=torch.Generator().manual_seed(5)) > 0.5).to(F64)


def vae(Model, Guide, **options):
    torch.manual_seed(1)
    model = Model((1, 4, 4), hidden=(8,), **options).double()
    return model, Guide(model, hidden=(8,)).double()


# Against Pyro.


@pytest.mark.parametrize("num_particles", [1, 3])
@pytest.mark.parametrize("vectorize", [True, False])
def test_pathwise_is_trace_elbo(x, num_particles, vectorize, param_store):
    model, guide = vae(GaussianVAE, NormalGuide, latent_dim=3)
    ours = SiteELBO("pathwise", num_particles=num_particles, vectorize_particles=vectorize)(model, guide)
    stock = Trace_ELBO(num_particles=num_particles, vectorize_particles=vectorize, max_plate_nesting=1)(model, guide)
    found = []
    for loss in (ours, stock):
        torch.manual_seed(7)
        value = loss(x)
        found.append((value.detach(), gradient(value, both(model, guide))))
    assert torch.allclose(found[0][0], found[1][0], rtol=1e-13, atol=0)
    assert torch.allclose(found[0][1], found[1][1], rtol=1e-10, atol=1e-12)


class RelaxedChain(Params):
    """A die relaxed by hand, in model and guide."""

    def __init__(self, temperature):
        super().__init__(a=[0.1, -0.4, 0.6], w=[0.2, 1.0, -0.5], p=0.3)
        self.temperature = torch.tensor(temperature, dtype=F64)

    def model(self, relaxed):
        prior = torch.zeros(2, 3, dtype=F64)
        with pyro.plate("data", 2):
            y = pyro.sample(
                "y",
                dist.RelaxedOneHotCategorical(self.temperature, logits=prior)
                if relaxed
                else dist.OneHotCategorical(logits=prior),
            )
            coin = torch.zeros(2, dtype=F64)
            b = pyro.sample(
                "b",
                dist.RelaxedBernoulli(self.temperature, logits=coin) if relaxed else dist.Bernoulli(logits=coin),
            )
            pyro.sample("x", dist.Normal((y * self.w).sum(-1) * (1 + b), 1.0), obs=X)

    def guide(self, relaxed):
        with pyro.plate("data", 2):
            logits = self.a.expand(2, 3)
            y = pyro.sample(
                "y",
                dist.RelaxedOneHotCategorical(self.temperature, logits=logits)
                if relaxed
                else dist.OneHotCategorical(logits=logits),
            )
            coin = self.p + y[..., 0]
            pyro.sample(
                "b", dist.RelaxedBernoulli(self.temperature, logits=coin) if relaxed else dist.Bernoulli(logits=coin)
            )


@pytest.mark.parametrize("num_particles", [1, 4])
def test_concrete_is_trace_elbo_on_relaxed_programs(num_particles):
    programs = RelaxedChain(0.7)
    found = []
    for elbo, relaxed in (
        (SiteELBO(Concrete(0.7), num_particles=num_particles), False),
        (Trace_ELBO(num_particles=num_particles, vectorize_particles=True, max_plate_nesting=1), True),
    ):
        torch.manual_seed(3)
        value = elbo.differentiable_loss(programs.model, programs.guide, relaxed)
        found.append((value.detach(), gradient(value, programs)))
    assert torch.allclose(found[0][0], found[1][0], rtol=1e-9, atol=0)
    assert torch.allclose(found[0][1], found[1][1], rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize(
    "word", ["score", "score-average", "nvil", "rloo", "gumbel-softmax", "straight-through", "concrete"]
)
def test_both_idioms_give_the_same_gradients(x, word, param_store):
    model, guide = vae(CategoricalVAE, CategoricalGuide, num_latents=2, num_classes=3)
    module = SiteELBO(word)(model, guide).initialize(x)
    torch.manual_seed(11)
    module(x).backward()
    torchs = {name: p.grad.clone() for name, p in both(model, guide).named_parameters()}
    both(model, guide).zero_grad()
    seen = {}

    class Spy(pyro.optim.PyroOptim):
        def __init__(self):
            super().__init__(torch.optim.SGD, {"lr": 0.0})

        def __call__(self, params, *args, **kwargs):
            seen.update({name: p.grad.clone() for name, p in both(model, guide).named_parameters()})

    svi = SVI(model, guide, Spy(), loss=SiteELBO(word))
    torch.manual_seed(11)
    svi.step(x)
    assert seen.keys() == torchs.keys()
    assert all(torch.allclose(seen[name], torchs[name], rtol=1e-12, atol=1e-14) for name in torchs)


@pytest.mark.parametrize("word", ["rloo", "nvil", "gumbel-softmax"])
def test_stock_svi_trains_with_it(x, word, param_store):
    model, guide = vae(CategoricalVAE, CategoricalGuide, num_latents=2, num_classes=3)
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 1e-2}), loss=SiteELBO(word))
    before = {name: p.detach().clone() for name, p in both(model, guide).named_parameters()}
    for _ in range(2):
        svi.step(x)
    assert all((p != before[name]).any() for name, p in both(model, guide).named_parameters())
    assert isinstance(svi.evaluate_loss(x), float)


# Unbiased, biased, and wrong on purpose.


class IncludesItself(Baseline):
    """The mean over all particles, the one at hand included: biased by 1/K."""

    min_particles = 2

    def __call__(self, view):
        return view.cost.mean(view.particle_dim, keepdim=True)


class FlippedSign(ScoreFunction):
    def surrogate(self, view):
        return -super().surrogate(view)


@pytest.mark.parametrize("wrong", [ScoreFunction(baseline=IncludesItself()), FlippedSign()], ids=["itself", "sign"])
def test_estimators_that_are_wrong_on_purpose_fail_the_listing(wrong):
    model, guide = DISCRETE["chain"].make()
    loss = SiteELBO(wrong)(model, guide)
    mean = mean_over_draws(lambda: gradient(loss(), both(model, guide)))
    assert not torch.allclose(mean, exact_gradient(model, guide), atol=1e-3)


def z_scores(loss, modules, exact, num_draws):
    draws = torch.stack([gradient(loss(), modules) for _ in range(num_draws)])
    error = draws.std(0) / math.sqrt(num_draws)
    return (draws.mean(0) - exact).abs() / error.clamp(min=1e-300)


@pytest.mark.parametrize("hard", [False, True])
def test_relaxed_gradients_are_biased_at_temperature_one(hard):
    model, guide = DISCRETE["chain"].make()
    torch.manual_seed(0)
    loss = SiteELBO(GumbelSoftmax(1.0, hard=hard), num_particles=400)(model, guide)
    assert z_scores(loss, both(guide), exact_gradient(model, guide)[2:], 25).max() > 6


def test_concrete_is_unbiased_for_the_relaxed_program():
    """One relaxed coin; its bound by quadrature over the logistic noise. Two elements, |z| < 4.5: error rate 2e-5."""
    model, guide = OneCoinModel(), OneCoinGuide()
    temperature = 0.6
    u = (torch.arange(200_000, dtype=F64) + 0.5) / 200_000
    z = torch.special.logit(u)
    y_logit = (guide.a + z) / temperature

    def density(logits):
        relaxed = dist.RelaxedBernoulli(torch.tensor(temperature, dtype=F64), logits=logits)
        return relaxed.base_dist.log_prob(y_logit)

    y = y_logit.sigmoid()
    bound = density(torch.tensor(-0.3, dtype=F64)) + dist.Normal(model.w * y, 1.0).log_prob(X[0]) - density(guide.a)
    exact = gradient(-bound.mean(), both(model, guide))
    torch.manual_seed(0)
    loss = SiteELBO(Concrete(temperature), num_particles=500)(model, guide)
    assert z_scores(loss, both(model, guide), exact, 60).max() < 4.5
    assert loss.objective_name == "concrete-elbo"


def test_mixed_sites_pathwise_then_score_and_score_then_pathwise():
    """Normal, then a coin given it; coin, then a Normal given it. z-tests against quadrature, |z| < 4.5 each."""

    class Guide(Params):
        def __init__(self, coin_first):
            super().__init__(m=0.3, s=-0.4, a=-0.2, b=0.9)
            self.coin_first = coin_first

        def forward(self):
            if self.coin_first:
                b = pyro.sample("b", dist.Bernoulli(logits=self.a))
                pyro.sample("z", dist.Normal(self.m + self.b * b, self.s.exp()))
            else:
                z = pyro.sample("z", dist.Normal(self.m, self.s.exp()))
                pyro.sample("b", dist.Bernoulli(logits=self.a + self.b * z))

    class Model(Params):
        def __init__(self):
            super().__init__(w=1.3)

        def forward(self):
            z = pyro.sample("z", dist.Normal(torch.zeros((), dtype=F64), 1.0))
            b = pyro.sample("b", dist.Bernoulli(logits=torch.tensor(0.4, dtype=F64)))
            pyro.sample("x", dist.Normal(self.w * z * b + b, 1.0), obs=X[0])

    import numpy

    nodes, weights = (torch.tensor(a, dtype=F64) for a in numpy.polynomial.hermite_e.hermegauss(60))
    weights = weights / weights.sum()
    normal01 = dist.Normal(torch.zeros((), dtype=F64), 1.0)
    for coin_first in (True, False):
        model, guide = Model(), Guide(coin_first)
        total = 0.0
        for b in (torch.tensor(0.0, dtype=F64), torch.tensor(1.0, dtype=F64)):
            loc = guide.m + guide.b * b if coin_first else guide.m
            z = loc + guide.s.exp() * nodes
            coin = dist.Bernoulli(logits=guide.a if coin_first else guide.a + guide.b * z)
            f = (
                normal01.log_prob(z)
                + dist.Bernoulli(logits=torch.tensor(0.4, dtype=F64)).log_prob(b)
                + dist.Normal(model.w * z * b + b, 1.0).log_prob(X[0])
                - dist.Normal(loc, guide.s.exp()).log_prob(z)
                - coin.log_prob(b)
            )
            total = total + (weights * coin.log_prob(b).exp() * f).sum()
        exact = gradient(-total, both(model, guide))
        for word in ("score", "rloo", "enumerate", "nvil"):
            torch.manual_seed(4)
            loss = SiteELBO({"b": word, "z": "pathwise"}, num_particles=300)(model, guide)
            assert z_scores(loss, both(model, guide), exact, 40).max() < 4.5, (word, coin_first)


@pytest.mark.parametrize("vectorize", [True, False])
@pytest.mark.parametrize("first, second", [("enumerate", "rloo"), ("rloo", "enumerate"), ("score", "enumerate")])
def test_enumerated_and_drawn_sites_mix_exactly(first, second, vectorize):
    model, guide = ChainModel(), ChainGuide()
    loss = SiteELBO({"z1": first, "z2": second}, vectorize_particles=vectorize)(model, guide)
    mean = mean_over_draws(lambda: gradient(loss(), both(model, guide)))
    assert torch.allclose(mean, exact_gradient(model, guide), rtol=0, atol=1e-10)


def test_sticking_the_landing_has_no_variance_at_the_posterior():
    class Model(Params):
        def forward(self):
            z = pyro.sample("z", dist.Normal(torch.zeros((), dtype=F64), 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=X[0])

    class Guide(Params):
        def __init__(self):
            super().__init__(m=X[0].item() / 2, s=math.log(0.5) / 2)

        def forward(self):
            pyro.sample("z", dist.Normal(self.m, self.s.exp()))

    guide = Guide()
    spread = {}
    for word in ("stl", "pathwise"):
        loss = SiteELBO(word)(Model(), guide)
        spread[word] = torch.stack([gradient(loss(), guide) for _ in range(20)]).std(0).max()
    assert spread["stl"] < 1e-12 < 0.1 < spread["pathwise"]


@pytest.mark.parametrize("how", ["module", "method", "closed-over module", "closed-over tensor"])
def test_sticking_the_landing_knows_what_a_function_closes_over(how):
    class Guide(nn.Module):
        def __init__(self):
            super().__init__()
            self.m = nn.Parameter(X[0] / 2)

        def forward(self):
            pyro.sample("z", dist.Normal(self.m, math.sqrt(0.5)))

    def model():
        z = pyro.sample("z", dist.Normal(torch.zeros((), dtype=F64), 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=X[0])

    module = Guide()
    mean = module.m
    guide = {
        "module": module,
        "method": module.forward,
        "closed-over module": lambda: module(),
        "closed-over tensor": lambda: pyro.sample("z", dist.Normal(mean, math.sqrt(0.5))),
    }[how]
    loss = SiteELBO("stl")(model, guide)
    assert torch.stack([gradient(loss(), module) for _ in range(5)]).std(0).max() < 1e-12
    assert mean.requires_grad


# Who decides what a site takes.


def test_precedence_of_mapping_mark_and_star():
    def model():
        for name in "abc":
            pyro.sample(name, dist.Bernoulli(0.5))

    def guide():
        for name in "abc":
            mark = {"estimator": "rloo"} if name in "ab" else {}
            pyro.sample(name, dist.Bernoulli(0.4), infer=mark)

    elbo = SiteELBO({"a": "score", "*": "enumerate"})
    elbo.loss(model, guide)
    (binding,) = elbo._bindings
    assert {name: e.name for name, e in binding.chosen.items()} == {"a": "score", "b": "rloo", "c": "enumerate"}
    assert binding.num_particles == 2


def test_marks_of_pyro_are_honoured_or_refused():
    def model():
        pyro.sample("a", dist.Bernoulli(0.5))

    def marked(**infer):
        return lambda: pyro.sample("a", dist.Bernoulli(0.4), infer=infer)

    elbo = SiteELBO("score")
    elbo.loss(model, marked(enumerate="parallel"))
    assert isinstance(elbo._bindings[0].chosen["a"], Enumerate)
    elbo = SiteELBO("score")
    elbo.loss(model, marked(baseline={"use_decaying_avg_baseline": True, "baseline_beta": 0.7}))
    assert repr(elbo._bindings[0].chosen["a"]) == repr(ScoreFunction(baseline=MovingAverage(0.7)))
    with pytest.raises(UnsupportedSite, match="'nn_baseline'"):
        SiteELBO("score").loss(model, marked(baseline={"nn_baseline": nn.Linear(1, 1)}))
    enumerated_model = lambda: pyro.sample("b", dist.Bernoulli(0.5), infer={"enumerate": "sequential"})  # noqa: E731
    with pytest.raises(UnsupportedSite, match="'b'.*mark it 'parallel'"):
        SiteELBO("score").loss(enumerated_model, lambda: None)


@pytest.mark.parametrize(
    "make, error, says",
    [
        (lambda: SiteELBO("rlo0"), UnknownName, "unknown estimator 'rlo0': did you mean 'rloo'"),
        (lambda: SiteELBO("rloo", num_particles=1), UnsupportedSite, "'rloo': it needs num_particles ≥ 2, got 1"),
        (lambda: SiteELBO("rloo", num_particles=1), BadInput, "leave num_particles out for the least .* need$"),
        (lambda: SiteELBO({"z1": 3}), BadInput, "an estimator is a word or an Estimator, got 3"),
        (lambda: SiteELBO("score", plates="maybe"), UnknownName, "unknown plates 'maybe'"),
        (lambda: SiteELBO("score", num_particles=0), BadInput, "num_particles must be a positive integer"),
        (lambda: SiteELBO("score", kl_weight=-1.0), BadInput, "kl_weight must be"),
        (lambda: SiteELBO("score", kl_weight="linear"), BadInput, "kl_weight must be"),
        (lambda: SiteELBO("score", max_plate_nesting="1"), BadInput, "max_plate_nesting must be an integer"),
        (
            lambda: SiteELBO("score", max_plate_nesting=0).loss(*DISCRETE["nested plates"].make()),
            BadInput,
            "max_plate_nesting is 0, but the plates nest 2 deep",
        ),
        (lambda: GumbelSoftmax(0.0), BadInput, "temperature is 0.0: expected a finite number above 0"),
        (lambda: ScoreFunction(baseline="rloo"), BadInput, "baseline is .rloo.: expected a Baseline"),
        (lambda: SiteELBO({"nope": "score"})(ChainModel(), ChainGuide())(), BadInput, "'nope'.*its sites: z1, z2"),
        (
            lambda: SiteELBO()(ChainModel(), ChainGuide())(),
            UnsupportedSite,
            "'z1': it is discrete.*choose an estimator, e.g. 'rloo' ",
        ),
    ],
)
def test_what_cannot_be_meant_is_one_line(make, error, says, param_store):
    with pytest.raises(error, match=says) as caught:
        make()
    assert "\n" not in str(caught.value)


def test_a_relaxation_of_a_normal_site_is_refused(x):
    model, guide = vae(GaussianVAE, NormalGuide, latent_dim=3)
    with pytest.raises(UnsupportedSite, match="'z' cannot take estimator 'gumbel-softmax'.*Normal.*do:.*pathwise"):
        SiteELBO("gumbel-softmax")(model, guide)(x)


def test_bad_batches_are_one_line(x):
    model, guide = vae(GaussianVAE, NormalGuide, latent_dim=3)
    loss = SiteELBO("pathwise")(model, guide)
    with pytest.raises(BadInput, match="NaN"):
        loss(torch.full_like(x, math.nan))
    with pytest.raises(BadInput, match=r"\(1, 4, 4\)|1, 4, 4"):
        loss(torch.zeros(6, 1, 5, 5, dtype=F64))


def test_parameter_dependent_support_is_refused():
    class Guide(Params):
        def __init__(self):
            super().__init__(top=2.0)

        def forward(self):
            pyro.sample("z", dist.Uniform(0.0, self.top))

    class Model(Params):
        def forward(self):
            pyro.sample("z", dist.Normal(torch.zeros((), dtype=F64), 1.0))

    with pytest.raises(UnsupportedSite, match="support of Uniform depends on parameters"):
        SiteELBO("score")(Model(), Guide())()
    with torch.no_grad(), pytest.raises(UnsupportedSite, match="support of Uniform depends on parameters"):
        SiteELBO("score")(Model(), Guide())()


@pytest.mark.parametrize("word, objective", [("stl", "elbo"), ("dreg", "iwae")])
def test_a_score_with_a_mean_is_not_dropped(word, objective):
    class Guide(Params):
        def __init__(self):
            super().__init__(low=0.5)

        def forward(self):
            base = dist.Exponential(torch.tensor(1.0, dtype=F64))
            pyro.sample("z", dist.TransformedDistribution(base, [dist.transforms.AffineTransform(self.low, 1.0)]))

    class Model(Params):
        def forward(self):
            pyro.sample("z", dist.Normal(torch.zeros((), dtype=F64), 1.0))

    with pytest.raises(UnsupportedSite, match="support .* depends on parameters"):
        SiteELBO(word, objective=objective, num_particles=2)(Model(), Guide())()
    assert SiteELBO("pathwise", objective=objective, num_particles=2)(Model(), Guide())().isfinite()


def chain(base, *maps):
    return dist.TransformedDistribution(base, list(maps))


THETA = torch.tensor(2.0, requires_grad=True)
SCALES = AffineTransform(0.0, THETA)
MOVES, LOGIT, LOG = AffineTransform(THETA, 1.0), SigmoidTransform().inv, ExpTransform().inv


@pytest.mark.parametrize(
    ("fn", "moves"),
    [
        (chain(dist.LogNormal(0.0, 1.0), MOVES), True),
        (chain(dist.LogNormal(0.0, 1.0), LOG, MOVES, ExpTransform()), False),
        (chain(dist.Uniform(0.0, 1.0), AffineTransform(3.0, 2.0)), False),
        (chain(dist.Uniform(0.0, 1.0), MOVES), True),
        (chain(dist.Uniform(0.0, 1.0), LOGIT, MOVES, SigmoidTransform()), False),
        (chain(dist.Uniform(0.0, 1.0), LOGIT, MOVES, SigmoidTransform(), MOVES), True),
        (chain(dist.Uniform(0.0, 0.5), LOGIT, MOVES), True),
        (chain(dist.Uniform(0.0, 1.0), ComposeTransform([LOGIT, MOVES])), False),
        (chain(dist.Uniform(0.0, 1.0), ComposeTransform([ExpTransform(), MOVES])), True),
        (chain(dist.Uniform(torch.zeros(2), 1.0).to_event(1), MOVES), True),
        (chain(dist.Normal(THETA, 1.0), ExpTransform()), False),
        (dist.Weibull(THETA, THETA), False),
        (dist.Gumbel(THETA.expand(3), THETA).to_event(1), False),
        (dist.Gumbel(THETA.double(), 1.0), False),
        (dist.Kumaraswamy(THETA, THETA), False),
        (chain(dist.Kumaraswamy(THETA, THETA), AffineTransform(1.0, THETA)), True),
        (chain(dist.Exponential(1.0), SCALES), False),
        (chain(dist.Exponential(1.0), ComposeTransform([SCALES, MOVES])), True),
        (chain(dist.Exponential(1.0), AffineTransform(1.0, 1.0), SCALES), True),
        (chain(dist.Exponential(1.0), MOVES.inv), True),
        (chain(dist.Exponential(1.0), SCALES.inv), False),
        (chain(dist.Uniform(torch.tensor([-1.0, 1.0]), 3.0), SCALES), True),
        (chain(dist.Beta(1.0, 1.0), PowerTransform(THETA)), False),
        (chain(dist.Uniform(0.0, 2.0), PowerTransform(THETA)), True),
        (chain(dist.Poisson(1.0), MOVES), True),
        (chain(dist.Poisson(1.0), SCALES), True),
        (dist.AffineBeta(1.0, 2.0, THETA, 1.0), True),
        (dist.AffineBeta(1.0, 2.0, 0.0, THETA), True),
        (dist.Pareto(THETA, 2.0), True),
    ],
)
def test_a_learnable_map_moves_bounds_that_are_neither_infinite_nor_fixed_points(fn, moves):
    assert support_moves(fn) is moves


def test_errors_survive_a_trace_of_pyro(param_store):
    """Pyro makes errors that pass through a trace anew, from their message alone."""
    error = UnsupportedSite("z", "arm", "it needs a Bernoulli site", ["pathwise"])
    again = type(error)(f"{error}\nTrace Shapes:\n Param Sites:\n")
    assert (
        str(again)
        == str(error)
        == "site 'z' cannot take estimator 'arm': it needs a Bernoulli site; would do: pathwise"
    )
    with pytest.raises(UnsupportedSite, match="more than the limit of 4"):
        exact_elbo(DISCRETE["nested plates"].make()[0], DISCRETE["nested plates"].make()[1], limit=4)


def test_pmf_is_not_compared_with_density():
    def model():
        pyro.sample("y", dist.RelaxedOneHotCategorical(torch.tensor(0.5), logits=torch.zeros(3)))

    def guide():
        pyro.sample("y", dist.OneHotCategorical(logits=torch.zeros(3)))

    with pytest.raises(UnsupportedSite, match="pmf.*density"):
        SiteELBO("score").loss(model, guide)


@pytest.mark.parametrize(
    "model_sites, guide_sites, says",
    [
        ("ab", "a", "'b'.*has no site in the guide"),
        ("a", "ab", "'b'.*nowhere in the model"),
        ("aa", "a", "sampled twice"),
    ],
)
def test_sites_must_match(model_sites, guide_sites, says):
    def model():
        for name in model_sites:
            pyro.sample(name, dist.Bernoulli(0.5))

    def guide():
        for name in guide_sites:
            pyro.sample(name, dist.Bernoulli(0.5))

    with pytest.raises((UnsupportedSite, BadInput), match=says):
        SiteELBO("score").loss(model, guide)


def test_a_dimension_outside_any_plate_is_refused():
    def program():
        pyro.sample("z", dist.Bernoulli(torch.full((3,), 0.5)))

    with pytest.raises(UnsupportedSite, match="outside any plate.*to_event"):
        SiteELBO("score").loss(program, program)


# Vectorized or not.


class Recurrent(PyroModule):
    """An LSTM takes (K, B, D) for sequences of length K, and says nothing."""

    def __init__(self, is_model):
        super().__init__()
        self.is_model = is_model
        name = "decoder" if is_model else "encoder"
        setattr(self, name, nn.LSTM(2, 2).double())

    def forward(self, x):
        with pyro.plate("data", 4):
            if self.is_model:
                z = pyro.sample("z", dist.Normal(torch.zeros(4, 2, dtype=F64), 1.0).to_event(1))
                pyro.sample("x", dist.Normal(self.decoder(z)[0], 1.0).to_event(1), obs=x)
            else:
                pyro.sample("z", dist.Normal(torch.zeros(4, 2, dtype=F64), 1.0).to_event(1))


def test_a_program_that_mixes_particles_is_refused():
    data = torch.ones(4, 2, dtype=F64)
    with pytest.raises(CannotVectorize, match="'x'.*differs by .*vectorize_particles=False"):
        SiteELBO("pathwise", num_particles=3, vectorize_particles=True)(Recurrent(True), Recurrent(False))(data)
    assert SiteELBO("pathwise", num_particles=3, vectorize_particles=False)(Recurrent(True), Recurrent(False))(data) > 0


class Spread(PyroModule):
    """Spreads a draw outside the plate over the rows, which moves the particles one dimension to the left."""

    def __init__(self, is_model):
        super().__init__()
        self.is_model = is_model

    def forward(self, x):
        g = pyro.sample("g", dist.Normal(torch.zeros(3, dtype=F64), 1.0).to_event(1))
        if self.is_model:
            with pyro.plate("data", len(x)):
                pyro.sample("x", dist.Normal(g.unsqueeze(-2) + 0 * x, 1.0).to_event(1), obs=x)


@pytest.mark.parametrize("word", ["pathwise", "rloo"])
def test_a_program_that_moves_the_particles_is_refused(word):
    data = torch.ones(4, 3, dtype=F64)
    with pytest.raises(CannotVectorize, match="'x'.*dimension -3 of its own.*vectorize_particles=False"):
        SiteELBO(word, num_particles=3, vectorize_particles=True)(Spread(True), Spread(False))(data)
    assert SiteELBO(word, num_particles=3, vectorize_particles=False)(Spread(True), Spread(False))(data) > 0


@pytest.mark.parametrize("plain", [True, False])
def test_a_program_of_others_may_have_plain_networks(plain):
    """Its networks are then at hand in a call, once the loss's own store knows their parameters."""
    at_hand = []

    class Model(PyroModule):
        plain_networks = plain

        def __init__(self):
            super().__init__()
            self.decoder = nn.Linear(1, 2)

        def forward(self, x):
            at_hand.append("decoder" in vars(self))
            with pyro.plate("data", len(x)):
                z = pyro.sample("z", dist.Bernoulli(torch.tensor(0.5)).expand([len(x), 1]).to_event(1))
                pyro.sample("x", dist.Normal(self.decoder(z), 1.0).to_event(1), obs=x)

    class Guide(PyroModule):
        def __init__(self):
            super().__init__()
            self.encoder = nn.Linear(2, 1)

        def forward(self, x):
            with pyro.plate("data", len(x)):
                pyro.sample("z", dist.Bernoulli(logits=self.encoder(x)).to_event(1))

    model = Model()
    loss = SiteELBO("score")(model, Guide())
    values = []
    for _ in range(3):
        at_hand.clear()
        torch.manual_seed(0)
        values.append(loss(torch.ones(3, 2)).item())
    assert at_hand == [plain] and "decoder" not in vars(model)
    assert values[0] == values[2]


@pytest.mark.parametrize("word", ["rebar", "muprop"])
def test_a_step_asks_for_no_word(word, monkeypatch):
    """The word of an estimator is looked up in the registry, which makes one of each: for messages only."""
    loss = SiteELBO(word)(OneCoinModel(), OneCoinGuide())
    loss.initialize()
    monkeypatch.setattr(Estimator, "name", property(lambda self: pytest.fail("a step asked for its word")))
    loss().backward()


@pytest.mark.parametrize("word", ["rloo", "enumerate"])
def test_control_flow_does_not_vectorize(word):
    model, guide = DISCRETE["control flow"].make()
    with pytest.raises(CannotVectorize, match="vectorize_particles=False"):
        SiteELBO(word, vectorize_particles=True)(model, guide)()


def test_noise_outside_of_sample_statements_is_no_reason_to_refuse(x):
    torch.manual_seed(0)
    model = GaussianVAE((1, 4, 4), hidden=(8,), latent_dim=3).double()
    encoder = nn.Sequential(nn.Flatten(-3), nn.Dropout(0.5), nn.Linear(16, 3)).double()

    class Dropping(PyroModule):
        def __init__(self):
            super().__init__()
            self.encoder = encoder

        def forward(self, x):
            with pyro.plate("data", len(x)):
                pyro.sample("z", dist.Normal(self.encoder(x), 1.0).to_event(1))

    guide = Dropping()
    assert not torch.equal(guide.encoder(x), guide.encoder(x))
    assert SiteELBO("pathwise", num_particles=3)(model, guide)(x).isfinite()


def test_the_first_call_leaves_the_random_stream_alone(x):
    model, guide = vae(CategoricalVAE, CategoricalGuide, num_latents=2, num_classes=3)
    torch.manual_seed(5)
    before = torch.get_rng_state()
    SiteELBO("rloo")(model, guide).initialize(x)
    assert torch.equal(before, torch.get_rng_state())


def test_batches_may_change_size(x):
    model, guide = vae(CategoricalVAE, CategoricalGuide, num_latents=2, num_classes=3)
    for word in ("score-average", "nvil", "rloo", "gumbel-softmax", "enumerate"):
        loss = SiteELBO(word)(model, guide)
        for size in (6, 2, 1, 5):
            loss(x[:size]).backward()


# Scales, masks, plates.


def test_layers_that_mix_rows_need_plates_ignored():
    """The second row of x leans on the first coin, in spite of the plate."""

    class Model(Params):
        def __init__(self):
            super().__init__(w=0.7)

        def forward(self):
            with pyro.plate("data", 2):
                z = pyro.sample("z", dist.Bernoulli(logits=torch.tensor(-0.3, dtype=F64)))
                pyro.sample("x", dist.Normal(self.w * (z + 2 * z.flip(-1)), 1.0), obs=X)

    model, guide = Model(), DISCRETE["plate"].guide()
    exact = exact_gradient(model, guide)
    for word in ("score", "rloo", "enumerate", "nvil"):
        mean = {}
        for plates in ("trust", "ignore"):
            loss = SiteELBO(word, plates=plates)(model, guide)
            loss.initialize().eval()
            mean[plates] = mean_over_draws(lambda loss=loss: gradient(loss(), both(model, guide)))
        assert torch.allclose(mean["ignore"], exact, rtol=0, atol=1e-10), word
        assert not torch.allclose(mean["trust"], exact, rtol=0, atol=1e-3), word


def test_a_deterministic_mean_of_a_plate_closes_it():
    class Model(Params):
        def __init__(self):
            super().__init__(w=0.7)

        def forward(self):
            data = pyro.plate("data", 2)
            with data:
                z = pyro.sample("z", dist.Bernoulli(logits=torch.tensor(-0.3, dtype=F64)))
            mean = pyro.deterministic("mean", z.mean(-1, keepdim=z.dim() > 1))
            with data:
                pyro.sample("x", dist.Normal(self.w * mean + z, 1.0), obs=X)

    model, guide = Model(), DISCRETE["plate"].guide()
    loss = SiteELBO("score")(model, guide)
    mean = mean_over_draws(lambda: gradient(loss(), both(model, guide)))
    assert torch.allclose(mean, exact_gradient(model, guide), rtol=0, atol=1e-10)


def test_kl_weight_weighs_the_latent_terms():
    model, guide = ChainModel(), ChainGuide()
    half, full, none = (SiteELBO("enumerate", kl_weight=w)(model, guide)() for w in (0.5, 1.0, 0.0))
    assert torch.allclose(half, (full + none) / 2)
    assert SiteELBO("enumerate", kl_weight=0.5)(model, guide).objective_name == "weighted-elbo"
    loss = SiteELBO("enumerate", kl_weight=lambda step: min(1.0, step / 2))(model, guide)
    values = [loss() for _ in range(3)]
    assert torch.allclose(torch.stack(values), torch.stack([none, half, full]))
    with torch.no_grad():
        loss()
    loss.eval()()
    assert loss.binding.steps == 3


def test_transform_caches_are_cleared():
    class Guide(Params):
        def __init__(self):
            super().__init__(m=0.3)

        def forward(self):
            base = dist.Normal(self.m, torch.tensor(0.5, dtype=F64))
            pyro.sample("z", dist.TransformedDistribution(base, [dist.transforms.ExpTransform(cache_size=1)]))

    class Model(Params):
        def forward(self):
            pyro.sample("z", dist.LogNormal(torch.tensor(0.0, dtype=F64), 1.0))

    guide = Guide()
    grads = torch.stack([gradient(SiteELBO("score")(Model(), guide)(), guide) for _ in range(5)])
    assert (grads != 0).all()


def test_a_subsampled_plate_is_seen_alike_by_all_particles():
    x = torch.arange(6, dtype=F64)
    seen = []

    def model():
        with pyro.plate("data", 6, subsample_size=2) as rows:
            seen.append(tuple(rows.tolist()))
            z = pyro.sample("z", dist.Bernoulli(torch.full((2,), 0.3, dtype=F64)))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x[rows])

    def guide():
        with pyro.plate("data", 6, subsample_size=2):
            pyro.sample("z", dist.Bernoulli(torch.full((2,), 0.4, dtype=F64)))

    elbo = SiteELBO("rloo", num_particles=3, vectorize_particles=False)
    elbo.loss(model, guide)
    seen.clear()
    elbo.loss(model, guide)
    assert len(seen) == 3 and len(set(seen)) == 1


def test_too_few_particles_advise_only_words_that_support_the_site():
    def guide():
        pyro.sample("z", dist.Poisson(torch.tensor(1.0)), infer={"estimator": "rloo"})

    with pytest.raises(TooFewParticles) as refused:
        SiteELBO(num_particles=1).loss(lambda: pyro.sample("z", dist.Poisson(1.0)), guide)
    advised = refused.value.alternatives
    assert "score" in advised and not {"pathwise", "rloo", "enumerate", "disarm"}.intersection(advised)


def test_partly_observed_sites(param_store):
    """`obs_mask`: the unobserved half is a latent site, which the guide must sample."""
    mask = torch.tensor([True, False])

    class Model(Params):
        def __init__(self):
            super().__init__(w=0.7)

        def forward(self):
            with pyro.plate("data", 2):
                z = pyro.sample("z", dist.Bernoulli(logits=torch.tensor(-0.3, dtype=F64)))
                pyro.sample("x", dist.Bernoulli(logits=self.w * z), obs=torch.ones(2, dtype=F64), obs_mask=mask)

    class Guide(Params):
        def __init__(self, whole):
            super().__init__(a=[0.4, -0.7], b=0.3)
            self.whole = whole

        def forward(self):
            with pyro.plate("data", 2):
                pyro.sample("z", dist.Bernoulli(logits=self.a))
                if self.whole:
                    with pyro.poutine.mask(mask=~mask):
                        pyro.sample("x_unobserved", dist.Bernoulli(logits=self.b))

    with pytest.raises(UnsupportedSite, match="'x_unobserved'.*no site in the guide.*config_enumerate.* drops infer="):
        SiteELBO("score")(Model(), Guide(False))()
    assert math.isfinite(SiteELBO().loss(config_enumerate(Model()), lambda: None))  # the advice
    model, guide = Model(), Guide(True)
    for word in ("score", "rloo", "enumerate"):
        loss = SiteELBO(word)(model, guide)
        mean = mean_over_draws(lambda loss=loss: gradient(loss(), both(model, guide)))
        assert torch.allclose(mean, exact_gradient(model, guide), rtol=0, atol=1e-10), word


def test_factors_in_model_and_guide():
    class Guide(Params):
        def __init__(self):
            super().__init__(a=0.4)

        def forward(self):
            pyro.sample("z", dist.Bernoulli(logits=self.a))
            pyro.factor("correction", 0.3 * self.a, has_rsample=True)

    model, guide = OneCoinModel(), Guide()
    loss = SiteELBO("score")(model, guide)
    mean = mean_over_draws(lambda: gradient(loss(), both(model, guide)))
    plain = OneCoinGuide()
    exact = exact_gradient(model, plain)
    assert torch.allclose(mean, exact + torch.tensor([0.0, 0.3], dtype=F64), rtol=0, atol=1e-10)


# State, stores, names.


def test_state_moves_only_while_training_and_travels_in_the_state_dict(x):
    model, guide = vae(CategoricalVAE, CategoricalGuide, num_latents=2, num_classes=3)
    loss = SiteELBO("score-average")(model, guide).initialize(x)
    states = [{k: v for k, v in loss.state_dict().items() if "mean" in k}]

    def moved():
        states.append({k: v.clone() for k, v in loss.state_dict().items() if "mean" in k})
        return any(not torch.equal(states[-1][k], states[-2][k]) for k in states[-1])

    states[0] = {k: v.clone() for k, v in states[0].items()}
    loss(x)
    assert moved()
    with torch.no_grad():
        loss(x)
    assert not moved()
    loss.eval()(x)
    assert not moved()
    with pytest.raises(BadInput, match=r"loss\.initialize\(x\) before"):
        SiteELBO("score-average")(model, guide).load_state_dict(loss.state_dict())
    other = SiteELBO("score-average")(model, guide).initialize(x)
    other.load_state_dict(loss.state_dict())
    torch.manual_seed(0)
    a = gradient(loss(x), guide)
    torch.manual_seed(0)
    assert torch.equal(a, gradient(other(x), guide))


def test_a_baseline_reaches_nothing_but_its_own_parameters(x):
    model, guide = vae(CategoricalVAE, CategoricalGuide, num_latents=2, num_classes=3)
    loss = SiteELBO("nvil")(model, guide)
    with pytest.raises(BadInput, match=r"loss\.initialize\(x\)"):
        list(loss.parameters())
    loss.initialize(x)
    own = list(loss.binding.parameters())
    assert own and all(any(p is q for q in loss.parameters()) for p in own)
    torch.manual_seed(0)
    with_baseline = torch.autograd.grad(loss(x), own, retain_graph=False)
    assert any((g != 0).any() for g in with_baseline)
    # The score term alone, with the same baseline value, gives model and guide the same gradient.
    loss.eval()
    torch.manual_seed(0)
    a = gradient(loss(x), both(model, guide))
    for p in own:
        p.requires_grad_(False)
    torch.manual_seed(0)
    assert torch.equal(a, gradient(loss(x), both(model, guide)))


def test_a_loss_says_how_it_was_made():
    assert repr(SiteELBO("rloo")) == "SiteELBO('rloo', objective='elbo', num_particles=None)"
    one, other = (repr(SiteELBO(GumbelSoftmax(t), kl_weight=w)) for t, w in ((0.5, 1.0), (0.6, 0.5)))
    assert "temperature=0.5" in one and "kl_weight" not in one
    assert "temperature=0.6" in other and "kl_weight=0.5" in other


def test_a_loss_with_state_is_bound_to_one_pair(x):
    elbo = SiteELBO("score-average")
    elbo.loss(lambda: pyro.sample("z", dist.Bernoulli(0.5)), lambda: pyro.sample("z", dist.Bernoulli(0.4)))
    with pytest.raises(BadInput, match="for another model and guide"):
        elbo.loss(lambda: pyro.sample("z", dist.Bernoulli(0.5)), lambda: pyro.sample("z", dist.Bernoulli(0.4)))


def test_the_torch_idiom_leaves_the_param_store_alone(x):
    model, guide = vae(CategoricalVAE, CategoricalGuide, num_latents=2, num_classes=3)
    loss = SiteELBO("rloo")(model, guide)
    loss(x).backward()
    assert len(pyro.get_param_store()) == 0
    other_model, other_guide = vae(CategoricalVAE, CategoricalGuide, num_latents=2, num_classes=3)
    SiteELBO("rloo")(other_model, other_guide)(x).backward()
    assert all(p.grad is not None for p in both(model, guide, other_model, other_guide).parameters())


@pytest.mark.parametrize("local", [True, False])
def test_the_torch_idiom_works_under_either_setting_of_module_local_params(x, local):
    with pyro.settings.context(module_local_params=local):
        model, guide = vae(CategoricalVAE, CategoricalGuide, num_latents=2, num_classes=3)
        SiteELBO("rloo")(model, guide)(x).backward()
        assert all(p.grad is not None for p in both(model, guide).parameters())


def test_a_pyro_param_that_would_be_missed_is_refused():
    def model():
        pyro.sample("z", dist.Bernoulli(0.5))

    def guide():
        pyro.sample("z", dist.Bernoulli(logits=pyro.param("a", torch.zeros(()))))

    with pytest.raises(BadInput, match="pyro.param 'a'.*loss.parameters.*would miss it"):
        SiteELBO("score")(model, guide)()
    assert len(pyro.get_param_store()) == 0


def test_a_parameter_that_pyros_store_would_copy_is_refused_by_its_reason():
    class Model(PyroModule):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(2, 4)
            self.layer.weight.data = self.layer.weight.data.t().contiguous().t()

        def forward(self):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(self.layer(z), 1.0).to_event(1), obs=torch.ones(4))

    def guide():
        pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))

    with pytest.raises(BadInput, match="'layer.weight' is not contiguous in memory") as error:
        SiteELBO()(Model(), guide)()
    assert "\n" not in str(error.value) and len(pyro.get_param_store()) == 0
    with pyro.get_param_store().scope(), pytest.warns(GumboWarning, match="'layer.weight' is not contiguous in memory"):
        SVI(model := Model(), guide, pyro.optim.Adam({"lr": 0.1}), SiteELBO()).step()
        before = model.layer.weight.clone()
        SVI(model, guide, pyro.optim.Adam({"lr": 0.1}), Trace_ELBO()).step()
    assert torch.equal(before, model.layer.weight)  # what is warned of: the layer does not learn


def test_a_name_shared_by_model_and_guide_is_refused():
    class Program(PyroModule):
        def __init__(self):
            super().__init__()
            self.net = nn.Linear(1, 1)

        def forward(self):
            pyro.sample("z", dist.Bernoulli(logits=self.net(torch.ones(1)).sum()))

    with pytest.raises(BadInput, match=r"both have a parameter called 'net\.weight'"):
        SiteELBO("score")(Program(), Program())()


@pytest.mark.parametrize("Guide", [AutoNormal, AutoDiagonalNormal, AutoDelta])
@pytest.mark.parametrize("num_particles", [1, 3])
def test_autoguides(Guide, num_particles, param_store):
    x = torch.linspace(-1, 1, 5, dtype=F64)

    def model(x):
        mean = pyro.sample("mean", dist.Normal(torch.zeros((), dtype=F64), 1.0))
        scale = pyro.sample("scale", dist.LogNormal(torch.zeros((), dtype=F64), 1.0))
        with pyro.plate("data", 5):
            pyro.sample("x", dist.Normal(mean, scale), obs=x)

    guide = Guide(model)
    losses = {}
    for elbo in (
        SiteELBO("default", num_particles=num_particles),
        Trace_ELBO(num_particles=num_particles, vectorize_particles=True, max_plate_nesting=1),
    ):
        torch.manual_seed(0)
        guide(x)
        torch.manual_seed(1)
        losses[type(elbo).__name__] = elbo.loss_and_grads(model, guide, x)
    assert math.isclose(losses["SiteELBO"], losses["Trace_ELBO"], rel_tol=1e-6)


# Numbers.


@pytest.mark.parametrize("temperature", [1e-3, 1e-2, 0.1, 1.0, 100.0])
@pytest.mark.parametrize("make", [GumbelSoftmax, lambda t: GumbelSoftmax(t, hard=True), Concrete])
def test_relaxed_draws_stay_on_the_simplex_with_finite_log_probabilities(make, temperature):
    torch.manual_seed(0)
    logits = 5 * torch.randn(64, 20, 10)
    estimator = make(temperature)
    for fn in (dist.OneHotCategorical(logits=logits).to_event(1), dist.Bernoulli(logits=logits).to_event(2)):
        draw = estimator.draw(fn, 0)
        assert (draw.value >= 0).all() and (draw.value <= 1).all()
        if fn.event_shape[-1:] == (10,) and not isinstance(fn.base_dist, dist.Bernoulli):
            assert torch.allclose(draw.value.sum(-1), torch.ones(64, 20), atol=1e-5)
        for role in (estimator.guide_fn, estimator.model_fn):
            assert role(fn, draw, 0).log_prob(draw.value).isfinite().all()


def test_a_leave_one_out_baseline_is_what_it_says():
    class View:
        cost = torch.tensor([[1.0, 2.0], [3.0, 5.0], [8.0, 2.0]])
        particle_dim, num_particles, bound = -2, 3, None

    assert torch.equal(LeaveOneOut()(View), torch.tensor([[5.5, 3.5], [4.5, 2.0], [2.0, 3.5]]))


class Branching(Params):
    """A second coin that only shows where the first one says so."""

    def __init__(self, is_model):
        super().__init__(**({"w": 0.7} if is_model else {"a": 0.4, "b": -0.3}))
        self.is_model = is_model

    def forward(self):
        half = torch.tensor(0.0, dtype=F64)
        z = pyro.sample("z", dist.Bernoulli(logits=half if self.is_model else self.a))
        if z > 0.5:
            y = pyro.sample("y", dist.Bernoulli(logits=half if self.is_model else self.b))
        else:
            y = torch.zeros((), dtype=F64)
        if self.is_model:
            pyro.sample("x", dist.Normal(self.w * z + 2 * y, 1.0), obs=X[0])


@pytest.mark.parametrize("word", ["score", "score-average", "rloo", "enumerate", "disarm"])
def test_sites_that_come_and_go(word):
    """Particles whose programs took different branches; z-test for the antithetic one, |z| < 4.5 over 3 elements."""
    model, guide = Branching(True), Branching(False)
    loss = SiteELBO(word, vectorize_particles=False)(model, guide)
    exact = exact_gradient(model, guide)
    if word == "disarm":
        torch.manual_seed(0)
        assert z_scores(loss, both(model, guide), exact, 300).max() < 4.5
        return
    loss.initialize().eval()
    mean = mean_over_draws(lambda: gradient(loss(), both(model, guide)))
    assert torch.allclose(mean, exact, rtol=0, atol=1e-10)


@pytest.mark.parametrize("word", ["score", "score-average", "rloo"])
def test_sites_that_come_and_go_under_the_importance_weighted_bound(word):
    model, guide = Branching(True), Branching(False)
    with pyro.get_param_store().scope():
        exact = gradient(-exact_iwae(model, guide, num_particles=2), both(model, guide))
    loss = SiteELBO(word, objective="iwae", num_particles=2, vectorize_particles=False)(model, guide)
    loss.initialize().eval()
    mean = mean_over_draws(lambda: gradient(loss(), both(model, guide)))
    assert torch.allclose(mean, exact, rtol=0, atol=1e-10)


def test_a_learned_baseline_wants_its_site_in_the_first_call():
    model, guide = Branching(True), Branching(False)
    loss = SiteELBO({"z": "score", "*": "nvil"})(model, guide)
    with pytest.raises((UnsupportedSite, BadInput), match="first call"):
        loss.initialize()
        while "y" in loss.binding.states:
            loss = SiteELBO({"z": "score", "*": "nvil"})(model, guide).initialize()
        for _ in range(50):
            loss()


@pytest.mark.parametrize("word", ["score", "disarm"])
def test_rows_that_a_handler_outside_chooses_are_kept(word):
    """The draw of a plate's rows is made last, whether or not the programs' own noise is kept apart."""
    seen = []

    def model():
        with pyro.plate("data", 5, subsample_size=2) as rows:
            seen.append(rows.tolist())
            z = pyro.sample("z", dist.Bernoulli(torch.full((2,), 0.5, dtype=F64)))
            pyro.sample("x", dist.Normal(z, 1.0), obs=torch.arange(5.0, dtype=F64)[rows])

    class Guide(Params):
        def __init__(self):
            super().__init__(a=[0.1, 0.2])

        def forward(self):
            with pyro.plate("data", 5, subsample_size=2):
                pyro.sample("z", dist.Bernoulli(logits=self.a))

    class Rows(Messenger):
        def _pyro_sample(self, msg):
            if msg["name"] == "data" and not msg["done"]:
                msg["value"], msg["done"] = torch.tensor([3, 1]), True

    loss = SiteELBO(word)(model, Guide())
    with Rows():
        for _ in range(3):
            loss()
    assert {tuple(rows) for rows in seen} == {(3, 1)}


@pytest.mark.parametrize("word", ["pathwise", "rloo", "stl"])
def test_a_model_that_replays_another_trace_takes_the_guides_draws_and_rows(word):
    """As in Pyro, where the guide's draws replace what the model's own handler set."""
    mean = torch.tensor(0.3, requires_grad=True)
    x = torch.arange(5.0)

    def guide():
        with pyro.plate("data", 5, subsample_size=2) as rows:
            pyro.sample("z", dist.Normal(mean + x[rows], 1.0))

    def model():
        with pyro.plate("data", 5, subsample_size=2) as rows:
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x[rows])

    torch.manual_seed(0)
    trace = pyro.poutine.trace(guide).get_trace()
    found = []
    for program in (model, pyro.poutine.replay(model, trace=trace)):
        torch.manual_seed(1)
        loss = SiteELBO(word)(program, guide)()
        found.append(torch.stack([loss.detach(), *torch.autograd.grad(loss, [mean])]))
    assert torch.equal(*found)
