"""Inference: estimators, objectives, training, gradient audits, evaluation, posterior draws and diagnosis."""

from __future__ import annotations

from .auditing.automatic import Auto
from .auditing.comparison import audit
from .auditing.plot import plot_audit
from .auditing.recommendation import recommend
from .diagnosis.examination import diagnose
from .elbo import SiteELBO
from .posterior.activity import active_units
from .posterior.conversion import to_arviz
from .posterior.evaluation import evaluate
from .posterior.from_svi import from_pyro_svi
from .posterior.graphs import provide_compiler
from .posterior.leave_one_out import loo_approximate_posterior
from .posterior.prediction import predict
from .posterior.refinement import refine, refinement_gap
from .posterior.summaries import summary
from .stock import make_loss, stock_elbos
from .training.compile.functions import compiler
from .training.fits import fit
from .training.free_bits import FreeBits
from .training.natural_gradient import NaturalGradient
from .training.schedules import Constant, Cosine, Cyclical, Exponential, Linear, Step, parse_schedule, schedules

provide_compiler(compiler)

__all__ = [
    "Auto",
    "Constant",
    "Cosine",
    "Cyclical",
    "Exponential",
    "FreeBits",
    "Linear",
    "NaturalGradient",
    "SiteELBO",
    "Step",
    "active_units",
    "audit",
    "diagnose",
    "evaluate",
    "fit",
    "from_pyro_svi",
    "loo_approximate_posterior",
    "make_loss",
    "parse_schedule",
    "plot_audit",
    "predict",
    "recommend",
    "refine",
    "refinement_gap",
    "schedules",
    "stock_elbos",
    "summary",
    "to_arviz",
]
