"""Published tables: cells that run, results that are kept, and what is refused."""

from __future__ import annotations

import fcntl
import json
import os
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from gumbo.errors import BadInput
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


def test_a_result_of_other_settings_is_left_out_and_run_again(run, tmp_path):
    asked = ("toy", "--quick", "--cells", "[0.45/rloo]")
    assert run(*asked)[0] == 0
    (path,) = tmp_path.rglob("*0.45*rloo*.json")
    found = json.loads(path.read_text())
    (setting,) = [name for name, value in found["cell"].items() if value == 0.45]
    found["value"] = 17.0
    path.write_text(json.dumps(found))
    assert " 17.00" in run(*asked)[1].out
    path.write_text(json.dumps(found | {"cell": found["cell"] | {setting: 0.25}}))
    status, said = run(*asked, "--show")
    assert status == 0 and " 17.00" not in said.out and "other settings and is left out" in said.err
    status, said = run(*asked)
    assert status == 0 and " 17.00" not in said.out and "other settings and is run again" in said.err
    assert json.loads(path.read_text())["cell"][setting] == 0.45


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"cell": {}}', "[" * 9999], ids=range(5))
def test_a_result_that_cannot_be_read_is_one_line(run, tmp_path, content):
    path = tmp_path / "runs" / "reproduce" / "quick-results" / "toy" / "0.45-rloo-seed0.json"
    path.parent.mkdir(parents=True)
    path.write_text(content)
    status, said = run("toy", "--quick", "--cells", "[0.45/rloo]")
    assert status == 2 and said.err.count("\n") == 1 and f"{path.name} is no result of gumbo reproduce" in said.err


@pytest.mark.parametrize(
    ("seeds", "words"), [("[0, 1, 0]", "seeds has 0 twice: name it once"), ("[]", "seeds is empty")]
)
def test_seeds_that_would_count_twice_or_are_none_are_refused(run, seeds, words):
    status, said = run("toy", "--quick", "--cells", "[0.45/rloo]", "--seeds", seeds)
    assert status == 2 and said.err.count("\n") == 1 and words in said.err


def test_an_interruption_says_what_is_kept_and_how_to_go_on(run, monkeypatch):
    cells, ran = ("toy", "--quick", "--cells", "[0.45/score, 0.45/rloo]"), reproduce._run

    def once(config, table, cell, seed):
        if cell.name == "0.45/rloo":
            raise KeyboardInterrupt
        return ran(config, table, cell, seed)

    monkeypatch.setattr(reproduce, "_run", once)
    status, said = run(*cells)
    assert status == 130
    kept = "1 of 2 cells are finished and kept; the same command runs the others"
    assert said.err.splitlines()[-1] == f"gumbo reproduce: interrupted by SIGINT; {kept}"


def test_cells_of_another_process_are_left_to_it_and_the_others_run(run, tmp_path, monkeypatch):
    cells = ("toy", "--quick", "--cells", "[0.45/score, 0.45/rloo, 0.45/disarm]")
    folder = tmp_path / "runs" / "reproduce" / "quick" / "toy"
    kept = tmp_path / "runs" / "reproduce" / "quick-results" / "toy"
    held = folder / "0.45-score-seed0"
    held.mkdir(parents=True)
    ran = reproduce._run

    def while_another_finishes(config, table, cell, seed):
        numbers = ran(config, table, cell, seed)
        if cell.name == "0.45/disarm":
            path = kept / "0.45-rloo-seed0.json"
            (rloo,) = tables["toy"].chosen(["0.45/rloo"])
            found = {"cell": reproduce.asdict(rloo), "seed": 0, "value": 17.0, "steps": 1, "share": 1.0, "beside": {}}
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(found))
        return numbers

    monkeypatch.setattr(reproduce, "_run", while_another_finishes)
    with open(held / ".lock", "w") as file:  # what FolderLock does in another process
        fcntl.flock(file, fcntl.LOCK_EX)
        file.write("process 17")
        file.flush()
        status, said = run(*cells)
    assert status == 0
    assert "toy: 0.45/score seed 0: left to process 17, which runs it" in said.err
    assert "toy: 0.45/rloo seed 0: finished by another process meanwhile" in said.err
    assert "0.45/disarm" in said.out and " 17.00" in said.out and "0.45/score" not in said.out
    assert [path.name for path in folder.iterdir()] == [held.name]  # a cell that keeps nothing leaves no folder
    assert run(*cells)[0] == 0 and (kept / "0.45-score-seed0.json").exists() and not held.exists()


