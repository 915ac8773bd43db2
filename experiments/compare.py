"""``gumbo compare``: one model under pathwise, score-function and relaxed gradients, side by side, on real images.

Every arm of a family sees the same data, architecture, seeds, initial weights and batches; what differs is how the
gradient passes through the guide's draws. Whatever an arm trains on, what is reported of it is the true bound of the
model with exact densities or discrete latents.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from typing import Any

from gumbo.errors import BadInput, UnknownName
from gumbo.experiments._command import run_command
from gumbo.experiments._runs import RunFolder, Watch, available_cpus
from gumbo.tables import digits


@dataclass
class Compare:
    """Contrast gradient estimators on one model: pathwise against score function, discrete against relaxed.

    Args:
        quick: a small run of every arm, for a first look and for tests.
        data: a data set's name; its images are binarized at one half.
        families: which contrasts to run.
        seeds: how many seeds; each draws its own initial weights, batches and noise.
        epochs: training epochs of each arm and seed.
        batch_size: images a step; a last partial batch is dropped in every arm.
        lr: Adam's learning rate.
        hidden: layer widths of the encoder; the decoder mirrors them.
        latent_dim: Normal latents of the continuous family.
        num_latents: one-hot latents of the discrete family.
        num_classes: classes of each one-hot latent.
        particles: draws a step of the leave-one-out arms; every other arm draws one.
        gradient_draws: draws of the gradient behind each variance.
        burn_in: draws before that, for arms whose baseline is a moving average.
        common_epochs: epochs of the training that all arms share before the second variance is measured.
        importance_samples: draws a datum behind the final log p(x).
        jobs: worker processes; 0 takes one a core, at most 4.
        folder: the run folder; by default ./runs/compare-<time>.
        trust: import what the config.yaml of a run, given as `--config`, names by import path.
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
    common_epochs: int = 20
    importance_samples: int = 100
    jobs: int = 0
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
    "common_epochs": 3,
    "importance_samples": 20,
}


@dataclass(frozen=True)
class Arm:
    """One way to the gradient: a loss by its word, on one form of the family's pair."""

    family: str
    name: str
    word: str
    form: str
    particles: bool = False
    same_objective: bool = True

    @property
    def key(self) -> str:
        return f"{self.family}-{self.name}".replace(" ", "-").replace("(", "").replace(")", "")


# In each family: the arm whose gradients the ratios refer to, then whose parameters all arms meet at.
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
PICTURES = 8  # images a row


def compare(config: Compare) -> dict[str, Any]:
    """Run every arm and seed, and write the run folder; returns what ``results.json`` holds."""
    check(config)
    began = time.perf_counter()
    arms = [arm for arm in ARMS if arm.family in config.families]
    run = RunFolder.create("compare", config, config.folder)
    print(f"gumbo compare: {len(arms)} arms, {config.seeds} seeds, into {run.path}", file=sys.stderr)
    tasks = [(measure, family, seed) for seed in range(config.seeds) for family in config.families]
    tasks += [(train, arm, seed) for seed in range(config.seeds) for arm in arms]
    jobs = config.jobs or min(4, available_cpus())
    lines = config.seeds * (len(arms) * (config.epochs + 1) + len(config.families) * 2)
    results: list[dict[str, Any]] = []
    pictures: dict[tuple[str, str], Any] = {}
    with Watch(run, lines, "gumbo compare") as _:
        for result in in_parallel(tasks, config, run, jobs):
            if images := result.pop("pictures", None):
                pictures[result["family"], result["arm"]] = images
            results.append(result)
            run.write_json("results.json", {"config": asdict(config), "runs": results})
            write_tables(run, arms, results)
    draw(run, arms, results, pictures)
    show(arms, results)
    seconds = time.perf_counter() - began
    summary = {"config": asdict(config), "seconds": seconds, "runs": results, "table": summarize(arms, results)}
    run.write_json("results.json", summary)
    print(f"gumbo compare: {seconds:.0f} s; tables, plots and numbers in {run.path}", file=sys.stderr)
    return summary


