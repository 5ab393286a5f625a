"""Make the index of a folder of shards."""

import hashlib
import shutil
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory

from contracap.data.index import INDEX_FILE, IndexFileError, ShardEntry, read_index, write_index
from contracap.data.remote import BUFFER_BYTES, open_file
from contracap.data.samples import SampleError, parse_record
from contracap.data.shards import ShardError, list_shards, read_records
from contracap.data.workers import in_processes
from contracap.progress import progress_bar
from contracap.tokenizer import Tokenizer


def index_shard(shard: str | Path) -> ShardEntry:
    """Return the entry of a shard, which is read whole; a remote one is downloaded.

    Raises:
        ShardError: if it is missing, cut or broken.
        RemoteError: if it cannot be downloaded.
    """
    name = str(shard)
    if "://" not in name:
        return _describe_file(Path(name))
    with TemporaryDirectory() as folder, open_file(name) as remote:
        path = Path(folder, name.rpartition("/")[2])
        with path.open("wb") as file:
            shutil.copyfileobj(remote, file, BUFFER_BYTES)
        return _describe_file(path)


def _describe_file(path: Path) -> ShardEntry:
    tokenizer, samples, lengths = Tokenizer(), 0, Counter[int]()
    for record in read_records(str(path)):
        samples += 1
        try:
            captions = parse_record(record).captions
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


def index_folder(folder: str | Path, workers: int = 0, *, out: str | Path | None = None) -> list[ShardEntry]:
    """Make or complete the index of a folder of shards. Return its entries, sorted by name.

    An entry is kept while its shard has the same size and is not newer than the index. The entry of a shard that is
    gone is dropped. An interrupted run keeps the entries it made.

    Args:
        folder: of the shards and the index. The entries of a remote folder are kept without a check.
        workers: processes that read; 0: the calling one.
        out: another, local folder for the index, which a remote folder needs.

    Raises:
        FileNotFoundError: if the folder holds no shards.
        IndexFileError: if there is an index that cannot be read, or a remote folder has no `out`.
        ShardError, RemoteError: if a shard cannot be read; the others are in the index.
        KeyboardInterrupt: says how many shards are in the index.
    """
    if "://" in str(folder) and out is None:
        raise IndexFileError(
            f"{folder} is remote: give a local folder for {INDEX_FILE}, and then copy it to the shards"
        )
    out = Path(out or folder)
    shards, known = list_shards(folder), read_index(out)
    written = (out / INDEX_FILE).stat().st_mtime_ns if known else 0
    kept = {shard: entry for shard in shards if (entry := _current_entry(shard, known, written))}
    entries, unknown = list(kept.values()), [shard for shard in shards if shard not in kept]
    broken = list[ShardError | OSError]()
    described = in_processes(_describe_or_error, unknown, workers)
    try:
        for result in progress_bar(described, desc="index", total=len(unknown), unit=" shards"):
            if isinstance(result, ShardEntry):
                entries.append(result)
            else:
                broken.append(result)
    except KeyboardInterrupt:
        words = f"interrupted: {len(entries)} of {len(shards)} shards are in the index; the same command continues"
        raise KeyboardInterrupt(words) from None
    finally:
        write_index(out, entries)
    if broken:
        raise min(broken, key=str)
    return sorted(entries, key=lambda entry: entry.name)


def _current_entry(shard: str, known: Mapping[str, ShardEntry], written: int) -> ShardEntry | None:
    """Return the known entry of a shard that has not changed since the index was `written`, in nanoseconds."""
    entry = known.get(shard.rpartition("/")[2])
    if entry is None or "://" in shard:
        return entry
    state = Path(shard).stat()  # tar files are padded to 10,240 bytes, so a change often leaves the size
    return entry if entry.bytes == state.st_size and state.st_mtime_ns <= written else None


def _describe_or_error(shard: str) -> ShardEntry | ShardError | OSError:
    """Return an error as a result, so that it does not end the work on the other shards."""
    try:
        return index_shard(shard)
    except (ShardError, OSError) as error:
        return error
