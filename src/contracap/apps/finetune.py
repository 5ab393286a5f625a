"""Fine-tuning on someone's own images and texts, in one call: data, a recipe, a run, and a page of before and after."""

import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from contracap.apps.html_page import Html, gallery, page, paragraph, table, text
from contracap.apps.report.curves import draw_curves
from contracap.apps.report.thumbnails import thumbnail_tag
from contracap.config import build, flatten, to_dict, to_toml
from contracap.data.counts import samples_in
from contracap.data.loader import evaluation_samples
from contracap.data.shard_maker import make_shards
from contracap.data.shards import list_shards, read_records, write_shard
from contracap.data.tar import SHARD_SUFFIXES
from contracap.evaluation.config import TaskConfig
from contracap.evaluation.predictions import Prediction
from contracap.evaluation.result import RESULTS_FILE, Result
from contracap.evaluation.retrieval import evaluate_retrieval
from contracap.evaluation.task import build_evaluator
from contracap.files import write_text
from contracap.model.coca import CoCa, CoCaConfig
from contracap.model.sizes import SIZES
from contracap.pretrained import find_weights, load
from contracap.processor import Processor
from contracap.training.checkpoint import CHECKPOINTS, checkpoint_name, checkpoint_steps
from contracap.training.recipe import RECIPE_FILE, Recipe, load_recipe
from contracap.training.recorder import read_metrics
from contracap.training.trainer import train

HELD_OUT = 0.2  # of the images, at most MAX_HELD_OUT
MAX_HELD_OUT = 200
MIN_IMAGES = 20
CARDS = 48  # images on the page
EVALUATIONS = 5  # during a run
CIDER = "captions/CIDEr"  # in metrics.jsonl
LARGE = 50_000_000  # parameters; smaller models learn at a higher rate, and more of their checkpoints are kept
logger = logging.getLogger(__name__)


def finetune(weights: str, data: Path, out: Path, overrides: Sequence[str] = (), *, command: str = "") -> Result:
    """Fine-tune a captioner, and measure it on held-out images before and after. The same call continues.

    Writes to the folder `out`: `recipe.toml`, which can be edited and trained again, `data/`, the `run/`, `report.html`
    and `results.json`.

    Args:
        data: anything that `contracap shards make` reads, or tar shards.
        overrides: changes to the recipe, `key.path=value` each.

    Raises:
        ValueError: if the folder holds a finished call, the model has no decoder, or there are fewer than 20 images.
        Interrupted: if training was; the same call continues.
    """
    if (out / RESULTS_FILE).exists():
        raise ValueError(f"{out / RESULTS_FILE} is there already: look at {out / 'report.html'}, or give another --out")
    model, processor = load(weights)
    if model.decoder is None:
        raise ValueError(f"{weights} has no decoder and writes no captions: fine-tune a CoCa or a MaMMUT")
    split = hold_out(data, out / "data")
    recipe_file = out / RECIPE_FILE
    if not recipe_file.exists():
        recipe = choose_recipe(model.config, str(find_weights(weights)), split, out)
        header = (
            f"# Fine-tuning {weights!r} on {str(data)!r}. Edit it, then: contracap train THIS_FILE out=ANOTHER_RUN\n"
        )
        write_text(recipe_file, header + to_toml(recipe))
    recipe = load_recipe(recipe_file, ["resume=true", *overrides])
    logger.info("the recipe, to edit and train again: %s", recipe_file)
    before = measure(model, processor, split.validation)
    del model  # its memory
    train(recipe)
    best = best_checkpoint(Path(recipe.out))
    model, processor = load(best)
    after = measure(model, processor, split.validation)
    figures = {
        f"{when}/{name}": value
        for when, found in (("before", before), ("after", after))
        for name, value in found.figures.items()
    }
    result = Result(
        figures=figures,
        samples=before.samples,
        command=command,
        seed=recipe.seed,
        details={"checkpoint": str(best), "recipe": to_dict(recipe)},
    )
    write_text(out / "report.html", build_report(split, before, after, recipe, best))
    result.write(out / RESULTS_FILE)
    return result


