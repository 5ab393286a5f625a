from dataclasses import replace
from functools import partial

import pytest
import torch

from contracap.bench import accumulation, steps
from contracap.bench.accumulation import (
    Peak,
    accumulation_memory_row,
    accumulation_time_row,
    plain_step,
    training_peak,
)
from contracap.bench.steps import Ours, Setting, make_batch
from contracap.bench.timing import UnequalError

PEAKS = {("ours", 2): 1040.0, ("ours", 1): 1000.0, ("open_clip's", 2): 2400.0, ("open_clip's", 1): 1600.0}


@pytest.fixture(autouse=True)
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(accumulation, "MICRO_BATCHES", {"cpu": 2})
    monkeypatch.setattr(accumulation, "PARTS", 2)


@pytest.fixture
def peaks(monkeypatch: pytest.MonkeyPatch) -> dict:
    """What the processes hold at their peaks, in MiB; they are not started, but take their steps."""
    held = dict(PEAKS)

    class InThisProcess:
        def __init__(self, *_: object, **__: object) -> None:
            pass

        def __enter__(self):
            return self

        def __exit__(self, *_: object) -> None:
            pass

        def submit(self, function, side, size, micro, parts, setting):
            self.outcome = partial(
                replace, function(side, size, micro, parts, setting), mib=held[side, parts], before=900.0
            )
            return self

        def result(self) -> Peak:
            return self.outcome()

    monkeypatch.setattr(accumulation, "ProcessPoolExecutor", InThisProcess)
    return held


def test_time_is_beside_plain_parts_with_the_same_captioning_loss(setting: Setting) -> None:
    row = accumulation_time_row(setting, size="tiny")
    assert row.work == "tiny step of 2 parts of 2, time beside 2 plain micro-batches of ours"
    assert row.ratio and row.peer
    assert row.note.startswith(f"takes {1 / row.ratio:.2f} times as long as the peer, which is our own step on parts")
    assert "captioning_loss differ by" in row.note and "(allowed: 1e-04), contrastive losses" in row.note


def test_plain_parts_that_lose_a_caption_are_not_timed(setting: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(accumulation, "count_labels", lambda ids, end: 1 + (ids == end).sum() * 3)
    with pytest.raises(UnequalError, match="captioning_loss is"):
        accumulation_time_row(setting, size="tiny")


def test_plain_parts_have_the_gradients_of_their_own_losses(setting: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    ours = Ours("tiny", setting)
    batch = make_batch("tiny", setting, samples=16, full=False)
    norms = []
    clip = torch.nn.utils.clip_grad_norm_
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", lambda *given: norms.append(clip(*given)) or norms[-1])
    plain_step(ours, batch)
    monkeypatch.setattr(accumulation, "PARTS", 1)
    plain_step(ours, batch)
    ours.ways(batch)["eager"](slice(0, 16))
    parts, one, whole = map(float, norms)
    assert one == pytest.approx(whole, rel=1e-5)
    assert parts != pytest.approx(whole, rel=1e-2)


def test_extra_memory_is_that_of_all_parts_beyond_one(setting: Setting, small_peers: None, peaks: dict) -> None:
    row = accumulation_memory_row(setting, size="tiny")
    assert (row.ours, row.peer, row.ratio) == (40.0, 800.0, 20.0)
    assert row.work == "tiny step of 2 parts of 2, memory beyond that of one part"
    assert "tiny in fp32: contrastive_loss, gradient_norm, captioning_loss differ by" in row.note
    assert "ours 1,040 MiB with 2 parts and 1,000 with the first alone, open_clip's 2,400 MiB with 2" in row.note
    peaks["ours", 2] = 990.0
    row = accumulation_memory_row(setting, size="tiny")
    assert (row.ours, row.ratio) == (-10.0, 800.0)


def test_batches_that_differ_have_no_row(
    setting: Setting, small_peers: None, peaks: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours = steps.train_step

    def wrong(*arguments) -> dict[str, float]:
        numbers = ours(*arguments)
        return numbers | {"gradient_norm": 1.001 * numbers["gradient_norm"]}

    monkeypatch.setattr(steps, "train_step", wrong)
    with pytest.raises(UnequalError, match="gradient_norm is"):
        accumulation_memory_row(setting, size="tiny")


def test_peaks_that_the_steps_do_not_reach_are_refused(setting: Setting, peaks: dict) -> None:
    peaks["ours", 1] = 900.0
    with pytest.raises(ValueError, match="tiny: 900 MiB were held before the first step, which the steps do not reach"):
        accumulation_memory_row(setting, size="tiny")


def test_without_open_clip_or_room_for_it_only_ours_is_measured(
    setting: Setting, no_peer: None, peaks: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    row = accumulation_memory_row(setting, size="tiny")
    assert (row.ours, row.peer, row.ratio, row.reason) == (40.0, None, None, "open_clip is not here")

    def full(*_: object) -> None:
        raise torch.OutOfMemoryError("full")

    monkeypatch.setattr(accumulation, "Peer", full)
    row = accumulation_memory_row(setting, size="tiny")
    assert (row.ours, row.peer) == (40.0, None)
    assert row.reason == "open_clip's step does not fit into the memory of the device"


def test_a_process_takes_two_steps_and_tells_of_the_first(setting: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    taken = []
    ours = steps.train_step

    def step(state, batch, config) -> dict[str, float]:
        taken.append((len(batch), config.accumulation))
        return ours(state, batch, config) | {"step": len(taken)}

    monkeypatch.setattr(steps, "train_step", step)
    found = training_peak("ours", "tiny", 2, 8, setting)
    assert taken == [(16, 8)] * 2 and found.numbers["step"] == 1
    assert found.mib >= found.before > 50
    training_peak("ours", "tiny", 2, 1, setting)
    assert taken[2:] == [(2, 1)] * 2


@pytest.mark.slow
def test_a_process_of_its_own_holds_what_its_step_needs(setting: Setting) -> None:
    small, large = (accumulation._peak_of("ours", "tiny", micro, 8, setting) for micro in (64, 512))
    # a sample's 16 or so tokens have 1,024 logits each; pixels are float32
    assert large.mib - small.mib > 8 * (512 - 64) * 3 * 32 * 32 / 2**20
