"""Networks that output distributions, Bayesian networks, global weights and expectations, against exact answers."""

from __future__ import annotations

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from torch.distributions import MultivariateNormal
from torch.nn.functional import cross_entropy, one_hot, softplus

from gumbo.errors import BadInput, UnknownName
from gumbo.experiments.data import load
from gumbo.guides import AutoGuide, CategoricalGuide, LayeredGuide, NoGuide, NormalGuide, UnconditionalGuide, fitting
from gumbo.inference import SiteELBO, evaluate, fit, make_loss
from gumbo.models import (
    BayesianRegression,
    Expectation,
    GaussianVAE,
    HeteroscedasticRegression,
    NeuralBayesNet,
    NeuralClassifier,
)


def train(loss, parameters, *args, steps=100, lr=0.05, **kwargs):
    optimizer = torch.optim.Adam(list(parameters), lr=lr)
    for _ in range(steps):
        optimizer.zero_grad()
        loss(*args, **kwargs).backward()
        optimizer.step()


# --- networks that output a distribution ------------------------------------------------------------------------------


def test_heteroscedastic_regression_by_hand(param_store):
    model = HeteroscedasticRegression((3,), target_shape=(2,), hidden=(5,), min_sd=0.01)
    x, y = torch.randn(4, 3), torch.randn(4, 2)
    out = model.decoder(x)
    expected = dist.Normal(out[:, :2], softplus(out[:, 2:]) + 0.01).log_prob(y).sum()
    for word in ("trace", "default"):
        assert make_loss(word).differentiable_loss(model, NoGuide(model), x, y=y).item() == pytest.approx(
            -expected.item(), rel=1e-5
        )
    found = evaluate(model, NoGuide(model), {"x": x, "y": y}, num_samples=2)
    assert found.elbo == found.log_evidence == pytest.approx(expected.item() / 4, rel=1e-5)
    assert found.rate == 0


def test_classifier_is_cross_entropy_and_learns_digits(param_store):
    data = load("digits", binarize="static")
    model = NeuralClassifier((1, 8, 8), hidden=(32,))
    x, y = data.train[:300], data.labels["train"][:300]
    loss = SiteELBO()(model, NoGuide(model))
    expected = cross_entropy(model.classify(x), y, reduction="sum")
    torch.testing.assert_close(loss(x, y=y), expected)
    torch.testing.assert_close(loss(x, y=one_hot(y, 10).float()), expected)
    result = fit(
        model,
        NoGuide(model),
        {"x": data.train, "y": data.labels["train"]},
        valid=model.inputs(data.valid, data.labels["valid"]),
        epochs=3,
        batch_size=64,
        lr=5e-3,
        progress=False,
    )
    assert result.history[-1]["valid_elbo"] > -0.7 > result.history[0]["valid_elbo"]
    right = (model.classify(data.test).argmax(-1) == data.labels["test"]).double().mean()
    assert right > 0.85
    assert model.sample_prior(x=data.test[:5])["y"].sum(-1).tolist() == [1.0] * 5


def test_targets_are_checked_in_one_line():
    model = HeteroscedasticRegression((3,), hidden=(4,))
    with pytest.raises(BadInput, match=r"y has shape \(2, 2\), expected \(2, 1\)"):
        model(torch.zeros(2, 3), y=torch.zeros(2, 2))
    with pytest.raises(BadInput, match="give it x"):
        model()
    classifier = NeuralClassifier((3,), num_classes=4)
    with pytest.raises(BadInput, match="expected integers of shape"):
        classifier(torch.zeros(2, 3), y=torch.zeros(2))
    with pytest.raises(BadInput, match=r"it leaves the latents \(z\) undrawn; guides that fit"):
        NoGuide(GaussianVAE((1, 4, 4), latent_dim=2, hidden=(4,)))
    with pytest.raises(BadInput, match="it has no latents; guides that fit: none"):
        NormalGuide(model)


# --- global weights ---------------------------------------------------------------------------------------------------


