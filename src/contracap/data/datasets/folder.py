"""Folders of images, each next to a file with its captions."""

from collections.abc import Iterator
from itertools import product
from pathlib import Path

from contracap.data.annotations import Entry, SkippedEntry, SourceError, read_json, read_text
from contracap.data.datasets.tables import cell_captions
from contracap.data.image_finder import SkippedFiles, find_files, is_image
from contracap.data.samples import text_lines, texts_in

CAPTION_SUFFIXES = (".txt", ".caption", ".json")


def read_folder(folder: Path, lines: bool) -> Iterator[Entry | SkippedEntry]:
    """Yield the images with their captions, then the caption files without an image.

    A caption file has the image's name with another suffix, or with one more. The first one with a caption counts.

    Args:
        lines: each line of a text file is a caption; otherwise the whole text is one.
    """
    skipped = SkippedFiles()
    files = list(find_files(folder, skipped))
    caption_files = {
        (file.with_suffix("").as_posix(), file.suffix.lower()): file
        for file in files
        if file.suffix.lower() in CAPTION_SUFFIXES
    }
    used = set[Path]()
    for file in files:
        if not is_image(folder / file):
            skipped.add(folder / file)
            continue
        names = (file.with_suffix("").as_posix(), file.as_posix())
        own = [caption_files[key] for key in product(names, CAPTION_SUFFIXES) if key in caption_files]
        used.update(own)
        captions, problem = (), None
        for caption_file in own:
            try:
                captions = captions or _captions_in(folder / caption_file, lines)
            except SourceError as error:
                problem = problem or str(error)
        if problem and not captions:
            yield SkippedEntry(source=file.as_posix(), kind="broken_text", message=problem)
        else:
            yield Entry(name=file.as_posix(), captions=captions)
    skipped.report(folder)
    for file in caption_files.values():
        if file not in used and file.suffix.lower() != ".json":
            yield SkippedEntry(source=file.as_posix(), kind="text_without_image", message="no image has this name")


def _captions_in(file: Path, lines: bool) -> tuple[str, ...]:
    if file.suffix.lower() != ".json":
        text = read_text(file)
        return texts_in(text_lines(text) if lines else text)
    found = read_json(file)
    values = [found.get("captions"), found.get("caption")] if isinstance(found, dict) else [found]
    return next(filter(None, map(cell_captions, values)), ())
