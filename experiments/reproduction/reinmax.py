"""ReinMax (Liu et al. 2023, arXiv 2304.08612): categorical VAEs of MNIST, by number of classes × number of latents."""

from __future__ import annotations

from gumbo.experiments.reproduction.cells import register
from gumbo.experiments.reproduction.orderings import conclude
from gumbo.experiments.reproduction.trained import TrainedCell

# Training loss on gray levels, by classes × latents, from the paper's table (quoted from memory).
PUBLISHED = {
    (8, 4): {"reinmax": 124.66, "straight-through": 126.85},
    (4, 24): {"reinmax": 99.77, "straight-through": 101.32},
    (8, 16): {"reinmax": 97.70, "straight-through": 99.32},
    (16, 12): {"reinmax": 98.06, "straight-through": 100.09},
    (64, 8): {"reinmax": 100.71, "straight-through": 104.0},
    (10, 30): {"reinmax": 98.37, "straight-through": 99.63},
}
# The optimizer, learning rate and temperature of ReinMax; every column here uses them.
SETTINGS = {
    (8, 4): ("adam", "5e-4", "1.3"),
    (4, 24): ("radam", "5e-4", "1.5"),
    (8, 16): ("radam", "7e-4", "1.5"),
    (16, 12): ("radam", "7e-4", "1.5"),
    (64, 8): ("radam", "5e-4", "1.5"),
    (10, 30): ("radam", "5e-4", "1.3"),
}
OURS = {"gumbel-rao": None, "rloo": 4}
LISTED = (8, 4)  # 4,096 codes a datum, all of which can be summed


def cells() -> list[TrainedCell]:
    found = []
    for (classes, latents), (optimizer, lr, temperature) in SETTINGS.items():
        published = PUBLISHED[classes, latents]
        exact = {"enumerate": None} if (classes, latents) == LISTED else {}
        for word, particles in (*dict.fromkeys(published).items(), *OURS.items(), *exact.items()):
            found.append(
                TrainedCell(
                    f"{classes}x{latents}/{word}",
                    published.get(word),
                    model="categorical-vae",
                    guide="categorical",
                    estimator=word,
                    model_options={"num_latents": latents, "num_classes": classes, "hidden": [512, 256]},
                    particles=particles,
                    temperature=None if word in ("rloo", "enumerate") else temperature,
                    lr=lr,
                    optimizer=optimizer,
                    steps=96_000,
                    metric="training-loss",
                    draws=100,
                )
            )
    return found


register(
    "reinmax",
    "Liu et al. 2023, arXiv 2304.08612; Fan et al. 2022, arXiv 2206.07235",
    "Classes × latents; encoder 784-512-256 and its mirror, batch 100, 160 passes. The papers train on the 60,000 "
    "gray images with binary cross-entropy (BCE): for a gray level g in [0, 1] that is the mean of −log p(x) over "
    "pixels drawn from Bernoulli(g), so that their number is a mean over random binarizations and the bound of no "
    "image at hand. Their numbers are quoted from memory. Ours is the −ELBO "
    "of 5,000 training images of the fixed binarization: orderings compare, values do not. The "
    "100-draw bound is of test images.",
    cells,
    metric="−ELBO of training images",
    conclude=conclude,
)
