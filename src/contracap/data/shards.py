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
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import IO, Any, cast

from contracap.data.remote import WEB, expand, files_in
from contracap.data.tar import GZIP_SUFFIXES, file_part, is_tar, open_tar
from contracap.files import replacing
from contracap.wording import counted

SHARD_SUFFIXES = (".tar", *GZIP_SUFFIXES)
PICTURE_SUFFIXES = (  # a sample with several has the first of them
    *("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff", "avif", "ppm"),
    *("jfif", "jpe", "jp2", "j2k", "heic", "heif", "ico", "pgm", "pbm", "pnm"),
)
logger = logging.getLogger(__name__)
TEXT_SUFFIXES = ("json", "txt", "cls")
SAMPLE_SUFFIXES = frozenset((*PICTURE_SUFFIXES, *TEXT_SUFFIXES))  # of the members that `parse` looks at
# What one sample may cost, besides what `open_tar` allows it. A shard can claim anything in a few bytes.
MAX_MEMBER_BYTES = 256 * 2**20  # of a member, and of all that are read together
MAX_TEXT_BYTES = 4 * 2**20  # of a `.json`, `.txt`, `.cls` or `.npy` member
SORT = "write the tar again with `tar --sort=name`"
DOTTED = "dotted_name"  # the kind of samples whose images have names with several dots
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
        scattered: and none of these suffixes, as where members of one sample do not lie side by side.
        too_large: suffixes of members that were not read, because they are larger than any image or text.
    """

    key: str
    members: dict[str, bytes]
    shard: str
    repeated: bool = False
    scattered: bool = False
    too_large: list[str] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True, slots=True)
class Sample:
    """One image, still encoded, with its captions (possibly none) and the fields of its `.json` member.

    A `.cls` member with a number, the label of webdataset's classification shards, becomes the field `label`.

    Attributes:
        npy: the `.npy` member as it lies there, whatever it holds; empty where there is none, or it was not read.
        problem: why a text could not be read; empty if all could.
    """

    key: str
    image: bytes
    captions: tuple[str, ...]
    fields: dict[str, Any]
    shard: str
    npy: bytes = b""
    problem: str = ""

    @property
    def name(self) -> str:
        """What messages call it."""
        return f"sample {self.key} of {self.shard}"


def list_shards(paths: str | Path | Sequence[str | Path], *, key: str = "") -> list[str]:
    """The shards that a folder, a file, or a list of those stands for, a folder's in the order of their names.

    Args:
        paths: folders, local or remote, are searched for `*.tar`, `*.tar.gz` and `*.tgz`, not their subfolders; of a
            folder on a web server, its `index.json` tells the shards. A URL that ends otherwise than a shard is a
            folder. Braces are ranges and lists, as in `s3://bucket/{00000..00331}.tar`. `pipe:` and a shell command
            is one shard; its braces are ranges and lists too, unless one is neither.
        key: of a recipe, or the option, that names the paths; errors begin with it.

    Raises:
        FileNotFoundError: if a path is empty or does not exist, or a folder or the list holds no shard.
        ShardError: if a file that is not called like a shard is not a tar file.
        ValueError: if braces are wrong, or an index is.
        RemoteError: if a remote folder cannot be listed.
    """
    shards, key = [], f"{key}: " if key else ""
    for path in [paths] if isinstance(paths, str | Path) else paths:
        if not path:
            raise FileNotFoundError(f"{key}the path of the shards is empty; for the working folder give .")
        for name in [str(path)] if os.path.exists(path) else _expanded(str(path)):
            shards += _shards_at(name, key)
    if not shards:
        raise FileNotFoundError(f"{key}the list of shards is empty")
    return shards


def _expanded(pattern: str) -> list[str]:
    try:
        return expand(pattern)
    except ValueError:
        if pattern.startswith("pipe:"):  # the braces are the command's own
            return [pattern]
        raise


def _shards_at(name: str, key: str) -> list[str]:
    if name.startswith("pipe:") or ("://" in name and file_part(name).endswith(SHARD_SUFFIXES)):
        return [name]
    if name.startswith(WEB):
        from contracap.data.index import read_index  # which imports this module

        files = [f"{name.rstrip('/')}/{file}" for file in read_index(name)]
        if not files:
            example = f"{name.rstrip('/')}/{{00000..00331}}.tar"
            raise FileNotFoundError(
                f"{key}{name} has no index.json, and no other listing; name its shards, as in {example}"
            )
    elif "://" in name:
        files = files_in(name)
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


def samples(shard: str, start: int = 0, *, lines: bool = True) -> Iterator[Sample]:
    """The samples of one shard in their order, without the first `start`. Groups without an image are passed over, and
    counted in one warning.

    Args:
        lines: as in `parse`.

    Raises:
        ShardError: after the last whole sample, if the shard is missing, cut or broken.
        SampleError: at a sample that cannot be used.
    """
    passed_over = list[str]()
    for record in records(shard, start, suffixes=SAMPLE_SUFFIXES | {"npy"}):
        try:
            yield parse(record, lines=lines)
        except SampleError as error:
            if error.kind != "no_picture":
                raise
            passed_over.append(str(error))
    if passed_over:
        logger.warning("passed over %d groups without an image; the first: %s", len(passed_over), passed_over[0])


def records(shard: str, start: int = 0, *, suffixes: Container[str] | None = None) -> Iterator[Record]:
    """The groups of one shard as they lie there, without the first `start`, which are passed over unread.

    The key is the name up to the first dot after the last slash. As in webdataset, a new key starts a new group;
    beyond it, so does a suffix that the group already has. Members of other `suffixes` than those given are left empty,
    and so are those that are too large.

    Raises:
        ShardError: after the last whole group, if the shard is missing, cut or broken, or a group costs more than one
            sample may.
    """
    return islice(_groups(shard, start, suffixes), start, None)


def count_samples(shard: str) -> int:
    """How many groups `records` gives, from the headers alone.

    Raises:
        ShardError: as `records`; it says how many there were before.
    """
    return sum(1 for _ in _groups(shard, sys.maxsize, None))


def layout_fault(shard: str) -> str:
    """What is wrong with the order of a local shard's members, a sentence that begins with a blank; "" if nothing is,
    or that cannot be told."""
    try:
        scattered = os.path.isfile(shard) and any(record.scattered for record in _groups(shard, sys.maxsize, None))
    except ShardError:
        return ""
    return f" In {shard} the members of one sample do not lie side by side: {SORT}." if scattered else ""


def parse(record: Record, *, lines: bool = True) -> Sample:
    """The sample that a group of members holds.

    Of `captions` in the `.json`, the `.txt` and `caption` in the `.json`, the first with a caption counts; each may be
    a text, or in JSON a list of texts. A text that cannot be read is a `problem` of the sample, for who misses it.

    Args:
        lines: each line of the `.txt` is a caption; else the whole is one.

    Raises:
        SampleError: if there is no image, it is too large, or the key is not one of this sample alone.
    """
    members, name = record.members, f"sample {record.key} of {record.shard}"
    if record.key.startswith("/") or ".." in record.key.split("/"):
        raise SampleError(f"{name}: its name points out of the folder", kind="unsafe_path")
    if record.scattered:
        reason = f"some of its members ({', '.join(sorted(members))}) do not lie beside the others: {SORT}"
        raise SampleError(f"{name}: {reason}", kind="unsorted")
    if record.repeated:
        raise SampleError(f"{name}: an earlier sample of the shard has this key", kind="duplicate_key")
    suffix = next((suffix for suffix in PICTURE_SUFFIXES if suffix in members), None)
    if suffix is None:
        raise _without_picture(name, record)
    if suffix in record.too_large:
        reason = f"{suffix} has more than {MAX_MEMBER_BYTES:,} bytes, or all that is read of the sample has"
        raise SampleError(f"{name}: {reason}", kind="too_large")
    problems = [f".{text} has more than {MAX_TEXT_BYTES:,} bytes" for text in record.too_large if text in TEXT_SUFFIXES]

    def read(suffix: str, reader: Callable[[bytes], Any]) -> Any:
        """What a member says; None if there is none, or it cannot be read."""
        if suffix not in members or suffix in record.too_large:
            return None
        try:
            return reader(members[suffix])
        except (ValueError, RecursionError) as error:
            problems.append(f".{suffix}: {error}")
            return None

    fields = read("json", _object) or {}
    label = read("cls", int)
    text = read("txt", lambda content: content.decode("utf-8-sig"))
    if label is not None:
        fields["label"] = label
    written = text_lines(text or "") if lines else [text]
    captions = next(filter(None, map(texts_in, (fields.get("captions"), written, fields.get("caption")))), ())
    if not captions:
        wrong = [name for name in ("captions", "caption") if not _may_be_texts(fields.get(name))]
        problems += [f"{name} must be a text or a list of texts" for name in wrong]
    return Sample(
        key=record.key,
        image=members[suffix],
        captions=captions,
        fields=fields,
        shard=record.shard,
        npy=members.get("npy", b""),
        problem="; ".join(problems),
    )


def text_lines(text: str) -> list[str]:
    """The lines of a text file, whose ends are those of any system."""
    return re.split("\r\n?|\n", text)


def texts_in(value: Any) -> tuple[str, ...]:
    """The captions that a value holds, a text or a list of texts, without empty ones and what is not text."""
    found = value if isinstance(value, list) else [value]
    stripped = (text.strip() for text in found if isinstance(text, str))
    return tuple(text for text in stripped if text)


def _object(content: bytes) -> dict[str, Any]:
    found = json.loads(content)
    if not isinstance(found, dict):
        raise ValueError("it is not an object")
    return found


def _may_be_texts(value: Any) -> bool:
    return (
        value is None or isinstance(value, str) or (isinstance(value, list) and all(isinstance(x, str) for x in value))
    )


def is_image_suffix(suffix: str) -> bool:
    """Whether what follows the first dot of a member's name ends as the name of an image does."""
    return suffix.rpartition(".")[2] in PICTURE_SUFFIXES


