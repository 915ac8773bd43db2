"""The factor of one site: the family for its support, and the distribution from a network's output."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pyro.distributions as dist
import torch
from pyro.distributions import transforms as T
from torch import Tensor
from torch.distributions import biject_to, constraints
from torch.nn.functional import softplus

from ..errors import BadInput
from ._structure import Seen, bare, whole

MOST_CLASSES = 256  # the most values of a bounded integer for a categorical; beyond, it is a Binomial
MIN_SCALE = 1e-4  # in float32, log q of a draw with a large mean and a smaller scale is rounding error
INITIAL_SCALE = 0.1
NO_SHAPE = torch.Size()
FAR = 30.0  # unconstrained values are clamped to this as network inputs


class Integers(dist.Categorical):
    """A categorical distribution over integers from ``lower`` on, with the dtype of the model's site."""

    arg_constraints = {"logits": constraints.real_vector}

    def __init__(self, logits: Tensor, lower: int = 0, dtype: torch.dtype = torch.long, validate_args=None):
        self.lower, self.dtype = lower, dtype
        super().__init__(logits=logits, validate_args=validate_args)

    def expand(self, batch_shape, _instance=None):
        new = self._get_checked_instance(Integers, _instance)
        new.lower, new.dtype = self.lower, self.dtype
        return super().expand(batch_shape, new)

    @constraints.dependent_property(is_discrete=True, event_dim=0)
    def support(self):
        return constraints.integer_interval(self.lower, self.lower + self._num_events - 1)

    def sample(self, sample_shape=NO_SHAPE):
        return (super().sample(sample_shape) + self.lower).to(self.dtype)

    def log_prob(self, value: Tensor) -> Tensor:
        if self._validate_args:
            self._validate_sample(value)
        value = (value - self.lower).long().unsqueeze(-1)
        value, log_pmf = torch.broadcast_tensors(value, self.logits)
        return log_pmf.gather(-1, value[..., :1]).squeeze(-1)

    def enumerate_support(self, expand: bool = True) -> Tensor:
        return (super().enumerate_support(expand) + self.lower).to(self.dtype)

    @property
    def mean(self) -> Tensor:
        values = torch.arange(self._num_events, device=self.logits.device) + self.lower
        return (self.probs * values).sum(-1)

    @property
    def variance(self) -> Tensor:
        values = torch.arange(self._num_events, device=self.logits.device) + self.lower
        return (self.probs * values.square()).sum(-1) - self.mean.square()


