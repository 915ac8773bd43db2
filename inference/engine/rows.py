"""Data and batches as programs take them."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch

from ...errors import BadInput


class Rows:
    """Data as a program takes it: one tensor, a tuple of them, or a mapping of keywords; all share their first axis.

    >>> rows = Rows({"x": torch.zeros(3, 2), "y": torch.arange(3)})
    >>> len(rows), sorted(rows[torch.tensor([2, 0])].kwargs)
    (3, ['x', 'y'])
    """

    def __init__(self, data: object, what: str = "data"):
        self.args: tuple = ()
        self.kwargs: dict = {}
        if isinstance(data, Rows):
            self.args, self.kwargs = data.args, data.kwargs
        elif isinstance(data, Mapping):
            self.kwargs = dict(data)
        elif isinstance(data, (tuple, list)):
            self.args = tuple(data)
        else:
            self.args = (data,)
        named = [*enumerate(self.args), *self.kwargs.items()]
        for name, tensor in named:
            if not isinstance(tensor, torch.Tensor):
                raise BadInput(
                    f"{what}: argument {name!r} is {type(tensor).__name__}, expected a tensor of shape (N, …)"
                )
            if tensor.dim() == 0:
                raise BadInput(f"{what}: argument {name!r} is a scalar, expected a tensor of shape (N, …)")
        sizes = {tensor.shape[0] for _, tensor in named}
        if len(sizes) > 1:
            raise BadInput(f"{what}: the arguments have {sorted(sizes)} rows, expected one number of rows for all")
        self._length = sizes.pop() if sizes else 0

    def check(self, what: str) -> Rows:
        """Itself, once it is known to hold at least one row and no NaN or infinity."""
        if not len(self):
            raise BadInput(f"{what} is empty: expected at least one row")
        for name, tensor in [*enumerate(self.args), *self.kwargs.items()]:
            if tensor.is_floating_point() and not torch.isfinite(tensor).all():
                bad = int((~torch.isfinite(tensor)).flatten(1).any(1).sum()) if tensor.dim() > 1 else 1
                raise BadInput(
                    f"{what}: argument {name!r} holds NaN or infinity in {bad} of {len(self)} rows; mend them"
                )
        return self

    @property
    def data(self) -> object:
        """The rows in the form they were given in."""
        return self.kwargs or (self.args[0] if len(self.args) == 1 else self.args)

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index) -> Rows:
        return self._map(lambda tensor: tensor[index])

    def to(self, device: torch.device) -> Rows:
        return self._map(lambda tensor: tensor.to(device))

    def repeated(self, times: int) -> Rows:
        """Each row ``times`` times: all rows, then all rows again."""
        return self._map(lambda tensor: tensor.repeat(times, *[1] * (tensor.dim() - 1)))

    def _map(self, change: Callable[[torch.Tensor], torch.Tensor]) -> Rows:
        changed = Rows(())
        changed.args = tuple(change(tensor) for tensor in self.args)
        changed.kwargs = {name: change(tensor) for name, tensor in self.kwargs.items()}
        changed._length = next((len(tensor) for tensor in [*changed.args, *changed.kwargs.values()]), 0)
        return changed


def arguments_of(args: object) -> tuple[tuple, dict]:
    """``(args, kwargs)`` of one batch: a tensor, a tuple of arguments, or a mapping of keywords."""
    if isinstance(args, Rows):
        return args.args, args.kwargs
    if isinstance(args, Mapping):
        return (), dict(args)
    return (tuple(args) if isinstance(args, (tuple, list)) else (args,)), {}
