"""The benchmarks at tiny settings: they run, rivals have the same gradients, and the page is what the numbers give."""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
import json
import math
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

FOLDER = Path(__file__).resolve().parents[1] / "benchmarks"
SHAPE = (1, 6, 6)
WORKLOADS = ("gaussian", "categorical", "belief")


@pytest.fixture(autouse=True)
def scripts(monkeypatch):
    """The scripts find each other as they do when one of them is run."""
    before = set(sys.modules)
    monkeypatch.syspath_prepend(str(FOLDER))
    yield
    for name in set(sys.modules) - before:
        if str(FOLDER) in str(getattr(sys.modules[name], "__file__", "")):
            del sys.modules[name]


def script(name: str):
    return importlib.import_module(name)


def run(*command: str) -> str:
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


# elimination.py


@pytest.mark.slow
def test_the_rivals_of_elimination_have_one_loss(tmp_path):
    small = ("--lengths", "4", "--states", "2", "--rounds", "1", "--float64", "--out", str(tmp_path / "found.json"))
    said = run(str(FOLDER / "elimination.py"), *small)
    ours, stock = re.search(r"losses (\S+) and (\S+)", said).groups()
    assert ours == stock and "ratio" in said


# bernoulli_layer.py


def test_the_tables_of_layers_compare_words_of_equal_model_runs(tmp_path):
    layers, found, page = script("bernoulli_layer"), tmp_path / "found.json", tmp_path / "page.md"
    assert [*map(layers.model_runs, ("rloo K=4", "disarm", "disarm K=4", "arms, 3 draws", "relax"))] == [
        4,
        2,
        8,
        3,
        None,
    ]
    variances = {"rloo K=2": 8.0, "disarm": 6.0, "arms, 3 draws": 3.0}
    rows = [
        {"estimator": e, "variance": v, "snr": 1.0, "ms": 2.0, "variance x ms": 2 * v} for e, v in variances.items()
    ]
    found.write_text(json.dumps({"layer": "coins", "stops": {"500": rows}}))
    page.write_text("Findings.\n" + layers.TABLES + "old tables")
    layers.write_page([found], page)
    said = page.read_text()
    assert said.startswith("Findings.\n") and "old tables" not in said and "## coins, after 500 steps" in said
    assert "| `disarm` | 6 | 1 | 2 | 12 | 0.750 |" in said and "| `arms, 3 draws` | 3 | 1 | 2 | 6 |  |" in said


# relaxation_bias.py


def test_the_reference_of_the_bias_is_the_gradient_of_the_bound():
    bias = script("relaxation_bias")
    model, guide, images = bias.trained(1, latents=2, classes=3)
    problem = bias.Problem(model, guide, images[:2])
    leaf = problem.logits.clone().requires_grad_()
    log_q = (problem.codes * leaf.log_softmax(-1)).sum((-1, -2))
    bound = (log_q.exp() * problem.cost(problem.codes.expand(-1, 2, -1, -1), leaf)).sum()
    assert torch.allclose(problem.exact(), torch.autograd.grad(bound, leaf)[0], rtol=0, atol=1e-10)
    rows = {(row["estimator"], row["temperature"]): row for row in bias.measure(problem)}
    assert rows["reinmax", 1.0]["bias"] < 0.2 < rows["gumbel-softmax", 3.0]["bias"]
    assert rows["rloo K=2", None]["std"] > 0 and rows["reinmax", 1.0]["error"] == 0


# step.py


@pytest.mark.parametrize("name", WORKLOADS)
def test_the_version_by_hand_has_gumbos_gradients(name):
    step = script("step")
    step.check_same_gradients(step.WORKLOADS[name], shape=SHAPE)


@pytest.mark.parametrize("name", WORKLOADS)
def test_a_wrong_version_by_hand_is_found(name):
    step = script("step")

    def wrong(model, guide):
        hand = step.WORKLOADS[name].by_hand(model, guide)
        with torch.no_grad():
            hand.encoder[-1].bias[::3].add_(0.01)
        return hand

    with pytest.raises(AssertionError):
        step.check_same_gradients(dataclasses.replace(step.WORKLOADS[name], by_hand=wrong), shape=SHAPE)


