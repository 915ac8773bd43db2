"""fit: resumed runs, what it refuses, what it leaves alone."""

from __future__ import annotations

import functools
import json
import shutil
import sys

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import (
    SVI,
    RenyiELBO,
    ReweightedWakeSleep,
    Trace_ELBO,
    TraceGraph_ELBO,
    TraceTailAdaptive_ELBO,
)
from pyro.nn import PyroModule
from resuming import SHAPE, images, pair, quiet, weights

from gumbo.errors import BadInput, GumboError, UnknownName
from gumbo.inference import Linear, evaluate
from gumbo.inference.training.checkpoints import load_checkpoint, save_checkpoint


def same(one, other) -> bool:
    return torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other


def test_a_result_shows_numbers_and_not_its_history():
    x = images()
    result = quiet(*pair(), x, valid=x[:8], loss="rloo", epochs=3, batch_size=20)
    said = repr(result)
    assert len(said) < 300 and said.startswith("FitResult(epochs=3, ")
    assert f"valid_elbo={result.history[-1]['valid_elbo']:.6g}" in said and "best_epoch=" in said
    assert repr(result.history) not in said


@pytest.mark.parametrize(
    ("kind", "word"),
    [
        ("normal", "pathwise"),
        ("categorical", "score-average"),
        ("categorical", "rloo"),
        ("categorical", "trace"),
        ("categorical", "trace-graph+baseline"),
    ],
)
def test_a_resumed_run_gives_the_same_numbers(tmp_path, kind, word):
    straight, resumed = pair(kind), pair(kind)
    whole = quiet(*straight, images(), valid=images(10, 1), loss=word, epochs=4, run_dir=tmp_path / "whole")
    quiet(*resumed, images(), valid=images(10, 1), loss=word, epochs=2, run_dir=tmp_path / "parts")
    fresh = pair(kind, seed=1)  # other initial weights: everything must come from the checkpoint
    parts = quiet(*fresh, images(), valid=images(10, 1), loss=word, epochs=4, run_dir=tmp_path / "parts", resume=True)

    timings = ("ms_per_step", "seconds")
    numbers = [[{k: v for k, v in h.items() if k not in timings} for h in run.history] for run in (whole, parts)]
    assert numbers[0] == numbers[1]
    assert torch.equal(weights(*straight), weights(*fresh))
    assert not torch.equal(weights(*straight), weights(*resumed))
    states = [load_checkpoint(tmp_path / name / "checkpoints" / "last.pt") for name in ("whole", "parts")]
    assert states[0]["store"].keys() == states[1]["store"].keys()
    assert all(torch.equal(states[0]["store"][name], states[1]["store"][name]) for name in states[0]["store"])
    assert all(same(states[0]["module"][name], states[1]["module"][name]) for name in states[0]["module"])
    lines = (tmp_path / "parts" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["epoch"] for line in lines] == [0, 1, 2, 3, 4]


def test_the_stock_baseline_is_in_the_checkpoint(tmp_path):
    quiet(*pair(), images(), loss="trace-graph+baseline", epochs=1, run_dir=tmp_path)
    store = load_checkpoint(tmp_path / "checkpoints" / "last.pt")["store"]
    assert len(store) == 1
    assert next(iter(store.values())).shape == (16,)  # one number a batch position: partial batches were dropped


def test_lines_after_the_checkpoint_are_not_written_twice(tmp_path):
    quiet(*pair(), images(), loss="trace", epochs=2, run_dir=tmp_path)
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"epoch": 3, "elbo": 0.0}\n{"epo')
    quiet(*pair(), images(), loss="trace", epochs=3, run_dir=tmp_path, resume=True)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["epoch"] for line in lines] == [1, 2, 3]
    assert lines[-1]["elbo"] != 0.0


