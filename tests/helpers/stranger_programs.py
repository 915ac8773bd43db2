"""Pyro programs as strangers write them, each with the way in which SiteELBO's answer is known.

A program is a class with a ``model`` and a ``guide``, entered under one of five checks:

- ``EXACT``: its latent sites are discrete, so that the gradient is a sum over every joint value;
- ``STOCK``: its sites are reparameterized, so that Trace_ELBO with the same seed gives the same numbers;
- ``CLOSED``: it has ``truth()``, the loss as a differentiable closed form or a quadrature;
- ``SAME``: ``same()`` is another program that means the same, to be equal for equal seeds;
- ``REFUSED``: SiteELBO says in one line why not; ``says`` is what the line holds.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import pyro
import pyro.distributions as dist
import torch
from programs import F64, Params, X
from pyro import poutine
from pyro.distributions import constraints
from pyro.distributions import transforms as T
from pyro.distributions.testing.rejection_gamma import RejectionStandardGamma
from pyro.infer.autoguide import (
    AutoDelta,
    AutoLowRankMultivariateNormal,
    AutoMultivariateNormal,
    AutoNormal,
    AutoStructured,
)
from pyro.infer.reparam import ConjugateReparam, LocScaleReparam
from pyro.ops.indexing import Vindex
from torch import nn

from gumbo.inference.auditing.exact import exact_elbo


@dataclass(frozen=True)
class Entry:
    make: Callable
    words: tuple
    options: dict
    says: str = ""


EXACT: dict[str, Entry] = {}
STOCK: dict[str, Entry] = {}
CLOSED: dict[str, Entry] = {}
SAME: dict[str, Entry] = {}
REFUSED: dict[str, Entry] = {}


def enter(table: dict[str, Entry], *words, says: str = "", **options):
    def note(cls):
        name = "".join(" " + c.lower() if c.isupper() else c for c in cls.__name__).strip()
        table[name] = Entry(cls, words, options, says)
        return cls

    return note


def t(*values) -> torch.Tensor:
    return torch.tensor(values if len(values) != 1 else values[0], dtype=F64)


class Pair(Params):
    """Parameters under one roof, with ``model`` and ``guide`` as methods."""

    fields: dict = {}
    particles, calls, resolves = 2000, 25, 0.15  # how a mean is compared to a closed form

    def __init__(self):
        super().__init__(**self.fields)


# ---- discrete programs: sums over every value

VALUE = ("score", "enumerate")


@enter(EXACT, *VALUE, {"z": "score", "y": "enumerate"}, vectorize_particles=False)
class BranchOnALatent(Pair):
    fields = {"a": 0.4, "b": -0.3, "w": 0.7}

    def model(self):
        z = pyro.sample("z", dist.Bernoulli(logits=t(-0.3)))
        if z > 0.5:
            y = pyro.sample("y", dist.Bernoulli(logits=t(0.2)))
            pyro.sample("x", dist.Normal(self.w * y, 1.0), obs=X[0])
        else:
            pyro.sample("x", dist.Normal(-self.w, 1.0), obs=X[0])

    def guide(self):
        z = pyro.sample("z", dist.Bernoulli(logits=self.a))
        if z > 0.5:
            pyro.sample("y", dist.Bernoulli(logits=self.b))


@enter(EXACT, "score", num_particles=1)
@enter(
    REFUSED, "score", "rloo", says="'d' has . rows in one run.*on a draw", num_particles=20, vectorize_particles=False
)
class PlateOfADrawnSize(Pair):
    fields = {"a": 0.4, "b": -0.3, "w": 0.7}

    def model(self):
        k = pyro.sample("k", dist.Bernoulli(logits=t(-0.3)))
        with pyro.plate("d", 2 + int(k)):
            z = pyro.sample("z", dist.Bernoulli(logits=t(0.2)))
        with pyro.plate("rows", 2):
            pyro.sample("x", dist.Normal(self.w * z.sum(), 1.0), obs=X[:2])

    def guide(self):
        k = pyro.sample("k", dist.Bernoulli(logits=self.a))
        with pyro.plate("d", 2 + int(k)):
            pyro.sample("z", dist.Bernoulli(logits=self.b + 0.3 * k))


@enter(EXACT, *VALUE, "local-expectation", "measure-valued")
class ScaleThatLearns(Pair):
    """The scale of latent sites is a parameter, or follows a draw: log q stays a number, its scale does not."""

    fields = {"a": 0.4, "b": -0.3, "k": 0.3, "w": 0.7}

    def model(self):
        with poutine.scale(scale=self.k.exp()):
            z = pyro.sample("z", dist.Bernoulli(logits=t(-0.3)))
        with poutine.scale(scale=0.5 + self.w.exp() * z):
            y = pyro.sample("y", dist.Bernoulli(logits=t(0.2)))
        pyro.sample("x", dist.Normal(self.w * (z + y), 1.0), obs=X[0])

    def guide(self):
        with poutine.scale(scale=self.k.exp()):
            z = pyro.sample("z", dist.Bernoulli(logits=self.a))
        with poutine.scale(scale=0.5 + self.w.exp() * z):
            pyro.sample("y", dist.Bernoulli(logits=self.b + 0.2 * z))


@enter(EXACT, *({"z0": "enumerate", "z1": word} for word in ("local-expectation", "measure-valued", "rloo")))
class ChainOfOneListedAndOneRerun(Pair):
    fields = {"a": 0.4, "b": 0.5}

    def model(self):
        z = t(0.0)
        for i in pyro.markov(range(2)):
            z = pyro.sample(f"z{i}", dist.Bernoulli(logits=z - 0.2))
            pyro.sample(f"x{i}", dist.Normal(z, 1.0), obs=X[i])

    def guide(self):
        z = t(0.0)
        for i in pyro.markov(range(2)):
            z = pyro.sample(f"z{i}", dist.Bernoulli(logits=self.a + self.b * z))


@enter(EXACT, *VALUE, vectorize_particles=False)
class TossUntilHeads(Pair):
    """A recursion with at most three coins: which sites there are is itself random."""

    fields = {"a": [0.4, -0.2, 0.3], "w": 0.8}

    def model(self):
        count = 0
        while count < 3 and pyro.sample(f"z{count}", dist.Bernoulli(logits=t(0.1))) < 0.5:
            count += 1
        pyro.sample("x", dist.Normal(self.w * count, 1.0), obs=X[0])

    def guide(self):
        count = 0
        while count < 3 and pyro.sample(f"z{count}", dist.Bernoulli(logits=self.a[count])) < 0.5:
            count += 1


@enter(EXACT, *VALUE, vectorize_particles=False)
class TableByItem(Pair):
    fields = {"a": [0.4, -0.2, 0.1], "w": 0.8}

    def model(self):
        z = pyro.sample("z", dist.Categorical(logits=t(0.1, 0.0, 0.4)))
        pyro.sample("x", dist.Normal(self.w * {0: -1.0, 1: 0.5, 2: 2.0}[z.item()], 1.0), obs=X[0])

    def guide(self):
        pyro.sample("z", dist.Categorical(logits=self.a))


@enter(EXACT, *VALUE, vectorize_particles=False)
class ThroughNumpy(Pair):
    fields = {"a": [0.4, -0.2], "w": 0.8}

    def model(self):
        with pyro.plate("rows", 2):
            z = pyro.sample("z", dist.Bernoulli(logits=torch.zeros(2, dtype=F64)))
        simulated = torch.from_numpy(z.detach().numpy().cumsum())
        with pyro.plate("seen", 2):
            pyro.sample("x", dist.Normal(self.w * simulated, 1.0), obs=X)

    def guide(self):
        with pyro.plate("rows", 2):
            pyro.sample("z", dist.Bernoulli(logits=self.a))


@enter(EXACT, "score", "enumerate", "rloo")
class IndexByALatent(Pair):
    fields = {"a": [0.4, -0.2, 0.1], "w": [0.8, -1.0, 0.3]}

    def model(self):
        z = pyro.sample("z", dist.Categorical(logits=t(0.1, 0.0, 0.4)))
        pyro.sample("x", dist.Normal(Vindex(self.w)[z], 1.0), obs=X[0])

    def guide(self):
        pyro.sample("z", dist.Categorical(logits=self.a))


@enter(EXACT, "score", "enumerate", "rloo")
class CoinsOfOneEvent(Pair):
    fields = {"a": [[0.4, -0.2], [0.1, 0.9]], "w": 0.8}

    def model(self):
        z = pyro.sample("z", dist.Bernoulli(logits=torch.zeros(2, 2, dtype=F64)).to_event(2))
        pyro.sample("x", dist.Normal(self.w * z.sum((-1, -2)), 1.0), obs=X[0])

    def guide(self):
        pyro.sample("z", dist.Bernoulli(logits=self.a).to_event(2))


@enter(EXACT, "score", "enumerate")
class MarkovChain(Pair):
    fields = {"a": [0.4, -0.2, 0.1], "c": 0.7, "w": 0.8}

    def model(self):
        z = t(0.0)
        for i in pyro.markov(range(3)):
            z = pyro.sample(f"z{i}", dist.Bernoulli(logits=0.6 * z - 0.2))
            pyro.sample(f"x{i}", dist.Normal(self.w * z, 1.0), obs=t(0.3 * i))

    def guide(self):
        z = t(0.0)
        for i in pyro.markov(range(3)):
            z = pyro.sample(f"z{i}", dist.Bernoulli(logits=self.a[i] + self.c * z))


@enter(EXACT, "score", "enumerate")
class SequentialPlate(Pair):
    fields = {"a": [0.4, -0.2], "w": 0.8}

    def model(self):
        for i in pyro.plate("rows", 2):
            z = pyro.sample(f"z{i}", dist.Bernoulli(logits=t(0.1)))
            pyro.sample(f"x{i}", dist.Normal(self.w * z, 1.0), obs=X[i])

    def guide(self):
        for i in pyro.plate("rows", 2):
            pyro.sample(f"z{i}", dist.Bernoulli(logits=self.a[i]))


@enter(EXACT, "score", "enumerate")
class SubsampledSequentialPlate(Pair):
    """Rows 0 and 2 of four, each counted twice."""

    fields = {"a": [0.4, -0.2, 0.0, 0.3], "w": 0.8}
    rows = torch.tensor([0, 2])

    def model(self):
        for i in pyro.plate("rows", 4, subsample=self.rows):
            z = pyro.sample(f"z{i}", dist.Bernoulli(logits=t(0.1)))
            pyro.sample(f"x{i}", dist.Normal(self.w * z, 1.0), obs=t(0.1 * int(i)))

    def guide(self):
        for i in pyro.plate("rows", 4, subsample=self.rows):
            pyro.sample(f"z{i}", dist.Bernoulli(logits=self.a[int(i)]))


@enter(EXACT, "score", "enumerate", "rloo")
class SubsampledPlateUnderAGlobal(Pair):
    fields = {"g": 0.3, "a": [0.4, -0.2, 0.0, 0.3], "w": 0.8}
    rows = torch.tensor([1, 2])

    def model(self):
        g = pyro.sample("g", dist.Bernoulli(logits=t(0.2)))
        with pyro.plate("rows", 4, subsample=self.rows):
            z = pyro.sample("z", dist.Bernoulli(logits=t(0.1)))
            pyro.sample("x", dist.Normal(self.w * z + g, 1.0), obs=X)

    def guide(self):
        pyro.sample("g", dist.Bernoulli(logits=self.g))
        with pyro.plate("rows", 4, subsample=self.rows) as rows:
            pyro.sample("z", dist.Bernoulli(logits=self.a[rows]))


@enter(EXACT, "score", "enumerate")
class CrossedPlates(Pair):
    """Rows and columns with coins, read by every cell; the guide meets them in another order."""

    fields = {"r": [[0.4], [-0.2]], "c": [0.1, 0.5], "a": 0.6}

    def model(self):
        rows, columns = pyro.plate("rows", 2, dim=-2), pyro.plate("columns", 2, dim=-1)
        with rows:
            r = pyro.sample("r", dist.Bernoulli(logits=t(0.2)))
        with columns:
            c = pyro.sample("c", dist.Bernoulli(logits=t(-0.1)))
        with rows, columns:
            pyro.sample("x", dist.Normal(r - c + self.a * r * c, 1.0), obs=torch.stack([X, -X]))

    def guide(self):
        rows, columns = pyro.plate("rows", 2, dim=-2), pyro.plate("columns", 2, dim=-1)
        with columns:
            pyro.sample("c", dist.Bernoulli(logits=self.c))
        with rows:
            pyro.sample("r", dist.Bernoulli(logits=self.r))


@enter(EXACT, "score", "enumerate", "rloo")
class PlateOfAnUnknownSize(Pair):
    """``pyro.plate("data")``: Pyro leaves the size to the tensors."""

    fields = {"a": [0.4, -0.2], "w": 0.8}

    def model(self):
        with pyro.plate("data"):
            z = pyro.sample("z", dist.Bernoulli(logits=torch.zeros(2, dtype=F64)))
            pyro.sample("x", dist.Normal(self.w * z, 1.0), obs=X)

    def guide(self):
        with pyro.plate("data"):
            pyro.sample("z", dist.Bernoulli(logits=self.a))


@enter(EXACT, "score", "enumerate")
class MaskWithinAPlate(Pair):
    fields = {"a": [0.4, -0.2, 0.9], "w": 0.8}
    seen = torch.tensor([True, False, True])

    def model(self):
        with pyro.plate("data", 3), poutine.mask(mask=self.seen):
            z = pyro.sample("z", dist.Bernoulli(logits=t(0.2)))
            pyro.sample("x", dist.Normal(self.w * z, 1.0), obs=t(0.1, 0.2, 0.3))

    def guide(self):
        with pyro.plate("data", 3), poutine.mask(mask=self.seen):
            pyro.sample("z", dist.Bernoulli(logits=self.a))


@enter(EXACT, "score", "enumerate")
class MaskOfTheModelAlone(Pair):
    """The latents of masked rows keep their entropy: only the model's terms are gone."""

    fields = {"a": [0.4, -0.2], "w": 0.8}

    def model(self):
        with pyro.plate("data", 2), poutine.mask(mask=torch.tensor([True, False])):
            z = pyro.sample("z", dist.Bernoulli(logits=t(0.2)))
            pyro.sample("x", dist.Normal(self.w * z, 1.0), obs=X)

    def guide(self):
        with pyro.plate("data", 2):
            pyro.sample("z", dist.Bernoulli(logits=self.a))


