"""Tar shards: listing, reading and writing them.

A shard is a tar file whose members lie in groups: `folder/key.jpg`, `folder/key.json`, ... make one sample. The
grouping is that of the webdataset library, so shards of img2dataset and others are read as they are.
"""

import gzip
import io
import json
import logging
import os
import re
import sys
import tarfile
from collections.abc import Container, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import IO, Any, cast

from contracap.data.remote import WEB, expand, files_in, opened
from contracap.files import replacing

GZIP_SUFFIXES = (".tar.gz", ".tgz")
SHARD_SUFFIXES = (".tar", *GZIP_SUFFIXES)
PICTURE_SUFFIXES = (  # a sample with several has the first of them
    *("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff", "avif", "ppm"),
    *("jfif", "jpe", "jp2", "j2k", "heic", "heif", "jxl", "ico", "pgm", "pbm", "pnm"),
)
logger = logging.getLogger(__name__)
SAMPLE_SUFFIXES = frozenset((*PICTURE_SUFFIXES, "json", "txt", "cls"))  # of the members that `parse` looks at
MOST_MEMBER_BYTES = 256 * 2**20  # what is larger is no photograph, but may be a few bytes that unfold
META_NAME = re.compile(r"__[^/]*__($|/)")  # webdataset keeps notes about a shard under such names


class ShardError(ValueError):
    """A shard that cannot be read to its end; the message names it, `whole` is how many samples came before."""

    def __init__(self, message: str, *, whole: int = 0) -> None:
        super().__init__(message)
        self.whole = whole


class SampleError(ValueError):
    """A sample that cannot be used; the message names it and says why, `kind` is what it is counted under."""

    def __init__(self, message: str, *, kind: str) -> None:
        super().__init__(message)
        self.kind = kind


@dataclass(frozen=True, kw_only=True, slots=True)
class Record:
    """One group of members as it lies in a shard: lower-case suffix to bytes.

    Attributes:
        repeated: an earlier group of the shard has the same key.
        too_large: suffixes of members that were not read, because they are larger than any picture or text.
    """

    key: str
    members: dict[str, bytes]
    shard: str
    repeated: bool = False
    too_large: list[str] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True, slots=True)
class Sample:
    """One picture, still encoded, with its captions (possibly none) and the fields of its `.json` member.

    A `.cls` member, the label of webdataset's classification shards, becomes the field `label`.

    Attributes:
        npy: the `.npy` member as it lies there, whatever it holds; empty where there is none, or it was not read.
    """

    key: str
    image: bytes
    captions: tuple[str, ...]
    fields: dict[str, Any]
    shard: str
    npy: bytes = b""


def list_shards(paths: str | Path | Sequence[str | Path]) -> list[str]:
    """The shards that a folder, a file, or a list of those stands for, a folder's in the order of their names.

    Args:
        paths: folders, local or remote, are searched for `*.tar`, `*.tar.gz` and `*.tgz`, not their subfolders; of a
            folder on a web server, its `index.json` tells the shards. A URL that ends otherwise than a shard is a
            folder. Braces are ranges and lists, as in `s3://bucket/{00000..00331}.tar`. `pipe:` and a shell command
            is one shard; its braces are ranges and lists too, unless one is neither.

    Raises:
        FileNotFoundError: if a path is empty or does not exist, or a folder or the list holds no shard.
        ValueError: if braces are wrong, or an index is.
        RemoteError: if a remote folder cannot be listed.
    """
    shards = []
    for path in [paths] if isinstance(paths, str | Path) else paths:
        if not path:
            raise FileNotFoundError("the path of the shards is empty; for the working folder give .")
        for name in [str(path)] if os.path.exists(path) else _expanded(str(path)):
            shards += _shards_at(name)
    if not shards:
        raise FileNotFoundError("the list of shards is empty")
    return shards


def _expanded(pattern: str) -> list[str]:
    try:
        return expand(pattern)
    except ValueError:
        if pattern.startswith("pipe:"):  # the braces are the command's own
            return [pattern]
        raise


