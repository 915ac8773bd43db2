"""Numbers and tables as text."""

from __future__ import annotations

import math
from collections.abc import Sequence


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


def markdown(heads: Sequence[str], body: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a Markdown table; all columns but the first are right-aligned."""
    escaped = [[text.replace("|", "\\|") for text in line] for line in (heads, *body)]
    first, *rest = ["| " + " | ".join(line) + " |" for line in escaped]
    return [first, "| --- |" + " ---: |" * (len(heads) - 1), *rest]
