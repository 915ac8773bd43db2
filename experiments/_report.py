"""``report.html``: a self-contained page with settings, results, and the command that repeats the run."""

from __future__ import annotations

import base64
import math
import re
import shlex
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from gumbo.experiments._runs import RunFolder, environment, in_utf8
from gumbo.tables import digits
from gumbo.tables import html as html_table

MOST_BYTES = 5_000_000
NARROW = "-narrow"  # at the end of the name of a picture for phones
MOST_POINTS = 200  # the most points of a curve, each with a tooltip
COLORS = ("#3b82c4", "#d97706", "#2e9e5b", "#c8453b", "#8b5fbf", "#8c6d46", "#c95fa4", "#6b7280", "#9a9a1d", "#1fa3b0")
DASHES = ("", "6 3", "2 2", "8 3 2 3")

STYLE = """
:root { color-scheme: light dark; --edge: #8886; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 0 auto; padding: 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2rem; }
.verdict { border-left: 4px solid #3b82c4; padding: .5rem 1rem; background: #3b82c41a; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: .9rem; }
th, td { padding: .25rem .6rem; border-bottom: 1px solid var(--edge); text-align: right; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; }
td.long { white-space: normal; min-width: 16rem; text-align: left; }
td:hover { background: #3b82c433; }
svg { width: 100%; height: auto; max-width: 46rem; } svg text { fill: currentColor; font-size: 12px; }
@media (max-width: 40rem) {
  svg text { font-size: 18px; }
  th, td { padding: .25rem .4rem; }
  table:has(.long) { font-size: .8rem; }
  table:has(.long) td { white-space: normal; }
  td.long { min-width: 10rem; }
}
figure { margin: 1rem 0; } figcaption { font-size: .9rem; }
img { max-width: 100%; height: auto; background: white; }
pre { overflow-x: auto; padding: .6rem; border: 1px solid var(--edge); }
pre.command { white-space: pre-wrap; overflow-wrap: anywhere; }
ul.legend { list-style: none; padding: 0; display: flex; flex-wrap: wrap; gap: .2rem 1rem; font-size: .85rem; }
"""

Curve = Sequence[tuple[float, float]]


class Report:
    """A page made of blocks.

    Args:
        title: what was run.
        verdict: the result, in a sentence or two.

    >>> page = Report("gumbo train", "The bound is −20.1 nats per datum.")
    >>> page.table(["split", "ELBO"], [["test", "-20.1"]], "Numbers")
    >>> "<td title=\\"test, ELBO: -20.1\\">-20.1</td>" in page.html()
    True
    """

    def __init__(self, title: str, verdict: str):
        self.title, self.verdict = title, verdict
        self.blocks: list[str] = []

    def heading(self, text: str) -> None:
        self.blocks.append(f"<h2>{escape(text)}</h2>")

    def text(self, text: str) -> None:
        self.blocks.append(f"<p>{escape(text)}</p>")

    def table(self, heads: Sequence[str], body: Sequence[Sequence[str]], caption: str) -> None:
        """A table; each cell has a tooltip with its row and column."""
        self._wide(caption, html_table(heads, body))

    def result(self, caption: str, found: Any) -> None:
        """What a result shows of itself in a notebook."""
        self._wide(caption, found._repr_html_())

    def _wide(self, caption: str, shown: str) -> None:
        """A part of the page that scrolls by itself, where it is wider than the window."""
        self.heading(caption)
        attributes = f'class="scroll" tabindex="0" role="region" aria-label="{escape(caption)}"'
        self.blocks.append(f"<div {attributes}>{shown}</div>")

    def curves(self, caption: str, lines: Mapping[str, Curve], xlabel: str, ylabel: str) -> None:
        """Lines of (x, y) points, each point with its numbers as a tooltip."""
        lines = {name: [p for p in points if math.isfinite(p[1])] for name, points in lines.items()}
        lines = {name: _thinned(points) for name, points in lines.items() if points}
        if lines:
            self.heading(caption)
            self.blocks.append(_svg(caption, lines, xlabel, ylabel, f"clip{len(self.blocks)}"))

    def picture(self, path: Path, caption: str) -> None:
        """A PNG file, embedded in the page; ``NAME-narrow.png`` beside it takes its place on a phone."""
        image = f'<img alt="{escape(caption)}" src="{_embedded(path)}">'
        if (narrow := _narrow(path)).exists():
            image = f'<picture><source media="(max-width: 40rem)" srcset="{_embedded(narrow)}"/>{image}</picture>'
        self.blocks.append(f"<figure>{image}<figcaption>{escape(caption)}</figcaption></figure>")

    def facts(self, caption: str, found: Mapping[str, Any]) -> None:
        """Names and values, collapsed."""
        rows = "".join(f"<tr><th>{escape(str(k))}</th><td>{escape(str(v))}</td></tr>" for k, v in found.items())
        self.blocks.append(
            f'<details><summary>{escape(caption)}</summary><div class="scroll"><table>{rows}</table></div></details>'
        )

    def html(self) -> str:
        """The page."""
        return (
            '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
            '<meta name="viewport" content="width=device-width, initial-scale=1">'
            '<link rel="icon" href="data:,">'
            f"<title>{escape(self.title)}</title><style>{STYLE}</style></head>\n<body><main>"
            f'<h1>{escape(self.title)}</h1>\n<p class="verdict">{escape(self.verdict)}</p>\n'
            + "\n".join(self.blocks)
            + "\n</main></body></html>\n"
        )


