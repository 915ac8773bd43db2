"""The experiments, small: what they measure, what they write, and that a run can be gone on with and judged again."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from gumbo.errors import BadInput, GumboWarning, Interrupted, UnknownName
from gumbo.experiments import cli, compare, evaluate, listing, plots, train
from gumbo.experiments._runs import RunFolder

TINY = compare.Compare(
    seeds=1,
    epochs=1,
    batch_size=400,
    hidden=[8],
    latent_dim=4,
    num_latents=3,
    num_classes=3,
    gradient_draws=30,
    burn_in=40,
    common_epochs=1,
    importance_samples=3,
    jobs=1,
)


@pytest.fixture(scope="module")
def comparison(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "compare"
    return folder, compare.compare(replace(TINY, folder=str(folder)))


def test_every_arm_is_run_and_reported(comparison):
    folder, results = comparison
    trained = [(run["family"], run["arm"]) for run in results["runs"] if run["what"] == "training"]
    assert sorted(trained) == sorted((arm.family, arm.name) for arm in compare.ARMS)
    for row in results["table"]:
        for column in ("elbo", "log_evidence", "variance_initial", "variance_trained", "signal_to_noise_trained"):
            assert np.isfinite(row[column][0]), (row["arm"], column)
        assert row["log_evidence"][0] >= row["elbo"][0]
        assert row["ms_per_step"][0] > 0
    text = (folder / "table.md").read_text()
    assert all(f"| {arm.name}" in text for arm in compare.ARMS)


def test_the_run_folder_holds_what_it_should(comparison):
    folder, results = comparison
    assert json.loads((folder / "results.json").read_text())["table"] == json.loads(
        json.dumps(results["table"]).replace("NaN", "null")
    )
    assert yaml.safe_load((folder / "config.yaml").read_text())["epochs"] == 1
    assert json.loads((folder / "env.json").read_text())["torch"]
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert len(lines) == 2 * len(compare.ARMS) + 4
    assert len(list((folder / "checkpoints").glob("*.pt"))) == len(compare.ARMS)
    pictures = {path.name for path in (folder / "plots").glob("*.png") if path.stat().st_size > 5000}
    assert pictures == {
        "learning_curves.png",
        "gradient_variance.png",
        "continuous_reconstructions.png",
        "continuous_prior_draws.png",
        "discrete_reconstructions.png",
        "discrete_prior_draws.png",
    }


def test_the_table_fits_a_terminal_and_ends_in_the_answer(comparison, capsys):
    folder, results = comparison
    compare.show(TINY, compare.ARMS, results["runs"])
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80 and not any("…" in line for line in lines)
    last = " ".join(lines[len(lines) - lines[::-1].index("") :])
    assert last.startswith("Pathwise or score function? ") and last.count(". ") <= 2 and last.endswith(".")
    assert last in (folder / "table.md").read_text()
    assert all(row["seconds"][0] > 0 and 0 <= row["active_units"][0] <= row["units"] for row in results["table"])


def test_an_arm_whose_latents_know_nothing_is_called_collapsed(comparison):
    _, results = comparison
    runs = [dict(run, active_units=0) if run["arm"] == "concrete" else run for run in results["runs"]]
    rows = {row["arm"]: row for row in compare.summarize(compare.ARMS, runs) if row["family"] == "discrete"}
    assert compare.collapse(rows["concrete"]) == "collapsed"
    rows = compare.table_of("discrete", list(rows.values()))[1]
    assert [row[-1] for row in rows if row[0] == "concrete"] == ["collapsed"]


OTHER_NUMBERS = {"ratio_initial": (9.0, 0.0), "ratio_trained": (3.0, 0.0), "seeds": 2, "collapsed": 0}


@pytest.mark.parametrize(
    ("score", "error", "starts", "says"),
    [
        (-80.0, 20.0, "pathwise", "ends 60.0 ± 20.0 nats lower."),
        (-80.0, 60.0, "pathwise", "ends 60.0 ± 60.0 nats lower, too near to tell with these seeds."),
        (-15.0, 1.0, "the score function", "ends 5.0 ± 1.0 nats higher."),
        (-15.0, 4.0, "pathwise", "ends 5.0 ± 4.0 nats higher, too near to tell with these seeds."),
        (-80.0, float("nan"), "pathwise", "ends 60.0 nats lower."),
    ],
)
def test_the_conclusion_claims_no_more_than_its_standard_error(score, error, starts, says):
    ends = {"trace (pathwise)": (-20.0, 0.0), "trace (score)": (score, error)}
    rows = [{"family": "continuous", "arm": arm, "elbo": elbo, **OTHER_NUMBERS} for arm, elbo in ends.items()]
    said = compare.conclusion(rows)
    assert said.startswith(f"Pathwise or score function? For Normal latents take {starts}") and said.endswith(says)


@pytest.mark.parametrize(
    ("others", "says"),
    [
        ({}, "take the score function as rloo, which ends at -20.0 nats."),
        ({"trace": -24.0}, "take the score function as rloo, which ends at -20.0 nats."),
        ({"trace": -20.5}, "all estimators end too near to tell with these seeds, at -20.5 to -20.0 nats."),
        (
            {"trace": -20.5, "straight-through": -20.1},
            "all estimators end too near to tell with these seeds, at -20.5 to -20.0 nats.",
        ),
        (
            {"trace": -24.0, "straight-through": -20.1},
            "take the score function as rloo, which ends at -20.0 nats (the best relaxed gradient, straight-through, "
            "at -20.1); too near to tell with these seeds: straight-through.",
        ),
    ],
)
def test_the_conclusion_on_discrete_latents_claims_no_more_than_its_standard_error(others, says):
    ends = {"rloo": -20.0, **others}
    rows = [{"family": "discrete", "arm": arm, "elbo": (end, 1.0), **OTHER_NUMBERS} for arm, end in ends.items()]
    said = compare.conclusion(rows)
    assert said == f"Pathwise or score function? For one-hot latents, which have no pathwise gradient, {says}"


def test_the_conclusion_does_not_rank_collapsed_arms():
    arms = [
        ("continuous", "trace (pathwise)"),
        ("continuous", "trace (score)"),
        ("discrete", "rloo"),
        ("discrete", "trace"),
    ]
    rows = [
        {"family": family, "arm": arm, "elbo": (-20.0, 0.1), **OTHER_NUMBERS, "collapsed": 2} for family, arm in arms
    ]
    said = compare.conclusion(rows)
    assert "Pathwise ends without a latent in use" in said and "every estimator ends without a latent in use" in said
    assert "the score function as" not in said
    rows[-1]["collapsed"] = 1
    assert "all estimators end too near to tell" in compare.conclusion(rows)


def test_every_arm_warms_up(param_store):
    from gumbo.inference import Linear

    for arm in compare.ARMS:
        pair = compare.build(TINY, (1, 8, 8), 0, arm.form)
        x = compare.images("digits").train[:4]
        loss = compare.loss_of(TINY, arm, Linear(2))
        torch.manual_seed(0)
        # At weight 0 the loss is the distortion: 64 log 2 nats a datum before the decoder has learnt anything.
        assert abs(loss.loss_and_grads(*pair, x) / 4 - 64 * np.log(2)) < 4, arm


def test_the_weight_of_a_stock_elbo_is_that_of_its_step(param_store):
    from gumbo.inference.stock import stock_elbos

    pair = compare.build(TINY, (1, 8, 8), 0, "reparameterized")
    x = compare.images("digits").train[:4]
    for word in ("trace", "trace-meanfield", "trace-graph"):
        seen = []
        loss = compare.warmed(stock_elbos[word], lambda step: seen.append(step) or 0.5 * step)()  # noqa: B023
        values = []
        for _ in range(4):
            torch.manual_seed(0)
            values.append(loss.loss_and_grads(*pair, x))
        assert seen == [0, 1, 2, 3]
        steps = np.diff(values)
        assert steps == pytest.approx([steps[0]] * 3, rel=1e-4) and steps[0] > 0
        torch.manual_seed(0)
        assert values[2] == pytest.approx(stock_elbos[word]().loss_and_grads(*pair, x), rel=1e-6)


def test_an_interrupted_comparison_goes_on(comparison, tmp_path, monkeypatch):
    _, whole = comparison
    folder, made = tmp_path / "cut", []
    small = replace(TINY, families=["discrete"], folder=str(folder))
    train_arm = compare.train

    def three_arms(config, run, arm, seed):
        if len(made) == 3:
            run.append_metrics({"family": arm.family, "arm": arm.name, "seed": seed, "epoch": 1})
            raise Interrupted(15)
        made.append(arm.name)
        return train_arm(config, run, arm, seed)

    monkeypatch.setattr(compare, "train", three_arms)
    with pytest.raises(Interrupted, match="resume with: gumbo compare --resume"):
        compare.compare(small)
    monkeypatch.setattr(compare, "train", train_arm)
    settings = compare.resumed(str(folder)) | {"resume": str(folder)}
    found = compare.compare(compare.Compare(**settings))
    numbers = {(row["family"], row["arm"]): row["elbo"] for row in whole["table"]}
    again = {(row["family"], row["arm"]): row["elbo"] for row in found["table"]}
    assert set(again) == {key for key in numbers if key[0] == "discrete"}
    assert all(again[key] == numbers[key] for key in again)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert len(lines) == 2 * len(again) + 2  # nothing twice, and nothing of what was cut short
    with pytest.raises(BadInput, match="was begun with epochs 1, not 2"):
        compare.compare(compare.Compare(**settings | {"epochs": 2}))
    with pytest.raises(BadInput, match="empty"):
        compare.resumed("")
    with open(folder / "metrics.jsonl", "a") as file:
        file.write('{"family": "discrete", "arm": "of another process", "seed": 0}\n')
    before = (folder / "metrics.jsonl").read_text()
    with elsewhere_locked(folder), pytest.raises(BadInput, match="is in use by"):
        compare.compare(compare.Compare(**settings))
    assert (folder / "metrics.jsonl").read_text() == before  # the one who writes there keeps its lines
    for content in ("[]", '{"runs": [{}], "seconds": 0}', '{"seconds": 0}'):
        (folder / "results.json").write_text(content)
        with pytest.raises(BadInput, match="is not what gumbo compare wrote"):
            compare.compare(compare.Compare(**settings))


@contextmanager
def elsewhere_locked(folder):
    """The folder, held by another process."""
    code = "import sys, pathlib; from gumbo.inference.training.locks import FolderLock as L; "
    code += "L(pathlib.Path(sys.argv[1])).acquire(); print('held', flush=True); sys.stdin.read()"
    command = [sys.executable, "-c", code, str(folder)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout.readline() == "held\n"
        yield
        holder.stdin.close()


def test_a_comparison_without_results_leaves_nothing(tmp_path, monkeypatch):
    def stopped(*_):
        raise Interrupted(15)

    monkeypatch.setattr(compare, "measure", stopped)
    with pytest.raises(Interrupted, match="^interrupted by SIGTERM$"):
        compare.compare(replace(TINY, folder=str(tmp_path / "cut")))
    assert not (tmp_path / "cut").exists()


def test_arms_of_a_family_start_from_the_same_weights(comparison):
    _, results = comparison
    for family in compare.FAMILIES:
        starts = [run["valid_elbo"][0] for run in results["runs"] if run.get("valid_elbo") and run["family"] == family]
        assert max(starts) - min(starts) < 1e-5  # the true bound, so the relaxed arms begin there as well


def test_the_contrasts_show_in_the_table(comparison):
    _, results = comparison
    ratio = {(row["family"], row["arm"]): row["ratio_initial"][0] for row in results["table"]}
    assert ratio["continuous", "trace (score)"] >= 100
    assert ratio["continuous", "trace (pathwise)"] == 1
    assert ratio["discrete", "trace"] >= 10
    assert ratio["discrete", "trace-graph"] == pytest.approx(ratio["discrete", "trace"], rel=1e-3)
    objectives = {row["arm"]: row["objective"] for row in results["table"] if row["family"] == "discrete"}
    assert objectives["rloo"] == "weighted-elbo"  # by the warm-up that all arms share
    assert objectives["gumbel-softmax"] not in ("elbo", "weighted-elbo")
    assert objectives["concrete"] not in ("elbo", "weighted-elbo")


def test_forms_of_a_pair_hold_the_same_weights():
    for one, other in (("reparameterized", "score"), ("discrete", "relaxed")):
        for left, right in zip(
            compare.build(TINY, (1, 8, 8), 3, one), compare.build(TINY, (1, 8, 8), 3, other), strict=True
        ):
            weights = dict(left.named_parameters())
            assert all(torch.equal(weights[name], value) for name, value in right.named_parameters())
    source = compare.build(TINY, (1, 8, 8), 4, "discrete")
    target = compare.build(TINY, (1, 8, 8), 5, "relaxed")
    compare.copy_weights(target, source)
    assert torch.equal(target[0].decoder.state_dict()["0.weight"], source[0].decoder.state_dict()["0.weight"])


@pytest.mark.slow
def test_workers_find_what_one_process_finds(tmp_path):
    small = replace(TINY, families=["discrete"], gradient_draws=2, burn_in=1)
    one = compare.compare(replace(small, folder=str(tmp_path / "one")))
    two = compare.compare(replace(small, jobs=2, folder=str(tmp_path / "two")))
    for left, right in zip(one["table"], two["table"], strict=True):
        assert left["elbo"][0] == pytest.approx(right["elbo"][0], rel=1e-5)
        assert left["variance_initial"][0] == pytest.approx(right["variance_initial"][0], rel=1e-3)


def test_compare_refuses_what_it_cannot_run(tmp_path):
    for change, match in (
        ({"seeds": 0}, "seeds is 0"),
        ({"particles": 1}, "particles is 1: expected at least 2"),
        ({"batch_size": 5000}, "1297 training images"),
        ({"families": []}, "families is empty"),
    ):
        with pytest.raises(BadInput, match=match):
            compare.compare(replace(TINY, folder=str(tmp_path / "new"), **change))
    with pytest.raises(UnknownName, match="did you mean 'discrete'"):
        compare.compare(replace(TINY, families=["discret"]))
    assert not (tmp_path / "new").exists()


def test_numbers_read_well():
    assert [compare.digits(x) for x in (0.0123, 4.5678, 789.4, 12345.0, 45e6, 0.0)] == [
        "0.0123",
        "4.57",
        "789",
        "12,345",
        "4.5e+07",
        "0",
    ]
    assert compare.cell((1.234, 0.056), compare.decimals) == "1.23 ± 0.06"
    assert compare.mean_and_error([1.0, 3.0]) == (2.0, 1.0)


# --- run folders


def test_a_run_folder_is_new(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("gumbo.experiments._runs.time.strftime", lambda *_: "now")
    first, second = (RunFolder.create("x", TINY) for _ in range(2))
    assert [run.path.name for run in (first, second)] == ["x-now", "x-now-2"]
    with pytest.raises(BadInput, match="not an empty folder"):
        RunFolder.create("x", TINY, str(first.path))
    (tmp_path / "file").write_text("")
    with pytest.raises(BadInput, match="not an empty folder"):
        RunFolder.create("x", TINY, str(tmp_path / "file"))


# --- train, evaluate


def config_of(tmp_path: Path, name: str, **changes) -> train.Train:
    settings = {"hidden": [8], "num_latents": 3, "num_classes": 3}
    options = {"model": "categorical-vae", "estimator": "rloo", "model_options": settings, "batch_size": 300}
    return train.Train(folder=str(tmp_path / name), importance_samples=5, **(options | changes))


def test_training_in_two_parts_is_training_in_one(tmp_path):
    whole = train.train(config_of(tmp_path, "whole", epochs=4))
    train.train(config_of(tmp_path, "parts", epochs=2))
    resumed = train.Train(**{**train.resumed(str(tmp_path / "parts")), "epochs": 4, "resume": str(tmp_path / "parts")})
    parts = train.train(resumed)
    assert whole["test"] == parts["test"]
    assert yaml.safe_load((tmp_path / "parts" / "config.yaml").read_text())["epochs"] == 4
    again = evaluate.evaluate(evaluate.Evaluate(str(tmp_path / "parts"), importance_samples=5))
    assert again == parts["test"]
    assert json.loads((tmp_path / "parts" / "evaluation-test.json").read_text())["elbo"] == again["elbo"]
    pictures = {path.name for path in (tmp_path / "parts" / "plots").glob("*.png")}
    assert pictures == {"learning_curve.png", "reconstructions.png", "prior_draws.png"}


@pytest.mark.parametrize(
    "changes",
    [
        {"model": "gaussian-vae", "estimator": "default", "binarize": "dynamic", "model_options": {"hidden": [8]}},
        {"model": "structured-prediction", "estimator": "trace-graph", "model_options": {}},
        {"model": "conditional-vae", "estimator": "pathwise", "model_options": {"condition_shape": [10]}},
        {"model": "semi-supervised-vae", "estimator": "default", "model_options": {"latent_dim": 2, "hidden": [8]}},
        {"estimator": "trace", "model_options": {"relaxed": True, "hidden": [8], "num_latents": 2, "num_classes": 3}},
        {"patience": 1, "epochs": 3, "lr": 0.5},
        {"objective": "renyi", "objective_options": {"alpha": 0.5}, "estimator": "rloo", "particles": 2},
    ],
    ids=["dynamic", "halves", "labels", "seen latents", "relaxed", "patience", "renyi"],
)
def test_other_models_train_through_the_same_door(tmp_path, changes):
    results = train.train(config_of(tmp_path, "run", **({"epochs": 1} | changes)))
    assert np.isfinite(results["test"]["elbo"])
    assert (tmp_path / "run" / "plots" / "reconstructions.png").exists()
    found = evaluate.evaluate(evaluate.Evaluate(str(tmp_path / "run"), importance_samples=5))
    assert found == results["test"]


@pytest.mark.parametrize(
    "changes",
    [
        {"model": "sequence-vae", "model_options": {"vocabulary": 2, "rnn_hidden": 4, "hidden": [8]}},
        {"model": "gaussian-vae", "model_options": {"likelihood": "categorical", "hidden": [8]}},
    ],
    ids=["tokens", "classes"],
)
def test_data_without_a_mean_train_without_pictures_of_means(tmp_path, changes):
    """Pyro's Categorical has no mean: the run failed after its last epoch, or its pictures were empty."""
    results = train.train(config_of(tmp_path, "run", **changes, estimator="pathwise", epochs=1))
    assert np.isfinite(results["test"]["elbo"])
    assert {path.name for path in (tmp_path / "run" / "plots").glob("*.png")} == {"learning_curve.png"}


