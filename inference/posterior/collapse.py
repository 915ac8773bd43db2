"""Posterior collapse: how to see it (active units), and a floor under the KL that works against it (free bits)."""

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
from ..engine.rows import Rows
from ..engine.scopes import device_of, modes_kept, modules_of, private_seed, private_store


def active_units(
    guide: Callable,
    data: object,
    threshold: float = 0.01,
    *,
    num_samples: int = 10,
    batch_size: int = 256,
    seed: int | None = 0,
) -> dict[str, Tensor]:
    r"""Which latent dimensions the guide uses: :math:`\mathrm{Var}_x(E_{q(u \mid x)}[u]) >` ``threshold``.

    Returns a boolean tensor of each latent site's event shape; ``.sum()`` counts them. A dimension whose posterior mean
    does not move with the data says nothing about them: it has collapsed onto its prior. Means are taken in closed form
    where the site's distribution has one, and averaged over ``num_samples`` draws of whatever the site depends on; the
    variance that so few draws add is taken off again. Sites outside the data plate are left out.

    Burda, Grosse & Salakhutdinov 2015, arXiv:1509.00519. Raises BadInput for data that the guide does not take, or for
    fewer than two rows.

    >>> import pyro, pyro.distributions as dist
    >>> def guide(x):
    ...     with pyro.plate("data", len(x)):
    ...         loc = torch.stack([x, torch.zeros_like(x)], -1)  # the second unit ignores x
    ...         pyro.sample("z", dist.Normal(loc, 1.0).to_event(1))
    >>> active_units(guide, torch.linspace(-1.0, 1.0, 50))
    {'z': tensor([ True, False])}
    """
    rows = Rows(data).check("data")
    if len(rows) < 2:
        raise BadInput("active_units compares data with each other: expected at least two rows")
    if num_samples < 1 or batch_size < 1 or not threshold >= 0:
        raise BadInput("active_units: expected num_samples ≥ 1, batch_size ≥ 1 and threshold ≥ 0")
    device = device_of(guide)
    pieces: dict[str, list[Tensor]] = {}
    with private_store(guide), private_seed(seed, guide), modes_kept(guide), torch.no_grad():
        for module in modules_of(guide):
            module.eval()
        for start in range(0, len(rows), batch_size):
            batch = rows[start : start + batch_size].to(device)
            draws = [_means(guide, batch) for _ in range(num_samples)]
            for name in draws[0]:
                pieces.setdefault(name, []).append(torch.stack([draw[name] for draw in draws]))
    found = {}
    for name, parts in pieces.items():
        means = torch.cat(parts, 1).double()  # (draws, N, *event)
        spread = means.mean(0).var(0)
        if num_samples > 1:
            spread = spread - means.var(0).mean(0) / num_samples
        found[name] = spread > threshold
    return found


def _means(guide: Callable, batch: Rows) -> dict[str, Tensor]:
    """The mean of each local latent given what the guide drew before it, or its draw where there is no closed form."""
    trace = prune_subsample_sites(poutine.trace(guide).get_trace(*batch.args, **batch.kwargs))
    means = {}
    for name, site in trace.nodes.items():
        if site["type"] != "sample" or site["is_observed"]:
            continue
        fn = site["fn"]
        if tuple(fn.batch_shape) != (len(batch),):
            continue
        try:
            means[name] = fn.mean.expand(fn.batch_shape + fn.event_shape)
        except (NotImplementedError, AttributeError):  # no mean in closed form: a draw stands in
            means[name] = site["value"]
    return means


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


__all__ = ["FreeBits", "active_units"]
