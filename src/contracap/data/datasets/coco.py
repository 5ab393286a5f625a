"""COCO's captions JSON, and Karpathy's splits of COCO and Flickr."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from contracap.data.annotations import Entry, Refused, SourceError, each, number_or_text
from contracap.data.shards import texts_in


def read_coco(path: Path, document: dict[str, Any]) -> Iterator[Entry | Refused]:
    """The images of COCO captions JSON, in the order of its `images`; ids are the same as numbers and as texts.

    Raises:
        SourceError: if all images, or all annotations, are of another layout.
    """
    captions = dict[Any, list[str]]()

    def image_of(image: Any) -> tuple[Any, dict[str, Any]]:
        identity = number_or_text(image["id"])
        captions.setdefault(identity, [])
        _text(image["file_name"])
        return identity, image

    def annotate(annotation: Any) -> Refused | None:
        identity = number_or_text(annotation["image_id"])
        if identity not in captions:
            message = f"no image has the id {identity!r}"
            return Refused(
                source=f"annotation {annotation.get('id')}", kind="annotation_without_image", message=message
            )
        captions[identity].extend(texts_in(annotation["caption"]))
        return None

    images = list(each(path, document["images"], image_of, layout="coco", name="image"))
    for refused in each(path, document["annotations"], annotate, layout="coco", name="annotation"):
        if refused is not None:
            yield refused
    for found in images:
        if isinstance(found, Refused):
            yield found
        else:
            identity, image = found
            fields = {name: value for name, value in image.items() if name != "file_name"}
            yield Entry(picture=image["file_name"], captions=tuple(captions[identity]), fields=fields)


def read_karpathy(path: Path, document: dict[str, Any], splits: Sequence[str] = ()) -> Iterator[Entry | Refused]:
    """The images of Karpathy's `dataset_*.json` in these splits, or in all.

    Raises:
        SourceError: if a split has no image, or all images are of another layout.
    """
    names = [image.get("split") for image in document["images"] if isinstance(image, dict)]
    found = list(dict.fromkeys(name for name in names if isinstance(name, str)))
    for split in splits:
        if split not in found:
            raise SourceError(f"{path} has no images in the split {split}; its splits are {', '.join(found)}")

    def entry(image: Any) -> Entry | None:
        if image["split"] not in (splits or found):
            return None
        folder, name = image.get("filepath"), _text(image["filename"])  # Flickr's files have no folder
        used = ("filepath", "filename", "sentences", "sentids")
        return Entry(
            picture=f"{folder}/{name}" if folder else name,
            captions=texts_in([sentence["raw"] for sentence in image["sentences"]]),
            fields={name: value for name, value in image.items() if name not in used},
        )

    return filter(None, each(path, document["images"], entry, layout="karpathy", name="image"))


def _text(name: Any) -> str:
    if not isinstance(name, str) or not name:
        raise TypeError(f"the name of an image is a text, not {name!r}")
    return name
