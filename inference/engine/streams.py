"""The programs' own noise outside sample statements (dropout, ``torch.rand``), separate from the sites' draws.

An estimator that reruns the programs compares the costs of two draws. The two runs must share the programs' own noise,
and must not share the noise of the sites that are drawn again.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from hashlib import blake2b
from typing import Any

import torch
from torch import Tensor

from ...errors import BadInput
from .noise import Request, current_tape


class _Python:
    """Python's random numbers, with the interface of a torch generator."""

    get_state = staticmethod(random.getstate)
    set_state = staticmethod(random.setstate)
    manual_seed = staticmethod(random.seed)


class _NumPy:
    """NumPy's global random numbers, with the interface of a torch generator."""

    def get_state(self) -> tuple[Any, ...]:
        return tuple(part.tobytes() if hasattr(part, "tobytes") else part for part in self._global().get_state())

    def set_state(self, state: tuple[Any, ...]) -> None:
        numpy = sys.modules["numpy"]
        self._global().set_state((state[0], numpy.frombuffer(state[1], dtype=numpy.uint32), *state[2:]))

    def manual_seed(self, seed: int) -> None:
        self._global().seed(seed % 2**32)

    def _global(self) -> Any:
        return sys.modules["numpy"].random


class Generators:
    """The global random generators that programs may use: torch's on the CPU and on some devices.

    Args:
        devices: the CUDA devices in use.
        others: whether to include Python's and NumPy's generators.
    """

    def __init__(self, devices: Sequence[torch.device] = (), others: bool = False):
        self.devices, self.others = tuple(devices), others
        self.all: list[Any] = [torch.default_generator]
        self.all += [torch.cuda.default_generators[device.index or 0] for device in devices]
        if others:
            self.all += [_Python(), *([_NumPy()] if "numpy" in sys.modules else [])]

    def __reduce__(self) -> tuple[Any, ...]:
        return Generators, (self.devices, self.others)

    def states(self) -> list[Any]:
        return [generator.get_state() for generator in self.all]

    def restore(self, states: Sequence[Any]) -> None:
        for generator, state in zip(self.all, states, strict=True):
            generator.set_state(state)

    def seed(self, seed: int) -> None:
        for generator in self.all:
            generator.manual_seed(seed)

    @contextmanager
    def kept(self) -> Iterator[None]:
        """Restore all states on exit."""
        before = self.states()
        try:
            yield
        finally:
            self.restore(before)


def _same(a: Any, b: Any) -> bool:
    return torch.equal(a, b) if isinstance(a, Tensor) else a == b


def _coming_seed(state: Tensor) -> int:
    """A seed of 44 bits, determined by a generator's state."""
    digest = blake2b(state.numpy().tobytes(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 20


class OwnNoise:
    """The noise of a run's programs outside their sample statements, which other runs can repeat.

    The bodies of the programs run in :meth:`entered` with separately seeded generators; sample statements draw in
    :meth:`aside`, from the caller's generators, which continue from run to run. The seed comes from the caller's
    generator, which advances only if the programs draw noise: for programs without noise all random numbers are the
    same as without this class. Under a :class:`~gumbo.inference.engine.noise.Tape` the pieces of noise are stored
    instead of a seed.

    Attributes:
        drew: whether the first run drew noise outside its sample statements.
        drew_elsewhere: whether some of it came from Python's or NumPy's generators.
        fits: whether the latest run drew as much noise as the first.
    """

    def __init__(self, generators: Generators):
        self.generators = generators
        self.tape = current_tape()
        self.drew, self.drew_elsewhere, self.fits = False, False, True
        self._seed: int | None = None
        self._outside: list[Any] = []
        self._end: list[Any] | None = None
        self._pieces: list[tuple[Request, Tensor]] = []
        self._next: int | None = None  # under a tape, the piece to repeat; None in the first run
        self._unrepeatable: str | None = None

    def entered(self) -> AbstractContextManager[None]:
        """The programs' bodies run inside; a second entry repeats the noise of the first, if any."""
        if self._end is not None and not self.drew:
            return nullcontext()
        return self._seeded() if self.tape is None else self._taped()

    def aside(self) -> AbstractContextManager[None]:
        """A sample statement draws inside, from the caller's generators."""
        if self._end is not None and not self.drew:
            return nullcontext()
        if self.tape is not None:
            return self.tape.within(None)
        # Another stream in the body's place, for a site that all processes draw alike, has precedence.
        return self._outside_seed() if torch.default_generator.initial_seed() == self._seed else nullcontext()

    @contextmanager
    def _seeded(self) -> Iterator[None]:
        generators = self.generators
        self._outside = generators.states()
        if self._seed is None:
            self._seed = _coming_seed(self._outside[0])
        generators.seed(self._seed)
        start = [] if self._end else generators.states()
        try:
            yield
            end = generators.states()
        finally:
            generators.restore(self._outside)
        if self._end is None:
            self._end = end
            moved = [not _same(a, b) for a, b in zip(start, end, strict=True)]
            self.drew, self.drew_elsewhere = any(moved), any(moved[1 + len(self.generators.devices) :])
            if self.drew:
                torch.rand(())  # the next run has another seed
        self.fits = all(map(_same, self._end, end))

    @contextmanager
    def _outside_seed(self) -> Iterator[None]:
        inside = self.generators.states()
        self.generators.restore(self._outside)
        try:
            yield
        finally:
            self._outside = self.generators.states()
            self.generators.restore(inside)

    @contextmanager
    def _taped(self) -> Iterator[None]:
        first = self._end is None
        self._next = None if first else 0
        with self.tape.within(self):
            yield
        self._end = []
        if first:
            self.drew = bool(self._pieces) or self._unrepeatable is not None
        self.fits = True  # a tape refuses to repeat noise in another shape

    # The interface for a tape.

    def piece(self, request: Request, draw: Callable[[], Tensor]) -> Tensor:
        """The noise for a body: that of the first run as far as it goes, then new noise."""
        if self._next is None or self._next >= len(self._pieces):
            self._pieces.append((request, draw()))
            self._next = None if self._next is None else self._next + 1
            return self._pieces[-1][1]
        if self._pieces[self._next][0] != request:
            raise BadInput(
                "the program draws other noise of its own for another draw of a site, so that no single graph stands"
                " for both; pass compile=False"
            )
        self._next += 1
        return self._pieces[self._next - 1][1]

    def unwritten(self, operation: str) -> None:
        """Handle an operation of a body that the tape cannot rewrite as a function of noise."""
        if self._next is not None:
            raise BadInput(
                f"the program draws noise of its own with {operation} and has to repeat it in a second run, which a"
                " captured graph cannot do; pass compile=False"
            )
        self._unrepeatable = operation
