"""A dataclass as a command line: flags, ``--config file.yaml``, ``--print_config``; errors in one line."""

from __future__ import annotations

import argparse
import json
import re
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import MISSING, fields
from types import UnionType
from typing import Any, NoReturn, TypeVar, Union, get_args, get_origin, get_type_hints

from gumbo.console import forgiving, until_reader_leaves
from gumbo.errors import BadInput, GumboError, GumboWarning, Interrupted, UnknownName, UnsupportedSite, did_you_mean
from gumbo.experiments._names import marked, unmarked
from gumbo.experiments._runs import read_settings, without_nan
from gumbo.launcher import launched, rank
from gumbo.options import check_numbers

Config = TypeVar("Config")
Presets = Mapping[str, "Mapping[str, Any] | Callable[[Any], Mapping[str, Any]]"]

USAGE = 2  # exit status for a mistake of the caller; 1 is for a failure during the run


def fail(prog: str, message: object, status: int = USAGE) -> NoReturn:
    """Print one line to standard error, and exit."""
    if speaks(message):
        print(f"{prog}: error: {' '.join(str(message).split())}", file=sys.stderr)
    raise SystemExit(status)


def speaks(error: object = None) -> bool:
    """Whether this process prints (this error): with several processes the main one, unless another failed alone."""
    return launched() == 1 or rank() == getattr(error, "process", 0)


def run_command(
    config_class: type[Config],
    action: Callable[[Config], Any],
    argv: Sequence[str] | None,
    prog: str,
    presets: Presets | None = None,
    several: bool = False,
    answers: bool = True,
) -> None:
    """Parse ``argv`` (by default the process's) into the dataclass and call ``action`` with it.

    ``presets`` maps a field to the defaults that its value implies, or to a function that computes them from its value;
    explicit options have precedence. Mistakes of the caller end with one line and status 2; an interruption with one
    line and, by the shells' convention, status 128 + the signal's number. ``several`` says that the action supports
    several processes of a launcher.
    """
    with forgiving():
        _run(config_class, action, argv, prog, presets or {}, several, answers)


def _run(config_class, action, argv, prog: str, presets: Presets, several: bool, answers: bool) -> None:
    if launched() > 1 and not several:
        fail(prog, f"it runs in one process, and a launcher started {launched()}: only gumbo train runs on several")
    try:
        with _terminated_as_interrupted(), _warnings_in_one_line(prog), until_reader_leaves():
            config, as_json = _parsed(config_class, sys.argv[1:] if argv is None else argv, prog, presets, answers)
            if as_json:
                _answer(action, config)
            else:
                action(config)
    except GumboError as error:
        fail(prog, error, USAGE if isinstance(error, (BadInput, UnknownName, UnsupportedSite)) else 1)
    except KeyboardInterrupt as error:
        interruption = error if isinstance(error, Interrupted) else Interrupted(signal.SIGINT)
        if speaks():
            print(f"{prog}: {interruption}", file=sys.stderr)
        raise SystemExit(interruption.status) from None
    except OSError as error:
        # A full disk or a removed folder; saved files are intact.
        if error.strerror is None:
            raise
        fail(prog, f"{error.filename}: {error.strerror}" if error.filename else error.strerror, 1)


@contextmanager
def _terminated_as_interrupted() -> Iterator[None]:
    """Treat SIGTERM like Ctrl-C, so that worker processes are stopped too."""

    def stop(number: int, frame: object) -> NoReturn:
        raise Interrupted(number)

    if threading.current_thread() is not threading.main_thread() or signal.getsignal(signal.SIGTERM) != signal.SIG_DFL:
        yield
        return
    signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


@contextmanager
def _warnings_in_one_line(prog: str) -> Iterator[None]:
    """Print gumbo's warnings without their source line."""
    with warnings.catch_warnings():
        show = warnings.showwarning

        def in_one_line(message, category, *rest, **options) -> None:
            if issubclass(category, GumboWarning):
                print(f"{prog}: warning: {message}", file=sys.stderr)
            else:
                show(message, category, *rest, **options)

        warnings.showwarning = in_one_line
        yield


