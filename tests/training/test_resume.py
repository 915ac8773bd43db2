"""Runs that are stopped anywhere, in any way, and gone on with: the same numbers to the last bit."""

from __future__ import annotations

import functools
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time
import warnings

import pyro
import pyro.distributions as dist
import pytest
import resuming
import torch
import word_programs
from pyro.infer import RenyiELBO, Trace_ELBO
from resuming import After, assert_alike, images, pair, quiet, weights
from torch.optim import lr_scheduler

from gumbo.errors import BadInput, GumboWarning, Interrupted
from gumbo.inference import Cosine, Exponential, Linear, SiteELBO, fit, make_loss
from gumbo.inference.estimators import Concrete, GumbelSoftmax
from gumbo.inference.stock import stock_elbos
from gumbo.inference.training import checkpoints
from gumbo.inference.training import trainer as runs
from gumbo.inference.training.checkpoints import load_checkpoint
from gumbo.inference.training.steps import _UnsavedBuffers

LOSSES = {
    "pathwise": ("normal", lambda: "pathwise"),
    "stl": ("normal", lambda: "stl"),
    "dreg": ("normal", lambda: SiteELBO("dreg", objective="iwae", num_particles=2)),
    "iwae": ("categorical", lambda: SiteELBO("rloo", objective="iwae", num_particles=2)),
    "renyi": ("categorical", lambda: SiteELBO("rloo", objective="renyi", alpha=0.5, num_particles=2)),
    "log-variance": ("categorical", lambda: SiteELBO(objective="log-variance+elbo", num_particles=2)),
    "rws": ("categorical", lambda: SiteELBO(objective="rws", num_particles=2)),
    "score-average": ("categorical", lambda: "score-average"),
    "nvil": ("categorical", lambda: "nvil"),
    "rloo": ("categorical", lambda: "rloo"),
    "muprop": ("categorical", lambda: "muprop"),
    "disarm": ("bernoulli", lambda: "disarm"),
    "relax": ("categorical", lambda: "relax"),
    "double-cv": ("categorical", lambda: "double-cv"),
    "rodeo": ("bernoulli", lambda: "rodeo"),
    "arms": ("bernoulli", lambda: "arms"),
    "carms": ("categorical", lambda: "carms"),
    "gapped-straight-through": ("categorical", lambda: "gapped-straight-through"),
    "rebar": ("bernoulli", lambda: "rebar"),
    "cooling": ("categorical", lambda: SiteELBO(GumbelSoftmax(Exponential(1.0, 0.3, 0.1)), kl_weight=Linear(7))),
    "concrete": ("categorical", lambda: SiteELBO(Concrete(Linear(9, 1.0, 0.5)))),
    **{word: ("categorical", functools.partial(make_loss, word)) for word in stock_elbos if word != "trace-meanfield"},
    "trace-meanfield": ("normal", lambda: "trace-meanfield"),
}


