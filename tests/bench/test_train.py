import json
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from contracap.bench import train
from contracap.bench.timing import NoPeerError, Row, UnequalError
from contracap.bench.train import (
    ROWS,
    Passes,
    Setting,
    bench_train,
    clip_row,
    describe,
    flickr8k_captions,
    loss_memory_row,
    make_batch,
    our_step,
    peer_step,
    step_row,
)
from contracap.data.shards import write_shard
from contracap.model import sizes
from contracap.model.pooler import PoolerConfig
from contracap.model.sizes import SIZES
from contracap.model.weights import config_to_open_clip
from contracap.tokenizer import Tokenizer, lengths

CAPTIONS = ("a dog", "two dogs in the snow", "a cat on a mat &amp; a ball", "the sea")
TINY = SIZES["tiny"]
TINY_CLIP = replace(
    TINY, pooler=PoolerConfig(kind="class_token", queries=0), text=replace(TINY.text, pool="end_token"), decoder=None
)
SETTING = Setting(captions=CAPTIONS, device=torch.device("cpu"), precision="fp32", rounds=7, seed=0)


@pytest.fixture(autouse=True)
def small_models(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sizes.SIZES, "tiny-clip", TINY_CLIP)
    monkeypatch.setattr(train, "B_32", "tiny")
    monkeypatch.setattr(train, "CLIP", "tiny-clip")
    monkeypatch.setattr(train, "BATCHES", {"cpu": {"tiny": 4}})
    monkeypatch.setattr(train, "LOSS_BATCH", 6)


