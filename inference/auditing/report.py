"""An audit's dataset, and its table as text."""

from __future__ import annotations

import math

import xarray

from ...tables import digits, folded, html, wrapped
from .recommendation import recommend


class AuditReport(xarray.Dataset):
    """The dataset of an audit, whose ``repr`` is the table of its estimators; ``report.info()`` lists the variables.

    A selection (one estimator, some variables) is displayed as an ordinary dataset.
    """

    __slots__ = ()

    def table(self) -> str:
        """The audit in lines of at most 80 columns: facts, the table, remarks and the recommendation."""
        return _table(self)

    def __repr__(self) -> str:
        return self.table() if self._is_whole() else super().__repr__()

    def _repr_html_(self) -> str:
        """The table with all of its columns, for notebooks."""
        if not self._is_whole():
            return super()._repr_html_()
        return html(HEADS, cells(self), above=[facts(self)], below=[*remarks(self), advice(self), NOTE])

    def _is_whole(self) -> bool:
        return set(self.data_vars) >= _SHOWN and self["verdict"].dims == ("estimator",)


_SHOWN = {"verdict", "relative_bias", "total_bias_error", "total_variance", "seconds", "work_normalized_variance"}
HEADS = ["estimator", "verdict", "bias / ‖g‖", "detects", "max |z|", "variance", "SNR", "cos", "runs", "ms", "var × ms"]
NOTE = (
    "bias / ‖g‖: length of mean − reference, freed of what sampling adds, ± its error, over the gradient's length; "
    "detects: the least bias along the reference that is flagged at this number of gradients, over the same length; "
    "z: of the worst element, before adjustment; variance, SNR: of the guide's gradient, in total and nats², and "
    "length of the reference over its root; cos: of the mean to the reference; runs: model runs a step; ms: its median."
)

LIMIT = "ok is not exact: a bias along the gradient below “detects”, a share of its length, could pass"


def cells(report: xarray.Dataset) -> list[list[str]]:
    """A row for each estimator with numbers, sorted by variance × time."""
    judged = [label for label in report.estimator.values if report.total_variance.sel(estimator=label).notnull()]
    rows = [report.sel(estimator=label) for label in judged]
    rows.sort(key=lambda row: (row.work_normalized_variance.item(), row.seconds.item()))
    norm = report.attrs["reference_total_norm"] or 1.0
    return [
        [
            str(row.estimator.item()),
            row.verdict.item().partition(":")[0],
            f"{row.relative_bias.item():.1%} ± {row.total_bias_error.item() / norm:.1%}",
            "–" if math.isnan(row.detectable_bias.item()) else f"≥ {row.detectable_bias.item():.1%}",
            f"{row.max_z.item():.1f}",
            digits(row.total_variance.item()),
            digits(row.total_signal_to_noise.item()),
            f"{row.total_cosine.item():.3f}",
            digits(row.evaluations.item()),
            f"{1e3 * row.seconds.item():.2f}",
            digits(1e3 * row.work_normalized_variance.item()),
        ]
        for row in rows
    ]


def remarks(report: xarray.Dataset) -> list[str]:
    """Remarks below the table: why estimators were flagged or refused, grouped by reason."""
    by_reason: dict[str, list[str]] = {}
    for label, verdict in zip(report.estimator.values, report.verdict.values, strict=True):
        if ":" in verdict:
            by_reason.setdefault(str(verdict), []).append(str(label))
    return [f"{', '.join(labels)}: {verdict}" for verdict, labels in by_reason.items()]


def facts(report: xarray.Dataset) -> str:
    attrs = report.attrs
    error = "" if attrs["reference_is_exact"] else f" ± {attrs['reference_total_error']:.2g}"
    return (
        f"reference: {attrs['reference']}, ‖g‖ = {attrs['reference_total_norm']:.4g}{error}; "
        f"{attrs['num_samples']} gradients each, objective {attrs['objective']}, seed {attrs['seed']}; "
        f"{attrs['num_tests']} tests, any false alarm with probability {attrs['alpha']}"
    )


def advice(report: xarray.Dataset) -> str:
    label, reason = recommend(report)
    return f"recommended: {label}; {reason}" if label else f"recommended: none; {reason}"


# The columns that fit a terminal.
_ON_SCREEN = ("estimator", "verdict", "bias / ‖g‖", "detects", "variance", "ms", "var × ms")


def _table(report: xarray.Dataset) -> str:
    kept = [HEADS.index(head) for head in _ON_SCREEN]
    body = [[line[column] for column in kept] for line in cells(report)]
    said = [facts(report), "", *folded(_ON_SCREEN, body, left=2, gap=1), "", *remarks(report)]
    said += [LIMIT] if any(line[1] == "ok" for line in body) else []
    said.append(advice(report))
    return "\n".join(map(wrapped, said))
