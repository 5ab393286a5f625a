"""Positions of images for texts and of texts for images in retrieval, without the matrix of all scores."""

import math
from collections.abc import Iterator
from functools import partial

import torch
from jaxtyping import Bool, Float, Float32, Int64
from torch import Tensor
from torch.nn.functional import pad

from contracap.evaluation.distributed import run_on_every_rank
from contracap.evaluation.features import full_precision, require_finite
from contracap.parallel.process_group import ProcessGroup

SIDE = 1024  # texts and images of one tile of scores: 4 MiB in fp32
MULTIPLE = 64  # of the sides of a tile: at odd edges of a product, equal rows do not give equal bits


@torch.no_grad()
def find_positions(
    image_features: Float[Tensor, "image embed"],
    text_features: Float[Tensor, "text embed"],
    image_of_text: Int64[Tensor, "text"],
    process_group: ProcessGroup = ProcessGroup(),
) -> tuple[Int64[Tensor, "text"], Int64[Tensor, "image"]]:
    """Return the position of each text's image among all images, and of each image's best text; 0 is the top.

    They are computed on the device of the features, and returned on the CPU. If scores are equal, the candidate that
    comes first in the data is placed first, so a model that gives every pair the same score is at chance.

    Scores are computed in fp32, tile by tile. Each tile is counted in both directions at once, so memory grows with the
    number of rows, not with its square. Tiles that hold matching pairs are computed twice: the
    scores of those pairs are needed before anything is counted.

    Args:
        process_group: the ranks that call this with the same features; each takes every n-th row of tiles.

    Raises:
        ValueError: if there is none, an image has no text, a text no image, or features are not finite.
        Exception: what failed here, such as out of memory; on the other ranks a ValueError that says the same.
    """
    counts = run_on_every_rank(
        process_group, partial(_count_tiles, image_features, text_features, image_of_text, process_group)
    )
    text_counts, image_counts = zip(*process_group.all_gather(counts), strict=True)
    return torch.stack(text_counts).sum(dim=0), torch.stack(image_counts).sum(dim=0)


def _count_tiles(
    image_features: Float[Tensor, "image embed"],
    text_features: Float[Tensor, "text embed"],
    image_of_text: Int64[Tensor, "text"],
    process_group: ProcessGroup,
) -> tuple[Int64[Tensor, "text"], Int64[Tensor, "image"]]:
    """Return the part of the positions that the tiles of this process contribute."""
    images, texts = require_finite(image_features, "images"), require_finite(text_features, "texts")
    _check_owners(image_of_text, len(images))
    with full_precision(images.device):
        own = _compute_own_scores(texts, images, image_of_text)
        best, best_text = _find_best_texts(own, image_of_text, len(images))
        text_positions, image_positions = torch.zeros_like(image_of_text), torch.zeros_like(best_text)
        for rows in list(_split(len(texts)))[process_group.rank :: process_group.world_size]:
            for columns in _split(len(images)):
                scores = _score_tile(texts, rows, images, columns)
                text_positions[rows] += _count_before(scores, own[rows], image_of_text[rows] - columns.start)
                image_positions[columns] += _count_before(scores.T, best[columns], best_text[columns] - rows.start)
    return text_positions.cpu(), image_positions.cpu()


def _find_best_texts(
    own: Float32[Tensor, "text"], image_of_text: Int64[Tensor, "text"], images: int
) -> tuple[Float32[Tensor, "image"], Int64[Tensor, "image"]]:
    """Return the best score of each image among its texts, and the row of the first text that has it."""
    best = own.new_full((images,), -torch.inf).scatter_reduce(0, image_of_text, own, "amax")
    rows = torch.arange(len(own), device=own.device).where(own == best[image_of_text], len(own))
    return best, rows.new_full((images,), len(own)).scatter_reduce(0, image_of_text, rows, "amin")


def find_position(scores: Float32[Tensor, "query candidate"], wanted: Int64[Tensor, "query"]) -> Int64[Tensor, "query"]:
    """Return how many candidates come before the wanted one: higher scores, and equal ones that come earlier."""
    return _count_before(scores, scores.gather(1, wanted[:, None]).squeeze(1), wanted)


def compute_share(hits: Bool[Tensor, "query"]) -> float:
    """Return the share of the queries that hit, from 0 to 1."""
    return int(hits.sum()) / len(hits)


def _check_owners(image_of_text: Int64[Tensor, "text"], images: int) -> None:
    if not len(image_of_text) or not 0 <= int(image_of_text.min()) <= int(image_of_text.max()) < images:
        raise ValueError(f"each text, at least one, needs the row of its image, and there are {images} images")
    if not bool((torch.bincount(image_of_text, minlength=images) > 0).all()):
        raise ValueError("every image needs at least one text that belongs to it")


def _count_before(
    scores: Float32[Tensor, "query candidate"], own: Float32[Tensor, "query"], wanted: Int64[Tensor, "query"]
) -> Int64[Tensor, "query"]:
    """Return how many of these candidates come before the wanted one of each query.

    Args:
        own: the score of the wanted candidate.
        wanted: its column; below 0 or beyond the last if it comes before or after these candidates.
    """
    candidates = scores.shape[1]
    # Earlier candidates also count at an equal score: above the float that comes before it.
    bar = torch.where(wanted < candidates, own, own.nextafter(own.new_tensor(-torch.inf)))
    marks = torch.empty_like(scores)  # 0 and 1 as floats: counted several times faster than booleans, exact to 2**24
    before = torch.gt(scores, bar[:, None], out=marks).sum(dim=1).long()
    here = ((wanted >= 0) & (wanted < candidates)).nonzero().squeeze(1)
    if len(here):
        earlier = torch.arange(candidates, device=scores.device) < wanted[here, None]
        before[here] += ((scores[here] == own[here, None]) & earlier).sum(dim=1)
    return before


def _compute_own_scores(
    texts: Float32[Tensor, "text embed"], images: Float32[Tensor, "image embed"], image_of_text: Int64[Tensor, "text"]
) -> Float32[Tensor, "text"]:
    """Return the score of each text and its image, bit-equal to that in its tile."""
    own = texts.new_empty(len(texts))
    for rows in _split(len(texts)):
        for columns in _split(len(images)):
            owner = image_of_text[rows] - columns.start
            here = ((owner >= 0) & (owner < columns.stop - columns.start)).nonzero().squeeze(1)
            if len(here):
                own[rows.start + here] = _score_tile(texts, rows, images, columns)[here, owner[here]]
    return own


def _split(length: int) -> Iterator[slice]:
    return (slice(first, min(first + SIDE, length)) for first in range(0, length, SIDE))


def _score_tile(
    texts: Float32[Tensor, "text embed"], rows: slice, images: Float32[Tensor, "image embed"], columns: slice
) -> Float32[Tensor, "row column"]:
    """Return the scores of a block of texts and a block of images.

    All tiles are computed in the same shape, so that equal pairs have equal scores in every tile.
    """
    scores = _pad(texts, rows) @ _pad(images, columns).T
    return scores[: rows.stop - rows.start, : columns.stop - columns.start]


def _pad(features: Float32[Tensor, "row embed"], rows: slice) -> Float32[Tensor, "side embed"]:
    missing = min(SIDE, math.ceil(len(features) / MULTIPLE) * MULTIPLE) - (rows.stop - rows.start)
    return pad(features[rows], (0, 0, 0, missing)) if missing else features[rows]
