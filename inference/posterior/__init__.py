"""A guide's posterior: draws for ArviZ, bounds and evidence, information, refinement, refits."""

from __future__ import annotations
