"""The commands that say what is in an image without writing a text: its class, its embedding."""

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from contracap.cli.flags import PathText, arg
from contracap.cli.messages import fail, interruption, message, say
from contracap.cli.options import (
    Model,
    ModelFlags,
    ResultFile,
    WeightsName,
    check_batch_size,
    check_outputs,
    command_line,
)
from contracap.wording import counted

if TYPE_CHECKING:
    from contracap.apps.bulk.embedding import EmbeddingBatch
    from contracap.model.coca import CoCa
    from contracap.processor import Processor

Images = Annotated[
    tuple[PathText, ...],
    arg(
        metavar="PATH [PATH ...]",
        help="Images and their URLs, folders with their subfolders, patterns, .txt lists, tar shards.",
    ),
]
BatchSize = Annotated[int, arg(metavar="N", help="Images in a batch.")]


@interruption("interrupted: only the results above were computed; run the command again to start over")
def classify(
    weights: WeightsName,
    paths: Images,
    /,
    *,
    labels: Annotated[tuple[str, ...], arg(metavar="LABEL [LABEL ...]", help="Labels to choose from.")],
    templates: Annotated[
        tuple[str, ...],
        arg(metavar="TEXT", help="Prompts, with {} where the label goes; their embeddings are averaged."),
    ] = ("a photo of a {}.",),
    batch_size: BatchSize = 64,
    model_flags: Model = ModelFlags(),
    json: ResultFile = None,
) -> int:
    """Choose a label for each image, without training, and print a line for each: path, label, probability."""
    from contracap.apps.bulk.outputs import path_in_one_line
    from contracap.evaluation.class_names import check_templates
    from contracap.evaluation.result import Result
    from contracap.evaluation.zeroshot import build_classifier, compare_with_labels

    check_batch_size(batch_size)
    _check(paths)
    check_outputs([weights, *paths], json=json)
    if not labels or not all(label.strip() for label in labels) or len(set(labels)) < len(labels):
        raise ValueError("--labels wants one or more labels, each once and none empty: --labels LABEL [LABEL ...]")
    check_templates(templates)
    model, processor = model_flags.load(weights)
    scale = model.logit_scale.detach().exp()
    weight = build_classifier(model, processor, labels, templates)
    found, broken = [], list[Exception]()
    for batch in _batches(model, processor, paths, batch_size, progress=not sys.stdout.isatty()):
        broken += batch.broken
        _, probabilities = compare_with_labels(batch.embeddings, weight, scale)
        for name, row in zip(batch.names, probabilities.tolist(), strict=True):
            best = max(range(len(labels)), key=row.__getitem__)
            print(f"{path_in_one_line(name)}\t{labels[best]}\t{row[best]:.4f}", flush=True)
            if json is not None:
                found.append({"path": name, "probabilities": dict(zip(labels, row, strict=True))})
    if json is not None:
        figures = {"unreadable": float(len(broken))}
        details = {"images": found, "unreadable": [message(error) for error in broken]}
        result = Result(command=command_line(), seed=None, samples=len(found), figures=figures, details=details)
        result.write(json)
    return _report(broken)


@interruption()
def embed(
    weights: WeightsName,
    paths: Images,
    /,
    *,
    out: Annotated[
        Path,
        arg(
            metavar="FILE",
            help="An .npz file with arrays `paths` and `embeddings`, or .parquet with columns `path` and `embedding`.",
        ),
    ],
    batch_size: BatchSize = 64,
    model_flags: Model = ModelFlags(),
) -> int:
    """Write the contrastive embedding of each image to one file. Embeddings have unit length."""
    from contracap.apps.bulk.embedding import write_embeddings
    from contracap.files import is_stream

    check_batch_size(batch_size)
    _check(paths)
    kind = out.suffix.lower().removeprefix(".")
    if kind != "npz" and kind != "parquet":
        raise ValueError(f"--out {str(out)!r} must end in .npz or .parquet")
    check_outputs([weights, *paths], out=out)
    if out.exists() and not is_stream(out):
        raise FileExistsError(f"{out} is there already: remove it, or name another --out")
    broken = list[Exception]()

    def batches() -> "Iterator[EmbeddingBatch]":
        for batch in _batches(*model_flags.load(weights), paths, batch_size):
            broken.extend(batch.broken)
            yield batch

    count = write_embeddings(out, kind, batches())
    say(f"{counted(count, 'embedding(s)')}: {out}", to_stderr=is_stream(out))
    return _report(broken)


def _check(paths: tuple[str, ...]) -> None:
    """Raises: OSError, ValueError: if a path stands for no image; found before the weights are read."""
    from contracap.apps.bulk.inputs import first_items

    for _ in first_items(paths):
        pass


def _batches(
    model: "CoCa",
    processor: "Processor",
    paths: tuple[str, ...],
    batch_size: int,
    *,
    progress: bool = True,
) -> "Iterator[EmbeddingBatch]":
    from contracap.apps.bulk.embedding import embed_items
    from contracap.apps.bulk.inputs import count_items, find_items
    from contracap.progress import progress_bar, show_waiting

    workers = 4 * (os.cpu_count() or 1)
    found = find_items(paths)
    with progress_bar(total=lambda: count_items(paths), unit=" images", disable=not progress) as bar:
        made = embed_items(model, processor, found, batch_size=batch_size, workers=workers, on_wait=show_waiting(bar))
        for batch in made:
            yield batch
            bar.update(len(batch.names) + len(batch.broken))


def _report(broken: list[Exception]) -> int:
    for error in broken:
        fail(message(error))
    return 1 if broken else 0
