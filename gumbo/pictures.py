"""Figures that need no display, and their files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .files import write_whole


def figure(*args: Any, **kwargs: Any):
    """``(figure, axes)`` that need no display, for any backend of the user."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    subplots = {
        key: kwargs.pop(key)
        for key in ("sharey", "sharex", "squeeze", "width_ratios", "height_ratios")
        if key in kwargs
    }
    made = Figure(layout="constrained", **kwargs)
    FigureCanvasAgg(made)
    return made, made.subplots(*args, **subplots)


def save(made, path: Path, dpi: int = 120) -> Path:
    """Save a figure in the format of the suffix; a full disk leaves the old file."""
    write_whole(path, lambda file: made.savefig(file, dpi=dpi, format=path.suffix[1:]), shared=True)
    return path
