"""Small Pyro programs whose exact gradients can be had by listing every value."""

from __future__ import annotations

from dataclasses import dataclass, field

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.nn import PyroModule
from torch import nn

F64 = torch.float64
X = torch.tensor([0.3, -0.8], dtype=F64)


class Params(PyroModule):
    """A guide or model whose parameters are named tensors."""

    def __init__(self, **values):
        super().__init__()
        for name, value in values.items():
            setattr(self, name, nn.Parameter(torch.tensor(value, dtype=F64)))


def gradient(scalar, module):
    """The gradient of a scalar with respect to all parameters of a module, in one vector."""
    parameters = [p for p in torch.nn.Module.parameters(module) if p.requires_grad]
    found = torch.autograd.grad(scalar, parameters, allow_unused=True)
    return torch.cat(
        [torch.zeros_like(p).flatten() if g is None else g.flatten() for p, g in zip(parameters, found, strict=True)]
    )


class OneCoinGuide(Params):
    def __init__(self):
        super().__init__(a=0.4)

    def forward(self):
        pyro.sample("z", dist.Bernoulli(logits=self.a))


class OneCoinModel(Params):
    def __init__(self):
        super().__init__(w=0.7)

    def forward(self):
        z = pyro.sample("z", dist.Bernoulli(logits=torch.tensor(-0.3, dtype=F64)))
        pyro.sample("x", dist.Normal(self.w * z, 1.0), obs=X[0])


class ControlFlowModel(Params):
    """Branches on a latent, as no value tracking can follow."""

    def __init__(self):
        super().__init__(w=0.7)

    def forward(self):
        z = pyro.sample("z", dist.Bernoulli(logits=torch.tensor(-0.3, dtype=F64)))
        loc = 1.0 if z > 0.5 else -1.0
        pyro.sample("x", dist.Normal(self.w * loc, 1.0), obs=X[0])


class BufferModel(Params):
    """Writes a latent into a buffer."""

    def __init__(self):
        super().__init__(w=0.7)

    def forward(self):
        z = pyro.sample("z", dist.Bernoulli(logits=torch.tensor(-0.3, dtype=F64)))
        buffer = torch.zeros(2, dtype=F64)
        buffer[1] = z
        pyro.sample("x", dist.Normal(self.w * buffer.sum(), 1.0), obs=X[0])


class ItemModel(Params):
    """Takes a latent out of torch and makes a new tensor of it."""

    def __init__(self):
        super().__init__(w=0.7)

    def forward(self):
        z = pyro.sample("z", dist.Bernoulli(logits=torch.tensor(-0.3, dtype=F64)))
        again = torch.tensor(z.item(), dtype=F64)
        pyro.sample("x", dist.Normal(self.w * again, 1.0), obs=X[0])


class ChainGuide(Params):
    """Two layers, the second depending on the first."""

    def __init__(self):
        super().__init__(a=0.4, b=-0.2, c=0.9)

    def forward(self):
        z1 = pyro.sample("z1", dist.Bernoulli(logits=self.a))
        pyro.sample("z2", dist.Bernoulli(logits=self.b + self.c * z1))


class CurvedModel(Params):
    """A cost far from linear in either coin."""

    def __init__(self):
        super().__init__(u=0.5)

    def forward(self):
        z1 = pyro.sample("z1", dist.Bernoulli(logits=torch.tensor(0.2, dtype=F64)))
        z2 = pyro.sample("z2", dist.Bernoulli(logits=self.u * z1 - 0.4))
        pyro.sample("x", dist.Normal((1.5 * z1 + z2).exp(), 1.0), obs=X[0])


class ChainModel(Params):
    def __init__(self):
        super().__init__(u=0.5, w=-1.1)

    def forward(self):
        z1 = pyro.sample("z1", dist.Bernoulli(logits=torch.tensor(0.2, dtype=F64)))
        z2 = pyro.sample("z2", dist.Bernoulli(logits=self.u * z1 - 0.4))
        pyro.sample("x", dist.Normal(self.w * z2 + z1 * z2, 1.0), obs=X[0])


class DiceGuide(Params):
    """A one-hot die and a plain one that depends on it."""

    def __init__(self):
        super().__init__(a=[0.1, -0.4, 0.6], b=[[0.3, 0.2], [-0.5, 0.1], [0.0, 0.8]])

    def forward(self):
        y = pyro.sample("y", dist.OneHotCategorical(logits=self.a))
        pyro.sample("c", dist.Categorical(logits=y @ self.b))


class DiceModel(Params):
    def __init__(self):
        super().__init__(w=[0.2, 1.0, -0.5])

    def forward(self):
        y = pyro.sample("y", dist.OneHotCategorical(logits=torch.zeros(3, dtype=F64)))
        c = pyro.sample("c", dist.Categorical(logits=torch.tensor([0.1, -0.3], dtype=F64)))
        pyro.sample("x", dist.Normal((y * self.w).sum(-1) * (1.0 + c), 1.0), obs=X[1])


class PlateGuide(Params):
    """Coins in a plate, two of them."""

    def __init__(self):
        super().__init__(a=[0.4, -0.7])

    def forward(self):
        with pyro.plate("data", 2):
            pyro.sample("z", dist.Bernoulli(logits=self.a))


