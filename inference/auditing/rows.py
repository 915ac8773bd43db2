"""What an audit knows of one estimator."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from pyro.infer import ELBO

from .moments import Moments
from .sampler import Draws


@dataclass
class Row:
    """One estimator in the audit; ``refused`` says why it has no numbers."""

    label: str
    loss: ELBO | None = None
    draws: Draws | None = None
    refused: str | None = None
    unbiased: bool = True
    objective: str = "elbo"
    num_particles: int = 0
    evaluations: float = math.nan
    seconds: list[float] = field(default_factory=list)
    moments: Moments | None = None
    warned: list[str] = field(default_factory=list)

    @property
    def judged(self) -> bool:
        return self.refused is None and self.moments is not None and self.moments.count > 1
