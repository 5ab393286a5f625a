"""Numbers of samples in shards: from an index, from img2dataset's notes, or from the shards' headers."""

import json
import logging
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from contracap.data.index import INDEX_FILE, IndexFileError, ShardEntry, read_index
from contracap.data.shards import ShardError, count_samples
from contracap.progress import progress_bar
from contracap.wording import counted

logger = logging.getLogger(__name__)
Indexes = Mapping[str, Mapping[str, ShardEntry]]  # entries by folder and name


def samples_in(shards: Sequence[str]) -> list[int]:
    """Return how many samples each shard holds.

    The number comes from the index in the shard's folder, else from img2dataset's `00000_stats.json` next to the
    shard. Otherwise the headers of the shard are read; a remote shard is downloaded for that.

    Raises:
        IndexFileError: if an index cannot be read, lists a shard that is gone, or gives it another size.
        ShardError: if a remote shard cannot be counted, or none of the shards has a whole sample.
    """
    files = [shard for shard in shards if not shard.startswith("pipe:")]  # a command's output has no neighbours
    indexes = _read_indexes(files)
    _require_listed_shards(indexes)
    numbers = dict.fromkeys(shards) | {shard: _noted_samples(shard, indexes) for shard in files}
    unknown = [shard for shard, samples in numbers.items() if samples is None]
    if unknown:
        told = "counting samples; `contracap shards index FOLDER` keeps the numbers"
        failures = list[ShardError]()
        bar = progress_bar(unknown, desc=told, unit=" shards", delay=2)
        numbers |= {shard: _count(shard, failures) for shard in bar}
        if sum(not failure.whole for failure in failures) == len(numbers):
            raise failures[0]
    return [numbers[shard] or 0 for shard in shards]


def indexed_samples(shards: Sequence[str]) -> int | None:
    """Return how many samples local shards hold by their indexes; None if an entry is missing or out of date."""
    if not all(map(os.path.isfile, shards)):
        return None
    indexes = _read_indexes(shards)
    entries = [entry for shard in shards if (entry := _entry_of(shard, indexes))]
    current = [entry.bytes for entry in entries] == [os.path.getsize(shard) for shard in shards]
    return sum(entry.samples for entry in entries) if current else None


def indexed_captions(shards: Sequence[str]) -> int | None:
    """Return how many captions shards hold by their indexes; None if one is not indexed."""
    indexes = _read_indexes(shard for shard in shards if not shard.startswith("pipe:"))
    entries = [None if shard.startswith("pipe:") else _entry_of(shard, indexes) for shard in shards]
    return None if None in entries else sum(entry.captions for entry in entries if entry)


def is_damaged(shard: str) -> bool:
    """Return whether a local shard cannot be read to its end."""
    try:
        count_samples(shard)
    except ShardError:
        return os.path.isfile(shard)
    return False


def _read_indexes(shards: Iterable[str]) -> Indexes:
    return {folder: read_index(folder) for folder in {_folder(shard) for shard in shards}}


def _entry_of(shard: str, indexes: Indexes) -> ShardEntry | None:
    return indexes[_folder(shard)].get(shard.rpartition("/")[2])


def _folder(shard: str) -> str:
    return shard.rpartition("/")[0] or "."


def _require_listed_shards(indexes: Indexes) -> None:
    for folder, entries in indexes.items():
        gone = set(entries).difference(os.listdir(folder)) if os.path.isdir(folder) else ()
        if gone:
            raise IndexFileError(
                f"{folder}/{INDEX_FILE} lists {min(gone)}, which is not there ({len(gone)} of {len(entries)} shards "
                f"are gone): bring it back, or index what is left with `contracap shards index {folder}`"
            )


def _noted_samples(shard: str, indexes: Indexes) -> int | None:
    """Return the number that an index or img2dataset's notes give for a shard."""
    local, entry = "://" not in shard and os.path.isfile(shard), _entry_of(shard, indexes)
    if entry is not None:
        if local and os.path.getsize(shard) != entry.bytes:
            folder = _folder(shard)
            raise IndexFileError(
                f"{shard} has {os.path.getsize(shard)} bytes, in {folder}/{INDEX_FILE} it has {entry.bytes}: "
                f"index it again with `contracap shards index {folder}`"
            )
        return entry.samples
    notes = Path(f"{shard.removesuffix('.tar')}_stats.json")
    if not local or not notes.is_file():
        return None
    try:
        return int(json.loads(notes.read_text())["successes"])
    except (ValueError, TypeError, KeyError):
        return None


def _count(shard: str, failures: list[ShardError]) -> int:
    """Count a shard. A damaged one counts as the samples before the damage and one more, which reading will report."""
    try:
        return count_samples(shard)
    except ShardError as error:
        if not os.path.isfile(shard):  # a network's failure would give another order another day
            raise
        logger.warning("%s; it counts as %s", error, counted(error.whole + 1, "sample(s)"))
        failures.append(error)
        return error.whole + 1
