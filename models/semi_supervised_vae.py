"""A variational autoencoder with a class label that is observed for some data only."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro.poutine.util import is_validation_enabled

from ..errors import BadInput
from ._base import GenerativeModel, Latent, models
from ._networks import beside_each_other, mlp


@models.register("semi-supervised-vae")
class SemiSupervisedVAE(GenerativeModel):
    r"""The model M2: a label, a Normal latent independent of it, and a Bernoulli likelihood given both.

    .. math:: y \sim \mathrm{Categorical}(1/C, \dots, 1/C), \qquad z \sim N(0, I_D), \qquad
              x \mid y, z \sim \prod_i \mathrm{Bernoulli}(x_i; \sigma(f(y, z)_i))

    ``model(x)`` leaves the labels latent, ``model(x, y=labels)`` observes them; the label-conditional guide takes the
    same keyword. Shapes: ``x`` is ``(B, *data_shape)``, ``labels`` are integers ``(B,)`` or one-hot vectors
    ``(B, num_classes)``, site ``y`` is ``(B, num_classes)``, one-hot, and site ``z`` is ``(B, latent_dim)``. Raises
    BadInput for data or labels of another shape and, under validation, for labels out of range, for NaN or for values
    other than 0 and 1.

    Args:
        data_shape: shape of one datum, without the batch dimension.
        num_classes: number of labels, the size of site ``y``.
        latent_dim: size of site ``z``.
        hidden: widths of the decoder's hidden layers, in the encoder's order.
        activation: activation between layers: ``relu``, ``leaky-relu``, ``elu``, ``silu``, ``softplus`` or ``tanh``.
        likelihood: p(x | output), a word of `gumbo.models.likelihoods`.
        likelihood_options: options of the likelihood, by name; None takes its defaults.
        data_size: number of data in the whole set: terms are scaled by ``data_size / B``; None does not scale.

    Kingma et al. 2014, "Semi-supervised learning with deep generative models", arXiv:1406.5298.

    >>> model = SemiSupervisedVAE(data_shape=(1, 8, 8), num_classes=10, latent_dim=2, hidden=(16,))
    >>> {site: tuple(draws.shape) for site, draws in model.sample_prior(5).items()}
    {'y': (5, 10), 'z': (5, 2), 'x': (5, 1, 8, 8)}
    >>> model(torch.zeros(3, 1, 8, 8), y=torch.tensor([7, 2, 1])).shape
    torch.Size([3, 1, 8, 8])
    """

    variants = ({"num_classes": 4, "latent_dim": 3, "hidden": (8,)},)
    binary_data = True
    label_site = "y"

    def __init__(
        self,
        data_shape: Sequence[int],
        num_classes: int = 10,
        latent_dim: int = 50,
        hidden: Sequence[int] = (256, 128),
        activation: str = "softplus",
        likelihood: str = "bernoulli",
        likelihood_options: Mapping[str, Any] | None = None,
        data_size: int | None = None,
    ):
        super().__init__(data_shape, data_size)
        self.latents = {"y": Latent("categorical", (num_classes,)), "z": Latent("normal", (latent_dim,))}
        self.guide_parents = {"y": (), "z": ("y",)}
        self.mirror = {"channels": (), "hidden": tuple(hidden), "activation": activation}
        self.decoder = mlp(
            [num_classes + latent_dim, *reversed(hidden), self.observe_by(likelihood, likelihood_options)], activation
        )
        self.register_buffer("prior_logits", torch.zeros(num_classes), persistent=False)
        self.register_buffer("prior_loc", torch.zeros(latent_dim), persistent=False)
        self.register_buffer("prior_scale", torch.ones(latent_dim), persistent=False)

    def forward(
        self, x: torch.Tensor | None = None, *, y: torch.Tensor | None = None, batch_size: int = 1
    ) -> torch.Tensor:
        with self.data_plate(x, batch_size):
            seen = None if y is None else one_hot_labels(y, len(self.prior_logits), x, type(self).__name__)
            y = pyro.sample("y", dist.OneHotCategorical(logits=self.prior_logits), obs=seen)
            z = pyro.sample("z", dist.Normal(self.prior_loc, self.prior_scale).to_event(1))
            return pyro.sample("x", self.likelihood(y, z), obs=x)

    def likelihood(self, y: torch.Tensor, z: torch.Tensor) -> dist.TorchDistribution:
        """p(x | y, z) for one-hot ``y`` ``(..., num_classes)`` and ``z`` ``(..., latent_dim)``."""
        return self.observation(self.decoder(beside_each_other([y, z])))

    def inputs(self, images: torch.Tensor, labels: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
        """Images as ``x``, and their labels as ``y`` if they are given."""
        return {"x": images} if labels is None else {"x": images, "y": labels}


def one_hot_labels(labels: torch.Tensor, num_classes: int, x: torch.Tensor | None, who: str) -> torch.Tensor:
    """Labels ``(B,)`` or one-hot vectors, as one-hot vectors of x's dtype; BadInput for other values."""
    if x is None:
        raise BadInput(f"{who}: labels y= go with data x")
    if labels.shape == (len(x),) and not labels.is_floating_point():
        if is_validation_enabled() and ((labels < 0) | (labels >= num_classes)).any():
            raise BadInput(f"{who}: labels y lie in {labels.min()}...{labels.max()}, expected 0...{num_classes - 1}")
        return (labels.unsqueeze(-1) == torch.arange(num_classes, device=labels.device)).to(x.dtype)
    if labels.shape == (len(x), num_classes):
        return labels.to(x.dtype)
    raise BadInput(
        f"{who}: y has shape {tuple(labels.shape)} of {labels.dtype}, expected integers of shape {(len(x),)} "
        f"or one-hot vectors of shape {(len(x), num_classes)}"
    )
