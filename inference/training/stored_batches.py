"""Training batches of a Dataset or DataLoader: in an order drawn here, or in a loader's own order."""

from __future__ import annotations

import warnings
import zlib
from collections.abc import Iterator, Sequence
from itertools import count
from typing import Any

import torch
from torch.utils.data import BatchSampler, DataLoader, Dataset

from ...errors import BadInput, GumboError, first_line
from ..engine.rows import Rows
from ..engine.sources import Source, as_arguments, noise_of, worker_options
from ..engine.stored_rows import StoredRows
from .batches import Batches

STATEFUL = "pip install torchdata, whose StatefulDataLoader keeps a sampler's place"


def batches_of(rows: Rows, batch_size: int, *args: Any, **options: Any) -> Batches:
    """The batches of rows in memory or in a data set."""
    if not isinstance(rows, StoredRows):
        return Batches(rows, batch_size, *args, **options)
    kind = LoaderBatches if rows.source.own_order else StoredBatches
    return kind(rows, batch_size, *args, **options)


class StoredBatches(Batches):
    """The batches of a data set: the order is drawn here, and the loader's workers, if any, read ahead."""

    rows: StoredRows

    def __init__(self, rows: StoredRows, *args: Any, **options: Any):
        super().__init__(rows, *args, **options)
        if rows.source.loader is not None:
            self.note = (
                "data set, batch size, collate function and workers are the DataLoader's; the order of the rows is "
                f"drawn here, from seed {self.seed}, so that a resumed run has the same bits"
            )

    _moves_ahead = False

    @property
    def show_other_rows(self) -> bool:
        return True  # a data set may return different items each time

    @property
    def runs_code(self) -> bool:
        return True

    def close(self) -> None:
        self.rows.source.close()

    def _read(self, jobs: Sequence[tuple[torch.Tensor, int]]) -> Iterator[Rows]:
        plain = [(index.tolist(), seed % 2**63) for index, seed in jobs]
        read = self.rows.source.batches(plain, pin=self.device.type == "cuda")
        for (index, _), batch in zip(jobs, read, strict=True):
            yield self.rows.made(batch, len(index))


class LoaderBatches(Batches):
    """The batches of a loader with an order of its own: a user's sampler, or a stream.

    The sampler draws from a separate random stream, determined by ``(seed, epoch)``; draws during the reading of rows
    are determined by the seed and the rows. torchdata's StatefulDataLoader stores a sampler's position; without it a
    run cannot be resumed. A resumed run reads a stream again up to the place where the run stopped.
    """

    rows: StoredRows

    def _open(self, drop_last: bool) -> int | None:
        self._stream = _Stream()
        self._begun: list[torch.Tensor] = []
        self._after: list[torch.Tensor] = []  # a resumed stream's, at the end of the epoch that it had read
        self._began = False
        source = self.rows.source
        kind = None if source.iterable else _stateful_loader()
        self.loader = _rebuilt(
            source, kind or DataLoader, self.batch_size, drop_last, self.device.type == "cuda", self.seed
        )
        self.keeps, self.resumable = kind is not None, kind is not None or source.iterable
        self.why_not = f"its sampler, {_sampler_of(source)}, has an order of its own, which is not kept: {STATEFUL}"
        if source.iterable:
            self.note = (
                f"{type(source.dataset).__name__} is a stream: its rows are neither counted, shuffled nor told from "
                "another run's, and a resumed run reads it again up to its place, which is the same only if the "
                "stream repeats itself"
            )
        elif self.keeps:
            self.note = f"the order is that of {_sampler_of(source)}, whose place torchdata's StatefulDataLoader keeps"
        else:
            self.note = f"this run cannot be resumed: {self.why_not}"
        try:
            return len(self.loader)
        except TypeError:  # a stream
            return None

    _moves_ahead = False

    @property
    def runs_code(self) -> bool:
        return True

    @property
    def show_other_rows(self) -> bool:
        return True

    def of_epoch(self, epoch: int, done: int = 0) -> Iterator[Rows]:
        generators = _generators_of(self.loader)
        for generator, state in zip(generators, self._begun if done else self._after, strict=False):
            generator.set_state(state)
        self._after = []
        self._begun, self._began = [generator.get_state() for generator in generators], True
        self._stream.seed(self._seed_of(epoch, 0))
        places, batches = count(done if self.keeps else 0), None
        for number in places:
            with self._stream, self._one_line():
                batches = iter(self.loader) if batches is None else batches
                batch = next(batches, None)
            if batch is None:
                return
            if number >= done:
                yield self._from_loader(batch, self._seed_of(epoch, number))

    def first(self) -> Rows:
        self._stream.seed(self.seed)
        generators = _generators_of(self.loader)
        before = [generator.get_state() for generator in generators]
        with self._stream, self._one_line():
            batch = next(iter(_rebuilt(self.rows.source, DataLoader, self.batch_size, False, False, self.seed)), None)
        for generator, state in zip(generators, before, strict=True):
            generator.set_state(state)
        if batch is None:
            raise BadInput(f"{self.rows.what} is empty: expected at least one row")
        return self._from_loader(batch, self.seed)

    def state(self) -> dict[str, Any]:
        if not self._began:
            return {}
        after = [generator.get_state() for generator in _generators_of(self.loader)]
        place = self.loader.state_dict() if self.keeps else None  # type: ignore[attr-defined]
        return {"generators": self._begun, "after": after, "loader": place}

    def load(self, state: dict[str, Any]) -> None:
        if not self.resumable:
            raise BadInput(f"{self.rows.what}: this run cannot be resumed: {self.why_not}")
        self._begun = state.get("generators", [])
        self._after = [] if self.keeps else state.get("after", [])
        if state.get("loader") is not None:
            self.loader.load_state_dict(state["loader"])  # type: ignore[attr-defined]

    def close(self) -> None:
        self.loader = None  # type: ignore[assignment]

    def _from_loader(self, batch: Any, seed: int) -> Rows:
        return self._made(self.rows.made(as_arguments(batch)), 0, seed)

    def _one_line(self) -> _OneLine:
        return _OneLine(self.rows.what)