@enter(EXACT, "score", "enumerate", "rloo")
class ScaledSites(Pair):
    fields = {"a": 0.4, "b": -0.2, "w": 0.8}

    def model(self):
        with poutine.scale(scale=3.0):
            z = pyro.sample("z", dist.Bernoulli(logits=t(0.2)))
        y = pyro.sample("y", dist.Bernoulli(logits=z - 0.5))
        with poutine.scale(scale=0.25):
            pyro.sample("x", dist.Normal(self.w * z * y, 1.0), obs=X[0])

    def guide(self):
        with poutine.scale(scale=3.0):
            z = pyro.sample("z", dist.Bernoulli(logits=self.a))
        pyro.sample("y", dist.Bernoulli(logits=self.b * z))


@enter(EXACT, "score", "enumerate")
class ConditionedModel(Pair):
    fields = {"a": 0.4, "w": 0.8}

    def prior(self):
        z = pyro.sample("z", dist.Bernoulli(logits=t(0.2)))
        return pyro.sample("x", dist.Normal(self.w * z, 1.0))

    def model(self):
        return poutine.condition(self.prior, data={"x": X[0]})()

    def guide(self):
        pyro.sample("z", dist.Bernoulli(logits=self.a))


@enter(EXACT, "score", "enumerate")
class Intervention(Pair):
    """``do(y = 1)``: y is fixed downstream and its own density is gone."""

    fields = {"a": 0.4, "w": 0.8}

    def body(self):
        z = pyro.sample("z", dist.Bernoulli(logits=t(0.2)))
        y = pyro.sample("y", dist.Bernoulli(logits=self.w * z))
        pyro.sample("x", dist.Normal(self.w * z + y, 1.0), obs=X[0])

    def model(self):
        return poutine.block(poutine.do(self.body, data={"y": t(1.0)}), hide=["y"])()

    def guide(self):
        pyro.sample("z", dist.Bernoulli(logits=self.a))


