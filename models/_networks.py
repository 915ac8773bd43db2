"""Small networks for models and guides; each accepts any number of leading dimensions."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..errors import BadInput, UnknownName

ACTIVATIONS = {
    "relu": nn.ReLU,
    "leaky-relu": nn.LeakyReLU,
    "elu": nn.ELU,
    "silu": nn.SiLU,
    "softplus": nn.Softplus,
    "tanh": nn.Tanh,
}


# Activations with a parameter: the slope below zero, alpha, beta.
WITH_A_NUMBER = ("leaky-relu", "elu", "softplus")


def activation_layer(name: str) -> nn.Module:
    """The activation of that name, as a layer; ``leaky-relu(0.3)`` sets the slope below zero, whose default is 0.01.

    >>> activation_layer("leaky-relu(0.3)")
    LeakyReLU(negative_slope=0.3)
    """
    word, bracket, number = name.partition("(")
    if word not in ACTIVATIONS:
        raise UnknownName("activation", name, ACTIVATIONS)
    if not bracket:
        return ACTIVATIONS[word]()
    if word not in WITH_A_NUMBER or not re.fullmatch(r"[0-9]*\.?[0-9]+(e-?[0-9]+)?\)", number):
        raise BadInput(f"activation {name!r}: only {', '.join(WITH_A_NUMBER)} take a number, as in leaky-relu(0.3)")
    return ACTIVATIONS[word](float(number[:-1]))


def mlp(sizes: Sequence[int], activation: str = "relu", activate_last: bool = False) -> nn.Sequential:
    """A multilayer perceptron ``(..., sizes[0]) -> (..., sizes[-1])``; two sizes make it linear.

    >>> import torch
    >>> mlp([5, 8, 3], "tanh")(torch.zeros(7, 2, 5)).shape
    torch.Size([7, 2, 3])
    """
    layers: list[nn.Module] = []
    for inputs, outputs in zip(sizes[:-1], sizes[1:], strict=True):
        layers += [nn.Linear(inputs, outputs), activation_layer(activation)]
    return nn.Sequential(*(layers if activate_last else layers[:-1]))


def beside_each_other(parts: Sequence[Tensor]) -> Tensor:
    """Features ``(..., size)`` of several kinds, broadcast over leading dimensions and concatenated."""
    if len(parts) == 1:
        return parts[0]
    leading = torch.broadcast_shapes(*(part.shape[:-1] for part in parts))
    return torch.cat([part.expand(*leading, part.shape[-1]) for part in parts], -1)


# The transforms of x for encoders.
INPUTS = {"identity": lambda x: x, "log1p": torch.log1p}


class Trunk(nn.Module):
    """Features of data ``(B, *data_shape)`` and of further inputs: convolutions if any, then dense layers.

    ``inputs="log1p"`` passes log(1 + x) to the networks, for counts.

    Each of ``channels`` is a 3 x 3 convolution that halves height and width; ``extra`` is the number of further inputs,
    which are concatenated before the dense layers. ``size`` is the number of features.

    >>> import torch
    >>> trunk = Trunk((1, 8, 8), channels=(4, 6), hidden=(5,))
    >>> trunk(torch.zeros(3, 1, 8, 8)).shape
    torch.Size([3, 5])
    """

    def __init__(
        self,
        data_shape: Sequence[int],
        channels: Sequence[int] = (),
        hidden: Sequence[int] = (),
        activation: str = "relu",
        extra: int = 0,
        inputs: str = "identity",
    ):
        super().__init__()
        if inputs not in INPUTS:
            raise UnknownName("form of inputs", inputs, INPUTS)
        self.inputs = inputs
        layers: list[nn.Module] = []
        size = math.prod(data_shape)
        if channels:
            height, width = halved(data_shape, len(channels))
            for before, after in zip((data_shape[0], *channels[:-1]), channels, strict=True):
                layers += [nn.Conv2d(before, after, 3, stride=2, padding=1), activation_layer(activation)]
            size = channels[-1] * height * width
        self.convolutions = nn.Sequential(*layers)
        self.dense = mlp([size + extra, *hidden], activation, activate_last=True)
        self.size = hidden[-1] if hidden else size + extra

    def forward(self, x: Tensor, *beside: Tensor) -> Tensor:
        x = INPUTS[self.inputs](x)
        x = (self.convolutions(x) if len(self.convolutions) else x).flatten(1)
        return self.dense(torch.cat([x, *(part.flatten(1) for part in beside)], -1) if beside else x)


class Deconvolutions(nn.Module):
    """From a vector to an image, ``(..., inputs) -> (..., *data_shape)``: a dense layer and transposed convolutions.

    ``channels`` are in the order of the mirrored `Trunk`: the dense layer gives ``channels[0]`` small maps, each
    transposed convolution doubles their size, and a last one, of stride 1, gives the image.
    """

    def __init__(self, inputs: int, data_shape: Sequence[int], channels: Sequence[int], activation: str = "relu"):
        super().__init__()
        self.maps = (channels[0], *halved(data_shape, len(channels)))
        self.dense = nn.Sequential(nn.Linear(inputs, math.prod(self.maps)), activation_layer(activation))
        layers: list[nn.Module] = []
        descending = list(reversed(channels))
        for before, after in zip((channels[0], *descending[:-1]), descending, strict=True):
            grow = nn.ConvTranspose2d(before, after, 3, stride=2, padding=1, output_padding=1)
            layers += [grow, activation_layer(activation)]
        self.convolutions = nn.Sequential(*layers, nn.ConvTranspose2d(channels[0], data_shape[0], 3, padding=1))

    def forward(self, z: Tensor) -> Tensor:
        maps = self.dense(z).reshape(-1, *self.maps)  # convolutions support one leading dimension only
        return self.convolutions(maps).unflatten(0, z.shape[:-1])


def halved(data_shape: Sequence[int], times: int) -> tuple[int, int]:
    """Height and width of an image after ``times`` halvings; raises BadInput if they are not divisible."""
    if len(data_shape) != 3 or any(size % 2**times for size in data_shape[1:]):
        raise BadInput(
            f"data of shape {tuple(data_shape)} cannot go through {times} convolutions of stride 2: "
            f"expected (channels, height, width) with height and width divisible by {2**times}"
        )
    return data_shape[1] // 2**times, data_shape[2] // 2**times
