"""Class names and prompt templates as they were published, under the names that users of CLIP_benchmark know.

Source: OpenAI CLIP, open_clip 3.3.0 and CLIP_benchmark 1.6.2; each file in `classes` says which.
"""

import difflib
import json
from dataclasses import dataclass
from importlib.resources import files
from importlib.resources.abc import Traversable

IMAGENET = "imagenet1k"
ALIKE = {  # sets that have another's classes and templates
    "imagenet1k-unverified": IMAGENET,
    "imagenet-w": IMAGENET,
    "imagenetv2": IMAGENET,
    "imagenet_sketch": IMAGENET,
    "voc2007_multilabel": "voc2007",
}
WELL_KNOWN = (IMAGENET, "cifar10", "food101")
VTAB = "_vtab"  # ends the file of a set that VTAB has with other names than the set itself


@dataclass(frozen=True, kw_only=True)
class Published:
    """One set.

    Attributes:
        classes: in the order of the labels; none if it is a list of templates alone.
        templates: {} where the name goes; ImageNet's if the set has none of its own.
        origin: where both come from.
    """

    classes: tuple[str, ...]
    templates: tuple[str, ...]
    origin: str


def published(name: str) -> Published:
    """The set of that name, such as `imagenet1k`, `cifar10`, `vtab/eurosat` or `wds/vtab/eurosat`.

    Raises: ValueError: if there is none; names the nearest.
    """
    file = _file(name)
    if file is None:
        if "{}" in name:
            raise ValueError(
                f"{name!r} is neither a published name nor a file; give templates as a list in a JSON file"
            )
        near = difflib.get_close_matches(name.rpartition("/")[2], published_names(), n=3, cutoff=0.5)
        said = (
            f"the nearest are {', '.join(near)}"
            if near
            else f"some are {', '.join(WELL_KNOWN)}, all are in {_folder()}"
        )
        raise ValueError(f"no published classes or templates are called {name!r}; {said}; else give a JSON file")
    content = json.loads(file.read_text(encoding="utf-8"))
    return Published(
        classes=tuple(content.get("classes", ())),
        templates=tuple(content["templates"]) if "templates" in content else published(IMAGENET).templates,
        origin=content["origin"],
    )


def is_published(name: str) -> bool:
    """Whether there is a set of that name."""
    return _file(name) is not None


def main_name(name: str) -> str | None:
    """The same for all names of a set, such as `vtab/flowers` for `wds/vtab/flowers`; None if there is no such set."""
    file = _file(name)
    if file is None:
        return None
    stem = file.name.removesuffix(".json")
    return f"vtab/{stem.removesuffix(VTAB)}" if stem.endswith(VTAB) else stem


def published_names() -> list[str]:
    """All names, without the `vtab/` and `wds/` that may stand before them."""
    stems = {file.name.removesuffix(".json") for file in _folder().iterdir() if file.name.endswith(".json")}
    return sorted({stem for stem in stems if not stem.endswith(VTAB)} | set(ALIKE))


def _file(name: str) -> Traversable | None:
    prefix, _, short = name.removeprefix("wds/").rpartition("/")
    if prefix not in ("", "vtab") or not short or short.endswith(VTAB):
        return None
    short = ALIKE.get(short, short)
    candidates = [f"{short}{VTAB}"] if prefix else []
    found = [_folder() / f"{stem}.json" for stem in [*candidates, short]]
    return next((file for file in found if file.is_file()), None)


def _folder() -> Traversable:
    return files("contracap").joinpath("evaluation", "classes")
