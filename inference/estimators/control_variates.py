"""REBAR and RELAX: score-function gradients with a control variate of the relaxed draw.

A discrete draw is b = H(z) with perturbed logits z, and z̃ is drawn from the distribution of z given b, both
reparameterized. For any smooth control variate c

    [f(b) − c(z̃)] ∇log q(b) + ∇c(z) − ∇c(z̃)

is unbiased; the parameters of c are trained to minimize its variance.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...errors import BadInput, UnsupportedSite
from ._base import Draw, Estimator, SiteState, SiteView, estimators
from ._distributions import is_one_hot, logits_of
from ._reruns import cost_between, loss_of_state, share_shape, slope, spread
from .relaxation import bounded_logits, conditional_scores, harden, noise, relaxable_why_not, squash
from .score import ask, features, update_moments, zero_network

DECAY = 0.9  # the weight of earlier steps in the running moments of the cost


class Variate(SiteState):
    """The state of a control variate at one site: its temperature, strength, network, and moments of the cost.

    ``calls`` counts the calls for the probes of discontinuities; the last probe is at call ``last_probe``.
    """

    last_probe = 64
    uncaptured = frozenset({"calls"})

    def __init__(
        self, like: Tensor, temperature: float, strength: float | None, net: nn.Module | None = None, width: int = 0
    ):
        super().__init__()
        self.width = width  # number of input features of the network
        options = {"dtype": like.dtype, "device": like.device}
        self.log_temperature = nn.Parameter(torch.tensor(math.log(temperature), **options))
        self.strength = None if strength is None else nn.Parameter(torch.tensor(float(strength), **options))
        self.net = net
        self.calls = 0
        self.register_buffer("mean", torch.zeros((), **options))
        self.register_buffer("offset", torch.zeros((), **options))
        self.register_buffer("variance", torch.ones((), **options))
        self.register_buffer("seen", torch.zeros((), **options))

    mean: Tensor
    offset: Tensor
    variance: Tensor
    seen: Tensor

    @property
    def probed(self) -> bool:
        """Whether the programs run at relaxed values, so that discontinuities matter."""
        return self.strength is not None

    def looks_at_values(self, step: int) -> bool:
        return self.probed and self.is_probe(step + 1)

    def is_probe(self, call: int) -> bool:
        """Calls 1, 2, 4, …, ``last_probe``."""
        return call <= self.last_probe and not call & (call - 1)

    def continue_from(self, step: int) -> None:
        self.calls = step

    def stop_looking(self) -> None:
        self.calls = self.last_probe

    def temperature(self) -> Tensor:
        return self.log_temperature.clamp(-20.0, 20.0).exp()

    def scale(self) -> Tensor:
        return self.variance.clamp(min=1e-12).sqrt()

    @torch.no_grad()
    def observe(self, cost: Tensor, control: Tensor, average: Callable[[Tensor], Tensor]) -> None:
        """Update running moments by a step: of the cost, and of the residual after the control variate."""
        # The first control variate has no estimate of the mean, so its residual is not used.
        self.offset.add_(torch.where(self.seen > 0, (1 - DECAY) * average(cost - control), 0.0))
        update_moments(self, cost, average, DECAY)


class ControlVariate(Estimator, ABC):
    """The common part of REBAR and RELAX: the coupled relaxed draws, the gradient, and the training of c."""

    log_q = "value"
    lazy_parameters = True

    def why_not(self, site: Mapping[str, Any]) -> str | None:
        return relaxable_why_not(site)

    def draw(self, fn: Any, step: int, args: tuple = (), kwargs: Mapping[str, Any] | None = None) -> Draw:
        one_hot = is_one_hot(fn)
        logits = bounded_logits(fn).detach()
        made_by, again = noise(logits, one_hot), noise(logits, one_hot)
        return Draw(harden(logits + made_by, one_hot), {"made_by": made_by, "again": again})

    @abstractmethod
    def control(self, view: SiteView, relaxed: Tensor) -> tuple[Tensor, Tensor]:
        """c at a relaxed value, up to a constant, and its sum with each term counted once."""

    def free(self, view: SiteView, logits: Tensor) -> Tensor:
        """z, the perturbed logits of the draw."""
        return logits + view.draw.extra["made_by"]

    def tied(self, view: SiteView, logits: Tensor) -> Tensor:
        """z̃, perturbed logits conditioned on the same draw."""
        return conditional_scores(logits, view.value, view.draw.extra["again"], is_one_hot(view.fns[0]))

    def gradient_terms(self, view: SiteView, logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """c(z̃), ∂c/∂z and ∂c/∂z̃, differentiable with respect to the parameters of c while these are trained."""
        one_hot = is_one_hot(view.fns[0])

        def at(scores: Tensor) -> tuple[Tensor, Tensor]:
            scores = spread(scores.detach(), view).clone().requires_grad_()
            state = view.state
            control, total = self.control(view, squash(scores, state.temperature(), one_hot))
            return state.mean + state.offset + control, slope(total, scores, create_graph=view.training)

        with same_noise_again(view):
            control, tied_slope = at(self.tied(view, logits))
        _, free_slope = at(self.free(view, logits))
        return control, free_slope, tied_slope

    def path(self, view: SiteView, logits: Tensor, free_slope: Tensor, tied_slope: Tensor) -> Tensor:
        """A term whose gradient passes ∇c(z) − ∇c(z̃) to the logits; its value is meaningless."""
        return free_slope * self.free(view, logits) - tied_slope * self.tied(view, logits)

    def surrogate(self, view: SiteView) -> Tensor | None:
        if not torch.is_grad_enabled():
            return None
        logits = view.parameter("logits").clamp(-1e4, 1e4)
        control, *slopes = self.gradient_terms(view, logits.detach())
        path = self.path(view, logits, *(tensor.detach() for tensor in slopes))
        shape = share_shape(view)
        share = (view.cost - control.detach()) * view.log_prob + view.sum_event(path).sum_to_size(shape)
        if not view.training:
            return share
        return share - self.variance_loss(view, logits, control, *slopes) / math.prod(shape)

    def variance_loss(
        self, view: SiteView, logits: Tensor, control: Tensor, free_slope: Tensor, tied_slope: Tensor
    ) -> Tensor:
        """A scalar whose gradient, for the parameters of c alone, is that of the squared gradient of the logits."""
        one_hot = is_one_hot(view.fns[0])
        leaf = spread(logits.detach(), view).clone().requires_grad_()
        own = leaf.log_softmax(-1) if one_hot else leaf
        log_prob = view.sum_event(own * view.value if one_hot else log_prob_of_coin(own, view.value))
        score = ((view.cost - control) * log_prob).sum()
        (gradient,) = torch.autograd.grad(
            score + self.path(view, own, free_slope, tied_slope).sum(), leaf, create_graph=True
        )
        # In units of the cost's standard deviation, so that one learning rate serves all problems; the first single
        # cost has none, and its size is used.
        state = view.state
        state.observe(view.cost, control.detach(), view.mean)
        unit = torch.where(state.variance > 0, state.scale(), view.mean(view.cost.square()).sqrt()).clamp(min=1e-6)
        return loss_of_state(view, (gradient / unit).square().sum())


def log_prob_of_coin(logits: Tensor, value: Tensor) -> Tensor:
    logits, value = torch.broadcast_tensors(logits, value)
    return -F.binary_cross_entropy_with_logits(logits, value, reduction="none")


@contextmanager
def same_noise_again(view: SiteView) -> Iterator[None]:
    """Draws inside are repeated after exit: c(z̃) and c(z) share the downstream noise, which correlates them."""
    devices = [view.value.device.index or 0] if view.value.device.type == "cuda" else []
    with view.drawn_twice(devices):
        yield


def relaxed_cost(view: SiteView, estimator: Estimator, relaxed: Tensor) -> tuple[Tensor, Tensor]:
    """REBAR's term: η times the cost at a relaxed value, minus a constant, the mean cost of draws."""
    costs, total = cost_between(view, estimator, relaxed, downstream="soft")
    return view.state.strength * (costs - view.state.mean), view.state.strength * total


