"""The curves of a run, from its records."""

from collections.abc import Mapping, Sequence
from typing import Any

from contracap.apps.html_page import Html, chart, charts, paragraph

MAX_POINTS = 300  # of a curve; of a longer one, neighbours are averaged
SERIES = {  # what is drawn of each step's record: title to the names of up to three curves
    "contrastive loss, nats": {"training": "contrastive_loss", "validation": "validation_contrastive_loss"},
    "captioning loss, nats per token": {"training": "captioning_loss", "validation": "validation_captioning_loss"},
    "learning rate": {"": "learning_rate"},
    "gradient norm": {"": "gradient_norm"},
    "logit scale": {"": "logit_scale"},
    "samples per second": {"": "samples_per_second"},
}
Point = tuple[float, float]


def draw_curves(records: Sequence[Mapping[str, Any]]) -> Html:
    """Losses, learning rate, gradient norm, logit scale and speed over the steps, as far as they were recorded, and
    figures that were evaluated on the way more than once; those of one task that differ in K share a chart."""
    series = dict(SERIES)
    for name in dict.fromkeys(name for record in records for name in record if "/" in name):
        figure, _, k = name.partition("@")
        if not name.startswith("skipped/") and len(_points(records, name)) > 1:
            series[figure] = series.get(figure, {}) | {f"@{k}" if k else "": name}
    made = []
    for title, names in series.items():
        drawn = {label: _points(records, name) for label, name in list(names.items())[:3]}
        drawn = {label: average_neighbours(points) for label, points in drawn.items() if points}
        if drawn:
            made.append(chart(title, drawn, across="step"))
    most = max((len(_points(records, name)) for names in series.values() for name in names.values()), default=0)
    size = _neighbours(most)
    return Html(
        charts(made) + (paragraph(f"Each point of the longest curves averages {size} records.") if size > 1 else "")
    )


def average_neighbours(points: Sequence[Point], most: int = MAX_POINTS) -> list[Point]:
    """Return at most `most` points: of more, means of equally many neighbours."""
    size = _neighbours(len(points), most)
    parts = (points[first : first + size] for first in range(0, len(points), size)) if points else ()
    return [(sum(x for x, _ in part) / len(part), sum(y for _, y in part) / len(part)) for part in parts]


def _neighbours(points: int, most: int = MAX_POINTS) -> int:
    """Return how many points become one."""
    return -(-points // most)


def _points(records: Sequence[Mapping[str, Any]], name: str) -> list[Point]:
    """Step and value; a number that was NaN or infinite is not a point."""
    return [(float(record["step"]), record[name]) for record in records if record.get(name) is not None]
