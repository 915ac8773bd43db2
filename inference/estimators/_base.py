"""The contract of a gradient estimator: how a site draws, and how the gradient passes through the draw.

The engine (``inference/engine/``) runs guide and model, and hands each latent site of the guide to its estimator three
times: to ``draw`` when the site is reached, to ``guide_fn``/``model_fn`` when the log-probabilities of the draw are
taken, and to ``surrogate`` when all terms are known. A new estimator is one class in one file of this folder, a word in
``estimators`` and one import line in the folder's ``__init__``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import partial
from types import FunctionType
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ...errors import BadInput, Refusal
from ...options import Checked
from ...registry import Registry, home_of
from ._distributions import clear_caches, describe, elementary, score_log_prob, support_moves


def _expected(found: Any) -> str:
    own = issubclass(found, Estimator) if isinstance(found, type) else isinstance(found, (FunctionType, partial))
    return (
        ""
        if own and not home_of(found).startswith("torch")
        else "a subclass of Estimator, or a function that makes one"
    )


estimators: Registry[Callable[[], Estimator]] = Registry("estimator", _expected)

Schedule = Callable[[int], float]


@dataclass
class Draw:
    """A value for a site, with whatever the estimator wants to remember of how it was made (tensors by name)."""

    value: Tensor
    extra: dict[str, Tensor] = field(default_factory=dict)

    def map(self, change: Callable[[Tensor], Tensor]) -> Draw:
        """The same draw with every tensor changed alike (sliced, stacked)."""
        return Draw(change(self.value), {name: change(item) for name, item in self.extra.items()})


@dataclass
class SiteView:
    """What an estimator sees of its site once all terms are known.

    Leading dimensions are ``(…enumerated, K, *plates)``: K particles, then one dimension per plate level; the K
    dimension is there for K = 1 too.

    Attributes:
        name: the site.
        fns: the guide's distribution at the site: one, or one for each particle if they were run one by one.
        draw: the draws: ``draw.value`` and each of ``draw.extra`` are ``(…, K, *plates, *event)``.
        log_prob: unscaled, unmasked log q of the draws, differentiable, ``(…, K, *plates)``; for a draw with a path
            None, or the score term that the path leaves over.
        cost: the signed sum of everything evaluated at or after the site, detached, same shape.
        particle_dim: the dimension of K in ``log_prob`` and ``cost``.
        num_particles: K.
        step: training steps made so far.
        state: the estimator's module for this site, or None.
        training: whether statistics may move: training mode with gradients on.
        bound: under ``iwae``, the importance weights; None under ``elbo``.
        inputs: ``inputs()`` lists what a baseline may look at: the program's arguments and upstream values, each laid
            out as ``(…, K or 1, *plates, features)``.
        evaluate: ``evaluate(draw, downstream="draw", differentiable=False)`` runs the programs again with this site's
            draw replaced: every tensor of ``draw`` has one more dimension on the left, over A alternatives. Sites
            before this one keep their draws, and what the programs draw outside of sample statements (dropout) is
            what it was; later sites draw anew (``"draw"``), draw relaxed and reparameterized
            (``"soft"``), or take their means (``"mean"``). Returns the costs, ``(A, …)`` and otherwise broadcastable
            with ``cost``, detached. With ``differentiable`` it returns the costs and their sum with each term counted
            once, to be differentiated with respect to the draw: all parameters are frozen.
        mean: ``mean(tensor)`` of something shaped like ``cost``, over the whole batch: what running statistics use,
            since several processes may hold a part of the rows each.
        drawn_twice: ``with drawn_twice(devices):`` lets what is drawn within, on the CPU and those CUDA devices, be
            drawn again after.
        slope: the derivative of the sum of all costs with respect to the draws, each term counted once, shaped like
            ``value``; for estimators that ask for it by ``takes_slope``. It comes from the run at hand. Where the
            programs are not differentiable in the draw it is zero, or misses what they did not differentiate; what
            later sites drew is held still. A control variate may use it, and nothing that must be right.
        joined: the plate dimensions whose elements something after this site may join, so that ``cost`` tells them
            apart no longer: alternatives for one element at a time must be evaluated one element at a time.
    """

    name: str
    fns: list[Any]
    draw: Draw
    log_prob: Any
    cost: Tensor
    particle_dim: int
    num_particles: int
    step: int
    state: nn.Module | None
    training: bool
    bound: Any
    inputs: Callable[[], list[Tensor]]
    evaluate: Callable[..., Tensor]
    find_joined: Callable[[], tuple[int, ...]] = tuple
    find_slope: Callable[[], Tensor] | None = None
    mean: Callable[[Tensor], Tensor] = torch.mean
    drawn_twice: Callable[[Sequence[int]], AbstractContextManager] = torch.random.fork_rng

    @property
    def joined(self) -> tuple[int, ...]:
        return self.find_joined()

    @property
    def slope(self) -> Tensor:
        if self.find_slope is None:
            raise BadInput("the slope of a cost is found for estimators that set takes_slope")
        return self.find_slope()

    @property
    def value(self) -> Tensor:
        return self.draw.value

    @property
    def event_dim(self) -> int:
        return self.fns[0].event_dim

    def parameter(self, name: str, trailing: int = 0) -> Tensor:
        """A parameter of the site's elementary distribution, differentiable, shaped like ``value``.

        ``trailing`` counts dimensions that the parameter has and the value has not (1 for the logits of a Categorical).
        """
        room = -self.particle_dim
        found = []
        for fn in self.fns:
            parameter = getattr(elementary(fn), name)
            shape = tuple(fn.batch_shape) + tuple(fn.event_shape)
            shape += tuple(parameter.shape[parameter.dim() - trailing :]) if trailing else ()
            found.append(pad_left(parameter.expand(shape), room + len(fn.event_shape) + trailing))
        dim = self.particle_dim - self.event_dim - trailing
        return found[0] if len(found) == 1 else torch.cat(torch.broadcast_tensors(*found), dim=dim)

    def sum_event(self, tensor: Tensor) -> Tensor:
        """Sum the event dimensions of something shaped like ``value``, and plates that ``cost`` does not tell apart."""
        tensor = tensor.sum(list(range(-self.event_dim, 0))) if self.event_dim else tensor
        mixed = [dim for dim in range(self.particle_dim + 1, 0) if self.cost.shape[dim] == 1 < tensor.shape[dim]]
        return tensor.sum(mixed, keepdim=True) if mixed else tensor


class SiteState(nn.Module):
    """What an estimator keeps of one site from call to call, for states of which more is to be said than their tensors.

    What results depend on stands in parameters and buffers, which checkpoints hold and captured graphs carry; any
    ``nn.Module`` will do for that. A subclass of this one may also count calls, or look at values in some of them.

    Class attributes:
        uncaptured: plain attributes that change as the programs run and that no result depends on, such as counters: a
            captured graph does not see them change. Models, guides and their layers may name such attributes alike.
    """

    uncaptured: ClassVar[frozenset[str]] = frozenset()

    def looks_at_values(self, step: int) -> bool:
        """Whether the call after ``step`` training steps looks at values, and is to be run without a graph."""
        return False

    def continue_from(self, step: int) -> None:
        """Count on from ``step`` training steps, of which some were made by a graph or by an interrupted run."""

    def stop_looking(self) -> None:
        """Look at no values: a graph is captured, and what this changes is undone afterwards."""


def pad_left(tensor: Tensor, dims: int) -> Tensor:
    """The same tensor with at least ``dims`` dimensions."""
    return tensor.reshape((1,) * (dims - tensor.dim()) + tensor.shape) if tensor.dim() < dims else tensor


class Estimator(Checked):
    """How the gradient passes through a site.

    Class attributes:
        unbiased: whether E[gradient] is the exact gradient of the objective.
        min_particles: the smallest K that it works with.
        needs_relaxed_model: whether the model must accept values between the discrete ones.
        objectives: the objectives that it is derived for.
        log_q: how −log q of the site enters the differentiable objective: ``"full"``; ``"value"`` (counted, not
            differentiated: its direct gradient has expectation zero); ``"path"`` (differentiated through values only).
        has_path: whether draws come from the distribution's own ``rsample``, which may leave a score term.
        enumerates: whether the site is summed over rather than drawn.
        reruns: whether ``surrogate`` calls ``view.evaluate`` with several alternatives, which asks programs to accept
            leading dimensions.
        takes_slope: whether ``surrogate`` reads ``view.slope``; ``draw`` then gives a leaf that requires a gradient.
        runs_again: whether one gradient takes further runs of the programs (``view.evaluate``, ``log_q = "path"``).
        together: whether all sites must take this estimator if one does.
        lazy_parameters: whether the state has parameters, whose shapes only data can tell.
    """

    unbiased: bool = True
    min_particles: int = 1
    needs_relaxed_model: bool = False
    objectives: frozenset[str] = frozenset({"elbo"})
    log_q: str = "full"
    has_path: bool = False
    enumerates: bool = False
    reruns: bool = False
    takes_slope: bool = False
    together: bool = False
    lazy_parameters: bool = False

    @property
    def name(self) -> str:
        """The word for this configuration, or the class name where no word says it."""
        for word, make in estimators.items():
            if repr(make()) == repr(self):
                return word
        return type(self).__name__

    def __repr__(self) -> str:
        options = ", ".join(f"{key}={value!r}" for key, value in sorted(vars(self).items()) if not key.startswith("_"))
        return f"{type(self).__name__}({options})"

    @property
    def runs_again(self) -> bool:
        """Whether one gradient takes further runs of the programs, which then have to repeat their own noise."""
        again = type(self).surrogate is not Estimator.surrogate and not self.takes_slope
        return again or self.log_q == "path" or self.together

    def evaluations(self, num_particles: int = 1, num_sites: int = 1) -> int:
        """Model runs that one gradient costs."""
        return num_particles

    def objective_name(self) -> str:
        """What the value of the surrogate is when a site takes this estimator under ``elbo``."""
        return "elbo"

    def why_not(self, site: Mapping[str, Any]) -> str | None:
        """Why a site (a Pyro message with ``name`` and ``fn``) cannot be served, or None if it can."""
        return None

    def refusal(self, site: Mapping[str, Any]) -> Refusal | None:
        """:meth:`why_not` with the names of the site and of this estimator."""
        reason = self.why_not(site)
        return None if reason is None else Refusal(reason, site.get("name", ""), self.name)

    def supports(self, site: Mapping[str, Any]) -> bool:
        """Whether a site can be served."""
        return self.why_not(site) is None

    def make_state(self, site: Mapping[str, Any], inputs: Callable[[], list[Tensor]]) -> nn.Module | None:
        """The module that holds this estimator's running state for one site, perhaps a :class:`SiteState`.

        ``inputs`` is that of :class:`SiteView` for one particle, to tell how many features there are.
        """
        return None

    def draw(self, fn: Any, step: int, args: tuple = (), kwargs: Mapping[str, Any] | None = None) -> Draw:
        """A draw from the site's distribution after ``step`` training steps."""
        raise BadInput(f"{type(self).__name__} does not draw")

    def guide_fn(self, fn: Any, draw: Draw, step: int) -> Any:
        """The distribution whose log-probability at the draw is the site's log q."""
        return fn

    def model_fn(self, fn: Any, draw: Draw, step: int) -> Any:
        """The distribution whose log-probability at the draw is the site's log p."""
        return fn

    def surrogate(self, view: SiteView) -> Tensor | None:
        """A tensor shaped like ``view.log_prob`` whose gradient is this site's share of the gradient; None for none."""
        return None


