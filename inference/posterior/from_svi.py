"""``from_pyro_svi``: results of Pyro's SVI as ArviZ data, with the argument names of ArviZ's own converters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from ...errors import BadInput
from ...options import holds_to_annotations
from ..engine.rows import given_arguments
from . import _arviz
from .collection import Collection
from .conversion import assembled, check_count, exact_programs, fill, wanted_groups
from .naming import check_names, numbered
from .runner import Sweep

_ALWAYS = ("posterior", "sample_stats", "vi_stats", "observed_data", "constant_data")
_ORDER = (
    "posterior",
    "posterior_predictive",
    "predictions",
    "log_likelihood",
    "sample_stats",
    "vi_stats",
    "prior",
    "prior_predictive",
    "observed_data",
    "constant_data",
    "predictions_constant_data",
)
Draws = Mapping[str, Any]


@holds_to_annotations("posterior", "prior", "posterior_predictive", "log_likelihood")
def from_pyro_svi(
    svi: Any = None,
    *,
    model_args: Sequence[Any] | None = None,
    model_kwargs: Mapping[str, Any] | None = None,
    posterior: Draws | None = None,
    prior: Draws | bool | None = None,
    posterior_predictive: Draws | bool | None = None,
    log_likelihood: Draws | bool | None = None,
    predictions: Draws | None = None,
    constant_data: Draws | None = None,
    predictions_constant_data: Draws | None = None,
    coords: Mapping[str, Any] | None = None,
    dims: Mapping[str, Sequence[str]] | None = None,
    pred_dims: Mapping[str, Sequence[str]] | None = None,
    num_chains: int = 1,
    num_samples: int = 1000,
    seed: int | None = 0,
) -> Any:
    """Convert the result of Pyro's SVI to ArviZ data, with the argument names of ArviZ's converters.

    ArviZ 0.x has ``from_pyro``, which takes MCMC; ArviZ 1.x has ``from_numpyro_svi``, and no converter for Pyro. This
    function has their arguments, and works with both versions of ArviZ. The draws come from :func:`to_arviz`: chain and
    draw, then plates by their names, then the event; ``vi_stats`` has k̂ of the guide's weights.

    Args:
        svi: the ``pyro.infer.SVI`` after its last step, or any object with a ``model`` and a ``guide``; None converts
            the given draws only.
        model_args: the positional arguments of the programs, as passed to ``svi.step``.
        model_kwargs: their keywords.
        posterior: draws of the latents by site, as ``pyro.infer.Predictive`` returns them, where ``svi`` is None.
        prior: draws by site, ``(num_chains × draws, *shape)``, split into the groups ``prior`` and ``prior_predictive``
            (sites that the model observes; without ``svi`` those of ``posterior_predictive`` that ``posterior`` has
            not); True draws them.
        posterior_predictive: draws of the data by site, from which the latents are left out that ``Predictive`` with a
            guide returns too; True draws them.
        log_likelihood: log-likelihoods by site, ``(num_chains × draws, *data)``; True computes those of
            :func:`to_arviz`, which are integrated over local latents. As in ArviZ the default computes none.
        predictions: draws for new data by site, as from :func:`predict` or ``Predictive``.
        constant_data: arrays by name; None takes the tensors among the arguments that no site observes.
        predictions_constant_data: arrays by name.
        coords: coordinates by dimension.
        dims: names of the dimensions after chain and draw, by variable; by default plates and numbered dimensions.
        pred_dims: the same for ``predictions`` and ``predictions_constant_data``.
        num_chains: the number of chains in given draws, where ``svi`` is None.
        num_samples: draws of the guide.
        seed: of the draws; None draws from the current random state.

    Returns:
        ``InferenceData`` with ArviZ 0.x, ``xarray.DataTree`` with 1.x.

    Raises:
        BadInput: nothing to convert; an object without a model and a guide; draws, dimensions or coordinates whose
            sizes do not fit.

    >>> import pyro
    >>> import pyro.distributions as dist
    >>> from pyro.infer import SVI, Trace_ELBO
    >>> from pyro.infer.autoguide import AutoNormal
    >>> def model(x):
    ...     mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
    ...     with pyro.plate("data", len(x)):
    ...         pyro.sample("x", dist.Normal(mean, 1.0), obs=x)
    >>> x = torch.tensor([0.3, -1.2])
    >>> svi = SVI(model, AutoNormal(model), pyro.optim.Adam({"lr": 0.1}), loss=Trace_ELBO())
    >>> loss = svi.step(x)
    >>> idata = from_pyro_svi(svi, model_args=(x,), log_likelihood=True, num_samples=50)
    >>> idata.posterior["mean"].shape, idata.log_likelihood["x"].dims
    ((1, 50), ('chain', 'draw', 'data'))
    """
    coords, dims, pred_dims = coords or {}, dims or {}, pred_dims or {}
    groups: dict[str, Any] = {}
    if num_chains < 1:
        raise BadInput(f"num_chains is {num_chains}: expected at least 1")
    if svi is not None:
        if posterior is not None:
            raise BadInput("svi and posterior are both given: posterior holds draws where there is no svi")
        wanted = {"prior": prior, "posterior_predictive": posterior_predictive, "log_likelihood": log_likelihood}
        elsewhere = _named((*wanted.values(), predictions, constant_data, predictions_constant_data), dims, pred_dims)
        names = (coords, dims, elsewhere)
        groups, latents = _drawn(svi, tuple(model_args or ()), model_kwargs or {}, wanted, num_samples, seed, names)
        num_chains = 1
    else:
        latents = set(_draws(posterior, "posterior"))
    known = _known_dimensions(groups)
    given = _Given(num_chains, known, coords, dims)
    arrays = _sorted(posterior, prior, posterior_predictive, groups, latents)
    arrays["log_likelihood"] = _draws(log_likelihood, "log_likelihood")
    groups |= {name: given.dataset(draws) for name, draws in arrays.items() if draws}
    new = _Given(num_chains, known, coords, pred_dims, same_sizes=False)
    groups |= {"predictions": new.dataset(predictions)} if predictions else {}
    groups |= {"constant_data": given.dataset(constant_data, by_draw=False)} if constant_data else {}
    if predictions_constant_data:
        groups["predictions_constant_data"] = new.dataset(predictions_constant_data, by_draw=False)
    if not groups:
        raise BadInput("nothing to convert: give svi, or draws as posterior, prior, posterior_predictive, predictions")
    return _arviz.make({name: groups[name] for name in _ORDER if name in groups})


def _drawn(
    svi: Any, args: tuple, kwargs: Mapping, wanted: Mapping[str, Any], num_samples: int, seed: int | None, names: tuple
) -> tuple[dict[str, Any], set[str]]:
    """The groups that gumbo draws, as datasets, those of every fit and those of ``wanted`` that are True; the latents.

    ``names`` are coordinates, dimensions by variable, and those of variables that the caller gives.
    """
    drawn = {name for name, given in wanted.items() if given is True}
    drawn |= {"prior_predictive"} if "prior" in drawn else set()
    model, guide = _programs(svi)
    check_count(num_samples)
    # As one object, `args` are the positional arguments, whatever their number.
    args, kwargs = given_arguments((args,), kwargs)
    model, [guide] = exact_programs(model, [guide])
    sweep = Sweep(model, guide, args, kwargs)
    check_names(sweep, *names)
    collection = Collection(sweep, 1, num_samples, wanted_groups([*_ALWAYS, *sorted(drawn)]))
    fill(collection, [sweep], seed)
    made = assembled(collection, args, kwargs, *names[:2])
    return {name: _arviz.dataset_of(made, name) for name in _arviz.groups_of(made)}, set(sweep.latents)


def _named(groups: Sequence[Any], *dims: Mapping[str, Sequence[str]]) -> dict[str, list[str]]:
    """The names of the dimensions of all variables in groups that the caller gives."""
    names = {name for group in groups if isinstance(group, Mapping) for name in group}
    return {name: [one for named in dims for one in named.get(name, ())] for name in names}


def _programs(svi: Any) -> tuple[Any, Any]:
    model, guide = getattr(svi, "model", None), getattr(svi, "guide", None)
    if callable(model) and callable(guide):
        return model, guide
    advice = "ArviZ 0.x's from_pyro takes MCMC" if hasattr(svi, "get_samples") else "for two programs take to_arviz"
    raise BadInput(f"svi is an object of class {type(svi).__name__}: expected pyro.infer.SVI; {advice}")


def _draws(given: Draws | bool | None, name: str) -> Draws:
    """The draws of a mapping; none where gumbo drew them, or nothing was asked for."""
    if given is None or isinstance(given, bool):
        return {}
    if not isinstance(given, Mapping):
        raise BadInput(f"{name} is an object of class {type(given).__name__}: expected draws by site, True or None")
    return given


def _sorted(posterior: Any, prior: Any, predictive: Any, groups: Mapping[str, Any], latents: set[str]) -> dict:
    """Draws that the caller gives, by group."""
    # Predictive with a guide returns the latents beside the data: they are no predictions.
    of_data = _parted(_draws(predictive, "posterior_predictive"), latents)[1]
    observed = set(groups.get("observed_data", ())) | of_data.keys() - set(groups.get("posterior", ()))
    predicted, drawn = _parted(_draws(prior, "prior"), observed)
    found = {"posterior": _draws(posterior, "posterior"), "prior": drawn, "prior_predictive": predicted}
    return {**found, "posterior_predictive": of_data}


def _parted(draws: Draws, names: set[str]) -> tuple[Draws, Draws]:
    """The draws of these names, and those of others."""
    return {name: draws[name] for name in draws if name in names}, {n: draws[n] for n in draws if n not in names}


def _known_dimensions(groups: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """For each site of the programs its dimensions after chain and draw, with their coordinates."""
    found = {}
    for group in ("observed_data", "posterior"):
        for name, variable in groups[group].data_vars.items() if group in groups else ():
            names = [dim for dim in variable.dims if dim not in ("chain", "draw")]
            found[str(name)] = {str(dim): variable[dim].values for dim in names}
    return found


class _Given:
    """Arrays that the user gives, with names for their dimensions: the user's, or those of the program's site."""

    def __init__(
        self,
        num_chains: int,
        known: Mapping[str, Mapping[str, Any]],
        coords: Mapping[str, Any],
        dims: Mapping[str, Sequence[str]],
        same_sizes: bool = True,
    ):
        self.num_chains, self.known, self.coords, self.dims, self.same_sizes = (
            num_chains,
            known,
            coords,
            dims,
            same_sizes,
        )

    def dataset(self, values: Draws, by_draw: bool = True) -> Any:
        """An ``xarray.Dataset`` of arrays by name."""
        return _arviz.dataset({name: self._variable(name, value, by_draw) for name, value in values.items()})

    def _variable(self, name: str, value: Any, by_draw: bool) -> Any:
        import xarray

        data = np.asarray(value.detach().cpu() if isinstance(value, torch.Tensor) else value)
        head = {}
        if by_draw:
            if data.ndim < 1 or len(data) % self.num_chains or not len(data):
                raise BadInput(
                    f"the draws of {name!r} have shape {data.shape}: expected draws along the first dimension, a "
                    f"multiple of num_chains, which is {self.num_chains}"
                )
            data = self._without_plates(name, data)
            data = data.reshape(self.num_chains, -1, *data.shape[1:])
            sizes = {"chain": data.shape[0], "draw": data.shape[1]}
            head = {dim: numbered(self.coords, dim, np.arange(size)) for dim, size in sizes.items()}
        names, own = self._names(name, data.shape[len(head) :])
        tail = {}
        for dim, size in zip(names, data.shape[len(head) :], strict=True):
            values = np.asarray(self.coords.get(dim, own.get(dim, np.arange(size))))
            if len(values) != size and not self.same_sizes and dim in own:
                values = np.arange(size)  # new rows of a plate
            if len(values) != size:
                raise BadInput(f"coords for {dim!r} has {len(values)} values, but the dimension has {size} in {name!r}")
            tail[dim] = values
        return xarray.DataArray(data, dims=[*head, *tail], coords={**head, **tail})

    def _without_plates(self, name: str, data: np.ndarray) -> np.ndarray:
        """The draws of a site without the dimensions of size 1 that Pyro's ``Predictive`` leaves for plates."""
        while name in self.known and data.ndim - 1 > len(self.known[name]) and 1 in data.shape[1:]:
            data = data.squeeze(1 + data.shape[1:].index(1))
        return data

    def _names(self, name: str, shape: Sequence[int]) -> tuple[list[str], Mapping[str, Any]]:
        """The names, and the coordinates of those that come from the program's site."""
        if name in self.dims:
            named = list(self.dims[name])
            if len(named) > len(shape):
                raise BadInput(f"dims for {name!r} names {len(named)} dimensions, but it has {len(shape)}")
            return named + [f"{name}_dim_{place}" for place in range(len(named), len(shape))], {}
        site = self.known.get(name, {})
        # A log-likelihood has the dimensions of its site without the event.
        if len(site) >= len(shape) and (
            not self.same_sizes or all(len(v) == size for v, size in zip(site.values(), shape, strict=False))
        ):
            return list(site)[: len(shape)], site
        return [f"{name}_dim_{place}" for place in range(len(shape))], {}
