"""The policy of a walker on a grid."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn

from ..models._base import GenerativeModel
from ..models.grid_world import MOVES, GridWorld, moved
from ._base import AnyGuide, guides


@guides.register("grid-policy")
class GridPolicy(AnyGuide):
    r"""A table: :math:`\pi(a_t \mid s_{t-1}) = \mathrm{softmax}(\theta_{s_{t-1}})`, initially zero.

    The state is a function of the earlier actions, by the model's moves. ``encoder_logits`` is θ, ``(cells, 4)``.

    Shapes: ``x`` is ``(B, *data_shape)``, a row for each walk; a site is ``(B, 4)``. Raises BadInput for any model but
    `GridWorld`.

    Args:
        model: the model, whose latents and data shape the guide takes.

    >>> import torch
    >>> from gumbo.inference import SiteELBO
    >>> from gumbo.models import GridWorld
    >>> model = GridWorld(height=2, width=2, steps=3)
    >>> guide, walks = GridPolicy(model), torch.ones(50, 1)
    >>> loss = SiteELBO("rloo", kl_weight=0, num_particles=2)(model, guide)
    >>> optimizer = torch.optim.Adam(guide.parameters(), lr=0.3)
    >>> for _ in range(30):
    ...     optimizer.zero_grad()
    ...     loss(walks).backward()
    ...     optimizer.step()
    >>> bool(model.expected_return(guide.encoder_logits) > model.optimum() - 0.1)
    True
    """

    families = ("categorical",)

    def __init__(self, model: GenerativeModel):
        super().__init__(model)
        for name in ("moves", "start"):
            self.register_buffer(name, getattr(model, name).clone(), persistent=False)
        self.encoder_logits = nn.Parameter(torch.zeros(len(self.start), len(MOVES)))

    @classmethod
    def why_not(cls, model: GenerativeModel) -> str:
        if not isinstance(model, GridWorld):
            return "it is no grid world, over whose cells the policy is a table"
        return super().why_not(model)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        with self.data_plate(x):
            state, drawn = self.start, {}
            for site in self.latents:
                drawn[site] = pyro.sample(site, dist.OneHotCategorical(logits=state @ self.encoder_logits))
                state = moved(state, drawn[site], self.moves)
            return drawn
