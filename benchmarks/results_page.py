"""docs/results.md and its pictures, from the finished cells under experiments/results.

    python benchmarks/results_page.py [RESULTS [DOCS]]

``gumbo reproduce TABLE`` writes the cells; this trains nothing. Cells that have not been run are listed as such. The
README's first screen is written, too: two pictures, and a line for each table.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from readme_table import replaced

from gumbo.experiments.compare import mean_and_error
from gumbo.experiments.reproduce import finished as of_cell
from gumbo.experiments.reproduce import rows_of
from gumbo.experiments.reproduction import Table, orderings, tables
from gumbo.experiments.reproduction.orderings import by_cell, group, is_relaxed, seconds_of
from gumbo.inference.diagnosis.thresholds import SHIFT, WIDTH
from gumbo.pictures import figure, save
from gumbo.tables import markdown

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
README = ROOT / "README.md"
START, END = "<!-- published tables, run again -->", "<!-- end of the published tables -->"
SCREEN_START, SCREEN_END = "<!-- two pictures -->", "<!-- end of the two pictures -->"
MOST_SEEDS = 20
NEAR = 2.0  # nats
NO_WORSE = f"no worse than {NEAR:g} nats above the published value"
MEDIUM, WIDE = "48%", "100%"
ORDERINGS_ONLY = ("reinmax", "semi-supervised")  # on other data than the paper's
# The sentences of a table's conclusions that the README has.
HEADLINES = {
    "posteriors": ("Misses", "False alarms"),
    "semi-supervised": ("10 classes", "100 classes", "Errors"),
    "question": ("\0",),
}

Found = Sequence[Mapping[str, Any]]


def finished(table: Table, results: Path) -> list[dict[str, Any]]:
    """The cells of a table that have been run, with every seed."""
    everything = (of_cell(results, table.name, cell, seed) for cell in table.cells for seed in range(MOST_SEEDS))
    return [numbers for numbers in everything if numbers is not None]


def section(table: Table, found: list[dict[str, Any]], docs: Path) -> list[str]:
    """What the page says of one table."""
    lines = [f"## {table.name}", "", f"{table.source}.", "", table.note, ""]
    if not found:
        return [*lines, f"Not run yet: all {len(table.cells)} cells. `gumbo reproduce {table.name}` runs them.", ""]
    heads, rows = rows_of(table, found)
    beside = [k for k, head in enumerate(heads) if head == "published" and all(not row[k] for row in rows)]
    kept = [k for k in range(len(heads)) if k not in beside]
    lines += [f"*ours*: {table.ours}.", ""]
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
    lines += [f"{len(found)} runs, {seconds / 60:.0f} minutes in all, one thread each.", ""]
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
    arms = list(dict.fromkeys(arm_of(numbers["cell"]["name"]) for numbers in shown))
    styles = {arm: {"color": f"C{k % 10}", "linestyle": "-" if k < 10 else "--"} for k, arm in enumerate(arms)}
    for row, name in zip(axes, groups, strict=True):
        of_group = [numbers for numbers in shown if group(numbers["cell"]["name"]) == name]
        bands(row, table, name, by_cell(of_group), styles)
        beside_published(row[2], by_cell(of_group), styles)
    return made


def arm_of(cell: str) -> str:
    """The name of a cell within its group."""
    return cell.split("/", 1)[-1]


Styles = Mapping[str, Mapping[str, str]]  # of each arm, the same in all panels


def bands(row, table: Table, name: str, arms: Mapping[str, list[Mapping[str, Any]]], styles: Styles) -> None:
    """Curves of the arms that show one bound, over steps and over seconds."""
    left = []
    ends = []
    # Validation data where every arm has looked at them; else the training objective, which for some is another bound.
    of = "valid" if all("valid" in point for runs in arms.values() for r in runs for point in r["curve"]) else "train"
    for cell, runs in arms.items():
        if of == "train" and is_relaxed(runs[0]["cell"]):
            left.append(arm_of(cell))
            continue
        points = min(len(run["curve"]) for run in runs)
        heights = [[run["curve"][j][of] for run in runs] for j in range(points)]
        steps = [point["step"] for point in runs[0]["curve"][:points]]
        seconds = [sum(seconds_of(run)[j] for run in runs) / len(runs) for j in range(points)]
        ends += heights[-1] + heights[points // 4]
        for place, across in zip(row[:2], (steps, seconds), strict=True):
            place.plot(across, [sum(h) / len(h) for h in heights], label=arm_of(cell), **styles[arm_of(cell)])
            low, high = [min(h) for h in heights], [max(h) for h in heights]
            place.fill_between(across, low, high, alpha=0.2, color=styles[arm_of(cell)]["color"])
    what = "ELBO on validation data" if of == "valid" else "training objective"
    for place, across in zip(row[:2], ("step", "seconds of training"), strict=True):
        place.set(xlabel=across, ylabel=f"{what}, nats per datum", title=f"{table.name}: {name}")
        if ends:
            place.set_ylim(min(ends) - 3, max(ends) + 3)
    row[0].legend(fontsize="x-small")
    if left:
        row[1].set_title(f"not shown, a relaxed bound: {', '.join(left)}", fontsize="x-small")


def beside_published(place, arms: Mapping[str, list[Mapping[str, Any]]], styles: Styles) -> None:
    """Ours against the published number, ± standard error over seeds; on the line they are equal."""
    known = {name: runs for name, runs in arms.items() if runs[0]["cell"]["published"] is not None}
    place.set(xlabel="published", ylabel="ours", title="ours (share of the paper's steps)")
    place.set_visible(bool(known))
    ends: list[float] = []
    for name, runs in known.items():
        mean, error = mean_and_error([run["value"] for run in runs]) or (math.nan, math.nan)
        published = runs[0]["cell"]["published"]
        ends += [published, mean]
        label, color = f"{arm_of(name)} ({runs[0]['share']:.0%})", styles[arm_of(name)]["color"]
        place.errorbar(published, mean, yerr=0 if math.isnan(error) else error, fmt="o", color=color, label=label)
    if ends:
        place.legend(fontsize="x-small")
        room = 0.15 * (max(ends) - min(ends)) + 0.5
        both = (min(ends) - room, max(ends) + room)  # one range, so that the line of equal numbers is the diagonal
        place.set(xlim=both, ylim=both)
        place.axline((ends[0], ends[0]), slope=1, color="gray", linewidth=0.8)


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
        kept = [n for n in of if n["verdict"] == word and not math.isnan(n["value"])]
        for marker, those in (
            ("o", [n for n in kept if n["value"] <= TOP]),
            ("^", [n for n in kept if n["value"] > TOP]),
        ):
            across, up = [max(n["beside"]["shift"], 1e-3) for n in those], [min(n["value"], TOP) for n in those]
            right.semilogx(across, up, marker, color=color, alpha=0.7)
    left.axvline(SHIFT, color="gray", linewidth=0.8, label="beyond: wrong")
    for limit in (WIDTH, 1 / WIDTH):
        left.axhline(limit, color="gray", linewidth=0.8)
    left.set(xlabel="largest shift, posterior sd", ylabel="worst width, sd over posterior sd", title="verdicts")
    left.legend(fontsize="small", loc="lower left")
    right.axhline(0.7, color="gray", linewidth=0.8, linestyle="--", label="k̂ 0.7")
    right.axvline(SHIFT, color="gray", linewidth=0.8, label="beyond: wrong")
    right.legend(fontsize="small", loc="upper left")
    right.set(
        xlabel="largest shift, posterior sd", ylabel=f"k̂ of the guide's draws (▲: above {TOP})", ylim=(-0.5, TOP + 0.3)
    )
    return made


TOP = 5  # of the axis of k̂


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


def near(found: Found) -> tuple[int, int]:
    """Of cells with a published number: how many end within ``NEAR`` nats of it or better, and how many there are."""
    values = {
        name: sum(run["value"] for run in runs) / len(runs) - runs[0]["cell"]["published"]
        for name, runs in by_cell(found).items()
        if runs[0]["cell"]["published"] is not None
    }
    return sum(value <= NEAR for value in values.values()), len(values)


def headline(table: Table, found: Found) -> str:
    """What the README says of a table."""
    if table.conclude is not orderings.conclude:
        said = table.conclude(found) if table.conclude else []
        chosen = [one for one in said if one.startswith(HEADLINES.get(table.name, "\0")) or "equal variance" in one]
        return " ".join(chosen) or f"every estimator's {table.value}, variance and gradient"
    close, known = near(found)
    ordered = [one for one in orderings.totals(found) if one.startswith("Published orderings at equal steps")]
    against = f"{close} of {known} published cells {NO_WORSE}" if known else "no published cell"
    if table.name in ORDERINGS_ONLY:
        against = "values do not compare, being of other data than the paper's"
    return " ".join([f"{against}, after {steps_of(found)} of the paper's steps.", *ordered])


def steps_of(found: Found) -> str:
    """The share of the paper's steps, or the least and the largest."""
    shares = sorted({numbers["share"] for numbers in found})
    return f"{shares[0]:.1%}" if shares[0] == shares[-1] else f"{shares[0]:.1%} to {shares[-1]:.1%}"


