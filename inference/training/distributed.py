"""The processes that fit one model together: ranks and collective operations.

``torchrun`` or ``accelerate launch`` starts them, one for each device, and Accelerate joins them. Every process runs
the same script; all communication passes through this module. ``data_parallel.py`` explains how a batch is split over
the processes, and why the sum of their gradients is the gradient of one process.
"""

from __future__ import annotations

import atexit
import contextlib
import importlib.util
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from ...errors import BadInput, GumboError, Interrupted, first_line
from ...launcher import launched
from .signals import Interrupts

Found = TypeVar("Found")

# Longer than any step or evaluation should take: a process that waits for a missing one gives up after this.
PATIENCE = timedelta(minutes=10)

_failed_alone: list[GumboError] = []  # errors that this process alone raised


def _number_of_processes() -> int:
    """The number of processes that were joined; before that, of those that a launcher started."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else launched()


class LostTouch(GumboError):
    """Another process has stopped, or did not answer in time."""


class Processes:
    """The processes of one fit, seen from one of them.

    Attributes: ``rank`` counts from 0, ``world_size`` is the number of processes, ``main`` whether this is the one that
    writes files and prints, ``device`` where tensors for collective operations must be, ``timeout`` how long one waits
    for another.
    """

    def __init__(self, rank: int, world_size: int, device: torch.device, timeout: timedelta = PATIENCE):
        self.rank, self.world_size, self.device, self.timeout = rank, world_size, device, timeout
        self.main = rank == 0
        self.num_collectives = 0  # collective operations of this process
        # A step sends the signal that this process has received, and notes the one that any has; None: not sent.
        self.signal: Callable[[], int] = int
        self.told: int | None = None

    @classmethod
    def join(cls, device: torch.device | str | None = None, timeout: timedelta = PATIENCE) -> Processes | None:
        """The processes that a launcher started, or None if this one is alone; a second call joins the same ones.

        ``device`` is the device of the model: processes use gloo on the CPU, and NCCL on GPUs. None takes a GPU for
        each process if there is one.

        Raises :class:`~gumbo.errors.BadInput` if Accelerate is not installed, or the devices are not available.
        """
        if _number_of_processes() == 1:
            return None
        if importlib.util.find_spec("accelerate") is None:
            raise BadInput(
                f"{_number_of_processes()} processes were started, and fitting on several needs Accelerate: "
                'pip install -e ".[distributed]" in the checkout'
            )
        from accelerate import PartialState

        kind = torch.device(device).type if device is not None else "cuda" if torch.cuda.is_available() else "cpu"
        ours = not dist.is_initialized()
        options: dict[str, Any] = {"cpu": True, "backend": "gloo"} if kind == "cpu" else {}
        try:
            state = PartialState(timeout=timeout, **options)
            if not dist.is_initialized():
                # An earlier PartialState, on a machine without GPUs, treats this process as the only one.
                dist.init_process_group("gloo" if kind == "cpu" else "nccl", timeout=timeout)
        except (RuntimeError, ValueError) as error:
            raise BadInput(f"the {_number_of_processes()} processes cannot be joined ({first_line(error)})") from error
        if ours:
            atexit.register(_leave)
        own = torch.device("cpu") if dist.get_backend() == "gloo" else state.device
        if own.type != kind:
            raise BadInput(
                f"the model is on {kind} and the processes talk through {dist.get_backend()}, which serves {own.type}: "
                f"move the model to {own}"
            )
        return cls(dist.get_rank(), dist.get_world_size(), own, timeout)

    def all_reduce(self, tensor: torch.Tensor) -> torch.Tensor:
        """Sum a tensor over all processes, in place; every process then holds the same bits."""
        with self.speaking():
            dist.all_reduce(tensor)
        return tensor

    def all_reduce_together(self, tensors: Sequence[torch.Tensor]) -> None:
        """Sum several tensors over all processes, in place, on their way at the same time."""
        with self.speaking():
            for work in [dist.all_reduce(tensor, async_op=True) for tensor in tensors]:
                work.wait()

    def largest(self, number: float) -> float:
        """The largest of the processes' numbers."""
        found = torch.tensor(number, dtype=torch.float64, device=self.device)
        with self.speaking():
            dist.all_reduce(found, op=dist.ReduceOp.MAX)
        return found.item()

    def gather(self, thing: Found) -> list[Found]:
        """The values of all processes, ordered by rank."""
        found: list[Any] = [None] * self.world_size
        with self.speaking():
            dist.all_gather_object(found, thing)
        return found

    def same_as_main(self, tensors: list[torch.Tensor]) -> None:
        """Overwrite tensors by those of the main process."""
        with self.speaking(), torch.no_grad():
            for tensor in tensors:
                whole = tensor.detach().contiguous()
                dist.broadcast(whole, src=0)
                tensor.copy_(whole)

    def from_main(self, action: Callable[[], Found]) -> Found:
        """The result of an action that only the main process runs; all processes raise its error."""
        box: list[Any] = [None, None]
        problem: Exception | None = None
        if self.main:
            try:
                box[0] = action()
            except Exception as error:
                problem, box[1] = error, _told(error)
        with self.speaking():
            dist.broadcast_object_list(box, src=0)
        if problem is not None:
            raise problem
        if box[1] is not None:
            raise _retold(box[1])
        return box[0]

    def together(self, action: Callable[[], Found]) -> Found:
        """The result of an action here, after it has succeeded in all processes; all raise the error of one."""
        problem: Exception | None = None
        result: Any = None
        try:
            result = action()
        except Exception as error:
            problem = error
        self.agree(problem)
        return result

    def compare(self, named: Mapping[str, Any]) -> None:
        """Raise BadInput in all processes if one of these plain values differs between them; the message names it."""
        main, *others = self.gather(dict(named))
        for rank, found in enumerate(others, start=1):
            for name in [*main, *(key for key in found if key not in main)]:
                mine, theirs = main.get(name), found.get(name)
                if mine != theirs:
                    raise BadInput(
                        f"process {rank} has another {name}: {theirs} there, {mine} in process 0; give all processes "
                        "the same, each takes its own rows of every batch"
                    )

    def agree(self, problem: Exception | None) -> None:
        """Raise this process's problem, or the first one of another process; return if there is none."""
        told = self.gather(None if problem is None else _told(problem))
        if problem is not None:
            raise problem
        for rank, words in enumerate(told):
            if words is not None:
                raise _retold(words, f"process {rank}: ")

    @contextmanager
    def speaking(self) -> Iterator[None]:
        """Around a message: counted, and a lost connection is said in one line."""
        self.num_collectives += 1
        try:
            yield
        except RuntimeError as error:
            lost = LostTouch(
                f"process {self.rank} lost touch with the others ({first_line(error)}); another process has stopped, "
                "see its output"
            )
            raise alone(lost, self.rank) from error


