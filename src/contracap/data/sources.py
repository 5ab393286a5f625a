"""Sources of pictures with captions or questions, each read into items that are ready to become samples."""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from contracap.data.annotations import (
    BARS_HEAD,
    CAPTION_COLUMNS,
    PICTURE_COLUMNS,
    TABLE_HEAD,
    TOKEN,
    Entry,
    Refused,
    SourceError,
    other_layout,
    read_coco,
    read_flickr,
    read_json,
    read_karpathy,
    read_table,
    read_text,
    read_vqa,
    texts,
)
from contracap.data.walk import PassedOver, files_in, is_picture, pictures_in
from contracap.files import check_regular

Kind = Literal["folder", "table", "coco", "karpathy", "flickr", "vqa", "imagefolder"]

TABLE_SUFFIXES = (".csv", ".tsv", ".jsonl", ".parquet")
METADATA_FILES = ("metadata.jsonl", "metadata.csv", "metadata.parquet")
SIDE_CAR_SUFFIXES = (".txt", ".caption")


@dataclass(frozen=True, kw_only=True, slots=True)
class Item:
    """What becomes one sample: the picture's name in the source, where it lies (a path or a URL), and what is said."""

    source: str
    picture: str
    captions: tuple[str, ...] = ()
    fields: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Source:
    """The items of a source in its order, and what in it gives none."""

    kind: Kind
    items: list[Item]
    refused: list[Refused]