class Chooser(Estimator):
    """A word that stands for a choice: before a site is drawn, another estimator is put in its place.

    A loss asks it once for all of its sites that name one; ``choose`` says a word for each of these.
    """

    lazy_parameters = True  # what is chosen may have some
    objectives = frozenset()
    batches: int = 1  # how many of the first batches ``fit`` gives it
    again: Sequence[int] = ()  # the training steps before which ``fit`` asks again

    def why_not(self, site: Mapping[str, Any]) -> str | None:
        return "it is chosen for a loss, and not by a site's own mark: name it in SiteELBO, as in {'z': 'auto'}"

    def choose(self, loss: Any, model: Callable, guide: Callable, batches: Any) -> Any:
        """What was chosen, an object whose ``words`` map the sites to words.

        Args:
            loss: the :class:`SiteELBO` that names this word.
            model, guide: the programs.
            batches: pairs of arguments and keywords that they are called with.
        """
        raise BadInput(f"{type(self).__name__} does not choose")

    def announce(self, choice: Any) -> None:
        """Say what was chosen."""

    def recall(self, found: Mapping[str, Any]) -> Any:
        """A choice from what its ``as_dict()`` gave."""
        raise BadInput(f"{type(self).__name__} recalls no choice")


# Words that stand for a choice.
choosers: dict[str, Callable[..., Chooser]] = {}


