"""``gumbo reproduce``: train the cells of published tables and compare them with the published numbers."""

from __future__ import annotations

import json
import re
import shlex
import signal
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from fnmatch import fnmatch
from functools import lru_cache
from pathlib import Path
from typing import Any

from gumbo.errors import BadInput, Interrupted, UnknownName, first_line
from gumbo.experiments._command import check_least, refuse_twice, run_command
from gumbo.experiments._runs import environment, in_utf8
from gumbo.experiments._workers import check_workers, in_parallel
from gumbo.experiments.compare import mean_and_error
from gumbo.experiments.reproduction.orderings import is_relaxed
from gumbo.files import write_whole
from gumbo.tables import folded, wrapped

ALL = "all"
SETTINGS = ("seeds", "steps", "share")  # columns
OF_THE_PAPER = ("published", "steps")  # fields of a cell that decide nothing of its result
_NUMBER = re.compile(r"\b\d+(\.\d*)?(e[-+]?\d+)?\b")


@dataclass
class Reproduce:
    """Train the cells of a published table and compare them with the published numbers.

    Args:
        table: arm, coins, gumbel-softmax, iwae, posteriors, question, reinmax, semi-supervised, toy, or all of them.
        cells: names or patterns, as in `[nonlinear/*]`, or with `all` as in `[arm/nonlinear/*]`; by default every cell.
        seeds: the seeds to run each cell with.
        steps: steps a cell; by default the paper's own budget. With `all`, a cell with a smaller budget keeps its own.
        jobs: cells trained at the same time, one thread each.
        backend: loky for processes of this machine, dask for the workers of a Dask cluster, one cell at a time each.
        address: the cluster's scheduler, tcp://host:port.
        folder: the folder for checkpoints, the same path on every worker; a run found there is resumed.
        results: the folder for finished cells, one JSON file each; a cell found there is not run again, unless its
            settings have changed.
        device: cpu, cuda, …
        quick: run a few steps on a few images.
        show: train nothing and show the finished cells.
    """

    table: str
    cells: list[str] = field(default_factory=list)
    seeds: list[int] = field(default_factory=lambda: [0])
    steps: int | None = None
    jobs: int = 1
    backend: str = "loky"
    address: str | None = None
    folder: str = "runs/reproduce"
    results: str = "experiments/results"
    device: str = "cpu"
    quick: bool = False
    show: bool = False


def reproduce(config: Reproduce) -> list[dict[str, Any]]:
    """Run what is missing, then show the tables."""
    from gumbo.experiments.reproduction import tables

    check_workers(config.backend, config.address, config.jobs)
    check_least(config, steps=1)
    refuse_twice("seeds", config.seeds)
    if not config.seeds:
        raise BadInput("seeds is empty: expected some, as in [0, 1]")
    chosen = chosen_cells(config)
    results = Path(config.folder) / "quick-results" if config.quick else Path(config.results)
    wanted = [(table, cell, seed) for seed in config.seeds for table, cells in chosen.items() for cell in cells]
    missing = [task for task in wanted if finished(results, *task) is None]
    for name, cell, seed in missing:
        if path_of(results, name, cell, seed).exists():
            done = "left out" if config.show else "run again"
            print(
                f"gumbo reproduce: {name}: {cell.name} seed {seed}: the result has other settings and is {done}",
                file=sys.stderr,
            )
    if not config.show:
        with resumable(results, missing):
            run_cells(config, results, missing)
    everything = []
    for name in chosen:
        all_of_it = (finished(results, *task) for task in wanted if task[0] == name)
        found = [numbers for numbers in all_of_it if numbers is not None]
        if found:
            show(tables[name], found)
        else:
            print(f"gumbo reproduce: {name}: no finished cell in {results / name}", file=sys.stderr)
        if found and not config.show:
            write_report(Path(config.folder) / name / "report.html", tables[name], found)
        everything += found
    return everything


