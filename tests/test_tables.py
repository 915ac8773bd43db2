"""Public results show in a notebook the rows that they print."""

from __future__ import annotations

from html.parser import HTMLParser

import pyro
import pyro.distributions as dist
import pytest
import torch

from gumbo import tables
from gumbo.inference import audit, evaluate, fit
from gumbo.inference.diagnosis.report import Report, Verdict

X = torch.tensor([0.3, -1.2, 0.8, 0.1])


class Model(pyro.nn.PyroModule):
    def forward(self, x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)


class Guide(pyro.nn.PyroModule):
    def __init__(self):
        super().__init__()
        self.slope = torch.nn.Parameter(torch.tensor(0.4))

    def forward(self, x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(self.slope * x, 0.7))


class Cells(HTMLParser):
    """The texts of a page: rows of a table, and paragraphs."""

    def __init__(self, page):
        super().__init__()
        self.rows, self.paragraphs, self.open = [], [], []
        self.feed(page)
        assert not self.open, f"left open: {self.open}"

    def handle_starttag(self, tag, attrs):
        self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
        if tag == "p":
            self.paragraphs.append("")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] in ("td", "th"):
            self.rows[-1][-1] += data
        if self.open and self.open[-1] == "p":
            self.paragraphs[-1] += data


def words(text):
    return " ".join(text.split())


def test_an_evaluation():
    found = evaluate(Model(), Guide(), X, num_samples=5)
    page = Cells(found._repr_html_())
    lines = str(found).splitlines()
    assert page.paragraphs[0] == lines[0].partition(";")[0]
    assert [words(f"{name} {mean} ± {error} (± {drawn})") for name, mean, error, drawn in page.rows[1:]] == [
        words(line) for line in lines[1:]
    ]


def test_a_fit():
    found = fit(Model(), Guide(), X, epochs=2, progress=False)
    page = Cells(found._repr_html_())
    assert f"FitResult({', '.join('='.join(row) for row in page.rows[1:])})" == repr(found)


def test_an_audit_and_its_selections():
    report = audit(Model(), Guide(), X, estimators=["pathwise", "score"], num_samples=20)
    page = Cells(report._repr_html_())
    for line in page.rows[1:]:
        assert any(
            printed.startswith(line[0]) and line[3] in printed and line[5] in printed
            for printed in report.table().splitlines()
        )
    assert {line[0] for line in page.rows[1:]} == {"pathwise", "score"}
    assert any(text.startswith("recommended: ") for text in page.paragraphs)
    assert "xr-wrap" in report[["seconds"]]._repr_html_()  # some variables show as xarray shows them


def test_a_diagnosis():
    verdicts = (
        Verdict("khat", "alarm", "k̂ of 3 of 4 data is above 0.7", advice="take a richer guide"),
        Verdict("width", "ok", "the guide is as wide as the posterior"),
        Verdict("pull", "cannot say", "too few draws", advice="draw 1,000"),
    )
    report = Report(verdicts, None, skipped={"calibration": "it was not asked for", "khat": "said above"})
    page = Cells(report._repr_html_())
    printed = words(str(report))
    assert words(page.paragraphs[0]) in printed
    assert [row[0] for row in page.rows[1:]] == ["khat", "width", "pull", "calibration"]
    for name, _, text, advice in page.rows[1:]:
        assert words(f"{name}: {text}") in printed and words(advice) in printed


def test_a_table_is_folded_heads_first_and_a_name_behind_its_punctuation():
    heads = ["cell", "ours", "relaxed, in training"]
    body = [["vae-bernoulli/MuProp", "120.43 ± 0.27", "104.21"], ["linear/arm", "109.33 ± 0.14", ""]]
    whole = tables.folded(heads, body)
    assert whole == tables.plain(heads, body) and len(whole) == 3
    lines = tables.folded(heads, body, width=45)
    assert [line.split()[0] for line in lines] == ["relaxed,", "in", "cell", "vae-bernoulli/MuProp", "linear/arm"]
    narrow = tables.folded(heads, body, width=40)
    assert max(map(len, narrow)) <= 40 and any("120.43 ± 0.27" in line for line in narrow)
    assert [line.split()[0] for line in narrow if line[:1].strip()] == [
        "cell",
        "vae-bernoulli/",
        "MuProp",
        "linear/arm",
    ]
    assert tables.folded(["a name", "b"], []) == ["a name  b"]


@pytest.mark.parametrize("text", ["<b>", "a & b", '"'])
def test_cells_are_escaped(text):
    page = tables.html(["name", text], [["row", text]], above=[text], below=["", text])
    found = Cells(page)
    assert found.rows == [["name", text], ["row", text]] and found.paragraphs == [text, text]


def test_a_cell_of_a_sentence_may_break_its_lines():
    page = tables.html(
        ["question", "verdict", "found"], [["khat", "ok", "a sentence of more than forty characters, as here"]]
    )
    assert page.count('<td class="long" title=') == 1 and f'<td title="khat, verdict: ok"{tables.LEFT}>ok' in page


def test_columns_of_text_are_left_aligned_and_columns_of_numbers_right():
    heads = ["word", "ELBO", "found", "note"]
    body = [["rloo", "-19.27 ± 0.04", "1 of 2 published cells within 2 nats", ""], ["trace", "nan", "all", "collapsed"]]
    assert tables.markdown(heads, body)[1] == "| --- | ---: | --- | --- |"
    shown = tables.html(heads, body)
    for column, head in enumerate(heads):
        left = f'<th scope="col"{tables.LEFT}>{head}</th>' in shown
        assert left is (column != 1), head
    assert shown.count("<td title=") == 3 * len(body) and shown.count(f'"{tables.LEFT}>') == 3 + 2 * len(body)
