"""Parquet files: rows of tables, and images whose bytes are in them, as most data sets on the hub have them."""

from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from contracap.data.annotations import Refused, SourceError

BATCH = 1024  # rows that are in memory together
IMAGES = 16  # likewise, of rows with images


@dataclass(frozen=True, kw_only=True, slots=True)
class Embedded:
    """An image in a cell, which is not read yet: its name, and the number of its row, from 0."""

    name: str
    row: int


def column_names(path: Path) -> list[str]:
    """The columns of a file.

    Raises:
        SourceError: if it is another file.
    """
    with _opened(path) as file:
        return list(file.schema_arrow.names)


def parquet_rows(path: Path, image_column: str | None = None) -> Iterator[dict[str, Any] | Refused]:
    """The rows of a file. Images are left where they are; a row, or a group of rows, that cannot be read is refused.

    Args:
        image_column: the one with the names or the bytes of images.

    Raises:
        SourceError: if it is another file.
    """
    with _opened(path) as file:
        import pyarrow
        from pyarrow.types import is_binary, is_large_binary, is_struct

        wanted, held = list[str](), set[str]()
        for each in file.schema_arrow:
            inner = [each.type.field(i).name for i in range(each.type.num_fields)] if is_struct(each.type) else []
            if "bytes" in inner:
                held.add(each.name)
                wanted += [f"{each.name}.path"] if "path" in inner else []
            elif each.name == image_column and (is_binary(each.type) or is_large_binary(each.type)):
                held.add(each.name)
            else:
                wanted.append(each.name)
        first = 0
        for group in range(file.metadata.num_row_groups):
            count = file.metadata.row_group(group).num_rows
            row = first
            try:
                for batch in file.iter_batches(BATCH, row_groups=[group], columns=wanted):
                    for values in _values(batch, path.name, row):
                        if isinstance(values, dict) and image_column in held:
                            name = (values.get(image_column) or {}).get("path") or f"row {row + 1} of {path.name}"
                            values[image_column] = Embedded(name=name, row=row)
                        yield values
                        row += 1
            except (pyarrow.ArrowException, OSError) as error:
                message = f"{first + count - row} rows cannot be read: {error}"
                yield Refused(source=f"{path.name}, row {row + 1}", kind="bad_row", message=message)
            first += count


def parquet_images(path: Path, column: str, rows: Sequence[int]) -> Iterator[bytes | str | None]:
    """The images in these rows of a column, in ascending order: their bytes, else the path of a file, else nothing.

    Raises:
        SourceError: if they cannot be read.
    """
    with _opened(path) as file:
        wanted, first, row = iter(rows), 0, next(iter(rows))
        next(wanted)
        for group in range(file.metadata.num_row_groups):
            count = file.metadata.row_group(group).num_rows
            if row >= first + count:
                first += count
                continue
            for batch in file.iter_batches(IMAGES, row_groups=[group], columns=[column]):
                while row < first + len(batch):
                    value = batch.column(0)[row - first].as_py()
                    yield value.get("bytes") or value.get("path") if isinstance(value, dict) else value
                    following = next(wanted, None)
                    if following is None:
                        return
                    row = following
                first += len(batch)


@contextmanager
def _opened(path: Path) -> Generator[Any, None, None]:
    try:
        from pyarrow import ArrowException
        from pyarrow.parquet import ParquetFile
    except ImportError:
        raise SourceError(f"to read {path} pyarrow is needed: pip install 'contracap[data]'") from None
    with path.open("rb") as content:  # the system's word on a file that cannot be opened
        try:
            with ParquetFile(content) as file:
                yield file
        except (ArrowException, OSError) as error:
            raise SourceError(f"{path} is not a Parquet file, or broken: {error}") from None


def _values(batch: Any, source: str, first: int) -> Iterator[dict[str, Any] | Refused]:
    """The rows of a batch as Python has them. One that it cannot have, such as a text that is not UTF-8, is refused."""
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
            yield Refused(source=f"{source}, row {first + place + 1}", kind="bad_row", message=str(error))
