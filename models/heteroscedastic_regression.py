"""A network that outputs a Normal distribution."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pyro
import pyro.distributions as dist
import torch
from torch.nn.functional import softplus

from ._base import GenerativeModel, models
from ._networks import mlp


@models.register("heteroscedastic-regression")
class HeteroscedasticRegression(GenerativeModel):
    r"""Regression with a standard deviation that depends on the input.

    .. math:: y \mid x \sim N(\mu(x), \mathrm{diag}\,\sigma(x)^2), \qquad \sigma(x) = \mathrm{softplus}(s(x)) + \epsilon

    ``model(x, y=y)`` observes the targets, ``model(x)`` draws them. There are no latents: with the guide ``none`` every
    ELBO is the log-likelihood. Shapes: ``x`` is ``(B, *data_shape)``, ``y`` is ``(B, *target_shape)``. μ and s are the
    two halves of one network's output. Raises BadInput for inputs or targets of another shape.

    Args:
        data_shape: shape of one datum, without the batch dimension.
        target_shape: shape of one target, without the batch dimension.
        hidden: widths of the network's hidden layers.
        activation: activation between layers: ``relu``, ``leaky-relu``, ``elu``, ``silu``, ``softplus`` or ``tanh``.
        min_sd: ε, the smallest standard deviation, added to the softplus of an output.
        data_size: number of data in the whole set: terms are scaled by ``data_size / B``; None does not scale.

    Nix & Weigend 1994, "Estimating the mean and variance of the target probability distribution".

    >>> model = HeteroscedasticRegression((3,), hidden=(8,))
    >>> x = torch.randn(5, 3)
    >>> model.likelihood(x).base_dist.scale.shape, model.sample_prior(x=x)["y"].shape
    (torch.Size([5, 1]), torch.Size([5, 1]))
    """

    variants = ({"hidden": (8,)}, {"hidden": (8,), "target_shape": (2, 2)})
    observed = ("y",)
    x_is_given = True

    def __init__(
        self,
        data_shape: Sequence[int],
        target_shape: Sequence[int] = (1,),
        hidden: Sequence[int] = (64, 64),
        activation: str = "relu",
        min_sd: float = 1e-3,
        data_size: int | None = None,
    ):
        super().__init__(data_shape, data_size)
        self.latents = {}
        self.targets = {"y": tuple(target_shape)}
        self.mirror = {"channels": (), "hidden": tuple(hidden), "activation": activation}
        self.min_sd = min_sd
        self.decoder = mlp([math.prod(self.data_shape), *hidden, 2 * math.prod(target_shape)], activation)

    def forward(self, x: torch.Tensor | None = None, *, y: torch.Tensor | None = None) -> torch.Tensor:
        with self.data_plate(x):
            if y is not None:
                self.check_shape("y", y, (len(x), *self.targets["y"]))
            return pyro.sample("y", self.likelihood(x), obs=y)

    def likelihood(self, x: torch.Tensor) -> dist.TorchDistribution:
        """p(y | x) for ``x`` of shape ``(B, *data_shape)``."""
        shape = self.targets["y"]
        loc, raw = self.decoder(x.flatten(1)).unflatten(-1, (2, *shape)).unbind(1)
        return dist.Normal(loc, softplus(raw) + self.min_sd).to_event(len(shape))

    def inputs(self, images: torch.Tensor, labels: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
        """Images as ``x``; their labels, if there are any, as numbers ``y``."""
        return label_numbers(images, labels, self.targets["y"])


def label_numbers(images: torch.Tensor, labels: torch.Tensor | None, shape: tuple[int, ...]) -> dict[str, torch.Tensor]:
    """Images, and labels as numbers ``(B, *shape)`` to regress on."""
    if labels is None:
        return {"x": images}
    return {"x": images, "y": labels.to(images.dtype).reshape(-1, *[1] * len(shape)).expand(-1, *shape)}
