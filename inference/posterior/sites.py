"""The layout of a site's numbers, and the rows of its plates in a run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pyro.distributions as dist
import torch
from pyro.poutine.trace_struct import Trace
from torch.distributions import constraints

from ...errors import PROGRAM_ERRORS, first_line
from ..estimators._distributions import describe, elementary, is_computed, is_discrete, support_of
from .vmapped import random_sites


@dataclass(frozen=True)
class SiteLayout:
    """The layout of a site's numbers: dimensions ``(*batch, *event)``, without those of size 1 outside plates.

    ``dims`` are the batch dimensions that are kept, as negative indices into the program's batch shape; ``names`` are
    their plates, None for a batch dimension without a plate.
    """

    name: str
    kind: str
    dims: tuple[int, ...]
    names: tuple[str | None, ...]
    sizes: tuple[int, ...]
    event: tuple[int, ...]
    depth: int
    dtype: torch.dtype
    point: bool = False
    values: str = ""  # of a discrete site: one of `one-hot`, `classes`, `binary`, `counts`

    @property
    def discrete(self) -> bool:
        return bool(self.values)

    @property
    def determined(self) -> bool:
        """Whether other sites determine its value; ``transformed`` ones have a density of their own all the same."""
        return self.kind in ("deterministic", "transformed")

    @property
    def in_prior(self) -> bool:
        return self.kind in ("latent", "transformed")

    @property
    def plates(self) -> frozenset[str]:
        return frozenset(name for name in self.names if name is not None)

    @property
    def shape(self) -> tuple[int, ...]:
        return (*self.sizes, *self.event)

    @property
    def numel(self) -> int:
        return int(torch.Size(self.shape).numel())


@dataclass(frozen=True)
class Block:
    """Rows of a run by plate: their destination (``at``), and which of the run's rows are new (``take``)."""

    at: Mapping[str, slice] = field(default_factory=dict)
    take: Mapping[str, slice] = field(default_factory=dict)
    rows: Mapping[str, torch.Tensor] = field(default_factory=dict)

    def first(self, layout: SiteLayout) -> bool:
        """Whether no earlier block has visited the site's rows, or the site if it has none."""
        return all(span.start == 0 for plate, span in self.at.items() if plate not in layout.plates)

    def index(self, names: Sequence[str | None]) -> tuple[slice, ...]:
        return tuple(self.at.get(name, slice(None)) for name in names)

    def fresh(self, names: Sequence[str | None]) -> tuple[slice, ...]:
        return tuple(self.take.get(name, slice(None)) for name in names)


def discrete_values(fn: Any) -> str:
    """What the values of a discrete distribution are; an empty string for a continuous one.

    >>> import pyro.distributions as dist
    >>> ones = torch.ones(3)
    >>> laws = dist.OneHotCategorical(ones), dist.Categorical(ones), dist.Bernoulli(ones / 2), dist.Poisson(ones)
    >>> [discrete_values(law) for law in (*laws, dist.Normal(ones, ones))]
    ['one-hot', 'classes', 'binary', 'counts', '']
    """
    if not is_discrete(fn):
        return ""
    support = support_of(elementary(fn))
    while isinstance(support, type(constraints.independent(constraints.real, 1))):
        support = support.base_constraint
    if isinstance(support, type(constraints.one_hot)):
        return "one-hot"
    if isinstance(elementary(fn), torch.distributions.Categorical):
        return "classes"
    return "binary" if isinstance(support, type(constraints.boolean)) else "counts"


def why_undrawable(fn: Any) -> str | None:
    """A phrase that says why nothing can be drawn from a distribution, or None.

    >>> import pyro.distributions as dist
    >>> laws = dist.Normal(0.0, 1.0), dist.ImproperUniform(dist.constraints.real, (), ())
    >>> [why_undrawable(law) for law in laws]
    [None, 'nothing can be drawn from its ImproperUniform']
    """
    try:
        fn()
    except (NotImplementedError, AssertionError):  # an HMM without a duration asserts that it has one
        return f"nothing can be drawn from its {describe(fn)}"
    except PROGRAM_ERRORS as error:
        return f"a draw from its {describe(fn)} fails: {first_line(error, kind=True)}"
    return None


def lengths_of(*traces: Trace) -> dict[str, int]:
    """The number of rows in each plate without a size (``pyro.plate("data")``)."""
    found: dict[str, int] = {}
    for trace in traces:
        for _, site in random_sites(trace):
            value, fn = site["value"], site["fn"]
            if is_computed(site):
                continue  # Pyro counts all its dimensions as event dimensions
            batch = torch.broadcast_shapes(fn.batch_shape, value.shape[: value.dim() - fn.event_dim])
            for frame in site["cond_indep_stack"]:
                if frame.vectorized and frame.size == -1:
                    rows = batch[frame.dim] if -frame.dim <= len(batch) else 1
                    found[frame.name] = max(rows, found.get(frame.name, 1))
    return found


def kind_of(site: Mapping[str, Any]) -> str:
    if is_computed(site):
        return "deterministic"
    fn = site["fn"]
    while hasattr(fn, "base_dist") and not isinstance(fn, torch.distributions.TransformedDistribution):
        fn = fn.base_dist
    if isinstance(fn, dist.Unit):
        return "factor"
    if site["is_observed"]:
        return "observed"
    return "latent"


def key_of(layout: SiteLayout, block: Block) -> tuple:
    return (layout.name, *((plate, span.start) for plate, span in block.at.items() if plate in layout.plates))


def has_rows(value: object, size: int) -> bool:
    return isinstance(value, torch.Tensor) and value.dim() > 0 and value.shape[0] == size
