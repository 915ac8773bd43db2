"""NumPy arrays as tensors, and tables that have to be converted first."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import torch

from .errors import BadInput


def readable(value: Any, name: int | str, what: str = "data") -> Any:
    """An array of numbers as a tensor of the same type: over its memory, or its file if it is memory-mapped.

    A copy in this machine's byte order where torch needs one; other values are unchanged.

    Args:
        value: an argument of a program.
        name: its position or keyword.
        what: what it is an argument of, for errors.

    Returns:
        A tensor for an array of one dimension or more, otherwise the value.

    Raises:
        BadInput: what torch would misread, or could only read as a copy of a file.

    >>> readable(np.arange(3.0), "x"), readable("word", "x")
    (tensor([0., 1., 2.], dtype=torch.float64), 'word')
    """
    if isinstance(value, torch.Tensor) and value.is_nested:
        raise BadInput(
            f"{what}: argument {name!r} is a nested tensor, of which no batch can be taken; pass "
            "torch.nested.to_padded_tensor(x, 0.0), and the lengths as an argument of its own"
        )
    if not isinstance(value, np.ndarray) or value.dtype.kind not in "biufc" or not value.ndim:
        return value
    if np.ma.is_masked(value):
        raise BadInput(
            f"{what}: argument {name!r} is a masked array, whose mask would be lost; pass .filled(…), and the mask as "
            "an argument of its own"
        )
    plain = value.dtype.isnative and min(value.strides) >= 0
    if isinstance(value, np.memmap) and not plain:
        raise BadInput(
            f"{what}: argument {name!r} is a memory-mapped array of {value.dtype.str} with strides {value.strides}, "
            "which torch cannot read; pass a copy, as in numpy.ascontiguousarray(x, dtype=x.dtype.newbyteorder('='))"
        )
    bare = value.view(np.ndarray) if plain else np.ascontiguousarray(value, dtype=value.dtype.newbyteorder("="))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*not writable.*")  # nothing writes to it
        try:
            return torch.from_numpy(bare)
        except TypeError:  # a type that torch lacks, such as float128
            return value


def refuse_table(value: object, name: int | str, what: str = "data") -> None:
    """Raise BadInput for a table of another library, of which no batch can be taken."""
    if callable(getattr(value, "to_numpy", None)):
        kind = f"{type(value).__module__.partition('.')[0]} {type(value).__name__}"
        raise BadInput(
            f'{what}: argument {name!r} is a {kind}, of which no batch can be taken; pass .to_numpy("float32")'
        )
