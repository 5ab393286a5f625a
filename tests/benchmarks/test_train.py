from collections.abc import Callable, Mapping
from dataclasses import replace
from types import ModuleType

import pytest
import torch

from benchmarks import train, train_memory, train_steps
from benchmarks.harness import Row, Run, UnequalError
from benchmarks.train import accumulation_time_row, clip_row, fitting, step_row
from benchmarks.train_memory import accumulation_memory_row, captioning_loss_row, largest, largest_batch_row
from benchmarks.train_steps import OpenClip, Ours, make_batch
from contracap.training.optimizer import OptimizerConfig
from contracap.training.step import StepMetrics

ROWS: Mapping[str, Callable[[Run], Row]] = {
    "step": lambda run: step_row(run, size="tiny"),
    "clip": clip_row,
    "accumulation-time": accumulation_time_row,
    "accumulation-memory": lambda run: accumulation_memory_row(run, size="tiny"),
    "loss-memory": lambda run: captioning_loss_row(run, size="tiny"),
    "largest-batch": lambda run: largest_batch_row(run, size="tiny"),
}


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch, small_open_clip: ModuleType, captions: None, in_this_process: None) -> None:
    """Tiny models, small batches, and a memory that holds 100 samples."""
    monkeypatch.setattr(train, "B_32", "tiny")
    monkeypatch.setattr(train, "CLIP", "tiny-clip")
    monkeypatch.setattr(train, "BATCHES", {"cpu": {"tiny": 4}})
    for module in (train, train_memory):
        monkeypatch.setattr(module, "MICRO_BATCHES", {"cpu": 2})
        monkeypatch.setattr(module, "PARTS", 2)
    monkeypatch.setattr(train_memory, "LOSS_BATCH", 6)
    monkeypatch.setattr(train_memory, "fits", lambda side, batch, samples: samples <= 100)
    peaks = iter([1040.0, 1000.0, 2400.0, 1600.0])
    monkeypatch.setattr(train_memory, "peak_mib", lambda device: next(peaks))
    monkeypatch.setattr(train, "matmul_rate", lambda device, dtype: 1e9)


@pytest.mark.parametrize("name", ROWS)
def test_each_row_compares_equal_steps(name: str, run: Run) -> None:
    row = ROWS[name](run)
    assert row.peer and row.ratio and not row.reason
    assert "differ by" in row.note and "texts by their tokens" in row.note
    if name == "accumulation-memory":  # what parts take beyond one
        assert (row.ours, row.peer, row.ratio) == (40.0, 800.0, 20.0)


@pytest.mark.parametrize("name", ["step", "largest-batch"])
def test_steps_with_other_gradients_are_not_compared(name: str, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong_step(*arguments, step=train_steps.train_step) -> StepMetrics:
        made = step(*arguments)
        return replace(made, values=dict(made.values, gradient_norm=1.001 * made.values["gradient_norm"]))

    monkeypatch.setattr(train_steps, "train_step", wrong_step)
    with pytest.raises(UnequalError, match="gradient_norm"):
        ROWS[name](run)


def test_another_captioning_loss_has_no_row(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = train_memory.plain_loss
    monkeypatch.setattr(train_memory, "chunked_loss", lambda *inputs: 1.01 * plain(*inputs))
    with pytest.raises(UnequalError, match="captioning_loss"):
        ROWS["loss-memory"](run)


def test_both_sides_learn_alike_whole_and_in_parts(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train_steps, "OPTIMIZER", OptimizerConfig(learning_rate=1e-5, warmup_steps=0))
    batch = make_batch("tiny", run, samples=8)
    ours = Ours("tiny", run)
    sides = [OpenClip("tiny", ours.model, run).step(batch, parts=parts) for parts in (1, 4)]
    steps, found = [ours.step(batch), *sides], []
    for _ in range(4):
        numbers, *others = (step() for step in steps)
        found.append(numbers["loss"])
        for other in others:
            for name, value in other.items():
                assert numbers[name] == pytest.approx(float(value), rel=1e-4), name
    assert found[-1] < found[0] - 1e-4


@pytest.mark.parametrize("holds", [1, 3, 7681])
def test_the_largest_batch_is_found_to_within_six_percent(holds: int) -> None:
    low = largest(lambda samples: samples <= holds)
    assert low <= holds < max(1.07 * low, low + 1)


def test_a_batch_that_memory_does_not_hold_is_halved(run: Run) -> None:
    def row(samples: int) -> Row:
        if samples > 5:
            raise torch.OutOfMemoryError("full")
        return Row(work=f"batch {samples}", unit="samples/s", ours=1.0)

    assert fitting(row, 16, run).work == "batch 4"
