"""Checkpoints that are damaged, foreign or malicious; disks that are full; folders that cannot be written to."""

from __future__ import annotations

import errno
import hashlib
import io
import os
import pickle
import resource
import shutil
import subprocess
import sys
import time
import tracemalloc
import warnings
import zipfile
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from resuming import After, assert_alike, difference, images, pair, quiet

from gumbo import __version__
from gumbo.errors import BadInput, GumboError, GumboWarning
from gumbo.inference.training import checkpoints
from gumbo.inference.training.checkpoints import Checkpoints, DamagedCheckpoint, load_checkpoint, save_checkpoint

OPTIONS = {"loss": "nvil", "checkpoint_steps": 2, "valid": images(10, 1), "valid_samples": 2}
STATE = {
    "module": {"w": torch.arange(6.0)},
    "numbers": [1, 2.5, None, "x", (1, 2)],
    "more": {"a": torch.ones(3).bool()},
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A run of four epochs, and the same one stopped after two; copied for each test that spoils it."""
    folder = tmp_path_factory.mktemp("runs")
    quiet(*pair(), images(), epochs=4, run_dir=folder / "whole", **OPTIONS)
    quiet(*pair(), images(), epochs=2, run_dir=folder / "half", **OPTIONS)
    return folder


@pytest.fixture
def half(runs, tmp_path):
    return Path(shutil.copytree(runs / "half", tmp_path / "half"))


def go_on(folder, **options):
    return quiet(*pair(seed=3), images(), epochs=4, run_dir=folder, resume=True, **OPTIONS | options)


def one_line(text: object) -> str:
    assert str(text) and "\n" not in str(text)
    return str(text)


# --- what a checkpoint is


def test_what_is_saved_is_loaded(tmp_path):
    save_checkpoint(tmp_path / "new" / "a.pt", STATE)
    found = load_checkpoint(tmp_path / "new" / "a.pt")
    assert difference(found, STATE) is None
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["a.pt"]


def test_torch_and_zip_read_it_too(tmp_path):
    save_checkpoint(tmp_path / "a.pt", STATE)
    found = torch.load(tmp_path / "a.pt", weights_only=True)
    assert found.pop("gumbo") == {"format": checkpoints.FORMAT, "version": __version__}
    assert difference(found, STATE) is None
    assert zipfile.ZipFile(tmp_path / "a.pt").testzip() is None


@pytest.mark.parametrize("value", [object(), {1: lambda: 0}, torch.nn.Linear(1, 1), [Path("x")]])
def test_what_could_not_be_read_back_is_not_written(value, tmp_path):
    with pytest.raises(BadInput, match=r"state\['extra'\].* which a checkpoint cannot hold") as error:
        save_checkpoint(tmp_path / "a.pt", {**STATE, "extra": value})
    one_line(error.value)
    assert not list(tmp_path.iterdir())


def test_a_missing_checkpoint_is_named(tmp_path):
    with pytest.raises(BadInput, match=r"no checkpoint at .*a\.pt") as error:
        load_checkpoint(tmp_path / "a.pt")
    one_line(error.value)


# --- damage


def test_every_truncation_is_seen(tmp_path):
    path = tmp_path / "a.pt"
    save_checkpoint(path, STATE)
    whole = path.read_bytes()
    for length in [*range(0, len(whole), 97), len(whole) - 2, len(whole) - 1]:
        path.write_bytes(whole[:length])
        with pytest.raises(DamagedCheckpoint, match="damaged") as error:
            load_checkpoint(path)
        one_line(error.value)
    path.write_bytes(whole + b"\0")
    with pytest.raises(DamagedCheckpoint):
        load_checkpoint(path)


def test_every_flipped_byte_is_seen(tmp_path):
    path = tmp_path / "a.pt"
    save_checkpoint(path, {"w": torch.arange(3.0)})
    whole = path.read_bytes()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # zipfile warns of some of what it meets
        for place in range(len(whole)):
            spoiled = bytearray(whole)
            spoiled[place] ^= 1 << place % 8
            path.write_bytes(spoiled)
            with pytest.raises(DamagedCheckpoint):
                load_checkpoint(path)


def test_torch_alone_would_not_see_it(tmp_path):
    """The reason for the checksum: a flipped bit in a tensor loads without a word."""
    path = tmp_path / "a.pt"
    save_checkpoint(path, {"w": torch.arange(100.0)})
    content = bytearray(path.read_bytes())
    content[content.find(torch.arange(100.0).numpy().tobytes()[200:]) + 2] ^= 1
    path.write_bytes(content)
    assert not torch.equal(torch.load(path, weights_only=True)["w"], torch.arange(100.0))


@pytest.mark.parametrize("tenth", range(10))
def test_the_one_before_a_truncated_checkpoint_is_used(tenth, half, runs):
    last = half / "checkpoints" / "last.pt"
    whole = last.read_bytes()
    last.write_bytes(whole[: len(whole) * tenth // 10])
    with pytest.warns(GumboWarning, match=r"last\.pt is damaged.*going on from previous\.pt") as said:
        go_on(half)
    assert len(said) == 1
    one_line(said[0].message)
    assert_alike(runs / "whole", half)


@pytest.mark.parametrize("part", [0.1, 0.5, 0.9])
def test_the_one_before_a_spoiled_checkpoint_is_used(part, half, runs):
    last = half / "checkpoints" / "last.pt"
    spoiled = bytearray(last.read_bytes())
    spoiled[int(len(spoiled) * part)] ^= 4
    last.write_bytes(spoiled)
    with pytest.warns(GumboWarning, match=r"going on from previous\.pt"):
        go_on(half)
    assert_alike(runs / "whole", half)


def test_the_good_one_is_not_replaced_by_the_damaged_one(half):
    folder = Checkpoints(half / "checkpoints")
    before = folder.previous.read_bytes()
    folder.last.write_bytes(folder.last.read_bytes()[:1000])
    with pytest.warns(GumboWarning):
        state = folder.load()
    folder.save(state)
    assert folder.previous.read_bytes() == before
    assert difference(folder.load(), state) is None
    folder.save(state)
    assert difference(load_checkpoint(folder.previous), state) is None


def test_a_crash_between_two_renamings_loses_nothing(half, runs):
    (half / "checkpoints" / "last.pt").unlink()
    (half / "checkpoints" / ".last.pt.partial").write_bytes(b"half a file")
    with pytest.warns(GumboWarning, match=r"last\.pt is missing; going on from previous\.pt"):
        go_on(half)
    assert_alike(runs / "whole", half)
    assert not list((half / "checkpoints").glob(".*"))
    assert sorted(path.name for path in (half / "checkpoints").iterdir()) == ["best.pt", "last.pt", "previous.pt"]


def test_a_crash_between_a_second_name_and_the_new_file_leaves_no_trace(half):
    folder = Checkpoints(half / "checkpoints")
    folder.previous.unlink()
    os.link(folder.last, folder.previous)
    state = folder.load()
    folder.save(state)
    assert sorted(path.name for path in (half / "checkpoints").iterdir()) == ["best.pt", "last.pt", "previous.pt"]
    assert difference(load_checkpoint(folder.previous), state) is None


def test_where_both_are_damaged_it_is_said(half):
    kept = {}
    for name in ("last", "previous"):
        path = half / "checkpoints" / f"{name}.pt"
        path.write_bytes(path.read_bytes()[:500])
        kept[path] = path.read_bytes()
    with pytest.raises(BadInput, match=r"last\.pt is damaged.*previous\.pt is damaged.*start again") as error:
        go_on(half)
    one_line(error.value)
    assert all(path.read_bytes() == content for path, content in kept.items())


def test_the_command_reports_damage_in_one_line(tmp_path, capsys):
    from gumbo.experiments import cli

    options = ["--batch_size", "800", "--importance_samples", "2", "--model_options.hidden=[8]"]
    cli.main(["train", *options, "--epochs", "2", "--folder", str(tmp_path / "run")])
    last = tmp_path / "run" / "checkpoints" / "last.pt"
    last.write_bytes(last.read_bytes()[:3000])
    capsys.readouterr()
    with warnings.catch_warnings():
        warnings.simplefilter("default")
        cli.main(["train", "--resume", str(tmp_path / "run"), "--epochs", "3"])
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "warning" in line]
    assert line.startswith("gumbo train: warning: ") and line.endswith("going on from previous.pt, the one before it")


# --- code, and other formats


class Malicious:
    """Unpickled, it writes a file."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


def sealed(content: bytes) -> bytes:
    """As gumbo would have sealed it: whoever can write the file can write the checksum."""
    made = io.BytesIO(content).getvalue()
    made = made[:-2] + checkpoints._SEALED.to_bytes(2, "little")
    return made + checkpoints._SEAL + hashlib.sha256(made).hexdigest().encode()


def malicious(kind: str, target: Path) -> bytes:
    if kind == "bare pickle":
        return pickle.dumps({"module": Malicious(target)})
    buffer = io.BytesIO()
    torch.save({"module": Malicious(target), "gumbo": {"format": checkpoints.FORMAT, "version": "0"}}, buffer)
    return sealed(buffer.getvalue()) if kind == "sealed" else buffer.getvalue()


@pytest.mark.parametrize("kind", ["sealed", "torch.save", "bare pickle"])
def test_a_malicious_checkpoint_is_refused_and_not_run(kind, half, tmp_path):
    target = tmp_path / "was-here"
    path = half / "checkpoints" / "last.pt"
    path.write_bytes(malicious(kind, target))
    with pytest.raises(BadInput, match="damaged" if kind == "bare pickle" else "could run code: not loaded") as error:
        load_checkpoint(path)
    one_line(error.value)
    if kind == "bare pickle":
        (half / "checkpoints" / "previous.pt").unlink()
    with pytest.raises(BadInput, match=r"last\.pt") as error:
        go_on(half)
    one_line(error.value)
    assert not target.exists()
    # The file would have done it: this is what loading with code does.
    pickle.loads(path.read_bytes()) if kind == "bare pickle" else torch.load(path, weights_only=False)
    assert target.exists()


def test_another_format_is_told_apart(half, monkeypatch):
    last = half / "checkpoints" / "last.pt"
    state = load_checkpoint(last)
    with monkeypatch.context() as patch:
        patch.setattr(checkpoints, "FORMAT", 7)
        patch.setattr(checkpoints, "__version__", "9.1.0")
        save_checkpoint(last, state)
    with pytest.raises(
        BadInput, match=r"has checkpoint format 7, of gumbo 9\.1\.0, and gumbo .* reads format 1"
    ) as error:
        go_on(half)
    one_line(error.value)


def test_another_version_of_the_same_format_loads(half, runs, monkeypatch):
    last = half / "checkpoints" / "last.pt"
    state = load_checkpoint(last)
    with monkeypatch.context() as patch:
        patch.setattr(checkpoints, "__version__", "9.1.0")
        save_checkpoint(last, state)
    go_on(half)
    assert_alike(runs / "whole", half)


def test_a_checkpoint_from_before_formats_is_told_apart(half):
    torch.save({"module": {}, "settings": {}}, half / "checkpoints" / "last.pt")
    with pytest.raises(BadInput, match="no format number") as error:
        go_on(half)
    one_line(error.value)


# --- full disks, and places that cannot be written to


@contextmanager
def file_limit_kept():
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_disk_that_fills_up_loses_no_checkpoint(tmp_path, runs):
    size = (runs / "half" / "checkpoints" / "last.pt").stat().st_size
    kept = {}

    def fill():
        kept.update(snapshot(tmp_path / "full" / "checkpoints"))
        resource.setrlimit(resource.RLIMIT_FSIZE, (size // 2, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))

    full = pytest.raises(GumboError, match=r"cannot write .*last\.pt: File too large; what was")
    with file_limit_kept(), full as error:
        quiet(*pair(), images(), epochs=4, run_dir=tmp_path / "full", transform=After(7, fill), **OPTIONS)
    one_line(error.value)
    assert kept and snapshot(tmp_path / "full" / "checkpoints") == kept
    quiet(*pair(), images(), epochs=4, run_dir=tmp_path / "whole", transform=After(0, fill), **OPTIONS)
    go_on(tmp_path / "full", transform=After(0, fill))
    assert_alike(tmp_path / "whole", tmp_path / "full")


def test_metrics_that_do_not_fit_leave_no_part_of_a_line(half, monkeypatch):
    path = half / "metrics.jsonl"
    write = os.write

    def until_full(handle, data):
        if os.fstat(handle).st_size > path.stat().st_size - 1 and len(data) > 20:
            return write(handle, data[:20])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    before = path.read_text()
    with monkeypatch.context() as patch:
        patch.setattr(os, "write", until_full)
        with pytest.raises(GumboError, match=r"cannot write .*metrics\.jsonl: No space left on device") as error:
            go_on(half)
    one_line(error.value)
    assert path.read_text() == before
    go_on(half)
    assert path.read_text().count("\n") == 5


def tmpfs(folder: Path, size: str) -> bool:
    folder.mkdir()
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)], capture_output=True)
    return made.returncode == 0


