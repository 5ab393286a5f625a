"""How fast recalls are computed from embeddings, and in how much memory: beside clip_benchmark's own evaluation, and
beside the least that can be done with the matrix of all scores."""

import contextlib
import io
import multiprocessing
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from jaxtyping import Float32, Int64
from torch import Tensor
from torch.nn.functional import normalize

from contracap.bench.timing import (
    LEAST_ROUNDS,
    Benchmark,
    NoPeerError,
    Row,
    Work,
    compare,
    peak_growth,
    peer_module,
    require_equal,
    this_machine,
)
from contracap.evaluation.retrieval import recall

Side = Literal["ours", "clip_benchmark", "matrix"]

KS = (1, 5, 10)
PICTURES = 20_000  # of the large rows
CAPTIONS, EMBED = 5, 512  # captions of a picture, width of an embedding
NOISE = 6.0  # of texts around their pictures: makes recalls of about a half among thousands
BATCH = 64  # pictures that clip_benchmark ranks at a time, if not told otherwise
SHARE = 0.1  # of the queries that it is timed on in the large row: with all of them a round takes ten minutes
TOLERANCE = 1e-4  # relative: near ties fall otherwise in products of other shapes


def bench_retrieval(
    *,
    rounds: int = LEAST_ROUNDS,
    rows: Sequence[str] = (),
    seed: int = 0,
    report: Callable[[Row], object] = lambda row: None,
) -> Benchmark:
    """Recall@1, 5 and 10 in both directions, on the CPU.

    Args:
        rounds: of each comparison in time; memory is measured once.
        rows: which to measure, by their names in `ROWS`; none means all.
        report: is told of each row when it is done.

    Raises:
        UnequalError: if the recalls of both sides differ.
        ValueError: for a row that there is not, or too few rounds.
    """
    if unknown := [name for name in rows if name not in ROWS]:
        raise ValueError(f"no row {unknown[0]!r} in this benchmark; the rows are {', '.join(ROWS)}")
    machine, measured = this_machine(), list[Row]()
    for name in rows or ROWS:
        measured.append(ROWS[name](rounds=rounds, seed=seed))
        report(measured[-1])
    pictures = max(ROWS[name].keywords["images"] for name in rows or ROWS)
    return Benchmark(rows=measured, samples=pictures, seed=seed, machine=machine)


@dataclass(frozen=True)
class Embeddings:
    """Random pictures, and `CAPTIONS` texts near each."""

    images: Float32[Tensor, "image embed"]
    texts: Float32[Tensor, "text embed"]
    image_of_text: Int64[Tensor, "text"]

    @classmethod
    def random(cls, images: int, seed: int) -> "Embeddings":
        """Made text by text: what making them takes must not hide what ranking them takes."""
        draw = torch.Generator().manual_seed(seed)
        pictures = torch.empty(images, EMBED).normal_(generator=draw)
        texts = torch.empty(images * CAPTIONS, EMBED)
        for picture, near in zip(pictures, texts.split(CAPTIONS), strict=True):
            near.normal_(std=NOISE, generator=draw).add_(picture)
        for rows in (*pictures.split(BATCH), *texts.split(BATCH)):
            rows.copy_(normalize(rows, dim=-1))
        return cls(pictures, texts, torch.arange(images).repeat_interleave(CAPTIONS))


def time_row(*, images: int, peer: Side, share: float = 1.0, rounds: int, seed: int) -> Row:
    """Texts a second that are ranked, their pictures with them.

    Args:
        share: below 1: clip_benchmark is timed on its ranking of that share of the queries, its matrices made before
            the clock runs. The recalls that are compared are still those of all.

    Raises: UnequalError: if the recalls of both sides differ.
    """
    made = Embeddings.random(images, seed)
    ours = partial(recalls, "ours", made)

    def checked_peer() -> tuple[Work, str]:
        work = partial(recalls, peer, made)
        note = require_equal(ours(), work(), tolerance=TOLERANCE)
        if share == 1:
            return work, note
        return ranking_of_clip_benchmark(made, share), (
            f"{note}; clip_benchmark timed on {share:.0%} of the queries, its matrices of scores and pairs not counted"
        )

    return compare(
        f"recall of {images:,} pictures x {len(made.texts):,} texts, beside {DESCRIBED[peer]}",
        ours=ours,
        checked_peer=checked_peer,
        items=len(made.texts),
        unit="texts/s",
        rounds=rounds,
        clock=time.perf_counter,
        share=share,
    )


def memory_row(*, images: int, peer: Side, rounds: int, seed: int) -> Row:
    """Memory beyond the embeddings.

    Raises: UnequalError: if the recalls of both sides differ.
    """
    work = f"memory of recall of {images:,} pictures x {images * CAPTIONS:,} texts, beside {DESCRIBED[peer]}"
    ours, found = _in_fresh_process("ours", images, seed)
    try:
        theirs, expected = _in_fresh_process(peer, images, seed)
    except NoPeerError as error:
        return Row(work=work, unit="MiB", ours=ours, reason=str(error))
    note = require_equal(found, expected, tolerance=TOLERANCE)
    note = f"{note}; peak memory of a fresh process each, measured once"
    return Row(work=work, unit="MiB", ours=ours, peer=theirs, ratio=theirs / ours, note=note)


