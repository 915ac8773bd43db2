"""Sources of a toy model, guide, estimator, family and objective, and their registration for the time of a test."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

from gumbo.guides import guides
from gumbo.inference.estimators import estimators
from gumbo.inference.objectives import objectives
from gumbo.models import models
from gumbo.models.families import families

REGISTRIES = (models, guides, estimators, families, objectives)


@contextmanager
def additions(folder: Path) -> Iterator[Callable[[str], ModuleType]]:
    """Yields ``add(source)``, which imports a file of that source; its registrations are undone at the end."""
    before = [dict(registry._items) for registry in REGISTRIES]

    def add(source: str) -> ModuleType:
        path = folder / "addition.py"
        path.write_text(source)
        spec = importlib.util.spec_from_file_location("addition", path)
        sys.modules["addition"] = module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    try:
        yield add
    finally:
        sys.modules.pop("addition", None)
        for registry, items in zip(REGISTRIES, before, strict=True):
            registry._items = items


MODEL = '''
import math

import pyro
import pyro.distributions as dist
from torch import nn

from gumbo.models import GenerativeModel, Latent, models


@models.register("toy")
class Toy(GenerativeModel):
    """Two Normal latents, and Normal data around a linear map of them."""

    def __init__(self, data_shape):
        super().__init__(data_shape)
        self.latents = {"z": Latent("normal", (2,))}
        self.decoder = nn.Linear(2, math.prod(self.data_shape))

    def forward(self, x=None, *, batch_size=1):
        with self.data_plate(x, batch_size):
            zeros = self.decoder.bias.new_zeros(2)
            z = pyro.sample("z", dist.Normal(zeros, 1.0).to_event(1))
            mean = self.decoder(z).unflatten(-1, self.data_shape)
            return pyro.sample("x", dist.Normal(mean, 1.0).to_event(len(self.data_shape)), obs=x)
'''

GUIDE = '''
from gumbo.guides import guides
from gumbo.guides._base import FactorizedGuide
from gumbo.models.families import distribution


@guides.register("toy")
class ToyGuide(FactorizedGuide):
    """Normals of standard deviation at least 1/10."""

    families = ("normal",)

    def distribution(self, latent, output):
        return distribution(latent, output, min_sd=0.1)
'''

ESTIMATOR = '''
from gumbo.inference.estimators import estimators
from gumbo.inference.estimators._base import Estimator, detached_draw, score_why_not


@estimators.register("toy")
class Toy(Estimator):
    """The score function, with nothing taken off its cost."""

    log_q = "value"

    def why_not(self, site):
        return score_why_not(site)

    def draw(self, fn, step, args=(), kwargs=None):
        return detached_draw(fn, args, kwargs)

    def surrogate(self, view):
        return view.cost * view.log_prob
'''

FAMILY = """
import pyro.distributions as dist
from torch.distributions import constraints
from torch.nn.functional import softplus

from gumbo.models.families import Family, families


def make(latent, output, *, min_sd=1e-4, **_):
    rank = len(latent.shape)
    loc, raw = output.unflatten(-1, (2, *latent.shape)).unbind(-1 - rank)
    return dist.Laplace(loc, softplus(raw) + min_sd).to_event(rank)


def standard(latent, zero):
    return dist.Laplace(zero.expand(latent.shape), 1.0).to_event(len(latent.shape))


families.register("toy", Family(constraints.real, make, standard, outputs=2))
"""

OBJECTIVE = '''
from gumbo.inference.engine.terms import elbo_value
from gumbo.inference.objectives import Objective, objectives


@objectives.register("toy")
class ToyBound(Objective):
    """Twice the evidence lower bound."""

    name = "toy"
    sums_over_rows = True

    def accepts(self, estimator):
        return "elbo" in estimator.objectives

    def value(self, recorded):
        return 2 * elbo_value(recorded.groups, recorded.layout, recorded.view)
'''
