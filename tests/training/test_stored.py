"""Data that are read as they are needed: data sets, loaders, memory-mapped files; the same numbers as from memory."""

from __future__ import annotations

import multiprocessing
import os
import random
import shutil
import signal
import time

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.poutine import mask
from resuming import After, assert_alike, images, pair, quiet, weights
from torch import nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, Sampler, TensorDataset, WeightedRandomSampler

from gumbo.errors import BadInput, GumboError, Interrupted
from gumbo.inference import diagnose, evaluate, fit, to_arviz
from gumbo.inference.engine import sources
from gumbo.inference.engine.rows import Rows
from gumbo.inference.training import stored_batches
from gumbo.inference.training.checkpoints import load_checkpoint

X = images()


class Named(Dataset):
    """Items as a mapping, with noise of their own."""

    def __init__(self, noise: float = 0.0):
        self.noise = noise

    def __len__(self) -> int:
        return len(X)

    def __getitem__(self, number: int) -> dict:
        flips = [random.random(), np.random.rand(), torch.rand(()).item()]
        return {"x": 1 - X[number] if min(flips) < self.noise else X[number]}


class Stream(IterableDataset):
    def __iter__(self):
        return iter(X)


class Broken(Named):
    def __getitem__(self, number: int) -> dict:
        if number == 7:
            raise OSError("the disk\nis gone")
        return super().__getitem__(number)


def mapped(path, values: np.ndarray) -> np.ndarray:
    file = np.memmap(path, values.dtype, "w+", shape=values.shape)
    file[:] = values
    file.flush()
    return np.memmap(path, values.dtype, "r", shape=values.shape)


def trained(data, **options) -> torch.Tensor:
    programs = pair("normal")
    quiet(*programs, data, **{"epochs": 2, **options})
    return weights(*programs)


@pytest.fixture(scope="module")
def from_memory() -> torch.Tensor:
    return trained(X)


SOURCES = {
    "a data set of tuples": lambda path: TensorDataset(X),
    "a data set of mappings": lambda path: Named(),
    "a loader": lambda path: DataLoader(TensorDataset(X), batch_size=16),
    "a shuffling loader": lambda path: DataLoader(Named(), batch_size=16, shuffle=True),
    "workers": lambda path: DataLoader(Named(), batch_size=16, num_workers=2),
    "lasting workers": lambda path: DataLoader(Named(), batch_size=16, num_workers=2, persistent_workers=True),
    "a memory-mapped array": lambda path: mapped(path, X.numpy()),
    "a tensor over a file": lambda path: torch.from_file(str(path), size=X.numel()).reshape(X.shape),
}


@pytest.mark.parametrize("make", SOURCES.values(), ids=SOURCES)
def test_where_the_rows_lie_does_not_change_the_numbers(make, tmp_path, from_memory):
    mapped(tmp_path / "rows", X.numpy())
    assert torch.equal(trained(make(tmp_path / "rows")), from_memory)


def test_the_loaders_batch_size_and_collate_function_are_taken_and_said(capsys):
    sizes = []

    def collate(items):
        sizes.append(len(items))
        return {"x": torch.stack([item["x"] for item in items])}

    loader = DataLoader(Named(), batch_size=8, collate_fn=collate, drop_last=True)
    fit(*pair("normal"), loader, epochs=2, lr=1e-2)
    said = capsys.readouterr().err
    assert set(sizes) == {8, 1} and sizes.count(8) == 1 + 2 * 5  # single rows tell the data from another run's
    assert said.count("the order of the rows is drawn here, from seed 0") == 1
    with pytest.raises(BadInput, match="leave batch_size out"):
        fit(*pair("normal"), loader, batch_size=16)


