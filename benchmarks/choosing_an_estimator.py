"""The tables and figures of docs/choosing-an-estimator.md, by auditing every estimator that is registered.

    python benchmarks/choosing_an_estimator.py [--cases bernoulli categorical …] [--num-samples 600]

Each case is a pair of programs at fixed parameters: models of the collection on 16 binarized digits after a short
training, and small programs on which some estimators go wrong. The text between the page's markers of a case is
replaced, and its picture is written to docs/figures; the rest of the page is left as it is. Runs on one thread.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from _timing import machine
from pyro.nn import PyroModule

from gumbo.experiments.data import load
from gumbo.guides import BernoulliGuide, CategoricalGuide, MeanFieldGuide, NormalGuide
from gumbo.inference import SiteELBO, audit, fit, plot_audit, stock_elbos
from gumbo.inference.auditing.report import HEADS, advice, cells, facts, remarks
from gumbo.inference.estimators import estimators
from gumbo.models import BernoulliVAE, CategoricalVAE, GaussianVAE, PoissonVAE
from gumbo.tables import markdown

DOCS = Path(__file__).resolve().parent.parent / "docs"
PAGE = DOCS / "choosing-an-estimator.md"
SHAPE, HIDDEN, ROWS, EPOCHS = (1, 8, 8), (64,), 16, 10
SLOPE = 2.0


def trained(model: PyroModule, guide: PyroModule, word: str, particles: int | None) -> tuple[Any, Any, Any]:
    """The pair after a few epochs on digits, and a batch that it has seen."""
    digits = load("digits", binarize="static").train
    loss = SiteELBO(word, num_particles=particles)
    fit(model, guide, digits, loss=loss, optimizer="adam", lr=3e-3, epochs=EPOCHS, batch_size=64, progress=False)
    return model, guide, digits[:ROWS]


def every_word(**more: Any) -> dict[str, Any]:
    """Each registered estimator and each of Pyro's own ELBOs at its smallest K, and more."""
    return {word: word for word in (*estimators, *stock_elbos)} | more


def with_draws(*words: str, counts: tuple[int, ...] = (4,)) -> dict[str, Any]:
    """Words that compare K draws, at more of them than their smallest K."""
    return {f"{word}, K = {k}": SiteELBO(word, num_particles=k) for word in words for k in counts}


def bernoulli():
    model = BernoulliVAE(SHAPE, num_latents=8, hidden=HIDDEN)
    rivals = with_draws("rloo", counts=(4, 8)) | with_draws("double-cv", "rodeo")
    return *trained(model, BernoulliGuide(model), "rloo", 4), {"estimators": every_word(**rivals)}


def categorical():
    model = CategoricalVAE(SHAPE, num_latents=4, num_classes=5, hidden=HIDDEN)
    rivals = with_draws("rloo", counts=(4, 8)) | with_draws("double-cv", "rodeo")
    return *trained(model, CategoricalGuide(model), "rloo", 4), {"estimators": every_word(**rivals)}


def poisson():
    """Counts without an end: `head-tail`, `truncated-enumerate` and `fini` serve no other case."""
    model = PoissonVAE(SHAPE, num_latents=2, hidden=HIDDEN)
    rivals = with_draws("rloo", counts=(4, 8)) | with_draws("double-cv")
    options = {"estimators": every_word(**rivals), "reference": "rloo"}
    return *trained(model, MeanFieldGuide(model), "rloo", 4), options


def gaussian():
    model = GaussianVAE(SHAPE, latent_dim=4, hidden=HIDDEN)
    return *trained(model, NormalGuide(model), "pathwise", 1), {"estimators": every_word()}


def gaussian_iwae():
    model = GaussianVAE(SHAPE, latent_dim=4, hidden=HIDDEN)
    options = {"estimators": list(estimators), "objective": "iwae", "num_particles": 8}
    return *trained(model, NormalGuide(model), "pathwise", 1), options


class Coins(PyroModule):
    """A guide of one coin, or of two in a plate and a third that depends on both."""

    def __init__(self, count: int):
        super().__init__()
        self.a = torch.nn.Parameter(torch.tensor([0.4, -0.7][:count], dtype=torch.float64))

    def forward(self):
        if len(self.a) == 1:
            pyro.sample("z", dist.Bernoulli(logits=self.a[0]))
            return
        with pyro.plate("data", 2):
            z = pyro.sample("z", dist.Bernoulli(logits=self.a))
        pyro.sample("g", dist.Bernoulli(logits=SLOPE * z.mean(-1, keepdim=z.dim() > 1) - 0.3))


def branching_model():
    z = pyro.sample("z", dist.Bernoulli(torch.tensor(0.4, dtype=torch.float64)))
    loc = 1.0 if z > 0.5 else -1.0
    pyro.sample("x", dist.Normal(loc, 1.0), obs=torch.tensor(0.3, dtype=torch.float64))


def plated_model():
    g = pyro.sample("g", dist.Bernoulli(torch.tensor(0.5, dtype=torch.float64)))
    with pyro.plate("data", 2):
        z = pyro.sample("z", dist.Bernoulli(torch.tensor(0.4, dtype=torch.float64)))
        pyro.sample("x", dist.Normal(z - 2.0 * g, 1.0), obs=torch.tensor([0.3, -0.8], dtype=torch.float64))


def control_flow():
    return branching_model, Coins(1), None, {"estimators": every_word(), "vectorize_particles": False}


def plate_then_global():
    return plated_model, Coins(2), None, {"estimators": every_word()}


CASES: dict[str, Callable] = {
    "bernoulli": bernoulli,
    "categorical": categorical,
    "poisson": poisson,
    "gaussian": gaussian,
    "gaussian-iwae": gaussian_iwae,
    "control-flow": control_flow,
    "plate-then-global": plate_then_global,
}


def section(name: str, num_samples: int) -> str:
    """Table, remarks and picture of one case."""
    torch.manual_seed(0)
    model, guide, x, options = CASES[name]()
    arguments = () if x is None else (x,)
    report = audit(model, guide, *arguments, num_samples=num_samples, burn_in=300, **options)
    (DOCS / "figures").mkdir(exist_ok=True)
    plot_audit(report, DOCS / "figures" / f"audit-{name}.png")
    lines = [
        f"`python benchmarks/choosing_an_estimator.py --cases {name} --num-samples {num_samples}`",
        "",
        f"{facts(report)} ({machine()}).",
        "",
        *markdown(HEADS, cells(report)),
        "",
        f"![Bias with its error, and variance against time](figures/audit-{name}.png)",
        "",
        *(f"- {remark}" for remark in remarks(report)),
        "",
        f"The audit's own words: {advice(report)}.",
    ]
    return "\n".join(lines)


def insert(page: str, name: str, text: str) -> str:
    """The page with the text between the two markers of a case replaced."""
    start, end = f"<!-- audit: {name} -->", f"<!-- end: {name} -->"
    before, found, rest = page.partition(start)
    _, closed, after = rest.partition(end)
    if not (found and closed):
        raise SystemExit(f"{PAGE} has no markers {start} … {end}")
    return f"{before}{start}\n\n{text}\n\n{end}{after}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=list(CASES))
    parser.add_argument("--num-samples", type=int, default=600)
    given = parser.parse_args()
    torch.set_num_threads(1)
    for name in given.cases:
        text = section(name, given.num_samples)
        PAGE.write_text(insert(PAGE.read_text(), name, text))
        print(name, flush=True)


if __name__ == "__main__":
    main()
