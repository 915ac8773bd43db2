"""The twenty questions that users ask: each has an answer and a page whose title announces it; every link is right."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from pages import DOCS, sections

# Each question with words of the titles of pages that answer it: one page for each line of words.
QUESTIONS = {
    "Which ELBO or estimator should I take?": ["which gradient estimator", "which objective"],
    "Why does my discrete model not train?": ["discrete model does not train"],
    "How do I put SVI results into ArviZ?": ["SVI results into ArviZ"],
    "Can I trust this posterior?": ["posteriors you can trust"],
    "How do I predict for new data?": ["predict for new data"],
    "How do I write a guide for my own model?": ["write a guide for your own model"],
    "How do I train on my own images, table, counts, DataLoader?": ["your own images, table, counts or DataLoader"],
    "How do I change the network?": ["network of your own"],
    "How do I save, load, continue?": ["save, load", "resume"],
    "How do I stop early, and with a KL warm-up?": ["stop early, with a KL warm-up"],
    "When has SVI converged without validation data?": ["when SVI has converged"],
    "How do I mix estimators (one discrete site, the rest Normal)?": ["mix estimators"],
    "What does enumeration cost, and what then?": ["what enumeration costs"],
    "How do I handle masks and variable lengths?": ["masks, missing values and variable lengths"],
    "How do I use several GPUs or machines?": ["several processes, GPUs or machines"],
    "How do I get the same numbers again?": ["the same numbers again"],
    "How do I compile the step, and what can it not do?": ["compile the step, and what it cannot do"],
    "How do I track runs (TensorBoard, W&B, MLflow)?": ["track a run with TensorBoard, W&B, MLflow"],
    "How do I come from Pyro, NumPyro, pythae, Storchastic?": [
        "coming from Pyro",
        "coming from NumPyro",
        "coming from pythae",
        "coming from Storchastic",
    ],
    "How do I add a model, guide, estimator?": ["add a model, guide, estimator"],
}
PAGE = (DOCS / "questions.md").read_text(encoding="utf-8")


def links(text: str) -> list[tuple[Path, str]]:
    """The pages of the site that a text links to, each with the anchor, if there is one."""
    found = re.findall(r"\]\((?!https?:)([^)#]+\.md)(?:#([^)]+))?\)", text)
    return [((DOCS / path).resolve(), anchor) for path, anchor in found]


def anchors(path: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub and the site make them."""
    heads = re.findall(r"^#+ (.+)$", path.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", head.lower()).strip().replace(" ", "-") for head in heads}


def title(path: Path) -> str:
    return next(line for line in path.read_text(encoding="utf-8").splitlines() if line.startswith("# "))[2:]


def test_the_twenty_questions_are_asked():
    assert len(QUESTIONS) == 20 and list(sections(PAGE)) == list(QUESTIONS)


@pytest.mark.parametrize("question", QUESTIONS)
def test_a_question_has_a_page_whose_title_announces_the_answer(question):
    titles = [title(path).lower() for path, _ in links(sections(PAGE)[question])]
    for words in QUESTIONS[question]:
        assert any(words.lower() in said for said in titles), f"{words!r} in none of {titles}"


def test_every_link_of_the_questions_leads_to_a_page_and_a_heading():
    found = links(PAGE)
    assert len(found) > 40
    for path, anchor in found:
        assert path.is_file(), path
        assert not anchor or anchor in anchors(path), f"{path.name}#{anchor}: {sorted(anchors(path))}"
