"""Class names and prompt templates: published sets, under the names that users of CLIP_benchmark know, and files.

Source: OpenAI CLIP, open_clip 3.3.0 and CLIP_benchmark 1.6.2; each file in `classes` says which.
"""

import difflib
import json
import logging
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any

from contracap.data.annotations import read_list

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
TEMPLATE = "a photo of a {}."  # for a single template
TEMPLATES = (
    TEMPLATE,
    "a blurry photo of a {}.",
    "a close-up photo of a {}.",
    "a bright photo of a {}.",
    "a dark photo of a {}.",
    "a photo of the {}.",
    "an image of one {}.",
    "there is a {} in the photo.",
)
PLACEHOLDER = re.compile(r"\{\w*\}")
logger = logging.getLogger(__name__)


def load_classes(source: str | Path) -> tuple[str, ...]:
    """Return class names in the order of the labels.

    Args:
        source: the name of a published set, such as `imagenet1k`; a text file with a name on each line; or a JSON file
            with a list, or with an object that has a list `classes`.

    Raises: ValueError: if there is no such set, or the file holds no such list. FileNotFoundError: if there is no such
        file.
    """
    if (found := _find_set(source)) is not None:
        if not found.classes:
            raise ValueError(f"{str(source)!r} has templates alone; name the classes otherwise, such as {IMAGENET!r}")
        return found.classes
    names = read_list(Path(source), "classes")
    if repeated := [name for name, count in Counter(names).items() if count > 1]:
        logger.warning(
            f"{source}: {len(repeated)} of the class names are there twice or more, such as {repeated[0]!r}: "
            "the model cannot tell these classes apart; give each a name of its own"
        )
    return names


def load_templates(source: str | Path) -> tuple[str, ...]:
    """Return prompt templates, each with {} for the class name.

    Args:
        source: a single template; the name of a published set, such as `imagenet1k` or `imagenet-simple`; a text file
            with a template on each line; or a JSON file with a list, or with an object that has a list `templates`. In
            a file the placeholder may have a name, such as {c} in those of CLIP_benchmark.

    Raises: ValueError: if there is no such set, or the file holds no such list. FileNotFoundError: if there is no such
        file.
    """
    if "{" in str(source) and not Path(source).exists():
        return check_templates((str(source),))
    try:
        found = _find_set(source)
    except ValueError as error:
        raise ValueError(f"{error}. A template of your own has {{}} where the class name goes") from None
    if found is not None:
        return found.templates
    templates = [PLACEHOLDER.sub("{}", template) for template in read_list(Path(source), "templates")]
    try:
        return check_templates(templates)
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from None


def templates_for(classes: str | Path | None) -> tuple[str, ...]:
    """Return the default templates for classes: those of a published set, else `TEMPLATES`.

    Raises: ValueError: if there is no such set.
    """
    found = None if classes is None else _find_set(classes)
    return TEMPLATES if found is None else found.templates


def check_classes(names: Any) -> tuple[str, ...]:
    """Raises: ValueError: unless these are class names."""
    return _check_texts(names, "class names")


def check_templates(templates: Any) -> tuple[str, ...]:
    """Raises: ValueError: unless these are templates."""
    for template in _check_texts(templates, "templates"):
        if "{}" not in template:
            raise ValueError(f"the template {template!r} has no {{}} for the class name")
    return tuple(templates)


def _check_texts(texts: Any, what: str) -> tuple[str, ...]:
    """Empty texts are allowed, because a published set has one. `read_list` refuses them in files."""
    is_list = isinstance(texts, Sequence) and not isinstance(texts, str)
    if not is_list or not texts or not all(isinstance(text, str) for text in texts):
        raise ValueError(f"the {what} must be a list of texts, at least one")
    return tuple(texts)


@dataclass(frozen=True, kw_only=True)
class PublishedSet:
    """Class names and templates of one data set.

    Attributes:
        classes: in the order of the labels; none if it is a list of templates alone.
        templates: {} stands for the class name; ImageNet's if the set has none of its own.
        origin: the source of both.
    """

    classes: tuple[str, ...]
    templates: tuple[str, ...]
    origin: str


def published_set(name: str) -> PublishedSet:
    """Return the set of this name, such as `imagenet1k`, `cifar10`, `vtab/eurosat` or `wds/vtab/eurosat`.

    Raises: ValueError: if there is none; names the nearest.
    """
    file = _file(name)
    if file is None:
        near = difflib.get_close_matches(name.rpartition("/")[2], published_names(), n=3, cutoff=0.5)
        some = f"some are {', '.join(WELL_KNOWN)}, all are in {_folder()}"
        hint = f"the nearest are {', '.join(near)}" if near else some
        raise ValueError(
            f"no published classes or templates are called {name!r}; {hint}; else name a .txt or JSON file"
        )
    content = json.loads(file.read_text(encoding="utf-8"))
    return PublishedSet(
        classes=tuple(content.get("classes", ())),
        templates=tuple(content["templates"]) if "templates" in content else published_set(IMAGENET).templates,
        origin=content["origin"],
    )


def main_name(name: str) -> str | None:
    """Return the one name for all names of a set, such as `vtab/flowers` for `wds/vtab/flowers`; None if there is no
    such set."""
    file = _file(name)
    if file is None:
        return None
    stem = file.name.removesuffix(".json")
    return f"vtab/{stem.removesuffix(VTAB)}" if stem.endswith(VTAB) else stem


def published_names() -> list[str]:
    """Return all names, without the `vtab/` and `wds/` that they may start with."""
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


def _find_set(source: str | Path) -> PublishedSet | None:
    """Return the set of this name; None if it means a file: one that exists, or a name with a suffix."""
    name = str(source)  # unchanged: ./cifar10 is a file
    if _file(name) is None and (Path(source).exists() or (Path(source).suffix and "{}" not in name)):
        return None
    return published_set(name)