@pytest.fixture(scope="module")
def small_peers(open_clip, tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """open_clip knows the same small models."""
    folder = tmp_path_factory.mktemp("sizes")
    for name, config in {"tiny": TINY, "tiny-clip": TINY_CLIP}.items():
        legacy = replace(config, text=replace(config.text, cls_mask="legacy"))
        (folder / f"{name}.json").write_text(json.dumps(config_to_open_clip(legacy)))
    open_clip.add_model_config(folder)
    yield
    open_clip.factory._MODEL_CONFIG_PATHS.remove(folder)
    open_clip.factory._rescan_model_configs()


@pytest.fixture
def no_peer(monkeypatch: pytest.MonkeyPatch) -> None:
    def peer_module(name: str) -> None:
        raise NoPeerError(f"{name} is not here")

    monkeypatch.setattr(train, "peer_module", peer_module)


@pytest.fixture
def flickr8k(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    captions = json.dumps({"captions": [*CAPTIONS, "what a dog !!"]}).encode()
    write_shard(tmp_path / "flickr8k" / "train" / "000000.tar", [("0", {"jpg": b"-", "json": captions})])
    monkeypatch.setenv("CONTRACAP_DATA", str(tmp_path))


def test_steps_agree_and_are_timed_on_captions_and_on_full_texts(small_peers: None) -> None:
    for full, texts in ((False, "batch 4, Flickr8k captions"), (True, "batch 2, texts of 16 tokens")):
        row = step_row(SETTING, size="tiny", full=full)
        assert row.work == f"tiny step, {texts}"
        assert row.peer and row.ratio and not row.reason
        assert "tiny in fp32: contrastive_loss, gradient_norm, captioning_loss differ by" in row.note
    assert row.note.endswith("texts by their tokens, 16.0 on average: 16: 2")


def test_steps_of_other_losses_or_gradients_are_not_timed(small_peers: None, monkeypatch: pytest.MonkeyPatch) -> None:
    ours = train.train_step
    for name in ("contrastive_loss", "captioning_loss", "gradient_norm"):

        def wrong_step(*arguments, name: str = name) -> dict[str, float]:
            numbers = ours(*arguments)
            return numbers | {name: 1.001 * numbers[name]}

        monkeypatch.setattr(train, "train_step", wrong_step)
        with pytest.raises(UnequalError, match=f"{name} is .* apart, allowed is 1e-04"):
            step_row(SETTING, size="tiny", full=False)


def test_both_sides_change_their_weights_alike(small_peers: None) -> None:
    batch = make_batch("tiny", SETTING, samples=4, full=False)
    model, ours = our_step("tiny", batch, SETTING)
    peer = peer_step("tiny", model, batch, SETTING)
    for _ in range(5):
        numbers, peer_numbers = ours(slice(0, 4)), peer(slice(0, 4))
        for name, value in peer_numbers.items():
            assert numbers[name] == pytest.approx(float(value), rel=1e-4), name


def test_bf16_agrees_within_its_tolerance(small_peers: None) -> None:
    row = step_row(replace(SETTING, precision="bf16"), size="tiny", full=False)
    assert "tiny in bf16" in row.note and "(allowed: 2e-02)" in row.note


def test_clip_row_says_how_many_clip_steps_ours_takes(small_peers: None) -> None:
    row = clip_row(SETTING)
    assert row.work == "tiny step against open_clip's CLIP tiny-clip step, batch 4 (ratio: CLIP's time by ours)"
    assert row.ratio and row.note.startswith(f"our CoCa step takes {1 / row.ratio:.2f} times a CLIP step; ")
    assert "tiny in fp32: contrastive_loss, gradient_norm, captioning_loss differ" in row.note
    assert "tiny-clip in fp32: contrastive_loss, gradient_norm differ" in row.note


def test_without_open_clip_only_ours_is_timed(no_peer: None) -> None:
    for row in (step_row(SETTING, size="tiny", full=False), clip_row(SETTING)):
        assert row.ours > 0
        assert (row.peer, row.ratio, row.quartiles, row.reason) == (None, None, None, "open_clip is not here")
        assert row.note.startswith("texts by their tokens")


def test_texts_are_described_by_their_lengths() -> None:
    batch = make_batch("tiny", SETTING, samples=20, full=False)
    counted = lengths(batch.ids, TINY.text.end).tolist()
    listed = ", ".join(f"{length}: {counted.count(length)}" for length in sorted(set(counted)))
    assert describe(batch) == f"texts by their tokens, {sum(counted) / 20:.1f} on average: {listed}"
    assert len(set(counted)) > 1
    full = make_batch("tiny", SETTING, samples=20, full=True)
    assert lengths(full.ids, TINY.text.end).tolist() == [16] * 20
    assert (full.ids[:, -1] == TINY.text.end).all()


def test_all_sizes_are_timed_on_the_same_texts_and_the_seed_draws_them() -> None:
    batch, clip = (make_batch(size, SETTING, samples=8, full=False) for size in ("tiny", "tiny-clip"))
    assert torch.equal(batch.ids, clip.ids) and torch.equal(batch.pixels, clip.pixels)
    other = make_batch("tiny", replace(SETTING, seed=1), samples=8, full=False)
    assert not torch.equal(batch.ids, other.ids)


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


def test_captions_that_open_clip_would_take_for_shorter_are_left_out(flickr8k: None) -> None:
    assert flickr8k_captions() == list(CAPTIONS)


def test_rows_are_those_asked_for_in_that_order(flickr8k: None, monkeypatch: pytest.MonkeyPatch) -> None:
    named = {name: lambda setting, name=name: Row(work=name, unit="samples/s", ours=1.0) for name in ROWS}
    monkeypatch.setattr(train, "ROWS", named)
    benchmark = bench_train(rows=["l-14-full", "b-32"])
    assert [row.work for row in benchmark.rows] == ["l-14-full", "b-32"]
    assert [row.work for row in bench_train().rows] == list(ROWS)
    assert benchmark.samples == len(CAPTIONS)
    assert benchmark.machine["precision"] in ("fp32", "bf16") and benchmark.machine["device"] == "cpu"


def test_unknown_rows_devices_and_few_rounds_are_refused(
    flickr8k: None, no_peer: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ValueError, match=r"no row 'b-16' in this benchmark; the rows are b-32, b-32-full, .*"):
        bench_train(rows=["b-32", "b-16"])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="device is 'cuda', but torch finds no CUDA device; say cpu"):
        bench_train(device="cuda")
    monkeypatch.setattr(train, "ROWS", {"b-32": lambda setting: step_row(setting, size="tiny", full=False)})
    with pytest.raises(ValueError, match="rounds is 6; it must be at least 7"):
        bench_train(rounds=6)
    monkeypatch.setenv("CONTRACAP_DATA", "/no/such/folder")
    with pytest.raises(FileNotFoundError, match="no captions at /no/such/folder/flickr8k/train: set CONTRACAP_DATA"):
        bench_train()


def test_memory_row_is_on_each_token_but_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = {}

    def row(work: str, **arguments: object) -> Row:
        asked.update(arguments)
        return Row(work=work, unit="MiB", ours=1.0, note="equal")

    monkeypatch.setattr(train, "captioning_loss_row", row)
    found = loss_memory_row(SETTING)
    batch = make_batch("tiny", SETTING, samples=6, full=False)
    tokenizer = Tokenizer(TINY.text.context, TINY.text.vocab_size)
    for ids in batch.ids.tolist():
        length = ids.index(tokenizer.end) + 1
        assert asked["labels"][: length - 1].tolist() == ids[1:length]
        asked["labels"] = asked["labels"][length - 1 :]
    assert len(asked["labels"]) == 0
    assert (asked["vocab_size"], asked["width"]) == (1024, 32)
    assert found.note == f"equal; {describe(batch)}"
