"""Mirror images of the guide's draws, and exchanged components, with nearly the draws' posterior density."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from .target import Target

# The number of images tried, the number kept, and the largest loss of log-density in nats.
_TRIED, _KEPT, _NATS = 64, 8, 8.0
# The drop of log-density, in nats, that separates two modes.
_VALLEY = 3.0


def images_of(target: Target, drawn: torch.Tensor) -> tuple[list[str], list[torch.Tensor]]:
    """Reflections and exchanges of the guide's draws with a similar log-density in some unit.

    The names are those of images in another mode than the draws.
    """
    some = drawn[:50]
    here = sum(target(some)).mean(0)
    kept: list[tuple[float, str, torch.Tensor]] = []
    tried = 0
    for name, image in _symmetries(target, drawn):
        tried += 1
        if tried > _TRIED or not target.sweep.vectorized and tried > 12:
            break
        if not bool(image.isfinite().all()):
            continue
        image = target.turned(image)
        there = sum(target(image[:50])).mean(0)
        less = float((here - there).min())
        # An image among the guide's own draws is not another mode.
        apart = (image.mean(0) - drawn.mean(0)).abs() / drawn.std(0).clamp(min=1e-12)
        if less < _NATS and float(apart.max()) > 1.0:
            between = sum(target((some + image[:50]) / 2)).mean(0)
            parted = bool((between < torch.minimum(here, there) - _VALLEY).any())
            kept.append((less, name if parted else "", image))
    kept.sort(key=lambda one: one[0])
    return [name for _, name, _ in kept[:_KEPT] if name], [image for _, _, image in kept[:_KEPT]]


def in_other_modes(target: Target, sample: torch.Tensor, drawn: torch.Tensor) -> torch.Tensor:
    """The fraction ``(units,)`` of ``sample`` ``(points, units, d)`` in another mode than the guide's nearest draw."""
    near = torch.empty_like(sample)
    for unit in range(sample.shape[1]):
        spread = drawn[:, unit].std(0).clamp(min=1e-12)
        away = ((sample[:, unit, None] - drawn[None, :, unit]) / spread).square().sum(-1)
        near[:, unit] = drawn[away.argmin(1), unit]
    ends = torch.minimum(sum(target(sample)), sum(target(near)))
    between = torch.stack([sum(target(near + share * (sample - near))) for share in (0.25, 0.5, 0.75)])
    return (between.amin(0) < ends - _VALLEY).double().mean(0)


def _symmetries(target: Target, drawn: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
    """Signs of all numbers, of a site's, of one number; exchanged rows of all sites with the same number of rows."""
    yield "all signs change", -drawn
    center = target.draw(200).median(0).values
    if float(center.abs().max()) > 0.2 * float((target.draw(200) - center).abs().mean()):
        yield "all is mirrored at the prior's centre", 2 * center - drawn
    start = 0
    spans = {}
    for name in target.sites:
        spans[name] = slice(start, start + target.sizes[name])
        start += target.sizes[name]
    if len(target.sites) > 1:
        for name, span in spans.items():
            image = drawn.clone()
            image[..., span] = -image[..., span]
            yield f"the signs of {name} change", image
    if target.dimension > 1:
        for place in range(target.dimension):
            image = drawn.clone()
            image[..., place] = -image[..., place]
            yield f"the sign of number {place} changes", image
    yield from _exchanges(target, drawn)


def _exchanges(target: Target, drawn: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
    """Exchange two components in every site with the same number of components, such as the labels of a mixture."""
    values = target.values(drawn)
    axes: dict[int, list[tuple[str, int]]] = {}
    for name in target.sites:
        layout = target.sweep.model_sites[name]
        offset = 1
        for place, (plate, size) in enumerate(zip(layout.names, layout.sizes, strict=True)):
            if plate not in target.plates and size > 1:
                axes.setdefault(size, []).append((name, offset + place))
        for place, size in enumerate(layout.event):
            if size > 1:
                axes.setdefault(size, []).append((name, offset + len(layout.names) + place))
    for size, where in axes.items():
        first: dict[str, int] = {}
        for name, axis in where:
            first.setdefault(name, axis)
        for one in range(size):
            for other in range(one + 1, size):
                order = torch.arange(size)
                order[[one, other]] = order[[other, one]]
                swapped = dict(values)
                for name, axis in first.items():
                    swapped[name] = swapped[name].index_select(axis, order.to(swapped[name].device))
                names = ", ".join(first)
                yield f"{one} and {other} of {names} change places", target.free(swapped).cpu().double()
