"""Scenes of objects: the transformer against torch's, the law of presences, absent objects, counts and boxes."""

from __future__ import annotations

import io
import math
from functools import partial

import pytest
import torch
from pyro import poutine
from torch.nn.functional import affine_grid, grid_sample

from gumbo.errors import BadInput
from gumbo.guides import RecurrentAttentionGuide
from gumbo.inference import SiteELBO, diagnose, evaluate, fit, to_arviz
from gumbo.inference.engine.noise import Tape
from gumbo.inference.engine.rows import Rows
from gumbo.inference.training.compile import step
from gumbo.inference.training.compile.backends import uncompiled
from gumbo.inference.training.compile.step import CompiledStep
from gumbo.inference.training.optimizers import make_optimizer
from gumbo.inference.training.steps import TorchStep
from gumbo.models import AttendInferRepeat, GaussianVAE
from gumbo.models.attend_infer_repeat import glimpse, inverse

pytestmark = pytest.mark.usefixtures("param_store")

SHAPE = (1, 10, 10)
SMALL = {"num_steps": 2, "window": 4, "what_dim": 2, "hidden": (6,)}


def pair(seed=0, **options):
    torch.manual_seed(seed)
    model = AttendInferRepeat(SHAPE, **SMALL | options).double()
    return model, RecurrentAttentionGuide(model, rnn_hidden=5).double()


def recorded(program, *args, values=None, **kwargs):
    trace = poutine.trace(poutine.condition(program, values or {})).get_trace(*args, **kwargs)
    trace.compute_log_prob()
    return trace


def test_the_transformer_is_torchs_grid_sample():
    image = torch.rand(40, 2, 5, 7, dtype=torch.float64)
    where = torch.randn(40, 3, dtype=torch.float64) * torch.tensor([1.5, 2.0, 2.0]) + torch.tensor([1.0, 0.0, 0.0])
    scale, across, down, zero = *where.unbind(-1), torch.zeros(40).double()
    theta = torch.stack([scale, zero, across, zero, scale, down], -1).reshape(40, 2, 3)
    expected = grid_sample(image, affine_grid(theta, [40, 2, 9, 6], align_corners=False), align_corners=False)
    torch.testing.assert_close(glimpse(image, where, 9, 6), expected)


def test_a_glimpse_at_its_place_gives_an_object_back():
    look, where = torch.rand(3, 1, 5, 5), torch.tensor([[3.0, 0.0, 0.0], [3.0, 0.4, -0.4], [3.0, -1.2, 0.8]])
    scene = glimpse(look, where, 15, 15)
    torch.testing.assert_close(glimpse(scene, inverse(where), 5, 5), look)
    torch.testing.assert_close(scene.sum((-1, -2)), look.sum((-1, -2)))


def test_density_by_hand():
    model, _ = pair(success=0.3, scale=2.0, scale_sd=0.5, place_sd=0.8, likelihood_sd=0.2)
    x, values = torch.rand(3, *SHAPE).double(), {}
    for t, present in ((1, [1.0, 1.0, 0.0]), (2, [1.0, 0.0, 0.0])):
        values[f"z_pres_{t}"] = torch.tensor(present).double().unsqueeze(-1)
        values[f"z_where_{t}"] = torch.randn(3, 3).double() + torch.tensor([2.0, 0.0, 0.0])
        values[f"z_what_{t}"] = torch.randn(3, 2).double()
    log_p = torch.tensor([0.3 * 0.3, 0.3 * 0.7, 0.7]).double().log()
    scene = torch.zeros(3, *SHAPE).double()
    for t in (1, 2):
        loc, sd = torch.tensor([2.0, 0.0, 0.0]), torch.tensor([0.5, 0.8, 0.8])
        log_p = log_p + torch.distributions.Normal(loc, sd).log_prob(values[f"z_where_{t}"]).sum(-1)
        log_p = log_p + torch.distributions.Normal(0.0, 1.0).log_prob(values[f"z_what_{t}"]).sum(-1)
        look = model.decoder(values[f"z_what_{t}"]).sigmoid().reshape(3, 1, 4, 4)
        for row in range(3):
            if values[f"z_pres_{t}"][row]:
                where = values[f"z_where_{t}"][row].clone()
                where[0] = where[0].clamp(min=1.0)
                scene[row] = scene[row] + glimpse(look[row], where, 10, 10)
    log_p = log_p + torch.distributions.Normal(scene, 0.2).log_prob(x).sum((1, 2, 3))
    trace = recorded(model, x, values=values)
    torch.testing.assert_close(trace.log_prob_sum(), log_p.sum())