@pytest.mark.parametrize("loss", [Trace_ELBO(), TraceGraph_ELBO()])
def test_steps_are_those_of_svi(loss):
    ours, theirs = pair(), pair()
    x = images(16)
    quiet(*ours, x, loss=loss, optimizer="adam", epochs=3, seed=5)
    with pyro.get_param_store().scope(), torch.random.fork_rng():
        torch.manual_seed(5)
        svi = SVI(*theirs, pyro.optim.Adam({"lr": 1e-2}), loss=loss)
        for _ in range(3):
            svi.step(x)
    assert torch.allclose(weights(*ours), weights(*theirs), atol=1e-6)


@pytest.mark.parametrize("word", ["trace", "trace-graph+baseline", "rloo"])
def test_nothing_outside_the_programs_changes(word, param_store):
    param_store.setdefault("mine", torch.ones(2))
    param_store.setdefault("decoder$$$0.weight", torch.zeros(6, 6))  # a stale entry of another model's
    model, guide = pair()
    guide.eval()
    before = torch.get_rng_state()
    quiet(model, guide, images(), loss=word, epochs=1)
    assert torch.equal(before, torch.get_rng_state())
    assert set(param_store.keys()) == {"mine", "decoder$$$0.weight"}
    assert (model.training, guide.training) == (True, False)
    assert model.decoder[0].weight.abs().sum() > 0


def test_training_helps_and_the_true_bound_stands_beside_the_training_objective():
    model, guide = pair("normal")
    result = quiet(model, guide, images(200), valid=images(50, 1), loss="trace", epochs=20)
    assert result.history[-1]["valid_elbo"] > result.history[0]["valid_elbo"] + 0.1
    assert result.objective_name == "elbo"
    relaxed = quiet(*pair(), images(), valid=images(10, 1), loss="gumbel-softmax", epochs=1)
    assert relaxed.objective_name != "elbo"
    assert {relaxed.objective_name, "valid_elbo"} <= relaxed.history[-1].keys()


def test_patience_stops_and_the_best_parameters_come_back():
    model, guide = pair("normal")
    seen = []

    def note(numbers):
        seen.append((numbers["valid_elbo"], weights(model, guide)))

    # A step this long only makes things worse, so the best state is early.
    result = quiet(
        model,
        guide,
        images(),
        valid=images(10, 1),
        loss="trace",
        lr=0.5,
        epochs=50,
        patience=3,
        restore_best=True,
        on_epoch=note,
    )
    assert result.stopped_early
    assert result.epochs == result.best_epoch + 3
    if result.best_epoch:
        assert torch.equal(weights(model, guide), seen[result.best_epoch - 1][1])


class Averaging(PyroModule):
    """Its predictions are a running average of the data it was trained on; without a step, zero."""

    def __init__(self, persistent):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(2, dtype=torch.float64))
        self.register_buffer("mean", torch.zeros(2, dtype=torch.float64), persistent=persistent)

    def forward(self, x):
        if self.training:
            self.mean = 0.8 * self.mean + 0.2 * x.mean(0)
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(self.mean + 0 * self.weight, 1.0).to_event(1), obs=x)


class NoLatents(PyroModule):
    def forward(self, x):
        pass


@pytest.mark.parametrize("persistent", [True, False])
@pytest.mark.parametrize("at", [0.0, 1.1, 2.0])
@pytest.mark.parametrize("resumed", [False, True])
def test_the_best_buffers_come_back_also_those_that_no_state_dict_holds(persistent, at, resumed, tmp_path):
    """The best epoch is the one whose running average of 2 is the nearest to the validation data."""
    x = torch.full((8, 2), 2.0, dtype=torch.float64)
    valid = torch.full((4, 2), at, dtype=torch.float64)
    options = {"valid": valid, "batch_size": 8, "restore_best": True, "run_dir": tmp_path if resumed else None}
    if resumed:
        quiet(Averaging(persistent), NoLatents(), x, epochs=4, **options | {"restore_best": False})
    model = Averaging(persistent)
    result = quiet(model, NoLatents(), x, epochs=6, resume=resumed, **options)
    averages = [2 - 2 * 0.8**epoch for epoch in range(7)]
    best = min(range(7), key=lambda epoch: abs(averages[epoch] - at))
    assert result.best_epoch == best
    torch.testing.assert_close(model.mean, torch.full((2,), averages[best], dtype=torch.float64))
    assert evaluate(model, NoLatents(), valid, num_samples=1).elbo == pytest.approx(result.best_elbo, rel=1e-12)


