"""How programs are fitted and judged: estimators, objectives, training, evaluation, posteriors."""

from __future__ import annotations

from .elbo import SiteELBO

__all__ = ["SiteELBO"]
