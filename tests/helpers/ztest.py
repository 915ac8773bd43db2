"""Means of draws against the truth, with a stated chance of a false alarm and a stated power."""

from __future__ import annotations

import math

import torch

FAMILY_WISE_ERROR = 1e-4  # of one call, over all its parameters (Bonferroni)
POWER = 0.99


def _quantile(probability):
    return torch.distributions.Normal(0.0, 1.0).icdf(torch.tensor(probability, dtype=torch.float64)).item()


def misses(draws, truth, resolves):
    """Whether the mean of ``draws`` (rows) misses ``truth`` beyond chance.

    Fails by itself where there are too few draws to see a bias of ``resolves`` in any one parameter with power 0.99.
    """
    error = draws.std(0) / math.sqrt(len(draws))
    bound = _quantile(1 - FAMILY_WISE_ERROR / (2 * len(truth)))
    assert ((bound + _quantile(POWER)) * error <= resolves).all(), "too few draws for the power that is stated"
    return bool(((draws.mean(0) - truth).abs() > bound * error + 1e-12).any())
