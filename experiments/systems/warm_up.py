"""KL warm-up against collapse."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from gumbo.experiments._runs import RunFolder
from gumbo.experiments.systems._base import System, systems


@systems.register("warm-up")
@dataclass
class WarmUp(System):
    """A deep VAE whose latents collapse without KL warm-up (linear, cyclical) or free bits.

    Args:
        epochs: training epochs of each loss; by default 60, and 2 under `--quick`.
    """

    epochs: int | None = None

    def measure(self, run: RunFolder) -> dict[str, Any]:
        """The numbers; the picture goes to the run folder."""
        import torch

        from gumbo.experiments.data import load
        from gumbo.experiments.plots import colors, figure, save
        from gumbo.guides import NormalGuide
        from gumbo.inference import Cyclical, FreeBits, Linear, SiteELBO, active_units, evaluate, fit
        from gumbo.models import GaussianVAE

        data = load("digits", binarize="static")
        epochs = self.number("epochs", usual=60, quick=2)
        steps = epochs * -(-len(data.train) // 64)
        losses = {
            "none": SiteELBO(),
            "linear": SiteELBO(kl_weight=Linear(steps // 2)),
            "cyclical": SiteELBO(kl_weight=Cyclical(steps, cycles=4)),
            "free bits": FreeBits(0.1),
        }
        palette = colors(list(losses))
        made, axis = figure(figsize=(6.5, 4))
        found: dict[str, Any] = {"epochs": epochs, "latent dimensions": 20}
        for name, loss in losses.items():
            torch.manual_seed(self.seed)
            model = GaussianVAE((1, 8, 8), latent_dim=20, hidden=(128, 128, 128), likelihood="bernoulli")
            guide = NormalGuide(model)
            fit(model, guide, data.train, loss=loss, epochs=epochs, batch_size=64, lr=2e-3, seed=self.seed, title=name)
            judged = evaluate(model, guide, data.test, num_samples=50)
            found[name] = {
                "active units": int(active_units(guide, data.test)["z"].sum()),
                "test ELBO (nats)": judged.elbo,
                "rate (nats)": judged.rate,
            }
            with torch.no_grad():
                spread = guide.encoder_heads["z"](guide.encoder(data.test))[:, :20].var(0).sort(descending=True).values
            axis.semilogy(range(1, 21), spread, "o-", markersize=3, color=palette[name], label=name)
        axis.axhline(0.01, color="black", linewidth=0.8, linestyle=":", label="threshold of an active unit")
        axis.set(title="units in use", xlabel="latent dimension, by rank", ylabel="Var over x of E[z given x]")
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.legend(fontsize=8)
        save(made, run.plots / "warm_up.png")
        return found
