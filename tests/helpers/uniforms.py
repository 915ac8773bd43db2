"""The uniforms behind coins, listed."""

from __future__ import annotations

import pyro.distributions as dist
import torch


def representative_uniforms(probs, cuts=()):
    """The middle of one of the intervals of [0, 1] between m, 1 − m (m = min(p, 1 − p)) and ``cuts``, by its length.

    A coin and its partner are constant within an interval, and both estimators at most linear in each uniform, so
    that the mean over the middles is the mean over all uniforms; `mean_over_draws` lists the categorical draw.
    """
    low = torch.minimum(probs, 1 - probs)
    ends = [torch.full_like(low, cut) for cut in (0.0, *cuts, 1.0)]
    edges = torch.stack([low, 1 - low, *ends], -1).sort(-1).values
    picked = dist.Categorical(probs=edges.diff(dim=-1)).sample().unsqueeze(-1)
    return (edges.gather(-1, picked) + edges.gather(-1, picked + 1)).squeeze(-1) / 2
