"""The guide of independent latents of any families."""

from __future__ import annotations

from ..models._base import GenerativeModel
from ..models.families import families
from ._base import FactorizedGuide, guides


@guides.register("mean-field")
class MeanFieldGuide(FactorizedGuide):
    r"""Each latent by its own family: :math:`q(z \mid x) = \prod_j q(z_j \mid x)`, for one or mixed families.

    A Poisson latent has a Poisson posterior, a Gamma latent a Gamma posterior, and so on, each with its own head on one
    encoder of x; the layered guide does the same for dependent latents. The distribution of a site determines its
    estimators: ``pathwise`` for Normal, log-normal, Gamma, Beta and Dirichlet posteriors (by implicit
    reparameterization for the last three), score-type ones for all.

    Shapes: ``x`` is ``(B, *data_shape)``; a site is ``(B, *shape)`` as the model declares it. Raises BadInput for a
    model whose latents are all of one family with its own guide.

    Args:
        model: the model, whose latents and data shape the guide takes.
        hidden: widths of the encoder's hidden layers; None mirrors the model's decoder.
        channels: maps of the encoder's convolutions of stride 2; None mirrors the model's decoder.
        activation: activation of the guide's networks; None mirrors the model's decoder.

    Figurnov, Mohamed & Mnih 2018, "Implicit reparameterization gradients", arXiv:1805.08498.

    >>> import torch
    >>> from gumbo.models import Expectation
    >>> model = Expectation((4,), f="quadratic", family="gamma", shape=(3,))
    >>> MeanFieldGuide(model)(torch.ones(5, 4))["z"].shape
    torch.Size([5, 3])
    """

    families = families

    @classmethod
    def why_not(cls, model: GenerativeModel) -> str:
        found = {latent.family for latent in model.latents.values()}
        if len(found) == 1 and found <= guides.keys():
            return f"its latents are all {(own := found.pop())}, which the guide {own!r} serves with options of its own"
        return super().why_not(model)
