"""Numbers and tables as text, as Markdown and as HTML."""

from __future__ import annotations

import math
import re
import textwrap
from collections.abc import Sequence
from html import escape
from itertools import zip_longest


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
    return folded(heads, body, left, gap, width=math.inf)


def folded(
    heads: Sequence[str], body: Sequence[Sequence[str]], left: int = 1, gap: int = 2, width: float = 80
) -> list[str]:
    """The same in at most ``width`` columns: a cell that is too long goes on in the lines below.

    Cells are broken between words, those of the first column also behind a mark of punctuation. Where the longest
    pieces do not fit beside each other, lines are longer.

    >>> folded(["cell", "−log p(x)"], [["linear/rebar", "1.5 ± 0.1"]], width=20)
    ['cell       −log p(x)', 'linear/    1.5 ± 0.1', 'rebar']
    """
    columns = [
        [_pieces(cell, is_name=k == 0) for cell in column] for k, column in enumerate(zip(heads, *body, strict=True))
    ]
    widths = [max(len("".join(cell)) for cell in column) for column in columns]
    least = [max(len(piece.rstrip()) for cell in column for piece in cell) for column in columns]
    least[0] = min(least[0], LONGEST_PART)
    needed = [
        max([size, *(len("".join(cell)) for cell in column[1:])]) for size, column in zip(least, columns, strict=True)
    ]
    for limits in (needed, least):  # heads are broken before cells
        while sum(widths) + gap * (len(widths) - 1) > width and widths != limits:
            widest = max((k for k in range(len(widths)) if widths[k] > limits[k]), key=widths.__getitem__)
            widths[widest] -= 1
    top, *rows = [
        [_lines(cell, size) for cell, size in zip(row, widths, strict=True)] for row in zip(*columns, strict=True)
    ]
    height = max(map(len, top))
    top = [[""] * (height - len(cell)) + cell for cell in top]  # heads stand on the line above the numbers
    return [
        (" " * gap)
        .join(
            text.ljust(size) if column < left else text.rjust(size)
            for column, (text, size) in enumerate(zip(line, widths, strict=True))
        )
        .rstrip()
        for row in (top, *rows)
        for line in zip_longest(*row, fillvalue="")
    ]


def _pieces(text: str, is_name: bool) -> list[str]:
    """The parts of a cell between which a line may end: words, but no operator and no number without its error."""
    words = re.findall(r"\S+(?: [±×/] \S+)*\s*", text) or [""]
    return [piece for word in words for piece in re.findall(_PART_OF_A_NAME, word)] or [""] if is_name else words


_PART_OF_A_NAME = re.compile(r"[^:/.,( -]+[:/.,( -]*|[:/.,( -]+")
LONGEST_PART = 16  # of a name; longer ones are cut where the table is too wide


def _lines(pieces: Sequence[str], width: int) -> list[str]:
    """The pieces in lines of at most ``width`` characters.

    >>> _lines(["mine:", "ConstantBaseline(", "decay=0.5)"], 20)
    ['mine:', 'ConstantBaseline(', 'decay=0.5)']
    """
    lines = [""]
    short = [part[at : at + width] for part in pieces for at in range(0, len(part.rstrip()) or 1, width or 1)]
    for piece in short:
        if lines[-1] and len(lines[-1] + piece.rstrip()) > width:
            lines.append("")
        lines[-1] += piece
    return [line.rstrip() for line in lines]


def wrapped(text: str, indent: str = "  ") -> str:
    """A text in lines of at most 80 characters, those after the first indented.

    >>> wrapped("word " * 20).splitlines()[1]
    '  word word word word'
    """
    # Names with hyphens stay whole; a table among the texts keeps its spaces.
    return textwrap.fill(text, 80, replace_whitespace=False, subsequent_indent=indent, break_on_hyphens=False)


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
