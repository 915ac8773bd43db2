"""Data sets by name: real images, in fixed and documented splits.

=================== =========== ========================== =========================================================
name                image       train / valid / test       splits
=================== =========== ========================== =========================================================
``digits``          1 x 8 x 8   1,297 / 200 / 300          a fixed permutation of scikit-learn's 1,797; needs no network
``mnist``           1 x 28 x 28 50,000 / 10,000 / 10,000   the first 50,000 training images, the rest, the test images
``fashion-mnist``   1 x 28 x 28 50,000 / 10,000 / 10,000   as ``mnist``
``mnist-test``      1 x 28 x 28 7,000 / 1,000 / 2,000      MNIST's 10,000 test images alone, in their own order
``omniglot``        1 x 28 x 28 17,280 / 2,000 / 13,180    a fixed permutation of the background set; the evaluation set
``binarized-mnist`` 1 x 28 x 28 50,000 / 10,000 / 10,000   as Larochelle & Murray 2011 fixed them; no labels
``reuters``         1 x 4258    300 / 45 / 50              word counts of 395 news; a fixed permutation; no labels
``20newsgroups``    1 x 2000    10,314 / 1,000 / 7,532     word counts of posts, through scikit-learn; labels: groups
``jsb-chorales``    1 x T x 88  229 / 76 / 77              piano rolls of Boulanger-Lewandowski; labels: lengths
``cells``           1 x 60      1,500 / 500 / 1,000        counts drawn from ``cells_law``; labels: types of cell
``words``           1 x 10      letters of Reuters' words  tokens: 1 to 26 are letters, 0 pads; no labels
``switching``       1 x 30 x 6  400 / 100 / 200            sequences drawn from ``switching_law``; labels: lengths
``scenes``          1 x 20 x 20 10,000 / 1,000 / 2,000     0 to 2 of ``digits``, those of the split; labels: how many
``mnist-scenes``    1 x 50 x 50 20,000 / 1,000 / 2,000     0 to 2 of ``mnist-test``, likewise
=================== =========== ========================== =========================================================

Files are read from the folder that the environment variable ``GUMBO_DATA`` names (by default ``gumbo`` in the user's
cache folder) and downloaded there on first use.
"""

from __future__ import annotations

import gzip
import hashlib
import inspect
import math
import os
import re
import warnings
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset

from gumbo.arrays import readable, refuse_table
from gumbo.errors import BadInput, GumboError, UnknownName, first_line
from gumbo.experiments._names import named
from gumbo.files import write_whole
from gumbo.registry import Registry, describe, is_import_path, is_librarys, takes

__all__ = [
    "ImageData",
    "cells_law",
    "data_folder",
    "dataset",
    "datasets",
    "load",
    "newsgroups_vocabulary",
    "reuters_vocabulary",
    "spelled",
    "switching_law",
    "switching_regimes",
]

SPLITS = ("train", "valid", "test")
BINARIZATIONS = ("static", "dynamic", "auto")

Split = tuple[np.ndarray, "np.ndarray | None"]  # images (N, H, W) in [0, 1], and their labels (N,) if there are any
Loader = Callable[[Path, Sequence[str]], dict[str, Split]]


def _expected(found: object) -> str:
    """Check a loader: it takes a folder and the splits, or nothing, and belongs to no library."""
    own = callable(found) and not isinstance(found, type) and not is_librarys(found)
    fits = own and (takes(found, 2) or takes(found, 0))
    return "" if fits else "a loader of data, a function of (folder, splits) or of nothing"


datasets: Registry[Loader] = Registry("dataset", _expected)


_images: set[str] = set()


@dataclass(frozen=True)
class Described:
    """What `gumbo list data` says of a data set: its rows, where they come from, and two rows of the kind to try.

    ``example`` is a split ``(rows, labels or None)`` with the dimensions of the data, and fewer of each.
    """

    holds: str = ""
    source: str = ""
    example: Split | None = None


described: dict[str, Described] = {}
DOWNLOADED = "downloaded on first use"

FEW_IMAGES: Split = (np.tile(np.eye(8, dtype=np.float32), (2, 1, 1)), np.array([0, 1]))
IMAGES = (FEW_IMAGES, (FEW_IMAGES[0], None))
FEW_COUNTS: Split = (np.arange(24, dtype=np.float32).reshape(2, 12) % 5, None)
FEW_WORDS: Split = (np.array([[3, 1, 2, 0], [1, 4, 0, 0]], np.float32), None)
FEW_ROLLS: Split = (np.tile(np.eye(4, 88, dtype=np.float32), (2, 1, 1)), np.array([4, 2]))
FEW_SERIES: Split = (np.linspace(-1.5, 1.5, 48, dtype=np.float32).reshape(2, 4, 6), np.array([4, 2]))


def dataset(
    name: str, images: bool = False, holds: str = "", source: str = "", example: Split | None = None
) -> Callable[[Loader], Loader]:
    """Register a loader, a function from a folder and the names of splits to ``{split: (rows, labels or None)}``.

    Args:
        name: the name for ``load`` and ``--data``.
        images: whether rows are images with gray levels in [0, 1], which ``binarize="auto"`` thresholds at one half;
            other rows (counts, measurements) are not changed.
        holds: what a row is, in a few words, for ``gumbo list data``.
        source: where the data come from, in a few words.
        example: two rows of the kind, ``(rows, labels or None)``, by which ``gumbo list`` tries the models; None takes
            images for ``images``, and tries none otherwise.
    """

    def enrol(loader: Loader) -> Loader:
        datasets.register(name, loader)
        described[name] = Described(holds, source, FEW_IMAGES if images and example is None else example)
        if images:
            _images.add(name)
        return loader

    return enrol


