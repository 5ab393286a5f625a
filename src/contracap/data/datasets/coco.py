"""COCO's captions JSON, and Karpathy's splits of COCO and Flickr."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from contracap.data.annotations import Entry, SkippedEntry, SourceError, number_or_text, read_each, values_of
from contracap.data.samples import texts_in


def read_coco(path: Path, document: Any) -> Iterator[Entry | SkippedEntry]:
    """Yield the images of COCO captions JSON in order. An id may be a number in one place and a text in another.

    Raises:
        SourceError: if all images, or all annotations, are of another layout.
    """
    captions = dict[Any, list[str]]()

    def image_of(image: Any) -> tuple[Any, dict[str, Any]]:
        identity = number_or_text(image["id"])
        captions.setdefault(identity, [])
        _require_text(image["file_name"])
        return identity, image

    def add_caption(annotation: Any) -> SkippedEntry | None:
        identity = number_or_text(annotation["image_id"])
        if identity not in captions:
            source, message = f"annotation {annotation.get('id')}", f"no image has the id {identity!r}"
            return SkippedEntry(source=source, kind="annotation_without_image", message=message)
        captions[identity].extend(texts_in(annotation["caption"]))
        return None

    images = list(read_each(path, document, "images", image_of, layout="coco"))
    yield from filter(None, read_each(path, document, "annotations", add_caption, layout="coco"))
    for found in images:
        if isinstance(found, SkippedEntry):
            yield found
        else:
            identity, image = found
            fields = {name: value for name, value in image.items() if name != "file_name"}
            yield Entry(name=image["file_name"], captions=tuple(captions[identity]), fields=fields)


def read_karpathy(path: Path, document: Any, splits: Sequence[str] = ()) -> Iterator[Entry | SkippedEntry]:
    """Yield the images of Karpathy's `dataset_*.json` in these splits, or in all.

    Raises:
        SourceError: if a split has no image, or all images are of another layout.
    """
    images = values_of(path, document, "images", layout="karpathy")
    names = [image.get("split") for image in images if isinstance(image, dict)]
    found = list(dict.fromkeys(name for name in names if isinstance(name, str)))
    for split in splits:
        if split not in found:
            raise SourceError(f"{path} has no images in the split {split}; its splits are {', '.join(found)}")

    def entry(image: Any) -> Entry | None:
        if image["split"] not in (splits or found):
            return None
        folder, name = image.get("filepath"), _require_text(image["filename"])  # Flickr's files have no folder
        used = ("filepath", "filename", "sentences", "sentids")
        return Entry(
            name=f"{folder}/{name}" if folder else name,
            captions=texts_in([sentence["raw"] for sentence in image["sentences"]]),
            fields={name: value for name, value in image.items() if name not in used},
        )

    return filter(None, read_each(path, document, "images", entry, layout="karpathy"))


def _require_text(name: Any) -> str:
    if not isinstance(name, str) or not name:
        raise TypeError(f"the name of an image is a text, not {name!r}")
    return name
