"""Fixtures of the estimators' tests."""

from __future__ import annotations

import pytest
from uniforms import representative_uniforms

from gumbo.inference.estimators import coupled


@pytest.fixture
def listed_uniforms(monkeypatch):
    """Coins that are thresholds of a uniform draw it from a list, so that `mean_over_draws` is exact."""
    monkeypatch.setattr(coupled, "coin_uniforms", representative_uniforms)