def test_noise_of_the_data_set_follows_the_batch_and_not_the_worker():
    loaders = [DataLoader(Named(0.3), batch_size=16, num_workers=workers) for workers in (0, 1, 2)]
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()
    found = [trained(loader) for loader in loaders]
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])
    assert not torch.equal(found[0], trained(X))
    assert torch.equal(before[0], torch.get_rng_state()) and before[1] == random.getstate()
    assert np.array_equal(before[2], np.random.get_state()[1])


def test_evaluate_to_arviz_and_diagnose_take_what_fit_takes(tmp_path):
    model, guide = pair("normal")
    found = [
        evaluate(model, guide, data, num_samples=3, batch_size=16)
        for data in (
            X,
            Named(),
            DataLoader(Named(), batch_size=4, shuffle=True),
            Stream(),
            mapped(tmp_path / "rows", X.numpy()),
        )
    ]
    assert len({one.elbo for one in found}) == 1 and all(one.num_data == len(X) for one in found)
    draws = [
        to_arviz(model, guide, data, num_samples=3, groups=["posterior"]).posterior["z"].values
        for data in (X[:5], TensorDataset(X[:5]), mapped(tmp_path / "few", X[:5].numpy()))
    ]
    assert np.array_equal(draws[0], draws[1]) and np.array_equal(draws[0], draws[2])
    options = {"num_samples": 100, "num_simulations": 20, "refine_steps": 2}
    reports = [diagnose(model, guide, data, **options) for data in (X[:10], DataLoader(TensorDataset(X[:10])))]
    assert str(reports[0]) == str(reports[1])


# --- variable lengths -------------------------------------------------------------------------------------------------

SEQUENCES = [torch.linspace(-1, 1, length) for length in (3, 5, 2, 4, 1, 7)]


class Sequences(Dataset):
    def __len__(self) -> int:
        return len(SEQUENCES)

    def __getitem__(self, number: int) -> torch.Tensor:
        return SEQUENCES[number]


def padded(items: list) -> dict:
    lengths = torch.tensor([len(item) for item in items])
    return {"lengths": lengths, "steps": nn.utils.rnn.pad_sequence(items)}  # steps are (T, B)


def rates(lengths, steps):
    with pyro.plate("data", len(lengths), dim=-1):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        with pyro.plate("time", len(steps), dim=-2), mask(mask=torch.arange(len(steps))[:, None] < lengths):
            pyro.sample("x", dist.Normal(z, 1.0), obs=steps)


class Means(pyro.nn.PyroModule):
    def __init__(self):
        super().__init__()
        self.encoder = nn.Linear(1, 1)

    def forward(self, lengths, steps):
        mean = (steps.sum(0) / lengths)[:, None]
        with pyro.plate("data", len(lengths), dim=-1):
            pyro.sample("z", dist.Normal(self.encoder(mean)[:, 0], 0.5))


def test_sequences_of_several_lengths_train_under_masks():
    """Padding does not count: batches of one length each and padded ones have the same loss per datum."""
    guide = Means()
    loader = DataLoader(Sequences(), batch_size=4, collate_fn=padded)
    assert fit(rates, guide, loader, epochs=3, lr=1e-2, progress=False, valid=loader).epochs == 3
    together = evaluate(rates, guide, loader, num_samples=2000, seed=0)
    alone = [
        evaluate(rates, guide, padded([item]), num_samples=2000, seed=number, plate="data").elbo
        for number, item in enumerate(SEQUENCES)
    ]
    assert abs(together.elbo - np.mean(alone)) < 5 * 2**0.5 * together.elbo_mc_se


# --- going on ---------------------------------------------------------------------------------------------------------


def stop() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def noisy(workers: int) -> DataLoader:
    return DataLoader(Named(0.2), batch_size=16, shuffle=True, num_workers=workers)


def flipped(rows, generator):
    return {"x": AFTER[0](rows["x"], generator)}


AFTER = [After(0, stop)]


