"""Files with a row for each caption: written from rows, and read back when a run adds to them.

The columns are `path`, `caption`, `score`, which `contracap shards make` reads too; `metadata.jsonl` has Hugging Face's
`file_name` and `text`. Embeddings are a column of lists; next to a CSV file `NAME.csv` they are `NAME.csv.npy`, a NumPy
file of float32 with a row for each of its rows.
"""

import csv
import json
import os
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import IO, Any, Literal

import numpy as np

from contracap.apps.bulk.rows import Row
from contracap.extras import require_extra
from contracap.files import replace_file

TableFormat = Literal["jsonl", "csv", "parquet", "metadata"]

COLUMNS = ("path", "caption", "score")
METADATA_COLUMNS = ("file_name", "text")
MAX_LINE = 2**24  # characters; an embedding of 4,096 numbers has 90,000
ROW_GROUP = 4096  # rows of a Parquet file that are in memory together


class TableError(ValueError):
    """A file of rows that cannot be read or written; the message names it and says what would do."""


def write_table(path: Path, kind: TableFormat, rows: Iterable[Row], *, count: int, dimensions: int | None) -> None:
    """Write `count` rows, the file whole or not at all.

    Args:
        dimensions: of the embeddings; None: there are none.
    """
    if kind == "csv" and dimensions is not None:
        rows = _with_vectors_beside(path, rows, count, dimensions)
    elif kind == "csv" and os.path.exists(vectors_beside(path)):
        vectors_beside(path).unlink(missing_ok=True)  # of the rows that are overwritten
    with replace_file(path) as partial:
        if kind == "parquet":
            _write_parquet(partial, rows, dimensions is not None)
        else:
            with partial.open("w", encoding="utf-8", newline="") as file:
                _write_csv(file, rows) if kind == "csv" else _write_json_lines(file, rows, kind)


def _write_csv(file: IO[str], rows: Iterable[Row]) -> None:
    plain, quoted = (csv.writer(file, lineterminator="\n", quoting=how) for how in (csv.QUOTE_MINIMAL, csv.QUOTE_ALL))
    plain.writerow(COLUMNS)
    for row in rows:  # a carriage return ends a line for readers, but not all versions of Python quote it
        writer = quoted if "\r" in row.path + row.caption else plain
        writer.writerow((row.path, row.caption, row.score))


def _write_json_lines(file: IO[str], rows: Iterable[Row], kind: TableFormat) -> None:
    for row in rows:
        values = (
            dict(zip(METADATA_COLUMNS, (row.path, row.caption), strict=True)) if kind == "metadata" else _values(row)
        )
        if row.embedding is not None:
            values["embedding"] = row.embedding.tolist()
        file.write(json.dumps(values, ensure_ascii=False) + "\n")


def _write_parquet(partial: Path, rows: Iterable[Row], embedded: bool) -> None:
    require_extra("data", "pyarrow")
    import pyarrow
    from pyarrow.parquet import ParquetWriter

    fields = [("path", pyarrow.string()), ("caption", pyarrow.string()), ("score", pyarrow.float64())]
    if embedded:
        fields.append(("embedding", pyarrow.list_(pyarrow.float32())))
    schema = pyarrow.schema(fields)
    rows = iter(rows)
    with ParquetWriter(partial, schema) as writer:
        while group := list(islice(rows, ROW_GROUP)):
            values = [_values(row) | ({"embedding": row.embedding} if embedded else {}) for row in group]
            writer.write_table(pyarrow.Table.from_pylist(values, schema=schema))


def _values(row: Row) -> dict[str, Any]:
    return dict(zip(COLUMNS, (row.path, row.caption, row.score), strict=True))


def _with_vectors_beside(path: Path, rows: Iterable[Row], count: int, dimensions: int) -> Iterator[Row]:
    """Yield the rows; after the last, their embeddings are in the file next to `path`."""
    with replace_file(vectors_beside(path)) as partial, partial.open("wb") as file:
        np.lib.format.write_array_header_1_0(
            file, {"descr": "<f4", "fortran_order": False, "shape": (count, dimensions)}
        )
        for row in rows:
            file.write(np.asarray(row.embedding, dtype="<f4").tobytes())
            yield row


def vectors_beside(path: Path) -> Path:
    """Return the path of a CSV file's embeddings."""
    return path.with_name(f"{path.name}.npy")


def read_rows(path: Path, kind: TableFormat) -> Iterator[Row]:
    """The rows of a file that `write_table` wrote.

    Raises: TableError: if it is another file.
    """
    columns = METADATA_COLUMNS if kind == "metadata" else COLUMNS
    vectors = vectors_beside(path)
    try:
        embeddings = iter(np.load(vectors, mmap_mode="r")) if kind == "csv" and os.path.exists(vectors) else None
        for values in _READERS[kind](path):
            if embeddings is not None:
                values["embedding"] = next(embeddings)
            missing = set(columns) - set(values)
            unknown = set(values) - {*columns, "embedding"}
            if missing or unknown:
                problem = (
                    f"lacks {', '.join(sorted(missing))}" if missing else f"has {', '.join(sorted(map(str, unknown)))}"
                )
                raise ValueError(f"a row {problem}")
            name, caption, *score = (values[column] for column in columns)
            if not isinstance(name, str) or not isinstance(caption, str):
                raise ValueError(f"{columns[0]} and {columns[1]} must be strings")
            vector = values.get("embedding")
            yield Row(
                path=name,
                caption=caption,
                score=float(score[0]) if score and score[0] not in (None, "") else None,
                embedding=None if vector is None else np.asarray(vector, dtype=np.float32),
            )
    except (ValueError, TypeError, StopIteration, csv.Error) as error:  # pyarrow's errors are ValueErrors
        raise TableError(
            f"{path} is not a {kind} file of captions that more can be added to: "
            f"{error or 'rows without an embedding'}; give another --out, or --overwrite"
        ) from error


def _lines(file: IO[str]) -> Iterator[str]:
    """Raises: ValueError: if a line is longer than rows are, as in a file without any line ends."""
    while line := file.readline(MAX_LINE):
        if len(line) == MAX_LINE:
            raise ValueError(f"a line has more than {MAX_LINE:,} characters")
        yield line


def _read_csv(path: Path) -> Iterator[dict[str, Any]]:
    with path.open(encoding="utf-8", newline="") as file:
        reader = csv.DictReader(_lines(file))
        if tuple(reader.fieldnames or ()) != COLUMNS:
            raise ValueError(f"its first line is not {','.join(COLUMNS)}")
        yield from reader


def _read_json_lines(path: Path) -> Iterator[dict[str, Any]]:
    with path.open(encoding="utf-8") as file:
        for line in _lines(file):
            values = json.loads(line)
            if not isinstance(values, dict):
                raise ValueError(f"{line[:40].strip()} is not a row")
            yield values


def _read_parquet(path: Path) -> Iterator[dict[str, Any]]:
    require_extra("data", "pyarrow")
    from pyarrow.parquet import ParquetFile

    with ParquetFile(path) as file:
        for batch in file.iter_batches(ROW_GROUP):
            yield from batch.to_pylist()


_READERS = {"csv": _read_csv, "jsonl": _read_json_lines, "metadata": _read_json_lines, "parquet": _read_parquet}
