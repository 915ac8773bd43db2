"""Prediction of half an image from the other half, through layers of binary latents."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch import nn

from ..errors import BadInput
from ._base import GenerativeModel, Latent, models
from ._networks import mlp
from .families import distribution


@models.register("structured-prediction")
class StructuredPrediction(GenerativeModel):
    r"""The lower half of an image given the upper half, with a multimodal distribution through binary latents.

    .. math:: z_1 \mid u \sim \mathrm{Bernoulli}(\sigma(f_1(u))), \qquad
              z_l \mid z_{l-1} \sim \mathrm{Bernoulli}(\sigma(f_l(z_{l-1}))), \qquad
              x \mid z_L \sim \mathrm{Bernoulli}(\sigma(f_{L+1}(z_L)))

    ``data_shape`` is the whole image's; the model's own data, ``x``, is the lower half. Called as ``model(x,
    upper=u)``, and so are its guides; ``inputs`` cuts images in two. Shapes: for images ``(B, channels, height,
    width)`` both halves are ``(B, channels, height / 2, width)`` (an odd middle row is in the lower half), site ``zl``
    is ``(B, layers[l - 1])``. Each f is linear or, with ``nonlinear=True``, has a hidden layer as wide as its output's
    layer (the last: as the layer before). With ``num_classes`` a layer's latents are one-hot, and site ``zl`` is
    ``(B, layers[l - 1], num_classes)``. Raises BadInput for halves of another shape and, under validation, for NaN or
    for x outside its support.

    Args:
        data_shape: ``(channels, height, width)`` of the whole image.
        layers: widths of z1, z2, ...
        nonlinear: whether the networks have hidden layers; False makes them linear.
        activation: activation between layers: ``relu``, ``leaky-relu``, ``elu``, ``silu``, ``softplus`` or ``tanh``.
        num_classes: number of classes of a one-hot latent; None makes latents binary.
        likelihood: p(x | output), a word of `gumbo.models.likelihoods`.
        likelihood_options: options of the likelihood, by name; None takes its defaults.
        data_size: number of data in the whole set: terms are scaled by ``data_size / B``; None does not scale.

    Raiko et al. 2014, arXiv:1406.2989; Gu et al. 2016, arXiv:1511.05176.

    >>> model = StructuredPrediction(data_shape=(1, 8, 8), layers=(6, 5))
    >>> halves = model.inputs(torch.zeros(2, 1, 8, 8))
    >>> draws = model.sample_prior(2, upper=halves["upper"])
    >>> {site: tuple(value.shape) for site, value in draws.items()}
    {'z1': (2, 6), 'z2': (2, 5), 'x': (2, 1, 4, 8)}
    """

    variants = ({"layers": (6,)}, {"layers": (6, 5), "nonlinear": True}, {"layers": (4, 3), "num_classes": 3})

    def __init__(
        self,
        data_shape: Sequence[int],
        layers: Sequence[int] = (200, 200),
        nonlinear: bool = False,
        activation: str = "tanh",
        num_classes: int | None = None,
        likelihood: str = "bernoulli",
        likelihood_options: Mapping[str, Any] | None = None,
        data_size: int | None = None,
    ):
        if len(data_shape) != 3 or data_shape[1] < 2:
            raise BadInput(f"StructuredPrediction: images {tuple(data_shape)} must be (channels, height > 1, width)")
        if not layers or min(layers) < 1:
            raise BadInput(f"StructuredPrediction: layers={tuple(layers)} must hold at least one positive width")
        if num_classes is not None and num_classes < 2:
            raise BadInput(f"StructuredPrediction: num_classes={num_classes} must be at least 2, or None for coins")
        channels, height, width = data_shape
        super().__init__((channels, height - height // 2, width), data_size)
        self.conditions = {"upper": (channels, height // 2, width)}
        names = [f"z{level}" for level in range(1, len(layers) + 1)]
        self.latents = {
            name: Latent("bernoulli", (size,)) if num_classes is None else Latent("categorical", (size, num_classes))
            for name, size in zip(names, layers, strict=True)
        }
        self.mirror = {"channels": (), "hidden": (layers[0],) if nonlinear else (), "activation": activation}
        widths = [latent.size for latent in self.latents.values()]
        sizes = [math.prod(self.conditions["upper"]), *widths, self.observe_by(likelihood, likelihood_options)]
        self.decoder = nn.ModuleDict()  # keyed by the site whose logits the network computes
        for site, (inputs, outputs) in zip([*names, "x"], pairwise(sizes), strict=True):
            between = [inputs if site == "x" else outputs] if nonlinear else []
            self.decoder[site] = mlp([inputs, *between, outputs], activation)

    def forward(
        self, x: torch.Tensor | None = None, *, upper: torch.Tensor | None = None, batch_size: int = 1
    ) -> torch.Tensor:
        with self.data_plate(x, batch_size):
            (upper,) = self.check_conditions({"upper": upper}, batch_size if x is None else len(x))
            *_, (site, top) = draw_layers(self.latents, self.decoder, upper).items()
            return pyro.sample("x", self.likelihood(top.flatten(-len(self.latents[site].shape))), obs=x)

    def likelihood(self, z: torch.Tensor) -> dist.TorchDistribution:
        """p(x | z) for the last layer's ``z`` ``(..., layers[-1])`` (one-hot layers flat), batch shape ``(...)``."""
        return self.observation(self.decoder["x"](z))

    def inputs(self, images: torch.Tensor, labels: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
        """The lower half of each image as ``x``, the upper half as ``upper``."""
        height = self.conditions["upper"][1]
        return {"x": images[..., height:, :], "upper": images[..., :height, :]}


def draw_layers(
    latents: Mapping[str, Latent], networks: Mapping[str, nn.Module] | nn.ModuleDict, upper: torch.Tensor
) -> dict[str, torch.Tensor]:
    """Draw the layers of latents in turn, each from the one before, the first from the upper half."""
    values: dict[str, torch.Tensor] = {}
    below = upper.flatten(1)
    for site, latent in latents.items():
        values[site] = pyro.sample(site, distribution(latent, networks[site](below)))
        below = values[site].flatten(-len(latent.shape))
    return values