def check(config: Compare) -> None:
    for name in config.families:
        if name not in FAMILIES:
            raise UnknownName("family", name, FAMILIES)
    if not config.families:
        raise BadInput(f"families is empty: expected some of {', '.join(FAMILIES)}")
    smallest = {
        "seeds": 1,
        "epochs": 1,
        "batch_size": 1,
        "particles": 2,
        "gradient_draws": 2,
        "common_epochs": 1,
        "burn_in": 0,
    }
    for name, least in (smallest | {"importance_samples": 1, "jobs": 0}).items():
        if getattr(config, name) < least:
            raise BadInput(f"{name} is {getattr(config, name)}: expected at least {least}")
    # Read here once, so that a missing file is told before a run folder and workers exist.
    rows = len(images(config.data).train)
    if config.batch_size > rows:
        raise BadInput(f"batch_size is {config.batch_size}, and {config.data} has {rows} training images; lower it")


def in_parallel(tasks: Sequence[tuple], config: Compare, run: RunFolder, jobs: int) -> Iterable[dict[str, Any]]:
    """Results as they come."""
    if jobs == 1:
        return (function(config, run, *rest) for function, *rest in tasks)
    from joblib import Parallel, delayed

    return Parallel(jobs, return_as="generator_unordered")(
        delayed(function)(config, run, *rest) for function, *rest in tasks
    )


@lru_cache(maxsize=1)
def images(name: str):
    """The data set, binarized at one half; read once a process."""
    from gumbo.experiments.data import load

    return load(name, binarize="static")


def build(config: Compare, data_shape: Sequence[int], seed: int, form: str):
    """Model and guide in one of a family's forms; forms of one seed hold the same weights."""
    import torch

    from gumbo.guides import CategoricalGuide, NormalGuide, RelaxedCategoricalGuide
    from gumbo.models import CategoricalVAE, GaussianVAE

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        if form in ("reparameterized", "score"):
            model = GaussianVAE(data_shape, latent_dim=config.latent_dim, hidden=config.hidden)
            return model, NormalGuide(model, hidden=config.hidden, reparameterized=form == "reparameterized")
        sizes = {"num_latents": config.num_latents, "num_classes": config.num_classes, "hidden": config.hidden}
        model = CategoricalVAE(data_shape, **sizes, relaxed=form == "relaxed")
        guide = RelaxedCategoricalGuide if form == "relaxed" else CategoricalGuide
        return model, guide(model, hidden=config.hidden)


def copy_weights(pair, source) -> None:
    """Give a pair the weights of another form of it; what only one of them has (a temperature) stays."""
    for program, other in zip(pair, source, strict=True):
        weights = {name: value for name, value in other.state_dict().items() if name != "temperature"}
        missing = set(program.load_state_dict(weights, strict=False).missing_keys)
        assert missing <= {"temperature"}, missing


def loss_of(config: Compare, arm: Arm):
    from gumbo.inference import make_loss

    return make_loss(arm.word, num_particles=config.particles if arm.particles else None)


