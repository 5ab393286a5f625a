"""Images to search by a text or by another image."""

import os
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from contracap.apps.demo.actions import SHOWN, Actions
from contracap.data.image_finder import SkippedFiles, find_images
from contracap.image_files import ImageError, make_thumbnail
from contracap.wording import counted

BATCH = 16  # images embedded at a time
READERS = min(4, os.cpu_count() or 1)  # an image of the most pixels allowed takes up to 805 MB while it is decoded
MAX_SHOWN = 12


@dataclass(frozen=True)
class Match:
    """An image that was found.

    Attributes:
        image: all of it, small.
        score: cosine of its embedding and the query's, -1 to 1.
    """

    name: str
    image: Image.Image
    score: float


class Collection:
    """Embedded images. It can be searched while it still fills, from another thread.

    Attributes:
        total: images it is to hold, the unreadable ones included.
        skipped: what was wrong with each image that could not be read.
        searchable: images that a search looks at by now.
    """

    def __init__(self, actions: Actions, paths: Iterable[str | Path], *, folder: Path | None = None):
        """`folder`: where the names that are shown start; None: they are those of the files alone."""
        self.actions = actions
        self.paths = [Path(path) for path in paths]
        self._folder = folder
        self.skipped: list[str] = []
        self.searchable = 0
        self._readable: list[Path] = []
        self._embeddings = torch.empty(len(self.paths), actions.model.config.embed_dim)

    @property
    def total(self) -> int:
        return len(self.paths)

    @property
    def unread(self) -> int:
        """Images that are still to be read."""
        return self.total - self.searchable - len(self.skipped)

    @property
    def state(self) -> str:
        """A sentence on how far it is."""
        unread = self.unread
        parts = [f"{counted(self.searchable, 'image(s)')} to search"]
        parts += [f"{unread:,} still to be read"] if unread else []
        parts += [f"{len(self.skipped):,} skipped, for they cannot be read"] if self.skipped else []
        return "; ".join(parts) + "."

    def fill(self) -> Iterator[int]:
        """Embed all images, batch by batch; yields how many were looked at so far."""
        with ThreadPoolExecutor(READERS, thread_name_prefix="read") as readers:
            for first in range(0, self.total, BATCH):
                batch = self.paths[first : first + BATCH]
                pixels = []
                for path, found in zip(batch, readers.map(self._read, batch), strict=True):
                    if isinstance(found, str):
                        self.skipped.append(found)
                    else:
                        pixels.append(found)
                        self._readable.append(path)
                if pixels:
                    last = len(self._readable)
                    self._embeddings[self.searchable : last] = self.actions.embed(torch.cat(pixels))
                    self.searchable = last  # last of all, so that a search in another thread sees what is whole
                yield self.searchable + len(self.skipped)

    def _read(self, path: Path) -> Float[Tensor, "1 3 height width"] | str:
        """Return the pixels of an image, or why it cannot be read."""
        try:
            return self.actions.pixels(self.actions.read(path))
        except (ImageError, OSError) as error:
            return str(error)

    def search_text(self, text: str) -> list[Match]:
        """The best matches of a text, best first.

        Raises: ValueError: if the text is empty, or there is nothing to search.
        """
        if not text.strip():
            raise ValueError("there is nothing to search for: write a text, or give an image")
        return self._search(self.actions.embed_text(text).cpu())

    def search_image(self, path: str | None) -> list[Match]:
        """The images most like another one, best first.

        Raises: ValueError: if that image cannot be used, or there is nothing to search.
        """
        return self._search(self.actions.embed(self.actions.pixels(self.actions.read(path)))[0].cpu())

    def _search(self, query: Float[Tensor, "embed"]) -> list[Match]:
        count = self.searchable
        if not count:
            raise ValueError(f"there is nothing to search in: {self.state}")
        scores, places = (self._embeddings[:count] @ query).topk(min(MAX_SHOWN, count))
        matches = []
        for score, place in zip(scores.tolist(), places.tolist(), strict=True):
            path = self._readable[place]
            name = path.name if self._folder is None else path.relative_to(self._folder).as_posix()
            matches.append(Match(name, make_thumbnail(self.actions.read(path), SHOWN), score))
        return matches


def images_under(folder: Path) -> list[Path]:
    """The paths of a folder's images, as `data.image_finder.find_images` finds them.

    Raises:
        ValueError: if there are none, or no such folder.
        OSError: if one of its folders cannot be read.
    """
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a folder: give one that holds images")
    passed = SkippedFiles()
    found = [folder / path for path in find_images(folder, passed)]
    if not found:
        raise ValueError(f"{folder} holds no images" + (f" (skipped {passed})" if passed.counts else ""))
    passed.report(folder)
    return found
