"""Sources of images with captions or questions, each read into entries that are ready to become samples."""

import os
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Literal
from unicodedata import normalize

from contracap.data.annotations import Entry, Inside, SkippedEntry, SourceError, read_json
from contracap.data.datasets.bulk_captions import read_bulk
from contracap.data.datasets.coco import read_coco, read_karpathy
from contracap.data.datasets.flickr import read_flickr
from contracap.data.datasets.folder import CAPTION_SUFFIXES, read_folder
from contracap.data.datasets.imagefolder import read_imagefolder
from contracap.data.datasets.tables import IMAGE_COLUMNS, read_table
from contracap.data.datasets.vqa import read_vqa
from contracap.data.image_finder import SkippedFiles, find_files, find_images, is_image
from contracap.data.samples import IMAGE_SUFFIXES
from contracap.data.source_kinds import Kind, detect_kind, require_readable
from contracap.files import check_regular

NAMES_IMAGES = ("table", "coco", "karpathy", "flickr", "vqa", "bulk")  # kinds whose images may be in another folder
NAMES_TRIED = 100  # of a table's images, to find out where its names start


@dataclass(frozen=True, kw_only=True)
class SourceContents:
    """The entries of a source in order, and what was skipped."""

    kind: Kind
    entries: list[Entry]
    skipped: list[SkippedEntry]


