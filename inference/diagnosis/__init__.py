"""Diagnostics of a posterior: measurements and verdicts."""

from __future__ import annotations