@pytest.fixture(autouse=True)
def interruptible():
    """SIGINT as at a terminal: the tests may run in a background job, which ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def stop(number: int = signal.SIGTERM) -> None:
    os.kill(os.getpid(), number)


def interrupted_and_resumed(folder, kind: str, stops: list[int], options) -> None:
    """A run that gets a signal at each of these calls of its transform, and is gone on with in a new pair each time."""
    for seed, calls in enumerate(stops, start=5):
        with pytest.raises(Interrupted):
            quiet(
                *pair(kind, seed),
                images(kind=kind),
                transform=After(calls, stop),
                run_dir=folder,
                resume=True,
                **options(),
            )
    quiet(*pair(kind, 4), images(kind=kind), transform=After(0, stop), run_dir=folder, resume=True, **options())


def held_against_an_uninterrupted_run(tmp_path, kind: str, options) -> None:
    quiet(*pair(kind), images(kind=kind), transform=After(0, stop), run_dir=tmp_path / "whole", **options())
    # The first initialises, then come the batches: within the first epoch, at the end of the second, in the next.
    first = quiet_until(tmp_path / "parts", kind, 3, options)
    assert first.where == "epoch 1, step 2"
    interrupted_and_resumed(tmp_path / "parts", kind, [5, 3], options)
    assert_alike(tmp_path / "whole", tmp_path / "parts")


def quiet_until(folder, kind: str, calls: int, options) -> Interrupted:
    with pytest.raises(Interrupted) as caught:
        quiet(*pair(kind), images(kind=kind), transform=After(calls, stop), run_dir=folder, **options())
    return caught.value


@pytest.mark.parametrize("name", LOSSES)
def test_every_kind_of_loss_goes_on_in_mid_epoch(name, tmp_path):
    kind, make = LOSSES[name]
    held_against_an_uninterrupted_run(
        tmp_path, kind, lambda: {"loss": make(), "epochs": 4, "valid": images(10, 1), "valid_samples": 2}
    )


def newer_words():
    for word, kind, quick in word_programs.cells():
        marks = () if quick and word not in LOSSES else pytest.mark.slow
        yield pytest.param(word, kind, id=f"{word}-{kind}", marks=marks)


@pytest.mark.parametrize("word, kind", list(newer_words()))
def test_every_word_goes_on_in_mid_epoch_on_every_kind_of_site(word, kind, tmp_path):
    def options():
        loss = SiteELBO(word_programs.said(word), num_particles=2)
        return {"loss": loss, "epochs": 3, "valid": images(10, 1, kind), "valid_samples": 2}

    held_against_an_uninterrupted_run(tmp_path, kind, options)


class Counting(torch.nn.Module):
    """Its decoder depends on a buffer that no ``state_dict`` holds, and that grows with the number of calls."""

    def __init__(self, grows: bool):
        super().__init__()
        self.decoder = torch.nn.Linear(2, 3)
        self.grows = grows
        self.register_buffer("calls", torch.zeros(1), persistent=False)
        self.register_buffer("constant", torch.ones(3), persistent=False)

    def forward(self, x):
        pyro.module("counting", self)
        if self.grows:
            self.calls = torch.cat([self.calls, self.constant[:1]])
        else:
            self.calls += 1
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(self.decoder(z) + 0.1 * self.calls.sum(), 1.0).to_event(1), obs=x)


class Reading(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder = torch.nn.Linear(3, 4)

    def forward(self, x):
        pyro.module("reading", self)
        loc, log_scale = self.encoder(x).chunk(2, -1)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(loc, log_scale.exp()).to_event(1))


def test_a_write_that_torch_does_not_count_is_kept_too():
    model = torch.nn.Module()
    for name, value in (("mean", torch.zeros(3)), ("var", torch.ones(3)), ("constant", torch.ones(3))):
        model.register_buffer(name, value, persistent=False)
    kept = _UnsavedBuffers(model, torch.nn.Module())
    torch.nn.functional.batch_norm(torch.arange(12.0).reshape(4, 3), model.mean, model.var, training=True)
    assert list(kept.state()) == ["model.mean", "model.var"]


@pytest.mark.parametrize("grows", [False, True])
@pytest.mark.parametrize("loss", [SiteELBO(plates="ignore"), "trace-graph"])
def test_buffers_that_no_state_dict_holds_go_on_too(loss, grows, tmp_path):
    torch.manual_seed(3)
    x = torch.randn(40, 3)

    def run(folder, calls=0, resume=False):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            programs = Counting(grows), Reading()
        options = {"run_dir": folder, "resume": resume, "transform": After(calls, stop), "epochs": 3}
        try:
            quiet(*programs, x, loss=loss, **options)
        except Interrupted:
            assert calls
        return programs

    whole = run(tmp_path / "whole")
    run(tmp_path / "parts", 6)
    state = load_checkpoint(tmp_path / "parts" / "checkpoints" / "last.pt")
    assert list(state["buffers"]) == ["model.calls"]  # no constants
    parts = run(tmp_path / "parts", resume=True)
    assert torch.equal(weights(*whole), weights(*parts)) and torch.equal(whole[0].calls, parts[0].calls)

    # A checkpoint of before, which holds none, still loads.
    last = tmp_path / "parts" / "checkpoints" / "last.pt"
    state = load_checkpoint(last)
    del state["buffers"]
    checkpoints.save_checkpoint(last, state)
    assert torch.equal(weights(*run(tmp_path / "parts", resume=True)), weights(*whole))


def by_name(name: str) -> dict[str, float]:
    return {"lr": 3e-2 if name.startswith("decoder") else 1e-3, "betas": (0.8, 0.99)}


UPDATES = {
    **{word: {"optimizer": word} for word in ("adam", "adamax", "adamw", "nadam", "radam", "rmsprop", "sgd")},
    "class": {"optimizer": torch.optim.Adagrad},
    "partial": {"optimizer": functools.partial(torch.optim.SGD, lr=1e-2, momentum=0.9)},
    "pyro adam": {"optimizer": pyro.optim.Adam({"lr": 1e-2})},
    "pyro function": {"optimizer": pyro.optim.Adam},
    "pyro clipped": {"optimizer": pyro.optim.ClippedAdam({"lr": 1e-2, "clip_norm": 0.5, "lrd": 0.9})},
    "pyro adagrad": {"optimizer": pyro.optim.AdagradRMSProp({"eta": 0.1})},
    "pyro by name": {"optimizer": pyro.optim.Adam(by_name)},
    "pyro clip_args": {"optimizer": pyro.optim.SGD({"lr": 1e-2, "momentum": 0.9}, {"clip_norm": 0.1})},
    "pyro schedule": {
        "optimizer": lambda: pyro.optim.ExponentialLR(
            {"optimizer": torch.optim.Adam, "optim_args": {"lr": 1e-2}, "gamma": 0.5}
        )
    },
    "lr schedule": {"lr": Cosine(10, 3e-2, 1e-3)},
    "clipped": {"clip_norm": 0.5, "clip_value": 0.05},
    "steps": {"scheduler": lambda o: lr_scheduler.StepLR(o, 2, 0.5), "scheduler_every": "step"},
    "milestones": {"scheduler": functools.partial(lr_scheduler.MultiStepLR, milestones=[1, 3])},
    "one cycle": {
        "scheduler": functools.partial(lr_scheduler.OneCycleLR, max_lr=0.1, total_steps=13),
        "scheduler_every": "step",
    },
    "plateau": {"scheduler": functools.partial(lr_scheduler.ReduceLROnPlateau, patience=0, threshold=0.5)},
    "sequence": {
        "scheduler": lambda o: lr_scheduler.SequentialLR(
            o, [lr_scheduler.LinearLR(o, 0.1, 1.0, 2), lr_scheduler.CosineAnnealingLR(o, 5)], [2]
        )
    },
}


# SequentialLR of torch warns of its own call of step.
@pytest.mark.filterwarnings("ignore:The epoch parameter in `scheduler.step")
@pytest.mark.parametrize("name", UPDATES)
def test_every_kind_of_update_goes_on_in_mid_epoch(name, tmp_path):
    def options():
        made = {key: value() if name == "pyro schedule" else value for key, value in UPDATES[name].items()}
        return {"loss": "trace", "epochs": 4, **made}

    held_against_an_uninterrupted_run(tmp_path, "normal", options)


def test_the_same_without_a_transform_and_from_any_step(tmp_path):
    options = {"loss": "trace", "epochs": 3, "valid": images(10, 1), "valid_samples": 2}
    quiet(*pair(), images(), run_dir=tmp_path / "whole", **options)
    for done in range(9):
        model, guide = pair(seed=done)
        folder = tmp_path / f"{done}"
        with pytest.raises(ZeroDivisionError):
            quiet(*stopping(*pair(), done, folder), images(), run_dir=folder, checkpoint_steps=1, **options)
        state = load_checkpoint(tmp_path / f"{done}" / "checkpoints" / "last.pt")
        assert state["now"]["number"] * 3 - 3 + state["now"]["done"] == done
        quiet(model, guide, images(), run_dir=tmp_path / f"{done}", resume=True, checkpoint_steps=1, **options)
        assert_alike(tmp_path / "whole", tmp_path / f"{done}")


def stopping(model, guide, after: int, folder):
    """The pair, with a guide that fails in training once it has made so many steps, as a crash would."""
    begun = folder / "checkpoints" / "last.pt"  # written before the first step; what runs before it is no step
    calls = iter(range(10**6))
    seen = images(16).shape[0]

    def fail(module, inputs):
        training = torch.is_grad_enabled() and module.training and inputs[0].shape[0] in (seen, 8)
        if training and begun.exists() and next(calls) == after:
            raise ZeroDivisionError

    guide.register_forward_pre_hook(fail)
    return model, guide


@pytest.mark.parametrize("word", ["trace", "trace-graph+baseline"])
def test_patience_and_the_best_parameters_go_on_too(word, tmp_path):
    def options():
        return {
            "loss": word,
            "optimizer": "adam",
            "valid": images(10, 1),
            "valid_samples": 1,
            "patience": 3,
            "restore_best": True,
            "epochs": 60,
            "lr": 0.3,
        }

    whole, parts = pair(), pair(seed=1)
    one = quiet(*whole, images(), transform=After(0, stop), run_dir=tmp_path / "whole", **options())
    quiet_until(tmp_path / "parts", "categorical", 6, options)
    two = quiet(*parts, images(), transform=After(0, stop), run_dir=tmp_path / "parts", resume=True, **options())
    assert one.stopped_early and two.stopped_early
    assert (one.best_epoch, one.best_elbo, one.epochs) == (two.best_epoch, two.best_elbo, two.epochs)
    assert_alike(tmp_path / "whole", tmp_path / "parts")
    assert torch.equal(weights(*whole), weights(*parts))
    again = quiet(
        *pair(seed=2), images(), transform=After(0, stop), run_dir=tmp_path / "parts", resume=True, **options()
    )
    assert again.stopped_early and again.epochs == two.epochs


def test_a_signal_during_validation_stops_at_once_and_nothing_is_lost(tmp_path, monkeypatch):
    options = {"loss": "trace", "epochs": 3, "valid": images(10, 1), "valid_samples": 2}
    quiet(*pair(), images(), run_dir=tmp_path / "whole", **options)
    judge, calls = runs.Evaluator.__call__, iter(range(99))

    def slow(*args, **keywords):
        if next(calls) == 1:
            stop(signal.SIGINT)
            time.sleep(5)
            pytest.fail("validation went on")
        return judge(*args, **keywords)

    with monkeypatch.context() as patch:
        patch.setattr(runs.Evaluator, "__call__", slow)
        with pytest.raises(Interrupted, match="SIGINT at epoch 1, step 3; saved in .*resume=True") as caught:
            quiet(*pair(), images(), run_dir=tmp_path / "parts", **options)
    assert caught.value.status == 130 and "\n" not in str(caught.value)
    assert (tmp_path / "parts" / "metrics.jsonl").read_text().count("\n") == 1
    quiet(*pair(seed=1), images(), run_dir=tmp_path / "parts", resume=True, **options)
    assert_alike(tmp_path / "whole", tmp_path / "parts")


def test_signal_handlers_are_the_callers_again_and_ignored_signals_stay_ignored(tmp_path):
    mine = lambda *_: None  # noqa: E731
    before = signal.signal(signal.SIGTERM, mine), signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with pytest.raises(Interrupted):
            quiet(*pair(), images(), loss="trace", epochs=2, run_dir=tmp_path / "a", transform=After(3, stop))
        assert signal.getsignal(signal.SIGTERM) is mine
        interrupt = functools.partial(stop, signal.SIGINT)
        quiet(*pair(), images(), loss="trace", epochs=2, run_dir=tmp_path / "b", transform=After(3, interrupt))
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGTERM, before[0])
        signal.signal(signal.SIGINT, before[1])


def test_a_second_signal_does_not_wait_for_the_step(tmp_path):
    def twice():
        stop(signal.SIGINT)
        stop(signal.SIGINT)
        pytest.fail("the second signal was kept")

    with pytest.raises(KeyboardInterrupt) as caught:
        quiet(*pair(), images(), loss="trace", epochs=2, run_dir=tmp_path, transform=After(5, twice))
    assert not isinstance(caught.value, Interrupted)
    assert load_checkpoint(tmp_path / "checkpoints" / "last.pt")["now"]["number"] == 2


def test_without_a_folder_signals_are_left_alone():
    with pytest.raises(KeyboardInterrupt) as caught:
        interrupt = functools.partial(stop, signal.SIGINT)
        quiet(*pair(), images(), loss="trace", epochs=2, transform=After(3, interrupt))
    assert not isinstance(caught.value, Interrupted)


def test_a_run_in_another_thread_installs_no_handler(tmp_path):
    import threading

    found = []

    def work():
        with pyro.get_param_store().scope():
            found.append(quiet(*pair(), images(), loss="trace", epochs=1, run_dir=tmp_path))

    before = signal.getsignal(signal.SIGTERM)
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found[0].epochs == 1 and signal.getsignal(signal.SIGTERM) is before


def test_another_number_of_threads_is_said(tmp_path):
    quiet(*pair(), images(), loss="trace", epochs=1, run_dir=tmp_path)
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    try:
        with pytest.warns(GumboWarning, match=rf"threads {threads} and resumes with {threads + 1}") as said:
            quiet(*pair(), images(), loss="trace", epochs=2, run_dir=tmp_path, resume=True)
    finally:
        torch.set_num_threads(threads)
    assert len(said) == 1 and "\n" not in str(said[0].message)


def test_settings_that_change_the_numbers_are_compared(tmp_path):
    options = {"loss": "trace", "epochs": 1}
    quiet(*pair(), images(), run_dir=tmp_path, **options)
    for change, match in (
        ({"clip_norm": 1.0}, "optimizer: .* clip_norm 1.0"),
        ({"lr": 0.5}, "optimizer"),
        ({"lr": Linear(10, 1.0, 0.1)}, r"adam\(lr=Linear\(steps=10"),
        ({"scheduler": lambda o: lr_scheduler.StepLR(o, 3)}, "scheduler: None there, StepLR"),
        ({"transform": After(0, stop)}, "transform: None there, After here"),
        ({"loss": SiteELBO(GumbelSoftmax(0.7))}, "temperature=0.7"),
        ({"batch_size": 8}, "batch_size: 16 there, 8 here"),
    ):
        with pytest.raises(BadInput, match=match) as error:
            quiet(*pair(), images(), run_dir=tmp_path, resume=True, **options | {"epochs": 2} | change)
        assert "\n" not in str(error.value)
    assert quiet(*pair(), images(), run_dir=tmp_path, resume=True, loss="trace", epochs=2).epochs == 2


def made_by(make, **options):
    """Functions of one name that make different optimizers."""
    return lambda parameters: make(parameters, **options)


def warm_up(steps):
    return lambda step: min((1 + step) / steps, 1.0)


def by_word(word, lr):
    return lambda name: {"lr": lr if word in name else 1e-2}


UNSEEN = {
    "alpha": ("loss", lambda alpha: RenyiELBO(alpha=alpha, num_particles=2), 0.5, 0.0),
    "vectorized": ("loss", lambda flag: Trace_ELBO(vectorize_particles=flag, max_plate_nesting=1), True, False),
    "lr": ("optimizer", lambda lr: made_by(torch.optim.Adam, lr=lr), 1e-2, 1e-3),
    "betas": ("optimizer", lambda betas: made_by(torch.optim.Adam, betas=betas), (0.9, 0.99), (0.9, 0.999)),
    "class": ("optimizer", lambda kind: made_by(kind, lr=1e-2), torch.optim.Adam, torch.optim.SGD),
    "pyro": ("optimizer", lambda lr: pyro.optim.Adam(by_word("decoder", lr)), 1e-1, 1e-3),
    "every": ("scheduler_every", str, "epoch", "step"),
    "kl-weight": ("loss", lambda steps: SiteELBO(kl_weight=warm_up(steps)), 500, 600),
    "temperature": ("loss", lambda steps: SiteELBO(GumbelSoftmax(warm_up(steps))), 500, 600),
    "rate": ("lr", lambda steps: warm_up(steps), 500, 600),
    "scheduler": ("scheduler", lambda by: lambda o: lr_scheduler.LambdaLR(o, lambda epoch: by**epoch), 0.5, 0.6),
}


@pytest.mark.parametrize("kind", UNSEEN)
def test_another_configuration_that_looks_alike_is_refused_and_a_run_of_an_earlier_version_goes_on(kind, tmp_path):
    option, make, first, other = UNSEEN[kind]
    programs = "categorical" if kind == "temperature" else "normal"
    data, options = images(kind=programs), {"loss": "trace", "run_dir": tmp_path}
    if kind == "every":
        options["scheduler"] = lambda o: lr_scheduler.StepLR(o, 1, 0.5)
    quiet(*pair(programs), data, epochs=1, **options | {option: make(first)})
    with pytest.raises(BadInput, match="holds a run of another configuration: (loss_options|optimizer_groups|sched)"):
        quiet(*pair(programs), data, epochs=2, resume=True, **options | {option: make(other)})
    assert quiet(*pair(programs), data, epochs=2, resume=True, **options | {option: make(first)}).epochs == 2
    earlier = checkpoints.Checkpoints(tmp_path / "checkpoints")
    state = earlier.load()
    for name in ("dtypes", "loss_options", "optimizer_groups", "scheduler_every", "schedules"):
        del state["settings"][name]
    earlier.save(state)
    if kind == "class":
        with pytest.raises(BadInput, match="does not fit these .*its optimizer is no SGD") as error:
            quiet(*pair(programs), data, epochs=3, resume=True, **options | {option: make(other)})
        assert "\n" not in str(error.value)
    assert quiet(*pair(programs), data, epochs=3, resume=True, **options | {option: make(first)}).epochs == 3


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_programs_of_another_dtype_are_refused(dtype, tmp_path):
    options = {"loss": "trace", "run_dir": tmp_path}
    quiet(*pair(), images(), epochs=1, **options)
    model, guide = pair()
    for module in (model.to(dtype), guide.to(dtype)):
        module.register_forward_pre_hook(lambda _, args: tuple(x.to(dtype) for x in args))
    words = str(dtype).removeprefix("torch.")
    with pytest.raises(
        BadInput, match=rf"configuration: dtypes differ \(dtypes: float32 \w+ there, {words} \w+ here\)"
    ):
        quiet(model, guide, images(), epochs=2, resume=True, **options)


@pytest.mark.parametrize("kind", ["pyro", "partial"])
def test_the_order_of_an_optimizers_options_is_no_setting(kind, tmp_path):
    for epochs, options in ((1, {"lr": 1e-2, "momentum": 0.9}), (2, {"momentum": 0.9, "lr": 1e-2})):
        optimizer = pyro.optim.SGD(options) if kind == "pyro" else functools.partial(torch.optim.SGD, **options)
        given = {"loss": "trace", "optimizer": optimizer, "run_dir": tmp_path, "resume": epochs == 2}
        assert quiet(*pair(), images(), epochs=epochs, **given).epochs == epochs


def test_checkpoints_by_the_clock(tmp_path, monkeypatch):
    written = []
    save = checkpoints.Checkpoints.save
    monkeypatch.setattr(checkpoints.Checkpoints, "save", lambda self, state: (written.append(state), save(self, state)))

    def moments(**options):
        written.clear()
        quiet(*pair(), images(), loss="trace", epochs=2, run_dir=tmp_path / str(options), **options)
        return [(state["now"]["number"], state["now"]["done"]) for state in written]

    assert moments() == moments(checkpoint_minutes=60.0) == [(1, 0), (2, 0), (3, 0)]
    every_step = [(1, 0), (1, 1), (1, 2), (1, 3), (2, 0), (2, 1), (2, 2), (2, 3), (3, 0)]
    assert moments(checkpoint_minutes=1e-9) == moments(checkpoint_steps=1) == every_step
    assert moments(checkpoint_every=2) == [(1, 0), (3, 0)]
    with pytest.raises(BadInput, match="checkpoint_minutes is 0"):
        moments(checkpoint_minutes=0)


def test_generators_of_devices_go_on_too(tmp_path, monkeypatch):
    """The bookkeeping alone, with a device that only this test has; what draws from it is torch's."""
    device, stream = torch.device("cuda:0"), {"now": 0}

    def draw(numbers):
        stream["now"] += 1

    def restore(state, where):
        assert where == device
        stream["now"] = int(state)

    monkeypatch.setattr(runs, "devices_of", lambda *programs: [device])
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda where: torch.tensor(stream["now"]))
    monkeypatch.setattr(torch.cuda, "set_rng_state", restore)
    options = {"loss": "trace", "run_dir": tmp_path, "on_epoch": draw}
    quiet(*pair(), images(), epochs=2, **options)
    assert stream["now"] == 2
    stream["now"] = 99
    quiet(*pair(), images(), epochs=3, resume=True, **options)
    assert stream["now"] == 3  # as it was saved after two epochs' draws, and one more


