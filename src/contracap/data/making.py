"""Sources into tar shards: in parallel, resumable, the same bytes every time, with a report of what was left out."""

import base64
import hashlib
import io
import json
import math
import shutil
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from datetime import date, datetime, time
from decimal import Decimal
from itertools import groupby
from pathlib import Path
from typing import Any, Literal

from PIL import Image

from contracap.config import build, require_count
from contracap.data.annotations import Refused
from contracap.data.config import MAX_WORKERS
from contracap.data.contents import contents
from contracap.data.index import ShardEntry, describe, read_index, write_index
from contracap.data.shards import SHARD_SUFFIXES, write_shard
from contracap.data.sources import NAMES_PICTURES, Item, Kind, read_source
from contracap.data.workers import in_processes
from contracap.files import write_text
from contracap.image_files import ImageError, decode
from contracap.progress import progress_bar

SKIPPED_FILE = "skipped.jsonl"
PLAN_FILE = "making.json"
NOTES_FOLDER = ".making"  # a note for each finished shard; gone at the end
JPEG_QUALITY = 95  # of images that are made smaller
SUFFIXES = {"JPEG": "jpg", "MPO": "jpg", "TIFF": "tif", "JPEG2000": "jp2"}  # of formats that have another name


class MakingError(ValueError):
    """Shards that cannot be made; the message says why and what would do."""


@dataclass(frozen=True, kw_only=True)
class Making:
    """What stands in the folder at the end.

    Attributes:
        skipped: how many of each kind gave no sample.
        repeated_captions: captions that the same image has already; they are kept.
    """

    shards: int
    samples: int
    captions: int
    skipped: dict[str, int]
    repeated_captions: int = 0


def make_shards(
    source: str | Path,
    out: str | Path,
    *,
    kind: Kind | Literal["auto"] = "auto",
    pictures: str | Path | None = None,
    splits: Sequence[str] = (),
    image_column: str | None = None,
    caption_columns: Sequence[str] = (),
    caption_lines: bool = True,
    shorter_side: int | None = None,
    samples_per_shard: int = 1000,
    workers: int = 0,
) -> Making:
    """Makes tar shards of a source, with `index.json` and, of what was left out and why, `skipped.jsonl`.

    A sample is the image, its bytes untouched, and a `.json` with `captions`, `source` (its name there) and what else
    the source says. The bytes of the shards depend on the source and the settings only. The same call continues an
    interrupted one, with the shards that are whole; on a finished folder it does nothing.

    Args:
        source: what `data.sources.read_source` reads, with `kind`, `pictures`, `splits`, the columns and
            `caption_lines`.
        out: a local folder, made if need be.
        shorter_side: pixels; larger images are scaled down to it and stored upright, as JPEG. None: all as they are.
        samples_per_shard: of which those that are skipped are missing.
        workers: processes; 0: the calling one.

    Raises:
        FileNotFoundError, SourceError: as `read_source`.
        ValueError: if a number is too small.
        MakingError: if the folder holds other shards, or shards of another source or other settings; if nothing in the
            source can be used.
        KeyboardInterrupt: that says how many shards are done.
    """
    require_count("samples_per_shard", samples_per_shard, 1, "images for each shard", most=10**9)
    if shorter_side is not None:
        require_count("shorter_side", shorter_side, 1, "pixels")
    require_count("workers", workers, 0, "processes", most=MAX_WORKERS)
    read = read_source(
        source,
        kind=kind,
        pictures=pictures,
        splits=splits,
        image_column=image_column,
        caption_columns=caption_columns,
        caption_lines=caption_lines,
    )
    out, items = Path(out), read.items
    plan = {
        "samples_per_shard": samples_per_shard,
        "shorter_side": shorter_side,
        "kind": read.kind,
        "pictures": len(items),
        "source_sha256": _fingerprint(items, lines=caption_lines or read.kind != "bulk"),
    }
    finished = _begin(out, plan)
    if finished is not None:
        return finished
    tasks, first = list[_Task](), 0
    for number, part in enumerate(_parts(items, samples_per_shard)):
        tasks.append(_Task(number=number, first=first, items=part, side=shorter_side, lines=caption_lines, out=out))
        first += len(part)
    to_do = [task for task in tasks if not task.is_done()]
    done = len(items) - sum(len(task.items) for task in to_do)
    with progress_bar(total=len(items), initial=done, unit=" images") as progress:
        try:
            for made in in_processes(_make, to_do, workers):
                progress.update(made)
        except KeyboardInterrupt:
            done = sum(task.is_done() for task in tasks)
            words = f"interrupted: {done} of {len(tasks)} shards are in {out}; the same command continues from there"
            raise KeyboardInterrupt(words) from None
    repeated = sum(len(item.captions) - len(set(item.captions)) for item in items)
    return _finish(out, plan, [task.read_note() for task in tasks], read.refused, repeated)