@pytest.mark.skipif(sys.platform != "linux" or os.geteuid() != 0, reason="needs the right to mount a tmpfs")
def test_a_small_tmpfs_that_fills_up(tmp_path):
    if not tmpfs(tmp_path / "small", "256k"):
        pytest.skip("this machine does not let a tmpfs be mounted")
    folder = tmp_path / "small" / "run"
    kept = {}

    def fill():
        with pytest.raises(OSError), open(tmp_path / "small" / "filler", "wb", buffering=0) as file:
            while True:
                file.write(b"0" * 4096)
        kept.update(snapshot(folder / "checkpoints"))

    try:
        with pytest.raises(GumboError, match="cannot write .*: No space left on device; what was written") as error:
            quiet(*pair(), images(), epochs=4, run_dir=folder, transform=After(6, fill), **OPTIONS)
        one_line(error.value)
        assert kept and snapshot(folder / "checkpoints") == kept
        (tmp_path / "small" / "filler").unlink()
        go_on(folder, transform=After(0, fill))
        quiet(*pair(), images(), epochs=4, run_dir=tmp_path / "whole", transform=After(0, fill), **OPTIONS)
        assert_alike(tmp_path / "whole", folder)
    finally:
        subprocess.run(["umount", str(tmp_path / "small")], check=True)


