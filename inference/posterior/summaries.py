"""``summary``: posterior draws as a table, with k̂, and with modes for names of classes."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np

from ...errors import BadInput, UnknownName
from . import _arviz


def summary(idata: Any, var_names: Sequence[str] | None = None, group: str = "posterior", **options: Any) -> Any:
    """``az.summary`` of draws from :func:`~gumbo.inference.to_arviz`, with k̂ in place of MCMC diagnostics.

    R̂ is shown only for several chains (refits), which it compares. The draws of a guide are independent, so that their
    effective sample size measures the guide and not the posterior: in place of the ``ess`` columns there is ``khat``,
    the k̂ of the row's datum (of the global latents for a global variable); above 0.7 the guide is unreliable (Vehtari
    et al. 2024, arXiv:1507.02646).

    A class is a name, not a number: of one-hot sites (one row for each vector, without the dimension of classes),
    Categorical and Bernoulli sites there are the ``mode`` and its ``probability``, in place of means, intervals and
    R̂ of indices or indicators. Fits may name the same class differently (label switching): with several chains,
    ``chains_agree`` is the share of them whose own mode is the one shown, and where it is below 1 the chains are not
    to be pooled.

    Args:
        idata: the result of :func:`~gumbo.inference.to_arviz`.
        var_names: the variables to show; None shows all.
        group: their group.
        options: options of ``az.summary``.

    Returns:
        A ``pandas.DataFrame``, one row for each scalar.

    Raises:
        BadInput: ``idata`` is no result of :func:`~gumbo.inference.to_arviz`.
        UnknownName: ``idata`` has no such group.

    >>> import pyro
    >>> import torch
    >>> import pyro.distributions as dist
    >>> from gumbo.inference import to_arviz
    >>> def model(x):
    ...     z = pyro.sample("z", dist.Normal(0.0, 1.0))
    ...     pyro.sample("x", dist.Normal(z, 1.0), obs=x)
    >>> guide = lambda x: pyro.sample("z", dist.Normal(x / 2, 0.5**0.5))
    >>> found = summary(to_arviz(model, guide, torch.tensor(0.4), num_samples=400))
    >>> list(found.index), [name for name in ("mean", "khat", "r_hat") if name in found]
    (['z'], ['mean', 'khat'])
    """
    if not hasattr(idata, "groups"):  # of InferenceData, and of DataTree
        raise BadInput(f"idata is an object of class {type(idata).__name__}: expected what to_arviz returns")
    if group not in _arviz.groups_of(idata):
        raise UnknownName("group", group, _arviz.groups_of(idata))
    import pandas

    draws = _arviz.dataset_of(idata, group)
    names = list(draws.data_vars) if var_names is None else [var_names] if isinstance(var_names, str) else [*var_names]
    for name in names:
        if name not in draws.data_vars:
            raise UnknownName("variable", name, [str(one) for one in draws.data_vars])
    named = [name for name in names if name in draws and draws[name].attrs.get("values") in _NAMES]
    numbers = [name for name in names if name not in named]
    chains = draws.sizes["chain"]
    options = {"kind": "all" if chains > 1 else "stats", **options}
    made = _arviz.table(idata, group, numbers, options) if numbers else pandas.DataFrame()
    hidden = [name for name in made.columns if str(name).startswith(("ess", "mcse"))]
    hidden += [name for name in made.columns if name in ("r_hat", "R̂", "rhat")] if chains == 1 else []
    made = made.drop(columns=hidden)
    shown, start = {}, 0
    for name in numbers:
        size = draws[name].isel(chain=0, draw=0).size
        shown[name], start = made.iloc[start : start + size], start + size
    shown |= {name: _modes(name, draws[name]) for name in named}
    if group == "posterior" and "vi_stats" in _arviz.groups_of(idata):
        for name, rows in shown.items():
            shown[name] = rows.assign(khat=_khat_of_rows(idata, name).round(3))
    found = pandas.concat([shown[name] for name in names])
    return found[[*(column for column in found.columns if column != "khat"), *(["khat"] if "khat" in found else [])]]


_NAMES = ("one-hot", "classes", "binary")  # values that are names of classes


def _modes(name: str, draws: Any) -> Any:
    """The most frequent class of each element and its share of the draws, one row an element."""
    import pandas

    classes = draws.argmax(draws.dims[-1]) if draws.attrs["values"] == "one-hot" else draws.astype(int)
    values = classes.values
    by_chain = np.stack([(values == one).mean(1) for one in range(int(values.max()) + 1)])  # (classes, chains, …)
    shares = by_chain.mean(1)
    kept = [classes.coords[dim].values for dim in classes.dims[2:]]
    places = [", ".join(map(str, place)) for place in itertools.product(*kept)]
    index = [f"{name}[{place}]" if place else name for place in places]
    modes = shares.argmax(0)
    # Nullable integers: beside rows without a mode, others would become 2.0.
    columns = {
        "mode": pandas.array(modes.reshape(-1), dtype="Int64"),
        "probability": shares.max(0).reshape(-1).round(3),
    }
    if len(values) > 1:
        columns["chains_agree"] = (by_chain.argmax(0) == modes).mean(0).reshape(-1).round(3)
    if draws.attrs["values"] == "binary":
        columns = {"mean": values.mean((0, 1)).reshape(-1).round(3), **columns}
    return pandas.DataFrame(columns, index=index)


def _khat_of_rows(idata: Any, name: str) -> np.ndarray:
    """k̂ for each row of a variable of the posterior in the summary."""
    posterior, stats = _arviz.dataset_of(idata, "posterior"), _arviz.dataset_of(idata, "vi_stats")
    one = posterior[name].isel(chain=0, draw=0, drop=True)
    if one.attrs.get("values") == "one-hot":
        one = one.isel({one.dims[-1]: 0}, drop=True)
    local = name in str(stats.attrs.get("local", "")).split(",")
    source = "khat" if local or "khat_global" not in stats else "khat_global"
    worst = stats[source].max("chain") if source in stats else None
    if worst is None or not set(worst.dims) <= set(one.dims):
        return np.full(one.size, np.nan if worst is None else float(worst.max()))
    return worst.broadcast_like(one.astype(float)).transpose(*one.dims).values.reshape(-1)
