"""Pictures to search by a text or by another picture."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from contracap.data.shards import PICTURE_SUFFIXES
from contracap.demo.actions import Actions
from contracap.demo.overlay import to_pillow
from contracap.image import ImageError

BATCH = 16  # pictures embedded at a time
MOST_SHOWN = 12


@dataclass(frozen=True)
class Match:
    """A picture that was found.

    Attributes:
        picture: as far as the model sees it.
        score: cosine of its embedding and the query's, -1 to 1.
    """

    name: str
    picture: Image.Image
    score: float


class Collection:
    """Embedded pictures. It can be searched while it still fills, from another thread.

    Attributes:
        total: pictures it is to hold, the unreadable ones included.
        skipped: what was wrong with each picture that could not be read.
    """

    def __init__(self, actions: Actions, paths: Iterable[str | Path]):
        self.actions = actions
        self.paths = [Path(path) for path in paths]
        self.skipped: list[str] = []
        # One name for both, so that a search in another thread never sees one without the other.
        self._embedded: tuple[tuple[Path, ...], Float[Tensor, "picture embed"]] = ((), torch.empty(0, 0))

    @property
    def total(self) -> int:
        return len(self.paths)

    @property
    def searchable(self) -> int:
        """Pictures that a search looks at by now."""
        return len(self._embedded[0])

    @property
    def state(self) -> str:
        """A sentence on how far it is."""
        done = self.searchable + len(self.skipped)
        parts = [f"{self.searchable:,} pictures to search"]
        parts += [f"{self.total - done:,} still to be read"] if done < self.total else []
        parts += [f"{len(self.skipped):,} skipped, for they cannot be read"] if self.skipped else []
        return "; ".join(parts) + "."

    def fill(self) -> Iterator[int]:
        """Embed all pictures, batch by batch; yields how many were looked at so far."""
        for first in range(0, self.total, BATCH):
            readable, pixels = [], []
            for path in self.paths[first : first + BATCH]:
                try:
                    pixels.append(self.actions.pixels(self.actions.read(path)))
                    readable.append(path)
                except (ImageError, OSError) as error:
                    self.skipped.append(str(error))
            if readable:
                new = self.actions.embed(torch.cat(pixels)).cpu()
                paths, features = self._embedded
                self._embedded = (*paths, *readable), torch.cat([features.reshape(-1, new.shape[1]), new])
            yield self.searchable + len(self.skipped)

    def search_text(self, text: str) -> list[Match]:
        """The best matches of a text, best first.

        Raises: ValueError: if the text is empty, or there is nothing to search.
        """
        if not text.strip():
            raise ValueError("there is nothing to search for: write a text, or give a picture")
        return self._search(self.actions.embed_text(text).cpu())

    def search_picture(self, path: str | None) -> list[Match]:
        """The pictures most like another one, best first.

        Raises: ValueError: if that picture cannot be used, or there is nothing to search.
        """
        return self._search(self.actions.embed(self.actions.pixels(self.actions.read(path)))[0].cpu())

    def _search(self, query: Float[Tensor, "embed"]) -> list[Match]:
        paths, features = self._embedded
        if not paths:
            raise ValueError(f"there is nothing to search in: {self.state}")
        scores, places = (features @ query).topk(min(MOST_SHOWN, len(paths)))
        matches = []
        for score, place in zip(scores.tolist(), places.tolist(), strict=True):
            picture = self.actions.seen(self.actions.read(paths[place]))
            matches.append(Match(paths[place].name, to_pillow(picture), score))
        return matches


def pictures_in(folder: Path) -> list[Path]:
    """The picture files of a folder and of the folders in it, by name.

    Raises: ValueError: if there are none, or no such folder.
    """
    if not folder.is_dir():
        raise ValueError(f"{folder} is no folder: give one that holds pictures")
    found = sorted(path for path in folder.rglob("*") if path.suffix[1:].lower() in PICTURE_SUFFIXES and path.is_file())
    if not found:
        raise ValueError(f"{folder} holds no pictures ({', '.join(PICTURE_SUFFIXES)})")
    return found
