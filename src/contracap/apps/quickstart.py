"""The first five minutes: draw scenes, train on them with the ordinary trainer, and show what the model can do.

The model is measured on colour-shape pairs that it never saw in training; see `data.scenes`.
"""

import json
import logging
import shlex
import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from contracap.apps.html_page import (
    Html,
    gallery,
    image_tag,
    page,
    paragraph,
    table,
    text,
    verdict,
)
from contracap.apps.report.curves import draw_curves
from contracap.apps.report.grids import best_images, image_grid
from contracap.config import to_dict
from contracap.data.drawing import scene_records, write_training_shards
from contracap.data.grammar import COLOR_TEMPLATES, SHAPE_TEMPLATES, parse_caption
from contracap.data.loader import evaluation_samples
from contracap.data.samples import Sample
from contracap.data.scenes import (
    COLORS,
    HELD_OUT,
    PAIRS,
    SHAPES,
    count_meanings,
    single_scenes,
    twin_scenes,
)
from contracap.data.shards import write_shard
from contracap.evaluation.result import Result
from contracap.evaluation.retrieval import Features, evaluate_retrieval
from contracap.evaluation.zeroshot import evaluate_zeroshot
from contracap.files import replace_file, write_text
from contracap.generation.captioner import Captioner
from contracap.generation.sampling import Greedy
from contracap.model.coca import CoCa
from contracap.pretrained import load
from contracap.processor import Processor
from contracap.training.recipe import Recipe, load_recipe
from contracap.training.recorder import read_metrics
from contracap.training.trainer import train

TRAINING_SCENES = 30_000
TWIN_SCENES = 200
SINGLE_SCENES = 320
TEST_SEED = 2**31  # no shard of training scenes has this number
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
GO_ON = "the same command continues"
logger = logging.getLogger(__name__)


def evaluate_scene_captions(model: CoCa, processor: Processor, samples: Sequence[Sample]) -> Result:
    """Return the share of captions that say all of the scene and nothing wrong, in whichever phrasing of the grammar.

    A sample's own caption tells what its image shows. The predictions are each caption, and whether it is right.
    """
    captioner = Captioner(model, processor)
    strategy = Greedy(max_tokens=model.config.text.context)
    captions = [made.text for made in captioner([sample.image for sample in samples], strategy, batch_size=100)]
    shown = [parse_caption(sample.captions[0]) for sample in samples]
    correct = [parse_caption(caption) == scene for caption, scene in zip(captions, shown, strict=True)]
    return Result.of_samples(
        [sample.key for sample in samples],
        {"caption_accuracy": sum(correct) / len(correct)},
        predictions=list(zip(captions, correct, strict=True)),
    )


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


def quickstart(out: Path, overrides: Sequence[str] = ()) -> Result:
    """Draw, train, measure, and print a table. The same call continues an interrupted one.

    Writes to the folder `out`: `results.json`, `report.html`, the drawn `scenes`, the `run`, and one test image,
    `sample.png`.

    Args:
        out: the folder; made if need be.
        overrides: changes to the recipe, `key.path=value` each, as for `contracap train`.

    Raises:
        ValueError: if the folder holds a finished quickstart, or an override is refused.
        Interrupted: if training was; it says how to continue.
    """
    started = time.monotonic()
    run, scenes = out / "run", out / "scenes"
    if (out / "results.json").exists():
        raise ValueError(
            f"{out / 'results.json'} is there already: look at {out / 'report.html'}; for another quickstart remove "
            f"{out}, or choose another folder for --out"
        )
    paths = [f"out={json.dumps(str(run))}", f"data.train={json.dumps(str(scenes / 'train'))}"]
    recipe = load_recipe(find_recipe(), [*paths, "resume=true", *overrides])
    is_resumed = scenes.exists()
    if is_resumed:
        logger.info("continuing with what is in %s", out)
    else:
        draw_scenes(scenes, recipe)
    logger.info("training for %d steps of %d scenes", recipe.steps, recipe.data.batch_size)
    model, processor = load(train(recipe), device="cpu")
    logger.info("measuring on held-out pairs")
    measured = measure(model, processor, scenes)
    figures, reasons = dict(measured.figures), dict[str, str]()
    if is_resumed:
        reasons["seconds"] = "the quickstart was interrupted and continued later"
    else:
        figures["seconds"] = time.monotonic() - started
    result = Result(
        command=shlex.join(["contracap", *sys.argv[1:]]),
        seed=recipe.seed,
        samples=measured.samples,
        figures=figures | dict.fromkeys(reasons),
        reasons=reasons,
        details={"chance": CHANCE, "targets": TARGETS, "recipe": to_dict(recipe)},
    )
    write_text(out / "report.html", build_report(measured, figures, recipe))
    with replace_file(out / "sample.png") as sample:
        sample.write_bytes(measured.twins[0].image)
    result.write(out / "results.json")
    print(figures_as_text(figures))
    command = shlex.join(["contracap", "caption", str(out), str(out / "sample.png")])
    logger.info("\nthe page: %s\ncaption an image: %s", out / "report.html", command)
    return result


