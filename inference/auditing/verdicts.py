"""The dataset of an audit, with verdicts, from moments of gradients."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .bias import Comparison, adjusted, compare
from .directions import Directions
from .moments import Central
from .reference import Reference
from .rows import Row
from .sampler import Stage

if TYPE_CHECKING:
    import numpy as np
    import xarray


OPPOSITE = 2.0  # the bias of a gradient of opposite sign, in units of the gradient's length


def dataset_of(
    stage: Stage, rows: list[Row], truth: Reference, sites: dict[str, str], settings: dict[str, Any]
) -> xarray.Dataset:
    """Compare every row with the reference, adjust for all tests, and collect numbers and verdicts."""
    import numpy as np

    from .report import AuditReport  # xarray is loaded when an audit is made

    names, alpha = list(stage.parameters), settings["alpha"]
    groups = truth.directions.parameters if truth.directions is not None else {}
    judged = {row.label: compare(row.moments, truth) for row in rows if row.judged}
    # Half of alpha is for single elements, of which there may be millions, and half for directions.
    single = {(label, name): found[name].p_value for label, found in judged.items() for name in names}
    joint = {(label, group): found[group].p_value for label, found in judged.items() for group in groups}
    p_values = {key: (2 * p).clamp(max=1.0) for tests in (single, joint) for key, p in adjusted(tests).items()}
    level = alpha / 2 / max(sum(len(p) for p in joint.values()), 1)
    table = _per_parameter(rows, names, truth, groups, judged, p_values)
    flagged = np.nan_to_num(table["p_value"], nan=1.0) < alpha
    summary = []
    for i, row in enumerate(rows):
        line = _summary(row, names, truth, table, i)
        if row.judged:
            tests = {name: (found, p_values[row.label, name]) for name, found in judged[row.label].items()}
            line |= _judgement(row, tests, truth, alpha, level)
        summary.append(line)
    theirs = truth.moments.central() if truth.moments else {}
    reference_error = [
        math.sqrt(theirs[name].variance.sum().item() / theirs[name].count) if theirs else 0.0 for name in names
    ]
    data = {key: (("estimator", "parameter"), value) for key, value in table.items()}
    data["flagged"] = (("estimator", "parameter"), flagged)
    data |= {key: ("estimator", np.array([line[key] for line in summary])) for key in summary[0]}
    data["reference_norm"] = ("parameter", [truth.gradient[n].norm().item() for n in names])
    data["reference_error"] = ("parameter", reference_error)
    coords = {
        "estimator": [row.label for row in rows],
        "parameter": names,
        "size": ("parameter", [leaf.numel() for leaf in stage.parameters.values()]),
        "sites": ("parameter", [sites[name] for name in names]),
    }
    attributes = {
        **{key: _storable(value) for key, value in settings.items()},
        "reference": truth.kind,
        "reference_is_exact": int(truth.exact),
        "reference_total_norm": _norm(truth.gradient.values()),
        "reference_total_error": math.hypot(*reference_error),
        "reference_loss": truth.loss,
        "num_tests": sum(len(p) for tests in (single, joint) for p in tests.values()),
        **_versions(),
    }
    return AuditReport(data, coords, attributes)


_PER_PARAMETER = (
    "bias",
    "bias_error",
    "z",
    "p_value",
    "variance",
    "signal_to_noise",
    "cosine",
    "worst_mean",
    "worst_reference",
)


def _per_parameter(
    rows: list[Row],
    names: list[str],
    truth: Reference,
    groups: Mapping[str, str],
    judged: Mapping[str, Mapping[str, Comparison]],
    p_values: Mapping[tuple[str, str], Tensor],
) -> dict[str, np.ndarray]:
    """The numbers of each estimator and parameter, ``(estimators, parameters)``; NaN for estimators not judged."""
    import numpy as np

    table = {key: np.full((len(rows), len(names)), math.nan) for key in (*_PER_PARAMETER, "worst_element")}
    for i, row in enumerate(rows):
        central = row.moments.central() if row.judged else {}
        for j, name in enumerate(names if central else ()):
            found = judged[row.label][name]
            numbers = _parameter_numbers(central[name], truth.gradient[name], found)
            worst = int(found.p_value.argmin()) if len(found.p_value) else 0
            for key, value in numbers.items():
                is_element = isinstance(value, Tensor) and value.dim()
                table[key][i, j] = (value[worst] if is_element else value) if not is_element or len(value) else math.nan
            table["worst_element"][i, j] = worst
            own = [(row.label, name), *((row.label, group) for group, of in groups.items() if of == name)]
            table["p_value"][i, j] = min((p_values[key].min().item() for key in own if len(p_values[key])), default=1.0)
    return table


def _parameter_numbers(central: Central, truth: Tensor, found: Comparison) -> dict[str, Any]:
    variance = central.variance.sum().item()
    noise = found.squared_error.sum().item()
    return {
        "bias": math.sqrt(max(found.offset.square().sum().item() - noise, 0.0)),
        "bias_error": math.sqrt(noise),
        "z": found.z,
        "variance": variance,
        "signal_to_noise": _ratio(truth.norm().item(), math.sqrt(variance)),
        "cosine": _cosine([central.mean], [truth]),
        "worst_mean": central.mean,
        "worst_reference": truth,
    }


def _summary(row: Row, names: list[str], truth: Reference, table: dict, i: int) -> dict[str, Any]:
    """The numbers of one estimator over all parameters, or over the guide's for its variance."""
    own = [name.startswith("guide.") for name in names]
    own = own if any(own) else [True] * len(names)
    norm = _norm(truth.gradient.values())
    found: dict[str, Any] = {
        "verdict": row.said,
        "warnings": "; ".join(row.warned),
        "unbiased": bool(row.unbiased and row.refused is None),
        "any_flagged": False,
        "objective_name": row.objective if row.refused is None else "",
        "num_particles": row.num_particles,
        "evaluations": row.evaluations,
        "seconds": statistics.median(row.seconds) if row.judged and row.seconds else math.nan,
        "nonfinite": row.moments.bad if row.moments else 0,
    }
    totals = dict.fromkeys(
        ("total_bias", "total_bias_error", "relative_bias", "detectable_bias", "total_cosine", "max_z")
        + ("total_variance", "total_signal_to_noise"),
        math.nan,
    )
    if row.judged:
        bias, error = (table[key][i] for key in ("bias", "bias_error"))
        central = row.moments.central()
        squared = sum(float(b**2) for b in bias)
        totals["total_bias"] = math.sqrt(squared)
        totals["total_bias_error"] = math.hypot(*error)
        totals["relative_bias"] = _ratio(math.sqrt(squared), norm)
        totals["total_cosine"] = _cosine(
            [central[name].mean for name in names], [truth.gradient[name] for name in names]
        )
        totals["total_variance"] = float(table["variance"][i][own].sum())
        signal = _norm(truth.gradient[name] for name, mine in zip(names, own, strict=True) if mine)
        totals["total_signal_to_noise"] = _ratio(signal, math.sqrt(totals["total_variance"]))
    found |= totals
    found["work_normalized_variance"] = totals["total_variance"] * found["seconds"]
    found["evaluation_normalized_variance"] = totals["total_variance"] * found["evaluations"]
    return found


