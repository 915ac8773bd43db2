"""One process at a time writes into a run folder, and a dead one holds nothing."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time

import pytest
import torch

from gumbo.errors import BadInput
from gumbo.experiments import cli
from gumbo.experiments._runs import RunFolder
from gumbo.experiments.train import Train
from gumbo.guides import NormalGuide
from gumbo.inference import fit
from gumbo.inference.training import locks
from gumbo.inference.training.locks import FolderLock
from gumbo.models import GaussianVAE

# What FolderLock does, without the wait for torch.
HOLDER = """
import fcntl, os, sys
os.makedirs(sys.argv[1])
file = os.open(sys.argv[1] + "/.lock", os.O_RDWR | os.O_CREAT)
fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
os.write(file, f"process {os.getpid()}".encode())
print("held", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def holder(tmp_path):
    """Another process that holds the lock of a folder until it is killed."""
    folder = tmp_path / "run"
    command = [sys.executable, "-c", HOLDER, str(folder)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"held\n"
        yield process, folder
        process.kill()


def small_fit(folder, **options):
    torch.manual_seed(0)
    model = GaussianVAE((1, 2, 2), latent_dim=1, hidden=(2,))
    x = torch.ones(4, 1, 2, 2)
    return fit(model, NormalGuide(model), x, epochs=1, run_dir=folder, progress=False, **options)


def test_a_folder_in_use_is_refused_and_a_killed_holder_is_taken_over(holder, tmp_path, capsys):
    process, folder = holder
    with pytest.raises(BadInput, match=f"in use by process {process.pid}"):
        small_fit(folder)
    assert [path.name for path in folder.iterdir()] == [".lock"]
    RunFolder(folder).write_config("train", Train(epochs=1, model_options={"hidden": [2]}))
    with pytest.raises(SystemExit) as stop:
        cli.main(["train", "--resume", str(folder)])
    said = capsys.readouterr().err
    assert (stop.value.code, said.count("\n")) == (2, 1) and "in use" in said
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert small_fit(folder).epochs == 1
    assert not (folder / ".lock").exists()


def test_the_lock_ends_with_the_fit_however_it_ends(tmp_path):
    with pytest.raises(BadInput, match="loss"):
        small_fit(tmp_path / "run", loss=3)
    small_fit(tmp_path / "run")
    with pytest.raises(BadInput, match="holds a run already"):
        small_fit(tmp_path / "run")
    small_fit(tmp_path / "run", resume=True)


def test_a_thread_takes_its_lock_again_and_another_does_not(tmp_path):
    refused = []

    def other():
        try:
            FolderLock(tmp_path).acquire()
        except BadInput as error:
            refused.append(str(error))

    with FolderLock(tmp_path):
        with FolderLock(tmp_path):
            pass
        assert (tmp_path / ".lock").exists()
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
    assert len(refused) == 1 and "another fit in this process" in refused[0]
    assert not (tmp_path / ".lock").exists()


@pytest.mark.parametrize("name", ["resume", "folder"])
@pytest.mark.parametrize("value", ["", "a\0b"])
def test_an_empty_or_impossible_folder_is_refused(value, name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "config.yaml").write_text("experiment: train\nepochs: 1\n")
    with pytest.raises(SystemExit) as stop:
        cli.main(["train", f"--{name}", value])
    said = capsys.readouterr().err
    assert (stop.value.code, said.count("\n")) == (2, 1)
    assert [path.name for path in tmp_path.iterdir()] == ["config.yaml"]
    assert (tmp_path / "config.yaml").read_text() == "experiment: train\nepochs: 1\n"


@pytest.mark.skipif(not hasattr(os, "register_at_fork"), reason="this system does not fork")
def test_a_worker_that_outlives_a_killed_run_does_not_keep_its_lock(tmp_path):
    lock = FolderLock(tmp_path)
    lock.acquire()
    forks = multiprocessing.get_context("fork")
    begun = forks.Event()
    worker = forks.Process(target=lambda: (begun.set(), time.sleep(60)))
    worker.start()
    try:
        assert begun.wait(30)
        os.close(locks._held.pop(tmp_path)[1])  # what the system does where the run is killed
        with FolderLock(tmp_path):
            assert worker.is_alive()
    finally:
        worker.kill()
        worker.join()
