"""Noise as an input of a program: the program becomes a deterministic function of it.

A captured graph must not hold a draw as a constant, and its own draws could not be compared with an eager run's. Under
:class:`Tape` every random operation of torch is a function of uniform, normal or permutation noise. The first run
determines the noise needed; later runs, captured or not, receive it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from ...errors import BadInput

aten = torch.ops.aten


@dataclass(frozen=True)
class Request:
    """Noise of one kind: ``uniform`` on [0, 1), ``normal``, or a ``permutation`` of ``shape[0]`` numbers."""

    kind: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device

    @property
    def size(self) -> int:
        return math.prod(self.shape)


class Noise:
    """The noise of one run: one buffer for all draws of a kind, since one large draw is faster than many small ones."""

    def __init__(self, requests: Sequence[Request]):
        self.requests = list(requests)
        self.buffers: list[Tensor] = []
        self.kinds: list[str] = []
        self._places: list[tuple[int, int]] = []  # for each request its buffer and its offset
        sizes: list[int] = []
        found: dict[tuple, int] = {}
        for number, request in enumerate(self.requests):
            shared = request.kind != "permutation"
            key = (request.kind, request.dtype, request.device) if shared else (number,)
            if key not in found:
                found[key] = len(sizes)
                sizes.append(0)
                self.kinds.append(request.kind)
            self._places.append((found[key], sizes[found[key]]))
            sizes[found[key]] += request.size
        for key, number in found.items():
            like = self.requests[key[0]] if len(key) == 1 else Request(*key[:1], (), *key[1:])
            self.buffers.append(torch.zeros(sizes[number], dtype=like.dtype, device=like.device))

    def draw(self) -> None:
        """New noise in every buffer, from torch's own generators."""
        for kind, buffer in zip(self.kinds, self.buffers, strict=True):
            if kind == "uniform":
                buffer.uniform_()
            elif kind == "normal":
                buffer.normal_()
            else:
                torch.randperm(len(buffer), out=buffer)

    def pieces(self, buffers: Sequence[Tensor]) -> list[Tensor]:
        """The parts of ``buffers``, of the same sizes, for each request."""
        return [
            buffers[buffer].narrow(0, begin, request.size).view(request.shape)
            for request, (buffer, begin) in zip(self.requests, self._places, strict=True)
        ]


