"""The contract that every generative model keeps, and the registry of them."""

from __future__ import annotations

from ..registry import Registry

models: Registry[type] = Registry("model")
