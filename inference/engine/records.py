"""The record of one run of a guide and a model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from ..estimators._base import Draw, Estimator
from .streams import OwnNoise

PARTICLES = "_gumbo_particles"  # the plate of particles
Frame = tuple[str, int, int]
Frames = frozenset[Frame]


@dataclass
class Site:
    """One recorded sample statement, with its log-probability in the layout of ``programs.py``."""

    name: str
    fn: Any
    value: Tensor
    frames: Frames
    log_prob: Tensor
    scale: Any = 1.0
    latent: bool = False
    settled: bool = False  # a Delta or a pyro.deterministic: it can transmit a dependence, but is not random
    estimator: Estimator | None = None
    draw: Draw | None = None
    score: Tensor | None = None
    enum_dim: int | None = None
    joint: bool = False
    factor: bool = False  # a pyro.factor of the guide for earlier draws without a path
    infer: Mapping[str, Any] = field(default_factory=dict)
    masked: bool = False  # a mask of the program hides some of its elements
    scored: bool = True  # False where a replayed draw cannot be scored, and only the other sites can be compared
    sums: tuple[str, ...] = ()  # the factors of the sum that it replaces
    summed: bool = False  # a factor of a sum over enumerated sites; the sum is another site's log_prob
    unscaled: Tensor | None = None  # log_prob without its scale, where the scale has a gradient of its own

    def with_gradient_of(self, log_prob: bool = False, scale: bool = False) -> Tensor:
        """The site's log_prob, scaled, with the gradient of one of its factors only, or of neither."""
        if self.unscaled is None:
            return self.log_prob if log_prob else self.log_prob.detach()
        factor = self.unscaled if log_prob else self.unscaled.detach()
        return factor * (self.scale if scale else self.scale.detach())

    @property
    def random(self) -> bool:
        """Whether it is a latent site whose value is not computed from other draws."""
        return self.latent and not self.settled

    @property
    def drawn(self) -> bool:
        return self.estimator is not None and not self.estimator.enumerates


@dataclass
class Run:
    """One run of guide and model: K particles at once, or one particle, or one path through enumerated values."""

    guide: list[Site]
    model: list[Site]
    choices: dict[str, int] = field(default_factory=dict)
    subsamples: dict[str, Tensor] = field(default_factory=dict)
    guide_params: dict[str, Tensor] = field(default_factory=dict)
    model_params: dict[str, Tensor] = field(default_factory=dict)
    listed: dict[str, int] = field(default_factory=dict)  # the number of values of each enumerated site
    limit: int = 0
    eliminated: tuple[str, ...] = ()  # the enumerated sites of the model that the guide does not sample
    terms: list[Any] = field(default_factory=list)  # the factors of the sums (elimination.Terms)
    noise: OwnNoise | None = None  # the programs' noise outside sample statements; None if it is not separate
    statements: dict[str, Any] = field(default_factory=dict)  # the guide's sample statements as they ran, by name
    model_statements: dict[str, Any] = field(default_factory=dict)

    @property
    def sites(self) -> list[Site]:
        return self.guide + self.model

    def _plates(self) -> list[Any]:
        """The plates of all statements, as Pyro records them."""
        statements = (*self.statements.values(), *self.model_statements.values())
        return [f for msg in statements for f in msg["cond_indep_stack"] if f.name != PARTICLES]

    @property
    def loops(self) -> frozenset[str]:
        """Sequential plates."""
        return frozenset(f.name for f in self._plates() if not f.vectorized)

    @property
    def partial_plates(self) -> Frames:
        """Vectorized plates of which only some rows were visited."""
        partial = [f for f in self._plates() if f.vectorized and f.full_size not in (None, f.size)]
        return frozenset((f.name, f.dim, f.size) for f in partial)

    @property
    def part_sizes(self) -> dict[str, tuple[int, int]]:
        """The full size and the number of rows visited of each vectorized plate that is subsampled, by name."""
        partial = [f for f in self._plates() if f.vectorized and f.full_size not in (None, f.size)]
        return {f.name: (f.full_size, f.size) for f in partial}

    @property
    def partial_loops(self) -> frozenset[str]:
        """Sequential plates of which only some elements were visited."""
        return frozenset(f.name for f in self._plates() if not f.vectorized and f.full_size not in (None, f.size))

    def guide_site(self, name: str) -> Site:
        return next(site for site in self.guide if site.name == name)

    def upstream(self, name: str) -> list[Site]:
        """The guide's sites that ran before this one."""
        return self.guide[: next(i for i, site in enumerate(self.guide) if site.name == name)]
