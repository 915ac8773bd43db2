"""Deep Markov models: their densities step by step, masks, lengths, the combiner guide and its flow."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine

from gumbo.errors import BadInput
from gumbo.guides import CombinerGuide, NormalGuide, guides
from gumbo.inference import SiteELBO, evaluate
from gumbo.models import DeepMarkovModel, GaussianVAE, HiddenMarkovModel
from gumbo.models._chains import Couplings
from gumbo.testing import check_guide

pytestmark = pytest.mark.usefixtures("param_store")


def pair(flows=0, steps=5, **options):
    torch.manual_seed(0)
    model = DeepMarkovModel((steps, 3), latent_dim=2, hidden=(6,), transition_hidden=5)
    return model, CombinerGuide(model, rnn_hidden=6, flows=flows, flow_hidden=4)


def test_the_model_is_a_chain_step_by_step():
    model, _ = pair()
    given = model.example(4)
    trace = poutine.trace(model).get_trace(**given)
    trace.compute_log_prob()
    z, mask, x = trace.nodes["z"]["value"], given["mask"], given["x"]
    for row in range(4):
        before, log_z, log_x = model.decoder_start, 0.0, 0.0
        for t in range(5):
            loc, scale = model.decoder_transition(before)
            if mask[row, t]:
                log_z = log_z + dist.Normal(loc, scale).log_prob(z[row, t]).sum()
                log_x = log_x + dist.Bernoulli(logits=model.decoder(z[row, t])).log_prob(x[row, t]).sum()
            else:
                log_z = log_z + dist.Normal(0.0, 1.0).log_prob(z[row, t]).sum()
            before = z[row, t]
        assert torch.isclose(trace.nodes["z"]["log_prob"][row], log_z, atol=1e-4)
        assert torch.isclose(trace.nodes["x"]["log_prob"][row], log_x, atol=1e-4)


@pytest.mark.parametrize("flows", [0, 3])
def test_a_draw_has_the_density_that_scores_it(flows):
    """Change of variables by the Jacobian of the whole draw in its noise."""
    model, guide = pair(flows, steps=3)
    guide, mask = guide.double(), torch.tensor([[1.0, 1.0, 0.0]]).double()
    x = torch.ones(1, 3, 3).double() * mask.unsqueeze(-1)
    fn = poutine.trace(guide).get_trace(x, mask=mask).nodes["z"]["fn"]
    noise = torch.randn(6).double()

    def drawn(flat):
        parts = iter(flat.view(1, 3, 2).unbind(-2))
        real = torch.randn
        torch.randn = lambda *args, **kwargs: torch.stack(list(parts), -2)
        try:
            return fn.rsample().flatten()
        finally:
            torch.randn = real

    jacobian = torch.autograd.functional.jacobian(drawn, noise)
    expected = dist.Normal(0.0, 1.0).log_prob(noise).sum() - torch.linalg.slogdet(jacobian)[1]
    assert torch.allclose(fn.log_prob(drawn(noise).view(1, 3, 2)), expected, atol=1e-6)


@pytest.mark.parametrize("flows", [0, 2])
def test_padding_changes_no_bound(flows):
    """The same sequences with more padding: the ELBO in expectation, here with the noise of the common steps equal."""
    model, guide = pair(flows)
    longer = DeepMarkovModel((8, 3), latent_dim=2, hidden=(6,), transition_hidden=5)
    longer.load_state_dict(model.state_dict())
    other = CombinerGuide(longer, rnn_hidden=6, flows=flows, flow_hidden=4)
    other.load_state_dict(guide.state_dict())
    given = model.example(4)
    more = {
        "x": torch.nn.functional.pad(given["x"], (0, 0, 0, 3)),
        "mask": torch.nn.functional.pad(given["mask"], (0, 3)),
    }
    z = poutine.trace(guide).get_trace(**given).nodes["z"]["value"]
    padded = torch.cat([z, torch.randn(4, 3, 2)], -2)

    def log_weight(p, q, values, batch):
        at = poutine.condition(p, {"z": values}), poutine.condition(q, {"z": values})
        scores = []
        for program in at:
            trace = poutine.trace(program).get_trace(**batch)
            trace.compute_log_prob()
            scores.append(sum(trace.nodes[n]["log_prob"] for n in ("z", "x") if n in trace.nodes))
        return scores[0] - scores[1]

    assert torch.allclose(log_weight(model, guide, z, given), log_weight(longer, other, padded, more), atol=1e-4)


def test_the_guide_reads_what_is_to_come_and_no_padding():
    model, guide = pair()
    mask = model.mask_of(torch.tensor([3]))
    x = torch.zeros(1, 5, 3)
    base = guide.read(x, mask)
    x[0, 1] = 1.0
    moved = (guide.read(x, mask) - base).abs().sum(-1)[0]
    assert (moved[:2] > 0).all() and (moved[2] == 0)
    x[0, 1], x[0, 4] = 0.0, 1.0
    assert torch.equal(guide.read(x, mask)[0, :3], base[0, :3])


def test_the_flow_of_the_guide_keeps_the_contract():
    model, guide = pair(flows=2)
    given = model.example(4)
    check_guide(guide, model, given.pop("x"), **given)


def test_couplings_stretch_as_their_jacobian_says():
    torch.manual_seed(0)
    couplings, z = Couplings(5, 3, 4).double(), torch.randn(5).double()
    jacobian = torch.autograd.functional.jacobian(lambda v: couplings.forward(v)[0], z)
    assert torch.isclose(couplings.forward(z)[1], torch.linalg.slogdet(jacobian)[1])


def test_score_and_path_agree_on_the_mean_gradient():
    model, guide = pair(steps=2)
    given = {
        name: value.repeat(400, 1, 1) if value.dim() > 2 else value.repeat(400, 1)
        for name, value in model.example(2).items()
    }
    parameters = [*guide.parameters()]

    def mean(word, draws=12):
        torch.manual_seed(1)
        loss = SiteELBO(word, num_particles=2)(model, guide)
        gradients = [torch.autograd.grad(loss(**given), parameters) for _ in range(draws)]
        return torch.stack([torch.cat([part.flatten() for part in gradient]) for gradient in gradients])

    found = {word: mean(word) for word in ("pathwise", "stl", "rloo")}
    direction = found["pathwise"].mean(0)
    direction = direction / direction.norm()
    along = {word: gradients @ direction for word, gradients in found.items()}
    size = along["pathwise"].mean()
    for word in ("stl", "rloo"):
        error = ((along[word].var() + along["pathwise"].var()) / len(along[word])).sqrt()
        assert abs(along[word].mean() - size) < 5 * error and error < size / 8, word  # no agreement by noise


def test_evaluation_counts_steps():
    model, guide = pair()
    given = model.example(6)
    found = evaluate(model, guide, given, num_samples=5)
    assert abs(model.per_step(found.values["elbo"], given["mask"]) * given["mask"].sum().item() / 6 - found.elbo) < 1e-4


def test_lengths_masks_and_other_models_are_refused():
    model, guide = pair()
    x = torch.zeros(2, 5, 3)
    with pytest.raises(BadInput, match="0 to 6, expected 1 to 5"):
        model.inputs(x, torch.tensor([0, 6]))
    hole = torch.tensor([[1.0, 0.0, 1.0, 0.0, 0.0]]).expand(2, 5)
    with pyro.validation_enabled(True), pytest.raises(BadInput, match="ones from the first step"):
        model(x, mask=hole)
    with pytest.raises(BadInput, match="must be"):
        DeepMarkovModel((2, 5, 3))
    with pytest.raises(BadInput, match="no deep Markov model"):
        CombinerGuide(GaussianVAE((5, 3), hidden=(4,)))
    assert torch.equal(model.inputs(x)["mask"], torch.ones(2, 5))
    assert "combiner" in guides and NormalGuide(model)(x, mask=torch.ones(2, 5))["z"].shape == (2, 5, 2)


@pytest.mark.parametrize("kind", [DeepMarkovModel, HiddenMarkovModel])
def test_ones_at_masked_steps_are_refused(kind):
    """A one would count for 100 nats there."""
    model = kind((4, 2))
    x, lengths = torch.zeros(3, 4, 2), torch.tensor([4, 2, 3])
    x[0, 3] = x[1, 1] = 1.0
    given = model.inputs(x, lengths)
    model(**given)
    x[1, 2] = 1.0
    with pytest.raises(BadInput, match="holds ones at masked steps"):
        model.inputs(x, lengths)
    with pytest.raises(BadInput, match="holds ones at masked steps"):
        model(x, mask=given["mask"])
