"""Tar shards: list, read and write them.

The members of a shard are grouped by key: `folder/key.jpg`, `folder/key.json`, ... make one sample. The grouping is
that of webdataset, so shards of img2dataset and others are read as they are.
"""

import gzip
import io
import logging
import os
import re
import sys
import tarfile
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import IO, cast

from contracap.data.index import read_index
from contracap.data.patterns import expand
from contracap.data.remote import WEB, list_files
from contracap.data.samples import (
    MAX_MEMBER_BYTES,
    MAX_TEXT_BYTES,
    SAMPLE_SUFFIXES,
    SORT,
    TEXT_SUFFIXES,
    Record,
    Sample,
    SampleError,
    parse_record,
)
from contracap.data.tar import GZIP_SUFFIXES, SHARD_SUFFIXES, file_part, is_tar, open_tar
from contracap.files import replace_file
from contracap.wording import counted

META_NAME = re.compile(r"__[^/]*__($|/)")  # webdataset keeps notes about a shard under such names
logger = logging.getLogger(__name__)


class ShardError(ValueError):
    """A shard that cannot be read to its end. The message names it; `whole` counts the samples before the damage."""

    def __init__(self, message: str, *, whole: int = 0) -> None:
        super().__init__(message)
        self.whole = whole


def list_shards(paths: str | Path | Sequence[str | Path], *, key: str = "") -> list[str]:
    """Return the shards that a folder, a file, or a list of those stands for. A folder's are sorted by name.

    Args:
        paths: local and remote folders are searched for `*.tar`, `*.tar.gz` and `*.tgz`, without their subfolders.
            The shards of a folder on a web server are those in its `index.json`. A URL without the suffix of a shard
            is a folder. Braces are ranges and lists, as in `s3://bucket/{00000..00331}.tar`. `pipe:` and a shell
            command is one shard; its braces are expanded unless one is neither range nor list.
        key: of the recipe, or the option, that names the paths; errors begin with it.

    Raises:
        FileNotFoundError: if a path is empty or does not exist, or a folder or the list holds no shard.
        ShardError: if a file without the suffix of a shard is not a tar file.
        ValueError: if braces or an index are wrong.
        RemoteError: if a remote folder cannot be listed.
    """
    shards, key = [], f"{key}: " if key else ""
    for path in [paths] if isinstance(paths, str | Path) else paths:
        if not path:
            raise FileNotFoundError(f"{key}the path of the shards is empty; for the working folder give .")
        for name in [str(path)] if os.path.exists(path) else _expand(str(path)):
            shards += _shards_at(name, key)
    if not shards:
        raise FileNotFoundError(f"{key}the list of shards is empty")
    return shards


def _expand(pattern: str) -> list[str]:
    try:
        return expand(pattern)
    except ValueError:
        if pattern.startswith("pipe:"):  # the braces are the command's own
            return [pattern]
        raise


def _shards_at(name: str, key: str) -> list[str]:
    """Return the shards at a path without braces."""
    if name.startswith("pipe:") or ("://" in name and file_part(name).endswith(SHARD_SUFFIXES)):
        return [name]
    if name.startswith(WEB):
        files = [f"{name.rstrip('/')}/{file}" for file in read_index(name)]
        if not files:
            example = f"{name.rstrip('/')}/{{00000..00331}}.tar"
            raise FileNotFoundError(
                f"{key}{name} has no index.json, and no other listing; name its shards, as in {example}"
            )
    elif "://" in name:
        files = list_files(name)
    elif Path(name).is_dir():
        files = sorted(str(file) for file in Path(name).iterdir())
        files = [f"./{file}" if file.startswith("pipe:") else file for file in files]  # a name is not a command
    elif Path(name).exists():
        if os.path.isfile(name) and not name.endswith(SHARD_SUFFIXES) and not is_tar(name):
            make = f"make shards from it: contracap shards make {name!r} --out DIR"
            raise ShardError(f"{key}{name!r} is not a tar shard; {make}")
        return [name]
    else:
        raise FileNotFoundError(f"{key}no such shard or folder of shards: {name}")
    shards = [file for file in files if file.endswith(SHARD_SUFFIXES)]
    if not shards:
        raise FileNotFoundError(
            f"{key}no shards (*.tar, *.tar.gz, *.tgz) in the folder {name}: make some with contracap shards make"
        )
    return shards


def read_samples(shard: str, start: int = 0, *, lines: bool = True) -> Iterator[Sample]:
    """Yield the samples of a shard in order, from number `start` on. Records without an image are left out, and
    counted in one warning.

    Args:
        lines: as in `parse_record`.

    Raises:
        ShardError: after the last whole sample, if the shard is missing, cut or broken.
        SampleError: at a sample that cannot be used.
    """
    without_image = list[str]()
    for record in read_records(shard, start, suffixes=SAMPLE_SUFFIXES | {"npy"}):
        try:
            yield parse_record(record, lines=lines)
        except SampleError as error:
            if error.kind != "no_picture":
                raise
            without_image.append(str(error))
    if without_image:
        logger.warning("skipped %d samples without an image; the first: %s", len(without_image), without_image[0])


