"""Clusters of draws as heavy-tailed proposals, and the evidence under a mixture of them."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch

from ..posterior.importance import log_evidence
from .annealing import root_covariance
from .target import Target

# Draws of each proposal, clusters of a population, and degrees of freedom of their tails.
_DRAWS, _CLUSTERS, _TAILS = 500, 4, 5.0
_SAMPLE = 64


@dataclass
class Cluster:
    """A t distribution per unit: centres ``(units, d)`` and root scale matrices ``(units, d, d)``."""

    center: torch.Tensor
    root: torch.Tensor

    def draw(self, count: int) -> torch.Tensor:
        units, size = self.center.shape
        normal = torch.randn(count, units, size, dtype=torch.float64)
        chi = torch.distributions.Chi2(torch.tensor(_TAILS, dtype=torch.float64)).sample((count, units, 1))
        return self.center + torch.einsum("uij,puj->pui", self.root, normal) * (_TAILS / chi).sqrt()

    def log_prob(self, at: torch.Tensor) -> torch.Tensor:
        size = self.center.shape[-1]
        away = torch.linalg.solve_triangular(self.root, (at - self.center).movedim(0, -1), upper=False)
        square = (away**2).sum(-2).T
        log_root = self.root.diagonal(dim1=-2, dim2=-1).log().sum(-1)
        constant = math.lgamma((_TAILS + size) / 2) - math.lgamma(_TAILS / 2) - size / 2 * math.log(_TAILS * math.pi)
        return constant - log_root - (_TAILS + size) / 2 * torch.log1p(square / _TAILS)


def clusters(population: torch.Tensor, count: int = _CLUSTERS) -> list[Cluster]:
    """Each unit's particles ``(particles, units, d)`` in clusters, with a proposal for each."""
    _, units, size = population.shape
    whole = root_covariance(population)
    found = [Cluster(torch.zeros(units, size).double(), torch.zeros(units, size, size).double()) for _ in range(count)]
    for unit in range(units):
        points = torch.linalg.solve_triangular(whole[unit], population[:, unit].T, upper=False).T
        labels = _nearest(points, count)
        for number, cluster in enumerate(found):
            own = population[labels == number, unit] if bool((labels == number).any()) else population[:, unit]
            few = len(own) < 2 * size + 2
            cluster.center[unit] = own.mean(0)
            cluster.root[unit] = (root_covariance(own.unsqueeze(1))[0] if not few else whole[unit] * 0.5) * 1.1
    return found


def _nearest(points: torch.Tensor, count: int) -> torch.Tensor:
    """k-means, started from points far apart."""
    centers = points[[int((points - points.mean(0)).norm(dim=1).argmax())]]
    for _ in range(count - 1):
        centers = torch.cat([centers, points[[int(_squares(points, centers).min(1).values.argmax())]]])
    labels = torch.zeros(len(points), dtype=torch.long)
    for _ in range(10):
        labels = _squares(points, centers).argmin(1)
        for number in range(count):
            if bool((labels == number).any()):
                centers[number] = points[labels == number].mean(0)
    return labels


def _squares(points: torch.Tensor, centers: torch.Tensor) -> torch.Tensor:
    return ((points[:, None] - centers) ** 2).sum(-1)


@dataclass
class Mixture:
    """log p(x) of each unit under the search proposals and under all, and the error of the latter: ``(units,)`` each.

    ``sample`` ``(64, units, d)`` is resampled from the posterior under all proposals.
    """

    searched: np.ndarray
    total: np.ndarray
    error: np.ndarray
    sample: torch.Tensor


def mixture_evidence(target: Target, searching: list[Cluster], knowing: list[Cluster], times: int = 1) -> Mixture:
    """The evidence by importance sampling from the uniform mixture of the proposals; ``times`` multiplies the draws."""
    count = times * (_DRAWS if target.sweep.vectorized else 100)
    everyone = [*searching, *knowing]
    draws = torch.cat([cluster.draw(count) for cluster in everyone])
    log_p = sum(target(draws))
    log_q = torch.stack([cluster.log_prob(draws) for cluster in everyone])
    cut = count * len(searching)
    part = log_p[:cut] - torch.logsumexp(log_q[: len(searching), :cut], 0) + math.log(len(searching))
    whole = log_p - torch.logsumexp(log_q, 0) + math.log(len(everyone))
    searched, _ = log_evidence(part.T.numpy())
    total, error = log_evidence(whole.T.numpy())
    weight = torch.softmax(whole, 0).T.nan_to_num(1 / len(whole))
    picked = torch.multinomial(weight, _SAMPLE, replacement=True).T
    sample = draws.gather(0, picked.unsqueeze(-1).expand(-1, -1, draws.shape[-1]))
    return Mixture(searched, total, error, sample)
