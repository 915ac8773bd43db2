"""The benchmark of DisARM, ARMS, Double CV and RODEO: 200 Bernoulli latents, encoder 784-200-200-200 and back."""

from __future__ import annotations

from gumbo.experiments.reproduction.cells import register
from gumbo.experiments.reproduction.trained import TrainedCell

ARMS = (("disarm", 1), ("rloo", 2), ("rloo", 4), ("disarm", 2), ("rebar", 1), ("relax", 1))


def cells() -> list[TrainedCell]:
    return [
        TrainedCell(
            f"nonlinear/{word}-k{particles * (2 if word == 'disarm' else 1)}",
            101.6 if (word, particles) == ("disarm", 1) else None,
            model="bernoulli-vae",
            guide="bernoulli",
            estimator=word,
            model_options={"num_latents": 200},
            particles=particles,
            metric="negative-elbo",
            draws=100,
        )
        for word, particles in ARMS
    ]


register(
    "coins",
    "Dong et al. 2020, arXiv 2006.10680; Dimitriev & Zhou 2021; Titsias & Shi 2022; Shi et al. 2022",
    "The papers binarize MNIST anew at each pass; here it is the fixed binarization. Batch 100, Adam 1e-3.",
    cells,
)
