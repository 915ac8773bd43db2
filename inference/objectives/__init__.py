"""What is estimated, one file an objective."""

from . import doubly, evidence, free_bits, importance, wake_sleep
from ._base import Objective, Recorded, as_objective, objectives

__all__ = [
    "Objective",
    "Recorded",
    "as_objective",
    "doubly",
    "evidence",
    "free_bits",
    "importance",
    "objectives",
    "wake_sleep",
]
