"""The only file that depends on the installed ArviZ version: 0.x with InferenceData, or 1.x with DataTree."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from ...errors import BadInput, GumboWarning
from ...files import write_by_name


def arviz() -> Any:
    """The package, without the announcement that 0.23 prints at its first import."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        import arviz
    return arviz


def is_datatree() -> bool:
    """Whether the installed ArviZ uses xarray's DataTree (1.x)."""
    return int(arviz().__version__.split(".")[0]) >= 1


def make(groups: Mapping[str, Any]) -> Any:
    """An InferenceData or a DataTree of the datasets, without copies."""
    if is_datatree():
        import xarray

        refuse_slashes(groups.values(), "ArviZ 1.x takes for a group")
        return xarray.DataTree.from_dict({f"/{name}": dataset for name, dataset in groups.items()})
    with _own_groups():
        return arviz().InferenceData(**groups)


def refuse_slashes(datasets: Iterable[Any], why: str) -> None:
    """Raise BadInput for a variable or dimension with a slash in its name."""
    for name in (str(one) for found in datasets for one in (*found.variables, *found.dims)):
        if "/" in name:
            raise BadInput(f"the name {name!r} has a slash, which {why}: give it another name")


def dataset(variables: Mapping[str, Any], attrs: Mapping[str, Any] | None = None) -> Any:
    """An ``xarray.Dataset`` of variables; BadInput where xarray would fill up with NaN, or leave out a variable."""
    import xarray

    known: dict[str, tuple[str, Any]] = {}
    for name, variable in variables.items():
        for dim in variable.dims:
            if dim in variables:
                raise BadInput(f"{dim!r} is a variable, and a dimension of {name!r}: give the dimension another name")
            index = variable.get_index(dim)
            other, before = known.setdefault(dim, (name, index))
            if not before.equals(index):
                how = f"{len(before)} elements in {other!r} and {len(index)} in {name!r}"
                how = how if len(before) != len(index) else f"other coordinates in {other!r} than in {name!r}"
                raise BadInput(f"dimension {dim!r} has {how}: give them different names by dims=")
    return xarray.Dataset(dict(variables), attrs=attrs)


