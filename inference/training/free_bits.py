"""Free bits: the evidence lower bound with a floor under each latent dimension's KL, against posterior collapse."""

from __future__ import annotations

import math
from collections.abc import Callable

import pyro.poutine as poutine
import torch
from pyro.infer.elbo import ELBO, ELBOModule
from pyro.poutine.trace_struct import Trace
from pyro.poutine.util import prune_subsample_sites
from torch import Tensor
from torch.distributions import Independent, kl_divergence

from ...errors import BadInput, UnsupportedSite


class FreeBits(ELBO):
    r"""The evidence lower bound with a floor under each latent dimension's KL: it is free up to ``floor`` nats.

    .. math:: \sum_n E_q[\log p(x_n \mid z)] - \sum_j \max(N \lambda, \sum_n \mathrm{KL}(q(z_j \mid x_n) \| p(z_j)))

    A loss as Pyro's are, for `SVI`, for torch and for `fit`; its value is not a bound on log p(x) while a floor is
    active, and is called ``free-bits-elbo``. The KL must have a closed form, and latents be reparameterized: Normal,
    and whatever else torch pairs in ``kl_divergence``. Values in nats, summed over the batch; the mean KL that is
    compared with the floor is over the batch.

    Kingma et al. 2016, "Improved variational inference with inverse autoregressive flow", arXiv:1606.04934, eq. 15.
    Raises UnsupportedSite for another latent, and BadInput for a floor that is not a number of at least 0.

    >>> from gumbo.guides import NormalGuide
    >>> from gumbo.models import GaussianVAE
    >>> model = GaussianVAE((1, 4, 4), latent_dim=3, hidden=(8,), likelihood="bernoulli")
    >>> loss = FreeBits(0.5)(model, NormalGuide(model, hidden=(8,)))
    >>> loss(torch.zeros(5, 1, 4, 4)).backward()
    >>> loss.objective_name
    'free-bits-elbo'
    """

    def __init__(self, floor: float, *, num_particles: int = 1):
        if not (isinstance(floor, int | float) and floor >= 0):
            raise BadInput(f"free bits: the floor is {floor!r}, expected nats per latent dimension, at least 0")
        super().__init__(num_particles=num_particles)
        self.floor = floor

    def __repr__(self) -> str:
        return f"FreeBits({self.floor}, num_particles={self.num_particles})"

    def __call__(self, model, guide) -> ELBOModule:
        return _FreeBitsModule(model, guide, self)

    def _get_trace(self, model, guide, args, kwargs):
        raise BadInput("FreeBits runs the programs itself; use differentiable_loss, loss or loss_and_grads")

    def differentiable_loss(self, model: Callable, guide: Callable, *args, **kwargs) -> Tensor:
        """The loss as a differentiable scalar."""
        draws = [self._particle(model, guide, args, kwargs) for _ in range(self.num_particles)]
        return sum(draws) / self.num_particles

    def loss_and_grads(self, model: Callable, guide: Callable, *args, **kwargs) -> float:
        """The loss as a number; gradients are added to ``.grad`` of the parameters."""
        loss = self.differentiable_loss(model, guide, *args, **kwargs)
        if loss.requires_grad:
            loss.backward()
        return loss.item()

    def loss(self, model: Callable, guide: Callable, *args, **kwargs) -> float:
        """The loss as a number, without gradients."""
        with torch.no_grad():
            return self.differentiable_loss(model, guide, *args, **kwargs).item()

    def _particle(self, model: Callable, guide: Callable, args: tuple, kwargs: dict) -> Tensor:
        guide_trace = poutine.trace(guide).get_trace(*args, **kwargs)
        model_trace = poutine.trace(poutine.replay(model, trace=guide_trace)).get_trace(*args, **kwargs)
        model_trace = prune_subsample_sites(model_trace)
        model_trace.compute_log_prob()
        loss = torch.zeros(())
        for name, site in model_trace.nodes.items():
            if site["type"] == "sample":
                term = -site["log_prob_sum"] if site["is_observed"] else self._rate(name, site, guide_trace)
                loss = loss + term
        return loss

    def _rate(self, name: str, site: dict, guide_trace: Trace) -> Tensor:
        """The KL of one site, each of its dimensions at least the floor on average over the batch."""
        if name not in guide_trace.nodes:
            raise BadInput(f"site {name!r} is latent in the model but the guide does not draw it: add it to the guide")
        drawn, prior = guide_trace.nodes[name]["fn"], site["fn"]
        if not getattr(drawn, "has_rsample", False):
            raise UnsupportedSite(name, "free-bits", "its draws are not reparameterized; use kl_weight of SiteELBO")
        if site["mask"] is not None:
            raise UnsupportedSite(name, "free-bits", "it is masked, and the floor is on an average over whole plates")
        try:
            kl = kl_divergence(_elementary(drawn), _elementary(prior))
        except NotImplementedError:
            raise UnsupportedSite(name, "free-bits", "its KL has no closed form; use kl_weight of SiteELBO") from None
        kl = kl.expand(drawn.batch_shape + kl.shape[len(drawn.batch_shape) :])
        count = math.prod(drawn.batch_shape)
        mean = kl.reshape(count, -1).mean(0)
        return site["scale"] * count * mean.clamp(min=self.floor).sum()


class _FreeBitsModule(ELBOModule):
    objective_name = "free-bits-elbo"


def _elementary(fn):
    while isinstance(fn, Independent):
        fn = fn.base_dist
    return fn


__all__ = ["FreeBits"]
