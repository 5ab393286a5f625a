"""Sources into tar shards: in parallel, resumable, the same bytes every time, with a report of what was skipped."""

import hashlib
import json
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import groupby
from pathlib import Path
from typing import Any, Literal

from contracap.config import build, require_count
from contracap.data.annotations import Entry, SkippedEntry
from contracap.data.config import MAX_WORKERS
from contracap.data.image_bytes import read_images
from contracap.data.index import ShardEntry, read_index, write_index
from contracap.data.indexing import index_shard
from contracap.data.sample_members import plain_json, sample_members
from contracap.data.shards import write_shard
from contracap.data.source_kinds import Kind
from contracap.data.sources import NAMES_IMAGES, read_source
from contracap.data.tar import SHARD_SUFFIXES
from contracap.data.workers import in_processes
from contracap.files import require_folder, write_text
from contracap.progress import progress_bar

SKIPPED_FILE = "skipped.jsonl"
PLAN_FILE = "making.json"
NOTES_FOLDER = ".making"  # a note for each finished shard; gone at the end


class MakingError(ValueError):
    """Shards that cannot be made. The message says why and what to do."""


@dataclass(frozen=True, kw_only=True)
class MadeShards:
    """Counts of a finished folder.

    Attributes:
        skipped: entries that gave no sample, by kind.
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
    images: str | Path | None = None,
    splits: Sequence[str] = (),
    image_column: str | None = None,
    caption_columns: Sequence[str] = (),
    caption_lines: bool = True,
    shorter_side: int | None = None,
    samples_per_shard: int = 1000,
    workers: int = 0,
) -> MadeShards:
    """Make tar shards of a source, with `index.json`, and `skipped.jsonl` with what was left out and why.

    A sample has the image, its bytes unchanged, and a `.json` with `captions`, `source` (the image's name) and the
    other fields of the source. The bytes of the shards depend on the source and the settings only. The same call
    continues an interrupted one. In a finished folder it does nothing.

    Args:
        source: as in `read_source`, with `kind`, `images`, `splits`, the columns and `caption_lines`.
        out: a local folder, made if need be.
        shorter_side: pixels. Larger images are scaled down to it and stored upright, as JPEG. None: no image is.
        samples_per_shard: entries for each shard, including those that will be skipped.
        workers: processes; 0: the calling one.

    Raises:
        FileNotFoundError, SourceError: as `read_source`.
        ValueError: if a number is too small.
        MakingError: if the folder holds other shards, or shards of another source or with other settings; or if no
            image of the source can be used.
        KeyboardInterrupt: says how many shards are done.
    """
    require_count("samples_per_shard", samples_per_shard, 1, "images for each shard", most=10**9)
    if shorter_side is not None:
        require_count("shorter_side", shorter_side, 1, "pixels")
    require_count("workers", workers, 0, "processes", most=MAX_WORKERS)
    contents = read_source(
        source,
        kind=kind,
        images=images,
        splits=splits,
        image_column=image_column,
        caption_columns=caption_columns,
        caption_lines=caption_lines,
    )
    out, entries = Path(out), contents.entries
    plan = {
        "samples_per_shard": samples_per_shard,
        "shorter_side": shorter_side,
        "kind": contents.kind,
        "pictures": len(entries),
        "source_sha256": _fingerprint(entries, lines=caption_lines or contents.kind != "bulk"),
    }
    finished = _begin(out, plan)
    if finished is not None:
        return finished
    tasks = _tasks(entries, samples_per_shard, shorter_side=shorter_side, lines=caption_lines, out=out)
    _run(tasks, workers, out)
    repeated = sum(len(entry.captions) - len(set(entry.captions)) for entry in entries)
    return _finish(out, plan, [task.read_note() for task in tasks], contents.skipped, repeated)


def _parts(entries: Sequence[Entry], size: int) -> Iterator[list[Entry]]:
    """Yield the entries of each shard: `size` of them or, if they are samples of other shards, those of one."""
    if entries and entries[0].inside is not None and entries[0].inside.row is None:
        for _, part in groupby(sorted(entries, key=lambda entry: entry.path), lambda entry: entry.path):
            yield list(part)
    else:
        yield from (list(entries[first : first + size]) for first in range(0, len(entries), size))


@dataclass(frozen=True, kw_only=True)
class _Note:
    """The result for a shard: its entry in the index, if it has a sample, and what was skipped."""

    entry: ShardEntry | None
    refused: list[SkippedEntry]


@dataclass(frozen=True, kw_only=True)
class _Task:
    """A shard to be made. `first` is the number of its first entry in the source."""

    number: int
    first: int
    entries: list[Entry]
    shorter_side: int | None
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


def _tasks(
    entries: Sequence[Entry], samples_per_shard: int, *, shorter_side: int | None, lines: bool, out: Path
) -> list[_Task]:
    tasks, first = list[_Task](), 0
    for number, part in enumerate(_parts(entries, samples_per_shard)):
        tasks.append(_Task(number=number, first=first, entries=part, shorter_side=shorter_side, lines=lines, out=out))
        first += len(part)
    return tasks


def _run(tasks: Sequence[_Task], workers: int, out: Path) -> None:
    to_do = [task for task in tasks if not task.is_done()]
    total, left = (sum(len(task.entries) for task in some) for some in (tasks, to_do))
    with progress_bar(total=total, initial=total - left, unit=" images") as progress:
        try:
            for count in in_processes(_make_shard, to_do, workers):
                progress.update(count)
        except KeyboardInterrupt:
            done = sum(task.is_done() for task in tasks)
            words = f"interrupted: {done} of {len(tasks)} shards are in {out}; the same command continues from there"
            raise KeyboardInterrupt(words) from None


def _begin(out: Path, plan: dict[str, Any]) -> MadeShards | None:
    """Prepare the folder for a plan; return the result if all is done already."""
    plan_file = out / PLAN_FILE
    require_folder(out)
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
            what = "the entries of the source, or the options that select them, have changed"
            if name != "source_sha256":
                what = f"{name} was {begun.get(name)} and is now {value}"
            raise MakingError(f"{out} was begun with other input: {what}; delete {out}, or give another --out")
    for partial in out.glob(".*.partial"):  # of a process that was killed
        partial.unlink()
    if "outcome" not in begun:
        return None
    entries = read_index(out)
    gone = [name for name in entries if not (out / name).is_file()]
    if gone:
        raise MakingError(f"{out} was finished, but {gone[0]} is gone: bring it back, or give another folder")
    return build(MadeShards, {"captions": sum(entry.captions for entry in entries.values()), **begun["outcome"]})


def _finish(
    out: Path, plan: dict[str, Any], notes: Sequence[_Note], skipped: Sequence[SkippedEntry], repeated: int
) -> MadeShards:
    """Write the index and the report, then remove the notes."""
    entries = [note.entry for note in notes if note.entry is not None]
    skipped = [*skipped, *(one for note in notes for one in note.refused)]
    made = MadeShards(
        shards=len(entries),
        samples=sum(entry.samples for entry in entries),
        captions=sum(entry.captions for entry in entries),
        skipped=dict(sorted(Counter(one.kind for one in skipped).items())),
        repeated_captions=repeated,
    )
    write_text(out / SKIPPED_FILE, "".join(json.dumps(plain_json(asdict(one))) + "\n" for one in skipped))
    if entries:
        write_index(out, entries)
        write_text(out / PLAN_FILE, json.dumps({**plan, "outcome": asdict(made)}) + "\n")
    else:
        (out / PLAN_FILE).unlink()
    shutil.rmtree(out / NOTES_FOLDER, ignore_errors=True)
    if not entries:
        elsewhere = skipped[-1].kind == "missing_file" and plan["kind"] in NAMES_IMAGES
        hint = "; if the images are in another folder, name it: --pictures DIR" if elsewhere else ""
        raise MakingError(
            f"not one image of the source could be used; {out / SKIPPED_FILE} says why of each, the last: "
            f"{skipped[-1].kind}: {skipped[-1].message}{hint}"
        )
    return made


def _make_shard(task: _Task) -> int:
    """Make a shard, then its note; return the number of its entries."""
    skipped: list[SkippedEntry] = []

    def records() -> Iterator[tuple[str, dict[str, bytes]]]:
        for position, (entry, image) in enumerate(read_images(task.entries, lines=task.lines)):
            members = image if isinstance(image, SkippedEntry) else sample_members(entry, image, task.shorter_side)
            if isinstance(members, SkippedEntry):
                skipped.append(members)
            else:
                yield f"{task.first + position:09}", members

    write_shard(task.shard, records())
    shard_entry = None
    if len(skipped) < len(task.entries):
        shard_entry = index_shard(task.shard)
    else:
        task.shard.unlink()
    write_text(task.note, json.dumps(plain_json(asdict(_Note(entry=shard_entry, refused=skipped)))))
    return len(task.entries)


def _fingerprint(entries: Iterable[Entry], *, lines: bool) -> str:
    digest = hashlib.sha256(b"" if lines else b"texts of shards are not split")
    for entry in entries:
        digest.update(json.dumps([entry.name, entry.path, entry.captions, entry.fields], default=str).encode())
    return digest.hexdigest()
