"""Data sets: splits that never move, binarizations, and what is said when a file is missing."""

from __future__ import annotations

import gzip
import socket
import sys
import tracemalloc
import zipfile

import numpy as np
import pytest
import torch

from gumbo.errors import BadInput, UnknownName
from gumbo.experiments import cli, data
from gumbo.experiments.data import cells_law, load, newsgroups_vocabulary, reuters_vocabulary, spelled
from gumbo.experiments.train import Train


@pytest.fixture
def offline(monkeypatch):
    """No network: name look-ups fail."""

    def fail(*args, **kwargs):
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", fail)


def write_idx(path, array):
    path.parent.mkdir(parents=True, exist_ok=True)
    header = bytes([0, 0, 8, array.ndim]) + b"".join(n.to_bytes(4, "big") for n in array.shape)
    content = header + array.astype(np.uint8).tobytes()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)


def write_mnist(folder, prefix, rows, suffix=".gz"):
    images = np.arange(rows * 784).reshape(rows, 28, 28) % 256
    write_idx(folder / f"MNIST/raw/{prefix}-images-idx3-ubyte{suffix}", images)
    write_idx(folder / f"MNIST/raw/{prefix}-labels-idx1-ubyte{suffix}", np.arange(rows) % 10)
    return images


FIRST_DIGITS = {
    "train": [2, 8, 2, 6, 6, 7, 1, 9],
    "valid": [0, 9, 6, 9, 8, 4, 5, 8],
    "test": [8, 8, 2, 2, 2, 9, 8, 8],
}


def test_digits_are_split_for_good(offline):
    digits = load("digits")
    assert [len(digits.train), len(digits.valid), len(digits.test)] == [1297, 200, 300]
    assert digits.data_shape == (1, 8, 8)
    assert digits.train.dtype == torch.float32 and digits.train.min() == 0 and digits.train.max() == 1
    # The first labels of each split: a permutation that moved would show here.
    assert {split: labels[:8].tolist() for split, labels in digits.labels.items()} == FIRST_DIGITS
    whole = torch.cat([digits.train, digits.valid, digits.test])
    assert whole.unique(dim=0).shape[0] == whole.shape[0] == 1797


def test_static_is_a_threshold_at_one_half():
    gray, static = load("digits"), load("digits", binarize="static")
    assert torch.equal(static.valid, (gray.valid >= 0.5).float())
    assert torch.equal(static.transform(static.train), static.train)


def test_dynamic_draws_anew_for_training_and_once_for_the_rest():
    gray, dynamic = load("digits"), load("digits", binarize="dynamic")
    assert torch.equal(dynamic.train, gray.train)
    assert torch.equal(dynamic.valid, load("digits", binarize="dynamic").valid)
    assert set(dynamic.test.unique().tolist()) == {0.0, 1.0}
    generator = torch.Generator().manual_seed(0)
    epochs = torch.stack([dynamic.transform(dynamic.train, generator) for _ in range(200)])
    assert not torch.equal(epochs[0], epochs[1])
    again = dynamic.transform(dynamic.train, torch.Generator().manual_seed(0))
    assert torch.equal(again, epochs[0])
    # 200 draws of a pixel have a standard error of at most 0.036; over 83,008 pixels none strays beyond six of them.
    assert (epochs.mean(0) - gray.train).abs().max() < 6 * 0.036


COUNTS = """
import numpy as np


def counts(folder, splits):
    values = np.random.RandomState(0).poisson(3.0, (8, 2, 3)).astype(float)
    return {split: (values, None) for split in splits}


def gray(folder, splits):
    return {split: (np.random.RandomState(0).rand(8, 2, 3), None) for split in splits}
"""


