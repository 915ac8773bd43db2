"""What a run has left, in Python: `gumbo.load`, and `gumbo export` to safetensors."""

from __future__ import annotations

import json
import shutil
import sys
import warnings
from pathlib import Path

import pytest
import torch
import yaml

import gumbo
from gumbo.errors import BadInput, GumboWarning
from gumbo.experiments import cli
from gumbo.experiments.export import Export, export
from gumbo.guides import guides
from gumbo.inference.training.checkpoints import Checkpoints, load_checkpoint, save_checkpoint
from gumbo.models import models

QUICK = ["--epochs", "2", "--importance_samples", "2", "--batch_size", "400", "--model_options.hidden=[8]"]

TIED = """
from pathlib import Path

from torch import nn

from gumbo.models import GaussianVAE

Path({witness!r}).touch()


class Tied(GaussianVAE):
    def __init__(self, data_shape):
        super().__init__(data_shape, latent_dim=2, hidden=(8, 8))
        self.decoder_twin = nn.Linear(8, 8)
        layers = [layer for layer in self.decoder.modules() if isinstance(layer, nn.Linear) and layer.in_features == 8]
        self.decoder_twin.weight = layers[0].weight
"""


COUNTING = """
import torch

from gumbo.models import GaussianVAE


class Counting(GaussianVAE):
    def __init__(self, data_shape):
        super().__init__(data_shape, latent_dim=2, hidden=(8,))
        self.register_buffer("seen", torch.zeros(2), persistent=False)
        self.register_buffer("constant", torch.ones(2), persistent=False)

    def likelihood(self, z):
        if self.training:
            self.seen += 1
        return super().likelihood(z)
"""


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained") / "run"
    options = ["--model", "categorical-vae", "--estimator", "nvil", "--kl_weight", "linear(100)"]
    cli.main(["train", "--folder", str(folder), *QUICK, *options])
    return folder


