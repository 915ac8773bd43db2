"""What the contract does not say of single models: their densities in numbers, their sizes, their messages."""

from __future__ import annotations

import json
import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.distributions import RelaxedOneHotCategorical
from torch import nn

from gumbo.errors import BadInput, UnknownName
from gumbo.models import (
    BernoulliVAE,
    CategoricalVAE,
    ConditionalVAE,
    ConvVAE,
    GaussianMixtureVAE,
    GaussianVAE,
    HierarchicalVAE,
    Latent,
    SemiSupervisedVAE,
    SigmoidBeliefNetwork,
    StructuredPrediction,
    models,
)
from gumbo.models._networks import mlp
from gumbo.models._relaxed import RelaxedOneHot

SHAPE = (1, 4, 4)


def images(rows=5):
    return torch.randint(2, (rows, *SHAPE)).to(torch.get_default_dtype())


def linear_sizes(network):
    return [(layer.in_features, layer.out_features) for layer in network.modules() if isinstance(layer, nn.Linear)]


def log_joint(model, x, conditions=None, **latents):
    """The log-probability of the program at given latents, per row."""
    with pyro.get_param_store().scope():
        trace = poutine.trace(poutine.condition(model, data=latents)).get_trace(x, **(conditions or {}))
        trace.compute_log_prob()
    return sum(site["log_prob"] for name, site in trace.nodes.items() if "log_prob" in site and name != "data")


def test_gaussian_vae_has_the_sizes_of_its_source():
    model = GaussianVAE((1, 28, 28))
    assert linear_sizes(model.decoder) == [(50, 128), (128, 256), (256, 784)]
    assert model.latents == {"z": Latent("normal", (50,))}


def test_gaussian_vae_density_by_hand():
    x = images().double()
    z = torch.randn(5, 3, dtype=torch.float64)
    prior = -0.5 * (z**2).sum(-1) - 1.5 * math.log(2 * math.pi)

    model = GaussianVAE(SHAPE, latent_dim=3, hidden=(6,)).double()
    p = model.decoder(z).sigmoid().reshape(x.shape)
    bernoulli = (x * p.log() + (1 - x) * (1 - p).log()).flatten(1).sum(1)
    torch.testing.assert_close(log_joint(model, x, z=z), prior + bernoulli)

    model = GaussianVAE(SHAPE, latent_dim=3, hidden=(6,), likelihood="normal", likelihood_sd=0.5).double()
    squares = ((x - model.decoder(z).reshape(x.shape)) ** 2).flatten(1).sum(1)
    normal = -squares / (2 * 0.25) - 16 * math.log(0.5) - 8 * math.log(2 * math.pi)
    torch.testing.assert_close(log_joint(model, x, z=z), prior + normal, rtol=1e-6, atol=1e-6)


def test_the_sd_is_learned_or_fixed_and_always_positive():
    learned = GaussianVAE(SHAPE, likelihood="normal")
    assert "decoder_log_sd" in dict(learned.named_parameters())
    assert learned.likelihood(torch.zeros(1, 50)).base_dist.scale.unique() == 1
    fixed = GaussianVAE(SHAPE, likelihood="normal", likelihood_sd=0.1)
    assert "decoder_log_sd" not in dict(fixed.named_parameters())
    torch.testing.assert_close(fixed.likelihood(torch.zeros(1, 50)).base_dist.scale.unique(), torch.tensor([0.1]))


def test_categorical_vae_density_by_hand():
    x = images().double()
    model = CategoricalVAE(SHAPE, num_latents=3, num_classes=4, hidden=(6,)).double()
    y = nn.functional.one_hot(torch.randint(4, (5, 3)), 4).double()
    expected = model.likelihood(y).log_prob(x) - 3 * math.log(4)
    torch.testing.assert_close(log_joint(model, x, y=y), expected)