class _Stream:
    """Torch's CPU generator with a separate state while entered; the previous state is restored on exit."""

    def seed(self, seed: int) -> None:
        self._state = torch.Generator().manual_seed(seed % 2**63).get_state()

    def __enter__(self) -> None:
        self._outside = torch.get_rng_state()
        torch.set_rng_state(self._state)

    def __exit__(self, *error: object) -> None:
        self._state = torch.get_rng_state()
        torch.set_rng_state(self._outside)


class _OneLine:
    """Turns an error of a user's data set into a one-line BadInput."""

    def __init__(self, what: str):
        self.what = what

    def __enter__(self) -> None: ...

    def __exit__(self, kind: Any, error: BaseException | None, traceback: Any) -> None:
        if isinstance(error, Exception) and not isinstance(error, GumboError):
            raise BadInput(f"{self.what} cannot be read: {first_line(error, kind=True)}") from error


class _Keyed(Dataset):
    """A data set whose random draws for a row are determined by the seed and the row's number."""

    def __init__(self, dataset: Any, seed: int):
        self.dataset, self.seed = dataset, seed

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, number: Any) -> Any:
        with self._noise([number]):
            return self.dataset[number]

    def __getitems__(self, numbers: list[Any]) -> list[Any]:
        with self._noise(numbers):
            if hasattr(self.dataset, "__getitems__"):
                return self.dataset.__getitems__(numbers)
            return [self.dataset[number] for number in numbers]

    def _noise(self, numbers: list[Any]):
        return noise_of(self.seed + zlib.crc32(repr(numbers).encode()))


def _rebuilt(source: Source, kind: Any, batch_size: int, drop_last: bool, pin: bool, seed: int) -> DataLoader:
    """The user's loader rebuilt, so that its position, random draws and workers are controlled here; streams as is."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*set_vital.*")  # torchdata's own concern
        return _made_anew(source, kind, batch_size, drop_last, pin, seed)


def _made_anew(source: Source, kind: Any, batch_size: int, drop_last: bool, pin: bool, seed: int) -> DataLoader:
    loader = source.loader
    if loader is None:
        return kind(source.dataset, batch_size=batch_size, drop_last=drop_last)
    options = worker_options(loader, pin) | {"collate_fn": loader.collate_fn}
    options["generator"] = loader.generator or options["generator"]
    if source.iterable:
        size = {"batch_size": loader.batch_size}
        return kind(loader.dataset, **size, **({"drop_last": True} if loader.drop_last else {}), **options)
    dataset = _Keyed(loader.dataset, seed)
    if type(loader.batch_sampler) is BatchSampler:
        size = {"batch_size": loader.batch_size, "drop_last": loader.drop_last}
        return kind(dataset, sampler=loader.sampler, **size, **options)
    if loader.batch_sampler is None:
        return kind(dataset, sampler=loader.sampler, batch_size=None, **options)
    return kind(dataset, batch_sampler=loader.batch_sampler, **options)


def _stateful_loader() -> Any:
    """torchdata's StatefulDataLoader; None where it is not installed."""
    try:
        from torchdata.stateful_dataloader import StatefulDataLoader
    except ImportError:
        return None
    return StatefulDataLoader


def _sampler_of(source: Source) -> str:
    loader = source.loader
    if loader is None:
        return type(source.dataset).__name__
    own = loader.batch_sampler if type(loader.batch_sampler) is not BatchSampler else loader.sampler
    return type(own if own is not None else loader.sampler).__name__


def _generators_of(loader: Any) -> list[torch.Generator]:
    """The generators that a loader's samplers use, without duplicates."""
    batch_sampler = getattr(loader, "batch_sampler", None)
    holders = (loader, getattr(loader, "sampler", None), batch_sampler, getattr(batch_sampler, "sampler", None))
    found = [getattr(holder, "generator", None) for holder in holders]
    return list({id(one): one for one in found if isinstance(one, torch.Generator)}.values())
