"""Retrieval: recall@K from texts to images and from images to texts, with any number of captions an image.

Source: LAION-AI/CLIP_benchmark, commit 48de38c, zeroshot_retrieval, whose figures are called image_retrieval_recall
(text to image) and text_retrieval_recall (image to text).
"""

from collections.abc import Generator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Float32, Int64
from torch import Tensor

from contracap.data.captions import require_captions
from contracap.data.samples import Sample
from contracap.evaluation.distributed import encode_in_shares, run_on_every_rank
from contracap.evaluation.features import Source, image_pixels, open_source, progress, require_finite, sample_batches
from contracap.evaluation.metrics.ranking import compute_share, find_positions
from contracap.evaluation.result import Result
from contracap.model.coca import CoCa, evaluating
from contracap.parallel.process_group import ProcessGroup
from contracap.processor import Processor


@dataclass(frozen=True, kw_only=True)
class Features:
    """Images and captions as the model embeds them, on the CPU.

    Attributes:
        image_of_text: the row of `images` that each caption belongs to.
        keys: keys of the images.
        captions: one for each row of `texts`.
    """

    images: Float32[Tensor, "image embed"]
    texts: Float32[Tensor, "text embed"]
    image_of_text: Int64[Tensor, "text"]
    keys: list[str]
    captions: list[str]


def evaluate_retrieval(
    model: CoCa,
    processor: Processor,
    data: Source,
    *,
    ks: Sequence[int] = (1, 5, 10),
    batch_size: int = 64,
    process_group: ProcessGroup = ProcessGroup(),
) -> Result[Features]:
    """Return recall@K over all images and all their captions, as shares from 0 to 1.

    `text_to_image_recall@K` is the share of captions whose image is among the K best images for them,
    `image_to_text_recall@K` the share of images with at least one of their captions among the K best captions.
    The predictions are the `Features` that were ranked.

    Args:
        ks: each K of recall@K.
        batch_size: images, and captions, embedded at a time.
        process_group: the ranks that run this together, each on its share; the figures are those of one process.

    Raises: ValueError: if a K is below 1, an image has no caption or cannot be read, the features are not finite, or
        another rank failed.
    """
    _check_ks(ks)
    features = embed_pairs(model, processor, data, batch_size=batch_size, process_group=process_group)

    def move_features() -> tuple[Tensor, Tensor, Tensor]:
        device = model.device
        return features.images.to(device), features.texts.to(device), features.image_of_text.to(device)

    text_positions, image_positions = find_positions(*run_on_every_rank(process_group, move_features), process_group)
    hits, reasons = _hits(text_positions, image_positions, ks)
    images, per_sample = len(features.images), {}
    for name, hit in hits.items():
        owner = features.image_of_text if name.startswith("text_to_image") else torch.arange(images)
        parts = torch.zeros(images, dtype=torch.float64).index_add_(0, owner, hit.double())
        per_sample[name] = (parts * (images / len(hit))).tolist()
    return Result.of_samples(
        features.keys,
        {name: compute_share(hit) for name, hit in hits.items()},
        per_sample=per_sample,
        predictions=features,
        details={"captions": len(features.texts)},
        reasons=reasons,
    )


@torch.inference_mode()
def embed_pairs(
    model: CoCa, processor: Processor, source: Source, *, batch_size: int, process_group: ProcessGroup = ProcessGroup()
) -> Features:
    """Return the embeddings of all images and all their captions.

    Args:
        process_group: the ranks that call this with the same samples; each embeds every n-th batch and gets all
            features.

    Raises: ValueError: if an image has no caption or cannot be read, or the features are not finite.
    """
    keys, captions, image_of_text = list[str](), list[str](), list[int]()
    samples = open_source(source)

    def batches() -> Generator[list[Sample], None, None]:
        for batch in sample_batches(samples, batch_size):
            for sample in batch:
                captions.extend(require_captions(sample))
                image_of_text.extend([len(keys)] * len(sample.captions))
                keys.append(sample.key)
            yield batch

    def encode(pixels: Tensor) -> Tensor:
        bar.update(len(pixels))
        return model.encode_image(pixels.to(model.device))

    with evaluating(model), progress(samples) as bar:
        images = encode_in_shares(process_group, batches(), lambda batch: image_pixels(batch, processor), encode)
        texts = encode_in_shares(
            process_group,
            (captions[first : first + batch_size] for first in range(0, len(captions), batch_size)),
            processor.texts,
            lambda ids: model.encode_text(ids.to(model.device)),
        )
    return Features(
        images=require_finite(images, "images"),
        texts=require_finite(texts, "texts"),
        image_of_text=torch.tensor(image_of_text),
        keys=keys,
        captions=captions,
    )


def compute_recall(
    image_features: Float[Tensor, "image embed"],
    text_features: Float[Tensor, "text embed"],
    image_of_text: Int64[Tensor, "text"],
    ks: Sequence[int] = (1, 5, 10),
) -> dict[str, float]:
    """Return recall@K in both directions, from 0 to 1, of embeddings with unit rows.

    Args:
        image_of_text: the row of `image_features` that each text belongs to; each image has at least one.
        ks: each K of recall@K.

    Raises: ValueError: if a K is below 1 or above the number of candidates, an image has no text, or features are not
        finite.
    """
    _check_ks(ks)
    hits, reasons = _hits(*find_positions(image_features, text_features, image_of_text), ks)
    for reason in reasons.values():
        raise ValueError(reason)
    return {name: compute_share(hit) for name, hit in hits.items()}


def _hits(
    text_positions: Int64[Tensor, "text"], image_positions: Int64[Tensor, "image"], ks: Sequence[int]
) -> tuple[dict[str, Bool[Tensor, "query"]], dict[str, str]]:
    """Return, by the name of each recall, a mask of the queries that hit; and reasons why a recall has no value."""
    hits, reasons = dict[str, Tensor](), dict[str, str]()
    for direction, found, candidates, what in (
        ("text_to_image", text_positions, len(image_positions), "images"),
        ("image_to_text", image_positions, len(text_positions), "captions"),
    ):
        for k in ks:
            name = f"{direction}_recall@{k}"
            if k <= candidates:
                hits[name] = found < k
            else:
                reasons[name] = f"{name} needs at least {k} {what} to choose from; there are {candidates}"
    return hits, reasons


def _check_ks(ks: Sequence[int]) -> None:
    """Raises: ValueError: if a K is below 1."""
    if wrong := [k for k in ks if k < 1]:
        raise ValueError(f"recall@{wrong[0]} needs a K from 1")