@contextmanager
def _own_groups() -> Iterator[None]:
    """Older ArviZ warns of each group that its scheme does not name."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*not defined in the InferenceData scheme")
        yield


def groups_of(idata: Any) -> list[str]:
    """The names of the groups, without slashes."""
    return list(idata.children) if hasattr(idata, "children") else list(idata.groups())


def dataset_of(idata: Any, group: str) -> Any:
    """A group as an ``xarray.Dataset``."""
    found = idata[group]
    return found.to_dataset() if hasattr(found, "to_dataset") else found


OF_NETCDF = "a NetCDF file takes for a group"


def save(idata: Any, path: str | Path) -> None:
    """Write NetCDF through h5netcdf, which both versions support; GumboError where it cannot be written."""
    datasets = [dataset_of(idata, group) for group in groups_of(idata)]
    refuse_slashes(datasets, OF_NETCDF)
    size = sum(one.nbytes for one in datasets)
    write_by_name(Path(path), lambda partial: idata.to_netcdf(str(partial), engine="h5netcdf"), size)


def load(path: str | Path) -> Any:
    """Read what :func:`save` wrote."""
    with _own_groups():
        return arviz().from_netcdf(str(path), engine="h5netcdf")


def pareto_k(log_weights: np.ndarray) -> np.ndarray:
    """The shape k̂ of a generalized Pareto fit to the largest importance weights ``(…, S)`` (Vehtari et al. 2024).

    ``log_weights`` are log p − log q. ArviZ 0.x takes these; 1.x takes log-likelihoods and uses their negatives, the
    log-weights of leave-one-out.

    >>> rng = np.random.default_rng(0)
    >>> z = 0.5 * rng.standard_normal(100_000)
    >>> narrow = -0.5 * z**2 + 0.5 * (z / 0.5) ** 2
    >>> bool(0.6 < pareto_k(narrow) < 0.8), bool(pareto_k(-narrow) < 0.2)  # 0.75 is exact
    (True, True)
    """
    log_weights = np.array(log_weights, dtype=np.float64)
    # Bounded tails overflow inside the fit, without effect on the result.
    with np.errstate(all="ignore"):
        if is_datatree():
            from arviz_stats.base import array_stats

            return np.asarray(array_stats.psislw(-log_weights, axis=-1)[1])
        return np.asarray(arviz().psislw(log_weights)[1])


def table(idata: Any, group: str, var_names: Sequence[str] | None, options: Mapping[str, Any]) -> Any:
    """``az.summary`` of a group, as a DataFrame."""
    # A value that never varies has no R̂: ArviZ divides zero by zero.
    with np.errstate(invalid="ignore", divide="ignore"):
        return arviz().summary(idata, var_names=var_names, group=group, **options)


def loo_approximate_posterior(idata: Any, log_likelihood: Any, log_weight: Any, pointwise: bool | None) -> Any:
    """Leave-one-out with weights ``log_weight`` ``(chain, draw)`` of the draws: arviz-stats', or the same with 0.x.

    Magnusson et al. 2019, arXiv:1904.10679.
    """
    if is_datatree():
        import arviz_stats

        name, zero = str(log_likelihood.name), 0.0 * log_weight
        return arviz_stats.loo_approximate_posterior(idata, log_weight, zero, pointwise=pointwise, var_name=name)
    from scipy.special import logsumexp

    az = arviz()
    stacked = log_likelihood.stack(__sample__=("chain", "draw"))
    ratios = log_weight.stack(__sample__=("chain", "draw")) - stacked
    smoothed, khat = az.psislw((ratios - ratios.max("__sample__")).transpose(*stacked.dims))
    density = (smoothed + stacked).reduce(logsumexp, "__sample__").rename("loo_i")
    draws, total = stacked.sizes["__sample__"], float(density.sum())
    in_sample = float((stacked.reduce(logsumexp, "__sample__") - np.log(draws)).sum())
    good = min(1 - 1 / np.log10(draws), 0.7)
    if high := int((khat > good).sum()):
        warnings.warn(
            GumboWarning(f"k̂ of {high} of {density.size} data is above {good:.2f}: their densities are unreliable"),
            stacklevel=3,
        )
    found = {
        "elpd_loo": total,
        "se": float(np.sqrt(density.size * density.values.var())),
        "p_loo": in_sample - total,
        "n_samples": draws,
        "n_data_points": density.size,
        "warning": high > 0,
        "scale": "log",
        "good_k": good,
    }
    if az.rcParams["stats.ic_pointwise"] if pointwise is None else pointwise:
        found |= {"loo_i": density, "pareto_k": khat}
    from arviz.stats.stats_utils import ELPDData

    return ELPDData(found)


def ecdf_band(count: int, points: np.ndarray, prob: float = 0.99) -> tuple[np.ndarray, np.ndarray] | None:
    """The lower and upper ends, at ``points`` in (0, 1), of a band that holds whole ECDFs of ``count`` uniform values.

    It is ArviZ's, by simulation (Säilynoja et al. 2022, arXiv:2103.10522); None where the installed one has none.
    """
    try:
        if is_datatree():
            from arviz_stats.ecdf_utils import get_pointwise_confidence_band, simulate_confidence_bands

            rng = np.random.default_rng(0)
            pointwise = simulate_confidence_bands(count, 1, points, prob, 2000, rng)
            return get_pointwise_confidence_band(pointwise, count, points)
        from arviz.stats.ecdf_utils import ecdf_confidence_band
    except ImportError:
        return None
    return ecdf_confidence_band(
        count,
        points,
        points,
        prob,
        method="simulated",
        rvs=lambda size, random_state: random_state.uniform(size=size),
        num_trials=2000,
        random_state=np.random.default_rng(0),
    )
