"""The state of one estimator in an audit."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from pyro.infer import ELBO

from ...errors import Refusal
from .moments import Moments
from .sampler import Draws


@dataclass
class Row:
    """One estimator in the audit.

    Attributes:
        refused: why it has no numbers; ``failed`` if the reason is an error and not a refusal.
    """

    label: str
    loss: ELBO | None = None
    draws: Draws | None = None
    refused: Refusal | None = None
    failed: bool = False
    unbiased: bool = True
    objective: str = "elbo"
    num_particles: int = 0
    evaluations: float = math.nan
    seconds: list[float] = field(default_factory=list)
    moments: Moments | None = None
    warned: list[str] = field(default_factory=list)

    @property
    def said(self) -> str:
        """Why it has no numbers, for the table; empty if it has some."""
        if self.refused is None:
            return ""
        return f"{'failed' if self.failed else 'refused'}: {self.refused}"

    @property
    def judged(self) -> bool:
        return self.refused is None and self.moments is not None and self.moments.count > 1
