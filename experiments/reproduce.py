"""``gumbo reproduce``: published tables trained again, cell by cell, beside the published numbers."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from gumbo.errors import BadInput
from gumbo.experiments._command import run_command
from gumbo.experiments._runs import environment
from gumbo.experiments.compare import mean_and_error
from gumbo.files import write_whole
from gumbo.tables import plain


@dataclass
class Reproduce:
    """Train the cells of a published table and set them beside the published numbers.

    Args:
        table: a table's name: arm, coins, gumbel-softmax, iwae, question or toy.
        cells: names or patterns, as in `[nonlinear/*]`; by default all.
        seeds: the seeds to run each cell with.
        steps: steps a cell; by default the paper's own budget.
        jobs: cells trained at the same time, one thread each.
        folder: where runs keep their checkpoints; a run that stands there goes on.
        results: where finished cells are written, one JSON file each; those that stand there are not run again.
        device: cpu, cuda, …
        quick: a trial of a few steps on a few images.
        show: train nothing, and show what has been found.
    """

    table: str
    cells: list[str] = field(default_factory=list)
    seeds: list[int] = field(default_factory=lambda: [0])
    steps: int | None = None
    jobs: int = 1
    folder: str = "runs/reproduce"
    results: str = "experiments/results"
    device: str = "cpu"
    quick: bool = False
    show: bool = False


def reproduce(config: Reproduce) -> list[dict[str, Any]]:
    """Run what is missing, then show the table."""
    from gumbo.experiments.reproduction import tables

    table = tables[config.table]
    chosen = table.chosen(config.cells)
    if config.jobs < 1 or (config.steps is not None and config.steps < 1):
        raise BadInput("jobs and steps must be whole numbers of at least 1")
    results = Path(config.folder) / "quick-results" if config.quick else Path(config.results)
    wanted = [(cell, seed) for seed in config.seeds for cell in chosen]
    missing = [task for task in wanted if not path_of(results, table.name, *task).exists()]
    if not config.show:
        from joblib import Parallel, delayed

        # Of the code that is loaded now; each cell has a command of its own.
        surroundings = {name: value for name, value in environment().items() if name != "command"}
        parallel = Parallel(n_jobs=min(config.jobs, len(missing) or 1), return_as="generator_unordered")
        for cell, seed, numbers in parallel(delayed(_run)(config, table.name, *task) for task in missing):
            # The caller writes: a worker that dies leaves no half of a file.
            found = {"cell": asdict(cell), "seed": seed, **numbers, "table": table.name}
            found |= {"command": command_of(config, cell, seed), "env": surroundings}
            path = path_of(results, table.name, cell, seed)
            text = json.dumps(found, indent=1) + "\n"
            write_whole(path, lambda file, text=text: file.write(text.encode()))
            print(f"gumbo reproduce: {cell.name} seed {seed}: {found['value']:.2f}", file=sys.stderr)
    found = [
        json.loads(path_of(results, table.name, *t).read_text())
        for t in wanted
        if path_of(results, table.name, *t).exists()
    ]
    show(table, found)
    if found and not config.show:
        write_report(Path(config.folder) / table.name / "report.html", table, found)
    return found


def _run(config: Reproduce, table: str, cell, seed: int):
    folder = Path(config.folder) / ("quick" if config.quick else "") / table / f"{slug(cell)}-seed{seed}"
    return cell, seed, cell.run(seed, config.steps or cell.steps, folder, quick=config.quick, device=config.device)


def slug(cell) -> str:
    return cell.name.replace("/", "-")


def path_of(results: Path, table: str, cell, seed: int) -> Path:
    return results / table / f"{slug(cell)}-seed{seed}.json"


def command_of(config: Reproduce, cell, seed: int) -> str:
    steps = "" if config.steps is None else f" --steps {config.steps}"
    quick = " --quick" if config.quick else ""
    cells = shlex.quote(json.dumps([cell.name]))
    return f"gumbo reproduce {config.table} --cells {cells} --seeds '[{seed}]'{steps}{quick}"


def show(table, found: Sequence[dict[str, Any]]) -> None:
    """The table on standard output, and what it concludes."""
    print(f"{table.name}: {table.source}; {table.value}")
    print("\n".join(plain(*rows_of(table, found))))
    for sentence in table.conclude(found) if table.conclude else ():
        print(sentence)


def write_report(path: Path, table, found: Sequence[dict[str, Any]]) -> None:
    """``report.html``: the table, what it concludes, and the curves of training."""
    from gumbo.experiments._report import Report, again

    concluded = table.conclude(found) if table.conclude else []
    known = sum(cell.published is not None for cell in table.cells)
    cells = len({numbers["cell"]["name"] for numbers in found})
    said = f"{cells} of {len(table.cells)} cells have been run; for {known} of the table's cells a number is published."
    page = Report(f"gumbo reproduce {table.name}", " ".join([said, *concluded]))
    page.text(f"{table.source}. {table.note}")
    page.table(*rows_of(table, found), f"Ours: {table.value}")
    curves = {
        f"{numbers['cell']['name']}, seed {numbers['seed']}": [
            (point["step"], point.get("train", point.get("mean"))) for point in numbers["curve"]
        ]
        for numbers in found
        if numbers.get("curve")
    }
    page.curves("Training", curves, "step", table.value.split(",")[0])
    again(page, environment())
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, lambda file: file.write(page.html().encode()))
    print(f"gumbo reproduce: {path}", file=sys.stderr)


def rows_of(table, found: Sequence[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Heads and cells: published beside ours, mean ± standard error over seeds, and what stands beside."""
    heads = ["cell", "published", "ours", "seeds", "steps", "share"]
    beside = list(dict.fromkeys(head for numbers in found for head in numbers.get("beside", ())))
    rows = []
    for cell in table.cells:
        runs = [numbers for numbers in found if numbers["cell"]["name"] == cell.name]
        if not runs:
            continue
        mean, error = mean_and_error([numbers["value"] for numbers in runs])
        row = [cell.name, "" if cell.published is None else f"{cell.published:.2f}"]
        row.append(number(mean) if len(runs) == 1 else f"{number(mean)} ± {number(error)}")
        row += [str(len(runs)), f"{runs[0]['steps']:,}", f"{runs[0]['share']:.1%}"]
        for head in beside:
            values = [numbers["beside"][head] for numbers in runs if head in numbers.get("beside", ())]
            row.append(number(sum(values) / len(values)) if values else "")
        rows.append(row)
    return heads + beside, rows


def number(value: float) -> str:
    """Two decimals where these tell something, else three digits."""
    return f"{value:.2f}" if 0.1 <= abs(value) < 1e5 or value == 0 else f"{value:.3g}"


def main(argv: Sequence[str] | None = None, prog: str = "gumbo reproduce") -> None:
    run_command(Reproduce, reproduce, argv, prog)


if __name__ == "__main__":
    main()
