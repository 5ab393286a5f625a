"""Figures, drawn by matplotlib: how they look, and their files."""

import io
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from contracap.extras import require_extra
from contracap.files import replace_file

FIRST, SECOND, NEITHER = "#2f6fde", "#d9730d", "#8a8f98"
SETTINGS = {"svg.hashsalt": "contracap", "svg.fonttype": "path", "font.size": 9, "font.family": "DejaVu Sans"}


@dataclass(frozen=True, kw_only=True)
class Drawing:
    """A figure as two files."""

    svg: bytes
    png: bytes

    def write(self, folder: Path, name: str) -> None:
        """Write NAME.svg and NAME.png to a folder, each whole or not at all."""
        for ending, content in (("svg", self.svg), ("png", self.png)):
            with replace_file(folder / f"{name}.{ending}") as partial:
                partial.write_bytes(content)


def require_matplotlib() -> None:
    """Raises: ImportError: if it is not installed."""
    require_extra("figures", "matplotlib")


def new_figure(width: float, height: float) -> Any:
    """Return an empty figure of matplotlib; its size is in inches."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def draw(make_figure: Callable[[], Any]) -> Drawing:
    """Return the files of a figure; the same figure gives the same bytes.

    Raises: ImportError: if matplotlib is not installed.
    """
    require_matplotlib()
    from matplotlib import rc_context

    with rc_context(SETTINGS):
        figure = make_figure()
        svg, png = io.BytesIO(), io.BytesIO()
        figure.savefig(svg, format="svg", metadata={"Date": None, "Creator": None})
        figure.savefig(png, format="png", dpi=200, metadata={"Software": None})
    return Drawing(svg=svg.getvalue(), png=png.getvalue())
