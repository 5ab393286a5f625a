"""Folders of images with a subfolder for each class."""

import logging
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from unicodedata import normalize

from contracap.data.image_finder import SkippedFiles, find_images, has_image, is_image
from contracap.data.samples import Sample
from contracap.data.tar import SHARD_SUFFIXES
from contracap.files import read_regular

logger = logging.getLogger(__name__)


class ClassFolders:
    """A folder whose subfolders are the classes, in the order of their names, with all images below each. Names that
    are all numbers are in the order of the numbers.

    Classes and images are otherwise those of torchvision's ImageFolder, but for what is hidden, which is left out,
    and suffixes: `data.image_finder` says what is an image.

    Attributes:
        path: of the folder.
        names: of the subfolders.
        labels: the class of each subfolder; at first its place.
        strays: names of files next to them, which belong to no class.
    """

    def __init__(self, path: Path):
        """Raises: ValueError: if an image is next to the subfolders, or one of them holds none."""
        self.path = path
        entries = sorted(entry for entry in path.iterdir() if not entry.name.startswith("."))
        self.names = [entry.name for entry in entries if entry.is_dir()]
        if all(map(_is_number, self.names)):
            self.names.sort(key=int)
        self.labels = list(range(len(self.names)))
        self.strays = [entry.name for entry in entries if not entry.is_dir()]
        if images := [name for name in self.strays if is_image(path / name)]:
            raise ValueError(f"{path / images[0]} is not in the folder of a class; move it into one")
        for name in self.names:
            if not has_image(path / name):
                raise ValueError(f"{path / name} holds no image; fill or remove the folder of this class")

    def __iter__(self) -> Iterator[Sample]:
        """Yield every image once, folder by folder, with the class as its `label`."""
        if self.strays:
            logger.warning(f"{self.path}: skipped what is in no class folder: {', '.join(self.strays)}")
        skipped = SkippedFiles()
        for label, name in zip(self.labels, self.names, strict=True):
            for file in find_images(self.path / name, skipped):
                yield Sample(
                    key=f"{name}/{file.as_posix()}",
                    image=read_regular(self.path / name / file),
                    captions=(),
                    fields={"label": label},
                    shard=str(self.path),
                )
        skipped.report(self.path)

    def match(self, classes: Sequence[str]) -> None:
        """Set the labels to places in `classes`: by name, where all folders are called as classes; by number, where
        they are numbers below the number of classes; else one by one in their order, which a warning states.

        Raises: ValueError: if none of these can be.
        """
        places = dict[str, int]()
        for place, name in enumerate(classes):
            places.setdefault(_normalize_name(name), place)
        known = [name for name in self.names if _normalize_name(name) in places]
        if len(known) == len(self.names) and len(places) == len(classes):
            self.labels = [places[_normalize_name(name)] for name in self.names]
        elif all(map(_is_number, self.names)) and len(classes) > int(self.names[-1]):
            self.labels = [int(name) for name in self.names]
        elif len(self.names) != len(classes):
            missing = next(name for name in self.names if name not in known) if len(known) < len(self.names) else ""
            raise ValueError(
                f"{self.path} has {len(self.names)} subfolders, but there are {len(classes)} class names"
                + (f", and none is {missing!r}" if missing else "")
                + "; name the classes as the folders, or give one for each, in the order of their names"
            )
        elif moved := [
            name for place, name in enumerate(self.names) if places.get(_normalize_name(name), place) != place
        ]:
            missing = [name for name in self.names if name not in known]
            raise ValueError(
                f"{self.path}: {moved[0]!r} stands at another place among the class names, and none is "
                f"{missing[0] if missing else 'unique'!r}; name the classes as the folders, or in their order"
            )
        else:
            logger.warning(
                f"{self.path}: classes are matched by order: {self.names[0]} is {classes[0]!r}, ..., "
                f"{self.names[-1]} is {classes[-1]!r}"
            )


def _is_number(name: str) -> bool:
    return name.isascii() and name.isdecimal()


def _normalize_name(name: str) -> str:
    """Return a name without differences of case, blanks, hyphens and underscores, and composed accents."""
    return " ".join(re.split(r"[\s_-]+", normalize("NFC", name).casefold())).strip()


def class_folders(source: str | Path | Sequence[str | Path] | Sequence[Sample]) -> ClassFolders | None:
    """Return the source as class folders, if it is one local folder without shards whose subfolders have an image.

    Raises: ValueError: as `ClassFolders` does.
    """
    paths = [source] if isinstance(source, str | Path) else source
    if len(paths) != 1 or isinstance(paths[0], Sample) or not paths[0] or not Path(paths[0]).is_dir():
        return None
    path, visible = Path(paths[0]), [entry for entry in Path(paths[0]).iterdir() if not entry.name.startswith(".")]
    if any(entry.name.endswith(SHARD_SUFFIXES) for entry in visible):
        return None
    found = any(has_image(entry) for entry in visible if entry.is_dir())
    return ClassFolders(path) if found else None