@pytest.fixture
def run(trained, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return Path(shutil.copytree(trained, tmp_path / "run"))


def said(capsys, *argv: str) -> str:
    with pytest.raises(SystemExit) as stop:
        cli.main(list(argv))
    assert stop.value.code == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    return line


def test_a_loaded_run_is_what_was_trained(run):
    model, guide, loss, settings, metrics = found = gumbo.load(run)
    kept = Checkpoints(run / "checkpoints").load()["module"]
    for name, value in {f"model.{n}": v for n, v in model.state_dict().items()}.items():
        assert torch.equal(value, kept[name])
    for name, value in guide.state_dict().items():
        assert torch.equal(value, kept[f"guide.{name}"])
    assert (settings.model, settings.guide, settings.epochs) == ("categorical-vae", "categorical", 2)
    assert [line["epoch"] for line in metrics] == [0, 1, 2]
    assert metrics == [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert len(repr(found)) < 200 and not model.training
    idata = gumbo.to_arviz(model, guide, num_samples=3, groups=["posterior"], **found.inputs("test", 4))
    assert idata.posterior["y"].sizes["data"] == 4


def test_a_loaded_loss_goes_on_where_its_schedules_and_baselines_stood(run):
    found = gumbo.load(run)
    kept = Checkpoints(run / "checkpoints").load()["module"]
    module = found.loss(found.model, found.guide)
    module(**found.inputs("test", 4)).backward()
    assert module.binding.steps == kept["binding._extra_state"]["steps"] + 1 == 9
    states = {name: value for name, value in kept.items() if name.startswith("binding.states.")}
    again = gumbo.load(run)
    module = again.loss(again.model, again.guide).initialize(**again.inputs("test", 4))
    assert states and all(torch.equal(module.state_dict()[name], value) for name, value in states.items())
    model = models["categorical-vae"]((1, 4, 4), hidden=(8,))
    with pytest.raises(BadInput, match="stored state of this loss"):
        again.loss(model, guides["categorical"](model)).initialize(torch.zeros(2, 1, 4, 4))


def test_a_loaded_run_trains_on(run):
    found = gumbo.load(run)
    x = found.inputs("train", 40)
    result = gumbo.fit(found.model, found.guide, x, loss=found.loss, epochs=1, batch_size=40, progress=False)
    assert result.epochs == 1 and result.objective_name == "weighted-elbo"


def test_best_takes_the_best_epochs_parameters(run):
    best = Checkpoints(run / "checkpoints").load()["best"]["module"]
    found = gumbo.load(run, best=True)
    assert all(torch.equal(value, best[f"model.{name}"]) for name, value in found.model.state_dict().items())


def test_buffers_that_no_state_dict_holds_are_loaded_and_exported_too(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    Path("counting_models.py").write_text(COUNTING)
    cli.main(["train", "--folder", "run", *QUICK[:-1], "--model", "counting_models:Counting"])
    checkpoints = Checkpoints(Path("run/checkpoints"))
    state = checkpoints.load()
    assert list(state["buffers"]) == ["model.seen"]
    state["best"]["buffers"] = {"model.seen": state["buffers"]["model.seen"] + 0.5}
    checkpoints.save(state)
    for best in (False, True):
        expected = state["buffers"]["model.seen"] + 0.5 * best
        assert torch.equal(gumbo.load("run", trust=True, best=best).model.seen, expected)
        export(Export("run", folder=f"export-{best}", best=best, trust=True))
        found = gumbo.load(f"export-{best}", trust=True)
        assert torch.equal(found.model.seen, expected)
        assert not {name for name in found.model.state_dict() if "seen" in name or "constant" in name}
    del state["best"]["buffers"]  # as an earlier version wrote it
    checkpoints.save(state)
    assert torch.equal(gumbo.load("run", trust=True, best=True).model.seen, torch.zeros(2))


def test_an_export_loads_as_the_run_does_and_is_judged_alike(run, capsys):
    written = export(Export(str(run)))
    assert yaml.safe_load((run / "export" / "config.yaml").read_text())["experiment"] == "train"
    ours, theirs = gumbo.load(run), gumbo.load(run / "export")
    assert ours.metrics == theirs.metrics
    for program in ("model", "guide"):
        for (name, value), (other, loaded) in zip(
            getattr(ours, program).state_dict().items(), getattr(theirs, program).state_dict().items(), strict=True
        ):
            assert name == other and torch.equal(value, loaded)
    from safetensors import safe_open

    with safe_open(written["weights"], framework="pt") as file:
        assert json.loads(file.metadata()["data_shape"]) == [1, 8, 8]
    capsys.readouterr()
    for folder in (run, run / "export"):
        cli.main(["evaluate", str(folder), "--importance_samples", "2"])
    first, second = capsys.readouterr().out.split("test:")[1:]
    assert first == second
    assert "one set of parameters" in said(capsys, "evaluate", str(run / "export"), "--best")
    assert "not an empty folder" in said(capsys, "export", str(run))


def test_tied_weights_are_written_once_and_trust_is_asked_for(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "theirs.py").write_text(TIED.format(witness=str(tmp_path / "imported")))
    try:
        cli.main(["train", "--folder", "run", *QUICK[:-1], "--model", "theirs:Tied"])
        sys.modules.pop("theirs")
        (tmp_path / "imported").unlink()
        capsys.readouterr()
        with pytest.raises(BadInput, match="trust=True"):
            gumbo.load("run")
        assert "--trust" in said(capsys, "export", "run")
        assert not (tmp_path / "imported").exists()
        cli.main(["export", "run", "--folder", "out", "--trust"])
        with pytest.raises(BadInput, match="trust=True"):
            gumbo.load("out")
        model = gumbo.load("out", trust=True).model
    finally:
        sys.modules.pop("theirs", None)
    from safetensors import safe_open

    with safe_open(str(tmp_path / "out" / "model.safetensors"), framework="pt") as file:
        written = set(file.keys())
    tied = [
        name for name, value in model.named_parameters(remove_duplicate=False) if value is model.decoder_twin.weight
    ]
    assert len(tied) == 2 and len(written & {f"model.{name}" for name in tied}) == 1


@pytest.mark.parametrize("broken", ["weights", "config", "missing", "fit"])
def test_what_cannot_be_loaded_is_said_in_one_line(broken, run, tmp_path):
    export(Export(str(run), folder="out"))
    folder = tmp_path / "out"
    if broken == "weights":
        (folder / "model.safetensors").write_bytes(b"\x08" + bytes(40))
    elif broken == "config":
        settings = yaml.safe_load((folder / "config.yaml").read_text())
        settings["model_options"]["hidden"] = [9]
        (folder / "config.yaml").write_text(yaml.safe_dump(settings))
    elif broken == "missing":
        (folder / "model.safetensors").unlink()
    else:
        (folder / "config.yaml").unlink()
        (folder / "model.safetensors").unlink()
        (run / "checkpoints").rename(folder / "checkpoints")
    with pytest.raises(BadInput) as found:
        gumbo.load(folder)
    assert "\n" not in str(found.value)
    if broken == "fit":
        assert "resume=True" in str(found.value)


def test_an_export_without_safetensors_says_what_to_install(run, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    assert ".[export]" in said(capsys, "export", str(run))
    assert not (run / "export").exists()


def test_an_export_is_not_resumed_as_a_run_that_begins(run, tmp_path, capsys):
    cli.main(["export", str(run), "--folder", str(tmp_path / "export")])
    before = sorted(path.name for path in (tmp_path / "export").iterdir())
    capsys.readouterr()
    assert "is an export, which has no training state" in said(capsys, "train", "--resume", str(tmp_path / "export"))
    assert sorted(path.name for path in (tmp_path / "export").iterdir()) == before


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"buffers": {"model.no.where": torch.ones(2)}}, "the checkpoint's buffers do not fit config.yaml"),
        ({"buffers": {"x": torch.ones(2)}}, "the checkpoint's buffers do not fit config.yaml"),
        ({"buffers": [1]}, "its checkpoint is of something else"),
    ],
)
def test_buffers_of_other_programs_are_one_line(change, words, run, tmp_path):
    folder = shutil.copytree(run, tmp_path / "copy")
    path = folder / "checkpoints" / "last.pt"
    save_checkpoint(path, load_checkpoint(path) | change)
    with pytest.raises(BadInput, match=words) as said:
        gumbo.load(folder, best=False)
    assert "\n" not in str(said.value)


