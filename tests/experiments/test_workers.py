"""Cells on several workers: of this machine and of a Dask cluster, and workers that die."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from gumbo.errors import BadInput, GumboError, UnknownName
from gumbo.experiments import compare, reproduce
from gumbo.experiments._workers import DEATHS, LOOKS, check_workers, in_parallel

CELLS = "[0.45/score,0.45/rloo,0.45/disarm,0.49/score,0.49/rloo,0.49/disarm]"


def dies_once(folder: str, k: int) -> int:
    """Kills its process at its first call with 3."""
    mark = Path(folder) / "died"
    if k == 3 and not mark.exists():
        mark.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    (Path(folder) / f"{k}-{time.time_ns()}").touch()
    return k * k


def always_dies(k: int) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def refuses(k: int) -> int:
    raise BadInput(f"no {k}")


def breaks(k: int) -> int:
    raise ZeroDivisionError(f"by {k}")


def named(k: int) -> str:
    return f"cell {k}"


def writes_on(path: str) -> None:
    while True:
        with open(path, "a") as file:
            file.write(f"{os.getpid()}\n")
        time.sleep(0.02)


@pytest.fixture
def importable(monkeypatch):
    """This module under its name, in worker processes, too."""
    here = str(Path(__file__).parent)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([here, os.environ.get("PYTHONPATH", "")]))
    monkeypatch.syspath_prepend(here)
    import test_workers

    return test_workers


@pytest.fixture
def fresh_pool():
    from joblib.externals.loky import get_reusable_executor

    get_reusable_executor().shutdown(wait=True, kill_workers=True)
    yield
    get_reusable_executor().shutdown(wait=True, kill_workers=True)


def test_a_dead_workers_task_runs_again_and_finished_ones_do_not(tmp_path, importable, fresh_pool, capsys):
    tasks = [(str(tmp_path), k) for k in range(8)]
    again = []
    found = dict(in_parallel(importable.dies_once, tasks, 2, again=lambda: again.append(len(list(tmp_path.iterdir())))))
    assert found == {task: task[1] ** 2 for task in tasks}
    assert len(again) == 1 and "a worker died" in capsys.readouterr().err


def test_workers_that_die_again_and_again_end_in_one_line(importable, fresh_pool):
    with pytest.raises(GumboError, match=f"{DEATHS} workers died .* 0 of 2 tasks are finished"):
        list(in_parallel(importable.always_dies, [(0,), (1,)], 2))


def test_an_error_of_a_task_is_an_error_here(importable, fresh_pool):
    with pytest.raises(BadInput, match="no [01]"):
        list(in_parallel(importable.refuses, [(0,), (1,)], 2))


@pytest.mark.parametrize("jobs", [1, 2])
def test_the_error_of_a_task_names_it(jobs, importable, fresh_pool, capfd):
    with pytest.raises(BadInput, match=r"^cell ([01]): no \1$"):
        list(in_parallel(importable.refuses, [(0,), (1,)], jobs, name=named))
    with pytest.raises(ZeroDivisionError):
        list(in_parallel(importable.breaks, [(0,)], jobs, name=named))
    assert "gumbo: cell 0: ZeroDivisionError: by 0\n" in capfd.readouterr().err


def test_no_worker_writes_on_after_its_parent_was_killed(tmp_path, importable):
    code = "import test_workers as t; list(t.in_parallel(t.writes_on, [({!r},), ({!r},)], 2))"
    paths = [tmp_path / "0", tmp_path / "1"]
    started = subprocess.Popen([sys.executable, "-c", code.format(*map(str, paths))], stderr=subprocess.DEVNULL)
    limit = time.monotonic() + 100
    while not all(path.exists() for path in paths):
        assert started.poll() is None and time.monotonic() < limit
        time.sleep(0.05)
    started.kill()
    started.wait()
    time.sleep(5 * LOOKS)  # a worker looks so often whether its parent lives
    while (before := [path.stat().st_size for path in paths]) and time.monotonic() < limit:
        time.sleep(0.5)
        if before == [path.stat().st_size for path in paths]:
            return
    pytest.fail("a worker still writes")


def test_backends_that_cannot_be_are_refused_in_one_line(tmp_path):
    with pytest.raises(UnknownName, match="ray"):
        check_workers("ray", None, 1)
    with pytest.raises(BadInput, match="--address tcp://host:port"):
        reproduce.reproduce(reproduce.Reproduce("toy", backend="dask"))
    with pytest.raises(BadInput, match="--backend dask"):
        compare.compare(compare.Compare(address="tcp://127.0.0.1:1", folder=str(tmp_path / "run")))
    assert not (tmp_path / "run").exists()


def test_dask_that_is_not_installed_is_said(monkeypatch):
    monkeypatch.setitem(sys.modules, "distributed", None)
    with pytest.raises(BadInput, match=r"pip install -e \"\.\[dask\]\""):
        list(in_parallel(refuses, [(0,)], 1, "dask", "tcp://127.0.0.1:1"))


def test_an_address_that_does_not_answer_is_said(monkeypatch):
    pytest.importorskip("distributed")
    monkeypatch.setattr("gumbo.experiments._workers.SECONDS", 1)
    for address in ("tcp://127.0.0.1:1", "nothing at all"):
        with pytest.raises(BadInput, match="no Dask scheduler answers") as said:
            list(in_parallel(refuses, [(0,)], 1, "dask", address))
        assert "\n" not in str(said.value)


def toy(folder: Path, *options: str) -> list[str]:
    """`gumbo reproduce toy --quick` as a command."""
    command = [sys.executable, "-m", "gumbo", "reproduce", "toy", "--quick", "--cells", CELLS, "--folder", str(folder)]
    return [*command, *options]


def cells_of(folder: Path) -> dict[str, int]:
    """The finished cells, which are whole, and when they were written."""
    paths = sorted((folder / "quick-results" / "toy").glob("*.json"))
    assert all("value" in json.loads(path.read_text()) for path in paths)
    return {path.name: path.stat().st_mtime_ns for path in paths}


@pytest.mark.slow
@pytest.mark.parametrize("jobs", ["1", "2"])
def test_a_killed_run_loses_no_finished_cell_and_goes_on(tmp_path, jobs):
    options = ["--jobs", jobs, "--seeds", str(list(range(8)))]
    with subprocess.Popen(toy(tmp_path, *options), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as started:
        while len(cells_of(tmp_path)) < 3:
            assert started.poll() is None
            time.sleep(0.02)
        started.send_signal(signal.SIGKILL)
    kept = cells_of(tmp_path)
    assert 3 <= len(kept) < 48
    done = subprocess.run(toy(tmp_path, *options), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = cells_of(tmp_path)
    assert len(found) == 48 and {name: found[name] for name in kept} == kept


@pytest.fixture
def cluster(importable):
    distributed = pytest.importorskip("distributed")
    with distributed.LocalCluster(
        n_workers=2, threads_per_worker=1, processes=True, dashboard_address=None, silence_logs=50
    ) as made:
        yield made


@pytest.mark.slow
@pytest.mark.filterwarnings("default")  # of the cluster's own, as its workers die
def test_a_cluster_runs_cells_and_the_caller_writes_them(tmp_path, cluster, capsys):
    address = cluster.scheduler_address
    config = reproduce.Reproduce(
        "toy", quick=True, cells=["0.4*/score"], folder=str(tmp_path), backend="dask", address=address
    )
    there = reproduce.reproduce(config)
    here = reproduce.reproduce(
        reproduce.Reproduce("toy", quick=True, cells=["0.4*/score"], folder=str(tmp_path / "here"))
    )
    assert len(there) == 3 and [n["value"] for n in there] == [n["value"] for n in here]
    assert set(cells_of(tmp_path)) == set(cells_of(tmp_path / "here"))


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
def test_a_dead_worker_of_a_cluster_loses_nothing(tmp_path, cluster, importable):
    tasks = [(str(tmp_path), k) for k in range(8)]
    found = dict(in_parallel(importable.dies_once, tasks, 1, "dask", cluster.scheduler_address))
    assert found == {task: task[1] ** 2 for task in tasks} and (tmp_path / "died").exists()


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
def test_a_task_that_kills_every_worker_of_a_cluster_ends_in_one_line(cluster, importable):
    with pytest.raises(GumboError, match="workers died"):
        list(in_parallel(importable.always_dies, [(0,)], 1, "dask", cluster.scheduler_address))


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
def test_a_comparison_on_a_cluster_is_the_one_here(tmp_path, cluster):
    small = compare.Compare(
        **compare.QUICK | {"seeds": 1, "epochs": 1, "gradient_draws": 2, "burn_in": 0, "common_epochs": 1},
        families=["continuous"],
    )
    runs = {}
    for name, where in (
        ("here", {"jobs": 2}),
        ("there", {"backend": "dask", "address": cluster.scheduler_address}),
    ):
        folder = tmp_path / name
        found = compare.compare(compare.Compare(**vars(small) | where | {"folder": str(folder)}))
        runs[name] = {r["arm"]: r["test"]["elbo"] for r in found["runs"] if r["what"] == "training"}
        assert len(list((folder / "checkpoints").glob("*.pt"))) == 6
        assert (folder / "plots" / "learning_curves.png").exists() and (folder / "metrics.jsonl").exists()
    assert runs["there"] == pytest.approx(runs["here"], rel=1e-4)  # torch's threads may differ
