import json
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch

from contracap.bench import steps, train
from contracap.bench.steps import Setting, describe, make_batch
from contracap.bench.timing import Row, UnequalError, matmul_rate
from contracap.bench.train import (
    ROWS,
    Passes,
    bench_train,
    checked_passes,
    clip_row,
    flickr8k_captions,
    loss_memory_row,
    step_row,
)
from contracap.data.shards import write_shard
from contracap.model.sizes import SIZES
from contracap.tokenizer import Tokenizer

CAPTIONS = ("a dog", "two dogs in the snow")


@pytest.fixture(autouse=True)
def small_models(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train, "B_32", "tiny")
    monkeypatch.setattr(train, "CLIP", "tiny-clip")
    monkeypatch.setattr(train, "BATCHES", {"cpu": {"tiny": 4}})
    monkeypatch.setattr(train, "LOSS_BATCH", 6)
    monkeypatch.setattr(train, "matmul_rate", partial(matmul_rate, side=64))


@pytest.fixture
def flickr8k(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    captions = json.dumps({"captions": [*CAPTIONS, "what a dog !!"]}).encode()
    write_shard(tmp_path / "flickr8k" / "train" / "000000.tar", [("0", {"jpg": b"-", "json": captions})])
    monkeypatch.setenv("CONTRACAP_DATA", str(tmp_path))


def test_steps_agree_and_are_timed_on_captions_and_on_full_texts(setting: Setting, small_peers: None) -> None:
    for full, texts in ((False, "batch 4, Flickr8k captions"), (True, "batch 2, texts of 16 tokens")):
        row = step_row(setting, size="tiny", full=full)
        assert row.work == f"tiny step, {texts}"
        assert row.peer and row.ratio and not row.reason
        assert "tiny in fp32: contrastive_loss, gradient_norm, captioning_loss differ by" in row.note
    assert row.note.endswith("texts by their tokens, 16.0 on average: 16: 2")


def test_steps_of_other_losses_or_gradients_are_not_timed(
    setting: Setting, small_peers: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours = steps.train_step
    for name in ("contrastive_loss", "captioning_loss", "gradient_norm"):

        def wrong_step(*arguments, name: str = name) -> dict[str, float]:
            numbers = ours(*arguments)
            return numbers | {name: 1.001 * numbers[name]}

        monkeypatch.setattr(steps, "train_step", wrong_step)
        with pytest.raises(UnequalError, match=f"{name} is .* apart, allowed is 1e-04"):
            step_row(setting, size="tiny", full=False)


def test_bf16_agrees_within_its_tolerance(setting: Setting, small_peers: None) -> None:
    row = step_row(replace(setting, precision="bf16"), size="tiny", full=False)
    assert "tiny in bf16" in row.note and "(allowed: 2e-02)" in row.note


def test_clip_row_says_how_many_clip_steps_ours_takes(setting: Setting, small_peers: None) -> None:
    row = clip_row(setting)
    assert row.work == "tiny step against open_clip's CLIP tiny-clip step, batch 4 (ratio: CLIP's time by ours)"
    assert row.ratio and row.note.startswith(f"our CoCa step takes {1 / row.ratio:.2f} times a CLIP step; ")
    assert "tiny in fp32: contrastive_loss, gradient_norm, captioning_loss differ" in row.note
    assert "tiny-clip in fp32: contrastive_loss, gradient_norm differ" in row.note


def test_without_open_clip_only_ours_is_timed(setting: Setting, no_peer: None) -> None:
    for row in (step_row(setting, size="tiny", full=False), clip_row(setting)):
        assert row.ours > 0
        assert (row.peer, row.ratio, row.quartiles, row.reason) == (None, None, None, "open_clip is not here")
        assert row.note.startswith("texts by their tokens")


def test_a_batch_that_memory_does_not_hold_is_gone_through_in_parts() -> None:
    calls = []

    def step(rows: slice) -> Mapping[str, float]:
        calls.append((rows.start, rows.stop))
        if rows.stop - rows.start > most:
            raise torch.OutOfMemoryError("full")
        return {}

    most, passes = 4, Passes(step, 16)
    passes()
    assert passes.parts == 4
    assert calls == [(0, 16), (0, 8), (0, 4), (4, 8), (8, 12), (12, 16)]
    calls.clear()
    passes()
    assert len(calls) == 4
    most = 0
    with pytest.raises(torch.OutOfMemoryError):
        passes()


def test_compiled_steps_begin_with_the_parts_that_eager_ones_need_and_must_have_their_numbers(setting: Setting) -> None:
    calls = []

    def way(name: str, most: int, loss: float):
        def step(rows: slice) -> Mapping[str, float]:
            calls.append((name, rows.stop - rows.start))
            if rows.stop - rows.start > most:
                raise torch.OutOfMemoryError("full")
            return {"loss": loss}

        return step

    eager = way("eager", 4, 2.0)
    passes = checked_passes({"eager": eager, "compiled": way("compiled", 8, 2.0001)}, 8, setting)
    assert {name: each.parts for name, each in passes.items()} == {"eager": 2, "compiled": 2}
    assert calls == [("eager", 8), *[("eager", 4)] * 2, *[("compiled", 4)] * 2, *[("eager", 4)] * 2]
    with pytest.raises(UnequalError, match=r"loss is 2\.01"):
        checked_passes({"eager": eager, "compiled": way("compiled", 8, 2.01)}, 8, setting)
    passes = checked_passes({"eager": eager, "compiled": way("compiled", 2, 2.0)}, 8, setting)
    assert {name: each.parts for name, each in passes.items()} == {"eager": 2, "compiled": 4}


def test_the_fastest_way_of_each_side_counts_and_all_are_told(
    setting: Setting, small_peers: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "compile", lambda given: given)
    seconds = ([2.0] * 7, [1.0] * 7, [3.0] * 7, [4.0] * 7)
    monkeypatch.setattr(train, "in_turns", lambda *works, rounds, clock: seconds[: len(works)])
    row = step_row(replace(setting, compiled=True, matmul=1e9), size="tiny", full=False)
    assert (row.ours, row.peer, row.ratio) == (4.0, 4 / 3, 3.0)
    assert (
        "ours eager 2.0 samples/s, ours compiled 4.0 samples/s, open_clip's eager 1.3 samples/s, "
        "open_clip's compiled 1.0 samples/s; ours computes, by the plan's counting, "
    ) in row.note
    assert "% of 0.001 TFLOP/s (a product of 2048 rows and columns here in fp32); texts by" in row.note


def test_captions_that_open_clip_would_take_for_shorter_are_left_out(flickr8k: None) -> None:
    assert flickr8k_captions() == list(CAPTIONS)


def test_rows_are_those_asked_for_in_that_order(flickr8k: None, monkeypatch: pytest.MonkeyPatch) -> None:
    named = {name: lambda setting, name=name: Row(work=name, unit="samples/s", ours=1.0) for name in ROWS}
    monkeypatch.setattr(train, "ROWS", named)
    benchmark = bench_train(rows=["l-14-full", "b-32"])
    assert [row.work for row in benchmark.rows] == ["l-14-full", "b-32"]
    assert [row.work for row in bench_train().rows] == list(ROWS)
    assert benchmark.samples == len(CAPTIONS)
    assert benchmark.machine["matmul_tflops"][benchmark.machine["precision"]] > 0
    assert benchmark.machine["precision"] in ("fp32", "bf16") and benchmark.machine["device"] == "cpu"


def test_unknown_rows_devices_and_few_rounds_are_refused(
    flickr8k: None, no_peer: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ValueError, match=r"no row 'b-16' in this benchmark; the rows are b-32, b-32-full, .*"):
        bench_train(rows=["b-32", "b-16"])
    with pytest.raises(
        ValueError, match="row 'largest-batch-l-14' is measured in the memory of a GPU; say --device cuda"
    ):
        bench_train(rows=["b-32", "largest-batch-l-14"])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="device is 'cuda', but torch finds no CUDA device; say cpu"):
        bench_train(device="cuda")
    monkeypatch.setattr(train, "ROWS", {"b-32": lambda setting: step_row(setting, size="tiny", full=False)})
    with pytest.raises(ValueError, match="rounds must be a whole number of at least 7"):
        bench_train(rounds=6)
    monkeypatch.setenv("CONTRACAP_DATA", "/no/such/folder")
    with pytest.raises(FileNotFoundError, match="no captions at /no/such/folder/flickr8k/train: set CONTRACAP_DATA"):
        bench_train()


def test_memory_row_is_on_each_token_but_the_first(setting: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = {}

    def row(work: str, **arguments: object) -> Row:
        asked.update(arguments)
        return Row(work=work, unit="MiB", ours=1.0, note="equal")

    monkeypatch.setattr(train, "captioning_loss_row", row)
    found = loss_memory_row(setting)
    batch = make_batch("tiny", setting, samples=6, full=False)
    tokenizer = Tokenizer(SIZES["tiny"].text.context, SIZES["tiny"].text.vocab_size)
    for ids in batch.ids.tolist():
        length = ids.index(tokenizer.end) + 1
        assert asked["labels"][: length - 1].tolist() == ids[1:length]
        asked["labels"] = asked["labels"][length - 1 :]
    assert len(asked["labels"]) == 0
    assert (asked["vocab_size"], asked["width"]) == (1024, 32)
    assert found.note == f"equal; {describe(batch)}"
