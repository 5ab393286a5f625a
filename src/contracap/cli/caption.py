"""The command that captions images: files, folders, lists and shards of them."""

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Annotated

from tyro.conf import FlagCreatePairsOff

from contracap.cli.caption_output import CaptionOutput
from contracap.cli.flags import Flags, PathText, arg
from contracap.cli.messages import fail, message, say
from contracap.cli.options import (
    MAX_WORKERS,
    Model,
    ModelFlags,
    ResultFile,
    WeightsName,
    check_batch_size,
    check_outputs,
    command_line,
)
from contracap.config import require_count

if TYPE_CHECKING:
    from contracap.apps.bulk.caption_images import Outcome
    from contracap.apps.bulk.rows import Row
    from contracap.evaluation.result import Result


@dataclass(frozen=True, kw_only=True)
class CaptionFlags:
    """Flags that choose the images and how they are captioned."""

    prefix: Annotated[str, "TEXT"] = ""
    """Written before each caption, unchanged."""
    suffix: Annotated[str, "TEXT"] = ""
    """Written after each caption, unchanged."""
    strategy: Annotated[str, "NAME"] = "beam"
    """Decoding strategy for captions: greedy, beam, sample, legacy or rerank."""
    settings: Annotated[tuple[str, ...], "[KEY=VALUE ...]"] = ()
    """Settings of the strategy, such as width=3 length_penalty=0; `WEIGHTS --set help` lists them."""
    prompt: Annotated[str, "TEXT"] = ""
    """The beginning of each caption."""
    raw: FlagCreatePairsOff[bool] = False
    """Keep the spaces between tokens: "a star , above it a circle"."""
    limit: Annotated[int | None, "N"] = None
    """Caption only the first N images."""
    recursive: bool = True
    """Include the subfolders of folders."""
    batch_size: Annotated[int, "N"] = 16
    """Images in a batch; it does not change the captions."""
    workers: Annotated[int | None, "N"] = None
    """Threads that read, fetch and decode; the default is four for each core."""
    compiled: FlagCreatePairsOff[bool] = False
    """Faster steps after a slow first batch: docs/captioning.md."""

    def check(self) -> None:
        """Raises: ValueError, RuntimeError: if a number is too small or too large, or there is no compiler."""
        check_batch_size(self.batch_size)
        if self.workers is not None:
            require_count("--workers", self.workers, 1, "threads that read and decode", most=MAX_WORKERS)
        if self.limit is not None:
            require_count("--limit", self.limit, 1, "images, starting from the first", most=10**12)
        if self.compiled:
            from contracap.model.compiling import require_compiler

            require_compiler()


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
    output_flags: Annotated[CaptionOutput, Flags] = CaptionOutput(),
    flags: Annotated[CaptionFlags, Flags] = CaptionFlags(),
    model_flags: Model = ModelFlags(),
    json: ResultFile = None,
) -> int:
    """Write a caption for each image. Unreadable images are listed at the end. If interrupted, run the same command
    again to continue."""
    from contracap.apps.bulk.caption_images import caption_images, take_first
    from contracap.apps.bulk.inputs import count_items, find_items, first_items
    from contracap.apps.bulk.output_config import caption_config
    from contracap.apps.bulk.outputs import Lines
    from contracap.apps.bulk.rows import Row, caption_rows
    from contracap.apps.bulk.side_cars import SideCars
    from contracap.apps.bulk.table_output import Table
    from contracap.files import is_stream
    from contracap.generation.captioner import Captioner
    from contracap.generation.registry import build_strategy

    # Arguments are checked before the weights are read
    strategy = build_strategy(flags.strategy, flags.settings)
    flags.check()
    output = output_flags.open(paths)
    table = output.path if isinstance(output, Table) else None
    check_outputs([weights, *paths], out=table, json=json)
    for item in first_items(paths, recursive=flags.recursive):
        output.check(item)
    captioner = Captioner(*model_flags.load(weights), compiled=flags.compiled)
    captioner.check(strategy, flags.prompt)

    if isinstance(output, SideCars | Table):
        decided = caption_config(strategy, flags.prompt, captioner.model, captioner.processor)
        output.config = {**decided, "prefix": flags.prefix, "suffix": flags.suffix, "raw": flags.raw}

    rows = list[Row]()
    write = partial(
        caption_rows,
        captioner,
        strategy=strategy,
        prompt=flags.prompt,
        prefix=flags.prefix,
        suffix=flags.suffix,
        embed=output_flags.embed,
        raw=flags.raw,
    )
    with output:
        outcome = caption_images(
            take_first(find_items(paths, recursive=flags.recursive), flags.limit),
            write,
            output,
            image=captioner.processor.image_config,
            batch_size=flags.batch_size,
            workers=4 * (os.cpu_count() or 1) if flags.workers is None else flags.workers,
            seen=rows.append if json is not None else lambda row: None,
            progress=not (isinstance(output, Lines) and sys.stdout.isatty()),
            total=lambda: count_items(paths, recursive=flags.recursive, limit=flags.limit),
        )
    if json is not None:
        _result(rows, outcome).write(json)
    if outcome.captioned or outcome.skipped:  # otherwise the errors tell it
        place = f": {output.place}" if output.place else ""
        say(
            f"{outcome.summary()}{place}",
            to_stderr=isinstance(output, Lines) or (table is not None and is_stream(table)),
        )
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
        details={
            "captions": [{"path": row.path, "caption": row.caption, "score": row.score} for row in rows],
            "unreadable": [message(error) for error in outcome.broken],
        },
    )