def test_a_baseline_that_includes_its_own_draw_is_found():
    step = script("step")

    class Biased(step._by_hand.Categorical):
        def forward(self, x, noise):
            value, objective = super().forward(x, noise)
            return value, objective * (self.particles - 1) / self.particles

    biased = dataclasses.replace(step.WORKLOADS["categorical"], by_hand=lambda m, g: Biased(m, g, step.PARTICLES))
    with pytest.raises(AssertionError, match="parameter"):
        step.check_same_gradients(biased, shape=SHAPE)


def test_the_jax_version_has_the_same_gradients():
    if importlib.util.find_spec("numpyro") is None:
        pytest.skip("NumPyro is not installed")
    # In a process of its own: JAX starts threads, and warns of things that are not ours.
    checks = f"[step.check_same_gradients_in_jax(name, shape={SHAPE}) for name in {WORKLOADS}]"
    run("-c", f"import sys; sys.path.insert(0, {str(FOLDER)!r}); import step; {checks}")


@pytest.mark.parametrize("name", WORKLOADS)
def test_a_step_is_measured(name, capsys):
    step = script("step")
    rows = step.measure(name, 256, "cpu", rounds=2, without=("compile", "jax"))
    assert [row["rival"] for row in rows] == [step.HAND, step.STOCK, step.STOCK_UNCHECKED, step.EAGER]
    assert all(0 < row["fastest"] <= row["q25"] <= row["median"] <= row["q75"] for row in rows)
    step.show(rows)
    assert "gumbo ÷ PyTorch by hand" in capsys.readouterr().out


def test_rivals_start_alike_and_train():
    step = script("step")
    workload = step.WORKLOADS["belief"]
    x = step.make_batch(8)
    hand = workload.by_hand(*step.make_pair(workload))
    before = [parameter.clone() for parameter in hand.parameters()]
    model, guide = step.make_pair(workload)
    assert torch.equal(before[0], model.decoder["x"][0].weight) or torch.equal(before[0], model.decoder_prior_logits)
    step.hand_step(hand, x, compiled=False)()
    assert not any(torch.equal(old, new) for old, new in zip(before, hand.parameters(), strict=True))


@pytest.mark.parametrize("name", WORKLOADS)
def test_the_profile_tells_products_from_the_rest(name, capsys):
    step = script("step")
    found = step.profile(name, 128, steps=2, rounds=2, without=("compile", "jax"))
    for rival in (step.HAND, step.EAGER):
        kinds = found["rivals"][rival]["kinds"]
        assert kinds["matrix products"] > 0 and kinds["Adam"] > 0 and kinds["noise"] > 0
    assert step.kind_of("graph_0_cpp_fused_sqrt_sub_1") != step.kind_of("graph_0_cpp_fused_relu_2")
    step.show_profile(found)
    assert "matrix products alone: torch" in capsys.readouterr().out


# start.py


@pytest.mark.slow
def test_two_starts_are_measured(tmp_path):
    run(str(FOLDER / "start.py"), "--workloads", "belief", "--batch", "8", "--out", str(tmp_path))
    (row,) = json.loads((tmp_path / "start.json").read_text(encoding="utf-8"))["rows"]
    for one in row["starts"]:
        assert 0 < one["capture"] < one["to the first step"]


# evaluation.py


@pytest.mark.parametrize("name", ["gaussian", "coins"])
@pytest.mark.parametrize("draws", [1, 6])
def test_the_evaluation_by_hand_has_the_same_numbers(name, draws, monkeypatch):
    monkeypatch.delenv("GUMBO_DATA", raising=False)
    script("evaluation").check_same_numbers(name, draws)


# scaling.py


def test_the_exponent_is_that_of_the_larger_half():
    scaling = script("scaling")
    sizes = [1, 2, 4, 8, 16, 32]
    assert scaling.exponent(sizes, [100 if size < 8 else size**2 for size in sizes]) == pytest.approx(2)
    assert scaling.exponent([3], [1.0]) is None


