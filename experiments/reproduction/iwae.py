"""Burda, Grosse & Salakhutdinov 2015, "Importance weighted autoencoders" (arXiv 1509.00519), fixed binarization."""

from __future__ import annotations

from gumbo.experiments.reproduction.cells import register
from gumbo.experiments.reproduction.orderings import conclude
from gumbo.experiments.reproduction.trained import TrainedCell, cell_of

PUBLISHED = {("pathwise", 1): 88.71, ("pathwise", 5): 87.63, ("pathwise", 50): 87.10}
OURS = (("stl", 1), ("dreg", 5))


MODELS = {
    "one-layer": (
        "gaussian-vae",
        {"latent_dim": 50, "hidden": [200, 200], "activation": "tanh"},
        "normal",
        {},
    ),
    # 100 latents next to the data, 50 above them, and two layers of units before each.
    "two-layers": (
        "hierarchical-vae",
        {"latent_dims": [100, 50], "hidden": [200, 200], "level_hidden": 100, "activation": "tanh"},
        "layered",
        {"parents": {"z1": [], "z2": ["z1"]}, "site_hidden": [100], "skip": False},
    ),
}


def cells() -> list[TrainedCell]:
    found = []
    for layers, pair in MODELS.items():
        for word, particles in (*PUBLISHED, *OURS):
            found.append(
                cell_of(
                    pair,
                    f"{layers}/{word}-k{particles}",
                    PUBLISHED.get((word, particles)) if layers == "one-layer" else None,
                    word,
                    particles,
                    objective="iwae" if particles > 1 else "elbo",
                    steps=8_200_000,
                    draws=5000,
                )
            )
    return found


register(
    "iwae",
    "Burda, Grosse & Salakhutdinov 2015, arXiv 1509.00519",
    "Fixed binarization of MNIST, one stochastic layer of 50 Normal latents and two layers of 200 tanh units, or two "
    "of 100 and 50 latents. The paper: 3,280 "
    "passes in batches of 20 with Adam's rate falling from 1e-3 to 1e-4. Here: batch 100, cosine decay. "
    "The metric is −log p(x) by 5,000 importance-weighted draws.",
    cells,
    metric="−log p(x) by 5,000 importance-weighted draws",
    conclude=conclude,
)
