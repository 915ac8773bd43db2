"""Active units: the latent dimensions whose posterior mean varies with the data."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pyro.poutine as poutine
import torch
from pyro.poutine.util import prune_subsample_sites
from torch import Tensor

from ...errors import BadInput
from ..engine.rows import Rows
from ..engine.scopes import device_of, evaluating, private_seed, private_store
from ..engine.stored_rows import rows_in
from ..estimators._distributions import why_no_expectation
from .vmapped import unmasked

# Burda, Grosse & Salakhutdinov 2015, arXiv:1509.00519.
ACTIVE = 0.01


def active_units(
    guide: Callable,
    data: object,
    threshold: float = ACTIVE,
    *,
    num_samples: int = 10,
    batch_size: int = 256,
    seed: int | None = 0,
) -> dict[str, Tensor]:
    r"""The latent dimensions that the guide uses: :math:`\mathrm{Var}_x(E_{q(u \mid x)}[u]) >` ``threshold``.

    A dimension whose posterior mean does not vary with the data has collapsed to its prior. The mean is in closed form
    where the site's distribution has one, and is averaged over draws of the sites that it depends on; the variance from
    these draws is subtracted. Sites outside the data plate are left out. Burda, Grosse & Salakhutdinov 2015,
    arXiv:1509.00519.

    Args:
        guide: the guide, a program of the data.
        data: at least two rows, in any form that ``fit`` takes.
        threshold: the variance above which a dimension is active, in squared units of the latent.
        num_samples: draws of the sites that a site depends on.
        batch_size: rows per run.
        seed: of the draws; None draws from the current random state.

    Returns:
        A boolean tensor of each latent site's event shape, by site name; ``.sum()`` counts the active dimensions.

    Raises:
        BadInput: data that the guide rejects, fewer than two rows, or a number out of range.

    >>> import pyro, pyro.distributions as dist
    >>> def guide(x):
    ...     with pyro.plate("data", len(x)):
    ...         loc = torch.stack([x, torch.zeros_like(x)], -1)  # the second unit ignores x
    ...         pyro.sample("z", dist.Normal(loc, 1.0).to_event(1))
    >>> active_units(guide, torch.linspace(-1.0, 1.0, 50))
    {'z': tensor([ True, False])}
    """
    rows = rows_in(data).check("data")
    if len(rows) < 2:
        raise BadInput("active_units compares data with each other: expected at least two rows")
    if num_samples < 1 or batch_size < 1 or not threshold >= 0:
        raise BadInput("active_units: expected num_samples ≥ 1, batch_size ≥ 1 and threshold ≥ 0")
    device = device_of(guide)
    pieces: dict[str, list[Tensor]] = {}
    with private_store(guide), private_seed(seed, guide), evaluating(guide), torch.no_grad():
        for start in range(0, len(rows), batch_size):
            batch = rows[start : start + batch_size].to(device)
            draws = [_means(guide, batch) for _ in range(num_samples)]
            for name in draws[0]:
                pieces.setdefault(name, []).append(torch.stack([draw[name] for draw in draws]))
    found = {}
    for name, parts in pieces.items():
        means = torch.cat(parts, 1).double()  # (draws, N, *event), NaN where the guide masks
        within = means.var(0).nanmean(0) if num_samples > 1 else torch.zeros(())
        mean = means.mean(0).unsqueeze(0).cpu().numpy()
        between, _ = spread(mean, mean**2, np.isnan(mean))
        found[name] = active(torch.as_tensor(between[0]), within.cpu(), num_samples, threshold)
    return found


def active(between: Any, within: Any, num_draws: int, threshold: float = ACTIVE) -> Any:
    """Whether means vary over the data: their variance ``between`` rows, minus the part from finitely many draws.

    ``within`` is the variance of one draw's mean, averaged over rows; the mean of ``num_draws`` adds a fraction of it.
    """
    return between - within / num_draws > threshold


def spread(means: np.ndarray, squares: np.ndarray, hidden: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
    """The variance over rows of means ``(chain, row, *event)``, and the average variance within a row.

    ``hidden`` marks what is left out; a dimension with fewer than two numbers has NaN.
    """
    if hidden is None or not hidden.any():
        within = (squares.mean(1) - np.einsum("cr...,cr...->c...", means, means) / means.shape[1]).clip(0)
        return means.var(1, ddof=1), within
    means, squares = (np.where(hidden, np.nan, one) for one in (means, squares))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # of numpy, where nothing is left
        return np.nanvar(means, 1, ddof=1), np.nanmean(squares - means**2, 1).clip(0)


def _means(guide: Callable, batch: Rows) -> dict[str, Tensor]:
    """The mean of each local latent given the guide's earlier draws, or its draw where there is no closed form."""
    trace = prune_subsample_sites(poutine.trace(guide).get_trace(*batch.args, **batch.kwargs))
    means = {}
    for name, site in trace.nodes.items():
        if site["type"] != "sample" or site["is_observed"]:
            continue
        fn = site["fn"]
        if tuple(fn.batch_shape) != (len(batch),):
            continue
        known = why_no_expectation(fn) is None
        mean = fn.mean.expand(fn.batch_shape + fn.event_shape) if known else site["value"]
        shown = unmasked(site)
        means[name] = mean if shown is None else torch.where(shown, mean.double(), torch.nan)
    return means


__all__ = ["active_units"]
