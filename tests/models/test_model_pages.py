"""Each registered model has a page in docs/models that says what its class says."""

from __future__ import annotations

import inspect
import re
import textwrap
from pathlib import Path

import pytest
import torch

from gumbo.guides import fitting, guides
from gumbo.inference.elbo import refusals
from gumbo.models import models

DOCS = Path(__file__).resolve().parents[2] / "docs" / "models"
SHAPE = (1, 8, 8)


def written(name: str) -> str:
    path, command = DOCS / f"{name}.md", f"python benchmarks/model_pages.py --keep-examples --models {name}"
    if not path.exists():
        pytest.fail(f"model {name!r} has no page docs/models/{name}.md: write it with `{command}`")
    return path.read_text()


@pytest.mark.parametrize("name", list(models))
def test_the_page_says_what_the_class_says(name):
    page, cls = written(name), models[name]
    advice = f"write the page again: python benchmarks/model_pages.py --keep-examples --models {name}"
    torch.manual_seed(0)
    assert textwrap.dedent(inspect.getsource(cls.forward)).rstrip() in page, advice
    for site, latent in cls(SHAPE).latents.items():
        assert f"| `{site}` | {latent.family} | `{latent.shape}` |" in page, advice
    for variant in cls.variants:
        for guide in fitting(cls(SHAPE, **variant)):
            assert f"| `{guide}` |" in page, advice
    named = set(re.findall(r"^\| `([\w-]+)` \|.*`trace`", page, re.MULTILINE))
    assert named <= set(guides), advice


@pytest.mark.parametrize("name", list(models))
def test_the_page_names_the_estimators_that_serve(name):
    page, cls = written(name), models[name]
    torch.manual_seed(0)
    model = cls(SHAPE, **cls.variants[0])
    guide = fitting(model)[0]
    refused = refusals(model, guides[guide](model), **model.example(2))
    rows = [line.split(" | ")[1] for line in page.splitlines() if line.startswith(f"| `{guide}` |")]
    serving = {word for word, reason in refused.items() if not reason}
    assert any(set(re.findall(r"`([\w-]+)`", row) if "every one" not in row else refused) == serving for row in rows)


@pytest.mark.parametrize("name", list(models))
def test_the_page_has_an_example_with_its_picture(name):
    page = written(name)
    assert f"gumbo train --model {name} " in page
    pictures = re.findall(r"!\[.*?\]\((figures/.*?)\)", page)
    assert pictures
    for picture in pictures:
        assert (DOCS / picture).read_bytes()[:4] == b"\x89PNG"
        assert (DOCS / picture).stat().st_size < 60_000


def test_the_index_names_every_page_and_no_other():
    linked = set(re.findall(r"\]\(([\w-]+)\.md\)", (DOCS / "README.md").read_text()))
    assert linked == set(models) == {path.stem for path in DOCS.glob("*.md")} - {"README"}
