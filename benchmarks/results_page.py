"""docs/results.md and its pictures, from the finished cells under experiments/results.

    python benchmarks/results_page.py [RESULTS]

``gumbo reproduce TABLE`` writes the cells; this trains nothing. Cells that have not been run are listed as such.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from gumbo.experiments.compare import mean_and_error
from gumbo.experiments.reproduce import path_of, rows_of
from gumbo.experiments.reproduction import Table, tables
from gumbo.pictures import figure, save
from gumbo.tables import markdown

ROOT = Path(__file__).resolve().parent.parent
PAGE, FIGURES = ROOT / "docs" / "results.md", ROOT / "docs" / "figures"
MOST_SEEDS = 20

Found = Sequence[Mapping[str, Any]]


def finished(table: Table, results: Path) -> list[dict[str, Any]]:
    """The cells of a table that have been run, with every seed."""
    paths = [path_of(results, table.name, cell, seed) for cell in table.cells for seed in range(MOST_SEEDS)]
    return [json.loads(path.read_text()) for path in paths if path.exists()]


def section(table: Table, found: list[dict[str, Any]]) -> list[str]:
    """What the page says of one table."""
    lines = [f"## {table.name}", "", f"{table.source}.", "", table.note, ""]
    if not found:
        return [*lines, f"Not run yet: all {len(table.cells)} cells. `gumbo reproduce {table.name}` runs them.", ""]
    heads, rows = rows_of(table, found)
    beside = [k for k, head in enumerate(heads) if head == "published" and all(not row[k] for row in rows)]
    kept = [k for k in range(len(heads)) if k not in beside]
    lines += [*markdown([heads[k] for k in kept], [[row[k] for k in kept] for row in rows]), ""]
    lines += [sentence + "\n" for sentence in (table.conclude(found) if table.conclude else ())]
    lines += pictures(table, found)
    done = {numbers["cell"]["name"] for numbers in found}
    if missing := [cell.name for cell in table.cells if cell.name not in done]:
        lines += [f"Not run yet: {', '.join(missing)}.", ""]
    seconds = sum(numbers["seconds"] for numbers in found)
    lines += [f"Ours: {table.value}. {len(found)} runs, {seconds / 60:.0f} minutes in all, one thread each.", ""]
    return [*lines, f"    {found[0]['command']}  # and so on, one a cell; `gumbo reproduce {table.name}` for all", ""]


def pictures(table: Table, found: list[dict[str, Any]]) -> list[str]:
    draw = {"toy": toy_curves, "question": question_curves}.get(table.name, learning_curves)
    name, alt = f"results-{table.name}.png", f"{table.name}: {table.value}"
    if (made := draw(table, found)) is None:
        return []
    save(made, FIGURES / name)
    return [f"![{alt}](figures/{name})", ""]


def learning_curves(table: Table, found: Found):
    """The bound on the training data over steps, and ours against the published number."""
    by_name: dict[str, list] = {}
    for numbers in found:
        if numbers.get("curve"):
            by_name.setdefault(numbers["cell"]["name"], []).append(numbers)
    if not by_name:
        return None
    made, (left, right) = figure(1, 2, figsize=(11, 4.2))
    for name, runs in by_name.items():
        steps = [point["step"] for point in runs[0]["curve"]]
        heights = [[-abs(run["curve"][k]["train"]) for run in runs] for k in range(len(steps))]
        (line,) = left.plot(steps, [sum(h) / len(h) for h in heights], label=name)
        left.fill_between(
            steps, [min(h) for h in heights], [max(h) for h in heights], alpha=0.2, color=line.get_color()
        )
    last = [-abs(run["curve"][-1]["train"]) for runs in by_name.values() for run in runs]
    left.set(xlabel="step", ylabel="training objective, nats per datum", ylim=(min(last) - 25, max(last) + 5))
    left.legend(fontsize="x-small")
    known = [(name, runs) for name, runs in by_name.items() if runs[0]["cell"]["published"] is not None]
    for name, runs in known:
        mean, error = mean_and_error([run["value"] for run in runs])
        published = runs[0]["cell"]["published"]
        right.errorbar(published, mean, yerr=0 if math.isnan(error) else error, fmt="o")
        right.annotate(f"{name} ({runs[0]['share']:.0%})", (published, mean), fontsize="x-small")
    if known:
        ends = [runs[0]["cell"]["published"] for _, runs in known]
        right.axline((ends[0], ends[0]), slope=1, color="gray", linewidth=0.8)
    right.set(xlabel="published", ylabel="ours (share of the paper's steps)", title=table.value)
    return made


def toy_curves(table: Table, found: Found):
    """The probability of the worse value over steps, by target."""
    targets = sorted({numbers["cell"]["target"] for numbers in found})
    made, axes = figure(1, len(targets), figsize=(4 * len(targets) + 2, 4), sharey=True, squeeze=False)
    styles = ["-", "--", ":", "-."]
    for place, target in zip(axes[0], targets, strict=True):
        of_target = [numbers for numbers in found if numbers["cell"]["target"] == target]
        for k, numbers in enumerate(of_target):
            steps = [0, *(point["step"] for point in numbers["curve"])]
            means = [0.5, *(point["mean"] for point in numbers["curve"])]
            place.plot(steps, means, styles[k // 10 % 4], label=numbers["cell"]["estimator"], linewidth=1.2)
        place.set(title=f"t = {target}", xlabel="step")
    axes[0][0].set_ylabel("q(b = 1), 0 is best")
    axes[0][-1].legend(fontsize="x-small", loc="upper left", bbox_to_anchor=(1.02, 1))
    return made


def question_curves(table: Table, found: Found):
    """Variance × time against roughness, dimension and rows, for each kind of site."""
    kinds = (("sin-", "ω of sin(ωz)"), ("dimension-", "dimension"), ("rows-", "rows"))
    sites = list(dict.fromkeys(numbers["cell"]["site"] for numbers in found))
    made, axes = figure(len(sites), len(kinds), figsize=(12, 3.6 * len(sites)), squeeze=False)
    for row, site in zip(axes, sites, strict=True):
        for place, (kind, label) in zip(row, kinds, strict=True):
            lines: dict[str, list[tuple[float, float]]] = {}
            for numbers in found:
                cell = numbers["cell"]
                setting = cell["name"].split("/")[1]
                if cell["site"] == site and setting.startswith(kind):
                    lines.setdefault(cell["estimator"], []).append((float(setting[len(kind) :]), numbers["value"]))
            for word, points in lines.items():
                place.loglog(*zip(*sorted(points), strict=True), "o-", label=word, markersize=3)
            place.set(title=f"{site} site", xlabel=label)
        row[0].set_ylabel("variance × CPU ms")
    axes[0][0].legend(fontsize="small")
    return made


def main(argv: Sequence[str]) -> None:
    results = Path(argv[0]) if argv else ROOT / "experiments" / "results"
    lines = [
        "# Published tables, run again",
        "",
        "Made by `python benchmarks/results_page.py` from the files under `experiments/results`, one a cell and seed, "
        "which `gumbo reproduce TABLE` writes. *share* is that of the paper's training budget. A cell far below 100 % "
        "shows how far it came and no more.",
        "",
    ]
    for table in (tables[name] for name in tables):
        lines += section(table, finished(table, results))
    PAGE.write_text("\n".join(lines).rstrip() + "\n")
    print(f"{PAGE}: new")


if __name__ == "__main__":
    main(sys.argv[1:])