@pytest.mark.parametrize("line", [b'{"epo}\n', b"\xff}\n"])
def test_damaged_metrics_are_one_line(line, run, tmp_path):
    folder = shutil.copytree(run, tmp_path / "copy")
    with open(folder / "metrics.jsonl", "ab") as file:
        file.write(line)
    with pytest.raises(BadInput, match=r"metrics\.jsonl is damaged"):
        gumbo.load(folder)


def test_parameters_that_loading_rounds_are_warned_of(run, tmp_path):
    folder = shutil.copytree(run, tmp_path / "copy")
    path = folder / "checkpoints" / "last.pt"
    state = load_checkpoint(path)
    module = {
        name: v.double() if torch.is_tensor(v) and v.is_floating_point() else v for name, v in state["module"].items()
    }
    save_checkpoint(path, state | {"module": module})
    with pytest.warns(GumboWarning, match=r"was saved as torch\.float64 and is torch\.float32 here"):
        gumbo.load(folder, best=False)


@pytest.mark.parametrize("exported", [False, True], ids=["run", "export"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_parameters_that_are_not_finite_are_named(value, exported, run, tmp_path):
    folder = shutil.copytree(run, tmp_path / "copy")
    path = folder / "checkpoints" / "last.pt"
    state = load_checkpoint(path)
    name = next(name for name in state["module"] if name.startswith("guide.") and name.endswith("weight"))
    state["module"][name].view(-1)[0] = value
    save_checkpoint(path, state)
    words = rf"{name} has values that are not finite"
    if exported:
        with pytest.warns(GumboWarning, match=words):
            export(Export(str(folder), folder="out"))
        folder = tmp_path / "out"
    with pytest.warns(GumboWarning, match=words):
        loaded = gumbo.load(folder)
    assert not torch.isfinite(dict(loaded.guide.named_parameters())[name.removeprefix("guide.")]).all()


def test_settings_that_a_run_lacks_are_named(run, tmp_path, capsys):
    folder = shutil.copytree(run, tmp_path / "copy")
    settings = yaml.safe_load((folder / "config.yaml").read_text())
    del settings["particles"], settings["products"]
    (folder / "config.yaml").write_text(yaml.safe_dump(settings))
    words = "config.yaml lacks 'particles', 'products'"
    with pytest.warns(GumboWarning, match=words):
        gumbo.load(folder)
    with warnings.catch_warnings():
        warnings.simplefilter("default")
        cli.main(["evaluate", str(folder), "--importance_samples", "2"])
    assert capsys.readouterr().err.count(words) == 1
