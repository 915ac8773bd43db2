"""A run folder is data: what its config.yaml names is imported where the user has given it, and by its kind alone."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import yaml

from gumbo.errors import BadInput
from gumbo.experiments import cli
from gumbo.experiments._command import parse
from gumbo.experiments.data import load
from gumbo.experiments.evaluate import Evaluate, reopened
from gumbo.experiments.inspect_posterior import Inspect, inspect
from gumbo.experiments.train import Train, resumed, settings_of
from gumbo.guides import guides
from gumbo.inference import SiteELBO
from gumbo.models import models

QUICK = ["--epochs", "1", "--importance_samples", "2", "--model_options.hidden=[4]", "--model_options.latent_dim=2"]

MODULE = """
from pathlib import Path

import numpy as np

Path({witness!r}).touch()


def rows(folder, splits):
    pixels = np.random.RandomState(0).rand(12, 4, 4) > 0.5
    return {{split: (pixels.astype(float), None) for split in splits}}


def anything(*args, **kwargs):
    Path({called!r}).touch()


def aside(folder, splits, third):
    Path({called!r}).touch()


class Plain:
    def __init__(self, *args):
        Path({called!r}).touch()
"""


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A current folder with a module of the user's own, which notes when it is imported and when it is misused."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "theirs.py").write_text(
        MODULE.format(witness=str(tmp_path / "imported"), called=str(tmp_path / "called"))
    )
    yield tmp_path
    sys.modules.pop("theirs", None)
    assert not (tmp_path / "called").exists()


def said(capsys, *argv: str) -> str:
    with pytest.raises(SystemExit) as stop:
        cli.main(list(argv))
    assert stop.value.code == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1, lines
    return lines[0]


@pytest.fixture
def run(place, capsys) -> Path:
    """A finished run on the user's own data."""
    cli.main(["train", "--data", "theirs:rows", "--binarize=null", "--folder", "run", *QUICK])
    capsys.readouterr()
    sys.modules.pop("theirs")
    (place / "imported").unlink()
    return place / "run"


def rewrite(run: Path, **changed: object) -> None:
    path = run / "config.yaml"
    path.write_text(yaml.safe_dump(yaml.safe_load(path.read_text()) | changed))


LOADING = [
    ["evaluate", "run"],
    ["inspect", "run"],
    ["train", "--resume", "run"],
    ["train", "--config", "run/config.yaml"],
]


@pytest.mark.parametrize("setting", ["model", "guide", "estimator", "data", "objective"])
@pytest.mark.parametrize("argv", LOADING, ids=" ".join)
def test_a_path_that_only_the_run_names_is_not_imported(argv, setting, run, place, capsys):
    rewrite(run, **{"data": "digits"} | {setting: "theirs:anything"})
    line = said(capsys, *argv)
    assert "'theirs:anything'" in line and "--trust" in line and setting in line
    assert not (place / "imported").exists()


@pytest.mark.parametrize("argv", LOADING, ids=" ".join)
def test_the_refusal_names_options_only_where_the_command_has_them(argv, run, place, capsys):
    rewrite(run, data="theirs:rows", guide="theirs:Guide")
    line = said(capsys, *argv)
    flags = "name --guide theirs:Guide --data theirs:rows on this command, or add --trust"
    assert (flags in line) == (argv[0] == "train")
    assert argv[0] == "train" or "; add --trust" in line


@pytest.mark.parametrize("trust", [True, "--trust"])
def test_a_run_does_not_vouch_for_itself(trust, run, place, capsys):
    rewrite(run, trust=trust)
    for argv in LOADING:
        said(capsys, *argv)
    assert not (place / "imported").exists()


def test_a_path_that_a_run_hides_in_a_mapping_is_found(run, place, capsys):
    rewrite(run, data="digits", estimator={"z": "theirs:anything"})
    for argv in LOADING:
        assert "theirs:anything" in said(capsys, *argv)
    assert not (place / "imported").exists()


def test_a_path_that_a_run_hides_in_an_option_is_found(run, place, capsys):
    rewrite(run, data="digits", model="expectation", model_options={"f": "theirs:anything"})
    for argv in LOADING:
        assert "theirs:anything" in said(capsys, *argv)
    assert not (place / "imported").exists()


def test_python_asks_for_trust_too(run, place):
    for loads in (
        lambda: settings_of(str(run)),
        lambda: reopened(Evaluate(str(run)), "evaluate"),
        lambda: inspect(Inspect(str(run))),
    ):
        with pytest.raises(BadInput, match="trust=True"):
            loads()
    with pytest.raises(BadInput):
        load(resumed(str(run))["data"])
    assert not (place / "imported").exists()
    assert len(reopened(Evaluate(str(run), trust=True), "evaluate")[2].test) == 12


def test_trust_and_the_commands_own_path_open_it(run, place, capsys):
    cli.main(["evaluate", "run", "--importance_samples", "2", "--trust"])
    cli.main(["train", "--resume", "run", "--data", "theirs:rows", "--epochs", "2"])
    cli.main(["train", "--resume", "run", "--trust", "--epochs", "3"])
    assert "trust" not in yaml.safe_load((run / "config.yaml").read_text())
    own = yaml.safe_load((run / "config.yaml").read_text())
    assert own["data"] == "theirs:rows"
    assert Evaluate("run").trust is False


def test_the_commands_own_value_replaces_the_runs(run, place, capsys):
    rewrite(run, data="theirs:anything", binarize="static")
    settings = parse(Train, ["--config", "run/config.yaml", "--data", "digits"], "gumbo train", {"resume": resumed})
    assert (settings.data, settings.folder, settings.trust) == ("digits", None, False)
    assert not (place / "imported").exists()


