"""``plot_audit``: bias with its error, and variance against time."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ...pictures import figure, save

if TYPE_CHECKING:
    import xarray

_DPI = 150
_STYLES = {  # color and marker by the first word of a verdict
    "ok": ("tab:blue", "o", "declared unbiased, not flagged"),
    "flagged": ("tab:red", "X", "declared unbiased, FLAGGED"),
    "biased": ("tab:orange", "s", "declared biased"),
    "cannot": ("tab:gray", "v", "too few gradients for a verdict"),
    "no": ("tab:olive", "D", "does not claim to be unbiased, no bias seen"),
}


def plot_audit(dataset: xarray.Dataset, path: Any = None, narrow: bool = False) -> Any:
    """Plot each estimator's bias with its error, and its variance against time with the Pareto front.

    Args:
        dataset: the result of :func:`~gumbo.inference.audit`.
        path: where to save the figure, in the format of the suffix (PNG without one); None does not save.
        narrow: one panel above the other, for the width of a phone.

    Returns:
        The matplotlib figure: on the left (above) the bias relative to the gradient's length, on the right (below) the
        variance.

    Raises:
        KeyError: a dataset that is no audit.

    >>> import torch
    >>> from gumbo.guides import BernoulliGuide
    >>> from gumbo.inference import audit
    >>> from gumbo.models import BernoulliVAE
    >>> model = BernoulliVAE((1, 2, 2), num_latents=2, hidden=(4,))
    >>> x = torch.ones(1, 1, 2, 2)
    >>> report = audit(model, BernoulliGuide(model), x, estimators=["rloo", "enumerate"], num_samples=50)
    >>> len(plot_audit(report, "audit.png").axes) >= 2
    True
    """
    shown = dataset.sel(estimator=np.isfinite(dataset["total_variance"].values))
    count = shown.sizes["estimator"]
    if narrow:
        heights = [0.26 * count + 0.9, 0.16 * count + 3.4]
        made, (left, right) = figure(2, 1, figsize=(4.4, sum(heights) + 1.2), height_ratios=heights)
    else:
        made, (left, right) = figure(1, 2, figsize=(13, max(4.2, 0.32 * count + 1.6)), width_ratios=[1, 1.25])
    _bias(left, shown, 20 if narrow else 34)
    _variance(right, shown, 18 if narrow else 30)
    if narrow:
        left.set_xlabel(left.get_xlabel().replace(", ", ",\n"), fontsize=9)
    kinds = [_kind(verdict) for verdict in shown["verdict"].values]
    for kind, (color, marker, words) in _STYLES.items():
        if kind in kinds:
            left.plot([], [], marker, color=color, label=words)
    made.legend(loc="outside lower center", ncols=1 if narrow else 4, fontsize=8, frameon=False)
    made.suptitle(
        f"{shown.attrs.get('num_samples')} gradients each, objective {shown.attrs.get('objective')};"
        + ("\n" if narrow else " ")
        + f"reference: {_shortened(str(shown.attrs.get('reference')), 45 if narrow else 110)}",
        fontsize=9 if narrow else 10,
    )
    if hasattr(path, "write"):
        made.savefig(path, dpi=_DPI)
    elif path is not None:
        path = Path(path)
        save(made, path if path.suffix else path.with_name(f"{path.name}.png"), dpi=_DPI)
    return made


def _kind(verdict: str) -> str:
    return str(verdict).partition(":")[0].partition(" ")[0]


def _shortened(text: str, length: int) -> str:
    return text if len(text) <= length else text[: length - 1] + "…"


def _bias(axis: Any, shown: xarray.Dataset, length: int) -> None:
    norm = shown.attrs["reference_total_norm"] or 1.0
    bias, error = shown["total_bias"].values / norm, shown["total_bias_error"].values / norm
    order = np.lexsort((error, bias))[::-1]
    axis.axvline(0.0, color="black", linewidth=0.8)
    for row, i in enumerate(order):
        color, marker, _ = _STYLES[_kind(shown["verdict"].values[i])]
        axis.errorbar(bias[i], row, xerr=error[i], fmt=marker, color=color, capsize=3, markersize=6)
    axis.set_yticks(
        range(len(order)), [_shortened(str(shown["estimator"].values[i]), length) for i in order], fontsize=9
    )
    largest = max(float((bias + error).max(initial=0.0)), 1e-3)
    if largest > 1.0:
        # Linear for small biases, logarithmic beyond, so that one noisy estimator does not hide the others.
        axis.set_xscale("symlog", linthresh=0.1, linscale=1.0)
    axis.set_xlim(-0.07 * min(largest, 1.0), largest * 1.15)
    axis.set_xlabel("bias ± standard error, as a share of the gradient's length")
    axis.grid(axis="x", alpha=0.3)


def _variance(axis: Any, shown: xarray.Dataset, length: int) -> None:
    milliseconds, variance = 1e3 * shown["seconds"].values, shown["total_variance"].values
    noisy = variance > 0
    floor = variance[noisy].min() / 10 if noisy.any() else 1.0
    height = np.where(noisy, variance, floor)
    axis.set_xscale("log")
    axis.set_yscale("log")
    for i, verdict in enumerate(shown["verdict"].values):
        color, marker, _ = _STYLES[_kind(verdict)]
        axis.plot(milliseconds[i], height[i], marker, color=color, markersize=7, zorder=3)
    sound = [i for i, verdict in enumerate(shown["verdict"].values) if verdict == "ok"]
    front = pareto_front(milliseconds[sound], height[sound]) if sound else []
    if len(front) > 0:
        chosen = np.array(sound)[front]
        axis.step(
            milliseconds[chosen],
            height[chosen],
            where="post",
            color="tab:blue",
            alpha=0.4,
            label="Pareto front of the sound ones",
        )
    axis.set_xlabel("milliseconds a step (median)")
    axis.set_ylabel("total variance of the guide's gradient")
    axis.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axis.xaxis.set_minor_formatter(lambda value, _: f"{value:g}" if _leading(value) in (2, 5) else "")
    axis.grid(alpha=0.3, which="both", linewidth=0.4)
    low, high = axis.get_xlim()
    axis.set_xlim(low, high * (high / low) ** 0.3)  # space for names on the right
    names = [
        _shortened(str(label), length) if noisy[i] else f"{_shortened(str(label), 18)} (no variance)"
        for i, label in enumerate(shown["estimator"].values)
    ]
    _write_names(axis, milliseconds, height, names)


def _leading(value: float) -> int:
    return round(value / 10 ** math.floor(math.log10(value)))


def _write_names(axis: Any, x: np.ndarray, y: np.ndarray, names: list[str]) -> None:
    """Write each name beside its point, as near as no other name or point is; a line leads to one that is not beside.

    Lengths are in points. A character is taken as 4.6 points wide, a line of text as 9 high.
    """
    axis.figure.draw_without_rendering()  # fixes the layout before positions are measured
    scale = 72 / axis.figure.dpi
    points = axis.transData.transform(np.column_stack([x, y])) * scale
    bounds = axis.get_window_extent()
    taken = [(px - 5.0, px + 5.0, py) for px, py in points]  # left and right ends, and height, of points and names

    def fits(left: float, right: float, height: float, own: int) -> bool:
        if left < bounds.x0 * scale or right > bounds.x1 * scale:
            return False
        return not any(
            left < r and right > le and abs(height - h) < 9 for j, (le, r, h) in enumerate(taken) if j != own
        )

    for i in np.argsort(points[:, 1]):
        (px, py), width = points[i], 4.6 * len(names[i])
        places = [
            (start, 9.0 * sign * step)
            for step in range(len(names) + 1)
            for sign in ((1, -1) if step else (1,))
            for start in (7.0, -7.0 - width)
        ]
        start, shift = next(
            (place for place in places if fits(px + place[0], px + place[0] + width, py + place[1], i)), (7.0, 0.0)
        )
        taken.append((px + start, px + start + width, py + shift))
        line = {"arrowstyle": "-", "linewidth": 0.5, "color": "gray", "shrinkA": 0, "shrinkB": 3} if shift else None
        axis.annotate(
            names[i],
            (x[i], y[i]),
            xytext=(start if start > 0 else -7.0, shift),
            textcoords="offset points",
            ha="left" if start > 0 else "right",
            va="center",
            fontsize=8,
            zorder=4,
            arrowprops=line,
        )


def pareto_front(cost: np.ndarray, variance: np.ndarray) -> np.ndarray:
    """Indices of the points that no other point beats in both, by increasing cost.

    >>> pareto_front(np.array([1.0, 2.0, 3.0]), np.array([5.0, 7.0, 1.0])).tolist()
    [0, 2]
    """
    best, found = math.inf, []
    for i in np.lexsort((variance, cost)):
        if variance[i] < best:
            best = variance[i]
            found.append(int(i))
    return np.array(found, dtype=int)
