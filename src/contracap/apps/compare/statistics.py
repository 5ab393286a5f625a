"""Uncertainty of a gap between two systems: a paired bootstrap, a paired permutation test, and Holm's correction.

All work on differences: first system minus second, for each sample and, if there are several, each pair of runs.
"""

from collections.abc import Iterator, Sequence

import numpy as np
from jaxtyping import Float64

RESAMPLES = 10_000
CONFIDENCE = 0.95
BLOCK = 2**21  # counts that are held at a time: 16 MiB


def bootstrap_interval(
    differences: Float64[np.ndarray, "run sample"],
    *,
    resamples: int = RESAMPLES,
    confidence: float = CONFIDENCE,
    seed: int = 0,
) -> tuple[float, float]:
    """Return the percentile interval of the mean difference, from resampled samples and resampled runs.

    Both systems get the same samples in each resample, and so do all runs. Of several runs one fewer is drawn than
    there are: the variance of the mean is right for few of them, too. Three runs remain few; where they differ by more
    than the samples do, the interval covers less than it says. One run is taken as it is: the interval then speaks of
    these two models, not of two others that were trained the same way.

    Raises:
        ValueError: if there is no difference.

    Source: Efron and Tibshirani, An Introduction to the Bootstrap (1993), chapter 13; one fewer: Rao and Wu, Resampling
    Inference with Complex Survey Data (1988).
    """
    if not differences.size:
        raise ValueError("no differences to resample")
    runs, samples = differences.shape
    # Equal columns are drawn together: a figure of hits and misses has few that differ.
    values, counts = np.unique(differences, axis=1, return_counts=True)
    generator = np.random.default_rng(seed)
    means = np.concatenate(
        [
            generator.multinomial(samples, counts / samples, size=size) @ values.T / samples
            for size in _blocks(resamples, len(counts))
        ]
    )
    drawn = max(1, runs - 1)
    weights = generator.multinomial(drawn, np.full(runs, 1 / runs), size=resamples)
    low, high = np.quantile((means * weights).sum(axis=1) / drawn, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)


def permutation_test(differences: Float64[np.ndarray, "sample"], *, resamples: int = RESAMPLES, seed: int = 0) -> float:
    """Return the two-sided p-value of a mean difference, if on each sample the two systems could as well be exchanged.

    Signs are flipped at random, `resamples` times, so that the smallest value is 1 / (`resamples` + 1).

    Raises:
        ValueError: if there is no difference.

    Source: Phipson and Smyth, Permutation P-values Should Never Be Zero (2010).
    """
    if not differences.size:
        raise ValueError("no differences to test")
    sizes, counts = np.unique(np.abs(differences), return_counts=True)
    observed = abs(differences.sum()) * (1 - 1e-9)  # sums of another order are as large
    generator = np.random.default_rng(seed)
    as_large = sum(
        int(
            (np.abs((2 * generator.binomial(counts, 0.5, size=(size, len(counts))) - counts) @ sizes) >= observed).sum()
        )
        for size in _blocks(resamples, len(counts))
    )
    return (1 + as_large) / (1 + resamples)


def holm(p_values: Sequence[float]) -> list[float]:
    """P-values corrected for their number: at most a share alpha of such families has any below alpha by chance.

    Source: Holm, A Simple Sequentially Rejective Multiple Test Procedure (1979).
    """
    corrected, worst = [0.0] * len(p_values), 0.0
    for rank, place in enumerate(sorted(range(len(p_values)), key=lambda place: p_values[place])):
        worst = max(worst, min(1.0, (len(p_values) - rank) * p_values[place]))
        corrected[place] = worst
    return corrected


def _blocks(resamples: int, columns: int) -> Iterator[int]:
    """Sizes of the parts that resamples are drawn in."""
    most = max(1, BLOCK // columns)
    for first in range(0, resamples, most):
        yield min(most, resamples - first)
