"""The sections of docs/your-own-program.md run as they stand, and each in a namespace of its own."""

from __future__ import annotations

import pytest
from pages import DOCS, blocks, run, sections

PAGE = DOCS / "your-own-program.md"
SECTIONS = {title: blocks(part) for title, part in sections(PAGE.read_text(encoding="utf-8")).items()}


@pytest.mark.parametrize("title", [title for title, found in SECTIONS.items() if found])
def test_a_section_runs_as_it_stands(title, tmp_path, monkeypatch, param_store):
    monkeypatch.chdir(tmp_path)
    run(SECTIONS[title], f"{PAGE.name}: {title}")
