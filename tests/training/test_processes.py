"""Several processes: their gradients, statistics and numbers are those of one; what cannot be is refused."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import distributed_worker as worker
import pyro
import pyro.distributions as dist
import pytest
import torch
from distributed_worker import F64, NormalGuide, NormalModel, Program, data, pair_of, shared
from pyro.infer import RenyiELBO, Trace_ELBO
from torch import nn

from gumbo.errors import BadInput, UnsupportedSite
from gumbo.inference import FreeBits, SiteELBO, evaluate, fit, make_loss
from gumbo.inference.engine.rows import Rows
from gumbo.inference.stock import TraceEnumELBO
from gumbo.inference.training.distributed import Processes
from gumbo.inference.training.fits import _make_step
from gumbo.inference.training.optimizers import make_optimizer
from gumbo.inference.training.split_rows import Streams, share_of
from gumbo.inference.training.splittable import refuse, study

HELPERS = Path(__file__).parents[1] / "helpers"
missing = importlib.util.find_spec("accelerate") is None
several_processes = pytest.mark.skipif(missing, reason="needs Accelerate: pip install -e '.[distributed]'")


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def on_several(job: str, folder: Path, count: int = 2) -> Any:
    """What a job of ``distributed_worker.py`` finds on two processes, or on ``count``."""
    common = os.environ | {"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count), "OMP_NUM_THREADS": "1"}
    common |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    command = [
        sys.executable,
        "-W",
        "error",
        "-W",
        "ignore:the meaning of",
        str(HELPERS / "distributed_worker.py"),
        job,
        str(folder / "found.json"),
    ]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    both = [
        subprocess.Popen(command, env=common | {"RANK": str(rank), "LOCAL_RANK": str(rank)}, **pipes)
        for rank in range(count)
    ]
    try:
        said = [process.communicate(timeout=400)[0] for process in both]
    finally:
        for process in both:
            process.kill()
    assert not any(process.returncode for process in both), "\n".join(said)
    return json.loads((folder / "found.json").read_text())


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> dict:
    return on_several("everything_short", tmp_path_factory.mktemp("short"))


def check_gradients(differences: dict[str, dict[str, float]]) -> None:
    for name, worst in differences.items():
        assert worst["size"] > 0.1, f"{name}: a gradient of nothing shows nothing"
        for what in ("gradient", "loss", "buffers"):
            assert worst[what] < 1e-10, f"{name}: {what} differs by {worst[what]}"


# Two processes --------------------------------------------------------------------------------------------------------


@several_processes
def test_gradients_losses_and_baselines_are_those_of_one_process(found):
    assert set(found["gradients"]) == set(worker.SHORT)
    check_gradients(found["gradients"])


@several_processes
@pytest.mark.slow
def test_every_estimator_has_the_gradient_of_one_process(tmp_path):
    differences = on_several("gradients", tmp_path)
    assert set(differences) == set(worker.CASES)
    check_gradients(differences)


@several_processes
def test_gradients_that_gloo_sends_are_those_of_one_process(found):
    check_gradients(found["through gloo"])


@several_processes
@pytest.mark.skipif(sys.platform != "linux", reason="memory is shared on Linux")
def test_sums_in_memory_are_the_sums_and_alike_in_all_processes(found):
    for said in found["memory"]:
        assert len(said) == 1 + 5 * 7 + 5 and all(said)


@several_processes
@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="memory is shared on Linux")
def test_three_processes_share_memory_too(tmp_path):
    assert all(map(all, on_several("three", tmp_path, 3)))


@several_processes
def test_draws_outside_the_plate_are_shared_and_those_of_rows_are_not(found):
    first, second = found["draws"]["drawn"]
    assert first["g"] == second["g"] and first["c"] == second["c"]
    assert first["z"] != second["z"]
    assert first["g"][0] != first["g"][1] and first["z"][0] != first["z"][1]
    assert found["draws"]["common"][0] == found["draws"]["common"][1]


@several_processes
def test_evaluation_finds_what_one_process_does(found):
    (together, alone), (also_together, also_alone) = found["evaluation"]
    assert together == alone == also_together == also_alone


@several_processes
def test_plates_that_one_process_finds_mixed_are_mixed_for_all(found):
    assert found["mixed"]["elbo"] == [["inner"], ["inner"]]
    first, second = found["mixed"]["iwae"]
    assert "changes other rows of plate 'inner'" in first and "changes other rows of plate 'inner'" in second


@several_processes
def test_a_run_that_went_on_is_the_whole_run(found):
    whole, parts = found["resumed"]["whole"], found["resumed"]["in parts"]
    assert whole[0] == whole[1], "the processes hold the same"
    assert parts == whole
    assert len(whole[0][0]) == 4


@several_processes
@pytest.mark.parametrize("scaled", ["scaled", "unscaled"])
def test_compiled_steps_have_the_losses_and_updates_of_one_process(found, scaled):
    """Enumeration leaves nothing to chance; batches of another size run uncompiled, a new attribute is captured.

    So is a changed option of the optimizer, between any two steps.
    """
    steps = found["compiled"][scaled]
    assert [step["captures"] for step in steps] == [1, 1, 1, 1, 2]
    assert [step["graph"] for step in steps[:4]] == [True, True, False, True]
    for step in steps:
        assert step["size"] > 0.1 and step["loss"] < 1e-10 and step["state"] < 1e-10


@several_processes
@pytest.mark.parametrize("kind", ["adam", "adam compiled", "sgd", "sgd compiled"])
def test_the_order_of_parameters_in_memory_changes_nothing(found, kind):
    assert max(gaps[kind] for gaps in found["laid out"]) < 1e-12


@several_processes
def test_a_compiled_run_that_went_on_is_the_whole_run(found):
    whole, parts = found["compiled"]["resumed"]["whole"], found["compiled"]["resumed"]["in parts"]
    assert whole[0] == whole[1], "the processes hold the same"
    assert parts == whole


@several_processes
def test_what_no_graph_of_one_process_holds_is_refused(found):
    shared, averages, values = found["compiled"]["refused"]
    assert all("site 'g': it is outside plate 'rows'" in said for said in shared)
    assert all("score-average: the averages over the rows of all processes" in said for said in averages)
    assert "outside the support" in values[0] and "outside the support" in values[1]


@several_processes
def test_a_step_is_one_message_that_carries_signals_too(found):
    """The third step has no comparison of states; the fourth carries a signal that only the second process had."""
    for counts in found["messages"]:
        assert counts[2:] == [1, 15]


@several_processes
def test_auto_makes_one_choice_for_all_processes_and_keeps_it(found):
    """The second process would choose another word, and is not asked; a run that goes on asks nobody."""
    chosen = found["chosen"]
    assert chosen["measured"] == [[True], []]
    for first, second in chosen["runs"]:
        assert first == second and first[0] == {"z": chosen["kept"][0]["z"]}
    assert len(chosen["kept"]) == 1 and chosen["kept"][0]["z"] in ("rloo", "arms")


@several_processes
def test_what_on_epoch_changes_in_the_main_process_changes_in_all(found):
    found = found["changed in main"]
    for name in ("untouched", "an epoch", "scales", "writes", "freezes, compile=False", "freezes, compile=True"):
        assert found[name][0] == found[name][1], name
    whole, epoch = (found[name][0] for name in ("untouched", "an epoch"))
    assert found["scales"][0]["shift"] == [0.5 * value for value in whole["shift"]]
    assert found["writes"][0]["unit"] == [0.5] and whole["unit"] == [1.0]
    assert whole["shift"] != epoch["shift"] == found["freezes, compile=False"][0]["shift"]
    assert found["freezes, compile=True"][0]["shift"] == pytest.approx(epoch["shift"], abs=1e-12)
    assert found["breaks"] == ["ZeroDivisionError: of the user", "GumboError: ZeroDivisionError: of the user"]
    for name, words in (("replaces", "'model.shift' is new since training"), ("reshapes", "made 'model.unit' another")):
        assert all(said.startswith("BadInput: ") and words in said for said in found[name]), found[name]


@several_processes
def test_the_error_of_one_process_is_everybodys(found):
    assert found["one fails"] == [["GumboError: process 1: RuntimeError: nines"], ["RuntimeError: nines"]]
    assert found["main fails"] == ["BadInput: the main process says no"] * 2


@several_processes
@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("values", r"another train: \(12, 3\) float64 \w+ there, \(12, 3\) float64 \w+ in process 0; give all"),
        ("length", r"another train: \(13, 3\) float64 \w+ there"),
        ("stored values", r"another train: TensorDataset of 12 rows \w+ there"),
        ("valid", r"another valid: \(5, 3\) float64 \w+ there, None in process 0"),
        ("epochs", "another epochs: 2 there, 1 in process 0"),
        ("batch_size", "another batch_size: 5 there, 4 in process 0"),
        ("lr", r"another optimizer: adam\(lr=0.5\) there"),
        ("schedule", r"another schedules: \{'lr': \[0.05"),
        ("patience", "another patience: 3 there, None in process 0"),
        ("run_dir", "another use of run_dir: False there, True in process 0"),
        ("frozen", r"another parameter 'model.shift': \(3,\) torch.float64, frozen there"),
    ],
)
def test_processes_with_other_data_or_settings_are_refused_in_one_line_by_all(found, name, words):
    said = found["apart"][name]
    assert said[0] == said[1] and "\n" not in said[0]
    assert re.match(f"BadInput: process 1 has {words}", said[0])


@several_processes
def test_processes_may_draw_the_rows_of_a_data_set_differently(found):
    assert found["apart"]["drawn anew"] == ["nothing", "nothing"]


@several_processes
def test_what_comes_apart_is_noticed(found):
    for said in found["statistics of its own"]:
        assert "'binding.states.z.mean'" in said and "moved by each process's own rows" in said
    for said in found["depends on rows later"]:
        assert said.startswith("UnsupportedSite: site 'g'") and "drew it differently" in said


@several_processes
@pytest.mark.slow
def test_a_process_that_hangs_is_not_waited_for_without_end(tmp_path):
    found = on_several("hangs", tmp_path)
    assert set(found) == {"gloo", "memory"} if sys.platform == "linux" else {"gloo"}
    for waited in found.values():
        assert waited["said"].startswith("process 0 lost touch with the others") and "\n" not in waited["said"]
        assert waited["seconds"] < 7


# Splitting ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 2, 5, 9, 16])
@pytest.mark.parametrize("number", [1, 2, 3, 7])
def test_shares_are_all_rows_once(count, number):
    shares = [share_of(count, index, number) for index in range(number)]
    rows = [row for share in shares if not share.idle for row in range(count)[share.rows]]
    assert rows == list(range(count))
    assert sum(share.weight for share in shares) == pytest.approx(1.0, abs=1e-15)
    for share in shares:
        assert len(range(count)[share.rows]) >= 1
        assert share.idle or share.weight == pytest.approx(len(range(count)[share.rows]) / count)


def test_streams_go_on_where_they_stopped():
    streams, plain = Streams(3, 0, []), torch.Generator()
    plain.set_state(torch.get_rng_state())
    found = [torch.rand(2)]
    with streams.taken("own"):
        own = torch.rand(2)
    found.append(torch.rand(2))
    kept = streams.state()
    with streams.taken("own"):
        later = torch.rand(2)
    assert torch.equal(torch.cat(found), torch.rand(4, generator=plain))
    assert not torch.equal(own, later)
    streams.load(kept)
    with streams.taken("own"):
        assert torch.equal(torch.rand(2), later)
    other = Streams(3, 1, [])
    with other.taken("own"):
        assert not torch.equal(torch.rand(2), own)


@pytest.mark.parametrize(
    ("pair", "scaled"),
    [(worker.NORMAL, False), (worker.SHARED, True), (worker.LAYERS, True)],
)
def test_the_plate_over_the_rows_is_found(pair, scaled):
    before = torch.get_rng_state()
    model, guide = pair_of(pair, scaled)
    torch.set_rng_state(before)
    found = study(model, guide, Rows(data(9)))
    assert (found.plate, found.scaled) == ("rows", scaled)
    assert torch.equal(torch.get_rng_state(), before)


# Refusals -------------------------------------------------------------------------------------------------------------


class MeanOfRows(NormalGuide):
    def forward(self, x):
        super().forward(x - x.mean(0))


class Normed(NormalGuide):
    def __init__(self):
        super().__init__()
        self.encoder_norm = nn.BatchNorm1d(worker.WIDTH, dtype=F64)

    def forward(self, x):
        super().forward(self.encoder_norm(x))


class NoPlate(Program):
    def __init__(self):
        super().__init__(loc=(worker.WIDTH,))

    def forward(self, x):
        pyro.sample("x", dist.Normal(self.loc, 1.0).expand(x.shape).to_event(2), obs=x)


class Nothing(Program):
    def forward(self, x):
        pass


class LateModel(NormalModel):
    """A site outside the plate after those in it."""

    def forward(self, x):
        super().forward(x)
        pyro.sample("late", dist.Normal(self.shift.sum(), 1.0), obs=torch.zeros((), dtype=F64))


class MixingModel(worker.CoinModel):
    def forward(self, x):
        rows = self.rows(x)
        with rows:
            z = pyro.sample("z", dist.Bernoulli(logits=self.prior).to_event(1))
        mean = pyro.deterministic("mean", z.mean())
        with rows:
            pyro.sample("x", dist.Normal(z @ self.decoder + 0 * mean, 1.0).to_event(1), obs=x)


class OddScale(NormalModel):
    def forward(self, x):
        with pyro.poutine.scale(scale=1.0 / len(x) ** 2):
            super().forward(x)


class HalfScaled(NormalModel):
    def forward(self, x):
        with self.rows(x):
            z = pyro.sample("z", dist.Normal(torch.zeros(worker.LATENT, dtype=F64), 1.0).to_event(1))
            with pyro.poutine.scale(scale=100.0 / len(x)):
                pyro.sample("x", dist.Normal(z @ self.decoder + self.shift, 1.0).to_event(1), obs=x)


@pytest.mark.parametrize(
    ("model", "guide", "words"),
    [
        (NormalModel, MeanOfRows, "site 'z': its log-probability of a row depends on other rows"),
        (NormalModel, Normed, "layer 'encoder_norm' (BatchNorm1d) mixes the rows of a batch"),
        (NoPlate, Nothing, "the one plate that has as many elements as there are rows; none does"),
        (LateModel, NormalGuide, "site 'late': it is outside plate 'rows' and after site 'z' in it"),
        (OddScale, NormalGuide, "its scale is"),
        (HalfScaled, NormalGuide, "some sites in plate 'rows' are scaled by the number of rows and others are not"),
    ],
)
def test_programs_whose_rows_hang_together_are_refused(model, guide, words):
    with pytest.raises((BadInput, UnsupportedSite), match=re.escape(words)) as error:
        study(model(), guide(), Rows(data(9)))
    assert "\n" not in str(error.value)


def test_a_layer_with_noise_of_its_own_is_not_taken_for_a_mixer():
    class Dropped(NormalGuide):
        def __init__(self):
            super().__init__()
            self.encoder_drop = nn.Dropout(0.5)

        def forward(self, x):
            super().forward(self.encoder_drop(x))

    assert study(NormalModel(), Dropped(), Rows(data(9))).plate == "rows"


def test_a_batch_of_one_row_is_refused():
    with pytest.raises(BadInput, match="1 row cannot be split"):
        study(*pair_of(worker.NORMAL, False), Rows(data(1)))


@pytest.mark.parametrize(
    ("pair", "loss", "words"),
    [
        (worker.SHARED, lambda: shared("rloo", "rloo", objective="iwae"), "one weight spans the rows"),
        (worker.SHARED, lambda: SiteELBO(objective="rws", num_particles=2), "one weight spans the rows"),
        (
            worker.NORMAL,
            lambda: SiteELBO("dreg", objective="iwae", plates="ignore"),
            "one weight for all rows",
        ),
        (
            worker.COINS,
            lambda: SiteELBO("rloo", plates="ignore"),
            "its cost spans the rows of all processes",
        ),
        (
            worker.COINS,
            lambda: SiteELBO("enumerate", plates="ignore"),
            "its cost spans the rows of all processes",
        ),
        (worker.COINS, lambda: SiteELBO("enumerate", vectorize_particles=False), "enumerated together"),
        (
            worker.SHARED,
            lambda: shared("rebar"),
            "site 'c' cannot take estimator 'rebar': it is outside plate",
        ),
        (worker.SHARED, lambda: shared("muprop"), "the slope of its cost spans all processes"),
        (
            (MixingModel, worker.CoinGuide),
            lambda: SiteELBO("rloo"),
            "deterministic site 'mean' outside plate 'rows'",
        ),
        (worker.SHARED, Trace_ELBO, "Trace_ELBO multiplies its terms into the costs of rows"),
        (
            worker.SHARED,
            lambda: TraceEnumELBO(max_plate_nesting=1),
            "multiplies its terms into the costs of rows",
        ),
        (worker.NORMAL, lambda: RenyiELBO(num_particles=2), "RenyiELBO is not known to be a sum over rows"),
        (worker.NORMAL, lambda: FreeBits(0.5), "objective 'free-bits' is not known to be a sum over rows"),
    ],
)
def test_losses_that_reach_over_all_rows_are_refused(pair, loss, words, param_store):
    model, guide = pair_of(pair, False)
    loss = loss()
    module = loss(model, guide)
    if hasattr(module, "initialize"):
        module.initialize(data(4))
    found = study(model, guide, Rows(data(4)))
    with pytest.raises(UnsupportedSite, match=re.escape(words)) as error:
        refuse(loss, module, found)
    assert "use one process" in str(error.value) or "or one process" in str(error.value)


@pytest.mark.parametrize("loss", [lambda: SiteELBO("pathwise", plates="ignore"), Trace_ELBO])
def test_what_is_a_sum_over_rows_is_not_refused(loss, param_store):
    model, guide = pair_of(worker.NORMAL, False)
    loss = loss()
    refuse(loss, loss(model, guide), study(model, guide, Rows(data(9))))


@pytest.mark.parametrize(
    ("loss", "compile", "words"),
    [("trace-graph", False, "TraceGraph_ELBO takes gradients itself"), ("trace", True, "takes gumbo's own ELBOs")],
)
def test_kinds_of_step_for_one_process_are_refused(loss, compile, words):
    model, guide = pair_of(worker.COINS, False)
    two = Processes(0, 2, torch.device("cpu"))
    library = "torch" if compile else None
    with pytest.raises(BadInput, match=words):
        _make_step(model, guide, make_loss(loss), make_optimizer("adam", 1e-3)[0], Rows(data(9)), library, two, 0)


def test_evaluation_on_several_needs_a_seed():
    with pytest.raises(BadInput, match="pass seed="):
        evaluate(
            *pair_of(worker.COINS, False),
            data(9),
            seed=None,
            processes=Processes(0, 2, torch.device("cpu")),
        )


def test_without_accelerate_one_line_says_what_to_install(monkeypatch):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(BadInput, match=r'pip install -e "\.\[distributed\]"'):
        fit(*pair_of(worker.NORMAL, False), data(9), epochs=1, progress=False)


def test_one_process_needs_no_launcher_and_no_accelerate(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setenv("WORLD_SIZE", "1")
    monkeypatch.setenv("RANK", "0")
    assert Processes.join("cpu") is None
    assert fit(*pair_of(worker.NORMAL, False), data(9), epochs=1, progress=False).epochs == 1


# The command line -----------------------------------------------------------------------------------------------------

TRAIN = ["-m", "gumbo", "train", "--model", "bernoulli-vae", "--estimator", "nvil", "--epochs", "40"]
TRAIN += ["--importance_samples", "3", "--folder"]


@pytest.fixture
def torchrun(tmp_path):
    """Starts two processes; what they say is added to ``said.txt``; none is left at the end."""
    launchers: list[subprocess.Popen] = []

    def start(*arguments: str) -> subprocess.Popen:
        command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
        command += ["--master-port", str(free_port()), *arguments]
        env = os.environ | {"OMP_NUM_THREADS": "1"}
        with open(tmp_path / "said.txt", "a") as said:
            launchers.append(subprocess.Popen(command, cwd=tmp_path, env=env, stdout=said, stderr=subprocess.STDOUT))
        return launchers[-1]

    yield start
    for launcher in launchers:
        for process in [*workers_of(launcher.pid), *([launcher.pid] if launcher.poll() is None else [])]:
            os.kill(process, signal.SIGKILL)
        launcher.wait()


def wait_for_epochs(run: Path, count: int) -> None:
    for _ in range(600):
        if (run / "metrics.jsonl").exists() and len((run / "metrics.jsonl").read_text().splitlines()) > count:
            return
        time.sleep(0.1)
    raise AssertionError(f"{run} does not come to epoch {count}")


def workers_of(launcher: int) -> list[int]:
    found = subprocess.run(["ps", "-o", "pid=", "--ppid", str(launcher)], capture_output=True, text=True)
    return [int(pid) for pid in found.stdout.split()]


def without_times(run: Path) -> list[dict]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in ("ms_per_step", "seconds")} for line in lines]


@several_processes
@pytest.mark.slow
def test_train_on_two_processes_ended_by_a_signal_and_by_a_death_is_the_whole_run(tmp_path, torchrun):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert torchrun(*TRAIN, str(whole)).wait(300) == 0
    said = (tmp_path / "said.txt").read_text()
    assert said.count("plots, numbers and report.html in") == said.count("log p(x)") == 1, said
    for name in ("config.yaml", "results.json", "plots/learning_curve.png", "plots/reconstructions.png"):
        assert (whole / name).exists(), name

    first = torchrun(*TRAIN, str(parts))
    wait_for_epochs(parts, 5)
    first.send_signal(signal.SIGTERM)
    first.wait(60)
    said = (tmp_path / "said.txt").read_text()
    assert said.count("interrupted by SIGTERM at epoch") == 1 and "the same launcher of 2 processes" in said, said

    second = torchrun("-m", "gumbo", "train", "--resume", str(parts))
    wait_for_epochs(parts, 20)
    os.kill(workers_of(second.pid)[-1], signal.SIGKILL)
    began = time.monotonic()
    assert second.wait(120) != 0
    assert time.monotonic() - began < 60, "the others were left waiting"

    assert torchrun("-m", "gumbo", "train", "--resume", str(parts)).wait(300) == 0
    assert without_times(parts) == without_times(whole)
    ends = [torch.load(run / "checkpoints" / "last.pt", weights_only=True) for run in (whole, parts)]
    assert ends[0]["module"].keys() == ends[1]["module"].keys()
    for name, value in ends[0]["module"].items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(value, ends[1]["module"][name]), name
    for here, there in zip(ends[0]["streams"], ends[1]["streams"], strict=True):
        assert torch.equal(here[0], there[0])

    alone = subprocess.run(
        [sys.executable, "-m", "gumbo", "train", "--resume", str(parts)], capture_output=True, text=True, timeout=120
    )
    assert alone.returncode == 2 and "processes differ (processes: 2 there, 1 here)" in alone.stderr
    other = torchrun("-m", "gumbo", "list")
    assert other.wait(60) != 0
    assert (tmp_path / "said.txt").read_text().count("only gumbo train runs on several") == 1
