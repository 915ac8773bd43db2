"""Amortized guides q(z | x): one file per guide family."""

from __future__ import annotations

from ._base import guides

__all__ = ["guides"]
