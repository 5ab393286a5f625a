"""The verb that captions pictures: files, folders, lists and shards of them."""

import os
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from tyro.conf import FlagCreatePairsOff

from contracap.cli.errors import fail, message, say
from contracap.cli.options import (
    MAX_WORKERS,
    Device,
    Int8,
    PathText,
    ResultFile,
    Settings,
    Size,
    StrategyName,
    WeightsName,
    arg,
    check_batch_size,
    check_outputs,
    command_line,
    load_model,
)
from contracap.config import require_count

if TYPE_CHECKING:
    from contracap.apps.bulk.outputs import Existing, Output

METADATA_FILE = "metadata.jsonl"  # Hugging Face's name for it
FORMATS: "dict[str, Format]" = {".jsonl": "jsonl", ".csv": "csv", ".parquet": "parquet"}

Format = Literal["sidecar", "jsonl", "csv", "parquet", "metadata"]


def caption(
    weights: WeightsName,
    paths: Annotated[
        tuple[PathText, ...],
        arg(
            metavar="PATH [PATH ...]",
            help="pictures and their URLs, folders of them with their subfolders, patterns such as 'photos/**/*.png', "
            ".txt lists with a path or URL on each line, tar shards",
        ),
    ],
    /,
    *,
    format: Annotated[
        Format | None,
        arg(
            help="sidecar: a text file beside each picture; jsonl, csv, parquet: all captions in the file --out; "
            "metadata: the metadata.jsonl of Hugging Face's image folders. By default what --out ends in; without "
            "--out lines on stdout: path, tab, text"
        ),
    ] = None,
    out: Annotated[
        Path | None, arg(metavar="FILE|DIR", help="one file for all captions; for side-cars their folder")
    ] = None,
    ext: Annotated[Literal[".txt", ".caption"] | None, arg(help="of side-cars; by default .txt")] = None,
    prefix: Annotated[str, arg(metavar="TEXT", help="written before each caption, as it stands")] = "",
    suffix: Annotated[str, arg(metavar="TEXT", help="written after each caption, as it stands")] = "",
    skip_existing: Annotated[
        FlagCreatePairsOff[bool], arg(help="leave pictures that have a caption in the output; this is the default")
    ] = False,
    overwrite: Annotated[FlagCreatePairsOff[bool], arg(help="begin anew, in place of the captions there are")] = False,
    append: Annotated[
        FlagCreatePairsOff[bool], arg(help="one more caption for each picture, on a line or row of its own")
    ] = False,
    embed: Annotated[
        FlagCreatePairsOff[bool],
        arg(
            help="write the contrastive embeddings too: a column of lists; for csv the file FILE.npy beside "
            "it, for side-cars a .npy file for each picture"
        ),
    ] = False,
    strategy: StrategyName = "beam",
    settings: Settings = (),
    prompt: Annotated[str, arg(metavar="TEXT", help="how each caption begins")] = "",
    raw: Annotated[
        FlagCreatePairsOff[bool],
        arg(help='words and punctuation apart, as the vocabulary has them: "a star , above it a circle"'),
    ] = False,
    limit: Annotated[int | None, arg(metavar="N", help="the first pictures only")] = None,
    recursive: Annotated[bool, arg(help="whether a folder stands for its subfolders, too")] = True,
    batch_size: Annotated[int, arg(metavar="N", help="pictures at a time; does not change the captions")] = 16,
    workers: Annotated[
        int | None, arg(metavar="N", help="threads that read, fetch and decode; by default four for each core")
    ] = None,
    int8: Int8 = False,
    compiled: Annotated[
        FlagCreatePairsOff[bool], arg(help="faster steps after a slow first batch: docs/captioning.md")
    ] = False,
    device: Device = None,
    size: Size = None,
    json: ResultFile = None,
) -> int:
    """Write a caption for each picture. The same command goes on where it was stopped; unreadable pictures are listed
    at the end."""
    from contracap.apps.bulk.caption import caption_pictures, first
    from contracap.apps.bulk.inputs import count_items, first_items, items
    from contracap.apps.bulk.outputs import Lines, SideCars, Table
    from contracap.apps.bulk.rows import Row, caption_rows
    from contracap.apps.bulk.settings import caption_settings
    from contracap.evaluation.result import Result
    from contracap.files import is_stream
    from contracap.generation.captioner import Captioner
    from contracap.generation.choice import build_strategy

    # All that can be wrong is found before the weights are read
    chosen = build_strategy(strategy, settings)
    workers = 4 * (os.cpu_count() or 1) if workers is None else workers
    check_batch_size(batch_size)
    require_count("--workers", workers, 1, "threads that read and decode", most=MAX_WORKERS)
    if limit is not None:
        require_count("--limit", limit, 1, "pictures, from the first one on", most=10**12)
    existing = _existing(skip_existing=skip_existing, overwrite=overwrite, append=append)
    output = _output(paths, format, out, ext, existing, embed=embed)
    table = output.path if isinstance(output, Table) else None
    check_outputs([weights, *paths], out=table, json=json)
    for item in first_items(paths, recursive=recursive):
        output.check(item)

    if compiled:
        from contracap.model.compiling import require_compiler

        require_compiler()
    captioner = Captioner(*load_model(weights, size, int8=int8, device=device), compiled=compiled)
    captioner.check(chosen, prompt)
    if isinstance(output, SideCars | Table):
        decided = caption_settings(chosen, prompt, captioner.model, captioner.processor)
        output.settings = {**decided, "prefix": prefix, "suffix": suffix, "raw": raw}

    rows = list[Row]()
    with output:
        outcome = caption_pictures(
            first(items(paths, recursive=recursive, outputs=[table, json]), limit),
            partial(
                caption_rows,
                captioner,
                strategy=chosen,
                prompt=prompt,
                prefix=prefix,
                suffix=suffix,
                embed=embed,
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
        made = [{"path": row.path, "caption": row.caption, "score": row.score} for row in rows]
        figures = {"unreadable": float(len(outcome.broken)), "skipped": float(outcome.skipped)}
        result = Result(
            command=command_line(),
            seed=None,
            samples=len(made),
            figures=figures | {"seconds": outcome.seconds},
            details={"captions": made},
        )
        result.write(json)
    if not isinstance(output, Lines):
        say(outcome.summary(), to_stderr=table is not None and is_stream(table))
    for error in outcome.broken:
        fail(message(error))
    return 1 if outcome.broken else 0


def _existing(**given: bool) -> "Existing":
    """What becomes of pictures that have a caption."""
    chosen = [name for name, is_given in given.items() if is_given]
    if len(chosen) > 1:
        options = " and ".join(f"--{name.replace('_', '-')}" for name in chosen)
        raise ValueError(f"{options} exclude each other: give one of them")
    return "overwrite" if chosen == ["overwrite"] else "append" if chosen == ["append"] else "skip"


def _output(
    paths: Sequence[str], format: Format | None, out: Path | None, ext: str | None, existing: "Existing", *, embed: bool
) -> "Output":
    """Where the captions go.

    Raises: ValueError: if options do not suit each other. OSError: if nothing can be written there.
    """
    from contracap.apps.bulk.inputs import folders_of
    from contracap.apps.bulk.outputs import Lines, SideCars, Table

    if format is None and out is not None:
        format = "metadata" if out.name == METADATA_FILE else FORMATS.get(out.suffix)
        if format is None:
            raise ValueError(
                f"cannot tell the format of {out} by its name: give --format jsonl, csv, parquet or metadata"
            )
    if ext is not None and format != "sidecar":
        raise ValueError("--ext is for --format sidecar")
    if format is None:
        if embed or existing != "skip":
            option = "--embed" if embed else f"--{existing}"
            raise ValueError(f"{option} is for captions in files: give --format sidecar, or --out FILE")
        return Lines()
    if format == "sidecar":
        if out is not None and out.suffix in FORMATS:
            raise ValueError(f"--out {out} is one file for all captions, and side-cars need a folder: give one of both")
        return SideCars(ext or ".txt", existing, embed=embed, roots=folders_of(paths), folder=out)
    if out is None and format == "metadata" and len(paths) == 1 and Path(paths[0]).is_dir():
        out = Path(paths[0]) / METADATA_FILE
    if out is None:
        raise ValueError(f"--format {format} is one file for all captions: name it with --out FILE")
    return Table(out, format, existing, embed=embed)
