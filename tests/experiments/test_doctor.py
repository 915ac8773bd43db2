"""``gumbo doctor`` and ``gumbo completion``: what they find, what they print, and what a broken installation gives."""

from __future__ import annotations

import json
import shutil
import subprocess

import pytest

from gumbo.experiments import cli, completion, doctor


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(doctor, "CHECKS", {"a check": lambda: "it works"})


def test_the_self_test_passes():
    for name, check in doctor.CHECKS.items():
        assert doctor.checked(check)["passed"], name


def test_what_fails_is_named_and_sets_the_status(monkeypatch, quick, capsys):
    def broken() -> str:
        raise RuntimeError("a library\nis missing")

    monkeypatch.setitem(doctor.CHECKS, "another check", broken)
    with pytest.raises(SystemExit) as stop:
        cli.main(["doctor"])
    said = capsys.readouterr()
    assert stop.value.code == 1 and said.err == "gumbo doctor: error: the self-test failed: another check\n"
    assert "FAILED another check: RuntimeError: a library is missing" in said.out and "ok     a check" in said.out


def test_the_report_fits_a_terminal_and_the_json_is_whole(quick, capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("GUMBO_DATA", str(tmp_path))
    (tmp_path / "mine.npz").touch()
    cli.main(["doctor"])
    assert max(map(len, capsys.readouterr().out.splitlines())) <= 80 + len(str(tmp_path))
    cli.main(["doctor", "--json"])
    found = json.loads(capsys.readouterr().out)
    assert found["data"] == {"folder": str(tmp_path), "exists": True, "files": ["mine.npz"]}
    assert found["self-test"]["a check"]["passed"] and found["versions and machine"]["torch"]


@pytest.mark.parametrize("shell", completion.SHELLS)
def test_a_completion_script_knows_every_verb_and_starts_no_python(shell):
    script = completion.script(shell)
    assert all(verb in script for verb in cli.VERBS) and "python" not in script


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["gumbo", "eval"], {"evaluate"}),
        (["gumbo", "train", "--estimator", "rl"], {"rloo"}),
        (["gumbo", "train", "--batch"], {"--batch_size"}),
        (["gumbo", "evaluate", "run", "--imp"], {"--importance_samples"}),
        (["gumbo", "evaluate", "run", "--js"], {"--json"}),
        (["gumbo", "reproduce", "to"], {"toy"}),
    ],
)
def test_bash_completes(words, expected, tmp_path):
    if (bash := shutil.which("bash")) is None:
        pytest.skip("bash is not installed")
    path = tmp_path / "gumbo.bash"
    path.write_text(completion.script("bash"))
    command = f"source {path}; COMP_WORDS=({' '.join(words)}); COMP_CWORD={len(words) - 1}; _shtab_gumbo; "
    found = subprocess.run([bash, "-c", command + "echo ${COMPREPLY[@]}"], capture_output=True, text=True, check=True)
    assert set(found.stdout.split()) == expected


def test_a_shell_that_is_not_known_is_one_line(capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["completion", "fish"])
    said = capsys.readouterr().err
    assert stop.value.code == 2 and said.count("\n") == 1 and "'fish'" in said and "bash" in said
