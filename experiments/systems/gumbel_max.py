"""Gumbel-max draws."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from gumbo.experiments._runs import RunFolder
from gumbo.experiments.systems._base import System, systems


@systems.register("gumbel-max")
@dataclass
class GumbelMax(System):
    """argmax (log π + g) against π, the mean intensity of the digits' pixels, by a χ² test; and with the wrong sign."""

    def measure(self, run: RunFolder) -> dict[str, Any]:
        """The numbers; the picture goes to the run folder."""
        import torch
        from scipy.stats import chisquare

        from gumbo.experiments.data import load
        from gumbo.experiments.plots import figure, save

        ink = load("digits").train.double().mean(0).flatten() + 1e-3
        pi = ink / ink.sum()
        draws = 20_000 if self.quick else 200_000
        noise = -(-torch.rand(draws, len(pi), dtype=torch.float64).log()).log()
        found: dict[str, Any] = {"draws": draws, "classes": len(pi)}
        panels = {"π: the ink of each pixel": pi}
        for name, sign in (("log π + g", 1), ("log π − g (the slip)", -1)):
            counts = torch.bincount((pi.log() + sign * noise).argmax(-1), minlength=len(pi))
            test = chisquare(counts.numpy(), (draws * pi).numpy())
            found[name] = {"chi-squared": float(test.statistic), "p-value": float(test.pvalue)}
            panels[f"frequencies of argmax({name})"] = counts / draws
        made, axes = figure(1, 3, figsize=(11, 3.6))
        for axis, (title, values) in zip(axes, panels.items(), strict=True):
            shown = axis.imshow(values.reshape(8, 8).numpy(), cmap="viridis", vmin=0, vmax=pi.max())
            axis.set_title(title, fontsize=10)
            axis.set_axis_off()
        made.colorbar(shown, ax=list(axes), shrink=0.8)
        save(made, run.plots / "gumbel_max.png")
        return found
