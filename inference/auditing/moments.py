"""Draws of a loss's gradient at fixed parameters, and their moments."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from pyro.infer import ELBO

from ...errors import BadInput
from ..engine.looks import pair_of_traces
from ..engine.rows import arguments_of
from ..engine.scopes import Aside, modes_kept, modules_of, owned_parameters, private_seed
from ..stock import is_differentiable
from .directions import Directions

Gradient = dict[str, torch.Tensor]  # by parameter, flat, in float64


@dataclass(frozen=True)
class Central:
    """Mean and central moments of a gradient over ``count`` draws, element by element."""

    mean: torch.Tensor
    variance: torch.Tensor
    third: torch.Tensor
    fourth: torch.Tensor
    count: int
    precision: float  # relative; smaller changes are rounding errors of reordered sums


class Moments:
    """Means and central moments of draws of a gradient, in float64, with one draw in memory at a time.

    Updated draw by draw (Welford 1962; Pébay 2008 for the third and fourth). With ``directions`` the moments of the
    draws' components along them are included, under the names of their groups.

    Args:
        parameters: a tensor for each parameter, with the size and dtype of its gradient.
        directions: see :class:`~.directions.Directions`.
    """

    def __init__(self, parameters: Mapping[str, torch.Tensor], directions: Directions | None = None):
        self.directions = directions
        self.groups = {name: leaf.numel() for name, leaf in parameters.items()}
        # Twice the rounding error of a reordered sum.
        self.precision = {name: 8 * torch.finfo(leaf.dtype).eps for name, leaf in parameters.items()}
        if directions is not None:
            coarsest = max(self.precision.values(), default=0.0)
            for group, size in directions.groups.items():
                self.groups[group] = size
                self.precision[group] = coarsest * math.sqrt(directions.elements(group))
        self.count, self.bad, self.loss = 0, 0, 0.0
        self.mean = self.second = self.third = self.fourth = torch.zeros(())

    def add(self, gradient: Mapping[str, torch.Tensor], loss: float = 0.0) -> None:
        """Add a draw; one that is not finite is only counted as bad."""
        if self.directions is not None:
            gradient = {**gradient, **self.directions.project(gradient)}
        draw = torch.cat([gradient[name] for name in self.groups])
        if not torch.isfinite(draw).all():
            self.bad += 1
            return
        if not self.count:
            self.mean, self.second, self.third, self.fourth = (torch.zeros_like(draw) for _ in range(4))
        self.loss += loss
        self.count += 1
        n = self.count
        step = draw - self.mean
        share = step / n
        self.mean = self.mean + share
        square = step * (draw - self.mean)
        self.fourth += square * share**2 * (n**2 - 3 * n + 3) + 6 * share**2 * self.second - 4 * share * self.third
        self.third += square * share * (n - 2) - 3 * share * self.second
        self.second += square

    def central(self) -> dict[str, Central]:
        """Moments by parameter, and by group of directions; variation within rounding error is set to zero."""
        assert self.count
        moments = (
            self.mean,
            self.second / max(self.count - 1, 1),
            self.third / self.count,
            (self.fourth / self.count).clamp(min=0.0),
        )
        parts = zip(*(moment.split(list(self.groups.values())) for moment in moments), strict=True)
        found = {}
        for name, (mean, *higher) in zip(self.groups, parts, strict=True):
            precision = self.precision[name]
            digits = precision * mean.abs().max() if mean.numel() else 0.0
            still = higher[0] <= digits**2
            found[name] = Central(mean, *(moment.masked_fill(still, 0.0) for moment in higher), self.count, precision)
        return found


@dataclass(frozen=True)
class GradientMoments:
    """Mean and variance of a gradient over repeated draws at fixed parameters, in nats (a sum over the batch).

    ``mean``, ``variance`` and ``error`` (the standard error of the mean) map each parameter to a flat float64 tensor.
    """

    mean: Mapping[str, torch.Tensor]
    variance: Mapping[str, torch.Tensor]
    num_samples: int

    @property
    def error(self) -> dict[str, torch.Tensor]:
        return {name: (value / self.num_samples).sqrt() for name, value in self.variance.items()}

    @property
    def total_variance(self) -> float:
        """The trace of the gradient's covariance, over all parameters."""
        return sum(value.sum().item() for value in self.variance.values())

    @property
    def mean_norm(self) -> float:
        """The norm of the mean gradient, without the contribution of the mean's sampling error (at least 0)."""
        squared = sum(value.square().sum().item() for value in self.mean.values())
        return max(squared - self.total_variance / self.num_samples, 0.0) ** 0.5

    @property
    def signal_to_noise(self) -> float:
        """The norm of the mean gradient over the root of the total variance (infinite for an exact gradient)."""
        noise = self.total_variance**0.5
        return self.mean_norm / noise if noise > 0 else float("inf")


