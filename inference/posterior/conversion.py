"""``to_arviz``: posterior draws as ArviZ data."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import pyro

from ...errors import BadInput, UnknownName
from ...options import holds_to_annotations
from ..engine.progress import bar
from ..engine.rows import given_arguments
from ..engine.scopes import private_seed
from . import _arviz
from .collection import GROUPS, Collection
from .likelihoods import warn_of_shared_factors
from .naming import Naming, check_names
from .parts import exact_pair
from .runner import Sweep
from .weights import weight_statistics

_GIB = 2**30
# Smaller draws take no noticeable time: no progress is shown.
_QUIET_BYTES = 2**28


@holds_to_annotations("memory_limit")
def to_arviz(
    model: Callable,
    guide: Callable | Sequence[Callable],
    *args: Any,
    num_samples: int = 1000,
    batch_size: int | None = None,
    coords: Mapping[str, Any] | None = None,
    dims: Mapping[str, Sequence[str]] | None = None,
    num_refits: int | None = None,
    seed: int | None = 0,
    groups: Iterable[str] | None = None,
    thin: int | Mapping[str, int] = 1,
    data_plates: str | Sequence[str] | None = None,
    num_local_samples: int = 64,
    memory_limit: float = 4.0,
    progress: bool | None = None,
    refit: Callable[[int], Callable] | None = None,
    **kwargs: Any,
) -> Any:
    """Draws from ``guide`` and ``model`` as ArviZ data: InferenceData, or DataTree with ArviZ 1.x.

    Serves any Pyro model and guide, with local and global, discrete and continuous latents. Dimensions are ``(chain,
    draw, *plates, *event)``, with plate names as dimension names and row numbers as coordinates. A subsampled plate is
    visited in full. Discrete sites that the model enumerates and the guide does not sample are drawn from their exact
    conditional. A relaxed pair with a discrete form is replaced by that form. Each chain is an independent fit. For
    large draws, the memory needed is printed first. Global state does not change.

    A *datum* is an element of the plates that enclose every observed site, without plates that hold no latent;
    ``data_plates`` overrides this. Latents inside these plates are *local*, all others *global*. Groups (all
    log-probabilities in nats and unscaled):

    - ``posterior``: latents and deterministic sites at draws of the guide; ``posterior_predictive``: data drawn at
      these latents; ``prior``, ``prior_predictive``: the same from the model alone; ``observed_data``;
      ``constant_data``: arguments that no site observes. Masked values are NaN in the groups of data.
    - ``log_likelihood``: of each datum, integrated over its local latents by importance sampling, for each draw of the
      global latents with ``num_local_samples`` local draws; without global latents over all draws, so that it is
      constant. ``log_likelihood_conditional``: of each datum given the drawn latents; do not pass it to ``az.loo``.
      A ``pyro.factor`` in the plates of an observed site is part of the site's log-likelihood; sites that share such a
      factor have one variable, ``x+y``. A factor outside of them counts as part of the prior.
    - ``log_prior``: of each latent given its parents, summed over its elements, ``(chain, draw)``, for ``az.psense``;
      also the density that a reparameterization such as Pyro's ``NeuTraReparam`` leaves at the site in its place.
    - ``sample_stats``: ``log_p``, ``log_q`` and ``log_weight`` of each datum given the global latents, whose own
      log-probabilities are ``log_p_global`` and ``log_q_global``; of the whole program where no latent is local.
    - ``vi_stats``: for each datum k̂, the importance effective sample size, log-evidence and its standard error, ELBO
      (all but the last are NaN where the guide is a point at a latent, listed in the attribute ``points``);
      for each latent dimension KL and whether it is active; k̂ of the global latents. Beside global latents the
      log-evidence and the ELBO of a datum are those given the guide's draws of these (attribute ``given``), so that
      their sum is no bound of log p(data): ``evaluate`` gives that.

    Args:
        model: the Pyro model.
        guide: the Pyro guide, or a sequence of independently fitted guides, one per chain.
        args: the programs' own arguments, or one object in the form that ``fit`` takes: a tuple holds the positional
            arguments, a mapping the keywords, anything else is the single argument.
        num_samples: draws per chain, at least 2.
        batch_size: rows of the arguments per run; None passes all.
        coords: coordinates by dimension.
        dims: names of the event dimensions by variable.
        num_refits: total number of chains; the guide is refitted from other initial values for the missing ones, and
            the model does not change.
        seed: of the draws; the same seed gives the same draws, and None draws from the current random state.
        groups: the groups to make; None makes all.
        thin: keep every ``thin``-th draw, of all groups or of those that a mapping names.
        data_plates: the plates whose elements are the data.
        num_local_samples: draws of the local latents per draw of the global ones, for ``log_likelihood``.
        memory_limit: GiB that the draws may take.
        progress: True shows progress, False does not; None shows it for large draws.
        refit: a function from a seed to a fitted guide, used for ``num_refits``.
        kwargs: keywords of the programs.

    Returns:
        ``InferenceData`` with ArviZ 0.x, ``xarray.DataTree`` with 1.x.

    Raises:
        BadInput: the programs' sites do not match or vary between draws; names or sizes do not fit; the draws
            need more than ``memory_limit``.
        UnknownName: an unknown group.

    Burda et al. 2015, arXiv:1509.00519 (the integral over local latents); Vehtari et al. 2024, arXiv:1507.02646 (k̂).

    >>> import torch
    >>> import pyro.distributions as dist
    >>> def model(x):
    ...     with pyro.plate("data", len(x)):
    ...         z = pyro.sample("z", dist.Normal(0.0, 1.0))
    ...         pyro.sample("x", dist.Normal(z, 1.0), obs=x)
    >>> def guide(x):
    ...     with pyro.plate("data", len(x)):
    ...         pyro.sample("z", dist.Normal(x / 2, 0.5**0.5))
    >>> idata = to_arviz(model, guide, torch.tensor([0.3, -1.2]), num_samples=50)
    >>> idata.posterior["z"].dims, idata.log_likelihood["x"].shape
    (('chain', 'draw', 'data'), (1, 50, 2))
    """
    args, kwargs = given_arguments(args, kwargs)
    wanted = wanted_groups(groups)
    check_count(num_samples)
    guides = list(guide) if isinstance(guide, (list, tuple)) else [guide]
    if not guides:
        raise BadInput("the sequence of guides is empty")
    model, guides = exact_programs(model, guides)
    if num_refits is not None:
        guides += refitted(model, guides, args, kwargs, num_refits, seed, refit)
    options = {"batch_size": batch_size, "data_plates": data_plates}
    sweeps = [Sweep(model, one, args, kwargs, **options) for one in guides]
    check_names(sweeps[0], coords or {}, dims or {})
    collection = Collection(sweeps[0], len(sweeps), num_samples, wanted, thin, num_local_samples)
    fill(collection, sweeps, seed, memory_limit, progress)
    return assembled(collection, args, kwargs, coords or {}, dims or {})


def check_count(num_samples: int) -> None:
    if num_samples < 2:
        raise BadInput(f"num_samples is {num_samples}: expected at least 2")


def exact_programs(model: Callable, guides: Sequence[Callable]) -> tuple[Callable, list[Callable]]:
    """The discrete forms of a relaxed model and its guides; others as they are."""
    with private_seed(None, model, *guides):
        pairs = [exact_pair(model, one) for one in guides]
    return pairs[0][0], [pair[1] for pair in pairs]


def fill(
    collection: Collection,
    sweeps: Sequence[Sweep],
    seed: int | None,
    memory_limit: float = 4.0,
    progress: bool | None = None,
) -> None:
    """Draw what a collection holds, one chain of each sweep, if the memory allows it."""
    need = collection.bytes_needed()
    afford(need, memory_limit)
    loud = sum(need.values()) > _QUIET_BYTES if progress is None else progress
    if loud:
        print(f"to_arviz: {_in_words(need)}", file=sys.stderr, flush=True)
    collection.allocate()
    for chain, sweep in enumerate(sweeps):
        with bar(loud, "to_arviz", collection.steps(sweep)) as shown:
            collection.fill(chain, sweep, None if seed is None else seed + chain, shown)


def wanted_groups(groups: Iterable[str] | None) -> frozenset[str]:
    if groups is None:
        return frozenset(GROUPS)
    chosen = [groups] if isinstance(groups, str) else list(groups)
    for name in chosen:
        if name not in GROUPS:
            raise UnknownName("group", name, GROUPS)
    return frozenset(chosen)


def afford(need: Mapping[str, int], limit: float, remedy: str = "") -> None:
    """Raise BadInput if draws need more than ``limit`` GiB; the default ``remedy`` is to thin the largest group."""
    if sum(need.values()) > limit * _GIB:
        largest = max(need, key=need.__getitem__)
        remedy = remedy or f"thin the largest, as in thin={{{largest!r}: 10}}, name fewer groups="
        raise BadInput(f"{_in_words(need)}, more than memory_limit={limit:g} GiB: {remedy}, or raise memory_limit")


def _in_words(need: Mapping[str, int]) -> str:
    parts = ", ".join(f"{name} {size / _GIB:.2f}" for name, size in sorted(need.items(), key=lambda item: -item[1]))
    return f"the draws need {sum(need.values()) / _GIB:.2f} GiB ({parts})"


# --- what ArviZ gets --------------------------------------------------------------------------------------------------


def assembled(collection: Collection, args: tuple, kwargs: Mapping, coords: Mapping, dims: Mapping) -> Any:
    sweep = collection.sweep
    if "log_likelihood" in collection.groups and not (sweep.local or sweep.tied):
        warn_of_shared_factors(sweep)
    naming = Naming(sweep, coords, dims)
    groups: dict[str, dict[str, Any]] = {}
    for (group, name), array in collection.arrays.items():
        if group in collection.groups:
            groups.setdefault(group, {})[name] = naming.variable(array, collection)
    if "constant_data" in collection.groups and (
        constants := naming.constants(args, kwargs, list(collection.observed.values()))
    ):
        groups["constant_data"] = constants
    if "vi_stats" in collection.groups:
        groups["vi_stats"] = naming.statistics(weight_statistics(collection, naming.event_names))
        for name in ("log_evidence", "log_evidence_se", "elbo") if sweep.local and sweep.shared else ():
            groups["vi_stats"][name].attrs["given"] = ",".join(sweep.shared)
    attrs = _attrs(sweep)
    made = {
        name: _arviz.dataset(groups[name], attrs | _group_attrs(name, collection)) for name in GROUPS if name in groups
    }
    return _arviz.make(made)


def _attrs(sweep: Sweep) -> dict[str, Any]:
    from ..._version import __version__

    return {
        "inference_library": "gumbo",
        "inference_library_version": __version__,
        "modeling_interface": "pyro",
        "modeling_interface_version": pyro.__version__,
        "data_plates": ",".join(sweep.data_plates),
        "local": ",".join(sweep.local),
        "global": ",".join(sweep.shared),
        "points": ",".join(sweep.points),
    }


def _group_attrs(group: str, collection: Collection) -> dict[str, Any]:
    if group == "vi_stats":
        kinds = {"marginal": "of each dimension's marginal", "joint": "of the site"}
        return {f"kl_{name}": kinds[kind] for name, kind in collection.kl_kinds.items() if kind in kinds}
    if group != "log_likelihood":
        return {}
    return {
        "integrated_over": ",".join(collection.sweep.local),
        "constant_over_draws": int(bool(collection.sweep.local) and not collection.nested),
    }


def refitted(model, guides, args, kwargs, num_refits: int, seed: int | None, refit) -> list[Callable]:
    """The guides of the missing chains, for ``num_refits`` chains in total."""
    if num_refits < len(guides):
        raise BadInput(f"num_refits is {num_refits}: expected at least {len(guides)}, the guide given counted")
    from .refits import refitted

    missing = range(len(guides), num_refits)
    if refit is not None:
        return [refit((seed or 0) + number) for number in missing]
    return [refitted(model, guides[0], args, kwargs, seed=(seed or 0) + number) for number in missing]