def test_relaxed_categorical_vae_has_the_relaxed_density():
    x = images().double()
    model = CategoricalVAE(SHAPE, num_latents=3, num_classes=4, hidden=(6,), relaxed=True, temperature=0.7).double()
    assert model.latents["y"].family == "relaxed-categorical"
    y = torch.randn(5, 3, 4, dtype=torch.float64).softmax(-1)
    stock = RelaxedOneHotCategorical(torch.tensor(0.7).double(), logits=torch.zeros(3, 4).double())
    torch.testing.assert_close(log_joint(model, x, y=y), model.likelihood(y).log_prob(x) + stock.log_prob(y).sum(-1))
    before = log_joint(model, x, y=y)
    model.temperature.fill_(0.3)
    assert not torch.allclose(log_joint(model, x, y=y), before)


def test_bernoulli_vae_density_by_hand_and_its_linear_form():
    x = images().double()
    model = BernoulliVAE(SHAPE, num_latents=7, nonlinear=False).double()
    assert linear_sizes(model.decoder) == [(7, 16)]
    model.decoder_prior_logits.data.fill_(0.4)
    z = torch.randint(2, (5, 7)).double()
    p = torch.tensor(0.4).double().sigmoid()
    prior = (z * p.log() + (1 - z) * (1 - p).log()).sum(-1)
    torch.testing.assert_close(log_joint(model, x, z=z), prior + model.likelihood(z).log_prob(x))
    assert "decoder_prior_logits" not in dict(BernoulliVAE(SHAPE, learn_prior=False).named_parameters())


def test_conv_vae_is_the_convolutional_system_by_default():
    model = ConvVAE((1, 28, 28))
    assert model.latents["z"].shape == (2,)
    assert linear_sizes(model.decoder) == [(2, 7 * 7 * 32)]
    maps = [layer for layer in model.decoder.modules() if isinstance(layer, nn.ConvTranspose2d)]
    assert [(m.in_channels, m.out_channels, m.stride) for m in maps] == [
        (32, 64, (2, 2)),
        (64, 32, (2, 2)),
        (32, 1, (1, 1)),
    ]
    with pytest.raises(BadInput, match=r"cannot go through 3 convolutions.* height and width divisible by 8"):
        ConvVAE((1, 28, 28), channels=(4, 4, 4))
    with pytest.raises(BadInput, match=r"expected \(channels, height, width\)"):
        ConvVAE((784,))


def bernoulli_log_prob(value, logits):
    p = logits.sigmoid()
    return (value * p.log() + (1 - value) * (1 - p).log()).flatten(1).sum(1)


def normal_log_prob(value, loc, sd):
    return (-0.5 * ((value - loc) / sd) ** 2 - sd.log() - 0.5 * math.log(2 * math.pi)).sum(-1)


def test_sigmoid_belief_network_density_by_hand():
    x = images().double()
    model = SigmoidBeliefNetwork(SHAPE, layers=(6, 5, 3)).double()
    model.decoder_prior_logits.data.normal_()
    assert list(model.latents) == ["z3", "z2", "z1"]
    z1, z2, z3 = (torch.randint(2, (5, size)).double() for size in (6, 5, 3))
    expected = (
        bernoulli_log_prob(z3, model.decoder_prior_logits)
        + bernoulli_log_prob(z2, model.decoder["z2"](z3))
        + bernoulli_log_prob(z1, model.decoder["z1"](z2))
        + bernoulli_log_prob(x.flatten(1), model.decoder["x"](z1))
    )
    torch.testing.assert_close(log_joint(model, x, z1=z1, z2=z2, z3=z3), expected)


def test_sigmoid_belief_network_sizes():
    linear = SigmoidBeliefNetwork((1, 28, 28), layers=(1000, 200))
    assert {site: linear_sizes(f) for site, f in linear.decoder.items()} == {
        "x": [(1000, 784)],
        "z1": [(200, 1000)],
    }
    nonlinear = SigmoidBeliefNetwork(SHAPE, layers=(6, 5), nonlinear=True)
    assert {site: linear_sizes(f) for site, f in nonlinear.decoder.items()} == {
        "x": [(6, 6), (6, 16)],
        "z1": [(5, 6), (6, 6)],
    }


