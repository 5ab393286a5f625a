"""A self-contained HTML page: tables, curves and images in one file that asks the network for nothing.

Plain strings are escaped wherever they are put in; only what a function here made, `Html`, is taken as it is.
"""

import base64
import html
import math
from collections.abc import Iterable, Mapping, Sequence


class Html(str):
    """A string that is HTML already."""


STYLE = """
:root { color-scheme: light dark; --line: #8884; --soft: #8882; --good: #1a8f4c; --bad: #cf3535; --accent: #2f6fde;
  --second: #d9730d; --third: #8a4fd0; }
body { font: 16px/1.5 system-ui, sans-serif; margin: 0 auto; max-width: 60rem; padding: 1rem; background: Canvas;
  color: CanvasText; }
h1 { line-height: 1.2; } h2 { margin-top: 2.2rem; border-bottom: 1px solid var(--line); }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .35rem .7rem; border-bottom: 1px solid var(--line); text-align: left; vertical-align: middle; }
td.number, th.number { text-align: right; white-space: nowrap; }
img { display: block; border-radius: 4px; width: 72px; height: 72px;
  object-fit: cover; } img[src^="data:image/png"] { image-rendering: pixelated; }
figure { margin: 0; } figcaption { font-size: .85rem; line-height: 1.3; margin-top: .3rem; overflow-wrap: anywhere; }
.gallery { display: grid; grid-template-columns: repeat(auto-fill, minmax(10rem, 1fr)); gap: 1rem; }
.gallery img { width: 100%; height: auto; max-width: 12rem; }
.paper { background: #fff; border-radius: 4px; padding: .5rem; overflow-x: auto; }
.paper img { width: 100%; height: auto; min-width: 36rem; }
.pairs { display: grid; grid-template-columns: repeat(auto-fill, minmax(17rem, 1fr)); gap: 1.5rem 1rem; }
.pairs img { width: 100%; height: auto; max-height: 12rem; object-fit: contain; object-position: left top;
  image-rendering: auto; }
.pair { display: grid; grid-template-columns: 1fr 1fr; gap: .5rem; }
figcaption ul { margin: .3rem 0; padding-left: 1.1rem; } .faint { opacity: .65; }
.good, .bad { border: 3px solid var(--good); } .bad { border-color: var(--bad); }
.good-text { color: var(--good); } .bad-text { color: var(--bad); }
.heat td, .heat th { padding: .2rem .4rem; border: 1px solid var(--line); } .heat td { text-align: right; }
.heat tr:first-child th { vertical-align: bottom; } .heat th span { writing-mode: vertical-rl; rotate: 180deg; }
.good-heat { background: color-mix(in srgb, var(--good) calc(75% * var(--share)), transparent); }
.bad-heat { background: color-mix(in srgb, var(--bad) calc(75% * var(--share)), transparent); }
.curves { display: grid; grid-template-columns: repeat(auto-fit, minmax(17rem, 1fr)); gap: 1rem; margin-top: 1rem; }
svg { width: 100%; height: auto; } svg text { fill: currentColor; font-size: 11px; }
.grid line { stroke: var(--line); } .bar { fill: var(--accent); } .curve { fill: none; stroke-width: 1.6; }
.curve0 { stroke: var(--accent); } .curve1 { stroke: var(--second); } .curve2 { stroke: var(--third); }
.key0 { fill: var(--accent); } .key1 { fill: var(--second); } .key2 { fill: var(--third); }
"""


def text(words: str) -> Html:
    """Escape words, unless they are HTML already."""
    return words if isinstance(words, Html) else Html(html.escape(words))


def paragraph(words: str) -> Html:
    """A paragraph."""
    return Html(f"<p>{text(words)}</p>\n")


def verdict(words: str, *, good: bool) -> Html:
    """Words with a tick or a cross before them, so that colour is not all that tells."""
    return Html(f'<span class="{"good" if good else "bad"}-text">{"✓" if good else "✗"} {text(words)}</span>')


