"""Guides for one-hot latents and for their relaxations."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from pyro.distributions import TorchDistribution

from ..models._base import GenerativeModel, Latent
from ..models.families import TEMPERATURE, distribution
from ._base import FactorizedGuide, guides


@guides.register("categorical")
class CategoricalGuide(FactorizedGuide):
    r"""One-hot latents: :math:`q(y_n \mid x) = \mathrm{Categorical}(\mathrm{softmax}\,h_n(x))`, independent over n.

    Shapes: ``x`` is ``(B, *data_shape)``; a site is ``(B, *shape)``, one-hot along the last dimension. Raises BadInput
    for a model with latents of another family.

    Args:
        model: the model, whose latents and data shape the guide takes.
        hidden: widths of the encoder's hidden layers; None mirrors the model's decoder.
        channels: maps of the encoder's convolutions of stride 2; None mirrors the model's decoder.
        activation: activation of the guide's networks; None mirrors the model's decoder.

    Jang, Gu & Poole 2017, arXiv:1611.01144.

    >>> import torch
    >>> from gumbo.models import CategoricalVAE
    >>> model = CategoricalVAE((1, 8, 8), num_latents=4, num_classes=3, hidden=(16,))
    >>> CategoricalGuide(model, hidden=(16,))(torch.zeros(5, 1, 8, 8))["y"].sum(-1).unique()
    tensor([1.])
    """

    families = ("categorical",)


@guides.register("relaxed-categorical")
class RelaxedCategoricalGuide(FactorizedGuide):
    r"""Relaxed one-hot latents: RelaxedOneHotCategorical with logits :math:`h_n(x)`, independent over n.

    Shapes: ``x`` is ``(B, *data_shape)``; a site is ``(B, *shape)``, on the simplex along the last dimension. The
    temperature is a buffer: ``guide.temperature.fill_(0.3)`` changes it. Raises BadInput for a model with
    latents of another family: a density on the simplex is never compared with a discrete prior.

    Args:
        model: the model, whose latents and data shape the guide takes.
        temperature: initial temperature of relaxed sites.
        hidden: widths of the encoder's hidden layers; None mirrors the model's decoder.
        channels: maps of the encoder's convolutions of stride 2; None mirrors the model's decoder.
        activation: activation of the guide's networks; None mirrors the model's decoder.

    Maddison, Mnih & Teh 2017, arXiv:1611.00712, whose posterior temperature of 2/3 is the default.

    >>> import torch
    >>> from gumbo.models import CategoricalVAE
    >>> model = CategoricalVAE((1, 8, 8), num_latents=4, num_classes=3, hidden=(16,), relaxed=True)
    >>> RelaxedCategoricalGuide(model, hidden=(16,))(torch.zeros(5, 1, 8, 8))["y"].shape
    torch.Size([5, 4, 3])
    """

    families = ("relaxed-categorical",)

    def __init__(
        self,
        model: GenerativeModel,
        temperature: float = TEMPERATURE,
        hidden: Sequence[int] | None = None,
        channels: Sequence[int] | None = None,
        activation: str | None = None,
    ):
        super().__init__(model, hidden, channels, activation)
        self.register_buffer("temperature", torch.tensor(float(temperature)))

    def exact(self, model: GenerativeModel) -> CategoricalGuide:
        """The discrete guide over the same encoder, for ``model``, the discrete form of this guide's own."""
        config = {name: value for name, value in self.config.items() if name != "temperature"}
        twin = CategoricalGuide(model, **config).to(self.temperature)
        twin.encoder, twin.encoder_heads = self.encoder, self.encoder_heads
        return twin

    def distribution(self, latent: Latent, output: torch.Tensor) -> TorchDistribution:
        return distribution(latent, output, temperature=self.temperature)
