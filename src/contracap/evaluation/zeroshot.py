"""Zero-shot classification: image embeddings compared with those of class names in prompts.

Source: LAION-AI/CLIP_benchmark, commit 48de38c, zeroshot_classification; here the last product is in fp32.
"""

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from einops import rearrange
from jaxtyping import Float, Float32
from torch import Tensor
from torch.nn.functional import normalize

from contracap.data.annotations import number_or_text
from contracap.data.class_folders import ClassFolders, class_folders
from contracap.data.samples import Sample
from contracap.evaluation.class_names import TEMPLATES, check_classes, check_templates
from contracap.evaluation.features import Source, embed_images, embed_texts, full_precision, pixel_batches
from contracap.evaluation.metrics.classification import accuracy_parts, mean_average_precision
from contracap.evaluation.result import Result
from contracap.model.coca import CoCa, evaluating
from contracap.processor import Processor

PROMPTS = 256  # embedded at a time: see docs/performance.md


@dataclass(frozen=True, kw_only=True)
class ChosenClasses:
    """The class of each image, and the one that the model chooses, as indices into `classes`."""

    classes: tuple[str, ...]
    labels: list[int]
    predictions: list[int]


def evaluate_zeroshot(
    model: CoCa,
    processor: Processor,
    data: Source,
    *,
    classes: Sequence[str] | None = None,
    templates: Sequence[str] = TEMPLATES,
    batch_size: int = 64,
) -> Result:
    """Return top-1 and top-5 accuracy and mean per-class recall, from 0 to 1. The predictions are a `ChosenClasses`.

    A sample's class is its field `label` (or its `.cls` member): an index into `classes`. If scores are equal, the
    first class wins. The mean per-class recall is over the classes that occur.

    If images have several classes, the result is `mean_average_precision` over all classes, without predictions. Their
    field is `labels`, a list of indices, or CLIP_benchmark's `.npy` member with a one or a zero for each class. If
    scores are equal, the first image is ranked first.

    Args:
        data: shards, samples, or a folder with a subfolder of images for each class.
        classes: names of the classes; by default those of the subfolders, with blanks for underscores.
        batch_size: images at a time.

    Raises: ValueError: if there is no class, their number is not that of the subfolders, a template has no {}, a sample
        has no label or one without a class, some have one and others several, or an image cannot be read.
    """
    data, classes = match_classes(data, classes)
    labels, scores, keys = list[int | tuple[int, ...]](), list[Tensor](), list[str]()
    with torch.inference_mode(), evaluating(model):
        weights = build_classifier(model, processor, classes, templates)
        with pixel_batches(data, processor, batch_size) as batches:
            for batch, pixels in batches:
                labels += [label_of(sample, len(classes)) for sample in batch]
                keys += [sample.key for sample in batch]
                scores.append(compute_logits(embed_images(model, pixels), weights).cpu())
    details = {"classes": len(classes), "templates": len(templates)}
    single = [label for label in labels if isinstance(label, int)]
    several = [label for label in labels if not isinstance(label, int)]
    if single and several:
        first = next(key for key, label in zip(keys, labels, strict=True) if not isinstance(label, int))
        raise ValueError(f"sample {first} has `labels`, others have one `label`: give all samples the same field")
    if several:
        precision = mean_average_precision(torch.cat(scores), several)
        return Result.of_samples(keys, {"mean_average_precision": precision}, details=details)
    table = torch.cat(scores)
    parts, reasons = accuracy_parts(table, torch.tensor(single)), {}
    if len(classes) < 5:
        del parts["acc5"]
        reasons = {"acc5": f"acc5 needs at least 5 classes; there are {len(classes)}"}
    return Result.of_samples(
        keys,
        {name: float(part.mean()) for name, part in parts.items()},
        per_sample={name: part.tolist() for name, part in parts.items()},
        predictions=ChosenClasses(classes=classes, labels=single, predictions=table.argmax(dim=1).tolist()),
        details=details,
        reasons=reasons,
    )