def test_the_number_of_objects_is_a_truncated_geometric():
    model, _ = pair(num_steps=3, success=0.4)
    counts = model.counts(model.sample_prior(20_000))
    found = torch.stack([(counts == n).double().mean() for n in range(4)])
    expected = torch.tensor([0.6, 0.24, 0.096, 0.064]).double()
    error = (expected * (1 - expected) / len(counts)).sqrt()
    assert ((found - expected).abs() < 5 * error).all()


def test_absent_objects_add_nothing_to_the_bound():
    model, guide = pair()
    x = torch.rand(50, *SHAPE).double()
    trace = recorded(guide, x)
    scored = recorded(poutine.replay(model, trace=trace), x)
    absent = trace.nodes["z_pres_2"]["value"].squeeze(-1) == 0
    assert absent.any() and not absent.all()
    for site in ("z_where_2", "z_what_2"):
        gap = scored.nodes[site]["log_prob"] - trace.nodes[site]["log_prob"]
        assert not gap[absent].any() and gap[~absent].all()
    gone = trace.nodes["z_pres_1"]["value"].squeeze(-1) == 0
    assert not trace.nodes["z_pres_2"]["log_prob"][gone].abs().gt(1e-30).any()


def test_no_object_follows_an_absent_one():
    model, guide = pair()
    for draws in (model.sample_prior(500), guide(torch.rand(500, *SHAPE).double())):
        first, second = draws["z_pres_1"], draws["z_pres_2"]
        assert (second <= first).all() and (second < first).any() and second.any()


@pytest.mark.parametrize("word", ["nvil", "rloo", "disarm", "local-expectation"])
def test_the_mean_gradient_is_that_of_enumerated_presences(word):
    model, guide = pair()
    x = torch.rand(1, *SHAPE).double().expand(400, -1, -1, -1)

    def draws(estimator):
        loss = SiteELBO(model.estimators(estimator))(model, guide)
        loss(x)
        return torch.stack([torch.autograd.grad(loss(x) / len(x), guide.encoder_next.bias)[0] for _ in range(20)])

    ours, exact = draws(word), draws("enumerate")
    error = ((ours.var(0) + exact.var(0)) / len(ours)).sqrt()
    assert ((ours.mean(0) - exact.mean(0)).abs() < 5 * error).all()
    assert exact.mean(0)[0].abs() > 5 * error[0], "the test has no power"


def test_estimators_name_each_site():
    model, guide = pair()
    assert set(model.estimators("rloo")) == set(model.latents)
    assert SiteELBO(model.estimators("nvil"))(model, guide).initialize(torch.rand(4, *SHAPE).double())


def test_counts_boxes_and_accuracy():
    model, guide = pair(num_steps=3)
    x = torch.rand(30, *SHAPE).double()
    found = guide.objects(x)
    counts = model.counts(found)
    assert torch.equal(counts, sum(found[f"z_pres_{t}"] for t in (1, 2, 3)).squeeze(-1))
    assert guide.count_accuracy(x, counts) == 1.0
    assert guide.count_accuracy(x, counts + torch.arange(30).lt(6)) == 0.8
    assert guide.count_accuracy(x, counts.long()) == 1.0
    with pytest.raises(BadInput, match=r"counts has shape \(3,\), expected \(30,\)"):
        guide.count_accuracy(x, counts[:3])
    # A box holds the ink of its object: here the whole window, at half the side of the scene, up and to the right.
    where = torch.tensor([2.0, -0.6, 0.6]).double()
    left, top, right, bottom = model.boxes(where).tolist()
    assert (left, top, right, bottom) == pytest.approx((4.0, 1.0, 9.0, 6.0))
    ink = model.object(torch.ones(1).double(), where, torch.zeros(2).double())[0] > 0
    assert ink.any(0).nonzero().min() in (3, 4) and ink.any(1).nonzero().max() in (5, 6)


def test_objects_are_the_most_probable_steps():
    model, guide = pair()
    x = torch.rand(20, *SHAPE).double()
    found = guide.objects(x)
    trace = recorded(guide, x, values=found)
    for t in (1, 2):
        probs = trace.nodes[f"z_pres_{t}"]["fn"].base_dist.probs
        assert torch.equal(found[f"z_pres_{t}"], (probs >= 0.5).double())
        torch.testing.assert_close(found[f"z_where_{t}"], trace.nodes[f"z_where_{t}"]["fn"].base_dist.loc)


def test_success_may_be_annealed_and_is_saved():
    model, guide = pair(success=0.9)
    x = torch.rand(8, *SHAPE).double()
    model.success.fill_(0.01)
    values = {"z_pres_1": torch.ones(8, 1).double()}
    assert recorded(model, x, values=values).nodes["z_pres_1"]["log_prob"].exp().allclose(torch.tensor(0.01).double())
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    twin = AttendInferRepeat(**model.config).double()
    twin.load_state_dict(torch.load(file, weights_only=True))
    assert twin.success.item() == pytest.approx(0.01)
    seen = []

    def anneal(numbers):
        model.success.mul_(0.5)
        seen.append(model.success.item())

    fit(model, guide, x, loss=SiteELBO(model.estimators()), epochs=2, batch_size=8, progress=False, on_epoch=anneal)
    assert seen == pytest.approx([0.005, 0.0025]) and model.success.item() == pytest.approx(0.0025)


