"""What a source says about images, and the files of text and JSON that say it; the formats are in `data.datasets`.

The readers give an entry for each row, line or image, in the order of the file. Which entries mean the same image,
and where it lies, is for `data.sources` to find out.
"""

import codecs
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

Result = TypeVar("Result")


class SourceError(ValueError):
    """A source that cannot be read; the message names it and says what would do."""


class Inside(NamedTuple):
    """Where an image is within a file: in a column and row of a Parquet file, or in the sample `key` of a tar shard."""

    file: str
    key: str
    row: int | None = None


@dataclass(frozen=True, kw_only=True)
class Entry:
    """What a source says about an image.

    Attributes:
        image: its name as it stands there.
        inside: where its bytes are, if it has no file of its own.
    """

    picture: str
    captions: tuple[str, ...] = ()
    fields: dict[str, Any] = field(default_factory=dict)
    inside: Inside | None = None


@dataclass(frozen=True, kw_only=True)
class Refused:
    """What gives no sample: its name in the source, the kind it is counted under, and why."""

    source: str
    kind: str
    message: str


def number_or_text(identity: Any) -> Any:
    """An id by which things are matched: data sets write the same one as a number and as a text."""
    if isinstance(identity, float) and identity.is_integer():
        return int(identity)
    return int(identity) if isinstance(identity, str) and re.fullmatch(r"[0-9]{1,18}", identity) else identity


def encoding_of(path: Path) -> str:
    """UTF-8, or UTF-16 if the byte order mark says so."""
    with path.open("rb") as file:
        mark = file.read(2)
    return "utf-16" if mark in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE) else "utf-8-sig"


def read_text(path: Path) -> str:
    """The text of a file in UTF-8, or in UTF-16 with a byte order mark, without the mark.

    Raises:
        SourceError: if it is neither.
    """
    try:
        return path.read_text(encoding=encoding_of(path))
    except UnicodeError as error:
        raise SourceError(f"{path} is not UTF-8 text: {error}") from None


def read_lines(path: Path) -> Iterator[tuple[int, str | Refused]]:
    """The lines of a text file with their numbers, from 1; of one that is not text, why."""
    number = 0
    with path.open(encoding=encoding_of(path), errors="surrogateescape") as file:
        try:
            for number, line in enumerate(file, 1):
                yield number, refused_text(f"{path.name}, line {number}", line) or line.rstrip("\n")
        except UnicodeError as error:  # of UTF-16, after which nothing can be read
            source = f"{path.name}, line {number + 1} and the rest"
            yield number + 1, Refused(source=source, kind="broken_text", message=f"not text: {error}")


def refused_text(source: str, text: str) -> Refused | None:
    """Why a text cannot be used that was decoded with `surrogateescape`, if it had bytes that are no text."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        byte = ord(text[error.start]) & 0xFF
        return Refused(
            source=source, kind="broken_text", message=f"not UTF-8 text (byte 0x{byte:02x}): save it as UTF-8"
        )
    return None


def read_json(path: Path) -> Any:
    """What a JSON file holds.

    Raises:
        SourceError: if it is not JSON.
    """
    text = read_text(path)
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise SourceError(f"{path} is not JSON: {error}") from None


def other_layout(path: Path, layout: str, error: Exception) -> SourceError:
    """What to raise at JSON of another layout, from the error that it makes a reader run into."""
    return SourceError(f"{path} does not have the layout of {layout}: {_problem(error)}")


def read_list(path: Path, name: str) -> tuple[str, ...]:
    """The texts of a `.txt` file, one a line, or of a JSON file, which holds a list of them, or an object with such a
    list under a name.

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


def each(
    path: Path, values: Any, read: Callable[[Any], Result], *, layout: str, name: str
) -> Iterator[Result | Refused]:
    """What `read` makes of each value of a JSON file; a value of another layout is refused, and the rest follows.

    Args:
        layout: of the file, for messages.
        name: what a value is, such as an image.

    Raises:
        SourceError: if there are values, and all are of another layout.
    """
    first, good = None, False
    for number, value in enumerate(values, 1):
        try:
            result = read(value)
        except (LookupError, TypeError, AttributeError) as error:
            first = first or other_layout(path, layout, error)
            yield Refused(source=f"{path.name}, {name} {number}", kind="bad_row", message=_problem(error))
        else:
            good = True
            yield result
    if first is not None and not good:
        raise first


def _problem(error: Exception) -> str:
    return f"it lacks {error}" if isinstance(error, KeyError) else str(error)
