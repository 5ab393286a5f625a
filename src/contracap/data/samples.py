"""Samples: an image with its captions and fields, made from the members of a shard that share a key."""

import json
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from contracap.wording import text_problem

IMAGE_SUFFIXES = (  # a sample with several has the first of them
    *("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff", "avif", "ppm"),
    *("jfif", "jpe", "jp2", "j2k", "heic", "heif", "ico", "pgm", "pbm", "pnm"),
)
TEXT_SUFFIXES = ("json", "cls", "txt")
SAMPLE_SUFFIXES = frozenset((*IMAGE_SUFFIXES, *TEXT_SUFFIXES))  # of the members that `parse_record` reads
# A shard can claim any size in a few bytes. `open_tar` has further limits.
MAX_MEMBER_BYTES = 256 * 2**20  # of a member, and of all members of a sample that are read
MAX_TEXT_BYTES = 4 * 2**20  # of a `.json`, `.txt`, `.cls` or `.npy` member
SORT = "write the tar again with `tar --sort=name`"
DOTTED = "dotted_name"  # the kind of samples whose images have names with several dots


class SampleError(ValueError):
    """A sample that cannot be used. The message names it and says why; `kind` is what it is counted under."""

    def __init__(self, message: str, *, kind: str) -> None:
        super().__init__(message)
        self.kind = kind


@dataclass(frozen=True, kw_only=True, slots=True)
class Record:
    """Neighbouring members of a shard that share a key: their bytes by lower-case suffix.

    Attributes:
        repeated: an earlier record of the shard has the same key.
        scattered: an earlier record has the same key and none of these suffixes: the tar file is not sorted.
        too_large: suffixes of members that were not read, because they are larger than any image or text.
    """

    key: str
    members: dict[str, bytes]
    shard: str
    repeated: bool = False
    scattered: bool = False
    too_large: list[str] = field(default_factory=list)

    @property
    def name(self) -> str:
        """Key and shard, for messages."""
        return f"sample {self.key} of {self.shard}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Sample:
    """An encoded image with its captions (possibly none) and the fields of its `.json` member.

    The number in a `.cls` member, webdataset's label of the class, becomes the field `label`.

    Attributes:
        npy: bytes of the `.npy` member; empty if there is none or it was not read.
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
        """Key and shard, for messages."""
        return f"sample {self.key} of {self.shard}"


def parse_record(record: Record, *, lines: bool = True) -> Sample:
    """Return the sample that a record holds.

    Captions come from `captions` in the `.json`, else from the `.txt`, else from `caption` in the `.json`. In JSON,
    both may be a text or a list of texts. A text that cannot be read is noted in the sample's `problem`.

    Args:
        lines: each line of the `.txt` is a caption; otherwise the whole text is one.

    Raises:
        SampleError: if there is no image, it is too large, or the key is unsafe or not unique.
    """
    _check_key(record)
    image = record.members[_image_suffix(record)]
    texts, problems = _read_texts(record)
    fields, written = texts.get("json", {}), texts.get("txt", "")
    if "cls" in texts:
        fields["label"] = texts["cls"]
    candidates = (fields.get("captions"), text_lines(written) if lines else written, fields.get("caption"))
    captions = next(filter(None, map(texts_in, candidates)), ())
    if not captions:
        wrong = [name for name in ("captions", "caption") if not _may_be_texts(fields.get(name))]
        problems += [f"{name} must be a text or a list of texts" for name in wrong]
    return Sample(
        key=record.key,
        image=image,
        captions=captions,
        fields=fields,
        shard=record.shard,
        npy=record.members.get("npy", b""),
        problem="; ".join(problems),
    )


def _check_key(record: Record) -> None:
    if record.key.startswith("/") or ".." in record.key.split("/"):
        raise SampleError(f"{record.name}: its name points out of the folder", kind="unsafe_path")
    if record.scattered:
        members = ", ".join(sorted(record.members))
        reason = f"some of its members ({members}) are not next to the others: {SORT}"
        raise SampleError(f"{record.name}: {reason}", kind="unsorted")
    if record.repeated:
        raise SampleError(f"{record.name}: an earlier sample of the shard has this key", kind="duplicate_key")


def _image_suffix(record: Record) -> str:
    suffix = next((suffix for suffix in IMAGE_SUFFIXES if suffix in record.members), None)
    if suffix is None:
        raise _without_image(record)
    if suffix in record.too_large:
        reason = f"{suffix} has more than {MAX_MEMBER_BYTES:,} bytes, or all that is read of the sample has"
        raise SampleError(f"{record.name}: {reason}", kind="too_large")
    return suffix


def _without_image(record: Record) -> SampleError:
    dotted = next(filter(is_image_suffix, record.members), None)
    if dotted is None:
        return SampleError(
            f"{record.name} has no image (members: {', '.join(sorted(record.members))})", kind="no_picture"
        )
    base, (stem, _, suffix) = record.key.rpartition("/")[2], dotted.rpartition(".")
    reason = (
        f"has an image that is called {base}.{dotted}: a key ends at the first dot of a name, and what follows "
        f"must be the suffix alone. Rename the members, such as {base}_{stem.replace('.', '_')}.{suffix}"
    )
    return SampleError(f"{record.name} {reason}", kind=DOTTED)


def is_image_suffix(suffix: str) -> bool:
    """Return whether the text after the first dot of a member's name ends like the name of an image."""
    return suffix.rpartition(".")[2] in IMAGE_SUFFIXES


def _read_texts(record: Record) -> tuple[dict[str, Any], list[str]]:
    """Return the values of text members by suffix, and why others cannot be read."""
    readers: dict[str, Callable[[bytes], Any]] = {"json": _read_object, "cls": int, "txt": _decode}
    problems = [f".{suffix} has more than {MAX_TEXT_BYTES:,} bytes" for suffix in record.too_large if suffix in readers]
    values = {}
    for suffix, read in readers.items():
        if suffix in record.members and suffix not in record.too_large:
            try:
                values[suffix] = read(record.members[suffix])
            except (ValueError, RecursionError) as error:
                problems.append(f".{suffix}: {text_problem(error)}")
    return values, problems


def _read_object(content: bytes) -> dict[str, Any]:
    value = json.loads(content)
    if not isinstance(value, dict):
        raise ValueError("it is not an object")
    return value


def _decode(content: bytes) -> str:
    return content.decode("utf-8-sig")


def text_lines(text: str) -> list[str]:
    """Split a text at the line ends of any system."""
    return re.split("\r\n?|\n", text)


def texts_in(value: Any) -> tuple[str, ...]:
    """Return the captions in a text or a list of texts, without empty ones and other values."""
    texts = value if isinstance(value, list) else [value]
    stripped = (text.strip() for text in texts if isinstance(text, str))
    return tuple(filter(None, stripped))


def _may_be_texts(value: Any) -> bool:
    texts = value if isinstance(value, list) else [value]
    return value is None or all(isinstance(text, str) for text in texts)