def test_presences_that_are_not_judged_do_not_see_the_scene():
    model, guide = pair(success=0.9)
    x = torch.rand(8, *SHAPE).double()
    seeing = recorded(guide, x).nodes["z_pres_1"]["fn"].base_dist.logits
    assert seeing.unique().numel() > 1
    guide.judged.fill_(0.0)
    blind = recorded(guide, x).nodes["z_pres_1"]["fn"].base_dist.logits
    torch.testing.assert_close(blind, torch.full_like(blind, 2.0))
    SiteELBO(model.estimators("enumerate"))(model, guide)(x).backward()
    assert not guide.encoder_next.weight.grad[0].any() and guide.encoder_next.weight.grad[1:].any()
    fit(
        model, guide, x, loss=SiteELBO(model.estimators()), epochs=4, batch_size=8, progress=False,
        anneal={"judged": "step(2, 0, 1)"},
    )  # fmt: skip
    assert guide.judged.item() == 1.0


@pytest.mark.parametrize("word", ["nvil", *(pytest.param(w, marks=pytest.mark.slow) for w in ("enumerate", "disarm"))])
def test_the_compiled_step_is_the_eager_one_on_the_same_noise(word):
    """Its captured graph, with a prior of presences that changes between the steps."""
    steps = []
    for kind in (partial(CompiledStep, backend=uncompiled), TorchStep):
        model, guide = pair(success=0.4)
        loss = SiteELBO(model.estimators(word), num_particles=2 if word == "disarm" else 1)
        x = torch.rand(4, *SHAPE, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        steps.append((kind(model, guide, loss, make_optimizer("adam", 1e-2)[0], Rows(x, "x")), model))
    (compiled, model), (eager, twin) = steps
    eager.module.load_state_dict(compiled.module.state_dict())  # baselines
    for success in (0.4, 0.4, 0.1, 1e-3):
        for one in (model, twin):
            one.success.fill_(success)
        mine = compiled(Rows(x, "x"))
        with Tape(compiled.noise):
            assert mine == pytest.approx(eager(Rows(x, "x")), rel=1e-9)
        for name, value in eager.module.state_dict().items():
            if isinstance(value, torch.Tensor):
                torch.testing.assert_close(compiled.module.state_dict()[name], value, rtol=1e-8, atol=1e-9, msg=name)
    assert compiled.captures == 1  # the new prior is an input of the same graph


def test_a_compiled_fit_resumes_to_the_same_bits(tmp_path, monkeypatch):
    """The captured graph; inductor, which takes a minute for it, is left out."""
    monkeypatch.setattr(step, "inductor", uncompiled)
    ends = []
    for parts in ((2,), (1, 2)):
        model, guide = pair(num_steps=1)
        for epochs in parts:
            fit(
                model, guide, torch.rand(8, *SHAPE, generator=torch.Generator().manual_seed(1)).double(),
                loss=SiteELBO(model.estimators("nvil")), batch_size=4, epochs=epochs, compile=True, progress=False,
                anneal={"success": "linear(3, 0.5, 0.01)", "judged": "step(2)"},
                run_dir=tmp_path / str(parts), resume=epochs != parts[0],
            )  # fmt: skip
        ends.append(model.state_dict() | guide.state_dict())
    assert all(torch.equal(value, ends[1][name]) for name, value in ends[0].items())


def test_the_rest_of_the_library_takes_it():
    model, guide = pair()
    x = torch.rand(6, *SHAPE).double()
    judged = evaluate(model, guide, x, num_samples=20)
    assert math.isfinite(judged.elbo) and judged.elbo <= judged.log_evidence
    data = to_arviz(model, guide, x, num_samples=20)
    assert data.posterior["z_pres_2"].shape == (1, 20, 6, 1)
    assert str(diagnose(model, guide, x, num_samples=100, num_simulations=20, refine_steps=2))


def test_bad_input_is_one_line():
    with pytest.raises(BadInput, match=r"data_shape \(20,\) must be \(channels, height, width\)"):
        AttendInferRepeat((20,))
    with pytest.raises(BadInput, match="success is 1.5: expected a probability"):
        AttendInferRepeat(SHAPE, success=1.5)
    with pytest.raises(BadInput, match="no attend-infer-repeat"):
        RecurrentAttentionGuide(GaussianVAE(SHAPE))
