"""docs/results.md and its pictures, from the finished cells under experiments/results.

    python benchmarks/results_page.py [RESULTS [DOCS]]

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
from gumbo.experiments.reproduction import Table, orderings, tables
from gumbo.experiments.reproduction.orderings import by_cell, group, is_relaxed, seconds_of
from gumbo.inference.diagnosis.thresholds import SHIFT, WIDTH
from gumbo.pictures import figure, save
from gumbo.tables import markdown

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
MOST_SEEDS = 20

Found = Sequence[Mapping[str, Any]]


def finished(table: Table, results: Path) -> list[dict[str, Any]]:
    """The cells of a table that have been run, with every seed."""
    paths = [path_of(results, table.name, cell, seed) for cell in table.cells for seed in range(MOST_SEEDS)]
    return [json.loads(path.read_text()) for path in paths if path.exists()]


def section(table: Table, found: list[dict[str, Any]], docs: Path) -> list[str]:
    """What the page says of one table."""
    lines = [f"## {table.name}", "", f"{table.source}.", "", table.note, ""]
    if not found:
        return [*lines, f"Not run yet: all {len(table.cells)} cells. `gumbo reproduce {table.name}` runs them.", ""]
    heads, rows = rows_of(table, found)
    beside = [k for k, head in enumerate(heads) if head == "published" and all(not row[k] for row in rows)]
    kept = [k for k in range(len(heads)) if k not in beside]
    lines += [*markdown([heads[k] for k in kept], [[row[k] for k in kept] for row in rows]), ""]
    # Pairs of arms stand in a table of their own.
    concludes = orderings.totals if table.conclude is orderings.conclude else table.conclude
    lines += [sentence + "\n" for sentence in (concludes(found) if concludes else ())]
    if table.conclude is orderings.conclude and (ordered := orderings.rows(found)):
        lines += [
            "Pairs of arms with three seeds or more each: the first minus the second, nats per datum ± standard error. "
            "Undecided: seeds alone make such a difference in one of twenty cases. Equal time: the curves where the "
            "faster arm ends.",
            "",
            *markdown(orderings.HEADS, ordered),
            "",
        ]
    lines += pictures(table, found, docs)
    done = {numbers["cell"]["name"] for numbers in found}
    if missing := [cell.name for cell in table.cells if cell.name not in done]:
        lines += [f"Not run yet: {', '.join(missing)}.", ""]
    seconds = sum(numbers["seconds"] for numbers in found)
    lines += [f"Ours: {table.value}. {len(found)} runs, {seconds / 60:.0f} minutes in all, one thread each.", ""]
    return [*lines, f"    {found[0]['command']}  # and so on, one a cell; `gumbo reproduce {table.name}` for all", ""]


def pictures(table: Table, found: list[dict[str, Any]], docs: Path) -> list[str]:
    own = {"toy": toy_curves, "question": question_curves, "posteriors": confusion, "semi-supervised": speed_up}
    draw = own.get(table.name, learning_curves)
    name, alt = f"results-{table.name}.png", f"{table.name}: {table.value}"
    if (made := draw(table, found)) is None:
        return []
    save(made, docs / "figures" / name)
    return [f"![{alt}](figures/{name})", ""]


def learning_curves(table: Table, found: Found):
    """By group of arms: curves over steps and over time, mean and band over seeds; then ours against the published."""
    shown = [numbers for numbers in found if numbers.get("curve")]
    groups = list(dict.fromkeys(group(numbers["cell"]["name"]) for numbers in shown))
    if not groups:
        return None
    made, axes = figure(len(groups), 3, figsize=(14, 4 * len(groups)), squeeze=False)
    for row, name in zip(axes, groups, strict=True):
        of_group = [numbers for numbers in shown if group(numbers["cell"]["name"]) == name]
        bands(row, table, name, by_cell(of_group))
        beside_published(row[2], by_cell(of_group))
    return made


def bands(row, table: Table, name: str, arms: Mapping[str, list[Mapping[str, Any]]]) -> None:
    """Curves of the arms that show one bound, over steps and over seconds."""
    left = []
    ends = []
    # Validation data where every arm has looked at them; else the training objective, which for some is another bound.
    of = "valid" if all("valid" in point for runs in arms.values() for r in runs for point in r["curve"]) else "train"
    for k, (cell, runs) in enumerate(arms.items()):
        if of == "train" and is_relaxed(runs[0]["cell"]):
            left.append(cell.split("/", 1)[-1])
            continue
        points = min(len(run["curve"]) for run in runs)
        heights = [[run["curve"][j][of] for run in runs] for j in range(points)]
        steps = [point["step"] for point in runs[0]["curve"][:points]]
        seconds = [sum(seconds_of(run)[j] for run in runs) / len(runs) for j in range(points)]
        ends += heights[-1] + heights[points // 4]
        for place, across in zip(row[:2], (steps, seconds), strict=True):
            (line,) = place.plot(
                across, [sum(h) / len(h) for h in heights], "-" if k < 10 else "--", label=cell.split("/", 1)[-1]
            )
            low, high = [min(h) for h in heights], [max(h) for h in heights]
            place.fill_between(across, low, high, alpha=0.2, color=line.get_color())
    what = "ELBO on validation data" if of == "valid" else "training objective"
    for place, across in zip(row[:2], ("step", "seconds of training"), strict=True):
        place.set(xlabel=across, ylabel=f"{what}, nats per datum", title=f"{table.name}: {name}")
        if ends:
            place.set_ylim(min(ends) - 3, max(ends) + 3)
    row[0].legend(fontsize="x-small")
    if left:
        row[1].set_title(f"not shown, a relaxed bound: {', '.join(left)}", fontsize="x-small")


def beside_published(place, arms: Mapping[str, list[Mapping[str, Any]]]) -> None:
    """Ours against the published number, ± standard error over seeds; on the line they are equal."""
    known = {name: runs for name, runs in arms.items() if runs[0]["cell"]["published"] is not None}
    place.set(xlabel="published", ylabel="ours", title="ours (share of the paper's steps)")
    place.set_visible(bool(known))
    for name, runs in known.items():
        mean, error = mean_and_error([run["value"] for run in runs]) or (math.nan, math.nan)
        published = runs[0]["cell"]["published"]
        place.errorbar(published, mean, yerr=0 if math.isnan(error) else error, fmt="o")
        label = f" {name.split('/', 1)[-1]} ({runs[0]['share']:.0%})"
        place.annotate(label, (published, mean), fontsize="x-small")
    if known:
        ends = [runs[0]["cell"]["published"] for runs in known.values()]
        place.axline((ends[0], ends[0]), slope=1, color="gray", linewidth=0.8)
        place.margins(x=0.25)


def confusion(table: Table, found: Found):
    """What the verdict says of guides, over how wrong they are."""
    of = [numbers for numbers in found if "shift" in numbers["beside"]]
    if not of:
        return None
    made, (left, right) = figure(1, 2, figsize=(11, 4.2))
    colors = {"no alarm": "tab:green", "cannot say": "tab:orange", "alarm": "tab:red"}
    for word, color in colors.items():
        some = [numbers["beside"] for numbers in of if numbers["verdict"] == word]
        shifts, widths = [max(n["shift"], 1e-3) for n in some], [max(n["width"], 1e-4) for n in some]
        left.loglog(shifts, widths, "o", color=color, label=f"{word} ({len(some)})", alpha=0.7)
        kept = [n for n in of if n["verdict"] == word and math.isfinite(n["value"])]
        right.semilogx(
            [max(n["beside"]["shift"], 1e-3) for n in kept], [n["value"] for n in kept], "o", color=color, alpha=0.7
        )
    left.axvline(SHIFT, color="gray", linewidth=0.8)
    for limit in (WIDTH, 1 / WIDTH):
        left.axhline(limit, color="gray", linewidth=0.8)
    left.set(xlabel="largest shift, posterior sd", ylabel="worst width, sd over posterior sd", title="verdicts")
    left.legend(fontsize="small", loc="lower left")
    right.axhline(0.7, color="gray", linewidth=0.8)
    right.axvline(SHIFT, color="gray", linewidth=0.8)
    right.set(xlabel="largest shift, posterior sd", ylabel="k̂ of the guide's draws", ylim=(-0.5, 5))
    return made


def speed_up(table: Table, found: Found):
    """Milliseconds of a step over classes, by word."""
    lines: dict[str, dict[int, list[float]]] = {}
    for numbers in found:
        if "classes" in numbers["cell"]:
            of = lines.setdefault(numbers["cell"]["estimator"], {})
            of.setdefault(numbers["cell"]["classes"], []).append(numbers["value"])
    if not lines:
        return None
    made, place = figure(1, 1, figsize=(6, 4))
    for word, of in lines.items():
        points = sorted((classes, sum(values) / len(values)) for classes, values in of.items())
        place.loglog(*zip(*points, strict=True), "o-", label=word)
    place.set(xlabel="classes", ylabel="ms a training step, batch 100", title="one sample of the label or the sum")
    place.legend()
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
    results, docs = (Path(given) for given in (*argv, *(ROOT / "experiments" / "results", DOCS)[len(argv) :]))
    lines = [
        "# Published tables, run again",
        "",
        "Made by `python benchmarks/results_page.py` from the files under `experiments/results`, one a cell and seed, "
        "which `gumbo reproduce TABLE` writes. *share* is that of the paper's training budget. A cell far below 100 % "
        "shows how far it came and no more.",
        "",
        "`gumbo reproduce all` runs what is missing, `gumbo reproduce all --device cuda --jobs 8` does so on a GPU, "
        "and `gumbo reproduce all --backend dask --address tcp://host:port` on a cluster. Each result is written as it "
        "comes.",
        "",
    ]
    every = {name: finished(tables[name], results) for name in tables}
    for name, found in every.items():
        lines += section(tables[name], found, docs)
    page = docs / "results.md"
    page.write_text("\n".join(lines).rstrip() + "\n")
    print(f"{page}: new")


if __name__ == "__main__":
    main(sys.argv[1:])
