"""Yao et al. 2018, "Yes, but did it work?" (arXiv 1802.02538): do diagnostics tell which guides are wrong?

Autoguides are fitted to posteriors of posteriordb, whose moments are known from long runs of HMC. What they get wrong
stands beside what `diagnose`, which knows nothing of these runs, says of them.
"""

from __future__ import annotations

import json
import math
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

from gumbo.experiments.reproduction.cells import Cell, register
from gumbo.inference.diagnosis.thresholds import SHIFT, WIDTH

HERE = Path(__file__).resolve().parent
GUIDES = ("mean-field", "full-rank", "mode", "diagonal")
STEPS, QUICK_STEPS = 1000, 20
DRAWS, QUICK_DRAWS = 10_000, 200
RATE = 0.1
REFIT_STEPS = 1000
REFITS = 20  # simulated data sets
# The paper's own examples, mean-field, with guides fitted to simulated data.
CALIBRATED = {
    "linear": "linear",
    "logistic": "logistic",
    "eight-schools-centered": "eight_schools-eight_schools_centered",
    "eight-schools-noncentered": "eight_schools-eight_schools_noncentered",
    "horseshoe": "horseshoe",
}
SAYS = ("khat", "shift", "width")  # without these verdicts, a report without alarm is no evidence for the guide
# Its density has no mode: it is unbounded at tau = 0.
WITHOUT = {("eight_schools-eight_schools_centered", guide) for guide in ("mode", "diagonal")}
# k̂ of mean-field ADVI in the paper's section 4.3, quoted from memory.
PUBLISHED = {
    "eight_schools-eight_schools_centered/mean-field": 1.00,
    "eight_schools-eight_schools_noncentered/mean-field": 0.64,
}


@lru_cache(maxsize=1)
def references() -> dict[str, Any]:
    return json.loads((HERE / "posteriordb.json").read_text(encoding="utf-8"))


def program(name: str):
    """A posterior's model and data, by posteriordb's name."""
    import torch

    from gumbo.experiments.reproduction.programs_of_posteriordb import EXAMPLES, PROGRAMS

    if name in EXAMPLES:
        return EXAMPLES[name]()
    data = references()["data"][references()["references"][name]["data"]]
    return PROGRAMS[name]({key: torch.tensor(value, dtype=torch.float64) for key, value in data.items()})


@dataclass(frozen=True)
class PosteriorCell(Cell):
    """One guide for one posterior: ``value`` is k̂ of its draws.

    Beside it: whether `diagnose` raises an alarm; the largest distance of a mean from the reference, in standard
    deviations of the reference; the ratio of standard deviations that is farthest from one; and, where guides are
    fitted to simulated data, the chance of ranks as uneven.
    """

    posterior: str = ""
    guide: str = "mean-field"
    calibration_refits: int = 0

    def run(self, seed: int, steps: int, folder: Path, *, quick: bool = False, device: str = "cpu") -> dict[str, Any]:
        import pyro
        import torch

        torch.set_num_threads(1)
        # Autoguides keep their parameters in Pyro's store, under the name of their class.
        with torch.random.fork_rng(devices=[]), pyro.get_param_store().scope():
            torch.manual_seed(seed)
            return self.examined(seed, steps, quick)

    def examined(self, seed: int, steps: int, quick: bool) -> dict[str, Any]:
        from gumbo.inference import diagnose

        steps, draws = (QUICK_STEPS, QUICK_DRAWS) if quick else (steps, DRAWS)
        began = time.perf_counter()
        posterior = program(self.posterior)
        guide = fitted(posterior.model, posterior.y, self.guide, steps, seed)
        known = self.posterior in references()["references"]
        errors = against_reference(self.posterior, reported(posterior, guide, draws)) if known else {}
        report = diagnose(
            posterior.model,
            guide,
            posterior.y,
            num_samples=200 if quick else 2000,
            refine_steps=0,
            calibration_refits=0 if quick else self.calibration_refits,
            refit=lambda y: fitted(posterior.model, y, self.guide, REFIT_STEPS, seed),
            seed=seed,
            progress=False,
        )
        beside = {"alarm": float(not report.ok)}
        if errors:
            beside |= worst(errors)
        if self.calibration_refits and not quick:
            beside["calibration"] = report["calibration"].value
        return {
            "value": report["khat"].value,
            "beside": beside,
            "truth": truth(beside["shift"], beside["width"]) if errors else "not known",
            "verdict": verdict(report),
            "verdicts": {one.name: one.verdict for one in report.verdicts},
            "errors": errors,
            "steps": steps,
            "share": steps / self.steps,
            "seconds": time.perf_counter() - began,
        }


