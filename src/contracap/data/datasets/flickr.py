"""The caption files of Flickr8k and Flickr30k."""

import re
from collections.abc import Iterator
from pathlib import Path

from contracap.data.annotations import Entry, SkippedEntry, bad_row, read_lines
from contracap.data.datasets.tables import read_table
from contracap.data.samples import texts_in

TABLE_HEAD = "image,caption"  # of Kaggle's captions.txt, which is a CSV file
BARS_HEAD = "image_name|"  # of Kaggle's results.csv, in one line of which the second bar is missing
BARS = re.compile(r"(?P<image>[^|]+)\| *\d+ *\|?(?P<caption>.*)")
TOKEN = re.compile(r"(?P<image>.+)#\d+\t(?P<caption>.*)")


def is_flickr(path: Path, head: str) -> bool:
    """Return whether the first line of a file is in one of the layouts."""
    table = path.suffix.lower() == ".txt" and head.startswith(TABLE_HEAD)
    return table or head.startswith(BARS_HEAD) or TOKEN.fullmatch(head) is not None


def read_flickr(path: Path) -> Iterator[Entry | SkippedEntry]:
    """Yield the captions of a Flickr8k or Flickr30k file, line by line.

    Three layouts: `name.jpg#0`, a tab, the caption; Kaggle's `captions.txt` with the head `image,caption`; Kaggle's
    `results.csv` with the head `image_name| comment_number| comment`.

    Raises:
        SourceError: if the file is not text.
    """
    pattern = TOKEN
    for number, line in read_lines(path):
        if isinstance(line, SkippedEntry):
            yield line
        elif number == 1 and line.startswith(TABLE_HEAD):
            yield from read_table(path)
            return
        elif number == 1 and line.startswith(BARS_HEAD):
            pattern = BARS
        elif found := pattern.fullmatch(line):
            yield Entry(name=found["image"].strip(), captions=texts_in(found["caption"]))
        elif line:
            yield bad_row(f"{path.name}, line {number}", "not an image, a number and a caption")
