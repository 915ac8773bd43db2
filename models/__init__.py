"""Generative models p(x, z): one file per model."""

from __future__ import annotations

from ._base import GenerativeModel, Latent, models
from .categorical_vae import CategoricalVAE
from .gaussian_vae import GaussianVAE

__all__ = ["CategoricalVAE", "GaussianVAE", "GenerativeModel", "Latent", "models"]
