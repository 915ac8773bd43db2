"""The policy that writes sequences of tokens."""

from __future__ import annotations

import copy
from typing import cast

import pyro
import pyro.distributions as dist
from torch import Tensor

from ..models._base import GenerativeModel
from ..models.sequence_vae import SequenceVAE, written
from ._base import AnyGuide, guides


@guides.register("token-policy")
class TokenPolicy(AnyGuide):
    r"""A generator of its own: :math:`z \sim N(0, I)`, each token from a recurrent network of z and the earlier tokens.

    Its networks are those of the model, with the model's weights at the time of its making: a policy over a model that
    was trained by maximum likelihood starts there.

    Shapes: ``x`` is ``(B, *data_shape)``, a row for each sequence, and has no effect on what is drawn; sites as in the
    model. Raises BadInput for any model but a `SequenceVAE` with a reward.

    Args:
        model: the model, whose latents and data shape the guide takes.

    >>> import torch
    >>> from gumbo.inference import SiteELBO
    >>> from gumbo.models import SequenceVAE
    >>> _ = torch.manual_seed(0)
    >>> model = SequenceVAE((1,), vocabulary=3, latent_dim=2, rnn_hidden=8, reward="counting", length=4)
    >>> policy, rows = TokenPolicy(model), torch.ones(50, 1)
    >>> loss = SiteELBO({"z": "pathwise", "*": "rloo"}, kl_weight=0, num_particles=4)(model, policy)
    >>> optimizer = torch.optim.Adam(policy.parameters(), lr=0.05)
    >>> for _ in range(30):
    ...     optimizer.zero_grad()
    ...     loss(rows).backward()
    ...     optimizer.step()
    >>> -loss(rows).item() / 50 > 2.5  # of at most 3
    True
    """

    families = ("normal", "categorical")

    def __init__(self, model: GenerativeModel):
        super().__init__(model)
        generator = cast(SequenceVAE, model)
        self.tokens = generator.tokens
        self.encoder_state = copy.deepcopy(generator.decoder_state)
        self.encoder_rnn = copy.deepcopy(generator.decoder_rnn)
        self.encoder_output = copy.deepcopy(generator.decoder_output)
        for parameter in self.parameters():
            parameter.requires_grad_(True)
        for name in ("prior_loc", "prior_scale"):
            self.register_buffer(name, getattr(model, name).clone(), persistent=False)

    @classmethod
    def why_not(cls, model: GenerativeModel) -> str:
        if not isinstance(model, SequenceVAE) or model.reward is None:
            return "it is no sequence VAE with a reward, whose tokens the guide writes"
        return super().why_not(model)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        with self.data_plate(x):
            z = pyro.sample("z", dist.Normal(self.prior_loc, self.prior_scale).to_event(1))
            return {"z": z} | written(self.tokens, self.encoder_state, self.encoder_rnn, self.encoder_output, z)
