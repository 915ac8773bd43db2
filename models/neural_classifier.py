"""A network that outputs a distribution over classes."""

from __future__ import annotations

from collections.abc import Sequence

import pyro
import pyro.distributions as dist
import torch
from torch import nn

from ._base import GenerativeModel, models
from ._networks import Trunk
from .semi_supervised_vae import one_hot_labels


@models.register("neural-classifier")
class NeuralClassifier(GenerativeModel):
    r"""A classifier: :math:`y \mid x \sim \mathrm{Categorical}(\mathrm{softmax}\,f(x))`.

    ``model(x, y=labels)`` observes the labels, ``model(x)`` draws them, ``model.classify(x)`` gives the logits. There
    are no latents: with the guide ``none`` every ELBO is the log-likelihood, minus the cross-entropy. Shapes: ``x`` is
    ``(B, *data_shape)``, labels are integers ``(B,)`` or one-hot vectors ``(B, num_classes)``, site ``y`` is one-hot.
    f has convolutions of stride 2 (``channels``), if any, then dense layers. Raises BadInput for inputs or labels of
    another shape and, under validation, for labels out of range.

    Args:
        data_shape: shape of one datum, without the batch dimension.
        num_classes: number of classes, the size of site ``y``.
        hidden: widths of the network's hidden layers.
        channels: maps of the convolutions of stride 2; () has none.
        activation: activation between layers: ``relu``, ``leaky-relu``, ``elu``, ``silu``, ``softplus`` or ``tanh``.
        data_size: number of data in the whole set: terms are scaled by ``data_size / B``; None does not scale.

    >>> model = NeuralClassifier((1, 8, 8), num_classes=10, hidden=(16,))
    >>> model.likelihood(torch.zeros(3, 1, 8, 8)).probs.shape
    torch.Size([3, 10])
    """

    variants = ({"num_classes": 10, "hidden": (8,)}, {"num_classes": 10, "channels": (4,), "hidden": (8,)})
    observed = ("y",)
    x_is_given = True

    def __init__(
        self,
        data_shape: Sequence[int],
        num_classes: int = 10,
        hidden: Sequence[int] = (256, 128),
        channels: Sequence[int] = (),
        activation: str = "relu",
        data_size: int | None = None,
    ):
        super().__init__(data_shape, data_size)
        self.latents = {}
        self.targets = {"y": (num_classes,)}
        self.mirror = {"channels": tuple(channels), "hidden": tuple(hidden), "activation": activation}
        self.decoder = Trunk(self.data_shape, channels, hidden, activation)
        self.decoder_head = nn.Linear(self.decoder.size, num_classes)

    def forward(self, x: torch.Tensor | None = None, *, y: torch.Tensor | None = None) -> torch.Tensor:
        with self.data_plate(x):
            seen = None if y is None else one_hot_labels(y, self.targets["y"][0], x, type(self).__name__)
            return pyro.sample("y", self.likelihood(x), obs=seen)

    def likelihood(self, x: torch.Tensor) -> dist.TorchDistribution:
        """p(y | x) for ``x`` of shape ``(B, *data_shape)``, over one-hot vectors."""
        return dist.OneHotCategorical(logits=self.classify(x))

    def classify(self, x: torch.Tensor) -> torch.Tensor:
        """The logits of p(y | x), ``(B, num_classes)``."""
        return self.decoder_head(self.decoder(x))

    def inputs(self, images: torch.Tensor, labels: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
        """Images as ``x``, and their labels as ``y`` if they are given."""
        return {"x": images} if labels is None else {"x": images, "y": labels}
