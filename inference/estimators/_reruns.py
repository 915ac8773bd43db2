"""The cost of a site as a differentiable function of a relaxed value."""

from __future__ import annotations

import torch
from torch import Tensor

from ...errors import CallsAutograd, UnsupportedSite, first_line
from ._base import Draw, Estimator, SiteView


def spread(tensor: Tensor, view: SiteView) -> Tensor:
    """A tensor shaped like ``view.value``, expanded over particles and enumerated values."""
    plates = -view.particle_dim - 1
    lead = tuple(view.cost.shape[: view.cost.dim() - plates]) + (1,) * plates
    batch = tensor.shape[: tensor.dim() - view.event_dim]
    return tensor.expand(torch.broadcast_shapes(batch, lead) + tensor.shape[tensor.dim() - view.event_dim :])


def share_shape(view: SiteView) -> torch.Size:
    """The shape of cost × log q."""
    return torch.broadcast_shapes(view.cost.shape, view.log_prob.shape)


def slope(total: Tensor, at: Tensor, create_graph: bool = False) -> Tensor:
    """The derivative of a sum; zero where it does not depend on ``at``."""
    if not total.requires_grad:
        return torch.zeros_like(at)
    (found,) = torch.autograd.grad(total, at, create_graph=create_graph, allow_unused=True)
    return torch.zeros_like(at) if found is None else found


def loss_of_state(view: SiteView, loss: Tensor) -> Tensor:
    """A scalar with the gradient of a loss for the parameters of the site's own state, and for nothing else."""
    parameters = [p for p in view.state.parameters() if p.requires_grad]
    found = torch.autograd.grad(loss, parameters, allow_unused=True) if loss.requires_grad and parameters else ()
    pairs = [(p, g) for p, g in zip(parameters, found, strict=False) if g is not None]
    return sum(((p * g).sum() for p, g in pairs), start=view.cost.new_zeros(()))


def cost_between(view: SiteView, estimator: Estimator, value: Tensor, downstream: str) -> tuple[Tensor, Tensor]:
    """The cost at a relaxed or mean value, element by element, and its sum with each term counted once.

    Raises:
        UnsupportedSite: if the programs do not accept such a value.
    """
    try:
        costs, total = view.evaluate(Draw(value[None]), downstream=downstream, differentiable=True)
    except CallsAutograd as error:
        raise UnsupportedSite(view.name, estimator, str(error), ("score", "rloo")) from error
    except (UnsupportedSite, torch.cuda.OutOfMemoryError):
        raise
    except (RuntimeError, ValueError, TypeError, IndexError) as error:
        first = first_line(error)
        raise UnsupportedSite(
            view.name,
            estimator.name,
            f"the programs do not accept relaxed values ({first})",
            ("score", "rloo", "relax"),
        ) from error
    return costs[0], total