def test_an_option_that_the_objective_has_not_is_one_line(tmp_path):
    with pytest.raises(BadInput, match="objective 'renyi' has no option 'alhpa'"):
        train.train(config_of(tmp_path, "run", objective="renyi", objective_options={"alhpa": 0.5}))
    assert not (tmp_path / "run").exists()


def test_a_run_names_the_guide_that_it_used(tmp_path, capsys):
    train.train(config_of(tmp_path, "one", epochs=1))
    path = tmp_path / "one" / "config.yaml"
    assert yaml.safe_load(path.read_text())["guide"] == "categorical"
    again = ["train", "--config", str(path), "--folder", str(tmp_path / "two")]
    cli.main(again)  # the run's own settings, its mark among them, for a new run
    one, two = (json.loads((tmp_path / name / "results.json").read_text())["test"] for name in ("one", "two"))
    assert one == two


def test_a_word_for_each_site_on_the_command_line(tmp_path, capsys):
    options = ["--model_options.latent_dim=2", "--model_options.hidden=[8]", "--epochs", "1", "--batch_size", "600"]
    run = ["train", "--model", "gaussian-mixture-vae", *options, "--importance_samples", "2"]
    cli.main([*run, "--estimator", "{y: enumerate, z: pathwise}", "--folder", str(tmp_path / "run")])
    assert yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["estimator"] == {
        "y": "enumerate",
        "z": "pathwise",
    }
    with pytest.raises(SystemExit):
        cli.main([*run, "--estimator", "{nowhere: enumerate}", "--folder", str(tmp_path / "bad")])
    said = capsys.readouterr().err.splitlines()[-1]
    assert "nowhere" in said and not (tmp_path / "bad").exists()


