"""``report.html``: one file that holds all it shows, for eyes and for a screen reader."""

from __future__ import annotations

from html.parser import HTMLParser
from pathlib import Path

import pytest

from gumbo.experiments import cli
from gumbo.experiments._report import MOST_BYTES, Report, command_line, finish
from gumbo.experiments._runs import RunFolder
from gumbo.experiments.evaluate import Evaluate
from gumbo.pictures import figure, save

VOID = {"meta", "link", "img", "br"}


class Page(HTMLParser):
    """Which elements a page has; fails where one is not closed."""

    def __init__(self, text: str):
        super().__init__()
        self.open: list[str] = []
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open and self.open.pop() == tag, tag

    def handle_startendtag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attrs for name, attrs in self.found if name == tag]


def checked(path: Path) -> Page:
    """The page, once it is known to need nothing else."""
    text = path.read_text()
    assert len(text.encode()) < MOST_BYTES and "http" not in text.replace("http-equiv", "")
    page = Page(text)
    assert not page.all("script") and all(
        image["alt"] and image["src"].startswith("data:") for image in page.all("img")
    )
    assert all(picture["role"] == "img" and picture["aria-label"] for picture in page.all("svg"))
    assert page.all("html") == [{"lang": "en"}] and any(m.get("name") == "viewport" for m in page.all("meta"))
    return page


def test_train_and_audit_end_with_a_report(tmp_path, capsys):
    small = "--model gaussian-vae --model_options.hidden=[8] --model_options.latent_dim=2 --guide_options.hidden=[8]"
    cli.main(["train", *small.split(), "--epochs=3", "--importance_samples=2", f"--folder={tmp_path / 'train'}"])
    page = checked(tmp_path / "train" / "report.html")
    assert len(page.all("circle")) >= 6 and len(page.all("img")) == 3
    text = (tmp_path / "train" / "report.html").read_text()
    assert "After 3 epochs the true ELBO on the test data is" in text and "gaussian-vae with guide normal" in text
    audit = "bernoulli-vae bernoulli --data digits --batch_size 2 --estimators [rloo] --num_samples 20"
    options = "--model_options.num_latents=2 --model_options.hidden=[4] --guide_options.hidden=[4]"
    cli.main(["audit", *audit.split(), *options.split(), f"--folder={tmp_path / 'audit'}"])
    page = checked(tmp_path / "audit" / "report.html")
    assert "recommended:" in (tmp_path / "audit" / "report.html").read_text() and len(page.all("img")) == 1
    assert any(cell.get("title", "").startswith("rloo, variance: ") for cell in page.all("td"))


def test_reproduce_ends_with_a_report(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    cli.main(["reproduce", "toy", "--quick", "--cells", "[0.45/rloo]", "--folder", str(tmp_path)])
    checked(tmp_path / "toy" / "report.html")


def test_what_a_user_wrote_is_text_and_no_markup():
    page = Report("<script>alert(1)</script>", 'a "verdict" & more')
    page.table(["<b>", "x"], [["</table>", '"><img src=x>']], "<i>")
    page.curves("c", {"<u>": [(0.0, 1.0), (1.0, float("nan")), (2.0, 3.0)]}, "<x>", "y")
    parsed = Page(page.html())
    assert not {"script", "b", "i", "u", "x", "img"} & {tag for tag, _ in parsed.found}
    assert len(parsed.all("circle")) == 2


def test_a_curve_of_equal_values_and_of_one_point_can_be_drawn():
    page = Report("t", "v")
    page.curves("flat", {"a": [(0.0, 0.0), (1.0, 0.0)], "b": [(0.0, 0.0)], "none": []}, "x", "y")
    page.curves("one", {"a": [(3.0, -2.0)]}, "x", "y")
    assert len(Page(page.html()).all("svg")) == 2


def test_pictures_that_are_too_large_are_named(tmp_path):
    run = RunFolder.create("evaluate", Evaluate(run="x"), str(tmp_path / "run"))
    made, axes = figure(1, 1)
    axes.plot([0, 1])
    save(made, run.plots / "small.png")
    (run.plots / "large.png").write_bytes(b"0" * MOST_BYTES)
    page = checked(finish(run, Report("t", "v")))
    assert [image["alt"] for image in page.all("img")] == ["small"]
    assert "large.png" in (run.path / "report.html").read_text()


def test_a_later_verb_keeps_the_report_of_the_first_below_its_own(tmp_path):
    run = RunFolder.create("train", Evaluate(run="x"), str(tmp_path / "run"))
    first = Report("gumbo train: a < b", "the bound is −20")
    first.curves("Curves", {"a": [(0.0, 1.0), (1.0, 2.0)]}, "x", "y")
    finish(run, first)
    for verdict in ("all ok", "an alarm"):  # the second time its own earlier page is replaced, not nested
        path = finish(run, Report("gumbo inspect", verdict), earlier="The training")
        text = path.read_text()
        page = checked(path)
        assert len(page.all("section")) == len(page.all("h1")) == len(page.all("svg")) == 1
        assert text.index(verdict) < text.index("<h2>The training</h2>") < text.index("the bound is −20")
        assert "<p>gumbo train: a &lt; b</p>" in text
    assert "all ok" not in text
    assert "The training" not in finish(run, first).read_text()  # trained again: of the posterior nothing is left


def test_a_run_without_a_report_gets_one_without_a_section(tmp_path):
    run = RunFolder.create("train", Evaluate(run="x"), str(tmp_path / "run"))
    assert not checked(finish(run, Report("gumbo inspect", "all ok"), earlier="The training")).all("section")


@pytest.mark.parametrize(
    ("argv", "typed"),
    [
        (["/usr/bin/gumbo", "train", "--lr", "1e-3"], "gumbo train --lr 1e-3"),
        (["/x/gumbo/__main__.py", "list"], "gumbo list"),
        (["experiments/compare.py", "--families", "[a, b]"], "python experiments/compare.py --families '[a, b]'"),
    ],
)
def test_the_command_is_as_one_would_type_it(argv, typed):
    assert command_line(argv) == typed
