"""Switching state space models: regimes summed out, against the forward algorithm, listing and Gaussian integrals."""

from __future__ import annotations

import itertools

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import TraceEnum_ELBO
from torch.nn.functional import softplus

from gumbo.errors import BadInput
from gumbo.experiments.data import load, switching_law, switching_regimes
from gumbo.guides import CombinerGuide, fitting
from gumbo.inference import SiteELBO, diagnose, evaluate, fit, to_arviz
from gumbo.models import SwitchingStateSpace

pytestmark = pytest.mark.usefixtures("param_store")
LIKELIHOODS = ("normal", "bernoulli")


def built(likelihood="normal", steps=4, regimes=2, rows=5):
    torch.manual_seed(0)
    model = SwitchingStateSpace((steps, 3), num_regimes=regimes, latent_dim=2, likelihood=likelihood).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.5 * torch.randn_like(parameter))
    return model, model.example(rows)


def states_of(model, given):
    """States of each step, drawn from the prior, by site."""
    with torch.no_grad():
        trace = poutine.trace(model).get_trace(**given)
    return {site: trace.nodes[site]["value"] for site in model.latents}


def local_terms(model, regime, x, mask, z, t):
    """log p(z_t, x_t | s_t, z_{t-1}) at step t for a whole number ``regime``, by formulas, ``(B,)``."""
    before = model.decoder_start.expand(len(x), -1) if t == 0 else z[f"z{t}"]
    here = z[f"z{t + 1}"]
    loc = before @ model.decoder_dynamics[regime].mT + model.decoder_drift[regime]
    scale = softplus(model.decoder_noise[regime]) + model.min_sd
    moves = dist.Normal(loc, scale).log_prob(here).sum(-1)
    output = here @ model.decoder_loading[regime].mT + model.decoder_offset[regime]
    if model.decoder_spread is None:
        shows = dist.Bernoulli(logits=output).log_prob(x[:, t]).sum(-1)
    else:
        shows = dist.Normal(output, softplus(model.decoder_spread[regime]) + model.min_sd).log_prob(x[:, t]).sum(-1)
    still = dist.Normal(0.0, 1.0).log_prob(here).sum(-1)
    return torch.where(mask[:, t] > 0, moves + shows, still)


def forward_algorithm(model, x, mask, z):
    """log p(x, z) of each row, by messages from the first step to the last."""
    count = len(model.decoder_first)
    message = model.decoder_first.log_softmax(-1).expand(len(x), -1)
    for t in range(mask.shape[-1]):
        if t:
            message = (message.unsqueeze(-1) + model.decoder_transition.log_softmax(-1)).logsumexp(-2)
        message = message + torch.stack([local_terms(model, k, x, mask, z, t) for k in range(count)], -1)
    return message.logsumexp(-1)


def listed(model, x, mask, z):
    """log p(x, z) of each row, as a sum over every sequence of regimes."""
    total = []
    for path in itertools.product(range(len(model.decoder_first)), repeat=mask.shape[-1]):
        log_p = torch.zeros(len(x)).double()
        for t, regime in enumerate(path):
            row = model.decoder_first if t == 0 else model.decoder_transition[path[t - 1]]
            log_p = log_p + row.log_softmax(-1)[regime] + local_terms(model, regime, x, mask, z, t)
        total.append(log_p)
    return torch.stack(total).logsumexp(0)


def nothing(x, mask):
    """The guide of a model whose states are given."""


@pytest.mark.parametrize("likelihood", LIKELIHOODS)
def test_given_states_the_evidence_is_the_forward_algorithms(likelihood):
    model, given = built(likelihood, steps=12, regimes=3)
    z = states_of(model, given)
    loss = SiteELBO().differentiable_loss(poutine.condition(model, data=z), nothing, **given)
    assert torch.isclose(loss, -forward_algorithm(model, **given, z=z).sum())
    stock = TraceEnum_ELBO(max_plate_nesting=1).differentiable_loss(poutine.condition(model, data=z), nothing, **given)
    assert torch.isclose(loss, stock)


@pytest.mark.parametrize("likelihood", LIKELIHOODS)
def test_given_states_the_gradient_is_that_of_the_list(likelihood):
    model, given = built(likelihood)
    z = {site: value.requires_grad_() for site, value in states_of(model, given).items()}
    loss = SiteELBO().differentiable_loss(poutine.condition(model, data=z), nothing, **given)
    exact = -listed(model, **given, z=z).sum()
    assert torch.isclose(loss, exact)
    leaves = [*model.parameters(), *z.values()]
    pairs = zip(torch.autograd.grad(loss, leaves), torch.autograd.grad(exact, leaves), strict=True)
    assert all(torch.allclose(one, other, atol=1e-9) for one, other in pairs)


