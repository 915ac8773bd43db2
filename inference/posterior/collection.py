"""A guide's draws over all rows, collected by group: arrays with the names of their dimensions."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from ...errors import BadInput, GumboWarning, UnknownName
from ...options import fits
from ..engine.progress import Progress
from ..engine.scopes import quietly
from .importance import integrated, largest_of, log_evidence, pieces
from .likelihoods import changing_factors, factors_of_prior, likelihoods_of, masked_priors, warn_of_ignored
from .runner import Pass, Sweep
from .sites import Block, SiteLayout

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
_FROM_PRIOR = frozenset({"prior", "prior_predictive"})
_PREDICTIVE = frozenset({"posterior_predictive", "prior_predictive"})


@dataclass
class Array:
    """A variable: its dimensions, and an array ``(chain, draw, …)`` or without ``chain`` if all chains share it."""

    group: str
    name: str
    layout: SiteLayout | None
    plates: tuple[str | None, ...]
    shape: tuple[int, ...]
    dtype: torch.dtype
    every: int = 1
    by_draw: bool = True
    constant: bool = False
    data: np.ndarray = field(default=None, repr=False)  # type: ignore[assignment]


class Collection:
    """All draws for the requested groups, over chains, draws and blocks of rows.

    ``log_weight`` (and ``log_p_global``, ``log_q_global``) are always stored, in float64: k̂ and the integrals use
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
        if sweep.scaled:
            program, site = sweep.scaled[0]
            warnings.warn(
                f"site {site!r} has a scale of its own in the {program}: draws are weighed, and judged, by the programs"
                " without scales; evaluate() keeps them",
                GumboWarning,
                stacklevel=4,
            )
        self._leave_out_undrawable()
        self._warn_of_other_draws()
        sweep.warn_of_weights(stacklevel=4)
        self.arrays: dict[tuple[str, str], Array] = {}
        self._declare()

    def _leave_out_undrawable(self) -> None:
        for name, reason in self.sweep.undrawable.items():
            if found := self.groups & (_PREDICTIVE if name in self.sweep.observed else _FROM_PRIOR):
                self.groups -= found
                warnings.warn(
                    f"site {name!r}: {reason}; {_listed(found)} are left out: leave them out of groups, or give the"
                    " site a distribution with draws",
                    GumboWarning,
                    stacklevel=5,
                )

    def _warn_of_other_draws(self) -> None:
        for name, reason in self.sweep.other_draws.items():
            of_data = {"posterior_predictive"} if name in self.sweep.observed else set()
            if groups := self.groups & (_FROM_PRIOR | of_data):
                warnings.warn(f"site {name!r}: {reason}; {_listed(groups)} hold such draws", GumboWarning, stacklevel=5)
        for name in masked_priors(self.sweep) if self.groups & _FROM_PRIOR else ():
            warnings.warn(
                f"the prior of site {name!r} is masked, and the draws of {_listed(self.groups & _FROM_PRIOR)} do not "
                "follow that: leave them out of groups, or give it a proper prior",
                GumboWarning,
                stacklevel=5,
            )

    def _warn_of_factors(self, run: Pass) -> None:
        groups = self.groups & _FROM_PRIOR
        changing = set(changing_factors(run, self.factors)) - self.told
        for name in changing & set(factors_of_prior(self.sweep)):
            self.told.add(name)
            warnings.warn(
                f"factor {name!r} depends on the latents, and the draws of {_listed(groups)} do not follow it: leave "
                "them out of groups, or write a factor of the prior as a distribution",
                GumboWarning,
                stacklevel=7,
            )

    # Declared first, so that the memory needed is known before anything is drawn.

    def _declare(self) -> None:
        sweep, model = self.sweep, self.sweep.model_sites
        drawn = [name for name, layout in model.items() if layout.kind == "latent" or layout.determined]
        for group, names in (
            ("posterior", drawn),
            ("posterior_predictive", sweep.observed),
            ("prior", drawn),
            ("prior_predictive", sweep.observed),
        ):
            for name in names if group in self.groups else ():
                self._add(group, name, model[name], self.thin[group])
        if self.groups & {"observed_data", "constant_data"}:  # observed arguments are not constants
            for name in sweep.observed:
                self._add("observed_data", name, model[name], 1, by_draw=False)
        self.likelihoods = {one.name: one for one in likelihoods_of(sweep)}
        for one in self.likelihoods.values() if "log_likelihood_conditional" in self.groups else ():
            group = "log_likelihood_conditional"
            self._put(group, one.name, one.plates, one.sizes, self.thin[group])
        for name in [*sweep.latents, *sorted(sweep.transformed)] if "log_prior" in self.groups else ():
            self._put("log_prior", name, (), (), self.thin["log_prior"])
        every = self.thin["log_likelihood"]
        if self.nested or "log_likelihood" in self.groups:
            if sweep.local:
                self._put("log_likelihood", sweep.evidence, sweep.data_plates, self._sizes(sweep.data_plates), every)
                # The integral over all draws is one number per datum, stored once.
                self.arrays["log_likelihood", sweep.evidence].constant = not self.nested
            elif not sweep.tied:
                for one in self.likelihoods.values():
                    self._put("log_likelihood", one.name, one.plates, one.sizes, every)
        sizes = self._sizes(sweep.weight_plates)
        self._put("sample_stats", "log_weight", sweep.weight_plates, sizes, 1)
        for name in ("log_p", "log_q"):
            if "sample_stats" in self.groups:
                self._put("sample_stats", name, sweep.weight_plates, sizes, 1, self._precision())
            if self.nested:
                self._put("sample_stats", f"{name}_global", sweep.shared_plates, self._sizes(sweep.shared_plates), 1)

    def _sizes(self, plates: Sequence[str]) -> tuple[int, ...]:
        return tuple(self.sweep.sizes[plate] for plate in plates)

    def _add(self, group: str, name: str, layout: SiteLayout, every: int, by_draw: bool = True) -> None:
        dtype = layout.dtype
        if name in self.sweep.masked and not dtype.is_floating_point:
            dtype = torch.float64  # masked values are NaN
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
        """The dtype that the programs compute in: sums of their log-probabilities are no more precise."""
        known = [layout.dtype for layout in self.sweep.model_sites.values() if layout.dtype.is_floating_point]
        return torch.float32 if known and all(dtype.itemsize <= 4 for dtype in known) else torch.float64

    def full_shape(self, array: Array, kept: bool = False) -> tuple[int, ...]:
        """``(chain, draw, …)``; with ``kept``, the shape in memory."""
        if not array.by_draw:
            return array.shape
        draws = 1 if kept and array.constant else -(-self.num_samples // array.every)
        return (self.chains, draws, *array.shape)

    def bytes_needed(self) -> dict[str, int]:
        """Bytes by group."""
        need: dict[str, int] = {}
        for array in self.arrays.values():
            size = math.prod(self.full_shape(array, kept=True)) * kind_of_array(array.dtype).itemsize
            need[array.group] = need.get(array.group, 0) + size
        if "vi_stats" in self.groups:
            latents = [self.sweep.model_sites[name] for name in self.sweep.local]
            need["vi_stats"] = sum(2 * self.chains * one.numel * _sums(one).itemsize for one in latents)
        return need

    def allocate(self) -> None:
        for array in self.arrays.values():
            array.data = np.zeros(self.full_shape(array, kept=True), dtype=kind_of_array(array.dtype))
        self.largest_log_p = 0.0
        self.factors: dict[str, torch.Tensor] = {}  # of the first draw of the prior
        self.told: set[str] = set()
        self.ignored: dict[str, torch.Tensor] = {}  # factors of data, of the first draw of the posterior
        self.observed: dict[str, np.ndarray] = {}  # without masks
        # Which numbers of masked latents have a posterior.
        masked = self.sweep.masked_latents
        self.shown = {name: np.ones(self.sweep.model_sites[name].shape, dtype=bool) for name in masked}
        latents = [self.sweep.model_sites[name] for name in self.sweep.local]
        # Means and mean squares of each datum's latents.
        self.means = {
            layout.name: np.zeros((2, self.chains, *layout.shape), dtype=_sums(layout))
            for layout in latents
            if "vi_stats" in self.groups and math.prod(layout.event)
        }
        self.kl: dict[str, list[np.ndarray | float | None]] = {}
        self.kl_kinds: dict[str, str] = {}
        self.kl_sites: dict[str, list[float]] = {}  # of sites whose `kl` is of marginals
        self.partners: dict[str, str | None] = {}
        self.kl_together: dict[str, list[float]] = {}

    def steps(self, sweep: Sweep) -> int:
        blocks = len(list(sweep.blocks()))
        return blocks * len(list(self._chunks(sweep)))

    def _chunks(self, sweep: Sweep) -> Iterable[tuple[int, int]]:
        per_run = sweep.draws_a_run()
        return ((start, min(start + per_run, self.num_samples)) for start in range(0, self.num_samples, per_run))

    def fill(self, chain: int, sweep: Sweep, seed: int | None, progress: Progress | None = None) -> None:
        """Make all draws of one chain."""
        progress, done = progress or Progress(), 0
        with quietly(sweep.model, sweep.guide, seed):
            for start, stop in self._chunks(sweep):
                held: dict[tuple, torch.Tensor] = {}
                for block, guide, model in sweep.over_rows(stop - start):
                    self._posterior(chain, sweep, start, stop, block, guide, model)
                    if self.groups & _FROM_PRIOR:
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
        """Log-weights that measure the guide's error, ``(chain, draw, *weight plates)``.

        The log-weight of local latents given global ones is taken relative to the evidence given that global draw,
        which differs between draws under an exact guide too.
        """
        if not self.nested:
            return self.log_weight()
        array = self.arrays["log_likelihood", self.sweep.evidence]
        weight = self.log_weight()[:, :: array.every]
        with np.errstate(invalid="ignore"):
            found = weight - array.data
        found[weight == -np.inf] = -np.inf  # zero relative to any evidence, that of zero included
        return found

    def global_log_weight(self) -> np.ndarray | None:
        """Log-weights of the global latents, with the local ones integrated out, ``(chain, draw, *shared plates)``."""
        if not self.nested or not self.globals_known:
            return None
        array = self.arrays["log_likelihood", self.sweep.evidence]
        plates = self.sweep.data_plates
        axes = tuple(2 + i for i, plate in enumerate(plates) if plate not in self.sweep.shared_plates)
        log_p = self.array("sample_stats", "log_p_global") - self.array("sample_stats", "log_q_global")
        return log_p[:, :: array.every] + array.data.sum(axes)

    def _kept(self, array: Array, start: int, stop: int) -> tuple[np.ndarray, slice]:
        """The draws of a run that an array keeps, and their positions."""
        first = -(-start // array.every) * array.every
        picks = np.arange(first, stop, array.every) - start
        return picks, slice(first // array.every, first // array.every + len(picks))

    def _write(self, chain: int, array: Array, start: int, stop: int, block: Block, values: torch.Tensor) -> None:
        picks, where = self._kept(array, start, stop)
        if len(picks):
            picked = values if len(picks) == stop - start else values[torch.as_tensor(picks)]
            array.data[(chain, where, *block.index(array.plates))] = as_array(picked)

    def _posterior(
        self, chain: int, sweep: Sweep, start: int, stop: int, block: Block, guide: Pass, model: Pass
    ) -> None:
        count = stop - start
        for (group, name), array in self.arrays.items():
            if group == "posterior":
                self._write(chain, array, start, stop, block, model.value(name))
            elif group == "log_likelihood_conditional" or (group == "log_likelihood" and not sweep.local):
                self._write(chain, array, start, stop, block, self.likelihoods[name].log_prob(model))
            elif group == "log_prior" and block.first(model.layouts[name]):
                picks, where = self._kept(array, start, stop)
                array.data[chain, where] += model.log_prob(name, ()).cpu().numpy()[picks]
            elif group == "observed_data" and start == 0 and chain == 0:
                array.data[block.index(array.plates)] = as_array(model.shown_value(name)[0])
                self.observed.setdefault(name, np.zeros(array.shape, kind_of_array(array.layout.dtype)))
                self.observed[name][block.index(array.plates)] = as_array(model.value(name)[0])
        for name, known in self.shown.items():
            if start == 0 and chain == 0 and (shown := model.shown(name)) is not None:
                known[block.index(model.layouts[name].names)] = shown[0].cpu().numpy()
        self._weights(chain, sweep, start, stop, block, guide, model)
        if "posterior_predictive" in self.groups:
            if chain == 0 and not any(span.start for span in block.at.values()):
                warn_of_ignored(model, _listed(self.groups & _PREDICTIVE), self.ignored, self.told, stacklevel=7)
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
                    continue  # an auxiliary draw of the guide; the data's weights are conditional on it
                local = not self.nested or inside
                array = self.arrays["sample_stats", "log_weight" if local else f"{part}_global"]
                value = run.log_prob(name, array.plates)
                value = _aligned(value, [n for n in layout.names if n in array.plates], array.plates).cpu().numpy()
                where = (chain, slice(start, stop), *block.index(array.plates))
                array.data[where] += sign * value if local else value
                if local and ("sample_stats", part) in self.arrays:
                    self.array("sample_stats", part)[where] += value
                largest += largest_of(value)
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
            array.data[(chain, 0, *piece)] = log_evidence(np.moveaxis(weight[(slice(None), *piece)], 0, -1))[0]

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
            share = self._share(block, layout) * guide.count / self.num_samples
            total[chain] = total[chain] + found.cpu().numpy() * share
            if kind == "marginal":
                whole = float(guide.log_prob(name).mean() - model.log_prob(name).mean())
                if partner != name:
                    whole += float(guide.log_prob(partner).mean())
                self.kl_sites.setdefault(name, [0.0] * self.chains)[chain] += whole * share
        self._together(chain, block, guide, model)

    @staticmethod
    def _partner(guide: Pass, name: str) -> str | None:
        """The guide's site with the latent's density: the latent, or the auxiliary draw that determines it."""
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
        """KL of all latents that the guide computes from other draws, over all rows."""
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

    def _share(self, block: Block, layout: SiteLayout) -> float:
        """The fraction of a site's rows in a block."""
        share = 1.0
        for plate, span in block.at.items():
            if plate in layout.plates:
                share *= (span.stop - span.start) / self.sweep.sizes[plate]
            else:
                share *= 1.0 if span.start == 0 else 0.0
        return share

    def _prior(self, chain: int, sweep: Sweep, start: int, stop: int, block: Block, held: dict) -> None:
        fixed, new = sweep.known(held, block, sweep.model_sites)
        observe = not sweep.undrawable.keys().isdisjoint(sweep.observed)
        run = sweep.model_run(stop - start, block, fixed, observe=observe)
        sweep.keep(held, run, new, sweep.model_sites)
        if chain == 0 and not any(span.start for span in block.at.values()):
            self._warn_of_factors(run)
            if "prior_predictive" in self.groups:
                warn_of_ignored(run, _listed(self.groups & _PREDICTIVE), self.factors, self.told, stacklevel=7)
        for (group, name), array in self.arrays.items():
            if group in _FROM_PRIOR:
                self._write(chain, array, start, stop, block, run.shown_value(name))


def _listed(groups: Iterable[str]) -> str:
    return " and ".join(name for name in GROUPS if name in groups)


def as_array(values: torch.Tensor) -> np.ndarray:
    """The same numbers as an array; those of bfloat16, which numpy lacks, in single precision."""
    values = values.detach().cpu()
    return (values.float() if values.dtype == torch.bfloat16 else values).numpy()


def kind_of_array(dtype: torch.dtype) -> np.dtype:
    return as_array(torch.empty(0, dtype=dtype)).dtype


def _sums(layout: SiteLayout) -> np.dtype:
    """The dtype for sums of a site's values."""
    return np.dtype(np.float32 if layout.dtype == torch.float32 else np.float64)


def _divergence(guide: Pass, model: Pass, name: str, partner: str | None) -> tuple[torch.Tensor | None, str]:
    """Mean of log q − log p over draws and rows: by dimension, of each dimension's marginal, of the site, or unknown.

    A latent determined by one auxiliary draw (``z`` and ``z_unconstrained``) has that draw's density.
    """
    if partner is None:
        return None, "together"
    stretch = guide.log_prob(name) if partner != name else None
    ratio, other = guide.coordinates(partner), model.coordinates(name)
    same = ratio is not None and other is not None and ratio.depth == other.depth
    if same and ratio.log_prob.shape == other.log_prob.shape and (stretch is None or not stretch.any()):
        difference = (ratio.log_prob - other.log_prob).double()
        outer = difference.dim() - ratio.depth
        rows = difference.reshape(difference.shape[:outer].numel(), *difference.shape[outer:])
        return rows.mean(0), "each" if ratio.exact and other.exact else "marginal"
    whole = guide.log_prob(partner).mean() - model.log_prob(name).mean()
    one = math.prod(model.layouts[name].event) == 1
    return whole + (stretch.mean() if stretch is not None else 0.0), "each" if one else "joint"


def _aligned(value: torch.Tensor, have: Sequence[str], plates: Sequence[str | None]) -> torch.Tensor:
    """``(count, *have)`` with a dimension of size 1 for each missing plate of ``plates``."""
    for place, plate in enumerate(plates):
        if plate not in have:
            value = value.unsqueeze(1 + place)
    return value


def _thinning(thin: int | Mapping[str, int], num_samples: int) -> dict[str, int]:
    given = dict(thin) if isinstance(thin, Mapping) else dict.fromkeys(GROUPS, thin)
    for name, every in given.items():
        if name not in GROUPS:
            raise UnknownName("group", name, GROUPS)
        if not (fits(every, int) and every <= num_samples):
            raise BadInput(f"thin is {every} for {name}: expected 1 to {num_samples}")
    return dict.fromkeys(GROUPS, 1) | given