def linear_data(rows=40):
    torch.manual_seed(5)
    x = torch.randn(rows, 2, dtype=torch.float64) @ torch.tensor([[1.0, 0.9], [0.0, 0.4]], dtype=torch.float64)
    return x, (x @ torch.tensor([1.0, -1.0]).double() + 0.5 + 0.3 * torch.randn(rows).double()).unsqueeze(-1)


def exact_posterior(x, y, noise):
    """The weights' posterior and log p(y), with the bias as the last weight; prior variances 1/2, 1/2 and 1."""
    design = torch.cat([x, torch.ones(len(x), 1).double()], -1)
    prior = torch.tensor([0.5, 0.5, 1.0], dtype=torch.float64)
    precision = design.T @ design / noise**2 + torch.diag(1 / prior)
    covariance = torch.linalg.inv(precision)
    marginal = MultivariateNormal(
        torch.zeros(len(x)).double(), design @ torch.diag(prior) @ design.T + noise**2 * torch.eye(len(x)).double()
    )
    return MultivariateNormal(covariance @ design.T @ y[:, 0] / noise**2, covariance), marginal.log_prob(y[:, 0])


def test_linear_regression_reaches_its_exact_posterior_and_evidence():
    x, y = linear_data()
    truth, evidence = exact_posterior(x, y, 0.3)
    model = BayesianRegression((2,), hidden=(), noise_sd=0.3).double()
    guide = AutoGuide(model, init_scale=0.3).double()
    loss = SiteELBO(num_particles=16)(model, guide)
    train(loss, guide.parameters(), x, y=y, steps=120, lr=0.05)
    train(loss, guide.parameters(), x, y=y, steps=60, lr=0.01)
    found = guide.encoder.get_posterior()
    torch.testing.assert_close(found.mean.detach(), truth.mean, rtol=0, atol=0.03)
    torch.testing.assert_close(found.covariance_matrix.detach(), truth.covariance_matrix, rtol=0.5, atol=2e-3)
    elbo = evaluate(model, guide, {"x": x, "y": y}, num_samples=300).elbo * len(x)
    assert evidence.item() - 1.0 < elbo < evidence.item() + 0.5


def test_minibatches_scale_the_likelihood_and_not_the_prior(param_store):
    x, y = linear_data()
    weights = {"weight1": torch.tensor([[0.7, -0.2]]).double(), "bias1": torch.tensor([0.1]).double()}

    def log_joint(size, rows):
        model = BayesianRegression((2,), hidden=(), noise_sd=0.3, data_size=size).double()
        trace = poutine.trace(poutine.condition(model, data=weights)).get_trace(x[:rows], y=y[:rows])
        return trace.log_prob_sum().item()

    likelihood = dist.Normal(x @ weights["weight1"][0] + 0.1, 0.3).log_prob(y[:, 0])
    prior = dist.Normal(0.0, 0.5**0.5).log_prob(weights["weight1"]).sum() + dist.Normal(0.0, 1.0).log_prob(
        weights["bias1"]
    )
    assert log_joint(None, 40) == pytest.approx((prior + likelihood.sum()).item(), rel=1e-6)
    assert log_joint(40, 10) == pytest.approx((prior + 4 * likelihood[:10].sum()).item(), rel=1e-6)


@pytest.mark.parametrize("kind", ["normal", "diagonal-normal", "multivariate-normal", "low-rank-normal", "delta"])
def test_every_kind_of_autoguide_trains_and_survives_saving(kind):
    x, y = (part.float() for part in linear_data())
    model = BayesianRegression((2,), hidden=(3,))
    guide = AutoGuide(model, kind)
    before = {name: p.clone() for name, p in guide.named_parameters()}
    result = fit(model, guide, {"x": x, "y": y}, valid={"x": x, "y": y}, epochs=2, batch_size=40, progress=False)
    assert len(result.history) == 3
    assert all(not torch.equal(p, before[name]) for name, p in guide.named_parameters())
    twin = AutoGuide(model, **guide.config)
    twin.load_state_dict(guide.state_dict())
    torch.manual_seed(0)
    draw = guide(x)
    pyro.clear_param_store()
    torch.manual_seed(0)
    again = twin(x)
    pyro.clear_param_store()
    assert all(torch.equal(draw[name], again[name]) for name in model.latents)


