"""The two-dimensional manifold of a convolutional VAE."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from gumbo.experiments._runs import RunFolder
from gumbo.experiments.systems._base import System, images, systems


@systems.register("manifold")
@dataclass
class Manifold(System):
    """ConvVAE with two latents: the decoded images over the latent plane.

    Args:
        data: the training images; of mnist only the test split is read.
        epochs: training epochs; by default 30, and 2 under `--quick`.
    """

    data: str = "digits"
    epochs: int | None = None

    def measure(self, run: RunFolder) -> dict[str, Any]:
        """The numbers; the picture goes to the run folder."""
        import numpy as np
        import torch

        from gumbo.experiments.plots import figure, save
        from gumbo.guides import NormalGuide
        from gumbo.inference import evaluate, fit
        from gumbo.models import ConvVAE

        x = images(self.data)
        held, x = x[: len(x) // 10], x[len(x) // 10 :]
        if self.quick:
            held, x = held[:100], x[:500]
        model = ConvVAE(x.shape[1:], channels=(8, 16) if self.quick else (32, 64))
        guide = NormalGuide(model)
        epochs = self.number("epochs", usual=30, quick=2)
        fit(model, guide, x, valid=held, epochs=epochs, lr=2e-3, seed=self.seed, title="manifold")
        found = evaluate(model, guide, held, num_samples=50)
        side = 8 if self.quick else 20
        places = torch.distributions.Normal(0.0, 1.0).icdf((torch.arange(side) + 0.5) / side)
        with torch.no_grad():
            grid = torch.stack([places.expand(side, side), places.flip(0).unsqueeze(1).expand(side, side)], -1)
            pictures = model.likelihood(grid).mean[..., 0, :, :].numpy()
        height, width = pictures.shape[-2:]
        made, axes = figure(figsize=(8, 8))
        sheet = pictures.transpose(0, 2, 1, 3).reshape(side * height, side * width)
        axes.imshow(sheet, cmap="gray_r", vmin=0, vmax=1)
        ticks = np.linspace(0, side - 1, 5).round().astype(int)
        axes.set_xticks((ticks + 0.5) * width, [f"{places[t]:.1f}" for t in ticks])
        axes.set_yticks((ticks + 0.5) * height, [f"{places[side - 1 - t]:.1f}" for t in ticks])
        axes.set(title="decoder means over the latent plane, at equal prior mass", xlabel="z₁", ylabel="z₂")
        save(made, run.plots / "manifold.png")
        return {"images": len(x), "epochs": epochs, "held-out ELBO (nats)": found.elbo, "log p(x)": found.log_evidence}