class Tape(TorchDispatchMode):
    """Rewrites torch's random operations as functions of noise, which it draws or receives.

    Operations that it cannot rewrite (Gamma, Dirichlet, Poisson, binomial variables) draw their own noise.

    Args:
        noise: the noise to use, or None to draw.
        pieces: the tensors for ``noise.requests``; None takes those of ``noise``.

    >>> tape = Tape()
    >>> with torch.random.fork_rng(), tape:
    ...     coins = torch.bernoulli(torch.tensor([0.0, 1.0]))
    >>> coins, tape.requests[0].kind, tape.requests[0].shape
    (tensor([0., 1.]), 'uniform', (2,))
    """

    def __init__(self, noise: Noise | None = None, pieces: Sequence[Tensor] | None = None):
        super().__init__()
        self.noise = noise
        self.given = None if noise is None else list(noise.pieces(noise.buffers) if pieces is None else pieces)
        self.requests: list[Request] = []
        self._made: list[tuple[Request, Tensor]] = []  # in the order of use, repeats included
        self._repeat: list[tuple[Request, Tensor]] = []
        self._repeating = 0
        self._body: Any = None  # separates the noise of a program's body; see streams.OwnNoise

    def __enter__(self):
        _tapes.append(self)
        return super().__enter__()

    def __exit__(self, *error: Any):
        _tapes.remove(self)
        return super().__exit__(*error)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if torch.Tag.nondeterministic_seeded not in func.tags:
            return func(*args, **(kwargs or {}))
        kwargs = dict(kwargs or {})
        if kwargs.pop("generator", None) is not None:
            raise BadInput(
                f"the program draws ({func}) from a generator of its own, which no graph holds; pass compile=False"
            )
        if (write := _WRITTEN.get(func)) is not None:
            return write(self, *args, **kwargs)
        if self._body is not None:
            self._body.unwritten(str(func))
        elif self._repeating or self._repeat:
            raise BadInput(
                f"the program draws with {func} where a control variate has to see the same draw twice, which a"
                " captured graph cannot do; pass compile=False"
            )
        return func(*args, **kwargs)

    def take(self, kind: str, shape: Sequence[int], dtype: torch.dtype, device: Any) -> Tensor:
        """The next noise."""
        device = torch.device(device if device is not None else "cpu")
        if device.type == "cuda" and device.index is None:
            device = torch.device("cuda", torch.cuda.current_device())
        request = Request(kind, tuple(shape), dtype, device)
        if self._body is not None:
            return self._body.piece(request, partial(self._next, request))
        if self._repeat and self._repeat[0][0] == request:
            piece = self._repeat.pop(0)[1]
        else:
            self._repeat = []
            piece = self._next(request)
        self._made.append((request, piece))
        return piece

    def _next(self, request: Request) -> Tensor:
        self.requests.append(request)
        if self.given is None:
            fresh = Noise([request])
            fresh.draw()
            return fresh.pieces(fresh.buffers)[0]
        number = len(self.requests) - 1
        if number >= len(self.given) or self.noise.requests[number] != request:
            raise BadInput(
                "the program draws other things in one call than in the next, so that no single graph stands for it;"
                " pass compile=False"
            )
        return self.given[number]

    @contextmanager
    def within(self, body: Any) -> Iterator[None]:
        """Request noise from ``body`` (its ``piece`` and ``unwritten``); from the tape itself if it is None."""
        before, self._body = self._body, body
        try:
            yield
        finally:
            self._body = before

    @contextmanager
    def repeated(self) -> Iterator[None]:
        start = len(self._made)
        self._repeating += 1
        try:
            yield
        finally:
            self._repeating -= 1
            self._repeat = self._made[start:]


_tapes: list[Tape] = []


def current_tape() -> Tape | None:
    """The active tape, or None."""
    return _tapes[-1] if _tapes else None


@contextmanager
def drawn_twice(devices: Sequence[int] = ()) -> Iterator[None]:
    """Draws inside are repeated after exit.

    >>> with drawn_twice():
    ...     first = torch.rand(2)
    >>> torch.equal(first, torch.rand(2))
    True
    """
    with _tapes[-1].repeated() if _tapes else torch.random.fork_rng(devices=devices):
        yield


# Each operation as a function of noise. Exponential noise is made from uniform noise, which is several times faster.


def _exponential(tape: Tape, shape, dtype, device) -> Tensor:
    uniform = tape.take("uniform", shape, dtype, device)
    return (-torch.log1p(-uniform)).clamp(min=torch.finfo(dtype).eps / 4)


def _coins(tape: Tape, probs: Tensor | float, like: Tensor) -> Tensor:
    dtype = like.dtype if like.dtype.is_floating_point else torch.get_default_dtype()
    return (tape.take("uniform", like.shape, dtype, like.device) < probs).to(like.dtype)


def _options(dtype, layout, device, pin_memory, like: Tensor | None = None) -> tuple[torch.dtype, Any]:
    if like is not None:
        return dtype or like.dtype, device or like.device
    return dtype or torch.get_default_dtype(), device


def _sized(kind: str) -> Callable:
    def draw(tape, size, *, dtype=None, layout=None, device=None, pin_memory=None):
        return tape.take(kind, size, *_options(dtype, layout, device, pin_memory)).clone()

    return draw


def _alike(kind: str) -> Callable:
    def draw(tape, like, *, dtype=None, layout=None, device=None, pin_memory=None, memory_format=None):
        return tape.take(kind, like.shape, *_options(dtype, layout, device, pin_memory, like)).clone()

    return draw


