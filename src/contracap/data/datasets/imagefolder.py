"""Hugging Face's folders of images with metadata files."""

import os
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from unicodedata import normalize

from contracap.data.annotations import Entry, SkippedEntry
from contracap.data.datasets.tables import IMAGE_COLUMNS, read_table
from contracap.data.image_finder import SkippedFiles, find_files, is_image

METADATA_FILES = ("metadata.jsonl", "metadata.csv", "metadata.parquet")


def read_imagefolder(
    folder: Path, image_column: str | None, caption_columns: Sequence[str]
) -> Iterator[Entry | SkippedEntry]:
    """Yield the rows of every metadata file, whose names start in its folder; then the images that no row names."""
    image_columns = (image_column,) if image_column else ("file_name", *IMAGE_COLUMNS)
    named, images, skipped = set[str](), list[str](), SkippedFiles()
    for file in find_files(folder, skipped):
        if is_image(folder / file):
            images.append(file.as_posix())
        elif file.name in METADATA_FILES:
            parent = file.parent.as_posix()
            for row in read_table(folder / file, image_columns=image_columns, caption_columns=caption_columns):
                if isinstance(row, Entry) and row.inside is None:
                    if parent != "." and not os.path.isabs(row.name):
                        row = replace(row, name=f"{parent}/{row.name}")
                    named.add(normalize("NFC", os.path.normpath(row.name.replace("\\", "/"))))
                yield row
        else:
            skipped.add(folder / file)
    skipped.report(folder)
    for name in images:
        if normalize("NFC", name) not in named:
            yield SkippedEntry(source=name, kind="image_without_row", message="no row of the metadata names it")
