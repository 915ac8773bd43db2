"""Pictures of runs, as PNG files."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import torch
from pyro import poutine

from gumbo.pictures import figure, save


def colors(names: Sequence[str]) -> dict[str, Any]:
    """One color per name, the same in every picture of a run."""
    from matplotlib import colormaps

    palette = colormaps["tab10"]
    return {name: palette(index % 10) for index, name in enumerate(names)}


def learning_curves(path: Path, panels: Mapping[str, Mapping[str, np.ndarray]], ylabel: str) -> Path:
    """A panel for each title; in it a curve with its standard error for each name, from ``(seeds, epochs + 1)`` values.

    With four epochs or more, a second row enlarges the last half, since early epochs dominate the scale.
    """
    longest = max(values.shape[1] for curves in panels.values() for values in curves.values())
    starts = (0, longest // 2) if longest > 4 else (0,)
    size = (7.0 * len(panels), 4.2 * len(starts))
    made, axes = figure(len(starts), len(panels), figsize=size, squeeze=False)
    for row, start in zip(axes, starts, strict=True):
        for axis, (title, curves) in zip(row, panels.items(), strict=True):
            _curves(axis, curves, start)
            axis.set(title=f"{title}, the last half enlarged" if start else title, xlabel="epoch", ylabel=ylabel)
            if not start:
                axis.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1.01, 1.0))
    return save(made, path)


def _curves(axis: Any, curves: Mapping[str, np.ndarray], start: int) -> None:
    palette = colors(list(curves))
    for index, (name, values) in enumerate(curves.items()):
        epochs = np.arange(start, values.shape[1])
        shown = values[:, start:]
        mean = shown.mean(0)
        # Dashes of different lengths, since some curves coincide.
        style = "-" if index == 0 else (index, (4 + index, 2 + index % 3))
        mark = "o" if len(epochs) == 1 else None
        axis.plot(epochs, mean, label=name, color=palette[name], linewidth=1.8, linestyle=style, marker=mark)
        if len(values) > 1:
            error = shown.std(0, ddof=1) / math.sqrt(len(values))
            axis.fill_between(epochs, mean - error, mean + error, color=palette[name], alpha=0.2, linewidth=0)
    axis.margins(0.03)
    axis.xaxis.get_major_locator().set_params(integer=True)
    axis.grid(alpha=0.3)


def bars(path: Path, panels: Mapping[str, Mapping[str, Mapping[str, Sequence[float]]]], xlabel: str) -> Path:
    """A panel for each title; in it a row for each name and a bar for each group, the mean of positive values.

    Small dots are the single values.
    """
    rows = [len(names) for names in panels.values()]
    made, axes = figure(1, len(panels), figsize=(6.4 * len(panels), 1.6 + 0.5 * max(rows)), squeeze=False)
    for axis, (title, names) in zip(axes[0], panels.items(), strict=True):
        groups = list(next(iter(names.values())))
        height = 0.8 / len(groups)
        shades = ["tab:gray", "tab:blue", "tab:orange"]
        everything = [v for by_group in names.values() for values in by_group.values() for v in values if v > 0]
        left = 10 ** math.floor(math.log10(min(everything)) - 0.3) if everything else 1e-3
        for g, group in enumerate(groups):
            label: str | None = group
            for row, by_group in enumerate(names.values()):
                values = [value for value in by_group[group] if value > 0]
                if values:
                    y = row + (g - (len(groups) - 1) / 2) * height
                    mean = float(np.mean(values))
                    axis.barh(y, mean - left, height * 0.9, left=left, color=shades[g], label=label)
                    label = None
                    axis.plot(values, [y] * len(values), ".", color="black", markersize=3)
        axis.set_xscale("log")
        axis.set_xlim(left=left)
        axis.set_yticks(range(len(names)), list(names))
        axis.invert_yaxis()
        axis.set(title=title, xlabel=xlabel)
        axis.grid(axis="x", alpha=0.3)
        axis.legend(fontsize=8, loc="best")
    return save(made, path)


WIDEST = 14.0  # the largest width of a picture, in inches


def image_rows(path: Path, title: str, rows: Mapping[str, torch.Tensor]) -> Path:
    """A labelled row of gray images for each name, from tensors ``(n, *shape)``: of one channel, or flat as strips.

    Values in [0, 1] are shown from black to white, others from the smallest to the largest. No picture is wider than 14
    inches, whatever the shape.
    """
    flat = {name: _as_images(images) for name, images in rows.items()}
    count = max(len(images) for images in flat.values())
    height, width = next(iter(flat.values())).shape[-2:]
    gap = max(1, min(height, width) // 8)
    sheet = np.full((len(flat) * (height + gap) - gap, count * (width + gap) - gap), np.nan)
    for line, images in enumerate(flat.values()):
        for column, image in enumerate(images):
            top, left = line * (height + gap), column * (width + gap)
            sheet[top : top + height, left : left + width] = image
    across = min(0.55 / min(height, width), WIDEST / sheet.shape[1])
    # The aspect ratio of very flat or tall images is limited.
    down = min(max(across, 0.25 / height), 2.0 / height)
    made, axes = figure(figsize=(2.8 + across * sheet.shape[1], 0.5 + down * sheet.shape[0]))
    made.suptitle(title, fontsize=10)
    low, high = np.nanmin(sheet), np.nanmax(sheet)
    limits = (0, 1) if low >= 0 and high <= 1 else (low, high)
    axes.imshow(
        np.ma.masked_invalid(sheet), cmap="gray", vmin=limits[0], vmax=limits[1], interpolation="nearest", aspect="auto"
    )
    axes.set_yticks([line * (height + gap) + (height - 1) / 2 for line in range(len(flat))], list(flat), fontsize=9)
    axes.set_xticks([])
    axes.tick_params(length=0)
    axes.set_frame_on(False)
    return save(made, path)


def _as_images(images: torch.Tensor) -> np.ndarray:
    """``(n, H, W)`` of any data: the mean of channels, and vectors as rows."""
    images = images.detach().float().cpu()
    if images.dim() < 3:
        images = images.reshape(len(images), 1, -1)
    return images.flatten(1, -3).mean(1).numpy() if images.dim() > 3 else images.numpy()


def has_mean(model, inputs: Mapping[str, torch.Tensor]) -> bool:
    """Whether p(x | z) has a mean to show: tokens and other classes have none."""
    with _aside():
        try:
            mean = poutine.trace(model).get_trace(**inputs).nodes["x"]["fn"].mean
        except NotImplementedError:  # a distribution that defines no mean; others have NaN
            return False
    return not bool(mean.isnan().any())


def reconstructions(model, guide, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Means of p(x | z) for one draw z of the guide at each row of the programs' inputs, ``(B, *data_shape)``."""
    with _aside():
        guide_trace = poutine.trace(guide).get_trace(**inputs)
        return _observed_mean(poutine.trace(poutine.replay(model, trace=guide_trace)).get_trace(**inputs))


def prior_draws(model, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Means of p(x | z) for draws z of the prior, one per row, ``(B, *data_shape)``."""
    conditions = {name: inputs[name] for name in getattr(model, "conditions", {})}
    with _aside():
        return _observed_mean(poutine.trace(model).get_trace(batch_size=len(inputs["x"]), **conditions))


@contextmanager
def _aside():
    with torch.no_grad(), pyro.get_param_store().scope(), torch.random.fork_rng():
        torch.manual_seed(0)
        yield


def _observed_mean(trace) -> torch.Tensor:
    return trace.nodes["x"]["fn"].mean.detach().cpu()
