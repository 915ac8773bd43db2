"""The blocks of the how-to and coming-from pages, and of three more, run as they stand, from first to last."""

from __future__ import annotations

import importlib
import re

import pytest
from pages import DOCS, NOT_RUN, blocks, run

from gumbo.experiments import cli

PAGES = sorted(page for folder in ("howto", "coming-from") for page in (DOCS / folder).glob("*.md"))
# Longer pages, whose blocks run too.
LONGER = [DOCS / f"{name}.md" for name in ("runs", "compiled", "several-processes")]
COMPILES = pytest.mark.slow  # of the page that compiles two steps
RUN = [*PAGES, *(pytest.param(page, marks=COMPILES if page.stem == "compiled" else ()) for page in LONGER)]


@pytest.mark.parametrize("page", RUN, ids=lambda page: f"{page.parent.name}/{page.stem}")
def test_a_page_runs_as_it_stands(page, tmp_path, monkeypatch, param_store, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    found = blocks(page.read_text(encoding="utf-8"))
    assert any(not block.startswith(NOT_RUN) for block in found), "a page without a block that runs"
    run(found, page.name)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: f"{page.parent.name}/{page.stem}")
def test_a_page_is_a_screen_or_two_and_linked(page):
    text = page.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 110
    link = f"{page.parent.name}/{page.name}"
    assert link in (DOCS / "questions.md").read_text(encoding="utf-8")
    assert link.removesuffix(".md") in (DOCS / "index.md").read_text(encoding="utf-8")


def test_a_block_is_marked_only_where_it_needs_what_is_not_there():
    for page in [*PAGES, *LONGER]:
        for block in blocks(page.read_text(encoding="utf-8")):
            if block.startswith(NOT_RUN):
                first = block.partition("\n")[0]
                assert first.startswith(f"{NOT_RUN}: needs "), f"{page.name}: {first}"


COMMANDED = [*PAGES, *sorted((DOCS / "tutorials").glob("*.md"))]


@pytest.mark.parametrize("page", COMMANDED, ids=lambda page: f"{page.parent.name}/{page.stem}")
def test_commands_name_verbs_and_options_that_exist(page):
    for verb, options in re.findall(r"(?<![\w.])gumbo ([a-z]+)((?: [^`\n#]*)?)", page.read_text(encoding="utf-8")):
        if verb in cli.VERBS and (named := set(re.findall(r"--(\w+)", options))):
            module = importlib.import_module(f"gumbo.experiments.{cli.VERBS[verb].module}")
            known = {"config", "json", "print_config"} | set(vars(module)[verb.capitalize()].__dataclass_fields__)
            assert named <= known, f"gumbo {verb}{options}"


def test_a_block_that_fails_fails_and_one_that_is_marked_does_not():
    with pytest.raises(ZeroDivisionError):
        run(blocks("```py\n1 / 0\n```\n"), "page")
    with pytest.raises(SyntaxError):
        run([f"{NOT_RUN}: needs luck\n1 +\n"], "page")
    run(blocks(f"```py\n{NOT_RUN}: needs luck\n1 / 0\n```\n"), "page")
