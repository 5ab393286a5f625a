"""Sources of images with captions or questions, each read into items that are ready to become samples."""

import os
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice, product
from pathlib import Path
from typing import Any, Literal
from unicodedata import normalize

from contracap.data.annotations import (
    Entry,
    Inside,
    Refused,
    SourceError,
    other_layout,
    read_json,
    read_text,
)
from contracap.data.datasets.bulk import is_bulk, read_bulk
from contracap.data.datasets.coco import read_coco, read_karpathy
from contracap.data.datasets.flickr import is_flickr, read_flickr
from contracap.data.datasets.tables import (
    PICTURE_COLUMNS,
    cell_captions,
    is_lines,
    is_table,
    read_table,
)
from contracap.data.datasets.vqa import read_vqa
from contracap.data.shards import PICTURE_SUFFIXES, SHARD_SUFFIXES, text_lines, texts_in
from contracap.data.walk import PassedOver, files_in, is_picture, pictures_in
from contracap.files import check_regular

Kind = Literal["folder", "table", "coco", "karpathy", "flickr", "vqa", "imagefolder", "bulk"]

TABLE_SUFFIXES = (".csv", ".tsv", ".jsonl", ".parquet")
METADATA_COLUMNS = ("file_name", *PICTURE_COLUMNS)
METADATA_FILES = ("metadata.jsonl", "metadata.csv", "metadata.parquet")
SIDE_CAR_SUFFIXES = (".txt", ".caption", ".json")
NAMES_PICTURES = ("table", "coco", "karpathy", "flickr", "vqa", "bulk")  # which may be in another folder
NAMES_TRIED = 100  # of a table's images, to find out where its names start