def test_hierarchical_vae_density_by_hand():
    x = images().double()
    model = HierarchicalVAE(SHAPE, latent_dims=(4, 3), hidden=(6,), level_hidden=5).double()
    z1, z2 = torch.randn(5, 4).double(), torch.randn(5, 3).double()
    loc, raw = model.decoder_levels["z1"](z2).chunk(2, -1)
    expected = (
        normal_log_prob(z2, torch.zeros(3).double(), torch.ones(3).double())
        + normal_log_prob(z1, loc, nn.functional.softplus(raw) + 1e-3)
        + bernoulli_log_prob(x.flatten(1), model.decoder(z1))
    )
    torch.testing.assert_close(log_joint(model, x, z1=z1, z2=z2), expected)


def test_gaussian_mixture_vae_density_by_hand():
    x = images().double()
    model = GaussianMixtureVAE(SHAPE, num_components=3, latent_dim=2, hidden=(6,)).double()
    model.decoder_prior_logits.data.normal_()
    model.decoder_log_sds.data.normal_()
    label, z = torch.tensor([0, 1, 2, 1, 0]), torch.randn(5, 2).double()
    expected = (
        model.decoder_prior_logits.log_softmax(-1)[label]
        + normal_log_prob(z, model.decoder_means[label], model.decoder_log_sds[label].exp())
        + bernoulli_log_prob(x.flatten(1), model.decoder(z))
    )
    torch.testing.assert_close(log_joint(model, x, y=nn.functional.one_hot(label, 3).double(), z=z), expected)


def test_conditional_vae_density_by_hand():
    x, c, z = images().double(), torch.rand(5, 2, 2).double(), torch.randn(5, 3).double()
    model = ConditionalVAE(SHAPE, (2, 2), latent_dim=3, hidden=(6,), conditional_prior=True).double()
    loc, raw = model.decoder_prior(c.flatten(1)).chunk(2, -1)
    logits = model.decoder(torch.cat([z, c.flatten(1)], -1))
    expected = normal_log_prob(z, loc, nn.functional.softplus(raw) + 1e-3) + bernoulli_log_prob(x.flatten(1), logits)
    torch.testing.assert_close(log_joint(model, x, {"c": c}, z=z), expected)


def test_conditions_that_are_missing_or_misshapen_are_one_line(param_store):
    model, x = ConditionalVAE(SHAPE, (4,), hidden=(6,)), images()
    with pytest.raises(BadInput, match=r"^ConditionalVAE needs c=, a tensor of shape \(5, 4\)"):
        model(x)
    with pytest.raises(BadInput, match=r"^ConditionalVAE: c has shape \(5, 3\), expected \(5, 4\)"):
        model(x, c=torch.zeros(5, 3))
    with pytest.raises(BadInput, match=r"^ConditionalVAE: c has shape \(4, 4\), expected \(5, 4\)"):
        model(x, c=torch.zeros(4, 4))
    with pytest.raises(BadInput, match="give labels"):
        model.inputs(x)
    inputs = model.inputs(x, torch.tensor([3, 0, 1, 2, 3]))
    assert inputs["c"].argmax(-1).tolist() == [3, 0, 1, 2, 3]
    model(**inputs)


def test_structured_prediction_cuts_images_in_two():
    whole = torch.randint(2, (5, 2, 7, 4)).double()
    model = StructuredPrediction((2, 7, 4), layers=(6, 5)).double()
    halves = model.inputs(whole)
    assert torch.equal(torch.cat([halves["upper"], halves["x"]], dim=2), whole)
    assert model.data_shape == (2, 4, 4) and model.conditions == {"upper": (2, 3, 4)}
    z1, z2 = (torch.randint(2, (5, size)).double() for size in (6, 5))
    expected = (
        bernoulli_log_prob(z1, model.decoder["z1"](halves["upper"].flatten(1)))
        + bernoulli_log_prob(z2, model.decoder["z2"](z1))
        + bernoulli_log_prob(halves["x"].flatten(1), model.decoder["x"](z2))
    )
    torch.testing.assert_close(log_joint(model, halves["x"], {"upper": halves["upper"]}, z1=z1, z2=z2), expected)


