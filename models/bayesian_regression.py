"""Regression whose weights are latent."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import pyro
import pyro.distributions as dist
import torch
from torch import nn
from torch.nn.functional import softplus

from ._base import GenerativeModel, Latent, models
from ._networks import activation_layer
from .heteroscedastic_regression import label_numbers


@models.register("bayesian-regression")
class BayesianRegression(GenerativeModel):
    r"""Linear regression, or a network of ``hidden`` layers, with a prior over its weights.

    .. math:: W_l \sim N(0, s^2 / n_l), \qquad b_l \sim N(0, s^2), \qquad y \mid x, W, b \sim N(f_{W, b}(x), \sigma^2)

    The weights are global latents, one value for all data: the guide ``auto`` serves them. s is ``prior_sd``, n the
    number of a layer's inputs, and σ is learned unless ``noise_sd`` fixes it. ``model(x, y=y)`` observes the targets,
    ``model(x)`` draws them. Shapes: ``x`` is ``(B, *data_shape)``, ``y`` is ``(B, outputs)``; sites ``weight1``,
    ``bias1``, ... from the inputs onwards are ``(outputs, inputs)`` and ``(outputs,)`` of their layers. For minibatches
    give ``data_size``, else each batch counts as all the data. Raises BadInput for inputs or targets of another shape.

    Args:
        data_shape: shape of one datum, without the batch dimension.
        hidden: widths of the network's hidden layers.
        outputs: number of targets.
        activation: activation between layers: ``relu``, ``leaky-relu``, ``elu``, ``silu``, ``softplus`` or ``tanh``.
        prior_sd: s, the prior standard deviation of a bias; that of a weight is s / √n.
        noise_sd: σ, the standard deviation of the targets; None learns it, one for each target.
        data_size: number of data in the whole set: terms are scaled by ``data_size / B``; None does not scale.

    MacKay 1992, "A practical Bayesian framework for backpropagation networks"; Blundell et al. 2015, arXiv:1505.05424.

    >>> model = BayesianRegression((3,), hidden=())
    >>> {site: tuple(value.shape) for site, value in model.sample_prior(x=torch.randn(5, 3)).items()}
    {'weight1': (1, 3), 'bias1': (1,), 'y': (5, 1)}
    """

    variants = ({"hidden": ()}, {"hidden": (4,), "outputs": 2})
    observed = ("y",)
    x_is_given = True

    def __init__(
        self,
        data_shape: Sequence[int],
        hidden: Sequence[int] = (50,),
        outputs: int = 1,
        activation: str = "tanh",
        prior_sd: float = 1.0,
        noise_sd: float | None = None,
        data_size: int | None = None,
    ):
        super().__init__(data_shape, data_size)
        self.targets = {"y": (outputs,)}
        self.mirror = {"channels": (), "hidden": tuple(hidden), "activation": activation}
        self.noise_sd = noise_sd
        self.decoder_activation = activation_layer(activation)
        sizes = [math.prod(self.data_shape), *hidden, outputs]
        self.layers = [(f"weight{n}", f"bias{n}") for n in range(1, len(sizes))]
        self.latents = {}
        for (weight, bias), (before, after) in zip(self.layers, pairwise(sizes), strict=True):
            self.latents[weight] = Latent("normal", (after, before), local=False)
            self.latents[bias] = Latent("normal", (after,), local=False)
            self.register_buffer(f"prior_{weight}", torch.tensor(prior_sd / math.sqrt(before)), persistent=False)
            self.register_buffer(f"prior_{bias}", torch.tensor(float(prior_sd)), persistent=False)
        if noise_sd is None:
            self.decoder_noise = nn.Parameter(torch.zeros(outputs))

    def forward(self, x: torch.Tensor | None = None, *, y: torch.Tensor | None = None) -> torch.Tensor:
        plate = self.data_plate(x)
        weights = {site: pyro.sample(site, self.prior(site)) for site in self.latents}
        with plate:
            if y is not None:
                self.check_shape("y", y, (len(x), *self.targets["y"]))
            return pyro.sample("y", self.likelihood(x, weights), obs=y)

    def prior(self, site: str) -> dist.TorchDistribution:
        """The prior of one site."""
        scale, shape = getattr(self, f"prior_{site}"), self.latents[site].shape
        return dist.Normal(torch.zeros_like(scale), scale).expand(shape).to_event(len(shape))

    def likelihood(self, x: torch.Tensor, weights: dict[str, torch.Tensor]) -> dist.TorchDistribution:
        """p(y | x, weights) for ``x`` ``(B, *data_shape)``; weights may have more dimensions ``(..., 1)`` in front."""
        h = x.flatten(1)
        for weight, bias in self.layers:
            h = h if weight == "weight1" else self.decoder_activation(h)
            h = torch.einsum("...oi,...i->...o", weights[weight], h) + weights[bias]
        noise = softplus(self.decoder_noise) if self.noise_sd is None else torch.full_like(h[..., :1], self.noise_sd)
        return dist.Normal(h, noise).to_event(1)

    def inputs(self, images: torch.Tensor, labels: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
        """Images as ``x``; their labels, if there are any, as numbers ``y``."""
        return label_numbers(images, labels, self.targets["y"])
