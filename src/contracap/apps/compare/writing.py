"""A comparison as files: a figure, a page, tables, and a JSON result."""

from pathlib import Path

from contracap.apps.compare.comparison import Comparison
from contracap.apps.compare.comparison_tables import (
    describe_method,
    format_cells,
    list_headings,
    list_notes,
    to_csv,
    to_latex,
    to_markdown,
)
from contracap.apps.compare.figure import draw_panel
from contracap.apps.figures import Drawing
from contracap.apps.html_page import drawing, page, paragraph, table
from contracap.evaluation.result import RESULTS_FILE
from contracap.files import write_text


def write_comparison(comparison: Comparison, folder: Path, *, command: str) -> None:
    """Writes compare.svg, .png, .html, .md, .csv, .tex and results.json to a folder, each whole or not at all.

    Where no score has a gap there is nothing to draw: then without .svg and .png, and those of an earlier call go.

    Raises:
        ImportError: if matplotlib is not installed; nothing is written then.
    """
    drawn = draw_panel(comparison) if comparison.headlines else None
    texts = {
        "html": compare_page(comparison, drawn),
        "md": to_markdown(comparison),
        "csv": to_csv(comparison),
        "tex": to_latex(comparison),
    }
    if drawn is not None:
        drawn.write(folder, "compare")
    for ending in ("svg", "png") if drawn is None else ():
        (folder / f"compare.{ending}").unlink(missing_ok=True)
    for ending, text in texts.items():
        write_text(folder / f"compare.{ending}", text)
    comparison.result(command=command).write(folder / RESULTS_FILE)


def compare_page(comparison: Comparison, drawn: Drawing | None) -> str:
    """The page: the figure, if there is one, all figures as a table, and how they were made."""
    a, b = comparison.names
    head = list_headings(comparison)
    rows = [format_cells(row, comparison) for row in comparison.rows]
    sections = {
        "": [paragraph("There is nothing to draw: no score has a value in both.")]
        if drawn is None
        else [
            drawing(drawn.svg, alt=f"scores of {a} and {b} per task, and the gap between them"),
            paragraph(_legend(comparison)),
        ],
        "All figures": [
            table(head, rows, numbers=range(1, len(head))),
            *map(paragraph, list_notes(comparison)),
            paragraph(describe_method(comparison)),
        ],
    }
    return page(f"{a} and {b}", sections)


def _legend(comparison: Comparison) -> str:
    a, b = comparison.names
    several = comparison.runs > 1
    rule = "its interval leaves out zero" if several else "p (Holm), which is corrected for all figures, is below 0.05"
    dots = " Dots: the pairs of runs." if several else ""
    return (
        f"Blue: {a} is ahead and {rule}; orange: {b}; grey: neither is. "
        f"Each interval is for its figure alone, not corrected for how many there are.{dots} "
        "The figure shows what each kind of task is known by; the table holds everything."
    )