def run_cells(config: Reproduce, results: Path, missing: Sequence[tuple]) -> None:
    """Run cells, and write the result of each as it finishes."""
    # A worker may have another current folder.
    there = replace(config, folder=str(Path(config.folder).absolute()), results=str(results.absolute()))
    tasks = [(there, *task) for task in missing]
    where = {"jobs": config.jobs, "backend": config.backend, "address": config.address}
    for (_, name, cell, seed), numbers in in_parallel(_run, tasks, **where, name=_name):
        if isinstance(numbers, str):
            print(f"gumbo reproduce: {name}: {cell.name} seed {seed}: {numbers}", file=sys.stderr)
            continue
        # The caller writes: a worker that dies leaves no half of a file.
        found = {"cell": asdict(cell), "seed": seed} | numbers | {"table": name}
        found |= {"command": command_of(config, name, cell, seed), "env": found.pop("env")}
        text = json.dumps(found, indent=1) + "\n"
        path = path_of(results, name, cell, seed)
        write_whole(path, lambda file, text=text: file.write(text.encode()), shared=True)  # two may run one table
        print(f"gumbo reproduce: {name}: {cell.name} seed {seed}: {found['value']:.2f}", file=sys.stderr)


@contextmanager
def resumable(results: Path, missing: Sequence[tuple]) -> Iterator[None]:
    """Say in an interruption how many cells are finished, and that the same command goes on."""
    try:
        yield
    except KeyboardInterrupt as error:
        kept = sum(finished(results, *task) is not None for task in missing)
        how = f"; {kept} of {len(missing)} cells are finished and kept; the same command runs the others"
        raise Interrupted(getattr(error, "signal", signal.SIGINT), "", how) from None


def chosen_cells(config: Reproduce) -> dict[str, list[Any]]:
    """The cells that the patterns name, by table."""
    from gumbo.experiments.reproduction import tables

    if config.table not in (ALL, *tables):
        raise UnknownName("table", config.table, (ALL, *tables))
    if config.table != ALL:
        return {config.table: tables[config.table].chosen(config.cells)}
    names = {(name, cell.name): f"{name}/{cell.name}" for name in tables for cell in tables[name].cells}
    for pattern in config.cells:
        if not any(fnmatch(whole, pattern) for whole in names.values()):
            raise BadInput(f"no table has a cell {pattern!r}: of all tables, cells are TABLE/CELL, as in arm/linear/*")
    taken = {key for key, whole in names.items() if not config.cells or any(fnmatch(whole, p) for p in config.cells)}
    chosen = {name: [cell for cell in tables[name].cells if (name, cell.name) in taken] for name in tables}
    return {name: cells for name, cells in chosen.items() if cells}


def _run(config: Reproduce, table: str, cell, seed: int) -> dict[str, Any] | str:
    """The numbers of a cell; a phrase for one that another process runs or has finished meanwhile."""
    from gumbo.inference.training.locks import FolderInUse, FolderLock

    env = surroundings()
    folder = Path(config.folder) / ("quick" if config.quick else "") / table / f"{slug(cell)}-seed{seed}"
    steps = steps_of(config, cell) or cell.steps
    try:
        with FolderLock(folder):
            if finished(Path(config.results), table, cell, seed) is not None:
                return "finished by another process meanwhile"
            return cell.run(seed, steps, folder, quick=config.quick, device=config.device) | {"env": env}
    except FolderInUse as error:
        return f"left to {error.owner}, which runs it"
    finally:
        with suppress(OSError):  # a cell that keeps nothing leaves it empty
            folder.rmdir()


def _name(_config: Reproduce, table: str, cell, seed: int) -> str:
    return f"{table}: {cell.name} seed {seed}"


def steps_of(config: Reproduce, cell) -> int | None:
    """The number of steps that was asked for; None if the cell keeps its own."""
    if config.table == ALL and config.steps is not None and config.steps >= cell.steps:
        return None
    return config.steps


@lru_cache(maxsize=1)
def surroundings() -> dict[str, Any]:
    """The environment of this process's code, taken before its first cell, without the command."""
    return {name: value for name, value in environment().items() if name != "command"}


def slug(cell) -> str:
    return cell.name.replace("/", "-")


def path_of(results: Path, table: str, cell, seed: int) -> Path:
    return results / table / f"{slug(cell)}-seed{seed}.json"


