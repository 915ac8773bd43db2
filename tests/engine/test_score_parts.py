"""Distributions that are reparameterized in part, whose score term stands beside the path; factors in the guide."""

from __future__ import annotations

import itertools
import math
from contextlib import nullcontext

import pyro
import pyro.distributions as dist
import pytest
import torch
from exact_means import exact_gradient
from programs import F64, OneCoinModel, Params, X, gradient
from pyro.distributions.score_parts import ScoreParts
from pyro.distributions.testing.rejection_gamma import RejectionGamma, ShapeAugmentedBeta, ShapeAugmentedGamma
from pyro.distributions.torch_distribution import TorchDistribution
from pyro.distributions.util import broadcast_shape
from torch import nn
from torch.distributions import constraints
from ztest import misses

from gumbo.errors import BadInput, GumboWarning, UnsupportedSite
from gumbo.inference import SiteELBO
from gumbo.inference.auditing.exact import mean_over_draws


class Jump(TorchDistribution):
    """``loc + b`` for a coin b: a path through ``loc``, a score for the coin."""

    arg_constraints = {"loc": constraints.real, "logits": constraints.real}
    support = constraints.real
    has_rsample = True

    def __init__(self, loc, logits):
        self.loc, self.logits = torch.broadcast_tensors(loc, logits)
        super().__init__(self.loc.shape, validate_args=False)

    def expand(self, batch_shape, _instance=None):
        return Jump(self.loc.expand(batch_shape), self.logits.expand(batch_shape))

    def rsample(self, sample_shape=()):
        return self.loc + dist.Bernoulli(logits=self.logits).sample(sample_shape)

    def log_prob(self, value):
        coin = (value - self.loc).detach().round()
        shape = broadcast_shape(self.batch_shape, value.shape)
        return dist.Bernoulli(logits=self.logits.expand(shape)).log_prob(coin)

    def score_parts(self, value):
        log_prob = self.log_prob(value)
        coin = (value - self.loc).detach().round()
        return ScoreParts(log_prob, dist.Bernoulli(logits=self.logits).log_prob(coin), log_prob)


class JumpGuide(Params):
    """A jump, and one that depends on it; in a plate, masked, or as an event."""

    def __init__(self, wrap="plain"):
        super().__init__(loc=0.3, logit=-0.4, slope=0.7)
        self.wrap = wrap

    def forward(self):
        wraps = {
            "plain": lambda fn: fn,
            "event": lambda fn: fn.expand([1]).to_event(1),
            "masked": lambda fn: fn.mask(torch.tensor(True)),
            "bool mask": lambda fn: fn.mask(True),
        }
        z = pyro.sample("z", wraps[self.wrap](Jump(self.loc, self.logit)))
        z = z.squeeze(-1) if self.wrap == "event" else z
        pyro.sample("y", Jump(0.5 * z, self.logit + self.slope * z))


class JumpModel(Params):
    def __init__(self, wrap="plain"):
        super().__init__(w=0.8)
        self.wrap = wrap

    def forward(self):
        prior = dist.Normal(torch.zeros((), dtype=F64), 1.0)
        z = pyro.sample("z", prior.expand([1]).to_event(1) if self.wrap == "event" else prior)
        z = z.squeeze(-1) if self.wrap == "event" else z
        y = pyro.sample("y", dist.Normal(self.w * z, 1.0))
        pyro.sample("x", dist.Normal(self.w * y, 0.5), obs=X[0])


def jump_outcomes(guide, model):
    """For each pair of coins log q of them, and log p − log q of the values that they lead to, by hand."""
    normal = torch.distributions.Normal
    for first, second in itertools.product((0.0, 1.0), repeat=2):
        z = guide.loc + first
        coin = dist.Bernoulli(logits=guide.logit).log_prob(torch.tensor(first, dtype=F64))
        y = 0.5 * z + second
        other = dist.Bernoulli(logits=guide.logit + guide.slope * z).log_prob(torch.tensor(second, dtype=F64))
        p = (
            normal(0.0, 1.0).log_prob(z)
            + normal(model.w * z, 1.0).log_prob(y)
            + normal(model.w * y, 0.5).log_prob(X[0])
        )
        yield coin + other, p - coin - other