class OnMain:
    """An object of the main process: all processes call its methods together, it runs them, all get the result."""

    def __init__(self, processes: Processes, thing: Any):
        self._processes, self._thing = processes, thing

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._thing, name)
        if not callable(found):
            return found
        return lambda *args, **kwargs: self._processes.from_main(lambda: found(*args, **kwargs))


class SharedInterrupts(Interrupts):
    """A signal to one process interrupts all, at the same step.

    A second signal does nothing: launchers repeat the terminal's signal, and kill the processes in the end.
    """

    def __init__(self, processes: Processes, enabled: bool = True):
        super().__init__(enabled)
        self.processes, self.agreed = processes, enabled
        processes.signal = lambda: self.pending or 0

    def check(self) -> None:
        """Raise Interrupted in all processes if one has received a signal; all processes must call this.

        Right after a step the processes know already, by the step's own message.
        """
        told, self.processes.told = self.processes.told, None
        if not self.agreed:
            return
        if number := int(self.processes.largest(self.pending or 0)) if told is None else told:
            raise Interrupted(number)

    @contextmanager
    def at_once(self) -> Iterator[None]:
        self.check()
        yield

    def _receive(self, number: int, frame: object) -> None:
        self.pending = self.pending or number


def alone(error: GumboError, rank: int) -> GumboError:
    """Mark an error that this process alone raises, so that this process and not the main one reports it."""
    error.process = rank  # type: ignore[attr-defined]
    _failed_alone.append(error)
    return error


def _told(error: Exception) -> tuple[bool, str]:
    said = str(error) if isinstance(error, GumboError) else first_line(error, kind=True)
    return isinstance(error, BadInput), said


def _retold(words: tuple[bool, str], who: str = "") -> GumboError:
    bad_input, said = words
    return (BadInput if bad_input else GumboError)(who + said)


def _leave() -> None:
    """Wait for the others before closing connections, unless this process failed alone: the others wait elsewhere."""
    if not dist.is_initialized():
        return
    store, me = dist.distributed_c10d._get_default_store(), dist.get_rank()
    # gloo sometimes aborts a process that ends while another still holds its connections.
    with contextlib.suppress(RuntimeError):
        store.set(f"gumbo/left/{me}", "")
        if not (_failed_alone or hasattr(sys, "last_type")):
            store.wait([f"gumbo/left/{index}" for index in range(dist.get_world_size())], PATIENCE)
    with contextlib.suppress(RuntimeError):
        dist.destroy_process_group()