@dataclass(frozen=True)
class ImageData:
    """Images ``(N, 1, H, W)`` of three splits, and their labels ``(N,)`` by split, if any.

    A split that was not requested is empty. With ``binarize="dynamic"`` ``train`` keeps its gray levels, and
    ``transform`` draws zeros and ones from them, once per epoch or per batch. ``rows`` is a Dataset or DataLoader of
    the training rows if these are read on demand; ``train`` is empty then.

    Args:
        name: the name of the data set.
        train: the training images.
        valid: the validation images.
        test: the test images.
        labels: labels by split.
        binarize: how images become zeros and ones, as in :func:`load`.
        rows: training rows that are read on demand.
    """

    name: str
    train: Tensor
    valid: Tensor
    test: Tensor
    labels: dict[str, Tensor] = field(default_factory=dict)
    binarize: str | None = None
    rows: Any = None

    @property
    def data_shape(self) -> tuple[int, ...]:
        """The shape of one image, for models."""
        return tuple(self.train.shape[1:])  # without rows if they are read on demand

    def batch(self, rows: Any, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor | None]:
        """The images of a training batch for the model, and their labels if there are any."""
        images, labels = parts_of(self.name, rows)
        if self.rows is not None:
            images = _prepared(self.name, images, self.binarize, self.valid.dtype)
            labels = None if labels is None else torch.as_tensor(labels).long()
        return self.transform(images, generator), labels

    def transform(self, images: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Training ``images`` for the model: drawn again under dynamic binarization."""
        return torch.bernoulli(images, generator=generator) if self.binarize == "dynamic" else images


def load(
    name: str,
    binarize: str | None = None,
    splits: Sequence[str] = SPLITS,
    root: str | Path | None = None,
    dtype: torch.dtype = torch.float32,
) -> ImageData:
    """The data set of that name: images with values in [0, 1], or in {0, 1} if they are binarized.

    Your own loader may return any numbers, such as counts. ``binarize="auto"`` thresholds the images of the table above
    at one half and does not change other data; ``"static"`` thresholds at one half; ``"dynamic"`` makes zeros and ones
    by a Bernoulli draw per pixel: again for training images whenever ``ImageData.transform`` is called, once with a
    fixed seed for the other splits, so that evaluations are comparable. ``splits`` restricts what is read, so that
    MNIST's test images can be used without its training images. ``root`` overrides the folder. ``dtype`` is that of the
    images. Raises UnknownName for
    an unknown name or binarization, and BadInput for a binarization of values outside [0, 1], and for a file that is
    missing and cannot be downloaded, with the place to put it.

    >>> data = load("digits", binarize="static")
    >>> data.train.shape, data.train.unique(), data.labels["test"].shape
    (torch.Size([1297, 1, 8, 8]), tensor([0., 1.]), torch.Size([300]))
    """
    if binarize is not None and binarize not in BINARIZATIONS:
        raise UnknownName("binarization", binarize, BINARIZATIONS)
    splits = (splits,) if isinstance(splits, str) else tuple(splits)
    for split in splits:
        if split not in SPLITS:
            raise UnknownName("split", split, SPLITS)
    if name not in datasets and (Path(name).suffix in FILES or Path(name).is_file()):
        raise BadInput(f"dataset {name!r} is a file: name a function that reads it and returns an array, mymodule:rows")
    loader = named(datasets, name)
    reads_files = takes(loader, 2)
    with _explained(name):
        read = loader(Path(root) if root is not None else data_folder(), splits) if reads_files else loader()
    if not reads_files:
        return _own(name, read, binarize, splits, dtype)
    read = _checked(name, read, splits)
    shape = next(iter(read.values()))[0].shape[1:]
    images = {split: torch.zeros(0, 1, *shape, dtype=dtype) for split in SPLITS}
    images |= {split: _rows(pixels).to(dtype).unsqueeze(1) for split, (pixels, _) in read.items()}
    if binarize == "auto":
        binarize = "static" if name in _images else None
    if binarize is not None:
        _refuse_levels(name, images, binarize)
    labels = {split: torch.from_numpy(label).long() for split, (_, label) in read.items() if label is not None}
    if binarize == "static":
        images = {split: (pixels >= 0.5).to(dtype) for split, pixels in images.items()}
    elif binarize == "dynamic":
        _refuse_binary(name, images)
        images |= {split: _fixed_draw(images[split], seed) for seed, split in enumerate(("valid", "test"))}
    return ImageData(name, **images, labels=labels, binarize=binarize)


FILES = (".csv", ".feather", ".h5", ".npy", ".npz", ".parquet", ".pt", ".tsv", ".txt", ".xlsx")


@contextmanager
def _explained(name: str) -> Iterator[None]:
    """Name the data set in an error of the user's own function."""
    try:
        yield
    except Exception as error:
        if not is_import_path(name) or isinstance(error, GumboError):
            raise
        raise BadInput(f"dataset {name!r}: its function failed: {first_line(error, kind=True)}") from error


def parts_of(name: str, rows: Any) -> tuple[Any, Any]:
    """Images and labels (or None) of a batch in any form: images, a tuple with labels second, a mapping."""
    if isinstance(rows, Mapping):
        found = [next((rows[key] for key in keys if key in rows), None) for keys in (_IMAGES, _LABELS)]
        if found[0] is None:
            raise BadInput(f"dataset {name!r}: its items have {', '.join(map(str, rows))}: expected one of {_IMAGES}")
        return found[0], found[1]
    if isinstance(rows, (tuple, list)):
        if not 1 <= len(rows) <= 2:
            raise BadInput(f"dataset {name!r}: its items have {len(rows)} parts: expected images, and labels if any")
        return rows[0], rows[1] if len(rows) == 2 else None
    return rows, None


_IMAGES, _LABELS = ("images", "x", "image"), ("labels", "label", "y")


def _own(name: str, made: Any, binarize: str | None, splits: Sequence[str], dtype) -> ImageData:
    """The data that a user's function made: a Dataset, a DataLoader or arrays, for each split or for all."""
    from gumbo.inference.engine.sources import Source

    who = f"dataset {name!r}"
    if not (isinstance(made, Mapping) and set(made) <= set(SPLITS)):
        whole = made if isinstance(made, (Dataset, DataLoader)) else _ArrayRows(who, made)
        if isinstance(whole, (DataLoader, IterableDataset)):
            raise BadInput(f"{who} is {describe(made)}, which is not split here: return a dict with train, valid, test")
        count = len(whole)  # type: ignore[arg-type]
        order, ends = _permutation(count).tolist(), [count * 8 // 10, count * 9 // 10, count]
        made = {s: Subset(whole, order[a:b]) for s, a, b in zip(SPLITS, [0, *ends], ends, strict=False)}
    if not set(splits) <= set(made):
        raise BadInput(f"{who} has splits {', '.join(made) or 'none'}: expected a dict with {', '.join(splits)}")
    binarize = None if binarize == "auto" else binarize
    parts = {s: one if isinstance(one, (Dataset, DataLoader)) else _ArrayRows(who, one) for s, one in made.items()}
    images: dict[str, Tensor] = {}
    labels: dict[str, Tensor] = {}
    for split in ("valid", "test"):
        if split in splits:
            held, label = parts_of(name, Source(parts[split], f"{who}, {split}").held())
            fixed = binarize if binarize != "dynamic" else None
            images[split] = _prepared(name, held, fixed, dtype)
            if binarize == "dynamic":
                _refuse_levels(name, {split: images[split]}, binarize)
                images[split] = _fixed_draw(images[split], SPLITS.index(split) - 1)
            labels |= {} if label is None else {split: torch.as_tensor(label).long()}
    if not images:
        source = Source(parts["train"], who)
        first = next(iter(source.dataset)) if source.iterable else source.dataset[0]
        images["valid"] = _prepared(name, parts_of(name, first)[0], None, dtype).unsqueeze(0)[:0]
    empty = torch.zeros(0, *next(iter(images.values())).shape[1:], dtype=dtype)
    images = {split: images.get(split, empty) for split in SPLITS}
    return ImageData(name, **images, labels=labels, binarize=binarize, rows=parts.get("train"))


class _ArrayRows(Dataset):
    """The rows of an array, a tensor or a memory-mapped file, or of a pair of them with labels second."""

    def __init__(self, who: str, arrays: Any):
        arrays = arrays if isinstance(arrays, (tuple, list)) else (arrays,)
        for place, array in enumerate(arrays):
            refuse_table(array, place, who)
        found = [readable(array, place, who) for place, array in enumerate(arrays) if array is not None]
        kinds = [isinstance(array, (np.ndarray, Tensor)) and array.ndim for array in found]
        if not found or len(arrays) > 2 or not all(kinds) or len({len(array) for array in found}) != 1:
            raise BadInput(
                f"{who} is {describe(arrays[0]) if arrays else 'nothing'}: expected a Dataset, a DataLoader, an array "
                "(N, …), or (array, labels)"
            )
        for array in found:
            if not isinstance(array, Tensor) or array.is_complex():
                raise BadInput(f"{who} has values of type {array.dtype}: expected real numbers")
        self.arrays = found

    def __len__(self) -> int:
        return len(self.arrays[0])

    def __getitem__(self, number: int) -> Any:
        return tuple(array[number] for array in self.arrays)


def _prepared(name: str, images: Any, binarize: str | None, dtype: torch.dtype) -> Tensor:
    """Images in the dtype of models, thresholded if requested; BadInput for values that do not allow it."""
    if not isinstance(images, Tensor):
        raise BadInput(f"dataset {name!r}: its rows are {describe(images)}: expected tensors or arrays of numbers")
    if images.is_complex():
        raise BadInput(f"dataset {name!r} has values of type {images.dtype}: expected real numbers")
    images = images.to(dtype)
    if not torch.isfinite(images).all():
        raise BadInput(f"dataset {name!r}: its rows are not finite everywhere")
    if binarize is not None:
        _refuse_levels(name, {"": images}, binarize)
    return (images >= 0.5).to(dtype) if binarize == "static" else images


def _checked(name: str, read: Any, splits: Sequence[str]) -> dict[str, Split]:
    """The result of a loader, as arrays; BadInput for an invalid result."""
    who = f"dataset {name!r}"
    if not isinstance(read, Mapping) or not set(splits) <= set(read):
        raise BadInput(f"{who}: its loader returned {describe(read)}: expected a dict with {', '.join(splits)}")
    found = {}
    for split in splits:
        if not (isinstance(read[split], (tuple, list)) and len(read[split]) == 2):
            raise BadInput(f"{who}: its {split} split is {describe(read[split])}: expected (images, labels or None)")
        if any(np.ma.is_masked(part) for part in read[split]):
            raise BadInput(f"{who}: its {split} split is a masked array, whose mask would be lost: fill it")
        images, labels = (None if part is None else np.asarray(part) for part in read[split])
        if images is None or images.dtype.kind not in "biuf" or images.ndim < 2 or not len(images):
            what = "None" if images is None else f"{images.shape} {images.dtype}"
            raise BadInput(f"{who}: its {split} images are {what}: expected numbers (N, H, W), N of at least 1")
        if images.dtype.kind == "f" and not np.isfinite(images).all():
            raise BadInput(f"{who}: its {split} images are not finite everywhere")
        if labels is not None and (labels.dtype.kind not in "biu" or labels.shape[:1] != images.shape[:1]):
            raise BadInput(
                f"{who}: its {split} labels are {labels.shape} {labels.dtype}: expected integers {images.shape[:1]}"
            )
        found[split] = images, labels
    return found


def _rows(pixels: np.ndarray) -> Tensor:
    """Contiguous images: batches are gathered by row."""
    return torch.from_numpy(np.ascontiguousarray(pixels))


def data_folder() -> Path:
    """The folder of data files: ``GUMBO_DATA``, or ``gumbo`` in the user's cache folder."""
    if folder := os.environ.get("GUMBO_DATA"):
        return Path(folder)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "gumbo"


def _refuse_levels(name: str, images: dict[str, Tensor], binarize: str) -> None:
    """Raise BadInput for values that are not gray levels: a threshold of one half would turn counts into bits."""
    for pixels in images.values():
        if pixels.numel() and not (pixels.min() >= 0 and pixels.max() <= 1):
            raise BadInput(
                f"{name} has values from {pixels.min():.6g} to {pixels.max():.6g}: binarize={binarize} takes gray "
                "levels in [0, 1]; use binarize=None (--binarize null), or other data"
            )


def _refuse_binary(name: str, images: dict[str, Tensor]) -> None:
    if all(((pixels == 0) | (pixels == 1)).all() for pixels in images.values()):
        raise BadInput(f"{name} is binary already: there are no gray levels to draw from; use binarize=None")


def _fixed_draw(pixels: Tensor, seed: int) -> Tensor:
    return torch.bernoulli(pixels, generator=torch.Generator().manual_seed(seed))


def _permutation(size: int) -> np.ndarray:
    # RandomState's stream is frozen by numpy's policy, so the splits never change.
    return np.random.RandomState(0).permutation(size)


def _cut(images: np.ndarray, labels: np.ndarray | None, sizes: Sequence[int]) -> dict[str, Split]:
    """Consecutive pieces of the given sizes, by split."""
    ends = np.cumsum(sizes)
    pieces = zip(SPLITS[: len(sizes)], sizes, ends, strict=True)
    return {
        split: (images[end - size : end], None if labels is None else labels[end - size : end])
        for split, size, end in pieces
    }


def _only(read: dict[str, Split], splits: Sequence[str]) -> dict[str, Split]:
    return {split: read[split] for split in splits}


@dataset("digits", images=True, holds="gray images 8 × 8, and the digit", source="ships with scikit-learn")
def _digits(folder: Path, splits: Sequence[str]) -> dict[str, Split]:
    from sklearn.datasets import load_digits

    bunch = load_digits()
    order = _permutation(len(bunch.images))
    return _only(_cut(bunch.images[order] / 16, bunch.target[order], (1297, 200, 300)), splits)


@dataset("mnist", images=True, holds="gray images 28 × 28, and the digit", source=DOWNLOADED)
def _mnist(folder: Path, splits: Sequence[str]) -> dict[str, Split]:
    return _mnist_like("mnist", "MNIST", folder, splits)


@dataset("fashion-mnist", images=True, holds="gray images 28 × 28, and the garment", source=DOWNLOADED)
def _fashion_mnist(folder: Path, splits: Sequence[str]) -> dict[str, Split]:
    return _mnist_like("fashion-mnist", "FashionMNIST", folder, splits)


@dataset("mnist-test", images=True, holds="MNIST's 10,000 test images, cut into splits", source=DOWNLOADED)
def _mnist_test(folder: Path, splits: Sequence[str]) -> dict[str, Split]:
    images, labels = _mnist_like("mnist-test", "MNIST", folder, ["test"])["test"]
    return _only(_cut(images, labels, (7_000, 1_000, 2_000)), splits)


def _mnist_like(name: str, torchvision_name: str, folder: Path, splits: Sequence[str]) -> dict[str, Split]:
    """MNIST or a data set in its format, in torchvision's folder layout."""
    raw = folder / torchvision_name / "raw"
    prefixes = sorted({"t10k" if split == "test" else "train" for split in splits})
    files = [f"{prefix}-{kind}-ubyte" for prefix in prefixes for kind in ("images-idx3", "labels-idx1")]
    missing = [file for file in files if _find(raw / file) is None]
    if missing:

        def download() -> None:
            import torchvision.datasets

            getattr(torchvision.datasets, torchvision_name)(folder, download=True)

        test_is_here = not any(file.startswith("t10k") for file in missing)
        advice = '; the test images are there: splits=["test"] needs no others' if test_is_here else ""
        _download(name, download, f"{', '.join(f'{file}.gz' for file in missing)} into {raw}{advice}")
    arrays = {file: _read_idx(_find(raw / file)) for file in files}
    for file, array in arrays.items():
        _check_known(torchvision_name, file, array, raw)
    read = {}
    for prefix in prefixes:
        images, labels = (arrays[f"{prefix}-{kind}-ubyte"] for kind in ("images-idx3", "labels-idx1"))
        if images.ndim != 3 or labels.shape[:1] != images.shape[:1]:
            raise BadInput(
                f"{raw}: the {prefix} files hold {images.shape} and {labels.shape}, expected images (N, H, W) and "
                "a label for each; delete them to have them downloaded again"
            )
        images, labels = images.astype(np.float32) / 255, labels.astype(np.int64)
        if prefix == "t10k":
            read["test"] = images, labels
        else:
            read |= _cut(images, labels, (50_000, 10_000))
    return _only(read, splits)


def _find(path: Path) -> Path | None:
    """The file, plain or gzipped."""
    return next((found for found in (path, path.with_name(path.name + ".gz")) if found.exists()), None)


# MD5 of the IDX files, unpacked: the data sets as they were published.
_KNOWN = {
    "MNIST": {
        "train-images-idx3-ubyte": "6bbc9ace898e44ae57da46a324031adb",
        "train-labels-idx1-ubyte": "a25bea736e30d166cdddb491f175f624",
        "t10k-images-idx3-ubyte": "2646ac647ad5339dbf082846283269ea",
        "t10k-labels-idx1-ubyte": "27ae3e4e09519cfbb04c329615203637",
    },
    "FashionMNIST": {
        "train-images-idx3-ubyte": "f4a8712d7a061bf5bd6d2ca38dc4d50a",
        "train-labels-idx1-ubyte": "9018921c3c673c538a1fc5bad174d6f9",
        "t10k-images-idx3-ubyte": "8181f5470baa50b63fa0f6fddb340f0a",
        "t10k-labels-idx1-ubyte": "15d484375f8d13e6eb1aabb0c3f46965",
    },
}


def _check_known(name: str, file: str, array: np.ndarray, folder: Path) -> None:
    """Raise BadInput for an array with the published size and other content; another size is a user's own data."""
    rows = 10_000 if file.startswith("t10k") else 60_000
    if array.shape != ((rows, 28, 28) if "images" in file else (rows,)):
        return
    header = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">i4").tobytes()
    if hashlib.md5(header + array.tobytes(), usedforsecurity=False).hexdigest() != _KNOWN[name][file]:
        raise BadInput(
            f"{folder / file} is damaged or not {name}'s: its checksum differs; delete it to download it again"
        )


_LARGEST = 1 << 30  # bytes of one array; the largest of the data sets here has 47 million


def _read_idx(path: Path) -> np.ndarray:
    """An array of bytes in the IDX format: two zeros, the type (8: a byte), the rank, big-endian sizes, the data.

    Raises BadInput, having read no more than the header says, for a file of another format or size.
    """
    again = "; delete it to have it downloaded again"
    try:
        with gzip.open(path) if path.suffix == ".gz" else open(path, "rb") as file:
            start = file.read(4)
            if start[:3] != b"\0\0\x08" or len(start) < 4:
                raise BadInput(f"{path} is not an IDX file of bytes{again}")
            sizes = [int(size) for size in np.frombuffer(file.read(4 * start[3])[: 4 * start[3]], ">i4")]
            if not sizes or len(sizes) != start[3] or min(sizes) < 1:
                raise BadInput(f"{path} is not an IDX file: its sizes are {sizes}{again}")
            if math.prod(sizes) > _LARGEST:
                raise BadInput(f"{path} says that it holds {math.prod(sizes)} bytes, more than {_LARGEST}{again}")
            content = file.read(math.prod(sizes) + 1)
    except (OSError, EOFError, ValueError, zlib.error) as error:
        if isinstance(error, BadInput):
            raise
        raise BadInput(f"{path} cannot be read ({error}){again}") from error
    if len(content) != math.prod(sizes):
        held = "more" if len(content) > math.prod(sizes) else "less"
        raise BadInput(f"{path} holds {held} than the {math.prod(sizes)} bytes that it says{again}")
    return np.frombuffer(content, np.uint8).reshape(sizes)


def _read_npz(path: Path, names: Sequence[str]) -> dict[str, np.ndarray]:
    """Arrays of numbers out of an ``.npz``.

    Raises BadInput, having unpacked no more than `_LARGEST` bytes an array, for a file of another format, without one
    of the names, or with objects, which are code.
    """
    found = {}
    try:
        with zipfile.ZipFile(path) as archive:
            held = {entry.filename.removesuffix(".npy"): entry for entry in archive.infolist()}
            for name in names:
                if name not in held:
                    raise BadInput(f"{path} has no array {name!r}; it has {', '.join(sorted(held)) or 'none'}")
                if held[name].file_size > _LARGEST:
                    raise BadInput(f"{path}: {name!r} would unpack to {held[name].file_size} bytes: not read")
                with archive.open(held[name]) as file:
                    found[name] = _read_npy(file)
    except BadInput:
        raise
    except Exception as error:  # zipfile, zlib and numpy raise errors of any type on a broken file
        raise BadInput(f"{path} is damaged or no .npz file ({type(error).__name__}: {error})") from error
    return found


def _read_npy(file: IO[bytes]) -> np.ndarray:
    version = np.lib.format.read_magic(file)
    read_header = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}[version]
    shape, fortran, dtype = read_header(file)
    if dtype.kind not in "biuf":
        raise ValueError(f"an array of {dtype}, expected numbers")
    content = file.read()
    if len(content) != math.prod(shape) * dtype.itemsize:
        raise ValueError(f"an array {shape} of {dtype} in {len(content)} bytes")
    return np.frombuffer(content, dtype).reshape(shape, order="F" if fortran else "C")


