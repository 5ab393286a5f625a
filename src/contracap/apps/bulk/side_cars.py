"""Captions as text files next to the images."""

import errno
import hashlib
import io
import os
import sys
import threading
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from contracap.apps.bulk.inputs import Item
from contracap.apps.bulk.output_config import ConfigFile, OutputConfig
from contracap.apps.bulk.outputs import Existing, Output, errors_at, is_of_one_image, one_line, require_writable
from contracap.apps.bulk.rows import Row
from contracap.files import replace_file


class SideCars(Output):
    """A text file next to each image, with a line for each caption, and its embedding in a float32 `.npy` file.

    An empty or blank text file counts as missing. Images whose names differ only in their suffixes would share a
    side-car: the first that has a caption gets it, and the others get none.

    Args:
        suffix: of the text file, such as ".txt".
        roots: the folders that images are taken from.
        inputs: the paths that are read, none of which becomes a side-car: a list of images is a text file too.
        folder: folder of the side-cars, if not that of the images; it has the subfolders of the images.
        config: what decides the captions, kept in a hidden file of each folder with side-cars; None: those of any
            may lie together.
    """

    def __init__(
        self,
        suffix: str,
        existing: Existing,
        *,
        embed: bool,
        roots: Sequence[Path] = (),
        inputs: Sequence[str] = (),
        folder: Path | None = None,
        config: OutputConfig | None = None,
    ) -> None:
        self.suffix, self.existing, self.embed = suffix, existing, embed
        self._roots, self._folder = [Path(os.path.abspath(root)) for root in roots], folder
        self._inputs = set(map(os.path.realpath, inputs))
        self.config, self._config_files = config, dict[Path, ConfigFile | None]()  # None: they are written
        self._origins = dict[bytes, str]()  # of side-cars, by a digest: about 100 bytes an image
        self._lock = threading.Lock()  # images are looked for in one thread, and captions written in another
        if existing == "overwrite":
            self.resumption = "the same command starts again"
        self.place = str(folder) if folder is not None else "next to the images"
        if folder is not None:
            if folder.exists() and not folder.is_dir():
                raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(folder))
            require_writable(folder)

    def check(self, item: Item) -> None:
        require_writable(self._place(item).parent)

    def has(self, item: Item) -> bool:
        place = self._place(item)
        self._require_config(place.parent)
        vector = place.with_suffix(".npy")
        has_vector = not self.embed or (vector.is_file() and vector.stat().st_size > 0)
        text = place.with_suffix(self.suffix)
        if os.path.realpath(text) in self._inputs:
            raise ValueError(
                f"{item.name}: its side-car would be {text}, which is read: rename one, or give another --ext"
            )
        captions = _captions(text)
        if self.existing == "append" and not _is_utf8(captions):
            raise ValueError(
                f"{text} is not UTF-8, so no line can be added: save it as UTF-8, or give --overwrite or another --ext"
            )
        is_done = bool(captions) and self.existing == "skip" and has_vector
        if is_done:
            self._take(place, self._source(item))
        return is_done

    def write(self, rows: Sequence[tuple[Item, Row]]) -> list[Exception]:
        broken = list[Exception]()
        for item, row in rows:
            try:
                place = self._place(item)
                if self._take(place, self._source(item)):
                    self._write_one(place, row)
            except (OSError, ValueError) as error:
                if not is_of_one_image(error):
                    raise
                broken.append(error)
                continue
            if (config_file := self._config_files.get(place.parent)) is not None:
                config_file.write()  # the files there have these settings from now on
                self._config_files[place.parent] = None
        return broken

    def _write_one(self, place: Path, row: Row) -> None:
        text, vector = place.with_suffix(self.suffix), place.with_suffix(".npy")
        if row.embedding is not None and (self.existing != "skip" or not vector.exists()):
            content = io.BytesIO()
            np.save(content, row.embedding)
            _write(vector, content.getvalue())
        line = one_line(row.caption).encode() + b"\n"
        before = _captions(text) if self.existing != "overwrite" else b""
        if not before:
            _write(text, line)
        elif self.existing == "append" and line.strip() not in map(bytes.strip, before.splitlines()):
            _write(text, before.rstrip(b"\r\n") + b"\n" + line)
        else:
            return
        self.added += 1

    def _require_config(self, folder: Path) -> None:
        """Raises: OutputConfigError: if the side-cars of a folder are of other settings, and would be added to."""
        if self.config is None or folder in self._config_files:
            return
        config_file = ConfigFile(folder / f".contracap{self.suffix}.json", self.config)
        if self.existing == "skip":
            remedy = "Give --append for one more caption each, --overwrite to start again, or another --ext or --out"
            config_file.check(str(folder), remedy)
        self._config_files[folder] = config_file

    def _take(self, place: Path, image: Path) -> bool:
        """Give the image its side-car, unless it came before in this run; return whether it did not.

        Raises: ValueError: if the side-car is that of another image.
        """
        side_car, source = (Path(os.path.abspath(path)) for path in (place.with_suffix(self.suffix), image))
        digest = hashlib.blake2b(os.fsencode(side_car), digest_size=16).digest()
        # The image but for its stem, which is the side-car's: all images of a folder share this string.
        origin = sys.intern(str(source.with_name(f"*{source.suffix}")))
        with self._lock:
            is_new = digest not in self._origins
            first = Path(self._origins.setdefault(digest, origin))
            self.repeated += not is_new and first == Path(origin)
        if first != Path(origin):
            other = first.with_name(f"{source.stem}{first.suffix}")
            shown = other.name if other.parent == source.parent else other
            raise ValueError(
                f"{image}: {shown} has the same side-car, {side_car.name}: rename one of them, or take "
                "--format jsonl, csv or parquet"
            )
        return is_new

    def _source(self, item: Item) -> Path:
        if not isinstance(item.source, Path):
            raise ValueError(
                f"{item.name}: side-cars are for local image files only; for shards and URLs use --format jsonl, csv "
                "or parquet"
            )
        return item.source

    def _place(self, item: Item) -> Path:
        """Return the path of the side-car, but for its suffix."""
        source = self._source(item)
        if self._folder is None:
            return source
        whole = Path(os.path.abspath(source))
        root = next((root for root in self._roots if whole.is_relative_to(root)), whole.parent)
        return self._folder / whole.relative_to(root)


def _captions(side_car: Path) -> bytes:
    """Return what a side-car holds; nothing if there is none, or if it is blank.

    Raises: ValueError: if it is not a file. OSError: if it cannot be read.
    """
    if not side_car.exists():
        return b""
    if not side_car.is_file():
        raise ValueError(f"{side_car} is not a file, so no caption can be there: rename it, or take another --ext")
    content = side_car.read_bytes()
    return content if content.decode(errors="replace").strip("\ufeff\0 \t\r\n\f\v").strip() else b""


def _is_utf8(content: bytes) -> bool:
    try:
        return "\0" not in content.decode()  # of ASCII letters in UTF-16 every other byte is zero
    except ValueError:
        return False


def _write(path: Path, content: bytes) -> None:
    with errors_at(path), replace_file(path) as partial:
        partial.write_bytes(content)
