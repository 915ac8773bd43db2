"""A model and guide at fixed parameters, and the gradients that a loss draws there."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.infer import ELBO
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor

from ...errors import BadInput, GumboError, first_line
from ..elbo import SiteELBO
from ..engine.handlers import CheckedRows
from ..engine.interventions import ChosenRows, DrawnDetached
from ..engine.looks import pair_of_traces, plates_mixed_by, takes_particles_at_once
from ..engine.messenger_guides import as_program
from ..engine.scopes import check_shared_names, kept_buffers, modes_kept, private_seed, private_store
from ..estimators._distributions import is_deterministic
from .directions import Directions
from .moments import Gradient, Moments, flat_gradient, grads_aside, parameters_of


class _Count(Messenger):
    """Counts the elements of each observed site that were computed."""

    def __init__(self):
        super().__init__()
        self.elements: dict[str, int] = {}

    def _pyro_post_sample(self, msg) -> None:
        if msg["is_observed"] and not msg["infer"].get("_do_not_trace"):
            self.elements[msg["name"]] = self.elements.get(msg["name"], 0) + math.prod(msg["fn"].batch_shape)


class Stage:
    """Two programs in which everything but the draws is fixed: parameters, arguments, rows of subsampled plates.

    Create it inside :func:`set_aside`. ``parameters`` are the leaves by name, ``guide.…`` and ``model.…``; ``latents``
    the guide's random sites with their distributions in one run, ``nesting`` the number of batch dimensions of plates,
    ``mixed_plates`` the plates whose rows depend on each other.
    """

    def __init__(
        self,
        model: Callable,
        guide: Callable,
        args: tuple,
        kwargs: Mapping[str, Any],
        max_plate_nesting: int | None = None,
    ):
        self.model, self.guide, self.args, self.kwargs = model, as_program(guide), args, dict(kwargs)
        self.max_plate_nesting = max_plate_nesting
        try:
            with torch.no_grad(), CheckedRows():
                guide_trace = poutine.trace(self.guide).get_trace(*args, **kwargs)
                with _Count() as count:
                    model_trace = poutine.trace(poutine.replay(model, trace=guide_trace)).get_trace(*args, **kwargs)
        except GumboError:
            raise
        except Exception as error:  # the user's own programs
            raise BadInput(
                f"the programs cannot run on these arguments: {first_line(error, kind=True)}; model and guide are "
                "called alike, with what follows them"
            ) from error
        check_shared_names(model, guide)
        self.elements = count.elements
        sites = [(name, node) for t in (guide_trace, model_trace) for name, node in t.nodes.items()]
        frames = [f for _, site in sites if site["type"] == "sample" for f in site["cond_indep_stack"] if f.vectorized]
        self.nesting = max((-frame.dim for frame in frames), default=0)
        self.subsamples = {n: s["value"] for n, s in sites if s["type"] == "sample" and site_is_subsample(s)}
        self.latents = {
            name: site["fn"]
            for name, site in guide_trace.nodes.items()
            if site["type"] == "sample" and not site["is_observed"] and not site_is_subsample(site)
            if not is_deterministic(site["fn"])
        }
        self.parameters = parameters_of(model, guide, args, self.kwargs, "all")
        self.store = pyro.get_param_store().get_state()
        with self.held():
            self.mixed_plates = sorted(plates_mixed_by(model, self.guide, args, self.kwargs))

    def at_once(self, asked: bool | None) -> bool:
        """Whether particles run vectorized; by default, if the programs give the same log-probabilities."""
        return self._vectorizes if asked is None else asked

    @cached_property
    def _vectorizes(self) -> bool:
        with self.held():
            return takes_particles_at_once(self.model, self.guide, self.args, self.kwargs, self.max_plate_nesting)

    def new_store(self) -> Any:
        """A new state of the param store with the programs' own parameters only."""
        return {"params": dict(self.store["params"]), "constraints": dict(self.store["constraints"])}

    @contextmanager
    def held(self, store: Any = None) -> Iterator[None]:
        """Run programs inside; ``store`` is a state of the param store to continue from."""
        with (
            pyro.get_param_store().scope(self.new_store() if store is None else store),
            ChosenRows(self.subsamples, drawn_only=False),
            torch.enable_grad(),
        ):
            yield

    def gradient(self, loss: Tensor) -> Gradient:
        """The gradient of a scalar with respect to all parameters."""
        leaves = list(self.parameters.values())
        if not loss.requires_grad:
            return {name: torch.zeros(leaf.numel(), dtype=torch.float64) for name, leaf in self.parameters.items()}
        found = torch.autograd.grad(loss, leaves, allow_unused=True)
        return {
            name: (torch.zeros_like(leaf) if grad is None else grad).detach().double().flatten()
            for (name, leaf), grad in zip(self.parameters.items(), found, strict=True)
        }

    def sites_of_parameters(self) -> dict[str, str]:
        """For each parameter the sites whose distribution depends on it, joined by ``+``."""
        found: dict[str, list[str]] = {name: [] for name in self.parameters}
        with self.held(), DrawnDetached():
            for trace in pair_of_traces(self.model, self.guide, self.args, self.kwargs):
                trace.compute_log_prob()
                for name, site in trace.nodes.items():
                    if site["type"] != "sample" or site_is_subsample(site) or not site["log_prob_sum"].requires_grad:
                        continue
                    grads = torch.autograd.grad(
                        site["log_prob_sum"], list(self.parameters.values()), allow_unused=True, retain_graph=True
                    )
                    for parameter, grad in zip(self.parameters, grads, strict=True):
                        if grad is not None and name not in found[parameter]:
                            found[parameter].append(name)
        return {name: "+".join(sites) for name, sites in found.items()}