def table(head: Sequence[str], rows: Iterable[Sequence[str]], *, numbers: Sequence[int] = ()) -> Html:
    """A table; it scrolls by itself where the screen is narrow.

    Args:
        head: names of the columns.
        rows: a cell for each column.
        numbers: columns that are set flush right.
    """

    def line(cells: Sequence[str], tag: str) -> str:
        number = [' class="number"' if column in numbers else "" for column in range(len(cells))]
        made = "".join(f"<{tag}{kind}>{text(cell)}</{tag}>" for cell, kind in zip(cells, number, strict=True))
        return f"<tr>{made}</tr>\n"

    body = "".join(line(row, "td") for row in rows)
    return Html(f'<div class="wide"><table>\n{line(head, "th")}{body}</table></div>\n')


def heat_table(corner: str, names: Sequence[str], counts: Sequence[Sequence[int]]) -> Html:
    """A square table of counts, a row and a column for each name; a cell's colour is its share of its row.

    Args:
        corner: what the rows are.
        names: of the rows, which are also those of the columns.
        counts: row by row.
    """

    def cell(row: int, column: int) -> str:
        count = counts[row][column]
        share, kind = count / max(1, sum(counts[row])), "good" if row == column else "bad"
        return f'<td class="{kind}-heat" style="--share:{share:.3f}">{count or ""}</td>'

    head = "".join(f"<th><span>{text(name)}</span></th>" for name in names)
    body = "".join(
        f"<tr><th>{text(name)}</th>{''.join(cell(row, column) for column in range(len(names)))}</tr>\n"
        for row, name in enumerate(names)
    )
    return Html(
        f'<div class="wide"><table class="heat">\n<tr><th>{text(corner)}</th>{head}</tr>\n{body}</table></div>\n'
    )


def image_tag(content: bytes, *, alt: str, good: bool | None = None) -> Html:
    """An image inside the page, from a PNG's or a JPEG's bytes; framed green or red if it is right or wrong."""
    kind = "png" if content.startswith(b"\x89PNG") else "jpeg"
    frame = "" if good is None else f' class="{"good" if good else "bad"}"'
    encoded = base64.b64encode(content).decode()
    return Html(f'<img{frame} alt="{html.escape(alt)}" src="data:image/{kind};base64,{encoded}">')


def drawing(svg: bytes, *, alt: str) -> Html:
    """An SVG image of another tool's making, as wide as the page; it is drawn for white paper, and stays on it."""
    content = base64.b64encode(svg).decode()
    return Html(f'<div class="paper"><img alt="{html.escape(alt)}" src="data:image/svg+xml;base64,{content}"></div>\n')


def gallery(items: Iterable[tuple[Html, str]]) -> Html:
    """Images, each with what stands below it, as many in a row as fit."""
    figures = "".join(f"<figure>{shown}<figcaption>{text(below)}</figcaption></figure>\n" for shown, below in items)
    return Html(f'<div class="gallery">\n{figures}</div>\n')


def pairs(items: Iterable[tuple[Html, Html, Sequence[str], str]]) -> Html:
    """For each item two images side by side and, below them, a list of texts and a faint line."""
    figures = (
        f'<figure><div class="pair">{first}{second}</div><figcaption>'
        f"<ul>{''.join(f'<li>{text(words)}</li>' for words in listed)}</ul>"
        f'<span class="faint">{text(faint)}</span></figcaption></figure>\n'
        for first, second, listed, faint in items
    )
    return Html(f'<div class="pairs">\n{"".join(figures)}</div>\n')


def charts(made: Iterable[Html]) -> Html:
    """Charts side by side where the screen is wide enough."""
    return Html(f'<div class="curves">\n{"".join(made)}</div>\n')


