"""The guide of models without latents."""

from __future__ import annotations

import torch

from ..models._base import GenerativeModel
from ._base import AnyGuide, guides


@guides.register("none")
class NoGuide(AnyGuide):
    """Draws nothing: for models without latents, where the evidence lower bound is the likelihood itself.

    ``guide(x)`` takes the model's arguments, checks ``x`` and returns an empty dict, so that `fit`, `evaluate` and
    every ELBO do maximum likelihood. Raises BadInput for a model with latents.

    Args:
        model: the model, whose latents and data shape the guide takes.

    >>> import torch
    >>> from gumbo.models import NeuralClassifier
    >>> model = NeuralClassifier((1, 8, 8))
    >>> NoGuide(model)(torch.zeros(3, 1, 8, 8))
    {}
    """

    def __init__(self, model: GenerativeModel):
        super().__init__(model)
        # Gives the dtype and device that data must have, as a parameter would.
        like = next(model.parameters(), torch.empty(()))
        self.register_buffer("like", torch.empty(0, dtype=like.dtype, device=like.device), persistent=False)

    @classmethod
    def why_not(cls, model: GenerativeModel) -> str:
        return f"it leaves the latents ({', '.join(model.latents)}) undrawn" if model.latents else ""

    def forward(self, x: torch.Tensor, **given: torch.Tensor) -> dict[str, torch.Tensor]:
        with self.data_plate(x):
            return {}