def label_of(sample: Sample, classes: int) -> int | tuple[int, ...]:
    """Return the class of a sample, or a tuple of its classes, as `evaluate_zeroshot` describes them.

    Raises: ValueError: if it has no label, or one without a class.
    """
    label, labels = sample.fields.get("label"), sample.fields.get("labels")
    if label is None and labels is None:
        labels = _read_marks(sample.npy, classes)
    several = label is None and isinstance(labels, list)
    found = [number_or_text(each) for each in (labels if several else [label])]  # tables of text write numbers so
    if not all(type(each) is int and 0 <= each < classes for each in found):  # True is an int, too
        has = "no label" if found == [None] else f"the label {labels if several else label!r}"
        raise ValueError(
            f"sample {sample.key} of {sample.shard} has {has}: give each sample a field `label` or a .cls member "
            f"from 0 to {classes - 1}; or a list of such numbers as its field `labels`, or a .npy member "
            "with a one or a zero for each class"
        )
    return tuple(found) if several else found[0]


@torch.inference_mode()
def build_classifier(
    model: CoCa,
    processor: Processor,
    classes: Sequence[str],
    templates: Sequence[str] = TEMPLATES,
    *,
    batch_size: int = PROMPTS,
) -> Float32[Tensor, "class embed"]:
    """Return a unit row for each class: the mean of the unit embeddings of its prompts, normalised again.

    Args:
        batch_size: prompts at a time.

    Raises: ValueError: if there is no class, or a template has no {} for the class name.
    """
    classes, templates = check_classes(classes), check_templates(templates)
    # Grouped by template: the text before the class names is then computed once for many of them.
    prompts = [template.replace("{}", name) for template in templates for name in classes]
    with evaluating(model):
        return mean_per_class(embed_texts(model, processor, prompts, batch_size), classes=len(classes))


def mean_per_class(features: Float32[Tensor, "prompt embed"], *, classes: int) -> Float32[Tensor, "class embed"]:
    """Return unit rows of classes from embeddings of prompts, which are grouped by template."""
    per_template = rearrange(normalize(features, dim=-1), "(template name) embed -> template name embed", name=classes)
    return normalize(per_template.mean(dim=0), dim=-1)


def compute_logits(
    image_features: Float[Tensor, "image embed"], weights: Float[Tensor, "class embed"]
) -> Float32[Tensor, "image class"]:
    """Return 100 times the cosine of each image and each class, in fp32."""
    with full_precision(image_features.device):
        return 100.0 * image_features.float() @ weights.float().T


def compare_with_labels(
    image_features: Float[Tensor, "*image embed"], weights: Float[Tensor, "label embed"], logit_scale: Tensor | float
) -> tuple[Float[Tensor, "*image label"], Float[Tensor, "*image label"]]:
    """Return the cosine of each image and each label, and each label's probability at the model's temperature.

    Args:
        image_features: unit rows.
        weights: rows of `build_classifier`, one for each label.
        logit_scale: factor of the cosines before softmax, `exp` of the model's parameter.
    """
    cosines = image_features @ weights.T
    return cosines, (logit_scale * cosines).softmax(dim=-1)


def count_characters(labels: Sequence[str], templates: Sequence[str]) -> int:
    """Return how many characters the prompts of all labels in all templates have, before they are made."""
    return sum(len(each) * len(labels) + each.count("{}") * sum(map(len, labels)) for each in templates)


def match_classes(data: Source, classes: Sequence[str] | None) -> tuple[Source, tuple[str, ...]]:
    """Return the data, and the names of the classes. A folder with a subfolder for each class becomes `ClassFolders`,
    whose labels are those of the classes; data of that type was matched before.

    Raises: ValueError: if nothing names the classes, or the names are not as many as the subfolders.
    """
    if isinstance(data, ClassFolders) and classes is not None:
        return data, check_classes(classes)
    folders = class_folders(data) if isinstance(data, str | Path | Sequence) else None
    if folders is not None:
        if classes is None:
            return folders, tuple(name.replace("_", " ") for name in folders.names)
        folders.match(check_classes(classes))
    if classes is None:
        raise ValueError(
            "`classes` is missing: give it a file of class names, or a published name such as imagenet1k; only a "
            "folder with a subfolder for each class says them itself"
        )
    return folders or data, check_classes(classes)


def _read_marks(content: bytes, classes: int) -> list[int] | None:
    """Return the indices of the ones in a NumPy file; None if it is something else, such as an embedding, or broken."""
    try:
        array = np.lib.format.read_array(io.BytesIO(content), allow_pickle=False)
    except Exception:  # damaged bytes make its parser raise nearly anything
        return None
    is_mark = array.shape == (classes,) and array.dtype.kind in "biuf" and bool(np.isin(array, (0, 1)).all())
    return np.flatnonzero(array).tolist() if is_mark else None
