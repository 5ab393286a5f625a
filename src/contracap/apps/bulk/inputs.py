"""Images that a user names: files, folders, patterns, lists, tar shards and URLs, as one ordered stream."""

import errno
import logging
import os
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from glob import has_magic
from itertools import islice
from pathlib import Path

from contracap.data.image_finder import SkippedFiles, find_folders, find_images, is_image
from contracap.data.remote import WEB
from contracap.data.samples import DOTTED, IMAGE_SUFFIXES, SORT, Record, SampleError, is_image_suffix, parse_record
from contracap.data.shards import ShardError, list_shards, read_records
from contracap.data.source_kinds import TABLE_SUFFIXES
from contracap.data.tar import SHARD_SUFFIXES
from contracap.download import download
from contracap.files import check_regular, path_text, read_regular

logger = logging.getLogger(__name__)
LIST_SUFFIX = ".txt"
ONLY_WEB = "of URLs of images, only http:// and https:// are read: copy the image, and give its path"
WITHOUT_IMAGE = {  # samples of a shard, by the kind of their error: as they are counted
    "no_picture": "sample(s) without an image",
    "unsorted": f"sample(s) whose files are not next to each other ({SORT})",
}
OTHER_IMAGE = "further image(s) of a sample, of which the first is taken"


@dataclass(frozen=True, kw_only=True, slots=True)
class Item:
    """One image, not read yet.

    Attributes:
        name: the path or URL, or shard and key, as outputs have it.
        source: where its bytes are: a file, a URL, themselves; or why there are none.
        listed: the list and line that name it, for the message if there is no such file.
    """

    name: str
    source: Path | str | bytes | Exception
    listed: str = ""

    def content(self) -> bytes:
        """Return the encoded image.

        Raises: OSError, ValueError: if it cannot be read.
        """
        match self.source:
            case Exception() as error:
                raise error
            case bytes() as content:
                return content
            case str() as url:
                return download(url)
            case Path() as path:
                try:
                    return read_regular(path)
                except OSError as error:
                    if not self.listed:
                        raise
                    remark = " (a list has no comments)" if self.name.startswith("#") else ""
                    reason = "no such file" if error.errno == errno.ENOENT else error.strerror
                    raise type(error)(f"{self.listed}: {reason}: {self.name}{remark}") from None


def find_items(paths: Sequence[str], *, recursive: bool = True) -> Generator[Item, None, None]:
    """Yield the images that paths stand for, in order, read from folders, lists and shards only as they are asked for.

    A path is an image file, or its http(s) URL; a folder, whose images come by name and then those of its
    subfolders; a pattern with `*`, `?`, `[...]` and `**`, of images and shards; a tar shard, anywhere that
    `data/remote` reads, with braces as ranges and lists; or a `.txt` file with a path or URL of an image on each line.
    An unreadable path becomes an item whose source is the error. Files that are not images are counted and reported in
    one line at the end.
    """
    passed = SkippedFiles()
    for path in paths:
        try:
            yield from _items_of(path, recursive, passed)
        except (OSError, ValueError) as error:
            yield Item(name=path_text(path), source=error)
    passed.report(", ".join(paths))


def first_items(paths: Sequence[str], *, recursive: bool = True) -> Iterator[Item]:
    """Yield the first image of each path, to know that there are any before a model is loaded.

    Raises:
        FileNotFoundError: if a path does not exist or stands for no image; a shard that holds none, or is broken, is
            told in a warning where there are other paths.
        OSError, ValueError: if one cannot be read.
        ExceptionGroup: of these, if several cannot.
    """
    if not paths:
        raise ValueError("nothing to read: give images, folders, patterns, lists (.txt) or tar shards")
    empty, errors = list[str](), list[Exception]()
    for path in paths:
        try:
            first = _first_at(path, recursive)
        except (OSError, ValueError) as error:
            errors.append(error)
            continue
        if isinstance(first, Item):
            yield first
        else:
            empty.append(first)
    if len(errors) > 1:
        raise ExceptionGroup("paths that cannot be read", errors)
    if errors:
        raise errors[0]
    if len(empty) == len(paths):
        raise FileNotFoundError(empty[0])
    for problem in empty:
        logger.warning(problem)