def find_recipe() -> Path:
    """The recipe's file: in the package where it was installed from a wheel, else in the checkout."""
    package = Path(__file__).parents[1]
    places = [folder / "recipes" / "quickstart.toml" for folder in (package, package.parent.parent)]
    for place in places:
        if place.is_file():
            return place
    raise FileNotFoundError(f"no recipe at {' or '.join(map(str, places))}: install contracap again")


def draw_scenes(folder: Path, recipe: Recipe) -> None:
    """Draw shards of training scenes in `train`, of test scenes in `twins` and `singles`, of the model's image size.

    The folder is there once it is whole.
    """
    partial = folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)  # of a call that ended while it drew them
    count = min(TRAINING_SCENES, recipe.steps * recipe.data.batch_size)
    logger.info("drawing %d scenes; of %d colour-shape pairs %d are held out", count, len(PAIRS), len(HELD_OUT))
    size = recipe.model_config.vision.image_size
    write_training_shards(partial / "train", count, size=size, seed=recipe.seed)
    generator = np.random.default_rng((recipe.seed, TEST_SEED))
    for name, scenes in (
        ("twins", twin_scenes(generator, TWIN_SCENES)),
        ("singles", single_scenes(generator, SINGLE_SCENES)),
    ):
        write_shard(partial / name / "000000.tar", scene_records(scenes, generator, size=size, captions=1))
    partial.rename(folder)


def measure(model: CoCa, processor: Processor, scenes: Path) -> Measured:
    """All figures but the time, from the ordinary evaluators."""
    twins = list(evaluation_samples(scenes / "twins"))
    singles = list(evaluation_samples(scenes / "singles"))
    captioning = evaluate_scene_captions(model, processor, twins)
    figures = captioning.values
    for attribute, classes, templates in (("color", COLORS, COLOR_TEMPLATES), ("shape", SHAPES, SHAPE_TEMPLATES)):
        labels = [classes.index(sample.fields["scene"]["things"][0][attribute]) for sample in singles]
        labelled = [replace(sample, fields={"label": label}) for sample, label in zip(singles, labels, strict=True)]
        zeroshot = evaluate_zeroshot(model, processor, labelled, classes=classes, templates=templates)
        figures[f"zeroshot_{attribute}"] = zeroshot.values["acc1"]
    retrieval = evaluate_retrieval(model, processor, twins, ks=(1,))
    figures |= retrieval.values
    return Measured(figures, len(twins) + len(singles), twins, captioning.predictions, retrieval.predictions)


def figures_as_text(figures: Mapping[str, float]) -> str:
    """The table on the terminal."""
    rows = [("", "reached", "chance", "target"), *_figure_rows(figures)]
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    return "\n".join(
        f"{row[0]:{widths[0]}}" + "".join(f"  {cell:>{width}}" for cell, width in zip(row[1:], widths[1:], strict=True))
        for row in rows
    )


def build_report(measured: Measured, figures: Mapping[str, float], recipe: Recipe) -> str:
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
