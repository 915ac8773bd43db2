"""The engine of a loss: running the programs, collecting their terms, and scopes without side effects."""

from __future__ import annotations