@pytest.fixture
def own(tmp_path, monkeypatch):
    """A module of the user's own in the current folder."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own_data.py").write_text(COUNTS)
    yield
    sys.modules.pop("own_data", None)


def test_data_of_ones_own_are_left_as_they_are(own):
    counts = load("own_data:counts", binarize="auto")
    assert counts.binarize is None and counts.train.max() > 1
    assert torch.equal(counts.train, load("own_data:counts").train)
    assert load("own_data:gray", binarize="auto").train.unique().numel() > 2
    assert set(load("own_data:gray", binarize="static").train.unique().tolist()) == {0.0, 1.0}
    assert load("digits", binarize="auto").binarize == "static"
    assert Train().binarize == "auto"


@pytest.mark.parametrize("binarize", ["static", "dynamic"])
def test_counts_are_not_made_into_bits(own, binarize):
    with pytest.raises(BadInput, match=rf"own_data:counts has values from 0 to \d+: binarize={binarize}") as error:
        load("own_data:counts", binarize=binarize)
    assert "\n" not in str(error.value)


def test_splits_restrict_what_is_read():
    only = load("digits", splits=["test"])
    assert [len(only.train), len(only.valid), len(only.test)] == [0, 0, 300]
    assert list(only.labels) == ["test"] and only.data_shape == (1, 8, 8)
    assert load("digits", dtype=torch.float64, splits="valid").valid.dtype == torch.float64


def test_unknown_names_are_one_line():
    with pytest.raises(UnknownName, match="unknown dataset 'mnits': did you mean 'mnist'"):
        load("mnits")
    with pytest.raises(UnknownName, match="unknown binarization 'statik': did you mean 'static'"):
        load("digits", binarize="statik")
    with pytest.raises(UnknownName, match="unknown split 'tests': did you mean 'test'"):
        load("digits", splits=["tests"])


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_mnist_is_read_from_torchvisions_layout(tmp_path, monkeypatch, offline, suffix):
    images = write_mnist(tmp_path, "t10k", 30, suffix)
    monkeypatch.setenv("GUMBO_DATA", str(tmp_path))
    mnist = load("mnist", splits=["test"])
    assert mnist.test.shape == (30, 1, 28, 28)
    torch.testing.assert_close(mnist.test[:, 0], torch.from_numpy(images).float() / 255)
    assert mnist.labels["test"].tolist() == [i % 10 for i in range(30)]


def test_mnist_training_images_are_cut_at_fifty_thousand(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "_read_idx", lambda path: np.arange(60_000)[:, None, None] % 256)
    for name in ("images-idx3", "labels-idx1"):
        (tmp_path / "MNIST/raw").mkdir(parents=True, exist_ok=True)
        (tmp_path / f"MNIST/raw/train-{name}-ubyte").touch()
    mnist = load("mnist", splits=["train", "valid"], root=tmp_path)
    assert len(mnist.train) == 50_000 and len(mnist.valid) == 10_000
    assert mnist.valid[0].item() == pytest.approx((50_000 % 256) / 255)


MISSING = {
    "mnist": "put .*train-images-idx3-ubyte.gz.* into .*MNIST.raw$",
    "fashion-mnist": "put .*train-images-idx3-ubyte.gz.* into .*FashionMNIST.raw$",
    "omniglot": "put images_background.zip into .*omniglot-py$",
    "binarized-mnist": "put binarized_mnist.npz into ",
}


@pytest.mark.parametrize("name", MISSING)
def test_without_network_one_line_says_what_to_put_where(tmp_path, offline, name):
    with pytest.raises(BadInput, match=f"^{name} is not on disk and cannot be downloaded .*{MISSING[name]}") as caught:
        load(name, root=tmp_path)
    assert "\n" not in str(caught.value)


def test_mnist_with_its_test_images_alone_says_how_to_use_them(tmp_path, offline):
    write_mnist(tmp_path, "t10k", 3)
    with pytest.raises(BadInput, match=r'train-images-idx3-ubyte.gz.*; the test images are there: splits=\["test"\]'):
        load("mnist", root=tmp_path)


def test_a_damaged_file_is_named(tmp_path):
    write_mnist(tmp_path, "t10k", 3, suffix="")
    (tmp_path / "MNIST/raw/t10k-images-idx3-ubyte").write_bytes(b"<html>")
    with pytest.raises(BadInput, match="t10k-images-idx3-ubyte is not an IDX file"):
        load("mnist", root=tmp_path, splits="test")


def test_omniglot_is_shrunk_inverted_and_kept(tmp_path, monkeypatch):
    import torchvision.datasets
    from PIL import Image

    def omniglot(root, background, download):
        """White paper with a black dot of ink whose place tells the image."""
        paper = [Image.new("1", (105, 105), 1) for _ in range(2_010 if background else 5)]
        for i, image in enumerate(paper):
            image.paste(0, (i % 100, 0, i % 100 + 5, 5))
        return [(image, i // 20) for i, image in enumerate(paper)]

    monkeypatch.setattr(torchvision.datasets, "Omniglot", omniglot)
    first = load("omniglot", root=tmp_path)
    assert [len(first.train), len(first.valid), len(first.test)] == [10, 2_000, 5]
    assert first.data_shape == (1, 28, 28)
    assert first.test[0, 0, 0, 0] == 1 and first.test[0, 0, 20, 20] == 0
    monkeypatch.setattr(torchvision.datasets, "Omniglot", None)
    again = load("omniglot", root=tmp_path)
    assert torch.equal(again.valid, first.valid) and torch.equal(again.labels["valid"], first.labels["valid"])


def test_binarized_mnist_is_unpacked(tmp_path):
    rows = np.random.RandomState(0).randint(0, 2, (5, 784), dtype=np.uint8)
    np.savez(tmp_path / "binarized_mnist.npz", **dict.fromkeys(data.SPLITS, np.packbits(rows, axis=1)))
    binarized = load("binarized-mnist", root=tmp_path)
    assert torch.equal(binarized.test.flatten(1), torch.from_numpy(rows).float()) and not binarized.labels
    with pytest.raises(BadInput, match="binary already"):
        load("binarized-mnist", root=tmp_path, binarize="dynamic")


def test_images_lie_one_after_the_other(tmp_path):
    columns = np.asfortranarray(np.packbits(np.eye(9, 784, dtype=np.uint8), axis=1))
    np.savez(tmp_path / "binarized_mnist.npz", train=columns, valid=columns[:2], test=columns[:2])
    images = load("binarized-mnist", root=tmp_path)
    assert images.train.is_contiguous() and images.valid.is_contiguous()
    assert torch.equal(images.train.flatten(1), torch.eye(9, 784))


def test_binarized_mnist_download_is_checked_and_kept(tmp_path, monkeypatch):
    import hashlib
    import io
    import urllib.request

    rows = np.random.RandomState(0).randint(0, 2, (5, 784), dtype=np.uint8)
    text = b"\n".join(b" ".join(b"%d" % bit for bit in row) for row in rows)
    monkeypatch.setattr(urllib.request, "urlopen", lambda url, timeout: io.BytesIO(text))
    with pytest.raises(BadInput, match="downloaded train split is damaged"):
        load("binarized-mnist", root=tmp_path)
    assert not list(tmp_path.iterdir())
    digest = hashlib.sha256(np.packbits(rows, axis=1).tobytes()).hexdigest()
    monkeypatch.setattr(data, "_BINARIZED_MNIST", dict.fromkeys(data.SPLITS, digest))
    assert torch.equal(load("binarized-mnist", root=tmp_path).valid.flatten(1), torch.from_numpy(rows).float())
    assert [path.name for path in tmp_path.iterdir()] == ["binarized_mnist.npz"]


def test_the_real_binarized_mnist(shared_data):
    folder = shared_data("binarized_mnist.npz").parent
    binarized = load("binarized-mnist", root=folder)
    assert [len(binarized.train), len(binarized.valid), len(binarized.test)] == [50_000, 10_000, 10_000]
    # The share of ink in the literature's binarization.
    assert binarized.train.mean().item() == pytest.approx(0.1307, abs=2e-3)


def test_the_real_mnist_test_digits(shared_data):
    folder = shared_data("MNIST/raw/t10k-images-idx3-ubyte.gz").parents[2]
    mnist = load("mnist-test", root=folder)
    assert [len(mnist.train), len(mnist.valid), len(mnist.test)] == [7_000, 1_000, 2_000]
    assert mnist.labels["train"][:5].tolist() == [7, 2, 1, 0, 4]


def test_the_default_folder_is_in_the_users_cache(monkeypatch, tmp_path):
    monkeypatch.delenv("GUMBO_DATA", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert data.data_folder() == tmp_path / "gumbo"


# --- files that are not what they say ---------------------------------------------------------------------------------


def idx(sizes, content: bytes, kind: int = 8) -> bytes:
    return bytes([0, 0, kind, len(sizes)]) + np.array(sizes, ">i4").tobytes() + content


BROKEN_IDX = {
    "empty": b"",
    "only a magic": b"\0\0\x08\x03",
    "rank 0": idx([], b"\1"),
    "rank 255": b"\0\0\x08\xff" + b"\1" * 40,
    "short": idx([3, 28, 28], b"\1" * 100),
    "long": idx([3, 28, 28], b"\1" * (3 * 784 + 1)),
    "huge": idx([2**31 - 1, 2**31 - 1, 2**31 - 1], b"\1"),
    "of no size": idx([0, 28, 28], b""),
    "of negative size": idx([-3, 28, 28], b"\1" * 784),
    "floats": idx([3, 28, 28], b"\1" * 3 * 784, kind=0x0D),
}


@pytest.mark.parametrize("suffix", ["", ".gz"])
@pytest.mark.parametrize("content", BROKEN_IDX.values(), ids=BROKEN_IDX)
def test_a_broken_idx_file_is_one_line(content, suffix, tmp_path):
    write_mnist(tmp_path, "t10k", 3, suffix)
    path = tmp_path / f"MNIST/raw/t10k-images-idx3-ubyte{suffix}"
    path.write_bytes(gzip.compress(content) if suffix else content)
    with pytest.raises(BadInput, match="t10k-images-idx3-ubyte"):
        load("mnist", root=tmp_path, splits="test")


@pytest.mark.parametrize("damage", [lambda whole: whole[: len(whole) // 2], lambda whole: b"\x1f\x8b" + whole[10:]])
def test_a_broken_gz_is_one_line(damage, tmp_path):
    write_mnist(tmp_path, "t10k", 3, ".gz")
    path = tmp_path / "MNIST/raw/t10k-images-idx3-ubyte.gz"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(BadInput, match="t10k-images-idx3-ubyte.gz cannot be read"):
        load("mnist", root=tmp_path, splits="test")


def test_a_gz_bomb_is_read_no_further_than_its_header_says(tmp_path, monkeypatch):
    write_mnist(tmp_path, "t10k", 3, ".gz")
    path = tmp_path / "MNIST/raw/t10k-images-idx3-ubyte.gz"
    path.write_bytes(gzip.compress(idx([3, 28, 28], bytes(1 << 26))))
    tracemalloc.start()
    with pytest.raises(BadInput, match="holds more than the 2352 bytes"):
        load("mnist", root=tmp_path, splits="test")
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert most < 1 << 23


def test_images_without_a_label_each_are_refused(tmp_path):
    write_mnist(tmp_path, "t10k", 3, "")
    (tmp_path / "MNIST/raw/t10k-labels-idx1-ubyte").write_bytes(idx([2], b"\1\2"))
    with pytest.raises(BadInput, match="a label for each"):
        load("mnist", root=tmp_path, splits="test")


def test_an_array_of_the_published_size_must_be_the_published_one(tmp_path):
    raw = tmp_path / "MNIST/raw"
    raw.mkdir(parents=True)
    (raw / "t10k-images-idx3-ubyte").write_bytes(idx([10_000, 28, 28], bytes(7_840_000)))
    (raw / "t10k-labels-idx1-ubyte").write_bytes(idx([10_000], bytes(10_000)))
    with pytest.raises(BadInput, match="not MNIST's: its checksum differs"):
        load("mnist", root=tmp_path, splits="test")
    rows = np.zeros((10_000, 98), np.uint8)
    np.savez(tmp_path / "binarized_mnist.npz", test=rows)
    with pytest.raises(BadInput, match="not Larochelle's"):
        load("binarized-mnist", root=tmp_path, splits="test")


def npz_bomb(path):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive, archive.open("test.npy", "w") as file:
        np.lib.format.write_array_header_1_0(file, {"descr": "|u1", "fortran_order": False, "shape": (2**40, 98)})
        file.write(bytes(1 << 20))


BROKEN_NPZ = {
    "objects": lambda path: np.savez(path, test=np.array([{}, print], dtype=object)),
    "another name": lambda path: np.savez(path, images=np.zeros((3, 98), np.uint8)),
    "floats": lambda path: np.savez(path, test=np.zeros((3, 98))),
    "another width": lambda path: np.savez(path, test=np.zeros((3, 97), np.uint8)),
    "rank 0": lambda path: np.savez(path, test=np.uint8(3)),
    "text": lambda path: path.write_bytes(b"<html>"),
    "nothing": lambda path: path.write_bytes(b""),
    "a bomb": npz_bomb,
}


@pytest.mark.parametrize("write", BROKEN_NPZ.values(), ids=BROKEN_NPZ)
def test_a_broken_npz_is_one_line(write, tmp_path):
    write(tmp_path / "binarized_mnist.npz")
    with pytest.raises(BadInput, match=r"binarized_mnist\.npz"):
        load("binarized-mnist", root=tmp_path, splits="test")


RETURNED = {
    "nothing": None,
    "no splits": {},
    "no pair": {"test": np.zeros((3, 2, 2))},
    "text": {"test": (np.array(["a"]), None)},
    "no rows": {"test": (np.zeros((0, 2, 2)), None)},
    "a row": {"test": (np.zeros(3), None)},
    "NaN": {"test": (np.full((3, 2, 2), np.nan), None)},
    "too few labels": {"test": (np.zeros((3, 2, 2)), np.zeros(2, int))},
    "labels of another kind": {"test": (np.zeros((3, 2, 2)), np.zeros(3))},
}


@pytest.mark.parametrize("returned", RETURNED.values(), ids=RETURNED)
def test_a_loader_that_returns_something_else_is_one_line(returned, monkeypatch):
    monkeypatch.setitem(data.datasets._items, "mine", lambda folder, splits: returned)
    with pytest.raises(BadInput, match="^dataset 'mine': "):
        load("mine", splits="test")


@pytest.mark.parametrize("images", [True, False])
def test_a_data_set_is_one_function_and_one_registration(images, monkeypatch):
    monkeypatch.setattr(data.datasets, "_items", dict(data.datasets._items))
    monkeypatch.setattr(data, "_images", set(data._images))
    rows = np.random.default_rng(0).random((12, 2, 3))

    @data.dataset("toy", images=images)
    def toy(folder, splits):
        return {split: (rows, np.arange(12)) for split in splits}

    found = data.load("toy", binarize="auto")
    assert found.train.shape == (12, 1, 2, 3) and found.labels["test"].tolist() == list(range(12))
    assert bool(((found.train == 0) | (found.train == 1)).all()) == images


def test_chorales_are_padded_to_one_length_with_their_lengths_as_labels(tmp_path):
    rolls = {split: np.zeros((2, steps, 88), np.uint8) for split, steps in (("train", 3), ("valid", 5), ("test", 4))}
    for split in rolls:
        rolls[split][:, :3, 7] = 1
    packed = {split: np.packbits(roll, axis=-1) for split, roll in rolls.items()}
    lengths = {f"{split}_lengths": np.array([3, roll.shape[1]]) for split, roll in rolls.items()}
    np.savez(tmp_path / "jsb_chorales.npz", **packed, **lengths)
    found = load("jsb-chorales", root=tmp_path)
    assert found.data_shape == (1, 5, 88) and found.test.shape == (2, 1, 5, 88)
    assert found.labels["test"].tolist() == [3, 4]
    assert found.train.sum() == 6 and (found.train[:, 0, :3, 7] == 1).all()


def test_missing_chorales_are_one_line(tmp_path):
    with pytest.raises(BadInput, match=r"put jsb_chorales.npz into"):
        load("jsb-chorales", root=tmp_path)


def test_reuters_are_counts_with_a_word_for_each(tmp_path):
    counts = np.arange(120 * 3).reshape(120, 3) % 5
    np.savez(tmp_path / "reuters_counts.npz", counts=counts.astype(np.uint8), vocabulary=np.array(["a", "b", "c"]))
    found = load("reuters", root=tmp_path, binarize="auto")
    assert found.data_shape == (1, 3) and [len(part) for part in (found.train, found.valid, found.test)] == [25, 45, 50]
    assert sum(part.sum().item() for part in (found.train, found.valid, found.test)) == counts.sum()
    assert reuters_vocabulary(tmp_path) == ["a", "b", "c"]


def test_newsgroups_come_through_scikit_learn_once(tmp_path, monkeypatch):
    from types import SimpleNamespace

    calls = []

    def fetch(*, subset, data_home, remove, n_retries=3):
        calls.append((subset, n_retries))
        texts = ["Oil oil prices", "space SHUTTLE launch", "the oil of space"] * (4 if subset == "train" else 1)
        return SimpleNamespace(data=texts, target=np.arange(len(texts)) % 3)

    monkeypatch.setattr("sklearn.datasets.fetch_20newsgroups", fetch)
    found = load("20newsgroups", root=tmp_path)
    assert newsgroups_vocabulary(tmp_path) == ["launch", "oil", "prices", "shuttle", "space"]
    assert [len(part) for part in (found.train, found.valid, found.test)] == [10, 2, 3]
    assert found.test.squeeze(1).tolist() == [[0, 2, 1, 0, 0], [1, 0, 0, 1, 1], [0, 1, 0, 0, 1]]
    assert found.labels["test"].tolist() == [0, 1, 2]
    assert load("20newsgroups", root=tmp_path).train.equal(found.train) and calls == [("train", 1), ("test", 1)]


def test_newsgroups_without_a_network_are_one_line(tmp_path, offline):
    for ask in (lambda: load("20newsgroups", root=tmp_path), lambda: newsgroups_vocabulary(tmp_path)):
        with pytest.raises(BadInput, match=r"^20newsgroups is not on disk and cannot be downloaded .*put ") as caught:
            ask()
        assert "\n" not in str(caught.value)


def test_words_are_letters_padded_with_zeros(tmp_path):
    words = ["oil", "tea", "u.s", "a", "unanimously", *(f"{one}{two}x" for one in "abcdef" for two in "ghijkl")]
    np.savez(tmp_path / "reuters_counts.npz", counts=np.zeros((1, len(words))), vocabulary=np.array(words))
    found = load("words", root=tmp_path)
    assert found.data_shape == (1, 10) and len(found.test) == len(found.valid) == 1 and len(found.train) == 36
    told = [word for part in (found.train, found.valid, found.test) for word in spelled(part)]
    assert sorted(told) == sorted(set(words) - {"u.s", "a", "unanimously"})
    assert ((found.train > 0).int().diff(dim=-1) <= 0).all()  # letters, and then zeros only


def test_cells_have_the_means_of_their_law():
    cells, (shares, _) = load("cells"), cells_law()
    for kind in range(5):
        counts = cells.train[cells.labels["train"] == kind].flatten(1).numpy().sum(0)
        assert np.abs(counts / counts.sum() - shares[kind]).max() < 0.02


def pieces(scene, digits):
    """How many digits a scene is made of: taken off one after the other, each where it is found exactly."""
    left, number = scene.clone(), 0
    while left.any():
        found = [
            (top, left_side, digit)
            for top in range(13)
            for left_side in range(13)
            for digit in digits[(digits <= left[top : top + 8, left_side : left_side + 8] + 1e-6).all((1, 2))]
            if ((digit == left[top : top + 8, left_side : left_side + 8]) | (digit == 0)).all()
        ]
        top, left_side, digit = max(found, key=lambda one: one[2].sum().item())
        left[top : top + 8, left_side : left_side + 8] -= digit
        number += 1
    return number


def test_scenes_are_digits_of_their_split_and_labels_count_them():
    scenes, digits = load("scenes", binarize="auto"), load("digits")
    assert [len(scenes.train), len(scenes.valid), len(scenes.test)] == [10_000, 1_000, 2_000]
    assert scenes.data_shape == (1, 20, 20) and scenes.train.max() == 1
    for split in ("train", "valid", "test"):
        counts = scenes.labels[split]
        shares = counts.bincount() / len(counts)
        assert len(shares) == 3 and (shares - 1 / 3).abs().max() < 5 * (2 / 9 / len(counts)) ** 0.5
        for row in range(4):
            assert pieces(getattr(scenes, split)[row, 0], getattr(digits, split)[:, 0]) == counts[row]
    assert torch.equal(load("scenes", splits=["valid"]).valid, scenes.valid)


def test_scenes_of_mnist_have_every_second_digit_apart(shared_data):
    scenes = load("mnist-scenes", root=shared_data("MNIST").parent, splits=["valid"])
    ink, counts = scenes.valid.flatten(1), scenes.labels["valid"]
    assert scenes.data_shape == (1, 50, 50) and len(counts) == 1_000
    assert not ink[counts == 0].any() and ink[counts > 0].any(1).all() and ink.max() <= 1
    one, two = ((ink[counts == number] > 0).sum(1).double() for number in (1, 2))
    error = (two.var() / len(two) + 4 * one.var() / len(one)).sqrt()
    assert (two.mean() - 2 * one.mean()).abs() < 5 * error  # no ink is lost, so that none overlaps


OWN = """
import numpy as np
import torch
from torch.utils.data import DataLoader, TensorDataset