def test_a_settings_file_of_the_users_own_is_as_good_as_flags(place, capsys):
    (place / "mine.yaml").write_text("data: theirs:rows\nbinarize: null\n")
    settings = parse(Train, ["--config", "mine.yaml"], "gumbo train", {"resume": resumed})
    assert settings.data == "theirs:rows"


WITH_OPTIONS = {
    "auto(seconds=0.5, draws=8, candidates=['rloo', 'score'])": None,
    "score-average(decay=0.5)": None,
    "{z: score-average(decay=0.5)}": {"z": "score-average(decay=0.5)"},
}


@pytest.mark.parametrize("word", WITH_OPTIONS)
def test_options_of_an_estimator_are_no_import_path(word, place, capsys):
    """From a file of the user's own, out of a run folder, and when the run goes on, which takes no trust."""
    wanted = WITH_OPTIONS[word] or word
    own = {"estimator": wanted, "model": "bernoulli-vae", "epochs": 1, "importance_samples": 2}
    own["model_options"] = {"hidden": [4], "num_latents": 2}
    (place / "mine.yaml").write_text(yaml.safe_dump(own))
    cli.main(["train", "--config", "mine.yaml", "--folder", "first"])
    assert yaml.safe_load((place / "first" / "config.yaml").read_text())["estimator"] == wanted
    cli.main(["train", "--resume", "first", "--epochs", "2"])
    cli.main(["train", "--config", "first/config.yaml", "--folder", "second", "--estimator", word])
    cli.main(["evaluate", "second", "--importance_samples", "2"])
    for run, epochs in (("first", 2), ("second", 1)):
        assert len((place / run / "metrics.jsonl").read_text().splitlines()) >= epochs


def test_options_do_not_hide_an_import_path(run, place, capsys):
    rewrite(run, data="digits", estimator="theirs:anything(draws=3)")
    for argv in LOADING:
        assert "'theirs:anything(draws=3)'" in said(capsys, *argv)
    assert not (place / "imported").exists()


def test_a_config_of_another_verb_is_refused(run, capsys):
    rewrite(run, data="digits")
    assert "gumbo train" in said(capsys, "compare", "--config", "run/config.yaml")


NOT_OF_THE_KIND = [
    ("data", "shutil.rmtree"),
    ("data", "os:system"),
    ("data", "numpy.save"),
    ("data", "theirs:anything"),
    ("data", "theirs:aside"),
    ("data", "theirs:Plain"),
    ("model", "os.system"),
    ("model", "torch.nn.Linear"),
    ("model", "theirs:Plain"),
    ("model", "../../x"),
    ("model", "theirs"),
    ("guide", "builtins.print"),
    ("guide", "torch.nn.Linear"),
    ("guide", "theirs:anything"),
    ("estimator", "os.system"),
    ("estimator", "theirs:Plain"),
    ("estimator", "theirs.nothing"),
]


@pytest.mark.parametrize(("setting", "path"), NOT_OF_THE_KIND)
def test_what_is_of_another_kind_is_never_called(setting, path, place, capsys):
    line = said(capsys, "train", f"--{setting}", path, "--folder", "run", *QUICK)
    assert path.split(".")[-1].split(":")[-1] in line
    assert place.exists() and not (place / "run").exists()


@pytest.mark.parametrize(("setting", "path"), NOT_OF_THE_KIND)
def test_trust_does_not_change_the_kind(setting, path, run, capsys):
    rewrite(run, **{"data": "digits"} | {setting: path})
    if path != "theirs":
        for argv in LOADING[:-1]:
            if setting == "estimator" and argv[0] != "train":
                continue  # nothing of a finished run asks for its estimator
            said(capsys, *argv, "--trust")


@pytest.mark.parametrize("path", ["os.system", "theirs:Plain", "torch.nn.functional.relu", "builtins.print"])
def test_an_audit_calls_only_what_may_be_a_program(path, place, capsys):
    for model, guide in ((path, "normal"), ("gaussian-vae", path)):
        line = said(capsys, "audit", model, guide, "--data", "digits")
        assert path.split(".")[-1].split(":")[-1] in line


def test_registries_look_at_the_kind_in_python_too():
    for registry, path in ((models, "torch.nn.Linear"), (guides, "builtins.print")):
        with pytest.raises(BadInput, match="expected|Python's library"):
            registry[path]
    with pytest.raises(BadInput, match="Python's library"):
        SiteELBO("os.system")
    with pytest.raises(BadInput, match="Python's library"):
        load("shutil.rmtree")


def test_a_stray_module_shadows_nothing(place, capsys):
    (place / "theirs2.py").write_text("import h5py_stray\nfrom theirs import rows\n")
    (place / "h5py_stray.py").write_text("")
    (place / "colorsys.py").write_text("raise RuntimeError('shadowed')\n")
    before = list(sys.path)
    assert load("theirs2:rows").train.shape == (12, 1, 4, 4)
    assert sys.path == before
    sys.modules.pop("colorsys", None)
    import colorsys

    assert Path(colorsys.__file__).parent != place
    for name in ("theirs2", "h5py_stray"):
        sys.modules.pop(name)


def test_a_module_that_fails_when_imported_is_one_line(place, capsys):
    (place / "broken_one.py").write_text("raise SystemExit(3)\n")
    assert "broken_one" in said(capsys, "train", "--data", "broken_one:rows")
