"""The top-down guide for hierarchies of Normal latents."""

from __future__ import annotations

from collections.abc import Sequence

import pyro
import torch
from torch import nn

from ..models._base import GenerativeModel
from ..models._networks import mlp
from ..models.families import MIN_SD, distribution, num_outputs
from ._base import Guide, guides


@guides.register("top-down-normal")
class TopDownNormalGuide(Guide):
    r"""Normal levels drawn in the model's order, from the top level down.

    .. math:: q(z \mid x) = q(z_L \mid d_L(x)) \prod_{l < L} q(z_l \mid z_{l+1}, d_l(x))

    A deterministic upward pass computes features :math:`d_1(x), d_2(d_1), \dots`, one level for each latent; the
    latents are then drawn downwards, each from its features and the latent above, by a network with one hidden layer
    of ``level_hidden``.

    Shapes: ``x`` is ``(B, *data_shape)``; a site is ``(B, *shape)`` as the model declares it. Raises BadInput for a
    model with latents of another family, or with a single one.

    Args:
        model: the model, whose latents and data shape the guide takes.
        hidden: widths of the encoder's hidden layers; None mirrors the model's decoder.
        channels: maps of the encoder's convolutions of stride 2; None mirrors the model's decoder.
        level_hidden: width of the hidden layer of each level's network.
        activation: activation of the guide's networks; None mirrors the model's decoder.
        min_sd: smallest standard deviation, added to the softplus of an output.

    Sønderby et al. 2016, "Ladder variational autoencoders", arXiv:1602.02282.

    >>> import torch
    >>> from gumbo.models import HierarchicalVAE
    >>> model = HierarchicalVAE((1, 8, 8), latent_dims=(5, 3), hidden=(16,), level_hidden=8)
    >>> draws = TopDownNormalGuide(model)(torch.zeros(2, 1, 8, 8))
    >>> {site: tuple(draw.shape) for site, draw in draws.items()}
    {'z2': (2, 3), 'z1': (2, 5)}
    """

    families = ("normal",)

    def __init__(
        self,
        model: GenerativeModel,
        hidden: Sequence[int] | None = None,
        channels: Sequence[int] | None = None,
        level_hidden: int = 64,
        activation: str | None = None,
        min_sd: float = MIN_SD,
    ):
        super().__init__(model, hidden, channels, activation)
        self.min_sd = min_sd
        activation, sites = self.layout["activation"], list(self.latents)  # from the top level down
        self.encoder_up = nn.ModuleDict(
            {
                site: mlp([self.encoder.size, self.encoder.size], activation, activate_last=True)
                for site in reversed(sites[:-1])
            }
        )
        above = [0, *(self.latents[site].size for site in sites[:-1])]
        self.encoder_down = nn.ModuleDict(
            {
                site: mlp([self.encoder.size + size, level_hidden, num_outputs(self.latents[site])], activation)
                for site, size in zip(sites, above, strict=True)
            }
        )

    @classmethod
    def why_not(cls, model: GenerativeModel) -> str:
        if len(model.latents) < 2:
            return "it has a single latent, so there is no hierarchy"
        return super().why_not(model)

    def forward(self, x: torch.Tensor, **conditions: torch.Tensor) -> dict[str, torch.Tensor]:
        with self.data_plate(x):
            features = self.upwards(self.features(x, conditions))
            values: dict[str, torch.Tensor] = {}
            above = None
            for site, latent in self.latents.items():
                inputs = features[site]
                if above is not None:
                    inputs = torch.cat([inputs.expand(*above.shape[:-1], -1), above], -1)
                q = distribution(latent, self.encoder_down[site](inputs), min_sd=self.min_sd)
                values[site] = pyro.sample(site, q)
                above = values[site].flatten(-len(latent.shape))
        return values

    def upwards(self, features: torch.Tensor) -> dict[str, torch.Tensor]:
        """The features of each level, from those of the data."""
        *_, lowest = self.latents
        levels = {lowest: features}
        for site, step in self.encoder_up.items():
            features = step(features)
            levels[site] = features
        return levels