def test_a_series_is_measured_point_by_point(capsys):
    scaling = script("scaling")
    series = dataclasses.replace(scaling.SERIES["sites"], up_to={"stock TraceGraph_ELBO": 4})
    found = scaling.measure(series, rounds=2, sizes=(2, 4, 6), patience=60.0)
    assert found["rivals"]["score"]["sizes"] == [2, 4, 6]
    assert found["rivals"]["stock TraceGraph_ELBO"]["sizes"] == [2, 4]
    mib = {rival: [1.0] * len(row["sizes"]) for rival, row in found["rivals"].items()}
    scaling.show(scaling.with_memory(found, mib))
    assert "rloo, K = 4" in capsys.readouterr().out


def test_a_slow_step_is_taken_once():
    scaling = script("scaling")
    found = scaling.measure(scaling.SERIES["sites"], rounds=3, sizes=(2, 3), patience=0.0)
    assert [one["rounds"] for one in found["rivals"]["score"]["ms"]] == [1, 1]


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="memory is read from Linux's /proc")
def test_memory_grows_with_what_a_step_holds():
    scaling = script("scaling")
    timing = script("_timing")

    def holds(mib):
        return timing.Rival(lambda n: torch.ones(mib, 2**18))

    small, large = scaling.peak_growth(holds(8)), scaling.peak_growth(holds(64))
    if small is None:
        pytest.skip("the peak cannot be reset here")
    assert 7 < small < 24 and 60 < large < 80


def test_the_chain_is_one_site_a_coin(param_store):
    import pyro

    model, guide = script("scaling").chain(5)
    assert [name for name in pyro.poutine.trace(model).get_trace().nodes if name.startswith("z")] == [
        f"z{i}" for i in range(5)
    ]
    assert not {name for name, _ in model.named_parameters()} & {name for name, _ in guide.named_parameters()}


# time_to_bound.py


def test_the_race_on_digits():
    bound = script("time_to_bound")
    images = bound.load("digits", binarize="static")
    start = (images.train, images.test, 0, 8)
    stocks = {name: bound.make_runner("stock", settings, *start) for name, settings in bound.STOCKS.items()}
    ours = bound.make_runner("ours", bound.OURS, *start)
    assert len({runner.curve[0]["bound"] for runner in (ours, *stocks.values())}) == 1
    found = bound.race(stocks, ours, epochs=2)
    for name, stock in stocks.items():
        told = found["stocks"][name]
        assert stock.steps == told["steps"] == 2 * stock.per_epoch
        assert told["best"] == max(point["bound"] for point in told["curve"]) > told["curve"][0]["bound"]
        assert told["seconds"] <= stock.seconds
        assert (told["times_faster"] is None) == (ours.best < told["best"])


@pytest.mark.slow
def test_the_race_takes_the_winners_of_the_tuning(tmp_path, monkeypatch):
    bound = script("time_to_bound")
    assert bound.chosen(tmp_path) == (bound.STOCKS, bound.OURS)
    images = bound.load("digits", binarize="static")
    monkeypatch.setattr(bound, "OUR_CHOICES", [{"estimator": "rloo", "particles": 2, "lr": 3e-2}])
    found = bound.tune(images.train[:300], images.valid, epochs=3, latents=6, compiled=False)
    assert sorted(entry["epochs"] for entry in found["stock"]) == [1, 1, 3, 3, 3, 3]
    (tmp_path / "time-to-bound-tuning.json").write_text(json.dumps(found))
    stocks, ours = bound.chosen(tmp_path)
    for baseline, settings in stocks.items():
        bounds = {e["lr"]: e["bound"] for e in found["stock"] if e["baseline"] == baseline}
        assert settings == {"baseline": baseline, "lr": max(bounds, key=bounds.get)}
    reached = found["ours"][0]["seconds"] is not None
    assert ours == ({"estimator": "rloo", "particles": 2, "lr": 3e-2} if reached else bound.OURS)


