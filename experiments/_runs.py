"""Run folders: settings, environment, results."""

from __future__ import annotations

import json
import math
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from gumbo.errors import BadInput, GumboWarning, shortened
from gumbo.files import append_line, cannot_write, write_whole

LARGEST = 1 << 16  # the largest settings file, in bytes
NOT_OF_THE_RUN = ("trust", "folder", "resume")  # settings of the command that its run may not record
WEIGHTS = "model.safetensors"  # the parameters of an exported run, in place of its checkpoints
DEEPEST = 20  # the deepest nesting, for which YAML's time grows quadratically


def read_settings(path: str | Path) -> dict[str, Any]:
    """The settings in a YAML file, as a mapping of plain values.

    Raises BadInput, in bounded time and memory, for a file that is missing, larger than 64 KiB, not UTF-8, not YAML,
    with aliases (a few lines can expand to gigabytes), with a name twice, or with anything but a mapping of plain
    values.
    """
    import yaml

    if not str(path):
        raise BadInput("the name of the file of settings is empty: name one (is a variable of your shell not set?)")
    path = Path(path)
    try:
        with open(path, "rb") as file:
            content = file.read(LARGEST + 1)
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        raise BadInput(f"cannot read {path}: {getattr(error, 'strerror', None) or error}") from error
    if len(content) > LARGEST:
        raise BadInput(f"{path} is larger than {LARGEST} bytes: no file of settings")
    try:
        text = content.decode()
        _refuse_bombs(path, yaml.parse(text, Loader=yaml.SafeLoader))
        _refuse_twice(path, yaml.compose(text, Loader=yaml.SafeLoader))
        found = yaml.safe_load(text)
        json.dumps(found)  # plain values only
    except UnicodeDecodeError as error:
        raise BadInput(f"{path} is not UTF-8 text: no file of settings") from error
    except BadInput:
        raise
    except (yaml.YAMLError, RecursionError, TypeError, ValueError) as error:
        raise BadInput(f"{path} cannot be read as settings ({type(error).__name__}: {error})") from error
    if not isinstance(found, dict) or not all(isinstance(name, str) for name in found):
        raise BadInput(f"{path} holds no settings: expected lines such as `epochs: 10`")
    return found


def run_settings(run: str, verb: str, config_class: type) -> dict[str, Any]:
    """The settings in the ``config.yaml`` of a run of ``gumbo VERB``, by the fields of its dataclass.

    Raises BadInput for a folder that is no run, a run of another verb, and a setting that the dataclass lacks; warns of
    settings that the file lacks.
    """
    if not run:
        raise BadInput("the name of the run folder is empty: name one (is a variable of your shell not set?)")
    path = Path(run) / "config.yaml"
    try:
        found = read_settings(path)
    except BadInput as error:
        if not path.exists() and (Path(run) / "checkpoints").is_dir():
            raise BadInput(
                f"{run} is a run of fit, which keeps no programs: make them, and call fit with resume=True"
            ) from error
        raise BadInput(f"{run} is not a run folder: {error}") from error
    of = found.pop("experiment", None)
    if of != verb:
        other = f"a run of gumbo {of}, not" if of else "not a run"
        raise BadInput(f"{run} is {other} of gumbo {verb}")
    known = [item.name for item in fields(config_class)]
    if unknown := set(found) - set(known):
        raise BadInput(f"{path} has an unknown setting {sorted(unknown)[0]!r}")
    if missing := [repr(name) for name in known if name not in found and name not in NOT_OF_THE_RUN]:
        warnings.warn(
            f"{path} lacks {shortened(missing, 4)}, as in a run of an earlier version: the default is taken, which may "
            "not be what the run had",
            GumboWarning,
            stacklevel=1,  # one place, so that a command that reads the file twice says it once
        )
    return found


def _refuse_bombs(path: Path, events: Iterable[Any]) -> None:
    """Raise BadInput at the first YAML event that settings do not need."""
    import yaml

    depth = 0
    for event in events:
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if isinstance(event, yaml.AliasEvent):
            raise BadInput(f"{path} has a YAML alias, which settings have no need of: write the value out")
        if depth > DEEPEST:
            raise BadInput(f"{path} nests deeper than {DEEPEST} levels: no file of settings")


