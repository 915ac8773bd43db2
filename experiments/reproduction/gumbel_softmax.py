"""Jang, Gu & Poole 2017, "Categorical reparameterization with Gumbel-softmax" (arXiv 1611.01144), table 1."""

from __future__ import annotations

from typing import Any

from gumbo.experiments.reproduction.cells import register
from gumbo.experiments.reproduction.orderings import conclude
from gumbo.experiments.reproduction.trained import TrainedCell, cell_of, cosine

# By row of the paper's table: score function, MuProp, straight-through, Gumbel-softmax, straight-through Gumbel.
WORDS = {
    "SF": "score-average",
    "MuProp": "muprop",
    "ST": "reinmax(order=1)",
    "GS": "gumbel-softmax",
    "ST-GS": "straight-through",
}
PUBLISHED = {
    "vae-bernoulli": {"SF": 112.2, "MuProp": 109.7, "ST": 116.0, "GS": 105.0, "ST-GS": 111.5},
    "vae-categorical": {"SF": 110.6, "MuProp": 107.0, "ST": 110.9, "GS": 101.5, "ST-GS": 107.8},
    "sbn-bernoulli": {"SF": 72.0, "MuProp": 58.9, "ST": 58.9, "GS": 58.5, "ST-GS": 59.3},
    "sbn-categorical": {"SF": 73.1, "MuProp": 63.0, "ST": 61.8, "GS": 59.0, "ST-GS": 59.7},
}
# Columns of our own, by their draws a step.
OURS = {
    "rloo": 4,
    "disarm": None,
    "double-cv": None,
    "rebar": None,
    "reinmax": None,
    "gumbel-rao": None,
    "auto": None,
}
# What the paper reports, and the draws that it takes; −ELBO has no use for more.
JUDGED: dict[str, dict[str, Any]] = {
    "vae": {"metric": "negative-elbo", "draws": 100},
    "sbn": {"metric": "nll", "draws": 1000},
}
# 1e-3 where none stands. vae-bernoulli has the linear network of the table `arm` and its rate, which was chosen on
# validation images; the others take it over: they were tried at 8,000 steps only, where 1e-2 is ahead, or not at all.
RATES = {"vae-bernoulli": "3e-3", "vae-categorical": "3e-3", "sbn-categorical": "3e-3"}
RATES |= {"sbn-bernoulli/SF": "3e-3", "sbn-bernoulli/MuProp": "3e-3"}
MODELS = {
    "vae-bernoulli": ("bernoulli-vae", {"num_latents": 200, "nonlinear": False}, "bernoulli", {"hidden": []}),
    "vae-categorical": ("categorical-vae", {"num_latents": 20, "num_classes": 10, "hidden": []}, "categorical", {}),
    "sbn-bernoulli": ("structured-prediction", {"layers": [200, 200]}, "prior", {}),
    "sbn-categorical": ("structured-prediction", {"layers": [20, 20], "num_classes": 10}, "prior", {}),
}


def cells() -> list[TrainedCell]:
    found = []
    for family, pair in MODELS.items():
        published = PUBLISHED[family]
        rows = [(column, WORDS[column], None) for column in published]
        rows += [(word, word, particles) for word, particles in OURS.items()]
        for column, word, particles in rows:
            found.append(
                cell_of(
                    pair,
                    f"{family}/{column}",
                    published.get(column),
                    word,
                    particles,
                    lr=cosine(RATES.get(f"{family}/{column}", RATES.get(family, "1e-3"))),
                    temperature="exponential(1.0, 0.5, 3e-5)" if column in ("GS", "ST-GS") else None,
                    **JUDGED[family[:3]],
                )
            )
    return found


register(
    "gumbel-softmax",
    "Jang, Gu & Poole 2017, arXiv 1611.01144, table 1",
    "Fixed binarization of MNIST. SBN: −log p(lower half given upper half) with 1,000 draws of the prior; VAE: −ELBO. "
    "The paper: SGD with momentum 0.9. Here: Adam with a cosine decay from 3e-3, and from 1e-3 for the Bernoulli SBN "
    "but SF and MuProp; batch 100. Categorical: 20 latents of 10 classes a layer. ST is the straight-through gradient "
    "without Gumbel noise. Ours is the bound of the discrete model. GS trains the bound of a relaxed model, which the "
    "column *relaxed, in training* shows; the published 105.0 lies near that, and the others of the Bernoulli VAE "
    "nearer to our 100-draw bounds than to our −ELBO.",
    cells,
    metric="SBN: −log p(lower half given upper half) by 1,000 draws of the prior; VAE: −ELBO",
    conclude=conclude,
)
