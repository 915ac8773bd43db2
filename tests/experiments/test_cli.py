"""The command line: verbs, one-line errors, settings from flags and files."""

from __future__ import annotations

import errno
import importlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import xarray
import yaml

from gumbo import __version__, pictures
from gumbo.errors import GumboError
from gumbo.experiments import cli, compare, listing
from gumbo.experiments._command import parse
from gumbo.experiments.audit import Audit
from gumbo.experiments.systems import systems
from gumbo.experiments.train import Train
from gumbo.guides import BernoulliGuide
from gumbo.inference import audit, plot_audit
from gumbo.inference.posterior import _arviz
from gumbo.models import BernoulliVAE, GaussianVAE

ROOT = Path(__file__).resolve().parents[2]


def run(*argv: str, cwd: Path) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, *argv], cwd=cwd, capture_output=True, text=True, timeout=120)


def test_help_names_every_verb(capsys):
    cli.main(["--help"])
    said = capsys.readouterr().out
    assert all(f"\n  {verb}" in said for verb in cli.VERBS)
    cli.main([])
    assert capsys.readouterr().out == said
    cli.main(["--version"])
    assert capsys.readouterr().out == f"gumbo {__version__}\n"


def test_help_does_not_wait_for_torch(tmp_path):
    code = (
        "import sys; from gumbo.__main__ import main; sys.argv[1:] = ['--help']; main(); print('torch' in sys.modules)"
    )
    assert run("-c", code, cwd=tmp_path).stdout.splitlines()[-1] == "False"


