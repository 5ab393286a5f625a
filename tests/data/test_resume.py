"""Runs that are killed again and again, and data that is damaged in every way."""

import io
import json
import os
import signal
import tarfile
from collections.abc import Iterator
from itertools import islice
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from contracap.data.captions import CaptionConfig
from contracap.data.config import DataConfig
from contracap.data.counts import samples_in
from contracap.data.loader import TrainingBatches, join_states
from contracap.data.order import Order, SampleStream, ShardSet
from contracap.data.samples import Sample
from contracap.data.shards import list_shards, write_shard
from contracap.files import write_text
from contracap.image_files import decode
from contracap.images import ImageConfig
from contracap.tokenizer import Tokenizer
from tests.data.test_shard_maker import picture

TOKENIZER = Tokenizer(context=8, vocab_size=600)
SAMPLES, BATCH = 200, 8


def members(number: int) -> dict[str, bytes]:
    return {"jpg": picture(number), "json": json.dumps({"caption": f"image {number}"}).encode()}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shards")
    for shard, numbers in enumerate((range(0, 90), range(90, 95), range(95, SAMPLES))):
        write_shard(folder / f"{shard}.tar", ((f"{number:03}", members(number)) for number in numbers))
    return folder


def batches_of(
    folder: Path, *, workers: int = 0, rank: int = 0, world_size: int = 1, **changes: object
) -> TrainingBatches:
    config = DataConfig(
        **{"train": str(folder), "batch_size": BATCH, "shuffle_buffer": 40, "workers": workers, **changes}
    )
    return TrainingBatches(
        config, image=ImageConfig(size=8), tokenizer=TOKENIZER, seed=3, rank=rank, world_size=world_size
    )


def read_until_killed(folder: Path, out: Path, workers: int, ranks: int, kill_at: int, place: int, last: int) -> None:
    """Notes the keys of each batch, then the position after it, from the last position on; may kill itself."""
    parts = [batches_of(folder, workers=workers, rank=rank, world_size=ranks) for rank in range(ranks)]
    log, position, noted = out / "log", out / "position", 0
    if position.exists():
        state = json.loads(position.read_text())
        noted = state["batches"]
        for part in parts:
            part.load_state_dict(state)
    lines = log.read_text().splitlines(keepends=True)[:noted] if log.exists() else []
    write_text(log, "".join(lines))
    for step, rows in enumerate(zip(*(islice(part, last - noted) for part in parts), strict=True), noted + 1):
        if step == kill_at and place == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        with log.open("a") as file:
            file.write(json.dumps([key for batch in rows for key in batch.keys]) + "\n")
        if step == kill_at and place == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        write_text(position, json.dumps(join_states([part.state_dict() for part in parts])))
        if step == kill_at and place == 2:
            os.kill(os.getpid(), signal.SIGKILL)