@dataclass(frozen=True)
class Family:
    """The parts of one site's factor.

    Attributes:
        kind: the word in the table.
        size: number of unconstrained numbers, or of logits, of a value.
        outputs: number of inputs of ``make`` for one element.
        joint: whether the elements of an event depend on each other.
        shape: of the unconstrained value of one event.
        features: number of features of a value for networks that depend on it.
        values: number of values of one element; 0 if it is not finite.
    """

    kind: str
    size: int
    outputs: int
    joint: bool
    shape: tuple[int, ...]
    features: int
    values: int = 0
    lower: int = 0
    dtype: torch.dtype = torch.float32

    @property
    def continuous(self) -> bool:
        return self.kind.startswith(("Normal", "joint Normal"))

    def make(self, output: Tensor, seen: Seen) -> dist.TorchDistribution:
        """The distribution of one site from numbers ``(..., outputs)``, on the site's current support."""
        rank = len(seen.event_shape)
        if self.continuous:
            support = whole(seen.support, rank)
            if self.joint:
                return transformed(self.base(output), self.shape, support)
            loc, scale = (part.reshape((*part.shape[:-1], *self.shape)) for part in self._moments(output))
            return transformed(dist.Normal(loc, scale).to_event(len(self.shape)), self.shape, support)
        logits = output.unflatten(-1, (*seen.event_shape, -1)) if self.kind != "one-hot" else output
        if self.kind == "one-hot":
            return dist.OneHotCategorical(logits=output.unflatten(-1, seen.event_shape)).to_event(rank - 1)
        if self.kind == "Bernoulli":
            return dist.Bernoulli(logits=logits[..., 0]).to_event(rank)
        if self.kind == "categorical over integers":
            return Integers(self._allowed(logits, seen), self.lower, self.dtype).to_event(rank)
        if self.kind == "Binomial":
            bounds = bare(seen.support)
            return dist.Binomial(bounds.upper_bound, logits=logits[..., 0]).to_event(rank)
        count = softplus(logits[..., 0]) + MIN_SCALE
        logits = logits[..., 1] - count.log()
        # Torch's own class where it serves: estimators of counts know its law.
        counts = _Counts(self.lower, count, logits) if self.lower else dist.NegativeBinomial(count, logits=logits)
        return counts.to_event(rank)

    def base(self, output: Tensor) -> dist.TorchDistribution:
        """A Normal over unconstrained vectors ``(..., size)`` with a covariance."""
        loc, scale = self._moments(output)
        return dist.MultivariateNormal(loc, scale_tril=lower_triangular(scale, output[..., 2 * self.size :]))

    def _moments(self, output: Tensor) -> tuple[Tensor, Tensor]:
        return output[..., : self.size], softplus(output[..., self.size : 2 * self.size]) + MIN_SCALE

    def _allowed(self, logits: Tensor, seen: Seen) -> Tensor:
        upper = torch.as_tensor(bare(seen.support).upper_bound, device=logits.device)
        if int(upper.max()) - self.lower >= self.values:
            raise BadInput(
                f"site {seen.name!r} may be as large as {int(upper.max())}, and the guide was built for"
                f" {self.lower + self.values - 1}; build it with data of that size"
            )
        if upper.dim() == 0 and int(upper) - self.lower == self.values - 1:
            return logits
        steps = torch.arange(self.values, device=logits.device) + self.lower
        return logits.masked_fill(steps > upper.unsqueeze(-1), -torch.inf)

    def read(self, value: Tensor, seen: Seen) -> Tensor:
        """A value as features ``(*batch, features)`` for a network."""
        rank = len(seen.event_shape)
        if self.continuous:
            transform = biject_to(whole(seen.support, rank))
            value = transform.inv(value)
            rank = len(self.shape)
        elif self.kind == "categorical over integers":
            value = torch.nn.functional.one_hot((value - self.lower).long(), self.values).to(torch.get_default_dtype())
            rank += 1
        elif self.kind in ("Binomial", "negative binomial"):
            value = torch.log1p(value - self.lower)
        value = value.reshape(*value.shape[: value.dim() - rank], -1)
        return torch.nan_to_num(value, posinf=FAR, neginf=-FAR).clamp(-FAR, FAR) if self.continuous else value


class _Counts(dist.NegativeBinomial):
    """A negative binomial with smallest value ``lower``."""

    def __init__(self, lower: int, total_count: Tensor, logits: Tensor):
        self.lower = lower
        super().__init__(total_count, logits=logits)

    def expand(self, batch_shape, _instance=None):
        new = self._get_checked_instance(_Counts, _instance)
        new.lower = self.lower
        return super().expand(batch_shape, new)

    @constraints.dependent_property(is_discrete=True, event_dim=0)
    def support(self):
        return type(constraints.nonnegative_integer)(self.lower)

    def sample(self, sample_shape=NO_SHAPE):
        return super().sample(sample_shape) + self.lower

    def log_prob(self, value: Tensor) -> Tensor:
        if self._validate_args:
            self._validate_sample(value)
        return self._from_zero().log_prob(value - self.lower)

    @property
    def mean(self) -> Tensor:
        return self._from_zero().mean + self.lower

    @property
    def variance(self) -> Tensor:
        return self._from_zero().variance

    def _from_zero(self) -> dist.NegativeBinomial:
        return dist.NegativeBinomial(self.total_count, logits=self.logits, validate_args=False)


def lower_triangular(scale: Tensor, square: Tensor) -> Tensor:
    """The Cholesky factor with diagonal ``scale (..., n)`` and ``square`` below it, each row scaled by its diagonal."""
    size = scale.shape[-1]
    below = square.unflatten(-1, (size, size)).tril(-1)
    return scale.unsqueeze(-1) * (below + torch.eye(size, dtype=scale.dtype, device=scale.device))


