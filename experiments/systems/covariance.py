"""Full covariance and flows against a diagonal posterior."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from gumbo.experiments._runs import RunFolder
from gumbo.experiments.systems._base import System, clear_store, systems

CORRELATION = 0.95


@systems.register("covariance")
@dataclass
class Covariance(System):
    """The gap of a diagonal guide to a posterior of correlation 0.95, against a full covariance and a flow.

    Args:
        epochs: training epochs of each guide; by default 60, and 10 under `--quick`.
    """

    epochs: int | None = None

    def measure(self, run: RunFolder) -> dict[str, Any]:
        """The numbers; the picture goes to the run folder."""
        import math

        import torch

        from gumbo.experiments.data import load
        from gumbo.experiments.plots import figure, save
        from gumbo.guides import FlowGuide, NormalGuide, TriangularNormalGuide
        from gumbo.inference import evaluate, fit

        x = load("digits").train
        model, means, covariance, evidence = factor_model(x)
        epochs = self.number("epochs", usual=60, quick=10)
        found: dict[str, Any] = {
            "log p(x), exact": evidence.mean().item(),
            "best gap of a diagonal": -0.5 * math.log(1 - CORRELATION**2),
        }
        made, axes = figure(1, 3, figsize=(11, 4), sharex=True, sharey=True)
        exact = torch.distributions.MultivariateNormal(means[0], covariance).sample((1000,))
        for axis, (name, make) in zip(
            axes,
            {"normal": NormalGuide, "triangular-normal": TriangularNormalGuide, "flow": FlowGuide}.items(),
            strict=True,
        ):
            guide = make(model, hidden=(64,))
            for lr in (5e-3, 1e-3):
                fit(model, guide, x, epochs=epochs // 2, lr=lr, seed=self.seed, title=name)
            gap = evidence.mean().item() - evaluate(model, guide, x, num_samples=50).elbo
            found[name] = {"gap to log p(x) (nats)": gap}
            with torch.no_grad():
                draws = guide(x[:1].expand(1000, *x.shape[1:]))["z"]
            clear_store()
            axis.plot(*exact.T, ".", color="lightgray", markersize=3, label="exact posterior")
            axis.plot(*draws.T, ".", color="tab:blue", markersize=2, label=name)
            axis.set(title=f"{name}: gap {gap:.3f} nats", xlabel="z₁")
            axis.legend(fontsize=8, loc="upper left")
        axes[0].set_ylabel("z₂")
        save(made, run.plots / "covariance.png")
        return found


def factor_model(x):
    """Two factors of the images whose exact posterior is a Normal with that correlation; and log p(x) of each image."""
    import pyro
    import pyro.distributions as dist
    import torch

    from gumbo.models import GenerativeModel, Latent

    flat = x.flatten(1)
    centre = flat.mean(0)
    _, _, directions = torch.linalg.svd(flat - centre, full_matrices=False)
    precision = 20.0 * torch.tensor([[1.0, -CORRELATION], [-CORRELATION, 1.0]])
    root = torch.linalg.cholesky(precision - torch.eye(2)).mH
    loadings = directions[:2].mH @ root

    class Factors(GenerativeModel):
        def __init__(self):
            super().__init__(x.shape[1:])
            self.latents = {"z": Latent("normal", (2,))}
            self.register_buffer("loadings", loadings)

        def forward(self, x=None, *, batch_size=1):
            with self.data_plate(x, batch_size):
                z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
                mean = (centre + z @ self.loadings.mH).unflatten(-1, self.data_shape)
                return pyro.sample("x", dist.Normal(mean, 1.0).to_event(len(self.data_shape)), obs=x)

    covariance = torch.linalg.inv(precision)
    means = (flat - centre) @ loadings @ covariance
    evidence = dist.LowRankMultivariateNormal(centre, loadings, torch.ones(len(centre))).log_prob(flat)
    return Factors(), means, covariance, evidence