@dataclass(frozen=True, kw_only=True)
class Split:
    """Shards to train on and to measure on.

    Attributes:
        images: number of training images.
        held_out: number of the others.
    """

    train: tuple[str, ...]
    validation: tuple[str, ...]
    images: int
    held_out: int


def hold_out(data: Path, folder: Path) -> Split:
    """Make tar shards of the data, with one image in five held out, at most 200; the last of several shards as it is.

    Raises: ValueError: if there are fewer than 20 images. FileNotFoundError, ValueError: as `make_shards` does.
    """
    if _holds_shards(data):
        shards = list_shards(data)
        if len(shards) > 1:
            counts = samples_in(shards)
            return _checked(
                Split(train=tuple(shards[:-1]), validation=(shards[-1],), images=sum(counts[:-1]), held_out=counts[-1])
            )
    else:
        made = folder / "all"
        make_shards(data, made)
        shards = list_shards(made)
    counts = samples_in(shards)
    total = sum(counts)
    held_out = min(MAX_HELD_OUT, math.ceil(HELD_OUT * total))
    order = torch.randperm(total, generator=torch.Generator().manual_seed(0))
    chosen = set(order[:held_out].tolist())
    parts = {"train": False, "validation": True}
    for name, wanted in parts.items():
        if not (folder / name / "00000.tar").exists():
            write_shard(folder / name / "00000.tar", _records(shards, chosen, wanted))
    train, validation = (tuple(list_shards(folder / name)) for name in parts)
    return _checked(Split(train=train, validation=validation, images=total - held_out, held_out=held_out))


def _checked(split: Split) -> Split:
    total = split.images + split.held_out
    if total < MIN_IMAGES or min(split.images, split.held_out) < 2:
        raise ValueError(f"there are {total} images with texts: fine-tuning needs at least {MIN_IMAGES}")
    return split


def _holds_shards(data: Path) -> bool:
    names = [file.name for file in data.iterdir()] if data.is_dir() else [data.name]
    return any(name.endswith(SHARD_SUFFIXES) for name in names)


def _records(shards: Sequence[str], chosen: set[int], wanted: bool) -> Iterator[tuple[str, dict[str, bytes]]]:
    number = 0
    for shard in shards:
        for record in read_records(shard):
            if (number in chosen) == wanted:
                yield record.key, record.members
            number += 1