def parse(config_class: type[Config], argv: Sequence[str], prog: str, presets: Presets) -> Config:
    """The dataclass that ``argv`` describes; a mistake gives one line and status 2."""
    return _parsed(config_class, argv, prog, presets, answers=False)[0]


def _parsed(
    config_class: type[Config], argv: Sequence[str], prog: str, presets: Presets, answers: bool
) -> tuple[Config, bool]:
    """The dataclass, and whether ``--json`` was given."""
    parser = _parser(config_class, prog, answers)
    found = _parse(parser, argv, prog)
    chosen = {name: preset for name, preset in presets.items() if found[name] not in (None, False)}
    if chosen:
        # Again, with the preset's values as defaults: flags and files still come after them.
        for name, preset in chosen.items():
            parser.set_defaults(dict(preset(found[name]) if callable(preset) else preset))
        found = _parse(parser, argv, prog)
    settings = {field.name: found[field.name] for field in fields(config_class)}
    check_kinds(config_class, settings)
    check_numbers(settings)
    config = config_class(**unmarked(settings, trust=settings.get("trust", False)))
    return config, bool(has_json_flag(config_class, answers) and found.get("json", False))


def has_json_flag(config_class: type, answers: bool = True) -> bool:
    """Whether a verb gets ``--json`` here: it answers with numbers, and has no such option of its own."""
    return answers and all(field.name != "json" for field in fields(config_class))


JSON = "print the results as JSON on standard output, and what is printed otherwise on standard error"


def _answer(action: Callable[[Config], Any], config: Config) -> None:
    with redirect_stdout(sys.stderr):
        found = action(config)
    if speaks():
        found = found.to_dict() if hasattr(found, "to_dict") else found
        print(json.dumps(without_nan(found), indent=1))


def checked(config_class: type[Config], settings: Mapping[str, Any], source: object) -> Config:
    """The dataclass of settings from a file; raises BadInput for a wrong type."""
    parser = _parser(config_class, "gumbo")
    try:
        found = parser.parse_object({name: value for name, value in settings.items() if value is not None})
    except (argparse.ArgumentError, TypeError, ValueError, KeyError) as error:
        raise BadInput(f"{source}: {_in_our_words(parser, str(getattr(error, 'message', None) or error))}") from error
    settings = {field.name: found[field.name] for field in fields(config_class)} | {
        name: None for name, value in settings.items() if value is None
    }
    check_kinds(config_class, settings, f"{source}: ")
    check_numbers(settings)
    return config_class(**settings)


def check_kinds(config_class: type, settings: Mapping[str, Any], where: str = "") -> None:
    """Raise BadInput for what a file can set and the parser lets through: a switch that is no bool, a null.

    >>> from dataclasses import dataclass
    >>> @dataclass
    ... class Sums:
    ...     terms: int = 3
    >>> check_kinds(Sums, {"terms": None})
    Traceback (most recent call last):
    gumbo.errors.BadInput: terms is null: expected a whole number
    """
    for name, kind in get_type_hints(config_class).items():
        value = settings.get(name)
        if kind is bool and name in settings and not isinstance(value, bool):
            raise BadInput(f"{where}{name} is {value!r}: expected true or false, without quotation marks")
        if name in settings and value is None and type(None) not in get_args(kind):
            raise BadInput(f"{where}{name} is null: expected {_in_words(kind)}")


def _in_words(kind: Any) -> str:
    """A type of a setting in words.

    >>> _in_words(dict[str, str] | str | None), _in_words(list[int])
    ('a mapping, such as {name: value}, text or null', 'a list, such as [1, 2]')
    """
    parts = get_args(kind) if get_origin(kind) in (Union, UnionType) else (kind,)
    names = [(get_origin(part) or part).__name__ for part in parts]
    return either([_TYPES.get(name, name) for name in names])


def either(words: Sequence[str]) -> str:
    return " or ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)


