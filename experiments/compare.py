"""``gumbo compare``: one model under pathwise, score-function and relaxed gradients, side by side, on real images.

Every arm of a family has the same data, architecture, seeds, initial weights and batches; arms differ in how the
gradient passes through the guide's draws. For every training objective the reported number is the true bound of the
model with exact densities or discrete latents.
"""

from __future__ import annotations

import json
import math
import os
import signal
import sys
import textwrap
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from gumbo.errors import BadInput, Interrupted, UnknownName, first_line
from gumbo.experiments._command import check_least, refuse_twice, run_command
from gumbo.experiments._names import marked
from gumbo.experiments._runs import RunFolder, Watch, available_cpus, run_settings
from gumbo.experiments._workers import check_workers, in_parallel
from gumbo.experiments.train import Train
from gumbo.experiments.train import build as build_pair
from gumbo.files import write_whole
from gumbo.tables import digits, markdown, plain


@dataclass
class Compare:
    """Compare gradient estimators on one model: pathwise with score function, discrete with relaxed.

    Args:
        quick: a small run of every arm, for a first look and for tests.
        data: a data set's name; its images are binarized at one half.
        families: which comparisons to run.
        seeds: number of seeds; each has its own initial weights, batches and noise.
        epochs: training epochs of each arm and seed.
        batch_size: images per step; a last partial batch is dropped in every arm.
        lr: Adam's learning rate.
        hidden: layer widths of the encoder; the decoder mirrors them.
        latent_dim: Normal latents of the continuous family.
        num_latents: one-hot latents of the discrete family.
        num_classes: classes of each one-hot latent.
        particles: draws per step of the leave-one-out arms; other arms have one.
        gradient_draws: gradient draws for each variance.
        burn_in: draws before these, for arms with a moving-average baseline.
        warm_up: epochs over which every arm's KL weight rises from 0 to 1, against posterior collapse; 0 uses weight 1
            from the start. The reported bound always has weight 1.
        common_epochs: epochs of the common training before the second variance is measured.
        importance_samples: draws per datum for the final log p(x).
        jobs: worker processes; 0 takes one per core, at most 4.
        backend: loky for processes of this machine, dask for every worker of a Dask cluster.
        address: of the cluster's scheduler, tcp://host:port.
        resume: the folder of a comparison to resume; finished arms are kept.
        folder: the run folder; by default ./runs/compare-<time>.
        trust: import the import paths in the config.yaml of a run, given as `--config`.
    """

    quick: bool = False
    data: str = "digits"
    families: list[str] = field(default_factory=lambda: ["continuous", "discrete"])
    seeds: int = 3
    epochs: int = 50
    batch_size: int = 64
    lr: float = 3e-3
    hidden: list[int] = field(default_factory=lambda: [128])
    latent_dim: int = 20
    num_latents: int = 10
    num_classes: int = 10
    particles: int = 4
    gradient_draws: int = 60
    burn_in: int = 80
    warm_up: int = 25
    common_epochs: int = 20
    importance_samples: int = 100
    jobs: int = 0
    backend: str = "loky"
    address: str | None = None
    resume: str | None = None
    folder: str | None = None
    trust: bool = False


QUICK = {
    "hidden": [64, 32],
    "latent_dim": 10,
    "num_latents": 8,
    "num_classes": 5,
    "seeds": 2,
    "epochs": 3,
    "batch_size": 128,
    "gradient_draws": 10,
    "burn_in": 40,
    "warm_up": 2,
    "common_epochs": 3,
    "importance_samples": 20,
}


@dataclass(frozen=True)
class Arm:
    """One estimator: a loss by its word, on one form of the family's pair."""

    family: str
    name: str
    word: str
    form: str
    particles: bool = False
    same_objective: bool = True

    @property
    def key(self) -> str:
        """The arm's part of its file names."""
        return f"{self.family}-{self.name}".replace(" ", "-").replace("(", "").replace(")", "")


