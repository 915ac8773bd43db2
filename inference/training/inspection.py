"""One run of model and guide before training: their parameters, the size of the data plate, parameters of rows."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import pyro
import pyro.poutine as poutine
import torch
from torch import Tensor, nn

from ...errors import PROGRAM_ERRORS, BadInput, GumboError, GumboWarning, UnsupportedSite
from ..engine.handlers import StaysFrozen
from ..engine.row_parameters import positional_parameter, sites_of, traces_of
from ..engine.rows import Rows
from ..engine.scopes import (
    autoguides_in,
    built_or_not,
    kept_buffers,
    modes_kept,
    modules_met,
    private_seed,
    private_store,
)
from ..estimators._distributions import is_computed, observes_itself, turns_validation_off
from ..posterior.superfluous import superfluous_latents
from ..posterior.vmapped import unmasked


class ProgramModule(nn.Module):
    """A program whose parameters are in Pyro's param store, as a module that owns them.

    Args:
        program: a function, a bound method, or a module that calls ``pyro.param``.
        networks: the modules that the program calls, for their parameters, modes and buffers.
        params: leaves of ``pyro.param`` that belong to no network, by their name in the store, with constraints.

    A call in any scope of the store finds these parameters there.
    """

    def __init__(self, program: Callable, networks: Sequence[nn.Module], params: Mapping[str, tuple[Tensor, Any]]):
        super().__init__()
        self.__dict__["program"] = program
        self.params = nn.ParameterDict({_key(name): leaf for name, (leaf, _) in params.items()})
        self.constraints = {name: constraint for name, (_, constraint) in params.items()}
        for number, network in enumerate(networks):
            name = type(network).__name__
            self.add_module(f"{name}_{number}" if name in self._modules or hasattr(self, name) else name, network)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["program"], name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        store = pyro.get_param_store()
        for name, constraint in self.constraints.items():
            leaf = self.params[_key(name)]
            if store._params.get(name) is not leaf:
                store._params[name], store._constraints[name] = leaf, constraint
                store._param_to_name[leaf] = name
        return self.program(*args, **kwargs)


@dataclass(frozen=True)
class Inspection:
    """What ``fit`` needs to know of a model and guide before the first step.

    Attributes: ``model`` and ``guide`` as modules; ``num_data``, the number of data that the loss of a batch counts,
    where that is not the batch's length; ``of_rows``, a parameter with an element for each row of a batch, or None;
    ``unchecked``, the observed sites with ``validate_args=False``; ``averages``, whether a site asks TraceGraph_ELBO
    for its average for each position in a batch; ``names``, those of the parameters in Pyro's store by their ``id``.
    """

    model: nn.Module
    guide: nn.Module
    num_data: int | None = None
    of_rows: str | None = None
    unchecked: frozenset[str] = frozenset()
    averages: bool = False
    names: dict[int, str] = field(default_factory=dict)
    _unregistered: list[nn.Parameter] = field(default_factory=list)

    @contextmanager
    def trained(self) -> Iterator[None]:
        """Keep parameters that the programs do not register; on exit, put the trained ones in the param store.

        Only parameters of ``pyro.param`` that no module owns are put there; the rest of the store does not change.
        """
        for parameter in self._unregistered:
            parameter.requires_grad_(False)
        try:
            yield
        finally:
            for parameter in self._unregistered:
                parameter.requires_grad_(True)
            store = pyro.get_param_store()
            for program in (self.model, self.guide):
                if isinstance(program, ProgramModule):
                    for name, constraint in program.constraints.items():
                        _put(store, name, program.params[_key(name)].detach(), constraint)


def inspect_programs(model: Callable, guide: Callable, batch: Rows, seed: int) -> Inspection:
    """Run model and guide on the first batch and inspect them; random state, buffers, modes and the store are restored.

    Raises BadInput for programs without sites, and for two networks under one name; errors of the programs pass.
    """
    with ExitStack() as stack:
        stack.enter_context(private_store(model, guide))
        stack.enter_context(private_seed(seed, model, guide))
        stack.enter_context(kept_buffers(model, guide))
        stack.enter_context(built_or_not(guide))
        stack.enter_context(torch.enable_grad())
        stack.enter_context(StaysFrozen())
        called = stack.enter_context(modules_met())
        traces = traces_of(model, guide, batch)
        store = pyro.get_param_store()
        stored = {name: (store._params[name], store._constraints[name]) for name in _names(*traces) if name in store}
        unchecked = _unchecked(traces[1]) if pyro.infer.util.is_validation_enabled() else frozenset()
        averages = any(
            site["infer"].get("baseline", {}).get("use_decaying_avg_baseline")
            for site in traces[0].nodes.values()
            if site["type"] == "sample"
        )
        unregistered: list[nn.Parameter] = []
        stored = _as_parameters(stored)
        names = {id(parameter): name for name, (parameter, _) in stored.items()}
        # A network of a module belongs to that module alone: under two names compile would count it twice.
        whose = {id(part) for program in (model, guide) if isinstance(program, nn.Module) for part in program.modules()}
        others = [part for part in called if id(part) not in whose]
        programs = [
            _as_module(program, trace, stored, others, unregistered)
            for program, trace in zip((model, guide), reversed(traces), strict=True)
        ]
        if not any(True for trace in traces for _ in sites_of(trace)):
            raise BadInput("model and guide have no sample sites, so that there is no objective")
        of_rows = None
        # A program that fails here trains without the inspection.
        with suppress(Exception), modes_kept(*programs):
            of_rows = positional_parameter(*programs, batch, seed)
        if len(batch) == 1 and not batch.whole:
            of_rows = _autoguide_of_one_row(guide, traces[1])
        hidden = _hidden_latents(*programs, traces[1], batch)
    if hidden:
        warnings.warn(
            f"site {hidden[0]!r}: the model masks elements that the guide draws, and nothing depends on them; their"
            " log q adds to the loss without a bound, as in Pyro: mask them in the guide too (pyro.poutine.mask)",
            GumboWarning,
            stacklevel=3,
        )
    if unregistered:
        warnings.warn(
            f"{len(unregistered)} parameters of networks that the programs call without pyro.module are not trained: "
            "register the networks, or set requires_grad to False",
            GumboWarning,
            stacklevel=3,
        )
    return Inspection(*programs, _num_data(traces[1], batch), of_rows, unchecked, averages, names, unregistered)


def _hidden_latents(model: Callable, guide: Callable, seen: poutine.Trace, batch: Rows) -> list[str]:
    """Latents with elements that only the model masks and that nothing depends on."""
    masks = (unmasked(site) for site in sites_of(seen) if not site["is_observed"])
    if all(mask is None or bool(mask.all()) for mask in masks):
        return []
    try:
        return sorted(superfluous_latents(model, guide, batch.args, batch.kwargs).values())
    except UnsupportedSite as error:
        return [error.site]
    except (GumboError, *PROGRAM_ERRORS):
        return []  # the first step says what is wrong


def parameter_of_rows(model: Callable, guide: Callable, batch: Rows, seed: int) -> str | None:
    """The parameter that has elements for each row of a batch, found on copies of the programs, or None."""
    if any(autoguides_in(program) for program in (model, guide)):
        return None  # such programs cannot be copied, and report parameters of rows themselves
    with suppress(Exception), warnings.catch_warnings():
        warnings.simplefilter("ignore", GumboWarning)
        return inspect_programs(*copy.deepcopy((model, guide)), batch, seed).of_rows
    return None


def _autoguide_of_one_row(guide: Callable, model: poutine.Trace) -> str | None:
    """A parameter of an autoguide whose latents are in a data plate of size 1."""
    observed = {frame.name for site in sites_of(model) if site["is_observed"] for frame in site["cond_indep_stack"]}
    for autoguide in autoguides_in(guide):
        if autoguide.prototype_trace is None or autoguide.create_plates is not None:
            continue
        for site in sites_of(autoguide.prototype_trace):
            frames = [frame for frame in site["cond_indep_stack"] if frame.full_size == 1 and frame.name in observed]
            if frames and not site["is_observed"]:
                return next((name for name, _ in autoguide.named_parameters()), None)
    return None


# --- the run ----------------------------------------------------------------------------------------------------------


def _names(*traces: poutine.Trace) -> list[str]:
    """The names of the parameters in the traces."""
    return [name for trace in traces for name, site in trace.nodes.items() if site["type"] == "param"]


def _as_module(
    program: Callable,
    trace: poutine.Trace,
    stored: Mapping[str, tuple[Tensor, Any]],
    called: Sequence[nn.Module],
    unregistered: list[nn.Parameter],
) -> nn.Module:
    """The program itself if it is a module that owns all its parameters, else a module that wraps it."""
    asked = {name: stored[name] for name in _names(trace) if name in stored}
    if isinstance(program, nn.Module):
        networks = [program]
    else:
        owner = getattr(program, "__self__", None)
        networks = _outermost([*([owner] if isinstance(owner, nn.Module) else []), *called])
    owned = {id(parameter): parameter for network in networks for parameter in network.parameters()}
    loose = {name: (leaf, constraint) for name, (leaf, constraint) in asked.items() if id(leaf) not in owned}
    if isinstance(program, nn.Module):
        return ProgramModule(program, networks, loose) if loose else program
    registered = {id(leaf) for leaf, _ in stored.values()}
    known = {id(parameter) for parameter in unregistered}
    for parameter in owned.values():
        if parameter.requires_grad and id(parameter) not in registered | known:
            unregistered.append(parameter)
    return ProgramModule(program, networks, loose)


def _outermost(modules: Sequence[nn.Module]) -> list[nn.Module]:
    """The modules that no other module contains, without duplicates."""
    unique = list({id(module): module for module in modules}.values())
    inside = {id(child) for module in unique for child in module.modules() if child is not module}
    return [module for module in unique if id(module) not in inside]


def _as_parameters(leaves: Mapping[str, tuple[Tensor, Any]]) -> dict[str, tuple[nn.Parameter, Any]]:
    """Leaves of the store as parameters that share their memory."""
    return {
        name: (leaf if isinstance(leaf, nn.Parameter) else nn.Parameter(leaf.detach()), constraint)
        for name, (leaf, constraint) in leaves.items()
    }


def _put(store, name: str, value: Tensor, constraint: Any) -> None:
    """Write an unconstrained value into the store's tensor of that name."""
    if name in store:
        leaf = store._params[name]
        if leaf.data_ptr() != value.data_ptr():
            with torch.no_grad():
                leaf.copy_(value)
        return
    leaf = value.clone().requires_grad_(True)
    store._params[name], store._constraints[name] = leaf, constraint
    store._param_to_name[leaf] = name


