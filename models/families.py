"""The families that a latent can have: where its values lie, and the distribution that a network's output makes.

A family is one entry of the registry ``families``: models declare latents of it, and every guide that serves all
families, the contracts of `gumbo.testing` and the model pages take it from there.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import constraints
from torch.nn.functional import softplus

from ..errors import BadInput
from ..registry import Registry
from ._relaxed import RelaxedOneHot

MIN_SD = 1e-4
TEMPERATURE = 2 / 3


@dataclass(frozen=True)
class Family:
    """A family of latent variables.

    Args:
        support: where a value lies, as a constraint on its tensor.
        make: ``make(latent, output, min_sd=…, temperature=…)`` is the distribution of ``latent`` from a network's
            ``output`` of shape ``(..., num_outputs)``, with batch shape ``(...)`` and event shape ``latent.shape``.
            It ignores the settings that mean nothing to it.
        standard: ``standard(latent, zero)`` is the distribution without parameters that serves as a fixed prior; the
            tensor ``zero`` brings dtype and device.
        outputs: how many numbers ``make`` takes for each number of the value.
        relaxes: the discrete family that this one is a relaxation of, if any.
    """

    support: constraints.Constraint
    make: Callable[..., dist.TorchDistribution]
    standard: Callable[[Latent, Tensor], dist.TorchDistribution]
    outputs: int = 1
    relaxes: str | None = None


families: Registry[Family] = Registry(
    "latent family", lambda found: "" if isinstance(found, Family) else "a gumbo.models.families.Family"
)


@dataclass(frozen=True)
class Latent:
    """What a model says of one latent site: its family, and the shape of one datum's value.

    ``family`` is a word of ``families``: ``normal``, ``categorical`` (one-hot vectors), ``relaxed-categorical`` (points
    of the simplex), ``bernoulli``. For the two categorical families the last dimension of ``shape`` runs over classes.
    A latent that is not ``local`` is global: one value for all data (a weight), drawn outside of the data plate.

    >>> Latent("categorical", (20, 10)).size
    200
    """

    family: str
    shape: tuple[int, ...]
    local: bool = True

    def __post_init__(self):
        if self.family not in families:
            raise BadInput(f"latent family {self.family!r} is unknown: expected one of {', '.join(families)}")
        object.__setattr__(self, "shape", tuple(self.shape))

    @property
    def size(self) -> int:
        """Numbers per datum."""
        return math.prod(self.shape)


def num_outputs(latent: Latent) -> int:
    """How many numbers ``distribution`` needs for one datum.

    >>> num_outputs(Latent("normal", (3,))), num_outputs(Latent("bernoulli", (3,)))
    (6, 3)
    """
    return families[latent.family].outputs * latent.size


def distribution(
    latent: Latent, output: Tensor, *, min_sd: float = MIN_SD, temperature: Tensor | float = TEMPERATURE
) -> dist.TorchDistribution:
    """q of one latent from ``output`` ``(..., num_outputs)``: batch shape ``(...)``, event shape ``latent.shape``.

    A Normal has standard deviation ``softplus(output) + min_sd``; the discrete families and their relaxations take
    their logits from the output.
    """
    return families[latent.family].make(latent, output, min_sd=min_sd, temperature=temperature)


class _Simplex(constraints.Constraint):
    """The simplex to the rounding of float32 sums over many classes, where torch asks for 1e-6."""

    event_dim = 1

    def check(self, value: Tensor) -> Tensor:
        return (value >= 0).all(-1) & ((value.sum(-1) - 1).abs() < 1e-5)


def _logits(latent: Latent, output: Tensor) -> Tensor:
    return output.unflatten(-1, latent.shape)


def _zeros(latent: Latent, zero: Tensor) -> Tensor:
    return zero.expand(latent.shape)


def _normal(latent: Latent, output: Tensor, *, min_sd: float = MIN_SD, **_: Any) -> dist.TorchDistribution:
    rank = len(latent.shape)
    loc, raw = output.unflatten(-1, (2, *latent.shape)).unbind(-1 - rank)
    return dist.Normal(loc, softplus(raw) + min_sd).to_event(rank)


def _standard_normal(latent: Latent, zero: Tensor) -> dist.TorchDistribution:
    zeros = _zeros(latent, zero)
    return dist.Normal(zeros, torch.ones_like(zeros)).to_event(len(latent.shape))


def _bernoulli(latent: Latent, output: Tensor, **_: Any) -> dist.TorchDistribution:
    return dist.Bernoulli(logits=_logits(latent, output)).to_event(len(latent.shape))


def _categorical(latent: Latent, output: Tensor, **_: Any) -> dist.TorchDistribution:
    return dist.OneHotCategorical(logits=_logits(latent, output)).to_event(len(latent.shape) - 1)


def _relaxed(
    latent: Latent, output: Tensor, *, temperature: Tensor | float = TEMPERATURE, **_: Any
) -> dist.TorchDistribution:
    temperature = torch.as_tensor(temperature, dtype=output.dtype, device=output.device)
    return RelaxedOneHot(temperature, logits=_logits(latent, output)).to_event(len(latent.shape) - 1)


def _uniform(make: Callable[..., dist.TorchDistribution], **settings: Any):
    """The member of a family of logits that has all of them zero."""

    def standard(latent: Latent, zero: Tensor) -> dist.TorchDistribution:
        return make(latent, zero.expand(latent.size), **settings)

    return standard


families.register("normal", Family(constraints.real, _normal, _standard_normal, outputs=2))
families.register("categorical", Family(constraints.one_hot, _categorical, _uniform(_categorical)))
families.register(
    "relaxed-categorical",
    Family(_Simplex(), _relaxed, _uniform(_relaxed, temperature=1.0), relaxes="categorical"),
)
families.register("bernoulli", Family(constraints.boolean, _bernoulli, _uniform(_bernoulli)))
