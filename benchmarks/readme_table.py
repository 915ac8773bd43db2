"""The README's comparison table, from a run of ``gumbo compare`` as its first command starts it.

    python benchmarks/readme_table.py [RUN]

Without the folder of a finished run, ``gumbo compare`` runs first: a few minutes. The text between the README's markers
is replaced; the rest of the page is left as it is.
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path

import torch

from gumbo.experiments import compare
from gumbo.tables import markdown

README = Path(__file__).resolve().parent.parent / "README.md"
START, END = "<!-- the table of `gumbo compare` -->", "<!-- end of the table -->"
FREE = ("jobs", "backend", "address", "folder", "resume", "trust")  # settings that change no number


def section(results: dict, machine: str) -> str:
    """Both families' tables, what their columns mean, and the conclusion."""
    config = compare.Compare(**results["config"])
    rows = compare.summarize(compare.ARMS, results["runs"])
    lines = [f"`gumbo compare` prints, in {results['seconds'] / 60:.0f} minutes on {machine}:", ""]
    for family in config.families:
        title, body = compare.table_of(family, rows)
        lines += [f"*{title[0].upper()}{title[1:]}*", "", *markdown(compare.HEADS, body), ""]
    return "\n".join([*lines, compare.note(config), "", f"**{compare.conclusion(rows)}**"])


def replaced(page: str, text: str, start: str = START, end: str = END) -> str:
    """The page with ``text`` between its markers."""
    before, _, rest = page.partition(start)
    _, found, after = rest.partition(end)
    if not found:
        raise SystemExit(f"{README} has no markers {start} … {end}")
    return f"{before}{start}\n\n{text}\n\n{end}{after}"


def main(argv: list[str]) -> None:
    if argv:
        results = json.loads((Path(argv[0]) / "results.json").read_text())
    else:
        results = compare.compare(compare.Compare())
    default = asdict(compare.Compare())
    other = [name for name, value in results["config"].items() if name not in FREE and value != default[name]]
    if other:
        raise SystemExit(f"that run was not what `gumbo compare` does by default: it has other {', '.join(other)}")
    machine = f"{compare.available_cpus()} cores, torch {torch.__version__.partition('+')[0]}"
    README.write_text(replaced(README.read_text(), section(results, machine)))
    print(f"{README}: the table is new")


if __name__ == "__main__":
    main(sys.argv[1:])