def read_source(
    path: str | Path,
    *,
    kind: Kind | Literal["auto"] = "auto",
    pictures: str | Path | None = None,
    splits: Sequence[str] = (),
    image_column: str | None = None,
    caption_column: str | None = None,
) -> Source:
    """All that a source says, but for the pictures themselves; it takes about 1 kB of memory for each of them.

    Entries with the same picture become one item, at the place of the first, with its fields and the captions of all.
    A name must not lead out of the folder of pictures, save in a table: there a user may well write absolute paths,
    or URLs.

    Args:
        path: a folder or a file.
        kind: what it is; "auto" finds out.
        pictures: the folder where names start, if not the file's own.
        splits: those to take of Karpathy's JSON; none: all.
        image_column: of a table, the column with paths or URLs, if it is not called as usual.
        caption_column: of a table or of metadata, the column with captions, if it is not called as usual.

    Raises:
        FileNotFoundError: if the source or the folder of pictures does not exist.
        SourceError: if the source is not what it should be or holds nothing, or an option does not apply to it.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"no such source: {path}")
    if not path.is_dir():
        check_regular(path)
    if kind == "auto":
        kind = _kind_of_folder(path) if path.is_dir() else _kind_of_file(path)
    for option, given, kinds in (
        ("--pictures", pictures, ("table", "coco", "karpathy", "flickr", "vqa")),
        ("--split", splits, ("karpathy",)),
        ("--image-column", image_column, ("table",)),
        ("--caption-column", caption_column, ("table", "imagefolder")),
    ):
        if given and kind not in kinds:
            raise SourceError(f"{option} is for {', '.join(kinds)}; {path} is read as {kind}")
    folder = Path(pictures) if pictures else path if path.is_dir() else path.parent
    if not folder.is_dir():
        raise FileNotFoundError(f"no such folder of pictures: {folder}")
    picture_columns = (image_column,) if image_column else PICTURE_COLUMNS
    caption_columns = (caption_column,) if caption_column else CAPTION_COLUMNS
    match kind:
        case "folder":
            entries = _read_folder(path)
        case "imagefolder":
            entries = _read_imagefolder(path, caption_columns)
        case "table":
            entries = read_table(path, picture_columns=picture_columns, caption_columns=caption_columns)
        case "flickr":
            entries = read_flickr(path)
        case _:
            entries = _read_document(path, kind, folder, splits)
    source = _merged(entries, kind, folder)
    if not source.items and not source.refused:
        raise SourceError(f"{path}, read as {kind}, holds nothing")
    return source


def _merged(entries: Iterator[Entry | Refused], kind: Kind, folder: Path) -> Source:
    refused, merged = [], dict[str, tuple[list[str], dict[str, Any]]]()
    for entry in entries:
        if isinstance(entry, Refused):
            refused.append(entry)
        elif entry.picture in merged:
            merged[entry.picture][0].extend(entry.captions)
        else:
            merged[entry.picture] = list(entry.captions), entry.fields
    items = []
    for name, (captions, fields) in merged.items():
        remote = kind == "table" and "://" in name
        if kind != "table" and (os.path.isabs(name) or ".." in Path(name).parts):
            message = f"the name leads out of the folder of pictures, {folder}"
            refused.append(Refused(source=name, kind="unsafe_path", message=message))
        elif not captions and kind != "vqa":
            refused.append(Refused(source=name, kind="no_caption", message="no caption, or only empty ones"))
        else:
            picture = name if remote else str(folder / name)
            items.append(Item(source=name, picture=picture, captions=tuple(captions), fields=fields))
    return Source(kind=kind, items=items, refused=refused)


def _kind_of_folder(folder: Path) -> Kind:
    kind = None
    for file in files_in(folder, PassedOver()):
        if file.name in METADATA_FILES:
            return "imagefolder"
        if kind is None and is_picture(folder / file):
            kind = "folder"
    if kind is None:
        raise SourceError(f"{folder} has neither pictures nor a metadata file ({', '.join(METADATA_FILES)})")
    return kind


def _kind_of_file(path: Path) -> Kind:
    suffix = path.suffix.lower()
    if suffix == ".json":
        document = read_json(path)
        if isinstance(document, dict) and "questions" in document:
            return "vqa"
        if isinstance(document, dict) and "images" in document:
            return "coco" if "annotations" in document else "karpathy"
    else:
        with path.open("rb") as file:
            head = file.readline(2**16).decode("utf-8-sig", errors="replace").rstrip("\r\n")
        if head.startswith(BARS_HEAD) or TOKEN.fullmatch(head) or (suffix == ".txt" and head.startswith(TABLE_HEAD)):
            return "flickr"
        if suffix in TABLE_SUFFIXES:
            return "table"
    raise SourceError(
        f"cannot tell what {path} is; looked for a table ({', '.join(TABLE_SUFFIXES)}), the JSON of COCO captions, "
        "of Karpathy's splits or of VQA questions, and a Flickr token file: name it with --kind"
    )


def _read_folder(folder: Path) -> Iterator[Entry | Refused]:
    """Pictures with the lines of the text file beside each."""
    for file in pictures_in(folder):
        side_cars = [(folder / file).with_suffix(suffix) for suffix in SIDE_CAR_SUFFIXES]
        side_car = next((path for path in side_cars if path.is_file()), None)
        try:
            captions = texts(read_text(side_car).split("\n")) if side_car else ()
        except SourceError as error:
            yield Refused(source=file.as_posix(), kind="broken_text", message=str(error))
        else:
            yield Entry(picture=file.as_posix(), captions=captions)


def _read_imagefolder(folder: Path, caption_columns: Sequence[str]) -> Iterator[Entry | Refused]:
    """The rows of every metadata file; names start where their file lies."""
    for file in files_in(folder, PassedOver()):
        if file.name in METADATA_FILES:
            for row in read_table(folder / file, picture_columns=("file_name",), caption_columns=caption_columns):
                beside = file.parent.as_posix()
                if isinstance(row, Entry) and beside != "." and not os.path.isabs(row.picture):
                    row = replace(row, picture=f"{beside}/{row.picture}")
                yield row


def _read_document(path: Path, kind: Kind, folder: Path, splits: Sequence[str]) -> Iterator[Entry]:
    document = read_json(path)
    try:
        if kind == "coco":
            yield from read_coco(document)
        elif kind == "karpathy":
            yield from read_karpathy(path, document, splits)
        else:
            yield from read_vqa(path, document, (file.as_posix() for file in pictures_in(folder)))
    except (LookupError, TypeError, AttributeError) as error:
        raise other_layout(path, kind, error) from error
