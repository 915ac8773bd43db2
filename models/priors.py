"""Priors of a vector of latents by word, besides N(0, I).

A prior is a module made by an entry of the registry ``priors``; models with the option ``prior`` take its word, and in
``prior_options`` the options that it names.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor, nn
from torch.distributions import constraints
from torch.nn.functional import softplus

from ..options import check_known, check_option
from ..registry import Registry
from ._flows import FlowDistribution, zuko_flow
from ._networks import Trunk
from .families import MIN_SD

__all__ = [
    "AutoregressiveCodes",
    "AutoregressiveOneHot",
    "CodePrior",
    "FlowPrior",
    "IndependentCodes",
    "MixturePrior",
    "Prior",
    "StandardPrior",
    "UniformCodes",
    "VampPrior",
    "code_priors",
    "priors",
]

priors: Registry[Callable[..., Prior]] = Registry("prior")
code_priors: Registry[Callable[..., CodePrior]] = Registry("prior of codes")


class Prior(nn.Module):
    """Base of the priors of a vector: ``prior()`` is p(z), with no batch and with event shape ``(size,)``.

    Args:
        size: the number of dimensions of z.
        data_shape: the shape of a datum, for priors that encode pseudo-inputs.
        mirror: options of the encoder of such a prior, as the model gives them to its guides.
    """

    def forward(self) -> dist.TorchDistribution:
        raise TypeError(f"{type(self).__name__} must define forward()")


def made(registry: Registry, word: str, options: Mapping[str, Any] | None, *arguments: Any) -> Any:
    """The prior of that word; BadInput for unknown or invalid options."""
    make, given = registry[word], dict(options or {})
    taken = {n: p for n, p in inspect.signature(make).parameters.items() if p.kind is p.KEYWORD_ONLY}
    check_known(f"{registry.kind} {word!r}", given, taken)
    for name, value in given.items():
        check_option(f"{registry.kind} {word!r}: {name}", value, type(taken[name].default))
    return make(*arguments, **given)


@priors.register("standard")
class StandardPrior(Prior):
    """N(0, I)."""

    def __init__(self, size: int, data_shape: Sequence[int], mirror: Mapping[str, Any]):
        super().__init__()
        self.register_buffer("loc", torch.zeros(size), persistent=False)
        self.register_buffer("scale", torch.ones(size), persistent=False)

    def forward(self) -> dist.TorchDistribution:
        return dist.Normal(self.loc, self.scale).to_event(1)


@priors.register("mixture")
class MixturePrior(Prior):
    """A mixture of ``components`` diagonal Normals, all learned."""

    def __init__(self, size: int, data_shape: Sequence[int], mirror: Mapping[str, Any], *, components: int = 50):
        super().__init__()
        self.logits = nn.Parameter(torch.zeros(components))
        self.loc = nn.Parameter(torch.randn(components, size))
        self.raw = nn.Parameter(torch.zeros(components, size))

    def forward(self) -> dist.TorchDistribution:
        parts = dist.Normal(self.loc, softplus(self.raw) + MIN_SD).to_event(1)
        return dist.MixtureSameFamily(dist.Categorical(logits=self.logits), parts)


@priors.register("vamp")
class VampPrior(Prior):
    r"""The mean of the posteriors of ``components`` pseudo-inputs: :math:`\frac{1}{K} \sum_k q(z \mid u_k)`.

    With the guide ``vamp`` the encoder is shared with the guide; with another guide it is a separate network.
    Pseudo-inputs are learned, in [0, 1].

    Tomczak & Welling 2018, "VAE with a VampPrior", arXiv:1705.07120.
    """

    def __init__(self, size: int, data_shape: Sequence[int], mirror: Mapping[str, Any], *, components: int = 50):
        super().__init__()
        self.pseudo_inputs = nn.Parameter(torch.randn(components, *data_shape))
        self.encoder = NormalEncoder(size, data_shape, mirror)
        self.register_buffer("logits", torch.zeros(components), persistent=False)

    def forward(self) -> dist.TorchDistribution:
        return dist.MixtureSameFamily(dist.Categorical(logits=self.logits), self.encoder(self.pseudo_inputs.sigmoid()))


class NormalEncoder(nn.Module):
    """q(z | x), a diagonal Normal of a network of x: ``(B, *data_shape)`` to batch ``(B,)`` and event ``(size,)``."""

    def __init__(self, size: int, data_shape: Sequence[int], mirror: Mapping[str, Any]):
        super().__init__()
        self.trunk = Trunk(data_shape, **mirror)
        self.head = nn.Linear(self.trunk.size, 2 * size)

    def forward(self, x: Tensor) -> dist.TorchDistribution:
        loc, raw = self.head(self.trunk(x)).chunk(2, -1)
        return dist.Normal(loc, softplus(raw) + MIN_SD).to_event(1)


@priors.register("flow")
class FlowPrior(Prior):
    """A normalizing flow of N(0, I): ``transforms`` of zuko's ``flow`` (``nsf`` or ``maf``), as couplings."""

    def __init__(
        self,
        size: int,
        data_shape: Sequence[int],
        mirror: Mapping[str, Any],
        *,
        flow: str = "nsf",
        transforms: int = 3,
        hidden: int = 64,
    ):
        super().__init__()
        self.flow = zuko_flow(flow)(size, 0, transforms=transforms, hidden_features=(hidden, hidden), passes=2)

    def forward(self) -> dist.TorchDistribution:
        return FlowDistribution(self.flow())