def read_source(
    path: str | Path,
    *,
    kind: Kind | Literal["auto"] = "auto",
    images: str | Path | None = None,
    splits: Sequence[str] = (),
    image_column: str | None = None,
    caption_columns: Sequence[str] = (),
    caption_lines: bool = True,
) -> SourceContents:
    """Read a source, but not its images. An image takes about 1 kB of memory.

    Entries of the same image become one, in the place of the first, with its fields and the captions of all. A name
    must not lead out of the folder of images. In a table it may: absolute paths and URLs are usual there.

    Args:
        path: a folder or a file.
        kind: of the source; "auto" finds out.
        images: the folder where names start; by default the file's own or, of a table, also the working folder. Of
            `bulk`, the folder of the shards, if they have moved.
        splits: those to take of Karpathy's JSON, of a table with the column `split`, or of a folder of Parquet files;
            none: all.
        image_column: of a table, the column with paths or URLs, if it does not have a usual name.
        caption_columns: of a table or of metadata, the columns with captions, if they do not have usual names.
        caption_lines: each line of a text file next to an image is a caption; otherwise the whole text is.

    Raises:
        FileNotFoundError: if the source or the folder of images does not exist.
        SourceError: if the source is not of the kind or holds nothing, or an option does not apply to it.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"no such source: {path}")
    if not path.is_dir():
        check_regular(path)
        require_readable(path)
    if kind == "auto":
        kind = detect_kind(path)
    for option, given, kinds in (
        ("--pictures", images, NAMES_IMAGES),
        ("--split", splits, ("karpathy", "table")),
        ("--image-column", image_column, ("table", "imagefolder")),
        ("--caption-column", caption_columns, ("table", "imagefolder")),
        ("--no-caption-lines", not caption_lines, ("folder", "bulk")),
    ):
        if given and kind not in kinds:
            raise SourceError(f"{option} is for {', '.join(kinds)}; {path} is read as {kind}")
    folder = Path(images) if images else path if path.is_dir() else path.parent
    if not folder.is_dir():
        raise FileNotFoundError(f"no such folder of images: {folder}")
    if kind in ("table", "imagefolder"):
        entries = _read_tables(path, kind, image_column, caption_columns, splits)
    else:
        entries = _read_entries(path, kind, folder, splits, caption_lines, moved=bool(images))
    contents = _merge(entries, kind, folder, may_be_elsewhere=kind == "table" and not images)
    if not contents.entries and not contents.skipped:
        raise SourceError(f"{path}, read as {kind}, holds nothing")
    return contents


def find_image(entry: Entry) -> Path | None:
    """Return the file of an entry that is neither a URL nor inside a file; None if there is no such file.

    The name is tried unchanged, composed and decomposed (é as one letter or two), with slashes in place of
    backslashes, and, if it has no suffix, with every suffix of images.
    """
    name = entry.path
    spellings = [name, normalize("NFC", name), normalize("NFD", name), name.replace("\\", "/")]
    if not is_image(Path(name)):
        spellings += [f"{name}.{suffix}" for suffix in IMAGE_SUFFIXES]
    return next((Path(spelling) for spelling in spellings if os.path.isfile(spelling)), None)


def _read_entries(
    path: Path, kind: Kind, folder: Path, splits: Sequence[str], caption_lines: bool, *, moved: bool
) -> Iterator[Entry | SkippedEntry]:
    """Return the entries of a source without columns to choose from."""
    match kind:
        case "folder":
            return read_folder(path, caption_lines)
        case "flickr":
            return read_flickr(path)
        case "coco":
            return read_coco(path, read_json(path))
        case "karpathy":
            return read_karpathy(path, read_json(path), splits)
        case "vqa":
            return read_vqa(path, read_json(path), (file.as_posix() for file in find_images(folder)))
        case _:
            return (entry for table in _tables(path) for entry in read_bulk(table, folder if moved else None))


def _read_tables(
    path: Path, kind: Kind, image_column: str | None, caption_columns: Sequence[str], splits: Sequence[str]
) -> Iterator[Entry | SkippedEntry]:
    """Yield the rows of tables or of the metadata of an imagefolder."""
    if kind == "imagefolder":
        yield from read_imagefolder(path, image_column, caption_columns)
        return
    image_columns = (image_column,) if image_column else IMAGE_COLUMNS
    row_splits = () if path.is_dir() else splits
    for table in _tables(path, splits):
        yield from read_table(table, image_columns=image_columns, caption_columns=caption_columns, splits=row_splits)


def _tables(path: Path, splits: Sequence[str] = ()) -> list[Path]:
    """Return the table, or the Parquet files in a folder whose names hold one of the splits."""
    if not path.is_dir():
        return [path]
    found = [file for file in find_files(path, SkippedFiles()) if file.suffix.lower() == ".parquet"]
    for split in splits:
        if not any(split in _words(file) for file in found):
            raise SourceError(f"{path} has no Parquet file of the split {split}, but {', '.join(map(str, found[:20]))}")
    return [path / file for file in found if not splits or set(splits) & set(_words(file))]


def _words(file: Path) -> list[str]:
    return re.split(r"[^A-Za-z0-9]+", file.as_posix())


def _merge(
    entries: Iterable[Entry | SkippedEntry], kind: Kind, folder: Path, *, may_be_elsewhere: bool
) -> SourceContents:
    """Join the captions of entries with the same image, and find out where each image is."""
    skipped, first, captions = list[SkippedEntry](), dict[str | Inside, Entry](), dict[str | Inside, list[str]]()
    found = list[Entry]()
    for each in entries:
        if isinstance(each, SkippedEntry):
            skipped.append(each)
        else:
            found.append(each)
    relative = (entry.name for entry in found if entry.inside is None and not os.path.isabs(entry.name))
    names = list(islice(relative, NAMES_TRIED))
    if (
        may_be_elsewhere
        and any(map(os.path.isfile, names))
        and not any(os.path.isfile(folder / name) for name in names)
    ):
        folder = Path()  # where `caption` ran that wrote the table, say
    for entry in found:
        key = entry.inside or _same_place(entry.name, folder, kind)
        first.setdefault(key, entry)
        captions.setdefault(key, []).extend(entry.captions)
    merged = []
    for key, entry in first.items():
        if problem := _problem(entry.name, bool(captions[key]), kind, folder):
            skipped.append(problem)
        else:
            is_url = kind == "table" and "://" in entry.name
            path = entry.inside.file if entry.inside else entry.name if is_url else str(folder / entry.name)
            merged.append(replace(entry, path=path, captions=tuple(captions[key])))
    return SourceContents(kind=kind, entries=merged, skipped=skipped)


def _same_place(name: str, folder: Path, kind: Kind) -> str:
    """Return one text for all spellings of a name: `a.jpg`, `./a.jpg`, and the path from the root."""
    if "://" in name or (kind not in ("table", "bulk") and (os.path.isabs(name) or ".." in re.split(r"[/\\]", name))):
        return name
    return os.path.abspath(folder / name)


def _problem(name: str, has_captions: bool, kind: Kind, folder: Path) -> SkippedEntry | None:
    """Skip an image whose name leads out of the folder, or that has no caption."""
    if kind not in ("table", "bulk") and (os.path.isabs(name) or ".." in re.split(r"[/\\]", name)):
        message = f"the name leads out of the folder of images, {folder}"
        return SkippedEntry(source=name, kind="unsafe_path", message=message)
    if has_captions or kind == "vqa":
        return None
    message = "no caption, or only empty ones"
    if kind == "folder":
        message = f"no {', '.join(CAPTION_SUFFIXES)} of the same name holds a caption"
    return SkippedEntry(source=name, kind="no_caption", message=message)
