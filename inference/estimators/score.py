"""Score-function gradients, and baselines that reduce their variance (Williams 1992)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ...errors import BadInput, UnsupportedSite
from ...options import Checked, with_options
from ._base import Draw, Estimator, SiteView, detached_draw, estimators, score_why_not


class Baseline(Checked):
    """A term that is subtracted from the cost of a draw and does not depend on that draw.

    A subclass defines ``__call__``, and ``make_state`` and ``loss`` where it learns something.

    >>> from gumbo.inference.estimators import ScoreFunction
    >>> class Fixed(Baseline):
    ...     def __init__(self, value: float = 1.0):
    ...         self.value = value
    ...     def __call__(self, view):
    ...         return self.value
    >>> ScoreFunction(baseline=Fixed(2.0))
    ScoreFunction(baseline=Fixed(value=2.0))
    """

    min_particles = 1
    lazy_parameters = False
    _ranges = {"decay": 0}

    def make_state(self, inputs: Callable[[], list[Tensor]]) -> nn.Module | None:
        """The module with the baseline's state at one site."""
        return None

    def __call__(self, view: SiteView) -> Tensor | float:
        """The baseline, broadcastable against ``view.cost``."""
        return 0.0

    def loss(self, view: SiteView, prediction: Tensor) -> Tensor | None:
        """The loss of the baseline's own parameters, if it has any; shaped like ``view.cost``."""
        return None

    def __repr__(self) -> str:
        return with_options(self)


class _Average(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.zeros((), dtype=torch.float64))
        self.register_buffer("weight", torch.zeros((), dtype=torch.float64))

    mean: Tensor
    weight: Tensor


def check_decay(owner: Any, decay: float) -> float:
    if not 0.0 <= decay < 1.0:
        raise BadInput(f"{type(owner).__name__}(decay=…) must lie in [0, 1), got {decay!r}")
    return float(decay)


class MovingAverage(Baseline):
    """A decaying average of earlier costs: one number per site, so that it serves any batch size.

    The average is corrected for its start at zero, and read before it is updated with the current costs.

    Args:
        decay: the weight of the earlier average, in [0, 1).

    >>> from gumbo.inference.estimators import ScoreFunction
    >>> ScoreFunction(baseline=MovingAverage()).name
    'score-average'
    """

    def __init__(self, decay: float = 0.9):
        self.decay = check_decay(self, decay)

    def make_state(self, inputs: Callable[[], list[Tensor]]) -> nn.Module:
        return _Average()

    def __call__(self, view: SiteView) -> Tensor:
        state = view.state
        baseline = (state.mean / state.weight.clamp(min=1e-12)).to(view.cost.dtype)
        if view.training:
            with torch.no_grad():
                state.mean.mul_(self.decay).add_((1 - self.decay) * view.mean(view.cost).to(state.mean.dtype))
                state.weight.mul_(self.decay).add_(1 - self.decay)
        return baseline


class LeaveOneOut(Baseline):
    """The mean cost of the other particles (Kool et al. 2019; under ``iwae``, VIMCO, Mnih & Rezende 2016).

    >>> from gumbo.inference.estimators import ScoreFunction
    >>> ScoreFunction(baseline=LeaveOneOut()).name
    'rloo'
    """

    min_particles = 2

    def __call__(self, view: SiteView) -> Tensor:
        if view.bound is not None:
            return view.bound.leave_one_out()
        cost, dim = view.cost, view.particle_dim
        if view.num_particles == 1:
            return torch.zeros_like(cost)  # no other particle has this site
        return (cost.sum(dim, keepdim=True) - cost) / (view.num_particles - 1)


class _Network(nn.Module):
    """A network for the baseline, and running moments of the cost that it predicts."""

    def __init__(self, net: nn.Module, decay: float, width: int):
        super().__init__()
        self.net, self.decay, self.width = net, decay, width
        self.register_buffer("mean", torch.zeros(()))
        self.register_buffer("variance", torch.ones(()))
        self.register_buffer("seen", torch.zeros(()))

    mean: Tensor
    variance: Tensor
    seen: Tensor

    def predict(self, x: Tensor, like: Tensor, name: str) -> Tensor:
        scale = self.variance.clamp(min=1e-12).sqrt()
        said = ask(self.net, x.to(next(self.net.parameters()).dtype), self.width, name)
        return self.mean.to(like.dtype) + scale.to(like.dtype) * said.squeeze(-1).to(like.dtype)


@torch.no_grad()
def update_moments(state: Any, cost: Tensor, average: Callable[[Tensor], Tensor], decay: float) -> None:
    """Update the running ``mean`` and ``variance`` of a state by the costs of a step; the first costs replace them.

    ``state.seen`` counts the updates. The variance is that within a step, and that of the steps' means.
    """
    mean = average(cost)
    variance = average((cost - mean).square()).to(state.mean.dtype)
    mean = mean.to(state.mean.dtype)
    keep = torch.where(state.seen > 0, decay, 0.0)
    moved = (mean - state.mean).square() * keep
    state.mean.mul_(keep).add_((1 - keep) * mean)
    state.variance.mul_(keep).add_((1 - keep) * (variance + moved))
    state.seen.add_(1)


def zero_network(inputs: int, hidden: int, dtype: torch.dtype) -> nn.Sequential:
    """A network ``(…, inputs) -> (…, 1)`` with one hidden layer, whose initial output is zero."""
    net = nn.Sequential(nn.Linear(inputs, hidden), nn.Tanh(), nn.Linear(hidden, 1)).to(dtype)
    nn.init.zeros_(net[-1].weight)
    nn.init.zeros_(net[-1].bias)
    return net


