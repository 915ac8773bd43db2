"""Sequential Monte Carlo from the prior to the posterior, independent of the guide."""

from __future__ import annotations

import math

import numpy as np
import torch

from ..engine.progress import Progress
from .target import Target

_TEMPERATURES = 80  # the most of them


def annealed(
    target: Target, particles: int = 500, moves: int = 6, progress: Progress | None = None
) -> tuple[np.ndarray, torch.Tensor]:
    """log p(x) of each unit ``(units,)`` and particles ``(particles, units, d)`` of its posterior, by annealing.

    Sequential Monte Carlo: each temperature step keeps half of a unit's particles effective; between temperatures they
    make random-walk Metropolis moves with their own covariance. Del Moral, Doucet & Jasra 2006. The evidence is −∞ if
    the posterior is not reached within 80 temperatures.
    """
    free = target.draw(particles)
    prior, likelihood = target(free)
    _, units, size = free.shape
    inverse = torch.zeros(units, dtype=torch.float64)
    evidence = torch.zeros(units, dtype=torch.float64)
    step = torch.full((units,), 2.38 / math.sqrt(size), dtype=torch.float64)
    for temperature in range(_TEMPERATURES):
        higher = _next(inverse, likelihood)
        gain = (higher - inverse) * likelihood
        gain = gain.masked_fill((higher == inverse).expand_as(gain), 0.0)
        evidence = evidence + torch.logsumexp(gain, 0) - math.log(particles)
        inverse = higher
        picked = _resampled(gain)
        free = free.gather(0, picked.unsqueeze(-1).expand_as(free))
        prior, likelihood = prior.gather(0, picked), likelihood.gather(0, picked)
        root = root_covariance(free)
        for move in range(moves):
            if progress is not None:
                progress.step(temperature * moves + move)
            noise = torch.randn_like(free)
            proposed = free + step[:, None] * torch.einsum("uij,puj->pui", root, noise)
            new_prior, new_likelihood = target(proposed)
            ratio = new_prior + inverse * new_likelihood - prior - inverse * likelihood
            accepted = torch.rand_like(ratio).log() < ratio
            free = torch.where(accepted.unsqueeze(-1), proposed, free)
            prior = torch.where(accepted, new_prior, prior)
            likelihood = torch.where(accepted, new_likelihood, likelihood)
            step = step * (accepted.double().mean(0) - 0.3).exp()
        if bool((inverse >= 1).all()):
            return evidence.numpy(), free
    return np.where(inverse.numpy() >= 1, evidence.numpy(), -math.inf), free


def _next(inverse: torch.Tensor, likelihood: torch.Tensor) -> torch.Tensor:
    """The largest inverse temperature of each unit that leaves half of the particles' weight."""
    low, high = inverse.clone(), torch.ones_like(inverse)
    enough = _effective((high - inverse) * likelihood) >= 0.5
    for _ in range(40):
        middle = (low + high) / 2
        good = _effective((middle - inverse) * likelihood) >= 0.5
        low, high = torch.where(good, middle, low), torch.where(good, high, middle)
    return torch.where(enough, torch.ones_like(low), torch.maximum(low, inverse + 1e-9).clamp(max=1.0))


def _effective(gain: torch.Tensor) -> torch.Tensor:
    weight = (gain - gain.max(0).values).exp()
    return weight.sum(0) ** 2 / (weight**2).sum(0) / len(gain)


def _resampled(gain: torch.Tensor) -> torch.Tensor:
    """Systematic resampling of each unit's particles ``(particles, units)``."""
    count = len(gain)
    weight = torch.softmax(gain, 0).nan_to_num(1 / count)
    at = (
        torch.arange(count, dtype=torch.float64).unsqueeze(1) + torch.rand(1, gain.shape[1], dtype=torch.float64)
    ) / count
    edges = weight.cumsum(0)
    return torch.searchsorted(edges.T.contiguous(), at.T.contiguous()).clamp(max=count - 1).T.contiguous()


def root_covariance(free: torch.Tensor) -> torch.Tensor:
    centred = free - free.mean(0)
    covariance = torch.einsum("pui,puj->uij", centred, centred) / len(free)
    spread = covariance.diagonal(dim1=-2, dim2=-1).mean(-1).clamp(min=1e-12)
    covariance = covariance + 1e-6 * spread[:, None, None] * torch.eye(free.shape[-1], dtype=torch.float64)
    root, failed = torch.linalg.cholesky_ex(covariance)
    alone = covariance.diagonal(dim1=-2, dim2=-1).sqrt().diag_embed()
    return torch.where(failed[:, None, None] != 0, alone, root)