@enter(EXACT, "score", "enumerate")
class Uncondition(Pair):
    fields = {"a": 0.4, "w": 0.8}

    def body(self):
        z = pyro.sample("z", dist.Bernoulli(logits=t(0.2)), obs=t(1.0))
        pyro.sample("x", dist.Normal(self.w * z, 1.0), obs=X[0])

    def model(self):
        return poutine.condition(poutine.uncondition(self.body), data={"x": X[0]})()

    def guide(self):
        pyro.sample("z", dist.Bernoulli(logits=self.a))


@enter(EXACT, "score", "enumerate")
class FactorOfTheModel(Pair):
    fields = {"a": [0.4, -0.2], "w": 0.8}

    def model(self):
        with pyro.plate("data", 2):
            z = pyro.sample("z", dist.Bernoulli(logits=t(0.2)))
            pyro.factor("potential", -self.w * (z - 0.3) ** 2)

    def guide(self):
        with pyro.plate("data", 2):
            pyro.sample("z", dist.Bernoulli(logits=self.a))


@enter(EXACT, "score", "enumerate")
class ObservedByHalf(Pair):
    """``obs_mask``: the unseen half of a vector is a latent of its own, with a site in the guide."""

    fields = {"a": [0.4, -0.2], "w": [0.8, 0.1]}
    seen = torch.tensor([True, False])

    def model(self):
        with pyro.plate("data", 2):
            x = pyro.sample("x", dist.Bernoulli(logits=self.w), obs=t(1.0, 0.0), obs_mask=self.seen)
            pyro.sample("y", dist.Normal(x, 1.0), obs=X)

    def guide(self):
        with pyro.plate("data", 2):
            pyro.sample("x_unobserved", dist.Bernoulli(logits=self.a))


@enter(EXACT, "score", "enumerate")
class DeterministicBetween(Pair):
    fields = {"a": [0.4, -0.2], "w": 0.8}

    def model(self):
        with pyro.plate("data", 2):
            z = pyro.sample("z", dist.Bernoulli(logits=t(0.2)))
            loc = pyro.deterministic("loc", self.w * z)
            pyro.sample("x", dist.Normal(loc, 1.0), obs=X)

    def guide(self):
        with pyro.plate("data", 2):
            pyro.sample("z", dist.Bernoulli(logits=self.a))


@enter(EXACT, "score", "enumerate")
class PointGlobalBesideCoins(Pair):
    """A Delta in the guide is a parameter: it is not drawn, and needs no word."""

    fields = {"a": [0.4, -0.2], "m": 0.3}

    def model(self):
        m = pyro.sample("m", dist.Normal(t(0.0), 2.0))
        with pyro.plate("data", 2):
            z = pyro.sample("z", dist.Bernoulli(logits=m))
            pyro.sample("x", dist.Normal(m * z, 1.0), obs=X)

    def guide(self):
        pyro.sample("m", dist.Delta(self.m))
        with pyro.plate("data", 2):
            pyro.sample("z", dist.Bernoulli(logits=self.a))


@enter(EXACT, {"u": "enumerate", "v": "score"}, {"u": "score", "v": "enumerate"}, {"u": "enumerate", "v": "rloo"})
class ListedBesideDrawn(Pair):
    fields = {"a": 0.4, "b": -0.2, "c": 0.6, "w": 0.8}

    def model(self):
        u = pyro.sample("u", dist.Bernoulli(logits=t(0.2)))
        v = pyro.sample("v", dist.Bernoulli(logits=u - 0.4))
        pyro.sample("x", dist.Normal(self.w * u * v, 1.0), obs=X[0])

    def guide(self):
        u = pyro.sample("u", dist.Bernoulli(logits=self.a))
        pyro.sample("v", dist.Bernoulli(logits=self.b + self.c * u))


@enter(EXACT, {"g": "score", "z": "enumerate"}, {"g": "enumerate", "z": "score"})
class GlobalAfterAPlate(Pair):
    """A coin outside of the plate reads all of the plate: from there on the plate is summed."""

    fields = {"a": [0.4, -0.2], "b": 0.6}

    def model(self):
        g = pyro.sample("g", dist.Bernoulli(logits=t(0.2)))
        with pyro.plate("data", 2):
            z = pyro.sample("z", dist.Bernoulli(logits=t(-0.1)))
            pyro.sample("x", dist.Normal(z - g, 1.0), obs=X)

    def guide(self):
        with pyro.plate("data", 2):
            z = pyro.sample("z", dist.Bernoulli(logits=self.a))
        share = z.mean(-1, keepdim=z.dim() > 1)
        pyro.sample("g", dist.Bernoulli(logits=self.b * (share - 0.4)))


@enter(EXACT, "score", "enumerate")
class BinomialCounts(Pair):
    fields = {"a": 0.4, "w": 0.5}

    def model(self):
        n = pyro.sample("n", dist.Binomial(3, logits=t(0.2)))
        pyro.sample("x", dist.Poisson(torch.exp(self.w * n)), obs=t(2.0))

    def guide(self):
        pyro.sample("n", dist.Binomial(3, logits=self.a))


EXACT["binomial counts"] = Entry(BinomialCounts, ("enumerate",), {})  # its sampler cannot be scripted


@enter(EXACT, "score", "enumerate")
class ObservedInTheGuide(Pair):
    """An observed statement of the guide counts in log q, as in Pyro."""

    fields = {"a": 0.4, "w": 0.8}

    def model(self):
        z = pyro.sample("z", dist.Bernoulli(logits=t(0.2)))
        pyro.sample("x", dist.Normal(self.w * z, 1.0), obs=X[0])

    def guide(self):
        z = pyro.sample("z", dist.Bernoulli(logits=self.a))
        pyro.sample("hint", dist.Normal(z, 1.0), obs=X[1])


@enter(EXACT, "score", "enumerate")
class AuxiliarySite(Pair):
    """A site of the guide alone, marked as auxiliary: its log q counts and nothing else does."""

    fields = {"a": 0.4, "b": 0.7, "w": 0.8}

    def model(self):
        z = pyro.sample("z", dist.Bernoulli(logits=t(0.2)))
        pyro.sample("x", dist.Normal(self.w * z, 1.0), obs=X[0])

    def guide(self):
        s = pyro.sample("s", dist.Bernoulli(logits=self.b), infer={"is_auxiliary": True})
        pyro.sample("z", dist.Bernoulli(logits=self.a * (2 * s - 1)))


@enter(EXACT, "enumerate")
class HiddenMarkovLikelihood(Pair):
    """A likelihood that sums over its own hidden path."""

    fields = {"a": 0.4, "w": 0.8}

    def model(self):
        z = pyro.sample("z", dist.Bernoulli(logits=t(0.2)))
        emission = dist.Normal(torch.stack([-self.w * (1 + z), self.w * (1 + z)], -1).unsqueeze(-2), 1.0)
        logits = t([0.0, 0.3])
        steps = t([[0.2, -0.1], [0.4, 0.0]])
        pyro.sample("x", dist.DiscreteHMM(logits, steps, emission, duration=3), obs=t(0.2, -0.4, 1.0))

    def guide(self):
        pyro.sample("z", dist.Bernoulli(logits=self.a))


