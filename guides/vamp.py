"""The guide that shares its encoder with a VampPrior."""

from __future__ import annotations

import pyro
import torch

from ..models._base import GenerativeModel
from ..models.priors import VampPrior
from ._base import AnyGuide, guides


@guides.register("vamp")
class VampGuide(AnyGuide):
    r"""The diagonal Normal q(z | x) whose posteriors of pseudo-inputs are the model's prior.

    Both share one encoder: the model holds it as a part of its prior, the guide as ``encoder``, so that training
    either trains the other. Other guides of Normal latents support such a model too; the prior then has its own
    encoder.

    Shapes: ``x`` is ``(B, *data_shape)``; site ``z`` is ``(B, D)``. Raises BadInput for a model without such a prior.

    Args:
        model: the model, whose latents and data shape the guide takes.

    Tomczak & Welling 2018, "VAE with a VampPrior", arXiv:1705.07120.

    >>> import torch
    >>> from gumbo.models import GaussianVAE
    >>> model = GaussianVAE((1, 8, 8), latent_dim=2, hidden=(16,), prior="vamp", prior_options={"components": 5})
    >>> guide = VampGuide(model)
    >>> guide(torch.zeros(3, 1, 8, 8))["z"].shape, guide.encoder is model.decoder_prior.encoder
    (torch.Size([3, 2]), True)
    """

    families = ("normal",)

    def __init__(self, model: GenerativeModel):
        super().__init__(model)
        self.encoder = model.decoder_prior.encoder

    @classmethod
    def why_not(cls, model: GenerativeModel) -> str:
        if not isinstance(getattr(model, "decoder_prior", None), VampPrior):
            return "it has no VampPrior, whose encoder the guide shares"
        return super().why_not(model)

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        with self.data_plate(x):
            return {"z": pyro.sample("z", self.encoder(x))}
