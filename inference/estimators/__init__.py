"""Gradient estimators: one file per family. A new one is a file and an import line here."""

from __future__ import annotations

from ._base import Draw, Estimator, SiteState, SiteView, detached_draw, estimators, score_why_not
from .antithetic import ARM, DisARM
from .control_variates import Rebar, Relax
from .counts import Fini
from .coupled import ARMS, CARMS
from .double_control_variates import DoubleControlVariates
from .doubly import DoublyReparameterized
from .enumeration import Enumerate
from .gapped import GappedStraightThrough
from .local_expectation import LocalExpectation
from .measure_valued import MeasureValued
from .muprop import MuProp
from .pathwise import Pathwise
from .reinmax import ReinMax
from .relaxation import Concrete, GumbelSoftmax
from .score import Baseline, LeaveOneOut, MovingAverage, Neural, ScoreFunction
from .stein import Rodeo
from .truncated import HeadTail, TruncatedEnumerate

__all__ = [
    "ARM",
    "ARMS",
    "Baseline",
    "CARMS",
    "Concrete",
    "DisARM",
    "DoubleControlVariates",
    "DoublyReparameterized",
    "Draw",
    "Enumerate",
    "Estimator",
    "Fini",
    "GappedStraightThrough",
    "GumbelSoftmax",
    "HeadTail",
    "LeaveOneOut",
    "LocalExpectation",
    "MeasureValued",
    "MovingAverage",
    "MuProp",
    "Neural",
    "Pathwise",
    "Rebar",
    "ReinMax",
    "Relax",
    "Rodeo",
    "ScoreFunction",
    "SiteState",
    "SiteView",
    "TruncatedEnumerate",
    "detached_draw",
    "estimators",
    "score_why_not",
]
