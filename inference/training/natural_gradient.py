"""Natural gradients: the Fisher matrix as the Hessian of a KL, by matrix-vector products and conjugate gradients."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence

import pyro.poutine as poutine
import torch
from pyro.poutine.util import site_is_subsample
from torch import Tensor
from torch.distributions import Distribution, kl_divergence

from ...errors import BadInput
from ..engine.rows import arguments_of
from ..engine.scopes import private_store

Distributions = Callable[[], "Distribution | Sequence[Distribution]"]


def fisher_product(distributions: Distributions, parameters: Sequence[Tensor]) -> Callable[[Tensor], Tensor]:
    r"""The map :math:`v \mapsto G v` with the Fisher matrix G of ``distributions()`` at the current parameters.

    :math:`G = \nabla^2_\theta\, \mathrm{KL}(p_{\theta_{old}} \| p_\theta)` at θ = θ_old. ``distributions`` computes a
    torch or Pyro distribution (or several) from ``parameters``; KLs are summed over its batch. A vector is flat: the
    parameters are concatenated. A product costs one backward pass.

    Raises BadInput for distributions without a registered KL, and for a parameter that the distributions do not use.

    >>> loc, log_scale = torch.zeros(1, requires_grad=True), torch.ones(1, requires_grad=True)
    >>> normal = lambda: torch.distributions.Normal(loc, log_scale.exp())
    >>> product = fisher_product(normal, [loc, log_scale])
    >>> product(torch.tensor([1.0, 1.0]))  # 1 / scale², and 2 for the logarithm of the scale
    tensor([0.1353, 2.0000])
    """
    with torch.enable_grad():
        found = distributions()
        new = [found] if isinstance(found, Distribution) else list(found)
        divergence = _divergence([_detached(fn) for fn in new], new)
        if not divergence.requires_grad:
            raise BadInput("the distributions depend on none of the parameters, so that there is no Fisher matrix")
        slopes = torch.autograd.grad(divergence, parameters, create_graph=True, allow_unused=True)
    for place, (slope, parameter) in enumerate(zip(slopes, parameters, strict=True)):
        if slope is None or not slope.requires_grad:
            raise BadInput(
                f"parameter {place} of shape {tuple(parameter.shape)} does not move the distributions, so that the "
                "Fisher matrix is singular: give it to another optimizer"
            )
    flat = _flat(slopes)

    def product(vector: Tensor) -> Tensor:
        found = torch.autograd.grad(flat @ vector, parameters, retain_graph=True, allow_unused=True)
        return _flat([torch.zeros_like(p) if f is None else f for f, p in zip(found, parameters, strict=True)])

    return product


def conjugate_gradients(
    product: Callable[[Tensor], Tensor], target: Tensor, *, iterations: int = 20, tolerance: float = 1e-10
) -> Tensor:
    """Solve A x = ``target`` for x, with a symmetric positive definite A given as ``product(v) = A v``.

    Stops after ``iterations`` products, or when the norm of the residual is ``tolerance`` times that of the target;
    exact, up to rounding, after as many products as A has distinct eigenvalues. Hestenes & Stiefel 1952.

    >>> matrix = torch.tensor([[2.0, 1.0], [1.0, 3.0]])
    >>> conjugate_gradients(matrix.mv, torch.tensor([3.0, 4.0]))
    tensor([1.0000, 1.0000])
    """
    solution = torch.zeros_like(target)
    residual, direction = target.clone(), target.clone()
    squared = residual @ residual
    goal = tolerance**2 * squared
    for _ in range(iterations):
        if squared <= goal:
            break
        moved = product(direction)
        curvature = direction @ moved
        if not curvature > 0:
            break  # the residual is below rounding error
        length = squared / curvature
        solution = solution + length * direction
        residual = residual - length * moved
        before, squared = squared, residual @ residual
        direction = residual + squared / before * direction
    return solution


def guide_distributions(guide: Callable, args: object) -> Distributions:
    """The distributions of a guide's latent sites for one batch, as a function of the parameters alone.

    The guide runs once; later calls replay its draws, so that a site that depends on other sites stays a function of
    the parameters. The draws of earlier sites make the Fisher matrix of a dependent guide an estimate, over the rows of
    the batch.

    >>> from gumbo.guides import NormalGuide
    >>> from gumbo.models import GaussianVAE
    >>> guide = NormalGuide(GaussianVAE((1, 4, 4), latent_dim=2, hidden=(8,)))
    >>> [tuple(fn.batch_shape) for fn in guide_distributions(guide, torch.zeros(5, 1, 4, 4))()]
    [(5,)]
    """
    positional, keywords = arguments_of(args)
    with torch.no_grad(), private_store(guide):
        drawn = poutine.trace(guide).get_trace(*positional, **keywords)
    for site in drawn.nodes.values():
        if site["type"] == "sample" and isinstance(site["value"], Tensor):
            site["value"] = site["value"].detach()

    def distributions() -> list[Distribution]:
        with private_store(guide):
            trace = poutine.trace(poutine.replay(guide, trace=drawn)).get_trace(*positional, **keywords)
        return [
            site["fn"]
            for site in trace.nodes.values()
            if site["type"] == "sample" and not site["is_observed"] and not site_is_subsample(site)
        ]

    return distributions


class NaturalGradient(torch.optim.Optimizer):
    r"""An optimizer whose step is :math:`-\text{lr}\,(G + \text{damping}\, I)^{-1} \nabla`.

    G is the Fisher matrix of what ``distributions`` returns (see `fisher_product`): a model's likelihood on the batch,
    or the sites of a guide (`guide_distributions`). Call ``loss.backward()``, then ``step(distributions)``. The loss
    and the KL need the same scale: a sum over the same batch, as for every ELBO.

    Args:
        parameters: the tensors to optimize.
        lr: the factor of the step.
        damping: added to the diagonal of G.
        iterations: the maximal number of conjugate-gradient products.
        max_kl: nats; a step is shortened until :math:`\tfrac12 s^\top G s`, its KL to second order, is at most this
            (a trust region). None sets no limit.

    Raises:
        BadInput: settings out of range, and what `fisher_product` refuses.

    Amari 1998, "Natural gradient works efficiently in learning"; Martens 2010, "Deep learning via Hessian-free
    optimization"; Schulman et al. 2015, arXiv:1502.05477, for the trust region.

    >>> loc, raw = torch.tensor([3.0], requires_grad=True), torch.tensor([1.0], requires_grad=True)
    >>> q = lambda: torch.distributions.Normal(loc, raw.exp())
    >>> optimizer = NaturalGradient([loc, raw])
    >>> for _ in range(5):
    ...     optimizer.zero_grad()
    ...     kl_divergence(q(), torch.distributions.Normal(0.0, 2.0)).sum().backward()
    ...     optimizer.step(q)
    >>> bool(loc.abs() < 1e-2), bool((raw.exp() - 2.0).abs() < 1e-2)
    (True, True)
    """

    def __init__(
        self,
        parameters: Iterable[Tensor],
        lr: float = 1.0,
        *,
        damping: float = 1e-4,
        iterations: int = 20,
        max_kl: float | None = None,
    ):
        for name, value, fine in (
            ("lr", lr, lr > 0),
            ("damping", damping, damping >= 0),
            ("iterations", iterations, iterations >= 1),
            ("max_kl", max_kl, max_kl is None or max_kl > 0),
        ):
            if not fine:
                raise BadInput(f"NaturalGradient: {name} is {value}, which is out of range")
        self.damping, self.iterations, self.max_kl = damping, iterations, max_kl
        super().__init__(parameters, {"lr": lr})

    def step(self, distributions: Distributions) -> None:  # type: ignore[override]
        """One step from the current gradients."""
        pairs = [(p, group["lr"]) for group in self.param_groups for p in group["params"] if p.grad is not None]
        if not pairs:
            raise BadInput("NaturalGradient: no parameter has a gradient; call loss.backward() before step")
        parameters = [parameter for parameter, _ in pairs]
        fisher = fisher_product(distributions, parameters)
        gradient = _flat([parameter.grad for parameter in parameters])
        direction = conjugate_gradients(lambda v: fisher(v) + self.damping * v, gradient, iterations=self.iterations)
        rates = torch.cat([direction.new_full((parameter.numel(),), lr) for parameter, lr in pairs])
        change = rates * direction
        if self.max_kl is not None:
            divergence = 0.5 * change @ fisher(change)
            change = change * (self.max_kl / divergence.clamp(min=self.max_kl)).sqrt()
        with torch.no_grad():
            for parameter, part in zip(parameters, change.split([p.numel() for p in parameters]), strict=True):
                parameter -= part.view_as(parameter)


def _detached(thing):
    """A distribution with all its tensors detached: θ_old."""
    if isinstance(thing, Tensor):
        return thing.detach()
    if isinstance(thing, Distribution):
        twin = copy.copy(thing)
        twin.__dict__ = {name: _detached(part) for name, part in vars(thing).items()}
        return twin
    return thing


def _divergence(old: Sequence[Distribution], new: Sequence[Distribution]) -> Tensor:
    total: Tensor | float = 0.0
    for before, after in zip(old, new, strict=True):
        try:
            total = total + kl_divergence(before, after).sum()
        except NotImplementedError:
            raise BadInput(
                f"torch has no KL for {type(before).__name__}: natural gradients need one (register_kl adds it)"
            ) from None
    if not isinstance(total, Tensor):
        raise BadInput("there are no distributions, so that there is no Fisher matrix")
    return total


def _flat(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([tensor.reshape(-1) for tensor in tensors])


__all__ = ["NaturalGradient", "conjugate_gradients", "fisher_product", "guide_distributions"]
