"""``predict``: draws for data that the guide was not fitted to, as ArviZ data."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from typing import Any

import numpy as np
import torch
from pyro import poutine
from pyro.poutine.messenger import Messenger

from ...errors import PROGRAM_ERRORS, BadInput, GumboError, GumboWarning, first_line, rows_in_plates
from ...options import holds_to_annotations
from ..engine.messenger_guides import MessengerProgram, as_program
from ..engine.progress import bar
from ..engine.row_parameters import positional_parameter, sites_of
from ..engine.rows import Rows, about_arguments, given_arguments
from ..engine.scopes import autoguides_in, kept_buffers, modules_of, private_seed, quietly
from . import _arviz
from .collection import Array, as_array, kind_of_array
from .conversion import afford
from .likelihoods import warn_of_ignored
from .naming import Naming, check_names
from .opened import OpenedModel, opened_model
from .parts import exact_pair
from .runner import Sweep

GROUP = "predictions"
REMEDY = (
    "predict takes a guide that reads the data, or one of global latents; refit it to the new rows, or take "
    "to_arviz(…).posterior_predictive for those that it was fitted to"
)


@holds_to_annotations("memory_limit")
def predict(
    model: Callable,
    guide: Callable | Sequence[Callable],
    *args: Any,
    num_samples: int = 1000,
    batch_size: int | None = None,
    coords: Mapping[str, Sequence] | None = None,
    dims: Mapping[str, Sequence[str]] | None = None,
    seed: int | None = 0,
    memory_limit: float = 4.0,
    progress: bool | None = None,
    **kwargs: Any,
) -> Any:
    """Draws for new data: the model's draws given the guide's latents, in ArviZ's group ``predictions``.

    Global latents are drawn from the fitted guide; local latents from the guide given the new rows, as in a variational
    autoencoder, where predictions are reconstructions. Predicted sites are those that the model observes (an observed
    value only determines the shape, and the guide may read it), those without a value (``obs=None``), those that the
    model enumerates, and ``pyro.deterministic`` sites.

    A guide with parameters per datum (AutoNormal of a latent in the data plate, a refined guide) has no distribution
    for new rows and is refused.

    Args:
        model: the Pyro model.
        guide: the Pyro guide, or a sequence of independently fitted guides, one per chain.
        args: the programs' own arguments for the new rows, or one object in the form that ``fit`` takes.
        num_samples: draws per chain.
        batch_size: rows of the arguments per run; None passes all.
        coords: coordinates by dimension.
        dims: names of the event dimensions by variable.
        seed: of the draws; None draws from the current random state.
        memory_limit: GiB that the draws may take.
        progress: True shows progress, False does not; None shows it for large draws.
        kwargs: keywords of the programs.

    Returns:
        ``InferenceData`` with ArviZ 0.x, ``xarray.DataTree`` with 1.x, with the groups ``predictions``, of dims
        ``(chain, draw, *plates, *event)``, and ``predictions_constant_data``, the dense tensors among the arguments
        that no site observes.

    Raises:
        BadInput: a guide with parameters per datum; programs that fail on the new data; no site to predict; draws that
            need more than ``memory_limit``.

    >>> import pyro
    >>> import pyro.distributions as dist
    >>> def model(t, y=None):
    ...     slope = pyro.sample("slope", dist.Normal(0.0, 1.0))
    ...     with pyro.plate("data", len(t)):
    ...         pyro.sample("y", dist.Normal(slope * t, 0.1), obs=y)
    >>> def guide(t, y=None):
    ...     pyro.sample("slope", dist.Normal(2.0, 0.01))
    >>> found = predict(model, guide, torch.tensor([1.0, 10.0]), num_samples=200)
    >>> found.predictions["y"].dims, [round(float(mean)) for mean in found.predictions["y"].mean(["chain", "draw"])]
    (('chain', 'draw', 'data'), [2, 20])
    """
    args, kwargs = given_arguments(args, kwargs)
    if num_samples < 1:
        raise BadInput(f"num_samples is {num_samples}: expected at least 1")
    guides = list(guide) if isinstance(guide, (list, tuple)) else [guide]
    if not guides:
        raise BadInput("the sequence of guides is empty")
    with private_seed(None, model, *guides):
        pairs = [exact_pair(model, as_program(one)) for one in guides]
    sweeps, options = [], {"batch_size": batch_size, "latents_needed": False, "scored": False}
    with rows_in_plates():
        for whole, one in pairs:
            _refuse_open_sites(whole, one, args, kwargs)
            _refuse_parameters_of_data(whole, one, args, kwargs)
            with _explained(one, args, kwargs):
                opened = opened_model(whole, one, args, kwargs)
                sweeps.append(Sweep(opened, one, args, kwargs, **options))
    check_names(sweeps[0], coords or {}, dims or {})
    drawn = Predictions(sweeps[0], len(sweeps), num_samples)
    need = drawn.bytes_needed()
    afford({GROUP: need}, memory_limit, "draw fewer num_samples=, or predict fewer rows")
    loud = need > 2**28 if progress is None else progress
    for chain, sweep in enumerate(sweeps):
        with bar(loud, "predict", drawn.steps(sweep)) as shown:
            drawn.fill(chain, sweep, None if seed is None else seed + chain, shown)
    return drawn.as_arviz(Naming(sweeps[0], coords or {}, dims or {}), args, kwargs)


class Predictions:
    """The arrays ``(chain, draw, *plates, *event)`` of the predicted sites, filled chain by chain."""

    def __init__(self, sweep: Sweep, chains: int, num_samples: int):
        self.sweep, self.chains, self.num_samples = sweep, chains, num_samples
        computed = [name for name, layout in sweep.model_sites.items() if layout.determined]
        enumerated = [name for name in sweep.model_sites if name in sweep.summed_out]
        names = [*sweep.observed, *enumerated, *computed]
        if not names:
            raise BadInput("the model has no site to predict: the guide draws all its sites")
        for name in sweep.observed:
            if name in sweep.undrawable:
                raise BadInput(f"site {name!r}: {sweep.undrawable[name]}; give it a distribution with draws")
            if name in sweep.other_draws:
                said = f"site {name!r}: {sweep.other_draws[name]}; {GROUP} hold such draws"
                warnings.warn(said, GumboWarning, stacklevel=3)
        self.arrays = [self._array(name) for name in names]

    def _array(self, name: str) -> Array:
        layout = self.sweep.model_sites[name]
        dtype = layout.dtype
        if name in self.sweep.masked and not dtype.is_floating_point:
            dtype = torch.float64  # masked values are NaN
        return Array(GROUP, name, layout, layout.names, layout.shape, dtype)

    def full_shape(self, array: Array) -> tuple[int, ...]:
        return (self.chains, self.num_samples, *array.shape)

    def bytes_needed(self) -> int:
        return sum(math.prod(self.full_shape(array)) * kind_of_array(array.dtype).itemsize for array in self.arrays)

    def _chunks(self, sweep: Sweep) -> list[tuple[int, int]]:
        size = sweep.draws_a_run()
        return [(start, min(start + size, self.num_samples)) for start in range(0, self.num_samples, size)]

    def steps(self, sweep: Sweep) -> int:
        return len(self._chunks(sweep)) * len(list(sweep.blocks()))

    def fill(self, chain: int, sweep: Sweep, seed: int | None, progress: Any) -> None:
        """Make all draws of one chain."""
        for array in self.arrays if chain == 0 else ():
            array.data = np.zeros(self.full_shape(array), kind_of_array(array.dtype))
        done, factors, told = 0, {}, set()
        with quietly(sweep.model, sweep.guide, seed):
            for start, stop in self._chunks(sweep):
                held: dict[tuple, torch.Tensor] = {}
                for block in sweep.blocks():
                    fixed, new = sweep.known(held, block, sweep.guide_sites)
                    guide = sweep.guide_run(stop - start, block, fixed)
                    sweep.keep(held, guide, new, sweep.guide_sites)
                    values = {name: sweep.held(guide, name) for name in sweep.latents}
                    shared, new = sweep.known(held, block, sweep.model_sites, "observed")
                    model = sweep.model_run(stop - start, block, values | shared, observe=False)
                    sweep.keep(held, model, new, sweep.model_sites)
                    if chain == 0 and not any(span.start for span in block.at.values()):
                        warn_of_ignored(model, GROUP, factors, told, stacklevel=4)
                    for array in self.arrays:
                        where = (chain, slice(start, stop), *block.index(array.plates))
                        array.data[where] = as_array(model.shown_value(array.name))
                    done += 1
                    progress.step(done)
                    progress.epoch(done, {})

    def as_arviz(self, naming: Naming, args: tuple, kwargs: Mapping[str, Any]) -> Any:
        from ..._version import __version__

        attrs = {"inference_library": "gumbo", "inference_library_version": __version__}
        groups = {GROUP: {array.name: naming.variable(array, self) for array in self.arrays}}
        given = [as_array(value) for name, value in self.sweep.observed_values.items() if not self._is_open(name)]
        if constants := naming.constants(args, kwargs, given):
            groups[f"{GROUP}_constant_data"] = constants
        return _arviz.make({name: _arviz.dataset(group, attrs) for name, group in groups.items()})

    def _is_open(self, name: str) -> bool:
        return isinstance(self.sweep.model, OpenedModel) and name in self.sweep.model.left_open


# --- guides that know the rows they were fitted to --------------------------------------------------------------------


def _refuse_open_sites(model: Callable, guide: Callable, args: tuple, kwargs: Mapping[str, Any]) -> None:
    """Raise BadInput if a guide that runs the model would treat a site to be predicted as a latent."""
    known = getattr(getattr(guide, "inner_program", None), "locs", None)
    if not isinstance(guide, MessengerProgram) or known is None:
        return
    try:
        with quietly(model, guide, 0):
            run = poutine.trace(model).get_trace(*args, **kwargs)
    except PROGRAM_ERRORS:
        return
    for site in sites_of(run):
        held = known
        for part in site["name"].split("."):
            held = getattr(held, part, None)
        if held is None and not site["is_observed"]:
            raise BadInput(
                f"site {site['name']!r} is left open, and {type(guide.inner_program).__name__} draws whatever the "
                "model leaves open: give it a value, of which only the shape counts"
            )


def _refuse_parameters_of_data(model: Callable, guide: Callable, args: tuple, kwargs: Mapping[str, Any]) -> None:
    """Raise BadInput for a guide whose parameters belong to the data that it was fitted to."""
    for auto in autoguides_in(guide):
        if auto.prototype_trace is None:
            continue
        latents = {site["name"]: site for site in sites_of(auto.prototype_trace) if not site["is_observed"]}
        plates = _plates(model, args, kwargs, latents.keys())
        for name, site in latents.items():
            if shared := sorted({frame.name for frame in site["cond_indep_stack"]} & plates.keys()):
                raise BadInput(
                    f"the guide has parameters per datum ({type(auto).__name__}, of site {name!r} in plate "
                    f"{shared[0]!r}) and has no distribution for new rows: {REMEDY}"
                )
    rows, kept = Rows.of(args, kwargs), _plates(guide, args, kwargs)
    for name, size in _plates(model, args, kwargs).items():
        if not rows.whole and size == len(rows) != kept.get(name, size):
            raise BadInput(
                f"the guide has parameters per datum ({kept[name]} in plate {name!r}, for any arguments) and has no "
                f"distribution for {size} new rows: {REMEDY}"
            )
    if found := _looked_at(model, guide, rows):
        raise BadInput(f"the guide has parameters per datum ({found!r}) and has no distribution for new rows: {REMEDY}")


def _looked_at(model: Callable, guide: Callable, rows: Rows) -> str | None:
    """The parameter with elements for each row, or None if there is none or the check fails."""
    with suppress(Exception), quietly(model, guide, 0), torch.enable_grad(), kept_buffers(model, guide):
        return positional_parameter(model, guide, rows, 0)
    return None


def _plates(
    program: Callable, args: tuple, kwargs: Mapping[str, Any], left_out: Collection[str] = ()
) -> dict[str, int]:
    """The plates around a program's sites, and their sizes; empty if it fails on these arguments."""
    try:
        with quietly(program, program, 0):
            run = poutine.trace(program).get_trace(*args, **kwargs)
    except PROGRAM_ERRORS:
        return {}
    sites = [site for site in sites_of(run) if site["name"] not in left_out]
    return {frame.name: frame.size for site in sites for frame in site["cond_indep_stack"]}


