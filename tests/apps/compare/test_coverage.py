"""How often the interval of several runs holds the true gap, and how often a test over samples is wrong about it."""

import numpy as np
import pytest

from contracap.apps.compare.statistics import bootstrap_interval, permutation_test

TRIALS, SAMPLES = 1000, 200


def differences(generator: np.random.Generator, *, runs: int, spread: float) -> np.ndarray:
    """Of samples in several runs, 0 in the mean. Half of a sample's variance is the same in all runs; the runs' own
    means differ by `spread` times the standard error that the samples give to one of them."""
    sample = generator.normal(size=(1, SAMPLES)) + generator.normal(size=(runs, SAMPLES))
    return sample / 2**0.5 + generator.normal(scale=spread / SAMPLES**0.5, size=(runs, 1))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("runs", "spread", "wanted"), [(1, 0, 0.956), (3, 0, 0.979), (3, 1, 0.956), (3, 2, 0.906), (3, 4, 0.833)]
)
def test_coverage_is_what_the_docs_say(runs: int, spread: float, wanted: float) -> None:
    generator, held = np.random.default_rng(0), 0
    for trial in range(TRIALS):
        low, high = bootstrap_interval(differences(generator, runs=runs, spread=spread), resamples=1000, seed=trial)
        held += low <= 0 <= high
    assert held / TRIALS == pytest.approx(wanted, abs=0.03)  # another NumPy may draw otherwise


@pytest.mark.slow
def test_a_test_over_samples_is_wrong_about_runs_that_differ() -> None:
    generator, wrong = np.random.default_rng(0), 0
    for trial in range(TRIALS):
        mean = differences(generator, runs=3, spread=2).mean(axis=0)
        wrong += permutation_test(mean, resamples=1000, seed=trial) <= 0.05
    assert wrong / TRIALS == pytest.approx(0.275, abs=0.03)