@contextmanager
def set_aside(model: Callable, guide: Callable, seed: int) -> Iterator[None]:
    """Restore param store, seeds, training modes and buffers on exit."""
    with (
        private_store(model, guide),
        private_seed(seed, model, guide),
        modes_kept(model, guide),
        kept_buffers(model, guide),
    ):
        yield


class Draws:
    """Gradients of one loss on a stage; its baselines and control variates adapt until :meth:`freeze`."""

    def __init__(self, stage: Stage, loss: ELBO, lr: float = 1e-2):
        self.stage, self.loss, self.lr = stage, loss, lr
        self.store = stage.new_store()
        self.frozen: Any = None
        self.binding = None
        self.optimizer: torch.optim.Optimizer | None = None
        if isinstance(loss, SiteELBO):
            self.binding = loss._binding(stage.model, stage.guide)
            with stage.held(self.store):
                self.binding.initialize(stage.args, stage.kwargs)
            own = list(self.binding.parameters())
            self.optimizer = torch.optim.Adam(own, lr=lr) if own else None

    @property
    def has_state(self) -> bool:
        """Whether state changes between draws: known for a SiteELBO, for Pyro's ELBOs after one draw."""
        if self.binding is not None:
            return self.binding.has_state()
        return any(name.startswith("__baseline") for name in self.store["params"])

    def draw(self) -> tuple[Gradient, float, float]:
        """One gradient, the loss, and the seconds for both."""
        store = self.store
        if self.frozen is not None:
            store = {part: dict(held) for part, held in self.frozen.items()}
        with self.stage.held(store), grads_aside(self.stage.model, self.stage.guide, self.stage.parameters):
            watch = _Stopwatch(self.stage.parameters.values())
            value = self.loss.loss_and_grads(self.stage.model, self.stage.guide, *self.stage.args, **self.stage.kwargs)
            seconds = watch.seconds()
            gradient = {name: flat_gradient(leaf) for name, leaf in self.stage.parameters.items()}
        if self.optimizer is not None:
            if self.frozen is None:
                self.optimizer.step()
            self.optimizer.zero_grad()
        return gradient, float(value), seconds

    def evaluations(self) -> float:
        """Model runs per draw, counted by the computed elements of observed sites; NaN without such sites."""
        with _Count() as count:
            self.draw()
        shared = [count.elements[name] / size for name, size in self.stage.elements.items() if name in count.elements]
        return max(shared, default=float("nan"))

    def freeze(self) -> None:
        """Stop all adaptation, so that draws are independent."""
        self.frozen = {part: dict(held) for part, held in self.store.items()}
        if self.binding is not None:
            self.binding.eval()

    def moments(self, count: int, directions: Directions | None = None) -> Moments:
        """Moments of ``count`` draws, and of their components along ``directions``."""
        found = Moments(self.stage.parameters, directions)
        for _ in range(count):
            gradient, value, _ = self.draw()
            found.add(gradient, value)
        return found


class _Stopwatch:
    """Seconds since it was made, without those in which other processes had the processor.

    These are the smaller of the time that has passed, and the processor's time of all threads. On a GPU, or where the
    system counts the processor's time in large units, they are the time that has passed.
    """

    def __init__(self, parameters: Iterable[Tensor]):
        self.on_gpu = any(leaf.is_cuda for leaf in parameters)
        self._began = self._now()

    def _now(self) -> tuple[float, ...]:
        if self.on_gpu:
            torch.cuda.synchronize()
        return (time.perf_counter(),) if self.on_gpu or _COARSE else (time.perf_counter(), time.process_time())

    def seconds(self) -> float:
        return min(now - then for now, then in zip(self._now(), self._began, strict=True))


_COARSE = time.get_clock_info("process_time").resolution > 1e-5