class Rebar(ControlVariate):
    """The score function with the relaxed program as a control variate (Tucker et al. 2017, arXiv 1703.07370).

    c(z) is η times the cost of σ(z/τ), from a rerun in which all downstream sites are relaxed too and the log pmf is
    extended linearly, plus a running average of the cost's residual. η (``strength``) and τ (``temperature``) are
    learnt from these initial values, one pair per site. The model must accept relaxed values and be continuous in them:
    a branch on them, or a conversion out of torch, biases the gradient. The first steps check this.

    Args:
        temperature: the initial τ, which is learnt.
        strength: the initial η, which is learnt.

    Raises:
        UnsupportedSite: at the first gradient, if the programs do not accept relaxed values, or are discontinuous.

    >>> Rebar().unbiased, Rebar().evaluations(num_particles=1, num_sites=2)
    (True, 5)
    """

    needs_relaxed_model = True
    _ranges = {"strength": -math.inf}

    def __init__(self, temperature: float = 0.5, strength: float = 1.0):
        self.temperature, self.strength = positive(temperature), float(strength)

    def evaluations(self, num_particles: int = 1, num_sites: int = 1) -> int:
        return num_particles * (1 + 2 * num_sites)

    def make_state(self, site: Mapping[str, Any], inputs: Callable[[], list[Tensor]]) -> nn.Module:
        return Variate(logits_of(site["fn"]), self.temperature, self.strength)

    def control(self, view: SiteView, relaxed: Tensor) -> tuple[Tensor, Tensor]:
        return relaxed_cost(view, self, relaxed)

    def surrogate(self, view: SiteView) -> Tensor | None:
        if torch.is_grad_enabled():
            check_continuous(view, self)
        return super().surrogate(view)


