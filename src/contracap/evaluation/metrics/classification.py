"""Metrics of classification.

Source: LAION-AI/CLIP_benchmark, commit 48de38c, zeroshot_classification.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float32, Float64, Int64
from torch import Tensor

from contracap.evaluation.metrics.ranking import find_position

ROWS = 1024  # images ranked at a time


def accuracy_parts(
    scores: Float32[Tensor, "image class"], labels: Int64[Tensor, "image"]
) -> dict[str, Float64[Tensor, "image"]]:
    """Return values of each image whose means are `acc1`, `acc5` and `mean_per_class_recall`."""
    blocks = zip(scores.split(ROWS), labels.split(ROWS), strict=True)
    positions, counts = torch.cat([find_position(*block) for block in blocks]), torch.bincount(labels).double()
    top1, top5 = (positions < 1).double(), (positions < 5).double()
    weight = len(labels) / (int((counts > 0).sum()) * counts[labels])  # each class that occurs counts alike
    return {"acc1": top1, "acc5": top5, "mean_per_class_recall": top1 * weight}


def mean_average_precision(scores: Float32[Tensor, "image class"], labels: Sequence[tuple[int, ...]]) -> float:
    """Return the mean over the classes of average precision.

    For each image of a class this is the share of the class's images among those that score at least as high, averaged
    over these images. A class without an image counts 0. It is not a mean over images.
    """
    wanted = torch.zeros(scores.shape, dtype=torch.float64)
    for row, found in zip(wanted, labels, strict=True):
        row[list(found)] = 1
    hits = wanted.gather(0, scores.argsort(dim=0, descending=True, stable=True))
    precision = hits * hits.cumsum(dim=0) / torch.arange(1, len(scores) + 1)[:, None]
    return float((precision.sum(dim=0) / hits.sum(dim=0).clamp(min=1)).mean())
