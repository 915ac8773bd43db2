"""Normal chains: a latent with many time steps as one site, drawn step by step and scored at all steps at once."""

from __future__ import annotations

from collections.abc import Callable
from types import MappingProxyType

import pyro.distributions as dist
import torch
from torch import Tensor, nn
from torch.distributions import constraints
from torch.nn.functional import softplus

from ._networks import mlp

# ``(previous (..., Z) at one step or (..., T, Z) at all steps, the step or a slice) -> (loc, scale)``
Step = Callable[[Tensor, "int | slice"], tuple[Tensor, Tensor]]


class NormalChain(dist.TorchDistribution):
    r"""z_1 ... z_T with :math:`z_t \mid z_{t-1} \sim N(\mu_t(z_{t-1}), \mathrm{diag}\,\sigma_t(z_{t-1})^2)`.

    Steps with ``mask`` zero are N(0, I), independent of the others, so that a guide with the same rule agrees with the
    model there exactly, and any other guide still gives a valid bound. With ``flow`` a step's Normal is transformed by
    that invertible map.

    Args:
        step: mean and standard deviation of one step, or of a slice of steps, given the values before.
        start: the value before the first step, ``(Z,)``.
        mask: ones for the valid steps, ``(B, T)``.
        flow: a map with ``forward`` and ``inverse``, each of which returns values and log abs det of the forward map.

    Shapes: batch ``(B,)``, event ``(T, Z)``.
    """

    arg_constraints = MappingProxyType({})
    support = constraints.independent(constraints.real, 2)
    has_rsample = True

    def __init__(
        self,
        step: Step,
        start: Tensor,
        mask: Tensor,
        flow: Couplings | None = None,
        batch_shape: torch.Size | None = None,
    ):
        self.step, self.start, self.mask, self.flow = step, start, mask, flow
        rows = mask.shape[:-1] if batch_shape is None else batch_shape
        super().__init__(rows, torch.Size((mask.shape[-1], start.shape[-1])), validate_args=False)

    def expand(self, batch_shape, _instance=None) -> NormalChain:
        return type(self)(self.step, self.start, self.mask, self.flow, torch.Size(batch_shape))

    def rsample(self, sample_shape=()) -> Tensor:
        shape = self._extended_shape(torch.Size(sample_shape))
        noise = torch.randn(shape, dtype=self.start.dtype, device=self.start.device)
        last = self.start.expand(*shape[:-2], -1)
        drawn = []
        for t, part in enumerate(noise.unbind(-2)):
            counts = self.mask[..., t].unsqueeze(-1) > 0
            loc, scale = self.step(last, t)
            value = loc + scale * part
            if self.flow is not None:
                value = self.flow.forward(value)[0]
            last = torch.where(counts, value, part)
            drawn.append(last)
        return torch.stack(drawn, -2)

    def sample(self, sample_shape=()) -> Tensor:
        with torch.no_grad():
            return self.rsample(sample_shape)

    def log_prob(self, value: Tensor) -> Tensor:
        counts = self.mask.unsqueeze(-1) > 0
        first = self.start.expand(*value.shape[:-2], 1, -1)
        loc, scale = self.step(torch.cat([first, value[..., :-1, :]], -2), slice(None))
        base, stretch = (value, None) if self.flow is None else self.flow.inverse(value)
        base = torch.where(counts, base, value)
        loc, scale = torch.where(counts, loc, torch.zeros_like(loc)), torch.where(counts, scale, torch.ones_like(scale))
        total = dist.Normal(loc, scale, validate_args=False).log_prob(base).sum((-1, -2))
        if stretch is None:
            return total
        return total - torch.where(counts.squeeze(-1), stretch, torch.zeros_like(stretch)).sum(-1)


class Couplings(nn.Module):
    """An invertible map of vectors: affine couplings, each transforms one half by a network of the other half.

    >>> couplings = Couplings(4, 2, 8)
    >>> z = torch.randn(3, 4)
    >>> moved, stretch = couplings.forward(z)
    >>> back, same = couplings.inverse(moved)
    >>> bool(torch.allclose(back, z, atol=1e-5)), bool(torch.allclose(stretch, same, atol=1e-5))
    (True, True)
    """

    def __init__(self, size: int, count: int, hidden: int):
        super().__init__()
        self.cut = size // 2
        sizes = [
            (self.cut, size - self.cut) if layer % 2 == 0 else (size - self.cut, self.cut) for layer in range(count)
        ]
        self.networks = nn.ModuleList(mlp([kept, hidden, 2 * moved], "tanh") for kept, moved in sizes)

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """The image of z, and log abs det of the derivative at z."""
        first, second, total = z[..., : self.cut], z[..., self.cut :], z.new_zeros(())
        for layer, network in enumerate(self.networks):
            kept, moved = (first, second) if layer % 2 == 0 else (second, first)
            shift, log_scale = self._moves(network, kept)
            moved = moved * log_scale.exp() + shift
            first, second = (kept, moved) if layer % 2 == 0 else (moved, kept)
            total = total + log_scale.sum(-1)
        return torch.cat([first, second], -1), total

    def inverse(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """The preimage of z, and log abs det of the derivative of the map, not of its inverse."""
        first, second, total = z[..., : self.cut], z[..., self.cut :], z.new_zeros(())
        for layer, network in reversed(list(enumerate(self.networks))):
            kept, moved = (first, second) if layer % 2 == 0 else (second, first)
            shift, log_scale = self._moves(network, kept)
            moved = (moved - shift) * (-log_scale).exp()
            first, second = (kept, moved) if layer % 2 == 0 else (moved, kept)
            total = total + log_scale.sum(-1)
        return torch.cat([first, second], -1), total

    def _moves(self, network: nn.Module, kept: Tensor) -> tuple[Tensor, Tensor]:
        shift, raw = network(kept).chunk(2, -1)
        return shift, 2 * torch.tanh(raw / 2)  # a bounded scale keeps draws finite


class GatedTransition(nn.Module):
    """Mean and standard deviation of a step given the previous one, ``(..., Z) -> 2 x (..., Z)``, partly linear.

    Krishnan, Shalit & Sontag 2017, arXiv:1609.09869, section 5.
    """

    def __init__(self, size: int, hidden: int, min_sd: float):
        super().__init__()
        self.gate = mlp([size, hidden, size])
        self.proposal = mlp([size, hidden, size])
        self.linear = nn.Linear(size, size)
        self.spread = nn.Linear(size, size)
        self.min_sd = min_sd
        with torch.no_grad():  # initially a step equals the previous one
            self.linear.weight.copy_(torch.eye(size))
            self.linear.bias.zero_()

    def forward(self, previous: Tensor) -> tuple[Tensor, Tensor]:
        gate, proposal = self.gate(previous).sigmoid(), self.proposal(previous)
        loc = (1 - gate) * self.linear(previous) + gate * proposal
        return loc, softplus(self.spread(proposal.relu())) + self.min_sd
