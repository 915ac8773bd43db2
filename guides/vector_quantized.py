"""The guide of vector-quantized models."""

from __future__ import annotations

from collections.abc import Sequence

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn

from ..models._base import GenerativeModel
from ..models.vector_quantized_vae import Codebook
from ._base import Guide, guides


@guides.register("vector-quantized")
class VectorQuantizedGuide(Guide):
    r"""Codes by distance: :math:`q(y_n = k \mid x) \propto \exp(-\|h_n(x) - e_k\|^2 / \tau)`, independent over n.

    The vectors e are the model's own: both programs hold one codebook. ``temperature`` τ is a buffer:
    ``guide.temperature.fill_(0.1)`` changes it; towards 0 the nearest vector has probability one.

    Shapes: ``x`` is ``(B, *data_shape)``; site ``y`` is ``(B, N, K)``, one-hot. Raises BadInput for a model without a
    codebook.

    Args:
        model: the model, whose latents and data shape the guide takes.
        temperature: initial τ.
        hidden: widths of the encoder's hidden layers; None mirrors the model's decoder.
        channels: maps of the encoder's convolutions of stride 2; None mirrors the model's decoder.
        activation: activation of the guide's networks; None mirrors the model's decoder.

    van den Oord, Vinyals & Kavukcuoglu 2017, arXiv:1711.00937.

    >>> import torch
    >>> from gumbo.models import VectorQuantizedVAE
    >>> model = VectorQuantizedVAE((1, 8, 8), num_codes=4, num_classes=3, code_dim=2, hidden=(16,))
    >>> guide = VectorQuantizedGuide(model)
    >>> guide(torch.zeros(5, 1, 8, 8))["y"].shape, guide.encoder_codebook is model.decoder_codebook
    (torch.Size([5, 4, 3]), True)
    """

    families = ("categorical",)

    def __init__(
        self,
        model: GenerativeModel,
        temperature: float = 1.0,
        hidden: Sequence[int] | None = None,
        channels: Sequence[int] | None = None,
        activation: str | None = None,
    ):
        super().__init__(model, hidden, channels, activation)
        self.encoder_codebook = model.decoder_codebook
        count, size = self.latents["y"].shape[0], self.encoder_codebook.vectors.shape[-1]
        self.encoder_heads = nn.Linear(self.encoder.size, count * size)
        self.register_buffer("temperature", torch.tensor(float(temperature)))

    @classmethod
    def why_not(cls, model: GenerativeModel) -> str:
        if not isinstance(getattr(model, "decoder_codebook", None), Codebook):
            return "it has no codebook, whose vectors the guide shares"
        return super().why_not(model)

    def forward(self, x: Tensor, **conditions: Tensor) -> dict[str, Tensor]:
        with self.data_plate(x):
            logits = self.logits(self.features(x, conditions))
            return {"y": pyro.sample("y", dist.OneHotCategorical(logits=logits).to_event(1))}

    def logits(self, features: Tensor) -> Tensor:
        """The logits of all codes at all positions, ``(B, N, K)``, from features ``(B, encoder.size)``."""
        places = self.encoder_heads(features).unflatten(-1, (self.latents["y"].shape[0], -1))
        return -self.encoder_codebook.distances(places) / self.temperature
