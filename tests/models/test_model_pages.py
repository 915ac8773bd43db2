"""What `python benchmarks/model_pages.py` writes of each registered model is what its class says.

Pages are written by that command, and no test asks for one: a new model is one file and one import line.
"""

from __future__ import annotations

import importlib
import inspect
import re
import textwrap
from pathlib import Path

import pytest
import torch

from gumbo.experiments.listing import combinations
from gumbo.guides import fitting, guides
from gumbo.inference.engine.looks import refusals
from gumbo.models import models

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs" / "models"
SHAPE = (1, 8, 8)
PAGES = sorted(path.stem for path in DOCS.glob("*.md") if path.stem != "README")


@pytest.fixture
def pages(monkeypatch):
    """The script that writes the pages."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module("model_pages")


def row(name, variant, guide, word="rloo", reason=""):
    return {"model": name, "variant": dict(variant), "guide": guide, "estimator": word, "reason": reason}


@pytest.mark.parametrize("name", list(models))
def test_the_page_says_what_the_class_says(name, pages):
    cls = models[name]
    torch.manual_seed(0)
    fits = [(variant, guide) for variant in cls.variants for guide in fitting(cls(SHAPE, **variant))]
    page = pages.page(name, [row(name, variant, guide) for variant, guide in fits], "(the example)")
    assert textwrap.dedent(inspect.getsource(cls.forward)).rstrip() in page and "(the example)" in page
    for site, latent in cls(SHAPE).latents.items():
        assert f"| `{site}` | {latent.family} | `{tuple(latent.shape)}` |" in page
    for _, guide in fits:
        assert f"| `{guide}` |" in page
    named = set(re.findall(r"^\| `([\w-]+)` \|.*`trace`", page, re.MULTILINE))
    assert named <= set(guides)


@pytest.mark.parametrize("name", PAGES)
def test_a_page_shows_no_marks_of_docstrings_and_no_private_class(name):
    page = (DOCS / f"{name}.md").read_text()
    assert not re.search(r":\w+:`", page) and not re.search(r"this one is _|not (?:of|for) _", page)


@pytest.mark.parametrize("name", list(models))
def test_the_page_names_the_estimators_that_serve(name, pages):
    cls = models[name]
    torch.manual_seed(0)
    model = cls(SHAPE, **cls.variants[0])
    guide = fitting(model)[0]
    refused = refusals(model, guides[guide](model), **model.example(2))
    rows = [row(name, cls.variants[0], guide, word, reason) for word, reason in refused.items()]
    page = pages.page(name, rows, "")
    cells = [line.split(" | ")[1] for line in page.splitlines() if line.startswith(f"| `{guide}` |")]
    serving = {word for word, reason in refused.items() if not reason}
    assert any(
        set(re.findall(r"`([\w-]+)`", cell) if "every one" not in cell else refused) == serving for cell in cells
    )


def test_mixed_latents_are_advised_an_estimator_each(pages):
    [line, *_] = pages.advice(models["semi-supervised-vae"])
    assert '{"y": "enumerate", "z": "pathwise"}' in line
    [line, *_] = pages.advice(models["sequence-vae"])  # one form of it; three tokens of three values, listed together
    assert "With `vocabulary=3" in line and '{"z": "pathwise", "t1": "enumerate", "t2": "enumerate"' in line
    assert pages.advice(models["gaussian-vae"]) == [] == pages.advice(models["categorical-vae"])


def test_rows_of_one_model_are_its_part_of_the_grid():
    rows = combinations(["neural-classifier"])
    assert {one["model"] for one in rows} == {"neural-classifier"} and {one["guide"] for one in rows} == set(guides)


@pytest.mark.parametrize("name", PAGES)
def test_a_written_page_is_of_this_code_and_of_the_studies_as_they_stand(name, pages):
    torch.manual_seed(0)
    expected = pages.page(name, combinations([name]), pages.kept_example(name))
    same = (DOCS / f"{name}.md").read_text() == expected
    assert same, f"docs/models/{name}.md is old: python benchmarks/model_pages.py --keep-examples"


def test_the_index_is_of_this_code(pages):
    assert (DOCS / "README.md").read_text() == pages.index()


@pytest.mark.parametrize("name", PAGES)
def test_the_page_has_an_example_with_its_picture(name):
    page = (DOCS / f"{name}.md").read_text()
    assert f"gumbo train --model {name} " in page
    pictures = re.findall(r"!\[.*?\]\((figures/.*?)\)", page)
    assert pictures
    for picture in pictures:
        assert (DOCS / picture).read_bytes()[:4] == b"\x89PNG"
        assert (DOCS / picture).stat().st_size < 60_000


def test_the_index_names_every_page_and_no_other():
    linked = set(re.findall(r"\]\(([\w-]+)\.md\)", (DOCS / "README.md").read_text()))
    assert linked == set(PAGES) <= set(models)


FRAGMENTS = sorted((ROOT / "benchmarks" / "results" / "collection").glob("*.md"))


@pytest.mark.parametrize("path", [*FRAGMENTS, *DOCS.glob("*.md")], ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_every_link_leads_to_a_file(path):
    """Also in the tables of the studies, which are read where they lie and on the pages."""
    text = re.sub(r"```.*?```", "", path.read_text(), flags=re.DOTALL)
    links = re.findall(r"\]\((?!https?:|#)([^)#]+)", text)
    assert not [link for link in links if not (path.parent / link).exists()]