# --- runs that are killed


def endless_kill(folder, word: str, kind: str, options) -> None:
    """What the killed process runs; slow enough to be killed in the middle of it."""
    torch.set_num_threads(1)

    def slowly(rows, generator):
        time.sleep(0.004)
        return torch.where(torch.rand(rows.shape, generator=generator) < 0.05, 1 - rows, rows)

    model, guide = pair(kind, seed=int(time.time() * 1e3) % 1000 if folder.exists() else 0)
    fit(model, guide, images(), loss=word, transform=slowly, run_dir=folder, resume=folder.exists(), **options)


def process(*arguments) -> multiprocessing.Process:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["gumbo.inference.elbo", "gumbo.models", "gumbo.guides"])  # once for all of them
    started = context.Process(target=endless_kill, args=arguments)
    started.start()
    return started


KILLED = {"pathwise": "normal", "nvil": "categorical", "relax": "categorical", "trace-graph+baseline": "categorical"}


def kill_and_go_on(tmp_path, word: str, kills: int, epochs: int) -> None:
    options = {"epochs": epochs, "batch_size": 8, "valid": images(10, 1), "valid_samples": 2, "progress": False}
    options |= {"checkpoint_steps": 3, "lr": 1e-2}
    endless_kill(tmp_path / "whole", word, KILLED[word], options)
    moments = random.Random(word)
    hits, steps = 0, set()
    last = tmp_path / "killed" / "checkpoints" / "last.pt"
    while hits < kills:
        started = process(tmp_path / "killed", word, KILLED[word], options)
        limit = time.monotonic() + 120
        stood = last.stat().st_mtime_ns if last.exists() else 0
        # Importing takes long and is no moment of the run: wait for its first sign of life.
        while (not last.exists() or last.stat().st_mtime_ns == stood) and started.is_alive():
            assert time.monotonic() < limit
            time.sleep(0.002)
        started.join(moments.uniform(0.0, 0.25))
        assert started.is_alive(), "the run was over before it could be killed: make it longer"
        os.kill(started.pid, signal.SIGKILL)
        started.join()
        assert started.exitcode == -signal.SIGKILL
        hits += 1
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", GumboWarning)
            steps.add(str(resuming.without_times(checkpoints.Checkpoints(last.parent).load()["now"])))
    assert len(steps) > kills // 2  # it came forward between the kills
    endless_kill(tmp_path / "killed", word, KILLED[word], options)
    assert_alike(tmp_path / "whole", tmp_path / "killed")


