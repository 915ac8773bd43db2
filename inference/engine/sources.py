"""Data sets of ``torch.utils.data``: the settings of a Dataset or a DataLoader, and rows read on demand."""

from __future__ import annotations

import random
import signal
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch
from torch.utils.data import BatchSampler, DataLoader, Dataset, IterableDataset, RandomSampler, SequentialSampler
from torch.utils.data import default_collate as collate_tensors

from ...errors import BadInput, GumboError, first_line

LIMIT = 4 * 2**30  # the largest data set, in bytes, that is read whole where a function needs all rows
Job = tuple[list[int], int]  # row indices, and a seed for draws during their reading


def is_source(data: object) -> bool:
    """Whether data are a torch data set or loader."""
    return isinstance(data, (Dataset, DataLoader))


class Source:
    """A Dataset, or the one of a DataLoader with the loader's settings for batches.

    Attributes: ``dataset``; ``loader``, None for a Dataset; ``collate`` makes a batch of a list of items; ``iterable``
    says that rows have no random access, ``own_order`` that they have a user-defined order: a sampler other than
    torch's plain ones, or a stream.

    A batch in a list or a tuple is the positional arguments of the programs, a mapping the keywords, anything else the
    single argument.

    >>> rows = torch.utils.data.TensorDataset(torch.arange(3.0), torch.arange(3))
    >>> Source(rows, "train").batch([2, 0])
    (tensor([2., 0.]), tensor([2, 0]))
    """

    def __init__(self, data: Any, what: str = "data"):
        self.what, self.loader = what, data if isinstance(data, DataLoader) else None
        self.dataset = data if self.loader is None else self.loader.dataset
        self.iterable = isinstance(self.dataset, IterableDataset)
        self.whole_items = self.loader is not None and self.loader.batch_sampler is None  # items are batches
        self.own_order = self.iterable or (self.loader is not None and not _is_plain(self.loader))
        self.collate: Callable = collate_tensors if self.loader is None else self.loader.collate_fn
        self._reader: DataLoader | None = None
        self._jobs: list[Job] = []
        if not self.iterable and not hasattr(self.dataset, "__len__"):
            raise BadInput(
                f"{what}: {type(self.dataset).__name__} has no length: define __len__, or make it an IterableDataset"
            )

    @property
    def batch_size(self) -> int | None:
        """The loader's batch size, if any."""
        return None if self.loader is None else self.loader.batch_size

    def __len__(self) -> int:
        return len(self.dataset)  # type: ignore[arg-type]

    def batch(self, numbers: Sequence[int], seed: int = 0) -> object:
        """The rows at these indices, as arguments of the programs; draws during reading use the seed."""
        return _opened(self._fetch()[list(numbers), seed])

    def batches(self, jobs: Sequence[Job], pin: bool = False) -> Iterator[object]:
        """One batch per job, read by the loader's workers if it has some; ``pin`` uses page-locked memory.

        Raises BadInput for a row that cannot be read, GumboError where a worker dies.
        """
        loader = self.loader
        if loader is None or not (loader.num_workers or (pin and loader.pin_memory)):
            fetch = self._fetch()
            yield from (_opened(fetch[job]) for job in jobs)
            return
        if self._reader is None or not loader.persistent_workers:
            self._jobs = []
            options = worker_options(loader, pin)
            self._reader = DataLoader(self._fetch(), batch_size=None, sampler=self._jobs, collate_fn=_same, **options)
        self._jobs[:] = jobs
        try:
            for batch in self._reader:
                yield _opened(batch)
        except RuntimeError as error:
            if isinstance(error, GumboError):
                raise
            raise GumboError(f"{self.what}: a worker that reads batches has stopped ({first_line(error)})") from error

    def close(self) -> None:
        """Stop the workers."""
        self._reader = None

    def held(self) -> object:
        """All rows at once, in the data set's order, as the arguments of the programs.

        Raises BadInput where they take more than `LIMIT` bytes.
        """
        if self.whole_items:
            raise BadInput(f"{self.what}: a DataLoader with batch_size=None gives whole batches: pass its data set")
        found, size = [], 0
        with noise_of(0):
            for number, item in enumerate(self._items()):
                if item is None and self.collate is collate_tensors:
                    raise BadInput(_nothing(self.what, number, self.dataset))
                found.append(item)
                size += size_of(item)
                if size > LIMIT or (not self.iterable and len(found) == 1 and size * len(self) > LIMIT):
                    raise BadInput(
                        f"{self.what}: all rows of {type(self.dataset).__name__} take more than {LIMIT >> 30} GiB, and "
                        "are needed at once: pass some of them, as in torch.utils.data.Subset"
                    )
        if not found:
            raise BadInput(f"{self.what} is empty: expected at least one row")
        return as_arguments(self.collate(found))

    def _items(self) -> Iterator[Any]:
        try:
            if self.iterable:
                yield from self.dataset
            else:
                yield from (self.dataset[number] for number in range(len(self)))
        except GumboError:
            raise
        except Exception as error:  # the user's code
            raise BadInput(f"{self.what} cannot be read: {first_line(error, kind=True)}") from error

    def _fetch(self) -> _Fetch:
        return _Fetch(self.dataset, self.collate, self.what)