def finished(results: Path, table: str, cell, seed: int) -> dict[str, Any] | None:
    """The stored result of a cell; None if there is none, or if it was found with other settings than the cell's."""
    path = path_of(results, table, cell, seed)
    if not path.exists():
        return None
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        kept = dict(found["cell"])
        if not {"value", "steps", "share", "seed"} <= found.keys():
            raise ValueError("a number is missing")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise BadInput(
            f"{path} is no result of gumbo reproduce ({first_line(error, kind=True)}): delete it, and the cell runs "
            "again"
        ) from error
    settings = json.loads(json.dumps(asdict(cell)))
    apart = [
        name
        for name, value in settings.items()
        if name in kept and name not in OF_THE_PAPER and _plain(value) != _plain(kept[name])
    ]
    return None if apart else found


def _plain(setting: Any) -> Any:
    """A setting in which the numbers of a text are written in one way: 1e-05 is 1e-5."""
    return _NUMBER.sub(lambda found: repr(float(found[0])), setting) if isinstance(setting, str) else setting


def command_of(config: Reproduce, table: str, cell, seed: int) -> str:
    asked = steps_of(config, cell)
    steps = "" if asked is None else f" --steps {asked}"
    quick = " --quick" if config.quick else ""
    cells = shlex.quote(json.dumps([cell.name]))
    return f"gumbo reproduce {table} --cells {cells} --seeds '[{seed}]'{steps}{quick}"


def show(table, found: Sequence[dict[str, Any]]) -> None:
    """Print the table and its conclusions in 80 columns; what is the same in every row stands above the table."""
    heads, rows = rows_of(table, found)
    columns = dict(zip(heads, zip(*rows, strict=True), strict=True))
    common = {head: columns.pop(head)[0] for head in SETTINGS if len(set(columns[head])) == 1}
    said = [f"{table.name}: {table.source}; {table.ours}"]
    said += [f"each: {', '.join(f'{head} {value}' for head, value in common.items())}"] if common else []
    said += folded([*columns], [*zip(*columns.values(), strict=True)], gap=1)
    said += table.conclude(found) if table.conclude else []
    print("\n".join(map(wrapped, said)))


def write_report(path: Path, table, found: Sequence[dict[str, Any]]) -> None:
    """Write ``report.html``: the table, its conclusions and the learning curves."""
    from gumbo.experiments._report import Report, again

    concluded = table.conclude(found) if table.conclude else []
    known = sum(cell.published is not None for cell in table.cells)
    cells = len({numbers["cell"]["name"] for numbers in found})
    said = f"{cells} of {len(table.cells)} cells have been run; for {known} of the table's cells a number is published."
    page = Report(f"gumbo reproduce {table.name}", " ".join([said, *concluded]))
    page.text(f"{table.source}. {table.note}")
    page.table(*rows_of(table, found), f"Ours: {table.ours}")
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
    write_whole(path, lambda file: file.write(in_utf8(page.html())), shared=True)
    print(f"gumbo reproduce: {path}", file=sys.stderr)


def rows_of(table, found: Sequence[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Heads and cells: published and own numbers, mean ± standard error over seeds, and further columns."""
    heads = ["cell", "published", "ours", "seeds", "steps", "share"]
    beside = list(dict.fromkeys(head for numbers in found for head in beside_of(numbers)))
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
            values = [beside_of(numbers)[head] for numbers in runs if head in beside_of(numbers)]
            row.append(number(sum(values) / len(values)) if values else "")
        rows.append(row)
    return heads + beside, rows


def beside_of(numbers: Mapping[str, Any]) -> dict[str, float]:
    """Further numbers of a cell; for a trained cell, the other bound on test data comes first."""
    cell, test = numbers["cell"], numbers.get("test")
    if test is None:
        other = {}
    elif cell["metric"] == "nll":
        other = {"−ELBO": -test["elbo"]}
    else:
        other = {f"{test['num_samples']}-draw bound": -test["log_evidence"]}
    if numbers.get("curve") and "objective" in cell and is_relaxed(cell):
        other["relaxed, in training"] = -numbers["curve"][-1]["train"]
    return other | numbers.get("beside", {})


def number(value: float) -> str:
    """Two decimals if these are significant, otherwise three digits."""
    return f"{value:.2f}" if 0.1 <= abs(value) < 1e5 or value == 0 else f"{value:.3g}"


def main(argv: Sequence[str] | None = None, prog: str = "gumbo reproduce") -> None:
    run_command(Reproduce, reproduce, argv, prog)


if __name__ == "__main__":
    main()