class CodePrior(nn.Module):
    """Base of the priors of N one-hot codes of C classes: ``prior()`` has no batch and the event shape ``(N, C)``.

    Args:
        count: N, the number of codes.
        classes: C, the number of classes of each.
    """

    def forward(self) -> dist.TorchDistribution:
        raise TypeError(f"{type(self).__name__} must define forward()")


@code_priors.register("uniform")
class UniformCodes(CodePrior):
    """Uniform codes."""

    def __init__(self, count: int, classes: int):
        super().__init__()
        self.register_buffer("logits", torch.zeros(count, classes), persistent=False)

    def forward(self) -> dist.TorchDistribution:
        return dist.OneHotCategorical(logits=self.logits).to_event(1)


@code_priors.register("independent")
class IndependentCodes(CodePrior):
    """Each position with its own learned probabilities."""

    def __init__(self, count: int, classes: int):
        super().__init__()
        self.logits = nn.Parameter(torch.zeros(count, classes))

    def forward(self) -> dist.TorchDistribution:
        return dist.OneHotCategorical(logits=self.logits).to_event(1)


@code_priors.register("autoregressive")
class AutoregressiveCodes(CodePrior):
    r"""Each position given earlier ones: :math:`p(y_n \mid y_{<n}) = \mathrm{softmax}(V_n\,g(c + \sum_{m<n} W_m y_m))`.

    Larochelle & Murray 2011, "The neural autoregressive distribution estimator"; one pass scores all positions.
    """

    def __init__(self, count: int, classes: int, *, hidden: int = 64):
        super().__init__()
        self.before = nn.Parameter(torch.randn(count, classes, hidden) / max(1, count) ** 0.5)
        self.bias = nn.Parameter(torch.zeros(hidden))
        self.after = nn.Parameter(torch.randn(count, hidden, classes) / hidden**0.5)
        self.logits = nn.Parameter(torch.zeros(count, classes))

    def forward(self) -> dist.TorchDistribution:
        return AutoregressiveOneHot(self.before, self.bias, self.after, self.logits)


class AutoregressiveOneHot(dist.TorchDistribution):
    """N one-hot vectors of C classes, each given the earlier ones; event ``(N, C)``, scored in one pass."""

    arg_constraints = MappingProxyType({})
    support = constraints.independent(constraints.one_hot, 1)
    has_rsample = False

    def __init__(self, before: Tensor, bias: Tensor, after: Tensor, logits: Tensor, batch_shape: Sequence[int] = ()):
        self.before, self.bias, self.after, self.offset = before, bias, after, logits
        super().__init__(torch.Size(batch_shape), logits.shape, validate_args=False)

    def expand(self, batch_shape, _instance=None) -> AutoregressiveOneHot:
        return type(self)(self.before, self.bias, self.after, self.offset, batch_shape)

    def conditional_logits(self, value: Tensor) -> Tensor:
        """The logits of each position given those before it, ``(..., N, C)``, not normalized."""
        seen = torch.einsum("...nc,nch->...nh", value, self.before)
        state = (seen.cumsum(-2) - seen + self.bias).tanh()
        return torch.einsum("...nh,nhc->...nc", state, self.after) + self.offset

    def sample(self, sample_shape=()) -> Tensor:
        with torch.no_grad():
            value = self.offset.new_zeros(self._extended_shape(torch.Size(sample_shape)))
            seen = self.bias
            for n in range(self.event_shape[0]):
                logits = seen.tanh() @ self.after[n] + self.offset[n]
                logits = logits.expand(*value.shape[:-2], -1)
                drawn = dist.OneHotCategorical(logits=logits).sample()
                value[..., n, :] = drawn
                seen = seen + drawn @ self.before[n]
            return value

    def log_prob(self, value: Tensor) -> Tensor:
        return (self.conditional_logits(value).log_softmax(-1) * value).sum((-1, -2))

    def relaxed_log_prob(self, value: Tensor) -> Tensor:
        """The same formula at points between codes, for estimators that relax them; at codes it is log p."""
        return self.log_prob(value)
