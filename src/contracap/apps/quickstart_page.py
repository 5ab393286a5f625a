"""The results of the quickstart, as a table on the terminal and as a page."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from contracap.apps.html_page import Html, gallery, image_tag, page, paragraph, table, text, verdict
from contracap.apps.report.curves import draw_curves
from contracap.apps.report.grids import best_images, image_grid
from contracap.data.samples import Sample
from contracap.data.scenes import COLORS, HELD_OUT, PAIRS, SHAPES, count_meanings
from contracap.evaluation.retrieval import Features
from contracap.training.recipe import Recipe
from contracap.training.recorder import read_metrics

TWIN_SCENES = 200
CARDS, GRID_ROWS = 24, 12
TARGETS = {
    "caption_accuracy": 0.8,
    "zeroshot_color": 0.9,
    "zeroshot_shape": 0.9,
    "text_to_image_recall@1": 0.8,
    "image_to_text_recall@1": 0.8,
    "seconds": 300.0,
}
WORDS = {
    "caption_accuracy": "fully correct captions",
    "zeroshot_color": "zero-shot colour of one object",
    "zeroshot_shape": "zero-shot shape of one object",
    "text_to_image_recall@1": "text to image, recall@1",
    "image_to_text_recall@1": "image to text, recall@1",
    "seconds": "seconds in all",
}
CHANCE = {
    "caption_accuracy": 1 / count_meanings(),
    "zeroshot_color": 1 / len(COLORS),
    "zeroshot_shape": 1 / len(SHAPES),
    "text_to_image_recall@1": 1 / TWIN_SCENES,
    "image_to_text_recall@1": 1 / TWIN_SCENES,
}


@dataclass(frozen=True)
class Measured:
    """Results for the table and the page.

    Attributes:
        figures: by their names in `results.json`.
        samples: test images.
        twins: scenes of two objects, each next to its twin.
        captions: of the twins, and whether each is right.
        features: of the twins and their captions.
    """

    figures: dict[str, float]
    samples: int
    twins: Sequence[Sample]
    captions: Sequence[tuple[str, bool]]
    features: Features


def figures_as_text(figures: Mapping[str, float]) -> str:
    """The table on the terminal."""
    rows = [("", "reached", "chance", "target"), *_figure_rows(figures)]
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    return "\n".join(
        f"{row[0]:{widths[0]}}" + "".join(f"  {cell:>{width}}" for cell, width in zip(row[1:], widths[1:], strict=True))
        for row in rows
    )


def build_page(measured: Measured, figures: Mapping[str, float], recipe: Recipe) -> str:
    """The page: figures, images with their captions, retrieval, and the curves of the run."""
    features = measured.features
    cards = [
        (
            image_tag(sample.image, alt=sample.captions[0], good=correct),
            verdict(caption, good=correct) if correct else wrong_caption(caption, sample.captions[0]),
        )
        for sample, (caption, correct) in zip(measured.twins, measured.captions, strict=True)
    ]
    wrong = [card for card, (_, correct) in zip(cards, measured.captions, strict=True) if not correct]
    sections = {
        "": [
            paragraph(
                f"A contrastive captioner ({recipe.size}) was trained from nothing on drawn scenes: {recipe.steps} "
                f"steps of {recipe.data.batch_size}. {len(HELD_OUT)} of the {len(PAIRS)} colour-shape pairs "
                "never occur in training, although every colour and shape does. Every test scene contains at least one "
                "of them."
            ),
            table(("", "reached", "chance", "target"), _figure_rows(figures), numbers=(1, 2, 3)),
        ],
        "Captions": [
            paragraph(
                f"The first {CARDS} of {len(cards)} test scenes, in pairs of twins that differ by one exchanged "
                "attribute. A caption is correct if it names both objects with size, texture, colour and shape, and "
                "their relation, in whichever phrasing."
            ),
            gallery(cards[:CARDS]),
        ],
        "Wrong captions": [
            paragraph(f"{len(wrong)} of {len(cards)}; at most {CARDS} are shown."),
            gallery(wrong[:CARDS]),
        ],
        "Retrieval": [
            paragraph(
                f"The five best of {len(cards)} images for each caption, its twin's among them. Green: "
                "the caption's own image; red: another image in the first place."
            ),
            image_grid(features, best_images(features, range(GRID_ROWS)), dict(enumerate(measured.twins))),
        ],
        "The run": [draw_curves(read_metrics(Path(recipe.out)))],
    }
    return page("contracap quickstart", sections)


def wrong_caption(caption: str, shown: str) -> Html:
    """A caption that is wrong, and what would have been right."""
    return Html(f"{verdict(caption, good=False)}<br>{text(f'shown: {shown}')}")


def _figure_rows(figures: Mapping[str, float]) -> list[tuple[str, str, str, str]]:
    def percent(share: float) -> str:
        return f"{100 * share:.3g} %" if share >= 0.001 or share == 0 else f"{100 * share:.1g} %"

    return [
        (words, percent(figures[name]), percent(CHANCE[name]), f">= {percent(TARGETS[name])}")
        if name in CHANCE
        else (words, f"{figures[name]:.0f}", "", f"<= {TARGETS[name]:.0f}")
        for name, words in WORDS.items()
        if name in figures
    ]
