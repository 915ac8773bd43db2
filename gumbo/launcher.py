"""The environment variables of process launchers (torchrun, accelerate)."""

from __future__ import annotations

import os


def launched() -> int:
    """The number of processes that a launcher started, this one included; 1 without a launcher.

    >>> launched()
    1
    """
    number = os.environ.get("WORLD_SIZE", "1") if "RANK" in os.environ else "1"
    return max(int(number), 1) if number.isdigit() else 1


def rank() -> int:
    """The rank of this process among those that a launcher started."""
    number = os.environ.get("RANK", "0")
    return int(number) if number.isdigit() else 0
