"""Training: fit, its loop, steps, optimizers, schedules, checkpoints, and what a run writes down."""

from __future__ import annotations
