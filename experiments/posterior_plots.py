"""Pictures of a posterior from `to_arviz` and of the results of `diagnose`, for both versions of ArviZ."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from gumbo.experiments.plots import figure, save

# The most coordinates, or observed sites, in one picture.
_FOREST, _TRACES, _PAIRS, _PREDICTIVE = 20, 4, 4, 4


def coordinates(posterior: Any, most: int) -> dict[str, np.ndarray]:
    """Up to ``most`` scalars of the posterior by name, each ``(chain, draw)``: those with the largest variation."""
    found: dict[str, np.ndarray] = {}
    for name, values in posterior.data_vars.items():
        names = values.dims[2:]
        flat = np.asarray(values).reshape(*values.shape[:2], -1).astype(float)
        places = itertools.product(
            *(
                posterior[dim].values if dim in posterior else range(n)
                for dim, n in zip(names, values.shape[2:], strict=True)
            )
        )
        for column, place in enumerate(itertools.islice(places, 400)):
            found[f"{name}[{', '.join(map(str, place))}]" if place else str(name)] = flat[..., column]
    spread = sorted(found, key=lambda name: -found[name].std())[:most]
    return {name: found[name] for name in found if name in spread}


def one_datum(posterior: Any) -> Any:
    """The global latents, and the local ones of the first datum, which may be dependent."""
    if not posterior.attrs.get("local"):
        return posterior
    first = {dim: slice(0, 1) for dim in posterior.attrs["data_plates"].split(",") if dim in posterior.dims}
    return posterior.isel(first)


def with_indicators(posterior: Any) -> Any:
    """The draws with an indicator of each class in place of its index, whose mean and intervals mean nothing."""
    shown = {}
    for name, values in posterior.data_vars.items():
        if values.attrs.get("values") == "classes":
            dim = f"{name}_class"
            classes = type(values)(np.arange(int(values.max()) + 1), dims=[dim])
            values = (values == classes.assign_coords({dim: classes.values})).astype(int)
        shown[name] = values
    return type(posterior)(shown, attrs=posterior.attrs)


def is_binary(values: np.ndarray) -> bool:
    """Whether all draws are 0 or 1, as for a Bernoulli or one-hot site."""
    return bool(np.isin(values, (0.0, 1.0)).all())


def forest(path: Path, posterior: Any) -> Path:
    """A row for each scalar and chain: means with intervals that hold 50 and 94 % of the draws.

    For binary scalars the fraction of ones, their probability, is drawn instead.
    """
    shown = coordinates(one_datum(posterior), _FOREST)
    binary = [is_binary(values) for values in shown.values()]
    made, axis = figure(figsize=(6.4, 1.2 + 0.28 * len(shown)))
    for row, (values, zero_one) in enumerate(zip(shown.values(), binary, strict=True)):
        for chain, draws in enumerate(values):
            height = row + 0.15 * (chain - (len(values) - 1) / 2)
            if zero_one:
                axis.barh(height, draws.mean(), 0.6 / len(values), color=f"C{chain}", alpha=0.7)
                continue
            for width, inside in ((1.2, 94), (3.5, 50)):
                low, high = np.percentile(draws, (50 - inside / 2, 50 + inside / 2))
                axis.plot((low, high), (height, height), color=f"C{chain}", linewidth=width)
            axis.plot(draws.mean(), height, "o", color=f"C{chain}", markersize=4)
    axis.set_yticks(range(len(shown)), list(shown), fontsize=8)
    axis.set_ylim(len(shown) - 0.5, -0.5)
    if all(binary):
        axis.set_xlim(0.0, 1.0)
    words = "means, 50 % and 94 % intervals"
    words = "probabilities of a 1" if all(binary) else f"{words};\nbars: probabilities of a 1" if any(binary) else words
    axis.set_title(f"posterior by the guide: {words}", fontsize=10)
    axis.grid(axis="x", alpha=0.3)
    return save(made, path)


def traces(path: Path, posterior: Any) -> Path:
    """Draws in their order, and their histogram; the title says that draws of a guide are independent."""
    shown = coordinates(one_datum(posterior), _TRACES)
    made, axes = figure(len(shown), 2, figsize=(8.0, 1.0 + 1.6 * len(shown)), squeeze=False, width_ratios=(1, 2))
    for (left, right), (name, values) in zip(axes, shown.items(), strict=True):
        for chain, draws in enumerate(values):
            if is_binary(values):
                left.bar((0, 1), ((draws == 0).mean(), (draws == 1).mean()), 0.6, color=f"C{chain}", alpha=0.6)
                left.set_xticks((0, 1))
                right.plot(draws, "|", markersize=6, color=f"C{chain}")
                right.set_yticks((0, 1))
            else:
                left.hist(draws, bins=30, histtype="step", density=True, color=f"C{chain}")
                right.plot(draws, ".", markersize=2, color=f"C{chain}")
        left.set_title(name, fontsize=9)
        right.set_xlabel("draw", fontsize=8)
    made.suptitle(
        "draws of the guide: independent by construction, so that no pattern tells of convergence", fontsize=9
    )
    return save(made, path)


def pairs(path: Path, posterior: Any) -> Path:
    """Scatter plots of the draws of some pairs of scalars."""
    shown = coordinates(one_datum(posterior), _PAIRS)
    noise = np.random.default_rng(0)  # separates draws of 0 and 1 that would coincide
    placed = {
        name: values + noise.uniform(-0.15, 0.15, values.shape) if is_binary(values) else values
        for name, values in shown.items()
    }
    names, count = list(shown), len(shown)
    made, axes = figure(count, count, figsize=(1.0 + 2.0 * count, 1.0 + 2.0 * count), squeeze=False)
    for (row, down), (column, across) in itertools.product(enumerate(names), enumerate(names)):
        axis = axes[row, column]
        if row == column:
            edges = bins(shown[down], 1, 2) if is_binary(shown[down]) else 30
            axis.hist(shown[down].ravel(), bins=edges, color="tab:blue", rwidth=0.9 if is_binary(shown[down]) else None)
        elif row > column:
            axis.plot(placed[across].ravel(), placed[down].ravel(), ".", markersize=2, alpha=0.4)
        else:
            axis.set_axis_off()
        axis.tick_params(labelsize=7)
        if row == count - 1:
            axis.set_xlabel(across, fontsize=8)
        if column == 0 and row:
            axis.set_ylabel(down, fontsize=8)
    return save(made, path)


def predictive(path: Path, observed: Any, drawn: Any) -> Path:
    """The data against data drawn from the posterior: for each datum, the mean over its elements.

    Of many observed sites, as of a sequence, a few are shown.
    """
    names = list(observed.data_vars)
    names = names[:: -(-len(names) // _PREDICTIVE)]
    made, axes = figure(1, len(names), figsize=(5.6 * len(names), 4.0), squeeze=False)
    for axis, name in zip(axes[0], names, strict=True):
        data = np.asarray(observed[name]).astype(float)
        draws = np.asarray(drawn[name]).astype(float)
        event = tuple(range(1, data.ndim))
        seen = data.mean(event) if event else np.atleast_1d(data)
        made_up = draws.mean(tuple(range(3, draws.ndim))) if draws.ndim > 3 else draws
        made_up = made_up.reshape(made_up.shape[0] * made_up.shape[1], -1)
        edges = bins(np.concatenate([seen.ravel(), made_up.ravel()]), math.prod(data.shape[1:]) if event else 1)
        label: str | None = "predicted, a draw of the posterior each"
        for some in made_up[:: max(1, len(made_up) // 50)]:
            axis.hist(
                some, bins=edges, histtype="step", density=True, color="tab:gray", alpha=0.2, linewidth=0.6, label=label
            )
            label = None
        axis.hist(
            made_up.ravel(), bins=edges, histtype="step", density=True, color="tab:blue", label="predicted, all draws"
        )
        axis.hist(
            seen.ravel(), bins=edges, histtype="step", density=True, color="black", linewidth=1.6, label="observed"
        )
        axis.set(
            title=f"posterior predictive of {name}",
            xlabel=f"{name}: mean over a datum" if event else str(name),
            ylabel="density",
        )
        axis.legend(fontsize=8)
    return save(made, path)


def bins(values: np.ndarray, size: int, most: int = 30) -> np.ndarray:
    """Edges of about ``most`` bins; means over ``size`` counts are on a grid; bins have equally many grid points.

    >>> bins(np.array([0.0, 3.0, 2.0]), 1).tolist()
    [-0.5, 0.5, 1.5, 2.5, 3.5]
    """
    sums = values * size
    if not np.isfinite(sums).all() or np.abs(sums - sums.round()).max() > 1e-3:
        return np.histogram_bin_edges(values[np.isfinite(values)], most)
    low, high = sums.round().min(), sums.round().max()
    width = math.ceil((high - low + 1) / most)
    return (low - 0.5 + width * np.arange(math.ceil((high - low + 1) / width) + 1)) / size


def pareto(path: Path, stats: Any, limit: float, verdict: str) -> Path:
    """k̂ of each datum, or of all data, with the verdict's limit."""
    values = np.asarray(stats["khat"]).reshape(-1)
    made, axis = figure(figsize=(6.4, 3.6))
    finite = np.isfinite(values)
    axis.plot(np.flatnonzero(finite), values[finite], "+", color="tab:blue")
    axis.axhline(limit, color="tab:red", linestyle="--", linewidth=1.0)
    high, missing = int((values > limit).sum()), int((~finite).sum())
    unknown = f", {missing} without a fit" if missing else ""
    axis.set(title=f"k̂: {high} of {len(values)} above {limit:.2f}{unknown}; verdict: {verdict}")
    axis.set(xlabel="datum", ylabel="k̂ of the importance weights")
    return save(made, path)