def chart(title: str, curves: Mapping[str, Sequence[tuple[float, float]]], *, across: str) -> Html:
    """Draw up to three curves over a common axis, as an SVG image.

    Args:
        title: above the chart.
        curves: name to points (x, y), in the order of x; points that are not finite are left out. A name of "" is not
            printed: the title says it.
        across: what x is.

    Raises:
        ValueError: if there are more than three curves, or no point to draw.
    """
    if len(curves) > 3:
        raise ValueError(f"a chart shows up to three curves, not {len(curves)}")
    shown = {name: [(x, y) for x, y in points if math.isfinite(x + y)] for name, points in curves.items()}
    points = [point for curve in shown.values() for point in curve]
    if not points:
        raise ValueError(f"no point to draw in the chart {title!r}")
    width, height, left, right, top, bottom = 340, 220, 48, 10, 26, 34
    (x_low, x_high), (y_low, y_high) = (_range(values) for values in zip(*points, strict=True))
    y_low = min(0.0, y_low)

    def place(x: float, y: float) -> tuple[float, float]:
        return (
            left + (width - left - right) * (x - x_low) / (x_high - x_low),
            height - bottom - (height - top - bottom) * (y - y_low) / (y_high - y_low),
        )

    parts = [f'<text x="{left}" y="14">{text(title)}</text>', '<g class="grid">']
    for tick in _ticks(y_low, y_high):
        _, y = place(x_low, tick)
        parts.append(f'<line x1="{left}" x2="{width - right}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{left - 5}" y="{y + 4:.1f}" text-anchor="end">{tick:g}</text>')
    for tick in _ticks(x_low, x_high):
        x, _ = place(tick, y_low)
        parts.append(f'<text x="{x:.1f}" y="{height - bottom + 14}" text-anchor="middle">{tick:g}</text>')
    parts.append(f'</g><text x="{width - right}" y="{height - 4}" text-anchor="end">{text(across)}</text>')
    for number, (name, curve) in enumerate(shown.items()):
        line = " ".join(f"{x:.1f},{y:.1f}" for x, y in (place(*point) for point in curve))
        parts.append(f'<polyline class="curve curve{number}" points="{line}"/>')
        if len(curve) == 1:
            parts.append('<circle class="key{}" cx="{}" cy="{}" r="3"/>'.format(number, *line.split(",")))
        if not name:
            continue
        key = left + 6 + number * 105
        parts.append(f'<circle class="key{number}" cx="{key}" cy="{height - 8}" r="4"/>')
        parts.append(f'<text x="{key + 8}" y="{height - 4}">{text(name)}</text>')
    label = html.escape(f"{title} over {across}")
    return Html(f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{label}">{"".join(parts)}</svg>\n')


def bars(title: str, counts: Mapping[str, int]) -> Html:
    """Draw a bar for each name, its count at its end, as an SVG image.

    Raises:
        ValueError: if there is no bar to draw.
    """
    if not counts:
        raise ValueError(f"no bar to draw in the chart {title!r}")
    width, left, right, top, row = 340, 80, 60, 26, 16
    longest, height = max(1, *counts.values()), top + row * len(counts)
    parts = [f'<text x="0" y="14">{text(title)}</text>']
    for number, (name, count) in enumerate(counts.items()):
        y, length = top + row * number, (width - left - right) * count / longest
        parts.append(f'<text x="{left - 6}" y="{y + 10}" text-anchor="end">{text(name)}</text>')
        parts.append(f'<rect class="bar" x="{left}" y="{y}" width="{length:.1f}" height="{row - 4}"/>')
        parts.append(f'<text x="{left + length + 5:.1f}" y="{y + 10}">{count:,}</text>')
    label = html.escape(title)
    return Html(f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{label}">{"".join(parts)}</svg>\n')


def page(title: str, sections: Mapping[str, Iterable[Html]]) -> str:
    """The whole page: a title and, under each heading, its parts; the heading "" has none."""
    parts = []
    for heading, contents in sections.items():
        parts += [f"<h2>{text(heading)}</h2>\n"] if heading else []
        parts += contents
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{text(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n<h1>{text(title)}</h1>\n"
        f"{''.join(parts)}</body>\n</html>\n"
    )


def _range(values: Sequence[float]) -> tuple[float, float]:
    low, high = min(values), max(values)
    return low, high if high > low else low + 1.0


def _ticks(low: float, high: float) -> list[float]:
    """Three to six round numbers within a range."""
    rough = (high - low) / 4
    unit = 10.0 ** math.floor(math.log10(rough))
    step = next(unit * factor for factor in (1, 2, 5, 10) if unit * factor >= rough)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [number * step for number in range(first, last + 1)]