def features(inputs: list[Tensor], select: Callable[[list[Tensor]], Sequence[Tensor]] | None = None) -> Tensor:
    """Inputs, or those that ``select`` makes of them, concatenated along the last dimension."""
    inputs = inputs if select is None else list(select(inputs))
    shape = torch.broadcast_shapes(*(tensor.shape[:-1] for tensor in inputs))
    return torch.cat([tensor.detach().expand(*shape, tensor.shape[-1]) for tensor in inputs], dim=-1)


def ask(net: nn.Module, x: Tensor, width: int, name: str) -> Tensor:
    """The output of a network for features, of which it expects ``width``.

    Raises:
        UnsupportedSite: if the number of features differs.
    """
    try:
        return net(x)
    except RuntimeError as error:
        if x.shape[-1] == width:
            raise
        raise UnsupportedSite(
            name,
            reason=f"its network was made for {width} inputs and is given {x.shape[-1]}: the inputs before the site"
            " (arguments, upstream values) vary between runs; select constant ones by inputs=…, or give the"
            " estimator a network that takes any number",
            alternatives=("score", "score-average"),
        ) from error


class Neural(Baseline):
    """A network that predicts the cost from upstream values ("NVIL", Mnih & Gregor 2014, 1402.0030).

    Its inputs are the program's arguments and upstream values, element by element of the plates; its squared error
    trains only its own parameters.

    Args:
        net: a module from ``(…, features)`` to ``(…, 1)``; None builds a perceptron with ``hidden`` units in the first
            run. A network serves one site: name several sites by a mapping, each with its own.
        inputs: selects its inputs, ``inputs(list_of_tensors) -> list_of_tensors``; None takes all.
        hidden: units of the perceptron.
        decay: the weight of earlier steps in the running moments of the cost, in [0, 1).

    >>> from gumbo.inference.estimators import ScoreFunction
    >>> ScoreFunction(baseline=Neural()).name
    'nvil'
    """

    lazy_parameters = True

    def __init__(
        self,
        net: nn.Module | None = None,
        inputs: Callable[[list[Tensor]], Sequence[Tensor]] | None = None,
        hidden: int = 100,
        decay: float = 0.9,
    ):
        self.net, self.inputs, self.hidden, self.decay = net, inputs, int(hidden), check_decay(self, decay)

    def make_state(self, inputs: Callable[[], list[Tensor]]) -> nn.Module:
        x = features(inputs(), self.inputs)
        net = zero_network(x.shape[-1], self.hidden, x.dtype) if self.net is None else self.net
        return _Network(net, self.decay, x.shape[-1])

    def __call__(self, view: SiteView) -> Tensor:
        return view.state.predict(features(view.inputs(), self.inputs), view.cost, view.name)

    def loss(self, view: SiteView, prediction: Tensor) -> Tensor:
        if view.training:
            update_moments(view.state, view.cost, view.mean, view.state.decay)
        # In units of the cost's standard deviation, so that one learning rate serves all problems; the first single
        # cost has none, and its size is used.
        spread = view.state.variance
        unit = torch.where(spread > 0, spread, view.mean(view.cost.square()).to(spread.dtype))
        return (view.cost - prediction).square() / unit.clamp(min=1e-12).to(view.cost.dtype)


class ScoreFunction(Estimator):
    """REINFORCE: f(z) ∇ log q(z), minus a baseline; f need not be differentiable (Williams 1992).

    Args:
        baseline: a :class:`Baseline`, such as ``LeaveOneOut()``, ``MovingAverage()`` or ``Neural()``; None takes none.

    >>> from gumbo.inference.estimators import LeaveOneOut
    >>> ScoreFunction().name, ScoreFunction(baseline=LeaveOneOut()).name
    ('score', 'rloo')
    >>> ScoreFunction(baseline=LeaveOneOut()).min_particles
    2
    """

    objectives = frozenset({"elbo", "iwae"})

    def __init__(self, baseline: Baseline | None = None):
        if baseline is not None and not isinstance(baseline, Baseline):
            raise BadInput(
                f"ScoreFunction(baseline=…) takes MovingAverage(), Neural() or LeaveOneOut(), got {baseline!r}"
            )
        self.baseline = baseline

    log_q = "value"
    runs_again = False  # type: ignore[assignment]

    @property
    def min_particles(self) -> int:  # type: ignore[override]
        return self.baseline.min_particles if self.baseline else 1

    def why_not(self, site: Mapping[str, Any]) -> str | None:
        return score_why_not(site)

    @property
    def lazy_parameters(self) -> bool:  # type: ignore[override]
        return bool(self.baseline and self.baseline.lazy_parameters)

    def make_state(self, site: Mapping[str, Any], inputs: Callable[[], list[Tensor]]) -> nn.Module | None:
        return self.baseline.make_state(inputs) if self.baseline else None

    def draw(self, fn: Any, step: int, args: tuple = (), kwargs: Mapping[str, Any] | None = None) -> Draw:
        return detached_draw(fn, args, kwargs)

    def surrogate(self, view: SiteView) -> Tensor:
        if self.baseline is None:
            return view.cost * view.log_prob
        prediction = torch.as_tensor(self.baseline(view))
        surrogate = (view.cost - prediction.detach()) * view.log_prob
        loss = self.baseline.loss(view, prediction)
        return surrogate if loss is None else surrogate - loss


estimators.register("score", ScoreFunction)
estimators.register("score-average", lambda **options: ScoreFunction(baseline=MovingAverage(**options)))
estimators.register("nvil", lambda **options: ScoreFunction(baseline=Neural(**options)))
estimators.register("rloo", lambda: ScoreFunction(baseline=LeaveOneOut()))
