"""Networks that output a distribution."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from gumbo.experiments._runs import RunFolder
from gumbo.experiments.systems._base import System, diabetes, systems


@systems.register("regression")
@dataclass
class Regression(System):
    """Progress of diabetes from body mass: a network with input-dependent spread, and one with latent weights.

    Args:
        epochs: training epochs of each network; by default 300, and 20 under `--quick`.
    """

    epochs: int | None = None

    def measure(self, run: RunFolder) -> dict[str, Any]:
        """The numbers; the picture goes to the run folder."""
        import torch

        from gumbo.experiments.plots import figure, save
        from gumbo.guides import AutoGuide, NoGuide
        from gumbo.inference import evaluate, fit
        from gumbo.models import BayesianRegression, HeteroscedasticRegression

        (x, y), (x_test, y_test) = diabetes()
        body_mass = 2
        train = {"x": x[:, [body_mass]].float(), "y": y.float()}
        test = {"x": x_test[:, [body_mass]].float(), "y": y_test.float()}
        grid = torch.linspace(float(train["x"].min()), float(train["x"].max()), 100).unsqueeze(-1)
        epochs = self.number("epochs", usual=300, quick=20)
        made, axes = figure(1, 2, figsize=(10, 4), sharey=True)
        found: dict[str, Any] = {}
        network = HeteroscedasticRegression((1,), hidden=(16,), activation="tanh")
        weights = BayesianRegression((1,), hidden=(16,))
        pairs = {"heteroscedastic": (network, NoGuide(network)), "Bayesian": (weights, AutoGuide(weights))}
        for axis, (name, (model, guide)) in zip(axes, pairs.items(), strict=True):
            fit(model, guide, train, epochs=epochs, batch_size=len(x), lr=1e-2, seed=self.seed, title=name)
            judged = evaluate(model, guide, test, num_samples=500)
            found[name] = {"test log p(y given x) (nats)": judged.log_predictive}
            with torch.no_grad():
                draws = _predictive(model, guide, grid, 200 if self.quick else 2000)
            mean, sd = draws.mean(0), draws.std(0)
            axis.plot(train["x"], train["y"], ".", color="gray", markersize=3)
            axis.plot(grid, mean, color="tab:blue")
            for band in (1, 2):
                axis.fill_between(
                    grid[:, 0], mean - band * sd, mean + band * sd, alpha=0.2, color="tab:blue", linewidth=0
                )
            axis.set(title=f"{name}: ±1 and ±2 sd", xlabel="body mass index (standardized)")
        axes[0].set_ylabel("progress (standardized)")
        save(made, run.plots / "regression.png")
        return found


def _predictive(model, guide, x, count: int):
    """Draws of y at each x, ``(count, rows)``, each under its own draw of the guide."""
    import pyro
    import torch
    from pyro import poutine

    draws = []
    with pyro.get_param_store().scope():
        for _ in range(count):
            trace = poutine.trace(guide).get_trace(x)
            draws.append(poutine.replay(model, trace=trace)(x)[:, 0])
    return torch.stack(draws)
