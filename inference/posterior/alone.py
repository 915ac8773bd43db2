"""Whether rows of data have the same terms in a run on them alone as in a run on more rows."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

# One draw of the guide, and the model at it, with given latents; each as a `Pass`.
Run = Callable[[Mapping[str, Tensor]], tuple[Any, Any]]


def changed_alone(
    together: Run, parts: Iterable[tuple[Run, Tensor]], plate: str, scored: bool = True
) -> tuple[str, str] | None:
    """The first site whose terms differ when some rows of a plate run without the others, at the same draws.

    Args:
        together: runs the programs on all rows.
        parts: runs on some of them, each with the numbers of these rows.
        plate: the plate of the rows.
        scored: whether observed sites count; their data may stand for their shape alone.

    Returns:
        ``"guide"`` or ``"model"``, and the name of the site; None if no site differs.
    """

    def terms(guide: Any, model: Any) -> Terms:
        return _terms(guide, model, plate, scored)

    guide, model = together({})
    drawn = {
        name: (layout.names, guide.whole_value(name))
        for name, layout in guide.layouts.items()
        if layout.kind == "latent"
    }
    before, again = terms(guide, model), None
    for run, numbers in parts:

        def rows_of(value: Tensor, names: tuple[str | None, ...], numbers: Tensor = numbers) -> Tensor:
            place = 1 + names.index(plate) if plate in names else None
            return value if place is None else value.index_select(place, numbers.to(value.device))

        found = terms(*run({name: rows_of(value, names) for name, (names, value) in drawn.items()}))
        for (program, site), (own, names, dtype) in found.items():
            expected = before[program, site][0]
            if agree(own, rows_of(expected, names), dtype):
                continue
            # A difference counts only if a repetition on all rows has none: the programs may draw noise of their own.
            again = again or terms(*together({name: value for name, (_, value) in drawn.items()}))
            if agree(again[program, site][0], expected, dtype):
                return program, site
    return None


Terms = dict[tuple[str, str], tuple[Tensor, tuple[str | None, ...], torch.dtype]]


def _terms(guide: Any, model: Any, plate: str, scored: bool) -> Terms:
    """Log-probabilities by program and site, with the plates that they keep; those of the guide in the plate alone."""
    return {
        (program, site): (run.log_prob(site, (plate,)), (plate,) if plate in layout.plates else (), layout.dtype)
        for program, run in (("guide", guide), ("model", model))
        for site, layout in run.layouts.items()
        if layout.kind != "deterministic" and (scored or layout.kind != "observed")
        if run is model or plate in layout.plates
    }


def agree(a: Tensor, b: Tensor, dtype: torch.dtype) -> bool:
    """Whether log-probabilities of values of a type are equal up to rounding."""
    size = b[b.isfinite()].abs().max().item() if b.isfinite().any() else 0.0
    tolerance = 1e-9 if dtype == torch.float64 else (2e-3 if a.is_cuda else 5e-5)
    return torch.allclose(a, b, rtol=0.0, atol=tolerance * (1 + size), equal_nan=True)
