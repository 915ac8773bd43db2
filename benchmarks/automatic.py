"""How good the choice of ``auto`` is: its variance × cost against the best fixed word's, measured after the pilot.

    python benchmarks/automatic.py [--cases bernoulli sigmoid-belief-network …] [--draws 300] [--cost evaluations]

The programs are those of ``choosing_an_estimator.py`` whose objective is the ELBO, and every variant of the
collection's models with a discrete site, after 30 steps of leave-one-out. In each, ``auto`` chooses twice: with its own
limit of 1,024 model runs a step, and with 16, under which few programs can be listed. Then every word that took part,
at all sites that it serves with the choice's own words at the others, and the choice, draw fresh gradients of the guide
with another seed. The table gives the variance × cost of the choice as a ratio to the best of these. Each row is
written to benchmarks/results/automatic.json as it comes, and the table to automatic.md. Runs on one thread.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import pyro
import torch
from _timing import RESULTS, machine
from choosing_an_estimator import CASES
from pyro.poutine.util import site_is_subsample

from gumbo.errors import GumboError
from gumbo.experiments.train import default_guide
from gumbo.guides import fitting, guides
from gumbo.inference import Auto, SiteELBO
from gumbo.inference.auditing.sampler import Draws, Stage, set_aside
from gumbo.inference.estimators import estimators
from gumbo.models import models
from gumbo.tables import digits, markdown

OUT = RESULTS / "automatic.json"
LIMITS = (1024, 16)
BURN_IN = 100
HEADS = ["program", "model runs allowed", "chosen", "best fixed word", "its variance × cost", "ratio", "pilot, s"]


def programs() -> Iterator[tuple[str, Callable[[], tuple[Any, Any, tuple, dict[str, Any]]]]]:
    """(name, what makes model, guide, arguments and keywords)."""
    for name, case in CASES.items():
        if name != "gaussian-iwae":

            def example(case=case):
                model, guide, x, options = case()
                sequential = options.get("vectorize_particles") is False
                return model, guide, () if x is None else (x,), {}, sequential

            yield name, example
    for name, kind in models.items():
        for number, variant in enumerate(kind.variants):

            def collected(kind=kind, variant=variant):
                model = kind((1, 8, 8), **variant)
                guide = guides[default_guide(model, fitting(model))](model)
                batch = model.example(8)
                loss = SiteELBO("rloo", num_particles=4)(model, guide).initialize(**batch)
                optimizer = torch.optim.Adam(loss.parameters(), lr=1e-3)
                for _ in range(30):
                    optimizer.zero_grad()
                    loss(**batch).backward()
                    optimizer.step()
                return model, guide, (), batch, False

            yield f"{name}, {number}", collected


def is_discrete(model: Any, guide: Any, args: tuple, kwargs: dict[str, Any]) -> bool:
    with torch.no_grad(), pyro.get_param_store().scope():
        trace = pyro.poutine.trace(guide).get_trace(*args, **kwargs)
    sites = [trace.nodes[name] for name in trace.stochastic_nodes]
    return any(not getattr(site["fn"], "has_rsample", False) for site in sites if not site_is_subsample(site))


def work(stage: Stage, words: dict[str, str], count: int, cost: str, vectorize: bool | None, limit: int) -> float:
    """Variance of the guide's gradient times what a step costs, from fresh draws; ∞ for a step of too many runs."""
    torch.manual_seed(12345)
    draws = Draws(stage, SiteELBO(words, vectorize_particles=vectorize))
    for _ in range(BURN_IN if draws.has_state else 1):
        draws.draw()
    runs = draws.evaluations()
    if runs > limit:
        return math.inf
    draws.freeze()
    own = [name for name in stage.parameters if name.startswith("guide.")] or list(stage.parameters)
    mean, square, took = torch.zeros(()), torch.zeros(()), []
    for seen in range(1, count + 1):
        gradient, _, seconds = draws.draw()
        flat = torch.cat([gradient[name] for name in own]).double()
        step = flat - mean
        mean = mean + step / seen
        square = square + (step * (flat - mean)).sum()
        took.append(seconds)
    variance = float(square) / (count - 1)
    variance = 0.0 if variance <= 1e-10 * float(mean.square().sum()) else variance
    return variance * (runs if cost == "evaluations" else statistics.median(took))