def test_a_network_s_weights_are_drawn_for_each_particle():
    model = BayesianRegression((2,), hidden=(4,), outputs=3)
    weights = {name: torch.randn(5, 1, *latent.shape) for name, latent in model.latents.items()}
    x = torch.randn(7, 2)
    fn = model.likelihood(x, weights)
    assert fn.batch_shape == (5, 7)
    one = {name: value[2, 0] for name, value in weights.items()}
    torch.testing.assert_close(fn.base_dist.loc[2], model.likelihood(x, one).base_dist.loc)
    hidden = torch.tanh(x @ one["weight1"].T + one["bias1"])
    torch.testing.assert_close(fn.base_dist.loc[2], hidden @ one["weight2"].T + one["bias2"])


def test_global_and_local_latents_are_not_confused():
    model = BayesianRegression((2,), hidden=())
    assert fitting(model) == ["auto"]
    with pytest.raises(BadInput, match="'weight1' is one for all data, and the guide draws one for each datum"):
        NormalGuide(model)
    with pytest.raises(BadInput, match="'z' is one for each datum, and the guide draws one for all data"):
        AutoGuide(GaussianVAE((1, 4, 4), latent_dim=2, hidden=(4,)))
    with pytest.raises(UnknownName, match="did you mean 'normal'"):
        AutoGuide(model, "normall")


# --- Bayesian networks ------------------------------------------------------------------------------------------------

SPRINKLER = {
    "grass": {"family": "bernoulli", "shape": [1], "parents": ["rain", "sprinkler"]},
    "sprinkler": {"family": "bernoulli", "shape": [1], "parents": ["rain"]},
    "rain": {"family": "categorical", "shape": [3]},
    "moisture": {"family": "normal", "shape": [2], "parents": ["grass"]},
}


def test_nodes_come_after_their_parents_and_factorize(param_store):
    model = NeuralBayesNet(nodes=SPRINKLER, hidden=(4,))
    assert list(model.nodes) == ["rain", "sprinkler", "grass", "moisture"]
    draws = model.sample_prior(6)
    x = model.pack(**draws)
    assert x.shape == (6, 7) and all(torch.equal(draws[name], part) for name, part in model.unpack(x).items())
    trace = poutine.trace(model).get_trace(x)
    expected = sum(model.conditional(name, draws).log_prob(draws[name]).sum() for name in model.nodes)
    torch.testing.assert_close(trace.log_prob_sum(), expected)


def test_fully_observed_it_recovers_the_tables_that_made_the_data():
    torch.manual_seed(2)
    rain = dist.OneHotCategorical(torch.tensor([0.6, 0.3, 0.1])).sample((2000,))
    sprinkler = torch.bernoulli(rain @ torch.tensor([0.8, 0.3, 0.05])).unsqueeze(-1)
    wet = (rain @ torch.tensor([0.1, 0.7, 0.95])).unsqueeze(-1)
    grass = torch.bernoulli(torch.where(sprinkler > 0, 0.9, wet))
    moisture = torch.where(grass > 0, 2.0, -1.0) + torch.tensor([0.5, 0.1]) * torch.randn(2000, 2)
    model = NeuralBayesNet(nodes=SPRINKLER, hidden=(8,))
    x = model.pack(rain=rain, sprinkler=sprinkler, grass=grass, moisture=moisture)
    train(SiteELBO()(model, NoGuide(model)), model.parameters(), x, steps=250, lr=0.03)
    values = {"rain": torch.eye(3), "sprinkler": torch.zeros(3, 1), "grass": torch.ones(1, 1)}
    with torch.no_grad():
        assert model.conditional("rain", {}).probs.tolist() == pytest.approx([0.6, 0.3, 0.1], abs=0.04)
        found = model.conditional("sprinkler", values).base_dist.probs[:, 0].tolist()
        assert found == pytest.approx([0.8, 0.3, 0.05], abs=0.06)
        found = model.conditional("grass", values).base_dist.probs[:, 0].tolist()
        assert found == pytest.approx([0.1, 0.7, 0.95], abs=0.15)
        fn = model.conditional("moisture", values).base_dist
        assert fn.loc[0].tolist() == pytest.approx([2.0, 2.0], abs=0.2)
        assert fn.scale[0].tolist() == pytest.approx([0.5, 0.1], abs=0.1)


