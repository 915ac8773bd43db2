"""The families of latents: the support of a value, and the distribution from a network's output.

A family is one entry of the registry ``families``: models declare latents of it, and every guide for all families, the
contract suites of `gumbo.testing` and the model pages use the registry.
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

__all__ = ["Family", "Latent", "distribution", "families", "num_outputs"]

MIN_SD = 1e-4
MIN_CONCENTRATION = 0.05
TEMPERATURE = 2 / 3


@dataclass(frozen=True)
class Family:
    """A family of latent variables.

    Args:
        support: the support of a value, as a constraint on its tensor.
        make: ``make(latent, output, min_sd=…, temperature=…)`` is the distribution of ``latent`` from a network's
            ``output`` of shape ``(..., num_outputs)``, with batch shape ``(...)`` and event shape ``latent.shape``.
            It ignores settings that do not apply to it.
        standard: ``standard(latent, zero)`` is the distribution without parameters for a fixed prior; the tensor
            ``zero`` gives dtype and device.
        outputs: the number of network outputs per number of the value.
        relaxes: the discrete family that this one relaxes, if any.
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
    """The declaration of one latent site: its family, and the shape of one datum's value.

    Families are ``normal``, ``log-normal``, ``gamma``, ``beta``, ``von-mises`` (angles), ``bernoulli``, ``poisson``,
    ``negative-binomial``, ``binomial``, ``categorical`` (one-hot vectors), and points of the simplex, ``dirichlet`` and
    ``relaxed-categorical``. For one-hot vectors and points of the simplex the last dimension of the shape runs over
    classes.

    Args:
        family: the word of the family.
        shape: shape of one datum's value.
        local: whether each datum has a value; False: one for all data (a weight), drawn outside of the data plate.
        total_count: r of negative binomial and n of binomial latents.

    >>> Latent("categorical", (20, 10)).size
    200
    """

    family: str
    shape: tuple[int, ...]
    local: bool = True
    total_count: int = 8

    def __post_init__(self):
        if self.family not in families:
            raise BadInput(f"latent family {self.family!r} is unknown: expected one of {', '.join(families)}")
        object.__setattr__(self, "shape", tuple(self.shape))

    @property
    def size(self) -> int:
        """Numbers per datum."""
        return math.prod(self.shape)


def num_outputs(latent: Latent) -> int:
    """The number of outputs that ``distribution`` needs for one datum.

    Args:
        latent: the site: its family and shape.

    >>> num_outputs(Latent("normal", (3,))), num_outputs(Latent("bernoulli", (3,)))
    (6, 3)
    """
    return families[latent.family].outputs * latent.size