# By family: the reference arm of the ratios, then the arm of the common training.
REFERENCE = {"continuous": "trace (pathwise)", "discrete": "rloo"}
ARMS = [
    Arm("continuous", "trace (pathwise)", "trace", "reparameterized"),
    Arm("continuous", "trace-meanfield", "trace-meanfield", "reparameterized"),
    Arm("continuous", "trace (score)", "trace", "score"),
    Arm("continuous", "trace-graph", "trace-graph", "score"),
    Arm("continuous", "trace-graph+baseline", "trace-graph+baseline", "score"),
    Arm("continuous", "rloo", "rloo", "score", particles=True),
    Arm("discrete", "trace", "trace", "discrete"),
    Arm("discrete", "trace-graph", "trace-graph", "discrete"),
    Arm("discrete", "trace-graph+baseline", "trace-graph+baseline", "discrete"),
    Arm("discrete", "rloo", "rloo", "discrete", particles=True),
    Arm("discrete", "trace (relaxed)", "trace", "relaxed", same_objective=False),
    Arm("discrete", "concrete", "concrete", "discrete", same_objective=False),
    Arm("discrete", "gumbel-softmax", "gumbel-softmax", "discrete", same_objective=False),
    Arm("discrete", "straight-through", "straight-through", "discrete", same_objective=False),
]
FAMILIES = tuple(REFERENCE)
ARM_BY_KEY = {(arm.family, arm.name): arm for arm in ARMS}
PICTURES = 8  # images a row


def compare(config: Compare) -> dict[str, Any]:
    """Run every arm and seed, and write the run folder; returns the content of ``results.json``."""
    from gumbo.inference.training.locks import FolderLock

    check(config)
    if config.resume is None:
        run = RunFolder.create("compare", config, config.folder)
    else:
        run = RunFolder(Path(config.resume).absolute())
    with FolderLock(run.path):
        results, before = ([], 0.0) if config.resume is None else finished(run)
        with resumable(run, config, results):
            return compare_into(run, config, results, before)


def compare_into(run: RunFolder, config: Compare, results: list[dict[str, Any]], before: float) -> dict[str, Any]:
    """Add what is missing to the results, which took ``before`` seconds, and write tables, plots and numbers."""
    began = time.perf_counter()
    arms = [arm for arm in ARMS if arm.family in config.families]
    done = {identity(result) for result in results}
    tasks: list[tuple] = [(measure, family, seed) for seed in range(config.seeds) for family in config.families]
    tasks += [(train, arm, seed) for seed in range(config.seeds) for arm in arms]
    tasks = [task for task in tasks if task_identity(task) not in done]
    kept = f", {len(done)} results kept" if done else ""
    print(f"gumbo compare: {len(arms)} arms, {config.seeds} seeds{kept}, into {run.path}", file=sys.stderr)
    jobs = config.jobs or min(4, available_cpus())
    lines = config.seeds * (len(arms) * (config.epochs + 1) + len(config.families) * 2)

    def summary() -> dict[str, Any]:
        seconds = before + time.perf_counter() - began
        return {"config": asdict(config), "seconds": seconds, "runs": results, "table": summarize(arms, results)}

    found = results_of(tasks, config, run, jobs, done)
    with Watch(run, lines, "gumbo compare"), closing(found):
        for result in found:
            results.append(result)
            run.write_json("results.json", summary())
            write_tables(run, config, arms, results)
    write_tables(run, config, arms, results)
    draw(run, config, arms, results)
    write_report(run, config, arms, results)
    show(config, arms, results)
    whole = summary()
    run.write_json("results.json", whole)
    print(f"gumbo compare: {whole['seconds']:.0f} s; tables, plots and numbers in {run.path}", file=sys.stderr)
    return whole


def identity(result: Mapping[str, Any]) -> tuple[str, str, int]:
    return result["family"], result["arm"], result["seed"]


def task_identity(task: tuple) -> tuple[str, str, int]:
    _, of, seed = task
    return (of.family, of.name, seed) if isinstance(of, Arm) else (of, "", seed)


