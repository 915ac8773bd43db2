"""Natural gradients against Adam."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from gumbo.experiments._runs import RunFolder
from gumbo.experiments.systems._base import System, diabetes, systems


@systems.register("natural-gradient")
@dataclass
class NaturalGradient(System):
    """Steps against Adam: a mean-field Gaussian with a known optimum, and heteroscedastic regression on real data."""

    def measure(self, run: RunFolder) -> dict[str, Any]:
        """The numbers; the picture goes to the run folder."""
        import torch

        from gumbo.experiments.plots import figure, save
        from gumbo.models import HeteroscedasticRegression

        steps = 60 if self.quick else 400
        (x, y), _ = diabetes()

        def fresh():
            torch.manual_seed(self.seed)
            return HeteroscedasticRegression((10,), hidden=(16,), activation="tanh").double()

        gaussian = {name: descend(*mean_field(), how, steps) for name, how in METHODS.items()}
        networks = {}
        for name, how in METHODS.items():
            model = fresh()
            losses = descend(
                list(model.parameters()),
                lambda model=model: -model.likelihood(x).log_prob(y).sum(),
                lambda model=model: model.likelihood(x),
                how,
                steps // 4,
            )
            networks[name] = [loss / len(x) for loss in losses]
        found: dict[str, Any] = {"mean-field Gaussian: steps to 1e-4 nats of the optimum": {}}
        for name, losses in gaussian.items():
            near = [step for step, loss in enumerate(losses) if loss < 1e-4]
            found["mean-field Gaussian: steps to 1e-4 nats of the optimum"][name] = near[0] if near else f"over {steps}"
        goal = min(min(losses) for name, losses in networks.items() if name != "natural gradient")
        key = f"diabetes: steps to the best loss that any Adam reaches in {steps // 4}"
        found[key] = {}
        for name, losses in networks.items():
            near = [step for step, loss in enumerate(losses) if loss <= goal]
            found[key][name] = near[0] if near else f"over {steps // 4}"
        found["diabetes: last training loss (nats per datum)"] = {name: losses[-1] for name, losses in networks.items()}
        made, axes = figure(1, 2, figsize=(10.5, 4))
        for name in METHODS:
            style = "-" if name == "natural gradient" else "--"
            axes[0].semilogy([max(loss, 1e-9) for loss in gaussian[name]], style, label=name)
            axes[1].plot(networks[name], style, label=name)
        axes[0].set(title="mean-field Gaussian, known optimum", xlabel="step", ylabel="KL above the optimum (nats)")
        top = networks["natural gradient"][0]
        axes[1].set(
            title="heteroscedastic regression, diabetes", xlabel="step", ylabel="−log p(y given x), nats per datum"
        )
        axes[1].set_ylim(min(networks["natural gradient"]) - 0.1, top + 0.1)
        axes[0].legend(fontsize=8)
        save(made, run.plots / "natural_gradient.png")
        return found


METHODS = {"natural gradient": None, "Adam, lr 0.03": 0.03, "Adam, lr 0.1": 0.1, "Adam, lr 0.3": 0.3}


def mean_field():
    """Parameters of a diagonal Normal, its KL above the optimum for an ill-conditioned target, and itself."""
    import torch
    from torch.distributions import MultivariateNormal, Normal, kl_divergence

    precision = torch.diag(torch.tensor([100.0, 1.0, 0.01], dtype=torch.float64))
    precision[0, 1] = precision[1, 0] = 5.0
    target = MultivariateNormal(torch.tensor([1.0, -2.0, 3.0], dtype=torch.float64), precision_matrix=precision)
    best = -0.5 * (torch.logdet(precision) - precision.diagonal().log().sum())
    loc, log_scale = (torch.zeros(3, dtype=torch.float64, requires_grad=True) for _ in range(2))

    def loss():
        return kl_divergence(MultivariateNormal(loc, scale_tril=torch.diag(log_scale.exp())), target) - best

    return [loc, log_scale], loss, lambda: Normal(loc, log_scale.exp())


def descend(parameters, loss: Callable, distributions: Callable, how: float | None, steps: int) -> list[float]:
    """The losses before each step and after the last: natural gradients, or Adam at a learning rate."""
    import torch

    from gumbo.inference import NaturalGradient

    if how is None:
        damping = 1e-8 if len(parameters) == 2 else 0.1
        optimizer: Any = NaturalGradient(parameters, lr=0.7, damping=damping, iterations=30, max_kl=1.0)
    else:
        optimizer = torch.optim.Adam(parameters, lr=how)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        value = loss()
        losses.append(value.item())
        value.backward()
        optimizer.step(distributions) if how is None else optimizer.step()
    return [*losses, loss().item()]