def calibration(path: Path, ranks: Mapping[str, np.ndarray], rank_draws: int) -> Path:
    """ECDF of ranks among ``rank_draws`` draws minus that of uniform ones, and a band that holds 99 % of such curves.

    The band is ArviZ's, for whole curves; where the installed version has none, it holds 99 % at each point.
    """
    from scipy.stats import binom

    from gumbo.inference.posterior._arviz import ecdf_band

    count = min(len(found) for found in ranks.values())
    top = rank_draws + 1
    at = np.arange(top) / top
    made, axis = figure(figsize=(6.4, 4.0))
    band = ecdf_band(count, at[1:], 0.99)
    words = "band: 99 % at each rank" if band is None else "band: 99 % of whole curves"
    low, high = (binom.ppf(tail, count, at[1:]) / count for tail in (0.005, 0.995)) if band is None else band
    low, high = (np.concatenate([[0.0], end - at[1:], [0.0]]) for end in (low, high))
    axis.fill_between([*at, 1.0], low, high, color="tab:gray", alpha=0.3, linewidth=0, label=words)
    for index, (name, found) in enumerate(itertools.islice(ranks.items(), 12)):
        ecdf = (found[:, None] < np.arange(top)).mean(0)
        dark = name.startswith("log p")
        axis.plot(
            at, ecdf - at, linewidth=1.8 if dark else 0.9, color="black" if dark else f"C{index % 10}", label=name
        )
    axis.axhline(0.0, color="black", linewidth=0.5)
    axis.set(title="simulation-based calibration", xlabel="fractional rank", ylabel="ECDF − uniform")
    axis.legend(fontsize=6, ncols=2)
    return save(made, path)


