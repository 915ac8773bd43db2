"""Generative models p(x, z): one file per model."""

from __future__ import annotations

from ._base import GenerativeModel, Latent, models
from .bernoulli_vae import BernoulliVAE
from .categorical_vae import CategoricalVAE
from .conv_vae import ConvVAE
from .gaussian_mixture_vae import GaussianMixtureVAE
from .gaussian_vae import GaussianVAE
from .hierarchical_vae import HierarchicalVAE
from .sigmoid_belief_network import SigmoidBeliefNetwork

__all__ = [
    "BernoulliVAE",
    "CategoricalVAE",
    "ConvVAE",
    "GaussianMixtureVAE",
    "GaussianVAE",
    "GenerativeModel",
    "HierarchicalVAE",
    "Latent",
    "SigmoidBeliefNetwork",
    "models",
]