def _shards_at(name: str) -> list[str]:
    if name.startswith("pipe:") or ("://" in name and _file_part(name).endswith(SHARD_SUFFIXES)):
        return [name]
    if name.startswith(WEB):
        from contracap.data.index import read_index  # which imports this module

        files = [f"{name.rstrip('/')}/{file}" for file in read_index(name)]
        if not files:
            example = f"{name.rstrip('/')}/{{00000..00331}}.tar"
            raise FileNotFoundError(f"{name} has no index.json, and no other listing; name its shards, as in {example}")
    elif "://" in name:
        files = files_in(name)
    elif Path(name).is_dir():
        files = sorted(str(file) for file in Path(name).iterdir())
    elif Path(name).exists():
        return [name]
    else:
        raise FileNotFoundError(f"no such shard or folder of shards: {name}")
    shards = [file for file in files if file.endswith(SHARD_SUFFIXES)]
    if not shards:
        raise FileNotFoundError(f"no shards (*.tar, *.tar.gz, *.tgz) in the folder {name}")
    return shards


def _file_part(url: str) -> str:
    """A URL without what may follow the name of its file on a web server, such as a signature."""
    return re.split(r"[?#]", url, maxsplit=1)[0] if url.startswith(WEB) else url


def samples(shard: str, start: int = 0) -> Iterator[Sample]:
    """The samples of one shard in their order, without the first `start`.

    Raises:
        ShardError: after the last whole sample, if the shard is missing, cut or broken.
        SampleError: at a group without a picture or with an unreadable caption.
    """
    return map(parse, records(shard, start))


def records(shard: str, start: int = 0, *, suffixes: Container[str] | None = None) -> Iterator[Record]:
    """The groups of one shard as they lie there, without the first `start`, which are passed over unread.

    The key is the name up to the first dot behind the last slash. As in webdataset, a new key starts a new group;
    beyond it, so does a suffix that the group already has. Members of other `suffixes` than those given are left empty,
    and so are those of more than `MOST_MEMBER_BYTES`.

    Raises:
        ShardError: after the last whole group, if the shard is missing, cut or broken.
    """
    return islice(_groups(shard, start, suffixes), start, None)


def count_samples(shard: str) -> int:
    """How many groups `records` gives, from the headers alone.

    Raises:
        ShardError: as `records`; it says how many there were before.
    """
    return sum(1 for _ in _groups(shard, sys.maxsize, None))


def parse(record: Record) -> Sample:
    """The sample that a group of members holds. Captions: `captions` of the `.json`, else the `.txt`, else `caption`.

    Raises:
        SampleError: if there is no picture, or the `.json`, `.txt` or `.cls` member is not what it should be.
    """
    members = record.members
    if record.key.startswith("/") or ".." in record.key.split("/"):
        raise SampleError(f"{_name(record)}: its name points out of the folder", kind="unsafe_path")
    if record.repeated:
        raise SampleError(f"{_name(record)}: an earlier sample of the shard has this key", kind="duplicate_key")
    if record.too_large:
        names = ", ".join(record.too_large)
        raise SampleError(f"{_name(record)}: {names} has more than {MOST_MEMBER_BYTES:,} bytes", kind="too_large")
    picture = next((members[suffix] for suffix in PICTURE_SUFFIXES if suffix in members), None)
    if picture is None:
        listed = ", ".join(sorted(members))
        raise SampleError(f"{_name(record)} has no picture (members: {listed})", kind="no_picture")
    try:
        fields = json.loads(members["json"]) if "json" in members else {}
        if not isinstance(fields, dict):
            raise ValueError("the .json member is no object")
        if "cls" in members:
            fields["label"] = int(members["cls"])
        captions = _captions(fields, members.get("txt"))
    except (ValueError, RecursionError) as error:
        raise SampleError(f"{_name(record)}: {error}", kind="broken_text") from error
    return Sample(
        key=record.key,
        image=picture,
        captions=captions,
        fields=fields,
        shard=record.shard,
        npy=members.get("npy", b""),
    )


