"""The contract that every guide keeps, and the registry of them."""

from __future__ import annotations

from ..registry import Registry

guides: Registry[type] = Registry("guide")