def train(config: Compare, run: RunFolder, arm: Arm, seed: int) -> dict[str, Any]:
    """One arm and seed: trained, watched on the validation data, judged on the test data."""
    from gumbo.inference import evaluate, fit
    from gumbo.inference.training.checkpoints import save_checkpoint

    data = images(config.data)
    model, guide = build(config, data.data_shape, seed, arm.form)
    where = {"family": arm.family, "arm": arm.name, "seed": seed}
    result = fit(
        model,
        guide,
        data.train,
        valid=data.valid,
        loss=loss_of(config, arm),
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
    run.append_metrics({**where, **result.history[0]})
    save_checkpoint(
        run.checkpoints / f"{arm.key}-seed{seed}.pt", {"model": model.state_dict(), "guide": guide.state_dict()}
    )
    found = evaluate(model, guide, data.test, num_samples=config.importance_samples, seed=seed)
    outcome = {
        **where,
        "what": "training",
        "objective": result.objective_name,
        "valid_elbo": [numbers["valid_elbo"] for numbers in result.history],
        "test": found.as_dict(),
        "ms_per_step": result.ms_per_step,
    }
    if seed == 0:
        outcome["pictures"] = sample_pictures(model, guide, data.test[:PICTURES])
    return outcome


def sample_pictures(model, guide, x):
    from gumbo.experiments.plots import prior_draws, reconstructions
    from gumbo.inference.posterior.evaluation import exact_pair

    model, guide = exact_pair(model, guide)
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
                # Pyro's average decays by 0.9 a draw: what is left of its start adds to the variance by its square.
                burn_in=config.burn_in if arm.word.endswith("+baseline") else 0,
            )
        # Arms with one objective share one true gradient, and the least noisy of them knows its size best.
        least = min((m for a, m in zip(arms, moments.values(), strict=True) if a.same_objective), key=noise)
        for arm in arms:
            own = moments[arm.name]
            signal = least.mean_norm if arm.same_objective else own.mean_norm
            found.setdefault(arm.name, {})[stage] = {
                "variance": own.total_variance,
                "signal_to_noise": signal / own.total_variance**0.5,
            }
        run.append_metrics({"family": family, "what": f"gradients ({stage})", "seed": seed})
    return {"family": family, "arm": "", "what": "gradients", "seed": seed, "moments": found}


def noise(moments) -> float:
    return moments.total_variance


# --- what is made of the results


