"""The guide that is the model's own prior, for predictions from conditions."""

from __future__ import annotations

import torch
from torch import nn

from ..models._base import GenerativeModel
from ..models.structured_prediction import StructuredPrediction, draw_layers
from ._base import AnyGuide, guides


@guides.register("prior")
class PriorGuide(AnyGuide):
    r"""Draws the latents as the model does, from its conditions alone: :math:`q(z \mid x, u) = p(z \mid u)`.

    The guide has no parameters of its own: it shares the networks of the model's layers, which are trained through
    both. The ELBO is E[log p(x | z)], and the importance-weighted bound of K draws is the logarithm of the mean of K
    likelihoods. This is the estimate of Raiko et al. 2014 and of the structured predictions of Jang et al. 2017.

    Shapes: ``x`` is ``(B, *data_shape)``, ``upper`` as the model has it; a site is ``(B, *shape)`` as the model
    declares it. Raises BadInput for a model that is no StructuredPrediction.

    Args:
        model: the model, whose latents and data shape the guide takes.

    Raiko et al. 2014, arXiv:1406.2989; Jang, Gu & Poole 2017, arXiv:1611.01144.

    >>> import torch
    >>> from gumbo.inference import evaluate
    >>> from gumbo.models import StructuredPrediction
    >>> model = StructuredPrediction(data_shape=(1, 8, 8), layers=(6, 5))
    >>> guide = PriorGuide(model)
    >>> halves = model.inputs(torch.zeros(2, 1, 8, 8))
    >>> {site: tuple(draw.shape) for site, draw in guide(**halves).items()}
    {'z1': (2, 6), 'z2': (2, 5)}
    >>> evaluate(model, guide, halves, num_samples=3, seed=0).rate
    0.0
    """

    families = ("bernoulli", "categorical")

    def __init__(self, model: GenerativeModel):
        super().__init__(model)
        self.encoder_layers = nn.ModuleDict({site: model.decoder[site] for site in self.latents})

    @classmethod
    def why_not(cls, model: GenerativeModel) -> str:
        if not isinstance(model, StructuredPrediction):
            return "its latents do not follow from its conditions alone"
        return super().why_not(model)

    def forward(self, x: torch.Tensor, **conditions: torch.Tensor) -> dict[str, torch.Tensor]:
        with self.data_plate(x):
            (upper,) = self.check_conditions(conditions, len(x))
            return draw_layers(self.latents, self.encoder_layers, upper)
