"""Likelihoods p(x | z) by word: the distribution of data from a decoder's output.

A likelihood is one entry of the registry ``likelihoods``; models with the option ``likelihood`` take its word and, in
``likelihood_options``, the options that it names.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor, nn
from torch.distributions import constraints
from torch.nn.functional import logsigmoid, softplus

from ..errors import BadInput
from ..options import check_known, check_option
from ..registry import Registry
from .families import rate

__all__ = ["DiscretizedLogistic", "Likelihood", "MultinomialCounts", "Tokens", "likelihoods", "negative_binomial"]

MIN_DISPERSION = 1e-3


@dataclass(frozen=True)
class Likelihood:
    """A likelihood of data.

    Args:
        make: ``make(*parts, **options)`` is the distribution of x, with event shape ``shape``, from ``parts``: tensors
            ``(..., *shape)``, one for each number that the decoder gives of a number of x.
        outputs: how many parts, a number or a function of the options.
        options: the options and their defaults.
        wants: ``wants(x, **options)`` says, in a few words, what the data must be, or nothing where they are that.
    """

    make: Callable[..., dist.TorchDistribution]
    wants: Callable[..., str]
    outputs: int | Callable[..., int] = 1
    options: Mapping[str, Any] = field(default_factory=dict)


likelihoods: Registry[Likelihood] = Registry(
    "likelihood", lambda found: "" if isinstance(found, Likelihood) else "a gumbo.models.likelihoods.Likelihood"
)


class Observation(nn.Module):
    """p(x | output) for a decoder's output: the likelihood of that word over data of that shape, with its options.

    ``outputs`` is the number of outputs that it takes for each number of x. Raises UnknownName for another word and
    BadInput for options that the likelihood does not have.

    >>> observation = Observation("zero-inflated-poisson", (1, 8, 8))
    >>> observation(torch.zeros(5, observation.outputs * 64)).sample().shape
    torch.Size([5, 1, 8, 8])
    """

    def __init__(self, word: str, shape: Sequence[int], options: Mapping[str, Any] | None = None):
        super().__init__()
        self.word, self.shape = word, torch.Size(shape)
        self.family = likelihoods[word]
        given = dict(options or {})
        check_known(f"likelihood {word!r}", given, self.family.options)
        for name, value in given.items():
            kind = type(self.family.options[name])
            check_option(f"likelihood {word!r}: {name}", value, float if kind is float else int)
        self.options = {**self.family.options, **given}
        outputs = self.family.outputs
        self.outputs = outputs if isinstance(outputs, int) else outputs(**self.options)

    def forward(self, output: Tensor) -> dist.TorchDistribution:
        """p(x | output) from ``(..., outputs * size)``, batch shape ``(...)`` and event shape ``shape``."""
        rank = len(self.shape)
        if self.outputs == 1:
            return self.family.make(output.unflatten(-1, self.shape), rank=rank, **self.options)
        parts = output.unflatten(-1, (self.outputs, *self.shape)).unbind(-1 - rank)
        return self.family.make(*parts, rank=rank, **self.options)

    def check(self, x: Tensor, who: str) -> None:
        """Raise BadInput for data that the likelihood gives no probability to."""
        if found := self.family.wants(x, **self.options):
            raise BadInput(f"{who}: a {self.word} likelihood needs {found}")


def _counts(x: Tensor, **_: Any) -> str:
    return "" if ((x >= 0) & (x == x.floor())).all() else "x of counts: 0, 1, 2, ..."


def _bits(x: Tensor, **_: Any) -> str:
    return (
        ""
        if ((x == 0) | (x == 1)).all()
        else ('x of zeros and ones; load the data with binarize="static" or "dynamic"')
    )


def _tokens(x: Tensor, *, num_categories: int, **_: Any) -> str:
    return (
        ""
        if ((x >= 0) & (x < num_categories) & (x == x.floor())).all()
        else (f"x of whole numbers 0 to {num_categories - 1}: set num_categories in likelihood_options")
    )


def _anything(x: Tensor, **_: Any) -> str:
    return ""


def _bernoulli(logits: Tensor, *, rank: int) -> dist.TorchDistribution:
    return dist.Bernoulli(logits=logits).to_event(rank)


def _normal(loc: Tensor, *, rank: int, sd: float) -> dist.TorchDistribution:
    return dist.Normal(loc, sd).to_event(rank)


def _heteroscedastic(loc: Tensor, raw: Tensor, *, rank: int, min_sd: float) -> dist.TorchDistribution:
    return dist.Normal(loc, softplus(raw) + min_sd).to_event(rank)


def _poisson(log_rate: Tensor, *, rank: int) -> dist.TorchDistribution:
    return dist.Poisson(rate(log_rate)).to_event(rank)


def _zero_inflated_poisson(log_rate: Tensor, gate: Tensor, *, rank: int) -> dist.TorchDistribution:
    return dist.ZeroInflatedPoisson(rate(log_rate), gate_logits=gate).to_event(rank)


def negative_binomial(mean: Tensor, total_count: Tensor, gate: Tensor | None = None) -> dist.TorchDistribution:
    """Counts of that mean and of variance mean + mean² / total_count, with more zeros where there are gate logits.

    >>> counts = negative_binomial(torch.tensor(3.0), torch.tensor(2.0))
    >>> counts.mean, counts.variance
    (tensor(3.), tensor(7.5000))
    """
    logits = mean.log() - total_count.log()
    if gate is None:
        return dist.NegativeBinomial(total_count, logits=logits)
    return dist.ZeroInflatedNegativeBinomial(total_count, logits=logits, gate_logits=gate)


def _negative_binomial(log_mean: Tensor, raw: Tensor, *gate: Tensor, rank: int) -> dist.TorchDistribution:
    return negative_binomial(rate(log_mean), softplus(raw) + MIN_DISPERSION, *gate).to_event(rank)


class MultinomialCounts(dist.TorchDistribution):
    """Counts over all numbers of an event of any shape, from logits ``(..., *shape)``; their sum may differ by row.

    What is scored has its own total; what is drawn has ``total_count``, a number or one number for each row.

    Args:
        logits: log-probabilities up to a constant, ``(..., *shape)``.
        rank: the number of dimensions of ``shape``.
        total_count: the total of a draw.
        validate_args: whether torch checks parameters and values; None takes its global setting.

    >>> counts = MultinomialCounts(torch.zeros(5, 2, 3), rank=2, total_count=7)
    >>> counts.sample().sum((-1, -2)).unique(), counts.event_shape
    (tensor([7.]), torch.Size([2, 3]))
    >>> given = torch.tensor([[4.0, 0.0], [0.0, 2.0]])
    >>> MultinomialCounts(torch.zeros(2, 2)).with_totals(given).sample().sum(-1)
    tensor([4., 2.])
    """

    arg_constraints = MappingProxyType({"logits": constraints.independent(constraints.real, 1)})
    has_rsample = False

    def __init__(
        self, logits: Tensor, rank: int = 1, total_count: int | Tensor = 100, validate_args: bool | None = None
    ):
        self.logits, self.total_count, self.rank = logits, total_count, rank
        cut = logits.dim() - rank
        super().__init__(logits.shape[:cut], logits.shape[cut:], validate_args=validate_args)

    @property
    def support(self) -> constraints.Constraint:
        return constraints.independent(constraints.nonnegative_integer, self.rank)

    @property
    def probs(self) -> Tensor:
        return self.logits.flatten(-self.rank).softmax(-1).unflatten(-1, self.event_shape)

    @property
    def mean(self) -> Tensor:
        total = torch.as_tensor(self.total_count, device=self.logits.device)
        return total.reshape(total.shape + (1,) * self.rank) * self.probs

    def with_totals(self, counts: Tensor | None) -> MultinomialCounts:
        """The same law, whose draws have the totals of these counts, ``(..., *shape)``; unchanged for None."""
        found = copy.copy(self)
        if counts is not None:
            found.total_count = counts.flatten(-self.rank).sum(-1)
        return found

    def expand(self, batch_shape, _instance=None) -> MultinomialCounts:
        logits = self.logits.expand(torch.Size(batch_shape) + self.event_shape)
        return type(self)(logits, self.rank, self.total_count, validate_args=False)

    def sample(self, sample_shape=()) -> Tensor:
        with torch.no_grad():
            logits = self.logits.flatten(-self.rank)
            total = torch.as_tensor(self.total_count, dtype=logits.dtype, device=logits.device)
            words = dist.Categorical(logits=logits, validate_args=False)
            drawn = words.sample((max(1, int(total.max())), *sample_shape)).movedim(0, -1)
            counts = total.new_zeros((*drawn.shape[:-1], logits.shape[-1]))
            read = torch.arange(drawn.shape[-1], device=total.device) < total.unsqueeze(-1)
            counts.scatter_add_(-1, drawn, read.to(counts.dtype).expand_as(drawn))
            return counts.unflatten(-1, self.event_shape)

    def log_prob(self, value: Tensor) -> Tensor:
        if self._validate_args:
            self._validate_sample(value)
        counts = value.flatten(-self.rank)
        log_probs = self.logits.flatten(-self.rank).log_softmax(-1)
        ways = torch.lgamma(counts.sum(-1) + 1) - torch.lgamma(counts + 1).sum(-1)
        # An impossible number that does not occur contributes zero: 0 · log 0 = 0.
        return ways + torch.where(counts == 0, 0.0, counts * log_probs).sum(-1)


def _multinomial(logits: Tensor, *, rank: int, total_count: int) -> dist.TorchDistribution:
    return MultinomialCounts(logits, rank, total_count)


class Tokens(dist.Categorical):
    """A categorical over 0, 1, ... whose draws are numbers of the logits' dtype, as a batch of data is.

    Args:
        probs: the probabilities ``(..., C)``, in place of ``logits``.
        logits: log-probabilities up to a constant, ``(..., C)``.
        validate_args: whether torch checks parameters and values; None takes its global setting.

    >>> Tokens(logits=torch.zeros(2, 5)).sample().dtype
    torch.float32
    """

    def sample(self, sample_shape=()) -> Tensor:
        return super().sample(sample_shape).to(self.logits.dtype)


def _categorical(*logits: Tensor, rank: int, num_categories: int) -> dist.TorchDistribution:
    return Tokens(logits=torch.stack(logits, -1)).to_event(rank)


class DiscretizedLogistic(dist.TorchDistribution):
    """A logistic variable seen as one of ``levels`` equally spaced numbers of [0, 1], the outer ones with its tails.

    Salimans et al. 2017, "PixelCNN++", arXiv:1701.05517.

    Args:
        loc: the location of the logistic variable, of any shape; 0 to 1 is the range of the data.
        scale: its scale, positive, in the same unit.
        levels: the number of values, 0 and 1 included.
        validate_args: whether torch checks parameters and values; None takes its global setting.

    Raises:
        BadInput: fewer than two levels.

    >>> pixel = DiscretizedLogistic(torch.tensor(0.4), torch.tensor(0.1), levels=5)
    >>> round(pixel.log_prob(torch.linspace(0, 1, 5)).exp().sum().item(), 4)
    1.0
    """

    arg_constraints = MappingProxyType({"loc": constraints.real, "scale": constraints.positive})
    support = constraints.unit_interval
    has_rsample = False

    def __init__(self, loc: Tensor, scale: Tensor, levels: int = 256, validate_args: bool | None = None):
        if levels < 2:
            raise BadInput(f"a discretized logistic has {levels} level: expected at least 0 and 1")
        self.loc, self.scale = torch.broadcast_tensors(loc, scale)
        self.levels = levels
        super().__init__(self.loc.shape, validate_args=validate_args)

    @property
    def mean(self) -> Tensor:
        return self.loc.clamp(0.0, 1.0)

    def expand(self, batch_shape, _instance=None) -> DiscretizedLogistic:
        shape = torch.Size(batch_shape)
        return type(self)(self.loc.expand(shape), self.scale.expand(shape), self.levels, validate_args=False)

    def sample(self, sample_shape=()) -> Tensor:
        with torch.no_grad():
            shape = self._extended_shape(torch.Size(sample_shape))
            uniform = torch.rand(shape, dtype=self.loc.dtype, device=self.loc.device)
            drawn = self.loc + self.scale * torch.special.logit(uniform, eps=torch.finfo(self.loc.dtype).eps)
            steps = self.levels - 1
            return (drawn.clamp(0.0, 1.0) * steps).round() / steps

    def log_prob(self, value: Tensor) -> Tensor:
        if self._validate_args:
            self._validate_sample(value)
        half = 0.5 / (self.levels - 1)
        upper, lower = (value + half - self.loc) / self.scale, (value - half - self.loc) / self.scale
        # log(σ(u) − σ(l)) = log σ(u) + log σ(−l) + log(1 − e^(l − u)), which no rounding cancels.
        between = logsigmoid(upper) + logsigmoid(-lower) + torch.log(-torch.expm1(lower - upper))
        inner = torch.where(value > 1 - half, logsigmoid(-lower), between)
        return torch.where(value < half, logsigmoid(upper), inner)


def _discretized_logistic(loc: Tensor, raw: Tensor, *, rank: int, levels: int) -> dist.TorchDistribution:
    scale = softplus(raw) / 10 + 0.1 / levels
    return DiscretizedLogistic(0.5 + loc, scale, levels).to_event(rank)


def _on_levels(x: Tensor, *, levels: int) -> str:
    steps = levels - 1
    near = ((x * steps) - (x * steps).round()).abs() < 1e-3
    return "" if ((x >= 0) & (x <= 1) & near).all() else f"x of the levels 0, 1/{steps}, ... 1: set levels"


likelihoods.register("bernoulli", Likelihood(_bernoulli, _bits))
likelihoods.register("normal", Likelihood(_normal, _anything, options={"sd": 1.0}))
likelihoods.register(
    "heteroscedastic-normal", Likelihood(_heteroscedastic, _anything, outputs=2, options={"min_sd": 1e-3})
)
likelihoods.register("poisson", Likelihood(_poisson, _counts))
likelihoods.register("negative-binomial", Likelihood(_negative_binomial, _counts, outputs=2))
likelihoods.register("zero-inflated-poisson", Likelihood(_zero_inflated_poisson, _counts, outputs=2))
likelihoods.register("zero-inflated-negative-binomial", Likelihood(_negative_binomial, _counts, outputs=3))
likelihoods.register("multinomial", Likelihood(_multinomial, _counts, options={"total_count": 100}))
likelihoods.register(
    "categorical",
    Likelihood(_categorical, _tokens, outputs=lambda num_categories: num_categories, options={"num_categories": 10}),
)
likelihoods.register(
    "discretized-logistic", Likelihood(_discretized_logistic, _on_levels, outputs=2, options={"levels": 256})
)