def test_a_command_of_a_locale_without_utf8_is_in_the_report(run, tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", ["gumbo", "reproduce", "gr\udcc3\udcb6n"])  # what Python makes of grön there
    assert run("toy", "--quick", "--cells", "[0.45/score]")[0] == 0
    assert "grön" in (tmp_path / "runs" / "reproduce" / "toy" / "report.html").read_text(encoding="utf-8")


def test_a_cell_that_does_not_exist_is_refused_in_one_line(run):
    status, said = run("iwae", "--cells", "[three-layers]")
    assert status == 2 and said.err.count("\n") == 1 and "three-layers" in said.err and "one-layer/stl-k1" in said.err


def test_showing_what_was_found_trains_nothing(run):
    status, said = run("arm", "--show")
    assert status == 0 and "arm: no finished cell in " in said.err


@pytest.mark.parametrize("word", ["enumerate", "rloo", "labels-alone"])
def test_an_interrupted_accuracy_goes_on_with_the_same_numbers(word, tmp_path, monkeypatch):
    from gumbo.experiments.reproduction import semi_supervised

    noise = torch.Generator().manual_seed(0)
    x, images = (torch.rand(n, 1, 28, 28, generator=noise).round() for n in (300, 200))
    monkeypatch.setattr(semi_supervised, "digits", lambda: (x, images, torch.arange(200) % 10))
    (cell,) = tables["semi-supervised"].chosen([f"accuracy/{word}"])
    whole = cell.run(1, 6, tmp_path / "whole")
    cell.run(1, 3, tmp_path / "cut")
    cut = cell.run(1, 6, tmp_path / "cut")
    assert [point["step"] for point in cut["progress"]] == [3, 6]
    assert cut["progress"] == whole["progress"] and cut["value"] == whole["value"]


@needs_data
def test_labels_of_the_fixed_test_digits_are_checked_against_gray_ones(monkeypatch):
    from gumbo.experiments import data
    from gumbo.experiments.reproduction import semi_supervised

    unlabelled, images, labels = semi_supervised.digits()
    assert len(unlabelled) == 50_000 and labels.bincount().tolist()[:2] == [980, 1135]
    load = data.load

    def shuffled(name, **options):
        found = load(name, **options)
        return replace(found, test=found.test.flip(0)) if name == "binarized-mnist" else found

    monkeypatch.setattr(data, "load", shuffled)
    with pytest.raises(BadInput, match="are not those of mnist"):
        semi_supervised.digits()


@pytest.mark.parametrize("name", list(tables))
def test_cells_have_names_of_their_own(name):
    names = [cell.name for cell in tables[name].cells]
    assert len(set(names)) == len(names)
    assert len({cell.replace("/", "-") for cell in names}) == len(names)


def test_the_toy_lists_every_estimator_that_serves_a_coin_and_knows_its_gradient(run, tmp_path):
    words = {cell.estimator for cell in tables["toy"].cells}
    assert {"score", "rloo", "disarm", "rebar", "gumbel-softmax", "enumerate"} <= words and "pathwise" not in words
    status, said = run("toy", "--quick", "--cells", "[0.45/enumerate,0.45/rloo]")
    assert status == 0 and "q(b = 1)" in said.out
    found = {path.name: json.loads(path.read_text()) for path in tmp_path.rglob("0.45-*.json")}
    beside = found["0.45-enumerate-seed0.json"]["beside"]
    assert beside["gradient"] == pytest.approx(beside["exact"]) and beside["variance"] < 1e-12
    beside = found["0.45-rloo-seed0.json"]["beside"]
    assert abs(beside["gradient"] - beside["exact"]) < 4 * beside["± se"]


@pytest.mark.parametrize("name", [cell.name for cell in tables["question"].cells if cell.estimator == "score"])
def test_the_gradients_that_the_question_compares_with_are_exact(name):
    from scipy import integrate, stats

    from gumbo.experiments.reproduction.question import exact_gradient

    (cell,) = tables["question"].chosen([name])
    functions = {"square": np.square, "sin": lambda z: np.sin(cell.frequency * z), "jump": lambda z: 1.0 * (z > 1)}

    def expectation(theta):
        law = stats.norm(theta, 1) if cell.site == "normal" else stats.gamma(2, scale=1 / theta)
        ends = (-9, 10) if cell.site == "normal" else (0, 45)
        integrand = lambda z: functions[cell.function](z) * law.pdf(z)  # noqa: E731
        return integrate.quad(integrand, *ends, points=[1.0], limit=2000, epsabs=1e-13)[0]

    theta = 0.5 if cell.site == "normal" else 1.0
    slope = (expectation(theta + 1e-4) - expectation(theta - 1e-4)) / 2e-4
    assert exact_gradient(cell) == pytest.approx(slope, rel=1e-5, abs=1e-8)


def test_the_question_is_answered_by_variance_and_time_and_tells_bias(run):
    status, said = run("question", "--quick", "--cells", "[normal/jump/*,normal/sin-16/*]")
    assert status == 0
    lines = said.out.splitlines()
    assert max(map(len, lines)) <= 80
    answer = " ".join(said.out[said.out.index("normal: by variance") : said.out.index("gamma: ")].split())
    assert "at sin-16;" in answer and answer.endswith("biased at jump.")


@pytest.mark.parametrize("name", sorted(tables))
def test_the_committed_results_fit_a_terminal_of_80_columns(name, capsys):
    results = Path(__file__).parents[2] / "experiments" / "results"
    reproduce.main([name, "--show", "--seeds", "[0,1,2]", "--results", str(results)])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) > 3 and max(map(len, lines)) <= 80


