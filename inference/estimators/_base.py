"""The interface of a gradient estimator: how a site is drawn, and how the gradient passes through the draw.

The engine (``inference/engine/``) runs guide and model, and calls the estimator of each latent site of the guide three
times: ``draw`` when the site is reached, ``guide_fn``/``model_fn`` for the log-probabilities of the draw, and
``surrogate`` when all terms are known. A new estimator is one class in one file of this folder, a word in
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
from ...options import Checked, with_options
from ...registry import Registry, home_of
from ._distributions import (
    clear_caches,
    describe,
    elementary,
    find_probs_once,
    samples_by_path,
    score_log_prob,
    support_moves,
    why_other_draws,
)


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
    """A value for a site, with further tensors by name that the estimator needs later.

    Attributes:
        value: the value of the site, ``(…, K, *plates, *event)``.
        extra: the further tensors, with the same leading dimensions as the value.

    >>> import torch
    >>> draw = Draw(torch.zeros(3), {"partner": torch.ones(3)})
    >>> draw.map(lambda tensor: tensor[:2]).extra["partner"]
    tensor([1., 1.])
    """

    value: Tensor
    extra: dict[str, Tensor] = field(default_factory=dict)

    def map(self, change: Callable[[Tensor], Tensor]) -> Draw:
        """The same draw with every tensor transformed alike (sliced, stacked)."""
        return Draw(change(self.value), {name: change(item) for name, item in self.extra.items()})


@dataclass
class SiteView:
    """The data of a site that an estimator receives once all terms are known.

    Leading dimensions are ``(…enumerated, K, *plates)``: K particles, then one dimension per plate level; the K
    dimension also exists for K = 1.

    Attributes:
        name: the site.
        fns: the guide's distribution at the site: one, or one per particle if particles ran one by one.
        draw: the draws: ``draw.value`` and each of ``draw.extra`` are ``(…, K, *plates, *event)``.
        log_prob: unscaled, unmasked log q of the draws, differentiable, ``(…, K, *plates)``; for a reparameterized draw
            None, or its score term if it has one.
        cost: the signed sum of all terms at or after the site, detached, same shape.
        particle_dim: the dimension of K in ``log_prob`` and ``cost``.
        num_particles: K.
        step: number of earlier training steps.
        state: the estimator's module for this site, or None.
        training: whether statistics may change: training mode with gradients enabled.
        bound: under ``iwae``, the importance weights; None under ``elbo``.
        inputs: ``inputs()`` returns the possible inputs of a baseline: the program's arguments and upstream values,
            each as ``(…, K or 1, *plates, features)``.
        evaluate: ``evaluate(draw, downstream="draw", differentiable=False)`` reruns the programs with this site's draw
            replaced: every tensor of ``draw`` has an additional leftmost dimension over A alternatives. Upstream sites
            keep their draws, and so does noise outside sample statements (dropout); later sites are drawn again
            (``"draw"``), drawn relaxed and reparameterized (``"soft"``), or set to their means (``"mean"``). Returns
            the costs, detached, ``(A, …)`` and otherwise broadcastable with ``cost``. With ``differentiable`` it
            returns the costs and their sum with each term counted once, to be differentiated with respect to the draw:
            all parameters are frozen.
        mean: ``mean(tensor)`` of a tensor shaped like ``cost``, over the whole batch: running statistics use it, since
            several processes may hold parts of the rows.
        drawn_twice: ``with drawn_twice(devices):`` restores the random state of the CPU and those CUDA devices on exit,
            so that the same draws follow.
        slope: the derivative of the sum of all costs with respect to the draws, each term counted once, shaped like
            ``value``; for estimators that set ``takes_slope``. It comes from the current run. Where the programs are
            not differentiable in the draw it is zero or incomplete; later draws are held fixed. Use it in control
            variates only: it may be wrong.
        joined: the plate dimensions whose elements a later site may combine, so that ``cost`` does not separate them:
            alternatives must then be evaluated one element at a time.
        find_joined: ``find_joined()`` is ``joined``, found when it is first asked for.
        find_slope: ``find_slope()`` is ``slope``; None for estimators that do not set ``takes_slope``.

    docs/extending.md has an estimator that reads one.
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

        ``trailing`` is the number of dimensions that only the parameter has (1 for the logits of a Categorical).
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
        """Sum over the event dimensions of a tensor shaped like ``value``, and over plates that ``cost`` has summed."""
        tensor = tensor.sum(list(range(-self.event_dim, 0))) if self.event_dim else tensor
        mixed = [dim for dim in range(self.particle_dim + 1, 0) if self.cost.shape[dim] == 1 < tensor.shape[dim]]
        return tensor.sum(mixed, keepdim=True) if mixed else tensor