def test_a_folder_that_cannot_be_written_to_is_told_before_any_step(tmp_path):
    (tmp_path / "file").write_text("in the way")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "checkpoints").write_text("in the way")
    for folder in (tmp_path / "file", tmp_path / "file" / "below", tmp_path / "run"):
        never = After(2, lambda: pytest.fail("a step was made"))  # the first call is for initialising
        with pytest.raises(GumboError, match="cannot write|cannot read|a file: expected a folder") as error:
            quiet(*pair(), images(), loss="trace", epochs=1, run_dir=folder, transform=never)
        one_line(error.value)


def test_a_folder_without_permission_is_told_before_any_step(tmp_path, monkeypatch):
    # The bits of a folder do not stop the superuser, as whom tests may run.
    def refuse(*_, **__):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(Path, "mkdir", refuse)
    never = After(2, lambda: pytest.fail("a step was made"))
    with pytest.raises(GumboError, match="cannot write .*: Permission denied") as error:
        quiet(*pair(), images(), loss="trace", epochs=1, run_dir=tmp_path / "run", transform=never)
    one_line(error.value)


@pytest.mark.parametrize("call", range(1, 8))
@pytest.mark.parametrize("links", [True, False])
def test_a_crash_at_any_renaming_leaves_a_whole_checkpoint(call, links, tmp_path, runs, monkeypatch):
    replace, calls = os.replace, iter(range(1, 99))

    def no_link(*_):
        raise OSError(errno.EPERM, "no hard links here")

    if not links:
        monkeypatch.setattr(os, "link", no_link)

    def crash(*arguments):
        if next(calls) == call:
            raise KeyboardInterrupt
        return replace(*arguments)

    folder = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", crash)
        with pytest.raises(KeyboardInterrupt):
            quiet(*pair(), images(), epochs=4, run_dir=folder, **OPTIONS)
    with warnings.catch_warnings():
        if not links:  # with them, there is always a last one
            warnings.simplefilter("ignore", GumboWarning)
        go_on(folder)
    if call > 1:  # before that there was nothing to go on from, and this pair has other weights
        assert_alike(runs / "whole", folder)


