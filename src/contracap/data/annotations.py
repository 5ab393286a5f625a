"""Entries of sources, and the files of text and JSON that hold them. The formats are in `data.datasets`.

A reader yields an entry for each row, line or image, in the order of the file; a `SkippedEntry` takes the place of one
that cannot be used. `data.sources` then merges entries of the same image.
"""

import codecs
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from contracap.files import check_regular
from contracap.wording import text_problem

Result = TypeVar("Result")


class SourceError(ValueError):
    """A source that cannot be read. The message names it and says what to do."""


class Inside(NamedTuple):
    """Place of an image within a file: a column and row of a Parquet file, or the sample `key` of a tar shard."""

    file: str
    key: str
    row: int | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Entry:
    """An image of a source, with its captions and fields.

    Attributes:
        name: of the image in the source.
        inside: place of its bytes, if it has no file of its own.
        path: of the file, or its URL; set by `read_source`, which knows the folder.
    """

    name: str
    captions: tuple[str, ...] = ()
    fields: dict[str, Any] = field(default_factory=dict)
    inside: Inside | None = None
    path: str = ""


@dataclass(frozen=True, kw_only=True)
class SkippedEntry:
    """A row, line or image that gives no sample: its name in the source, the kind it is counted under, and why."""

    source: str
    kind: str
    message: str


def bad_row(source: str, message: str) -> SkippedEntry:
    """Skip a row, line or object of another layout."""
    return SkippedEntry(source=source, kind="bad_row", message=message)


def number_or_text(identity: Any) -> Any:
    """Return an id as a number, if it is one: data sets write the same id as a number and as a text."""
    if isinstance(identity, float) and identity.is_integer():
        return int(identity)
    return int(identity) if isinstance(identity, str) and re.fullmatch(r"[0-9]{1,18}", identity) else identity


def encoding_of(path: Path) -> str:
    """Return UTF-8, or UTF-16 if the byte order mark says so.

    Raises: OSError: if the file cannot be read, or is a pipe or a device, which may never end.
    """
    check_regular(path)
    with path.open("rb") as file:
        mark = file.read(2)
    return "utf-16" if mark in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE) else "utf-8-sig"


def read_text(path: Path) -> str:
    """Return the text of a file in UTF-8, or in UTF-16 with a byte order mark.

    Raises:
        SourceError: if it is neither.
    """
    try:
        return path.read_text(encoding=encoding_of(path))
    except UnicodeError as error:
        problem = text_problem(error) if isinstance(error, UnicodeDecodeError) else f"not UTF-8 text: {error}"
        raise SourceError(f"{path} is {problem}") from None


def read_lines(path: Path) -> Iterator[tuple[int, str | SkippedEntry]]:
    """Yield the lines of a text file with their numbers, from 1. A line that is not text is skipped."""
    number = 0
    with path.open(encoding=encoding_of(path), errors="surrogateescape") as file:
        try:
            for number, line in enumerate(file, 1):
                yield number, broken_text(f"{path.name}, line {number}", line) or line.rstrip("\n")
        except UnicodeError as error:  # of UTF-16, after which nothing can be read
            source = f"{path.name}, line {number + 1} and the rest"
            yield number + 1, SkippedEntry(source=source, kind="broken_text", message=f"not text: {error}")


def broken_text(source: str, text: str) -> SkippedEntry | None:
    """Skip a text that was decoded with `surrogateescape`, if it had bytes that are not UTF-8."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        byte = ord(text[error.start]) & 0xFF
        return SkippedEntry(
            source=source, kind="broken_text", message=f"not UTF-8 text (byte 0x{byte:02x}): save it as UTF-8"
        )
    return None


def read_json(path: Path) -> Any:
    """Return the content of a JSON file.

    Raises:
        SourceError: if it is not JSON.
    """
    text = read_text(path)
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise SourceError(f"{path} is not JSON: {text_problem(error)}") from None


def read_list(path: Path, name: str) -> tuple[str, ...]:
    """Return the lines of a `.txt` file, or the texts in a JSON file: a list, or an object with such a list.

    Args:
        name: of the list in the object.

    Raises:
        SourceError: if the file holds no such list, or one of its texts is empty.
    """
    content = read_text(path).strip().split("\n") if path.suffix.lower() == ".txt" else read_json(path)
    found = content.get(name) if isinstance(content, dict) else content
    if not isinstance(found, list) or not found or not all(isinstance(text, str) and text.strip() for text in found):
        raise SourceError(
            f"{path} holds no {name}; give a JSON list of texts, an object with a list `{name}`, or a .txt with one a "
            "line"
        )
    return tuple(text.strip() if path.suffix.lower() == ".txt" else text for text in found)


def values_of(path: Path, document: Any, key: str, *, layout: str) -> list[Any]:
    """Return the values under a key of a JSON file's content.

    Raises:
        SourceError: if the file does not have this layout.
    """
    try:
        return list(document[key])
    except (LookupError, TypeError) as error:
        raise _other_layout(path, layout, error) from error


def read_each(
    path: Path, document: Any, key: str, read: Callable[[Any], Result], *, layout: str
) -> Iterator[Result | SkippedEntry]:
    """Yield what `read` makes of each value under a key of a JSON file's content. A value of another layout is skipped.

    Args:
        key: such as `images`; without its last letter it names a value in messages.
        layout: of the file, for messages.

    Raises:
        SourceError: if there are values, and all are of another layout.
    """
    first, good = None, False
    for number, value in enumerate(values_of(path, document, key, layout=layout), 1):
        try:
            result = read(value)
        except (LookupError, TypeError, AttributeError) as error:
            first = first or _other_layout(path, layout, error)
            yield bad_row(f"{path.name}, {key[:-1]} {number}", _problem(error))
        else:
            good = True
            yield result
    if first is not None and not good:
        raise first


def _other_layout(path: Path, layout: str, error: Exception) -> SourceError:
    return SourceError(f"{path} does not have the layout of {layout}: {_problem(error)}")


def _problem(error: Exception) -> str:
    return f"it lacks {error}" if isinstance(error, KeyError) else str(error)