def write_shard(path: str | Path, records: Iterable[tuple[str, Mapping[str, bytes]]]) -> None:
    """Writes a shard, whole or not at all; the same records make the same bytes.

    Args:
        path: the file; its folder is made if need be. `.gz` and `.tgz` are compressed.
        records: key and members (suffix to bytes) of each sample, such as `("000017", {"jpg": ..., "json": ...})`.

    Raises:
        ValueError: if a key would not be read back, because it is empty or its last part has a dot.
    """
    path = Path(path)
    with replacing(path) as partial, partial.open("wb") as file:
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
                raise ValueError(f"sample key {key!r}: the part behind the last slash must not be empty or have a dot")
            for suffix, content in members.items():
                member = tarfile.TarInfo(f"{key}.{suffix}")
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))


@contextmanager
def _opened(shard: str) -> Generator[tarfile.TarFile, None, None]:
    gzipped = _file_part(shard).endswith(GZIP_SUFFIXES) and not shard.startswith("pipe:")
    with opened(shard) as file, gzip.GzipFile(fileobj=file) if gzipped else nullcontext(file) as stream:
        seeking = file.seekable() and not gzipped  # passes over members without reading them, and reads faster
        with tarfile.open(
            fileobj=cast(IO[bytes], stream), mode="r:" if seeking else "r|", tarinfo=_StrictHeader
        ) as archive:
            yield archive


class _StrictHeader(tarfile.TarInfo):
    """Only the end-of-archive mark ends a shard: `tarfile` by itself takes a broken or missing header for the end."""

    @classmethod
    def fromtarfile(cls, archive: tarfile.TarFile) -> tarfile.TarInfo:  # pyrefly: ignore
        try:
            return super().fromtarfile(archive)
        except tarfile.EOFHeaderError:  # pyrefly: ignore[missing-attribute]
            if any(cast(IO[bytes], archive.fileobj).read(tarfile.BLOCKSIZE)):  # the mark is two blocks of zeros
                raise tarfile.ReadError(f"a block of zeros at byte {archive.offset}, and more behind it") from None
            raise
        except tarfile.HeaderError as error:
            raise tarfile.ReadError(f"{error} at byte {archive.offset}") from error


def _groups(shard: str, unread: int, suffixes: Container[str] | None) -> Iterator[Record]:
    """Every group; the members of the first `unread` are empty."""
    record, begun, keys = None, 0, set[str]()
    try:
        with _opened(shard) as archive:
            for member in archive:
                archive.members.clear()  # type: ignore[attr-defined]  # tarfile would keep every header it has seen
                name = _key_and_suffix(member)
                if name is None:
                    continue
                key, suffix = name
                if record is None or key != record.key or suffix in record.members:
                    if record is not None:
                        yield record
                    record = Record(key=key, members={}, shard=shard, repeated=key in keys)
                    keys.add(key)
                    begun += 1
                wanted = begun > unread and (suffixes is None or suffix in suffixes)
                if wanted and (member.size > MOST_MEMBER_BYTES or member.issparse()):
                    record.too_large.append(suffix)
                    wanted = False
                record.members[suffix] = cast(IO[bytes], archive.extractfile(member)).read() if wanted else b""
    except Exception as error:  # damaged bytes make tarfile and the decompressors raise nearly anything
        whole = max(0, begun - 1)  # the last group begun may lack members
        message = f"cannot read shard {shard} beyond its first {whole} samples: {_reason(error)}"
        raise ShardError(message, whole=whole) from error
    if record is not None:
        yield record


def _key_and_suffix(member: tarfile.TarInfo) -> tuple[str, str] | None:
    """Key and lower-case suffix that a member's name stands for; None if it belongs to no sample."""
    if not member.isreg() or META_NAME.match(member.name):
        return None
    folder, slash, base = member.name.rpartition("/")
    stem, dot, suffix = base.partition(".")
    return (folder + slash + stem, suffix.lower()) if stem and dot else None


def _captions(fields: dict[str, Any], text: bytes | None) -> tuple[str, ...]:
    if fields.get("captions") is not None:
        captions = fields["captions"]
    elif text is not None:
        captions = [text.decode("utf-8")]
    else:
        captions = [fields["caption"]] if fields.get("caption") is not None else []
    if not isinstance(captions, list) or not all(isinstance(caption, str) for caption in captions):
        raise ValueError("captions must be a list of strings")
    return tuple(caption for caption in (caption.strip() for caption in captions) if caption)


def _name(record: Record) -> str:
    return f"sample {record.key} of {record.shard}"


def _reason(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
