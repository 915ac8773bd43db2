"""``gumbo completion``: a static script that completes verbs, options and names in a shell."""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Sequence
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

from gumbo.errors import BadInput, UnknownName
from gumbo.experiments._command import has_json_flag, run_command

SHELLS = ("bash", "zsh", "tcsh")


@dataclass
class Completion:
    """Print a script that completes gumbo's verbs, options and names, without starting Python on TAB.

    bash: `gumbo completion bash > ~/.local/share/bash-completion/completions/gumbo`; zsh: `gumbo completion zsh >
    DIR/_gumbo`, DIR a folder of $fpath. Run it again after an upgrade.

    Args:
        shell: bash, zsh or tcsh.
    """

    shell: str


def names() -> dict[str, list[str]]:
    """The values of an option, from the registries."""
    from gumbo.experiments.data import datasets
    from gumbo.guides import guides
    from gumbo.inference import stock_elbos
    from gumbo.inference.estimators import estimators
    from gumbo.models import models

    return {
        "model": list(models),
        "guide": list(guides),
        "estimator": [*estimators, *stock_elbos],
        "data": list(datasets),
    }


def settings_of(module: str) -> type | None:
    """The dataclass of a verb's settings, which its module defines under the verb's name."""
    found = importlib.import_module(f"gumbo.experiments.{module}")
    own = [thing for thing in vars(found).values() if is_dataclass(thing) and thing.__module__ == found.__name__]
    marked = [thing for thing in own if isinstance(thing, type) and "Args:" in (thing.__doc__ or "")]
    last = [one for one in marked if not any(issubclass(other, one) and other is not one for other in marked)]
    return last[0] if last else None


def parser() -> argparse.ArgumentParser:
    """All verbs with their options, for completion."""
    from gumbo.experiments.cli import VERBS
    from gumbo.experiments.reproduction import tables
    from gumbo.experiments.systems import systems

    known = names()
    positional = {"reproduce": list(tables), "system": list(systems), "completion": list(SHELLS)}
    made = argparse.ArgumentParser(prog="gumbo")
    made.add_argument("--version", action="store_true", help="the version")
    verbs = made.add_subparsers()
    for verb, (module, summary) in VERBS.items():
        sub = verbs.add_parser(verb, help=summary, description=summary)
        if verb in positional:
            sub.add_argument("name", choices=positional[verb])
        config = settings_of(module)
        sub.add_argument("--config", help="a YAML file of settings")
        for field in fields(config) if config else ():
            options: dict[str, Any] = {"help": " "}
            if field.type in (bool, "bool"):
                options["action"] = "store_true"
            elif field.name in known:
                options["choices"] = known[field.name]
            sub.add_argument(f"--{field.name}", **options)
        if config and has_json_flag(config, answers=config is not Completion):
            sub.add_argument("--json", action="store_true", help=" ")
    return made


def script(shell: str) -> str:
    """The completion script of a shell.

    Raises:
        UnknownName: the shell is none of bash, zsh, tcsh.
        BadInput: shtab, which generates the script, is not installed.
    """
    if shell not in SHELLS:
        raise UnknownName("shell", shell, SHELLS)
    try:
        import shtab
    except ImportError:
        raise BadInput('gumbo completion needs shtab: pip install -e ".[completion]"') from None
    return shtab.complete(parser(), shell=shell)


def completion(config: Completion) -> None:
    print(script(config.shell))


def main(argv: Sequence[str] | None = None, prog: str = "gumbo completion") -> None:
    run_command(Completion, completion, argv, prog, answers=False)


if __name__ == "__main__":
    main()
