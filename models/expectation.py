"""The expectation of a user's function, to be maximized over its distribution."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import pyro
import pyro.distributions as dist
import torch

from ..errors import BadInput
from ..registry import Registry
from ._base import GenerativeModel, Latent, models
from .families import families

Reward = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]

rewards: Registry[Reward] = Registry("reward")


@rewards.register("quadratic")
def quadratic(z: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    r"""−Σ (z − 0.499)²: for Bernoulli latents the classical toy problem of Tucker et al. 2017."""
    return -(z - 0.499).square().sum(-1)


@rewards.register("bandit")
def bandit(z: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """A contextual bandit: the reward of arm i, a one-hot z, is the context x at place i (a pixel's intensity)."""
    paid, arms = x.flatten(1), z.shape[-1]
    if paid.shape[-1] < arms:
        raise BadInput(f"bandit: {arms} arms need a context of at least as many values, not {paid.shape[-1]}")
    return (z * paid[..., :arms]).sum(-1)


@rewards.register("counting")
def counting(z: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """The number of tokens in ``(..., length, vocabulary)`` that follow their predecessor, in the cycle 0 1 2 ..."""
    return (z[..., 1:, :] * z[..., :-1, :].roll(1, -1)).sum((-1, -2))


def reward_named(f: str | Reward, who: str) -> Reward:
    """The reward of that word or import path, or a function itself."""
    found = rewards[f] if isinstance(f, str) else f
    if not callable(found):
        raise BadInput(f"{who}: f is {type(f).__name__}, expected a function f(z, x) or the name of one")
    return found


def reward_of_rows(f: Reward, z: torch.Tensor, x: torch.Tensor, rank: int, who: str) -> torch.Tensor:
    """f of values ``(..., B, *event)`` of that many event dimensions; raises BadInput unless a number for each row."""
    expected = torch.Size(z.shape[: z.dim() - rank])
    reward = f(z, x)
    if not isinstance(reward, torch.Tensor) or reward.shape != torch.broadcast_shapes(expected, x.shape[:1]):
        found = tuple(reward.shape) if isinstance(reward, torch.Tensor) else type(reward).__name__
        raise BadInput(f"{who}: f(z, x) is {found}, expected a number for each row, {tuple(expected)}")
    return reward


@models.register("expectation")
class Expectation(GenerativeModel):
    r""":math:`E_{p_\theta(z \mid x)}[f(z, x)]` as a Pyro pair: the guide is p_θ, and the model weights its draws by f.

    .. math:: z \sim p_0, \qquad \text{factor } e^{f(z, x)} \quad\Rightarrow\quad
              \mathrm{ELBO} = E_{p_\theta}[f(z, x)] - \mathrm{KL}(p_\theta \| p_0)

    ``SiteELBO(word, kl_weight=0)`` drops the KL, and with it the entropy of p_θ: the objective is E[f], and ``score``
    is the policy gradient. A weight α keeps α times the entropy, as in maximum-entropy reinforcement learning. p_0 is
    standard: N(0, 1), fair Bernoulli, uniform classes.

    ``f(z, x)`` maps values ``(..., B, *shape)`` to numbers ``(..., B)``: a function, its import path, or one of
    ``quadratic``, ``bandit``, ``counting``. ``family`` and ``shape`` are those of z. With ``length=T`` z is a sequence
    of T tokens, sites ``z1``, ``z2``, ... of that family and shape; f takes them stacked, ``(..., B, T, *shape)``, and
    the guide ``layered`` draws each given the earlier ones. x is a given context ``(B, *data_shape)``; without a
    context pass ones ``(B, 1)``, a row per draw, and use the guide ``unconditional``, whose parameters are θ.

    Raises BadInput for a context of another shape, and for an f that does not return a number per row.

    Args:
        data_shape: shape of one context, without the batch dimension.
        f: the function, its import path, or a word of `gumbo.models.rewards`.
        family: family of z, as in :class:`Latent`.
        shape: shape of z, or of each token.
        length: T, the number of tokens; None makes z a single site.
        hidden: widths of the hidden layers of the guides' encoders.
        activation: activation between layers: ``relu``, ``leaky-relu``, ``elu``, ``silu``, ``softplus`` or ``tanh``.
        data_size: number of data in the whole set: terms are scaled by ``data_size / B``; None does not scale.

    Williams 1992, "Simple statistical gradient-following algorithms for connectionist reinforcement learning".

    >>> from gumbo.guides import UnconditionalGuide
    >>> from gumbo.inference import SiteELBO
    >>> def reward(z, x):  # a bandit of three arms
    ...     return z @ torch.tensor([0.1, 0.9, 0.5])
    >>> model = Expectation((1,), reward, family="categorical", shape=(3,))
    >>> policy, draws = UnconditionalGuide(model), torch.ones(50, 1)
    >>> loss = SiteELBO("score", kl_weight=0)(model, policy)
    >>> optimizer = torch.optim.Adam(policy.parameters(), lr=0.5)
    >>> for _ in range(20):
    ...     optimizer.zero_grad()
    ...     loss(draws).backward()
    ...     optimizer.step()
    >>> policy(draws)["z"].mean(0).argmax()
    tensor(1)
    >>> -SiteELBO("enumerate", kl_weight=0)(model, policy)(draws) / 50 > 0.8  # E[f], exactly
    tensor(True)
    """

    variants = (
        {},
        {"f": "bandit", "family": "categorical", "shape": (64,)},
        {"f": "counting", "family": "categorical", "shape": (4,), "length": 3},
        {"f": "bandit", "family": "bernoulli", "shape": (64,)},
    )
    observed = ("reward",)
    x_is_given = True

    _unchecked = ("f",)
    _ranges = {"length": -math.inf}

    def __init__(
        self,
        data_shape: Sequence[int] = (1,),
        f: str | Reward = "quadratic",
        family: str = "normal",
        shape: Sequence[int] = (1,),
        length: int | None = None,
        hidden: Sequence[int] = (),
        activation: str = "tanh",
        data_size: int | None = None,
    ):
        super().__init__(data_shape, data_size)
        self.reward = reward_named(f, "Expectation")
        if length is not None and length < 1:
            raise BadInput(f"Expectation: length={length} must be at least 1, or None for a single z")
        names = ["z"] if length is None else [f"z{t}" for t in range(1, length + 1)]
        self.latents = {name: Latent(family, tuple(shape)) for name in names}
        self.length = length
        self.mirror = {"channels": (), "hidden": tuple(hidden), "activation": activation}
        self.register_buffer("zero", torch.zeros(()), persistent=False)

    def forward(self, x: torch.Tensor | None = None) -> torch.Tensor:
        with self.data_plate(x):
            draws = [pyro.sample(name, self.base(latent)) for name, latent in self.latents.items()]
            reward = self.value(draws, x)
            pyro.factor("reward", reward)
        return reward

    def value(self, draws: Sequence[torch.Tensor], x: torch.Tensor) -> torch.Tensor:
        """f of the draws of each site ``(..., B, *shape)``, a number for each row."""
        rank = len(next(iter(self.latents.values())).shape)
        z = draws[0] if self.length is None else torch.stack(torch.broadcast_tensors(*draws), -1 - rank)
        return reward_of_rows(self.reward, z, x, rank + (self.length is not None), "Expectation")

    def base(self, latent: Latent) -> dist.TorchDistribution:
        """p_0 of one site."""
        return families[latent.family].standard(latent, self.zero)