@pytest.mark.parametrize("workers", [0, 2])
def test_a_loaders_run_goes_on_to_the_same_bits_after_a_signal(workers, tmp_path):
    options = {"epochs": 3, "transform": flipped}
    AFTER[0] = After(0, stop)
    quiet(*pair("normal"), noisy(0), run_dir=tmp_path / "whole", **options)
    AFTER[0] = After(6, stop)
    with pytest.raises(Interrupted):
        quiet(*pair("normal"), noisy(workers), run_dir=tmp_path / "parts", **options)
    AFTER[0] = After(0, stop)
    # With another number of workers, and a pair that is not the run's.
    quiet(*pair("normal", 2), noisy(2 - workers), run_dir=tmp_path / "parts", resume=True, **options)
    assert_alike(tmp_path / "whole", tmp_path / "parts")


def endless(folder, epochs: int) -> None:
    torch.set_num_threads(1)
    quiet(*pair("normal"), noisy(1), epochs=epochs, checkpoint_steps=2, run_dir=folder, resume=True)


def test_kill_9_in_a_loaders_run_and_on_to_the_same_bits(tmp_path):
    epochs = 12
    endless(tmp_path / "whole", epochs)
    last, kills = tmp_path / "killed" / "checkpoints" / "last.pt", 0
    while kills < 2:
        started = multiprocessing.get_context("fork").Process(target=endless, args=(tmp_path / "killed", 10_000))
        started.start()
        stood, limit = (last.stat().st_mtime_ns if last.exists() else 0), time.monotonic() + 120
        while not last.exists() or last.stat().st_mtime_ns == stood:
            assert started.is_alive() and time.monotonic() < limit
            time.sleep(0.005)
        time.sleep(0.05)
        os.kill(started.pid, signal.SIGKILL)
        started.join()
        kills += 1
        if load_checkpoint(last)["now"]["number"] > epochs:
            shutil.rmtree(tmp_path / "killed")  # it was faster than the kill
            kills = 0
    endless(tmp_path / "killed", epochs)
    assert_alike(tmp_path / "whole", tmp_path / "killed")


# --- orders of their own ----------------------------------------------------------------------------------------------


class Wanders(Sampler):
    """An order with a state of its own, which knows its place."""

    def __init__(self):
        self.turn, self.yielded, self.start = 0, 0, 0

    def __iter__(self):
        start, self.start = self.start, 0
        self.turn += start == 0
        order = torch.randperm(len(X), generator=torch.Generator().manual_seed(self.turn)).tolist()
        for self.yielded, number in enumerate(order[start:], start + 1):
            yield number

    def __len__(self) -> int:
        return len(X)

    def state_dict(self) -> dict:
        return {"turn": self.turn, "yielded": self.yielded}

    def load_state_dict(self, state: dict) -> None:
        self.turn, self.start = state["turn"], state["yielded"] % len(X)


def weighted() -> DataLoader:
    generator = torch.Generator().manual_seed(3)
    sampler = WeightedRandomSampler(torch.rand(len(X), generator=generator), len(X), generator=generator)
    return DataLoader(Named(0.2), batch_size=16, sampler=sampler)


