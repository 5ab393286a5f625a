"""Files of captions that are to be scored: a list with references in it, or COCO's results and annotations."""

import hashlib
import json
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from contracap.data.annotations import read_json
from contracap.data.datasets.tables import is_lines
from contracap.data.shards import texts_in
from contracap.evaluation.metrics.scores import domain_name
from contracap.evaluation.metrics.tokens import has_word


@dataclass(frozen=True, kw_only=True)
class Entry:
    """What a model wrote for one picture, and what people wrote.

    Attributes:
        key: the picture's id, else its file's name, else a digest of what people wrote of it: files that hold other
            pictures, or the same in another order, have other keys.
        picture: name of the picture's file, if it is known.
        domain: part of NoCaps that the picture belongs to, such as `near`.
    """

    key: str
    prediction: str
    captions: tuple[str, ...]
    picture: str | None = None
    domain: str | None = None


def read_entries(path: Path, references: Mapping[str, Entry] | None = None) -> list[Entry]:
    """The entries of a file, in its order.

    Args:
        path: a JSON list of objects with `prediction` and `captions`, and maybe `image_name` and NoCaps' `domain`; with
            `references`, of objects with `image_id` and `caption`, the layout of COCO's results.
        references: what `read_references` found. Pictures that `path` has nothing of do not count.

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
    entries, seen = list[Entry](), set[str]()
    for number, value in enumerate(found):
        try:
            if not isinstance(value, dict):
                raise ValueError(f"must be an object, not {type(value).__name__}")
            entry = _own(value) if references is None else _coco(value, references)
            if entry.key in seen and (references is not None or entry.picture):
                raise ValueError(f"is the second one of picture {entry.key}")
        except ValueError as error:
            raise ValueError(f"{path}, entry {number} (counted from 0): {error}") from None
        entries.append(entry)
        seen.add(entry.key)
    return entries


def read_references(path: Path) -> dict[str, Entry]:
    """Pictures by their ids, with nothing predicted, from annotations in COCO's layout; `images` may be missing.

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
        key: Entry(
            key=key,
            prediction="",
            captions=tuple(written),
            picture=images.get(key, {}).get("file_name"),
            domain=domain_name(images.get(key, {}).get("domain")),
        )
        for key, written in captions.items()
    }


def _own(value: dict[str, Any]) -> Entry:
    if "captions" not in value and "image_id" in value:
        raise ValueError("has no `captions`, but an `image_id`: name the file with the references, --references FILE")
    captions = value.get("captions")
    if not isinstance(captions, list) or not all(isinstance(caption, str) for caption in captions):
        raise ValueError("needs a list of texts under `captions`")
    if not has_word(captions):
        raise ValueError("has no reference in `captions` with a word in it")
    written, picture = texts_in(captions), value.get("image_name")
    named = isinstance(picture, str) and picture
    return Entry(
        key=picture if named else hashlib.sha256(json.dumps(written).encode()).hexdigest()[:16],
        prediction=_text(value, "prediction"),
        captions=written,
        picture=picture if named else None,
        domain=domain_name(value.get("domain")),
    )


def _coco(value: dict[str, Any], known: Mapping[str, Entry]) -> Entry:
    if "image_id" not in value:
        raise ValueError("needs an `image_id`, whose references are in the other file")
    picture = known.get(str(value["image_id"]))
    if picture is None:
        one = f"; one of theirs is {next(iter(known))}" if known else ""
        raise ValueError(f"the image_id {value['image_id']!r} is not among the references{one}")
    if not has_word(picture.captions):
        raise ValueError(f"picture {value['image_id']} has no reference with a word in it")
    return replace(picture, prediction=_text(value, "caption"))


def _text(value: dict[str, Any], name: str) -> str:
    if not isinstance(value.get(name), str):
        raise ValueError(f"needs a text under `{name}`")
    return value[name]
