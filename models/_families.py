"""From a network's output to the distribution of one latent, by family."""

from __future__ import annotations

import pyro.distributions as dist
import torch
from torch import Tensor
from torch.nn.functional import softplus

from ._base import Latent
from ._relaxed import RelaxedOneHot

MIN_SD = 1e-4
TEMPERATURE = 2 / 3


def num_outputs(latent: Latent) -> int:
    """How many numbers ``distribution`` needs for one datum."""
    return 2 * latent.size if latent.family == "normal" else latent.size


def distribution(
    latent: Latent, output: Tensor, *, min_sd: float = MIN_SD, temperature: Tensor | float = TEMPERATURE
) -> dist.TorchDistribution:
    """q of one latent from ``output`` ``(..., num_outputs)``: batch shape ``(...)``, event shape ``latent.shape``.

    A Normal has standard deviation ``softplus(output) + min_sd``; the others take their logits from the output.
    """
    rank = len(latent.shape)
    if latent.family == "normal":
        loc, raw = output.unflatten(-1, (2, *latent.shape)).unbind(-1 - rank)
        return dist.Normal(loc, softplus(raw) + min_sd).to_event(rank)
    logits = output.unflatten(-1, latent.shape)
    if latent.family == "bernoulli":
        return dist.Bernoulli(logits=logits).to_event(rank)
    if latent.family == "categorical":
        return dist.OneHotCategorical(logits=logits).to_event(rank - 1)
    temperature = torch.as_tensor(temperature, dtype=output.dtype, device=output.device)
    return RelaxedOneHot(temperature, logits=logits).to_event(rank - 1)
