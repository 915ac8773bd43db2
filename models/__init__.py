"""Generative models p(x, z): one file per model."""

from __future__ import annotations

from ._base import GenerativeModel, Latent, models
from .bernoulli_vae import BernoulliVAE
from .categorical_vae import CategoricalVAE
from .conditional_vae import ConditionalVAE
from .conv_vae import ConvVAE
from .gaussian_mixture_vae import GaussianMixtureVAE
from .gaussian_vae import GaussianVAE
from .hierarchical_vae import HierarchicalVAE
from .semi_supervised_vae import SemiSupervisedVAE
from .sigmoid_belief_network import SigmoidBeliefNetwork
from .structured_prediction import StructuredPrediction

__all__ = [
    "BernoulliVAE",
    "CategoricalVAE",
    "ConditionalVAE",
    "ConvVAE",
    "GaussianMixtureVAE",
    "GaussianVAE",
    "GenerativeModel",
    "HierarchicalVAE",
    "Latent",
    "SemiSupervisedVAE",
    "SigmoidBeliefNetwork",
    "StructuredPrediction",
    "models",
]
