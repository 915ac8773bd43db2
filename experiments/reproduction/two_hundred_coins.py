"""The benchmark of DisARM, ARMS, Double CV and RODEO: 200 Bernoulli latents, encoder 784-200-200-200 and back."""

from __future__ import annotations

from typing import Any

from gumbo.experiments.reproduction.cells import register
from gumbo.experiments.reproduction.orderings import conclude
from gumbo.experiments.reproduction.trained import TrainedCell

# Estimator, particles, and the number of model runs a step, which the cell's name gives.
ARMS = (
    ("disarm", 1, 2),
    ("rloo", 2, 2),
    ("rloo", 4, 4),
    ("disarm", 2, 4),
    ("rebar", 1, 1),
    ("relax", 1, 1),
)
# Two, three and four model runs a step.
MORE = (
    *((f"arms(draws={k})", "arms", 1, k) for k in (2, 3, 4)),
    *(("double-cv", "double-cv", k, k) for k in (2, 3, 4)),
    *(("rodeo", "rodeo", k, k) for k in (2, 3, 4)),
    ("rloo", "rloo", 3, 3),
)


def cells() -> list[TrainedCell]:
    return [
        *(cell(word, word, particles, k) for word, particles, k in ARMS),
        *(cell(call, word, particles, k, bounds=(2,), variance=True) for call, word, particles, k in MORE),
    ]


def cell(estimator: str, word: str, particles: int, k: int, **options: Any) -> TrainedCell:
    return TrainedCell(
        f"nonlinear/{word}-k{k}",
        101.6 if (word, k) == ("disarm", 2) else None,
        model="bernoulli-vae",
        guide="bernoulli",
        estimator=estimator,
        model_options={"num_latents": 200},
        particles=particles,
        metric="negative-elbo",
        draws=100,
        **options,
    )


register(
    "coins",
    "Dong et al. 2020, arXiv 2006.10680; Dimitriev & Zhou 2021; Titsias & Shi 2022; Shi et al. 2022",
    "The papers binarize MNIST anew in each pass; this table uses the fixed binarization. Batch 100, Adam 1e-3. K is "
    "the number of model runs a step. The papers call their test bound one of 100 draws, but their released code draws "
    "two or three: the table has both beside the −ELBO of the test images.",
    cells,
    metric="−ELBO of the test images",
    conclude=conclude,
)
