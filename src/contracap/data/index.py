"""The index beside a set of shards: what each holds, and how long its captions are."""

import hashlib
import json
import logging
import os
import shutil
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from contracap.data.remote import BUFFER_BYTES, opened
from contracap.data.shards import SampleError, ShardError, count_samples, list_shards, parse, records
from contracap.data.workers import in_processes
from contracap.files import write_text
from contracap.progress import progress_bar
from contracap.tokenizer import Tokenizer

INDEX_FILE = "index.json"
logger = logging.getLogger(__name__)


class IndexFileError(ValueError):
    """An index that cannot be used; the message names the file."""


@dataclass(frozen=True, kw_only=True)
class ShardEntry:
    """One shard, by the name of its file.

    `samples` counts groups of members, also those that turn out unusable. `caption_lengths` is the number of captions
    of each length in tokens of CLIP's tokenizer, start and end included, not cut to any context.
    """

    name: str
    samples: int
    bytes: int
    sha256: str
    captions: int
    caption_lengths: dict[int, int]


def describe(shard: str | Path) -> ShardEntry:
    """The entry of one shard, which is read whole, and a remote one downloaded for it.

    Raises:
        ShardError: if it is missing, cut or broken.
        RemoteError: if it cannot be downloaded.
    """
    name = str(shard)
    if "://" not in name:
        return _describe(Path(name))
    with TemporaryDirectory() as folder, opened(name) as remote:
        path = Path(folder, name.rpartition("/")[2])
        with path.open("wb") as file:
            shutil.copyfileobj(remote, file, BUFFER_BYTES)
        return _describe(path)


def _describe(path: Path) -> ShardEntry:
    tokenizer, samples, lengths = Tokenizer(), 0, Counter[int]()
    for record in records(str(path)):
        samples += 1
        try:
            captions = parse(record).captions
        except SampleError:
            continue
        lengths.update(len(tokenizer.encode(caption)) + 2 for caption in captions)
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return ShardEntry(
        name=path.name,
        samples=samples,
        bytes=path.stat().st_size,
        sha256=digest,
        captions=lengths.total(),
        caption_lengths=dict(sorted(lengths.items())),
    )


def read_index(folder: str | Path) -> dict[str, ShardEntry]:
    """The entries by the names of their shards; none if the folder, local or remote, has no index.

    Raises:
        IndexFileError: if there is one and it cannot be read.
    """
    path = f"{folder}/{INDEX_FILE}".replace(f"//{INDEX_FILE}", f"/{INDEX_FILE}")
    try:
        with opened(path) as file:
            entries = [_entry(**values) for values in dict(json.loads(file.read()))["shards"]]
    except FileNotFoundError:
        return {}
    except (KeyError, TypeError) as error:
        reason = " ".join(str(error).split())
        raise IndexFileError(
            f"{path} is not an index of shards ({reason}); delete it and index the folder again"
        ) from None
    except Exception as error:  # broken JSON, and whatever fsspec's file systems raise
        raise IndexFileError(f"cannot read the index {path}: {error or type(error).__name__}") from error
    return {entry.name: entry for entry in entries}


def _entry(*, caption_lengths: dict[str, int], **values: Any) -> ShardEntry:
    """From the values in the file. Only what decides the order is checked: an index may have a million entries."""
    entry = ShardEntry(caption_lengths={int(length): count for length, count in caption_lengths.items()}, **values)
    if not (isinstance(entry.name, str) and type(entry.samples) is type(entry.bytes) is int and entry.samples >= 0):
        raise TypeError(f"an entry has name {entry.name!r}, samples {entry.samples!r}, bytes {entry.bytes!r}")
    return entry


def samples_in(shards: Sequence[str]) -> list[int]:
    """How many samples each shard holds.

    From the index in its folder; else from the notes that img2dataset left beside it (`00000_stats.json`); else from
    the shard's own headers, which takes a moment for each and for a remote shard a download.

    Raises:
        IndexFileError: if an index cannot be read, or its shard has another size by now.
        ShardError: if a remote shard cannot be counted, or not one of the shards has a whole sample.
    """
    files = [shard for shard in shards if not shard.startswith("pipe:")]  # nothing lies beside a command's output
    indexes = {folder: read_index(folder) for folder in {_folder(shard) for shard in files}}
    for folder, entries in indexes.items():
        gone = set(entries).difference(os.listdir(folder)) if os.path.isdir(folder) else ()
        if gone:
            raise IndexFileError(
                f"{folder}/{INDEX_FILE} lists {min(gone)}, which is not there ({len(gone)} of {len(entries)} shards "
                f"are gone): bring it back, or index what is left with `contracap shards index {folder}`"
            )
    found = dict.fromkeys(shards) | {shard: _told(shard, indexes[_folder(shard)]) for shard in files}
    unknown = [shard for shard, samples in found.items() if samples is None]
    if unknown:
        told = "counting samples; `contracap shards index FOLDER` keeps the numbers"
        failures = list[ShardError]()
        bar = progress_bar(unknown, desc=told, unit=" shards", delay=2)
        found |= {shard: _counted(shard, failures) for shard in bar}
        if sum(not failure.whole for failure in failures) == len(found):
            raise failures[0]
    return [found[shard] or 0 for shard in shards]


