"""Amortized guides q(z | x): one file per guide family."""

from __future__ import annotations

from ._base import Guide, fitting, guides
from .bernoulli import BernoulliGuide
from .categorical import CategoricalGuide, RelaxedCategoricalGuide
from .normal import NormalGuide

__all__ = ["BernoulliGuide", "CategoricalGuide", "Guide", "NormalGuide", "RelaxedCategoricalGuide", "fitting", "guides"]
