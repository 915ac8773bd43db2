"""The toy of REBAR and RELAX: minimize E[(b − t)²] over the probability of a coin b, for t just below a half.

Both values of b cost nearly the same, so that the gradient, σ(φ)(1 − σ(φ))(1 − 2t), is small beside its noise.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gumbo.experiments.reproduction.cells import Cell, register
from gumbo.inference.estimators import estimators

TARGETS = (0.45, 0.49, 0.499)
REPLICAS, QUICK_REPLICAS = 500, 20  # coins, each with its own parameter and its own noise
CALLS, QUICK_CALLS = 40, 5  # at fixed parameters
ADAPTING, QUICK_ADAPTING = 200, 5  # steps of an estimator's own parameters before the variance is measured
QUICK_STEPS = 10
LR = 0.05
POINTS = 20


@dataclass(frozen=True)
class ToyCell(Cell):
    """One estimator at one target: ``value`` is the probability of the worse value after the training, 0.5 at first.

    Beside it: the mean and the variance of the gradient at φ = 0, whose exact value is (1 − 2t)/4.
    """

    target: float = 0.45
    estimator: str = "score"

    def run(self, seed: int, steps: int, folder: Path, *, quick: bool = False, device: str = "cpu") -> dict[str, Any]:
        import torch

        torch.set_num_threads(1)
        replicas, steps = (QUICK_REPLICAS, QUICK_STEPS) if quick else (REPLICAS, steps)
        began = time.perf_counter()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            gradients = _gradients(self, replicas, quick)
            worse, curve = _train(self, replicas, steps)
        exact = (1 - 2 * self.target) / 4
        error = gradients.std() / len(gradients) ** 0.5
        return {
            "value": worse.mean().item(),
            "value_se": (worse.std() / len(worse) ** 0.5).item(),
            "beside": {
                "variance": gradients.var().item(),
                "gradient": gradients.mean().item(),
                "± se": error.item(),
                "exact": exact,
            },
            "steps": steps,
            "share": steps / self.steps,
            "seconds": time.perf_counter() - began,
            "curve": curve,
        }


def _loss(cell: ToyCell, replicas: int):
    """The loss of ``replicas`` coins at φ = 0, and φ of shape ``(replicas,)``."""
    import pyro
    import pyro.distributions as dist
    import torch

    from gumbo.inference import SiteELBO

    class Coins(pyro.nn.PyroModule):
        def __init__(self):
            super().__init__()
            self.phi = torch.nn.Parameter(torch.zeros(replicas))

        def forward(self):
            with pyro.plate("replicas", replicas):
                return pyro.sample("b", dist.Bernoulli(logits=self.phi))

    def model():
        with pyro.plate("replicas", replicas):
            b = pyro.sample("b", dist.Bernoulli(torch.tensor(0.5), validate_args=False))  # relaxed values, too
            pyro.factor("cost", -((b - cell.target) ** 2))

    guide = Coins()
    loss = SiteELBO(cell.estimator, kl_weight=0.0)(model, guide)  # E[cost] alone, without the coins' entropy
    loss()  # makes what is sized by the data
    return loss, guide.phi


def _gradients(cell: ToyCell, replicas: int, quick: bool):
    """Gradients at φ = 0, one for each replica and call, after the estimator's own parameters have adapted."""
    import torch

    loss, phi = _loss(cell, replicas)
    own = [p for p in loss.parameters() if p is not phi]
    optimizer = torch.optim.Adam(own, lr=LR) if own else None
    for _ in range(QUICK_ADAPTING if quick else ADAPTING):
        loss.zero_grad()
        loss().backward()
        if optimizer:
            optimizer.step()
    loss.eval()
    found = []
    for _ in range(QUICK_CALLS if quick else CALLS):
        loss.zero_grad()
        loss().backward()
        found.append(phi.grad.clone())
    return torch.cat(found)


def _train(cell: ToyCell, replicas: int, steps: int):
    """σ(φ) of each replica after training, and its curve during training."""
    import torch

    loss, phi = _loss(cell, replicas)
    optimizer = torch.optim.Adam(loss.parameters(), lr=LR)
    curve = []
    for step in range(1, steps + 1):
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()
        if step % max(1, steps // POINTS) == 0:
            worse = phi.detach().sigmoid()
            curve.append({"step": step, "mean": round(worse.mean().item(), 6), "sd": round(worse.std().item(), 6)})
    return phi.detach().sigmoid(), curve


def serves(word: str) -> bool:
    """Whether an estimator serves a coin under the evidence lower bound."""
    import pyro.distributions as dist

    estimator = estimators[word]()
    return "elbo" in estimator.objectives and estimator.supports({"name": "b", "fn": dist.Bernoulli(0.5)})


def cells() -> list[ToyCell]:
    words = [word for word in estimators if serves(word)]
    return [
        ToyCell(f"{target}/{word}", steps=1000, target=target, estimator=word) for target in TARGETS for word in words
    ]


register(
    "toy",
    "Tucker et al. 2017, arXiv 1703.07370; Grathwohl et al. 2018, arXiv 1711.00123",
    "E[(b − t)²] of a coin b. Ours: the probability of the worse value after 1,000 steps of Adam at 0.05 from 0.5, the "
    "mean over 500 coins; then the variance and the mean of the gradient at the start, 20,000 draws.",
    cells,
    value="q(b = 1)",
)