def _download(name: str, action: Callable[[], object], what: str) -> None:
    try:
        action()
    except (OSError, RuntimeError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[-1]
        raise BadInput(f"{name} is not on disk and cannot be downloaded ({reason}): put {what}") from error


@dataset("omniglot", images=True, holds="gray images of characters, 28 × 28", source=DOWNLOADED)
def _omniglot(folder: Path, splits: Sequence[str]) -> dict[str, Split]:
    read = {}
    if {"train", "valid"} & set(splits):
        images, labels = _omniglot_part(folder, background=True)
        order = _permutation(len(images))
        read |= _cut(images[order], labels[order], (len(images) - 2_000, 2_000))
    if "test" in splits:
        read["test"] = _omniglot_part(folder, background=False)
    return _only(read, splits)


def _omniglot_part(folder: Path, background: bool) -> tuple[np.ndarray, np.ndarray]:
    """One of Omniglot's two sets, reduced to 28 x 28 with ink as 1; cached as an ``.npz``, since many PNGs are slow."""
    part = "background" if background else "evaluation"
    kept = folder / f"omniglot-28-{part}.npz"
    if not kept.exists():
        found: list = []

        def download() -> None:
            import torchvision.datasets

            found.append(torchvision.datasets.Omniglot(folder, background=background, download=True))

        _download("omniglot", download, f"images_{part}.zip into {folder / 'omniglot-py'}")
        pixels = [np.asarray(image.convert("L").resize((28, 28), resample=4)) for image, _ in found[0]]  # 4: box filter
        labels = [label for _, label in found[0]]
        _save(kept, images=255 - np.stack(pixels), labels=np.array(labels))
    arrays = _read_npz(kept, ("images", "labels"))
    return arrays["images"].astype(np.float32) / 255, arrays["labels"].astype(np.int64)


_LAROCHELLE = "http://www.cs.toronto.edu/~larocheh/public/datasets/binarized_mnist/binarized_mnist_{}.amat"
# SHA-256 of the packed rows of each split, so that a damaged or different download is detected.
_BINARIZED_MNIST = {
    "train": "727146c35424b019f3e350e1e69faa05644a0abaf787e3f4e1a9632220a13906",
    "valid": "a256ac44ae26be720fad8616a05ed6ecfd1619930d9a208379bb2a4405df5b6d",
    "test": "9fcd8da6f0fdf09b2ba30fe63a0bb784042a0de82563172530229b983e294ff2",
}


_BINARIZED_MNIST_ROWS = {"train": 50_000, "valid": 10_000, "test": 10_000}


@dataset(
    "binarized-mnist",
    images=True,
    holds="binary images 28 × 28",
    source=DOWNLOADED,
    example=IMAGES[1],
)
def _binarized_mnist(folder: Path, splits: Sequence[str]) -> dict[str, Split]:
    path = folder / "binarized_mnist.npz"
    if not path.exists():
        _download("binarized-mnist", lambda: _convert_binarized_mnist(path), f"binarized_mnist.npz into {folder}")
    packed = _read_npz(path, splits)
    for split, rows in packed.items():
        if rows.dtype != np.uint8 or rows.ndim != 2 or rows.shape[1] != 98:
            raise BadInput(f"{path}: {split!r} is {rows.shape} {rows.dtype}, expected 98 bytes a row")
        digest = hashlib.sha256(np.ascontiguousarray(rows)).hexdigest()
        if len(rows) == _BINARIZED_MNIST_ROWS[split] and digest != _BINARIZED_MNIST[split]:
            raise BadInput(f"{path}: {split!r} is damaged or not Larochelle's; delete the file to download it again")
    return {split: (_unpack(packed[split]), None) for split in splits}


def _unpack(rows: np.ndarray) -> np.ndarray:
    return np.unpackbits(rows, axis=1)[:, :784].reshape(-1, 28, 28)


def _convert_binarized_mnist(path: Path) -> None:
    """Download the three text files (a row per image, 784 numbers a row) and store them packed, 98 bytes a row."""
    from urllib.request import urlopen

    packed = {}
    for split, digest in _BINARIZED_MNIST.items():
        with urlopen(_LAROCHELLE.format(split), timeout=60) as answer:
            rows = np.array([line.split() for line in answer.read().splitlines()], dtype=np.uint8)
        packed[split] = np.packbits(rows, axis=1)
        if hashlib.sha256(packed[split].tobytes()).hexdigest() != digest:
            raise BadInput(f"binarized-mnist: the downloaded {split} split is damaged or not the known one; try again")
    _save(path, **packed)


def _save(path: Path, **arrays: np.ndarray) -> None:
    """Write an ``.npz`` atomically."""
    write_whole(path, lambda file: np.savez_compressed(file, **arrays), shared=True)


@dataset("reuters", holds="counts of words, a document a row", source="ships with the package lda", example=FEW_COUNTS)
def _reuters(folder: Path, splits: Sequence[str]) -> dict[str, Split]:
    path = folder / "reuters_counts.npz"
    if path.exists():
        counts = _read_npz(path, ("counts",))["counts"]
    else:
        counts = _ldas("load_reuters", path)
    order = _permutation(len(counts))
    rows = counts[order].astype(np.float32)
    return _only(_cut(rows, None, (len(rows) - 95, 45, 50)), splits)


def reuters_vocabulary(root: str | Path | None = None) -> list[str]:
    """The words of the columns of ``reuters``.

    Args:
        root: the data folder, by default that of ``load``.

    Raises:
        BadInput: if there is no file and the package ``lda`` is not installed.
    """
    path = (Path(root) if root is not None else data_folder()) / "reuters_counts.npz"
    if not path.exists():
        return list(_ldas("load_reuters_vocab", path))
    return _vocabulary(path)


def _vocabulary(path: Path) -> list[str]:
    try:
        with np.load(path, allow_pickle=False) as held:
            return [str(word) for word in held["vocabulary"]]
    except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
        raise BadInput(f"{path} holds no vocabulary ({type(error).__name__}: {error})") from error


NEWSGROUP_WORDS = 2_000


@dataset("20newsgroups", holds="counts of words, a post a row, and its group", source=DOWNLOADED, example=FEW_COUNTS)
def _newsgroups(folder: Path, splits: Sequence[str]) -> dict[str, Split]:
    """The counts of the most frequent words in the training posts; every post, without headers, footers and quotes."""
    held = _read_npz(_newsgroups_file(folder), ("train", "train_labels", "test", "test_labels"))
    counts = held["train"].astype(np.float32)
    order = _permutation(len(counts))
    valid = min(1_000, len(counts) // 5)
    read = _cut(counts[order], held["train_labels"][order], (len(counts) - valid, valid))
    return _only(read | {"test": (held["test"].astype(np.float32), held["test_labels"].astype(np.int64))}, splits)


def newsgroups_vocabulary(root: str | Path | None = None) -> list[str]:
    """The words of the columns of ``20newsgroups``.

    Args:
        root: the data folder, by default that of ``load``.

    Raises:
        BadInput: if the data are not on disk and cannot be downloaded.
    """
    return _vocabulary(_newsgroups_file(Path(root) if root is not None else data_folder()))


def _newsgroups_file(folder: Path) -> Path:
    """The counts, made of scikit-learn's download at first use."""
    path = folder / "20newsgroups_counts.npz"
    posts: dict[str, Any] = {}
    if path.exists():
        return path
    from sklearn.datasets import fetch_20newsgroups
    from sklearn.feature_extraction.text import CountVectorizer

    options: dict[str, Any] = {"data_home": str(folder), "remove": ("headers", "footers", "quotes")}
    if "n_retries" in inspect.signature(fetch_20newsgroups).parameters:  # since scikit-learn 1.5
        options["n_retries"] = 1

    def download() -> None:
        with warnings.catch_warnings():  # of the second try
            warnings.simplefilter("ignore")
            for split in ("train", "test"):
                posts[split] = fetch_20newsgroups(subset=split, **options)

    folder.mkdir(parents=True, exist_ok=True)
    _download("20newsgroups", download, f"{path.name} or scikit-learn's 20news-bydate_py3.pkz into {folder}")
    made = CountVectorizer(stop_words="english", token_pattern=r"\b[a-z]{3,}\b", max_features=NEWSGROUP_WORDS)
    counts = {"train": made.fit_transform(posts["train"].data), "test": made.transform(posts["test"].data)}
    largest = np.iinfo(np.uint16).max
    arrays = {split: np.minimum(rows.toarray(), largest).astype(np.uint16) for split, rows in counts.items()}
    arrays |= {f"{split}_labels": np.asarray(found.target, np.int64) for split, found in posts.items()}
    _save(path, **arrays, vocabulary=made.get_feature_names_out().astype(str))
    return path


WORD_LENGTH = 10


@dataset("words", holds="10 letters as numbers, 0 after the end", source="reuters' vocabulary", example=FEW_WORDS)
def _words(folder: Path, splits: Sequence[str]) -> dict[str, Split]:
    """The words of ``reuters`` of three to ten letters a to z, in a fixed permutation; nine tenths are to train on."""
    held = [word for word in reuters_vocabulary(folder) if re.fullmatch(f"[a-z]{{3,{WORD_LENGTH}}}", word)]
    rows = np.zeros((len(held), WORD_LENGTH), np.float32)
    for row, word in zip(rows, held, strict=True):
        row[: len(word)] = [ord(letter) - ord("a") + 1 for letter in word]
    rows = rows[_permutation(len(rows))]
    tenth = len(rows) // 20
    return _only(_cut(rows, None, (len(rows) - 2 * tenth, tenth, tenth)), splits)


def spelled(tokens: Any) -> list[str]:
    """The words of tokens of ``words``: letters for 1 to 26, nothing for 0.

    Args:
        tokens: integers ``(N, ...)``, a row for each word.

    >>> spelled(torch.tensor([[3.0, 1.0, 20.0, 0.0]]))
    ['cat']
    """
    rows = torch.as_tensor(tokens).flatten(1).long().tolist()
    return ["".join(chr(ord("a") + token - 1) for token in row if token) for row in rows]


def _ldas(function: str, path: Path) -> Any:
    """A file of the package ``lda``, if it is installed."""
    try:
        import lda.datasets
    except ImportError as error:
        advice = f"pip install lda, or put {path.name} into {path.parent}"
        raise BadInput(
            f"reuters is not on disk, and the package lda, which ships it, not installed: {advice}"
        ) from error
    return getattr(lda.datasets, function)()


@dataset(
    "jsb-chorales",
    holds="88 notes a step, and the number of steps",
    source="jsb_chorales.npz in GUMBO_DATA",
    example=FEW_ROLLS,
)
def _jsb_chorales(folder: Path, splits: Sequence[str]) -> dict[str, Split]:
    """Rolls (N, T, 88), padded with silence to the longest chorale of all splits; the lengths are the labels."""
    path = folder / "jsb_chorales.npz"
    if not path.exists():
        raise BadInput(f"jsb-chorales is not on disk: put jsb_chorales.npz into {folder}")
    held = _read_npz(path, [name for split in SPLITS for name in (split, f"{split}_lengths")])
    longest = max(held[split].shape[1] for split in SPLITS)
    read = {}
    for split in splits:
        rolls = np.unpackbits(held[split], axis=-1)[..., :88].astype(np.float32)
        padding = ((0, 0), (0, longest - rolls.shape[1]), (0, 0))
        read[split] = np.pad(rolls, padding), held[f"{split}_lengths"].astype(np.int64)
    return read


CELL_TYPES, CELL_GENES, CELL_LIBRARY = 5, 60, (5.0, 0.5)  # mean and standard deviation of log totals


def cells_law() -> tuple[np.ndarray, np.ndarray]:
    """The parameters of the data set ``cells``: each type's gene proportions ``(5, 60)``, and total counts.

    A cell's type is uniform, its library l log-normal with the parameters ``CELL_LIBRARY``, and each gene's count
    negative binomial with mean l times the proportion, and with the gene's total count.
    """
    random = np.random.RandomState(0)
    shares = random.dirichlet(np.full(CELL_GENES, 0.5), CELL_TYPES)
    return shares, random.uniform(1.0, 5.0, CELL_GENES)


@dataset(
    "cells",
    holds="counts of 60 genes, and the cell's type",
    source="drawn from a known law",
    example=(FEW_COUNTS[0], FEW_IMAGES[1]),
)
def _cells(folder: Path, splits: Sequence[str]) -> dict[str, Split]:
    shares, totals = cells_law()
    random = np.random.RandomState(1)
    types = random.randint(CELL_TYPES, size=3_000)
    library = np.exp(CELL_LIBRARY[0] + CELL_LIBRARY[1] * random.randn(len(types)))
    mean = library[:, None] * shares[types]
    counts = random.poisson(random.gamma(totals, mean / totals)).astype(np.float32)
    return _only(_cut(counts, types.astype(np.int64), (1_500, 500, 1_000)), splits)


SWITCHING_STEPS, SWITCHING_SIZES = 30, (400, 100, 200)


def switching_law() -> dict[str, np.ndarray]:
    """The parameters of the data set ``switching``, three regimes of two states and six numbers a step.

    Returns:
        By name: ``first`` ``(3,)`` and ``transition`` ``(3, 3)``, probabilities of regimes; ``dynamics`` ``(3, 2, 2)``,
        ``drift`` ``(3, 2)`` and ``noise`` ``(3, 2)``, of a state given the one before (the first: given zeros);
        ``loading`` ``(3, 6, 2)``, ``offset`` ``(3, 6)`` and ``spread`` ``(3, 6)``, of a step of x given its state.
        The first regime turns the state quickly, the second slowly the other way, the third draws it to a point.
    """
    random = np.random.RandomState(0)
    turns = [0.97 * np.array([[np.cos(a), -np.sin(a)], [np.sin(a), np.cos(a)]]) for a in (0.8, -0.25)]
    loading = random.randn(6, 2)
    return {
        "first": np.full(3, 1 / 3),
        "transition": np.full((3, 3), 0.04) + 0.88 * np.eye(3),
        "dynamics": np.stack([*turns, 0.5 * np.eye(2)]),
        "drift": np.array([[0.0, 0.0], [0.0, 0.0], [1.0, -1.0]]),
        "noise": np.array([[0.3, 0.3], [0.2, 0.2], [0.1, 0.1]]),
        "loading": np.stack([loading] * 3),
        "offset": 0.2 * random.randn(3, 6),
        "spread": np.array([[0.3] * 6, [0.3] * 6, [0.15] * 6]),
    }


def switching_regimes() -> dict[str, np.ndarray]:
    """The regimes that the sequences of ``switching`` were drawn with, ``(N, 30)`` of 0, 1, 2 by split."""
    _, regimes, lengths = _switching_draws()
    return {split: rows for split, (rows, _) in _cut(regimes, lengths, SWITCHING_SIZES).items()}


def _switching_draws() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Sequences padded with zeros ``(N, 30, 6)``, their regimes ``(N, 30)`` and lengths ``(N,)``."""
    law, random, count = switching_law(), np.random.RandomState(1), sum(SWITCHING_SIZES)
    regime, z, steps = random.choice(3, count, p=law["first"]), np.zeros((count, 2)), []
    lengths = random.randint(10, SWITCHING_STEPS + 1, count)
    for t in range(SWITCHING_STEPS):
        if t:
            regime = (random.rand(count, 1) > law["transition"].cumsum(-1)[regime]).sum(-1).clip(max=2)
        z = np.einsum("nij,nj->ni", law["dynamics"][regime], z) + law["drift"][regime]
        z = z + law["noise"][regime] * random.randn(count, 2)
        x = np.einsum("nij,nj->ni", law["loading"][regime], z) + law["offset"][regime]
        steps.append((x + law["spread"][regime] * random.randn(count, 6), regime))
    x, regimes = (np.stack(part, 1) for part in zip(*steps, strict=True))
    inside = np.arange(SWITCHING_STEPS) < lengths[:, None]
    return (x * inside[..., None]).astype(np.float32), regimes, lengths.astype(np.int64)


@dataset(
    "switching",
    holds="6 numbers a step, and the number of steps",
    source="drawn from a known law",
    example=FEW_SERIES,
)
def _switching(folder: Path, splits: Sequence[str]) -> dict[str, Split]:
    x, _, lengths = _switching_draws()
    return _only(_cut(x, lengths, SWITCHING_SIZES), splits)


SCENE_OBJECTS = 2  # the most objects of a scene


def _scenes_of(
    folder: Path, splits: Sequence[str], digits: Loader, side: int, sizes: Mapping[str, int]
) -> dict[str, Split]:
    """Scenes of 0 to `SCENE_OBJECTS` digits of the same split, side by side; their labels are the numbers of digits."""
    read = {}
    for split, (images, _) in digits(folder, splits).items():
        random = np.random.RandomState(SPLITS.index(split))
        counts = random.randint(SCENE_OBJECTS + 1, size=sizes[split])
        scenes = np.zeros((len(counts), side, side), np.float32)
        for number in range(SCENE_OBJECTS):
            rows = np.flatnonzero(counts > number)
            while len(rows):  # digits that cover each other are drawn again
                added = _placed(images[random.randint(len(images), size=len(rows))], side, random)
                apart = ~((scenes[rows] > 0) & (added > 0)).any((1, 2))
                scenes[rows[apart]] += added[apart]
                rows = rows[~apart]
        read[split] = scenes, counts.astype(np.int64)
    return read


def _placed(images: np.ndarray, side: int, random: np.random.RandomState) -> np.ndarray:
    """Each image at a uniform place of an empty square."""
    height, width = images.shape[1:]
    top, left = random.randint(side - height + 1, size=len(images)), random.randint(side - width + 1, size=len(images))
    rows, columns = top[:, None] + np.arange(height), left[:, None] + np.arange(width)
    made = np.zeros((len(images), side, side), np.float32)
    made[np.arange(len(images))[:, None, None], rows[:, :, None], columns[:, None, :]] = images
    return made


@dataset(
    "scenes", holds="gray images 20 × 20, and the number of digits", source="composed of digits", example=FEW_IMAGES
)
def _scenes(folder: Path, splits: Sequence[str]) -> dict[str, Split]:
    return _scenes_of(folder, splits, _digits, 20, {"train": 10_000, "valid": 1_000, "test": 2_000})


@dataset(
    "mnist-scenes",
    holds="gray images 50 × 50, and the number of digits",
    source="composed of mnist-test",
    example=FEW_IMAGES,
)
def _mnist_scenes(folder: Path, splits: Sequence[str]) -> dict[str, Split]:
    return _scenes_of(folder, splits, _mnist_test, 50, {"train": 20_000, "valid": 1_000, "test": 2_000})
