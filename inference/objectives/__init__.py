"""Objectives of variational inference, one file each."""

from . import doubly, evidence, free_bits, importance, log_variance, renyi, wake_sleep
from ._base import Objective, Recorded, as_objective, objectives
from ._weights import Weights, importance_weights

__all__ = [
    "Objective",
    "Recorded",
    "Weights",
    "as_objective",
    "doubly",
    "evidence",
    "free_bits",
    "importance",
    "log_variance",
    "importance_weights",
    "objectives",
    "renyi",
    "wake_sleep",
]
