"""What a guide believes, as ArviZ takes it."""

from __future__ import annotations

import inspect
import math
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyro
import torch

from ...errors import BadInput, UnknownName
from ..engine.progress import Progress
from ..engine.rows import given_arguments
from ..engine.scopes import private_seed
from . import _arviz
from .evaluation import exact_pair
from .importance import integrated, pieces, weight_statistics
from .runner import Block, Layout, Pass, Sweep, quietly

GROUPS = (
    "posterior",
    "posterior_predictive",
    "prior",
    "prior_predictive",
    "observed_data",
    "constant_data",
    "log_likelihood",
    "log_likelihood_conditional",
    "log_prior",
    "sample_stats",
    "vi_stats",
)
_GIB = 2**30
# Below this size nobody waits, and nothing needs to be said.
_QUIET_BYTES = 2**28


def to_arviz(
    model: Callable,
    guide: Callable | Sequence[Callable],
    *args: Any,
    num_samples: int = 1000,
    batch_size: int | None = None,
    coords: Mapping[str, Sequence] | None = None,
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
    """Draws of ``guide`` and ``model`` on data as ArviZ takes them: InferenceData, or DataTree in 1.x.

    The data are the programs' arguments and keywords, ``to_arviz(model, guide, x, y, mask=mask)``, or one object in the
    form that ``fit`` takes: a tuple is the positional arguments, a mapping the keywords, anything else the one argument
    (a tuple or a mapping that is itself an argument stands in a tuple).

    Any Pyro model and guide will do, with local and global, discrete and continuous latents. Dimensions are ``(chain,
    draw, *plates, *event)``: the plates give their names, and row numbers as coordinates; ``dims`` names the event
    dimensions of a variable, ``coords`` gives coordinates. A subsampled plate is visited in full. ``batch_size`` passes
    so many rows of the arguments at a time.

    A *datum* is an element of the plates that enclose every observed site, without those that hold no latent;
    ``data_plates`` says otherwise. Latents inside them are *local*, all others *global*. Groups (all log-probabilities
    in nats and unscaled):

    - ``posterior``: latents and deterministic sites at draws of the guide; ``posterior_predictive``: data drawn anew at
      them; ``prior``, ``prior_predictive``: the same from the model alone; ``observed_data``; ``constant_data``:
      arguments that no site observes. What a mask hides is NaN in the groups of data.
    - ``log_likelihood``: of each datum, integrated over its local latents by importance sampling, for each draw of the
      global ones: with none of these over all draws, and constant; else over ``num_local_samples`` of them a draw.
      ``log_likelihood_conditional``: of each datum given the drawn latents, which ``az.loo`` should not be given.
    - ``log_prior``: of each latent given those it depends on, summed over its elements, ``(chain, draw)``, as
      ``az.psense`` takes it.
    - ``sample_stats``: ``log_p``, ``log_q`` and ``log_weight`` of each datum given the global latents, whose own
      log-probabilities are ``log_p_global`` and ``log_q_global``; of the whole program where no latent is local.
    - ``vi_stats``: for each datum k̂, the importance effective sample size, log-evidence and its standard error, ELBO;
      for each latent dimension KL and whether it is active; k̂ of the global latents.

    A chain is an independent fit: ``num_refits`` fits the guide so many times from other initial values with the model
    as it is (``refit``, a function from a seed to a fitted guide, does it in your way); or ``guide`` is a sequence of
    guides fitted by yourself. ``groups`` restricts what is made; ``thin`` keeps every so-manieth draw, of all groups or
    of those that a mapping names. What is needed is said before the start where it is much, and refused beyond
    ``memory_limit`` GiB. The same ``seed`` gives the same draws (None draws from the current stream); no global state
    is touched. A relaxed pair that knows its discrete form is taken in that form.

    Raises :class:`~gumbo.errors.BadInput` for programs whose sites do not match or change from draw to draw, and for
    names and sizes that do not fit.

    Burda et al. 2015, arXiv:1509.00519 (the integral over local latents); Vehtari et al. 2024, arXiv:1507.02646 (k̂).

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
    wanted = _wanted(groups)
    if num_samples < 2:
        raise BadInput(f"num_samples is {num_samples}: expected at least 2")
    guides = list(guide) if isinstance(guide, (list, tuple)) else [guide]
    if not guides:
        raise BadInput("the sequence of guides is empty")
    with private_seed(None, model, *guides):
        pairs = [exact_pair(model, one) for one in guides]
    model, guides = pairs[0][0], [pair[1] for pair in pairs]
    if num_refits is not None:
        guides += _refits(model, guides, args, kwargs, num_refits, seed, refit)
    options = {"batch_size": batch_size, "data_plates": data_plates}
    sweeps = [Sweep(model, one, args, kwargs, **options) for one in guides]
    collection = Collection(sweeps[0], len(sweeps), num_samples, wanted, thin, num_local_samples)
    need = collection.bytes_needed()
    _afford(need, memory_limit)
    loud = sum(need.values()) > _QUIET_BYTES if progress is None else progress
    if loud:
        print(f"to_arviz: {_in_words(need)}", file=sys.stderr, flush=True)
    collection.allocate()
    for chain, sweep in enumerate(sweeps):
        with bar(loud, "to_arviz", collection.steps(sweep)) as shown:
            collection.fill(chain, sweep, None if seed is None else seed + chain, shown)
    return _assembled(collection, args, kwargs, coords or {}, dims or {})


def summary(idata: Any, var_names: Sequence[str] | None = None, group: str = "posterior", **options: Any) -> Any:
    """``az.summary`` of draws that :func:`to_arviz` made, as a DataFrame: honest about independent draws of one fit.

    One chain has no R̂, and none is shown; chains are refits, and R̂ compares them. Draws are independent, so their
    number is the effective sample size *of the guide*, which says nothing of the posterior: instead of Monte Carlo's
    ``ess`` columns there is ``khat``, the k̂ of the datum that the row belongs to (of the global latents for a global
    one), where above 0.7 the guide cannot be trusted (Vehtari et al. 2024, arXiv:1507.02646). ``options`` go to
    ``az.summary``.

    >>> import pyro.distributions as dist
    >>> def model(x):
    ...     z = pyro.sample("z", dist.Normal(0.0, 1.0))
    ...     pyro.sample("x", dist.Normal(z, 1.0), obs=x)
    >>> guide = lambda x: pyro.sample("z", dist.Normal(x / 2, 0.5**0.5))
    >>> found = summary(to_arviz(model, guide, torch.tensor(0.4), num_samples=400))
    >>> list(found.index), [name for name in ("mean", "khat", "r_hat") if name in found]
    (['z'], ['mean', 'khat'])
    """
    if group not in _arviz.groups_of(idata):
        raise UnknownName("group", group, _arviz.groups_of(idata))
    chains = _arviz.dataset_of(idata, group).sizes["chain"]
    options = {"kind": "all" if chains > 1 else "stats", **options}
    made = _arviz.table(idata, group, var_names, options)
    hidden = [name for name in made.columns if str(name).startswith(("ess", "mcse"))]
    hidden += [name for name in made.columns if name in ("r_hat", "R̂", "rhat")] if chains == 1 else []
    made = made.drop(columns=hidden)
    if group == "posterior" and "vi_stats" in _arviz.groups_of(idata):
        made["khat"] = _khat_of_rows(idata, var_names)
    return made


def _khat_of_rows(idata: Any, var_names: Sequence[str] | None) -> np.ndarray:
    """k̂ for each number of the posterior, in the order of the summary: variables, then positions."""
    posterior, stats = _arviz.dataset_of(idata, "posterior"), _arviz.dataset_of(idata, "vi_stats")
    names = list(posterior.data_vars) if var_names is None else [var_names] if isinstance(var_names, str) else var_names
    found = []
    for name in names:
        one = posterior[name].isel(chain=0, draw=0, drop=True)
        local = name in str(stats.attrs.get("local", "")).split(",")
        source = "khat" if local or "khat_global" not in stats else "khat_global"
        worst = stats[source].max("chain") if source in stats else None
        if worst is None or not set(worst.dims) <= set(one.dims):
            found.append(np.full(one.size, np.nan if worst is None else float(worst.max())))
        else:
            spread = worst.broadcast_like(one.astype(float)).transpose(*one.dims)
            found.append(spread.values.reshape(-1))
    return np.concatenate(found)


# --- what is drawn ----------------------------------------------------------------------------------------------------


@dataclass
class Array:
    """A variable in the making: its dimensions, and ``(chain, draw, …)`` numbers or those that one chain has."""

    group: str
    name: str
    layout: Layout | None
    plates: tuple[str | None, ...]
    shape: tuple[int, ...]
    dtype: torch.dtype
    every: int = 1
    by_draw: bool = True
    constant: bool = False
    data: np.ndarray = field(default=None, repr=False)  # type: ignore[assignment]


class Collection:
    """All that is drawn for the groups asked for, over chains, draws and blocks of rows.

    ``log_weight`` (and ``log_p_global``, ``log_q_global``) are always kept, in float64: k̂ and the integrals come from
    them.
    """

    def __init__(
        self,
        sweep: Sweep,
        chains: int,
        num_samples: int,
        groups: frozenset[str],
        thin: int | Mapping[str, int] = 1,
        num_local_samples: int = 64,
    ):
        self.sweep, self.chains, self.num_samples, self.groups = sweep, chains, num_samples, groups
        self.thin = _thinning(thin, num_samples)
        if num_local_samples < 1:
            raise BadInput(f"num_local_samples is {num_local_samples}: expected at least 1")
        self.num_local_samples = num_local_samples
        self.nested = bool(sweep.local and sweep.shared)
        self.globals_known = True
        self.arrays: dict[tuple[str, str], Array] = {}
        self._declare()

    # Declared first, so that the memory they need is known before anything is drawn.

    def _declare(self) -> None:
        sweep, model = self.sweep, self.sweep.model_sites
        drawn = [name for name, layout in model.items() if layout.kind in ("latent", "deterministic")]
        for group, names in (
            ("posterior", drawn),
            ("posterior_predictive", sweep.observed),
            ("prior", drawn),
            ("prior_predictive", sweep.observed),
        ):
            for name in names if group in self.groups else ():
                self._add(group, name, model[name], self.thin[group])
        if self.groups & {"observed_data", "constant_data"}:  # what is observed is no constant
            for name in sweep.observed:
                self._add("observed_data", name, model[name], 1, by_draw=False)
        if "log_likelihood_conditional" in self.groups:
            for name in sweep.observed:
                layout = model[name]
                shape = (*layout.sizes,)
                self._put(
                    "log_likelihood_conditional", name, layout.names, shape, self.thin["log_likelihood_conditional"]
                )
        for name in sweep.latents if "log_prior" in self.groups else ():
            self._put("log_prior", name, (), (), self.thin["log_prior"])
        every = self.thin["log_likelihood"]
        if self.nested or "log_likelihood" in self.groups:
            if sweep.local:
                self._put("log_likelihood", sweep.evidence, sweep.data_plates, self._sizes(sweep.data_plates), every)
                # Integrated over all draws it is one number a datum, which is kept once.
                self.arrays["log_likelihood", sweep.evidence].constant = not self.nested
            elif not sweep.tied:
                for name in sweep.observed:
                    self._put("log_likelihood", name, model[name].names, model[name].sizes, every)
        sizes = self._sizes(sweep.weight_plates)
        self._put("sample_stats", "log_weight", sweep.weight_plates, sizes, 1)
        for name in ("log_p", "log_q"):
            if "sample_stats" in self.groups:
                self._put("sample_stats", name, sweep.weight_plates, sizes, 1, self._precision())
            if self.nested:
                self._put("sample_stats", f"{name}_global", sweep.shared_plates, self._sizes(sweep.shared_plates), 1)

    def _sizes(self, plates: Sequence[str]) -> tuple[int, ...]:
        return tuple(self.sweep.sizes[plate] for plate in plates)

    def _add(self, group: str, name: str, layout: Layout, every: int, by_draw: bool = True) -> None:
        dtype = layout.dtype
        if name in self.sweep.masked and not dtype.is_floating_point:
            dtype = torch.float64  # what a mask hides is NaN
        self.arrays[group, name] = Array(group, name, layout, layout.names, layout.shape, dtype, every, by_draw)

    def _put(
        self,
        group: str,
        name: str,
        plates: Sequence[str | None],
        shape: tuple[int, ...],
        every: int,
        dtype: torch.dtype = torch.float64,
    ) -> None:
        self.arrays[group, name] = Array(group, name, None, tuple(plates), tuple(shape), dtype, every)

    def _precision(self) -> torch.dtype:
        """What the programs compute in: sums of their log-probabilities are no finer."""
        known = [layout.dtype for layout in self.sweep.model_sites.values() if layout.dtype.is_floating_point]
        return torch.float32 if known and all(dtype.itemsize <= 4 for dtype in known) else torch.float64

    def full_shape(self, array: Array, kept: bool = False) -> tuple[int, ...]:
        """``(chain, draw, …)``; ``kept`` as it is in memory."""
        if not array.by_draw:
            return array.shape
        draws = 1 if kept and array.constant else -(-self.num_samples // array.every)
        return (self.chains, draws, *array.shape)

    def bytes_needed(self) -> dict[str, int]:
        """By group."""
        need: dict[str, int] = {}
        for array in self.arrays.values():
            size = math.prod(self.full_shape(array, kept=True)) * array.dtype.itemsize
            need[array.group] = need.get(array.group, 0) + size
        if "vi_stats" in self.groups:
            latents = [self.sweep.model_sites[name] for name in self.sweep.local]
            need["vi_stats"] = sum(2 * self.chains * one.numel * _sums(one).itemsize for one in latents)
        return need

    def allocate(self) -> None:
        for array in self.arrays.values():
            array.data = np.zeros(self.full_shape(array, kept=True), dtype=_kind_of(array.dtype))
        self.largest_log_p = 0.0
        self.observed: dict[str, np.ndarray] = {}  # under no mask
        latents = [self.sweep.model_sites[name] for name in self.sweep.local]
        # Means and mean squares of each datum's latents.
        self.means = {
            layout.name: np.zeros((2, self.chains, *layout.shape), dtype=_sums(layout))
            for layout in latents
            if "vi_stats" in self.groups
        }
        self.kl: dict[str, list[np.ndarray | float | None]] = {}
        self.kl_kinds: dict[str, str] = {}
        self.partners: dict[str, str | None] = {}
        self.kl_together: dict[str, list[float]] = {}

    def steps(self, sweep: Sweep) -> int:
        blocks = len(list(sweep.blocks()))
        return blocks * len(list(self._chunks(sweep)))

    def _chunks(self, sweep: Sweep) -> Iterable[tuple[int, int]]:
        per_run = sweep.draws_a_run()
        return ((start, min(start + per_run, self.num_samples)) for start in range(0, self.num_samples, per_run))

    def fill(self, chain: int, sweep: Sweep, seed: int | None, progress: Progress | None = None) -> None:
        """Draw everything of one chain."""
        progress, done = progress or Progress(), 0
        with quietly(sweep.model, sweep.guide, seed):
            for start, stop in self._chunks(sweep):
                held: dict[tuple, torch.Tensor] = {}
                for block, guide, model in sweep.over_rows(stop - start):
                    self._posterior(chain, sweep, start, stop, block, guide, model)
                    if self.groups & {"prior", "prior_predictive"}:
                        self._prior(chain, sweep, start, stop, block, held)
                    done += 1
                    progress.step(done)
                    progress.epoch(done, {})
            if sweep.local and not self.nested and ("log_likelihood", sweep.evidence) in self.arrays:
                self._over_all_draws(chain)

    def array(self, group: str, name: str) -> np.ndarray:
        return self.arrays[group, name].data

    def log_weight(self) -> np.ndarray:
        """log p − log q, ``(chain, draw, *weight plates)``."""
        return self.array("sample_stats", "log_weight")

    def unit_log_weight(self) -> np.ndarray:
        """Log-weights whose spread is the guide's fault, ``(chain, draw, *weight plates)``.

        Of local latents given global ones, each is taken relative to the evidence given its draw of the global ones,
        which differs between draws under an exact guide too.
        """
        if not self.nested:
            return self.log_weight()
        array = self.arrays["log_likelihood", self.sweep.evidence]
        return self.log_weight()[:, :: array.every] - array.data

    def global_log_weight(self) -> np.ndarray | None:
        """Of the global latents, the local ones integrated out, ``(chain, draw, *shared plates)``."""
        if not self.nested or not self.globals_known:
            return None
        array = self.arrays["log_likelihood", self.sweep.evidence]
        plates = self.sweep.data_plates
        axes = tuple(2 + i for i, plate in enumerate(plates) if plate not in self.sweep.shared_plates)
        log_p = self.array("sample_stats", "log_p_global") - self.array("sample_stats", "log_q_global")
        return log_p[:, :: array.every] + array.data.sum(axes)

    def _kept(self, array: Array, start: int, stop: int) -> tuple[np.ndarray, slice]:
        """Which draws of a run an array keeps, and where they go."""
        first = -(-start // array.every) * array.every
        picks = np.arange(first, stop, array.every) - start
        return picks, slice(first // array.every, first // array.every + len(picks))

    def _write(self, chain: int, array: Array, start: int, stop: int, block: Block, values: torch.Tensor) -> None:
        picks, where = self._kept(array, start, stop)
        if len(picks):
            picked = values if len(picks) == stop - start else values[torch.as_tensor(picks)]
            array.data[(chain, where, *block.index(array.plates))] = picked.cpu().numpy()

    def _posterior(
        self, chain: int, sweep: Sweep, start: int, stop: int, block: Block, guide: Pass, model: Pass
    ) -> None:
        count = stop - start
        for (group, name), array in self.arrays.items():
            if group == "posterior":
                self._write(chain, array, start, stop, block, model.value(name))
            elif group == "log_likelihood_conditional" or (group == "log_likelihood" and not sweep.local):
                self._write(chain, array, start, stop, block, model.log_prob(name))
            elif group == "log_prior" and block.first(model.layouts[name]):
                picks, where = self._kept(array, start, stop)
                array.data[chain, where] += model.log_prob(name, ()).cpu().numpy()[picks]
            elif group == "observed_data" and start == 0 and chain == 0:
                array.data[block.index(array.plates)] = model.shown_value(name)[0].cpu().numpy()
                self.observed.setdefault(name, np.zeros(array.shape, _kind_of(array.layout.dtype)))
                self.observed[name][block.index(array.plates)] = model.value(name)[0].cpu().numpy()
        self._weights(chain, sweep, start, stop, block, guide, model)
        if "posterior_predictive" in self.groups:
            values = {name: sweep.held(model, name) for name in sweep.latents}
            again = sweep.model_run(count, block, values, observe=False)
            for name in sweep.observed:
                array = self.arrays["posterior_predictive", name]
                self._write(chain, array, start, stop, block, again.shown_value(name))
        if self.nested:
            self._integrate(chain, sweep, start, stop, block, guide)
        if "vi_stats" in self.groups:
            self._by_dimension(chain, sweep, block, guide, model)

    def _weights(self, chain, sweep, start, stop, block, guide: Pass, model: Pass) -> None:
        """Add each site to the log-probabilities of its datum, or of the global latents."""
        for part, run, sign in (("log_p", model, 1), ("log_q", guide, -1)):
            largest = 0.0
            for name, layout in run.layouts.items():
                if layout.kind == "deterministic" or not block.first(layout):
                    continue
                inside = set(sweep.data_plates) <= layout.plates
                if sweep.local and not self.nested and not inside:
                    continue  # an auxiliary draw of the guide: given it, the weights of the data are right as they are
                local = not self.nested or inside
                array = self.arrays["sample_stats", "log_weight" if local else f"{part}_global"]
                value = run.log_prob(name, array.plates)
                value = _aligned(value, [n for n in layout.names if n in array.plates], array.plates).cpu().numpy()
                where = (chain, slice(start, stop), *block.index(array.plates))
                array.data[where] += sign * value if local else value
                if local and ("sample_stats", part) in self.arrays:
                    self.array("sample_stats", part)[where] += value
                largest += float(np.abs(value).max())
            if run is model:
                self.largest_log_p = max(self.largest_log_p, largest)

    def _integrate(self, chain: int, sweep: Sweep, start: int, stop: int, block: Block, guide: Pass) -> None:
        array = self.arrays["log_likelihood", sweep.evidence]
        picks, where = self._kept(array, start, stop)
        if not len(picks):
            return
        given = {name: value[torch.as_tensor(picks)] for name, value in sweep.given(guide).items()}
        found, known = integrated(sweep, block, given, self.num_local_samples, guide, picks)
        self.globals_known &= known
        array.data[(chain, where, *block.index(array.plates))] = found.cpu().numpy()

    def _over_all_draws(self, chain: int) -> None:
        array = self.arrays["log_likelihood", self.sweep.evidence]
        weight = self.log_weight()[chain]
        for piece in pieces(weight.shape[1:], weight.shape[0]):
            array.data[(chain, 0, *piece)] = _log_mean_exp(weight[(slice(None), *piece)])

    def _by_dimension(self, chain: int, sweep: Sweep, block: Block, guide: Pass, model: Pass) -> None:
        for name in sweep.latents:
            layout = sweep.model_sites[name]
            if name in self.means:
                index = (chain, *block.index(layout.names))
                value = model.value(name).double()
                for power in (1, 2):
                    self.means[name][power - 1][index] += (value**power).sum(0).cpu().numpy() / self.num_samples
            partner = self._partner(guide, name)
            found, kind = _divergence(guide, model, name, partner)
            self.kl_kinds[name], self.partners[name] = kind, partner
            total = self.kl.setdefault(name, [0.0] * self.chains)
            if found is None:
                total[chain] = None
                continue
            part = (found * self._share(block, layout)).cpu().numpy() * (guide.count / self.num_samples)
            total[chain] = total[chain] + part
        self._together(chain, block, guide, model)

    @staticmethod
    def _partner(guide: Pass, name: str) -> str | None:
        """The guide's site that has the latent's density: itself, or the one auxiliary draw it is a point given."""
        layout = guide.layouts[name]
        if not layout.point:
            return name
        own = [
            other
            for other, one in guide.layouts.items()
            if other.startswith(f"{name}_")
            and (one.kind, one.point, one.names) == ("latent", False, layout.names)
            and other not in guide.sweep.model_sites
        ]
        return own[0] if len(own) == 1 else None

    def _together(self, chain: int, block: Block, guide: Pass, model: Pass) -> None:
        """KL of all that the guide draws through other draws, over all rows."""
        sites = [name for name, partner in self.partners.items() if partner is None]
        rest = set(guide.layouts) - set(self.partners) - set(self.partners.values())
        drawn = [name for name in rest if guide.layouts[name].kind == "latent" and not guide.layouts[name].point]
        for name in sites:
            self.kl_kinds[name] = "together" if drawn else "point"
        if not sites or not drawn:
            return
        total: Any = 0.0
        for run, sign, names in ((guide, 1.0, [*rest, *sites]), (model, -1.0, sites)):
            for name in names:
                if block.first(run.layouts[name]) and run.layouts[name].kind != "deterministic":
                    total = total + sign * run.log_prob(name, ())
        by_chain = self.kl_together.setdefault("+".join(sites), [0.0] * self.chains)
        by_chain[chain] += float(torch.as_tensor(total).mean()) * guide.count / self.num_samples

    def _share(self, block: Block, layout: Layout) -> float:
        """What part of a site's rows a block brings."""
        share = 1.0
        for plate, span in block.at.items():
            if plate in layout.plates:
                share *= (span.stop - span.start) / self.sweep.sizes[plate]
            else:
                share *= 1.0 if span.start == 0 else 0.0
        return share

    def _prior(self, chain: int, sweep: Sweep, start: int, stop: int, block: Block, held: dict) -> None:
        fixed, new = sweep.known(held, block, sweep.model_sites)
        run = sweep.model_run(stop - start, block, fixed, observe=False)
        sweep.keep(held, run, new, sweep.model_sites)
        for (group, name), array in self.arrays.items():
            if group in ("prior", "prior_predictive"):
                self._write(chain, array, start, stop, block, run.shown_value(name))


def _kind_of(dtype: torch.dtype) -> np.dtype:
    return torch.empty(0, dtype=dtype).numpy().dtype


def _sums(layout: Layout) -> np.dtype:
    """What to add a site's values up in."""
    return np.dtype(np.float32 if layout.dtype == torch.float32 else np.float64)


def _divergence(guide: Pass, model: Pass, name: str, partner: str | None) -> tuple[torch.Tensor | None, str]:
    """Mean of log q − log p over draws and rows: by dimension, of each dimension's marginal, of the site, or unknown.

    A latent that is a point given one auxiliary draw (``z`` and ``z_unconstrained``) has that draw's density.
    """
    if partner is None:
        return None, "together"
    stretch = guide.log_prob(name) if partner != name else None
    ratio, other = guide.coordinates(partner), model.coordinates(name)
    same = ratio is not None and other is not None and ratio.depth == other.depth
    if same and ratio.log_prob.shape == other.log_prob.shape and (stretch is None or not stretch.any()):
        difference = (ratio.log_prob - other.log_prob).double()
        rows = difference.reshape(-1, *difference.shape[difference.dim() - ratio.depth :])
        return rows.mean(0), "each" if ratio.exact and other.exact else "marginal"
    whole = guide.log_prob(partner).mean() - model.log_prob(name).mean()
    one = math.prod(model.layouts[name].event) == 1
    return whole + (stretch.mean() if stretch is not None else 0.0), "each" if one else "joint"


def _aligned(value: torch.Tensor, have: Sequence[str], plates: Sequence[str | None]) -> torch.Tensor:
    """``(count, *have)`` with a dimension of size 1 for each of ``plates`` that it lacks."""
    for place, plate in enumerate(plates):
        if plate not in have:
            value = value.unsqueeze(1 + place)
    return value


def _log_mean_exp(log_weight: np.ndarray, axis: int = 0) -> np.ndarray:
    top = log_weight.max(axis, keepdims=True)
    top = np.where(np.isfinite(top), top, 0.0)
    with np.errstate(divide="ignore"):
        return np.squeeze(top, axis) + np.log(np.exp(log_weight - top).mean(axis))


def _wanted(groups: Iterable[str] | None) -> frozenset[str]:
    if groups is None:
        return frozenset(GROUPS)
    chosen = [groups] if isinstance(groups, str) else list(groups)
    for name in chosen:
        if name not in GROUPS:
            raise UnknownName("group", name, GROUPS)
    return frozenset(chosen)


def _thinning(thin: int | Mapping[str, int], num_samples: int) -> dict[str, int]:
    given = dict(thin) if isinstance(thin, Mapping) else dict.fromkeys(GROUPS, thin)
    for name, every in given.items():
        if name not in GROUPS:
            raise UnknownName("group", name, GROUPS)
        if not 1 <= every <= num_samples:
            raise BadInput(f"thin is {every} for {name}: expected 1 to {num_samples}")
    return dict.fromkeys(GROUPS, 1) | given


def _afford(need: Mapping[str, int], limit: float) -> None:
    if sum(need.values()) > limit * _GIB:
        largest = max(need, key=need.__getitem__)
        raise BadInput(
            f"{_in_words(need)}, more than memory_limit={limit:g} GiB: thin the largest, as in"
            f" thin={{{largest!r}: 10}}, name fewer groups=, or raise memory_limit"
        )


def _in_words(need: Mapping[str, int]) -> str:
    parts = ", ".join(f"{name} {size / _GIB:.2f}" for name, size in sorted(need.items(), key=lambda item: -item[1]))
    return f"the draws need {sum(need.values()) / _GIB:.2f} GiB ({parts})"


class _Lines(Progress):
    def __init__(self, title: str, steps: int):
        self.title, self.steps, self.said = title, steps, 0

    def step(self, done: int) -> None:
        if 10 * done // self.steps > self.said:
            self.said = 10 * done // self.steps
            print(f"{self.title} {done}/{self.steps}", file=sys.stderr, flush=True)


def bar(enabled: bool, title: str, steps: int) -> Progress:
    """A bar on a terminal; elsewhere a line for each tenth of the work."""
    if not enabled:
        return Progress()
    if not sys.stderr.isatty():
        return _Lines(title, steps)
    from ..engine.progress import _Bar

    return _Bar(title, steps)


# --- what ArviZ gets --------------------------------------------------------------------------------------------------


def _assembled(collection: Collection, args: tuple, kwargs: Mapping, coords: Mapping, dims: Mapping) -> Any:
    import xarray

    sweep = collection.sweep
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
    attrs = _attrs(sweep)
    made = {
        name: xarray.Dataset(groups[name], attrs=attrs | _group_attrs(name, collection))
        for name in GROUPS
        if name in groups
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


class Naming:
    """Dimension names and coordinates: plates and row numbers, and what the user says of the others."""

    def __init__(self, sweep: Sweep, coords: Mapping[str, Sequence], dims: Mapping[str, Sequence[str]]):
        self.sweep, self.dims = sweep, dict(dims)
        self.coords = {plate: sweep.row_ids[plate].numpy() for plate in sweep.row_ids if plate in sweep.sizes}
        self.coords |= {name: np.asarray(values) for name, values in coords.items()}

    def variable(self, array: Array, collection: Collection) -> Any:
        """An ``xarray.DataArray`` around the numbers."""
        names = self._names_of(array)
        head = {"chain": np.arange(collection.chains)} if array.by_draw else {}
        if array.by_draw:
            head["draw"] = np.arange(0, collection.num_samples, array.every)
        data = _counted(array)
        if array.constant:
            data = np.broadcast_to(data, collection.full_shape(array))
            # A view that cannot be written to, only where memory counts.
            data = data.copy() if data.nbytes < _QUIET_BYTES // 8 else data
        return self._made(data, names, head)

    def _made(self, data: np.ndarray, names: Sequence[str], head: Mapping[str, np.ndarray]) -> Any:
        import xarray

        coords = dict(head)
        for name, size in zip(names, data.shape[len(head) :], strict=True):
            values = self.coords.get(name, np.arange(size))
            if len(values) != size:
                raise BadInput(f"coords for {name!r} has {len(values)} values, but the dimension has {size}")
            coords[_free(name)] = values
        return xarray.DataArray(data, dims=[*head, *map(_free, names)], coords=coords)

    def _names_of(self, array: Array) -> list[str]:
        if array.layout is not None or None not in array.plates:
            return self._names(array.name, array.plates, array.shape) if array.layout else list(array.plates)
        # Log-probabilities of a site stand where its values do, without the event.
        layout = self.sweep.model_sites[array.name]
        return self._names(array.name, layout.names, layout.shape)[: len(array.plates)]

    def _names(self, variable: str, plates: Sequence[str | None], shape: Sequence[int]) -> list[str]:
        """Plates by their names; the others by the user's, or ``variable_dim_0``, ``variable_dim_1``, …"""
        free = len(shape) - len([plate for plate in plates if plate is not None])
        given = list(self.dims.get(variable, ()))
        if len(given) == len(shape) and free != len(shape):
            return given
        if len(given) > free:
            raise BadInput(f"dims for {variable!r} names {len(given)} dimensions, but it has {free} beside its plates")
        others = iter(given + [f"{variable}_dim_{place}" for place in range(len(given), free)])
        named = [plate if plate is not None else next(others) for plate in plates]
        return named + list(others)

    def constants(self, args: tuple, kwargs: Mapping, observed: Iterable[np.ndarray]) -> dict[str, Any]:
        """Tensor arguments of the model that are not what a site observes, in all rows."""
        found = {}
        for name, value in _arguments(self.sweep.model, args, kwargs).items():
            if not isinstance(value, torch.Tensor) or any(
                value.shape == seen.shape and np.array_equal(value.detach().cpu().numpy(), seen) for seen in observed
            ):
                continue
            plates = [p for p in self.sweep.data_plates if value.dim() and self.sweep.sizes[p] == len(value)][:1]
            names = self._names(name, [*plates], tuple(value.shape))
            # A variable cannot bear the name of one of its own dimensions.
            label = f"{name}_argument" if name in self.sweep.sizes else name
            found[label] = self._made(value.detach().cpu().numpy(), names, {})
        return found

    def statistics(self, found: Mapping[str, tuple[Sequence[str], np.ndarray]]) -> dict[str, Any]:
        """Numbers ``(chain, *plates, *others)`` with the names of their dimensions."""
        made = {}
        for name, (names, data) in found.items():
            head = {"chain": np.arange(data.shape[0])}
            made[name] = self._made(data, names, head)
        return made

    def event_names(self, site: str, count: int) -> list[str]:
        layout = self.sweep.model_sites[site]
        names = self._names(site, layout.names, layout.shape)
        return names[len(layout.names) : len(layout.names) + count]


def _counted(array: Array) -> np.ndarray:
    """The numbers of a variable, those of a discrete site as integers: ArviZ draws counts as counts only then."""
    data = array.data
    if array.layout is None or not array.layout.discrete or data.dtype.kind != "f":
        return data
    if np.isnan(data).any():
        return data  # a mask hides some
    counts = data.astype(np.int32)
    return counts if np.array_equal(counts, data) else data


def _free(name: str) -> str:
    """A plate's name as a dimension's: ArviZ has its own draws and chains."""
    return f"{name}_plate" if name in ("chain", "draw") else name


def _arguments(program: Callable, args: tuple, kwargs: Mapping) -> dict[str, Any]:
    """Arguments by their names in the program's signature."""
    target = program.forward if isinstance(program, torch.nn.Module) else program
    try:
        bound = inspect.signature(target).bind(*args, **kwargs)
    except (TypeError, ValueError):
        return {f"argument_{place}": value for place, value in enumerate(args)} | dict(kwargs)
    named: dict[str, Any] = {}
    for name, value in bound.arguments.items():
        kind = bound.signature.parameters[name].kind
        if kind is inspect.Parameter.VAR_POSITIONAL:
            named |= {f"{name}_{place}": one for place, one in enumerate(value)}
        elif kind is inspect.Parameter.VAR_KEYWORD:
            named |= value
        else:
            named[name] = value
    return named


def _refits(model, guides, args, kwargs, num_refits: int, seed: int | None, refit) -> list[Callable]:
    """``num_refits`` chains in all, the given guide being the first."""
    if num_refits < len(guides):
        raise BadInput(f"num_refits is {num_refits}: expected at least {len(guides)}, the guide given counted")
    from .refits import refitted

    missing = range(len(guides), num_refits)
    if refit is not None:
        return [refit((seed or 0) + number) for number in missing]
    return [refitted(model, guides[0], args, kwargs, seed=(seed or 0) + number) for number in missing]
