import math

import numpy as np
import pytest

from contracap.apps.compare.statistics import bootstrap_interval, holm, permutation_test


def outcomes(generator: np.random.Generator, samples: int) -> np.ndarray:
    """Differences of hits and misses: 1, 0 or -1, 0.1 in the mean."""
    return generator.choice([1.0, 0.0, -1.0], p=[0.25, 0.6, 0.15], size=(1, samples))


def test_the_interval_holds_the_true_gap_as_often_as_it_says() -> None:
    generator = np.random.default_rng(0)
    held = 0
    for trial in range(400):
        low, high = bootstrap_interval(outcomes(generator, 150), resamples=1000, seed=trial)
        held += low <= 0.1 <= high
    assert 0.925 < held / 400 < 0.975  # the standard error of the share is 0.011


def test_the_interval_is_as_wide_as_theory_says() -> None:
    differences = outcomes(np.random.default_rng(2), 2000)
    low, high = bootstrap_interval(differences)
    half = 1.96 * differences.std() / math.sqrt(2000)
    assert low == pytest.approx(differences.mean() - half, abs=0.05 * half)
    assert high == pytest.approx(differences.mean() + half, abs=0.05 * half)


def test_equal_seeds_give_equal_intervals_and_others_others() -> None:
    differences = outcomes(np.random.default_rng(4), 100)
    assert bootstrap_interval(differences, seed=1) == bootstrap_interval(differences, seed=1)
    skewed = np.random.default_rng(4).exponential(size=(1, 30))
    assert bootstrap_interval(skewed, seed=1) != bootstrap_interval(skewed, seed=2)


def test_no_gap_anywhere_has_p_one() -> None:
    assert permutation_test(np.zeros(20)) == 1.0
    assert permutation_test(np.array([0.5, -0.5, 0.0])) == 1.0


@pytest.mark.parametrize("seed", range(2))
def test_the_permutation_test_agrees_with_all_permutations(seed: int) -> None:
    stats = pytest.importorskip("scipy.stats")
    differences = np.random.default_rng(seed).normal(0.4, 1.0, size=10)
    exact = stats.permutation_test(
        (differences,), lambda x, axis: x.mean(axis=axis), permutation_type="samples", vectorized=True, n_resamples=2000
    ).pvalue
    ours = permutation_test(differences)
    assert ours == pytest.approx(exact, abs=4 * math.sqrt(exact * (1 - exact) / 10_000) + 1e-4)


def test_hits_and_misses_give_the_exact_test_of_mcnemar() -> None:
    """12 images that only the first gets right, 4 that only the second does, 84 that tell nothing."""
    differences = np.array([1.0] * 12 + [-1.0] * 4 + [0.0] * 84)
    exact = 2 * sum(math.comb(16, hits) for hits in range(12, 17)) / 2**16
    assert permutation_test(differences) == pytest.approx(exact, abs=4 * math.sqrt(exact / 10_000))


def test_p_is_never_zero() -> None:
    assert permutation_test(np.ones(200), resamples=999) == pytest.approx(1 / 1000)


def test_holm_corrects_step_by_step() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.6, 0.7]) == [1.0, 1.0]
    assert holm([]) == []


def test_nothing_to_resample_is_refused() -> None:
    with pytest.raises(ValueError, match="no differences"):
        bootstrap_interval(np.empty((1, 0)))
    with pytest.raises(ValueError, match="no differences"):
        permutation_test(np.empty(0))