def test_all_tables_run_by_one_command_each_with_its_own_budget(run, tmp_path):
    cells = '["toy/0.45/score","question/normal/jump/score"]'
    status, said = run("all", "--quick", "--steps", "5000", "--cells", cells)
    assert status == 0 and "q(b = 1)" in said.out and "0.45/score" in said.out and "normal/jump/score" in said.out
    found = {path.parent.name: json.loads(path.read_text()) for path in (tmp_path / "runs").rglob("*.json")}
    # The toy's own budget is 1,000 steps, and its command names its own table.
    assert found["toy"]["command"].startswith("gumbo reproduce toy ") and "--steps" not in found["toy"]["command"]
    assert set(found) == {"toy", "question"}
    status, said = run("all", "--quick", "--cells", "[0.45/score]")
    assert status == 2 and said.err.count("\n") == 1 and "TABLE/CELL" in said.err


@pytest.mark.slow
@needs_data
@pytest.mark.parametrize("name", list(tables))
def test_every_table_runs_quickly(name, run):
    status, said = run(name, "--quick")
    assert status == 0 and all(re.search(folded_name(cell.name), said.out) for cell in tables[name].cells)


def folded_name(name):
    """A pattern for a name that goes on in the next line behind a mark of punctuation."""
    return r"(?: .*\n|\n)?".join(map(re.escape, re.split(r"(?<=\W|_)", name)))


def flat_regressions():
    """Programs whose coefficients and noise have flat priors, with posteriors in closed form."""
    from gumbo.experiments.reproduction import programs_of_posteriordb as programs

    kinds = ("earnings", "mesquite", "nes", "kidiq_with")
    return [name for name in programs.PROGRAMS if name.startswith(kinds)]


def traced(program, **values):
    import pyro

    return pyro.poutine.trace(pyro.poutine.condition(program.model, values)).get_trace(program.y).nodes


