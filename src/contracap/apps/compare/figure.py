"""The release's figure: (a) the scores of two systems per task, (b) the gap per task with its interval."""

from functools import partial
from typing import Any

from contracap.apps.compare.comparison import Comparison, ComparisonRow
from contracap.apps.figures import FIRST, NEITHER, SECOND, SETTINGS, Drawing, draw, new_figure

SHORT = {
    "acc1": "acc@1",
    "mean_average_precision": "mAP",
    "text_to_image_recall@5": "text → image R@5",
    "image_to_text_recall@5": "image → text R@5",
}
LONGEST = 30  # letters of a name


def draw_panel(comparison: Comparison) -> Drawing:
    """Draws the headline figures, largest gap on top; the same comparison gives the same bytes.

    Raises:
        ImportError: if matplotlib is not installed.
        ValueError: if there are no headlines.
    """
    return draw(partial(make_figure, comparison))


def make_figure(comparison: Comparison) -> Any:
    """The figure as matplotlib has it.

    Raises:
        ValueError: if there are no headlines.
    """
    rows = comparison.headlines
    if not rows:
        raise ValueError("nothing to draw: no score has a gap")
    figure = new_figure(10.5, 1.7 + 0.3 * len(rows))
    scores, gaps = figure.subplots(1, 2, sharey=True)
    _draw_scores(scores, rows)
    _draw_gaps(gaps, comparison, rows)
    legend = figure.legend(scores.collections[-2:], ["", ""], loc="outside upper center", ncols=2, frameon=False)
    for text, name in zip(legend.get_texts(), comparison.names, strict=True):
        text.set(text=shorten_name(name), parse_math=False)  # as a label, a name that begins with _ would be left out
    return figure


def _draw_scores(axes: Any, rows: tuple[ComparisonRow, ...]) -> None:
    """Both scores on a line per task."""
    places = range(len(rows))
    a, b = ([100 * (getattr(row, side) or 0.0) for row in rows] for side in ("a", "b"))
    axes.hlines(places, a, b, color=NEITHER, linewidth=1.2, zorder=1)
    axes.scatter(a, places, color=FIRST, marker="o", zorder=2, clip_on=False)
    axes.scatter(b, places, color=SECOND, marker="D", s=26, zorder=2, clip_on=False)
    axes.set_yticks(places, [make_label(row) for row in rows], parse_math=False)
    axes.set_ylim(len(rows) - 0.5, -0.5)  # the first row on top
    axes.set_xlim(1.05 * min(0.0, *a, *b), 1.05 * max(0.0, *a, *b) or 1.0)
    axes.locator_params(axis="x", nbins=5)
    axes.set_xlabel("score x 100")
    axes.set_title("(a) scores", loc="left")
    axes.grid(axis="x", alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)


def _draw_gaps(axes: Any, comparison: Comparison, rows: tuple[ComparisonRow, ...]) -> None:
    """The gap of each task, of several runs also each one's, and the interval where there is one; grey where the gap
    may be chance."""
    for place, row in enumerate(rows):
        gap = row.gap or 0.0
        color = _color(row)
        axes.barh(place, 100 * gap, color=color, height=0.62, alpha=0.75)
        if row.low is not None and row.high is not None:
            axes.hlines(place, 100 * row.low, 100 * row.high, color="black", linewidth=1.2)
            axes.plot([100 * row.low, 100 * row.high], [place, place], "|", color="black", markersize=6)
        if comparison.runs > 1:
            axes.plot([100 * one for one in row.gaps], [place] * comparison.runs, "o", color="black", mfc="white", ms=4)
    axes.axvline(0, color="black", linewidth=0.8)
    axes.locator_params(axis="x", nbins=5)
    axes.set_xlabel("gap x 100" + ("; 95 % interval" if any(row.low is not None for row in rows) else ""))
    axes.set_title("(b) gap: the first minus the second", loc="left")
    axes.grid(axis="x", alpha=0.3)
    axes.tick_params(axis="y", length=0)
    axes.spines[["top", "right", "left"]].set_visible(False)


def make_label(row: ComparisonRow) -> str:
    """A row's task, cut if need be, and its figure."""
    name = shorten_name(SHORT.get(row.name, row.name))
    return f"{shorten_name(row.task)}, {name}" if row.task else name


def shorten_name(name: str) -> str:
    """A name that fits, on one line and with its middle left out if need be; what the font lacks is a question mark."""
    from matplotlib.font_manager import findfont, get_font

    known = get_font(findfont(SETTINGS["font.family"])).get_charmap()
    line = "".join(letter if ord(letter) in known else "\ufffd" for letter in " ".join(name.split()))
    return line if len(line) <= LONGEST else f"{line[: LONGEST // 2 - 1]}…{line[-LONGEST // 2 :]}"


def _color(row: ComparisonRow) -> str:
    """Color of the system that is ahead for sure; a neutral one where that may be chance."""
    if not row.is_sure:
        return NEITHER
    return FIRST if (row.gap or 0.0) > 0 else SECOND