class SiteState(nn.Module):
    """The state of an estimator at one site between calls, for states with more than tensors.

    Everything that results depend on is in parameters and buffers, which checkpoints store and captured graphs update;
    any ``nn.Module`` serves for that. A subclass of this class may also count calls, or read values in some of them.

    Class attributes:
        uncaptured: plain attributes that change while the programs run and that no result depends on, such as counters:
            a captured graph ignores their changes. Models, guides and their layers may have this attribute too.

    >>> class Probed(SiteState):
    ...     def looks_at_values(self, step):
    ...         return step < 3
    >>> Probed().looks_at_values(2), Probed().looks_at_values(3)
    (True, False)
    """

    uncaptured: ClassVar[frozenset[str]] = frozenset()

    def looks_at_values(self, step: int) -> bool:
        """Whether the call after ``step`` training steps reads values, and must run without a graph."""
        return False

    def continue_from(self, step: int) -> None:
        """Set the counters for ``step`` training steps, made by a graph or by an interrupted run."""

    def stop_looking(self) -> None:
        """Read no values: a graph is captured, and changes are undone afterwards."""


def pad_left(tensor: Tensor, dims: int) -> Tensor:
    """The tensor with at least ``dims`` dimensions, padded on the left."""
    return tensor.reshape((1,) * (dims - tensor.dim()) + tensor.shape) if tensor.dim() < dims else tensor


class Estimator(Checked):
    """A gradient estimator: how the gradient passes through a site.

    Class attributes:
        unbiased: whether E[gradient] is the exact gradient of the objective.
        min_particles: the smallest K that it supports.
        needs_relaxed_model: whether the model must accept relaxed values of discrete sites.
        objectives: the objectives that it supports.
        log_q: how −log q of the site enters the differentiable objective: ``"full"``; ``"value"`` (only its value: its
            direct gradient has expectation zero); ``"path"`` (differentiated through values only).
        has_path: whether draws come from the distribution's own ``rsample``, which may leave a score term.
        enumerates: whether the site is summed over rather than drawn.
        reruns: whether ``surrogate`` calls ``view.evaluate`` with several alternatives, for which programs must accept
            additional leading dimensions.
        takes_slope: whether ``surrogate`` reads ``view.slope``; ``draw`` then returns a leaf that requires a gradient.
        runs_again: whether a gradient needs further runs of the programs (``view.evaluate``, ``log_q = "path"``).
        together: whether all sites must take this estimator if one does.
        lazy_parameters: whether the state has parameters whose shapes depend on the data.

    docs/extending.md has an example of a subclass.

    >>> import pyro.distributions as dist
    >>> estimators["pathwise"]().why_not({"name": "z", "fn": dist.Bernoulli(0.5)})
    'Bernoulli has no reparameterized sampler (rsample)'
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
        """The word for this configuration, or the class name if no word matches."""
        for word, make in estimators.items():
            if repr(make()) == repr(self):
                return word
        return type(self).__name__

    def __repr__(self) -> str:
        return with_options(self)

    @property
    def runs_again(self) -> bool:
        """Whether a gradient needs further runs of the programs, which must then repeat their own noise."""
        again = type(self).surrogate is not Estimator.surrogate and not self.takes_slope
        return again or self.log_q == "path" or self.together

    def evaluations(self, num_particles: int = 1, num_sites: int = 1) -> int:
        """Model runs per gradient."""
        return num_particles

    def objective_name(self) -> str:
        """The name of the surrogate's value when a site takes this estimator under ``elbo``."""
        return "elbo"

    def why_not(self, site: Mapping[str, Any]) -> str | None:
        """Why a site (a Pyro message with ``name`` and ``fn``) is not supported, or None if it is."""
        return None

    def refusal(self, site: Mapping[str, Any]) -> Refusal | None:
        """:meth:`why_not` with the site's and the estimator's name."""
        reason = self.why_not(site)
        return None if reason is None else Refusal(reason, site.get("name", ""), self.name)

    def supports(self, site: Mapping[str, Any]) -> bool:
        """Whether a site is supported."""
        return self.why_not(site) is None

    def make_state(self, site: Mapping[str, Any], inputs: Callable[[], list[Tensor]]) -> nn.Module | None:
        """The module with this estimator's state for one site, possibly a :class:`SiteState`.

        ``inputs`` is that of :class:`SiteView` for one particle, which gives the number of features.
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
        """A tensor shaped like ``view.log_prob`` whose gradient is this site's part of the gradient, or None."""
        return None


