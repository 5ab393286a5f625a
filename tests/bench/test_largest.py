from collections.abc import Iterator

import pytest
import torch

from contracap.bench import largest as module
from contracap.bench.largest import START, NoFitError, fits, largest, largest_batch_row
from contracap.bench.steps import Ours, Peer, Setting, make_batch
from contracap.bench.timing import UnequalError


class Memory:
    """Holds so many samples."""

    def __init__(self, holds: int):
        self.holds, self.tried = holds, []

    def __call__(self, samples: int) -> bool:
        self.tried.append(samples)
        return samples <= self.holds


@pytest.mark.parametrize("holds", [1, 3, 15, 16, 100, 1000, 7681])
def test_the_largest_is_found_by_doubling_and_bisection(holds: int) -> None:
    memory = Memory(holds)
    low, high = largest(memory)
    assert low <= holds < high <= max(1.06 * low, low + 1)
    assert len(memory.tried) <= 16


def test_nothing_fits() -> None:
    with pytest.raises(NoFitError, match="not even a batch of 1 fits"):
        largest(Memory(0))


def test_time_ends_the_search_with_what_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    def clock() -> Iterator[float]:
        return iter(range(0, 1000, 10))

    times = clock()
    assert largest(Memory(10_000), clock=lambda: next(times)) == (256, None)
    times = clock()
    assert largest(Memory(20), clock=lambda: next(times)) == (20, 22)
    times = clock()
    assert largest(Memory(50), clock=lambda: next(times)) == (48, 56)


@pytest.fixture
def memories(monkeypatch: pytest.MonkeyPatch) -> dict[type, int]:
    """How many samples the steps of each side hold, in place of a GPU's memory."""
    holds = {Ours: 100, Peer: 30}
    for side in holds:
        ways = side.ways

        def limited(self, batch, side=side, ways=ways):
            if len(batch) > holds[side]:
                raise torch.OutOfMemoryError("full")
            return ways(self, batch)

        monkeypatch.setattr(side, "ways", limited)
    return holds


def test_row_says_what_fits_and_what_does_not(setting: Setting, small_peers: None, memories: dict[type, int]) -> None:
    row = largest_batch_row(setting, size="tiny")
    assert (row.ours, row.peer, row.ratio, row.unit) == (100, 30, 100 / 30, "samples")
    assert "tiny in fp32: contrastive_loss, gradient_norm, captioning_loss differ by" in row.note
    assert "ours 100 fit, 104 do not, open_clip's 30 fit, 31 do not; texts repeat 16: texts by" in row.note


def test_sides_that_differ_have_no_row(
    setting: Setting, small_peers: None, memories: dict[type, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    random_model = module.random_model
    monkeypatch.setattr(module, "random_model", lambda config, seed: random_model(config, seed=seed + 1))
    with pytest.raises(UnequalError):
        largest_batch_row(setting, size="tiny")


def test_without_open_clip_ours_is_measured(setting: Setting, no_peer: None, memories: dict[type, int]) -> None:
    row = largest_batch_row(setting, size="tiny")
    assert (row.ours, row.peer, row.ratio, row.reason) == (100, None, None, "open_clip is not here")


def test_a_batch_is_made_of_the_first_one_again_and_again(setting: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    batch = make_batch("tiny", setting, samples=START, full=False)
    seen = []
    ours = Ours("tiny", setting)
    monkeypatch.setattr(ours, "ways", lambda whole: seen.append(whole) or {"eager": lambda rows: seen.append(rows)})
    assert fits(ours, batch, 40)
    whole, rows = seen
    assert rows == slice(0, 40)
    assert torch.equal(whole.pixels[16:32], batch.pixels) and torch.equal(whole.ids[32:], batch.ids[:8])