def _parts(items: Sequence[Item], size: int) -> Iterator[list[Item]]:
    """The items of each shard: so many, or, if they are samples of other shards, those of one."""
    if items and items[0].inside is not None and items[0].inside.row is None:
        for _, part in groupby(sorted(items, key=lambda item: item.picture), lambda item: item.picture):
            yield list(part)
    else:
        yield from (list(items[first : first + size]) for first in range(0, len(items), size))


@dataclass(frozen=True, kw_only=True)
class _Note:
    """What became of a shard; there is none if none of its items could be used."""

    entry: ShardEntry | None
    refused: list[Refused]


@dataclass(frozen=True, kw_only=True)
class _Task:
    """One shard to be made. `first` is the number of its first item in the source."""

    number: int
    first: int
    items: list[Item]
    side: int | None
    lines: bool
    out: Path

    @property
    def shard(self) -> Path:
        return self.out / f"{self.number:05}.tar"

    @property
    def note(self) -> Path:
        return self.out / NOTES_FOLDER / f"{self.number:05}.json"

    def read_note(self) -> _Note:
        return build(_Note, json.loads(self.note.read_bytes()))

    def is_done(self) -> bool:
        if not self.note.exists():
            return False
        entry = self.read_note().entry
        return entry is None or (self.shard.is_file() and self.shard.stat().st_size == entry.bytes)


def _begin(out: Path, plan: dict[str, Any]) -> Making | None:
    """Makes the folder ready for a plan, or gives the outcome if that is done already."""
    plan_file = out / PLAN_FILE
    if not plan_file.exists():
        if out.is_dir() and any(file.name.endswith(SHARD_SUFFIXES) for file in out.iterdir()):
            raise MakingError(f"{out} holds shards already that are not of this source: give another folder")
        write_text(plan_file, json.dumps(plan) + "\n")
    try:
        begun = dict(json.loads(plan_file.read_bytes()))
    except (ValueError, TypeError) as error:
        raise MakingError(f"{plan_file} is broken ({error}): give another folder") from None
    for name, value in plan.items():
        if begun.get(name) != value:
            raise MakingError(
                f"{out} was begun with another source or other settings: {name} was {begun.get(name)} "
                f"and is now {value}; set it back, or give another folder"
            )
    for partial in out.glob(".*.partial"):  # of a process that was killed
        partial.unlink()
    if "outcome" not in begun:
        return None
    entries = read_index(out)
    gone = [name for name in entries if not (out / name).is_file()]
    if gone:
        raise MakingError(f"{out} was finished, but {gone[0]} is gone: bring it back, or give another folder")
    return build(Making, {"captions": sum(entry.captions for entry in entries.values()), **begun["outcome"]})