def choose_recipe(start: CoCaConfig, weights: str, split: Split, out: Path) -> Recipe:
    """Return a recipe for these data on this machine: only the decoder learns, so that retrieval cannot change.

    A MaMMUT has one stack for both, so it keeps both losses instead. The learning rate of large models is that of the
    release's fine-tuning on COCO; small ones learn at a higher rate.
    """
    size, changes = _closest_size(start)
    with torch.device("meta"):
        parameters = sum(parameter.numel() for parameter in CoCa(start).parameters())
    on_gpu = torch.cuda.is_available()
    most = min(128 if on_gpu else 32, split.images // 2, split.held_out)
    batch = 2 ** int(math.log2(max(2, most)))
    epochs = next(
        epochs for images, epochs in ((1_000, 10), (10_000, 5), (100_000, 2), (math.inf, 1)) if split.images < images
    )
    steps = max(100, math.ceil(epochs * split.images / batch))
    every = math.ceil(steps / EVALUATIONS)
    values: dict[str, Any] = {
        "size": size,
        "model": changes,
        "steps": steps,
        "out": str(out / "run"),
        "initialise_from": weights,
        "frozen": () if start.is_mammut else ("image", "pooler", "text", "logit_scale"),
        "log_every": max(1, steps // 50),
        "validate_every": every,
        "data": {
            "train": split.train,
            "validation": split.validation,
            "batch_size": batch,
            "shuffle_buffer": min(10_000, split.images),
            "streams": 1 if batch < 16 else 16,
            "workers": 4 if on_gpu else 0,
            "augmentation": {"crop_scale": [0.9, 1.0]},
        },
        "loss": {"contrastive": 1.0 if start.is_mammut else 0.0, "captioning": 1.0},
        "optimizer": {
            "learning_rate": 1e-5 if parameters >= LARGE else 1e-4,
            "warmup_steps": steps // 10,
            "weight_decay": 0.1,
        },
        "evaluation": {
            "every": every,
            "tasks": {"captions": captioning_task(split.validation)},
        },
        "checkpoint": {"every": every, "keep": 1 if parameters >= LARGE else EVALUATIONS},
    }
    return build(Recipe, values)


def _closest_size(config: CoCaConfig) -> tuple[str, dict[str, Any]]:
    """Return the size that a configuration differs least from, and the differences, nested."""
    changes = {name: _changes(to_dict(size), to_dict(config)) for name, size in SIZES.items()}
    closest = min(changes, key=lambda name: len(list(flatten(changes[name]))))
    return closest, changes[closest]


def _changes(before: Mapping[str, Any], after: Mapping[str, Any]) -> dict[str, Any]:
    return {
        name: _changes(before[name], value)
        if isinstance(value, Mapping) and isinstance(before.get(name), Mapping)
        else value
        for name, value in after.items()
        if before.get(name) != value
    }


def captioning_task(shards: Sequence[str]) -> dict[str, Any]:
    """Return the task by which captions are judged, during the run, before and after it."""
    return {"task": "captioning", "data": tuple(shards), "metrics": ["cider"], "tokenizer": "python"}


def measure(model: CoCa, processor: Processor, shards: Sequence[str]) -> Result[list[Prediction]]:
    """Return CIDEr of the captions of the held-out images, and recall@5 in both directions. The predictions are the
    captions."""
    captions = build_evaluator(build(TaskConfig, captioning_task(shards)), processor)(model)
    recall = evaluate_retrieval(model, processor, shards, ks=(5,))
    return replace(captions, figures={**captions.values, **recall.values}, reasons={}, per_sample={})


def best_checkpoint(run: Path) -> Path:
    """Return the checkpoint that is left with the highest CIDEr on the held-out images."""
    scores = {record["step"]: record[CIDER] for record in read_metrics(run) if record.get(CIDER) is not None}
    steps = checkpoint_steps(run / CHECKPOINTS)
    best = max(steps, key=lambda step: scores.get(step, 0.0))
    if best != steps[-1]:
        logger.info(
            "CIDEr on the held-out images is highest at step %d of %d: that checkpoint is taken", best, steps[-1]
        )
    return run / CHECKPOINTS / checkpoint_name(best)


def build_report(
    split: Split, before: Result[list[Prediction]], after: Result[list[Prediction]], recipe: Recipe, best: Path
) -> str:
    """Return the page: figures, captions of held-out images before and after, and the curves of the run."""
    samples = list(islice(evaluation_samples(split.validation), CARDS))
    cards = [
        (thumbnail_tag(sample), _card(was.prediction, now.prediction, sample.captions[0]))
        for sample, was, now in zip(samples, before.predictions, after.predictions, strict=False)
    ]
    rows = [(name, f"{before.values[name]:.3f}", f"{after.values[name]:.3f}") for name in before.values]
    sections = {
        "": [
            paragraph(
                f"{recipe.size}, fine-tuned on {split.images:,} images and measured on {split.held_out:,} others."
            ),
            table(("", "before", "after"), rows, numbers=(1, 2)),
            paragraph(
                f"The model is {best}. It is the checkpoint with the best captions of these images, so the gain on new "
                "images may be a little smaller."
            ),
        ],
        "Captions of held-out images": [gallery(cards)],
        "The run": [draw_curves(read_metrics(Path(recipe.out)))],
    }
    return page("contracap finetune", sections)


def _card(before: str, after: str, reference: str) -> Html:
    return Html(f"{text(f'before: {before}')}<br><b>{text(f'after: {after}')}</b><br>{text(f'reference: {reference}')}")


def figures_as_text(result: Result) -> str:
    """Return a table of the figures before and after."""
    names = [name.removeprefix("before/") for name in result.values if name.startswith("before/")]
    lines = [
        f"{name:24}  {result.values[f'before/{name}']:.4f} -> {result.values[f'after/{name}']:.4f}" for name in names
    ]
    return "\n".join(lines)
