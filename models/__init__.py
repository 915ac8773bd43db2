"""Generative models p(x, z): one file per model."""

from __future__ import annotations

from ._base import models

__all__ = ["models"]