@contextmanager
def _explained(guide: Callable, args: tuple, kwargs: Mapping[str, Any]) -> Iterator[None]:
    """Turn an error on new rows into a one-line BadInput, which names a parameter sized for the old rows."""
    try:
        yield
    except (GumboError, *PROGRAM_ERRORS) as error:
        Rows.of(args, kwargs).check("data")  # first: a guide that fails on NaN runs on other rows
        if found := _parameter_of_other_rows(guide, Rows.of(args, kwargs)):
            raise BadInput(
                f"the guide has parameters per datum ({found[0]!r}, of {found[1]} data) and has no distribution for "
                f"new rows: {REMEDY}"
            ) from error
        if isinstance(error, GumboError):
            raise
        said = f"{first_line(error, kind=True)}{about_arguments(error)}"
        raise BadInput(f"the programs fail on these arguments: {said}") from error


def _parameter_of_other_rows(guide: Callable, rows: Rows) -> tuple[str, int] | None:
    """A parameter whose size is the number of rows that the guide needs to run, if it fails on these."""
    asked = _Asked()
    if rows.whole or _runs(guide, rows, asked):
        return None
    shapes = {name: leaf.shape for module in modules_of(guide) for name, leaf in module.named_parameters()}
    for name, shape in (shapes | asked.shapes).items():
        for count in shape:
            if count != len(rows) and _runs(guide, rows[torch.arange(count) % len(rows)]):
                return name, count
    return None


class _Asked(Messenger):
    """Records the shapes of the parameters that a program reads from the param store."""

    def __init__(self):
        super().__init__()
        self.shapes: dict[str, torch.Size] = {}

    def _pyro_post_param(self, msg) -> None:
        self.shapes[msg["name"]] = msg["value"].shape


def _runs(guide: Callable, rows: Rows, look: Messenger | None = None) -> bool:
    try:
        with quietly(guide, guide, 0), look or nullcontext():
            poutine.trace(guide).get_trace(*rows.args, **rows.kwargs)
    except (GumboError, *PROGRAM_ERRORS):
        return False
    return True