@pytest.mark.parametrize(
    "verb", [pytest.param(verb, marks=() if verb in ("compare", "audit") else pytest.mark.slow) for verb in cli.VERBS]
)
def test_the_verb_and_the_script_behave_alike(verb, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    by_script = run(str(ROOT / "experiments" / f"{cli.VERBS[verb].module}.py"), "--help", cwd=tmp_path)
    with suppress(SystemExit):  # as jsonargparse ends a program after its help
        cli.main([verb, "--help"])
    assert by_script.returncode == 0
    assert capsys.readouterr().out == by_script.stdout
    assert by_script.stdout.startswith(f"usage: gumbo {verb}")


@pytest.mark.parametrize(
    "argv", [[], *([verb] for verb in cli.VERBS), *(["system", name] for name in systems)], ids=" ".join
)
def test_help_is_of_80_columns(argv, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    with suppress(SystemExit):
        cli.main([*argv, "--help"])
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if len(line) > 80] == []
    heads = {line for line in lines if line.endswith(":") and not line.startswith(" ")}
    assert heads <= {"verbs:", "systems:", "options:", "settings:", "positional arguments:"}


def test_options_take_dashes_for_underscores():
    given = ["--num-samples", "7", "--model-options.latent-dim=2", "--one-by-one", "--folder", "my-run"]
    settings = parse(Audit, ["model:m", "guide:g", *given], "gumbo audit", {})
    assert (settings.num_samples, settings.model_options, settings.one_by_one) == (7, {"latent_dim": 2}, True)
    assert (settings.folder, settings.model) == ("my-run", "model:m")


def one_line_and_status(capsys, argv: list[str]) -> tuple[str, int]:
    with pytest.raises(SystemExit) as stop:
        cli.main(argv)
    said = capsys.readouterr()
    assert said.err.count("\n") == 1 and said.out == "", said
    return said.err, stop.value.code


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["trian"], "unknown verb 'trian': did you mean 'train'?"),
        (["train", "--epochs", "many"], "epochs"),
        (["train", "--epoch_count", "3"], "epoch_count"),
        (["train", "--model", "gausian-vae"], "did you mean 'gaussian-vae'?"),
        (["train", "--estimator", "rlo0"], "did you mean 'rloo'?"),
        (["train", "--data", "rows.csv"], "dataset 'rows.csv' is a file: name a function that reads it"),
        (["train", "--config", ""], "the name of the file of settings is empty"),
        (["train", "--model_options.latent_dim=9999999999"], "whole number of at least 1, and at most 2147483647"),
        (["train", "--optimizer", "adan", "--folder", "unused"], "did you mean 'adam'?"),
        (["train", "--data", "digit"], "did you mean 'digits'?"),
        (["train", "--binarize", "hard"], "binarization"),
        (["train", "--model_options.depth=3"], "no option 'depth'"),
        (["train", "--config", "missing.yaml"], "missing.yaml"),
        (["train", "--resume", "nowhere"], "nowhere is not a run folder"),
        (["evaluate"], "run"),
        (["evaluate", "nowhere"], "nowhere is not a run folder"),
        (["compare", "--seeds", "0"], "seeds is 0"),
        (["compare", "--families", "[discrte]"], "did you mean 'discrete'?"),
        (["compare", "--families", "[discrete, discrete]"], "families has 'discrete' twice: name it once"),
        (["train", "--temperature", "1.0"], "--temperature is of a relaxed estimator: name one too"),
        (["train", "--compile=false"], "--compile takes no value (it was given 'false')"),
        (["train", "--epochs="], "epochs is '': expected a whole number"),
        (["train", "--patience", "soon"], "patience is 'soon': expected a whole number or null"),
        (["train", "--particles", "0"], "particles is 0: expected at least 1"),
        (["train", "--kl_weight", "fast(3)"], "kl_weight: unknown schedule 'fast'"),
        (["train", "--kl_weight", "-1"], "kl_weight: -1: expected a number of at least 0"),
        (["train", "--kl_weight", "linear(-5)"], "kl_weight: linear(-5): expected at least one step"),
        (["train", "--lr", "cosine(10)"], "cosine(10) does not say its start, a rate of 1.0 by default: write it"),
        (["train", "--lr", "linear(10, 1e-3)"], "does not say its end, a rate of 1.0 by default"),
        (["evaluate", "nowhere", "--importance_samples", "0"], "importance_samples is 0: expected at least 1"),
        (["compare", "--families", "discrete"], "families is 'discrete': expected a list, such as [discrete]"),
        (["doctor", "--depth"], "unknown option '--depth' (gumbo doctor --help shows all)"),
        (["reproduce", "al"], "did you mean 'all'?"),
        (
            ["train", "--model_options.prior_options.hidden=8", "--model_options.prior_options.transforms=2"],
            "--model_options.prior_options takes a mapping: write --model_options.prior_options='{hidden: VALUE}'",
        ),
        (["list", "--jsn"], "unknown option '--jsn': did you mean '--json'?"),
        (["--verson"], "unknown option '--verson': did you mean '--version'?"),
        (["train", "--modle", "x"], "unknown option '--modle': did you mean '--model'?"),
        (["train", "--model_option.hidden=[4]"], "did you mean '--model_options'?"),
        (["train", "extra"], "unexpected argument 'extra'"),
        (["train", "--epochs", "1.5"], "epochs is '1.5': expected a whole number"),
        (["train", "--config", "odd.yaml"], "unknown setting 'modle': did you mean 'model'?"),
        (["train", "--model_options.hiden=[3]"], "did you mean 'hidden'?"),
        (["reproduce", "toy", "--cells", "[0.45/rlo]"], "did you mean '0.45/rloo'?"),
        (["reproduce", "toy", "--seeds", "a"], "seeds is 'a': expected a list"),
        (["system"], "the name of a system is missing"),
        (["system", "warmup"], "did you mean 'warm-up'?"),
        (["completion", "bsh"], "did you mean 'bash'?"),
    ],
)
def test_a_mistake_is_one_line_and_status_2(argv, words, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("odd.yaml").write_text("modle: gaussian-vae\n")
    said, status = one_line_and_status(capsys, argv)
    assert words in said
    assert said.startswith(f"gumbo {argv[0]}: error: " if argv[0] in cli.VERBS else "gumbo: error: ")
    assert status == 2


def test_a_program_called_without_its_arguments_is_told_of_the_option(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("needs_rows.py").write_text("def model(rows): ...\n\n\ndef guide(rows): ...\n")
    with pytest.raises(SystemExit):
        cli.main(["audit", "needs_rows:model", "needs_rows:guide"])
    said = capsys.readouterr().err
    assert "missing 1 required positional argument: 'rows'" in said and "--args module:function" in said
    sys.modules.pop("needs_rows", None)


@pytest.mark.parametrize("kind", ["likelihoods", "priors"])
def test_the_listed_words_are_those_that_a_model_takes(kind, capsys):
    cli.main(["list", kind, "--json"])
    found = json.loads(capsys.readouterr().out)[kind]
    word, options = {"likelihoods": ("normal", {"sd": 1.0}), "priors": ("mixture", {"components": 50})}[kind]
    assert found[word]["options"] == options
    GaussianVAE((1, 2, 2), **{kind[:-1]: word, f"{kind[:-1]}_options": options})
    cli.main(["list", kind])
    said = capsys.readouterr().out
    assert all(one in said for one in found) and max(map(len, said.splitlines())) <= 80


@pytest.mark.parametrize("width", [40, 50, 60, 80])
def test_a_table_in_a_narrow_terminal_folds_words_and_cuts_none(width):
    heads, row = ["word", "first", "second", "third"], ["rloo", "a" * 25, "b" * 28, "c" * 22]
    made = listing.table("made of", heads, [row], width)
    assert max(map(len, made.splitlines())) <= width
    assert [made.count(letter * 2) > 0 for letter in "abc"] == [True] * 3
    assert sum(line.count("b") for line in made.splitlines()[4:]) == 28
    assert sum(line.count("c") for line in made.splitlines()[4:]) == 22


def test_pyros_losses_are_listed_without_their_docstrings_references(capsys):
    cli.main(["list", "stock"])
    assert "[1]" not in capsys.readouterr().out


def test_a_table_without_finished_cells_says_where_it_looked(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    cli.main(["reproduce", "toy", "--show"])
    said = capsys.readouterr()
    assert said.out == "" and "toy: no finished cell in experiments/results/toy" in said.err


def test_resuming_to_fewer_epochs_trains_nothing_and_keeps_the_record(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    quick = ["--batch_size=400", "--importance_samples=2", "--model_options.hidden=[4]"]
    cli.main(["train", "--epochs=2", *quick, "--folder=run"])
    capsys.readouterr()
    cli.main(["train", "--resume", "run", "--epochs=1"])
    assert "with 2 epochs done: nothing to train" in capsys.readouterr().err
    assert "epochs: 2\n" in Path("run/config.yaml").read_text()


@pytest.mark.parametrize("folder", [[], ["--folder", "deep/er"]], ids=["by time", "by name"])
@pytest.mark.parametrize(
    ("option", "words"),
    [
        (["--batch_size", "0"], "batch_size is 0"),
        (["--epochs", "0"], "epochs is 0"),
        (["--lr", "-1"], "lr is -1.0"),
        (["--lr", "fast(3)"], "unknown schedule 'fast'"),
        (["--clip_norm", "0"], "clip_norm is 0"),
        (["--patience", "0"], "patience is 0"),
        (["--estimator", "rebar"], "cannot take estimator 'rebar'"),
    ],
)
def test_a_run_that_comes_to_nothing_leaves_nothing(option, words, folder, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    said, status = one_line_and_status(capsys, ["train", *option, *folder])
    assert words in said and status == 2
    assert not list(tmp_path.iterdir())


def test_a_folder_that_stood_is_left_standing(capsys, tmp_path):
    (tmp_path / "mine").mkdir()
    one_line_and_status(capsys, ["train", "--batch_size", "0", "--folder", str(tmp_path / "mine")])
    assert (tmp_path / "mine").is_dir() and not list((tmp_path / "mine").iterdir())


def test_a_full_disk_is_one_line(capsys, tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "replace", full)
    said, status = one_line_and_status(capsys, ["train", "--folder", str(tmp_path / "new")])
    assert "cannot write" in said and "No space left on device" in said
    assert status == 1 and not (tmp_path / "new").exists()


def failing(*_, **__):
    raise OSError(errno.EFBIG, "a text of HDF5\nin two lines")


def small_audit():
    model = BernoulliVAE((1, 2, 2), num_latents=2, hidden=(4,))
    return audit(model, BernoulliGuide(model), torch.ones(1, 1, 2, 2), estimators=["rloo", "enumerate"], num_samples=50)


@pytest.mark.parametrize("what", ["a picture", "a plot of an audit", "a posterior", "a posterior without room"])
def test_a_file_that_cannot_be_written_is_named_and_the_old_one_kept(what, tmp_path, monkeypatch):
    path, said = tmp_path / "old.png", "File too large"
    path.write_text("old")
    made, _ = pictures.figure()
    monkeypatch.setattr(type(made), "savefig", failing)
    posterior = _arviz.make({"posterior": xarray.Dataset({"z": ("draw", np.ones(9))})})
    if what == "a posterior without room":
        monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=71))
        said = "No space left on device"
    else:
        monkeypatch.setattr(type(posterior), "to_netcdf", failing)
    write = {
        "a picture": lambda: pictures.save(made, path),
        "a plot of an audit": lambda: plot_audit(small_audit(), path),
    }.get(what, lambda: _arviz.save(posterior, path))
    with pytest.raises(GumboError, match=f"cannot write {path}: {said}; what was written before"):
        write()
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def children(pid: int) -> set[int]:
    """Processes below this one, and below those."""
    found = subprocess.run(["ps", "-eo", "pid=,ppid="], capture_output=True, text=True, check=True).stdout
    pairs = [tuple(map(int, line.split())) for line in found.splitlines()]
    below, new = set(), {pid}
    while new := {child for child, parent in pairs if parent in new} - below:
        below |= new
    return below


@pytest.fixture
def interruptible():
    """SIGINT as at a terminal: the tests may run in a background job, which ignores it, as its children do."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.skipif(shutil.which("ps") is None, reason="needs ps")
@pytest.mark.usefixtures("interruptible")
@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_no_worker_outlives_a_comparison(number, tmp_path):
    options = ["--quick", "--jobs", "2", "--epochs", "500", "--folder", "out"]
    started = subprocess.Popen(
        [sys.executable, "-m", "gumbo", "compare", *options],
        cwd=tmp_path,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stderr=subprocess.PIPE,
        text=True,
    )
    metrics, limit = tmp_path / "out" / "metrics.jsonl", time.monotonic() + 100
    while not metrics.exists():
        assert started.poll() is None and time.monotonic() < limit
        time.sleep(0.05)
    workers = children(started.pid)
    assert len(workers) >= 2
    started.send_signal(number)
    _, said = started.communicate(timeout=60)
    assert started.returncode == 128 + number
    assert said.splitlines()[-1] == f"gumbo compare: interrupted by {signal.Signals(number).name}"
    assert "Traceback" not in said
    for _ in range(100):
        alive = {pid for pid in workers if Path(f"/proc/{pid}").exists() and "Z" not in state(pid)}
        if not alive:
            return
        time.sleep(0.1)
    pytest.fail(f"{len(alive)} workers are still there")


def state(pid: int) -> str:
    return subprocess.run(["ps", "-o", "stat=", "-p", str(pid)], capture_output=True, text=True).stdout


def test_unknown_keys_of_a_file_are_refused(capsys, tmp_path):
    path = tmp_path / "settings.yaml"
    path.write_text("epochs: 3\nlatents: 5\n")
    said, status = one_line_and_status(capsys, ["compare", "--config", str(path)])
    assert "latents" in said
    assert status == 2


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("tensorboard: 'no'", "tensorboard is 'no': expected true or false"),
        ("compile: 1", "compile is 1: expected true or false"),
        ("epochs: null", "epochs is null: expected a whole number"),
        ("model_options: null", "model_options is null: expected a mapping, such as {name: value}"),
        ("estimator: null", "estimator is null: expected a mapping, such as {name: value} or text"),
        ("epochs: 3\nseed: 1\nepochs: 4", "sets 'epochs' twice, again in line 3: keep one"),
        ("model_options: {hidden: [3], hidden: [4]}", "sets 'hidden' twice, again in line 1"),
        ("batch-size: 3", "unknown setting 'batch-size': did you mean 'batch_size'?"),
        ("print_config: true", "unknown setting 'print_config' (gumbo train --help shows all)"),
        ("config: other.yaml", "names another settings file: give both"),
        ("model_options: hidden", "model_options is 'hidden': expected a mapping, such as {name: value}"),
        ("patience: soon", "patience is 'soon': expected a whole number or null"),
        ("estimator: {z: 3}", ": expected a mapping, such as {name: value} or text"),
        ("clip_norm: [1]", "clip_norm is '[1]': expected a number or null"),
    ],
)
def test_a_file_that_sets_what_cannot_be_is_one_line(text, words, capsys, tmp_path):
    (path := tmp_path / "settings.yaml").write_text(text + "\n")
    said, status = one_line_and_status(capsys, ["train", "--config", str(path)])
    assert words in said and status == 2


def test_numbers_that_may_be_schedules_are_numbers_in_a_file_too(tmp_path):
    (path := tmp_path / "settings.yaml").write_text("kl_weight: 0.5\ntemperature: 2\nlr: linear(10)\n")
    found = parse(Train, ["--config", str(path)], "gumbo train", {})
    assert (found.kl_weight, found.temperature, found.lr) == (0.5, 2, "linear(10)")
    assert parse(Train, ["--kl_weight", "linear(3)"], "gumbo train", {}).kl_weight == "linear(3)"


def test_settings_come_from_preset_then_file_then_flags(tmp_path):
    path = tmp_path / "settings.yaml"
    path.write_text("epochs: 7\nhidden: [5]\n")

    def settings(*argv: str) -> compare.Compare:
        return parse(compare.Compare, argv, "gumbo compare", {"quick": compare.QUICK})

    assert settings() == compare.Compare()
    quick = settings("--quick")
    assert {name: getattr(quick, name) for name in compare.QUICK} == compare.QUICK
    assert quick.quick
    mixed = settings("--quick", "--config", str(path), "--seeds", "9")
    assert (mixed.epochs, mixed.hidden, mixed.seeds, mixed.gradient_draws) == (7, [5], 9, quick.gradient_draws)
    path.write_text("quick: true\nepochs: 7\n")
    assert settings("--config", str(path)).seeds == quick.seeds


def test_print_config_can_be_given_back(tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["compare", "--quick", "--print_config"])
    assert stop.value.code in (0, None)
    printed = capsys.readouterr().out
    assert yaml.safe_load(printed)["epochs"]
    path = tmp_path / "settings.yaml"
    path.write_text(printed)
    again = parse(compare.Compare, ["--config", str(path)], "gumbo compare", {"quick": compare.QUICK})
    assert again.quick


def test_the_examples_of_the_readme_run(param_store, capsys):
    first, second = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.S)
    exec(compile(first, "README.md", "exec"), {})
    assert capsys.readouterr().out.split()[::4] == ["Trace_ELBO", "TraceGraph_ELBO", "SiteELBO", "SiteELBO"]
    with param_store.scope():
        exec(compile(second, "README.md", "exec"), {})
    said = capsys.readouterr().out
    assert "300 data, 50 draws; nats per datum" in said and re.search(r"ELBO +-\d", said)


def test_the_readme_names_verbs_and_options_that_exist():
    lines = re.findall(r"^gumbo (\S+)(.*?)(?:\s{3}.*)?$", (ROOT / "README.md").read_text(), flags=re.M)
    assert {"compare", "train", "evaluate", "list"} <= {verb for verb, _ in lines} <= set(cli.VERBS)
    for verb, options in lines:
        fields = importlib.import_module(f"gumbo.experiments.{cli.VERBS[verb].module}").__dict__[verb.capitalize()]
        assert set(re.findall(r"--(\w+)", options)) <= set(fields.__dataclass_fields__)


def test_a_run_from_a_shell(tmp_path):
    """The whole way, in a process of its own: a script by its path, from another directory, without a terminal."""
    options = ["--epochs", "1", "--batch_size", "400", "--importance_samples", "2", "--model_options.hidden=[8]"]
    done = run(str(ROOT / "experiments" / "train.py"), *options, "--folder", "out", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "gumbo train epoch 1/1" in done.stderr
    assert "log p(x)" in done.stdout
    assert json.loads((tmp_path / "out" / "results.json").read_text())["epochs"] == 1
    again = run("-m", "gumbo", "train", *options, "--folder", "out", cwd=tmp_path)
    assert again.returncode == 2
    assert again.stderr.count("\n") == 1
    judged = run("-m", "gumbo", "evaluate", "out", "--importance_samples", "2", cwd=tmp_path)
    assert judged.returncode == 0
    assert judged.stdout.startswith(done.stdout)


def test_the_results_of_any_verb_as_json_are_alone_on_standard_output(tmp_path, capsys):
    """What people read goes to standard error."""
    gumbel = tmp_path / "gumbel"
    cli.main(["system", "gumbel-max", "--quick", "--json", "--folder", str(gumbel)])
    shown = capsys.readouterr()
    assert json.loads(shown.out) == json.loads((gumbel / "results.json").read_text()) and "draws" in shown.err
    audit = "bernoulli-vae bernoulli --data digits --estimators score,rloo --num_samples 10 --batch_size 2"
    options = "--model_options.num_latents=2 --model_options.hidden=[4] --guide_options.hidden=[4] --json"
    cli.main(["audit", *audit.split(), *options.split(), f"--folder={tmp_path / 'audit'}"])
    found = json.loads(capsys.readouterr().out)
    assert found["coords"]["estimator"]["data"] == ["score", "rloo"] and found["data_vars"]["seconds"]["data"][0] > 0


def test_a_run_with_json_can_be_gone_on_with_without_it(tmp_path, capsys):
    small = ["--model_options.latent_dim=2", "--model_options.hidden=[4]", "--guide_options.hidden=[4]"]
    options = [*small, "--importance_samples", "2", "--batch_size", "500"]
    cli.main(["train", "--epochs", "1", *options, "--json", "--folder", str(tmp_path / "run")])
    first = json.loads(capsys.readouterr().out)
    assert first["epochs"] == 1 and "json" not in first["config"]
    cli.main(["train", "--resume", str(tmp_path / "run"), "--epochs", "2"])
    assert capsys.readouterr().out.startswith("test: ")


def test_an_interruption_while_torch_is_imported_is_one_line(capsys, monkeypatch):
    def importing(name):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli.importlib, "import_module", importing)
    assert one_line_and_status(capsys, ["train"]) == ("gumbo train: interrupted by SIGINT\n", 130)
