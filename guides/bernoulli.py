"""The guide for binary latents."""

from __future__ import annotations

from ._base import FactorizedGuide, guides


@guides.register("bernoulli")
class BernoulliGuide(FactorizedGuide):
    r"""Binary latents: :math:`q(z_j \mid x) = \mathrm{Bernoulli}(\sigma(h_j(x)))`, independent over j.

    Shapes: ``x`` is ``(B, *data_shape)``; a site is ``(B, *shape)`` as the model declares it. With ``hidden=()`` h is
    linear. Raises BadInput for a model with latents of another family.

    Args:
        model: the model, whose latents and data shape the guide takes.
        hidden: widths of the encoder's hidden layers; None mirrors the model's decoder.
        channels: maps of the encoder's convolutions of stride 2; None mirrors the model's decoder.
        activation: activation of the guide's networks; None mirrors the model's decoder.

    Mnih & Gregor 2014, arXiv:1402.0030.

    >>> import torch
    >>> from gumbo.models import BernoulliVAE
    >>> model = BernoulliVAE((1, 8, 8), num_latents=6, hidden=(16,))
    >>> BernoulliGuide(model, hidden=(16,))(torch.zeros(5, 1, 8, 8))["z"].shape
    torch.Size([5, 6])
    """

    families = ("bernoulli",)