def _first_at(path: str, recursive: bool) -> Item | str:
    """Return the first image of a path, or why a shard that is there has none."""
    passed, dotted = SkippedFiles(), ""
    with closing(_items_of(path, recursive, passed)) as found:
        try:
            while (first := next(found, None)) is not None and _is_dotted(first.source):
                dotted = dotted or str(first.source)
        except ShardError as error:
            if not Path(path).exists():
                raise
            return str(error)
    if first is None:
        problem = dotted or _nothing_at(path) + (f" (skipped {passed})" if passed.counts else "")
        if path.endswith(SHARD_SUFFIXES):
            return problem
        raise FileNotFoundError(problem)
    if path.endswith(LIST_SUFFIX) and isinstance(first.source, Exception):
        raise first.source
    if path.endswith(LIST_SUFFIX) and isinstance(first.source, Path) and not first.source.is_file():
        if first.source.exists() and not first.source.is_dir():
            check_regular(first.source)
        raise FileNotFoundError(
            f"{path} is not a list of images, a path or URL on each line and no comments: {first.listed} names no "
            f"file, {first.name}"
        )
    return first


def _items_of(path: str, recursive: bool, passed: SkippedFiles) -> Generator[Item, None, None]:
    with closing(_found_at(path, recursive, passed)) as found:
        for each in found:
            if isinstance(each, Item):
                yield each
            else:
                yield from _of_shards(each, passed)


def _found_at(path: str, recursive: bool, passed: SkippedFiles) -> Generator[Item | str, None, None]:
    """The images that a path stands for, and the names of shards, which are not opened."""
    local = Path(path)
    if "://" in path or path.startswith("pipe:"):
        if path.startswith(WEB) and not path.partition("?")[0].endswith(SHARD_SUFFIXES):
            yield Item(name=path_text(path), source=path)
        elif is_image(Path(path.partition("?")[0])):
            raise ValueError(f"{path_text(path)}: {ONLY_WEB}")
        else:
            yield path
    elif local.is_dir():
        for image in find_images(local, passed):
            if not recursive and image.name != str(image):  # those of subfolders come last
                break
            yield _file(local / image)
    elif local.exists():
        check_regular(local)
        if path.endswith(SHARD_SUFFIXES):
            yield path
        elif local.suffix == LIST_SUFFIX:
            yield from _of_list(local)
        elif local.suffix.lower() in TABLE_SUFFIXES:
            raise ValueError(f"{path} is a table, which contracap shards make reads; a list of images is a .txt file")
        else:
            yield _file(local)
    elif has_magic(path):
        for match in _matches(Path(local.anchor), local.relative_to(local.anchor).parts, passed):
            if match.name.endswith(SHARD_SUFFIXES):
                yield str(match)
            elif os.path.isfile(match) and is_image(match):
                yield _file(match)
            else:
                passed.add(match)
    elif path.endswith(SHARD_SUFFIXES):
        yield path
    elif path == "-":
        raise FileNotFoundError("stdin is not read: write the list of images to a .txt file, and name that")
    elif local.is_symlink():
        raise FileNotFoundError(f"{path} is a broken link: {os.readlink(path)} is not there")
    else:
        raise FileNotFoundError(f"no such image or folder: {path}")


def count_items(paths: Sequence[str], *, recursive: bool = True, limit: int | None = None) -> int | None:
    """Return how many images there are; None if there are shards, which say so only once they are read."""
    count = 0
    try:
        for path in paths:
            with closing(_found_at(path, recursive, SkippedFiles())) as found:
                for each in islice(found, limit):
                    if not isinstance(each, Item):
                        return limit
                    count += 1
    except (OSError, ValueError):
        return None
    return count if limit is None else min(count, limit)


def folders_of(paths: Sequence[str]) -> list[Path]:
    """The folders that images are taken from: those that are named, and those in which patterns begin."""
    found = list[Path]()
    for path in paths:
        parts = Path(path).parts
        magic = next((place for place, part in enumerate(parts) if has_magic(part)), None)
        if Path(path).is_dir():
            found.append(Path(path))
        elif magic is not None and "://" not in path and not Path(path).exists():
            found.append(Path(*parts[:magic]))
    return found


