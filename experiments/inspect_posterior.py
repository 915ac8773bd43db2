"""``gumbo inspect RUN``: the posterior of a run of ``gumbo train``, in ArviZ's format, in pictures and in verdicts."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from gumbo.errors import BadInput
from gumbo.experiments._command import check_least, run_command
from gumbo.experiments._runs import RunFolder
from gumbo.experiments.evaluate import OfRun, reopened
from gumbo.experiments.train import inputs_of


@dataclass
class Inspect(OfRun):
    """Draw the posterior of a run of `gumbo train`, diagnose it, and plot it.

    Args:
        num_data: number of rows of the split, from its beginning.
        num_samples: draws of the guide.
        num_simulations: data sets or data drawn from the model, for calibration.
        refine_steps: optimization steps per datum, to separate amortization and approximation gap.
    """

    num_data: int = 100
    num_samples: int = 500
    num_simulations: int = 400
    refine_steps: int = 200


def inspect(config: Inspect) -> dict[str, Any]:
    """Writes ``posterior.nc``, ``diagnosis.txt``, ``diagnosis.json``, ``report.html`` and pictures into the folder."""
    from gumbo.experiments.posterior_plots import everything
    from gumbo.inference import diagnose, to_arviz
    from gumbo.inference.posterior import _arviz

    check_least(config, num_data=2)
    settings, run, data, model, guide = reopened(config, "inspect")
    if not model.latents:
        raise BadInput(f"{settings.model} has no latents, so that there is no posterior to inspect")
    inputs = inputs_of(model, data, config.split, config.num_data)
    images = max(1, config.num_samples // 50)
    idata = to_arviz(
        model,
        guide,
        num_samples=config.num_samples,
        thin={"posterior_predictive": images, "prior_predictive": images},
        seed=config.seed,
        **inputs,
    )
    groups = {name: _arviz.dataset_of(idata, name) for name in _arviz.groups_of(idata)}
    _arviz.refuse_slashes(groups.values(), _arviz.OF_NETCDF)  # before the longer part of the work
    draws = max(config.num_samples, 500)
    report = diagnose(
        model,
        guide,
        num_samples=draws,
        num_simulations=config.num_simulations,
        refine_steps=config.refine_steps,
        seed=config.seed,
        **inputs,
    )
    judged = report.to_arviz()
    ranks = {name: _arviz.dataset_of(judged, name) for name in _arviz.groups_of(judged) if name == "prior_sbc"}
    _arviz.save(_arviz.make(groups | ranks), run.path / "posterior.nc")
    run.write_text("diagnosis.txt", f"{report}\n")
    found = {
        "config": asdict(config),
        "ok": report.ok,
        "alarms": report.alarms,
        "cannot_say": report.cannot_say,
        "verdicts": {
            one.name: {"fired": one.fired, "verdict": one.verdict, "text": one.text, "advice": one.advice}
            for one in report.verdicts
        },
        "skipped": dict(report.skipped),
    }
    run.write_json("diagnosis.json", found)
    labels = data.labels.get(config.split)
    labels = None if labels is None else labels[: config.num_data].numpy()
    pictures = everything(run.plots, groups, report, labels, draws)
    write_report(run, report, pictures)
    print(report)
    print(
        f"gumbo inspect: posterior.nc, diagnosis.txt, report.html and {len(pictures)} pictures in {run.path}",
        file=sys.stderr,
    )
    return found | {"pictures": [str(path) for path in pictures]}


CAPTIONS = {
    "forest": "means and intervals of latents: those of all data, and those of the first datum",
    "trace": "draws of the guide and their distribution, for the latents that vary most",
    "pair": "pairs of latents: draws of the guide",
    "khat": "k̂ of each datum against the limit for this number of draws",
    "posterior_predictive": "the data, and data drawn at the guide's latents",
    "calibration": "ranks of latents that were drawn from the prior among the guide's draws, against uniform ranks",
    "latent_space": "posterior mean of each datum along the two directions of largest variance",
}


def write_report(run: RunFolder, report, pictures: Sequence[Path]) -> None:
    """``report.html``: every verdict with its advice, the pictures, and below them the report of the training."""
    from gumbo.experiments._report import Report, finish

    page = Report(f"gumbo inspect: the posterior of {run.path.name}", report.summary)
    body = [[one.name, one.verdict, one.text, one.advice or ""] for one in report.verdicts]
    page.table(["question", "verdict", "found", "what to do next"], body, "Verdicts")
    finish(run, page, pictures, CAPTIONS, earlier="The training")


def main(argv: Sequence[str] | None = None, prog: str = "gumbo inspect") -> None:
    run_command(Inspect, inspect, argv, prog)


if __name__ == "__main__":
    main()
