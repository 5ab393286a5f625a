"""Captions of tar shards in Parquet files, as `contracap bulk caption` writes them."""

from collections.abc import Iterator
from pathlib import Path

from contracap.data.annotations import Entry, Inside, SkippedEntry, SourceError, bad_row
from contracap.data.datasets.parquet import column_names, parquet_rows
from contracap.data.samples import texts_in

COLUMNS = ("shard", "key", "caption")


def is_bulk(path: Path) -> bool:
    """Return whether the rows of a Parquet file are about samples of shards.

    Raises:
        SourceError: if it is not a Parquet file.
    """
    return {"shard", "key"} <= set(column_names(path))


def read_bulk(path: Path, folder: Path | None = None) -> Iterator[Entry | SkippedEntry]:
    """Yield the captions of a file, with the shard and key of each image.

    Args:
        folder: of the shards, if they have moved.

    Raises:
        SourceError: if it is another file, or without captions.
    """
    missing = [name for name in COLUMNS if name not in column_names(path)]
    if missing:
        raise SourceError(f"{path} has no column {' and '.join(missing)}: give the output of contracap bulk caption")
    for number, row in enumerate(parquet_rows(path), 1):
        if isinstance(row, SkippedEntry):
            yield row
            continue
        shard, key = row["shard"], row["key"]
        if not isinstance(shard, str) or not isinstance(key, str):
            yield bad_row(f"{path.name}, row {number}", "shard and key must be texts")
        elif row.get("error"):
            yield SkippedEntry(source=f"{shard}/{key}", kind="broken_picture", message=str(row["error"]))
        else:
            file = shard if folder is None else str(folder / shard.rpartition("/")[2])
            if file.startswith("pipe:"):  # also of a folder `.`
                message = f"{shard!r} is a shell command, which no row may name"
                yield SkippedEntry(source=f"{path.name}, row {number}", kind="unsafe_path", message=message)
            else:
                yield Entry(name=f"{shard}/{key}", captions=texts_in(row["caption"]), inside=Inside(file, key))