def latent_space(path: Path, posterior: Any, names: Sequence[str], labels: np.ndarray | None) -> Path:
    """Posterior means of each datum's latents on their two first principal components."""
    means = [np.asarray(posterior[name].mean(("chain", "draw"))) for name in names]
    joined = np.concatenate([mean.reshape(len(mean), -1) for mean in means], 1).astype(float)
    centred = joined - joined.mean(0)
    _, lengths, directions = np.linalg.svd(centred, full_matrices=False)
    share = lengths**2 / max((lengths**2).sum(), 1e-300)
    flat = centred @ directions[:2].T
    flat = np.pad(flat, ((0, 0), (0, max(0, 2 - flat.shape[1]))))
    made, axis = figure(figsize=(6.0, 5.2))
    if labels is None:
        axis.scatter(*flat.T, s=14, color="tab:blue")
    else:
        for index, label in enumerate(np.unique(labels)):
            axis.scatter(*flat[labels == label].T, s=14, color=f"C{index % 10}", label=str(label))
        axis.legend(title="label", fontsize=8, loc="upper left", bbox_to_anchor=(1.01, 1.0))
    title = " and ".join(f"{part:.0%}" for part in share[:2])
    told = ", ".join(names) if len(names) < 4 else f"{names[0]} … {names[-1]}, {len(names)} sites"
    axis.set(xlabel="1", ylabel="2")
    axis.set_title(f"posterior means of {told}:\n{title} of their variance", fontsize=10)
    return save(made, path)


def everything(
    folder: Path, groups: Mapping[str, Any], report: Any, labels: np.ndarray | None, num_samples: int
) -> list[Path]:
    """All pictures of the groups; ``num_samples`` is the number of draws of the report."""
    from gumbo.inference.posterior.importance import khat_limit

    posterior = with_indicators(groups["posterior"])
    made = [
        forest(folder / "forest.png", posterior),
        traces(folder / "trace.png", posterior),
        pairs(folder / "pair.png", posterior),
        pareto(
            folder / "khat.png", report.vi_stats, khat_limit(num_samples), report["khat"].verdict
        ),  # of the draws that the verdicts are about
    ]
    if "observed_data" in groups and "posterior_predictive" in groups:
        made.append(
            predictive(folder / "posterior_predictive.png", groups["observed_data"], groups["posterior_predictive"])
        )
    if report.ranks:
        made.append(calibration(folder / "calibration.png", report.ranks, report.rank_draws))
    local = [name for name in posterior.attrs.get("local", "").split(",") if name]
    if local and math.prod(posterior[local[0]].shape[2:3]) > 1:
        rows = len(posterior[local[0]][0, 0])
        known = labels if labels is not None and len(labels) == rows else None
        made.append(latent_space(folder / "latent_space.png", posterior, local, known))
    return made