# --- files that are made to do harm -----------------------------------------------------------------------------------


def under_seal(content: bytes) -> bytes:
    """Any zip archive or what begins like one, under a seal that holds."""
    seal = b"gumbo checkpoint sha256 "
    return content + seal + hashlib.sha256(content).hexdigest().encode()


def archive(compression: int, **entries: bytes) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as file:
        for name, content in entries.items():
            file.writestr(f"archive/{name}", content)
    content = buffer.getvalue()
    return content[:-2] + (len("gumbo checkpoint sha256 ") + 64).to_bytes(2, "little")


def torch_saved(thing) -> bytes:
    buffer = io.BytesIO()
    torch.save(thing, buffer)
    return buffer.getvalue()[:-2] + (len("gumbo checkpoint sha256 ") + 64).to_bytes(2, "little")


def laughs(levels: int) -> list:
    made: list = ["ha"]
    for _ in range(levels):
        made = [made] * 10
    return made


HARMFUL = {
    "no archive": b"text",
    "an empty archive": archive(zipfile.ZIP_STORED),
    "an archive of another kind": archive(zipfile.ZIP_STORED, **{"data.pkl": b"N.", "version": b"3"}),
    "a cut pickle": archive(zipfile.ZIP_STORED, **{"data.pkl": b"\x80\x02}q", "version": b"3", "byteorder": b"little"}),
    "a zip bomb": archive(zipfile.ZIP_DEFLATED, **{"data.pkl": b"N.", "data/0": bytes(1 << 28)}),
    "a list": torch_saved([1, 2]),
    "a dict of another kind": torch_saved({"module": {}}),
    "a mark of another kind": torch_saved({"gumbo": 3}),
    "a mark that lacks something": torch_saved({"gumbo": {"format": 1}}),
    "a thousand million laughs": torch_saved({"gumbo": {"format": 1, "version": "0"}, "history": laughs(9)}),
}


