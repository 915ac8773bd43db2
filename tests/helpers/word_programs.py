"""One program for every kind of site: two dependent sites, the second masked by row, in a subsampled plate.

:func:`cells` pairs each registered estimator with each kind of site that it serves, so that a new word is enrolled in
all tests that ask for them: particles at once and one by one, the compiled step, several processes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pyro
import pyro.distributions as dist
import torch
from pyro.nn import PyroModule
from torch import nn

from gumbo.inference.estimators import estimators

F64 = torch.float64
WIDTH, ALL = 3, 40  # of a row; how many rows a subsampled plate stands for

# The first wave; what is registered beside it is tested on every run, these only where slow tests are.
FIRST_WAVE = {
    "pathwise", "stl", "dreg", "score", "score-average", "nvil", "rloo", "muprop", "arm", "enumerate",
    "local-expectation", "rebar", "relax", "gumbel-softmax", "straight-through", "gumbel-rao", "reinmax", "concrete",
}  # fmt: skip
LATER = {"disarm": ("classes",), "measure-valued": ("gamma",)}  # sites served since

# Small supports where sums over them are listed: two coordinates a site, two sites.
SHORTER = {"truncated-enumerate": "truncated-enumerate(values=2, tolerance=1.0)", "head-tail": "head-tail(values=3)"}

# The law of a site from real numbers; probabilities beyond 7 are below 1e-5.
KINDS: dict[str, Callable] = {
    "coins": lambda a: dist.Bernoulli(logits=a).to_event(1),
    "classes": lambda a: dist.OneHotCategorical(logits=a),
    "poisson": lambda a: dist.Poisson((a - 1).exp()).to_event(1),
    "binomial": lambda a: dist.Binomial(3, logits=a).to_event(1),
    "negative binomial": lambda a: dist.NegativeBinomial(torch.tensor(3.0, dtype=F64), logits=a - 2).to_event(1),
    "geometric": lambda a: dist.Geometric(logits=a + 2).to_event(1),
    "gamma": lambda a: dist.Gamma(torch.tensor(2.0, dtype=F64), a.exp()).to_event(1),
    "normals": lambda a: dist.Normal(a, 1.0).to_event(1),
}


class Program(PyroModule):
    def __init__(self, kind: str, **shapes: tuple[int, ...]):
        super().__init__()
        self.kind = kind
        for name, shape in shapes.items():
            setattr(self, name, nn.Parameter(0.4 * torch.randn(shape, dtype=F64)))

    def rows(self, x):
        return pyro.plate("rows", ALL, subsample=torch.arange(len(x)), dim=-1)

    def masked(self, x):
        return pyro.poutine.mask(mask=x[:, 0] > 0)

    def law(self, a):
        return KINDS[self.kind](a)


def width(kind: str) -> int:
    return 3 if kind == "classes" else 2


class Model(Program):
    def __init__(self, kind: str):
        size = width(kind)
        super().__init__(kind, prior=(size,), decoder=(size, WIDTH), decoder_top=(size, WIDTH))

    def forward(self, x):
        with self.rows(x):
            z = pyro.sample("z", self.law(self.prior.expand(len(x), -1)))
            with self.masked(x):
                y = pyro.sample("y", self.law(0.5 * torch.tanh(z) + 0 * x[:, :1]))
            pyro.sample("x", dist.Normal(z @ self.decoder + y @ self.decoder_top, 1.0).to_event(1), obs=x)


class Guide(Program):
    def __init__(self, kind: str):
        size = width(kind)
        super().__init__(kind, encoder=(WIDTH, size), encoder_top=(size, size))

    def forward(self, x):
        with self.rows(x):
            z = pyro.sample("z", self.law(x @ self.encoder))
            with self.masked(x):
                pyro.sample("y", self.law(torch.tanh(z @ self.encoder_top) + 0 * x[:, :1]))


def pair(kind: str, seed: int = 1) -> tuple[Model, Guide]:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return Model(kind), Guide(kind)


def rows(count: int, seed: int = 0) -> torch.Tensor:
    x = torch.randn(count, WIDTH, dtype=F64, generator=torch.Generator().manual_seed(seed))
    x[:2, 0] = torch.tensor([0.5, -0.5])[: len(x)]  # of the first two, one is masked
    return x


def cells() -> Iterator[tuple[str, str, bool]]:
    """(word, kind of site, whether every run tests it): newer words on the first kind that they serve."""
    for word, make in estimators.items():
        first = word not in FIRST_WAVE
        for kind, law in KINDS.items():
            site = {"name": "z", "fn": law(torch.zeros(2, width(kind), dtype=F64)), "infer": {}, "is_observed": False}
            if make().supports(site) and "elbo" in make().objectives:
                yield word, kind, kind in LATER[word] if word in LATER else first
                first = False


def said(word: str) -> str:
    """The word with options that keep its lists short."""
    return SHORTER.get(word, word)