def _without_picture(name: str, record: Record) -> SampleError:
    dotted = next(filter(is_image_suffix, record.members), None)
    if dotted is not None:
        base, (stem, _, suffix) = record.key.rpartition("/")[2], dotted.rpartition(".")
        reason = (
            f"has an image that is called {base}.{dotted}: a key ends at the first dot of a name, and what follows "
            f"must be the suffix alone. Rename the members, such as {base}_{stem.replace('.', '_')}.{suffix}"
        )
        return SampleError(f"{name} {reason}", kind=DOTTED)
    return SampleError(f"{name} has no image (members: {', '.join(sorted(record.members))})", kind="no_picture")


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
                raise ValueError(f"sample key {key!r}: the part after the last slash must not be empty or have a dot")
            for suffix, content in members.items():
                member = tarfile.TarInfo(f"{key}.{suffix}")
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))


def _groups(shard: str, unread: int, suffixes: Container[str] | None) -> Iterator[Record]:
    """Every group; the members of the first `unread` are empty."""
    record, begun, size = None, 0, 0
    seen = dict[str, frozenset[str]]()  # the suffixes of each key
    kinds = dict[frozenset[str], frozenset[str]]()  # few, so each is kept once

    def whole(record: Record) -> Record:
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
                        yield whole(record)
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
        complete = max(0, begun - 1)  # the last group begun may lack members
        beyond = f" beyond its first {counted(complete, 'sample(s)')}" if complete else ""
        message = f"cannot read shard {shard}{beyond}: {_reason(error)}"
        raise ShardError(message, whole=complete) from error
    if record is not None:
        yield whole(record)


def _key_and_suffix(member: tarfile.TarInfo) -> tuple[str, str] | None:
    """Key and lower-case suffix that a member's name stands for; None if it belongs to no sample."""
    if not member.isreg() or META_NAME.match(member.name):
        return None
    folder, slash, base = member.name.rpartition("/")
    stem, dot, suffix = base.partition(".")
    return (folder + slash + stem, suffix.lower()) if stem and dot else None


def _reason(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
