"""Generative models p(x, z): one file per model."""

from __future__ import annotations

from ._base import GenerativeModel, Latent, models
from .bernoulli_vae import BernoulliVAE
from .categorical_vae import CategoricalVAE
from .gaussian_vae import GaussianVAE

__all__ = ["BernoulliVAE", "CategoricalVAE", "GaussianVAE", "GenerativeModel", "Latent", "models"]
