"""Distributions of a user's own: a subclass with another draw or density is not taken for the class above it."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import pytest
import torch
from programs import F64, gradient
from torch import nn
from ztest import misses

from gumbo.errors import BadInput, UnsupportedSite
from gumbo.inference import SiteELBO
from gumbo.inference.auditing.exact import exact_elbo
from gumbo.inference.estimators import detached_draw, estimators


class Gated(dist.Bernoulli):
    """A coin that another coin must allow: its probability is half of the one that its logits say."""

    def sample(self, sample_shape=()):
        drawn = super().sample(sample_shape)
        return drawn * torch.bernoulli(torch.full_like(drawn, 0.5))

    def log_prob(self, value):
        half = self.probs / 2
        return value * half.log() + (1 - value) * (1 - half).log()


class WithMoments(Gated):
    @property
    def mean(self):
        return self.probs / 2

    @property
    def variance(self):
        return self.mean * (1 - self.mean)


class Wide(dist.Normal):
    """A Normal of twice the scale."""

    def rsample(self, sample_shape=()):
        return 2 * super().rsample(sample_shape) - self.loc

    def sample(self, sample_shape=()):
        with torch.no_grad():
            return self.rsample(sample_shape)

    def log_prob(self, value):
        return torch.distributions.Normal(self.loc, 2 * self.scale).log_prob(value)


class Guide(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.kind = kind
        self.a = nn.Parameter(torch.tensor([0.4, -0.7], dtype=F64))

    def forward(self):
        with pyro.plate("data", 2):
            own = {"logits": self.a} if issubclass(self.kind, dist.Bernoulli) else {"loc": self.a, "scale": 0.5}
            pyro.sample("z", self.kind(**own))


class Model(nn.Module):
    def __init__(self, prior):
        super().__init__()
        self.prior = prior

    def forward(self):
        with pyro.plate("data", 2):
            z = pyro.sample("z", self.prior)
            pyro.sample("x", dist.Normal(1.5 * z, 1.0), obs=torch.tensor([1.2, -0.4], dtype=F64))


COIN = dist.Bernoulli(torch.full((2,), 0.3, dtype=F64))


def served(fn):
    return [word for word, make in estimators.items() if make().refusal({"name": "z", "fn": fn}) is None]


def mean_of(word, model, guide, draws):
    options = {} if word == "enumerate" else {"num_particles": 3}
    loss = SiteELBO(word, **options)(model, guide)
    loss.initialize()
    return torch.stack([gradient(loss(), guide) for _ in range(1 if word == "enumerate" else draws)])


@pytest.mark.slow
@pytest.mark.parametrize("kind", [Gated, WithMoments])
def test_every_word_refuses_a_coin_of_another_law_or_is_right(kind):
    torch.manual_seed(0)
    model, guide = Model(COIN), Guide(kind)
    plain = Guide(dist.Bernoulli)
    with torch.no_grad():
        plain.a.copy_((guide.a.sigmoid() / 2).logit())
    # The chain rule from the logit of the half probability to the logit.
    p = guide.a.detach().sigmoid()
    slope = 0.5 * p * (1 - p) / ((p / 2) * (1 - p / 2))
    truth = gradient(-exact_elbo(model, plain), plain) * slope
    words = served(kind(logits=guide.a))
    assert {"score", "rloo", "enumerate", "local-expectation"} <= set(words)
    assert not {"disarm", "arm", "arms", "measure-valued", "rebar", "gumbel-softmax", "reinmax", "stein"} & set(words)
    assert ("muprop" in words) == ("double-cv" in words) == (kind is WithMoments)
    for word in words:
        found = mean_of(word, model, guide, 400)
        if len(found) == 1:
            assert torch.allclose(found[0], truth, atol=1e-10), word
        elif estimators[word]().unbiased:
            assert not misses(found, truth, resolves=0.35), word


@pytest.mark.slow
def test_every_word_refuses_a_normal_of_another_law_or_is_right():
    torch.manual_seed(0)
    model, guide = Model(dist.Normal(torch.zeros(2, dtype=F64), 1.0)), Guide(Wide)
    # log p(x, z) has curvature 1 + 1.5² in z, and its slope is linear.
    truth = (1 + 1.5**2) * guide.a.detach() - 1.5 * torch.tensor([1.2, -0.4], dtype=F64)
    words = served(Wide(guide.a, 0.5))
    assert "pathwise" in words and "measure-valued" not in words
    for word in ("pathwise", "stl", "rloo", "score"):
        assert word in words and not misses(mean_of(word, model, guide, 1500), truth, resolves=1.5), word


@pytest.mark.parametrize("word", ["straight-through", "reinmax", "gumbel-softmax"])
def test_a_prior_of_another_law_has_no_linear_extension(word):
    prior = Gated(torch.full((2,), 0.6, dtype=F64))
    with pytest.raises((BadInput, UnsupportedSite), match="Gated has a draw or a density of its own") as caught:
        SiteELBO(word)(Model(prior), Guide(dist.Bernoulli))()
    assert "\n" not in str(caught.value)
    assert SiteELBO(word)(Model(COIN), Guide(dist.Bernoulli))().isfinite()


class Keeping(dist.TorchDistribution):
    """A coin that keeps the probability that its draw computes, and reads it again in its density."""

    arg_constraints, support, has_enumerate_support = {}, dist.constraints.boolean, True

    def __init__(self, logits):
        self.logits, self.kept = logits, None
        super().__init__(logits.shape, validate_args=False)

    def probability(self):
        if self.kept is None:
            self.kept = self.logits.sigmoid()
        return self.kept

    def sample(self, sample_shape=()):
        return torch.bernoulli(self.probability().expand(sample_shape + self.batch_shape))

    def log_prob(self, value):
        return dist.Bernoulli(self.probability()).log_prob(value)


def gaussian_chain(a):
    unit = dist.Normal(torch.zeros(2, dtype=F64), 1.0).to_event(1)
    step = dist.Normal(a, 1.0).to_event(1)
    return dist.GaussianHMM(step, torch.eye(2, dtype=F64), step, torch.eye(2, dtype=F64), unit, duration=3)


@pytest.mark.parametrize(
    "law",
    [
        Keeping,
        gaussian_chain,
        lambda a: gaussian_chain(a).mask(True),
        lambda a: dist.TransformedDistribution(gaussian_chain(a), [dist.transforms.ExpTransform()]),
    ],
    ids=["own", "chain", "masked", "transformed"],
)
def test_what_a_law_keeps_of_its_draw_has_a_gradient(law):
    a = torch.tensor([0.4, -0.7], dtype=F64, requires_grad=True)
    drawn_from = law(a)
    value = detached_draw(drawn_from).value
    assert not value.requires_grad
    found, right = (torch.autograd.grad(fn.log_prob(value).sum(), a)[0] for fn in (drawn_from, law(a)))
    assert torch.allclose(found, right, atol=1e-10)
