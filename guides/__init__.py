"""Amortized guides q(z | x): one file per guide family."""

from __future__ import annotations

from ._base import Guide, fitting, guides
from .bernoulli import BernoulliGuide
from .categorical import CategoricalGuide, RelaxedCategoricalGuide
from .flow import FlowGuide
from .label_conditional import LabelConditionalGuide
from .layered import LayeredGuide
from .normal import NormalGuide
from .top_down import TopDownNormalGuide
from .triangular_normal import TriangularNormalGuide

__all__ = [
    "BernoulliGuide",
    "CategoricalGuide",
    "FlowGuide",
    "Guide",
    "LabelConditionalGuide",
    "LayeredGuide",
    "NormalGuide",
    "RelaxedCategoricalGuide",
    "TopDownNormalGuide",
    "TriangularNormalGuide",
    "fitting",
    "guides",
]