def gaussian_evidence(model, x, path):
    """log p(x | regimes) of each row under Normal emissions, from the joint Normal of all x."""
    steps, size = len(path), len(model.decoder_start)
    loc, cov = model.decoder_start, torch.zeros(size, size).double()
    mean, blocks, cross = [], [], []
    for regime in path:
        moves = model.decoder_dynamics[regime]
        noise = (softplus(model.decoder_noise[regime]) + model.min_sd).square().diag()
        loc, cov = moves @ loc + model.decoder_drift[regime], moves @ cov @ moves.mT + noise
        cross = [moves @ before for before in cross] + [cov]  # cov of z_t with each earlier state
        mean.append(loc)
        blocks.append(list(cross))
    joint = torch.cat(
        [torch.cat([blocks[s][t] if s >= t else blocks[t][s].mT for t in range(steps)], 1)
         for s in range(steps)]
    )  # fmt: skip
    loading = torch.block_diag(*(model.decoder_loading[regime] for regime in path))
    offset = torch.cat([model.decoder_offset[regime] for regime in path])
    spread = torch.cat([softplus(model.decoder_spread[regime]) + model.min_sd for regime in path])
    law = dist.MultivariateNormal(
        loading @ torch.cat(mean) + offset, loading @ joint @ loading.mT + spread**2 * torch.eye(len(spread))
    )
    return law.log_prob(x.flatten(1))


def test_the_evidence_is_that_of_the_mixture_over_all_paths():
    """p(x) is a mixture of 2² Normals; the importance-weighted bound converges to it, and the ELBO is below."""
    model, given = built(steps=2, rows=6)
    given["mask"] = torch.ones_like(given["mask"])
    given["x"] = model.joined(model.sample_prior(6, mask=given["mask"]))
    paths = list(itertools.product(range(2), repeat=2))
    exact = []
    for path in paths:
        rows = [model.decoder_first, *(model.decoder_transition[regime] for regime in path[:-1])]
        weight = sum(row.log_softmax(-1)[regime] for row, regime in zip(rows, path, strict=True))
        exact.append(weight + gaussian_evidence(model, given["x"], path))
    exact = torch.stack(exact).logsumexp(0).detach()
    guide = CombinerGuide(model, rnn_hidden=16).double()
    fit(model.requires_grad_(False), guide, given, lr=1e-2, batch_size=6, epochs=250, progress=False)
    found = evaluate(model, guide, given, num_samples=4_000)
    assert abs(found.log_evidence - exact.mean()) < 4 * found.log_evidence_mc_se < 0.2
    assert exact.mean() - 1.5 < found.elbo < exact.mean() - 4 * found.elbo_mc_se


def test_regimes_are_drawn_from_their_conditional_given_the_states():
    """Over draws, regimes minus their smoothed probability given the states of the same draw have mean zero."""
    model, given = built(steps=3, rows=2)
    given["mask"] = torch.ones_like(given["mask"])
    guide = CombinerGuide(model, rnn_hidden=8).double()
    drawn = to_arviz(model, guide, num_samples=3_000, groups=["posterior"], seed=0, **given).posterior
    z = {site: torch.tensor(drawn[site].values[0]) for site in model.latents}  # (draws, B, Z)
    regimes = torch.stack([torch.tensor(drawn[site].values[0]) for site in model.summed], -1)
    x, mask = (given[name].repeat(3_000, *[1] * (given[name].dim() - 1)) for name in ("x", "mask"))
    flat = {site: value.flatten(0, 1).double() for site, value in z.items()}
    every = []
    for path in itertools.product(range(2), repeat=3):
        rows = [model.decoder_first, *(model.decoder_transition[regime] for regime in path[:-1])]
        parts = [row.log_softmax(-1)[regime] for row, regime in zip(rows, path, strict=True)]
        parts += [local_terms(model, regime, x, mask, flat, t) for t, regime in enumerate(path)]
        every.append(sum(parts))
    shares = torch.stack(every, -1).softmax(-1)
    for place, path in enumerate(itertools.product(range(2), repeat=3)):
        hit = (regimes.flatten(0, 1) == torch.tensor(path)).all(-1).double()
        excess = (hit - shares[:, place]).detach()
        error = (shares[:, place] * (1 - shares[:, place])).sum().sqrt() / len(hit)
        assert abs(excess.mean()) < 4.5 * error, path