def fitted(model: Callable, y, kind: str, steps: int, seed: int):
    """An autoguide of the kind: trained from Stan's initial values, or a normal approximation at the mode.

    The diagonal guide has the widths that minimize KL(q ‖ p) for a normal p: the conditional standard deviations.
    """
    import torch
    from pyro.infer.autoguide import AutoLaplaceApproximation, AutoMultivariateNormal, AutoNormal
    from pyro.infer.autoguide.initialization import init_to_uniform

    from gumbo.inference import fit, parse_schedule

    if kind in ("mode", "diagonal"):
        # Nearer to 0 than Stan's initial values: with a coefficient beyond 1, a moving average of 200 steps diverges.
        guide = AutoLaplaceApproximation(model, init_loc_fn=partial(init_to_uniform, radius=0.5))
        guide(y)
        to_mode(model, guide, y)
        normal = guide.laplace_approximation(y)
        if kind == "diagonal":
            root = normal.scale.unsqueeze(-1) * normal.scale_tril
            normal.scale = torch.cholesky_inverse(root).diagonal() ** -0.5
            normal.scale_tril = torch.eye(len(root), dtype=root.dtype)
        return normal
    make = {"mean-field": AutoNormal, "full-rank": AutoMultivariateNormal}[kind]
    guide = make(model, init_loc_fn=init_to_uniform)
    # Rows of y belong to those of covariates that the model keeps, or follow each other: none is to be shuffled.
    fit(
        partial(model, y),
        partial(guide, y),
        (),
        loss="pathwise",
        lr=parse_schedule(f"cosine({steps}, {RATE}, {RATE / 100})"),
        epochs=steps,
        seed=seed,
        progress=False,
    )
    return guide


def to_mode(model: Callable, guide, y) -> None:
    """Damped Newton steps until the gradient is small in units of the curvature."""
    import torch
    from pyro.infer import Trace_ELBO

    loss, damping = Trace_ELBO(), 1.0

    def value():
        return loss.differentiable_loss(model, guide, y)

    for _ in range(200):
        now = value()
        (slope,) = torch.autograd.grad(now, guide.loc, create_graph=True)
        rows = [torch.autograd.grad(one, guide.loc, retain_graph=True)[0] for one in slope]
        slope, curvature = slope.detach(), torch.stack(rows)
        scale = curvature.diagonal().abs().clamp(min=1e-12).sqrt()
        # Negative curvature enters by its absolute value, so that every step descends.
        bends, directions = torch.linalg.eigh(curvature / scale / scale[:, None])
        along = directions.mT @ (slope / scale)
        for _ in range(30):
            step = directions @ (along / (bends.abs() + damping))
            before = guide.loc.data.clone()
            guide.loc.data -= step / scale
            with torch.no_grad():
                after = value()
            if bool(after <= now):
                damping /= 10
                break
            guide.loc.data.copy_(before)
            damping *= 10
        else:
            return
        if float((slope * step / scale).abs().sum()) < 1e-10 and damping < 1e-6:
            return


def reported(posterior, guide, draws: int):
    """Draws of a guide as the reference's parameters, by its names."""
    import pyro
    import torch

    with torch.no_grad(), pyro.plate("draws", draws, dim=-1):
        found = posterior.reported(guide(posterior.y))
    named = {}
    for name, value in found.items():
        parts = {name: value} if value.dim() == 1 else {f"{name}[{k + 1}]": value[:, k] for k in range(value.shape[1])}
        named |= parts
    return named


def against_reference(name: str, draws) -> dict[str, dict[str, float]]:
    """By parameter: how many standard deviations the mean is off, and how wide the guide is beside the reference."""
    found = {}
    for parameter, known in references()["references"][name]["parameters"].items():
        mean, sd = draws[parameter].mean().item(), draws[parameter].std().item()
        found[parameter] = {"shift": (mean - known["mean"]) / known["sd"], "width": sd / known["sd"]}
    return found


def worst(errors: dict[str, dict[str, float]]) -> dict[str, float]:
    """The largest shift, and the width that is farthest from one."""
    shift = max(abs(one["shift"]) for one in errors.values())
    return {"shift": shift, "width": max((one["width"] for one in errors.values()), key=away)}


def away(width: float) -> float:
    return abs(math.log(max(width, 1e-9)))


