"""One loss: running the programs, walking back over their terms, objectives, and scopes that leave no trace."""

from __future__ import annotations