def _is_plain(loader: DataLoader) -> bool:
    """Whether a loader's order is one of torch's plain ones: all rows once, in sequence or shuffled."""
    sampler = loader.sampler
    plain = type(sampler) is SequentialSampler or (
        type(sampler) is RandomSampler and not sampler.replacement and sampler.num_samples == len(loader.dataset)  # type: ignore[arg-type]
    )
    return plain and type(loader.batch_sampler) is BatchSampler


def worker_options(loader: DataLoader, pin: bool) -> dict[str, Any]:
    """Options for another loader to read with the same workers."""
    options: dict[str, Any] = {
        "num_workers": loader.num_workers,
        "pin_memory": loader.pin_memory and pin,
        "timeout": loader.timeout,
        "generator": torch.Generator(),  # so that torch's own generator does not change
    }
    if loader.num_workers:
        options |= {
            "worker_init_fn": partial(_deaf, loader.worker_init_fn),
            "prefetch_factor": loader.prefetch_factor,
            "persistent_workers": loader.persistent_workers,
            "multiprocessing_context": loader.multiprocessing_context,
        }
    return options


def _deaf(then: Callable[[int], None] | None, number: int) -> None:
    """Ignore Ctrl-C in a worker; the main process handles it and saves first."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if then is not None:
        then(number)


class _Unreadable(str):
    """An error message about unreadable rows, sent by a worker."""


class _Fetch(Dataset):
    """Batches as a function of row indices and a seed, independent of the worker."""

    def __init__(self, dataset: Any, collate: Callable, what: str):
        self.dataset, self.collate, self.what = dataset, collate, what

    def __getitem__(self, job: tuple[Sequence[int], int]) -> Any:
        numbers, seed = job
        try:
            with noise_of(seed):
                if hasattr(self.dataset, "__getitems__"):
                    items = self.dataset.__getitems__(list(numbers))
                else:
                    items = [self.dataset[number] for number in numbers]
                if self.collate is collate_tensors and any(item is None for item in items):
                    number = next(n for n, item in zip(numbers, items, strict=False) if item is None)
                    return _Unreadable(_nothing(self.what, number, self.dataset))
                return self.collate(items)
        except Exception as error:  # the user's code
            said = first_line(error, kind=True)
            return _Unreadable(f"{self.what}: rows {numbers[0]}, … of {type(self.dataset).__name__}: {said}")


def _nothing(what: str, number: int, dataset: Any) -> str:
    return f"{what}: row {number} of {type(dataset).__name__} is None: expected tensors, arrays or numbers"


def _opened(batch: Any) -> object:
    if isinstance(batch, _Unreadable):
        raise BadInput(str(batch))
    return as_arguments(batch)


def as_arguments(batch: Any) -> object:
    """A collated batch in the form of programs' data: a list, which collation makes of a tuple of items, is a tuple."""
    return tuple(batch) if type(batch) is list else batch


def _same(batch: Any) -> Any:
    return batch


@contextmanager
def noise_of(seed: int) -> Iterator[None]:
    """Seed torch's CPU generator, NumPy's and Python's inside, and restore them on exit."""
    before = torch.get_rng_state(), np.random.get_state(), random.getstate()
    torch.default_generator.manual_seed(seed % 2**63)
    np.random.seed(seed % 2**32)
    random.seed(seed)
    try:
        yield
    finally:
        torch.set_rng_state(before[0])
        np.random.set_state(before[1])
        random.setstate(before[2])


def size_of(item: Any) -> int:
    """Bytes of the tensors and arrays in an item."""
    if isinstance(item, torch.Tensor):
        return item.numel() * item.element_size()
    if isinstance(item, np.ndarray):
        return item.nbytes
    if isinstance(item, Mapping):
        return sum(map(size_of, item.values()))
    return sum(map(size_of, item)) if isinstance(item, (list, tuple)) else 8
