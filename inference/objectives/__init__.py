"""What is estimated, one file an objective."""

from . import doubly, evidence, importance, wake_sleep
from ._base import Objective, Recorded, as_objective, objectives

__all__ = ["Objective", "Recorded", "as_objective", "doubly", "evidence", "importance", "objectives", "wake_sleep"]
