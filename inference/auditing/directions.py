"""Fixed directions in gradient space, along which mean gradients are also compared."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

RANDOM = 4  # random directions of each parameter


class Directions:
    """Unit directions: the reference gradient's, in total and per parameter, and random signs per parameter.

    A component along a direction sums the biases of many elements, and is nonzero in most draws even where single
    elements are nonzero in few. ``parameters`` maps each group of components to its parameter; the group
    ``"(gradient)"``, along the whole reference gradient, has none.

    >>> gradient = {"a": torch.tensor([3.0, 4.0]).double(), "b": torch.zeros(1).double()}
    >>> directions = Directions(gradient)
    >>> found = directions.project(gradient)
    >>> [(group, len(components)) for group, components in found.items()], found["(gradient)"].item()
    ([('a (directions)', 5), ('b (directions)', 1), ('(gradient)', 1)], 5.0)
    """

    WHOLE = "(gradient)"

    def __init__(self, gradient: Mapping[str, Tensor]):
        generator = torch.Generator().manual_seed(0)
        self.along: dict[str, Tensor] = {}
        self.randoms: dict[str, int] = {}
        self.parameters: dict[str, str | None] = {}
        self.size = sum(part.numel() for part in gradient.values())
        for name, part in gradient.items():
            part = part.double()
            size, norm = part.numel(), part.norm()
            # A single element has only one direction.
            count = RANDOM if size > 1 else int(norm == 0) if size else 0
            signs = torch.randint(2, (count, size), generator=generator).to(part) * 2 - 1
            own = part[None] / norm if norm > 0 else part.new_zeros(0, size)
            self.along[name] = torch.cat([own, signs / math.sqrt(max(size, 1))])
            self.randoms[name] = count
            self.parameters[f"{name} (directions)"] = name
        norm = math.sqrt(sum(part.double().square().sum().item() for part in gradient.values()))
        self.whole = {name: part.double() / norm for name, part in gradient.items()} if norm > 0 else None
        if self.whole is not None:
            self.parameters[self.WHOLE] = None

    @property
    def groups(self) -> dict[str, int]:
        """The number of components by group."""
        return {group: 1 if name is None else len(self.along[name]) for group, name in self.parameters.items()}

    def random(self, group: str) -> int:
        """The number of random directions of a parameter, which are the last ones."""
        name = self.parameters[group]
        return 0 if name is None else self.randoms[name]

    def elements(self, group: str) -> int:
        """The number of gradient elements in a component of the group."""
        name = self.parameters[group]
        return self.size if name is None else self.along[name].shape[1]

    def project(self, gradient: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The components of a gradient by group."""
        found = {}
        for group, name in self.parameters.items():
            if name is not None:
                found[group] = self.along[name] @ gradient[name]
            else:
                assert self.whole is not None
                found[group] = sum(part @ gradient[key] for key, part in self.whole.items()).reshape(1)  # type: ignore[union-attr]
        return found