@pytest.mark.parametrize("name", flat_regressions())
def test_references_of_flat_regressions_are_their_closed_forms(name):
    import torch

    from gumbo.experiments.reproduction.posteriors import program, references

    made, known = program(name), references()["references"][name]["parameters"]
    count = len([parameter for parameter in known if parameter.startswith("beta")])
    one = torch.tensor(1.0).double()
    columns = [traced(made, beta=unit, sigma=one)["y"]["fn"].base_dist.loc for unit in torch.eye(count).double()]
    x = torch.stack(columns, -1)
    precision = x.mT @ x
    beta = torch.linalg.solve(precision, x.mT @ made.y)
    # p(sigma² | y) is inverse gamma with (n − p − 1)/2 and half the squared residuals.
    variance = ((made.y - x @ beta) ** 2).sum() / (len(x) - count - 3)
    sd = (variance * torch.linalg.inv(precision).diagonal()).sqrt()
    for k in range(count):
        of = known[f"beta[{k + 1}]"]
        # 10,000 draws: errors of 0.01 standard deviations, and of 0.7 % of one.
        assert abs(of["mean"] - beta[k]) < 0.045 * sd[k] and of["sd"] == pytest.approx(sd[k].item(), rel=0.035)


def test_references_were_long_enough():
    from gumbo.experiments.reproduction.posteriors import references

    known = references()["references"]
    assert len(known) >= 20 and all(one["rhat"] < 1.01 and one["ess_bulk"] > 1000 for one in known.values())


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    # Without the centered eight schools, which have no mode and are compared with the others below.
    [cell.posterior for cell in tables["posteriors"].chosen(["*/mode"])],
)
def test_programs_have_the_posteriors_of_their_references(name):
    """Draws at the mode, weighted by importance, have the reference's moments."""
    import pyro
    import torch

    from gumbo.experiments.reproduction.posteriors import fitted, program, references

    made, known = program(name), references()["references"][name]["parameters"]
    with torch.random.fork_rng(), pyro.get_param_store().scope():
        torch.manual_seed(0)
        kind = "full-rank" if name.startswith("eight") else "mode"  # the eight schools have no mode
        normal = fitted(made.model, made.y, kind, 2000, 0)
        count = 20_000
        with torch.no_grad(), pyro.plate("draws", count, dim=-1):
            loc, root = normal.loc, normal.scale[:, None] * normal.scale_tril
            # Heavier tails than the posterior's: t with five degrees of freedom.
            noise = torch.distributions.StudentT(torch.tensor(5.0).double()).sample((count, len(loc)))
            z = loc + 1.1 * noise @ root.mT
            q = torch.distributions.StudentT(torch.tensor(5.0).double()).log_prob(noise).sum(-1)
            values = {}
            p = torch.zeros(count).double()
            for site, unconstrained in normal._unpack_latent(z):
                transform = torch.distributions.biject_to(site["fn"].support)
                values[site["name"]] = transform(unconstrained)
                jacobian = transform.log_abs_det_jacobian(unconstrained, values[site["name"]])
                p = p + jacobian.reshape(count, -1).sum(-1)
            trace = pyro.poutine.trace(pyro.poutine.condition(made.model, values)).get_trace(made.y)
            p = p + joint(trace, count)
            weights = (p - q).softmax(0)
        draws = made.reported(values)
    effective = 1 / (weights**2).sum()
    assert effective > 50
    for parameter, of in known.items():
        base, _, index = parameter.partition("[")
        draw = draws[base][:, int(index[:-1]) - 1] if index else draws[base]
        mean = (weights * draw).sum().item()
        assert abs(mean - of["mean"]) < (5 / effective**0.5 + 0.05) * of["sd"], parameter


def joint(trace, count: int):
    """log p of each of the draws."""
    import torch

    trace.compute_log_prob()
    found = torch.zeros(count).double()
    for name, site in trace.nodes.items():
        if site["type"] == "sample" and name != "draws":
            found = found + site["log_prob"]
    return found


def test_the_eight_schools_are_one_model_in_two_forms():
    import torch

    from gumbo.experiments.reproduction.posteriors import program

    centered, other = (program(f"eight_schools-eight_schools_{form}") for form in ("centered", "noncentered"))
    z, mu, tau = torch.randn(8).double(), torch.tensor(2.0).double(), torch.tensor(3.0).double()
    densities = []
    for made, values in ((centered, {"theta": mu + tau * z}), (other, {"theta_trans": z})):
        trace_of = traced(made, mu=mu, tau=tau, **values)
        densities.append(
            sum(
                site["fn"].log_prob(site["value"])
                for site in trace_of.values()
                if "fn" in site and site["type"] == "sample"
            )
        )
    assert densities[0] == pytest.approx((densities[1] - 8 * tau.log()).item())