def test_semi_supervised_vae_with_and_without_labels():
    x, labels, z = images().double(), torch.tensor([2, 0, 1, 1, 2]), torch.randn(5, 2).double()
    model = SemiSupervisedVAE(SHAPE, num_classes=3, latent_dim=2, hidden=(6,)).double()
    y = nn.functional.one_hot(labels, 3).double()
    expected = (
        -math.log(3)
        + normal_log_prob(z, torch.zeros(2).double(), torch.ones(2).double())
        + bernoulli_log_prob(x.flatten(1), model.decoder(torch.cat([y, z], -1)))
    )
    torch.testing.assert_close(log_joint(model, x, y=y, z=z), expected)
    torch.testing.assert_close(log_joint(model, x, {"y": labels}, z=z), expected)
    torch.testing.assert_close(log_joint(model, x, {"y": y}, z=z), expected)


@pytest.mark.parametrize(
    "labels, message",
    [
        (torch.zeros(4).long(), r"y has shape \(4,\) of torch.int64, expected integers of shape \(5,\)"),
        (torch.zeros(5), r"y has shape \(5,\) of torch.float32, expected integers"),
        (torch.full((5,), 3), r"labels y lie in 3...3, expected 0...2"),
    ],
)
def test_bad_labels_are_one_line(labels, message, param_store):
    model = SemiSupervisedVAE(SHAPE, num_classes=3, latent_dim=2, hidden=(6,))
    with pytest.raises(BadInput, match=f"^SemiSupervisedVAE: {message}"):
        model(images(), y=labels)


def test_a_thousand_binary_latents():
    draws = BernoulliVAE(SHAPE, num_latents=1000).sample_prior(3)
    assert draws["z"].shape == (3, 1000)
    assert draws["x"].shape == (3, *SHAPE)


@pytest.mark.parametrize("name", models)
def test_config_survives_json_and_rebuilds(name):
    for variant in models[name].variants:
        model = models[name](**{"data_shape": SHAPE, **variant})
        twin = models[name](**json.loads(json.dumps(model.config)))
        assert twin.config == model.config
        twin.load_state_dict(model.state_dict())


@pytest.mark.parametrize("rows", [1, 5, 20])
def test_data_size_scales_the_log_density(rows):
    x = images(rows)
    torch.manual_seed(0)
    model = GaussianVAE(SHAPE, latent_dim=2, hidden=(4,), data_size=20)
    plain = GaussianVAE(SHAPE, latent_dim=2, hidden=(4,))
    plain.load_state_dict(model.state_dict())
    z = torch.randn(rows, 2)
    torch.testing.assert_close(log_joint(model, x, z=z), log_joint(plain, x, z=z) * 20 / rows)


def test_priors_are_drawn_beyond_data_size_and_leave_the_store_alone():
    draws = GaussianVAE(SHAPE, latent_dim=2, hidden=(4,), data_size=3).sample_prior(8)
    assert draws["z"].shape == (8, 2) and not draws["x"].requires_grad
    assert len(pyro.get_param_store()) == 0


def test_runs_under_local_module_parameters():
    with pyro.settings.context(module_local_params=True):
        model = GaussianVAE(SHAPE, latent_dim=2, hidden=(4,), likelihood="normal")
        trace = poutine.trace(model).get_trace(images())
    assert trace.log_prob_sum().requires_grad
    assert len(pyro.get_param_store()) == 0


BAD_BATCHES = {
    "a wrong size": (lambda x: x[..., :3], r"x has shape \(5, 1, 4, 3\), expected \(B, 1, 4, 4\)"),
    "no channel": (lambda x: x[:, 0], r"x has shape \(5, 4, 4\), expected \(B, 1, 4, 4\)"),
    "no rows": (lambda x: x[:0], "empty batch"),
    "not a tensor": (lambda x: x.tolist(), "x is list, expected a tensor"),
    "integers": (lambda x: x.int(), "x is torch.int32, expected torch.float32"),
    "doubles": (lambda x: x.double(), "x is torch.float64, expected torch.float32"),
    "NaN": (lambda x: x.index_fill(0, torch.tensor([2]), float("nan")), "x has NaN in 1 of 5 rows"),
    "gray levels": (lambda x: x / 2 + 0.25, "needs x of zeros and ones"),
    "too many rows": (lambda x: torch.cat([x, x]), "a batch of 10 is larger than data_size=6"),
}


