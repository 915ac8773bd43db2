"""Trial runs that inspect the programs without side effects."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.poutine.trace_struct import Trace
from torch import Tensor, nn

from ...errors import GumboError
from ..estimators import Estimator, estimators
from ..estimators._distributions import is_deterministic
from .mixing import mixed_plates
from .programs import Program
from .records import Run
from .scopes import built_or_not, devices_of, is_writable, kept_buffers, modules_met, modules_of
from .streams import Generators
from .vectorizing import check_at_once


@contextmanager
def looking(model: Callable, guide: Callable, *args: Any) -> Iterator[Collection[nn.Module]]:
    """A trial run: random state and buffers are restored afterwards.

    Gradients are enabled even if the caller disabled them, since only they show a support that depends on parameters.
    Yields the modules that take part, including those that plain functions call.
    """
    generators = Generators(devices_of(model, guide, *args), others=True)
    with generators.kept(), kept_buffers(model, guide), built_or_not(guide), modules_met() as met, torch.enable_grad():
        yield met


NEAR_ZERO = 1e-3  # of an element of a parameter; layers that begin as nothing take such values


@contextmanager
def off_zero(program: Program, args: tuple, kwargs: Mapping[str, Any], seen: Run) -> Iterator[Run]:
    """Move elements of parameters that are near zero away from it, in a trial run; yields a run at these parameters.

    A layer, a gate or a coupling that begins at zero hides what depends on what, and training shows it. ``seen``, a run
    at the parameters as they are, is yielded where none is near zero, or where the programs fail at the others.
    """
    near = [one for one in _parameters(program.model, program.guide) if (one.abs() < NEAR_ZERO).any()]
    with ExitStack() as moved:
        for parameter in near:
            moved.enter_context(_moved(parameter.data))  # no change of version: graphs of the caller stay valid
        if near:
            try:
                seen = program.run(args, kwargs)
            except Exception:
                moved.close()
        yield seen


def _parameters(*programs: Callable) -> list[Tensor]:
    """The parameters of modules and of the store that are learned, each once."""
    held = [one for module in modules_of(*programs) for one in module.parameters() if not nn.parameter.is_lazy(one)]
    held += pyro.get_param_store()._params.values()
    return list({id(one): one for one in held if one.requires_grad and is_writable(one)}.values())


@contextmanager
def _moved(value: Tensor) -> Iterator[None]:
    """Elements near zero are away from it inside, on the same side."""
    before = value.clone()
    side = torch.where(value == 0, torch.randint_like(value, 2) * 2 - 1, value.sign())
    value.copy_(torch.where(value.abs() < NEAR_ZERO, side * (0.05 + 0.1 * torch.rand_like(value)), value))
    try:
        yield
    finally:
        value.copy_(before)


def pair_of_traces(model: Callable, guide: Callable, args: tuple, kwargs: Mapping[str, Any]) -> tuple[Trace, Trace]:
    """Pyro's traces of one run of the guide, and of the model at its draws."""
    guide_trace = poutine.trace(guide).get_trace(*args, **kwargs)
    return guide_trace, poutine.trace(poutine.replay(model, trace=guide_trace)).get_trace(*args, **kwargs)


def one_particle(
    model: Callable,
    guide: Callable,
    max_plate_nesting: int | None = None,
    resolve: Callable[[Any], Estimator | None] = lambda msg: None,
) -> Program:
    """A model and a guide with one particle, without estimators; ``resolve`` may give sites an estimator."""
    return Program(
        model,
        guide,
        resolve=resolve,
        num_particles=1,
        max_plate_nesting=max_plate_nesting,
        vectorized=False,
    )


def plates_mixed_by(
    model: Callable,
    guide: Callable,
    args: tuple,
    kwargs: Mapping[str, Any],
    max_plate_nesting: int | None = None,
    resolve: Callable[[Any], Estimator | None] = lambda msg: None,
) -> frozenset[str]:
    """The plates with dependent rows, found in the programs' current mode and with no parameter at zero.

    >>> import pyro.distributions as dist
    >>> def guide():
    ...     with pyro.plate("data", 3):
    ...         pyro.sample("z", dist.Bernoulli(torch.full((3,), 0.5)))
    >>> def model():
    ...     with pyro.plate("data", 3):
    ...         z = pyro.sample("z", dist.Bernoulli(torch.full((3,), 0.5)))
    ...         pyro.sample("x", dist.Normal(z - z.mean(), 1.0), obs=torch.zeros(3))
    >>> sorted(plates_mixed_by(model, guide, (), {}))
    ['data']
    """
    with looking(model, guide, *args):
        program = one_particle(model, guide, max_plate_nesting, resolve)
        program.generators = Generators(devices_of(model, guide, *args), others=True)
        with off_zero(program, args, kwargs, program.run(args, kwargs)) as seen:
            return mixed_plates(program, seen, args, kwargs)


def takes_particles_at_once(
    model: Callable, guide: Callable, args: tuple, kwargs: Mapping[str, Any], max_plate_nesting: int | None = None
) -> bool:
    """Whether two particles at once have the log-probabilities of single ones, judged by one run.

    >>> import pyro.distributions as dist
    >>> def guide():
    ...     pyro.sample("w", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    >>> def model():
    ...     w = pyro.sample("w", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    ...     pyro.sample("x", dist.Normal(torch.ones(3, 2) @ w, 1.0).to_event(1), obs=torch.zeros(3))
    >>> takes_particles_at_once(model, guide, (), {})
    False
    """
    with looking(model, guide, *args):
        program = one_particle(model, guide, max_plate_nesting)
        program.generators = Generators(devices_of(model, guide, *args), others=True)
        seen = program.run(args, kwargs)
        program.num_particles, program.vectorized = 2, True
        try:
            check_at_once(program, seen, args, kwargs)
        except GumboError:
            return False
    return True


def refusals(model: Callable, guide: Callable, *args: Any, **kwargs: Any) -> dict[str, str]:
    """For each estimator's word why it does not support all sites of a pair, or ""; one run of the programs.

    >>> import pyro.distributions as dist
    >>> program = lambda: pyro.sample("z", dist.Normal(0.0, 1.0))
    >>> refusals(program, program)["arm"]
    "site 'z': antithetic pairs need a Bernoulli site, this one is Normal"
    >>> refusals(program, program)["rloo"]
    ''
    """
    with pyro.get_param_store().scope(), looking(model, guide, *args):
        seen = one_particle(model, guide).run(args, kwargs)
    sites = [site for site in seen.guide if site.latent and not is_deterministic(site.fn)]
    found = {}
    for word, make in estimators.items():
        estimator = make()
        of_sites = (estimator.refusal({"name": site.name, "fn": site.fn}) for site in sites)
        found[word] = next((refusal for refusal in of_sites if refusal is not None), "")
    return found