def _finish(
    out: Path, plan: dict[str, Any], notes: Sequence[_Note], refused: Sequence[Refused], repeated: int
) -> Making:
    """The index and the report; then the notes go."""
    entries = [note.entry for note in notes if note.entry is not None]
    skipped = [*refused, *(one for note in notes for one in note.refused)]
    making = Making(
        shards=len(entries),
        samples=sum(entry.samples for entry in entries),
        captions=sum(entry.captions for entry in entries),
        skipped=dict(sorted(Counter(one.kind for one in skipped).items())),
        repeated_captions=repeated,
    )
    write_text(out / SKIPPED_FILE, "".join(json.dumps(_plain(asdict(one))) + "\n" for one in skipped))
    if entries:
        write_index(out, entries)
        write_text(out / PLAN_FILE, json.dumps({**plan, "outcome": asdict(making)}) + "\n")
    else:
        (out / PLAN_FILE).unlink()
    shutil.rmtree(out / NOTES_FOLDER, ignore_errors=True)
    if not entries:
        elsewhere = skipped[-1].kind == "missing_file" and plan["kind"] in NAMES_PICTURES
        hint = "; if the images are in another folder, name it: --pictures DIR" if elsewhere else ""
        raise MakingError(
            f"not one image of the source could be used; {out / SKIPPED_FILE} says why of each, the last: "
            f"{skipped[-1].kind}: {skipped[-1].message}{hint}"
        )
    return making


def _make(task: _Task) -> int:
    """Makes one shard, then its note; returns the number of its items."""
    refused: list[Refused] = []

    def records() -> Iterator[tuple[str, dict[str, bytes]]]:
        for position, (item, content) in enumerate(contents(task.items, lines=task.lines)):
            members = content if isinstance(content, Refused) else _members(item, content, task.side)
            if isinstance(members, Refused):
                refused.append(members)
            else:
                yield f"{task.first + position:09}", members

    write_shard(task.shard, records())
    entry = None
    if len(refused) < len(task.items):
        entry = describe(task.shard)
    else:
        task.shard.unlink()
    write_text(task.note, json.dumps(_plain(asdict(_Note(entry=entry, refused=refused)))))
    return len(task.items)


def _members(item: Item, content: bytes, side: int | None) -> dict[str, bytes] | Refused:
    """The members of a sample: the image under the suffix of its true format, and the `.json`."""
    try:
        pixels = decode(content, name=item.source)
    except ImageError as error:
        return Refused(source=item.source, kind=error.kind, message=str(error))
    height, width = pixels.shape[1:]
    if side is not None and min(height, width) > side:
        scale = side / min(height, width)
        size = round(width * scale), round(height * scale)
        smaller = Image.fromarray(pixels.permute(1, 2, 0).numpy()).resize(size, Image.Resampling.LANCZOS)
        file = io.BytesIO()
        smaller.save(file, "JPEG", quality=JPEG_QUALITY)
        content = file.getvalue()
    captions: dict[str, Any] = {"captions": item.captions} if item.captions else {}
    if captions and "captions" in item.fields:
        captions["other_captions"] = item.fields["captions"]
    named = "source" if "source" not in item.fields else "image_name"  # a table may have a column `source`
    fields = {**item.fields, **captions, named: item.source}
    return {_suffix(content): content, "json": json.dumps(_plain(fields), allow_nan=False).encode()}


def _plain(value: Any) -> Any:
    """The value as strict JSON has it: no NaN, no infinity, text for what it does not know."""
    match value:
        case dict():
            return {_plain(str(key)): _plain(inner) for key, inner in value.items()}
        case list() | tuple():
            return [_plain(inner) for inner in value]
        case str():
            return value.encode(errors="backslashreplace").decode()  # of a name with bytes that are not text
        case float():
            return value if math.isfinite(value) else None
        case bytes():
            return base64.b64encode(value).decode()
        case datetime() | date() | time():
            return value.isoformat()
        case Decimal():
            return _plain(float(value))
        case None | bool() | int():
            return value
    return str(value)


def _suffix(content: bytes) -> str:
    """What the names of such files usually end in; the content has been decoded before, so Pillow knows it."""
    if content.startswith(b"\xff\xd8\xff"):
        return "jpg"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about odd but harmless metadata
        with Image.open(io.BytesIO(content)) as picture:
            name = str(picture.format)
    return SUFFIXES.get(name, name.lower())


def _fingerprint(items: Iterable[Item], *, lines: bool) -> str:
    digest = hashlib.sha256(b"" if lines else b"texts of shards are not split")
    for item in items:
        digest.update(json.dumps([item.source, item.picture, item.captions, item.fields], default=str).encode())
    return digest.hexdigest()