def finish(
    run: RunFolder,
    page: Report,
    pictures: Sequence[Path] | None = None,
    captions: Mapping[str, str] | None = None,
    earlier: str | None = None,
) -> Path:
    """Add pictures, settings, environment and command, and write ``report.html`` to the run's folder.

    ``pictures`` are by default all of the run; ``captions`` say what they show, by file name without its ending.
    Pictures that would make the file larger than 5 MB are left out, and the page names them. ``earlier`` is the heading
    below which the report that the folder already has stays on the page.
    """
    before = _section(run.path / "report.html", earlier) if earlier else ""
    paths = sorted(run.plots.glob("*.png")) if pictures is None else [path for path in pictures if path.exists()]
    paths = [path for path in paths if not path.stem.endswith(NARROW)]
    if paths:
        page.heading("Pictures")
    size, left = len(in_utf8(page.html() + before)), []
    for path in paths:
        own = sum(one.stat().st_size * 4 // 3 + 500 for one in (path, _narrow(path)) if one.exists())
        if size + own < MOST_BYTES - 100_000:
            size += own
            page.picture(path, (captions or {}).get(path.stem, re.sub(r"[_-]+", " ", path.stem)))
        else:
            left.append(path.name)
    if left:
        page.text(f"Left out, to keep this file small: {', '.join(left)}, in plots/.")
    again(page, environment())
    settings = escape((run.path / "config.yaml").read_text(encoding="utf-8"))
    page.blocks.append(f"<details><summary>settings of the run</summary><pre>{settings}</pre></details>")
    page.blocks.append(before)
    run.write_text("report.html", page.html())
    return run.path / "report.html"


def _section(path: Path, heading: str) -> str:
    """The report of a run's first verb as a section of a later page; the same one if that page is written again."""
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    if kept := re.search(r'<section id="earlier">.*</section>', text, re.DOTALL):
        return kept[0]
    if whole := re.search(r"<main>\s*<h1>(.*?)</h1>(.*)</main>", text, re.DOTALL):
        return f'<section id="earlier">\n<h2>{escape(heading)}</h2>\n<p>{whole[1]}</p>{whole[2]}</section>'
    return ""


def _narrow(path: Path) -> Path:
    return path.with_name(f"{path.stem}{NARROW}{path.suffix}")


def _embedded(path: Path) -> str:
    return f"data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()}"


def again(page: Report, found: Mapping[str, Any]) -> None:
    """Add the command that repeats the run, and its environment."""
    page.heading("Again")
    page.blocks.append(f'<pre class="command" tabindex="0">{escape(command_line(found["command"]))}</pre>')
    page.facts("environment", {name: value for name, value in found.items() if name != "command"})


def command_line(argv: Sequence[str]) -> str:
    """The command of a process, as typed in a shell."""
    script = Path(argv[0]).name if argv else "gumbo"
    program = "gumbo" if script in ("gumbo", "__main__.py") else f"python {argv[0]}"
    return " ".join([program, *(shlex.quote(str(part)) for part in argv[1:])])


def _thinned(points: Curve) -> list[tuple[float, float]]:
    step = max(1, -(-len(points) // MOST_POINTS))
    kept = list(points[::step])
    return kept if kept[-1] == points[-1] else [*kept, points[-1]]


def _ticks(low: float, high: float) -> list[float]:
    """About five round numbers between two others.

    >>> _ticks(-43.0, -19.0)
    [-40.0, -35.0, -30.0, -25.0, -20.0]
    """
    step = 10.0 ** math.floor(math.log10((high - low) / 5))
    step *= next(m for m in (1, 2, 5, 10) if (high - low) / (m * step) <= 6)
    return [k * step for k in range(math.ceil(low / step), math.floor(high / step) + 1)]


def _svg(caption: str, lines: Mapping[str, Curve], xlabel: str, ylabel: str, clip: str) -> str:
    width, height, left, right, top, bottom = 720, 380, 64, 12, 10, 44
    xs, ys = zip(*(point for points in lines.values() for point in points), strict=True)
    low, high = _visible(ys)
    x0, x1 = min(xs), max(xs) if max(xs) > min(xs) else min(xs) + 1

    def at(x: float, y: float) -> tuple[float, float]:
        return (
            left + (x - x0) / (x1 - x0) * (width - left - right),
            top + (high - y) / (high - low) * (height - top - bottom),
        )

    said = "; ".join(f"{name} ends at {digits(points[-1][1])}" for name, points in lines.items())
    parts = [f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{escape(f"{caption}: {said}")}">']
    for y in _ticks(low, high):
        place = at(x0, y)[1]
        parts.append(f'<path d="M{left} {place:.1f}H{width - right}" stroke="currentColor" opacity=".15"/>')
        parts.append(f'<text x="{left - 6}" y="{place + 4:.1f}" text-anchor="end">{y:g}</text>')
    whole = all(float(x).is_integer() for x in xs)  # epochs, steps
    for x in (x for x in _ticks(x0, x1) if not whole or float(x).is_integer()):
        parts.append(f'<text x="{at(x, low)[0]:.1f}" y="{height - bottom + 18}" text-anchor="middle">{x:g}</text>')
    middle = (top + height - bottom) / 2
    parts.append(
        f'<text x="{(left + width - right) / 2}" y="{height - 6}" text-anchor="middle">{escape(xlabel)}</text>'
    )
    parts.append(
        f'<text x="14" y="{middle}" text-anchor="middle" transform="rotate(-90 14 {middle})">{escape(ylabel)}</text>'
    )
    parts.append(
        f'<clipPath id="{clip}"><rect x="{left}" y="{top}" width="{width - left - right}" '
        f'height="{height - top - bottom}"/></clipPath><g clip-path="url(#{clip})">'
    )
    legend = []
    for k, (name, points) in enumerate(lines.items()):
        color, dash = COLORS[k % len(COLORS)], DASHES[k // len(COLORS) % len(DASHES)]
        places = [at(*point) for point in points]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
        parts.append(
            f'<polyline points="{path}" fill="none" stroke="{color}" stroke-width="2" stroke-dasharray="{dash}"/>'
        )
        for (x, y), (cx, cy) in zip(points, places, strict=True):
            title = escape(f"{name}: {xlabel} {x:g}, {digits(y)}")
            parts.append(f'<circle cx="{cx:.1f}" cy="{cy:.1f}" r="2.5" fill="{color}"><title>{title}</title></circle>')
        swatch = f'<span style="color:{color}" aria-hidden="true">{"━" if not dash else "╍"}</span>'
        legend.append(f"<li>{swatch} {escape(name)}</li>")
    return "".join([*parts, "</g></svg>", f'<ul class="legend">{"".join(legend)}</ul>'])


def _visible(ys: Sequence[float]) -> tuple[float, float]:
    """The range of the axis: all values, without low outliers from the start of training."""
    ordered = sorted(ys)
    high, low = ordered[-1], ordered[0]
    tenth = ordered[len(ordered) // 10]
    if high > tenth and tenth - low > 3 * (high - tenth):
        low = tenth - 0.5 * (high - tenth)
    margin = 0.04 * (high - low) or max(1e-9, abs(high) * 0.01)
    return low - margin, high + margin