def measured(name: str, make: Callable, limit: int, options: argparse.Namespace) -> dict[str, Any] | None:
    """One row of the table; None for a program without a discrete site."""
    torch.manual_seed(0)
    model, guide, args, kwargs, sequential = make()
    if name not in CASES and not is_discrete(model, guide, args, kwargs):
        return None
    vectorize = False if sequential else None
    began = time.perf_counter()
    chooser = Auto(cost=options.cost, max_evaluations=limit, quiet=True)
    elbo = SiteELBO(chooser, vectorize_particles=vectorize)
    elbo(model, guide).initialize(*args, **kwargs)
    pilot = time.perf_counter() - began
    words = elbo.choice.words
    served = [row for row in elbo.choice.rows if row.draws and row.word in estimators]
    entries = {"auto": words}
    for word in dict.fromkeys(row.word for row in served):
        sites = {row.site for row in served if row.word == word}
        everywhere = "(all)" in sites or set(words) <= sites
        fixed = {site: word if everywhere or site in sites else own for site, own in words.items()}
        if fixed != words:
            entries[word] = fixed
    found = {}
    with set_aside(model, guide, 7):
        stage = Stage(model, guide, args, kwargs, None)
        for label, taken in entries.items():
            try:
                found[label] = work(stage, taken, options.draws, options.cost, vectorize, limit)
            except GumboError as error:
                print(f"{name}: {label}: {error}", flush=True)
    found = {label: value for label, value in found.items() if value < math.inf}
    best = min(found, key=lambda label: (found[label], label != "auto"))
    chosen = ", ".join(sorted(set(words.values()))) if len(words) > 3 else ", ".join(map(": ".join, words.items()))
    mine, least = found["auto"], found[best]
    ratio = 1.0 if mine == least else mine / least if least else None
    return {
        "program": name, "limit": limit, "chosen": chosen, "best": "the choice" if best == "auto" else best,
        "work": least, "ratio": ratio, "pilot": pilot, "all": found, "cost": options.cost, "draws": options.draws,
    }  # fmt: skip


def table(rows: list[dict[str, Any]], options: argparse.Namespace) -> list[str]:
    body = [
        [
            row["program"],
            str(row["limit"]),
            row["chosen"],
            row["best"],
            digits(row["work"]),
            "∞" if row["ratio"] is None else f"{row['ratio']:.2f}",
            f"{row['pilot']:.1f}",
        ]
        for row in rows
    ]
    within = sum(row["ratio"] is not None and row["ratio"] <= 1.5 for row in rows)
    drawn = [row for row in rows if row["work"] > 0]
    return [
        "# The choice of `auto` against the best fixed word",
        "",
        f"`python benchmarks/automatic.py --draws {options.draws} --cost {options.cost}` ({machine()}):"
        f" within 1.5 times the best in {within} of {len(rows)} programs,",
        f"{len(drawn)} of these have variance under every word. Variance of the guide's gradient × {options.cost} of a"
        " step,",
        "measured after the pilot with another seed; a fixed word stands at every site that it serves.",
        "",
        *markdown(HEADS, body),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--cases", nargs="*", help="names of programs; all by default")
    parser.add_argument("--draws", type=int, default=300)
    parser.add_argument("--cost", choices=["evaluations", "time"], default="evaluations")
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = json.loads(OUT.read_text()) if OUT.exists() else []
    for name, make in programs():
        if options.cases and name.split(",")[0] not in options.cases and name not in options.cases:
            continue
        for limit in LIMITS:
            settings = {"program": name, "limit": limit, "cost": options.cost, "draws": options.draws}
            if any(settings.items() <= row.items() for row in rows):
                continue
            try:
                row = measured(name, make, limit, options)
            except (GumboError, IndexError) as error:
                print(f"{name}: left out: {error}", flush=True)
                break
            if row is None:
                break
            rows.append(row)
            print(row, flush=True)
            OUT.write_text(json.dumps(rows, indent=1) + "\n")
            OUT.with_suffix(".md").write_text("\n".join(table(rows, options)) + "\n")
    print("\n".join(table(rows, options)))


if __name__ == "__main__":
    main()
