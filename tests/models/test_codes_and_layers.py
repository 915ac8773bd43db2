"""Vector-quantized autoencoders and deep exponential families: their laws, their guides, their limits."""

from __future__ import annotations

import itertools

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from torch.nn.functional import softplus

from gumbo.errors import BadInput, UnknownName
from gumbo.guides import CategoricalGuide, LayeredGuide, VectorQuantizedGuide
from gumbo.inference import SiteELBO
from gumbo.models import CategoricalVAE, PoissonDEF, VectorQuantizedVAE

pytestmark = pytest.mark.usefixtures("param_store")


def quantized(temperature=1.0):
    torch.manual_seed(0)
    model = VectorQuantizedVAE((4,), num_codes=2, num_classes=3, code_dim=2, hidden=(5,))
    return model.double(), VectorQuantizedGuide(model, temperature).double()


def every_code():
    return torch.eye(3).double()[torch.tensor(list(itertools.product(range(3), repeat=2)))]


def test_codes_are_likelier_the_nearer_their_vectors():
    model, guide = quantized(0.5)
    x = torch.ones(1, 4).double()
    law = poutine.trace(guide).get_trace(x).nodes["y"]["fn"]
    places = guide.encoder_heads(guide.features(x, {})).view(2, 2)
    for n in range(2):
        squares = (places[n] - model.decoder_codebook.vectors).square().sum(-1)
        assert torch.allclose(law.base_dist.probs[0, n], (-squares / 0.5).softmax(-1))


def test_enumeration_is_the_exact_gradient_of_the_listed_bound():
    model, guide = quantized()
    x = torch.tensor([[1.0, 0.0, 1.0, 1.0]]).double()
    loss = SiteELBO("enumerate")(model, guide)(x)
    q = poutine.trace(guide).get_trace(x).nodes["y"]["fn"]
    codes = every_code().unsqueeze(1)
    log_q = q.log_prob(codes)
    f = model.decoder_prior().log_prob(codes) + model.likelihood(codes).log_prob(x) - log_q
    exact = -(log_q.exp() * f).sum()
    parameters = list(dict.fromkeys([*model.parameters(), *guide.parameters()]))
    assert torch.isclose(loss, exact)
    pairs = zip(torch.autograd.grad(loss, parameters), torch.autograd.grad(exact, parameters), strict=True)
    assert all(torch.allclose(a, b, atol=1e-10) for a, b in pairs)


def test_the_cold_limit_is_the_deterministic_code_and_its_encoder_has_no_gradient():
    model, guide = quantized(1e-4)
    x = torch.tensor([[1.0, 0.0, 1.0, 1.0]]).double()
    nearest = guide.logits(guide.features(x, {})).argmax(-1)
    y = torch.eye(3).double()[nearest]
    bound = model.decoder_prior().log_prob(y) + model.likelihood(y).log_prob(x)
    loss = SiteELBO("enumerate")(model, guide)(x)
    assert torch.isclose(-loss, bound.sum(), atol=1e-6)
    loss.backward()
    assert all(parameter.grad.abs().max() < 1e-6 for parameter in guide.encoder_heads.parameters())


def test_other_guides_serve_codes_and_this_one_no_other_model():
    model, _ = quantized()
    assert CategoricalGuide(model).double()(torch.ones(2, 4).double())["y"].shape == (2, 2, 3)
    with pytest.raises(BadInput, match="no codebook"):
        VectorQuantizedGuide(CategoricalVAE((4,), hidden=(5,)))
    with pytest.raises(UnknownName, match="autoregressive"):
        VectorQuantizedVAE((4,), prior="markov")


@pytest.mark.parametrize("kind", ["gamma", "poisson"])
def test_a_layer_has_the_mean_that_the_layer_above_makes(kind):
    torch.manual_seed(0)
    model = PoissonDEF((5,), layers=(3, 2), kind=kind, shape=0.7)
    x = model.example(4)["x"]
    trace = poutine.trace(model).get_trace(x)
    trace.compute_log_prob()
    z2, z1 = (trace.nodes[name]["value"] for name in ("z2", "z1"))
    mean = z2 @ softplus(model.decoder["z1"]) + 1e-3
    expected = dist.Poisson(mean) if kind == "poisson" else dist.Gamma(torch.tensor(0.7), 0.7 / mean)
    assert torch.allclose(trace.nodes["z1"]["log_prob"], expected.log_prob(z1).sum(-1), atol=1e-4)
    assert torch.allclose(trace.nodes["z1"]["fn"].mean, mean, rtol=1e-4)
    rate = z1 @ softplus(model.decoder["x"]) + 1e-3
    assert torch.allclose(trace.nodes["x"]["log_prob"], dist.Poisson(rate).log_prob(x).sum(-1), atol=1e-4)
    assert torch.allclose(model.topics().sum(-1), torch.ones(3))


def test_each_kind_takes_its_own_estimators():
    torch.manual_seed(0)
    x = torch.poisson(torch.full((6, 5), 2.0))
    for kind, word in (("gamma", "pathwise"), ("poisson", "rloo")):
        model = PoissonDEF((5,), layers=(3, 2), kind=kind)
        guide = LayeredGuide(model)
        assert guide.parents == {"z1": (), "z2": ("z1",)}
        with pyro.validation_enabled(True):
            SiteELBO(word)(model, guide)(x).backward()
        assert all(parameter.grad.isfinite().all() for parameter in (*model.parameters(), *guide.parameters()))


def test_layers_that_cannot_be_are_refused():
    with pytest.raises(UnknownName, match="gamma"):
        PoissonDEF((5,), kind="normal")
    with pytest.raises(BadInput, match="at least one width"):
        PoissonDEF((5,), layers=())
    with pyro.validation_enabled(True), pytest.raises(BadInput, match="counts"):
        PoissonDEF((5,))(torch.full((2, 5), 0.5))
