"""The exact gradient of a small program, and the exact mean of an estimator over every tuple of draws."""

from __future__ import annotations

import pyro
import torch
from programs import gradient

from gumbo.inference import SiteELBO
from gumbo.inference.auditing.exact import exact_elbo, mean_over_draws


def exact_gradient(model, guide):
    with pyro.get_param_store().scope():
        return gradient(-exact_elbo(model, guide), torch.nn.ModuleList([model, guide]))


def mean_gradient(estimator, model, guide, **options):
    """E[gradient] over every tuple of draws, with whatever state a few training steps leave."""
    loss = SiteELBO(estimator, **options)(model, guide)
    loss.initialize()
    for _ in range(3):
        loss()
    loss.eval()
    return mean_over_draws(lambda: gradient(loss(), torch.nn.ModuleList([model, guide])))


def is_unbiased(estimator, model, guide, **options):
    """Whether the mean over every tuple of draws is the exact gradient."""
    mean = mean_gradient(estimator, model, guide, **options)
    return torch.allclose(mean, exact_gradient(model, guide), rtol=0, atol=1e-10)
