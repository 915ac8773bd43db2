"""Numbers and tables as text, as Markdown and as HTML."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from html import escape


def digits(number: float) -> str:
    """Three significant digits in the shortest form: 0.0123, 4.56, 789, 12,300, 4.5e+07.

    >>> digits(0.01234), digits(12300.0), digits(4.5e7)
    ('0.0123', '12,300', '4.5e+07')
    """
    if not math.isfinite(number) or number == 0:
        return f"{number:.0f}"
    if 1e-3 <= abs(number) < 1e5:
        places = max(0, 2 - math.floor(math.log10(abs(number))))
        return f"{number:,.{places}f}"
    return f"{number:.1e}"


def plain(heads: Sequence[str], body: Sequence[Sequence[str]], left: int = 1, gap: int = 2) -> list[str]:
    """Lines of a table with aligned columns, the first ``left`` left-aligned.

    >>> plain(["name", "value"], [["a", "1.0"], ["bcdef", "10.0"]])
    ['name   value', 'a        1.0', 'bcdef   10.0']
    """
    widths = [max(len(line[column]) for line in (heads, *body)) for column in range(len(heads))]
    return [
        (" " * gap)
        .join(
            text.ljust(width) if column < left else text.rjust(width)
            for column, (text, width) in enumerate(zip(line, widths, strict=True))
        )
        .rstrip()
        for line in (heads, *body)
    ]


def holds_numbers(cells: Sequence[str]) -> bool:
    """Whether a column is of numbers, errors, intervals or shares, and so right-aligned.

    >>> holds_numbers(["-19.17 ± 0.07", "", "**1,024**"]), holds_numbers(["1 of 2 cells", "–"]), holds_numbers(["–"])
    (True, False, False)
    """
    said = [cell for cell in cells if re.search(r"\w", cell)]
    return bool(said) and all(_NUMBER.match(cell) and not re.search(r"[^\W\d_]{4}", cell) for cell in said)


_NUMBER = re.compile(r"[^\w]*(\d|nan|inf)")


def markdown(heads: Sequence[str], body: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a Markdown table; columns of numbers but the first are right-aligned.

    >>> markdown(["name", "ELBO", "note"], [["a", "-1.0", "collapsed"]])[1]
    '| --- | ---: | --- |'
    """
    escaped = [[text.replace("|", "\\|") for text in line] for line in (heads, *body)]
    first, *rest = ["| " + " | ".join(line) + " |" for line in escaped]
    marks = ["---:" if k and holds_numbers([line[k] for line in body]) else "---" for k in range(len(heads))]
    return [first, f"| {' | '.join(marks)} |", *rest]


def html(
    heads: Sequence[str], body: Sequence[Sequence[str]], above: Sequence[str] = (), below: Sequence[str] = ()
) -> str:
    """A table as HTML, with paragraphs above and below; the first cell of a row is its head.

    A cell has its row and its column for a title, which a browser shows on hovering. A cell of more than 40 characters
    is of class ``long``, so that a page can break its lines. Columns of text are left-aligned, in any page.

    >>> html(["name", "value"], [["a", "<1"]], above=["Numbers"]).splitlines()[0]
    '<p>Numbers</p>'
    >>> '<td title="a, value: &lt;1">&lt;1</td>' in html(["name", "value"], [["a", "<1"]])
    True
    """
    left = ["" if holds_numbers([line[k] for line in body]) else LEFT for k in range(len(heads))]
    top = "".join(f'<th scope="col"{side}>{escape(head)}</th>' for head, side in zip(heads, left, strict=True))
    rows = []
    for row, *rest in body:
        cells = "".join(
            f'<td{LONG if len(cell) > 40 else ""} title="{escape(f"{row}, {head}: {cell}")}"{side}>{escape(cell)}</td>'
            for head, cell, side in zip(heads[1:], rest, left[1:], strict=True)
        )
        rows.append(f'<tr><th scope="row">{escape(row)}</th>{cells}</tr>')
    table = f"<table><thead><tr>{top}</tr></thead><tbody>{''.join(rows)}</tbody></table>"
    return "\n".join([*_paragraphs(above), table, *_paragraphs(below)])


LONG = ' class="long"'
LEFT = ' style="text-align:left"'


def _paragraphs(texts: Sequence[str]) -> list[str]:
    return [f"<p>{escape(text)}</p>" for text in texts if text]