@enter(EXACT, "score", "enumerate", kl_weight=1.0)
class ImpossibleValues(Pair):
    """A prior that rules a class out: the guide gives it almost nothing, and the loss stays finite."""

    fields = {"a": [0.4, -0.2], "w": 0.8}

    def model(self):
        z = pyro.sample("z", dist.Categorical(probs=t(0.5, 0.5, 0.0)))
        pyro.sample("x", dist.Normal(self.w * z, 1.0), obs=X[0])

    def guide(self):
        pyro.sample("z", dist.Categorical(logits=torch.cat([self.a, t([-math.inf])])))


@enter(EXACT, "enumerate", vectorize_particles=False)
class ImpossiblePaths(ImpossibleValues):
    """The same, one path after the other: a path that cannot be leaves no NaN in the gradients of the others."""


# ---- reparameterized programs: the numbers of Trace_ELBO, seed by seed


class Guided(Pair):
    """A Normal guide for one latent named z."""

    fields = {"m": 0.3, "s": -0.4}

    def guide(self):
        pyro.sample("z", dist.Normal(self.m, self.s.exp()))


@enter(STOCK)
class MixtureLikelihood(Guided):
    def model(self):
        z = pyro.sample("z", dist.Normal(t(0.0), 1.0))
        parts = dist.Normal(torch.stack([z, -z], -1), 1.0)
        pyro.sample("x", dist.MixtureSameFamily(dist.Categorical(logits=t(0.1, 0.4)), parts), obs=X[0])


@enter(STOCK)
class MaskedMixtureLikelihood(Guided):
    def model(self):
        z = pyro.sample("z", dist.Normal(t(0.0), 1.0))
        with pyro.plate("data", 2):
            parts = dist.Normal(z, 1.0), dist.Laplace(z, 2.0)
            pyro.sample("x", dist.MaskedMixture(torch.tensor([True, False]), *parts), obs=X)


@enter(STOCK)
class ZeroInflatedCounts(Guided):
    def model(self):
        z = pyro.sample("z", dist.Normal(t(0.0), 1.0))
        with pyro.plate("data", 3):
            pyro.sample("x", dist.ZeroInflatedPoisson(z.exp(), gate=z.sigmoid()), obs=t(0.0, 2.0, 1.0))


@enter(STOCK)
class OverdispersedCounts(Guided):
    def model(self):
        z = pyro.sample("z", dist.Normal(t(0.0), 1.0))
        with pyro.plate("data", 2):
            pyro.sample("x", dist.GammaPoisson(z.exp(), 1.0), obs=t(3.0, 0.0))
            pyro.sample("y", dist.ZeroInflatedNegativeBinomial(z.exp(), logits=z, gate=t(0.2)), obs=t(0.0, 4.0))


@enter(STOCK)
class GaussianHiddenMarkov(Guided):
    def model(self):
        z = pyro.sample("z", dist.Normal(t(0.0), 1.0))
        eye = torch.eye(1, dtype=F64)
        unit = dist.MultivariateNormal(torch.zeros(1, dtype=F64), eye)
        hmm = dist.GaussianHMM(unit, z.sigmoid()[..., None, None, None] * eye, unit, eye, unit, duration=3)
        pyro.sample("x", hmm, obs=t([[0.1], [0.4], [-0.2]]))


@enter(STOCK)
class TruncatedLikelihood(Guided):
    """A density cut at zero, by hand: Normal less the log of its mass."""

    def model(self):
        z = pyro.sample("z", dist.Normal(t(0.0), 1.0))
        with pyro.plate("data", 2):
            pyro.sample("x", dist.Normal(z, 1.0), obs=t(0.5, 1.2))
            pyro.factor("cut", -torch.special.log_ndtr(z))


@enter(STOCK)
class ImproperPrior(Guided):
    def model(self):
        z = pyro.sample("z", dist.ImproperUniform(constraints.real, (), ()))
        pyro.sample("x", dist.Normal(z, 1.0), obs=X[0])


@enter(STOCK)
class TransformedGuide(Pair):
    fields = {"m": 0.3, "s": -0.4}

    def model(self):
        z = pyro.sample("z", dist.Gamma(t(2.0), 1.0))
        pyro.sample("x", dist.Poisson(z), obs=t(3.0))

    def guide(self):
        base = dist.Normal(t(0.0), 1.0)
        pyro.sample(
            "z", dist.TransformedDistribution(base, [T.AffineTransform(self.m, self.s.exp()), T.ExpTransform()])
        )


@enter(STOCK)
class PositiveFamilies(Pair):
    fields = {"a": 0.3, "b": 0.1}

    def model(self):
        z1 = pyro.sample("z1", dist.HalfCauchy(t(1.0)))
        z2 = pyro.sample("z2", dist.InverseGamma(t(2.0), 1.0))
        z3 = pyro.sample("z3", dist.Exponential(t(1.0)))
        pyro.sample("x", dist.Normal(z1 - z2 + z3, 1.0), obs=X[0])

    def guide(self):
        pyro.sample("z1", dist.LogNormal(self.a, 0.5))
        pyro.sample("z2", dist.Gamma(self.b.exp() * 3, 1.0))
        pyro.sample("z3", dist.Weibull(self.a.exp(), self.b.exp()))


@enter(STOCK)
class SimplexAndInterval(Pair):
    fields = {"a": [0.3, 0.0, 0.2], "b": 0.1}

    def model(self):
        p = pyro.sample("p", dist.Dirichlet(torch.ones(3, dtype=F64)))
        r = pyro.sample("r", dist.Beta(t(1.0), 2.0))
        pyro.sample("x", dist.Multinomial(5, p), obs=t(2.0, 3.0, 0.0))
        pyro.sample("y", dist.Bernoulli(r), obs=t(1.0))

    def guide(self):
        pyro.sample("p", dist.Dirichlet(self.a.exp() * 2))
        pyro.sample("r", dist.Kumaraswamy(self.b.exp() * 2, t(2.0)))


@enter(STOCK)
class HeavyTails(Pair):
    fields = {"a": 0.3, "b": 0.1}

    def model(self):
        z1 = pyro.sample("z1", dist.StudentT(t(4.0), 0.0, 1.0))
        z2 = pyro.sample("z2", dist.Cauchy(t(0.0), 1.0))
        z3 = pyro.sample("z3", dist.Gumbel(t(0.0), 1.0))
        pyro.sample("x", dist.Laplace(z1 + z2 + z3, 1.0), obs=X[0])

    def guide(self):
        pyro.sample("z1", dist.Laplace(self.a, 1.0))
        pyro.sample("z2", dist.StudentT(t(5.0), self.b, 1.0))
        pyro.sample("z3", dist.Logistic(self.a, self.b.exp()))


@enter(STOCK)
class CorrelatedNormals(Pair):
    fields = {"m": [0.3, -0.1], "f": [[0.4], [0.2]], "d": [0.1, 0.0]}

    def model(self):
        z = pyro.sample("z", dist.MultivariateNormal(torch.zeros(2, dtype=F64), torch.eye(2, dtype=F64)))
        pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=X)

    def guide(self):
        pyro.sample("z", dist.LowRankMultivariateNormal(self.m, self.f, self.d.exp()))


@enter(STOCK)
class WishartLikelihood(Guided):
    def model(self):
        z = pyro.sample("z", dist.Normal(t(0.0), 1.0))
        spread = z.exp()[..., None, None] * torch.eye(2, dtype=F64)
        pyro.sample("scatter", dist.Wishart(t(3.0), spread), obs=t([[1.0, 0.2], [0.2, 0.7]]))


