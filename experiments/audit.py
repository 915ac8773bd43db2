"""``gumbo audit``: which gradient estimator to use on a model and guide, yours or the collection's."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from gumbo.errors import BadInput, GumboError
from gumbo.experiments._command import run_command
from gumbo.experiments._names import imported, program
from gumbo.experiments._runs import RunFolder
from gumbo.registry import Registry


@dataclass
class Audit:
    """Draw gradients of many estimators at fixed parameters, hold them against the exact gradient, and recommend one.

    Args:
        model: a Pyro program as module:object (a function, a module, or a class to be made), or a model's name.
        guide: its guide, alike.
        args: module:function that returns the programs' arguments, a tuple or a mapping of keywords; or one tensor.
        data: a data set's name, whose first training images are the argument.
        batch_size: how many images.
        estimators: words of estimators and of Pyro's own ELBOs; by default every one there is.
        objective: elbo, or iwae (with `--particles`).
        particles: draws a step; by default each estimator's own minimum.
        num_samples: gradients drawn of each estimator.
        reference: auto, exact, long-run, or an estimator to be run long.
        burn_in: steps in which baselines and control variates settle.
        alpha: the chance that any unbiased estimator is flagged.
        kl_weight: a factor for the latent terms.
        one_by_one: run particles one after the other, for programs whose layers do not broadcast.
        max_plate_nesting: how deep plates nest; by default the first run tells.
        model_options: arguments of a model that is made here, as in `--model_options.num_latents=6`.
        guide_options: arguments of a guide that is made here.
        seed: initial weights and draws.
        folder: the run folder; by default ./runs/audit-<time>.
        trust: import what the config.yaml of a run, given as `--config`, names by import path.
    """

    model: str
    guide: str
    args: str | None = None
    data: str | None = None
    batch_size: int = 16
    estimators: list[str] = field(default_factory=list)
    objective: str = "elbo"
    particles: int | None = None
    num_samples: int = 2000
    reference: str = "auto"
    burn_in: int = 200
    alpha: float = 0.05
    kl_weight: float = 1.0
    one_by_one: bool = False
    max_plate_nesting: int | None = None
    model_options: dict[str, Any] = field(default_factory=dict)
    guide_options: dict[str, Any] = field(default_factory=dict)
    seed: int = 0
    folder: str | None = None
    trust: bool = False


def audit(config: Audit):
    """Audit, print the table and write the run folder; returns the dataset."""
    from gumbo.inference import audit as judge
    from gumbo.inference import plot_audit

    check(config)
    model, guide, args, kwargs = programs(config)
    run = RunFolder.create("audit", config, config.folder)
    print(f"gumbo audit: {config.model} and {config.guide} into {run.path}", file=sys.stderr)
    try:
        report = judge(
            model,
            guide,
            *args,
            **kwargs,
            estimators=config.estimators or None,
            num_samples=config.num_samples,
            num_particles=config.particles,
            objective=config.objective,
            reference=config.reference,
            seed=config.seed,
            burn_in=config.burn_in,
            alpha=config.alpha,
            vectorize_particles=not config.one_by_one,
            max_plate_nesting=config.max_plate_nesting,
            kl_weight=config.kl_weight,
            progress=say,
        )
    except GumboError:
        raise
    except Exception as error:
        first = next(iter(str(error).splitlines()), "")
        raise BadInput(f"the programs fail on these arguments: {type(error).__name__}: {first}") from error
    report.to_netcdf(run.path / "audit.nc", engine="h5netcdf")
    (run.path / "table.md").write_text(as_markdown(report, f"{config.model} and {config.guide}"))
    plot_audit(report, run.plots / "audit.png")
    show(report)
    print(f"gumbo audit: audit.nc, table.md and plots/audit.png in {run.path}", file=sys.stderr)
    return report


def check(config: Audit) -> None:
    from gumbo.inference.auditing.comparison import labelled

    if config.args is not None and config.data is not None:
        raise BadInput("--args and --data both say what the programs are called with: give one of them")
    if config.batch_size < 1:
        raise BadInput(f"batch_size is {config.batch_size}: expected at least 1")
    labelled(config.estimators or None)


def say(label: str, done: int, total: int) -> None:
    """One line on standard error, written over on a terminal."""
    over = sys.stderr.isatty()
    words = {"": "done", "reference": "finding the reference", "time": "timing"}.get(label, label)
    ending = "" if over and label else "\n"
    print(f"{chr(13) + chr(27) + '[K' if over else ''}{done}/{total}  {words}", end=ending, file=sys.stderr, flush=True)


# What is audited.


def programs(config: Audit) -> tuple[Callable, Callable, tuple, dict[str, Any]]:
    """Model, guide, and their arguments."""
    import torch

    from gumbo.guides import guides
    from gumbo.models import models

    images, labels = batch(config)
    with torch.random.fork_rng():
        torch.manual_seed(config.seed)
        shape = (tuple(images.shape[1:]),) if images is not None else ()
        model = made(models, config.model, "model", shape, config.model_options)
        guide = made(guides, config.guide, "guide", (model,), config.guide_options)
        if images is None:
            return model, guide, *user_arguments(config.args)
    if hasattr(model, "inputs"):
        return model, guide, (), model.inputs(images, labels)
    return model, guide, (images,), {}


def batch(config: Audit):
    if config.data is None:
        return None, None
    from gumbo.experiments.data import load

    data = load(config.data, binarize="static")
    labels = data.labels.get("train")
    return data.train[: config.batch_size], None if labels is None else labels[: config.batch_size]


def made(registry: Registry[Any], name: str, kind: str, positional: tuple, options: Mapping[str, Any]) -> Callable:
    """A registered program built, or an imported one; a class is called with as much of ``positional`` as it takes."""
    from gumbo.experiments.train import construct

    found = program(registry, name)
    if not isinstance(found, type):
        if options:
            raise BadInput(f"{kind} {name!r} is no class that could take options, and was given {sorted(options)[0]!r}")
        return found
    parameters = inspect.signature(found).parameters.values()
    places = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    given = positional if places and (places[0].default is places[0].empty or name in registry) else ()
    missing = [p.name for p in places[len(given) :] if p.default is p.empty and p.name not in options]
    if missing:
        advice = "; give --data, which tells the shape of the images" if kind == "model" and not positional else ""
        raise BadInput(f"{kind} {name!r} needs {missing[0]!r} to be made{advice}")
    return construct(found, name, kind, given, options)


def user_arguments(path: str | None) -> tuple[tuple, dict[str, Any]]:
    """What the user's function returns, as positional and keyword arguments."""
    from gumbo.inference.engine.rows import arguments_of

    if path is None:
        return (), {}
    function = imported(path, "arguments")
    return arguments_of(function() if callable(function) else function)