ENOUGH = 6  # runs of published cells that make a picture of the README


def first_screen(every: Mapping[str, list[dict[str, Any]]], docs: Path) -> str:
    """The README's two pictures, each with its numbers and its command."""
    trained = {
        name: [numbers for numbers in found if "objective" in numbers["cell"]]
        for name, found in every.items()
        if name not in ORDERINGS_ONLY
    }
    trained = {name: found for name, found in trained.items() if found}
    together = [numbers for found in trained.values() for numbers in found]
    pictures, said = [], []
    if sum(numbers["cell"]["published"] is not None for numbers in together) >= ENOUGH:
        save(against_published(together), docs / "figures" / "readme-published.png")
        pictures.append(("ours against published, nats per datum", "readme-published.png"))
        close, known = (sum(counts) for counts in zip(*map(near, trained.values()), strict=True))
        commands = ", ".join(f"`gumbo reproduce {name}`" for name in trained)
        said.append(
            f"published bounds against ours after {steps_of(together)} of the papers' steps; {close} of {known} cells "
            f"are {NO_WORSE} ({commands})"
        )
    if every["question"]:
        save(crossing(every["question"]), docs / "figures" / "readme-crossing.png")
        pictures.append(("variance × time of pathwise and score-function gradients", "readme-crossing.png"))
        (crosses,) = [one for one in tables["question"].conclude(every["question"]) if one.startswith("normal: for")]
        crosses = crosses.removeprefix("normal: for the cost").rstrip(".")
        said.append(f"for a Normal latent and the cost{crosses} (`gumbo reproduce question`)")
    if len(pictures) < 2 and every["posteriors"]:
        pictures.append(("diagnose's verdict and the error of guides", "results-posteriors.png"))
        said.append(f"{headline(tables['posteriors'], every['posteriors'])} (`gumbo reproduce posteriors`)")
    shown = " ".join(
        f'<img src="docs/figures/{name}" alt="{alt}" width="{MEDIUM if len(pictures) > 1 else WIDE}">'
        for alt, name in pictures[:2]
    )
    places = ("Left", "Right") if len(pictures) > 1 else ("Above",)
    return "\n".join([shown, "", *(f"*{place}*: {one}.\\" for place, one in zip(places, said, strict=False))]).rstrip(
        "\\"
    )


