"""What a launcher of several processes (torchrun, accelerate) says in the environment."""

from __future__ import annotations

import os


def launched() -> int:
    """How many processes a launcher started, this one included; 1 where there is none.

    >>> launched()
    1
    """
    number = os.environ.get("WORLD_SIZE", "1") if "RANK" in os.environ else "1"
    return max(int(number), 1) if number.isdigit() else 1


def rank() -> int:
    """The number of this process among those that a launcher started, counted from 0."""
    number = os.environ.get("RANK", "0")
    return int(number) if number.isdigit() else 0