def test_kill_9_at_random_moments(tmp_path):
    kill_and_go_on(tmp_path, "nvil", kills=3, epochs=40)


@pytest.mark.slow
@pytest.mark.parametrize("word", KILLED)
def test_kill_9_at_ten_random_moments(tmp_path, word):
    kill_and_go_on(tmp_path, word, kills=10, epochs=120)


COMMAND = ["-m", "gumbo", "train", "--model_options.hidden=[8]", "--guide_options.hidden=[8]", "--epochs", "150"]
COMMAND += ["--batch_size", "300", "--importance_samples", "2", "--checkpoint_steps", "2"]
THREAD = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}


def command(cwd, *options: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, *COMMAND, *options],
        cwd=cwd,
        env=os.environ | THREAD,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finished(started: subprocess.Popen) -> str:
    _, said = started.communicate(timeout=300)
    assert started.returncode == 0, said
    return said


def under_way(started: subprocess.Popen, metrics) -> None:
    """Wait until the run has written a line since it was started."""
    before = metrics.stat().st_mtime_ns if metrics.exists() else 0
    limit = time.monotonic() + 120
    while not metrics.exists() or metrics.stat().st_mtime_ns == before or metrics.stat().st_size == 0:
        assert started.poll() is None and time.monotonic() < limit
        time.sleep(0.005)