@pytest.mark.parametrize("baseline", ["decaying average", "network"])
def test_each_baseline_of_the_stock_trains(baseline):
    bound = script("time_to_bound")
    images = bound.load("digits", binarize="static")
    settings = {"baseline": baseline, "lr": 3e-3}
    runner = bound.make_runner("stock", settings, images.train[:300], images.test, seed=0, latents=8)
    network = [] if runner.step.network is None else list(runner.step.network.parameters())
    before = [parameter.clone() for parameter in network]
    assert runner.go(12) > runner.curve[0]["bound"]
    assert not any(torch.equal(old, new) for old, new in zip(before, network, strict=True))
    assert any("avg" in name for name in runner.step.store["params"]), "its average is not kept from step to step"


def test_the_two_see_the_same_batches():
    bound = script("time_to_bound")
    seen: dict[str, list] = {"stock": [], "ours": []}
    rows = torch.bernoulli(torch.full((300, 1, 4, 4), 0.5))
    for kind, settings in (("stock", bound.STOCKS["network"]), ("ours", bound.OURS)):
        runner = bound.make_runner(kind, settings, rows, rows[:50], seed=3, latents=4)
        step = runner.step

        class Watching:
            around = step.around

            def __call__(self, x, step=step, kind=kind):
                seen[kind].append(x)
                step(x)

        runner.step = Watching()
        runner.go(2)
        runner.go(2)
    assert len(seen["ours"]) == 4
    assert all(torch.equal(a, b) for a, b in zip(seen["stock"], seen["ours"], strict=True))


def test_the_time_to_a_target_is_interpolated():
    bound = script("time_to_bound")
    runner = bound.Runner.__new__(bound.Runner)
    runner.curve = [
        {"steps": 0, "seconds": 0.0, "bound": -100.0},
        {"steps": 5, "seconds": 1.0, "bound": -90.0},
        {"steps": 10, "seconds": 2.0, "bound": -80.0},
    ]
    assert runner.seconds_to(-85.0) == pytest.approx(1.5)
    assert runner.seconds_to(-90.0) == pytest.approx(1.0)
    assert runner.seconds_to(-79.0) is None


# performance.py


def rows_of(workload: str, **medians: float) -> list[dict]:
    names = {"hand": "PyTorch by hand", "stock": "Pyro SVI", "eager": "gumbo", "compiled": "gumbo, compiled"}
    numbers = {"q25": 1.0, "q75": 1.0, "fastest": 1.0, "rounds": 3, "turn": 5, "first_turn_s": 1.0}
    return [
        {"workload": workload, "batch": 32, "rival": names[key], "median": value} | numbers
        for key, value in medians.items()
    ]


def test_the_page_takes_its_verdicts_from_the_numbers(tmp_path):
    performance = script("performance")
    facts = {"device": "a machine", "machine": "2 threads", "threads": 2}
    for compiled, said in ((0.59, "yes"), (0.601, "**no**")):
        rows = rows_of("gaussian", hand=1.0, stock=2.0, eager=1.5, compiled=compiled)
        (tmp_path / "step.json").write_text(json.dumps(facts | {"rows": rows}))
        text = performance.page(tmp_path)
        assert f"gumbo, compiled ÷ PyTorch by hand ≤ 0.6 | {compiled:.3f} | {said} |" in text
        assert "gumbo ÷ Pyro SVI ≤ 0.6 | 0.750 | **no** |" in text
        assert "batch 128: gumbo ÷ Pyro SVI ≤ 0.6 | – | not measured |" in text


def test_one_thread_is_not_several(tmp_path):
    facts = {"device": "a machine", "machine": "x86_64, 1 threads, torch 2.5", "threads": 1}
    (tmp_path / "step.json").write_text(json.dumps(facts | {"rows": rows_of("gaussian", hand=1.0)}))
    assert "x86_64, 1 thread, torch 2.5" in script("performance").page(tmp_path)
    count = torch.get_num_threads()
    assert f", {count} thread{'' if count == 1 else 's'}, " in script("_timing").machine()


