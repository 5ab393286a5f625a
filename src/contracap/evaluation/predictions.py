"""Captions by a model, and their files: lists with the references, or COCO's results and annotations."""

import hashlib
import json
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from contracap.data.annotations import read_json
from contracap.data.datasets.tables import is_lines
from contracap.data.samples import texts_in
from contracap.evaluation.metrics.scores import domain_name
from contracap.evaluation.metrics.tokens import has_word
from contracap.files import write_text


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """A caption of an image by a model, and those that people wrote.

    Attributes:
        key: identifies the image. In a file it is the image's id, or else its name, or else a digest of the captions.
        captions: the references, which people wrote.
        image_name: the name of the image's file, if it is known.
        domain: the part of NoCaps that the image belongs to, such as `near`.
        cider: CIDEr of this image within the set, from 0 to 10; None if it was not computed.
    """

    key: str
    prediction: str
    captions: tuple[str, ...]
    image_name: str | None = None
    domain: str | None = None
    cider: float | None = None


def read_predictions(path: Path, references: Mapping[str, Prediction] | None = None) -> list[Prediction]:
    """Return the predictions of a file, in its order.

    Args:
        path: a JSON list of objects with `prediction` and `captions`, and maybe `image_name`, `file_name` and NoCaps'
            `domain`; with `references`, of objects with `image_id` and `caption`, the layout of COCO's results.
        references: the result of `read_references`. Images that are not in `path` do not count.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if a file has another layout; names it, and the first entry that is wrong.
    """
    if is_lines(path):
        raise ValueError(
            f"{path} is JSON lines; wanted is one JSON list of objects with `captions` and `prediction`, or, with "
            "--references, of objects with `image_id` and `caption`"
        )
    found = read_json(path)
    if not isinstance(found, list) or not found:
        raise ValueError(f"{path} must be a JSON list of at least one entry")
    entries, seen = list[Prediction](), set[str]()
    for number, value in enumerate(found):
        try:
            if not isinstance(value, dict):
                raise ValueError(f"must be an object, not {type(value).__name__}")
            entry = _own(value) if references is None else _coco(value, references)
            if entry.key in seen and (references is not None or entry.image_name):
                raise ValueError(f"is the second one of image {entry.key}")
        except ValueError as error:
            raise ValueError(f"{path}, entry {number} (counted from 0): {error}") from None
        entries.append(entry)
        seen.add(entry.key)
    return entries


def read_references(path: Path) -> dict[str, Prediction]:
    """Return the images by their ids, with empty predictions, from annotations in COCO's layout; `images` may be
    missing.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it has another layout.
    """
    document = read_json(path)
    captions = defaultdict[str, list[str]](list)
    try:
        images = {str(image["id"]): image for image in document.get("images", ())}
        for annotation in document["annotations"]:
            captions[str(annotation["image_id"])].extend(texts_in(annotation["caption"]))
    except (LookupError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{path} does not have the layout of COCO's annotations, an object with `annotations`, each of them with "
            f"`image_id` and `caption`: {error!r}"
        ) from None
    return {
        key: Prediction(
            key=key,
            prediction="",
            captions=tuple(written),
            image_name=images.get(key, {}).get("file_name"),
            domain=domain_name(images.get(key, {}).get("domain")),
        )
        for key, written in captions.items()
    }


def write_predictions(path: str | Path, predictions: Sequence[Prediction]) -> None:
    """Write a JSON list that `read_predictions` reads, with an entry on each line; a whole file or none.

    The key is the `image_name`, and the name of the image's file the `file_name`, unless another image has the same.
    """
    keys, names = Counter(one.key for one in predictions), Counter(one.image_name for one in predictions)
    entries = list[dict[str, Any]]()
    for one in predictions:
        entry: dict[str, Any] = {"image_name": one.key} if keys[one.key] == 1 else {}
        if one.image_name is not None and names[one.image_name] == 1:
            entry["file_name"] = one.image_name
        entry |= {"captions": one.captions, "prediction": one.prediction}
        entries.append(entry | ({"domain": f"{one.domain}-domain"} if one.domain else {}))
    write_list(path, entries)


def write_list(path: str | Path, entries: Sequence[Mapping[str, Any]]) -> None:
    """Write a JSON list with an entry on each line; a whole file or none."""
    write_text(path, "[\n" + ",\n".join(map(json.dumps, entries)) + "\n]\n")


def _own(value: dict[str, Any]) -> Prediction:
    if "captions" not in value and "image_id" in value:
        raise ValueError("has no `captions`, but an `image_id`: name the file with the references, --references FILE")
    captions = value.get("captions")
    if not isinstance(captions, list) or not all(isinstance(caption, str) for caption in captions):
        raise ValueError("needs a list of texts under `captions`")
    if not has_word(captions):
        raise ValueError("has no reference in `captions` with a word in it")
    written = texts_in(captions)
    key, name = (found if isinstance(found := value.get(field), str) else "" for field in ("image_name", "file_name"))
    return Prediction(
        key=key or name or hashlib.sha256(json.dumps(written).encode()).hexdigest()[:16],
        prediction=_text(value, "prediction"),
        captions=written,
        image_name=name or key or None,
        domain=domain_name(value.get("domain")),
    )


def _coco(value: dict[str, Any], known: Mapping[str, Prediction]) -> Prediction:
    if "image_id" not in value:
        raise ValueError("needs an `image_id`, whose references are in the other file")
    image = known.get(str(value["image_id"]))
    if image is None:
        one = f"; one of theirs is {next(iter(known))}" if known else ""
        raise ValueError(f"the image_id {value['image_id']!r} is not among the references{one}")
    if not has_word(image.captions):
        raise ValueError(f"image {value['image_id']} has no reference with a word in it")
    return replace(image, prediction=_text(value, "caption"))


def _text(value: dict[str, Any], name: str) -> str:
    if not isinstance(value.get(name), str):
        raise ValueError(f"needs a text under `{name}`")
    return value[name]
