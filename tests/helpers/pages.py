"""The blocks of code of a page of docs/, and how a test runs them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

DOCS = Path(__file__).resolve().parents[2] / "docs"
NOT_RUN = "# not run here"  # the first line of a block whose package or machine is not there; docs/conf.py marks it


def blocks(text: str) -> list[str]:
    """The Python blocks of a page, or of a part of one, in order."""
    return re.findall(r"^```(?:py|python)\n(.*?)^```", text, re.DOTALL | re.MULTILINE)


def sections(text: str) -> dict[str, str]:
    """The parts of a page below headings of the second level, by their titles."""
    return {part.partition("\n")[0]: part for part in re.split(r"^## ", text, flags=re.MULTILINE)[1:]}


def run(found: Sequence[str], page: str) -> None:
    """Run blocks in order in one namespace; those that are marked "not run here" are compiled only."""
    names = {"__name__": "page"}
    for number, block in enumerate(found, 1):
        code = compile(block, f"{page}, block {number}", "exec")
        if not block.startswith(NOT_RUN):
            exec(code, names)