def rows(count=60):
    return torch.arange(count * 16.0).reshape(count, 1, 4, 4) / (count * 16), torch.arange(count) % 3


def a_data_set():
    return TensorDataset(*rows())


def an_array():
    return rows()[0].numpy()


def pairs():
    return tuple(part.numpy() for part in rows())


def loaders():
    return {{split: DataLoader(TensorDataset(*rows(20)), batch_size=10) for split in ("train", "valid", "test")}}


def mapped():
    x = rows()[0].numpy()
    file = np.memmap({file!r}, "float32", "w+", shape=x.shape)
    file[:] = x
    return file


def nothing():
    return 3


def a_loader():
    return DataLoader(a_data_set())


def a_masked_array():
    return np.ma.masked_array(an_array(), an_array() < 0.1)


def masked_splits(folder, splits):
    return {{split: (a_masked_array()[:, 0], None) for split in splits}}


def complex_numbers():
    return an_array() + 1j


def words():
    return np.array([["a", "b"]] * 60)


def a_failure():
    raise KeyError("no such column")
"""


@pytest.fixture
def own_source(tmp_path, monkeypatch):
    (tmp_path / "own_source.py").write_text(OWN.format(file=str(tmp_path / "rows")))
    monkeypatch.chdir(tmp_path)
    yield
    sys.modules.pop("own_source", None)


@pytest.mark.parametrize(("name", "sizes"), [("a_data_set", (48, 6, 6)), ("an_array", (48, 6, 6)), ("loaders", None)])
def test_a_function_of_nothing_makes_a_data_set_of_ones_own(name, sizes, own_source):
    data = load(f"own_source:{name}")
    assert data.data_shape == (1, 4, 4)
    if sizes is not None:
        assert (len(data.rows), len(data.valid), len(data.test)) == sizes
        together = torch.cat([data.valid, data.test, *(torch.as_tensor(data.rows[i][0])[None] for i in range(48))])
        assert len(torch.unique(together.flatten(1), dim=0)) == 60  # each row once
    assert load(f"own_source:{name}", binarize="static").test.unique().tolist() in ([0.0, 1.0], [0.0], [1.0])


@pytest.mark.parametrize("name", ["a_data_set", "an_array", "pairs", "loaders", "mapped"])
def test_train_takes_a_data_set_of_ones_own(name, own_source, capsys):
    options = ["--binarize", "static", "--model_options.hidden=[4]", "--epochs", "1", "--importance_samples", "2"]
    cli.main(["train", "--data", f"own_source:{name}", "--folder", "run", *options])
    assert "ELBO" in capsys.readouterr().out
    cli.main(["evaluate", "run", "--split", "train", "--trust", "--importance_samples", "2"])
    assert "train:" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("nothing", "expected a Dataset"),
        ("a_loader", "return a dict"),
        ("a_masked_array", "a masked array, whose mask would be lost"),
        ("masked_splits", "a masked array, whose mask would be lost"),
        ("complex_numbers", "values of type torch.complex64: expected real numbers"),
        ("words", "values of type <U1: expected real numbers"),
        ("a_failure", "its function failed: KeyError: 'no such column'"),
    ],
)
def test_what_is_no_data_set_of_ones_own_is_one_line(name, words, own_source):
    with pytest.raises(BadInput, match=words) as found:
        load(f"own_source:{name}")
    assert "\n" not in str(found.value)
