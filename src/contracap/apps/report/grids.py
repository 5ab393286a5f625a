"""Retrieval as tables: for texts the best images, for images the best texts, the right ones marked."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from contracap.apps.html_page import Html, table, verdict
from contracap.apps.report.thumbnails import thumbnail_tag
from contracap.data.samples import Sample
from contracap.evaluation.retrieval import Features

PLACES = ("1st", "2nd", "3rd", "4th", "5th")


@dataclass(frozen=True, kw_only=True)
class Found:
    """The best candidates for one query.

    Attributes:
        query: row of the text or of the image.
        candidates: rows of the best, best first; of equal ones the first in the data is better.
        right: whether each belongs to the query.
    """

    query: int
    candidates: tuple[int, ...]
    right: tuple[bool, ...]


def best_images(features: Features, texts: Sequence[int]) -> list[Found]:
    """Return the five best images for each of these texts."""
    scores = features.texts[list(texts)] @ features.images.T
    found = []
    for text, row in zip(texts, scores, strict=True):
        best = tuple(row.sort(descending=True, stable=True).indices[: len(PLACES)].tolist())
        own = int(features.image_of_text[text])
        found.append(Found(query=text, candidates=best, right=tuple(image == own for image in best)))
    return found


def best_texts(features: Features, images: Sequence[int]) -> list[Found]:
    """Return the five best texts for each of these images."""
    scores = features.images[list(images)] @ features.texts.T
    found = []
    for image, row in zip(images, scores, strict=True):
        best = tuple(row.sort(descending=True, stable=True).indices[: len(PLACES)].tolist())
        right = tuple(int(features.image_of_text[text]) == image for text in best)
        found.append(Found(query=image, candidates=best, right=right))
    return found


def image_grid(features: Features, found: Sequence[Found], samples: Mapping[int, Sample]) -> Html:
    """A line for each text: its best images. Green is the right one, red another in the first place."""
    rows = [
        (
            features.captions[each.query],
            *(
                thumbnail_tag(samples[image], good=True if right else (None if place else False))
                for place, (image, right) in enumerate(zip(each.candidates, each.right, strict=True))
            ),
        )
        for each in found
    ]
    return table(("caption", *PLACES[: _width(found)]), rows)


def caption_grid(features: Features, found: Sequence[Found], samples: Mapping[int, Sample]) -> Html:
    """A line for each image: its best texts, ticked if they are its own."""
    rows = [
        (
            thumbnail_tag(samples[each.query]),
            Html(
                "<br>".join(
                    verdict(features.captions[text], good=right)
                    for text, right in zip(each.candidates, each.right, strict=True)
                )
            ),
        )
        for each in found
    ]
    return table(("image", f"the best {_width(found)} captions"), rows)


def _width(found: Sequence[Found]) -> int:
    return max((len(each.candidates) for each in found), default=0)