def _file(path: Path) -> Item:
    return Item(name=path_text(path), source=path)


def _of_list(path: Path) -> Iterator[Item]:
    with path.open(encoding="utf-8-sig", errors="surrogateescape") as lines:
        for number, line in enumerate(map(str.strip, lines), start=1):
            if line.startswith(WEB):
                yield Item(name=path_text(line), source=line)
            elif "://" in line:
                name = path_text(line)
                yield Item(name=name, source=ValueError(f"{path}, line {number}: {name}: {ONLY_WEB}"))
            elif line:
                yield replace(_file(Path(line)), listed=f"{path}, line {number}")


def _of_shards(path: str, passed: SkippedFiles) -> Iterator[Item]:
    for shard in list_shards(path):
        try:
            yield from images_of(shard, passed)
        except ShardError as error:
            if error.whole == 0:
                raise
            yield Item(name=path_text(shard), source=error)


def images_of(shard: str, passed: SkippedFiles) -> Generator[Item, None, None]:
    """Yield the images of a shard, in order. `passed` counts samples without one, and further images of a sample. If
    the names of all images of a sample have several dots, each is an item that says so.

    Raises: ShardError: after the last whole sample, if the shard is missing, cut or broken.
    """
    for record in read_records(shard, suffixes=IMAGE_SUFFIXES):
        images = {suffix: content for suffix, content in record.members.items() if is_image_suffix(suffix)}
        item = _item_of(record, images)
        kind = item.source.kind if isinstance(item.source, SampleError) else ""
        if kind in WITHOUT_IMAGE:
            passed.counts[WITHOUT_IMAGE[kind]] += 1
        elif _is_dotted(item.source):
            yield from (_dotted(f"{item.name}.{path_text(suffix)}") for suffix in images)
        else:
            if len(images) > 1:
                passed.counts[OTHER_IMAGE] += len(images) - 1
            yield item


def _dotted(name: str) -> Item:
    """Return the item of an image whose name has several dots."""
    stem, _, suffix = name.rpartition("/")[2].rpartition(".")
    right = f"{stem.replace('.', '_')}.{suffix}"
    reason = f"a name in a shard may have one dot, the one before its suffix: rename it, such as {right}"
    return Item(name=name, source=SampleError(f"{name}: {reason}", kind=DOTTED))


def _is_dotted(source: object) -> bool:
    return isinstance(source, SampleError) and source.kind == DOTTED


def _item_of(record: Record, images: dict[str, bytes]) -> Item:
    """The image of a sample; the item says why if it has none that can be used. Its texts may lie anywhere."""
    name = path_text(f"{record.shard}/{record.key}")
    if record.scattered and images:
        record = replace(record, scattered=False, repeated=False)
    try:
        return Item(name=name, source=parse_record(replace(record, members=images)).image)
    except SampleError as error:
        return Item(name=name, source=error)


def _matches(folder: Path, parts: Sequence[str], passed: SkippedFiles) -> Iterator[Path]:
    """Yield what a pattern finds in a folder, by name, nothing hidden. One folder's names are in memory at a time."""
    if not parts:
        yield folder
        return
    part, rest = parts[0], parts[1:]
    if not has_magic(part):
        if os.path.exists(folder / part):
            yield from _matches(folder / part, rest, passed)
    elif part == "**":
        if os.path.isdir(folder):
            for place, _ in find_folders(folder, passed):
                yield from _matches(folder / place, rest or ("*",), passed)
    elif os.path.isdir(folder):
        try:
            names = sorted(os.listdir(folder))
        except OSError:
            passed.counts["unreadable folder"] += 1
            return
        for name in names:
            if fnmatchcase(name, part) and not name.startswith("."):
                yield from _matches(folder / name, rest, passed)


def _nothing_at(path: str) -> str:
    if Path(path).is_dir():
        shards = any(name.endswith(SHARD_SUFFIXES) for name in os.listdir(path))
        return f"no images in the folder {path}" + (f"; for its tar shards write {path}/*.tar" if shards else "")
    return f"no images at {path}"