class Chooser(Estimator):
    """A word that selects other estimators: before a site is drawn, the selected estimator takes its place.

    A loss calls ``choose`` once for all of its sites with this word; it returns a word for each site.
    """

    lazy_parameters = True  # the selected estimator may have some
    objectives = frozenset()
    batches: int = 1  # the number of first batches that ``fit`` passes
    again: Sequence[int] = ()  # the training steps before which ``fit`` selects again

    def why_not(self, site: Mapping[str, Any]) -> str | None:
        return "it is chosen for a loss, and not by a site's own mark: name it in SiteELBO, as in {'z': 'auto'}"

    def choose(self, loss: Any, model: Callable, guide: Callable, batches: Any) -> Any:
        """The selection: an object whose ``words`` map the sites to words.

        Args:
            loss: the :class:`SiteELBO` that names this word.
            model, guide: the programs.
            batches: pairs of arguments and keywords that they are called with.
        """
        raise BadInput(f"{type(self).__name__} does not choose")

    def announce(self, choice: Any) -> None:
        """Print the selection."""

    def recall(self, found: Mapping[str, Any]) -> Any:
        """The selection, restored from its ``as_dict()``."""
        raise BadInput(f"{type(self).__name__} recalls no choice")


# Words that select other estimators.
choosers: dict[str, Callable[..., Chooser]] = {}


def detached_draw(fn: Any, args: tuple = (), kwargs: Mapping[str, Any] | None = None) -> Draw:
    """A draw without gradients, also from distributions with ``rsample``.

    Args:
        fn: the distribution of the site.
        args: positional arguments of ``fn.sample``, as ``Estimator.draw`` receives them.
        kwargs: keywords of ``fn.sample``; None has none.

    Returns:
        The draw, whose value ``(*batch, *event)`` requires no gradient.

    Raises:
        NotImplementedError: a distribution without a sampler.

    >>> import torch
    >>> from pyro.distributions import Normal
    >>> detached_draw(Normal(torch.zeros(3, requires_grad=True), 1.0)).value.requires_grad
    False
    """
    find_probs_once(fn)
    # Not under no_grad: some laws keep numbers that their draw computes, such as a GaussianHMM's factors, and read them
    # again in log_prob, which would have no gradient then.
    draw = fn if samples_by_path(fn) else fn.sample
    value = draw(*args, **(kwargs or {})).detach()
    clear_caches(fn)
    return Draw(value)


def sloping_draw(fn: Any, args: tuple = (), kwargs: Mapping[str, Any] | None = None) -> Draw:
    """A draw without gradients of parameters, as a leaf with respect to which costs can be differentiated."""
    return detached_draw(fn, args, kwargs).map(lambda value: value.clone().requires_grad_())


def score_why_not(site: Mapping[str, Any]) -> str | None:
    """Why the score-function family does not support a site, or None.

    A score needs draws of the law of its log-density, and a support that does not move with the parameters.

    Args:
        site: a Pyro message, of which ``fn`` is read: the distribution of the site.

    Returns:
        The reason, as a phrase; None if the site is supported.

    Raises:
        KeyError: a mapping without ``fn``.

    >>> import torch
    >>> from pyro.distributions import Bernoulli, Uniform
    >>> score_why_not({"fn": Uniform(0.0, torch.tensor(1.0, requires_grad=True))})
    'the support of Uniform depends on parameters, which a score cannot see'
    >>> score_why_not({"fn": Bernoulli(0.5)}) is None
    True
    """
    fn = site["fn"]
    if not hasattr(fn, "log_prob"):
        return "it has no log_prob"
    if support_moves(fn):
        return f"the support of {describe(fn)} depends on parameters, which a score cannot see"
    return why_other_draws(fn)


def at_step(value: float | Schedule, step: Any) -> Any:
    """A number, or the schedule's value at this step; a tensor during graph capture, which serves all steps."""
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
