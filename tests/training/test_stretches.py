"""A stretch of compiled steps is the same steps: losses, state and random numbers, also where it ends early."""

from __future__ import annotations

import dataclasses
import functools
import os
import signal

import pytest
import resuming
import torch

from gumbo.errors import GumboError, Interrupted
from gumbo.guides import BernoulliGuide, NormalGuide
from gumbo.inference import SiteELBO
from gumbo.inference.engine.noise import Noise
from gumbo.inference.engine.rows import Rows
from gumbo.inference.training import batches as reading
from gumbo.inference.training.batches import Batches
from gumbo.inference.training.compile import step as compiled
from gumbo.inference.training.compile.backends import uncompiled
from gumbo.inference.training.compile.step import CompiledStep
from gumbo.inference.training.optimizers import make_optimizer
from gumbo.inference.training.schedules import Linear
from gumbo.models import BernoulliVAE, GaussianVAE

SHAPE = (1, 3, 3)


def programs(kind):
    torch.manual_seed(0)
    if kind == "coins":
        model = BernoulliVAE(SHAPE, num_latents=3, hidden=(6,))
        return model, BernoulliGuide(model, hidden=(6,))
    model = GaussianVAE(SHAPE, latent_dim=2, hidden=(6,))
    return model, NormalGuide(model, hidden=(6,))


def images(rows, number=0):
    generator = torch.Generator().manual_seed(number)
    return (torch.rand(rows, *SHAPE, generator=generator) < 0.5).float()


def made_step(loss, kind="coins", optimizer="adam", lr=1e-2):
    make = make_optimizer(optimizer, lr, scheduler_every="step")[0]
    step = CompiledStep(*programs(kind), loss, make, Rows(images(4)), uncompiled)
    torch.manual_seed(5)
    return step


def one_by_one(step, batches):
    losses = []
    for batch in batches:
        losses.append(step(batch))
        if not torch.isfinite(torch.tensor(losses[-1])):
            break
    return losses


def in_stretches(step, batches):
    losses, source, counts = [], iter(batches), []
    while True:
        made: list = []
        step.stretch(source, made, most=5)
        if not made:
            return losses, counts
        losses += [loss for _, loss in made]
        counts.append(len(made))
        if not torch.isfinite(torch.tensor(losses[-1])):
            return losses, counts


def ends_alike(step, other):
    def state(one):
        return {"module": one.module.state_dict(), "optimizer": one.optimizer.optimizer.state_dict()}

    assert resuming.difference(state(step), state(other)) is None
    assert step.module.binding.steps == other.module.binding.steps


CASES = {
    "rloo": {"loss": lambda: SiteELBO("rloo", num_particles=2)},
    "a baseline and KL warm-up": {"loss": lambda: SiteELBO("score-average", kl_weight=Linear(6))},
    "probing": {"loss": lambda: SiteELBO("rebar")},
    "two kinds of noise": {"loss": lambda: SiteELBO("pathwise"), "kind": "normal"},
    "a schedule by the step": {
        "loss": lambda: SiteELBO("pathwise"),
        "kind": "normal",
        "lr": lambda step: 0.1 / (1 + step),
    },
    "an optimizer after the graph": {"loss": lambda: SiteELBO("disarm"), "optimizer": "sgd"},
    "values reported": {"loss": lambda: SiteELBO(objective="log-variance+elbo", num_particles=2)},
}


@pytest.mark.parametrize("name", CASES)
def test_a_stretch_is_its_steps(name):
    """Also where a batch of another size, or a step that reads values, is among them."""
    given = [Rows(images(3 if number == 7 else 4, number)) for number in range(12)]
    options = CASES[name]
    step, other = (made_step(options["loss"](), **{k: v for k, v in options.items() if k != "loss"}) for _ in range(2))
    torch.manual_seed(5)
    expected = one_by_one(step, given)
    state = torch.get_rng_state()
    torch.manual_seed(5)
    found, counts = in_stretches(other, given)
    assert found == expected and torch.equal(state, torch.get_rng_state())
    ends_alike(step, other)
    assert (max(counts) == 1) == (name in ("an optimizer after the graph", "values reported"))


def test_a_loss_that_is_not_finite_ends_the_learning_of_its_stretch():
    """The steps after it, made before anybody looked, leave no trace; later ones learn again."""
    given = [Rows(images(4, number) * (float("nan") if number == 2 else 1.0)) for number in range(6)]
    pair = [made_step(SiteELBO("disarm")) for _ in range(2)]
    for step in pair:
        step.check_data = False
    torch.manual_seed(5)
    expected = one_by_one(pair[0], given)
    state = torch.get_rng_state()
    torch.manual_seed(5)
    found, counts = in_stretches(pair[1], given)
    assert counts == [3] and found[:2] == expected[:2]
    assert torch.equal(state, torch.get_rng_state())
    ends_alike(*pair)
    before = resuming.weights(pair[1].module)
    made: list = []
    torch.manual_seed(6)
    pair[1].stretch(iter(given[3:5]), made, 5)
    torch.manual_seed(6)
    one_by_one(pair[0], given[3:5])
    ends_alike(*pair)
    assert len(made) == 2 and not torch.equal(before, resuming.weights(pair[1].module))


quiet = functools.partial(resuming.quiet, batch_size=4, compile=True)


@pytest.fixture
def captured(monkeypatch):
    monkeypatch.setattr(compiled, "inductor", uncompiled)


