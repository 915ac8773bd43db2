"""Small networks that models and guides are made of; each accepts any number of leading dimensions."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from ..errors import UnknownName

ACTIVATIONS = {
    "relu": nn.ReLU,
    "leaky-relu": nn.LeakyReLU,
    "elu": nn.ELU,
    "silu": nn.SiLU,
    "softplus": nn.Softplus,
    "tanh": nn.Tanh,
}


def activation_layer(name: str) -> nn.Module:
    """The activation of that name, as a layer."""
    if name not in ACTIVATIONS:
        raise UnknownName("activation", name, ACTIVATIONS)
    return ACTIVATIONS[name]()


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