def test_padding_changes_no_bound_and_no_data_beyond_the_end_are_read():
    model, given = built(rows=4)
    longer = SwitchingStateSpace((7, 3), num_regimes=2, latent_dim=2).double()
    longer.load_state_dict(model.state_dict())
    guide, other = (CombinerGuide(one, rnn_hidden=6).double() for one in (model, longer))
    other.load_state_dict(guide.state_dict())
    pad = torch.nn.functional.pad
    more = {"x": pad(given["x"], (0, 0, 0, 3)), "mask": pad(given["mask"], (0, 3))}
    noisy = {**given, "x": given["x"] + 100 * (1 - given["mask"]).unsqueeze(-1)}
    z = {
        site: node["value"]
        for site, node in poutine.trace(guide).get_trace(**given).nodes.items()
        if site in model.latents
    }
    extra = {f"z{t}": torch.randn(4, 2).double() for t in (5, 6, 7)}

    def log_weight(p, q, values, batch):
        posterior = poutine.trace(poutine.condition(q, data=values)).get_trace(**batch)
        at = poutine.condition(p, data=values)
        return -SiteELBO().differentiable_loss(at, nothing, **batch) - posterior.log_prob_sum()

    first = log_weight(model, guide, z, given)
    assert torch.isclose(first, log_weight(longer, other, {**z, **extra}, more))
    assert torch.isclose(first, log_weight(model, guide, z, noisy))


def test_draws_are_silent_beyond_the_end_and_nan_there_in_arviz():
    model, given = built(rows=4)
    assert (given["x"] * (1 - given["mask"]).unsqueeze(-1) == 0).all()
    guide = CombinerGuide(model, rnn_hidden=6).double()
    found = to_arviz(model, guide, num_samples=5, groups=["posterior", "observed_data"], **given)
    assert bool(found.observed_data["x4"].isnull().values[0].all())
    assert not found.observed_data["x1"].isnull().values.any()
    assert {*model.summed, *model.latents} <= set(found.posterior)


def test_the_sd_is_learned_or_given_and_every_likelihood_is_taken():
    fixed = SwitchingStateSpace((3, 2), likelihood_options={"sd": 0.1})
    assert fixed.decoder_spread is None
    given = fixed.inputs(torch.zeros(2, 3, 2))
    trace = poutine.trace(fixed).get_trace(**given)
    assert trace.nodes["x1"]["fn"].base_dist.base_dist.scale.unique() == torch.tensor(0.1)
    for word in ("poisson", "heteroscedastic-normal", "zero-inflated-negative-binomial"):
        model = SwitchingStateSpace((3, 2), likelihood=word)
        assert SiteELBO("pathwise")(model, CombinerGuide(model, rnn_hidden=4))(**model.example(3)).isfinite()
    counts = SwitchingStateSpace((3, 2), likelihood="poisson")
    with pyro.validation_enabled(True), pytest.raises(BadInput, match="counts"):
        counts(torch.full((2, 3, 2), 0.5), mask=torch.ones(2, 3))


def test_the_combiner_refuses_flows_over_single_steps():
    model, _ = built()
    assert "combiner" in fitting(model)
    with pytest.raises(BadInput, match="flows"):
        CombinerGuide(model, flows=2)


@pytest.mark.slow
def test_diagnosis_and_score_estimators_serve():
    model, given = built(rows=4)
    model, given = model.float(), {name: value.float() for name, value in given.items()}
    guide = CombinerGuide(model, rnn_hidden=6)
    for words in ("pathwise", "stl", "rloo"):
        assert SiteELBO(words, num_particles=2)(model, guide)(**given).isfinite()
    report = diagnose(model, guide, num_samples=100, num_simulations=20, refine_steps=5, **given)
    assert report.verdicts


def test_the_data_are_draws_of_their_law():
    """Regimes persist as the law says, and a state space model with the law's numbers scores the data as it should."""
    data, law, regimes = load("switching"), switching_law(), switching_regimes()
    assert data.data_shape == (1, 30, 6) and data.labels["train"].min() >= 10
    moves = torch.zeros(3, 3)
    for row, length in zip(torch.from_numpy(regimes["train"]), data.labels["train"], strict=True):
        for before, after in itertools.pairwise(row[:length].tolist()):
            moves[before, after] += 1
    shares = moves / moves.sum(-1, keepdim=True)
    expected = torch.from_numpy(law["transition"]).float()
    error = (expected * (1 - expected) / moves.sum(-1, keepdim=True)).sqrt()
    assert ((shares - expected).abs() < 4.5 * error).all()