def _parser(config_class: type, prog: str, answers: bool = False):
    from jsonargparse import ArgumentParser

    summary = (config_class.__doc__ or "").strip().split("\n\n")[0]
    parser = ArgumentParser(prog=prog, description=summary, exit_on_error=False, allow_abbrev=False)
    parser.add_argument("--config", action=_settings_file(prog), help="a YAML file with any of the settings below")
    switches = {field.name for field in fields(config_class) if field.type in (bool, "bool")}
    parser.add_class_arguments(config_class, as_positional=True, skip=switches)
    described = _descriptions(config_class)
    for group in parser._action_groups:
        if group.title and group.title.startswith(summary.rstrip(".")[:20]):
            group.title = "settings"  # the summary stands above
    for action in parser._actions:
        action.help = described.get(action.dest, action.help)
    for field in fields(config_class):
        if field.name in switches:
            assert field.default is not MISSING
            parser.add_argument(f"--{field.name}", action="store_true", help=described.get(field.name, ""))
    if has_json_flag(config_class, answers):
        parser.add_argument("--json", action="store_true", default=argparse.SUPPRESS, help=JSON)  # no setting of a run
    return parser


def _settings_file(prog: str) -> type[argparse.Action]:
    """The action of ``--config``: a user's file counts as flags, a run's own file as data."""
    from jsonargparse import ActionConfigFile

    class SettingsFile(ActionConfigFile):
        def __call__(self, parser, cfg, values, option_string=None):
            if not values.lstrip().startswith("{"):
                values = json.dumps(settings_in(values, verb=prog.split()[-1]))
            self.apply_config(parser, cfg, self.dest, values)

    return SettingsFile


def refuse_twice(setting: str, values: Sequence[Any]) -> None:
    """Raise BadInput for a list that names something twice: it would run twice, and count as two."""
    if twice := [value for k, value in enumerate(values) if value in values[:k]]:
        raise BadInput(f"{setting} has {twice[0]!r} twice: name it once")


def check_least(config: Any, **least: int) -> None:
    """Raise BadInput for a setting below the smallest number that it takes; null, the default of some, passes.

    >>> from types import SimpleNamespace
    >>> check_least(SimpleNamespace(steps=0, particles=None), particles=1, steps=1)
    Traceback (most recent call last):
    gumbo.errors.BadInput: steps is 0: expected at least 1
    """
    for name, number in least.items():
        value = getattr(config, name)
        if value is not None and value < number:
            raise BadInput(f"{name} is {value}: expected at least {number}")


def settings_in(path: str, verb: str) -> dict[str, Any]:
    """The settings of a file; those of a run's own ``config.yaml``, which names its experiment, without its folder.

    Raises BadInput for a file without settings, or of a run of another verb.
    """
    found = read_settings(path)
    if "config" in found:
        raise BadInput(f"{path} names another settings file: give both, as --config FIRST --config SECOND")
    if "experiment" not in found:
        return found
    if found["experiment"] != verb:
        raise BadInput(f"{path} is of a run of gumbo {found['experiment']}: it sets nothing of gumbo {verb}")
    return marked({name: value for name, value in found.items() if name not in ("experiment", "resume", "folder")})


def _parse(parser, argv: Sequence[str], prog: str):
    argv = _underscored(argv)
    for text in argv[: argv.index("--") if "--" in argv else None]:
        # jsonargparse would keep these values as text, and only the last of several in one mapping.
        option, _, rest = text.partition("=")[0].partition(".")
        key, dot, inner = rest.partition(".")
        if option.startswith("--") and dot:
            fail(prog, f"{option}.{key} takes a mapping: write {option}.{key}='{{{inner}: VALUE}}'")
    try:
        return parser.parse_args(argv)
    except (argparse.ArgumentError, TypeError, ValueError, KeyError) as error:
        fail(prog, _in_our_words(parser, str(getattr(error, "message", None) or error)))