def transformed(base: dist.TorchDistribution, shape: Sequence[int], support: Any) -> dist.TorchDistribution:
    """Unconstrained draws of ``base``, reshaped to events of ``shape`` and transformed to the support."""
    parts: list[Any] = []
    if tuple(shape) != tuple(base.event_shape):
        parts.append(T.ReshapeTransform(base.event_shape, torch.Size(shape)))
    if not isinstance(bare(support), type(constraints.real)):
        parts.append(biject_to(support))
    return dist.TransformedDistribution(base, parts) if parts else base


def family_of(seen: Seen, joint: bool, most_joint: int) -> Family:
    """The family for a site's support; raises BadInput if there is none."""
    support, rank, shape = bare(seen.support), len(seen.event_shape), tuple(seen.event_shape)
    count = math.prod(shape)
    if support is None:
        raise BadInput(f"amortize: site {seen.name!r} ({type(seen.fn).__name__}) does not declare its support")
    kind = type(support).__name__
    if isinstance(support, type(constraints.one_hot)):
        return Family("one-hot", count, count, False, shape, count, values=shape[-1] if rank == 1 else 0)
    if isinstance(support, type(constraints.boolean)):
        return Family("Bernoulli", count, count, False, shape, count, values=2 if not rank else 0)
    if isinstance(support, constraints.integer_interval):
        lower, upper = (torch.as_tensor(bound) for bound in (support.lower_bound, support.upper_bound))
        if int(lower.min()) == int(lower.max()):
            values = int(upper.max()) - int(lower.min()) + 1
            if values <= MOST_CLASSES:
                size = count * values
                listed = values if not rank and upper.dim() == 0 else 0
                return Family(
                    "categorical over integers",
                    size,
                    size,
                    False,
                    shape,
                    size,
                    listed or values,
                    int(lower.min()),
                    seen.value.dtype,
                )
            if int(lower.min()) == 0:
                return Family("Binomial", count, count, False, shape, count)
        raise BadInput(
            f"amortize: site {seen.name!r} takes integers from {int(lower.min())} to {int(upper.max())}, too many to"
            f" list (at most {MOST_CLASSES}); start them at 0"
        )
    if isinstance(support, type(constraints.nonnegative_integer)):
        lower = int(torch.as_tensor(support.lower_bound).max())
        return Family("negative binomial", count, 2 * count, False, shape, count, lower=lower)
    if getattr(support, "is_discrete", False):
        raise BadInput(
            f"amortize: site {seen.name!r} ({type(seen.fn).__name__}) has support {kind}, which no family here serves;"
            " write it with one-hot, integer or Bernoulli sites"
        )
    if any(getattr(bound, "requires_grad", False) for bound in vars(support).values()):
        raise BadInput(
            f"amortize: the bounds of site {seen.name!r} have parameters, and its support would move; fix them"
        )
    try:
        transform = biject_to(whole(seen.support, rank))
        inner = tuple(transform.inverse_shape(seen.batch_shape + seen.event_shape))[len(seen.batch_shape) :]
    except NotImplementedError:  # torch knows no transform to this support
        raise BadInput(
            f"amortize: site {seen.name!r} ({type(seen.fn).__name__}) has support {kind}, to which no transform from"
            " the reals is known; register one with torch.distributions.biject_to"
        ) from None
    size = math.prod(inner)
    if not size:
        raise BadInput(
            f"amortize: latent site {seen.name!r} ({type(seen.fn).__name__}) of event shape {list(shape)} has no free"
            " number: its value is certain; pass that value in the model without a site"
        )
    joint = joint and 1 < size <= most_joint
    outputs = 2 * size + (size * size if joint else 0)
    name = {"_Real": "real", "_GreaterThan": "positive", "_Simplex": "simplex", "_Interval": "interval"}.get(kind, kind)
    word = "joint Normal" if joint else "Normal"
    return Family(f"{word}, {name.strip('_')}", size, outputs, joint, inner, size)
