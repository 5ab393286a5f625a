"""The index of a folder of shards, `index.json`: the size of each shard, its samples, and its captions by length."""

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from contracap.data.remote import open_file
from contracap.files import write_text

INDEX_FILE = "index.json"


class IndexFileError(ValueError):
    """An index that cannot be used; the message names the file."""


@dataclass(frozen=True, kw_only=True)
class ShardEntry:
    """A shard, by the name of its file.

    `samples` counts records, unusable ones too. `caption_lengths` counts captions by their tokens of CLIP's
    tokenizer, start and end included, not cut to any context.
    """

    name: str
    samples: int
    bytes: int
    sha256: str
    captions: int
    caption_lengths: dict[int, int]


def read_index(folder: str | Path) -> dict[str, ShardEntry]:
    """Return the entries by the names of their shards; none if the folder, local or remote, has no index.

    Raises:
        IndexFileError: if there is an index and it cannot be read.
    """
    path = f"{folder}/{INDEX_FILE}".replace(f"//{INDEX_FILE}", f"/{INDEX_FILE}")
    try:
        with open_file(path) as file:
            entries = [_entry(**values) for values in dict(json.loads(file.read()))["shards"]]
    except FileNotFoundError:
        return {}
    except (KeyError, TypeError) as error:
        reason = " ".join(str(error).split())
        raise IndexFileError(
            f"{path} is not an index of shards ({reason}); delete it and index the folder again"
        ) from None
    except Exception as error:  # broken JSON, and the errors of all fsspec file systems
        raise IndexFileError(f"cannot read the index {path}: {error or type(error).__name__}") from error
    return {entry.name: entry for entry in entries}


def _entry(*, caption_lengths: dict[str, int], **values: Any) -> ShardEntry:
    """Build an entry, and check only what decides the order: an index may have a million entries."""
    entry = ShardEntry(caption_lengths={int(length): count for length, count in caption_lengths.items()}, **values)
    if not (isinstance(entry.name, str) and type(entry.samples) is type(entry.bytes) is int and entry.samples >= 0):
        raise TypeError(f"an entry has name {entry.name!r}, samples {entry.samples!r}, bytes {entry.bytes!r}")
    return entry


def write_index(folder: str | Path, entries: Iterable[ShardEntry]) -> None:
    """Write the index of a local folder, sorted by name, whole or not at all."""
    lines = (json.dumps(asdict(entry)) for entry in sorted(entries, key=lambda entry: entry.name))
    write_text(Path(folder) / INDEX_FILE, '{"shards": [\n' + ",\n".join(lines) + "\n]}\n")