def _underscored(argv: Sequence[str]) -> list[str]:
    """The arguments with options by the names of settings: ``--num-samples`` is ``--num_samples``.

    >>> _underscored(["--num-samples=5", "--model-options.latent-dim", "2", "--folder", "my-run", "--", "--a-b"])
    ['--num_samples=5', '--model_options.latent_dim', '2', '--folder', 'my-run', '--', '--a-b']
    """
    end = list(argv).index("--") if "--" in argv else len(argv)
    made = list(argv)
    for k, text in enumerate(made[:end]):
        name, equals, value = text.partition("=")
        if re.fullmatch(r"--[A-Za-z][\w.+-]*", name):
            made[k] = "--" + name[2:].replace("-", "_") + equals + value
    return made


_NO_SETTINGS = ("--help", "--config", "--print_config", "--json")

# What jsonargparse says of an unknown flag, of an unknown line of a file, and of a value of the wrong type.
_UNKNOWN_FLAG = re.compile(r"unrecognized arguments: (.*)", re.IGNORECASE)
_UNKNOWN_LINE = re.compile(r"Option '([^']+)' is not accepted")
_WRONG_TYPE = re.compile(r'Parser key "([\w.]+)": Expected an? <class .(\w+).>\. Got value: ?(.*)')
_NO_TYPE = re.compile(r'Parser key "([\w.]+)": Does not validate .* Subtypes: \[(.*?)\] Errors: .* Given value: ?(.*)')
_SWITCH_WITH_VALUE = re.compile(r"argument (--\w+): ignored explicit argument (.*)")
_SUBTYPE = re.compile(r"<class '(\w+)'>|(dict|list)\[[^\]]*\]")
_TYPES = {
    "int": "a whole number",
    "float": "a number",
    "str": "text",
    "bool": "true or false",
    "list": "a list, such as [1, 2]",
    "dict": "a mapping, such as {name: value}",
    "NoneType": "null",
}


def _in_our_words(parser, said: str) -> str:
    """The parser's message, with the nearest name for an unknown one, and types in words.

    >>> from argparse import ArgumentParser
    >>> (parser := ArgumentParser(prog="gumbo train")).add_argument("--model").dest
    'model'
    >>> _in_our_words(parser, "unrecognized arguments: --modle x")
    "unknown option '--modle': did you mean '--model'? (gumbo train --help shows all)"
    >>> _in_our_words(parser, "unrecognized arguments: --zz")
    "unknown option '--zz' (gumbo train --help shows all)"
    """
    said = " ".join(said.split())
    more = f"({parser.prog} --help shows all)"
    known = [text for action in parser._actions for text in action.option_strings if text.startswith("--")]
    settings = [text[2:] for text in known if text not in _NO_SETTINGS]
    if found := _UNKNOWN_FLAG.fullmatch(said):
        flag = next((one.partition("=")[0] for one in found[1].split() if one.startswith("--")), None)
        if flag is None:
            return f"unexpected argument {found[1].split()[0]!r} {more}"
        return f"unknown option {flag!r}{did_you_mean(flag.partition('.')[0], known, before=': ')} {more}"
    if found := _UNKNOWN_LINE.search(said):
        return f"unknown setting {found[1]!r}{did_you_mean(found[1], settings, before=': ')} {more}"
    if found := _WRONG_TYPE.fullmatch(said):
        if found[2] == "list" and found[3] and found[3][0] not in "[{":
            return f"{found[1]} is {found[3]!r}: expected a list, such as [{found[3]}]"
        return f"{found[1]} is {found[3]!r}: expected {_TYPES.get(found[2], found[2])}"
    if found := _NO_TYPE.fullmatch(said):
        kinds = [one[1] or one[2] for one in _SUBTYPE.finditer(found[2])]
        return f"{found[1]} is {found[3]!r}: expected {either([_TYPES.get(kind, kind) for kind in kinds])}"
    if found := _SWITCH_WITH_VALUE.fullmatch(said):
        return f"{found[1]} takes no value (it was given {found[2]}): leave the option out to keep it off"
    return said


def _descriptions(config_class: type) -> dict[str, str]:
    """The descriptions of options in the docstrings of a dataclass and its bases."""
    import docstring_parser

    return {
        item.arg_name: item.description or ""
        for base in reversed(config_class.__mro__)
        for item in docstring_parser.parse(vars(base).get("__doc__") or "").params
    }
