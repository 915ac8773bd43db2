"""How programs are fitted and judged: estimators, objectives, training, evaluation, posteriors."""

from __future__ import annotations

from .elbo import SiteELBO
from .evaluation import evaluate
from .fitting import fit
from .stock import make_loss, stock_elbos

__all__ = ["SiteELBO", "evaluate", "fit", "make_loss", "stock_elbos"]
