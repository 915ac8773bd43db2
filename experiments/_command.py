"""A dataclass as a command line: flags, ``--config file.yaml``, ``--print_config``; errors in one line."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, fields
from typing import Any, NoReturn, TypeVar

from gumbo.errors import BadInput, GumboError, UnknownName

Config = TypeVar("Config")
Presets = Mapping[str, "Mapping[str, Any] | Callable[[Any], Mapping[str, Any]]"]

USAGE = 2  # exit status for what the caller got wrong; 1 is for what failed underway


def fail(prog: str, message: object, status: int = USAGE) -> NoReturn:
    """One line on standard error, and out."""
    print(f"{prog}: error: {' '.join(str(message).split())}", file=sys.stderr)
    raise SystemExit(status)


def run_command(
    config_class: type[Config],
    action: Callable[[Config], Any],
    argv: Sequence[str] | None,
    prog: str,
    presets: Presets | None = None,
) -> None:
    """Parse ``argv`` (by default the process's) into the dataclass and call ``action`` with it.

    ``presets`` maps a field to the defaults that it stands for when it is given, or to a function that finds them from
    its value; what is given explicitly wins over them. Mistakes of the caller end in one line and status 2.
    """
    try:
        action(parse(config_class, sys.argv[1:] if argv is None else argv, prog, presets or {}))
    except GumboError as error:
        fail(prog, error, USAGE if isinstance(error, (BadInput, UnknownName)) else 1)
    except KeyboardInterrupt:
        fail(prog, "interrupted", 130)
    except BrokenPipeError:
        # The reader went away, as with `| head`; nobody is left to tell.
        sys.stderr.close()
        raise SystemExit(1) from None


def parse(config_class: type[Config], argv: Sequence[str], prog: str, presets: Presets) -> Config:
    """The dataclass that ``argv`` describes; a mistake is one line and status 2."""
    parser = _parser(config_class, prog)
    found = _parse(parser, argv, prog)
    chosen = {name: preset for name, preset in presets.items() if found[name]}
    if chosen:
        # Again, with the preset's values as defaults: flags and files still come after them.
        for name, preset in chosen.items():
            parser.set_defaults(dict(preset(found[name]) if callable(preset) else preset))
        found = _parse(parser, argv, prog)
    return config_class(**{field.name: found[field.name] for field in fields(config_class)})


def _parser(config_class: type, prog: str):
    from jsonargparse import ArgumentParser

    summary = (config_class.__doc__ or "").strip().split("\n\n")[0]
    parser = ArgumentParser(prog=prog, description=summary, exit_on_error=False)
    parser.add_argument("--config", action="config", help="a YAML file with any of the settings below")
    switches = {field.name for field in fields(config_class) if field.type in (bool, "bool")}
    parser.add_class_arguments(config_class, as_positional=True, skip=switches)
    described = _descriptions(config_class)
    for field in fields(config_class):
        if field.name in switches:
            assert field.default is not MISSING
            parser.add_argument(f"--{field.name}", action="store_true", help=described.get(field.name, ""))
    return parser


def _parse(parser, argv: Sequence[str], prog: str):
    try:
        return parser.parse_args(list(argv))
    except (argparse.ArgumentError, TypeError, ValueError, KeyError) as error:
        fail(prog, getattr(error, "message", None) or error)


def _descriptions(config_class: type) -> dict[str, str]:
    import docstring_parser

    found = docstring_parser.parse(config_class.__doc__ or "")
    return {item.arg_name: item.description or "" for item in found.params}