def test_the_page_says_what_was_not_measured(tmp_path):
    text = script("performance").page(tmp_path)
    for file in ("step.json", "scaling.json", "time-to-bound.json", "step-cuda.json"):
        assert f"benchmarks/results/{file}`" in text
    assert "Not measured without a GPU" in text


def test_the_page_shows_the_gpu_by_its_name(tmp_path):
    rows = rows_of("gaussian", stock=20.0, compiled=1.0)
    for row in rows:
        row["batch"] = 128
    (tmp_path / "step-cuda.json").write_text(json.dumps({"device": "Card 9000", "machine": "m", "rows": rows}))
    text = script("performance").page(tmp_path)
    assert "Card 9000" in text and "≥ 10 | 20.000 | yes |" in text


@pytest.mark.parametrize("ours, said", [(None, "– | **no** |"), (11.0, "4.545 | **no** |"), (5.0, "10.000 | yes |")])
def test_the_page_judges_the_time_to_the_bound(tmp_path, ours, said):
    facts = {"device": "a machine", "machine": "2 threads", "data": "digits", "latents": 8, "epochs": 2, "batch": 100}
    facts |= {"compiled": True, "ours": {"estimator": "rloo", "particles": 4, "lr": 1e-3}}
    facts["stocks"] = {"decaying average": {"baseline": "decaying average", "lr": 1e-3}}
    faster = None if ours is None else 50.0 / ours
    stock = {"best": -100.0, "ms": 5.0, "seconds": 50.0, "our_seconds": ours, "times_faster": faster}
    run_of = {"seed": 0, "stocks": {"decaying average": stock}, "ours": {"ms": 1.0, "best": -101.0, "compiling": 9.0}}
    (tmp_path / "time-to-bound.json").write_text(json.dumps(facts | {"runs": [run_of]}))
    tuned = [{"estimator": "rloo", "particles": k, "lr": 1e-3, "seconds": 2.5, "steps": 70} for k in (0, 4)]
    tuned[0]["seconds"] = None
    stock_tuned = [{"baseline": "network", "lr": 1e-3, "bound": -98.5, "epochs": 24}]
    (tmp_path / "time-to-bound-tuning.json").write_text(json.dumps({"epochs": 24, "stock": stock_tuned, "ours": tuned}))
    text = script("performance").page(tmp_path)
    assert "| `rloo`, K = 4, lr 0.001 | 2.50 | 70 |" in text and "| -98.50 | 24 |" in text
    assert "Given up at three times the fastest so far: `rloo`, K = 0, lr 0.001." in text
    assert f"≥ 5 | {said}" in text
    assert ("not reached" in text) == (ours is None)
    assert ("With it counted, the least of all the factors above is 3.6." in text) == (ours == 5.0)


def test_the_page_plots_the_history(tmp_path):
    timing, performance = script("_timing"), script("performance")
    facts = timing.surroundings()
    for value in (1.0, 2.0, 4.0):
        timing.remember("step", {"a ÷ b": value, "c ÷ d": None, "e ÷ f": value if value > 3 else None}, facts, tmp_path)
    entries = performance.lines_of(tmp_path / timing.HISTORY)
    assert [entry["ratios"] for entry in entries] == [{"a ÷ b": 1.0}, {"a ÷ b": 2.0}, {"a ÷ b": 4.0, "e ÷ f": 4.0}]
    assert entries[0].keys() == {"date", "commit", "benchmark", "device", "machine", "load", "ratios"}
    text = performance.page(tmp_path)
    assert "| a ÷ b | ▁▅█ | 1.00 | 4.00 | 1.00 | 4.00 |" in text and "Of 1 further ratios there is one run" in text


def test_the_committed_page_is_what_the_committed_numbers_give():
    assert run(str(FOLDER / "performance.py"), "--check") == ""


