"""How programs are fitted and judged: estimators, objectives, training, evaluation, posteriors."""

from __future__ import annotations

from .audit import audit, recommend
from .audit import plot as plot_audit
from .collapse import FreeBits, active_units
from .diagnostics import diagnose
from .elbo import SiteELBO
from .evaluation import evaluate
from .fitting import fit
from .natural_gradient import NaturalGradient
from .posterior import summary, to_arviz
from .refinement import refine, refinement_gap
from .schedules import Constant, Cosine, Cyclical, Exponential, Linear, parse_schedule, schedules
from .stock import make_loss, stock_elbos

__all__ = [
    "Constant",
    "Cosine",
    "Cyclical",
    "Exponential",
    "FreeBits",
    "Linear",
    "NaturalGradient",
    "SiteELBO",
    "active_units",
    "audit",
    "diagnose",
    "evaluate",
    "fit",
    "make_loss",
    "parse_schedule",
    "plot_audit",
    "recommend",
    "refine",
    "refinement_gap",
    "schedules",
    "stock_elbos",
    "summary",
    "to_arviz",
]
