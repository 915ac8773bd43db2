"""Burda, Grosse & Salakhutdinov 2015, "Importance weighted autoencoders" (arXiv 1509.00519), fixed binarization."""

from __future__ import annotations

from gumbo.experiments.reproduction.cells import register
from gumbo.experiments.reproduction.trained import TrainedCell

PUBLISHED = {("pathwise", 1): 88.71, ("pathwise", 5): 87.63, ("pathwise", 50): 87.10}
OURS = (("stl", 1), ("dreg", 5))


def cells() -> list[TrainedCell]:
    found = []
    for word, particles in (*PUBLISHED, *OURS):
        found.append(
            TrainedCell(
                f"one-layer/{word}-k{particles}",
                PUBLISHED.get((word, particles)),
                model="gaussian-vae",
                guide="normal",
                estimator=word,
                model_options={"latent_dim": 50, "hidden": [200, 200], "activation": "tanh"},
                particles=particles,
                objective="iwae" if particles > 1 else "elbo",
                lr="cosine({steps}, 1e-3, 1e-5)",
                steps=8_200_000,
                draws=5000,
            )
        )
    return found


register(
    "iwae",
    "Burda, Grosse & Salakhutdinov 2015, arXiv 1509.00519",
    "Fixed binarization of MNIST, one stochastic layer of 50 Normal latents, two layers of 200 tanh units. The paper: "
    "3,280 passes in batches of 20 with Adam's rate falling from 1e-3 to 1e-4. Here: batch 100, cosine decay. "
    "The metric is −log p(x) by 5,000 importance-weighted draws.",
    cells,
)