def test_transform_is_drawn_anew_each_epoch_and_repeatably():
    seen = []

    def draw(rows, generator):
        seen.append(torch.bernoulli(rows, generator=generator))
        return seen[-1]

    gray = torch.full((16, *SHAPE), 0.5)
    for _ in range(2):
        quiet(*pair(), gray, loss="trace", epochs=2, transform=draw)
    assert len(seen) == 6  # one to initialise and two epochs, twice
    assert torch.equal(seen[1], seen[4])
    assert not torch.equal(seen[1], seen[2])


def one_line(error) -> str:
    text = str(error.value)
    assert "\n" not in text
    return text


class After:
    """A transform that acts from the batch after the first ``calls``."""

    def __init__(self, calls, act):
        self.calls, self.act = calls, act

    def __call__(self, x, generator):
        self.calls -= 1
        return self.act(x) if self.calls < 0 else x


class Marked(pyro.nn.PyroModule):
    """A guide with Pyro's own mark for a decaying average."""

    def __init__(self):
        super().__init__()
        self.logits = torch.nn.Linear(9, 2)

    def forward(self, x):
        infer = {"baseline": {"use_decaying_avg_baseline": True}}
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Bernoulli(logits=self.logits(x)).to_event(1), infer=infer)


class Binary(pyro.nn.PyroModule):
    def __init__(self):
        super().__init__()
        self.out = torch.nn.Linear(2, 9)

    def forward(self, x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Bernoulli(logits=torch.zeros(2)).to_event(1))
            pyro.sample("x", dist.Bernoulli(logits=self.out(z)).to_event(1), obs=x)


@pytest.mark.parametrize("loss", ["trace-graph", TraceGraph_ELBO()], ids=["word", "object"])
def test_averages_that_a_guide_asks_for_drop_a_partial_batch(loss):
    x, steps = images(40).flatten(1), []
    quiet(Binary(), Marked(), x, loss=loss, epochs=2, on_epoch=lambda numbers: steps.append(numbers["step"]))
    assert steps == [2, 4]
    quiet(Binary(), Marked(), x[:8], loss=loss, epochs=1, on_epoch=lambda numbers: steps.append(numbers["step"]))
    assert steps == [2, 4, 1]


