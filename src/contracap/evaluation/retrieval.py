"""Retrieval: recall@K from texts to pictures and from pictures to texts, with any number of captions a picture.

Source: LAION-AI/CLIP_benchmark, commit 48de38c, zeroshot_retrieval, whose figures are called image_retrieval_recall
(text to image) and text_retrieval_recall (image to text).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Float32, Int64
from torch import Tensor

from contracap.evaluation.features import Source, embed_pictures, embed_texts, finite, full_precision, sample_batches
from contracap.model.coca import CoCa, evaluating
from contracap.processor import Processor

CHUNK = 2**20  # scores that are held at a time: 4 MiB in fp32


@dataclass(frozen=True, kw_only=True)
class Features:
    """Pictures and captions as the model embeds them, on the CPU.

    Attributes:
        image_of_text: row of `images` that each caption belongs to.
        keys: of the pictures.
        captions: one for each row of `texts`.
    """

    images: Float32[Tensor, "image embed"]
    texts: Float32[Tensor, "text embed"]
    image_of_text: Int64[Tensor, "text"]
    keys: list[str]
    captions: list[str]


class Retrieval:
    """Recall@K over all pictures and all their captions, as shares from 0 to 1.

    `text_to_image_recall@K` is the share of captions whose picture is among the K best pictures for them,
    `image_to_text_recall@K` the share of pictures with at least one of their captions among the K best captions.

    Attributes:
        samples: pictures, once `run` has come to its end; likewise the others.
        reasons: recalls with more places than there are candidates, which are left out.
        details: the number of captions.
        features: what was ranked.
    """

    def __init__(self, source: Source, processor: Processor, *, ks: Sequence[int] = (1, 5, 10), batch_size: int = 64):
        self.source, self.processor, self.ks, self.batch_size = source, processor, tuple(ks), batch_size
        self.samples = 0
        self.keys: list[str] = []
        self.per_sample: dict[str, list[float]] = {}
        self.reasons: dict[str, str] = {}
        self.details: dict[str, Any] = {}
        self.features: Features | None = None

    def run(self, model: CoCa) -> Iterator[tuple[str, float]]:
        """Name and value of each recall.

        Raises:
            ValueError: if a picture has no caption or cannot be read, or the features are not finite.
        """
        self.features = embed(model, self.processor, self.source, batch_size=self.batch_size)
        images, texts = len(self.features.images), len(self.features.texts)
        self.samples, self.details = images, {"captions": texts}
        device = next(model.parameters()).device
        text_ranks, image_ranks = ranks(
            self.features.images.to(device), self.features.texts.to(device), self.features.image_of_text.to(device)
        )
        self.reasons = {}
        for direction, found, candidates, what in (
            ("text_to_image", text_ranks, images, "pictures"),
            ("image_to_text", image_ranks, texts, "captions"),
        ):
            for k in self.ks:
                name = f"{direction}_recall@{k}"
                if k > candidates:
                    self.reasons[name] = f"{name} needs at least {k} {what} to choose from; there are {candidates}"
                else:
                    yield name, share(found < k)


@torch.inference_mode()
def embed(model: CoCa, processor: Processor, source: Source, *, batch_size: int) -> Features:
    """Embeddings of all pictures and all their captions.

    Raises:
        ValueError: if a picture has no caption or cannot be read, or the features are not finite.
    """
    keys, captions, image_of_text, images = [], [], [], []
    with evaluating(model):
        for batch in sample_batches(source, batch_size):
            for sample in batch:
                if not sample.captions:
                    raise ValueError(f"sample {sample.key} of {sample.shard} has no caption: nothing can retrieve it")
                captions += sample.captions
                image_of_text += [len(keys)] * len(sample.captions)
                keys.append(sample.key)
            images.append(embed_pictures(model, processor, batch).cpu())
        texts = embed_texts(model, processor, captions, batch_size).cpu()
    return Features(
        images=torch.cat(images),
        texts=texts,
        image_of_text=torch.tensor(image_of_text),
        keys=keys,
        captions=captions,
    )


def recall(
    image_features: Float[Tensor, "image embed"],
    text_features: Float[Tensor, "text embed"],
    image_of_text: Int64[Tensor, "text"],
    ks: Sequence[int] = (1, 5, 10),
) -> dict[str, float]:
    """Recall@K in both directions, as shares from 0 to 1, from embeddings with unit rows.

    Args:
        image_of_text: row of `image_features` that each text belongs to; each picture has at least one.
        ks: places from the top that count.

    Raises:
        ValueError: if a K is below 1 or above the number of candidates, a picture has no text, or features are not
            finite.
    """
    for k in ks:
        for direction, candidates, what in (
            ("text_to_image", len(image_features), "pictures"),
            ("image_to_text", len(text_features), "captions"),
        ):
            if not 1 <= k <= candidates:
                raise ValueError(f"{direction}_recall@{k} needs a K from 1 to {candidates}, the number of {what}")
    text_ranks, image_ranks = ranks(image_features, text_features, image_of_text)
    return {f"text_to_image_recall@{k}": share(text_ranks < k) for k in ks} | {
        f"image_to_text_recall@{k}": share(image_ranks < k) for k in ks
    }


@torch.no_grad()
def ranks(
    image_features: Float[Tensor, "image embed"],
    text_features: Float[Tensor, "text embed"],
    image_of_text: Int64[Tensor, "text"],
) -> tuple[Int64[Tensor, "text"], Int64[Tensor, "image"]]:
    """For each text the place of its picture among all pictures, for each picture that of its best text; 0 is the top.

    Among equal scores the candidate that comes first in the data stands first, so a model that gives every pair the
    same score is at chance. Scores are computed in fp32 and in blocks: memory grows with the number of rows, not with
    its square.

    Raises:
        ValueError: if a picture has no text, or features are not finite.
    """
    images, texts = finite(image_features, "pictures"), finite(text_features, "texts")
    own_texts = texts_of_images(image_of_text, len(images))
    text_ranks, image_ranks = torch.empty_like(image_of_text), torch.empty_like(own_texts[:, 0])
    with full_precision(images.device):
        for rows in torch.arange(len(texts), device=images.device).split(max(1, CHUNK // len(images))):
            text_ranks[rows] = places(texts[rows] @ images.T, image_of_text[rows])
        for rows in torch.arange(len(images), device=images.device).split(max(1, CHUNK // len(texts))):
            scores = images[rows] @ texts.T
            best = scores.gather(1, own_texts[rows]).argmax(dim=1, keepdim=True)  # the first of equal ones
            image_ranks[rows] = places(scores, own_texts[rows].gather(1, best).squeeze(1))
    return text_ranks, image_ranks


def texts_of_images(image_of_text: Int64[Tensor, "text"], images: int) -> Int64[Tensor, "image most"]:
    """The rows of the texts that belong to each picture, in rising order; where one has fewer, its first is repeated.

    Raises:
        ValueError: if a picture has no text.
    """
    counts = torch.bincount(image_of_text, minlength=images)
    if not bool((counts > 0).all()):
        raise ValueError("every picture needs at least one text that belongs to it")
    by_image = image_of_text.argsort(stable=True)
    place = torch.arange(int(counts.max()), device=counts.device)
    return by_image[(counts.cumsum(0) - counts)[:, None] + place.where(place < counts[:, None], 0)]


def places(scores: Float32[Tensor, "query candidate"], wanted: Int64[Tensor, "query"]) -> Int64[Tensor, "query"]:
    """How many candidates stand before the wanted one: those that score higher, and equal ones that come earlier."""
    own = scores.gather(1, wanted[:, None])
    marks = torch.empty_like(scores)  # 0 and 1 as floats: counted several times faster than booleans, exact to 2**24
    before = torch.gt(scores, own, out=marks).sum(dim=1).long()
    tied = torch.ge(scores, own, out=marks).sum(dim=1).long() - before > 1
    if bool(tied.any()):
        earlier = torch.arange(scores.shape[1], device=scores.device) < wanted[tied, None]
        before[tied] += ((scores[tied] == own[tied]) & earlier).sum(dim=1)
    return before


def share(hits: Bool[Tensor, "query"]) -> float:
    """The part of the queries that hit, from 0 to 1."""
    return int(hits.sum()) / len(hits)