def summarize(arms: Sequence[Arm], results: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """One row an arm: means and standard errors over seeds of whatever has come in."""
    rows = []
    for arm in arms:
        runs = [r for r in results if r["what"] == "training" and (r["family"], r["arm"]) == (arm.family, arm.name)]
        moments = [r["moments"] for r in results if r["what"] == "gradients" and r["family"] == arm.family]
        row: dict[str, Any] = {"family": arm.family, "arm": arm.name, "seeds": len(runs)}
        row["particles"] = "K" if arm.particles else 1
        row["objective"] = runs[0]["objective"] if runs else None
        row["elbo"] = mean_and_error([r["test"]["elbo"] for r in runs])
        row["log_evidence"] = mean_and_error([r["test"]["log_evidence"] for r in runs])
        row["ms_per_step"] = mean_and_error([r["ms_per_step"] for r in runs])
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


def table_of(family: str, rows: Sequence[Mapping[str, Any]]) -> tuple[str, list[str], list[list[str]]]:
    """Title, column heads and cells of one family's table."""
    heads = [
        "estimator",
        "test ELBO",
        "log p(x)",
        "var at start",
        f"÷ {REFERENCE[family]}",
        "var later",
        "÷",
        "SNR later",
    ]
    heads.append("ms/step")
    cells = [
        [
            row["arm"] + (" (K)" if row["particles"] == "K" else ""),
            cell(row["elbo"], decimals),
            cell(row["log_evidence"], decimals),
            cell(row["variance_initial"], digits, False),
            cell(row["ratio_initial"], digits, False),
            cell(row["variance_trained"], digits, False),
            cell(row["ratio_trained"], digits, False),
            cell(row["signal_to_noise_trained"], digits, False),
            cell(row["ms_per_step"], decimals, False),
        ]
        for row in rows
        if row["family"] == family
    ]
    return f"{family} latents", heads, cells


NOTE = (
    "ELBO and log p(x): true (exact-density or discrete) bounds on test data, nats per datum, mean ± standard error "
    "over seeds. var: total variance of the guide's gradient at parameters common to all arms of the family, as drawn "
    "(start) and after a common training (later); ÷: as a multiple of the reference arm's. SNR: norm of the mean "
    "gradient over the root of that variance. (K): draws several particles a step."
)


def write_tables(run: RunFolder, arms: Sequence[Arm], results: Sequence[Mapping[str, Any]]) -> None:
    rows = summarize(arms, results)
    text = ["# gumbo compare", ""]
    for family in dict.fromkeys(arm.family for arm in arms):
        title, heads, cells = table_of(family, rows)
        text += [f"## {title}", "", "| " + " | ".join(heads) + " |", "| --- |" + " ---: |" * (len(heads) - 1)]
        text += ["| " + " | ".join(line) + " |" for line in cells] + [""]
    (run.path / "table.md").write_text("\n".join([*text, NOTE, ""]))


def show(arms: Sequence[Arm], results: Sequence[Mapping[str, Any]]) -> None:
    """The final tables, on standard output."""
    rows = summarize(arms, results)
    tables = [table_of(family, rows) for family in dict.fromkeys(arm.family for arm in arms)]
    if sys.stdout.isatty():
        from rich.console import Console
        from rich.table import Table

        console = Console()
        for title, heads, cells in tables:
            table = Table(title=title, caption=NOTE if title == tables[-1][0] else None)
            for index, head in enumerate(heads):
                table.add_column(head, justify="right" if index else "left", no_wrap=True)
            for line in cells:
                table.add_row(*line)
            console.print(table)
        return
    for title, heads, cells in tables:
        widths = [max(len(line[column]) for line in (heads, *cells)) for column in range(len(heads))]
        print(f"\n{title}")
        for line in (heads, *cells):
            first, *rest = zip(line, widths, strict=True)
            print("  ".join([first[0].ljust(first[1]), *(text.rjust(width) for text, width in rest)]).rstrip())
    print(f"\n{NOTE}")


def draw(
    run: RunFolder, arms: Sequence[Arm], results: Sequence[Mapping[str, Any]], pictures: Mapping[tuple[str, str], Any]
) -> None:
    """All plots of the run."""
    import numpy as np

    from gumbo.experiments.plots import bars, image_rows, learning_curves

    curves: dict[str, dict[str, Any]] = {}
    variances: dict[str, dict[str, Any]] = {}
    for arm in arms:
        title = f"{arm.family} latents"
        runs = [r for r in results if r["what"] == "training" and (r["family"], r["arm"]) == (arm.family, arm.name)]
        curves.setdefault(title, {})[arm.name] = np.array([r["valid_elbo"] for r in runs])
        moments = [r["moments"][arm.name] for r in results if r["what"] == "gradients" and r["family"] == arm.family]
        variances.setdefault(title, {})[arm.name] = {
            "initial parameters": [m["initial"]["variance"] for m in moments],
            "after common training": [m["trained"]["variance"] for m in moments],
        }
    learning_curves(run.plots / "learning_curves.png", curves, "true ELBO on validation data (nats per datum)")
    bars(run.plots / "gradient_variance.png", variances, "total variance of the guide's gradient (log scale)")
    for family in dict.fromkeys(arm.family for arm in arms):
        shown = {name: images for (of, name), images in sorted_by_arm(arms, pictures) if of == family}
        data = next(iter(shown.values()))["data"]
        image_rows(
            run.plots / f"{family}_reconstructions.png",
            f"{family} latents: test images and their reconstructions (seed 0)",
            {"data": data, **{name: images["reconstructions"] for name, images in shown.items()}},
        )
        image_rows(
            run.plots / f"{family}_prior_draws.png",
            f"{family} latents: draws from the model (seed 0)",
            {name: images["prior"] for name, images in shown.items()},
        )


def sorted_by_arm(arms: Sequence[Arm], pictures: Mapping[tuple[str, str], Any]):
    return [((arm.family, arm.name), pictures[arm.family, arm.name]) for arm in arms]


def main(argv: Sequence[str] | None = None, prog: str = "gumbo compare") -> None:
    run_command(Compare, compare, argv, prog, presets={"quick": QUICK})


if __name__ == "__main__":
    # By import, so that worker processes find the functions under the same name.
    from gumbo.experiments.compare import main as run_script

    run_script()