def distribution(
    latent: Latent, output: Tensor, *, min_sd: float = MIN_SD, temperature: Tensor | float = TEMPERATURE
) -> dist.TorchDistribution:
    """q of one latent from ``output`` ``(..., num_outputs)``: batch shape ``(...)``, event shape ``latent.shape``.

    A Normal, also one whose exponential is log-normal, has standard deviation ``softplus(output) + min_sd``; coins and
    one-hot vectors, binomial and negative binomial counts, and relaxations take their logits from the output; a
    Poisson its log rate; Gamma, Beta and Dirichlet take ``softplus(output)`` plus a floor as their parameters; an angle
    its location, and ``softplus(output)`` plus a floor as its concentration.

    Args:
        latent: the site: its family and shape.
        output: outputs of a network, ``(..., num_outputs(latent))``.
        min_sd: the smallest standard deviation.
        temperature: of the relaxed families; the other families ignore it.
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


def _pair(latent: Latent, output: Tensor) -> tuple[Tensor, Tensor]:
    """The two numbers that the network gives for each number of the value."""
    return output.unflatten(-1, (2, *latent.shape)).unbind(-1 - len(latent.shape))


def _positive(raw: Tensor) -> Tensor:
    """Concentrations and rates; the floor keeps draws of small concentration away from the end of the number range."""
    return softplus(raw) + MIN_CONCENTRATION


def rate(output: Tensor) -> Tensor:
    """The rate of a Poisson from its logarithm, held where float32 can draw from it.

    >>> rate(torch.tensor([0.0, 1000.0])).isfinite().all()
    tensor(True)
    """
    return output.clamp(-30.0, 15.0).exp()


def _gamma(latent: Latent, output: Tensor, **_: Any) -> dist.TorchDistribution:
    concentration, speed = _pair(latent, output)
    return dist.Gamma(_positive(concentration), _positive(speed)).to_event(len(latent.shape))


def _beta(latent: Latent, output: Tensor, **_: Any) -> dist.TorchDistribution:
    one, other = _pair(latent, output)
    return dist.Beta(_positive(one), _positive(other)).to_event(len(latent.shape))


def _von_mises(latent: Latent, output: Tensor, **_: Any) -> dist.TorchDistribution:
    loc, raw = _pair(latent, output)
    return dist.VonMises(loc, softplus(raw) + MIN_CONCENTRATION).to_event(len(latent.shape))


def _located(make: Callable[..., dist.TorchDistribution]):
    """The members of a family of a location and a scale, which is at least ``min_sd``."""

    def of(latent: Latent, output: Tensor, *, min_sd: float = MIN_SD, **_: Any) -> dist.TorchDistribution:
        loc, raw = _pair(latent, output)
        return make(loc, softplus(raw) + min_sd).to_event(len(latent.shape))

    return of


def _at(make: Callable[..., dist.TorchDistribution], first: float, second: float):
    """The member of a family of two parameters that has these everywhere."""

    def standard(latent: Latent, zero: Tensor) -> dist.TorchDistribution:
        zeros = _zeros(latent, zero)
        values = (zeros if value == 0 else torch.full_like(zeros, value) for value in (first, second))
        return make(*values).to_event(len(latent.shape))

    return standard


def _dirichlet(latent: Latent, output: Tensor, **_: Any) -> dist.TorchDistribution:
    return dist.Dirichlet(_positive(_logits(latent, output))).to_event(len(latent.shape) - 1)


def _flat_dirichlet(latent: Latent, zero: Tensor) -> dist.TorchDistribution:
    return dist.Dirichlet(_zeros(latent, zero) + 1).to_event(len(latent.shape) - 1)


def _poisson(latent: Latent, output: Tensor, **_: Any) -> dist.TorchDistribution:
    return dist.Poisson(rate(_logits(latent, output))).to_event(len(latent.shape))


def _counted(make: Callable[..., dist.TorchDistribution]):
    """Counts of a fixed ``total_count``, from logits."""

    def of(latent: Latent, output: Tensor, **_: Any) -> dist.TorchDistribution:
        logits = _logits(latent, output)
        return make(total_count=torch.full_like(logits, latent.total_count), logits=logits).to_event(len(latent.shape))

    return of


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


families.register("normal", Family(constraints.real, _located(dist.Normal), _at(dist.Normal, 0, 1), outputs=2))
families.register("categorical", Family(constraints.one_hot, _categorical, _uniform(_categorical)))
families.register(
    "relaxed-categorical",
    Family(_Simplex(), _relaxed, _uniform(_relaxed, temperature=1.0), relaxes="categorical"),
)
families.register("bernoulli", Family(constraints.boolean, _bernoulli, _uniform(_bernoulli)))
families.register(
    "log-normal", Family(constraints.positive, _located(dist.LogNormal), _at(dist.LogNormal, 0, 1), outputs=2)
)
families.register("gamma", Family(constraints.positive, _gamma, _at(dist.Gamma, 1, 1), outputs=2))
families.register("beta", Family(constraints.unit_interval, _beta, _at(dist.Beta, 1, 1), outputs=2))
families.register(
    "von-mises", Family(constraints.interval(-math.pi, math.pi), _von_mises, _at(dist.VonMises, 0, 1e-4), outputs=2)
)
families.register("dirichlet", Family(_Simplex(), _dirichlet, _flat_dirichlet))
families.register("poisson", Family(constraints.nonnegative_integer, _poisson, _uniform(_poisson)))
for _word, _made in (
    ("negative-binomial", _counted(dist.NegativeBinomial)),
    ("binomial", _counted(dist.Binomial)),
):
    families.register(_word, Family(constraints.nonnegative_integer, _made, _uniform(_made)))
