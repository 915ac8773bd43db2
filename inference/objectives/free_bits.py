"""The evidence lower bound with free bits: a lower limit for the KL of each latent dimension."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.distributions import kl_divergence

from ...errors import BadInput, Refusal, UnsupportedSite
from ..engine.records import Run, Site
from ..estimators._base import Estimator
from ..estimators._distributions import without_to_event
from ..estimators.pathwise import Pathwise
from ._base import Objective, Recorded, objectives


@objectives.register("free-bits")
class FreeBitsBound(Objective):
    r"""Free bits: the KL of each latent dimension counts as at least ``floor`` nats, on average over the batch.

    .. math:: \sum_n E_q[\log p(x_n \mid z)] - \sum_j \max(N \lambda, \sum_n \mathrm{KL}(q(z_j \mid x_n) \| p(z_j)))

    The value is no bound on log p(x) while a floor is active, and is named ``free-bits-elbo``. The KL must have a
    closed form, and latents must be reparameterized: Normal, and other pairs in torch's ``kl_divergence``. Kingma et
    al. 2016, "Improved variational inference with inverse autoregressive flow", arXiv:1606.04934, eq. 15.

    Args:
        floor: nats per latent dimension, at least 0.

    Raises:
        BadInput: a floor that is not a number of at least 0.

    >>> FreeBitsBound(0.1)
    FreeBitsBound(0.1)
    """

    name = "free-bits"
    _unchecked = ("floor",)

    def __init__(self, floor: float = 0.25):
        number = isinstance(floor, int | float) and not isinstance(floor, bool)
        if not (number and math.isfinite(floor) and floor >= 0):
            raise BadInput(f"free bits: the floor is {floor!r}, expected nats per latent dimension, at least 0")
        self.floor = floor

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.floor!r})"

    def accepts(self, estimator: Estimator) -> bool:
        return type(estimator) is Pathwise and not estimator.drop_score

    def refusal(self, estimator: Estimator) -> Refusal | None:
        if self.accepts(estimator):
            return None
        reason = "it changes log q, and free bits have the KL in closed form" if estimator.has_path else ""
        reason = reason or "its draws are not reparameterized, as free bits need them"
        return Refusal(f"{reason}; use 'pathwise', or kl_weight under objective='elbo'")

    def value(self, recorded: Recorded) -> Tensor:
        room, total = recorded.layout.room, torch.zeros(())
        for paths in recorded.groups:
            for run in paths:
                drawn = _drawn(run)
                for site in run.model:
                    if not site.latent:
                        total = total + site.log_prob.sum()
                    elif site.name in drawn:
                        total = total - self._rate(site, drawn.pop(site.name), room)
                if drawn:
                    raise UnsupportedSite(next(iter(drawn)), "free-bits", "it is no latent of the model, and has no KL")
        return total / recorded.layout.num_particles

    def value_name(self, chosen: Mapping[str, Estimator], kl_weight: Any) -> str:
        return "free-bits-elbo"

    def _rate(self, prior: Site, site: Site, room: int) -> Tensor:
        """The KL of one site, with the floor applied to each dimension's mean over the batch, summed."""
        if site.masked or prior.masked:
            raise UnsupportedSite(site.name, "free-bits", "it is masked, and the floor is on a mean over whole plates")
        try:
            kl = kl_divergence(without_to_event(site.fn), without_to_event(prior.fn))
        except NotImplementedError:
            raise UnsupportedSite(
                site.name, "free-bits", "its KL has no closed form; use kl_weight under objective='elbo'"
            ) from None
        batch = site.fn.batch_shape
        kl = kl.expand(batch + kl.shape[len(batch) :])
        # Vectorized particles have a dimension of their own, and separate means.
        particles = batch[0] if len(batch) == room else 1
        rows = math.prod(batch) // particles
        mean = kl.reshape(particles, rows, -1).mean(1)
        return prior.scale * rows * mean.clamp(min=self.floor).sum()


def _drawn(run: Run) -> dict[str, Site]:
    """The guide's latent sites by name.

    Raises:
        UnsupportedSite: the guide has a factor, whose density no KL contains.
    """
    for site in run.guide:
        if not site.latent and not site.settled:
            raise UnsupportedSite(site.name, "free-bits", "a factor of the guide is in no KL; take objective='elbo'")
    return {site.name: site for site in run.guide if site.latent}
