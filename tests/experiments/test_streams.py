"""Standard error that is closed, broken, or has few letters does not stop a run; a reader may leave."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys

import pytest
import torch

from gumbo.console import Forgiving, forgiving, standard_error
from gumbo.experiments import cli
from gumbo.guides import NormalGuide
from gumbo.inference import fit
from gumbo.models import GaussianVAE

QUICK = ["--epochs", "2", "--batch_size", "600", "--importance_samples", "2", "--model_options.hidden=[4]"]


class Broken(io.StringIO):
    """The reader went away."""

    def __init__(self, terminal: bool = False):
        super().__init__()
        self.terminal = terminal

    def write(self, text):
        raise BrokenPipeError(32, "Broken pipe")

    def flush(self):
        raise BrokenPipeError(32, "Broken pipe")

    def isatty(self):
        return self.terminal


def closed() -> io.StringIO:
    stream = io.StringIO()
    stream.close()
    return stream


def ascii_only() -> io.TextIOWrapper:
    return io.TextIOWrapper(io.BytesIO(), encoding="ascii")


STREAMS = {
    "none": lambda: None,
    "closed": closed,
    "broken": Broken,
    "a broken terminal": lambda: Broken(terminal=True),
    "ascii": ascii_only,
}


@pytest.mark.parametrize("stream", STREAMS.values(), ids=STREAMS)
def test_fit_goes_on(stream, monkeypatch):
    torch.manual_seed(0)
    model = GaussianVAE((1, 2, 2), latent_dim=1, hidden=(2,))
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stderr", stream())
        assert fit(model, NormalGuide(model), torch.ones(4, 1, 2, 2), epochs=2, title="läuft").epochs == 2


@pytest.mark.parametrize("stream", [STREAMS["closed"], STREAMS["broken"]], ids=["closed", "broken"])
def test_a_command_goes_on_and_writes_its_results(stream, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stderr", stream())
        patch.setattr(sys, "stdout", ascii_only())
        cli.main(["train", *QUICK, "--folder", str(tmp_path / "run")])
        sys.stdout.flush()
        shown = sys.stdout.buffer.getvalue()
    assert json.loads((tmp_path / "run" / "results.json").read_text())["epochs"] == 2
    assert b"log p(x)" in shown and b"\\xb1" in shown


def test_a_mistake_is_told_by_the_status_where_nobody_listens(monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as stop:
        patch.setattr(sys, "stderr", Broken())
        cli.main(["train", "--model", "gaussian-va"])
    assert stop.value.code == 2


def test_letters_that_a_stream_lacks_are_spelt_out():
    stream = ascii_only()
    print("nats ± error → 3", file=Forgiving(stream), flush=True)
    assert stream.buffer.getvalue() == b"nats \\xb1 error \\u2192 3\n"
    assert Forgiving(stream).encoding == "ascii"


def test_standard_error_is_put_back(capsys):
    before = sys.stderr
    with forgiving():
        assert isinstance(sys.stderr, Forgiving)
        print("heard", file=standard_error())
    assert sys.stderr is before
    assert capsys.readouterr().err == "heard\n"


def test_a_process_without_standard_error_writes_nothing_of_it_into_its_files(tmp_path):
    command = (
        f"{sys.executable} -c 'from gumbo.console import forgiving\n"
        "import os\n"
        "with forgiving():\n"
        f'    file = os.open("{tmp_path / "out"}", os.O_CREAT | os.O_WRONLY)\n'
        '    os.write(2, b"lost")\n'
        "' 2>&-"
    )
    subprocess.run(["sh", "-c", command], check=True, timeout=120, env={**os.environ, "PYTHONIOENCODING": "ascii"})
    assert (tmp_path / "out").read_bytes() == b""


def test_a_process_without_standard_output_ends_as_with_one(tmp_path):
    asked = [sys.executable, "-m", "gumbo", "list", "data"]
    done = subprocess.run(["sh", "-c", '"$@" >&-', "sh", *asked], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("buffered", [True, False])
@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["list", "data"]], ids=" ".join)
def test_a_reader_that_leaves_ends_the_command_without_a_traceback(arguments, buffered):
    environment = {**os.environ, "PYTHONUNBUFFERED": "" if buffered else "1"}
    reading, writing = os.pipe()
    os.close(reading)
    asked = [sys.executable, "-m", "gumbo", *arguments]
    done = subprocess.run(asked, stdout=writing, stderr=subprocess.PIPE, text=True, timeout=120, env=environment)
    os.close(writing)
    assert (done.returncode, done.stderr) == (1, "")