def recall_memory(side: Side, images: int, seed: int) -> tuple[float, dict[str, float]]:
    """MiB by which a side raises the peak memory of this process, and its recalls."""
    made, found = Embeddings.random(images, seed), dict[str, float]()
    recalls(side, Embeddings.random(BATCH, seed))  # what libraries set up in their first call is not counted
    growth = peak_growth(lambda: found.update(recalls(side, made)), torch.device("cpu"))
    return growth, found


def recalls(side: Side, made: Embeddings) -> dict[str, float]:
    """The recalls as one of the sides computes them."""
    return SIDES[side](made)


def ours(made: Embeddings) -> dict[str, float]:
    """Tile by tile."""
    return recall(made.images, made.texts, made.image_of_text, KS)


def clip_benchmark(made: Embeddings) -> dict[str, float]:
    """By clip_benchmark's own `evaluate`, from a model that has nothing to do: it normalises embeddings once more.

    Raises: NoPeerError: if it is not installed.
    """
    module = peer_module("clip_benchmark.metrics.zeroshot_retrieval", package="clip_benchmark")
    texts = torch.arange(len(made.texts)).view(-1, CAPTIONS).tolist()
    batches = [
        (made.images[first : first + BATCH], texts[first : first + BATCH]) for first in range(0, len(texts), BATCH)
    ]
    with contextlib.redirect_stderr(io.StringIO()):  # its progress bar
        found = module.evaluate(_Embedded, batches, made.texts.__getitem__, "cpu", amp=False, recall_k_list=list(KS))
    return _named(found, "image_retrieval_recall", "text_retrieval_recall")


def ranking_of_clip_benchmark(made: Embeddings, share: float) -> Callable[[], list[Tensor]]:
    """Its ranking of the first queries of both directions for every K, in its own batches."""
    module = peer_module("clip_benchmark.metrics.zeroshot_retrieval", package="clip_benchmark")
    scores = made.texts @ made.images.T
    pairs = torch.zeros_like(scores, dtype=torch.bool)
    pairs[torch.arange(len(pairs)), made.image_of_text] = True
    parts = [
        tuple(each[: round(share * len(each))] for each in sides) for sides in ((scores, pairs), (scores.T, pairs.T))
    ]

    def work() -> list[Tensor]:
        return [module.batchify(module.recall_at_k, *part, BATCH, "cpu", k=k) for k in KS for part in parts]

    return work


def matrix(made: Embeddings) -> dict[str, float]:
    """The matrix of all scores and its ten best in each direction, which is the least that its holders can do."""
    scores = made.texts @ made.images.T
    found = dict[str, float]()
    to_image = scores.topk(max(KS), dim=1).indices == made.image_of_text[:, None]
    owners = made.image_of_text[scores.T.topk(max(KS), dim=1).indices]
    to_text = owners == torch.arange(len(made.images))[:, None]
    for k in KS:
        found[f"text_to_image_recall@{k}"] = to_image[:, :k].any(dim=1).double().mean().item()
        found[f"image_to_text_recall@{k}"] = to_text[:, :k].any(dim=1).double().mean().item()
    return found


class _Embedded:
    """Stands for a model whose pictures and texts are embeddings already."""

    @staticmethod
    def encode_image(images: Tensor) -> Tensor:
        return images

    @staticmethod
    def encode_text(texts: Tensor) -> Tensor:
        return texts


def _named(found: Mapping[str, float], to_image: str, to_text: str) -> dict[str, float]:
    """A peer's recalls under our names."""
    return {f"text_to_image_recall@{k}": found[f"{to_image}@{k}"] for k in KS} | {
        f"image_to_text_recall@{k}": found[f"{to_text}@{k}"] for k in KS
    }


def _in_fresh_process(side: Side, images: int, seed: int) -> tuple[float, dict[str, float]]:
    # The peak of resident memory never falls again.
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as fresh_process:
        return fresh_process.submit(recall_memory, side, images, seed).result()


SIDES: dict[Side, Callable[[Embeddings], dict[str, float]]] = {
    "ours": ours,
    "clip_benchmark": clip_benchmark,
    "matrix": matrix,
}
DESCRIBED: dict[Side, str] = {"clip_benchmark": "clip_benchmark", "matrix": "the N x N matrix and topk"}

ROWS: dict[str, partial[Row]] = {
    "coco": partial(time_row, images=5_000, peer="clip_benchmark"),
    "coco-matrix": partial(time_row, images=5_000, peer="matrix"),
    "large": partial(time_row, images=PICTURES, peer="clip_benchmark", share=SHARE),
    "large-matrix": partial(time_row, images=PICTURES, peer="matrix"),
    "large-memory": partial(memory_row, images=PICTURES, peer="clip_benchmark"),
    "large-matrix-memory": partial(memory_row, images=PICTURES, peer="matrix"),
}