def test_what_is_observed_may_change_and_latents_find_their_posterior():
    """Train the layered guide for the causes given the effect, and hold it to Bayes' rule by listing the causes."""
    torch.manual_seed(4)
    whole = NeuralBayesNet(nodes={name: SPRINKLER[name] for name in ("rain", "sprinkler", "grass")}, hidden=(8,))
    with torch.no_grad():
        for parameter in whole.parameters():
            parameter.mul_(2.0)
    model = whole.observing("grass")
    assert list(model.latents) == ["rain", "sprinkler"] and model.decoder is whole.decoder
    guide = LayeredGuide(model, hidden=(16,))
    x = torch.tensor([[0.0], [1.0]])
    exact = SiteELBO("enumerate")(model, guide)
    train(exact, guide.parameters(), x, steps=150, lr=0.05)
    joint = torch.zeros(2)
    with torch.no_grad():
        for rain in torch.eye(3):
            for sprinkler in (0.0, 1.0):
                values = {"rain": rain.expand(2, 3), "sprinkler": torch.full((2, 1), sprinkler), "grass": x}
                terms = [whole.conditional(name, values).log_prob(values[name]) for name in whole.nodes]
                joint += sum(terms).exp()
    assert exact(x).item() == pytest.approx(-joint.log().sum().item(), abs=0.01)


@pytest.mark.parametrize(
    "nodes, observed, message",
    [
        ({"a": {"family": "normal", "shape": [1], "parents": ["a"]}}, None, "the nodes a form a cycle"),
        ({"a": {"family": "normal", "shape": [1], "parents": ["b"]}}, None, "'b', which is no node"),
        ({"a": {"family": "cauchy", "shape": [1]}}, None, "'cauchy': expected one of normal"),
        ({"a": {"family": "normal"}}, None, "needs a shape"),
        ({"a": {"family": "normal", "shape": [1], "prior": 3}}, None, "expected family, shape and parents"),
        ({"a": {"family": "normal", "shape": [1]}}, ["b"], "observed 'b' is no node"),
        ({"a": {"family": "normal", "shape": [1]}}, [], "observed is empty"),
    ],
)
def test_graphs_that_are_none_are_refused_in_one_line(nodes, observed, message):
    with pytest.raises(BadInput, match=message):
        NeuralBayesNet(nodes=nodes, observed=observed)


# --- expectations -----------------------------------------------------------------------------------------------------


def test_score_function_of_an_expectation_is_the_policy_gradient():
    """The gradient is ∇ Σ π f by hand, and with the KL it has the entropy's gradient too."""
    payoff = torch.tensor([0.1, 0.9, 0.5], dtype=torch.float64)
    model = Expectation((1,), lambda z, x: z @ payoff, family="categorical", shape=(3,)).double()
    policy = UnconditionalGuide(model).double()
    logits = policy.encoder_outputs["z"]
    with torch.no_grad():
        logits.copy_(torch.tensor([0.5, -0.3, 0.2]))
    x = torch.ones(4000, 1).double()
    probs = logits.softmax(-1)
    for weight, exact in ((0.0, probs @ payoff), (0.7, probs @ payoff - 0.7 * (probs @ (3 * probs).log()))):
        truth = torch.autograd.grad(exact, logits, retain_graph=True)[0]
        listed = SiteELBO("enumerate", kl_weight=weight)(model, policy)(x) / len(x)
        assert listed.item() == pytest.approx(-exact.item(), abs=1e-12)
        torch.testing.assert_close(torch.autograd.grad(-listed, logits)[0], truth)
        drawn = SiteELBO("score", kl_weight=weight)(model, policy)(x) / len(x)
        torch.testing.assert_close(torch.autograd.grad(-drawn, logits)[0], truth, rtol=0, atol=0.05)


