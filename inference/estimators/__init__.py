"""Gradient estimators: one file per family. A new one is a file and an import line here."""

from __future__ import annotations

from ._base import Draw, Estimator, SiteView, estimators
from .doubly import DoublyReparameterized
from .enumeration import Enumerate
from .pathwise import Pathwise
from .relaxation import Concrete, GumbelSoftmax
from .score import Baseline, LeaveOneOut, MovingAverage, Neural, ScoreFunction

__all__ = [
    "Baseline",
    "Concrete",
    "DoublyReparameterized",
    "Draw",
    "Enumerate",
    "Estimator",
    "GumbelSoftmax",
    "LeaveOneOut",
    "MovingAverage",
    "Neural",
    "Pathwise",
    "ScoreFunction",
    "SiteView",
    "estimators",
]
