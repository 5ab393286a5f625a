"""Pictures in a folder for each class."""

import logging
from collections.abc import Iterator, Sequence
from pathlib import Path

from contracap.data.shards import SHARD_SUFFIXES, Sample
from contracap.data.walk import PassedOver, has_picture, is_picture, pictures_in
from contracap.files import read_regular

logger = logging.getLogger(__name__)


class ClassFolders:
    """A folder whose subfolders are the classes, in the order of their names, with all pictures below each.

    Classes and pictures are those of torchvision's ImageFolder, but for what is hidden, which is left out, and
    suffixes: `data.walk` says what is a picture.

    Attributes:
        path: of the folder.
        names: of the subfolders.
        strays: names of files beside them, which belong to no class.
    """

    def __init__(self, path: Path):
        """Raises: ValueError: if a picture lies beside the subfolders, or one of them holds none."""
        self.path = path
        entries = sorted(entry for entry in path.iterdir() if not entry.name.startswith("."))
        self.names = [entry.name for entry in entries if entry.is_dir()]
        self.strays = [entry.name for entry in entries if not entry.is_dir()]
        if pictures := [name for name in self.strays if is_picture(path / name)]:
            raise ValueError(
                f"{path / pictures[0]} lies beside the folders of the classes; move it into that of its own"
            )
        for name in self.names:
            if not has_picture(path / name):
                raise ValueError(f"{path / name} holds no picture; fill or remove the folder of this class")

    def __iter__(self) -> Iterator[Sample]:
        """Every picture once, class by class, with the class's number as its `label`."""
        if self.strays:
            logger.warning(f"{self.path}: passed over what is in no class folder: {', '.join(self.strays)}")
        passed = PassedOver()
        for label, name in enumerate(self.names):
            for file in pictures_in(self.path / name, passed):
                yield Sample(
                    key=f"{name}/{file.as_posix()}",
                    image=read_regular(self.path / name / file),
                    captions=(),
                    fields={"label": label},
                    shard=str(self.path),
                )
        passed.report(self.path)


def class_folders(source: str | Path | Sequence[str | Path] | Sequence[Sample]) -> ClassFolders | None:
    """The source as class folders, if it is one local folder without shards whose subfolders have a picture.

    Raises: ValueError: as `ClassFolders` does.
    """
    paths = [source] if isinstance(source, str | Path) else source
    if len(paths) != 1 or isinstance(paths[0], Sample) or not paths[0] or not Path(paths[0]).is_dir():
        return None
    path, visible = Path(paths[0]), [entry for entry in Path(paths[0]).iterdir() if not entry.name.startswith(".")]
    if any(entry.name.endswith(SHARD_SUFFIXES) for entry in visible):
        return None
    found = any(has_picture(entry) for entry in visible if entry.is_dir())
    return ClassFolders(path) if found else None