def test_a_sampler_without_torchdata_trains_and_says_that_it_cannot_be_resumed(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(stored_batches, "_stateful_loader", lambda: None)
    options = {"epochs": 1, "lr": 1e-2, "run_dir": tmp_path / "run"}
    fit(*pair("normal"), weighted(), **options)
    said = capsys.readouterr().err
    assert "cannot be resumed" in said and "WeightedRandomSampler" in said and "torchdata" in said
    with pytest.raises(BadInput, match="torchdata") as found:
        quiet(*pair("normal"), weighted(), resume=True, **options | {"epochs": 2})
    assert "\n" not in str(found.value)


@pytest.mark.parametrize("stops", [2, 5])
@pytest.mark.parametrize("make", [weighted, lambda: DataLoader(Named(0.2), batch_size=16, sampler=Wanders())])
def test_a_sampler_goes_on_to_the_same_bits_through_torchdata(make, stops, tmp_path):
    pytest.importorskip("torchdata.stateful_dataloader")
    options = {"epochs": 3, "transform": flipped}
    AFTER[0] = After(0, stop)
    quiet(*pair("normal"), make(), run_dir=tmp_path / "whole", **options)
    AFTER[0] = After(stops, stop)
    with pytest.raises(Interrupted):
        quiet(*pair("normal"), make(), run_dir=tmp_path / "parts", **options)
    AFTER[0] = After(0, stop)
    quiet(*pair("normal", 1), make(), run_dir=tmp_path / "parts", resume=True, **options)
    assert_alike(tmp_path / "whole", tmp_path / "parts")


def test_a_stream_trains_says_what_it_cannot_keep_and_is_read_again(tmp_path, capsys):
    options = {"epochs": 2, "batch_size": 16, "lr": 1e-2}
    fit(*pair("normal"), Stream(), run_dir=tmp_path / "whole", transform=After(0, stop), **options)
    said = capsys.readouterr().err
    assert "Stream is a stream" in said and "neither counted, shuffled" in said
    with pytest.raises(Interrupted):
        quiet(*pair("normal"), Stream(), run_dir=tmp_path / "parts", transform=After(3, stop), **options)
    assert load_checkpoint(tmp_path / "parts" / "checkpoints" / "last.pt")["now"]["done"] == 2
    quiet(*pair("normal", 1), Stream(), run_dir=tmp_path / "parts", resume=True, transform=After(0, stop), **options)
    assert_alike(tmp_path / "whole", tmp_path / "parts")


class NoisyStream(IterableDataset):
    def __iter__(self):
        return (torch.where(torch.rand(row.shape) < 0.2, 1 - row, row) for row in X)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_stream_that_draws_goes_on_with_the_draws_of_its_next_epoch(workers, tmp_path):
    def loader():
        return DataLoader(NoisyStream(), batch_size=16, num_workers=workers)

    quiet(*pair("normal"), loader(), epochs=3, run_dir=tmp_path / "whole")
    quiet(*pair("normal"), loader(), epochs=2, run_dir=tmp_path / "parts")
    quiet(*pair("normal", 1), loader(), epochs=3, run_dir=tmp_path / "parts", resume=True)
    assert_alike(tmp_path / "whole", tmp_path / "parts")


# --- what is refused --------------------------------------------------------------------------------------------------


class Lengthless(Dataset):
    def __getitem__(self, number: int) -> torch.Tensor:
        return X[number]


@pytest.mark.parametrize("workers", [0, 1])
def test_a_row_that_cannot_be_read_is_one_line(workers):
    with pytest.raises(BadInput) as found:
        trained(DataLoader(Broken(), batch_size=16, num_workers=workers))
    assert "\n" not in str(found.value) and "OSError: the disk" in str(found.value)


class Gap(Named):
    """A data set without its row 13."""

    def __getitem__(self, number: int):
        return None if number == 13 else super().__getitem__(number)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_row_that_is_none_is_named(workers):
    for use in (trained, lambda data: to_arviz(*pair("normal"), data)):
        with pytest.raises(BadInput, match=r"^(train|data): row 13 of Gap is None: expected tensors"):
            use(DataLoader(Gap(), batch_size=16, num_workers=workers))

    def without_gaps(items):
        return torch.utils.data.default_collate([item for item in items if item is not None])

    source = sources.Source(DataLoader(Gap(), batch_size=4, collate_fn=without_gaps))
    assert len(source.batch([12, 13, 14])["x"]) == 2


def test_what_is_no_data_set_to_train_on_is_one_line(monkeypatch):
    class Not(Named):
        def __getitem__(self, number: int) -> dict:
            return {"x": X[number] * np.nan}

    for data, words in (
        (Lengthless(), "no length"),
        (TensorDataset(X[:0]), "empty"),
        (Not(), "NaN"),
        (TensorDataset(X, X), "cannot run on a batch"),
    ):
        with pytest.raises(BadInput, match=words) as found:
            trained(data)
        assert "\n" not in str(found.value)
    monkeypatch.setattr(sources, "LIMIT", 100)
    with pytest.raises(BadInput, match="Subset"):
        to_arviz(*pair("normal"), TensorDataset(X), num_samples=2)
    trained(TensorDataset(X))  # which is read by batches


def test_a_dead_worker_is_one_line():
    class Deadly(Named):
        def __getitem__(self, number: int) -> dict:
            if torch.utils.data.get_worker_info() is not None and number > 20:
                os.kill(os.getpid(), signal.SIGKILL)
            return super().__getitem__(number)

    with pytest.raises(GumboError) as found:
        trained(DataLoader(Deadly(), batch_size=16, num_workers=1))
    assert "\n" not in str(found.value) and "worker" in str(found.value)


def test_values_in_a_file_are_looked_at_in_pieces(monkeypatch):
    from gumbo.inference.engine import rows

    monkeypatch.setattr(rows, "_AT_ONCE", 20)
    bad = X.clone()
    bad[[3, 30]] = torch.nan
    with pytest.raises(BadInput, match="2 of 40 rows"):
        Rows(bad).check("train")


# --- a file larger than memory ----------------------------------------------------------------------------------------


def own_memory() -> int:
    """Bytes of anonymous memory: what lies in no file."""
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("RssAnon"))