def truth(shift: float, width: float) -> str:
    """*wrong* beyond the limits that `diagnose` has for shift and width, *right* within half of them."""
    limit = away(WIDTH)
    if shift > SHIFT or away(width) > limit:
        return "wrong"
    return "right" if shift <= SHIFT / 2 and away(width) <= limit / 2 else "between"


def verdict(report) -> str:
    if not report.ok:
        return "alarm"
    return "cannot say" if set(report.cannot_say) & set(SAYS) else "no alarm"


def wilson(count: int, of: int) -> tuple[float, float]:
    """The 95% interval of a probability by Wilson's score, which holds at the ends, too.

    >>> [round(end, 3) for end in wilson(0, 30)]
    [0.0, 0.114]
    """
    z = 1.96
    share, slack = count / of, z * z / of
    middle, half = share + slack / 2, z * math.sqrt(share * (1 - share) / of + slack / (4 * of))
    return max(0.0, (middle - half) / (1 + slack)), min(1.0, (middle + half) / (1 + slack))


def conclude(found: Sequence[dict[str, Any]]) -> list[str]:
    """The confusion table, the rates of misses and false alarms, and which verdicts raise them."""
    # The calibrated runs of the eight schools are the mean-field guides over again.
    found = [numbers for numbers in found if numbers["truth"] != "not known" and "calibration" not in numbers["beside"]]
    counts = Counter((numbers["truth"], numbers["verdict"]) for numbers in found)
    said = []
    for kind in ("right", "between", "wrong"):
        row = ", ".join(f"{word} {counts[kind, word]}" for word in ("no alarm", "cannot say", "alarm"))
        said.append(f"{kind} guides, {sum(counts[kind, w] for w in ('no alarm', 'cannot say', 'alarm'))}: {row}.")
    for title, kind, word in (("Misses", "wrong", "no alarm"), ("False alarms", "right", "alarm")):
        of = [numbers for numbers in found if numbers["truth"] == kind]
        if not of:
            continue
        count = sum(numbers["verdict"] == word for numbers in of)
        low, high = wilson(count, len(of))
        rate = f"{count / len(of):.0%} (95% interval {low:.0%} to {high:.0%})"
        said.append(f"{title}: {count} of {len(of)} {kind} guides, {rate}.")
    alarms = {kind: Counter[str]() for kind in ("right", "wrong")}
    for numbers in found:
        if numbers["truth"] in alarms:
            alarms[numbers["truth"]].update(n for n, one in numbers["verdicts"].items() if one == "alarm")
    for kind, of in alarms.items():
        named = ", ".join(f"{name} {count}" for name, count in of.most_common())
        said.append(f"Alarms on {kind} guides by verdict: {named or 'none'}.")
    return said


def cells() -> list[PosteriorCell]:
    examples = [
        PosteriorCell(f"{name}/calibrated", None, STEPS, posterior=posterior, calibration_refits=REFITS)
        for name, posterior in CALIBRATED.items()
    ]
    return examples + [
        PosteriorCell(f"{name}/{guide}", PUBLISHED.get(f"{name}/{guide}"), STEPS, posterior=name, guide=guide)
        for name in references()["references"]
        for guide in GUIDES
        if (name, guide) not in WITHOUT
    ]


register(
    "posteriors",
    "Yao et al. 2018, arXiv 1802.02538; posteriordb (Magnusson et al. 2024, arXiv 2407.04967)",
    "Guides for posteriors of posteriordb: mean-field and full-rank Normal, 1,000 steps of Adam from 0.1 with a cosine "
    "decay from Stan's initial values, and the normal approximation at the mode, full and diagonal. A guide is wrong "
    f"where a parameter's mean is off by more than {SHIFT} posterior standard deviations or its standard deviation by "
    f"a factor beyond {WIDTH} or {1 / WIDTH:.2f}, and right where it is off by less than {SHIFT / 2:g} and by a factor "
    f"within {WIDTH**0.5:.2f} and {WIDTH**-0.5:.2f}; correlations do not count. The paper's own examples are "
    f"simulated anew, smaller, with a calibration by {REFITS} refits; the horseshoe stands on simulated data in place "
    "of the microarrays. The prior of the linear example draws a noise scale below 0.1 for a quarter of these data "
    "sets, whose posteriors 1,000 steps of Adam may not reach: its calibration judges these fits, too. The two "
    "published k̂ are quoted from memory.",
    cells,
    value="k̂ of the guide's draws",
    conclude=conclude,
)
