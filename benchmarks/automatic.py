"""How good the choice of ``auto`` is: its variance × time against the best fixed word's, measured after the pilot.

    python benchmarks/automatic.py [--cases bernoulli categorical …] [--num-samples 300]

The programs are those of ``choosing_an_estimator.py`` whose objective is the ELBO. For each, ``auto`` chooses by model
runs; then every word that it may choose is audited, and the table gives the ratio of the choice to the best. It is
written to benchmarks/results/automatic.md. Runs on one thread.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from _timing import machine
from choosing_an_estimator import CASES

from gumbo.inference import Auto, SiteELBO, audit
from gumbo.tables import digits, markdown

OUT = Path(__file__).resolve().parent / "results" / "automatic.md"
HEADS = [
    "program",
    "chosen",
    "best fixed word",
    "ratio in variance × time",
    "ratio in variance × model runs",
    "pilot, s",
]


def measured(name: str, num_samples: int) -> list[str]:
    """One row of the table."""
    torch.manual_seed(0)
    model, guide, x, options = CASES[name]()
    arguments = () if x is None else (x,)
    vectorize = options.get("vectorize_particles")
    chooser = Auto(quiet=True)
    elbo = SiteELBO(chooser, vectorize_particles=vectorize)
    elbo(model, guide).initialize(*arguments)
    words = elbo.choice.words
    served = {row.word for row in elbo.choice.rows if row.draws and row.word != "as chosen"}
    entries: dict[str, Any] = {word: word for word in sorted(served)} | {"auto": words}
    report = audit(
        model,
        guide,
        *arguments,
        estimators=entries,
        num_samples=num_samples,
        burn_in=100,
        vectorize_particles=vectorize,
    )
    fixed = [word for word in served if report.verdict.sel(estimator=word).item() == "ok"]
    time, runs = report.work_normalized_variance, report.evaluation_normalized_variance
    best = min(fixed, key=lambda word: time.sel(estimator=word).item())
    return [
        name,
        ", ".join(f"{site}: {word}" for site, word in words.items()),
        best,
        ratio(time.sel(estimator="auto").item(), time.sel(estimator=best).item()),
        ratio(runs.sel(estimator="auto").item(), min(runs.sel(estimator=word).item() for word in fixed)),
        digits(sum(row.seconds * row.draws for row in elbo.choice.rows if row.draws)),
    ]


def ratio(mine: float, best: float) -> str:
    if mine == best:
        return "1 (no variance)" if mine == 0 else "1"
    return digits(mine / best) if best else "∞"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--cases", nargs="*", default=[name for name in CASES if name != "gaussian-iwae"])
    parser.add_argument("--num-samples", type=int, default=300)
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = [measured(name, options.num_samples) for name in options.cases]
    lines = [
        "# The choice of `auto` against the best fixed word",
        "",
        f"`python benchmarks/automatic.py --cases {' '.join(options.cases)} --num-samples {options.num_samples}`"
        f" ({machine()}).",
        "",
        *markdown(HEADS, rows),
    ]
    OUT.write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
