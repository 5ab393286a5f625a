"""The first five minutes: draw scenes, train on them with the ordinary trainer, and show what the model can do.

The model is measured on colour-shape pairs that it never saw in training; see `data.scenes`.
"""

import json
import logging
import shlex
import shutil
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from contracap.apps.quickstart_page import CHANCE, TARGETS, TWIN_SCENES, Measured, build_page, figures_as_text
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
    single_scenes,
    twin_scenes,
)
from contracap.data.shards import write_shard
from contracap.evaluation.result import Result
from contracap.evaluation.retrieval import evaluate_retrieval
from contracap.evaluation.zeroshot import evaluate_zeroshot
from contracap.files import replace_file, write_text
from contracap.generation.captioner import Captioner
from contracap.generation.sampling import Greedy
from contracap.model.coca import CoCa
from contracap.pretrained import load
from contracap.processor import Processor
from contracap.training.recipe import Recipe, load_recipe
from contracap.training.trainer import train

TRAINING_SCENES = 30_000
SINGLE_SCENES = 320
TEST_SEED = 2**31  # no shard of training scenes has this number
RESUME_HINT = "the same command continues"
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


def quickstart(out: Path, overrides: Sequence[str] = (), *, command: str = "") -> Result:
    """Draw, train, measure, and print a table. The same call continues an interrupted one.

    Writes to the folder `out`: `results.json`, `report.html`, the drawn `scenes`, the `run`, and one test image,
    `sample.png`.

    Args:
        out: the folder; made if need be.
        overrides: changes to the recipe, `key.path=value` each, as for `contracap train`.
        command: the command line, for the result.

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
        command=command,
        seed=recipe.seed,
        samples=measured.samples,
        figures=figures | dict.fromkeys(reasons),
        reasons=reasons,
        details={"chance": CHANCE, "targets": TARGETS, "recipe": to_dict(recipe)},
    )
    write_text(out / "report.html", build_page(measured, figures, recipe))
    with replace_file(out / "sample.png") as sample:
        sample.write_bytes(measured.twins[0].image)
    result.write(out / "results.json")
    print(figures_as_text(figures))
    caption = shlex.join(["contracap", "caption", str(out), str(out / "sample.png")])
    logger.info("\nthe page: %s\ncaption an image: %s", out / "report.html", caption)
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