def test_the_committed_numbers_are_small():
    for path in filter(Path.is_file, (FOLDER / "results").rglob("*")):
        assert path.suffix in (".json", ".jsonl", ".md", ".png") and path.stat().st_size < 200_000
        if path.suffix == ".json":
            assert all(math.isfinite(value) for value in numbers_in(json.loads(path.read_text())))


def numbers_in(found):
    if isinstance(found, (dict, list)):
        for one in found.values() if isinstance(found, dict) else found:
            yield from numbers_in(one)
    elif isinstance(found, float):
        yield found


# collection.py


def test_the_best_word_is_the_best_of_all_words():
    collection = script("collection")
    torch.manual_seed(0)
    chain = collection.bigram_chain(torch.randint(27, (40, 4)).float())
    best, value = collection.best_word(chain, length=3)
    every = torch.cartesian_prod(*[torch.arange(27)] * 3)
    rewards = chain(torch.nn.functional.one_hot(every, 27).float(), None)
    assert best.argmax(-1).tolist() == every[rewards.argmax()].tolist()
    assert math.isclose(value, rewards.max().item(), rel_tol=1e-5)


def test_regimes_are_compared_up_to_their_names():
    collection = script("collection")
    truth = torch.tensor([[0, 0, 1, 2], [2, 1, 1, 0]])
    mask = torch.tensor([[1.0, 1.0, 1.0, 1.0], [1.0, 1.0, 1.0, 0.0]])
    renamed = torch.tensor([2, 0, 1])[truth]
    assert collection.agreement(renamed.expand(3, -1, -1), truth, mask) == 1
    renamed[0, 0] = 0
    assert math.isclose(collection.agreement(renamed.expand(3, -1, -1), truth, mask), 6 / 7, rel_tol=1e-5)


# readme_table.py


def test_the_readmes_table_is_that_of_a_run_with_default_settings(tmp_path, monkeypatch, capsys):
    table, compare = script("readme_table"), importlib.import_module("gumbo.experiments.compare")
    config, runs = dataclasses.asdict(compare.Compare()), []
    for index, arm in enumerate(compare.ARMS):
        found = {"elbo": -20.0 - index, "log_evidence": -19.0 - index}
        runs += [{"what": "training", "family": arm.family, "arm": arm.name, "seed": 0, "test": found, "seconds": 12.3,
                  "objective": "elbo", "active_units": index % 3, "units": 10, "ms_per_step": 1.0}]  # fmt: skip
    for family in compare.FAMILIES:
        numbers = {
            "initial": {"variance": 2.0, "signal_to_noise": 1.0},
            "trained": {"variance": 3.0, "signal_to_noise": 1.0},
        }
        moments = {arm.name: numbers for arm in compare.ARMS if arm.family == family}
        runs += [{"what": "gradients", "family": family, "arm": "", "seed": 0, "moments": moments}]
    (tmp_path / "results.json").write_text(json.dumps({"config": config, "runs": runs, "seconds": 300.0}))
    page = tmp_path / "README.md"
    page.write_text(f"above\n{table.START}\nold\n{table.END}\nbelow\n")
    monkeypatch.setattr(table, "README", page)
    table.main([str(tmp_path)])
    written = page.read_text()
    assert written.startswith("above\n") and written.endswith("\nbelow\n") and "old" not in written
    assert "| rloo (K) | -25.00 |" in written and "collapsed" in written and "Pathwise or score function?" in written
    (tmp_path / "results.json").write_text(json.dumps({"config": config | {"epochs": 3}, "runs": runs, "seconds": 1.0}))
    with pytest.raises(SystemExit, match="other epochs"):
        table.main([str(tmp_path)])
    assert page.read_text() == written


def test_the_readme_has_the_markers_of_its_table():
    table = script("readme_table")
    assert table.replaced(table.README.read_text(), "new").count("\n\nnew\n\n") == 1