@pytest.mark.parametrize("wrap", ["plain", "event", "masked", "bool mask"])
@pytest.mark.parametrize("word", ["default", "pathwise", "stl"])
@pytest.mark.parametrize("vectorize", [True, False])
def test_the_score_term_stands_beside_the_path(word, wrap, vectorize):
    model, guide = JumpModel(wrap), JumpGuide(wrap)
    both = nn.ModuleList([model, guide])
    exact = gradient(-sum(q.exp() * f for q, f in jump_outcomes(guide, model)), both)
    for num_particles in (1, 2):
        loss = SiteELBO(word, num_particles=num_particles, vectorize_particles=vectorize)(model, guide)
        mean = mean_over_draws(lambda loss=loss: gradient(loss(), both))
        assert torch.allclose(mean, exact, rtol=0, atol=1e-10), num_particles


@pytest.mark.parametrize("vectorize", [True, False])
def test_the_score_term_under_the_importance_weighted_bound(vectorize):
    model, guide = JumpModel(), JumpGuide()
    both = nn.ModuleList([model, guide])
    pairs = itertools.product(list(jump_outcomes(guide, model)), repeat=2)
    bound = sum((q + r).exp() * (torch.logaddexp(f, g) - math.log(2)) for (q, f), (r, g) in pairs)
    exact = gradient(-bound, both)
    loss = SiteELBO(objective="iwae", num_particles=2, vectorize_particles=vectorize)(model, guide)
    mean = mean_over_draws(lambda: gradient(loss(), both))
    assert torch.allclose(mean, exact, rtol=0, atol=1e-10)


GAMMAS = {
    "rejection": lambda a: RejectionGamma(a, torch.tensor(1.3, dtype=F64)),
    "shape augmented": lambda a: ShapeAugmentedGamma(a, torch.tensor(1.3, dtype=F64)),
}


class GammaGuide(Params):
    def __init__(self, make):
        super().__init__(a=[1.4, 2.2, 3.0])
        self.make = make

    def forward(self):
        with pyro.plate("data", 3):
            pyro.sample("z", self.make(self.a))


def gamma_model():
    with pyro.plate("data", 3):
        z = pyro.sample("z", dist.Gamma(torch.tensor(2.0, dtype=F64), 1.0))
        pyro.sample("x", dist.Poisson(z), obs=torch.tensor([1.0, 2.0, 5.0], dtype=F64))


@pytest.mark.parametrize("make", GAMMAS)
def test_pyros_own_rejection_samplers_as_under_trace_elbo(make, param_store):
    found = []
    for elbo in (pyro.infer.Trace_ELBO(), SiteELBO(), SiteELBO(vectorize_particles=False)):
        guide = GammaGuide(GAMMAS[make])
        elbo.loss_and_grads(gamma_model, guide)  # the first call looks at the programs
        guide.a.grad = None
        pyro.set_rng_seed(3)
        value = elbo.loss_and_grads(gamma_model, guide)
        found.append(torch.cat([torch.tensor([value], dtype=F64), guide.a.grad]))
    assert torch.allclose(found[1], found[0], rtol=0, atol=1e-10)
    assert torch.allclose(found[2], found[0], rtol=0, atol=1e-10)


class SkewGuide(Params):
    """Skew-normal draws by rejection, N(z)·2σ(tz): nothing of t moves a draw, so that all of its slope is score."""

    def __init__(self, count):
        super().__init__(t=0.8)
        self.count = count

    def forward(self):
        with pyro.plate("data", self.count):
            pyro.sample(
                "z",
                dist.Rejector(
                    dist.Normal(torch.zeros(self.count, dtype=F64), 1.0),
                    lambda z: nn.functional.logsigmoid(self.t * z),
                    torch.full((self.count,), -math.log(2.0), dtype=F64),
                ),
            )


def skew_model(count):
    with pyro.plate("data", count):
        z = pyro.sample("z", dist.Normal(torch.zeros((), dtype=F64), 1.0))
        pyro.sample("x", dist.Normal(z, 0.7), obs=torch.tensor(1.0, dtype=F64))


