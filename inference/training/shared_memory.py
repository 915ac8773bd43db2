"""Sums over the processes of one machine, through memory that all of them map.

A message through gloo takes milliseconds on the CPU, as long as a step of a small network. Here each process writes its
tensors into a slot of its own, and sends one byte to each of the others through a local socket. When it has their
bytes, it adds all slots up in the order of the ranks, so that all processes hold the same bits. Slots are used in
turns: when the bytes of the next step have arrived, every process has read the slots of this one.
"""

from __future__ import annotations

import os
import shutil
import socket
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from .distributed import Processes

FOLDER = Path("/dev/shm")
MOST = 8  # processes: each reads the slots of all
LARGEST = 2**30  # bytes, of all slots
TURNS = 2
_ALIGNED = 64  # bytes


class SharedMemory:
    """Slots for numbers and tensors of each process; make it with :meth:`among`.

    All processes must call :meth:`add_up`, or :meth:`written`, together.
    """

    def __init__(self, processes: Processes, numbers: int, tensors: Sequence[Tensor]):
        self.processes, self.turn = processes, 0
        self.sizes = {torch.float64: numbers}
        for tensor in tensors:
            self.sizes[tensor.dtype] = self.sizes.get(tensor.dtype, 0) + tensor.numel()
        self.places = [0]
        for dtype, size in self.sizes.items():
            self.places.append(self.places[-1] + -(-size * dtype.itemsize // _ALIGNED) * _ALIGNED)

    @classmethod
    def among(cls, processes: Processes, numbers: int, tensors: Sequence[Tensor]) -> SharedMemory | None:
        """Memory for so many numbers, and for tensors like these with all their gradients.

        None where the processes have GPUs, run on several machines, are many, or find no memory to share, and where
        the slots would take more than 1 GiB.
        """
        here = socket.gethostname() if FOLDER.is_dir() and processes.device.type == "cpu" else None
        hosts = set(processes.gather(here))
        if None in hosts or len(hosts) > 1 or not 1 < processes.world_size <= MOST:
            return None
        made = cls(processes, numbers, tensors)
        length = TURNS * processes.world_size * made.places[-1]
        folder = processes.from_main(lambda: _reserved(length)) if length <= LARGEST else None
        if folder is None:
            return None
        found = made._connect(Path(folder), length)
        processes.from_main(lambda: shutil.rmtree(folder, ignore_errors=True))
        return made if found else None

    def _connect(self, folder: Path, length: int) -> bool:
        """Map the memory, and connect to every other process; whether all have."""
        processes = self.processes
        patience = processes.timeout.total_seconds()
        own = socket.socket(socket.AF_UNIX)
        own.settimeout(patience)
        self.others: list[socket.socket] = []
        problem = False
        try:
            mapped = torch.from_file(str(folder / "memory"), shared=True, size=length, dtype=torch.uint8)
            own.bind(str(folder / str(processes.rank)))
            own.listen(processes.world_size)
        except (OSError, RuntimeError):  # another container, with a folder of its own
            problem = True
        if any(processes.gather(problem)):
            own.close()
            return False
        for rank in range(processes.rank):
            other = socket.socket(socket.AF_UNIX)
            other.settimeout(patience)
            other.connect(str(folder / str(rank)))
            self.others.append(other)
        for _ in range(processes.rank + 1, processes.world_size):
            other, _address = own.accept()
            other.settimeout(patience)
            self.others.append(other)
        own.close()
        slots = [
            {
                dtype: slot[begin : begin + size * dtype.itemsize].view(dtype)
                for (dtype, size), begin in zip(self.sizes.items(), self.places, strict=False)
            }
            for slot in mapped.split(self.places[-1])
        ]
        count = processes.world_size
        self.slots = [slots[turn * count : (turn + 1) * count] for turn in range(TURNS)]
        return True

    def add_up(self, numbers: Sequence[float], kinds: Sequence[Sequence[Tensor]]) -> tuple[Tensor, list[Tensor]]:
        """The sums over the processes of numbers, and of tensors: one flat tensor for each dtype of ``kinds``."""
        header, written = self.written(numbers, kinds)
        return header, [_total(slots) for slots in written]

    def written(self, numbers: Sequence[float], kinds: Sequence[Sequence[Tensor]]) -> tuple[Tensor, list[list[Tensor]]]:
        """The sums of numbers, and what each process has written: a flat tensor of each, for each dtype of ``kinds``.

        These are valid until the next message.
        """
        flat = {tensors[0].dtype: [tensor.detach().reshape(-1) for tensor in tensors] for tensors in kinds}
        said = torch.tensor(numbers, dtype=torch.float64)
        given = {torch.float64: [said, *flat.pop(torch.float64, [])], **flat}
        counts = {dtype: sum(map(len, tensors)) for dtype, tensors in given.items()}
        slots = self.slots[self.turn]
        for dtype, tensors in given.items():
            torch.cat(tensors, out=slots[self.processes.rank][dtype][: counts[dtype]])
        with self.processes.speaking():
            self._exchange()
        self.turn = (self.turn + 1) % TURNS
        found = {dtype: [slot[dtype][:count] for slot in slots] for dtype, count in counts.items()}
        header = _total([slot[: len(said)] for slot in found[torch.float64]])
        found[torch.float64] = [slot[len(said) :] for slot in found[torch.float64]]
        return header, [found[tensors[0].dtype] for tensors in kinds]

    def _exchange(self) -> None:
        """Tell the others that the slot is written, and wait until theirs are."""
        try:
            for other in self.others:
                other.sendall(b".")
            for other in self.others:
                if not other.recv(1):
                    raise RuntimeError("connection closed by peer")
        except OSError as error:
            raise RuntimeError(str(error)) from error


def _total(slots: Sequence[Tensor]) -> Tensor:
    first, second, *more = slots
    total = first + second
    for other in more:
        total += other
    return total


def _reserved(length: int) -> str | None:
    """A new folder with a file of so many bytes of memory; None if there is no room, or no right to write."""
    try:
        folder = tempfile.mkdtemp(prefix="gumbo-", dir=FOLDER)
    except OSError:
        return None
    try:
        with open(Path(folder) / "memory", "wb") as file:
            os.posix_fallocate(file.fileno(), 0, length)
    except OSError:
        shutil.rmtree(folder, ignore_errors=True)
        return None
    return folder