class PlateModel(Params):
    def __init__(self):
        super().__init__(w=0.7)

    def forward(self):
        with pyro.plate("data", 2):
            z = pyro.sample("z", dist.Bernoulli(logits=torch.tensor(-0.3, dtype=F64)))
            pyro.sample("x", dist.Normal(self.w * z, 1.0), obs=X)


class PlateThenGlobalGuide(Params):
    """Coins in a plate, then a coin outside of it that depends on all of them."""

    def __init__(self):
        super().__init__(a=[0.4, -0.7], b=-0.3, c=2.0)

    def forward(self):
        with pyro.plate("data", 2):
            z = pyro.sample("z", dist.Bernoulli(logits=self.a))
        mean = z.mean(-1, keepdim=z.dim() > 1)
        pyro.sample("g", dist.Bernoulli(logits=self.b + self.c * mean))


class PlateThenGlobalModel(Params):
    def __init__(self):
        super().__init__(w=0.9)

    def forward(self):
        g = pyro.sample("g", dist.Bernoulli(logits=torch.tensor(0.1, dtype=F64)))
        with pyro.plate("data", 2):
            z = pyro.sample("z", dist.Bernoulli(logits=torch.tensor(-0.3, dtype=F64)))
            pyro.sample("x", dist.Normal(self.w * z - 2.0 * g, 1.0), obs=X)


class GlobalThenPlateGuide(Params):
    """A coin above a plate of coins that depend on it."""

    def __init__(self):
        super().__init__(a=[0.4, -0.7], b=-0.3, c=2.0)

    def forward(self):
        g = pyro.sample("g", dist.Bernoulli(logits=self.b))
        with pyro.plate("data", 2):
            pyro.sample("z", dist.Bernoulli(logits=self.a + self.c * g))


class EventGuide(Params):
    """A vector of coins as one event, in a plate, masked and scaled in the ways that Pyro knows."""

    def __init__(self):
        super().__init__(a=[[0.4, -0.7], [0.1, 0.3]])

    def forward(self):
        with pyro.plate("data", 2), poutine.mask(mask=torch.tensor([True, False])):
            pyro.sample("z", dist.Bernoulli(logits=self.a).to_event(1))


class EventModel(Params):
    def __init__(self):
        super().__init__(w=[0.7, -0.4])

    def forward(self):
        with pyro.plate("data", 2), poutine.scale(scale=1.7):
            with poutine.mask(mask=torch.tensor([True, False])):
                z = pyro.sample("z", dist.Bernoulli(logits=torch.zeros(2, 2, dtype=F64)).to_event(1))
            pyro.sample("x", dist.Normal((z * self.w).sum(-1), 1.0), obs=X)
            pyro.factor("f", 0.3 * z[..., 0] * z[..., 1])


class MaskedDrawGuide(Params):
    """A coin whose own distribution is masked: its log q is zero, its draw is not."""

    def __init__(self):
        super().__init__(a=0.4)

    def forward(self):
        pyro.sample("z", dist.Bernoulli(logits=self.a).mask(False))


class NestedGuide(Params):
    """Plates two deep, with a coin in each and one in both."""

    def __init__(self):
        super().__init__(a=[0.4, -0.7], b=[[0.2], [-0.5]], c=1.1)

    def forward(self):
        inner, outer = pyro.plate("inner", 2, dim=-1), pyro.plate("outer", 2, dim=-2)
        with outer:
            o = pyro.sample("o", dist.Bernoulli(logits=self.b))
        with outer, inner:
            pyro.sample("z", dist.Bernoulli(logits=self.a + self.c * o))


class NestedModel(Params):
    def __init__(self):
        super().__init__(w=0.7)

    def forward(self):
        inner, outer = pyro.plate("inner", 2, dim=-1), pyro.plate("outer", 2, dim=-2)
        with outer:
            o = pyro.sample("o", dist.Bernoulli(logits=torch.tensor(0.2, dtype=F64)))
        with outer, inner:
            z = pyro.sample("z", dist.Bernoulli(logits=torch.tensor(-0.3, dtype=F64)))
            pyro.sample("x", dist.Normal(self.w * z + o, 1.0), obs=torch.stack([X, -X]))


@dataclass
class Case:
    """A pair of programs; ``branches``: it cannot be vectorized; ``large``: too many tuples for K = 2."""

    model: type
    guide: type
    branches: bool = False
    large: bool = False
    options: dict = field(default_factory=dict)

    def make(self):
        return self.model(), self.guide()


DISCRETE = {
    "one coin": Case(OneCoinModel, OneCoinGuide),
    "control flow": Case(ControlFlowModel, OneCoinGuide, branches=True),
    "buffer": Case(BufferModel, OneCoinGuide, branches=True),
    "item": Case(ItemModel, OneCoinGuide, branches=True),
    "chain": Case(ChainModel, ChainGuide),
    "dice": Case(DiceModel, DiceGuide),
    "plate": Case(PlateModel, PlateGuide),
    "plate then global": Case(PlateThenGlobalModel, PlateThenGlobalGuide),
    "global then plate": Case(PlateThenGlobalModel, GlobalThenPlateGuide),
    "masked event": Case(EventModel, EventGuide),
    "masked draw": Case(OneCoinModel, MaskedDrawGuide),
    "nested plates": Case(NestedModel, NestedGuide, large=True),
}

# Those of which all sites are coins.
COINS = [
    "one coin",
    "control flow",
    "buffer",
    "item",
    "chain",
    "plate",
    "plate then global",
    "global then plate",
    "masked event",
    "masked draw",
]