def gradient_moments(
    model: Callable,
    guide: Callable,
    loss: ELBO | torch.nn.Module,
    args: object,
    *,
    num_samples: int = 100,
    seed: int | None = 0,
    burn_in: int = 0,
    which: str = "guide",
) -> GradientMoments:
    """Moments of the gradient of ``loss`` over ``num_samples`` draws at fixed parameters; see :func:`gradient_draws`.

    Sums are in float64, with one draw in memory at a time. A draw that is not finite makes the moments NaN.

    >>> import pyro, pyro.distributions as dist
    >>> from pyro.infer import Trace_ELBO
    >>> class Guide(pyro.nn.PyroModule):
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.loc = torch.nn.Parameter(torch.tensor(0.0))
    ...     def forward(self):
    ...         pyro.sample("z", dist.Normal(self.loc, 1.0))
    >>> def model():
    ...     pyro.sample("z", dist.Normal(0.0, 1.0))
    >>> moments = gradient_moments(model, Guide(), Trace_ELBO(), (), num_samples=50)
    >>> list(moments.mean), round(moments.total_variance, 1)  # the gradient of this draw is z itself, a standard Normal
    (['guide.loc'], 0.9)
    """
    if num_samples < 2:
        raise BadInput(f"num_samples is {num_samples}: a variance needs at least 2 draws")
    draws = gradient_draws(model, guide, loss, args, num_samples=num_samples, seed=seed, burn_in=burn_in, which=which)
    found: Moments | None = None
    for draw in draws:
        found = Moments(draw) if found is None else found
        found.add(draw)
    assert found is not None
    sizes = list(found.groups.values())
    unknown = math.nan if found.bad else 0.0  # the mean of the finite draws would be another quantity
    mean, variance = (
        dict(zip(found.groups, (moment + unknown).split(sizes), strict=True))
        for moment in (found.mean, found.second / (found.count - 1))
    )
    return GradientMoments(mean, variance, num_samples)


def gradient_draws(
    model: Callable,
    guide: Callable,
    loss: ELBO | torch.nn.Module,
    args: object,
    *,
    num_samples: int = 100,
    seed: int | None = 0,
    burn_in: int = 0,
    which: str = "guide",
) -> Iterator[dict[str, torch.Tensor]]:
    """Repeated draws of the gradient of ``loss`` on one batch: dicts from parameter to a flat float64 tensor, in nats.

    Args:
        model, guide: the programs.
        loss: an ELBO, or the module that an ELBO makes of the pair.
        args: one batch: a tensor, a tuple of arguments, or a mapping of keywords.
        num_samples: the number of draws.
        seed: the same seed gives the same draws.
        burn_in: draws that are made and dropped first, for losses whose baseline needs time to adapt. The baseline
            keeps changing afterwards, as in training; draws stay uncorrelated, since no gradient's mean depends on it.
        which: ``"guide"`` or ``"all"``; names are ``guide.…`` and ``model.…``, without the parameters of control
            variates.

    Parameters, ``.grad``, param store, seeds and the loss's own state are restored, also between two draws.

    Raises :class:`~gumbo.errors.BadInput` for an unknown ``which`` or a pair without parameters.
    """
    if which not in ("guide", "all"):
        raise BadInput(f'which is {which!r}: expected "guide" or "all"')
    if burn_in < 0 or num_samples < 1:
        raise BadInput(f"burn_in is {burn_in} and num_samples {num_samples}: expected at least 0 and 1")
    # The copy's baselines change and the caller's do not; the programs themselves are shared.
    loss = copy.deepcopy(loss, {id(program): program for program in modules_of(model, guide)})
    aside = Aside(seed, model, guide)
    positional, keywords = arguments_of(args)
    with aside.entered(), modes_kept(model, guide):
        backward = _backward(model, guide, loss, positional, keywords)
        parameters = parameters_of(model, guide, positional, keywords, which)
    for count in range(burn_in + num_samples):
        with aside.entered(), grads_aside(model, guide, parameters):
            backward()
            draw = {name: flat_gradient(parameter) for name, parameter in parameters.items()}
        if count >= burn_in:
            yield draw


def _backward(
    model: Callable, guide: Callable, loss: ELBO | torch.nn.Module, positional: tuple, keywords: dict
) -> Callable[[], None]:
    """A function that leaves one draw of the gradient in ``.grad``."""
    if isinstance(loss, ELBO):
        both_modules = len(modules_of(model, guide)) == 2
        if not (both_modules and is_differentiable(loss)):
            return lambda: loss.loss_and_grads(model, guide, *positional, **keywords)
        loss = loss(model, guide)
    if hasattr(loss, "initialize"):
        loss.initialize(*positional, **keywords)
    return lambda: loss(*positional, **keywords).backward()


def parameters_of(
    model: Callable, guide: Callable, positional: tuple, keywords: dict, which: str
) -> dict[str, torch.Tensor]:
    """The programs' leaf parameters: the modules' own, and those that runs request from the param store."""
    with torch.no_grad(), private_seed(None, model, guide):
        guide_trace, model_trace = pair_of_traces(model, guide, positional, keywords)
    named: dict[str, torch.Tensor] = dict(owned_parameters(model, guide))
    seen = {id(parameter) for parameter in named.values()}
    for prefix, trace in (("guide", guide_trace), ("model", model_trace)):
        for name, site in trace.nodes.items():
            if site["type"] != "param":
                continue
            value = site["value"]
            parameter = value.unconstrained() if hasattr(value, "unconstrained") else value
            if id(parameter) not in seen:
                seen.add(id(parameter))
                named[f"{prefix}.{name}"] = parameter
    chosen = {name: value for name, value in named.items() if which == "all" or name.startswith("guide.")}
    if not chosen:
        raise BadInput(f"the {'programs have' if which == 'all' else 'guide has'} no parameter: there is no gradient")
    return chosen


@contextmanager
def grads_aside(model: Callable, guide: Callable, parameters: Mapping[str, torch.Tensor]) -> Iterator[None]:
    """Clear every ``.grad`` inside, and restore it afterwards."""
    leaves = [*owned_parameters(model, guide).values(), *parameters.values()]
    kept = [(leaf, leaf.grad) for leaf in leaves]
    for leaf in leaves:
        leaf.grad = None
    try:
        yield
    finally:
        for leaf, grad in kept:
            leaf.grad = grad


def flat_gradient(parameter: torch.Tensor) -> torch.Tensor:
    if parameter.grad is None:
        return torch.zeros(parameter.numel(), dtype=torch.float64, device=parameter.device)
    return parameter.grad.detach().double().flatten()
