"""Pathwise or score-function gradient: which is better for one continuous program, and why.

The loss is E[f(z)] with f(z) = Σ g(z_d), z of D independent Normal or Gamma variables, and the gradient with respect to
their D parameters from B rows. One property varies at a time: the dimension, the roughness of g, the number of rows.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gumbo.experiments.reproduction.cells import Cell, register

WORDS = ("pathwise", "score", "rloo", "measure-valued")
SITES = ("normal", "gamma")
DIMENSIONS = (1, 3, 10, 30, 100, 300, 1000)
FREQUENCIES = (0.25, 0.5, 0.7, 1.0, 1.4, 2.0, 4.0, 8.0, 16.0)
ROWS = (1, 10, 100, 1000)
SETTINGS = (
    *((f"dimension-{d}", {"dimension": d}) for d in DIMENSIONS),
    *((f"sin-{w:g}", {"function": "sin", "frequency": w}) for w in FREQUENCIES),
    ("jump", {"function": "jump"}),
    *((f"rows-{b}", {"rows": b}) for b in ROWS),
)
SECONDS, QUICK_SECONDS = 2.0, 0.02
LEAST, MOST = 30, 2000  # gradients a cell


@dataclass(frozen=True)
class QuestionCell(Cell):
    """One estimator in one setting: ``value`` is variance × CPU milliseconds of a gradient.

    The variance is the mean over the parameters, which are alike. Beside it: the variance, the
    milliseconds, and the distance of the mean from the exact gradient in standard errors.
    """

    site: str = "normal"
    estimator: str = "pathwise"
    function: str = "square"
    frequency: float = 1.0
    dimension: int = 1
    rows: int = 10

    def run(self, seed: int, steps: int, folder: Path, *, quick: bool = False, device: str = "cpu") -> dict[str, Any]:
        import torch

        torch.set_num_threads(1)
        began = time.perf_counter()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            found, milliseconds = _gradients(self, QUICK_SECONDS if quick else SECONDS, quick)
        exact = exact_gradient(self)
        variance, mean = found.var(0).mean().item(), found.mean(1)
        z = (mean.mean().item() - exact) / max(mean.std().item() / len(mean) ** 0.5, 1e-12)
        return {
            "value": variance * milliseconds,
            "beside": {"variance": variance, "ms": milliseconds, "z": max(-999.0, min(999.0, z))},
            "steps": len(found),
            "share": 1.0,
            "seconds": time.perf_counter() - began,
        }


def _gradients(cell: QuestionCell, seconds: float, quick: bool):
    """Gradients of the mean over rows, ``(calls, D)``, and the CPU milliseconds of one call."""
    import pyro
    import pyro.distributions as dist
    import torch

    from gumbo.inference import SiteELBO

    def g(z):
        if cell.function == "square":
            return z**2
        return torch.sin(cell.frequency * z) if cell.function == "sin" else (z > 1).to(z.dtype)

    class Guide(pyro.nn.PyroModule):
        def __init__(self):
            super().__init__()
            self.theta = torch.nn.Parameter(torch.full((cell.dimension,), 0.5 if cell.site == "normal" else 1.0))

        def forward(self):
            with pyro.plate("rows", cell.rows):
                theta = self.theta.expand(cell.rows, cell.dimension)
                normal = cell.site == "normal"
                return pyro.sample("z", (dist.Normal(theta, 1.0) if normal else dist.Gamma(2.0, theta)).to_event(1))

    def model():
        with pyro.plate("rows", cell.rows):
            base = dist.Normal(0.0, 1.0) if cell.site == "normal" else dist.Gamma(2.0, 1.0)
            z = pyro.sample("z", base.expand([cell.dimension]).to_event(1))
            pyro.factor("f", g(z).sum(-1))

    guide = Guide()
    loss = SiteELBO(cell.estimator, kl_weight=0.0)(model, guide)
    loss()
    found, began, least = [], time.process_time(), 3 if quick else LEAST
    while len(found) < least or (time.process_time() - began < seconds and len(found) < MOST):
        loss.zero_grad()
        loss().backward()
        found.append(-guide.theta.grad / cell.rows)
    return torch.stack(found), 1e3 * (time.process_time() - began) / len(found)


def exact_gradient(cell: QuestionCell) -> float:
    """∂E[g(z_d)]/∂θ_d, in closed form."""
    w = cell.frequency
    if cell.site == "normal":
        mu = 0.5
        if cell.function == "square":
            return 2 * mu
        if cell.function == "sin":
            return w * math.exp(-(w**2) / 2) * math.cos(w * mu)
        return math.exp(-((1 - mu) ** 2) / 2) / math.sqrt(2 * math.pi)
    # z = y/θ with y ~ Gamma(2, 1): E z² = 6/θ²; E e^(iwz) = (1 − iw/θ)⁻²; P(z > 1) = (1 + θ) e^(−θ). At θ = 1.
    if cell.function == "square":
        return -12.0
    if cell.function == "sin":
        return (-2j * w * (1 - 1j * w) ** -3).imag
    return -math.exp(-1.0)


def conclude(found: Sequence[dict[str, Any]]) -> list[str]:
    """The settings in which the score function, with or without a baseline, has the smaller variance × time."""
    by = {(n["cell"]["site"], n["cell"]["name"].split("/")[1], n["cell"]["estimator"]): n for n in found}
    said = []
    for site in SITES:
        wins, biased = [], []
        for setting, _ in SETTINGS:
            path = by.get((site, setting, "pathwise"))
            scores = [by[site, setting, word] for word in ("score", "rloo") if (site, setting, word) in by]
            if path is None or not scores:
                continue
            if abs(path["beside"]["z"]) > 6:
                biased.append(setting)
            elif min(n["value"] for n in scores) < path["value"]:
                wins.append(setting)
        said.append(
            f"{site}: by variance × time a score-type gradient is ahead of the pathwise one at "
            f"{', '.join(wins) or 'no setting'}; the pathwise gradient is biased at {', '.join(biased) or 'none'}."
        )
        curve = [
            (w, by[site, f"sin-{w:g}", "pathwise"]["value"] / by[site, f"sin-{w:g}", "rloo"]["value"])
            for w in FREQUENCIES
            if {(site, f"sin-{w:g}", word) for word in ("pathwise", "rloo")} <= by.keys()
        ]
        for (w, a), (v, b) in zip(curve, curve[1:], strict=False):
            if a < 1 <= b:
                crossing = math.exp(math.log(w) + (math.log(v / w)) * -math.log(a) / (math.log(b) - math.log(a)))
                said.append(
                    f"{site}: for the cost sin(ωz), rloo and pathwise have equal variance × time at ω = "
                    f"{crossing:.2f}; above it rloo is better."
                )
    return said


def cells() -> list[QuestionCell]:
    return [
        QuestionCell(f"{site}/{setting}/{word}", site=site, estimator=word, **options)
        for site in SITES
        for setting, options in SETTINGS
        for word in WORDS
        if serves(site, word)
    ]


def serves(site: str, word: str) -> bool:
    import pyro.distributions as dist

    from gumbo.inference.estimators import estimators

    fn = (dist.Normal(0.0, 1.0) if site == "normal" else dist.Gamma(2.0, 1.0)).expand([2]).to_event(1)
    return estimators[word]().supports({"name": "z", "fn": fn})


register(
    "question",
    "Mohamed et al. 2020, arXiv 1906.10652, section 3 asks it",
    "E[Σ g(z_d)], g(z) = z² unless said: Normal(0.5, 1) by its location, Gamma(2, rate 1) by its rate; one dimension "
    "and ten rows unless said. Ours: variance × CPU milliseconds a gradient.",
    cells,
    value="variance × milliseconds, smaller is better",
    conclude=conclude,
)
