"""A training step as one compiled graph."""

from __future__ import annotations
