"""Statistics of the importance weights of a guide's draws, by datum and by latent."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from .activity import active, spread
from .collection import Collection
from .importance import _STATES, by_piece, importance_ess, khat, log_evidence, number_of_states, rounding_of


def weight_statistics(
    collection: Collection, event_names: Callable[[str, int], list[str]]
) -> dict[str, tuple[Sequence[str], np.ndarray]]:
    """The variables of the group ``vi_stats``: dimension names and ``(chain, …)`` numbers."""
    sweep = collection.sweep
    rounding = _rounding(collection)
    weight = np.moveaxis(collection.log_weight(), 1, -1)
    relative = np.moveaxis(collection.unit_log_weight(), 1, -1)
    evidence = by_piece(lambda part: log_evidence(part)[0], weight)
    error = by_piece(lambda part: log_evidence(part)[1], weight)
    found: dict[str, tuple[Sequence[str], np.ndarray]] = {
        name: (sweep.weight_plates, value)
        for name, value in (
            ("khat", by_piece(lambda part: _unit_khat(collection, part, rounding), relative)),
            ("ess", by_piece(importance_ess, relative)),
            ("log_evidence", evidence),
            ("log_evidence_se", error),
            ("elbo", weight.mean(-1)),
        )
    }
    shared = collection.global_log_weight()
    if shared is not None:
        shared = np.moveaxis(shared, 1, -1)
        found["khat_global"] = (sweep.shared_plates, khat(shared, rounding))
        found["ess_global"] = (sweep.shared_plates, importance_ess(shared))
    for name in _of_points(collection) & found.keys():  # weights without a density of the guide
        found[name][1][...] = np.nan
    for name, by_chain in collection.kl.items():
        if all(value is not None for value in by_chain):
            value = np.stack([np.asarray(one) for one in by_chain])
            found[f"kl_{name}"] = (event_names(name, value.ndim - 1), value)
    for name, means in collection.means.items():
        layout = sweep.model_sites[name]
        rows, squares = means.reshape(2, means.shape[1], -1, *layout.event)
        if rows.shape[1] > 1:
            hidden = None if name not in collection.shown else ~collection.shown[name].reshape(1, -1, *layout.event)
            between, within = spread(rows, squares, hidden)
            names = event_names(name, len(layout.event))
            found[f"active_{name}"] = (names, active(between, within, collection.num_samples))
    return found


def _of_points(collection: Collection) -> set[str]:
    """The statistics of weights of latents at which the guide is a point."""
    sweep = collection.sweep
    of_data = {"khat", "ess", "log_evidence", "log_evidence_se"}
    if not collection.nested:
        return of_data if sweep.points else set()
    found = of_data if sweep.points.keys() & set(sweep.local) else set()
    return found | ({"khat_global", "ess_global"} if sweep.points.keys() & set(sweep.shared) else set())


def _unit_khat(collection: Collection, log_weights: np.ndarray, rounding: float) -> np.ndarray:
    """k̂ of each datum; unknown where only the global latents vary the few distinct weights of a datum."""
    shapes = khat(log_weights, rounding)
    if collection.nested and number_of_states(collection.sweep, collection.sweep.local) <= _STATES:
        shapes[shapes != 0] = np.nan
    return shapes


def _rounding(collection: Collection) -> float:
    return rounding_of(collection.sweep, collection.largest_log_p)