class Death(BaseException):
    """What no run can save itself from, as SIGKILL."""


def die() -> None:
    raise Death


def at_the_second_epoch(model, change: str):
    """An ``on_epoch`` that changes the programs."""

    def on_epoch(row) -> None:
        if row["epoch"] == 2 and change == "freezes":
            next(model.parameters()).requires_grad_(False)
        elif row["epoch"] == 2:
            with torch.no_grad():
                next(model.parameters()).mul_(0.5)

    return on_epoch


@pytest.mark.parametrize("change", ["freezes", "writes"])
@pytest.mark.parametrize("calls", [8, 9, 11])  # in the first step of the third epoch, within it, after it
def test_what_on_epoch_changes_is_in_the_checkpoint(change, calls, tmp_path):
    options = {"epochs": 4, "loss": "rloo"}
    for folder, calls_before, error in (("whole", 0, None), ("parts", calls, Death)):
        model, guide = pair()
        options["on_epoch"] = at_the_second_epoch(model, change)
        options |= {"transform": After(calls_before, die), "run_dir": tmp_path / folder}
        if error is None:
            quiet(model, guide, images(), **options)
        else:
            with pytest.raises(error):
                quiet(model, guide, images(), **options)
    model, guide = pair(seed=3)
    options |= {"on_epoch": at_the_second_epoch(model, change), "transform": After(0, die)}
    quiet(model, guide, images(), resume=True, **options)
    assert_alike(tmp_path / "whole", tmp_path / "parts")


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_error_in_on_epoch_loses_no_epoch(error, tmp_path):
    def fails(row) -> None:
        if row["epoch"] == 2:
            raise error("the tracker is away")

    options = {"epochs": 4, "loss": "rloo", "transform": After(0, die)}
    quiet(*pair(), images(), run_dir=tmp_path / "whole", **options)
    with pytest.raises(error, match="the tracker is away"):
        quiet(*pair(), images(), run_dir=tmp_path / "parts", on_epoch=fails, **options)
    assert load_checkpoint(tmp_path / "parts" / "checkpoints" / "last.pt")["now"]["number"] == 3
    quiet(*pair(seed=3), images(), run_dir=tmp_path / "parts", resume=True, **options)
    assert_alike(tmp_path / "whole", tmp_path / "parts")


@pytest.mark.slow
@pytest.mark.parametrize("estimator", ["pathwise", "trace-graph+baseline"])
def test_the_command_goes_on_after_any_signal(estimator, tmp_path):
    model = ["--model", "gaussian-vae" if estimator == "pathwise" else "categorical-vae", "--estimator", estimator]
    finished(command(tmp_path, *model, "--folder", "whole"))
    options = [*model, "--folder", "parts"]
    for number, status in ((signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGKILL, -9), (signal.SIGKILL, -9)):
        started = command(tmp_path, *options)
        under_way(started, tmp_path / "parts" / "metrics.jsonl")
        time.sleep(random.Random(number).uniform(0.0, 0.3))
        started.send_signal(number)
        _, said = started.communicate(timeout=60)
        assert started.returncode == status, said
        if number != signal.SIGKILL:
            line = said.splitlines()[-1]
            assert f"interrupted by {signal.Signals(number).name} at epoch" in line
            assert line.endswith("; resume with: gumbo train --resume parts --epochs 150")
            assert "Traceback" not in said
        options = ["--resume", "parts"]
    finished(command(tmp_path, *options))
    assert_alike(tmp_path / "whole", tmp_path / "parts")