def _counted(shard: str, failures: list[ShardError]) -> int:
    """Count a shard; of a damaged one, the samples before the damage and one more, which reading will report."""
    try:
        return count_samples(shard)
    except ShardError as error:
        if not Path(shard).is_file():  # it may be a network's failure: another count another day would be another order
            raise
        logger.warning("%s", error)
        failures.append(error)
        return error.whole + 1


def is_damaged(shard: str) -> bool:
    """Whether a local shard cannot be read to its end."""
    try:
        count_samples(shard)
    except ShardError:
        return Path(shard).is_file()
    return False


def _told(shard: str, index: Mapping[str, ShardEntry]) -> int | None:
    folder, name = _folder(shard), shard.rpartition("/")[2]
    local = "://" not in shard and Path(shard).is_file()
    if name in index:
        if local and Path(shard).stat().st_size != index[name].bytes:
            raise IndexFileError(
                f"{shard} has {Path(shard).stat().st_size} bytes, in {folder}/{INDEX_FILE} it has {index[name].bytes}: "
                f"index it again with `contracap shards index {folder}`"
            )
        return index[name].samples
    notes = f"{shard.removesuffix('.tar')}_stats.json"
    if not local or not Path(notes).is_file():
        return None
    try:
        return int(json.loads(Path(notes).read_text())["successes"])
    except (ValueError, TypeError, KeyError):
        return None


def _folder(shard: str) -> str:
    return shard.rpartition("/")[0] or "."


def write_index(folder: str | Path, entries: Iterable[ShardEntry]) -> None:
    """Writes the index of a local folder, its shards in the order of their names, whole or not at all."""
    lines = (json.dumps(asdict(entry)) for entry in sorted(entries, key=lambda entry: entry.name))
    write_text(Path(folder) / INDEX_FILE, '{"shards": [\n' + ",\n".join(lines) + "\n]}\n")


def index_folder(folder: str | Path, workers: int = 0, *, out: str | Path | None = None) -> list[ShardEntry]:
    """Makes or completes the index of a folder of shards; the entries in the order of their names.

    The entry of a shard is kept while the shard has the same size in bytes and is not newer than the index, and goes
    when the shard is gone. What is done when the work is interrupted is kept too.

    Args:
        folder: where the shards lie, and the index will; of a remote one, entries at hand are kept as they are.
        workers: processes that read; 0: the calling one.
        out: another, local folder for the index, as a remote folder of shards needs.

    Raises:
        FileNotFoundError: if the folder holds no shards.
        IndexFileError: if there is an index that cannot be read.
        RemoteError: likewise, of a remote shard.
        ShardError: if a shard cannot be read; the others are in the index.
        KeyboardInterrupt: that says how many shards are in the index.
    """
    remote = "://" in str(folder)
    if remote and out is None:
        raise IndexFileError(
            f"{folder} is remote: give a local folder for {INDEX_FILE}, and put it beside the shards then"
        )
    out = Path(out or folder)
    shards, known = list_shards(folder), read_index(out)
    written = (out / INDEX_FILE).stat().st_mtime_ns if known else 0
    entries, unknown, broken = list[ShardEntry](), list[str](), list[ShardError | OSError]()
    for shard in shards:
        entry = known.get(shard.rpartition("/")[2])
        # Tar files are filled up to 10,240 bytes, so a change often leaves the size
        if entry is not None and (remote or _is_unchanged(Path(shard), entry, written)):
            entries.append(entry)
        else:
            unknown.append(shard)
    described = in_processes(_described, unknown, workers)
    try:
        for made in progress_bar(described, desc="index", total=len(unknown), unit=" shards"):
            if isinstance(made, ShardEntry):
                entries.append(made)
            else:
                broken.append(made)
    except KeyboardInterrupt:
        words = f"interrupted: {len(entries)} of {len(shards)} shards are in the index; the same command continues"
        raise KeyboardInterrupt(words) from None
    finally:
        write_index(out, entries)
    if broken:
        raise min(broken, key=str)
    return sorted(entries, key=lambda entry: entry.name)


def _is_unchanged(path: Path, entry: ShardEntry, since: int) -> bool:
    state = path.stat()
    return entry.bytes == state.st_size and state.st_mtime_ns <= since


def _described(shard: str) -> ShardEntry | ShardError | OSError:
    """An error is handed over, so that it does not end the work on the other shards."""
    try:
        return describe(shard)
    except (ShardError, OSError) as error:
        return error
