"""The command ``gumbo``, which runs the scripts of this folder."""

from __future__ import annotations

import importlib
import shutil
import signal
import sys
import textwrap
from collections.abc import Sequence
from typing import NamedTuple

from gumbo.console import until_reader_leaves
from gumbo.errors import Interrupted, did_you_mean


class Verb(NamedTuple):
    """A module of this package with ``main(argv, prog)``, and a line that describes it."""

    module: str
    summary: str


# Imported on use, so that `gumbo --help` does not import torch.
VERBS = {
    "compare": Verb("compare", "compare pathwise, score-function and relaxed gradients on one model"),
    "train": Verb("train", "train a model with a guide and an estimator on a data set"),
    "evaluate": Verb("evaluate", "evaluate a run of `gumbo train` on a split of its data"),
    "inspect": Verb("inspect_posterior", "the posterior of a run for ArviZ, in pictures and verdicts"),
    "export": Verb("export", "write a run's parameters as safetensors, with the config of its programs"),
    "audit": Verb("audit", "compare gradient estimators with the exact gradient, on any model and guide"),
    "system": Verb("system", "one of the small demonstrations: a picture and its numbers"),
    "reproduce": Verb("reproduce", "train the cells of a published table and compare them with the published numbers"),
    "doctor": Verb("doctor", "versions, devices, data found, and a self-test of ten seconds"),
    "completion": Verb("completion", "a script that completes verbs, options and names in your shell"),
    "list": Verb("listing", "show models, guides, estimators, objectives, and which combinations are valid"),
}

OPTIONS = ("--help", "--version")


def usage() -> str:
    width = max(map(len, VERBS))
    verbs = "\n".join(wrapped(f"  {name:{width}}  {verb.summary}", width + 4) for name, verb in VERBS.items())
    summary = "Deep generative models and amortized guides in Pyro, with a gradient estimator for each site."
    status = (
        "Exit status: 0 success; 1 failure during the run; 2 a mistake in the command; 128 + n stopped by signal n."
    )
    more = "`gumbo VERB --help` shows the options of a verb; `gumbo --version` the version."
    return f"usage: gumbo VERB [options]\n\n{wrapped(summary)}\n\nverbs:\n{verbs}\n\n{wrapped(more)}\n{wrapped(status)}"


def wrapped(text: str, indent: int = 0) -> str:
    """The text in lines of the terminal's width, 120 at most, all but the first indented."""
    width = min(shutil.get_terminal_size().columns, 120)
    return textwrap.fill(text, width, subsequent_indent=" " * indent, break_long_words=False, break_on_hyphens=False)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the verb that ``argv`` (by default the process's arguments) begins with."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if not argv or argv[0] in ("-h", "--help", "help"):
        with until_reader_leaves():
            print(usage())
        return
    if argv[0] == "--version":
        from gumbo import __version__

        with until_reader_leaves():
            print(f"gumbo {__version__}")
        return
    name, *rest = argv
    if name not in VERBS:
        kind, known = ("option", OPTIONS) if name.startswith("-") else ("verb", tuple(VERBS))
        hint = did_you_mean(name, known, " ")
        print(f"gumbo: error: unknown {kind} {name!r}:{hint} (known: {', '.join(known)})", file=sys.stderr)
        raise SystemExit(2)
    try:
        verb = importlib.import_module(f"gumbo.experiments.{VERBS[name].module}")
    except KeyboardInterrupt:  # torch takes seconds to import
        stop = Interrupted(signal.SIGINT)
        print(f"gumbo {name}: {stop}", file=sys.stderr)
        raise SystemExit(stop.status) from None
    verb.main(rest, prog=f"gumbo {name}")


if __name__ == "__main__":
    main()
