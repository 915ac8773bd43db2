"""Rewards to maximize: policy gradients, and a generator of token sequences."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from gumbo.experiments._runs import RunFolder
from gumbo.experiments.systems._base import System, clear_store, systems


@systems.register("policy")
@dataclass
class Policy(System):
    """Policy gradients: point at the ink of a digit, with and without seeing it; and generate counting sequences."""

    def measure(self, run: RunFolder) -> dict[str, Any]:
        """The numbers; the picture goes to the run folder."""
        import torch

        from gumbo.experiments.data import load
        from gumbo.experiments.plots import colors, figure, save
        from gumbo.guides import CategoricalGuide, LayeredGuide, UnconditionalGuide
        from gumbo.models import Expectation

        data = load("digits", binarize="static")
        steps = 30 if self.quick else 300
        pointing = Expectation((1, 8, 8), "bandit", family="categorical", shape=(64,))
        counting = Expectation((1,), "counting", family="categorical", shape=(10,), length=8)
        draws = torch.ones(64, 1)
        tasks = {
            "point at ink": (pointing, lambda: CategoricalGuide(pointing, hidden=(64,)), data.train, data.test),
            "point at ink, blind": (pointing, lambda: UnconditionalGuide(pointing), data.train, data.test),
            "count": (counting, lambda: LayeredGuide(counting, skip=False), draws, draws),
        }
        made, axes = figure(1, 3, figsize=(13, 4))
        found: dict[str, Any] = {}
        trained: dict[str, Any] = {}
        for axis, (task, (model, make, x, test)) in zip(axes, tasks.items(), strict=True):
            found[task] = {}
            for word, color in colors(["score", "rloo"]).items():
                torch.manual_seed(self.seed)
                guide = make()
                rewards = climb(model, guide, word, x, steps)
                axis.plot(rewards, color=color, label=word, linewidth=1)
                found[task][f"E[f] under {word}"] = reward_of(model, guide, test)
                trained[task] = guide
            axis.set(title=task, xlabel="step", ylabel="reward")
            axis.legend(fontsize=8)
        save(made, run.plots / "policy.png")
        with torch.no_grad():
            values = trained["count"](draws[:5])
        clear_store()
        tokens = torch.stack([values[f"z{t}"].argmax(-1) for t in range(1, 9)], -1).tolist()
        found["sequences written"] = ", ".join("".join(map(str, row)) for row in tokens)
        return found


def climb(model, guide, word: str, x, steps: int) -> list[float]:
    """Maximize E[f] with one estimator; the mean reward of each step's draws."""
    import torch

    from gumbo.inference import SiteELBO

    loss = SiteELBO(word, kl_weight=0)(model, guide)
    optimizer = torch.optim.Adam(guide.parameters(), lr=0.02)
    rewards = []
    for step in range(steps):
        start = step * 64 % max(1, len(x) - 63)
        optimizer.zero_grad()
        value = loss(x[start : start + 64])
        value.backward()
        optimizer.step()
        rewards.append(-value.item() / 64)
    return rewards


def reward_of(model, guide, x) -> float:
    import torch

    from gumbo.inference import SiteELBO

    with torch.no_grad():
        return -SiteELBO("rloo", kl_weight=0, num_particles=20)(model, guide)(x).item() / len(x)