def skew_slope(num_particles=1):
    """∂/∂t of one datum's bound, by quadrature."""
    t = torch.tensor(0.8, dtype=F64, requires_grad=True)
    z = torch.linspace(-8.0, 8.0, 801, dtype=F64)
    normal = torch.distributions.Normal(torch.zeros((), dtype=F64), 1.0).log_prob(z)
    q = normal + math.log(2.0) + nn.functional.logsigmoid(t * z)
    f = normal + torch.distributions.Normal(z, 0.7).log_prob(torch.tensor(1.0, dtype=F64)) - q
    if num_particles == 1:
        return torch.autograd.grad(torch.trapezoid(q.exp() * f, z), t)[0]
    pair = (q[:, None] + q).exp() * (torch.logaddexp(f[:, None], f) - math.log(2))
    return torch.autograd.grad(torch.trapezoid(torch.trapezoid(pair, z), z), t)[0]


@pytest.mark.parametrize(
    ("word", "objective"), [("pathwise", "elbo"), ("stl", "elbo"), ("score", "elbo"), ("pathwise", "iwae")]
)
def test_a_rejector_by_z_score(word, objective):
    count, particles = 1000, 1 + (objective == "iwae")
    guide = SkewGuide(count)
    loss = SiteELBO(word, objective=objective, num_particles=particles, vectorize_particles=False)(
        lambda: skew_model(count), guide
    )
    draws = torch.stack([-gradient(loss(), guide) / count for _ in range(40)])
    exact = skew_slope(particles)
    assert exact.abs() > 0.1  # what the path alone would give is 0
    assert not misses(draws, exact[None], resolves=0.1)


def test_words_that_cannot_serve_a_rejector_say_so(param_store):
    model, guide = lambda: skew_model(3), SkewGuide(3)
    for word in ("measure-valued", "enumerate", "rebar", "arm", "gumbel-softmax", "local-expectation"):
        with pytest.raises(UnsupportedSite, match="site 'z' cannot take estimator"):
            SiteELBO(word).loss(model, guide)
    with pytest.raises(UnsupportedSite, match="'dreg': Rejector is reparameterized in part only"):
        SiteELBO("dreg", objective="iwae", num_particles=2).loss(model, guide)


@pytest.mark.parametrize("wrap", ["beta", "transformed"])
def test_a_score_term_that_a_distribution_hides(wrap):
    def guide():
        a = torch.tensor(1.5, requires_grad=True)
        if wrap == "beta":
            fn = ShapeAugmentedBeta(a, a)
        else:
            fn = dist.TransformedDistribution(RejectionGamma(a, torch.tensor(1.0)), [dist.transforms.ExpTransform()])
        pyro.sample("z", fn)

    def model():
        pyro.sample("z", dist.Beta(1.0, 1.0) if wrap == "beta" else dist.LogNormal(0.0, 1.0))

    with pytest.raises(UnsupportedSite, match="made of draws that are reparameterized in part"):
        SiteELBO("pathwise").loss(model, guide)


# Factors in the guide.


class OwnDraws(Params):
    """A guide that draws outside of Pyro and says what that cost: a coin within ``pyro.factor``."""

    def __init__(self, place="before"):
        super().__init__(a=[0.4, -0.9], b=0.3, c=0.5)
        self.place = place

    def forward(self):
        plate = pyro.plate("data", 2)
        first = pyro.sample("e", dist.Bernoulli(logits=self.c))
        logits = self.a + 0.6 * first
        coin = dist.Bernoulli(logits=logits).sample()  # outside of pyro.sample
        if self.place == "before":
            self.say(plate, logits, coin)
        with plate:
            pyro.sample("u", dist.Delta(coin))
            pyro.sample("y", dist.Bernoulli(logits=self.b + coin))
        if self.place == "after":
            self.say(plate, logits, coin)
        pyro.sample("g", dist.Bernoulli(logits=self.b - coin.sum(-1, keepdim=True)))
        if self.place == "last":
            self.say(plate, logits, coin)

    def say(self, plate, logits, coin):
        with plate:
            pyro.factor("logq", dist.Bernoulli(logits=logits).log_prob(coin), has_rsample=False)


class PlainDraws(OwnDraws):
    """The same guide, all in Pyro."""

    def forward(self):
        first = pyro.sample("e", dist.Bernoulli(logits=self.c))
        with pyro.plate("data", 2):
            coin = pyro.sample("u", dist.Bernoulli(logits=self.a + 0.6 * first))
            pyro.sample("y", dist.Bernoulli(logits=self.b + coin))
        pyro.sample("g", dist.Bernoulli(logits=self.b - coin.sum(-1, keepdim=True)))