# What is told.

HEADS = ["estimator", "verdict", "bias / ‖g‖", "max |z|", "variance", "SNR", "cos", "runs", "ms", "var × ms"]
NOTE = (
    "bias / ‖g‖: length of mean − reference, freed of what sampling adds, ± its error, over the gradient's length; "
    "z: of the worst element, before adjustment; variance, SNR: of the guide's gradient, in total and nats², and "
    "length of the reference over its root; cos: of the mean to the reference; runs: model runs a step; ms: its median."
)


def cells(report) -> list[list[str]]:
    """A row for each estimator that has numbers, the least variance × time first."""
    from gumbo.experiments.compare import digits

    judged = [label for label in report.estimator.values if report.total_variance.sel(estimator=label).notnull()]
    rows = [report.sel(estimator=label) for label in judged]
    rows.sort(key=lambda row: (row.work_normalized_variance.item(), row.seconds.item()))
    norm = report.attrs["reference_total_norm"] or 1.0
    return [
        [
            str(row.estimator.item()),
            row.verdict.item().partition(":")[0],
            f"{row.relative_bias.item():.1%} ± {row.total_bias_error.item() / norm:.1%}",
            f"{row.max_z.item():.1f}",
            digits(row.total_variance.item()),
            digits(row.total_signal_to_noise.item()),
            f"{row.total_cosine.item():.3f}",
            digits(row.evaluations.item()),
            f"{1e3 * row.seconds.item():.2f}",
            digits(1e3 * row.work_normalized_variance.item()),
        ]
        for row in rows
    ]