def front(every: Mapping[str, list[dict[str, Any]]]) -> str:
    """The README's line for each table that has been run."""
    rows = []
    for name, found in every.items():
        cells = len(by_cell(found)) if found else 0
        out = headline(tables[name], found) if found else "not run yet"
        rows.append([name, f"{cells} of {len(tables[name].cells)}", out, f"`gumbo reproduce {name}`"])
    lines = [
        "Published tables, run again cell by cell. [docs/results.md](docs/results.md) has every number and command; "
        "`gumbo reproduce all` runs what is missing. The published numbers of `reinmax`, the errors of "
        "`semi-supervised` and two k̂ of `posteriors` are quoted from memory; check them against the papers before you "
        "cite them.",
        "",
        *markdown(["table", "cells run", "what comes out", "command"], rows),
    ]
    return "\n".join(lines)


def against_published(trained: Found):
    """Every trained cell with a published number, by table."""
    made, place = figure(1, 1, figsize=(6, 4.2))
    ends = []
    for name in dict.fromkeys(numbers["table"] for numbers in trained):
        arms = by_cell([n for n in trained if n["table"] == name and n["cell"]["published"] is not None])
        if not arms:
            continue
        found = [mean_and_error([run["value"] for run in runs]) or (math.nan, math.nan) for runs in arms.values()]
        published = [runs[0]["cell"]["published"] for runs in arms.values()]
        errors = [0 if math.isnan(error) else error for _, error in found]
        place.errorbar(published, [mean for mean, _ in found], yerr=errors, fmt="o", label=name, alpha=0.8)
        ends += published
    place.axline((ends[0], ends[0]), slope=1, color="gray", linewidth=0.8)
    place.set(xlabel="published, nats per datum", ylabel="ours (below the line: better)")
    place.legend(fontsize="small")
    return made


def crossing(found: Found):
    """Variance × time against the roughness of f, at a Normal site."""
    made, place = figure(1, 1, figsize=(6, 4.2))
    lines: dict[str, list[tuple[float, float]]] = {}
    for numbers in found:
        setting = numbers["cell"]["name"].split("/")[1]
        if numbers["cell"]["site"] == "normal" and setting.startswith("sin-"):
            lines.setdefault(numbers["cell"]["estimator"], []).append((float(setting[4:]), numbers["value"]))
    for word, points in lines.items():
        place.loglog(*zip(*sorted(points), strict=True), "o-", label=word, markersize=3)
    place.set(xlabel="ω of E[sin(ωz)], z Normal", ylabel="variance × CPU ms of a gradient")
    place.legend(fontsize="small")
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
    if docs == DOCS:
        page = replaced(README.read_text(), first_screen(every, docs), SCREEN_START, SCREEN_END)
        README.write_text(replaced(page, front(every), START, END))
        print(f"{README}: its first screen is new")


if __name__ == "__main__":
    main(sys.argv[1:])
