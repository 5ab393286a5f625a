"""The verb that captions images: files, folders, lists and shards of them."""

import os
import sys
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Annotated

from tyro.conf import FlagCreatePairsOff

from contracap.cli.caption_output import CaptionOutput
from contracap.cli.errors import fail, message, say
from contracap.cli.flags import Flags, PathText, arg
from contracap.cli.options import (
    MAX_WORKERS,
    Device,
    ResultFile,
    Settings,
    Size,
    StrategyName,
    WeightsName,
    check_batch_size,
    check_outputs,
    command_line,
    load_model,
)
from contracap.config import require_count

if TYPE_CHECKING:
    from contracap.apps.bulk.caption import Outcome
    from contracap.apps.bulk.rows import Row
    from contracap.evaluation.result import Result


def caption(
    weights: WeightsName,
    paths: Annotated[
        tuple[PathText, ...],
        arg(
            metavar="PATH [PATH ...]",
            help="Images and their URLs, folders of images with their subfolders, patterns such as 'photos/**/*.png', "
            ".txt lists with a path or URL on each line, tar shards.",
        ),
    ],
    /,
    *,
    prefix: Annotated[str, arg(metavar="TEXT", help="Written before each caption, unchanged.")] = "",
    suffix: Annotated[str, arg(metavar="TEXT", help="Written after each caption, unchanged.")] = "",
    output_flags: Annotated[CaptionOutput, Flags] = CaptionOutput(),
    strategy: StrategyName = "beam",
    settings: Settings = (),
    prompt: Annotated[str, arg(metavar="TEXT", help="The beginning of each caption.")] = "",
    raw: Annotated[
        FlagCreatePairsOff[bool],
        arg(help='Keep the spaces between tokens: "a star , above it a circle".'),
    ] = False,
    limit: Annotated[int | None, arg(metavar="N", help="Caption only the first N images.")] = None,
    recursive: Annotated[bool, arg(help="Whether folders include their subfolders.")] = True,
    batch_size: Annotated[int, arg(metavar="N", help="Images in a batch; it does not change the captions.")] = 16,
    workers: Annotated[
        int | None, arg(metavar="N", help="Threads that read, fetch and decode; the default is four for each core.")
    ] = None,
    compiled: Annotated[
        FlagCreatePairsOff[bool], arg(help="Faster steps after a slow first batch: docs/captioning.md.")
    ] = False,
    device: Device = None,
    size: Size = None,
    json: ResultFile = None,
) -> int:
    """Write a caption for each image. The same command continues where it was stopped. Unreadable images are listed
    at the end."""
    from contracap.apps.bulk.caption import caption_images, first
    from contracap.apps.bulk.inputs import count_items, first_items, items
    from contracap.apps.bulk.output_config import caption_config
    from contracap.apps.bulk.outputs import Lines
    from contracap.apps.bulk.rows import Row, caption_rows
    from contracap.apps.bulk.side_cars import SideCars
    from contracap.apps.bulk.table_output import Table
    from contracap.files import is_stream
    from contracap.generation.captioner import Captioner
    from contracap.generation.registry import build_strategy

    # All that can be wrong is found before the weights are read
    chosen = build_strategy(strategy, settings)
    workers = 4 * (os.cpu_count() or 1) if workers is None else workers
    check_batch_size(batch_size)
    require_count("--workers", workers, 1, "threads that read and decode", most=MAX_WORKERS)
    if limit is not None:
        require_count("--limit", limit, 1, "images, starting from the first", most=10**12)
    output = output_flags.open(paths)
    table = output.path if isinstance(output, Table) else None
    check_outputs([weights, *paths], out=table, json=json)
    for item in first_items(paths, recursive=recursive):
        output.check(item)

    if compiled:
        from contracap.model.compiling import require_compiler

        require_compiler()
    captioner = Captioner(*load_model(weights, size, device=device), compiled=compiled)
    captioner.check(chosen, prompt)
    if isinstance(output, SideCars | Table):
        decided = caption_config(chosen, prompt, captioner.model, captioner.processor)
        output.config = {**decided, "prefix": prefix, "suffix": suffix, "raw": raw}

    rows = list[Row]()
    with output:
        outcome = caption_images(
            first(items(paths, recursive=recursive, outputs=[table, json]), limit),
            partial(
                caption_rows,
                captioner,
                strategy=chosen,
                prompt=prompt,
                prefix=prefix,
                suffix=suffix,
                embed=output_flags.embed,
                raw=raw,
            ),
            output,
            image=captioner.processor.image_config,
            batch_size=batch_size,
            workers=workers,
            seen=rows.append if json is not None else lambda row: None,
            progress=not (isinstance(output, Lines) and sys.stdout.isatty()),
            total=lambda: count_items(paths, recursive=recursive, limit=limit),
        )
    if json is not None:
        _result(rows, outcome).write(json)
    if outcome.captioned or outcome.skipped:  # else the errors say it all
        say(outcome.summary(), to_stderr=isinstance(output, Lines) or (table is not None and is_stream(table)))
    for error in outcome.broken:
        fail(message(error))
    return 1 if outcome.broken else 0


def _result(rows: "Sequence[Row]", outcome: "Outcome") -> "Result":
    from contracap.evaluation.result import Result

    return Result(
        command=command_line(),
        seed=None,
        samples=len(rows),
        figures={
            "unreadable": float(len(outcome.broken)),
            "skipped": float(outcome.skipped),
            "seconds": outcome.seconds,
        },
        details={"captions": [{"path": row.path, "caption": row.caption, "score": row.score} for row in rows]},
    )
