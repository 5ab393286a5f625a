"""Images of a data set, small enough for a page."""

from collections.abc import Iterable

from contracap.apps.html_page import Html, image_tag
from contracap.data.samples import Sample
from contracap.evaluation.features import Source, sample_batches
from contracap.image_files import decode, encode_jpeg, make_thumbnail

SIDE = 160  # pixels of the longer side


def read_wanted_samples(source: Source, rows: Iterable[int]) -> dict[int, Sample]:
    """The samples in these places of the data, by their places."""
    wanted, found, first = set(rows), {}, 0
    for batch in sample_batches(source, 64):
        found |= {row: sample for row, sample in enumerate(batch, first) if row in wanted}
        first += len(batch)
        if len(found) == len(wanted):
            break
    return found


def thumbnail_tag(sample: Sample, *, good: bool | None = None) -> Html:
    """A sample's image as a thumbnail; its first caption, or its key, stands for it where it cannot be seen."""
    alt = sample.captions[0] if sample.captions else sample.key
    return image_tag(encode_thumbnail(sample.image), alt=alt, good=good)


def encode_thumbnail(image: bytes) -> bytes:
    """A JPEG of at most `SIDE` pixels; a PNG of no more is left as it is.

    Raises: ImageError: if the image cannot be read.
    """
    pixels = decode(image)
    if max(pixels.shape[1:]) <= SIDE and image.startswith(b"\x89PNG"):
        return image
    return encode_jpeg(make_thumbnail(pixels, SIDE))