def finished(run: RunFolder) -> tuple[list[dict[str, Any]], float]:
    """The results in a run, and the seconds it took; lines of unfinished arms are removed."""
    try:
        found = json.loads((run.path / "results.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        found = {"runs": [], "seconds": 0.0}
    except (OSError, ValueError) as error:
        raise BadInput(f"{run.path / 'results.json'} cannot be read ({error}): delete it to start again") from error
    try:
        runs, seconds = list(found["runs"]), float(found["seconds"])
        done = {identity(result) for result in runs}
    except (KeyError, TypeError, ValueError) as error:
        raise BadInput(
            f"{run.path / 'results.json'} is not what gumbo compare wrote ({first_line(error, kind=True)}): delete it "
            "to start again"
        ) from error
    forget_unfinished(run, done)
    return runs, seconds


def forget_unfinished(run: RunFolder, done: Collection[tuple]) -> None:
    """Remove the lines of unfinished arms, while no worker writes."""
    known = (line for line in run.read_metrics() if {"family", "seed"} <= line.keys())
    lines = [line for line in known if (line["family"], line.get("arm", ""), line["seed"]) in done]
    run.write_text("metrics.jsonl", "".join(f"{json.dumps(line)}\n" for line in lines))


@contextmanager
def resumable(run: RunFolder, config: Compare, results: Sequence[Mapping[str, Any]]) -> Iterator[None]:
    """Add the command to resume to an interruption; a comparison without results leaves no folder behind."""
    try:
        yield
    except BaseException as error:
        nothing = not results and config.resume is None
        if nothing:
            run.empty()
        if nothing or not isinstance(error, KeyboardInterrupt):
            raise
        how = f"; {len(results)} results are kept; resume with: gumbo compare --resume {os.path.relpath(run.path)}"
        raise Interrupted(getattr(error, "signal", signal.SIGINT), "", how) from None


def resumed(run: str) -> dict[str, Any]:
    """The defaults of ``--resume RUN``: the run's recorded settings."""
    found = run_settings(run, "compare", Compare)
    elsewhere = ("folder", "resume", "quick", "backend", "address")
    return {name: value for name, value in marked(found).items() if name not in elsewhere}


def check(config: Compare) -> None:
    for name in config.families:
        if name not in FAMILIES:
            raise UnknownName("family", name, FAMILIES)
    refuse_twice("families", config.families)
    if not config.families:
        raise BadInput(f"families is empty: expected some of {', '.join(FAMILIES)}")
    if config.resume is not None:
        recorded, asked = resumed(config.resume), asdict(config)
        for name in set(recorded) - {"jobs"}:
            if asked[name] != recorded[name]:
                raise BadInput(f"{config.resume} was begun with {name} {recorded[name]}, not {asked[name]}")
    check_workers(config.backend, config.address, config.jobs, least=0)
    check_least(config, seeds=1, epochs=1, batch_size=1, common_epochs=1, importance_samples=1)
    check_least(config, particles=2, gradient_draws=2, burn_in=0, warm_up=0)
    # Read here once, so that a missing file is reported before a run folder and workers exist.
    rows = len(images(config.data).train)
    if config.batch_size > rows:
        raise BadInput(f"batch_size is {config.batch_size}, and {config.data} has {rows} training images; lower it")


def results_of(
    tasks: Sequence[tuple], config: Compare, run: RunFolder, jobs: int, done: set[tuple]
) -> Iterator[dict[str, Any]]:
    """Yield results as they finish, and add their identities to ``done``; all workers stop with the loop."""
    if config.backend == "loky":
        here = [(run, config, task) for task in tasks]
        options = {"again": lambda: forget_unfinished(run, done), "name": lambda *task: task_name(task[-1])}
        for (_, _, task), result in in_parallel(_here, here, jobs, **options):
            done.add(task_identity(task))
            yield result
        return
    # Workers of a cluster may share no disk with the caller, which writes their results.
    elsewhere = [(config, task) for task in tasks]
    cluster = {"backend": config.backend, "address": config.address, "name": lambda *task: task_name(task[-1])}
    for _, (result, lines, files) in in_parallel(_elsewhere, elsewhere, jobs, **cluster):
        for line in lines:
            run.append_metrics(line)
        for name, content in files.items():
            write_whole(run.checkpoints / name, lambda file, content=content: file.write(content))
        yield result


def task_name(task: tuple) -> str:
    """The task in words, for its errors."""
    family, arm, seed = task_identity(task)
    return f"{family} {arm or 'gradients'}, seed {seed}"


def _here(run: RunFolder, config: Compare, task: tuple) -> dict[str, Any]:
    function, *rest = task
    return function(config, run, *rest)


def _elsewhere(config: Compare, task: tuple) -> tuple[dict[str, Any], list[dict[str, Any]], dict[str, bytes]]:
    """The result of a task, its lines of ``metrics.jsonl``, and its checkpoints by name."""
    with TemporaryDirectory() as folder:
        run = RunFolder(Path(folder))
        run.checkpoints.mkdir()
        result = _here(run, config, task)
        return result, run.read_metrics(), {path.name: path.read_bytes() for path in run.checkpoints.iterdir()}


@lru_cache(maxsize=1)
def images(name: str):
    """The data set, binarized at one half; read once a process."""
    from gumbo.experiments.data import load

    return load(name, binarize="static")


def build(config: Compare, data_shape: Sequence[int], seed: int, form: str):
    """Model and guide in one of a family's forms; forms of one seed hold the same weights."""
    hidden = {"hidden": config.hidden}
    if form in ("reparameterized", "score"):
        words = {"model": "gaussian-vae", "guide": "normal"}
        sizes, own = {"latent_dim": config.latent_dim}, {"reparameterized": form == "reparameterized"}
    else:
        relaxed = form == "relaxed"
        words = {"model": "categorical-vae", "guide": "relaxed-categorical" if relaxed else "categorical"}
        sizes = {"num_latents": config.num_latents, "num_classes": config.num_classes, "relaxed": relaxed}
        own = {}
    return build_pair(Train(**words, model_options=sizes | hidden, guide_options=own | hidden, seed=seed), data_shape)


def copy_weights(pair, source) -> None:
    """Copy a pair's weights from another form of it; tensors that only one of them has (a temperature) are kept."""
    for program, other in zip(pair, source, strict=True):
        weights = {name: value for name, value in other.state_dict().items() if name != "temperature"}
        missing = set(program.load_state_dict(weights, strict=False).missing_keys)
        assert missing <= {"temperature"}, missing


def loss_of(config: Compare, arm: Arm, kl_weight: Callable[[int], float] | None = None):
    from gumbo.inference import make_loss
    from gumbo.inference.stock import stock_elbos

    particles = config.particles if arm.particles else None
    if kl_weight is None:
        return make_loss(arm.word, num_particles=particles)
    if arm.word in stock_elbos:
        return warmed(stock_elbos[arm.word], kl_weight)(num_particles=particles or 1)
    return make_loss(arm.word, num_particles=particles, kl_weight=kl_weight)


def warmed(stock: type, kl_weight: Callable[[int], float]) -> type:
    """One of Pyro's ELBOs, which have no KL weight, with its latent terms weighted by a schedule of the step."""
    from gumbo.inference.stock import LatentsWeighted

    class Warmed(stock):  # type: ignore[misc, valid-type]
        step = 0
        objective_name = "weighted-elbo"

        def loss_and_grads(self, model, guide, *args, **kwargs):
            with LatentsWeighted(kl_weight(self.step)):
                value = super().loss_and_grads(model, guide, *args, **kwargs)
            self.step += 1
            return value

    if hasattr(stock, "differentiable_loss"):

        def differentiable_loss(self, model, guide, *args, **kwargs):
            with LatentsWeighted(kl_weight(self.step)):
                value = stock.differentiable_loss(self, model, guide, *args, **kwargs)
            self.step += 1
            return value

        Warmed.differentiable_loss = differentiable_loss  # only if it exists: TraceGraph_ELBO has none
    return Warmed


def train(config: Compare, run: RunFolder, arm: Arm, seed: int) -> dict[str, Any]:
    """One arm and seed: training, validation, evaluation on the test data."""
    from gumbo.inference import Linear, evaluate, fit
    from gumbo.inference.training.checkpoints import save_checkpoint

    data = images(config.data)
    model, guide = build(config, data.data_shape, seed, arm.form)
    where = {"family": arm.family, "arm": arm.name, "seed": seed}
    steps = config.warm_up * (len(data.train) // config.batch_size)
    began = time.perf_counter()
    result = fit(
        model,
        guide,
        data.train,
        valid=data.valid,
        loss=loss_of(config, arm, Linear(steps) if steps else None),
        optimizer="adam",
        lr=config.lr,
        epochs=config.epochs,
        batch_size=config.batch_size,
        seed=seed,
        drop_last=True,
        valid_samples=5,
        progress=False,
        on_epoch=lambda numbers: run.append_metrics({**where, **numbers}),
    )
    seconds = time.perf_counter() - began
    run.append_metrics({**where, **result.history[0]})
    save_checkpoint(checkpoint(run, arm, seed), {"model": model.state_dict(), "guide": guide.state_dict()})
    found = evaluate(model, guide, data.test, num_samples=config.importance_samples, seed=seed)
    (active,) = found.active_units.values()
    units = active.flatten(1).any(1) if active.dim() > 1 else active  # a one-hot latent is one unit
    return {
        **where,
        "what": "training",
        "objective": result.objective_name,
        "valid_elbo": [numbers["valid_elbo"] for numbers in result.history],
        "test": found.as_dict(),
        "active_units": int(units.sum()),
        "units": len(units),
        "ms_per_step": result.ms_per_step,
        "seconds": seconds,
    }


def checkpoint(run: RunFolder, arm: Arm, seed: int) -> Path:
    return run.checkpoints / f"{arm.key}-seed{seed}.pt"


def sample_pictures(config: Compare, run: RunFolder, arm: Arm):
    """Test images with their reconstructions by the arm's first seed, and draws from its model."""
    from gumbo.experiments.plots import prior_draws, reconstructions
    from gumbo.inference.posterior.parts import exact_pair
    from gumbo.inference.training.checkpoints import load_checkpoint

    data = images(config.data)
    pair = build(config, data.data_shape, 0, arm.form)
    state = load_checkpoint(checkpoint(run, arm, 0))
    for program, part in zip(pair, ("model", "guide"), strict=True):
        program.load_state_dict(state[part])
    model, guide = exact_pair(*pair)
    x = data.test[:PICTURES]
    inputs = model.inputs(x)
    return {"data": x, "reconstructions": reconstructions(model, guide, inputs), "prior": prior_draws(model, inputs)}


def measure(config: Compare, run: RunFolder, family: str, seed: int) -> dict[str, Any]:
    """Moments of every arm's gradient at the same two sets of parameters: as drawn, and after a common training."""
    from gumbo.inference import fit
    from gumbo.inference.auditing.moments import gradient_moments

    data = images(config.data)
    batch = data.train[: config.batch_size]
    arms = [arm for arm in ARMS if arm.family == family]
    reference = next(arm for arm in arms if arm.name == REFERENCE[family])
    source = build(config, data.data_shape, seed, reference.form)
    found: dict[str, Any] = {}
    for stage in ("initial", "trained"):
        if stage == "trained":
            fit(
                *source,
                data.train,
                loss=loss_of(config, reference),
                lr=config.lr,
                epochs=config.common_epochs,
                batch_size=config.batch_size,
                seed=seed,
                progress=False,
            )
        moments = {}
        for arm in arms:
            pair = build(config, data.data_shape, seed, arm.form)
            copy_weights(pair, source)
            moments[arm.name] = gradient_moments(
                *pair,
                loss_of(config, arm),
                batch,
                num_samples=config.gradient_draws,
                seed=seed,
                # Pyro's average decays by 0.9 per draw: the remainder of its initial value adds to the variance.
                burn_in=config.burn_in if arm.word.endswith("+baseline") else 0,
            )
        # Arms with the same objective have the same exact gradient, best estimated by the least noisy one.
        same = [moments[arm.name] for arm in arms if arm.same_objective]
        least = min(same, key=lambda found: found.total_variance)
        for arm in arms:
            own = moments[arm.name]
            signal = least.mean_norm if arm.same_objective else own.mean_norm
            found.setdefault(arm.name, {})[stage] = {
                "variance": own.total_variance,
                "signal_to_noise": signal / own.total_variance**0.5,
            }
        run.append_metrics({"family": family, "what": f"gradients ({stage})", "seed": seed})
    return {"family": family, "arm": "", "what": "gradients", "seed": seed, "moments": found}


# --- what is made of the results


def runs_of(arm: Arm, results: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The arm's training runs, one for each available seed."""
    return [r for r in results if r["what"] == "training" and (r["family"], r["arm"]) == (arm.family, arm.name)]


def moments_of(arm: Arm, results: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The moments of gradients by arm of this arm's family, one mapping for each available seed."""
    return [r["moments"] for r in results if r["what"] == "gradients" and r["family"] == arm.family]


def summarize(arms: Sequence[Arm], results: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """One row per arm: means and standard errors over the available seeds."""
    rows = []
    for arm in arms:
        runs, moments = runs_of(arm, results), moments_of(arm, results)
        row: dict[str, Any] = {"family": arm.family, "arm": arm.name, "seeds": len(runs)}
        row["particles"] = "K" if arm.particles else 1
        row["objective"] = runs[0]["objective"] if runs else None
        row["elbo"] = mean_and_error([r["test"]["elbo"] for r in runs])
        row["log_evidence"] = mean_and_error([r["test"]["log_evidence"] for r in runs])
        row["ms_per_step"] = mean_and_error([r["ms_per_step"] for r in runs])
        row["seconds"] = mean_and_error([r["seconds"] for r in runs])
        row["active_units"] = mean_and_error([r["active_units"] for r in runs])
        row["units"] = runs[0]["units"] if runs else None
        row["collapsed"] = sum(r["active_units"] == 0 for r in runs)
        for stage in ("initial", "trained"):
            own = [m[arm.name][stage] for m in moments]
            reference = [m[REFERENCE[arm.family]][stage]["variance"] for m in moments]
            ratios = [o["variance"] / r for o, r in zip(own, reference, strict=True)]
            row[f"variance_{stage}"] = mean_and_error([o["variance"] for o in own])
            row[f"ratio_{stage}"] = mean_and_error(ratios)
            row[f"signal_to_noise_{stage}"] = mean_and_error([o["signal_to_noise"] for o in own])
        rows.append(row)
    return rows


def mean_and_error(values: Sequence[float]) -> tuple[float, float] | None:
    if not values:
        return None
    mean = sum(values) / len(values)
    if len(values) == 1:
        return mean, math.nan
    return mean, math.sqrt(sum((value - mean) ** 2 for value in values) / (len(values) - 1) / len(values))


def decimals(number: float) -> str:
    return f"{number:.2f}"


def cell(value: tuple[float, float] | None, form: Callable[[float], str], with_error: bool = True) -> str:
    if value is None:
        return "…"
    mean, error = value
    return f"{form(mean)} ± {form(error)}" if with_error and math.isfinite(error) else form(mean)


HEADS = ["estimator", "ELBO", "log p(x)", "start ×", "later ×", "active", "s", "note"]


def table_of(family: str, rows: Sequence[Mapping[str, Any]]) -> tuple[str, list[list[str]]]:
    """Title and cells of one family's table, under ``HEADS``."""
    body = [
        [
            row["arm"] + (" (K)" if row["particles"] == "K" else ""),
            cell(row["elbo"], decimals),
            cell(row["log_evidence"], decimals, False),
            cell(row["ratio_initial"], digits, False),
            cell(row["ratio_trained"], digits, False),
            "…" if row["active_units"] is None else f"{row['active_units'][0]:.3g}/{row['units']}",
            cell(row["seconds"], lambda seconds: f"{seconds:.{0 if seconds >= 10 else 1}f}", False),
            collapse(row),
        ]
        for row in rows
        if row["family"] == family
    ]
    return f"{family} latents; variances as multiples of {REFERENCE[family]}'s", body


def all_collapsed(row: Mapping[str, Any]) -> bool:
    """Whether an arm's latents are independent of the data in every seed."""
    return 0 < row["collapsed"] == row["seeds"]


def collapse(row: Mapping[str, Any]) -> str:
    """A remark on an arm whose latents are independent of the data."""
    if all_collapsed(row):
        return "collapsed"
    return f"{row['collapsed']} collapsed" if row["collapsed"] else ""


def note(config: Compare) -> str:
    early = f", perhaps because {config.epochs} epochs are few" if config.epochs < 10 else ""
    trained = "; every arm trains on the full KL from the first step"
    if config.warm_up:
        trained = f", after KL warm-up over {config.warm_up} of {config.epochs} epochs in every arm"
    return (
        f"ELBO (± standard error over {config.seeds} seeds) and log p(x): true bounds, exact-density or discrete, on "
        f"test data, nats per datum{trained}. start ×, later ×: total variance of the guide's "
        "gradient at parameters common to all arms, as drawn and after a common training. active: latents whose "
        f"posterior mean varies over the data; collapsed: none does{early}. s: wall-clock seconds of the training. "
        f"Arms marked (K) take {config.particles} draws a step, the others one."
    )


_UNUSED = "ends without a latent in use, so that the ELBOs do not say which to take: train for more epochs"


def conclusion(rows: Sequence[Mapping[str, Any]]) -> str:
    """Pathwise or score function, in a few sentences, from the numbers."""
    by_arm = {(row["family"], row["arm"]): row for row in rows if row["elbo"] and row["ratio_initial"]}
    parts = []
    path, score = (by_arm.get(("continuous", name)) for name in ("trace (pathwise)", "trace (score)"))
    if path and score:
        lost, known = _behind(path, score)
        times, later = (digits(score[key][0]) for key in ("ratio_initial", "ratio_trained"))
        ends = f"{abs(lost):.1f}{f' ± {known:.1f}' if known else ''} nats {'lower' if lost > 0 else 'higher'}"
        chosen = "pathwise:" if lost >= -2 * known else "the score function by its ELBO, although"
        near = "" if abs(lost) > 2 * known else ", too near to tell with these seeds"
        found = f"The score function's ELBO ends {ends}{near}."
        if all_collapsed(path):
            found = f"Pathwise {_UNUSED}."
        parts += [
            f"For Normal latents take {chosen} the plain score function's gradient has {times} times the variance of "
            f"the pathwise one at the start and {later} times later.",
            found,
        ]
    discrete = [row for (family, _), row in by_arm.items() if family == "discrete"]
    if discrete_said := _discrete_conclusion(discrete):
        parts.append(f"For one-hot latents, which have no pathwise gradient, {discrete_said}.")
    return " ".join(["Pathwise or score function?", *parts]) if parts else ""


def _behind(row: Mapping[str, Any], other: Mapping[str, Any]) -> tuple[float, float]:
    """By how many nats the ELBO of one arm ends below another's, and the standard error; 0 if one seed shows none."""
    error = math.hypot(row["elbo"][1], other["elbo"][1])
    return row["elbo"][0] - other["elbo"][0], 0.0 if math.isnan(error) else error


def _discrete_conclusion(rows: Sequence[Mapping[str, Any]]) -> str:
    """Which arm to take for discrete latents, as far as the seeds tell; empty without an arm of the discrete bound."""
    bounds = [row for row in rows if ARM_BY_KEY["discrete", row["arm"]].same_objective]
    if not bounds:
        return ""
    if all(all_collapsed(row) for row in rows):
        return f"every estimator {_UNUSED}"
    best = max(bounds, key=lambda row: row["elbo"][0])
    near = []
    for row in rows:
        lost, known = _behind(best, row)
        if row is not best and abs(lost) <= 2 * known:
            near.append(row["arm"])
    if near and len(near) == len(rows) - 1:
        ends = sorted(row["elbo"][0] for row in rows)
        return f"all estimators end too near to tell with these seeds, at {ends[0]:.1f} to {ends[-1]:.1f} nats"
    said = f"take the score function as {best['arm']}, which ends at {best['elbo'][0]:.1f} nats"
    if relaxed := [row for row in rows if row not in bounds]:
        other = max(relaxed, key=lambda row: row["elbo"][0])
        said += f" (the best relaxed gradient, {other['arm']}, at {other['elbo'][0]:.1f})"
    return said + (f"; too near to tell with these seeds: {', '.join(near)}" if near else "")


def write_tables(run: RunFolder, config: Compare, arms: Sequence[Arm], results: Sequence[Mapping[str, Any]]) -> None:
    """``table.md``: the table of each family, and further numbers below it."""
    rows = summarize(arms, results)
    text = ["# gumbo compare", ""]
    for family in dict.fromkeys(arm.family for arm in arms):
        title, body = table_of(family, rows)
        text += [f"## {title}", "", *markdown(HEADS, body), ""]
    text += [note(config), "", conclusion(rows), "", "## Variances, signal-to-noise ratios, steps", ""]
    more = [
        [
            row["family"],
            row["arm"],
            *(cell(row[key], digits, False) for key in ("variance_initial", "variance_trained")),
            *(cell(row[key], digits, False) for key in ("signal_to_noise_initial", "signal_to_noise_trained")),
            cell(row["ms_per_step"], decimals, False),
        ]
        for row in rows
    ]
    heads = ["latents", "estimator", "variance at start", "variance later", "SNR at start", "SNR later", "ms a step"]
    text += [*markdown(heads, more), "", "SNR: the norm of the mean gradient over the root of its total variance."]
    run.write_text("table.md", "\n".join([*text, ""]))


def write_report(run: RunFolder, config: Compare, arms: Sequence[Arm], results: Sequence[Mapping[str, Any]]) -> None:
    """``report.html``: the conclusion, the tables, the curves."""
    from gumbo.experiments._report import Report, finish

    rows = summarize(arms, results)
    page = Report("gumbo compare: one model under each gradient", conclusion(rows))
    for family in dict.fromkeys(arm.family for arm in arms):
        title, body = table_of(family, rows)
        page.table(HEADS, body, title[0].upper() + title[1:])
        curves = {arm.name: mean_curve(runs_of(arm, results)) for arm in arms if arm.family == family}
        page.curves(
            f"True ELBO on validation data, {family} latents", curves, "epoch", "nats per datum, mean over seeds"
        )
    page.text(note(config))
    finish(run, page)


def mean_curve(runs: Sequence[Mapping[str, Any]]) -> list[tuple[float, float]]:
    """(epoch, validation bound), the mean over seeds."""
    heights = zip(*(run["valid_elbo"] for run in runs), strict=False)
    return [(float(epoch), sum(height) / len(height)) for epoch, height in enumerate(heights)]


def show(config: Compare, arms: Sequence[Arm], results: Sequence[Mapping[str, Any]]) -> None:
    """The final tables, on standard output, in 80 columns."""
    rows = summarize(arms, results)
    for family in dict.fromkeys(arm.family for arm in arms):
        title, body = table_of(family, rows)
        print(f"\n{title}")
        print("\n".join(plain(HEADS, body, gap=1)))
    print()
    print(textwrap.fill(note(config), 80))
    print()
    print(textwrap.fill(conclusion(rows), 80))


def draw(run: RunFolder, config: Compare, arms: Sequence[Arm], results: Sequence[Mapping[str, Any]]) -> None:
    """All plots of the run."""
    import numpy as np

    from gumbo.experiments.plots import bars, image_rows, learning_curves

    curves: dict[str, dict[str, Any]] = {}
    variances: dict[str, dict[str, Any]] = {}
    for arm in arms:
        title = f"{arm.family} latents"
        runs, moments = runs_of(arm, results), [m[arm.name] for m in moments_of(arm, results)]
        curves.setdefault(title, {})[arm.name] = np.array([r["valid_elbo"] for r in runs])
        variances.setdefault(title, {})[arm.name] = {
            "initial parameters": [m["initial"]["variance"] for m in moments],
            "after common training": [m["trained"]["variance"] for m in moments],
        }
    learning_curves(run.plots / "learning_curves.png", curves, "true ELBO on validation data (nats per datum)")
    bars(run.plots / "gradient_variance.png", variances, "total variance of the guide's gradient (log scale)")
    for family in dict.fromkeys(arm.family for arm in arms):
        shown = {arm.name: sample_pictures(config, run, arm) for arm in arms if arm.family == family}
        data = next(iter(shown.values()))["data"]
        image_rows(
            run.plots / f"{family}_reconstructions.png",
            f"{family} latents: test images, and means of p(x | z) at a draw of the guide (seed 0)",
            {"data": data, **{name: images["reconstructions"] for name, images in shown.items()}},
        )
        image_rows(
            run.plots / f"{family}_prior_draws.png",
            f"{family} latents: means of p(x | z) at draws of the prior (seed 0)",
            {name: images["prior"] for name, images in shown.items()},
        )


def main(argv: Sequence[str] | None = None, prog: str = "gumbo compare") -> None:
    run_command(Compare, compare, argv, prog, presets={"quick": QUICK, "resume": resumed})


if __name__ == "__main__":
    # By import, so that worker processes find the functions under the same name.
    from gumbo.experiments.compare import main as run_script

    run_script()