def test_the_page_of_results_orders_arms_and_draws_them(tmp_path):
    from dataclasses import asdict

    from gumbo.experiments.reproduce import path_of
    from gumbo.experiments.reproduction import tables

    page = script("results_page")
    for name, better in (("linear/arm", 0.0), ("linear/rebar", 2.0)):
        (cell,) = tables["arm"].chosen([name])
        for seed in range(3):
            value = 107.0 + better + 0.1 * seed
            points = [
                {"step": 10 * k, "seconds": k, "train": -value - 20 / k, "valid": -value - 30 / k} for k in range(1, 6)
            ]
            found = {"cell": asdict(cell), "seed": seed, "table": "arm", "value": value, "steps": 50, "share": 0.05}
            found |= {"test": {"elbo": -value - 5, "log_evidence": -value}, "seconds": 60.0, "ms_per_step": 20.0}
            path = path_of(tmp_path / "results", "arm", cell, seed)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(found | {"command": f"gumbo reproduce arm --cells '[{name}]'", "curve": points}))
    (tmp_path / "docs").mkdir()
    page.main([str(tmp_path / "results"), str(tmp_path / "docs")])
    written = (tmp_path / "docs" / "results.md").read_text()
    assert "| linear/arm | 107.20 | 107.10 ± 0.0577 | 3 | 50 | 5.0% | 112.10 |" in written
    assert "| linear/arm − rebar | -0.50 | -2.00 ± 0.08 | confirmed | -2.00 ± 0.08 | confirmed |" in written
    assert (tmp_path / "docs" / "figures" / "results-arm.png").stat().st_size > 10_000
    every = {name: page.finished(tables[name], tmp_path / "results") for name in tables}
    front, screen = page.front(every), page.first_screen(every, tmp_path / "docs")
    assert "2 of 2 published cells no worse than 2 nats above the published value" in front
    assert f"| semi-supervised | 0 of {len(tables['semi-supervised'].cells)} | not run yet |" in front
    assert "quoted from memory" in front
    assert "*ours*: −log p(x) by 1,000 importance-weighted draws, nats per datum, smaller is better." in written
    assert "`gumbo reproduce arm`" in front and "`gumbo reproduce arm`" in screen
    assert (
        "readme-published.png" in screen
        and "2 of 2 cells are no worse than 2 nats" in screen
        and "after 5.0% of" in screen
    )


def test_the_readme_has_the_markers_of_what_is_made():
    page = script("results_page")
    for ends in ((page.START, page.END), (page.SCREEN_START, page.SCREEN_END)):
        assert page.replaced(page.README.read_text(), "new", *ends).count("\n\nnew\n\n") == 1


# collection.py


def test_the_time_to_count_is_that_of_the_first_epoch_that_does():
    collection = script("collection")
    watch = collection.Counting(None, None, None)
    watch.curve = [(10, 1.0, 0.5), (20, 2.0, 0.96), (30, 3.0, 0.94)]
    assert watch.reached(0.95) == (20, 2.0) and all(map(math.isnan, watch.reached(0.99)))


def test_counting_goes_by_the_epoch():
    collection = script("collection")
    guide = collection.RecurrentAttentionGuide(collection.AttendInferRepeat((1, 8, 8), num_steps=1))
    x = torch.rand(6, 1, 8, 8)
    watch = collection.Counting(guide, x, guide.objects(x)["z_pres_1"].squeeze(-1))
    for epoch in (1, 2):
        watch({"epoch": epoch, "step": 10 * epoch})
    assert [(step, accuracy) for step, _, accuracy in watch.curve] == [(10, 1.0), (20, 1.0)]


def test_lengths_of_documents_have_a_law():
    collection = script("collection")
    model = collection.PoissonDEF((5,), layers=(3, 2), kind="poisson")
    counts = torch.zeros(200, 5)
    counts[:, 0] = torch.arange(200.0)
    found = collection.log_lengths(model, counts, draws=50)
    assert found.logsumexp(0).item() == pytest.approx(0.0, abs=1e-5)


def test_seeds_that_never_come_so_far_are_counted():
    reached = script("collection").reached
    assert reached([math.nan, math.nan]) == "never" and reached([2.0, 4.0]) == "3 ± 1"
    assert reached([2.0, math.nan]) == "2 (1 of 2 seeds)"
