"""Captions of tar shards in Parquet files, as `contracap bulk caption` writes them."""

from collections.abc import Iterator
from pathlib import Path

from contracap.data.annotations import Entry, Inside, Refused, SourceError
from contracap.data.datasets.parquet import column_names, parquet_rows
from contracap.data.shards import texts_in

COLUMNS = ("shard", "key", "caption")


def is_bulk(path: Path) -> bool:
    """Whether a Parquet file has rows for the samples of shards.

    Raises:
        SourceError: if it is not a Parquet file.
    """
    return {"shard", "key"} <= set(column_names(path))


def read_bulk(path: Path, folder: Path | None = None) -> Iterator[Entry | Refused]:
    """The captions of a file; where each image is, its shard and key say.

    Args:
        folder: where the shards lie, if not where they were.

    Raises:
        SourceError: if it is another file, or without captions.
    """
    missing = [name for name in COLUMNS if name not in column_names(path)]
    if missing:
        raise SourceError(f"{path} has no column {' and '.join(missing)}: give the output of contracap bulk caption")
    for number, row in enumerate(parquet_rows(path), 1):
        if isinstance(row, Refused):
            yield row
            continue
        shard, key = row["shard"], row["key"]
        if not isinstance(shard, str) or not isinstance(key, str):
            yield Refused(source=f"{path.name}, row {number}", kind="bad_row", message="shard and key must be texts")
        elif row.get("error"):
            yield Refused(source=f"{shard}/{key}", kind="broken_picture", message=str(row["error"]))
        else:
            file = shard if folder is None else str(folder / shard.rpartition("/")[2])
            if file.startswith("pipe:"):  # also of a folder `.`
                message = f"{shard!r} is a shell command, which no row may name"
                yield Refused(source=f"{path.name}, row {number}", kind="unsafe_path", message=message)
            else:
                yield Entry(picture=f"{shard}/{key}", captions=texts_in(row["caption"]), inside=Inside(file, key))
