"""The commands that show what came out: of two results, and of one run."""

from pathlib import Path
from typing import Annotated

from contracap.cli.flags import arg
from contracap.cli.messages import say
from contracap.cli.options import command_line

Results = Annotated[Path, arg(metavar="RESULTS.json", help="Written by contracap evaluate or score, with --json.")]


def compare(
    a: Results,
    b: Results,
    /,
    *,
    names: Annotated[
        tuple[str, str] | None,
        arg(metavar="A B", help="Names of the two systems; the default is those of their files or folders."),
    ] = None,
    out: Annotated[
        Path, arg(metavar="DIR", help="Folder for compare.svg, .png, .html, .md, .csv, .tex and results.json.")
    ] = Path("comparison"),
) -> None:
    """Draw two results side by side: scores, gaps with intervals, and tables."""
    from contracap.apps.compare.comparison import compare as compared
    from contracap.apps.compare.comparison_tables import to_markdown
    from contracap.apps.compare.results import load_result, names_of
    from contracap.apps.compare.writing import write_comparison
    from contracap.evaluation.result import RESULTS_FILE
    from contracap.files import require_folder

    require_folder(out)
    if (result := out / RESULTS_FILE).exists() and any(result.samefile(each) for each in (a, b) if each.exists()):
        raise ValueError(f"{result} would take the place of a result that is compared: choose another --out")
    comparison = compared([load_result(a)], [load_result(b)], names=names or names_of(a, b))
    write_comparison(comparison, out, command=command_line())
    print(to_markdown(comparison))
    say(f"the figure: {out / 'compare.svg'}" if comparison.headlines else "no figure: no score has a value in both")
    say(f"the page: {out / 'compare.html'}")


def report(run: Annotated[Path, arg(metavar="RUN", help="A run folder: the `out` of contracap train.")], /) -> None:
    """Write a page about a run, RUN/report.html: curves, figures, captions, retrieval, confusions."""
    from contracap.apps.report.run_report import write_report

    print(write_report(run))