@pytest.mark.parametrize("seal", [True, False])
@pytest.mark.parametrize("name", HARMFUL)
def test_a_file_made_to_do_harm_is_one_line_in_bounded_time_and_memory(name, seal, tmp_path):
    path = tmp_path / "last.pt"
    path.write_bytes(under_seal(HARMFUL[name]) if seal else HARMFUL[name])
    tracemalloc.start()
    began = time.process_time()
    with pytest.raises(BadInput) as error:
        load_checkpoint(path)
    took, most = time.process_time() - began, tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    one_line(error.value)
    assert took < 20 and most < 1 << 28


WITHOUT = ["settings", "made_on", "optimizer", "random", "now", "history", "best", "module"]


@pytest.mark.parametrize("part", WITHOUT)
@pytest.mark.parametrize("value", [None, [], {}, {"a": 1}, [3], "x"], ids=str)
def test_a_checkpoint_with_a_part_of_another_kind_is_refused(part, value, half):
    path = half / "checkpoints" / "last.pt"
    state = load_checkpoint(path)
    save_checkpoint(path, state | {part: value})
    if value == {} and part == "made_on":
        return  # it is not said where the run began, and nothing to compare
    with pytest.raises(BadInput) as error:
        go_on(half)
    one_line(error.value)


def test_a_folder_or_device_in_place_of_a_checkpoint_is_refused(tmp_path):
    for path in (tmp_path, Path("/dev/null")):
        with pytest.raises(BadInput, match="is no file"):
            load_checkpoint(path)
