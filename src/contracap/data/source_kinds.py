"""Kinds of sources, and how to tell which one a file or a folder is."""

from pathlib import Path
from typing import Literal

from contracap.data.annotations import SourceError, read_json
from contracap.data.datasets.bulk_captions import is_bulk
from contracap.data.datasets.flickr import is_flickr
from contracap.data.datasets.imagefolder import METADATA_FILES
from contracap.data.datasets.tables import is_lines, is_table
from contracap.data.image_finder import SkippedFiles, find_files, is_image
from contracap.data.tar import SHARD_SUFFIXES

Kind = Literal["folder", "table", "coco", "karpathy", "flickr", "vqa", "imagefolder", "bulk"]

TABLE_SUFFIXES = (".csv", ".tsv", ".jsonl", ".parquet")


def detect_kind(path: Path) -> Kind:
    """Return what a source is.

    Raises:
        SourceError: if it is none of the kinds, or a broken file.
    """
    return _kind_of_folder(path) if path.is_dir() else _kind_of_file(path)


def _kind_of_folder(folder: Path) -> Kind:
    has_image, table, shard = False, None, None
    for file in find_files(folder, SkippedFiles()):
        if file.name in METADATA_FILES:
            return "imagefolder"
        if not has_image and is_image(folder / file):
            has_image = True
        elif table is None and file.suffix.lower() == ".parquet":
            table = folder / file
        elif shard is None and file.name.endswith(SHARD_SUFFIXES):
            shard = folder / file
    if has_image:
        return "folder"
    if table is not None:
        return _kind_of_file(table)
    if shard is not None:
        raise SourceError(f"{folder} holds tar shards already: use {shard.parent} as it is, as data.train of a recipe")
    metadata = ", ".join(METADATA_FILES)
    raise SourceError(f"{folder} has neither images nor a metadata file ({metadata}), nor Parquet files")


def _kind_of_file(path: Path) -> Kind:
    suffix = path.suffix.lower()
    if suffix == ".json" and not is_lines(path):
        kind = _kind_of_json(path)
        if kind is not None:
            return kind
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


def require_readable(path: Path) -> None:
    """Refuse a file in a format that no kind of source has.

    Raises:
        SourceError: that says what to convert it to.
    """
    with path.open("rb") as file:
        head = file.read(8)
    if head.startswith(b"\x1f\x8b") and not path.name.endswith(SHARD_SUFFIXES):
        raise SourceError(f"{path} is compressed: unpack it first, with gunzip")
    if head.startswith((b"ARROW1", b"FEA1")):
        raise SourceError(f"{path} is a Feather or Arrow file: save it as Parquet, under a name that ends in .parquet")
    if head.startswith(b"PAR1") and path.suffix.lower() != ".parquet":
        raise SourceError(f"{path} is a Parquet file: give it a name that ends in .parquet")


def _kind_of_json(path: Path) -> Kind | None:
    document = read_json(path)
    if isinstance(document, dict) and "questions" in document:
        return "vqa"
    if isinstance(document, dict) and "images" in document:
        images = document["images"]
        first = images[0] if isinstance(images, list) and images else None
        named = isinstance(first, dict) and "file_name" in first  # COCO's test images, without captions
        return "coco" if "annotations" in document or named else "karpathy"
    return "table" if is_table(document) else None