def _refuse_twice(path: Path, node: Any) -> None:
    """Raise BadInput for a mapping that names something twice, of which YAML would take the last."""
    import yaml

    if isinstance(node, yaml.SequenceNode):
        for part in node.value:
            _refuse_twice(path, part)
    if isinstance(node, yaml.MappingNode):
        met = set()
        for key, value in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value in met:
                raise BadInput(f"{path} sets {key.value!r} twice, again in line {key.start_mark.line + 1}: keep one")
            met.add(key.value if isinstance(key, yaml.ScalarNode) else id(key))
            _refuse_twice(path, value)


class RunFolder:
    """``config.yaml`` (resolved), ``env.json``, ``metrics.jsonl``, ``checkpoints/`` and ``plots/`` of one run."""

    def __init__(self, path: Path, made: Sequence[Path] = ()):
        self.path, self.made = path, made
        self.plots = path / "plots"
        self.checkpoints = path / "checkpoints"
        self.metrics = path / "metrics.jsonl"

    @classmethod
    def create(cls, experiment: str, config: Any, path: str | None = None) -> RunFolder:
        """A new folder, ``./runs/<experiment>-<time>`` or ``path``; a folder with content is refused."""
        if path is not None:
            if not path or "\0" in path:
                raise BadInput(f"folder is {path!r}: expected the name of a folder")
            if path.startswith("~"):  # the shell replaces it in `--folder ~/run`, not in `--folder=~/run`
                path = os.path.expanduser(path)
            chosen = Path(path)
            if chosen.exists() and (not chosen.is_dir() or any(chosen.iterdir())):
                raise BadInput(f"{chosen} exists and is not an empty folder: name another one")
            stood = {folder for folder in (chosen, *chosen.parents) if folder.exists()}
            _make(chosen)
        else:
            chosen = Path("runs") / f"{experiment}-{time.strftime('%Y%m%d-%H%M%S')}"
            stood = {folder for folder in chosen.parents if folder.exists()}
            chosen = _new(chosen)
        made = [folder.absolute() for folder in (chosen, *chosen.parents) if folder not in stood]
        run = cls(chosen.absolute(), made)
        try:
            _make(run.plots)
            _make(run.checkpoints)
            run.write_config(experiment, config)
            run.write_json("env.json", environment())
        except BaseException:
            run.empty()
            raise
        return run

    def check_writable(self) -> None:
        """Raise GumboError if no file can be written here: before the work, whose results would be lost."""
        try:
            tempfile.TemporaryFile(dir=self.path).close()
        except OSError as error:
            raise cannot_write(self.path, error) from error

    def saved(self) -> bool:
        """Whether there is a checkpoint to resume from."""
        return any(self.checkpoints.glob("*.pt"))

    def empty(self) -> None:
        """Remove the folders that :meth:`create` made, after a run without results."""
        for folder in (self.plots, self.checkpoints):
            shutil.rmtree(folder, ignore_errors=True)
        for name in ("config.yaml", "env.json", "metrics.jsonl", ".lock"):
            (self.path / name).unlink(missing_ok=True)
        for folder in self.made:
            if any(folder.iterdir()):
                return
            folder.rmdir()

    def write_config(self, experiment: str, config: Any, **changed: Any) -> None:
        """Write the settings of a run with the name of its experiment, which marks them as a run's.

        ``trust`` is not a setting of the run.
        """
        import yaml

        settings = {name: value for name, value in asdict(config).items() if name != "trust"}
        text = yaml.safe_dump({"experiment": experiment, **settings, **changed}, sort_keys=False)
        self.write_text("config.yaml", text)

    def write_json(self, name: str, content: Any) -> None:
        self.write_text(name, json.dumps(without_nan(content), indent=1) + "\n")

    def write_text(self, name: str, text: str) -> None:
        """Write a file atomically, so that a reader never sees a part, and a full disk keeps the old one."""
        write_whole(self.path / name, lambda file: file.write(in_utf8(text)), shared=True)  # two may look at one run

    def append_metrics(self, numbers: Mapping[str, Any]) -> None:
        """Append one line in one write, so that lines of several processes do not mix."""
        append_line(self.metrics, json.dumps(numbers))

    def read_metrics(self) -> list[dict[str, Any]]:
        if not self.metrics.exists():
            return []
        try:
            lines = self.metrics.read_text(encoding="utf-8").splitlines()
            return [json.loads(line) for line in lines if line.endswith("}")]
        except ValueError as error:  # a last line that a full disk cut ends without a brace
            raise BadInput(f"{self.metrics} is damaged ({error}): mend it, or delete it to go without") from error