def _judgement(
    row: Row, tests: dict[str, tuple[Comparison, Tensor]], truth: Reference, alpha: float, level: float
) -> dict[str, Any]:
    """The verdict on one estimator and its totals; ``tests`` holds each comparison with its adjusted p-values."""
    directions = truth.directions
    said: dict[str, Any] = {"max_z": max(c.z.abs().max().item() for c, p in tests.values() if len(p))}
    whole = tests.get(Directions.WHOLE, (None, None))[0]
    norm, needed = _norm(truth.gradient.values()), None
    if whole is not None:
        said["detectable_bias"] = whole.resolution(level).item() / norm
        if said["detectable_bias"] > OPPOSITE:
            needed = _needed(whole, level, OPPOSITE * norm)
    name = min((name for name, (_, p) in tests.items() if len(p)), key=lambda name: tests[name][1].min())
    comparison, p_values = tests[name]
    said["any_flagged"] = bool(p_values.min() < alpha)
    if not row.unbiased:
        said["verdict"] = "biased" if said["any_flagged"] else "no bias seen"
    elif said["any_flagged"]:
        at = int(comparison.p_value.argmin())
        groups = directions.parameters if directions is not None else {}
        if name not in groups:
            what, exact = f"{name}[{at}]", truth.gradient[name][at].item()
        else:
            assert directions is not None
            of = groups[name] or "the gradient"
            random = groups[name] is not None and at >= len(directions.along[groups[name]]) - directions.random(name)
            what = f"{of} along {'random signs' if random else 'the reference'}"
            exact = directions.project(truth.gradient)[name][at].item()
        mean = exact + comparison.offset[at].item()
        said["verdict"] = (
            f"flagged: declared unbiased, and {what} is {mean:.4g} where the reference is {exact:.4g}"
            f" (z = {comparison.z[at]:.1f})"
        )
    else:
        said["verdict"] = "ok"
    if needed is not None and not said["any_flagged"]:
        said["verdict"] = (
            f"cannot say: at {row.moments.count} gradients one of the opposite sign could pass; draw about "
            f"{float(f'{needed:.1g}'):,.0f}"
        )
    return said


def _needed(whole: Comparison, level: float, difference: float) -> float:
    """The number of draws that would detect this difference, estimated from the spread of these draws."""
    count = whole.count
    while whole.resolution(level, count).item() > difference and count < 10**12:
        count = math.ceil(1.25 * count)
    return float(count)


def _norm(parts: Iterable[Tensor]) -> float:
    return math.sqrt(sum(part.square().sum().item() for part in parts))


def _cosine(a: list[Tensor], b: list[Tensor]) -> float:
    return _ratio(sum((x * y).sum().item() for x, y in zip(a, b, strict=True)), _norm(a) * _norm(b), math.nan)


def _ratio(over: float, under: float, otherwise: float = math.inf) -> float:
    if under > 0:
        return over / under
    return otherwise if over > 0 else math.nan


def _storable(value: Any) -> Any:
    if value is None:
        return "found in the first run"
    return int(value) if isinstance(value, bool) else value


def _versions() -> dict[str, str]:
    import pyro

    from ..._version import __version__

    return {"gumbo": __version__, "torch": str(torch.__version__), "pyro": pyro.__version__}
