import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from contracap.data.order import OrderError, SampleStream
from contracap.data.shards import Sample, SampleError, write_shard


def make_shards(folder: Path, sizes: list[int]) -> list[str]:
    paths = []
    for number, size in enumerate(sizes):
        path = folder / f"{number:03}.tar"
        write_shard(path, ((f"{number}-{member}", {"jpg": b"p", "txt": b"t"}) for member in range(size)))
        paths.append(str(path))
    return paths


def prepare(sample: Sample, generator: np.random.Generator) -> tuple[str, float]:
    return sample.key, generator.random()


def only_good(sample: Sample, generator: np.random.Generator) -> str:
    if sample.captions != ("t",):
        raise SampleError(f"sample {sample.key} is bad")
    return sample.key


def drawn(stream: SampleStream, count: int) -> list[tuple[str, float]]:
    return [stream.draw(prepare) for _ in range(count)]


def test_epoch_holds_every_sample_once_in_another_order(tmp_path: Path) -> None:
    stream = SampleStream(make_shards(tmp_path, [5, 8, 1, 4]), seed=3, shuffle_buffer=7)
    first, second = ([key for key, _ in drawn(stream, 18)] for _ in range(2))
    assert len(set(first)) == len(set(second)) == 18
    assert set(first) == set(second)
    assert first != second
    assert first != sorted(first)


def test_streams_share_out_each_epoch(tmp_path: Path) -> None:
    shards = make_shards(tmp_path, [4] * 7)
    streams = [SampleStream(shards, seed=0, shuffle_buffer=5, stream=stream, streams=3) for stream in range(3)]
    seen = Counter[tuple[int, str]]()
    for stream in streams:
        key, _ = stream.draw(prepare)
        while (epoch := stream.state_dict()["epoch"]) < 6:
            seen[epoch, key] += 1
            key, _ = stream.draw(prepare)
    assert len(seen) == 6 * 28
    assert set(seen.values()) == {1}


def test_order_depends_on_the_seed_alone(tmp_path: Path) -> None:
    shards = make_shards(tmp_path, [6, 6])
    assert drawn(SampleStream(shards, seed=1, shuffle_buffer=4), 30) == drawn(
        SampleStream(shards, seed=1, shuffle_buffer=4), 30
    )
    assert drawn(SampleStream(shards, seed=1, shuffle_buffer=4), 30) != drawn(
        SampleStream(shards, seed=2, shuffle_buffer=4), 30
    )


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_stream_resumed_anywhere_goes_on_as_if_never_stopped(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    sizes = data.draw(st.lists(st.integers(0, 9), min_size=1, max_size=5).filter(any), label="sizes")
    buffer = data.draw(st.integers(1, 30), label="buffer")
    shards = make_shards(tmp_path_factory.mktemp("resume"), sizes)
    if data.draw(st.booleans(), label="cut"):
        Path(shards[0]).write_bytes(Path(shards[0]).read_bytes()[: sizes[0] * 2048 - 300])
        sizes[0] = max(0, sizes[0] - 1)
        if not any(sizes):
            return
    stream = SampleStream(shards, seed=5, shuffle_buffer=buffer)
    expected = drawn(stream, 3 * sum(sizes))
    last = stream.state_dict()
    stop = data.draw(st.integers(0, len(expected)), label="stop")
    stopped = SampleStream(shards, seed=5, shuffle_buffer=buffer)
    assert drawn(stopped, stop) == expected[:stop]
    state = json.loads(json.dumps(stopped.state_dict()))
    resumed = SampleStream(shards, seed=5, shuffle_buffer=buffer)
    resumed.load_state_dict(state)
    assert drawn(resumed, len(expected) - stop) == expected[stop:]
    assert resumed.state_dict() == last


def test_state_stays_small(tmp_path: Path) -> None:
    stream = SampleStream(make_shards(tmp_path, [500]), seed=0, shuffle_buffer=400)
    drawn(stream, 450)
    assert len(json.dumps(stream.state_dict())) < 200


def test_bad_samples_and_cut_shards_are_skipped_and_counted(tmp_path: Path) -> None:
    shards = make_shards(tmp_path, [3, 3])
    write_shard(shards[0], [("good", {"jpg": b"p", "txt": b"t"}), ("bad", {"jpg": b"p"}), ("none", {"txt": b"t"})])
    Path(shards[1]).write_bytes(Path(shards[1]).read_bytes()[: 2048 * 2 + 600])
    stream = SampleStream(shards, seed=0, shuffle_buffer=100)
    assert Counter(stream.draw(only_good) for _ in range(30)) == {"good": 10, "1-0": 10, "1-1": 10}
    completed = stream.state_dict()["epoch"]
    assert 3 * completed <= stream.skipped <= 3 * (completed + 1)
    reasons = Counter(skip.key for skip in stream.take_skips())
    assert reasons.total() == stream.skipped
    assert set(reasons) == {"bad", "none", None}


def test_skips_name_sample_shard_and_reason(tmp_path: Path) -> None:
    shards = make_shards(tmp_path, [2, 0])
    Path(shards[1]).write_bytes(b"nonsense" * 200)
    stream = SampleStream(shards, seed=0, shuffle_buffer=10)
    stream.draw(prepare)
    (skip,) = stream.take_skips()
    assert (skip.shard, skip.key) == (shards[1], None)
    assert shards[1] in skip.reason
    assert stream.take_skips() == []


@pytest.mark.parametrize("streams", [1, 3])
def test_pass_without_a_usable_sample_is_an_error_with_the_reason(tmp_path: Path, streams: int) -> None:
    shards = make_shards(tmp_path, [2, 0, 3])
    stream = SampleStream(shards, seed=0, shuffle_buffer=4, streams=streams)

    def refuse(sample: Sample, generator: np.random.Generator) -> str:
        raise SampleError("too blurred")

    with pytest.raises(OrderError, match=r"3 shards .* too blurred"):
        stream.draw(refuse)


def test_stream_outlives_an_epoch_of_nothing_but_broken_shards(tmp_path: Path) -> None:
    shards = make_shards(tmp_path, [2, 2, 2])
    Path(shards[0]).write_bytes(b"")
    for number in range(3):
        stream = SampleStream(shards, seed=0, shuffle_buffer=4, stream=number, streams=3)
        assert len({key for key, _ in drawn(stream, 40)}) == 4


def test_resuming_over_shards_that_lost_samples_is_refused(tmp_path: Path) -> None:
    shards = make_shards(tmp_path, [6])
    stream = SampleStream(shards, seed=0, shuffle_buffer=6)
    drawn(stream, 5)
    make_shards(tmp_path, [4])
    with pytest.raises(OrderError, match="samples are missing"):
        SampleStream(shards, seed=0, shuffle_buffer=6).load_state_dict(stream.state_dict())


def test_fewer_shards_than_streams_is_an_error_that_says_what_would_do(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="3 streams need at least 3 shards, there are 2: set streams to 2 or less"):
        SampleStream(make_shards(tmp_path, [1, 1]), seed=0, shuffle_buffer=4, streams=3)
