"""Published tables: cells that run, results that are kept, and what is refused."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from gumbo.experiments import reproduce
from gumbo.experiments.reproduction import tables

needs_data = pytest.mark.skipif(
    not (Path(os.environ.get("GUMBO_DATA", "-")) / "binarized_mnist.npz").exists(),
    reason="binarized_mnist.npz does not stand under GUMBO_DATA",
)


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)

    def call(*options):
        capsys.readouterr()
        try:
            reproduce.main(list(options), prog="gumbo reproduce")
            status = 0
        except SystemExit as stop:
            status = stop.code
        return status, capsys.readouterr()

    return call


@needs_data
def test_a_cell_is_trained_judged_and_kept(run, tmp_path):
    status, said = run("iwae", "--quick", "--cells", "[one-layer/stl-k1]", "--seeds", "[3]")
    assert status == 0 and "one-layer/stl-k1" in said.out
    (path,) = tmp_path.rglob("one-layer-stl-k1-seed3.json")
    found = json.loads(path.read_text())
    assert found["value"] == -found["test"]["log_evidence"]
    assert found["steps"] == 8 and found["share"] < 1e-5
    assert "--seeds '[3]'" in found["command"]
    before = path.stat().st_mtime_ns
    assert run("iwae", "--quick", "--cells", "[one-layer/stl-k1]", "--seeds", "[3]")[0] == 0
    assert path.stat().st_mtime_ns == before  # a finished cell is not run again


def test_a_cell_that_does_not_exist_is_refused_in_one_line(run):
    status, said = run("iwae", "--cells", "[three-layers]")
    assert status == 2 and said.err.count("\n") == 1 and "three-layers" in said.err and "one-layer/stl-k1" in said.err


def test_showing_what_was_found_trains_nothing(run):
    status, said = run("arm", "--show")
    assert status == 0 and "published" in said.out


@pytest.mark.parametrize("name", list(tables))
def test_cells_have_names_of_their_own(name):
    names = [cell.name for cell in tables[name].cells]
    assert len(set(names)) == len(names)
    assert len({cell.replace("/", "-") for cell in names}) == len(names)


@pytest.mark.slow
@needs_data
@pytest.mark.parametrize("name", list(tables))
def test_every_table_runs_quickly(name, run):
    status, said = run(name, "--quick")
    assert status == 0 and all(cell.name in said.out for cell in tables[name].cells)