def in_utf8(text: str) -> bytes:
    """The text in UTF-8; file names may hold bytes that Python could not decode, as in a locale without UTF-8.

    >>> in_utf8("ü"), in_utf8("\\udcc3\\udcbc") == in_utf8("ü"), in_utf8("\\udcfc")
    (b'\\xc3\\xbc', True, b'\\\\udcfc')
    """
    found = text.encode(errors="surrogateescape")
    try:
        found.decode()
    except UnicodeDecodeError:
        return text.encode(errors="backslashreplace")
    return found


def without_nan(content: Any) -> Any:
    """The same with None for NaN, which JSON does not have."""
    if isinstance(content, Mapping):
        return {name: without_nan(value) for name, value in content.items()}
    if isinstance(content, (list, tuple)):
        return [without_nan(value) for value in content]
    return None if isinstance(content, float) and math.isnan(content) else content


def _make(path: Path) -> None:
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BadInput(f"cannot create the run folder {path}: {error.strerror}") from error


def _new(path: Path) -> Path:
    """``path``, or the first free of ``path-2``, ``path-3``, …: two runs may start within one second."""
    _make(path.parent)
    for number in range(1, 1000):
        candidate = path if number == 1 else path.with_name(f"{path.name}-{number}")
        try:
            candidate.mkdir()
            return candidate
        except FileExistsError:
            continue
        except OSError as error:
            raise BadInput(f"cannot create the run folder {candidate}: {error.strerror}") from error
    raise BadInput(f"{path} and 998 more are taken: name a folder")


def environment() -> dict[str, Any]:
    """Versions, machine and command of this process."""
    from importlib.metadata import PackageNotFoundError, version

    import torch

    import gumbo

    versions = {}
    for package in ("torch", "pyro-ppl", "numpy", "scikit-learn", "arviz"):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = None
    return {
        "command": sys.argv,
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "gumbo": gumbo.__version__,
        "commit": _commit(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpus": available_cpus(),
        "torch_threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        **versions,
    }


def available_cpus() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _commit() -> str | None:
    """The commit of this code, if it is a checkout."""
    here = Path(__file__).resolve().parent.parent
    if not (here / ".git").exists():
        return None
    try:
        done = subprocess.run(
            ["git", "-C", str(here), "describe", "--always", "--dirty", "--abbrev=40"],
            capture_output=True,
            text=True,
            timeout=10,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None


class Watch:
    """Live progress of a run with worker processes: counts the lines of ``metrics.jsonl``.

    A bar on a terminal; elsewhere a line for each tenth of the work. Used as a context manager.
    """

    def __init__(self, run: RunFolder, total: int, title: str):
        self.run, self.total, self.title = run, total, title
        self.over = threading.Event()
        self.thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> Watch:
        self.thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.over.set()
        self.thread.join()

    def _watch(self) -> None:
        if not sys.stderr.isatty():
            self._lines()
            return
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (TextColumn(self.title), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns, TextColumn("{task.fields[now]}"), console=Console(stderr=True)) as bar:
            task = bar.add_task(self.title, total=self.total, now="")
            while not self.over.wait(0.2):
                done, now = self._state()
                bar.update(task, completed=done, now=now)
            bar.update(task, completed=self._state()[0], now="")

    def _lines(self) -> None:
        said = 0
        while not self.over.wait(0.2):
            done, now = self._state()
            if 10 * done // self.total > said:
                said = 10 * done // self.total
                print(f"{self.title} {done}/{self.total}  {now}", file=sys.stderr, flush=True)

    def _state(self) -> tuple[int, str]:
        try:
            lines = self.run.metrics.read_text(encoding="utf-8").splitlines()
        except FileNotFoundError:
            return 0, ""
        try:
            last = json.loads(lines[-1])
        except (IndexError, json.JSONDecodeError):
            return len(lines), ""
        where = " ".join(str(last[key]) for key in ("arm", "what") if key in last)
        elbo = f" elbo {last['valid_elbo']:.2f}" if "valid_elbo" in last else ""
        return len(lines), f"{where} seed {last.get('seed')}{elbo}"