def remarks(report) -> list[str]:
    """What does not fit into the table: why estimators were flagged or refused, those with one reason together."""
    by_reason: dict[str, list[str]] = {}
    for label, verdict in zip(report.estimator.values, report.verdict.values, strict=True):
        if ":" in verdict:
            by_reason.setdefault(str(verdict), []).append(str(label))
    return [f"{', '.join(labels)}: {verdict}" for verdict, labels in by_reason.items()]


def facts(report) -> str:
    attrs = report.attrs
    error = "" if attrs["reference_is_exact"] else f" ± {attrs['reference_total_error']:.2g}"
    return (
        f"reference: {attrs['reference']}, ‖g‖ = {attrs['reference_total_norm']:.4g}{error}; "
        f"{attrs['num_samples']} gradients each, objective {attrs['objective']}, seed {attrs['seed']}; "
        f"{attrs['num_tests']} elements tested, any false alarm with probability {attrs['alpha']}"
    )


def advice(report) -> str:
    from gumbo.inference import recommend

    label, reason = recommend(report)
    return f"recommended: {label}; {reason}" if label else f"recommended: none; {reason}"


def as_markdown(report, title: str) -> str:
    """The table, the remarks, and the variance site by site."""
    lines = [f"# gumbo audit: {title}", "", facts(report), "", *markdown_table(HEADS, cells(report)), "", NOTE, ""]
    lines += [f"- {remark}" for remark in remarks(report)]
    lines += ["", advice(report), "", "## Variance by site", ""]
    by_site = report["variance"].dropna("estimator").groupby("sites").sum()
    from gumbo.experiments.compare import digits

    sites = [str(site) for site in by_site.sites.values]
    body = [
        [str(label), *(digits(by_site.sel(estimator=label, sites=site).item()) for site in sites)]
        for label in by_site.estimator.values
    ]
    lines += markdown_table(["estimator", *(f"parameters of {site}" for site in sites)], body)
    return "\n".join([*lines, ""])


def markdown_table(heads: Sequence[str], body: Sequence[Sequence[str]]) -> list[str]:
    escaped = [[text.replace("|", "\\|") for text in line] for line in (heads, *body)]
    first, *rest = ["| " + " | ".join(line) + " |" for line in escaped]
    return [first, "| --- |" + " ---: |" * (len(heads) - 1), *rest]


def show(report) -> None:
    """The table on standard output."""
    body = cells(report)
    print(facts(report))
    if sys.stdout.isatty():
        from rich.console import Console
        from rich.table import Table

        table = Table(caption=NOTE)
        for index, head in enumerate(HEADS):
            table.add_column(head, justify="right" if index > 1 else "left", no_wrap=True)
        colours = {"ok": "green", "flagged": "bold red", "biased": "yellow", "no bias seen": "yellow"}
        for line in body:
            table.add_row(*line, style=colours.get(line[1]))
        Console().print(table)
    else:
        widths = [max(len(line[column]) for line in (HEADS, *body)) for column in range(len(HEADS))]
        for line in (HEADS, *body):
            placed = [
                text.ljust(w) if i < 2 else text.rjust(w) for i, (text, w) in enumerate(zip(line, widths, strict=True))
            ]
            print("  ".join(placed).rstrip())
        print(NOTE)
    for remark in remarks(report):
        print(remark)
    print(advice(report))


def with_lists(argv: Sequence[str]) -> list[str]:
    """``--estimators score rloo`` as one value, ``[score,rloo]``."""
    made: list[str] = []
    for item in argv:
        if made and not item.startswith("-") and (given := made[-1]).startswith("--estimators=[") and item[0] != "[":
            made[-1] = f"{given[:-1]}{',' if given[-2] != '[' else ''}{item}]"
        elif item == "--estimators":
            made.append("--estimators=[]")
        elif item.startswith("[") and made and made[-1] == "--estimators=[]":
            made[-1] = f"--estimators={item}"
        else:
            made.append(item)
    return made


def main(argv: Sequence[str] | None = None, prog: str = "gumbo audit") -> None:
    run_command(Audit, audit, with_lists(sys.argv[1:] if argv is None else argv), prog)


if __name__ == "__main__":
    main()
