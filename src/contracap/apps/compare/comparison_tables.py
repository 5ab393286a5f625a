"""A comparison as tables: Markdown and LaTeX as they are printed, CSV as they are computed."""

import csv
import io
import re
from collections.abc import Sequence

from contracap.apps.compare.comparison import UNITS, Comparison, ComparisonRow
from contracap.apps.compare.statistics import RESAMPLES

MISSING = "missing"
LATEX = str.maketrans(
    {character: f"\\{character}" for character in "&%$#_{}"}
    | {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
)
MINUS = re.compile(r"(?<![^ ])-(?=\d)")  # a sign, not the hyphen of a name


def list_headings(comparison: Comparison) -> list[str]:
    """Names of the columns of `format_cells`."""
    if comparison.runs > 1:
        return ["figure", *comparison.names, "gap", "each run", "95 % interval"]
    return ["figure", *comparison.names, "gap", "95 % interval", "p", "p (Holm)"]


def format_cells(row: ComparisonRow, comparison: Comparison) -> list[str]:
    """A row as it is printed: scores times 100, what is missing as a word or left empty."""
    factor = 1.0 if row.name in UNITS else 100.0

    def score(value: float | None) -> str:
        return MISSING if value is None else f"{factor * value:.2f}".replace("-0.00", "0.00")

    def gap(value: float | None) -> str:
        printed = "" if value is None else f"{factor * value:+.2f}"
        return "0.00" if printed in ("+0.00", "-0.00") else printed

    interval = "" if row.low is None else f"{gap(row.low)} to {gap(row.high)}"
    scores = [row.figure, score(row.a), score(row.b), gap(row.gap)]
    if comparison.runs > 1:
        return [*scores, " ".join(map(gap, row.gaps)), interval]
    return [*scores, interval, format_probability(row.p), format_probability(row.p_holm)]


def format_probability(p: float | None) -> str:
    """A p-value with as many places as can be told apart."""
    return "" if p is None else f"{p:.4f}"


def list_notes(comparison: Comparison) -> list[str]:
    """Return the lines below a table: what is missing, what only one system has, what was measured in other ways."""
    reasons: dict[str, list[str]] = {}
    for row in comparison.rows:
        if row.reason:
            reasons.setdefault(row.reason, []).append(row.figure)
    lines = [f"{', '.join(figures)}: {reason}" for reason, figures in reasons.items()]
    lines += [
        f"only of {name}: {', '.join(only)}"
        for name, only in zip(comparison.names, comparison.only, strict=True)
        if only
    ]
    return [*lines, *comparison.remarks]


def describe_method(comparison: Comparison) -> str:
    """Describe how intervals and p-values were made."""
    a, b = comparison.names
    if comparison.runs > 1:
        drawn = f"the samples and of the {comparison.runs} pairs of runs"
        tested = (
            "The interval also covers variation between runs. With so few runs, its true coverage is below 95 % if "
            "runs vary more than samples. No p-value is given: a test over samples would describe these runs only."
        )
    else:
        drawn = "the samples"
        tested = (
            f"p: a sign-flip test over the samples' differences, {RESAMPLES:,} flips, with Holm's correction over all "
            "metrics tested. Both describe these two models, not others that were trained the same way."
        )
    return (
        f"Gap: {a} minus {b}; scores are times 100. Interval: 95 % percentile bootstrap of the paired difference, "
        f"{RESAMPLES:,} resamples of {drawn}. {tested} Seed {comparison.seed}."
    )


def to_markdown(comparison: Comparison) -> str:
    """A table, and below it what it does not hold."""
    head = list_headings(comparison)
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *(format_cells(row, comparison) for row in comparison.rows)]
    made = "\n".join(f"| {' | '.join(cell.replace('|', '&#124;') for cell in line)} |" for line in lines)
    below = "".join(f"- {note}\n" for note in list_notes(comparison))
    return f"{made}\n\n{describe_method(comparison)}\n" + (f"\n{below}" if below else "")


def to_csv(comparison: Comparison) -> str:
    """One line per figure, in its own unit and to full precision; what is missing is empty."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    several = comparison.runs > 1
    runs = [f"gap_{number}" for number in range(1, comparison.runs + 1)] if several else []
    tests = [] if several else ["p", "p_holm"]
    writer.writerow(["figure", *comparison.names, "gap", *runs, "low", "high", *tests, "reason"])
    for row in comparison.rows:
        gaps: Sequence[float | None] = row.gaps or [None] * comparison.runs
        own = [row.figure, row.a, row.b, row.gap, *(gaps if several else ()), row.low, row.high]
        writer.writerow([*own, *(() if several else (row.p, row.p_holm)), row.reason])
    return file.getvalue()


def to_latex(comparison: Comparison) -> str:
    """A tabular in the style of the package booktabs."""
    head = list_headings(comparison)

    def line(texts: Sequence[str]) -> str:
        figure, *numbers = (text.translate(LATEX) for text in texts)
        return " & ".join([figure, *(MINUS.sub("$-$", number) for number in numbers)]) + r" \\"

    rows = "\n".join(line(format_cells(row, comparison)) for row in comparison.rows)
    return (
        f"% {describe_method(comparison)}\n"
        + "".join(f"% {note}\n" for note in list_notes(comparison))
        + f"\\begin{{tabular}}{{l{'r' * (len(head) - 1)}}}\n\\toprule\n{line(head)}\n\\midrule\n{rows}\n"
        "\\bottomrule\n\\end{tabular}\n"
    )
