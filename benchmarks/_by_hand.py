"""The three workloads of step.py as one would write them in PyTorch without Pyro: same networks, same estimators.

Each has ``noise(x)`` and a ``forward(x, noise)`` that returns two scalars: the negative bound, summed over the batch,
and what to differentiate. Parameters are copied from the pair of programs, in the programs' order.
"""

from __future__ import annotations

import copy
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def plain(*parts: nn.Module) -> nn.Sequential:
    """The layers of some networks, one after the other, with weights of their own."""
    leaves = [leaf for part in parts for leaf in part.modules() if not any(leaf.children())]
    return nn.Sequential(*copy.deepcopy([leaf for leaf in leaves if not isinstance(leaf, nn.Flatten)]))


def log_bernoulli(logits: Tensor, value: Tensor) -> Tensor:
    """log p(value), summed over the last dimension."""
    return -F.binary_cross_entropy_with_logits(logits, value, reduction="none").sum(-1)


class Gaussian(nn.Module):
    """Normal latents under a reparameterized draw; log q − log p of the draw in its shortest form."""

    def __init__(self, model: nn.Module, guide: nn.Module):
        super().__init__()
        self.decoder, self.encoder = plain(model.decoder), plain(guide.encoder, guide.encoder_heads["z"])
        self.min_sd = guide.min_sd

    def noise(self, x: Tensor) -> Tensor:
        return torch.randn(len(x), self.decoder[0].in_features, device=x.device)

    def forward(self, x: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        x = x.flatten(1)
        loc, raw = self.encoder(x).chunk(2, -1)
        scale = F.softplus(raw) + self.min_sd
        z = torch.addcmul(loc, scale, noise)
        rate = 0.5 * (z.square() - noise.square()).sum() - scale.log().sum()
        loss = rate + F.binary_cross_entropy_with_logits(self.decoder(z), x, reduction="sum")
        return loss, loss


class Categorical(nn.Module):
    """One-hot latents, K draws a datum, and the mean of the other draws as each one's baseline."""

    def __init__(self, model: nn.Module, guide: nn.Module, particles: int):
        super().__init__()
        self.decoder, self.encoder = plain(model.decoder), plain(guide.encoder, guide.encoder_heads["y"])
        self.shape, self.particles = tuple(model.latents["y"].shape), particles

    def noise(self, x: Tensor) -> Tensor:
        return torch.empty(self.particles, len(x), *self.shape, device=x.device).exponential_()

    def forward(self, x: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        x = x.flatten(1)
        latents, classes = self.shape
        log_pi = self.encoder(x).unflatten(-1, self.shape).log_softmax(-1)
        with torch.no_grad():
            y = F.one_hot((log_pi.exp() / noise).argmax(-1), classes).to(x.dtype)
        log_q = (log_pi * y).sum((-2, -1))
        log_x = log_bernoulli(self.decoder(y.flatten(-2)), x.expand(self.particles, *x.shape))
        bound = (log_x - log_q).detach() - latents * math.log(classes)
        baseline = (bound.sum(0) - bound) / (self.particles - 1)
        surrogate = log_x + (bound - baseline) * log_q
        return -bound.sum() / self.particles, -surrogate.sum() / self.particles


class Belief(nn.Module):
    """A layer of coins, each batch drawn with its antithetic partner (DisARM)."""

    def __init__(self, model: nn.Module, guide: nn.Module):
        super().__init__()
        self.decoder, self.prior = plain(model.decoder["x"]), nn.Parameter(model.decoder_prior_logits.detach().clone())
        self.encoder = plain(guide.encoder, guide.encoder_heads["z1"])

    def noise(self, x: Tensor) -> Tensor:
        return torch.rand(len(x), len(self.prior), device=x.device)

    def log_p(self, x: Tensor, z: Tensor) -> Tensor:
        return log_bernoulli(self.prior.expand_as(z), z) + log_bernoulli(self.decoder(z), x)

    def forward(self, x: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        x = x.flatten(1)
        logits = self.encoder(x)
        with torch.no_grad():
            probs = logits.sigmoid()
            z, partner = (noise < probs).to(x.dtype), (1 - noise < probs).to(x.dtype)
        log_p = self.log_p(x, z)
        with torch.no_grad():
            bound = log_p - log_bernoulli(logits, z)
            gap = bound - self.log_p(x, partner) + log_bernoulli(logits, partner)
            weight = 0.5 * gap.unsqueeze(-1) * (z - partner) * logits.abs().sigmoid()
        return -bound.sum(), -(log_p.sum() + (weight * logits).sum())