@enter(STOCK)
class MixtureAsAGuide(Pair):
    """Pyro's own pathwise gradient of a mixture of diagonal Normals, whose derivative in the logits is wrong."""

    fields = {"m": [[0.3, 0.1], [-0.5, 0.2]]}

    def model(self):
        z = pyro.sample("z", dist.Normal(torch.zeros(2, dtype=F64), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=X)

    def guide(self):
        pyro.sample("z", dist.MixtureOfDiagNormals(self.m, torch.ones(2, 2, dtype=F64), t([0.1, 0.3])))


@enter(STOCK)
class NestedPlatesAndMasks(Pair):
    fields = {"o": [[0.3], [0.1]], "m": [[0.3, -0.2, 0.1], [0.0, 0.4, 0.2]]}

    def model(self):
        outer, inner = pyro.plate("outer", 2, dim=-2), pyro.plate("inner", 3, dim=-1)
        with outer:
            o = pyro.sample("o", dist.Normal(t(0.0), 1.0))
            with inner, poutine.mask(mask=torch.tensor([True, False, True])), poutine.scale(scale=2.0):
                z = pyro.sample("z", dist.Normal(o, 1.0))
                pyro.sample("x", dist.Normal(z, 1.0), obs=torch.ones(2, 3, dtype=F64))

    def guide(self):
        outer, inner = pyro.plate("outer", 2, dim=-2), pyro.plate("inner", 3, dim=-1)
        with outer:
            pyro.sample("o", dist.Normal(self.o, 1.0))
            with inner, poutine.mask(mask=torch.tensor([True, False, True])), poutine.scale(scale=2.0):
                pyro.sample("z", dist.Normal(self.m, 0.5))


@enter(STOCK)
class RandomSubsample(Pair):
    """Both ELBOs draw the same rows for the same seed, since the first look leaves the stream alone."""

    fields = {"m": [0.3, -0.2, 0.1, 0.5, 0.0, 0.4]}

    def model(self):
        with pyro.plate("data", 6, subsample_size=2) as rows:
            z = pyro.sample("z", dist.Normal(t(0.0), 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=torch.arange(6.0, dtype=F64)[rows])

    def guide(self):
        with pyro.plate("data", 6, subsample_size=2) as rows:
            pyro.sample("z", dist.Normal(self.m[rows], 1.0))


@enter(STOCK)
class SubsampleOfTheGuideAlone(Pair):
    """The model's plate says its full size only, and takes the rows that the guide drew (Pyro's AIR)."""

    fields = {"m": [0.3, -0.2, 0.1, 0.5, 0.0, 0.4]}

    def model(self):
        with pyro.plate("data", 6) as rows:
            z = pyro.sample("z", dist.Normal(t(0.0), 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=torch.arange(6.0, dtype=F64)[rows])

    def guide(self):
        with pyro.plate("data", 6, subsample_size=2) as rows:
            pyro.sample("z", dist.Normal(self.m[rows], 1.0))


@enter(STOCK)
class SubsampleStatement(Pair):
    fields = {"m": 0.2}

    def model(self):
        x = torch.arange(6.0, dtype=F64)
        z = pyro.sample("z", dist.Normal(t(0.0), 1.0))
        with pyro.plate("data", 6, subsample_size=3):
            batch = pyro.subsample(x, event_dim=0)
            pyro.sample("x", dist.Normal(z, 1.0), obs=batch)

    def guide(self):
        pyro.sample("z", dist.Normal(self.m, 1.0))


@enter(STOCK, vectorize_particles=False)
class LiftedParameter(Pair):
    """``poutine.lift`` gives a parameter of the model a prior."""

    fields = {"m": 0.2}

    def model(self):
        def body():
            loc = pyro.param("loc", t(0.1))
            pyro.sample("x", dist.Normal(loc, 1.0), obs=X[0])

        return poutine.lift(body, prior={"loc": dist.Normal(t(0.0), 2.0)})()

    def guide(self):
        pyro.sample("loc", dist.Normal(self.m, 0.5))


@enter(STOCK)
class ReparameterizedModel(Pair):
    fields = {"m": 0.2}

    def model(self):
        def body():
            s = pyro.sample("s", dist.Normal(t(0.0), 1.0))
            z = pyro.sample("z", dist.Normal(s, 0.5))
            pyro.sample("x", dist.Normal(z, 1.0), obs=X[0])

        return poutine.reparam(body, config={"z": LocScaleReparam(0.0)})()

    def guide(self):
        pyro.sample("s", dist.Normal(self.m, 0.5))
        pyro.sample("z_decentered", dist.Normal(self.m, 0.7))


@enter(STOCK, vectorize_particles=False)
class ConjugateRates(Pair):
    """``ConjugateReparam``: the rates are drawn in the model from their posterior, by a statement that has no site."""

    fields = {"shape": 2.0, "m": 0.3}

    def model(self):
        counts = t(1.0, 3.0, 2.0)

        def body():
            z = pyro.sample("z", dist.Normal(t(0.0), 1.0))
            with pyro.plate("data", 3):
                rate = pyro.sample("rate", dist.Gamma(self.shape, 1.0))
                pyro.sample("x", dist.Poisson(rate * z.exp()), obs=counts)

        return poutine.reparam(body, config={"rate": ConjugateReparam(dist.Gamma(counts + 1, 1.5))})()

    def guide(self):
        pyro.sample("z", dist.Normal(self.m, 0.5))


@enter(STOCK)
class RandomWalk(Pair):
    """Increments in another basis: a guide through the cosine transform, in which they are smooth."""

    fields = {"m": [0.1, 0.2, 0.3], "s": 0.0}

    def model(self):
        steps = pyro.sample("steps", dist.Normal(torch.zeros(3, dtype=F64), 0.5).to_event(1))
        pyro.sample("x", dist.Normal(steps.cumsum(-1), 1.0).to_event(1), obs=t(0.2, 0.1, 0.5))

    def guide(self):
        base = dist.Normal(self.m, self.s.exp()).to_event(1)
        pyro.sample("steps", dist.TransformedDistribution(base, [T.DiscreteCosineTransform(smooth=1.0)]))


@enter(STOCK)
class ConstrainedParameters(Pair):
    """``pyro.param`` with constraints, made by the program itself."""

    def model(self):
        p = pyro.param("p", t(0.2, 0.8), constraint=constraints.simplex)
        z = pyro.sample("z", dist.Normal(t(0.0), 1.0))
        pyro.sample("x", dist.Normal(z * p[0], 1.0), obs=X[0])

    def guide(self):
        s = pyro.param("s", t(0.7), constraint=constraints.positive)
        m = pyro.param("m", t(0.1))
        pyro.sample("z", dist.Normal(m, s))


@enter(STOCK)
class NetworksByModule(Pair):
    def __init__(self):
        super().__init__()
        self.net = nn.Linear(1, 2).double()

    def model(self):
        with pyro.plate("data", 2):
            z = pyro.sample("z", dist.Normal(t(0.0), 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=X)

    def guide(self):
        pyro.module("net", self.net)
        with pyro.plate("data", 2):
            loc, scale = self.net(X.unsqueeze(-1)).unbind(-1)
            pyro.sample("z", dist.Normal(loc, scale.exp()))


class Flow(Pair):
    """A guide pushed through one of Pyro's flows."""

    make_flow: Callable = T.spline_coupling

    def __init__(self):
        super().__init__()
        self.flow = type(self).make_flow(2).double()

    def model(self):
        z = pyro.sample("z", dist.Normal(torch.zeros(2, dtype=F64), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(z.sum(-1), 1.0), obs=X[0])

    def guide(self):
        pyro.module("flow", self.flow)
        base = dist.Normal(torch.zeros(2, dtype=F64), 1.0).to_event(1)
        pyro.sample("z", dist.TransformedDistribution(base, [self.flow]))


@enter(STOCK)
class FlowThatInverts(Flow):
    make_flow = staticmethod(T.affine_coupling)


@enter(STOCK)
class FlowWithoutAnInverse(Flow):
    """It scores the draw that it has just made, from a cache, and no other."""

    make_flow = staticmethod(T.planar)


@enter(STOCK)
class CholeskyOfCorrelations(Pair):
    """An LKJ prior, with a guide pushed through its support's transform."""

    fields = {"m": [0.1], "s": [0.0]}

    def model(self):
        root = pyro.sample("root", dist.LKJCholesky(2, t(1.5)))
        pyro.sample("x", dist.MultivariateNormal(torch.zeros(2, dtype=F64), scale_tril=root), obs=X)

    def guide(self):
        base = dist.Normal(self.m, self.s.exp()).to_event(1)
        pyro.sample("root", dist.TransformedDistribution(base, [T.CorrCholeskyTransform()]))


@enter(STOCK)
class FactorOfTheGuide(Pair):
    """``has_rsample=True``: the factor follows the draw, and its pathwise gradient is all there is."""

    fields = {"m": 0.2}

    def model(self):
        z = pyro.sample("z", dist.Normal(t(0.0), 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=X[0])

    def guide(self):
        z = pyro.sample("z", dist.Normal(self.m, 0.5))
        pyro.factor("lean", 0.3 * z, has_rsample=True)


class Regression(pyro.nn.PyroModule):
    """Weights with a prior: a Bayesian linear layer as in Pyro's tutorials."""

    def __init__(self):
        super().__init__()
        self.linear = pyro.nn.PyroModule[nn.Linear](2, 1).double()
        self.linear.weight = pyro.nn.PyroSample(dist.Normal(t(0.0), 1.0).expand([1, 2]).to_event(2))
        self.linear.bias = pyro.nn.PyroSample(dist.Normal(t(0.0), 1.0).expand([1]).to_event(1))

    def forward(self):
        scale = pyro.sample("scale", dist.LogNormal(t(0.0), 0.5))
        mean = (X.unsqueeze(-2) * self.linear.weight).sum(-1) + self.linear.bias
        pyro.sample("x", dist.Normal(mean.squeeze(-1), scale), obs=t(0.4))


class Automatic(pyro.nn.PyroModule):
    """A regression and the guide that Pyro makes for it."""

    make_guide: Callable

    def __init__(self):
        super().__init__()
        self.model = Regression()
        self.guide = type(self).make_guide(self.model)


for name, make_guide in {
    "GuideOfNormals": AutoNormal,
    "GuideOfOneJointNormal": AutoMultivariateNormal,
    "GuideOfLowRank": AutoLowRankMultivariateNormal,
    "GuideOfPoints": AutoDelta,
    "GuideWithStructure": AutoStructured,
}.items():
    enter(STOCK)(type(name, (Automatic,), {"make_guide": staticmethod(make_guide)}))


# ---- closed forms


@enter(CLOSED, {"c": "enumerate", "z": "pathwise"}, {"c": "score", "z": "pathwise"}, {"c": "rloo", "z": "pathwise"})
class SwitchOverANormal(Pair):
    """A coin that chooses the mean of a Normal latent."""

    fields = {"a": 0.4, "m": [0.5, -0.3]}

    def model(self):
        c = pyro.sample("c", dist.Bernoulli(logits=t(0.2)))
        z = pyro.sample("z", dist.Normal(2 * c - 1, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=X[0])

    def guide(self):
        c = pyro.sample("c", dist.Bernoulli(logits=self.a))
        pyro.sample("z", dist.Normal(self.m[0] * c + self.m[1], 0.5))

    def truth(self):
        total = 0.0
        for c in (0.0, 1.0):
            q = torch.sigmoid(self.a if c else -self.a)
            mean = self.m[0] * c + self.m[1]
            kl = normal_kl(mean, t(0.5), 2 * c - 1, 1.0)
            coin = q.log() - dist.Bernoulli(logits=t(0.2)).log_prob(t(c))
            total = total + q * (coin + kl - mean_log_normal(X[0], mean, 0.5))
        return total


@enter(CLOSED, "score", "rloo", "measure-valued")
class PoissonLatent(Pair):
    fields = {"a": 0.4}

    def model(self):
        n = pyro.sample("n", dist.Poisson(t(1.5)))
        pyro.sample("x", dist.Normal(n, 2.0), obs=t(1.0))

    def guide(self):
        pyro.sample("n", dist.Poisson(self.a.exp()))

    def truth(self):
        n = torch.arange(60.0, dtype=F64)
        q, p = dist.Poisson(self.a.exp()), dist.Poisson(t(1.5))
        cost = q.log_prob(n) - p.log_prob(n) - dist.Normal(n, 2.0).log_prob(t(1.0))
        return (q.log_prob(n).exp() * cost).sum()


@enter(CLOSED, "score", "rloo")
class WaitingTime(Pair):
    fields = {"a": 0.4}

    def model(self):
        n = pyro.sample("n", dist.Geometric(t(0.4)))
        pyro.sample("x", dist.Normal(n, 2.0), obs=t(1.0))

    def guide(self):
        pyro.sample("n", dist.Geometric(logits=self.a))

    def truth(self):
        n = torch.arange(120.0, dtype=F64)
        q, p = dist.Geometric(logits=self.a), dist.Geometric(t(0.4))
        cost = q.log_prob(n) - p.log_prob(n) - dist.Normal(n, 2.0).log_prob(t(1.0))
        return (q.log_prob(n).exp() * cost).sum()


@enter(CLOSED, "score", "rloo")
class AngleOnACircle(Pair):
    """VonMises has no reparameterized sampler."""

    fields = {"a": 0.4}

    def model(self):
        angle = pyro.sample("angle", dist.VonMises(t(0.0), 1.0))
        pyro.sample("x", dist.Normal(angle.cos(), 1.0), obs=X[0])

    def guide(self):
        pyro.sample("angle", dist.VonMises(self.a, t(2.0)))

    def truth(self):
        # The trapezoid rule on a periodic function is exact to rounding.
        grid = (torch.arange(400, dtype=F64) / 400 * 2 - 1) * math.pi
        q, p = dist.VonMises(self.a, t(2.0)), dist.VonMises(t(0.0), 1.0)
        cost = q.log_prob(grid) - p.log_prob(grid) - dist.Normal(grid.cos(), 1.0).log_prob(X[0])
        return (q.log_prob(grid).exp() * cost).sum() * 2 * math.pi / 400


@enter(CLOSED, "pathwise", "score", "stl", "measure-valued")
class NormalByEveryRoad(Pair):
    fields = {"m": 0.3, "s": -0.4}

    def model(self):
        z = pyro.sample("z", dist.Normal(t(0.2), 1.5))
        pyro.sample("x", dist.Normal(z, 1.0), obs=X[0])

    def guide(self):
        pyro.sample("z", dist.Normal(self.m, self.s.exp()))

    def truth(self):
        return normal_kl(self.m, self.s.exp(), 0.2, 1.5) - mean_log_normal(X[0], self.m, self.s.exp())


@enter(CLOSED, "pathwise", "score")
class WeightedDivergence(Pair):
    """``kl_weight`` weighs every latent term, a factor of the model counts with the data."""

    fields = {"m": 0.3, "s": -0.4}
    weight = 0.25

    model = NormalByEveryRoad.model
    guide = NormalByEveryRoad.guide

    def truth(self):
        return self.weight * normal_kl(self.m, self.s.exp(), 0.2, 1.5) - mean_log_normal(X[0], self.m, self.s.exp())


@enter(CLOSED, "pathwise", "score", "stl", "measure-valued")
class ScaleOfANormalThatLearns(Pair):
    fields = {"m": 0.3, "s": -0.4, "k": 0.3}

    def model(self):
        with poutine.scale(scale=self.k.exp()):
            z = pyro.sample("z", dist.Normal(t(0.2), 1.5))
        pyro.sample("x", dist.Normal(z, 1.0), obs=X[0])

    def guide(self):
        with poutine.scale(scale=self.k.exp()):
            pyro.sample("z", dist.Normal(self.m, self.s.exp()))

    def truth(self):
        divergence = self.k.exp() * normal_kl(self.m, self.s.exp(), 0.2, 1.5)
        return divergence - mean_log_normal(X[0], self.m, self.s.exp())


CLOSED["weighted divergence"] = Entry(WeightedDivergence, ("pathwise", "score"), {"kl_weight": 0.25})


def normal_kl(m, s, m0, s0):
    s, s0 = torch.as_tensor(s, dtype=F64), torch.as_tensor(s0, dtype=F64)
    return s0.log() - s.log() + (s**2 + (m - m0) ** 2) / (2 * s0**2) - 0.5


def mean_log_normal(x, m, s):
    """E log N(x; z, 1) for z ~ N(m, s)."""
    return -0.5 * math.log(2 * math.pi) - 0.5 * ((x - m) ** 2 + s**2)


class Listed:
    """The truth of a discrete program, for estimators whose draws (uniforms) cannot be listed."""

    def truth(self):
        return -exact_elbo(self.model, self.guide)


@enter(CLOSED, "disarm", "arm", "rebar")
class PairedCoinsOfOneEvent(Listed, CoinsOfOneEvent):
    pass


@enter(
    CLOSED, {"g": "score", "z": "disarm"}, {"g": "disarm", "z": "disarm"}, {"g": "enumerate", "z": "local-expectation"}
)
class PairsInsideAPlate(Listed, GlobalAfterAPlate):
    pass


@enter(CLOSED, "pathwise", "rloo")
class SamplerByRejection(Pair):
    """A sampler of which only a part is reparameterized: the rest of its gradient is a score."""

    fields = {"a": 0.4}
    calls, resolves = 60, 0.08

    def model(self):
        z = pyro.sample("z", dist.Gamma(t(2.0), 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=t(1.5))

    def guide(self):
        pyro.sample("z", RejectionStandardGamma(1 + (self.a - 1).exp()))

    def truth(self):
        grid = torch.linspace(1e-6, 40.0, 200_001, dtype=F64)
        q, p = dist.Gamma(1 + (self.a - 1).exp(), t(1.0)), dist.Gamma(t(2.0), 1.0)
        cost = q.log_prob(grid) - p.log_prob(grid) - dist.Normal(grid, 1.0).log_prob(t(1.5))
        return torch.trapezoid(q.log_prob(grid).exp() * cost, grid)


ROWS = 400


def mean_of_rows(body):
    """Independent copies of a program in a plate, with the mean for the sum: many masks in one call."""

    def program(self):
        with poutine.scale(scale=1 / ROWS), pyro.plate("rows", ROWS):
            body(self)

    return program


@enter(CLOSED, "score", "rloo", "disarm", "arm", "local-expectation", "measure-valued")
class NoiseOutsideOfSample(Pair):
    """Dropout in front of a coin: each draw has a mask, and a run that is repeated must repeat it."""

    fields = {"a": 0.4, "w": 0.8}
    particles, calls, resolves = 2, 60, 0.08

    @mean_of_rows
    def model(self):
        z = pyro.sample("z", dist.Bernoulli(logits=t(0.2)))
        pyro.sample("x", dist.Normal(self.w * z, 1.0), obs=X[0])

    @mean_of_rows
    def guide(self):
        kept = nn.functional.dropout(torch.ones(ROWS, dtype=F64), 0.5)
        pyro.sample("z", dist.Bernoulli(logits=self.a * kept - 0.3))

    def truth(self):
        total = 0.0
        for kept in (0.0, 2.0):
            q = dist.Bernoulli(logits=self.a * kept - 0.3)
            for z in (t(0.0), t(1.0)):
                cost = q.log_prob(z) - dist.Bernoulli(logits=t(0.2)).log_prob(z)
                total = total + 0.5 * q.log_prob(z).exp() * (cost - dist.Normal(self.w * z, 1.0).log_prob(X[0]))
        return total


@enter(CLOSED, {"z": "score", "g": "pathwise"}, {"z": "disarm", "g": "pathwise"}, {"z": "measure-valued", "g": "stl"})
class NoiseUpstreamOfANormal(Pair):
    """The mask reaches a coin and, below it, a Normal site."""

    fields = {"a": 0.4, "m": 0.3}
    particles, calls, resolves = 2, 60, 0.12

    @mean_of_rows
    def model(self):
        z = pyro.sample("z", dist.Bernoulli(logits=t(0.2)))
        g = pyro.sample("g", dist.Normal(z, 1.0))
        pyro.sample("x", dist.Normal(g, 1.0), obs=X[0])

    @mean_of_rows
    def guide(self):
        kept = nn.functional.dropout(torch.ones(ROWS, dtype=F64), 0.5)
        z = pyro.sample("z", dist.Bernoulli(logits=self.a * kept - 0.3))
        pyro.sample("g", dist.Normal(self.m * kept + z, 0.5))

    def truth(self):
        total = 0.0
        for kept in (0.0, 2.0):
            q = dist.Bernoulli(logits=self.a * kept - 0.3)
            for z in (t(0.0), t(1.0)):
                mean = self.m * kept + z
                coin = q.log_prob(z) - dist.Bernoulli(logits=t(0.2)).log_prob(z)
                cost = coin + normal_kl(mean, 0.5, z, 1.0) - mean_log_normal(X[0], mean, 0.5)
                total = total + 0.5 * q.log_prob(z).exp() * cost
        return total


# ---- one meaning, two programs


@enter(SAME, "score", "pathwise")
class PlateOrLoop(Pair):
    """A vectorized plate, and the same by ``.to_event``: draws are the same, term by term or together."""

    fields = {"m": [0.3, -0.2]}

    def model(self):
        with pyro.plate("data", 2):
            z = pyro.sample("z", dist.Normal(t(0.0), 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=X)

    def guide(self):
        with pyro.plate("data", 2):
            pyro.sample("z", dist.Normal(self.m, 1.0))

    def same(self):
        other = type("Other", (Pair,), {"fields": self.fields})()

        def model():
            with pyro.plate("data"):
                z = pyro.sample("z", dist.Normal(torch.zeros(2, dtype=F64), 1.0))
                pyro.sample("x", dist.Normal(z, 1.0), obs=X)

        def guide():
            with pyro.plate("data"):
                pyro.sample("z", dist.Normal(other.m, 1.0))

        return other, model, guide


@enter(SAME, "score", "enumerate", "disarm")
class InferConfig(Pair):
    """Marks by ``poutine.infer_config`` are the marks of the statement."""

    fields = {"a": [0.3, -0.2]}
    model = PlateOfAnUnknownSize.model
    w = 0.8

    def guide(self):
        with pyro.plate("data"):
            pyro.sample("z", dist.Bernoulli(logits=self.a))

    def same(self):
        other = InferConfig()

        def mark(site):
            return {"some_key_of_theirs": 1}

        return other, other.model, poutine.infer_config(other.guide, config_fn=mark)


@enter(SAME, "score", "pathwise")
class HandlersAroundTheGuide(Pair):
    fields = {"m": [0.3, -0.2]}
    model = PlateOrLoop.model
    guide = PlateOrLoop.guide

    def same(self):
        other = HandlersAroundTheGuide()
        return other, poutine.scale(other.model, scale=1.0), poutine.block(poutine.mask(other.guide, True), hide=[])


@enter(STOCK)
class MaskAsAnImproperPrior(Pair):
    """A masked latent on which the data depend has a flat prior, and its log q counts."""

    fields = {"m": 0.3, "s": -0.3}

    def model(self):
        z = pyro.sample("z", dist.Normal(t(0.0), 1.0).mask(False))
        pyro.sample("x", dist.Normal(z, 1.0), obs=X[0])

    def guide(self):
        pyro.sample("z", dist.Normal(self.m, self.s.exp()))


# ---- refused in one line


class Coin(Pair):
    fields = {"a": 0.4, "w": 0.7}

    def model(self):
        z = pyro.sample("z", dist.Bernoulli(logits=t(-0.3)))
        pyro.sample("x", dist.Normal(self.w * z, 1.0), obs=X[0])

    def guide(self):
        pyro.sample("z", dist.Bernoulli(logits=self.a))


@enter(REFUSED, "score", says="'s'.*support")
class SupportThatMoves(Pair):
    fields = {"a": 0.4}

    def model(self):
        s = pyro.sample("s", dist.Uniform(t(0.0), 5.0))
        pyro.sample("x", dist.Normal(s, 1.0), obs=X[0])

    def guide(self):
        pyro.sample("s", dist.Uniform(t(0.0), self.a.exp()))


@enter(REFUSED, "score", says="'z' is sampled twice")
class OneNameTwice(Coin):
    def guide(self):
        pyro.sample("z", dist.Bernoulli(logits=self.a))
        pyro.sample("z", dist.Bernoulli(logits=self.a))


@enter(REFUSED, "score", says="'extra'.*nowhere in the model")
class SiteOfTheGuideAlone(Coin):
    def guide(self):
        super().guide()
        pyro.sample("extra", dist.Bernoulli(logits=self.a))


@enter(REFUSED, "score", says="'y'.*no site in the guide")
class SiteOfTheModelAlone(Coin):
    def model(self):
        super().model()
        pyro.sample("y", dist.Normal(t(0.0), 1.0))


@enter(REFUSED, "score", says="'y'.*sequential")
class ListedInSequenceByTheModel(Coin):
    def model(self):
        super().model()
        pyro.sample("y", dist.Bernoulli(t(0.3)), infer={"enumerate": "sequential"})


@enter(REFUSED, "score", says="'z'.*pmf.*density")
class PmfAgainstDensity(Coin):
    def model(self):
        z = pyro.sample("z", dist.Normal(t(0.0), 1.0))
        pyro.sample("x", dist.Normal(self.w * z, 1.0), obs=X[0])


@enter(REFUSED, "score", says="'z'.*outside any plate")
class LooseBatch(Pair):
    fields = {"a": [0.4, 0.2]}

    def model(self):
        z = pyro.sample("z", dist.Bernoulli(logits=torch.zeros(2, dtype=F64)))
        pyro.sample("x", dist.Normal(z.sum(-1), 1.0), obs=X[0])

    def guide(self):
        pyro.sample("z", dist.Bernoulli(logits=self.a))


@enter(REFUSED, {"zz": "score"}, says="'zz'.*does not sample")
class WordForNoSite(Coin):
    pass


@enter(REFUSED, "arm", says="'z'.*Bernoulli")
class PairsOfANormal(Guided):
    def model(self):
        z = pyro.sample("z", dist.Normal(t(0.0), 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=X[0])


@enter(REFUSED, "default", says="'z'.*no reparameterized sampler")
class NoWordForACoin(Coin):
    pass


@enter(REFUSED, "rloo", says="num_particles", num_particles=1)
class LeaveNoneOut(Coin):
    pass


@enter(REFUSED, "dreg", says="'z'.*'elbo'")
class DoublyUnderTheElbo(PairsOfANormal):
    pass


@enter(REFUSED, "score", says="max_plate_nesting is 0", max_plate_nesting=0)
class PlatesDeeperThanSaid(PlateOfAnUnknownSize):
    pass


@enter(REFUSED, "enumerate", says="'z'.*limit")
class TooManyToList(Pair):
    def __init__(self):
        super().__init__()
        self.a = nn.Parameter(torch.zeros(40, dtype=F64))

    def model(self):
        z = pyro.sample("z", dist.Bernoulli(logits=torch.zeros(40, dtype=F64)).to_event(1))
        pyro.sample("x", dist.Normal(z.sum(-1), 1.0), obs=X[0])

    def guide(self):
        pyro.sample("z", dist.Bernoulli(logits=self.a).to_event(1))


@enter(REFUSED, "score", says="'z'.*no inverse.*pathwise")
class ScoreOfAFlowWithoutAnInverse(FlowWithoutAnInverse):
    pass


@enter(REFUSED, "score", says="Shape mismatch inside plate")
class PlateOfTheWrongSize(Coin):
    def model(self):
        with pyro.plate("data", 3):
            super().model()
            pyro.sample("y", dist.Normal(torch.zeros(2, dtype=F64), 1.0), obs=X)

    def guide(self):
        with pyro.plate("data", 3):
            super().guide()


@enter(REFUSED, "pathwise", says="kl_weight", objective="iwae", num_particles=2, kl_weight=0.3)
class WeightedDivergenceOfImportanceWeights(NormalByEveryRoad):
    pass


@enter(REFUSED, "score", says="'x'.*observe")
class LatentThatTheModelObserves(Coin):
    def guide(self):
        super().guide()
        pyro.sample("x", dist.Normal(self.a, 1.0))


@enter(REFUSED, "score", says="'x'.*both observe it")
class LatentsAndDataOfTheModel(Coin):
    """The model as its own guide."""

    def guide(self):
        self.model()


@enter(REFUSED, "score", says="'z'.*one value")
class PointOfTheModelDrawnByTheGuide(Coin):
    def model(self):
        z = pyro.sample("z", dist.Delta(t(1.0)))
        pyro.sample("x", dist.Normal(self.w * z, 1.0), obs=X[0])


@enter(REFUSED, "score", says="torch.distributions.Bernoulli is no Pyro distribution")
class DistributionOfTorch(Coin):
    def guide(self):
        pyro.sample("z", torch.distributions.Bernoulli(logits=self.a))


class Shapeless(dist.Distribution):
    """A histogram without shapes, as the marginals of Pyro's RSA examples are."""

    def sample(self):
        return t(1.0)

    def log_prob(self, value):
        return t(-0.7) * (1 + value)


SHAPELESS = "'{}': Shapeless has no batch_shape and event_shape"


@enter(REFUSED, "score", "enumerate", says=SHAPELESS.format("x"))
class ObservationWithoutShapes(Coin):
    def model(self):
        pyro.sample("z", dist.Bernoulli(logits=t(0.2)))
        pyro.sample("x", Shapeless(), obs=X[0])


@enter(REFUSED, "score", "enumerate", says=SHAPELESS.format("z"))
class DrawWithoutShapes(Coin):
    def guide(self):
        pyro.sample("z", Shapeless())


@enter(REFUSED, "pathwise", says="'rows' is subsampled", objective="iwae", num_particles=2)
class GlobalUnderASubsampledLoop(Pair):
    """Importance weights of a global latent need all rows: two of four do not estimate the bound."""

    fields = {"m": 0.3}

    def model(self):
        g = pyro.sample("g", dist.Normal(t(0.0), 1.0))
        for i in pyro.plate("rows", 4, subsample_size=2):
            pyro.sample(f"x{i}", dist.Normal(g, 1.0), obs=X[0])

    def guide(self):
        pyro.sample("g", dist.Normal(self.m, 1.0))
        for _ in pyro.plate("rows", 4, subsample_size=2):
            pass


@enter(REFUSED, "pathwise", says="'data' has 2 rows.*6 later")
class PlatesOfTwoSizes(Pair):
    """A guide over the batch alone, and a model that scales the batch to all data."""

    fields = {"m": 0.3}

    def model(self):
        with pyro.plate("data", 6):
            z = pyro.sample("z", dist.Normal(t(0.0), 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=X)

    def guide(self):
        with pyro.plate("data", 2):
            pyro.sample("z", dist.Normal(self.m, 1.0))


class PlateThatParticlesMisfit(Pair):
    """A sum over the last dimension takes the particles for a plate, so that a later plate does not fit."""

    fields = {"a": [0.4, -0.2]}

    def model(self):
        with pyro.plate("few", 2):
            z = pyro.sample("z", dist.Bernoulli(logits=torch.zeros(2, dtype=F64)))
        with pyro.plate("more", 3):
            pyro.sample("x", dist.Bernoulli(logits=z.sum(-1)).expand([3]), obs=t(0.0, 1.0, 1.0))

    def guide(self):
        with pyro.plate("few", 2):
            pyro.sample("z", dist.Bernoulli(logits=self.a))