def test_fit_looks_at_the_losses_of_a_stretch_together(captured, monkeypatch, tmp_path):
    """An epoch is one stretch; checkpoints by the step, and the clock, end others."""
    looks = []
    look = CompiledStep._count_losses
    monkeypatch.setattr(CompiledStep, "_count_losses", lambda *args: (looks.append(len(args[2])), look(*args))[1])
    options = {"loss": SiteELBO("pathwise"), "epochs": 2}
    whole = quiet(*programs("normal"), images(48), **options)
    assert looks == [12, 12]
    looks.clear()
    quiet(*programs("normal"), images(48), run_dir=tmp_path, checkpoint_steps=5, **options)
    assert looks == [5, 5, 2, 3, 5, 4]
    looks.clear()
    monkeypatch.setattr(compiled, "SECONDS", 0.0)
    singly = quiet(*programs("normal"), images(48), **options)
    assert looks == [1] * 24
    assert [line["elbo"] for line in singly.history] == [line["elbo"] for line in whole.history]


def test_the_first_bad_step_of_a_stretch_is_named(captured, tmp_path):
    """With its site, and with the checkpoint before it, which still holds a good state."""
    seen = []

    def transform(x, generator):
        seen.append(1)
        return x + 1e30 if len(seen) >= 8 else x

    class Gaussian(GaussianVAE):
        def likelihood(self, z):
            import pyro.distributions as dist

            return dist.Normal(super().likelihood(z).base_dist.logits, 1.0).to_event(3)

    torch.manual_seed(0)
    model = Gaussian(SHAPE, latent_dim=2, hidden=(6,))
    guide = NormalGuide(model, hidden=(6,))
    options = {"transform": transform, "loss": SiteELBO("pathwise"), "run_dir": tmp_path, "checkpoint_steps": 4}
    first = len(seen)
    with pytest.raises(
        GumboError, match=r"epoch 1, step \d+: the loss is .*; site 'z' .*still holds it at epoch 1, step"
    ) as caught:
        quiet(model, guide, images(64), epochs=1, **options)
    step = 8 - first - 1  # the first call is fit's look at the programs
    assert f"step {step}:" in str(caught.value)
    assert all(torch.isfinite(parameter).all() for parameter in model.parameters())
    kept = resuming.load_checkpoint(tmp_path / "checkpoints" / "last.pt")
    assert kept["now"]["done"] == 4
    assert all(torch.isfinite(value).all() for value in kept["module"].values() if isinstance(value, torch.Tensor))


def test_a_signal_ends_a_stretch_after_its_step(captured, tmp_path):
    """The run is saved there, and resumes to the bits of one that nobody interrupted."""
    count = []

    def transform(x, generator):
        count.append(1)
        if len(count) == 8:
            os.kill(os.getpid(), signal.SIGTERM)
        return x

    def run(**options):
        pair = programs("normal")
        result = quiet(*pair, images(64), loss=SiteELBO("pathwise"), epochs=2, transform=transform, **options)
        return resuming.weights(*pair), [line["elbo"] for line in result.history]

    with pytest.raises(Interrupted, match="epoch 1, step 7"):
        run(run_dir=tmp_path)
    assert resuming.load_checkpoint(tmp_path / "checkpoints" / "last.pt")["now"]["done"] == 7
    found, history = run(run_dir=tmp_path, resume=True)
    expected, whole = run()
    assert torch.equal(found, expected) and history == whole


def test_rows_of_several_batches_are_selected_together(monkeypatch):
    """The same batches as one by one; rows that do not lie one by one are selected alone."""
    data = {"x": torch.randn(23, 4), "y": torch.arange(23), "all": torch.ones(3)}
    selections = []
    select = Rows.__getitem__
    monkeypatch.setattr(Rows, "__getitem__", lambda self, index: (selections.append(index), select(self, index))[1])

    def batches(x, ahead):
        monkeypatch.setattr(reading, "AHEAD", ahead)
        selections.clear()
        found = list(Batches(Rows(data | {"x": x}), 4, seed=3).of_epoch(2, done=1))
        return found, sum(isinstance(index, torch.Tensor) for index in selections)

    alone, number = batches(data["x"], 1)
    assert number == 5
    for ahead, asked in ((40, 3), (2**20, 1)):
        together, number = batches(data["x"], ahead)
        assert number == asked
        for one, other in zip(alone, together, strict=True):
            assert len(one) == len(other)
            assert all(torch.equal(one.kwargs[name], other.kwargs[name]) for name in data)
    assert batches(data["x"].t().contiguous().t(), 2**20)[1] == 5


@pytest.mark.parametrize("most, size", [(5, 8), (40, 8), (40, 16), (40, 1600)])
@pytest.mark.parametrize("kind", ["coins", "normal"])
def test_noise_in_blocks_is_the_noise_of_single_draws(kind, most, size):
    """For every number of steps, and whether or not this size can be drawn in blocks."""
    step = made_step(SiteELBO("disarm" if kind == "coins" else "pathwise"), kind)
    request = step.noise.requests[0]
    step.noise = Noise([dataclasses.replace(request, shape=(size,))])
    step._blocks = None
    singly, ahead = [], []
    for steps in (1, 3, most, 0):
        torch.manual_seed(steps)
        for _ in range(steps):
            step.noise.draw()
            singly.append(step.noise.buffers[0].clone())
        state = torch.get_rng_state()
        torch.manual_seed(steps)
        noises = step._noise_ahead(most)
        ahead += [next(noises)[0].clone() for _ in range(steps)]
        noises.close()
        assert torch.equal(state, torch.get_rng_state())
    assert all(map(torch.equal, singly, ahead)) and len(singly) == len(ahead)
    assert step._draws_in_blocks() == (kind == "coins" or size % 16 == 0)
