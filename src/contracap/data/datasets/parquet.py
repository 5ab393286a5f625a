"""Parquet files: rows of tables, and images whose bytes are in them, as most data sets on the hub have them."""

from collections import deque
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from contracap.data.annotations import SkippedEntry, SourceError, bad_row
from contracap.extras import require_extra

BATCH = 1024  # rows that are in memory together
IMAGES = 16  # rows with images that are in memory together


@dataclass(frozen=True, kw_only=True, slots=True)
class Embedded:
    """An image in a cell that is not read yet: its name, and the number of its row, from 0."""

    name: str
    row: int


def column_names(path: Path) -> list[str]:
    """Return the names of a file's columns.

    Raises:
        SourceError: if it is another file.
    """
    with _open_parquet(path) as file:
        return list(file.schema_arrow.names)


def parquet_rows(path: Path, image_column: str | None = None) -> Iterator[dict[str, Any] | SkippedEntry]:
    """Yield the rows of a file. Images are not read. A row, or a group of rows, that cannot be read is skipped.

    Args:
        image_column: with the names or the bytes of images.

    Raises:
        SourceError: if it is another file.
    """
    with _open_parquet(path) as file:
        from pyarrow import ArrowException

        wanted, with_images = _columns(file.schema_arrow, image_column)
        first = 0
        for group in range(file.metadata.num_row_groups):
            count = file.metadata.row_group(group).num_rows
            row = first
            try:
                for batch in file.iter_batches(BATCH, row_groups=[group], columns=wanted):
                    for values in _values(batch, path.name, row):
                        if isinstance(values, dict) and image_column in with_images:
                            name = (values.get(image_column) or {}).get("path") or f"row {row + 1} of {path.name}"
                            values[image_column] = Embedded(name=name, row=row)
                        yield values
                        row += 1
            except (ArrowException, OSError) as error:
                message = f"{first + count - row} rows cannot be read: {error}"
                yield bad_row(f"{path.name}, row {row + 1}", message)
            first += count


def _columns(schema: Any, image_column: str | None) -> tuple[list[str], set[str]]:
    """Return the columns to read, and those that hold images, of which at most the path is read."""
    from pyarrow.types import is_binary, is_large_binary, is_struct

    wanted, with_images = list[str](), set[str]()
    for column in schema:
        inner = [column.type.field(i).name for i in range(column.type.num_fields)] if is_struct(column.type) else []
        if "bytes" in inner:
            with_images.add(column.name)
            wanted += [f"{column.name}.path"] if "path" in inner else []
        elif column.name == image_column and (is_binary(column.type) or is_large_binary(column.type)):
            with_images.add(column.name)
        else:
            wanted.append(column.name)
    return wanted, with_images


def parquet_images(path: Path, column: str, rows: Sequence[int]) -> Iterator[bytes | str | None]:
    """Yield the images in these rows, which ascend: their bytes, else the path of a file, else None.

    Raises:
        SourceError: if they cannot be read.
    """
    with _open_parquet(path) as file:
        remaining, first = deque(rows), 0
        for group in range(file.metadata.num_row_groups):
            after = first + file.metadata.row_group(group).num_rows
            if remaining and remaining[0] < after:
                for batch in file.iter_batches(IMAGES, row_groups=[group], columns=[column]):
                    while remaining and remaining[0] < first + len(batch):
                        value = batch.column(0)[remaining.popleft() - first].as_py()
                        yield value.get("bytes") or value.get("path") if isinstance(value, dict) else value
                    if not remaining:
                        return
                    first += len(batch)
            first = after


@contextmanager
def _open_parquet(path: Path) -> Generator[Any, None, None]:
    require_extra("data", "pyarrow")
    from pyarrow import ArrowException
    from pyarrow.parquet import ParquetFile

    with path.open("rb") as content:  # raises the system's error if it cannot be opened
        try:
            with ParquetFile(content) as file:
                yield file
        except (ArrowException, OSError) as error:
            raise SourceError(f"{path} is not a Parquet file, or broken: {error}") from None


def _values(batch: Any, source: str, first: int) -> Iterator[dict[str, Any] | SkippedEntry]:
    """Yield the rows of a batch. One that Python cannot hold, such as a text that is not UTF-8, is skipped."""
    from pyarrow import ArrowException

    try:
        yield from batch.to_pylist()
        return
    except (ArrowException, ValueError, OverflowError):
        pass
    for place in range(len(batch)):
        try:
            yield from batch.slice(place, 1).to_pylist()
        except (ArrowException, ValueError, OverflowError) as error:
            yield bad_row(f"{source}, row {first + place + 1}", str(error))