@dataclass(frozen=True, kw_only=True, slots=True)
class Item:
    """What becomes one sample: the image's name in the source, where it lies (a path or a URL), and what is said.

    Attributes:
        inside: where the image is within the file `picture`, if that is not an image.
    """

    source: str
    picture: str
    captions: tuple[str, ...] = ()
    fields: dict[str, Any] = field(default_factory=dict)
    inside: Inside | None = None


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
    caption_columns: Sequence[str] = (),
    caption_lines: bool = True,
) -> Source:
    """All that a source says, but for the images themselves; it takes about 1 kB of memory for each of them.

    Entries with the same image become one item, at the place of the first, with its fields and the captions of all.
    A name must not lead out of the folder of images, save in a table: there a user may well write absolute paths,
    or URLs.

    Args:
        path: a folder or a file.
        kind: what it is; "auto" finds out.
        images: the folder where names start, if not the file's own, or, of a table, the working folder; of captions
            by `bulk`, the folder of the shards, if they have moved.
        splits: those to take of Karpathy's JSON, of a table with the column `split`, or of a folder of Parquet files;
            none: all.
        image_column: of a table, the column with paths or URLs, if it is not called as usual.
        caption_columns: of a table or of metadata, the columns with captions, if they are not called as usual.
        caption_lines: of text files next to images, each line is a caption; else the whole text is.

    Raises:
        FileNotFoundError: if the source or the folder of images does not exist.
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
        ("--pictures", pictures, NAMES_PICTURES),
        ("--split", splits, ("karpathy", "table")),
        ("--image-column", image_column, ("table", "imagefolder")),
        ("--caption-column", caption_columns, ("table", "imagefolder")),
        ("--no-caption-lines", not caption_lines, ("folder", "bulk")),
    ):
        if given and kind not in kinds:
            raise SourceError(f"{option} is for {', '.join(kinds)}; {path} is read as {kind}")
    folder = Path(pictures) if pictures else path if path.is_dir() else path.parent
    if not folder.is_dir():
        raise FileNotFoundError(f"no such folder of images: {folder}")
    picture_columns = (image_column,) if image_column else PICTURE_COLUMNS
    match kind:
        case "folder":
            entries = _read_folder(path, caption_lines)
        case "imagefolder":
            entries = _read_imagefolder(path, (image_column,) if image_column else METADATA_COLUMNS, caption_columns)
        case "table":
            tables = _tables(path, splits)
            entries = (
                entry
                for table in tables
                for entry in read_table(
                    table,
                    picture_columns=picture_columns,
                    caption_columns=caption_columns,
                    splits=() if path.is_dir() else splits,
                )
            )
        case "bulk":
            entries = (entry for table in _tables(path) for entry in read_bulk(table, folder if pictures else None))
        case "flickr":
            entries = read_flickr(path)
        case _:
            entries = _read_document(path, kind, folder, splits)
    source = _merged(entries, kind, folder, may_be_elsewhere=kind == "table" and not pictures)
    if not source.items and not source.refused:
        raise SourceError(f"{path}, read as {kind}, holds nothing")
    return source


def find_image(item: Item) -> Path | None:
    """The file of an item that is neither a URL nor inside a file; None if there is no such file.

    A name is tried as it stands, composed and decomposed (é as one letter or two), with slashes in place of
    backslashes, and, if it has no suffix, with every suffix of images.
    """
    name = item.picture
    spellings = [name, normalize("NFC", name), normalize("NFD", name), name.replace("\\", "/")]
    if not is_picture(Path(name)):
        spellings += [f"{name}.{suffix}" for suffix in PICTURE_SUFFIXES]
    return next((Path(spelling) for spelling in spellings if os.path.isfile(spelling)), None)


def _merged(entries: Iterable[Entry | Refused], kind: Kind, folder: Path, *, may_be_elsewhere: bool) -> Source:
    refused, merged = list[Refused](), dict[str | Inside, tuple[str, list[str], dict[str, Any]]]()
    for entry in entries:
        if isinstance(entry, Refused):
            refused.append(entry)
            continue
        key = entry.inside or entry.picture
        if key in merged:
            merged[key][1].extend(entry.captions)
        else:
            merged[key] = entry.picture, list(entry.captions), entry.fields
    names = [key for key in islice(merged, NAMES_TRIED) if isinstance(key, str)]
    if (
        may_be_elsewhere
        and any(map(os.path.isfile, names))
        and not any(os.path.isfile(folder / name) for name in names)
    ):
        folder = Path()  # where `caption` ran that wrote the table, say
    items = []
    for key, (name, captions, fields) in merged.items():
        if kind not in ("table", "bulk") and (os.path.isabs(name) or ".." in re.split(r"[/\\]", name)):
            message = f"the name leads out of the folder of images, {folder}"
            refused.append(Refused(source=name, kind="unsafe_path", message=message))
        elif not captions and kind != "vqa":
            message = "no caption, or only empty ones"
            if kind == "folder":
                message = f"no {', '.join(SIDE_CAR_SUFFIXES)} of the same name holds a caption"
            refused.append(Refused(source=name, kind="no_caption", message=message))
        else:
            inside = key if isinstance(key, Inside) else None
            picture = inside.file if inside else name if kind == "table" and "://" in name else str(folder / name)
            items.append(Item(source=name, picture=picture, captions=tuple(captions), fields=fields, inside=inside))
    return Source(kind=kind, items=items, refused=refused)


def _tables(path: Path, splits: Sequence[str] = ()) -> list[Path]:
    """The table, or the Parquet files in a folder, of these splits: with one of them in their names."""
    if not path.is_dir():
        return [path]
    found = [file for file in files_in(path, PassedOver()) if file.suffix.lower() == ".parquet"]
    for split in splits:
        if not any(split in _words(file) for file in found):
            raise SourceError(f"{path} has no Parquet file of the split {split}, but {', '.join(map(str, found[:20]))}")
    return [path / file for file in found if not splits or set(splits) & set(_words(file))]


def _words(file: Path) -> list[str]:
    return re.split(r"[^A-Za-z0-9]+", file.as_posix())


def _kind_of_folder(folder: Path) -> Kind:
    kind = table = shard = None
    for file in files_in(folder, PassedOver()):
        if file.name in METADATA_FILES:
            return "imagefolder"
        if kind is None and is_picture(folder / file):
            kind = "folder"
        elif table is None and file.suffix.lower() == ".parquet":
            table = folder / file
        elif shard is None and file.name.endswith(SHARD_SUFFIXES):
            shard = folder / file
    if kind is None and table is not None:
        kind = _kind_of_file(table)
    if kind is None and shard is not None:
        raise SourceError(f"{folder} holds tar shards already: use {shard.parent} as it is, as data.train of a recipe")
    if kind is None:
        metadata = ", ".join(METADATA_FILES)
        raise SourceError(f"{folder} has neither images nor a metadata file ({metadata}), nor Parquet files")
    return kind


def _kind_of_file(path: Path) -> Kind:
    suffix = path.suffix.lower()
    if suffix == ".json" and not is_lines(path):
        document = read_json(path)
        if isinstance(document, dict) and "questions" in document:
            return "vqa"
        if isinstance(document, dict) and "images" in document:
            images = document["images"]
            first = images[0] if isinstance(images, list) and images else None
            named = isinstance(first, dict) and "file_name" in first  # COCO's test images, without captions
            return "coco" if "annotations" in document or named else "karpathy"
        if is_table(document):
            return "table"
    elif suffix == ".parquet":
        return "bulk" if is_bulk(path) else "table"
    else:
        with path.open("rb") as file:
            head = file.readline(2**16).decode("utf-8-sig", errors="replace").rstrip("\r\n")
        if is_flickr(path, head):
            return "flickr"
        if suffix in (*TABLE_SUFFIXES, ".json"):
            return "table"
        if path.name.endswith(SHARD_SUFFIXES):
            raise SourceError(f"{path} is a tar shard already: use it as it is, as data.train of a recipe")
    raise SourceError(
        f"cannot tell what {path} is; looked for a table ({', '.join(TABLE_SUFFIXES)}), the JSON of COCO captions, of "
        "Karpathy's splits, of VQA questions or of a list of objects, and a Flickr token file: name it with --kind"
    )


def _read_folder(folder: Path, lines: bool) -> Iterator[Entry | Refused]:
    """Images with the captions of the first file next to each that has one, named as the image with another suffix, or
    with one more."""
    passed = PassedOver()
    files = list(files_in(folder, passed))
    side_cars = {
        (file.with_suffix("").as_posix(), file.suffix.lower()): file
        for file in files
        if file.suffix.lower() in SIDE_CAR_SUFFIXES
    }
    used = set[Path]()
    for file in files:
        if not is_picture(folder / file):
            passed.add(folder / file)
            continue
        names = (file.with_suffix("").as_posix(), file.as_posix())
        beside = [side_cars[key] for key in product(names, SIDE_CAR_SUFFIXES) if key in side_cars]
        used.update(beside)
        captions, problem = (), None
        for side_car in beside:
            try:
                captions = captions or _captions_in(folder / side_car, lines)
            except SourceError as error:
                problem = problem or str(error)
        if problem and not captions:
            yield Refused(source=file.as_posix(), kind="broken_text", message=problem)
        else:
            yield Entry(picture=file.as_posix(), captions=captions)
    passed.report(folder)
    for file in side_cars.values():
        if file not in used and file.suffix.lower() != ".json":
            yield Refused(source=file.as_posix(), kind="text_without_image", message="no image has this name")


def _captions_in(side_car: Path, lines: bool) -> tuple[str, ...]:
    if side_car.suffix.lower() != ".json":
        text = read_text(side_car)
        return texts_in(text_lines(text) if lines else text)
    found = read_json(side_car)
    values = [found.get("captions"), found.get("caption")] if isinstance(found, dict) else [found]
    return next(filter(None, map(cell_captions, values)), ())


def _read_imagefolder(
    folder: Path, picture_columns: Sequence[str], caption_columns: Sequence[str]
) -> Iterator[Entry | Refused]:
    """The rows of every metadata file, whose names start where it lies; then the images that no row names."""
    named, images, passed = set[str](), list[str](), PassedOver()
    for file in files_in(folder, passed):
        if is_picture(folder / file):
            images.append(file.as_posix())
        elif file.name in METADATA_FILES:
            beside = file.parent.as_posix()
            for row in read_table(folder / file, picture_columns=picture_columns, caption_columns=caption_columns):
                if isinstance(row, Entry) and row.inside is None:
                    if beside != "." and not os.path.isabs(row.picture):
                        row = replace(row, picture=f"{beside}/{row.picture}")
                    named.add(normalize("NFC", os.path.normpath(row.picture.replace("\\", "/"))))
                yield row
        else:
            passed.add(folder / file)
    passed.report(folder)
    for name in images:
        if normalize("NFC", name) not in named:
            yield Refused(source=name, kind="image_without_row", message="no row of the metadata names it")


def _read_document(path: Path, kind: Kind, folder: Path, splits: Sequence[str]) -> Iterator[Entry | Refused]:
    document = read_json(path)
    try:
        if kind == "coco":
            yield from read_coco(path, document)
        elif kind == "karpathy":
            yield from read_karpathy(path, document, splits)
        else:
            yield from read_vqa(path, document, (file.as_posix() for file in pictures_in(folder)))
    except (LookupError, TypeError, AttributeError) as error:
        raise other_layout(path, kind, error) from error