def test_pathwise_and_score_agree_on_a_normal_s_expectation():
    model = Expectation((1,), "quadratic", shape=(1,)).double()
    guide = UnconditionalGuide(model).double()
    output = guide.encoder_outputs["z"]
    with torch.no_grad():
        output.copy_(torch.tensor([1.0, 0.2]))
    x = torch.ones(20_000, 1).double()
    sd = softplus(output[1]) + 1e-4
    exact = -((output[0] - 0.499) ** 2 + sd**2)
    truth = torch.autograd.grad(exact, output)[0]
    for word, tolerance in (("pathwise", 0.05), ("score", 0.15)):
        drawn = SiteELBO(word, kl_weight=0)(model, guide)(x) / len(x)
        torch.testing.assert_close(torch.autograd.grad(-drawn, output)[0], truth, rtol=0, atol=tolerance)


def test_a_generator_learns_to_count():
    """Sequences of five tokens of four: each that follows its predecessor pays one, so that the best is four."""
    torch.manual_seed(0)
    model = Expectation((1,), "counting", family="categorical", shape=(4,), length=5)
    assert "layered" in fitting(model)
    guide = LayeredGuide(model, skip=False)
    x = torch.ones(100, 1)
    loss = SiteELBO("rloo", kl_weight=0)(model, guide)
    assert -loss(x).item() / 100 == pytest.approx(1.0, abs=0.7)
    train(loss, guide.parameters(), x, steps=60, lr=0.1)
    assert -loss(x).item() / 100 > 3.5
    draws = guide(x)
    pyro.clear_param_store()
    tokens = torch.stack([draws[f"z{t}"].argmax(-1) for t in range(1, 6)], -1)
    assert ((tokens[:, 1:] - tokens[:, :-1]) % 4 == 1).double().mean() > 0.85


def test_a_policy_finds_the_ink_of_each_digit(param_store):
    data = load("digits", binarize="static")
    model = Expectation((1, 8, 8), "bandit", family="categorical", shape=(64,))
    blind, seeing = UnconditionalGuide(model), CategoricalGuide(model, hidden=(32,))
    for guide in (blind, seeing):
        train(SiteELBO("rloo", kl_weight=0)(model, guide), guide.parameters(), data.train[:500], steps=80, lr=0.05)
    paid = [-SiteELBO("enumerate", kl_weight=0).loss(model, g, data.test) / len(data.test) for g in (blind, seeing)]
    assert paid[0] > 0.7 and paid[1] > paid[0] + 0.03, paid


def test_rewards_that_are_none_are_refused():
    with pytest.raises(BadInput, match=r"f\(z, x\) is \(\), expected a number for each row, \(3,\)"):
        Expectation((1,), lambda z, x: z.sum())(torch.ones(3, 1))
    with pytest.raises(BadInput, match="64 arms need a context of at least as many values, not 16"):
        Expectation((1, 4, 4), "bandit", shape=(64,))(torch.ones(2, 1, 4, 4))
    with pytest.raises(UnknownName, match="did you mean 'bandit'"):
        Expectation((1,), "bandits")
    with pytest.raises(BadInput, match="f is int"):
        Expectation((1,), 3)
    assert Expectation((1,), "math.hypot").reward is math.hypot


def test_many_joint_draws_are_those_of_pyros_guide():
    model, x = BayesianRegression((3,), hidden=(4,)).double(), torch.randn(5, 3, dtype=torch.float64)
    guide = AutoGuide(model).double()
    with torch.no_grad():
        for parameter in guide.parameters():
            parameter.add_(torch.randn_like(parameter) / 3)
    ours = guide.encoder.get_posterior()
    theirs = dist.MultivariateNormal(ours.loc, scale_tril=ours.scale_tril)
    for shape, batch in (((), ()), ((7,), ()), ((), (6, 1)), ((2,), (3, 1))):
        draws = []
        for fn in (ours, theirs):
            torch.manual_seed(1)
            draws.append(fn.expand(batch).rsample(shape))
        torch.testing.assert_close(*draws)
        assert torch.equal(ours.log_prob(draws[0]), theirs.log_prob(draws[0]))
        assert draws[0].shape == (*shape, *batch, 21)
    with pyro.get_param_store().scope(), pyro.plate("draws", 50, dim=-2):
        assert guide(x)["weight1"].shape == (50, 1, 4, 3)
