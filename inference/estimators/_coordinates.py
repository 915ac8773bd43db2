"""Changes of the cost when one coordinate of a draw changes and the others are kept."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ._base import Draw, SiteView

AT_ONCE = 64  # the most alternatives per run; bounds memory


def gains(view: SiteView, alternatives: Tensor, element_dim: int = 0) -> Tensor:
    """The change of the cost when one coordinate takes an alternative value and all others keep their draws.

    Coordinates are those of the event (the rightmost ``element_dim`` dimensions form one coordinate), and the elements
    of plates that a later site combines. Elements of other plates, and particles, are changed at the same time, since
    their costs are separate. Downstream sites are drawn again.

    Args:
        view: the site.
        alternatives: ``(J, *view.value.shape)``, J alternatives for each coordinate.
        element_dim: 1 for one-hot values, otherwise 0.

    Returns:
        ``(J, …, K, *plates, *coordinates)``.
    """
    value, coordinate_dim = view.value, view.event_dim - element_dim
    dims = [dim - view.event_dim for dim in view.joined] + list(range(-view.event_dim, -element_dim))
    sizes = [1] * value.dim()
    for dim in dims:
        sizes[dim] = value.shape[dim]
    number = torch.arange(math.prod(sizes), device=value.device).reshape(sizes)
    found: list[Tensor | None] = [None] * len(alternatives)
    tasks = [(j, cell) for cell in range(number.numel()) for j in range(len(alternatives))]
    for start in range(0, len(tasks), AT_ONCE):
        part = tasks[start : start + AT_ONCE]
        here = [number == cell for _, cell in part]
        changed = [torch.where(mask, alternatives[j], value) for mask, (j, _) in zip(here, part, strict=True)]
        change = view.evaluate(Draw(torch.stack(changed))) - view.cost
        change = change.reshape(change.shape + (1,) * coordinate_dim)
        for mask, gain, (j, _) in zip(here, change, part, strict=True):
            mask = mask.squeeze(-1) if element_dim else mask
            before = found[j] if found[j] is not None else torch.zeros_like(gain)
            found[j] = torch.where(mask, gain, before)
    return torch.stack(found)  # type: ignore[arg-type]
