"""Zero-shot classification: pictures against class names in prompts.

Source: LAION-AI/CLIP_benchmark, commit 48de38c, zeroshot_classification; its last product in fp32.
"""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from einops import rearrange
from jaxtyping import Float, Float32, Int64
from torch import Tensor
from torch.nn.functional import normalize

from contracap.data.shards import Sample
from contracap.evaluation.features import Source, embed_pictures, embed_texts, full_precision, sample_batches
from contracap.evaluation.ranking import places, share
from contracap.model.coca import CoCa, evaluating
from contracap.processor import Processor

TEMPLATE = "a photo of a {}."  # where one has to do
TEMPLATES = (
    TEMPLATE,
    "a blurry photo of a {}.",
    "a close-up photo of a {}.",
    "a bright photo of a {}.",
    "a dark photo of a {}.",
    "a photo of the {}.",
    "a picture of one {}.",
    "there is a {} in the photo.",
)


class ZeroShot:
    """Top-1 and top-5 accuracy and mean per-class recall, as shares from 0 to 1.

    A sample's class is its field `label` (or its `.cls` member): an index into `classes`. Of equal scores the class
    that comes first stands first. The mean per-class recall is over the classes that occur.

    Attributes:
        samples: pictures, once `run` has come to its end; likewise the others.
        reasons: `acc5`, where there are fewer than five classes.
        details: the numbers of classes and of templates.
        labels: the class of each picture.
        predictions: the best class of each picture.
    """

    def __init__(
        self,
        source: Source,
        processor: Processor,
        *,
        classes: Sequence[str],
        templates: Sequence[str] = TEMPLATES,
        batch_size: int = 64,
    ):
        """Raises: ValueError: if there is no class, or a template has no {} for the class name."""
        self.source, self.processor, self.batch_size = source, processor, batch_size
        self.classes, self.templates = check_classes(classes), check_templates(templates)
        self.samples = 0
        self.keys: list[str] = []
        self.per_sample: dict[str, list[float]] = {}
        self.reasons: dict[str, str] = {}
        self.details: dict[str, Any] = {}
        self.labels: list[int] = []
        self.predictions: list[int] = []

    def run(self, model: CoCa) -> Iterator[tuple[str, float]]:
        """Name and value of each figure.

        Raises:
            ValueError: if a sample has no label or one without a class, or a picture cannot be read.
        """
        scores, labels = self._scores(model)
        ranks = places(scores, labels)
        self.samples, self.labels = len(labels), labels.tolist()
        self.predictions = scores.argmax(dim=1).tolist()
        self.details = {"classes": len(self.classes), "templates": len(self.templates)}
        self.reasons = {}
        yield "acc1", share(ranks < 1)
        if len(self.classes) < 5:
            self.reasons["acc5"] = f"acc5 needs at least 5 classes; there are {len(self.classes)}"
        else:
            yield "acc5", share(ranks < 5)
        recalls = [share(ranks[labels == label] < 1) for label in labels.unique()]
        yield "mean_per_class_recall", sum(recalls) / len(recalls)

    @torch.inference_mode()
    def _scores(self, model: CoCa) -> tuple[Float32[Tensor, "picture class"], Int64[Tensor, "picture"]]:
        labels, scores = [], []
        with evaluating(model):
            weights = classifier(model, self.processor, self.classes, self.templates, batch_size=self.batch_size)
            for batch in sample_batches(self.source, self.batch_size):
                labels += [self.label(sample) for sample in batch]
                scores.append(logits(embed_pictures(model, self.processor, batch), weights).cpu())
        return torch.cat(scores), torch.tensor(labels)

    def label(self, sample: Sample) -> int:
        """The class of a sample.

        Raises: ValueError: if it has no label, or one without a class.
        """
        label = sample.fields.get("label")
        if not isinstance(label, int) or not 0 <= label < len(self.classes):
            raise ValueError(
                f"sample {sample.key} of {sample.shard} has "
                + ("no label" if label is None else f"the label {label!r}")
                + f": give each sample a field `label` or a .cls member from 0 to {len(self.classes) - 1}"
            )
        return label


@torch.inference_mode()
def classifier(
    model: CoCa,
    processor: Processor,
    classes: Sequence[str],
    templates: Sequence[str] = TEMPLATES,
    *,
    batch_size: int = 64,
) -> Float32[Tensor, "class embed"]:
    """A unit row for each class: the mean of the unit embeddings of its prompts, normalised again.

    Raises:
        ValueError: if there is no class, or a template has no {} for the class name.
    """
    classes, templates = check_classes(classes), check_templates(templates)
    prompts = [template.replace("{}", name) for name in classes for template in templates]
    with evaluating(model):
        features = normalize(embed_texts(model, processor, prompts, batch_size), dim=-1)
    per_class = rearrange(features, "(name template) embed -> name template embed", name=len(classes))
    return normalize(per_class.mean(dim=1), dim=-1)


def logits(
    image_features: Float[Tensor, "picture embed"], weights: Float[Tensor, "class embed"]
) -> Float32[Tensor, "picture class"]:
    """100 times the cosine of each picture and each class, in fp32."""
    with full_precision(image_features.device):
        return 100.0 * image_features.float() @ weights.float().T


def load_classes(path: str | Path) -> tuple[str, ...]:
    """Class names, in the order of the labels, from a JSON list or a JSON object with a list `classes`.

    Raises:
        ValueError: if the file holds no such list.
    """
    content = _read_json(path)
    names = content.get("classes") if isinstance(content, dict) else content
    try:
        return check_classes(names)
    except ValueError as error:
        raise ValueError(f"{path}: {error}; give a JSON list of names, or an object with a list `classes`") from None


def load_templates(path: str | Path) -> tuple[str, ...]:
    """Prompt templates from a JSON list of texts, each with {} where the class name goes.

    Raises:
        ValueError: if the file holds no such list.
    """
    try:
        return check_templates(_read_json(path))
    except ValueError as error:
        raise ValueError(f"{path}: {error}; give a JSON list of texts with {{}} where the class name goes") from None


def check_classes(names: Any) -> tuple[str, ...]:
    """Raises: ValueError: unless these are class names."""
    if not _are_texts(names):
        raise ValueError("the class names must be a list of texts, at least one")
    return tuple(names)


def check_templates(templates: Any) -> tuple[str, ...]:
    """Raises: ValueError: unless these are templates."""
    if not _are_texts(templates):
        raise ValueError("the templates must be a list of texts, at least one")
    for template in templates:
        if "{}" not in template:
            raise ValueError(f"the template {template!r} has no {{}} for the class name")
    return tuple(templates)


def _are_texts(texts: Any) -> bool:
    is_list = isinstance(texts, Sequence) and not isinstance(texts, str)
    return is_list and len(texts) > 0 and all(isinstance(text, str) for text in texts)


def _read_json(path: str | Path) -> Any:
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