def read_records(shard: str, start: int = 0, *, suffixes: Container[str] | None = None) -> Iterator[Record]:
    """Yield the records of a shard in order, from number `start` on. Those before it are not read.

    The key is the name up to the first dot after the last slash. As in webdataset, a new key starts a new record. So
    does a suffix that the record already has. Members that are too large, or have other than the given `suffixes`,
    are left empty.

    Raises:
        ShardError: after the last whole record, if the shard is missing, cut or broken, or a record is too large.
    """
    return islice(_records(shard, start, suffixes), start, None)


def count_samples(shard: str) -> int:
    """Return the number of records, from the headers alone.

    Raises:
        ShardError: as `read_records`.
    """
    return sum(1 for _ in _records(shard, sys.maxsize, None))


def layout_fault(shard: str) -> str:
    """Return a sentence, after a blank, if the members of a local shard are not sorted by sample; otherwise ""."""
    try:
        scattered = os.path.isfile(shard) and any(record.scattered for record in _records(shard, sys.maxsize, None))
    except ShardError:
        return ""
    return f" In {shard} the members of one sample do not lie side by side: {SORT}." if scattered else ""


def _records(shard: str, unread: int, suffixes: Container[str] | None) -> Iterator[Record]:
    """Yield every record; the members of the first `unread` are empty."""
    record, begun, size = None, 0, 0
    seen = dict[str, frozenset[str]]()  # the suffixes of each key
    kinds = dict[frozenset[str], frozenset[str]]()  # few, so each is kept once

    def compare(record: Record) -> Record:
        """Mark a record whose key came before."""
        found, earlier = frozenset(record.members), seen.get(record.key)
        seen[record.key] = kinds.setdefault(found, found)
        return record if earlier is None else replace(record, repeated=True, scattered=earlier.isdisjoint(found))

    try:
        with open_tar(shard) as (archive, metered):
            for member in archive:
                archive.members.clear()  # type: ignore[attr-defined]  # tarfile would keep every header it has seen
                key, suffix = _key_and_suffix(member) or (None, "")
                if key is not None and (record is None or key != record.key or suffix in record.members):
                    if record is not None:
                        yield compare(record)
                    metered.begin_sample()
                    record, size = Record(key=key, members={}, shard=shard), 0
                    begun += 1
                wanted = key is not None and begun > unread and (suffixes is None or suffix in suffixes)
                if record is not None and wanted:
                    limit = MAX_TEXT_BYTES if suffix in (*TEXT_SUFFIXES, "npy") else MAX_MEMBER_BYTES - size
                    if member.size > limit or member.issparse():
                        record.too_large.append(suffix)
                        wanted = False
                metered.charge(member, wanted=wanted)
                if record is not None and key is not None:
                    record.members[suffix] = cast(IO[bytes], archive.extractfile(member)).read() if wanted else b""
                    size += len(record.members[suffix])
    except Exception as error:  # damaged bytes make tarfile and the decompressors raise nearly anything
        whole = max(0, begun - 1)  # the last record begun may lack members
        beyond = f" beyond its first {counted(whole, 'sample(s)')}" if whole else ""
        told = error.strerror if isinstance(error, OSError) and error.filename else str(error)
        reason = " ".join(str(told).split()) or type(error).__name__
        raise ShardError(f"cannot read shard {shard}{beyond}: {reason}", whole=whole) from error
    if record is not None:
        yield compare(record)


def _key_and_suffix(member: tarfile.TarInfo) -> tuple[str, str] | None:
    """Return the key and the lower-case suffix of a member; None if it belongs to no sample."""
    if not member.isreg() or META_NAME.match(member.name):
        return None
    folder, slash, base = member.name.rpartition("/")
    stem, dot, suffix = base.partition(".")
    return (folder + slash + stem, suffix.lower()) if stem and dot else None


def write_shard(path: str | Path, records: Iterable[tuple[str, Mapping[str, bytes]]]) -> None:
    """Write a shard, whole or not at all. The same records give the same bytes.

    Args:
        path: the file; its folder is made if need be. `.gz` and `.tgz` are compressed.
        records: key and members (suffix to bytes) of each sample, such as `("000017", {"jpg": ..., "json": ...})`.

    Raises:
        ValueError: if a key would not be read back, because it is empty or its last part has a dot.
    """
    path = Path(path)
    with replace_file(path) as partial, partial.open("wb") as file:
        if path.name.endswith(GZIP_SUFFIXES):
            with gzip.GzipFile(filename="", fileobj=file, mode="wb", mtime=0) as compressed:
                _write(compressed, records)
        else:
            _write(file, records)


def _write(stream: io.BufferedIOBase, records: Iterable[tuple[str, Mapping[str, bytes]]]) -> None:
    with tarfile.open(fileobj=cast(IO[bytes], stream), mode="w") as archive:
        for key, members in records:
            base = key.rpartition("/")[2]
            if not base or "." in base:
                raise ValueError(f"sample key {key!r}: the part after the last slash must not be empty or have a dot")
            for suffix, content in members.items():
                member = tarfile.TarInfo(f"{key}.{suffix}")
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