def test_guides_of_posteriors_are_fitted_to_unshuffled_data():
    """A mean-field guide finds a regression's coefficients, which it does not where y is permuted against x."""
    import pyro
    import torch

    from gumbo.experiments.reproduction.posteriors import fitted, program, reported

    made = program("linear")
    with torch.random.fork_rng(), pyro.get_param_store().scope():
        torch.manual_seed(0)
        draws = reported(made, fitted(made.model, made.y, "mean-field", 300, 0), 500)
    found = torch.stack([draws[f"beta[{k}]"].mean() for k in range(1, 21)])
    x = torch.stack(
        [
            traced(made, beta=unit, sigma=torch.tensor(1.0).double())["y"]["fn"].base_dist.loc
            for unit in torch.eye(20).double()
        ],
        -1,
    )
    assert (found - torch.linalg.lstsq(x, made.y.unsqueeze(-1)).solution.squeeze(-1)).abs().max() < 0.3


def arm_of(name: str, published: float | None, values, estimator: str = "rloo", seconds: float = 1.0, steps: int = 100):
    """Runs of a trained cell, one a seed, whose curves fall by a nat a point."""
    cell = {"name": name, "published": published, "estimator": estimator, "objective": "elbo", "particles": None}
    return [
        {
            "cell": cell,
            "seed": seed,
            "value": value,
            "steps": steps,
            "ms_per_step": 10 * seconds,
            "curve": [{"step": 10 * k, "train": -value - (10 - k)} for k in range(1, 11)],
        }
        for seed, value in enumerate(values)
    ]


def test_orderings_are_confirmed_contradicted_or_undecided_by_their_seeds():
    from gumbo.experiments.reproduction.orderings import conclude, orderings

    found = [
        *arm_of("net/a", 100.0, [90.0, 90.1, 89.9]),
        *arm_of("net/b", 101.0, [92.0, 92.1, 91.9]),
        *arm_of("net/c", 99.0, [95.0, 95.1, 94.9]),
        *arm_of("net/d", 98.0, [80.0, 95.0, 88.0]),
        *arm_of("net/ours", None, [85.0, 85.1, 84.9]),
        *arm_of("net/few", 97.0, [85.0, 85.1]),
        *arm_of("other/a", 100.0, [80.0, 80.1, 79.9]),
    ]
    verdicts = {(one.one, one.other): one.verdict(one.steps) for one in orderings(found)}
    assert verdicts["net/a", "net/b"] == "confirmed" and verdicts["net/a", "net/c"] == "contradicted"
    assert verdicts["net/a", "net/d"] == "undecided" and verdicts["net/a", "net/ours"] == "ours ahead"
    assert len(verdicts) == 10  # pairs of five arms: none with two seeds, and none of another group
    said = conclude(found)
    assert "Published orderings at equal steps, 6 pairs: 1 confirmed, 2 contradicted, 3 undecided." in said
    assert "2 seeds only, not ordered: net/few." in said


def test_equal_time_is_where_the_faster_arm_ends_and_relaxed_bounds_are_not_compared():
    from gumbo.experiments.reproduction.orderings import orderings

    slow = arm_of("net/slow", 100.0, [90.0, 90.1, 89.9], seconds=2.0)
    fast = arm_of("net/fast", 101.0, [92.0, 92.1, 91.9])
    (pair,) = orderings([*slow, *fast])
    # The slow one has come half its way by then: five points, a nat each.
    assert pair.steps.mean == pytest.approx(-2.0) and pair.time.mean == pytest.approx(3.0)
    assert pair.verdict(pair.steps) == "confirmed" and pair.verdict(pair.time) == "contradicted"
    relaxed = arm_of("net/relaxed", 99.0, [91.0, 91.1, 90.9], estimator="gumbel-softmax")
    (pair,) = orderings([*fast, *relaxed])
    assert pair.time is None and pair.verdict(pair.time) == "not comparable"
    for run in (*fast, *relaxed):
        for point in run["curve"]:
            point["valid"] = point["train"]
    (pair,) = orderings([*fast, *relaxed])
    assert pair.time.mean == pytest.approx(1.0)