def test_run_killed_again_and_again_reads_every_sample_in_the_order_of_an_uninterrupted_one(folder, tmp_path) -> None:
    """Each time it goes on with other numbers of workers and ranks."""
    last = 30
    expected = [batch.keys for batch in islice(batches_of(folder), last)]
    kills = [(4, 0, 1, 1), (13, 1, 2, 2), (22, 2, 0, 4), (0, 0, 2, 1)]  # batch, place in it, workers, ranks
    for kill_at, place, workers, ranks in kills:
        process = get_context("fork").Process(
            target=read_until_killed, args=(folder, tmp_path, workers, ranks, kill_at, place, last)
        )
        process.start()
        process.join(60)
        assert process.exitcode == (-signal.SIGKILL if kill_at else 0)
    seen = [json.loads(line) for line in (tmp_path / "log").read_text().splitlines()]
    assert seen == expected
    epoch = [key for keys in seen[: SAMPLES // BATCH] for key in keys]
    assert sorted(epoch) == [f"{number:03}" for number in range(SAMPLES)]


@pytest.fixture
def time_limit() -> Iterator[None]:
    """Ends a test that hangs."""

    def stop(signal_number: int, frame: object) -> None:
        raise TimeoutError("the test hangs")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(300)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.fixture(scope="module")
def two_shards(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, bytes]:
    """A folder with two shards, and the sound content of the first."""
    folder = tmp_path_factory.mktemp("sound")
    write_shard(folder / "0.tar", ((f"{number:03}", members(number)) for number in range(5)))
    write_shard(folder / "1.tar", ((f"{number:03}", members(number)) for number in range(5, 8)))
    return folder, (folder / "0.tar").read_bytes()


def flipped(content: bytes, bits: list[int]) -> bytes:
    changed = bytearray(content)
    for bit in bits:
        changed[bit // 8 % len(changed)] ^= 1 << bit % 8
    return bytes(changed)


def reordered(content: bytes, order: list[int]) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=io.BytesIO(content)) as old, tarfile.open(fileobj=file, mode="w") as new:
        parts = old.getmembers()
        for index in order:
            new.addfile(parts[index], old.extractfile(parts[index]))
    return file.getvalue()


def decoded(sample: Sample, caption: str, generator: np.random.Generator) -> str:
    decode(sample.image)
    return sample.key


def zeroed(content: bytes, block: int) -> bytes:
    return content[: block * 512] + bytes(512) + content[(block + 1) * 512 :]


DAMAGES = st.one_of(
    st.tuples(st.just(flipped), st.lists(st.integers(0, 2**20), min_size=1, max_size=20)),
    st.tuples(st.just(lambda content, length: content[: length % len(content)]), st.integers(0, 2**20)),
    st.tuples(st.just(reordered), st.permutations(range(10))),
    st.tuples(st.just(lambda content, at: content[:at] + content[at + 512 :]), st.integers(0, 2**15)),
    st.tuples(st.just(zeroed), st.integers(0, 20)),
)


@settings(max_examples=70, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(damage=DAMAGES, counted_before=st.booleans())
def test_damaged_shard_neither_hangs_nor_crashes_nor_loses_anything_untold(
    two_shards: tuple[Path, bytes], damage: tuple, counted_before: bool, time_limit: None
) -> None:
    (change, how), (folder, sound) = damage, two_shards
    shard = folder / "0.tar"
    shard.write_bytes(sound if counted_before else change(sound, how))
    shards = tuple(list_shards(folder))
    source = ShardSet(shards=shards, counts=tuple(samples_in(shards)))
    shard.write_bytes(change(sound, how))
    stream = SampleStream(Order(sources=(source,), seed=0, streams=1, buffer=6, max_bad_share=0.9))
    keys = set()
    while stream.state_dict()["sources"][0]["epoch"] < 1:
        keys.add(stream.draw(decoded))
    told = sum(skip.samples for skip in stream.take_skips())
    lost = {f"{number:03}" for number in range(8)} - keys
    assert told >= (len(lost) if counted_before else bool(lost))


def test_shards_that_changed_since_the_checkpoint_are_named_when_training_continues(tmp_path: Path, caplog) -> None:
    def write(padding: int) -> TrainingBatches:
        write_shard(tmp_path / "0.tar", ((f"{n:03}", {**members(n), "txt": b"a" * padding}) for n in range(40)))
        return batches_of(tmp_path)

    state = json.loads(json.dumps(write(1).state_dict()))
    write(1).load_state_dict(state)
    assert caplog.text == ""
    write(1000).load_state_dict(state)
    assert "1 shard changed" in caplog.text and "0.tar" in caplog.text


def test_a_caption_field_that_the_first_samples_lack_is_an_error_with_the_nearest_right_one(folder: Path) -> None:
    batches_of(folder, captions=CaptionConfig(weights={"caption": 1.0}))
    with pytest.raises(ValueError, match=r"data\.captions\.weights: .*'captoin'.* 'caption'"):
        batches_of(folder, captions=CaptionConfig(weights={"caption": 0.1, "captoin": 0.9}))


def test_a_caption_field_of_some_shards_may_be_named_like_another(tmp_path: Path) -> None:
    for number, fields in enumerate(({"caption_1": "a"}, {"caption_1": "a", "caption_2": "b"})):
        records = ((f"{n:03}", {**members(n), "json": json.dumps(fields).encode()}) for n in range(200))
        write_shard(tmp_path / f"{number}.tar", records)
    batches_of(tmp_path, captions=CaptionConfig(weights={"caption_1": 1.0, "caption_2": 1.0}))
