"""Normalizing flows as distributions, for guides and for priors."""

from __future__ import annotations

import pyro
import torch
from pyro.contrib.zuko import ZukoToPyro
from torch.distributions import constraints

from ..errors import UnknownName

FLOWS = ("maf", "nsf")


class FlowDistribution(ZukoToPyro):
    """A flow as a Pyro distribution that computes the log-probability of every value from the value.

    The parent caches the log-probability of each draw, computed during the draw. Estimators that need the derivative
    of log q at a fixed value would get the cached one, so it is not stored here.
    """

    support = constraints.real_vector

    def rsample(self, sample_shape=()):
        return self.dist.rsample(torch.Size(sample_shape))

    def sample(self, sample_shape=()):
        with torch.no_grad():
            return self.rsample(sample_shape)

    def __call__(self, sample_shape=()):
        return self.rsample(sample_shape)

    def log_prob(self, value: torch.Tensor) -> torch.Tensor:
        return self.dist.log_prob(value)

    def expand(self, batch_shape, _instance=None):
        return type(self)(self.dist.expand(torch.Size(batch_shape)))


def zuko_flow(word: str):
    """The class of zuko's flow with that name; UnknownName for another.

    Imported late because the import is slow, and in a context because it switches validation off globally.
    """
    if word not in FLOWS:
        raise UnknownName("flow", word, FLOWS)
    validates = pyro.settings.get("validate_distributions_torch")
    with pyro.settings.context(validate_distributions_torch=validates):
        import zuko.flows
    return getattr(zuko.flows, word.upper())
