"""A guide that is independent of the data."""

from __future__ import annotations

import pyro
import torch
from torch import nn

from ..models._base import GenerativeModel
from ..models.families import distribution, families, num_outputs
from ._base import AnyGuide, guides


@guides.register("unconditional")
class UnconditionalGuide(AnyGuide):
    r"""One distribution for every datum: :math:`q_\phi(z) = \prod_j q_{\phi_j}(z_j)`, with free parameters φ.

    It is the distribution of the expectation of an `Expectation` model (a bandit's policy, for example); for a model of
    data it is the form of a collapsed guide. All parameters start at zero: means 0, logits 0, standard deviations
    softplus(0).

    Shapes: ``x`` is ``(B, *data_shape)``; a site is ``(B, *shape)`` as the model declares it. Raises BadInput for a
    model without latents, or with global ones.

    Args:
        model: the model, whose latents and data shape the guide takes.

    >>> import torch
    >>> from gumbo.models import BernoulliVAE
    >>> guide = UnconditionalGuide(BernoulliVAE((1, 8, 8), num_latents=6, hidden=(16,)))
    >>> guide(torch.zeros(5, 1, 8, 8))["z"].shape, sum(p.numel() for p in guide.parameters())
    (torch.Size([5, 6]), 6)
    """

    families = families
    factorized = True

    def __init__(self, model: GenerativeModel):
        super().__init__(model)
        self.encoder_outputs = nn.ParameterDict(
            {site: nn.Parameter(torch.zeros(num_outputs(latent))) for site, latent in self.latents.items()}
        )

    def forward(self, x: torch.Tensor, **conditions: torch.Tensor) -> dict[str, torch.Tensor]:
        with self.data_plate(x):
            self.check_conditions(conditions, len(x))
            return {
                site: pyro.sample(site, distribution(latent, self.encoder_outputs[site].expand(len(x), -1)))
                for site, latent in self.latents.items()
            }
