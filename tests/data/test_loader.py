import json
import multiprocessing
import pickle
import re
from collections.abc import Iterator
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch

from contracap.data.batch import Batch
from contracap.data.captions import CaptionConfig
from contracap.data.config import DataConfig, SourceConfig
from contracap.data.loader import TrainingBatches, evaluation_samples, join_states
from contracap.data.order import OrderError
from contracap.data.samples import SampleError
from contracap.data.shards import ShardError, write_shard
from contracap.images import AugmentationConfig, ImageConfig
from contracap.tokenizer import Tokenizer
from tests.data.test_shard_maker import picture

TOKENIZER = Tokenizer(context=20, vocab_size=600)
AUGMENTATION = AugmentationConfig(crop_scale=(0.3, 1.0), flip=0.5)


jpeg = partial(picture, size=(30, 24))


def make_shard(path: Path, keys: range) -> None:
    def captions(key: int) -> bytes:
        return json.dumps({"captions": [f"image {key}", f"again {key}", f"the third of {key}"]}).encode()

    write_shard(path, ((f"{key:04}", {"jpg": jpeg(key), "json": captions(key)}) for key in keys))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four shards with 5, 6, 7 and 8 images, one of them broken."""
    folder = tmp_path_factory.mktemp("shards")
    start = 0
    for number, size in enumerate((5, 6, 7)):
        make_shard(folder / f"{number}.tar", range(start, start + size))
        start += size
    good = ((f"{key:04}", {"jpg": jpeg(key), "txt": b"a"}) for key in range(18, 25))
    write_shard(folder / "3.tar", [("broken", {"jpg": jpeg(0)[:200], "txt": b"a"}), *good])
    return folder


def training(
    folder: Path,
    *,
    workers: int = 0,
    streams: int = 2,
    batch_size: int = 4,
    shuffle_buffer: int = 5,
    seed: int = 7,
    augmentation: AugmentationConfig = AUGMENTATION,
    rank: int = 0,
    world_size: int = 1,
    **settings: Any,
) -> TrainingBatches:
    config = DataConfig(
        train=str(folder),
        batch_size=batch_size,
        shuffle_buffer=shuffle_buffer,
        streams=streams,
        workers=workers,
        augmentation=augmentation,
        **settings,
    )
    image = ImageConfig(size=16)
    return TrainingBatches(config, image=image, tokenizer=TOKENIZER, seed=seed, rank=rank, world_size=world_size)


def assert_equal(batches: list[Batch], others: list[Batch]) -> None:
    assert [batch.keys for batch in batches] == [batch.keys for batch in others]
    for batch, other in zip(batches, others, strict=True):
        assert torch.equal(batch.pixels, other.pixels)
        assert torch.equal(batch.ids, other.ids)
        assert batch.lengths.tolist() == other.lengths.tolist()


@pytest.fixture(scope="module")
def uninterrupted(folder: Path) -> list[Batch]:
    return list(islice(training(folder), 18))  # 72 samples of 25: nearly three epochs


# The first batches, the middle of an epoch with a partly used buffer, and the ends of the two streams' first epochs.
@pytest.mark.parametrize(("before", "after", "stop"), [(0, 0, 0), (2, 0, 4), (0, 1, 6), (0, 0, 12)])
def test_resumed_batches_equal_uninterrupted_ones_whatever_the_workers(
    folder: Path, uninterrupted: list[Batch], before: int, after: int, stop: int
) -> None:
    stopped = training(folder, workers=before)
    assert_equal(list(islice(stopped, stop)), uninterrupted[:stop])
    resumed = training(folder, workers=after)
    resumed.load_state_dict(json.loads(json.dumps(stopped.state_dict())))
    assert_equal(list(islice(resumed, 18 - stop)), uninterrupted[stop:])
    reference = training(folder)
    list(islice(reference, 18))
    assert resumed.state_dict() == reference.state_dict()


def test_iterating_again_goes_on_where_the_last_iteration_stopped(folder: Path, uninterrupted: list[Batch]) -> None:
    batches = training(folder)
    assert_equal([*islice(batches, 5), *islice(batches, 4)], uninterrupted[:9])


def test_captions_and_crops_vary_between_epochs(folder: Path) -> None:
    texts: dict[str, set[str]] = {}
    crops: dict[str, set[bytes]] = {}
    for batch in islice(training(folder, streams=1, batch_size=5), 15):
        for key, ids, pixels in zip(batch.keys, batch.ids, batch.pixels, strict=True):
            texts.setdefault(key, set()).add(TOKENIZER.decode(ids.tolist()))
            crops.setdefault(key, set()).add(pixels.numpy().tobytes())
    assert 1 < len(texts["0003"]) <= 3
    assert len(crops["0003"]) == 3  # epochs


def test_batch_is_uint8_pixels_and_ids_cut_to_the_longest_text(tmp_path: Path) -> None:
    captions = ["a", "a b c d e", "a b c d e f", "x " * 50]
    tokens = [8, 8, 16, 20]  # start, letters, end and one more, rounded up to 8, at most the context
    for caption, width in zip(captions, tokens, strict=True):
        write_shard(tmp_path / "s.tar", [("0", {"jpg": jpeg(0), "txt": caption.encode()})])
        batch = next(iter(training(tmp_path, streams=1, batch_size=2)))
        assert batch.ids.shape == (2, width)
        assert torch.equal(batch.ids, TOKENIZER([caption] * 2)[:, :width])
        assert batch.pixels.shape == (2, 3, 16, 16)
        assert batch.pixels.dtype == torch.uint8
        assert len(batch.to("cpu")) == 2


@pytest.mark.parametrize(("ranks", "workers"), [(1, 2), (2, 0), (4, 0)])
def test_ranks_and_their_workers_share_the_rows_of_the_same_batches(folder: Path, ranks: int, workers: int) -> None:
    whole = list(islice(training(folder, streams=4), 5))
    parts = [training(folder, streams=4, rank=rank, world_size=ranks, workers=workers) for rank in range(ranks)]
    rows = zip(*(islice(part, 5) for part in parts), strict=True)
    assert_equal([Batch.join(part) for part in rows], whole)


@pytest.mark.parametrize(("before", "after"), [(4, 1), (2, 4)])
def test_run_goes_on_with_another_number_of_ranks(folder: Path, before: int, after: int) -> None:
    whole = list(islice(training(folder, streams=4), 12))
    stopped = [training(folder, streams=4, rank=rank, world_size=before) for rank in range(before)]
    for part in stopped:
        list(islice(part, 7))
    state = json.loads(json.dumps(join_states([part.state_dict() for part in stopped])))
    resumed = [training(folder, streams=4, rank=rank, world_size=after) for rank in range(after)]
    for part in resumed:
        part.load_state_dict(state)
    rows = zip(*(islice(part, 5) for part in resumed), strict=True)
    assert_equal([Batch.join(part) for part in rows], whole[7:])


def test_state_of_one_rank_alone_is_refused_by_another(folder: Path) -> None:
    state = training(folder, rank=0, world_size=2).state_dict()
    with pytest.raises(ValueError, match=r"stream 1 is not in the saved state.*join the states of all ranks"):
        training(folder, rank=1, world_size=2).load_state_dict(state)


def test_more_workers_than_streams_are_not_started(folder: Path, uninterrupted: list[Batch]) -> None:
    assert_equal(list(islice(training(folder, workers=5), 3)), uninterrupted[:3])


def test_mixture_of_named_sources(tmp_path: Path) -> None:
    make_shard(tmp_path / "a.tar", range(10))
    make_shard(tmp_path / "b.tar", range(100, 130))
    sources = {"a": SourceConfig(shards=str(tmp_path / "a.tar")), "b": SourceConfig(shards=str(tmp_path / "b.tar"))}
    config = DataConfig(train=sources, batch_size=8)
    batches = TrainingBatches(config, image=ImageConfig(size=16), tokenizer=TOKENIZER, seed=0)
    keys = [key for batch in islice(batches, 12) for key in batch.keys]
    assert 0.3 < sum(key < "0100" for key in keys) / len(keys) < 0.7


@pytest.mark.parametrize("workers", [0, 2])
def test_bad_samples_are_skipped_counted_and_told_of(folder: Path, workers: int) -> None:
    batches = training(folder, workers=workers)
    keys = {key for batch in islice(batches, 12) for key in batch.keys}
    skips = batches.take_skips()
    assert "broken" not in keys
    assert batches.skipped == {"broken_picture": len(skips)}
    assert all("broken of" in skip.reason and "3.tar" in skip.reason and "\n" not in skip.reason for skip in skips)
    assert batches.take_skips() == []


def test_tiny_pictures_are_bad_samples(tmp_path: Path) -> None:
    dot = picture(0, size=(1, 1))
    write_shard(tmp_path / "0.tar", [("dot", {"jpg": dot, "txt": b"a"}), ("a", {"jpg": jpeg(0), "txt": b"a"})])
    batches = training(tmp_path, streams=1)
    assert set(next(iter(batches)).keys) == {"a"}
    (skip, *_) = batches.take_skips()
    assert skip.kind == "picture_size"
    assert "1 x 1 pixels; the shorter side must have at least 8" in skip.reason


def test_too_many_lost_samples_stop_the_run(tmp_path: Path) -> None:
    for number in range(4):
        make_shard(tmp_path / f"{number}.tar", range(60 * number, 60 * (number + 1)))
    batches = training(tmp_path, batch_size=8, max_bad_share=0.05, streams=4)
    whole = (tmp_path / "1.tar").read_bytes()
    (tmp_path / "1.tar").write_bytes(b"\1" * len(whole))
    with pytest.raises(OrderError, match=r"broken shards have lost 60 of .* cannot read shard .*1\.tar"):
        for _ in islice(batches, 30):
            pass


def test_worker_that_dies_is_one_line(folder: Path) -> None:
    others = multiprocessing.active_children()  # of iterators that earlier tests left
    batches = iter(training(folder, workers=2))
    next(batches)
    for worker in multiprocessing.active_children():
        if worker not in others:
            worker.kill()
    with pytest.raises(
        OrderError, match=r"a worker process of the data died \(process \d+: ended by SIGKILL\)"
    ) as error:
        for _ in range(20):
            next(batches)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("workers", [0, 1])
def test_data_without_a_usable_sample_is_an_error_instead_of_an_endless_search(tmp_path: Path, workers: int) -> None:
    write_shard(tmp_path / "0.tar", [("a", {"jpg": b"no picture", "txt": b"a"}), ("b", {"jpg": jpeg(0), "txt": b" "})])
    batches = training(tmp_path, streams=1, workers=workers)
    with pytest.raises(OrderError, match="51 of the last 51 samples") as error:
        next(iter(batches))
    assert "\n" not in str(error.value)
    assert len(batches.take_skips()) == 51


def test_reading_draws_no_random_numbers_of_the_model(folder: Path) -> None:
    torch.manual_seed(0)
    state = torch.get_rng_state()
    for workers in (0, 1):
        next(iter(training(folder, workers=workers)))
    assert torch.equal(torch.get_rng_state(), state)


def test_resuming_with_another_order_or_other_shards_is_refused(folder: Path, tmp_path: Path) -> None:
    for change, name in (({"seed": 8}, "seed"), ({"streams": 4}, "streams"), ({"shuffle_buffer": 9}, "buffer")):
        with pytest.raises(ValueError, match=f"cannot resume the data: .*{name}"):
            training(folder, **change).load_state_dict(training(folder).state_dict())
    for number in range(4):
        make_shard(tmp_path / f"other-{number}.tar", range(2))
    with pytest.raises(ValueError, match="cannot resume the data: samples was 26 and is now 8"):
        training(tmp_path).load_state_dict(training(folder).state_dict())


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"streams": 3}, "streams is 3; it must divide batch_size 4"),
        ({"max_bad_share": 1.0}, "max_bad_share is 1.0"),
        ({"batch_size": 0}, "batch_size must be at least 1, is 0"),
        ({"shuffle_buffer": 0}, "shuffle_buffer must be at least 1, is 0"),
        ({"workers": -1}, "workers must be at least 0, is -1"),
    ],
)
def test_impossible_settings_are_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DataConfig(**{"train": "shards", "batch_size": 4} | values)


def test_impossible_seeds_ranks_and_cuts_are_refused(folder: Path) -> None:
    with pytest.raises(ValueError, match=r"0 to 2\*\*32 - 1, is -1"):
        training(folder, seed=-1)
    with pytest.raises(ValueError, match=r"3 ranks cannot share 2 streams: set data\.streams to a multiple of 3"):
        training(folder, world_size=3)
    with pytest.raises(ValueError, match="max_tokens is 2; it must be at least 3"):
        CaptionConfig(max_tokens=2)


def test_batches_can_be_sent_to_a_spawned_worker(folder: Path, uninterrupted: list[Batch]) -> None:
    assert_equal(list(islice(pickle.loads(pickle.dumps(training(folder))), 2)), uninterrupted[:2])


def test_evaluation_reads_every_sample_once_in_order_and_stops_at_damage(tmp_path: Path, caplog) -> None:
    make_shard(tmp_path / "0.tar", range(3))
    make_shard(tmp_path / "1.tar", range(3, 5))
    assert [sample.key for sample in evaluation_samples(tmp_path)] == ["0000", "0001", "0002", "0003", "0004"]
    whole = [("b", {"jpg": jpeg(0), "txt": b"b"})]
    write_shard(tmp_path / "1.tar", [("a", {"txt": b"no picture"}), *whole])
    assert [sample.key for sample in evaluation_samples(tmp_path)] == ["0000", "0001", "0002", "b"]
    assert re.search(r"skipped 1 .*sample a of .*1\.tar", caplog.text)
    write_shard(tmp_path / "1.tar", [("../a", {"jpg": jpeg(0)}), *whole])
    with pytest.raises(SampleError, match=r"\.\./a.*out of the folder"):
        exhaust(evaluation_samples(tmp_path))
    (tmp_path / "0.tar").write_bytes((tmp_path / "0.tar").read_bytes()[:1500])
    with pytest.raises(ShardError, match=r"0\.tar"):
        exhaust(evaluation_samples(tmp_path))


def exhaust(iterator: Iterator[object]) -> None:
    for _ in iterator:
        pass


def test_captions_are_cut_to_the_most_tokens_and_keep_their_end(folder: Path, uninterrupted: list[Batch]) -> None:
    cut = list(islice(training(folder, captions=CaptionConfig(max_tokens=5)), 3))
    for batch, whole in zip(cut, uninterrupted, strict=False):
        assert batch.keys == whole.keys and batch.ids.shape[1] == 5
        for row, full in zip(batch.ids, whole.ids, strict=True):
            length = int((full == TOKENIZER.end).nonzero()[0]) + 1
            kept = min(length, 5)
            assert row[kept - 1] == TOKENIZER.end and not row[kept:].any()
            assert torch.equal(row[: kept - 1], full[: kept - 1])
    assert max(int((ids == TOKENIZER.end).nonzero()[0]) for batch in uninterrupted[:3] for ids in batch.ids) > 4
    longer = list(islice(training(folder, captions=CaptionConfig(max_tokens=50)), 3))
    assert_equal(longer, uninterrupted[:3])