class Relax(ControlVariate):
    """The score function with a network as its control variate (Grathwohl et al. 2018, arXiv 1711.00123).

    c(z) is a network of the relaxed draw σ(z/τ) and of upstream values: the program's arguments and earlier sites,
    element by element of the plates; a running average of the cost is added. The model runs once, without relaxed
    values.

    Args:
        net: a module from ``(…, features)`` to ``(…, 1)``, with the relaxed draw as the first features; None builds a
            perceptron with ``hidden`` units in the first run. A network serves one site: name several sites by a
            mapping, each with its own.
        inputs: selects its further inputs, ``inputs(list_of_tensors) -> list_of_tensors``; None takes all.
        hidden: units of the perceptron.
        temperature: the initial τ, which is learnt.
        rebar: also add REBAR's term, with its requirements on the model.

    >>> Relax().needs_relaxed_model, Relax(rebar=True).evaluations(num_particles=2)
    (False, 6)
    """

    def __init__(
        self,
        net: nn.Module | None = None,
        inputs: Callable[[list[Tensor]], Sequence[Tensor]] | None = None,
        hidden: int = 50,
        temperature: float = 0.5,
        rebar: bool = False,
    ):
        self.net, self.inputs, self.hidden = net, inputs, int(hidden)
        self.temperature, self.rebar = positive(temperature), bool(rebar)

    @property
    def needs_relaxed_model(self) -> bool:  # type: ignore[override]
        return self.rebar

    @property
    def runs_again(self) -> bool:
        return self.rebar

    def evaluations(self, num_particles: int = 1, num_sites: int = 1) -> int:
        return num_particles * (1 + 2 * num_sites * self.rebar)

    def make_state(self, site: Mapping[str, Any], inputs: Callable[[], list[Tensor]]) -> nn.Module:
        fn, net = site["fn"], self.net
        known = features(inputs(), self.inputs)
        width = math.prod(fn.event_shape) + known.shape[-1]
        net = zero_network(width, self.hidden, known.dtype) if net is None else net
        return Variate(logits_of(fn), self.temperature, 1.0 if self.rebar else None, net, width)

    def control(self, view: SiteView, relaxed: Tensor) -> tuple[Tensor, Tensor]:
        state = view.state
        known = features(view.inputs(), self.inputs).to(relaxed.dtype)
        flat = relaxed.flatten(-view.event_dim) if view.event_dim else relaxed.unsqueeze(-1)
        shape = torch.broadcast_shapes(flat.shape[:-1], known.shape[:-1])
        seen = torch.cat([flat.expand(*shape, -1), known.expand(*shape, -1)], dim=-1)
        dtype = next((p.dtype for p in state.net.parameters()), seen.dtype)
        said = ask(state.net, seen.to(dtype), state.width, view.name).squeeze(-1).to(view.cost.dtype)
        said = said * state.scale()
        # Where the cost is summed over a plate, so is c.
        control, total = said.sum_to_size(view.cost.shape), said.sum()
        if not self.rebar:
            return control, total
        costs, relaxed_total = relaxed_cost(view, self, relaxed)
        return control + costs, total + relaxed_total

    def surrogate(self, view: SiteView) -> Tensor | None:
        if self.rebar and torch.is_grad_enabled():
            check_continuous(view, self)
        return super().surrogate(view)


