"""How programs are fitted and judged: estimators, objectives, training, evaluation, posteriors."""

from __future__ import annotations

from .audit import audit, recommend
from .audit import plot as plot_audit
from .collapse import FreeBits, active_units
from .elbo import SiteELBO
from .evaluation import evaluate
from .fitting import fit
from .schedules import Constant, Cyclical, Exponential, Linear, parse_schedule, schedules
from .stock import make_loss, stock_elbos

__all__ = [
    "Constant",
    "Cyclical",
    "Exponential",
    "FreeBits",
    "Linear",
    "SiteELBO",
    "active_units",
    "audit",
    "evaluate",
    "fit",
    "make_loss",
    "parse_schedule",
    "plot_audit",
    "recommend",
    "schedules",
    "stock_elbos",
]
