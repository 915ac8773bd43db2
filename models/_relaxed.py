"""A relaxed one-hot distribution whose draws are always in its support."""

from __future__ import annotations

import torch
from pyro.distributions import RelaxedOneHotCategorical


class RelaxedOneHot(RelaxedOneHotCategorical):
    """RelaxedOneHotCategorical (Maddison et al. 2017, arXiv:1611.00712) that is safe at low temperatures.

    In float32 the parent's draws leave the simplex by more than validation allows once ``logits / temperature`` is
    large, and coordinates that underflow to zero have an infinite density. Draws are renormalized here and kept above
    the smallest normal number; apart from that rounding they are the parent's for equal noise, with the same density.

    >>> import torch
    >>> relaxed = RelaxedOneHot(torch.tensor(0.01), logits=torch.randn(100, 10))
    >>> bool(relaxed.log_prob(relaxed.rsample()).isfinite().all())
    True
    """

    def rsample(self, sample_shape=()) -> torch.Tensor:
        simplex = super().rsample(sample_shape)
        simplex = simplex / simplex.sum(-1, keepdim=True)
        return simplex.clamp(min=torch.finfo(simplex.dtype).tiny)

    def sample(self, sample_shape=()) -> torch.Tensor:
        with torch.no_grad():
            return self.rsample(sample_shape)
