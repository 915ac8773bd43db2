"""Amortized guides q(z | x), and guides of global latents: one file per guide family."""

from __future__ import annotations

from ._base import AnyGuide, Guide, fitting, guides
from .amortized import AmortizedGuide, Decision, amortize
from .auto import AutoGuide
from .bernoulli import BernoulliGuide
from .categorical import CategoricalGuide, RelaxedCategoricalGuide
from .combiner import CombinerGuide
from .flow import FlowGuide
from .grid_policy import GridPolicy
from .label_conditional import LabelConditionalGuide
from .layered import LayeredGuide
from .mean_field import MeanFieldGuide
from .none import NoGuide
from .normal import NormalGuide
from .prior import PriorGuide
from .recurrent_attention import RecurrentAttentionGuide
from .token_policy import TokenPolicy
from .top_down import TopDownNormalGuide
from .triangular_normal import TriangularNormalGuide
from .unconditional import UnconditionalGuide
from .vamp import VampGuide
from .vector_quantized import VectorQuantizedGuide

__all__ = [
    "AmortizedGuide",
    "AnyGuide",
    "AutoGuide",
    "BernoulliGuide",
    "CategoricalGuide",
    "Decision",
    "CombinerGuide",
    "FlowGuide",
    "GridPolicy",
    "Guide",
    "LabelConditionalGuide",
    "LayeredGuide",
    "MeanFieldGuide",
    "NoGuide",
    "NormalGuide",
    "PriorGuide",
    "RecurrentAttentionGuide",
    "RelaxedCategoricalGuide",
    "TokenPolicy",
    "TopDownNormalGuide",
    "TriangularNormalGuide",
    "UnconditionalGuide",
    "VampGuide",
    "VectorQuantizedGuide",
    "amortize",
    "fitting",
    "guides",
]