def test_draws_for_the_evaluation_are_refused_before_the_training(tmp_path, capsys):
    with pytest.raises(SystemExit):
        cli.main(["train", "--importance_samples", "0", "--folder", str(tmp_path / "run")])
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "importance_samples is 0: expected at least 1" in said
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("temperature", "words"),
    [
        ("0", "temperature is 0: expected a positive number"),
        ("linear(100)", "expected a positive number, or a schedule that begins with one"),
        ("-1", "at least 0"),
        ("nan", "cannot read the schedule"),
    ],
)
def test_a_temperature_that_is_not_positive_is_refused_before_the_training(temperature, words, tmp_path, capsys):
    options = ["--model", "categorical-vae", "--estimator", "concrete", f"--temperature={temperature}"]
    with pytest.raises(SystemExit):
        cli.main(["train", *options, "--folder", str(tmp_path / "run")])
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and words in said
    assert not (tmp_path / "run").exists()


def test_a_folder_beside_resume_is_refused_and_a_name_that_cannot_be_decoded_is_written(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    name = "ü".encode().decode("ascii", "surrogateescape")  # as Python has it in a locale without UTF-8
    short = ["--epochs", "1", "--importance_samples", "2", "--batch_size", "400", "--model_options.hidden=[8]"]
    monkeypatch.setattr("sys.argv", ["gumbo", "train", "--folder", name])
    cli.main(["train", "--folder", name, *short])
    assert "ü" in (tmp_path / name / "report.html").read_text(encoding="utf-8")
    capsys.readouterr()
    with pytest.raises(SystemExit):
        cli.main(["train", "--resume", name, "--folder", "other"])
    assert "a resumed run stays in its own" in capsys.readouterr().err and not Path("other").exists()


GUIDE = '''
import pyro, pyro.distributions as dist, torch
from torch import nn

class Flat(pyro.nn.PyroModule):
    """q(z | x) by one linear layer, in nobody's registry."""
    def __init__(self, model, width=3.0):
        super().__init__()
        self.latents, self.width = model.latents, width
        self.encoder = nn.Linear(64, 2 * model.latents["z"].size)
    def forward(self, x):
        with pyro.plate("data", len(x)):
            loc, raw = self.encoder(x.flatten(1)).chunk(2, -1)
            pyro.sample("z", dist.Normal(loc, self.width * raw.sigmoid()).to_event(1))
'''


def test_a_guide_from_elsewhere_is_named_by_its_import_path(tmp_path, monkeypatch):
    (tmp_path / "somebody.py").write_text(GUIDE)
    monkeypatch.syspath_prepend(tmp_path)
    options = {"model": "gaussian-vae", "estimator": "pathwise", "guide": "somebody.Flat", "epochs": 1}
    results = train.train(
        config_of(tmp_path, "run", **options, model_options={"hidden": [8]}, guide_options={"width": 2.0})
    )
    assert np.isfinite(results["test"]["elbo"])
    with pytest.raises(BadInput, match="guide 'somebody.Flat' has no option 'wdth'; its options: width"):
        train.train(config_of(tmp_path, "bad", **options, model_options={}, guide_options={"wdth": 2.0}))
    with pytest.raises(BadInput, match="has no 'Flt'"):
        train.train(config_of(tmp_path, "bad", **(options | {"guide": "somebody.Flt"}), model_options={}))


def test_a_guide_from_elsewhere_trains_from_the_command_line(tmp_path, monkeypatch, capsys):
    (tmp_path / "elsewhere.py").write_text(GUIDE)
    monkeypatch.syspath_prepend(tmp_path)
    words = ["train", "--guide", "elsewhere.Flat", "--guide_options.width=2.0", "--model_options.hidden=[8]"]
    cli.main([*words, "--epochs", "3", "--importance_samples", "5", "--folder", str(tmp_path / "run")])
    curve = [json.loads(line)["valid_elbo"] for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert curve[-1] > curve[0] + 1.0
    assert "ELBO" in capsys.readouterr().out


def test_evaluate_refuses_what_is_no_run(tmp_path):
    with pytest.raises(BadInput, match="is not a run folder"):
        evaluate.evaluate(evaluate.Evaluate(str(tmp_path)))
    (tmp_path / "config.yaml").write_text("experiment: compare\n")
    with pytest.raises(BadInput, match="is a run of gumbo compare, not of gumbo train"):
        evaluate.evaluate(evaluate.Evaluate(str(tmp_path)))
    (tmp_path / "config.yaml").write_text("experiment: train\nlatent: 3\n")
    with pytest.raises(BadInput, match="unknown setting 'latent'"):
        evaluate.evaluate(evaluate.Evaluate(str(tmp_path)))
    (tmp_path / "config.yaml").write_text("experiment: train\n")
    with pytest.warns(GumboWarning, match="lacks 'model', 'guide'"), pytest.raises(BadInput, match="no checkpoint"):
        evaluate.evaluate(evaluate.Evaluate(str(tmp_path)))
    with pytest.raises(UnknownName, match="split"):
        evaluate.evaluate(evaluate.Evaluate(str(tmp_path), split="tests"))


# --- list


def test_the_list_says_what_goes_with_what(monkeypatch):
    from gumbo.guides import guides
    from gumbo.models import models

    few = {"gaussian-vae": models["gaussian-vae"], "categorical-vae": models["categorical-vae"]}
    monkeypatch.setattr("gumbo.models.models", few)
    monkeypatch.setattr("gumbo.guides.guides", {name: guides[name] for name in ("normal", "categorical")})
    found = listing.catalogue()
    json.dumps(found)
    assert found["estimators"]["rloo"]["min_particles"] == 2
    assert not found["estimators"]["gumbel-softmax"]["unbiased"]
    assert found["models"]["gaussian-vae"]["latents"]["z"]["family"] == "normal"
    rows = {(row["model"], row["guide"], row["estimator"]): row["reason"] for row in found["combinations"]}
    assert rows["gaussian-vae", "normal", "pathwise"] == ""
    assert rows["categorical-vae", "categorical", "rloo"] == ""
    assert rows["categorical-vae", "categorical", "trace"] == ""
    assert "no reparameterized sampler" in rows["categorical-vae", "categorical", "pathwise"]
    assert "finite support" in rows["gaussian-vae", "normal", "enumerate"]
    assert "reparameterized" in rows["categorical-vae", "categorical", "trace-meanfield"]
    assert "latent 'z' is normal" in rows["gaussian-vae", "categorical", "*"]
    assert all("\n" not in reason for reason in rows.values())


def test_the_list_says_which_guides_data_and_estimators_fit():
    found = listing.catalogue(kinds=["models", "guides", "estimators", "data"])
    models, guides, estimators, data = (found[kind] for kind in ("models", "guides", "estimators", "data"))
    assert "categorical" in models["categorical-vae"]["guides"] and "normal" not in models["categorical-vae"]["guides"]
    assert models["neural-classifier"]["guides"] == ["none"]
    assert all(
        (model in guides[name]["models"]) == (name in models[model]["guides"]) for model in models for name in guides
    )
    assert all((model in data[name]["models"]) == (name in models[model]["data"]) for model in models for name in data)
    assert "reuters" in models["prod-lda"]["data"] and "switching" not in models["bernoulli-vae"]["data"]
    assert "digits" in models["conditional-vae"]["data"]
    assert "binarized-mnist" not in models["conditional-vae"]["data"]  # it has no labels
    assert set(models) == {model for name in data for model in data[name]["models"]}  # each can be tried
    assert "normal" in estimators["pathwise"]["families"] and "categorical" not in estimators["pathwise"]["families"]
    assert estimators["arm"]["families"] == ["bernoulli"]


def test_lists_are_tables_of_80_columns_that_break_no_name(capsys, monkeypatch):
    for kind in ("models", "guides", "estimators", "data", "objectives", "families", "stock"):
        listing.show(listing.List(kind=kind))
        said = capsys.readouterr().out
        assert max(map(len, said.splitlines())) <= 80
        names = listing.catalogue(kinds=[kind])[kind]
        assert set(names) <= set(re.findall(r"[\w+-]+", said))


# --- pictures


def size_of(path) -> tuple[int, int]:
    """Width and height of a PNG in pixels."""
    content = path.read_bytes()
    return int.from_bytes(content[16:20], "big"), int.from_bytes(content[20:24], "big")


@pytest.mark.parametrize("shape", [(1, 12), (12,), (1, 1, 12), (1, 40, 2), (3, 5, 5), (1, 28, 28)])
def test_pictures_of_any_shape_fit_a_page(shape, tmp_path):
    rows = {"data": torch.rand(10, *shape), "reconstruction": torch.rand(10, *shape)}
    width, height = size_of(plots.image_rows(tmp_path / "a.png", "rows", rows))
    assert width <= 17 * 120 and 50 <= height <= 17 * 120 and width / height < 20


def test_no_point_of_a_learning_curve_is_cut(tmp_path, monkeypatch):
    made = []
    monkeypatch.setattr(plots, "save", lambda figure, path: made.append(figure))
    curve = np.concatenate([[-500.0], np.linspace(-40, -20, 20)])[None]
    plots.learning_curves(tmp_path / "a.png", {"t": {"good": curve, "bad": 5 * curve}}, "nats")
    whole, half = made[0].axes
    low, high = whole.get_ylim()
    assert low < -2500 and high > -20
    low, high = half.get_ylim()
    assert -2500 < low < 5 * curve[0, 10] and high > -20 and "enlarged" in half.get_title()


def test_pictures_of_odd_sizes(tmp_path):
    path = plots.image_rows(tmp_path / "a.png", "few", {"one": torch.rand(3, 1, 5, 4), "two": torch.rand(2, 1, 5, 4)})
    assert path.stat().st_size > 1000
    path = plots.learning_curves(tmp_path / "b.png", {"t": {"one": np.zeros((1, 1)), "two": np.ones((2, 1))}}, "nats")
    assert path.stat().st_size > 1000
    path = plots.bars(tmp_path / "c.png", {"t": {"one": {"g": [0.0]}, "two": {"g": [3.0, 4.0]}}}, "variance")
    assert path.stat().st_size > 1000


@pytest.mark.parametrize(
    ("warm_up", "said"), [(0, "; every arm trains on the full KL"), (5, ", after KL warm-up over 5 of")]
)
def test_the_note_below_the_table_says_how_the_kl_was_weighed(warm_up, said):
    assert f"nats per datum{said}" in compare.note(compare.Compare(warm_up=warm_up))
