"""Walks over a grid with rewards: policy gradients with a known exact gradient."""

from __future__ import annotations

from collections.abc import Sequence

import pyro
import torch
from torch import Tensor

from ..errors import BadInput
from ._base import GenerativeModel, Latent, models
from .families import families

MOVES = ((-1, 0), (1, 0), (0, -1), (0, 1))


@models.register("grid-world")
class GridWorld(GenerativeModel):
    r"""A walk of T steps over a grid: the guide is the policy, and the model weights a walk by its return.

    .. math:: a_t \sim p_0 = \mathrm{uniform}, \qquad s_t = m(s_{t-1}, a_t), \qquad
              \prod_t e^{r(s_t)} \quad\Rightarrow\quad
              \mathrm{ELBO\ at\ KL\ weight\ 0} = E_\pi \textstyle\sum_t r(s_t)

    It is an `Expectation` over trajectories with a reward at each step, so that the cost of an action contains the
    later rewards only. A walker starts in one corner of ``height`` × ``width`` cells, moves up, down, left or right (a
    move out of the grid does nothing), has reward −1 for each step that does not end in the opposite corner, and stays
    there after reaching it. ``SiteELBO(word, kl_weight=0)`` with the guide ``grid-policy`` is the policy gradient; a
    weight α keeps α times the policy's entropy.

    States are one-hot, and so are actions, sites ``a1`` ... ``aT`` of ``(B, 4)``: return and policy are multilinear in
    them, which relaxed estimators differentiate through. ``expected_return(logits)`` is :math:`E \sum_t r_t` of a
    policy table ``(cells, 4)`` by its forward marginals, differentiable; ``optimum()`` the best return of any. x is a
    given context without effect: ones ``(B, 1)``, a row for each walk. Raises BadInput for a context of
    another shape and for a grid of one cell.

    Args:
        data_shape: shape of one context, without the batch dimension.
        height: number of rows of cells.
        width: number of columns of cells.
        steps: T, the number of actions of a walk.
        data_size: number of data in the whole set: terms are scaled by ``data_size / B``; None does not scale.

    Sutton & Barto 2018, "Reinforcement learning", chapters 3 and 13.

    >>> model = GridWorld(height=2, width=3, steps=4)
    >>> model.optimum(), model.expected_return(torch.zeros(6, 4)).item() < model.optimum()
    (-2.0, True)
    """

    variants = ({"height": 2, "width": 2, "steps": 2},)
    x_is_given = True

    def __init__(
        self,
        data_shape: Sequence[int] = (1,),
        height: int = 4,
        width: int = 4,
        steps: int = 10,
        data_size: int | None = None,
    ):
        super().__init__(data_shape, data_size)
        if height * width < 2:
            raise BadInput("GridWorld: a grid of one cell has nowhere to go: expected height * width of at least 2")
        self.cells, self.steps = height * width, steps
        self.latents = {f"a{t}": Latent("categorical", (len(MOVES),)) for t in range(1, steps + 1)}
        self.observed = tuple(f"reward{t}" for t in range(1, steps + 1))
        self.mirror = {"channels": (), "hidden": (), "activation": "tanh"}
        moves = torch.zeros(self.cells, len(MOVES), self.cells)
        for row in range(height):
            for column in range(width):
                here = row * width + column
                for action, (down, right) in enumerate(MOVES):
                    there = min(max(row + down, 0), height - 1) * width + min(max(column + right, 0), width - 1)
                    moves[here, action, here if here == self.cells - 1 else there] = 1.0
        start, rewards = torch.zeros(self.cells), -torch.ones(self.cells)
        start[0], rewards[-1] = 1.0, 0.0
        for name, value in (("moves", moves), ("start", start), ("rewards", rewards)):
            self.register_buffer(name, value, persistent=False)

    def forward(self, x: Tensor | None = None) -> Tensor:
        with self.data_plate(x):
            state, total = self.start, self.start.new_zeros(())
            for t, (site, latent) in enumerate(self.latents.items(), 1):
                action = pyro.sample(site, families["categorical"].standard(latent, self.start.new_zeros(())))
                state = moved(state, action, self.moves)
                reward = state @ self.rewards
                pyro.factor(f"reward{t}", reward)
                total = total + reward
        return total

    def expected_return(self, logits: Tensor) -> Tensor:
        """The expected sum of rewards of the policy softmax(logits), ``(cells, 4)``, by its forward marginals."""
        policy = logits.softmax(-1)
        marginal, total = self.start.to(policy), policy.new_zeros(())
        for _ in range(self.steps):
            marginal = torch.einsum("s,sa,sab->b", marginal, policy, self.moves.to(policy))
            total = total + marginal @ self.rewards.to(policy)
        return total

    def optimum(self) -> float:
        """The best expected return of any policy, by backward induction."""
        value = torch.zeros_like(self.rewards)
        for _ in range(self.steps):
            value = (self.moves @ (self.rewards + value)).amax(-1)
        return (self.start @ value).item()


def moved(state: Tensor, action: Tensor, moves: Tensor) -> Tensor:
    """The state ``(..., cells)`` after an action ``(..., 4)``, by a table of moves ``(cells, 4, cells)``."""
    leading = torch.broadcast_shapes(state.shape[:-1], action.shape[:-1])
    return torch.einsum("...s,...a,sab->...b", state.expand(*leading, -1), action.expand(*leading, -1), moves)