@pytest.mark.parametrize("case", BAD_BATCHES)
def test_bad_batches_are_one_line(case):
    spoil, message = BAD_BATCHES[case]
    model = GaussianVAE(SHAPE, latent_dim=2, hidden=(4,), data_size=6)
    with pytest.raises(BadInput, match=f"^GaussianVAE: .*{message}"):
        model(spoil(images()))


def test_values_are_read_only_under_validation(param_store):
    model, x = GaussianVAE(SHAPE, latent_dim=2, hidden=(4,), likelihood="normal"), images() * float("nan")
    with pyro.validation_enabled(False):
        model(x)
    with pytest.raises(BadInput, match="NaN"):
        model(x)


BAD_ARGUMENTS = {
    "likelihood": (lambda: GaussianVAE(SHAPE, likelihood="bernouli"), UnknownName, "did you mean 'bernoulli'"),
    "likelihood_sd": (lambda: GaussianVAE(SHAPE, likelihood_sd=0.1), BadInput, "goes with likelihood='normal'"),
    "negative sd": (lambda: GaussianVAE(SHAPE, likelihood="normal", likelihood_sd=-1.0), BadInput, "must be positive"),
    "activation": (lambda: GaussianVAE(SHAPE, activation="rellu"), UnknownName, "did you mean 'relu'"),
    "data_shape": (lambda: GaussianVAE((1, 0, 8)), BadInput, "positive sizes"),
    "no layers": (lambda: SigmoidBeliefNetwork(SHAPE, layers=()), BadInput, "at least one positive width"),
    "one level": (lambda: HierarchicalVAE(SHAPE, latent_dims=(3,)), BadInput, "at least two levels"),
    "no height": (lambda: StructuredPrediction((784,)), BadInput, "channels, height > 1, width"),
    "family": (lambda: Latent("gaussian", (2,)), BadInput, "expected one of normal"),
    "name": (lambda: models["gausian-vae"], UnknownName, "did you mean 'gaussian-vae'"),
}


@pytest.mark.parametrize("case", BAD_ARGUMENTS)
def test_bad_arguments_are_one_line(case):
    build, error, message = BAD_ARGUMENTS[case]
    with pytest.raises(error, match=message):
        build()


def test_mlp_without_hidden_layers_is_linear():
    assert [type(layer) for layer in mlp([3, 2])] == [nn.Linear]
    assert [type(layer) for layer in mlp([3, 2, 1], "tanh")] == [nn.Linear, nn.Tanh, nn.Linear]
    assert [type(layer) for layer in mlp([3, 2], activate_last=True)] == [nn.Linear, nn.ReLU]


def test_relaxed_one_hot_is_its_parent_for_equal_noise():
    logits = torch.randn(50, 10, dtype=torch.float64)
    temperature = torch.tensor(0.5, dtype=torch.float64)
    ours, stock = (
        cls(temperature, logits=logits.clone().requires_grad_()) for cls in (RelaxedOneHot, RelaxedOneHotCategorical)
    )
    torch.manual_seed(1)
    mine = ours.rsample((3,))
    torch.manual_seed(1)
    theirs = stock.rsample((3,))
    torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(ours.log_prob(theirs), stock.log_prob(theirs), rtol=0, atol=0)
    weights = torch.randn(10, dtype=torch.float64)
    gradients = [
        torch.autograd.grad((draws @ weights).sum(), each.base_dist.logits)[0]
        for draws, each in ((mine, ours), (theirs, stock))
    ]
    torch.testing.assert_close(*gradients, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("temperature", [1.0, 0.1, 0.01])
def test_relaxed_one_hot_scores_its_own_draws_at_low_temperatures(temperature):
    logits = (5 * torch.randn(200, 10)).requires_grad_()
    with pyro.validation_enabled(True):
        relaxed = RelaxedOneHot(torch.tensor(temperature), logits=logits).to_event(1).expand([3])
        draws = relaxed.rsample()
        density = relaxed.log_prob(draws)
        dist.RelaxedOneHotCategorical(torch.tensor(0.5), logits=torch.zeros(10)).log_prob(draws)
    assert density.isfinite().all()
    assert torch.autograd.grad(density.sum(), logits)[0].isfinite().all()
