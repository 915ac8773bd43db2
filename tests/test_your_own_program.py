"""The sections of docs/your-own-program.md run as they stand, and each in a namespace of its own."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

PAGE = Path(__file__).resolve().parents[1] / "docs" / "your-own-program.md"
SECTIONS = {
    part.splitlines()[0]: re.findall(r"```py\n(.*?)```", part, re.DOTALL)
    for part in re.split(r"^## ", PAGE.read_text(), flags=re.MULTILINE)[1:]
}


@pytest.mark.parametrize("title", [title for title, blocks in SECTIONS.items() if blocks])
def test_a_section_runs_as_it_stands(title, tmp_path, monkeypatch, param_store):
    monkeypatch.chdir(tmp_path)
    names = {"__name__": "page"}
    for block in SECTIONS[title]:
        exec(compile(block, f"{PAGE.name}: {title}", "exec"), names)
