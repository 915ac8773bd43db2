"""``gumbo system NAME``: small demonstrations, each with a picture and its numbers."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

from gumbo.errors import UnknownName
from gumbo.experiments._command import fail, run_command
from gumbo.experiments._runs import RunFolder
from gumbo.experiments.cli import wrapped
from gumbo.experiments.systems import System, systems


def system(config: System) -> dict[str, Any]:
    """Run a system, write ``results.json`` and ``plots/``, and print the numbers."""
    import torch

    run = RunFolder.create(config.name, config, config.folder)
    print(f"gumbo system {config.name}: into {run.path}", file=sys.stderr)
    with torch.random.fork_rng():
        torch.manual_seed(config.seed)
        results = config.measure(run)
    run.write_json("results.json", results)
    show(results)
    return results


def show(results: dict[str, Any], indent: str = "") -> None:
    """Print numbers by name, those of a group indented."""
    for name, value in results.items():
        if isinstance(value, dict):
            print(f"{indent}{name}")
            show(value, indent + "  ")
        else:
            print(f"{indent}{name:32} {f'{value:.4g}' if isinstance(value, float) else value}")


def usage(prog: str) -> str:
    """The systems, each with the first line of its docstring."""
    width = max(map(len, systems))
    lines = [f"  {name:{width}}  {(known.__doc__ or '').splitlines()[0]}" for name, known in systems.items()]
    listed = "\n".join(wrapped(line, width + 4) for line in lines)
    return f"usage: {prog} NAME [options]\n\nsystems:\n{listed}\n\n`{prog} NAME --help` shows the options of one."


def main(argv: Sequence[str] | None = None, prog: str = "gumbo system") -> None:
    argv = list(sys.argv[1:] if argv is None else argv)
    if not argv:
        fail(prog, f"the name of a system is missing: expected one of {', '.join(systems)}")
    if argv[0] in ("-h", "--help"):
        print(usage(prog))
        return
    name, *rest = argv
    if name not in systems:
        fail(prog, UnknownName("system", name, systems))
    run_command(systems[name], system, rest, f"{prog} {name}")


if __name__ == "__main__":
    main()