def _filled(make: Callable) -> Callable:
    def draw(tape, self, *args):
        return self.copy_(make(tape, self, *args))

    return draw


def _normal_of(tape, self, mean=0.0, std=1.0):
    return tape.take("normal", self.shape, self.dtype, self.device) * std + mean


def _uniform_of(tape, self, low=0.0, high=1.0):
    return tape.take("uniform", self.shape, self.dtype, self.device) * (high - low) + low


def _exponential_of(tape, self, rate=1.0):
    return _exponential(tape, self.shape, self.dtype, self.device) / rate


def _coins_of(tape, self, probs=0.5):
    return _coins(tape, probs, self)


def _normal_about(tape, mean, std=1.0):
    like = mean if isinstance(mean, Tensor) else std
    shape = torch.broadcast_shapes(*(item.shape for item in (mean, std) if isinstance(item, Tensor)))
    return tape.take("normal", shape, like.dtype, like.device) * std + mean


def _normal_sized(tape, mean, std, size, *, dtype=None, layout=None, device=None, pin_memory=None):
    return tape.take("normal", size, *_options(dtype, layout, device, pin_memory)) * std + mean


def _multinomial(tape, probs, num_samples, replacement=False):
    """Draw the class with the smallest exponential waiting time at its rate, as torch does for a single draw."""
    several = replacement and num_samples > 1
    if several:
        probs = probs.unsqueeze(-2).expand(*probs.shape[:-1], num_samples, probs.shape[-1])
    # The noise of a class lies together, so that compiled code compares the classes of many draws at a time.
    waits = _exponential(tape, (probs.shape[-1], *probs.shape[:-1]), probs.dtype, probs.device).movedim(0, -1)
    speed = probs / waits
    if several:
        return speed.argmax(-1)
    return speed.argmax(-1, keepdim=True) if num_samples == 1 else speed.topk(num_samples, -1).indices


def _permutation(tape, size, *, dtype=None, layout=None, device=None, pin_memory=None):
    return tape.take("permutation", (size,), dtype or torch.int64, device).clone()


def _integers(tape, low, high, size, *, dtype=None, layout=None, device=None, pin_memory=None):
    uniform = tape.take("uniform", size, torch.float64, device)
    return (uniform * (high - low) + low).floor().to(dtype or torch.int64)


def _dropout(tape, input, p, train=True):
    if not train:
        return input.clone(), torch.ones_like(input, dtype=torch.bool)
    kept = tape.take("uniform", input.shape, input.dtype, input.device) >= p
    return input * kept / (1 - p), kept


_WRITTEN: dict[Any, Callable] = {
    aten.normal_.default: _filled(_normal_of),
    aten.uniform_.default: _filled(_uniform_of),
    aten.exponential_.default: _filled(_exponential_of),
    aten.bernoulli_.float: _filled(_coins_of),
    aten.bernoulli_.Tensor: _filled(_coins_of),
    aten.bernoulli.default: lambda tape, probs: _coins(tape, probs, probs),
    aten.bernoulli.p: lambda tape, like, probs: _coins(tape, probs, like),
    aten.rand.default: _sized("uniform"),
    aten.randn.default: _sized("normal"),
    aten.rand_like.default: _alike("uniform"),
    aten.randn_like.default: _alike("normal"),
    aten.normal.Tensor_Tensor: _normal_about,
    aten.normal.Tensor_float: _normal_about,
    aten.normal.float_Tensor: _normal_about,
    aten.normal.float_float: _normal_sized,
    aten.multinomial.default: _multinomial,
    aten.randperm.default: _permutation,
    aten.randint.default: lambda tape, high, size, **options: _integers(tape, 0, high, size, **options),
    aten.randint.low: _integers,
    aten.native_dropout.default: _dropout,
}