def detached_draw(fn: Any, args: tuple = (), kwargs: Mapping[str, Any] | None = None) -> Draw:
    """A draw that carries no gradient, whatever the distribution could do."""
    with torch.no_grad():
        value = fn.sample(*args, **(kwargs or {}))
    clear_caches(fn)
    return Draw(value.detach())


def sloping_draw(fn: Any, args: tuple = (), kwargs: Mapping[str, Any] | None = None) -> Draw:
    """A draw that carries no gradient of parameters, and with respect to which costs can be differentiated."""
    return detached_draw(fn, args, kwargs).map(lambda value: value.clone().requires_grad_())


def score_why_not(site: Mapping[str, Any]) -> str | None:
    """What the score-function family asks of a site."""
    fn = site["fn"]
    if not hasattr(fn, "log_prob"):
        return "it has no log_prob"
    if support_moves(fn):
        return f"the support of {describe(fn)} depends on parameters, which a score cannot see"
    return None


def at_step(value: float | Schedule, step: Any) -> Any:
    """A number, or what a schedule says at this step; a tensor while a graph is captured, which outlives the step."""
    if not callable(value):
        return float(value)
    return step.at(value) if hasattr(step, "at") else float(value(step))


def check_temperature(temperature: float | Schedule) -> float | Schedule:
    if callable(temperature):
        return temperature
    if not 0 < float(temperature) < math.inf:
        raise BadInput(f"temperature must be a positive number or a schedule, got {temperature!r}")
    return float(temperature)


__all__ = [
    "Chooser",
    "Draw",
    "Estimator",
    "SiteState",
    "SiteView",
    "at_step",
    "check_temperature",
    "choosers",
    "detached_draw",
    "estimators",
    "pad_left",
    "score_log_prob",
    "score_why_not",
    "sloping_draw",
]
