"""Speed and memory of recall from embeddings, next to clip_benchmark and to the plain matrix of all scores."""

import contextlib
import io
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from jaxtyping import Float32, Int64
from torch import Tensor
from torch.nn.functional import normalize

from benchmarks.harness import (
    Benchmark,
    Numbers,
    Row,
    Run,
    Work,
    compare,
    compare_memory,
    in_fresh_process,
    require_equal,
)
from benchmarks.machine import peak_growth
from benchmarks.peers import peer_module
from contracap.evaluation.retrieval import compute_recall

Side = Literal["ours", "clip_benchmark", "the N x N matrix and topk"]
PEER: Side = "clip_benchmark"
MATRIX: Side = "the N x N matrix and topk"

KS = (1, 5, 10)
IMAGES = 20_000  # of the large rows
CAPTIONS, EMBED = 5, 512  # captions of an image, width of an embedding
NOISE = 6.0  # of texts around their images: gives recalls of about a half among thousands
BATCH = 64  # images that clip_benchmark ranks at a time, its default
SHARE = 0.1  # of the queries that it is timed on in the large row: with all of them a round takes ten minutes
TOLERANCE = 1e-4  # relative: near ties come out differently in products of other shapes


@dataclass(frozen=True)
class Embeddings:
    """Random images, and `CAPTIONS` texts near each."""

    images: Float32[Tensor, "image embed"]
    texts: Float32[Tensor, "text embed"]
    image_of_text: Int64[Tensor, "text"]

    @classmethod
    def random(cls, images: int, seed: int) -> "Embeddings":
        """Made text by text: the memory of making them must not hide that of ranking them."""
        draw = torch.Generator().manual_seed(seed)
        centres = torch.empty(images, EMBED).normal_(generator=draw)
        texts = torch.empty(images * CAPTIONS, EMBED)
        for centre, near in zip(centres, texts.split(CAPTIONS), strict=True):
            near.normal_(std=NOISE, generator=draw).add_(centre)
        for rows in (*centres.split(BATCH), *texts.split(BATCH)):
            rows.copy_(normalize(rows, dim=-1))
        return cls(centres, texts, torch.arange(images).repeat_interleave(CAPTIONS))


def time_row(run: Run, *, images: int, peer: Side, share: float = 1.0) -> Row:
    """Texts a second that are ranked, and their images with them.

    Below 1, `share` is that of the queries on which clip_benchmark's ranking is timed, its matrices made before the
    clock runs. The recalls that are compared are still those of all queries.
    """
    embeddings = Embeddings.random(images, run.seed)
    ours = partial(ranked, "ours", embeddings)

    def checked_peer() -> tuple[Work, str]:
        work = partial(ranked, peer, embeddings)
        note = require_equal(ours(), work(), tolerance=TOLERANCE)
        if share == 1:
            return work, note
        return ranking_of_clip_benchmark(embeddings, share), (
            f"{note}; clip_benchmark timed on {share:.0%} of the queries, its matrices of scores and pairs not counted"
        )

    return compare(
        f"recall of {images:,} images x {images * CAPTIONS:,} texts, next to {peer}",
        run=run,
        ours=ours,
        checked_peer=checked_peer,
        items=images * CAPTIONS,
        unit="texts/s",
        share=share,
    )


def memory_row(run: Run, *, images: int, peer: Side) -> Row:
    """Memory beyond the embeddings."""
    return compare_memory(
        f"memory of recall of {images:,} images x {images * CAPTIONS:,} texts, next to {peer}",
        ours=partial(in_fresh_process, recall_memory, "ours", images, run.seed),
        peer=partial(in_fresh_process, recall_memory, peer, images, run.seed),
        tolerance=TOLERANCE,
    )


def recall_memory(side: Side, images: int, seed: int) -> tuple[float, Numbers]:
    """MiB by which a side raises the peak memory of this process, and its recalls."""
    embeddings, found = Embeddings.random(images, seed), dict[str, float]()
    ranked(side, Embeddings.random(BATCH, seed))  # what libraries set up in their first call is not counted
    growth = peak_growth(lambda: found.update(ranked(side, embeddings)), torch.device("cpu"))
    return growth, found


def ranked(side: Side, embeddings: Embeddings) -> dict[str, float]:
    """The recalls as one of the sides computes them."""
    if side == "ours":
        return compute_recall(embeddings.images, embeddings.texts, embeddings.image_of_text, KS)
    return clip_benchmark(embeddings) if side == PEER else matrix(embeddings)


def clip_benchmark(embeddings: Embeddings) -> dict[str, float]:
    """clip_benchmark's own `evaluate`, of a model whose images and texts are embeddings already."""
    module = peer_module("clip_benchmark.metrics.zeroshot_retrieval", package="clip_benchmark")
    texts = torch.arange(len(embeddings.texts)).view(-1, CAPTIONS).tolist()
    batches = [
        (embeddings.images[first : first + BATCH], texts[first : first + BATCH])
        for first in range(0, len(texts), BATCH)
    ]
    with contextlib.redirect_stderr(io.StringIO()):  # its progress bar
        found = module.evaluate(
            Unchanged, batches, embeddings.texts.__getitem__, "cpu", amp=False, recall_k_list=list(KS)
        )
    names = {"text_to_image": "image_retrieval", "image_to_text": "text_retrieval"}
    return {f"{ours}_recall@{k}": found[f"{theirs}_recall@{k}"] for ours, theirs in names.items() for k in KS}


class Unchanged:
    """A model that returns what it is given."""

    @staticmethod
    def encode_image(images: Tensor) -> Tensor:
        return images

    @staticmethod
    def encode_text(texts: Tensor) -> Tensor:
        return texts


def ranking_of_clip_benchmark(embeddings: Embeddings, share: float) -> Callable[[], list[Tensor]]:
    """Its ranking of the first queries of both directions for every k, in its own batches."""
    module = peer_module("clip_benchmark.metrics.zeroshot_retrieval", package="clip_benchmark")
    scores = embeddings.texts @ embeddings.images.T
    pairs = torch.zeros_like(scores, dtype=torch.bool)
    pairs[torch.arange(len(pairs)), embeddings.image_of_text] = True
    directions = [
        [each[: round(share * len(each))] for each in direction] for direction in ((scores, pairs), (scores.T, pairs.T))
    ]
    return lambda: [
        module.batchify(module.recall_at_k, *direction, BATCH, "cpu", k=k) for k in KS for direction in directions
    ]


def matrix(embeddings: Embeddings) -> dict[str, float]:
    """The matrix of all scores and its ten best in each direction: the least that its owner can do."""
    scores = embeddings.texts @ embeddings.images.T
    to_image = scores.topk(max(KS), dim=1).indices == embeddings.image_of_text[:, None]
    owners = embeddings.image_of_text[scores.T.topk(max(KS), dim=1).indices]
    to_text = owners == torch.arange(len(embeddings.images))[:, None]
    return {
        f"{direction}_recall@{k}": hits[:, :k].any(dim=1).double().mean().item()
        for direction, hits in {"text_to_image": to_image, "image_to_text": to_text}.items()
        for k in KS
    }


BENCHMARK = Benchmark(
    rows={
        "coco": partial(time_row, images=5_000, peer=PEER),
        "large": partial(time_row, images=IMAGES, peer=PEER, share=SHARE),
        "large-matrix": partial(time_row, images=IMAGES, peer=MATRIX),
        "large-memory": partial(memory_row, images=IMAGES, peer=PEER),
        "large-matrix-memory": partial(memory_row, images=IMAGES, peer=MATRIX),
    },
    samples=lambda: IMAGES,
)