def _key(name: str) -> str:
    """A store name as a valid module parameter name."""
    return name.replace(".", "/")


# --- what the run shows -----------------------------------------------------------------------------------------------


def _unchecked(trace: poutine.Trace) -> frozenset[str]:
    return frozenset(
        name
        for name, site in trace.nodes.items()
        if site["type"] == "sample" and site["is_observed"] and turns_validation_off(site["fn"])
    )


def _num_data(trace: poutine.Trace, batch: Rows) -> int | None:
    """The number of data that a loss on this batch counts, if it is not the batch's length.

    The plates that enclose every observed site give it: a subsampling plate scales its terms to its full size.
    """
    observed = [site for site in sites_of(trace) if site["is_observed"] and not is_computed(site)]
    if not observed:
        return None
    # A point with a density is data only where nothing else is: Pyro's SplitReparam and NeuTraReparam leave such sites.
    observed = [site for site in observed if not observes_itself(site)] or observed
    common = frozenset.intersection(*[frozenset(frame.name for frame in site["cond_indep_stack"]) for site in observed])
    plates = {frame.name: frame for frame in observed[0]["cond_indep_stack"] if frame.name in common}
    if batch.whole:
        latents = [site for site in sites_of(trace) if not site["is_observed"]]
        around = {frame.name for site in latents for frame in site["cond_indep_stack"]}
        chosen = [frame for name, frame in plates.items() if name in around] or list(plates.values())
        count = 1
        for frame in chosen:
            count *= frame.full_size or frame.size
        return count
    for frame in plates.values():
        full = frame.full_size or frame.size
        if frame.size == len(batch) < full:
            return full
    return None


def refuse_parameter_of_rows(inspection: Inspection, batch_size: int, num_rows: int) -> None:
    """Raise BadInput where several batches would train one parameter for different rows."""
    if inspection.of_rows is not None and batch_size < num_rows:
        raise BadInput(
            f"parameter {inspection.of_rows!r} has elements for each row of a batch, so that the {num_rows} rows of "
            f"train would share those of {batch_size}: pass batch_size={num_rows}, tell the guide which rows it sees "
            "(an autoguide's create_plates=), or take a guide that reads the data"
        )


__all__ = ["Inspection", "ProgramModule", "inspect_programs", "parameter_of_rows", "refuse_parameter_of_rows"]