class Wide(pyro.nn.PyroModule):
    def __init__(self, size: int):
        super().__init__()
        self.decoder = nn.Linear(1, size)

    def forward(self, x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(1), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(self.decoder(z), 1.0).to_event(1), obs=x)


class WideGuide(pyro.nn.PyroModule):
    def __init__(self, size: int):
        super().__init__()
        self.encoder = nn.Linear(size, 1)

    def forward(self, x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(self.encoder(x), 1.0).to_event(1))


def file_of(path, gigabytes: float, size: int = 2**16) -> np.ndarray:
    """Rows of 256 KiB, none of whose numbers is zero, so that the file has no holes."""
    count = int(gigabytes * 2**30) // (4 * size)
    block = np.random.default_rng(0).standard_normal((256, size), dtype=np.float32) + 0.01
    with open(path, "wb") as file:
        for start in range(0, count, 256):
            block[:, 0] = np.arange(start + 1, start + 257)
            file.write((block / 100)[: count - start].tobytes())
    return np.memmap(path, "float32", "r", shape=(count, size))


def trains_in_little_memory(path, gigabytes: float, limit: float) -> None:
    rows = file_of(path, gigabytes)
    assert path.stat().st_blocks * 512 >= 0.99 * gigabytes * 2**30
    found: list[int] = []
    options = {"epochs": 1, "batch_size": 64, "progress": False}
    watch = {"transform": lambda batch, generator: (found.append(own_memory()), batch)[1]}
    result = fit(Wide(rows.shape[1]), WideGuide(rows.shape[1]), rows, **options, **watch)
    assert result.epochs == 1 and len(found) >= len(rows) // 64
    assert max(found) < limit * 2**30, max(found) / 2**30


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="no /proc")
def test_a_mapped_file_trains_in_less_memory_than_it_has(tmp_path):
    before = own_memory()
    trains_in_little_memory(tmp_path / "rows", 1.0, before / 2**30 + 0.6)


@pytest.mark.slow
@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="no /proc")
def test_a_mapped_file_of_20_gigabytes_trains_in_less_than_two(tmp_path):
    free = shutil.disk_usage(tmp_path).free / 2**30
    try:
        trains_in_little_memory(tmp_path / "rows", min(20.0, 0.5 * free), 2.0)
    finally:
        (tmp_path / "rows").unlink(missing_ok=True)
