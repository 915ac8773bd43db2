"""Importance weights per datum, and bounds from them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...errors import UnsupportedSite
from ..engine.records import Frames, Run, Site
from ..engine.terms import Layout, common_frames, summed_to


@dataclass
class Bound:
    """Per-datum log importance weights ``(K, *plates)``, and the bounds of order ``alpha`` from them."""

    log_weight: Tensor
    dim: int
    alpha: float = 0.0

    def value(self) -> Tensor:
        """(1/(1 − α)) log (1/K) Σₖ wₖ^(1 − α) per datum: at α = 0 log (1/K) Σₖ wₖ."""
        return power_mean(self.log_weight, self.dim, self.alpha)

    def normalized(self) -> Tensor:
        """The derivative of :meth:`value` by each log weight: the weights to the power 1 − α, normalized."""
        return ((1 - self.alpha) * self.log_weight).softmax(self.dim)

    def leave_one_out(self) -> Tensor:
        """For each k the bound with log wₖ replaced by the mean of the others (Mnih & Rezende 2016, 1602.06725).

        It is 0, no baseline, where that bound is −∞ because all other weights are zero.
        """
        weights = self.log_weight.movedim(self.dim, -1)
        count = weights.shape[-1]
        diagonal = torch.eye(count, dtype=torch.bool, device=weights.device)
        rows = weights.unsqueeze(-2)
        # Without the own weight, not less it: a weight of zero is −∞ here, and −∞ + ∞ is no number.
        others = rows.masked_fill(diagonal, 0.0).sum(-1, keepdim=True) / (count - 1)
        bound = power_mean(torch.where(diagonal, others, rows), -1, self.alpha).squeeze(-1)
        return bound.masked_fill(bound.isneginf(), 0.0).movedim(-1, self.dim)


def weighted(weights: Tensor, terms: Tensor) -> Tensor:
    """The product of normalized weights and terms, where a weight of zero makes zero of a term of −∞ too."""
    return weights * torch.where(weights > 0, terms, torch.zeros_like(terms))


def power_mean(log_weight: Tensor, dim: int, alpha: float) -> Tensor:
    """The logarithm of the mean of w^(1 − α) along ``dim``, over 1 − α; at α = 1 the mean of log w.

    >>> log_weight = torch.tensor([0.0, 2.0], dtype=torch.float64)
    >>> [round(power_mean(log_weight, 0, alpha).item(), 4) for alpha in (0.0, 0.5, 1.0 - 1e-12, 1.0, 2.0)]
    [1.4338, 1.2402, 1.0, 1.0, 0.5662]
    """
    power = 1.0 - alpha
    count = log_weight.shape[dim]
    if power == 0.0:
        return log_weight.mean(dim, keepdim=True)
    if power == 1.0:
        return log_weight.logsumexp(dim, keepdim=True) - math.log(count)
    # Centred, which avoids cancellation where the power is small and the sum of exponentials is nearly K.
    middle = log_weight.detach().mean(dim, keepdim=True).nan_to_num(0.0, 0.0, 0.0)
    offset = power * (log_weight - middle)
    near = offset.clamp(-1.0, 1.0).expm1().mean(dim, keepdim=True).log1p()
    far = offset.logsumexp(dim, keepdim=True) - math.log(count)
    is_near = offset.detach().abs().amax(dim, keepdim=True) <= 1.0
    return middle + torch.where(is_near, near, far) / power


def common_scale(runs: list[Run]) -> Any:
    """What multiplies the bound: the scale common to all terms, or, where scales differ, that of subsampled plates.

    The rest of scales that differ enters the weights as exponents.
    """
    scales = [site.scale for run in runs for site in run.sites if site.latent or not site.settled]
    first = scales[0] if scales else 1.0
    same = all(
        s is first or (not isinstance(s, Tensor) and not isinstance(first, Tensor) and s == first) for s in scales
    )
    return first if same else _subsampling(runs[0])


def _subsampling(run: Run) -> float:
    """N/B of the subsampled plates, which Pyro has put into the scale of every site inside."""
    return math.prod(full / size for full, size in run.part_sizes.values())


@dataclass
class Weights:
    """Importance weights per datum, with log p and log q.

    Attributes:
        log_p: log p(x, z) of each particle, in nats, ``(K, *plates)``.
        log_q: log q(z | x) of each particle, in nats, ``(K, *plates)``.
        frames: the plates that enclose all sites, over whose elements the weights are.
        scale: what multiplies the bound, such as N/B of a subsampled plate.

    :func:`importance_weights` makes them, and has an example.
    """

    log_p: Tensor
    log_q: Tensor
    frames: Frames
    scale: Any


def importance_weights(groups: list[list[Run]], layout: Layout) -> Weights:
    """log p(x, z) and log q(z | x) of each particle, per element of the plates that enclose all sites.

    Args:
        groups: the runs, as in :class:`Recorded`.
        layout: the meaning of the terms' dimensions; particles are along dimension ``-layout.room``.

    Returns:
        log p and log q in nats, each ``(K, *plates)``, and the scale outside of the weights.

    Raises:
        UnsupportedSite: a plate that does not enclose every site is subsampled.

    >>> import pyro
    >>> import pyro.distributions as dist
    >>> import torch
    >>> from gumbo.inference import SiteELBO
    >>> from gumbo.inference.objectives import Objective
    >>> class MeanLogWeight(Objective):
    ...     name = "mean-log-weight"
    ...     def accepts(self, estimator):
    ...         return estimator.name == "pathwise"
    ...     def value(self, recorded):
    ...         weights = importance_weights(recorded.groups, recorded.layout)
    ...         print(tuple(weights.log_p.shape))
    ...         return weights.scale * (weights.log_p - weights.log_q).mean(0).sum()
    >>> def model(x):
    ...     with pyro.plate("rows", len(x)):
    ...         z = pyro.sample("z", dist.Normal(0.0, 1.0))
    ...         pyro.sample("x", dist.Normal(z, 1.0), obs=x)
    >>> def guide(x):
    ...     with pyro.plate("rows", len(x)):
    ...         pyro.sample("z", dist.Normal(0.0, 1.0))
    >>> loss = SiteELBO("pathwise", objective=MeanLogWeight(), num_particles=3).loss(model, guide, torch.zeros(5))
    (3, 5)
    """
    runs = [run for paths in groups for run in paths]
    frames, scale = common_frames(runs, layout), common_scale(runs)
    for plate in sorted(runs[0].partial_loops):
        raise UnsupportedSite(
            f"the sequential plate {plate!r} is subsampled, and a weight over a part of the data does not estimate the"
            " bound over all of it; make it a vectorized plate that encloses every site, run it in full, or take"
            " objective='elbo'"
        )
    outside = runs[0].partial_plates - frames
    if outside:
        plate = next(iter(outside))[0]
        site = next((s.name for s in runs[0].guide if s.latent and not s.frames & outside), "(program)")
        raise UnsupportedSite(
            site,
            "any",
            f"it is outside the subsampled plate {plate!r}, and a weight over a part of the data does not estimate"
            " the bound over all of it; run the full plate, or take objective='elbo'",
        )

    def gather(sites: list[Site]) -> Tensor:
        return sum((summed_to(s.log_prob / scale, s.frames, frames) for s in sites), start=torch.zeros(()))

    return Weights(
        layout.join([gather(run.model) for run in runs]),
        layout.join([gather(run.guide) for run in runs]),
        frames,
        scale,
    )