# Five Gauss-Legendre points, which integrate a polynomial of degree nine exactly.
NODES = (0.0469100770306680, 0.2307653449471585, 0.5, 0.7692346550528415, 0.9530899229693320)
WEIGHTS = (0.1184634425280945, 0.2393143352496832, 0.2844444444444444, 0.2393143352496832, 0.1184634425280945)
TOLERANCE = 3e-3  # of the integral of the derivative, as a share of how far the cost moves


@dataclass(frozen=True, order=True)
class Stretch:
    """An interval that is probed: the error of the integral of the derivative, and the variation of the cost."""

    error: float
    moved: float
    a: float
    b: float
    at_a: float
    at_b: float


def check_continuous(view: SiteView, estimator: Estimator) -> None:
    """Refuse programs whose relaxed cost is not the integral of its derivative: they jump, or lose the derivative.

    At calls 1, 2, 4, …, 64 the derivative is integrated on a straight line from the draw to another value of each
    element, and compared with the difference; the interval with the largest error is halved. At kinks and steep slopes
    the errors vanish after enough halvings. At a jump, or a lost derivative, the error of the halves stays that of the
    whole.
    """
    view.state.calls += 1
    if not view.state.is_probe(view.state.calls):
        return
    start = spread(view.value.detach(), view)
    step = spread(another_value(view), view) - start

    def cost(t: float, differentiate: bool = True) -> tuple[float, float]:
        at = torch.tensor(t, dtype=start.dtype, device=start.device, requires_grad=True)
        with same_noise_again(view):
            _, total = cost_between(view, estimator, start + at * step, downstream="soft")
        return total.item(), slope(total, at).item() if differentiate else 0.0

    def stretch(a: float, b: float, at_a: float, at_b: float) -> Stretch:
        slopes = [(b - a) * weight * cost(a + (b - a) * node)[1] for node, weight in zip(NODES, WEIGHTS, strict=True)]
        error = abs(math.fsum(slopes) - (at_b - at_a)) - 64 * coarsest_eps(start) * max(abs(at_a), abs(at_b))
        return Stretch(max(error, 0.0), math.fsum(map(abs, slopes)) + abs(at_b - at_a), a, b, at_a, at_b)

    def halve_worst(parts: list[Stretch]) -> None:
        worst = max(parts)
        parts.remove(worst)
        middle = (worst.a + worst.b) / 2
        at_middle = cost(middle, False)[0]
        parts += [
            stretch(worst.a, middle, worst.at_a, at_middle),
            stretch(middle, worst.b, at_middle, worst.at_b),
        ]

    parts = [stretch(0.0, 1.0, cost(0.0, False)[0], cost(1.0, False)[0])]
    for _ in range(8):
        for _ in range(16):
            error = off(parts)
            if not math.isfinite(error) or error <= TOLERANCE * sum(part.moved for part in parts):
                return
            halve_worst(parts)
        worst = max(parts)
        if lasts(worst, halve_worst, parts):
            raise UnsupportedSite(
                view.name,
                estimator.name,
                "the cost is not continuous and differentiable in relaxed values (the programs branch on a draw, round"
                " it, or take it out of torch), and its derivative is needed",
                ("score", "rloo", "relax"),
            )


def off(parts: Sequence[Stretch]) -> float:
    return math.fsum(part.error for part in parts)


def lasts(worst: Stretch, halve_worst: Callable[[list[Stretch]], None], parts: list[Stretch]) -> bool:
    """Whether the error of an interval persists when its worst part is halved repeatedly."""
    within = [worst]
    for _ in range(24):
        halve_worst(within)
        if not off(within) > worst.error / 2:
            parts.remove(worst)
            parts += within
            return False
    return True


def coarsest_eps(like: Tensor) -> float:
    kind = like.device.type
    lowered = torch.is_autocast_enabled(kind)
    return torch.finfo(torch.get_autocast_dtype(kind) if lowered else like.dtype).eps


def another_value(view: SiteView) -> Tensor:
    """For each element the most probable value other than the draw."""
    value = view.value.detach()
    if not is_one_hot(view.fns[0]):
        return 1 - value
    others = view.parameter("logits").detach().masked_fill(value > 0, -math.inf)
    other = torch.zeros_like(value).scatter_(-1, others.argmax(-1, keepdim=True), 1.0)
    return torch.where(others.isneginf().all(-1, keepdim=True), value, other)


def positive(temperature: float) -> float:
    if callable(temperature) or not float(temperature) > 0:
        raise BadInput(f"temperature is where a learnt one starts, a positive number; got {temperature!r}")
    return float(temperature)


estimators.register("rebar", Rebar)
estimators.register("relax", Relax)
