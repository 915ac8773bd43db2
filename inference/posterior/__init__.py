"""The posterior of a guide: draws for ArviZ, predictions, bounds and evidence, information, refinement, refits."""

from __future__ import annotations