def test_bad_input_is_one_line(tmp_path):
    model, guide = pair()
    bad = images()
    bad[3, 0, 0, 0] = torch.nan
    for data, word in ((images(0), "empty"), (bad, "NaN"), (torch.zeros(8, 2, 2), "shape"), ([1, 2], "tensor")):
        with pytest.raises(BadInput, match=word) as error:
            quiet(model, guide, data, loss="trace")
        one_line(error)
    with pytest.raises(UnknownName, match="did you mean 'adam'"):
        quiet(model, guide, images(), loss="trace", optimizer="adan")
    with pytest.raises(UnknownName):
        quiet(model, guide, images(), loss="rlo0")
    with pytest.raises(BadInput, match="never full"):
        quiet(model, guide, images(8), loss="trace-graph+baseline")
    for no_guide, word in (
        (lambda x: None, "'y'"),
        ("a guide", "expected a Pyro program"),
        (Binary, "the class Binary"),
    ):
        with pytest.raises(BadInput, match=word) as error:
            quiet(model, no_guide, images(), loss="trace")
        one_line(error)
    with pytest.raises(BadInput, match="epochs is 0"):
        quiet(model, guide, images(), loss="trace", epochs=0)
    with pytest.raises(BadInput, match="run_dir"):
        quiet(model, guide, images(), loss="trace", resume=True)
    with pytest.raises(BadInput, match="valid="):
        quiet(model, guide, images(), loss="trace", patience=2)


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"run_dir": 3}, "run_dir is int: expected a path"),
        ({"run_dir": ""}, "run_dir is '': expected a path"),
        ({"run_dir": __file__}, "run_dir is .*, a file: expected a folder"),
        ({"run_dir": "a\0b"}, "run_dir"),
        ({"run_dir": "a" * 300}, "run_dir .* too long"),
        ({"seed": 2**70}, "seed is"),
        ({"seed": -1}, "seed is -1: expected a whole number"),
        ({"seed": -(2**70)}, "seed is"),
        ({"transform": lambda x, generator: x[:3]}, "transform's result has 3 rows for a batch of 16"),
        ({"transform": lambda x, generator: x * torch.nan}, "transform's result.* NaN"),
        ({"transform": After(2, lambda x: x * torch.nan)}, "transform's result.* NaN"),
    ],
    ids=lambda value: str(value)[:20],
)
def test_folders_seeds_and_transforms_that_cannot_be_are_refused(change, word, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for kind in ("normal", "categorical"):
        with pytest.raises(BadInput, match=word) as error:
            quiet(*pair(kind), images(), **{"loss": "trace", "epochs": 3} | change)
        one_line(error)


def test_a_folder_of_another_run_is_refused(tmp_path):
    quiet(*pair(), images(), loss="trace", epochs=1, run_dir=tmp_path)
    with pytest.raises(BadInput, match="resume=True"):
        quiet(*pair(), images(), loss="trace", epochs=1, run_dir=tmp_path)
    with pytest.raises(BadInput, match="loss: trace there, trace-graph here"):
        quiet(*pair(), images(), loss="trace-graph", epochs=2, run_dir=tmp_path, resume=True)
    with pytest.raises(BadInput, match="train"):
        quiet(*pair(), images(seed=7), loss="trace", epochs=2, run_dir=tmp_path, resume=True)
    with pytest.raises(BadInput, match="parameters"):
        quiet(*pair("normal"), images(), loss="trace", epochs=2, run_dir=tmp_path, resume=True)


def test_damaged_checkpoints_are_named(tmp_path):
    quiet(*pair(), images(), loss="trace", epochs=1, run_dir=tmp_path)
    for name in ("last.pt", "previous.pt"):
        path = tmp_path / "checkpoints" / name
        path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(BadInput, match=r"last\.pt is damaged.*, and .*previous\.pt is damaged"):
        quiet(*pair(), images(), loss="trace", epochs=2, run_dir=tmp_path, resume=True)


def test_a_checkpoint_of_something_else_is_told_apart(tmp_path):
    quiet(*pair(), images(), loss="trace", epochs=1, run_dir=tmp_path)
    path = tmp_path / "checkpoints" / "last.pt"
    state = load_checkpoint(path)
    model, guide = pair()
    model.register_buffer("another", torch.zeros(1))
    with pytest.raises(BadInput, match="of other programs: .*another") as error:
        quiet(model, guide, images(), loss="trace", epochs=2, run_dir=tmp_path, resume=True)
    one_line(error)
    save_checkpoint(path, {"model": state["module"]})
    with pytest.raises(BadInput, match="something else than fit") as error:
        quiet(*pair(), images(), loss="trace", epochs=2, run_dir=tmp_path, resume=True)
    one_line(error)


@pytest.mark.parametrize("word", ["trace", "trace-graph", "rloo"])
@pytest.mark.filterwarnings("ignore:Encountered NaN")
def test_a_loss_that_stops_being_finite_is_explained(word, tmp_path):
    model, guide = pair()
    with pytest.raises(GumboError, match=r"epoch 1, step \d: parameter '.*' is no longer finite; lower the") as error:
        quiet(model, guide, images(), loss=word, epochs=3, optimizer="sgd", lr=1e38)
    one_line(error)
    model, guide = pair()
    with torch.no_grad():
        guide.encoder_heads["y"].bias[0] = torch.nan
    with pytest.raises(BadInput, match=r"parameter 'guide\.encoder_heads\.y\.bias' is not finite before") as error:
        quiet(model, guide, images(), loss=word, epochs=1)


def test_a_site_that_is_not_finite_is_named():
    model, guide = pair("normal")
    model.prior_loc.fill_(1e30)
    with pytest.raises(GumboError, match="site 'z' has a log-probability that is not finite") as error:
        quiet(model, guide, images(), loss="trace", epochs=1)
    one_line(error)


class SqrtModel(torch.nn.Module):
    """Its logits are NaN once the weight has been driven below zero; the weight itself stays finite."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.tensor(0.02))

    def forward(self, x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            logits = z.mean(-1, keepdim=True) - 100 * torch.sqrt(self.weight)
            pyro.sample("x", dist.Bernoulli(logits=logits.expand(-1, 9)).to_event(1), obs=x)


class TwoLatents(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.loc = torch.nn.Linear(9, 2)

    def forward(self, x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(self.loc(x), 1.0).to_event(1))


@pytest.mark.filterwarnings("ignore:Encountered NaN")
@pytest.mark.parametrize("checked", [True, False])
@pytest.mark.parametrize("change", [{}, {"valid": 10}, {"validate": True}, {"loss": "trace"}], ids=str)
def test_a_site_that_breaks_in_mid_training_is_named(change, checked):
    x = images(rows=40).flatten(1)
    options = {"loss": "pathwise", "epochs": 30, "lr": 4e-3} | change
    if "valid" in change:
        options |= {"valid": x[:10], "batch_size": 40}  # one step an epoch: validation comes upon it first
    with (
        pyro.validation_enabled(checked),
        pytest.raises(GumboError, match=r"stopped at epoch \d+, step \d+: .*site 'x'") as error,
    ):
        quiet(SqrtModel(), TwoLatents(), x, **options)
    one_line(error)


def test_one_name_for_two_parameters_is_refused():
    model, guide = pair("normal")
    guide.decoder = torch.nn.Linear(2, 2)
    guide.decoder.register_parameter("0", None)
    model.decoder_extra, guide.decoder_extra = torch.nn.Linear(1, 1), torch.nn.Linear(1, 1)
    with pytest.raises(BadInput, match="decoder_extra"):
        quiet(model, guide, images(), loss="trace")


def scalars(folder):
    """What TensorBoard shows of a folder, by name: the values over steps."""
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    found = accumulator.EventAccumulator(str(folder))
    found.Reload()
    return {name: {e.step: e.value for e in found.Scalars(name)} for name in found.Tags()["scalars"]}, found


def test_tensorboard_shows_every_number_once(tmp_path):
    pytest.importorskip("tensorboard")
    options = {"loss": "trace", "valid": images(10, 1), "valid_samples": 2, "tensorboard": True, "run_dir": tmp_path}
    options |= {"lr": Linear(20, 1e-2, 1e-3)}
    quiet(*pair(), images(), epochs=3, **options)
    # As if the run had been killed after its second epoch: what came later is written again.
    shutil.copy(tmp_path / "checkpoints" / "previous.pt", tmp_path / "checkpoints" / "last.pt")
    result = quiet(*pair(seed=1), images(), epochs=4, resume=True, **options)
    shown, found = scalars(tmp_path / "tensorboard")
    assert shown.keys() == {"elbo", "valid_elbo", "lr", "ms_per_step", "seconds"}
    for name, values in shown.items():
        assert values == pytest.approx({h["step"]: h[name] for h in result.history if name in h}, rel=1e-6)
        assert [event.step for event in found.Scalars(name)] == sorted(values)  # none of them twice


def test_tensorboard_that_is_missing_is_told_before_any_step(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(BadInput, match=r'pip install -e "\.\[tensorboard\]"') as error:
        quiet(*pair(), images(), loss="trace", run_dir=tmp_path / "run", tensorboard=True)
    one_line(error)
    assert not (tmp_path / "run").exists()


def test_clipping_bounds_the_step():
    moved = {}
    for name, options in (
        ("free", {}),
        ("norm", {"clip_norm": 0.1}),
        ("value", {"clip_value": 1e-3}),
        ("pyro", {"optimizer": pyro.optim.SGD({"lr": 1.0}, {"clip_norm": 0.1})}),
    ):
        programs = pair("normal")
        before = weights(*programs)
        quiet(*programs, images(16), loss="trace", epochs=1, **{"optimizer": "sgd", "lr": 1.0} | options)
        moved[name] = weights(*programs) - before
    assert moved["free"].norm() > 1
    assert moved["norm"].norm() == pytest.approx(0.1, rel=1e-3)
    assert torch.allclose(moved["norm"] / 0.1, moved["free"] / moved["free"].norm(), atol=1e-4)
    assert moved["value"].abs().max() == pytest.approx(1e-3, rel=1e-3)
    assert moved["pyro"].norm() > 0.11  # each parameter by itself, as Pyro clips


@pytest.mark.parametrize(
    "make",
    [
        lambda: pyro.optim.ClippedAdam({"lr": 1e-2, "clip_norm": 0.01, "lrd": 0.5}),
        lambda: pyro.optim.Adam(lambda name: {"lr": 1e-2 if "decoder" in name else 1e-3}),
        lambda: pyro.optim.SGD({"lr": 1e-2}, {"clip_norm": 0.1}),
        lambda: pyro.optim.StepLR(
            {"optimizer": torch.optim.SGD, "optim_args": {"lr": 1e-2}, "step_size": 1, "gamma": 0.1}
        ),
    ],
    ids=["clipped", "by name", "clip_args", "schedule"],
)
def test_pyro_s_optimizers_do_what_they_do_under_svi(make):
    ours, theirs = pair("normal"), pair("normal")
    x = images(16)
    quiet(*ours, x, loss="trace", optimizer=make(), epochs=3, seed=5)
    with pyro.get_param_store().scope(), torch.random.fork_rng():
        torch.manual_seed(5)
        optimizer = make()
        svi = SVI(*theirs, optimizer, loss=Trace_ELBO())
        for _ in range(3):
            svi.step(x)
            if hasattr(optimizer, "step"):
                optimizer.step()
    start = weights(*pair("normal"))
    assert (weights(*ours) - start).norm() > 1e-3
    assert torch.allclose(weights(*ours), weights(*theirs), atol=1e-6)


def test_a_schedule_of_lr_is_that_of_the_step():
    moved = [weights(*pair("normal"))]
    result = quiet(
        *(programs := pair("normal")),
        images(16),
        loss="trace",
        optimizer="sgd",
        lr=Linear(2, 1e-2, 0.0),
        epochs=4,
        on_epoch=lambda _: moved.append(weights(*programs)),
    )
    assert [h["lr"] for h in result.history] == pytest.approx([5e-3, 0.0, 0.0, 0.0])  # what the next step takes
    steps = [float((b - a).norm()) for a, b in zip(moved, moved[1:], strict=False)]
    assert steps[0] > 0 and steps[1] > 0 and steps[2:] == [0.0, 0.0]


def test_schedulers_move_by_the_epoch_or_by_the_step():
    rates = {}
    for every in ("epoch", "step"):
        result = quiet(
            *pair("normal"),
            images(),
            loss="trace",
            scheduler=lambda o: torch.optim.lr_scheduler.StepLR(o, 1, 0.5),
            scheduler_every=every,
            epochs=2,
        )
        rates[every] = [h["lr"] for h in result.history]
    assert rates["epoch"] == pytest.approx([1e-2, 5e-3])
    assert rates["step"] == pytest.approx([1e-2 / 2**3, 1e-2 / 2**6])


def test_plateau_judges_by_the_validation_loss():
    result = quiet(
        *pair("normal"),
        images(),
        valid=images(10, 1),
        loss="trace",
        lr=0.5,
        scheduler=lambda o: torch.optim.lr_scheduler.ReduceLROnPlateau(o, factor=0.1, patience=0, threshold=0.0),
        epochs=12,
    )
    rate, best = 0.5, float("inf")
    for numbers in result.history[1:]:
        assert numbers["lr"] == pytest.approx(rate)
        if -numbers["valid_elbo"] < best:
            best = -numbers["valid_elbo"]
        else:
            rate *= 0.1
    assert rate < 0.5


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"optimizer": torch.optim.LBFGS}, "'closure'"),
        ({"optimizer": pyro.optim.Adam({"lrr": 1.0})}, "'lrr'"),
        ({"optimizer": torch.nn.Linear}, "made a|cannot be made"),
        ({"optimizer": lambda parameters: 3}, "made a int"),
        ({"optimizer": 3}, "expected a word"),
        ({"optimizer": pyro.optim.SGD({"lr": 1.0}, lambda module, name: {})}, "clip_args"),
        ({"optimizer": pyro.optim.Adam(lambda module, name: {})}, "one argument"),
        ({"scheduler": lambda o: 3}, "made a int"),
        ({"scheduler": torch.optim.lr_scheduler.StepLR}, "step_size"),
        ({"scheduler": torch.optim.lr_scheduler.ReduceLROnPlateau, "scheduler_every": "step"}, "epochs"),
        ({"scheduler": torch.optim.lr_scheduler.ReduceLROnPlateau, "lr": Linear(3)}, "leave one"),
        ({"scheduler_every": "batch"}, "scheduler_every"),
        ({"optimizer": functools.partial(torch.optim.SGD, lr=0.1), "lr": Linear(3)}, "use scheduler="),
        ({"optimizer": pyro.optim.Adam({"lr": 0.1}), "lr": Linear(3)}, "use scheduler="),
        ({"clip_norm": 0.0}, "clip_norm is 0.0"),
        ({"clip_value": "1"}, "clip_value is '1'"),
        ({"lr": 0.0}, "lr is 0.0"),
        ({"lr": "fast"}, "lr is 'fast'"),
        ({"batch_size": 2.5}, "batch_size is 2.5"),
        ({"epochs": "3"}, "epochs is '3'"),
        ({"seed": "x"}, "seed is 'x'"),
        ({"patience": 0, "valid": images(4)}, "patience is 0"),
        ({"checkpoint_steps": 0}, "checkpoint_steps is 0"),
        ({"tensorboard": True}, "run_dir"),
        ({"transform": 3}, "transform is int"),
        ({"transform": lambda rows, generator: 3}, "transform's result"),
        ({"valid": images(0)}, "valid is empty"),
        ({"valid": torch.zeros(4, 2, 2)}, "shape"),
        ({"valid": images(4) / 0}, "valid: argument 0 holds NaN or infinity"),
    ],
    ids=lambda value: ",".join(value) if isinstance(value, dict) else value,  # the same in every process
)
def test_bad_settings_are_one_line_and_nothing_is_written(change, words, tmp_path):
    folder = {} if "tensorboard" in change else {"run_dir": tmp_path / "run"}
    with pytest.raises((BadInput, UnknownName), match=words) as error:
        quiet(*pair(), images(), **{"loss": "trace", "epochs": 1} | folder | change)
    one_line(error)
    assert not (tmp_path / "run" / "metrics.jsonl").exists() or "valid" in change


@pytest.mark.parametrize(
    "data",
    [images().long(), images().double(), {"y": images()}, (images(), images())],
    ids=["int", "double", "y", "two"],
)
def test_data_that_the_programs_cannot_take_are_one_line(data):
    class Model(pyro.nn.PyroModule):
        """Checks nothing itself."""

        def __init__(self):
            super().__init__()
            self.decoder = torch.nn.Linear(1, 9)

        def forward(self, x):
            with pyro.plate("data", len(x), dim=-1):
                z = pyro.sample("z", dist.Normal(torch.zeros(len(x), 1), 1).to_event(1))
                pyro.sample("x", dist.Bernoulli(logits=self.decoder(z)).to_event(1), obs=x.flatten(1))

    class Guide(pyro.nn.PyroModule):
        def __init__(self):
            super().__init__()
            self.encoder = torch.nn.Linear(9, 1)

        def forward(self, x):
            with pyro.plate("data", len(x), dim=-1):
                pyro.sample("z", dist.Normal(self.encoder(x.flatten(1)), 1).to_event(1))

    for loss in ("trace", "pathwise", "trace-graph"):
        assert quiet(Model(), Guide(), images(), loss=loss, epochs=1).epochs == 1
        with pytest.raises(BadInput, match=r"cannot run on a batch of train, \(16, 1, 3, 3\)") as error:
            quiet(Model(), Guide(), data, loss=loss, epochs=1)
        one_line(error)


@pytest.mark.filterwarnings("ignore:Encountered NaN")
def test_a_broken_run_keeps_its_last_good_checkpoint(tmp_path):
    """One step of this length is too much: it is found before it is saved, and the state before it stays."""
    with pytest.raises(
        GumboError, match=r"no longer finite; .*; .*last\.pt still holds it at epoch 1, step 0"
    ) as error:
        quiet(*pair(), images(), loss="rloo", epochs=3, optimizer="sgd", lr=1e38, run_dir=tmp_path, checkpoint_steps=1)
    one_line(error)
    state = load_checkpoint(tmp_path / "checkpoints" / "last.pt")
    assert state["now"]["done"] == 0
    assert all(value.isfinite().all() for value in state["module"].values() if isinstance(value, torch.Tensor))


def test_parameters_that_break_between_epochs_are_not_saved(tmp_path):
    model, guide = pair()

    def spoil(numbers):
        if numbers["epoch"] == 2:
            with torch.no_grad():
                guide.encoder_heads["y"].bias[0] = torch.nan

    options = {"loss": "rloo", "epochs": 4, "run_dir": tmp_path}
    with pytest.raises(GumboError, match=r"parameter 'guide\.encoder_heads\.y\.bias' .* at epoch 2, step 3") as error:
        quiet(model, guide, images(), on_epoch=spoil, **options)
    one_line(error)
    assert quiet(*pair(seed=1), images(), resume=True, **options).epochs == 4


def test_other_bounds_of_pyros_have_their_own_names():
    found = quiet(*pair("normal"), images(), loss=RenyiELBO(num_particles=3), epochs=1, batch_size=20)
    assert found.objective_name == "renyi" and "renyi" in found.history[-1] and "elbo" not in found.history[-1]


@pytest.mark.parametrize(
    ("loss", "said"), [(ReweightedWakeSleep(), "objective='rws'"), (TraceTailAdaptive_ELBO(num_particles=2), "inf")]
)
def test_losses_of_pyros_without_a_value_are_refused(loss, said):
    with pytest.raises(BadInput, match=said):
        quiet(*pair("normal"), images(), loss=loss, epochs=1, batch_size=20)


@pytest.mark.parametrize("trouble", [ZeroDivisionError("of the user"), KeyboardInterrupt()], ids=["error", "Ctrl-C"])
def test_the_error_of_on_epoch_is_told_although_it_also_replaced_a_parameter(trouble, tmp_path):
    model, guide = pair()

    def breaks(_):
        guide.extra = torch.nn.Parameter(torch.zeros(()))
        raise trouble

    with pytest.raises(type(trouble)):
        quiet(model, guide, images(), loss="rloo", epochs=1, on_epoch=breaks, run_dir=tmp_path)
    assert load_checkpoint(tmp_path / "checkpoints" / "last.pt")["now"]["number"] == 1  # the last one of these programs