class OwnModel(Params):
    def __init__(self):
        super().__init__(w=0.7)

    def forward(self):
        plate = pyro.plate("data", 2)
        half = torch.tensor(0.4, dtype=F64)
        e = pyro.sample("e", dist.Bernoulli(half))
        with plate:
            u = pyro.sample("u", dist.Bernoulli(half))
            y = pyro.sample("y", dist.Bernoulli(half))
        g = pyro.sample("g", dist.Bernoulli(half))
        with plate:
            pyro.sample("x", dist.Normal(self.w * (u + 2 * y + g - e), 1.0), obs=X)


MIXED = {"e": "enumerate", "y": "score", "g": "score"}


@pytest.mark.parametrize(
    ("words", "vectorize", "place"),
    [
        *(("score", True, place) for place in ("before", "after", "last")),
        *(pytest.param(MIXED, False, place, marks=pytest.mark.slow) for place in ("before", "after", "last")),
    ],
    ids=str,
)
def test_a_factor_of_draws_without_a_path_keeps_its_score(words, vectorize, place):
    model, guide, plain = OwnModel(), OwnDraws(place), PlainDraws()
    loss = SiteELBO(words, vectorize_particles=vectorize)(model, guide)
    mean = mean_over_draws(lambda: gradient(loss(), nn.ModuleList([model, guide])))
    assert torch.allclose(mean, exact_gradient(model, plain), rtol=0, atol=1e-9)


@pytest.mark.parametrize("objective", ["iwae", "rws"])
def test_a_factor_enters_the_importance_weights(objective):
    class Coin(Params):
        def __init__(self, own):
            super().__init__(a=0.4)
            self.own = own

        def forward(self):
            if self.own:
                coin = dist.Bernoulli(logits=self.a).sample()
                pyro.sample("z", dist.Delta(coin))
                pyro.factor("logq", dist.Bernoulli(logits=self.a).log_prob(coin), has_rsample=False)
            else:
                pyro.sample("z", dist.Bernoulli(logits=self.a))

    def gradients(own):
        guide = Coin(own)
        loss = SiteELBO(
            *(["score"] if objective == "iwae" else []), objective=objective, num_particles=2, vectorize_particles=False
        )(OneCoinModel(), guide)
        return mean_over_draws(lambda: gradient(loss(), guide))

    assert torch.allclose(gradients(True), gradients(False), rtol=0, atol=1e-10)


def test_a_factor_of_the_guide_must_say_where_it_comes_from():
    def guide():
        pyro.sample("z", dist.Bernoulli(0.5))
        pyro.factor("f", torch.tensor(0.0))

    def model():
        pyro.sample("z", dist.Bernoulli(0.5))

    with pytest.raises(BadInput, match=r"pyro.factor\('f', …\) in the guide must say.*has_rsample"):
        SiteELBO("score").loss(model, guide)


@pytest.mark.parametrize(("word", "has_rsample", "warned"), [("pathwise", 0, 1), ("pathwise", 1, 0), ("score", 0, 0)])
def test_a_term_of_the_loss_that_is_declared_a_score_is_warned_of(word, has_rsample, warned):
    class Guide(Params):
        def __init__(self):
            super().__init__(m=0.3, c=0.2)

        def forward(self):
            pyro.sample("z", dist.Normal(self.m, 1.0))
            pyro.factor("classified", 0.7 * self.c, has_rsample=bool(has_rsample))

    def model():
        z = pyro.sample("z", dist.Normal(torch.tensor(0.0, dtype=F64), 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=X[0])

    guide = Guide()
    expected = pytest.warns(GumboWarning, match="'classified'.*every draw of the guide has a path.*has_rsample")
    with expected if warned else nullcontext():
        SiteELBO(word)(model, guide)().backward()
    if has_rsample:
        assert guide.c.grad.item() == pytest.approx(0.7, abs=1e-12)


def test_dreg_has_no_path_for_a_factor():
    def guide():
        pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.factor("f", torch.tensor(0.0), has_rsample=False)

    with pytest.raises(UnsupportedSite, match="site 'f' cannot take estimator 'dreg'"):
        SiteELBO("dreg", objective="iwae", num_particles=2).loss(lambda: pyro.sample("z", dist.Normal(0.0, 1.0)), guide)
