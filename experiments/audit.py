"""``gumbo audit``: which gradient estimator to use on a model and guide, yours or the collection's."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from gumbo.errors import BadInput, GumboError, first_line
from gumbo.experiments._command import check_least, run_command
from gumbo.experiments._names import current_folder_importable, imported, named_objective, program
from gumbo.experiments._runs import RunFolder
from gumbo.files import write_by_name
from gumbo.registry import Registry
from gumbo.tables import digits, markdown


@dataclass
class Audit:
    """Compare the gradients of many estimators at fixed parameters with the exact gradient, and recommend one.

    Args:
        model: a Pyro program as module:object (a function, a module, or a class to be made), or a model's name.
        guide: its guide, in the same form.
        args: module:function that returns the programs' arguments, a tuple or a mapping of keywords; or one tensor.
        data: a data set's name; its first training images are the argument.
        batch_size: number of images.
        estimators: words of estimators and of Pyro's own ELBOs, or for each site one, as in
            `--estimators rloo '{gate: enumerate, z: pathwise}'`; by default every word.
        objective: elbo, or iwae or renyi (with `--particles`).
        objective_options: options of the objective, as in `--objective_options.alpha=0.5` for renyi.
        particles: draws per step; by default each estimator's smallest number.
        num_samples: gradients per estimator.
        reference: auto, exact, long-run, or an estimator for a long run.
        burn_in: steps in which baselines and control variates adapt.
        alpha: the probability that any unbiased estimator is flagged.
        kl_weight: a factor for the latent terms.
        one_by_one: run particles one after the other, for programs whose layers do not broadcast.
        max_plate_nesting: number of batch dimensions of plates; by default found in the first run.
        model_options: arguments of a model class, as in `--model_options.num_latents=6`.
        guide_options: arguments of a guide class.
        seed: initial weights and draws.
        folder: the run folder; by default ./runs/audit-<time>.
        trust: import the import paths in the config.yaml of a run, given as `--config`.
    """

    model: str
    guide: str
    args: str | None = None
    data: str | None = None
    batch_size: int = 16
    estimators: list[dict[str, str] | str] = field(default_factory=list)
    objective: str = "elbo"
    objective_options: dict[str, Any] = field(default_factory=dict)
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
    from gumbo.experiments._report import NARROW
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
            objective=named_objective(config.objective, config.objective_options),
            reference=config.reference,
            seed=config.seed,
            burn_in=config.burn_in,
            alpha=config.alpha,
            vectorize_particles=False if config.one_by_one else None,
            max_plate_nesting=config.max_plate_nesting,
            kl_weight=config.kl_weight,
            progress=say,
        )
    except Exception as error:
        run.empty()
        if not isinstance(error, GumboError):
            raise BadInput(f"the programs fail on these arguments: {first_line(error, kind=True)}") from error
        if config.args is None and config.data is None and isinstance(error.__cause__, TypeError):
            raise BadInput(f"{error}; say what they are called with: --args module:function") from error
        raise
    write_by_name(run.path / "audit.nc", lambda path: report.to_netcdf(path, engine="h5netcdf"), report.nbytes)
    run.write_text("table.md", as_markdown(report, f"{config.model} and {config.guide}"))
    plot_audit(report, run.plots / "audit.png")
    plot_audit(report, run.plots / f"audit{NARROW}.png", narrow=True)
    write_report(run, report, f"{config.model} and {config.guide}")
    show(report)
    print(f"gumbo audit: audit.nc, table.md, report.html and plots/audit.png in {run.path}", file=sys.stderr)
    return report


def check(config: Audit) -> None:
    from gumbo.inference.auditing.comparison import check_settings, labelled

    if config.args is not None and config.data is not None:
        raise BadInput("--args and --data both say what the programs are called with: give one of them")
    check_least(config, batch_size=1, particles=1)
    with current_folder_importable():
        labelled(config.estimators or None)
        if config.reference not in ("auto", "exact", "long-run"):
            labelled(config.reference)
    objective = named_objective(config.objective, config.objective_options)
    check_settings(config.num_samples, config.particles, objective, config.burn_in, config.alpha, config.kl_weight)


def say(label: str, done: int, total: int) -> None:
    """Print one line to standard error, overwritten on a terminal."""
    over = sys.stderr.isatty()
    words = {"": "done", "reference": "finding the reference", "time": "timing"}.get(label, label)
    ending = "" if over and label else "\n"
    print(f"{chr(13) + chr(27) + '[K' if over else ''}{done}/{total}  {words}", end=ending, file=sys.stderr, flush=True)


# The programs and their arguments.


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

    data = load(config.data, binarize="auto")
    if data.rows is None:
        images, labels = data.train, data.labels.get("train")
    else:  # read on demand
        from gumbo.inference.engine.sources import Source

        images, labels = data.batch(Source(data.rows, f"dataset {data.name!r}").held())
    return images[: config.batch_size], None if labels is None else labels[: config.batch_size]


def made(registry: Registry[Any], name: str, kind: str, positional: tuple, options: Mapping[str, Any]) -> Callable:
    """A registered program built, or an imported one; a class receives as many of ``positional`` as it takes."""
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
        advice = "; give --data, which sets the shape of the images" if kind == "model" and not positional else ""
        raise BadInput(f"{kind} {name!r} needs {missing[0]!r} to be made{advice}")
    return construct(found, name, kind, given, options)


def user_arguments(path: str | None) -> tuple[tuple, dict[str, Any]]:
    """The result of the user's function, as positional and keyword arguments."""
    from gumbo.inference.engine.rows import arguments_of

    if path is None:
        return (), {}
    function = imported(path, "arguments")
    return arguments_of(function() if callable(function) else function)


# Output.


def as_markdown(report, title: str) -> str:
    """The table, the remarks, and the variance site by site."""
    from gumbo.inference.auditing.report import HEADS, NOTE, advice, cells, facts, remarks

    lines = [f"# gumbo audit: {title}", "", facts(report), "", *markdown(HEADS, cells(report)), "", NOTE, ""]
    lines += [f"- {remark}" for remark in remarks(report)]
    lines += ["", advice(report), "", "## Variance by site", ""]
    by_site = report["variance"].dropna("estimator").groupby("sites").sum()
    sites = [str(site) for site in by_site.sites.values]
    body = [
        [str(label), *(digits(by_site.sel(estimator=label, sites=site).item()) for site in sites)]
        for label in by_site.estimator.values
    ]
    lines += markdown(["estimator", *(f"parameters of {site}" for site in sites)], body)
    return "\n".join([*lines, ""])


def write_report(run: RunFolder, report, title: str) -> None:
    """``report.html``: the recommendation, the table, the remarks."""
    from gumbo.experiments._report import Report, finish
    from gumbo.inference.auditing.report import HEADS, NOTE, advice, cells, facts, remarks

    page = Report(f"gumbo audit: {title}", advice(report))
    page.text(facts(report))
    page.table(HEADS, cells(report), "Estimators, the least variance × time first")
    page.text(NOTE)
    for remark in remarks(report):
        page.text(remark)
    shown = (
        "Bias of each estimator with its standard error, and the variance of its gradient against the time of a step"
    )
    finish(run, page, captions={"audit": shown})


def show(report) -> None:
    """The table on standard output."""
    print(report.table())


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
