"""Estimators against the exact gradient: sampling gradients, references, verdicts, pictures."""

from __future__ import annotations
