import json
from collections import Counter
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from contracap.data.captions import CaptionConfig
from contracap.data.counts import samples_in
from contracap.data.order import Order, OrderError, SampleStream, ShardSet
from contracap.data.samples import Sample, SampleError
from contracap.data.shards import write_shard


def make_shards(folder: Path, sizes: list[int], name: str = "") -> tuple[str, ...]:
    paths = []
    for number, size in enumerate(sizes):
        path = folder / f"{name}{number:03}.tar"
        write_shard(path, ((f"{name}{number}-{member}", {"jpg": b"p", "txt": b"t"}) for member in range(size)))
        paths.append(str(path))
    return tuple(paths)


def order(*sources: tuple[str, ...], weights: tuple[float, ...] = (1.0, 1.0), **changes: Any) -> Order:
    made = (
        ShardSet(shards=shards, counts=tuple(samples_in(shards)), weight=weight)
        for shards, weight in zip(sources, weights, strict=False)
    )
    return Order(**{"sources": tuple(made), "seed": 5, "streams": 1, "buffer": 7, **changes})


def streams_of(order: Order) -> list[SampleStream]:
    return [SampleStream(order, number) for number in range(order.streams)]


def prepare(sample: Sample, caption: str, generator: np.random.Generator) -> tuple[str, float]:
    return sample.key, generator.random()


def caption_of(sample: Sample, caption: str, generator: np.random.Generator) -> str:
    return caption


def only_good(sample: Sample, caption: str, generator: np.random.Generator) -> str:
    return sample.key


def drawn(stream: SampleStream, count: int) -> list[tuple[str, float]]:
    return [stream.draw(prepare) for _ in range(count)]


def epoch_of(stream: SampleStream) -> int:
    return stream.state_dict()["sources"][0]["epoch"]


def test_epoch_holds_every_sample_once_in_another_order(tmp_path: Path) -> None:
    stream = SampleStream(order(make_shards(tmp_path, [5, 8, 1, 4])))
    first, second = ([key for key, _ in drawn(stream, 18)] for _ in range(2))
    assert len(set(first)) == 18 and set(first) == set(second)
    assert first != second and first != sorted(first)


@settings(max_examples=12, deadline=None)
@given(sizes=st.lists(st.integers(0, 9), min_size=1, max_size=6).filter(any), streams=st.integers(1, 9))
def test_spans_of_an_epoch_are_equal_and_hold_every_sample_once(sizes: list[int], streams: int) -> None:
    source = ShardSet(shards=tuple(map(str, range(len(sizes)))), counts=tuple(sizes))
    for epoch in range(3):
        spans = [source.span(seed=3, epoch=epoch, stream=stream, streams=streams) for stream in range(streams)]
        held = [(shard, sample) for span in spans for shard, begin, end in span for sample in range(begin, end)]
        assert sorted(held) == [(shard, sample) for shard, size in enumerate(sizes) for sample in range(size)]
        lengths = [sum(end - begin for _, begin, end in span) for span in spans]
        assert max(lengths) - min(lengths) <= 1
        assert all(begin < end for span in spans for _, begin, end in span)


@pytest.mark.parametrize("sizes", [[28], [1, 27]])
def test_streams_share_out_each_epoch_however_few_the_shards(tmp_path: Path, sizes: list[int]) -> None:
    seen = Counter[tuple[int, str]]()
    for stream in streams_of(order(make_shards(tmp_path, sizes), streams=4)):
        key, _ = stream.draw(prepare)
        while (epoch := epoch_of(stream)) < 3:
            seen[epoch, key] += 1
            key, _ = stream.draw(prepare)
    assert len(seen) == 3 * 28
    assert set(seen.values()) == {1}


def test_order_depends_on_the_seed_alone(tmp_path: Path) -> None:
    shards = make_shards(tmp_path, [6, 6])
    assert drawn(SampleStream(order(shards)), 30) == drawn(SampleStream(order(shards)), 30)
    assert drawn(SampleStream(order(shards)), 30) != drawn(SampleStream(order(shards, seed=6)), 30)


@pytest.fixture(scope="module")
def bank(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards with every number of samples up to 6, for four places in a list, and the same shards cut short."""
    folder = tmp_path_factory.mktemp("bank")
    for place, size in product(range(4), range(7)):
        keys = (f"{place}-{member}" for member in range(size))
        write_shard(folder / f"{place}-{size}.tar", ((key, {"jpg": b"p", "txt": b"t"}) for key in keys))
        content = (folder / f"{place}-{size}.tar").read_bytes()
        (folder / f"{place}-{size}-cut.tar").write_bytes(content[: max(0, size * 2048 - 300)])
    return folder


@settings(max_examples=25, deadline=None)
@given(
    sizes=st.lists(st.integers(0, 6), min_size=1, max_size=4).filter(any),
    cut=st.booleans(),
    mixture=st.booleans(),
    buffer=st.integers(1, 25),
    use=st.sampled_from(["random", "all"]),
    stop=st.floats(0, 1),
)
def test_stream_resumed_anywhere_goes_on_as_if_never_stopped(
    bank: Path, sizes: list[int], cut: bool, mixture: bool, buffer: int, use: Any, stop: float
) -> None:
    names = [f"{place}-{size}" for place, size in enumerate(sizes)]
    if cut and 0 < sizes[0] < sum(sizes):
        names[0] += "-cut"
    sources = [ShardSet(shards=tuple(str(bank / f"{name}.tar") for name in names), counts=tuple(sizes))]
    if mixture:
        sources.append(ShardSet(shards=(str(bank / "0-3.tar"), str(bank / "1-4.tar")), counts=(3, 4)))
    changes = {"captions": CaptionConfig(use=use), "max_bad_share": 0.9}
    whole = Order(sources=tuple(sources), seed=5, streams=1, buffer=buffer, **changes)
    stream, stopped, resumed = (SampleStream(whole) for _ in range(3))
    expected = drawn(stream, 3 * sum(sizes))
    done = round(stop * len(expected))
    assert drawn(stopped, done) == expected[:done]
    resumed.load_state_dict(json.loads(json.dumps(stopped.state_dict())))
    assert drawn(resumed, len(expected) - done) == expected[done:]
    assert resumed.state_dict() == stream.state_dict()
    told, in_parts = ([skip for each in some for skip in each.take_skips()] for some in ([stream], [stopped, resumed]))
    assert sum(skip.samples for skip in told) == sum(skip.samples for skip in in_parts)


def test_state_stays_small(tmp_path: Path) -> None:
    stream = SampleStream(order(make_shards(tmp_path, [500]), buffer=400))
    drawn(stream, 450)
    assert len(json.dumps(stream.state_dict())) < 200


def test_mixture_draws_by_weight(tmp_path: Path) -> None:
    small, large = make_shards(tmp_path, [10], name="s"), make_shards(tmp_path, [40], name="l")
    stream = SampleStream(order(small, large, weights=(3.0, 1.0)))
    keys = Counter(key for key, _ in drawn(stream, 400))
    assert 0.7 < sum(count for key, count in keys.items() if key.startswith("s")) / 400 < 0.8
    large_ones = [count for key, count in keys.items() if key.startswith("l")]
    assert len(large_ones) == 40  # each in turn, as its own epochs have it
    assert max(large_ones) - min(large_ones) <= 1


def test_replacement_repeats_shards_before_others_have_come(tmp_path: Path) -> None:
    shards = make_shards(tmp_path, [2] * 20)
    source = ShardSet(shards=shards, counts=(2,) * 20, replacement=True)
    streams = streams_of(Order(sources=(source,), seed=0, streams=2, buffer=4))
    keys = [Counter(key for key, _ in drawn(stream, 20)) for stream in streams]
    assert max(keys[0].values()) > 1
    assert keys[0] != keys[1]
    assert len(Counter(key for key, _ in drawn(streams[0], 300))) == 40


def captioned(path: Path, fields: list[dict[str, Any]]) -> tuple[str, ...]:
    write_shard(path, ((str(key), {"jpg": b"p", "json": json.dumps(each).encode()}) for key, each in enumerate(fields)))
    return (str(path),)


def test_captions_are_chosen_by_the_rule(tmp_path: Path) -> None:
    shards = captioned(tmp_path / "0.tar", [{"captions": ["a", "b"], "alt": "x", "new": ["y", "z", " "]}])

    def captions(config: CaptionConfig) -> Counter[str]:
        stream = SampleStream(order(shards, captions=config))
        return Counter(stream.draw(caption_of) for _ in range(60))

    assert captions(CaptionConfig()).keys() == {"a", "b"}
    assert captions(CaptionConfig(use="first")) == {"a": 60}
    assert captions(CaptionConfig(use="all")) == {"a": 30, "b": 30}  # each once in an epoch
    weighted = captions(CaptionConfig(weights={"alt": 1.0, "new": 3.0, "none": 5.0}))
    assert weighted.keys() == {"x", "y", "z"}
    assert 6 < weighted["x"] < 24
    assert captions(CaptionConfig(use="all", weights={"alt": 1.0, "new": 3.0})) == {"x": 20, "y": 20, "z": 20}


def test_bad_samples_and_cut_shards_are_skipped_and_counted(tmp_path: Path) -> None:
    shards = make_shards(tmp_path, [3, 3])
    write_shard(shards[0], [("good", {"jpg": b"p", "txt": b"t"}), ("bad", {"txt": b"t"}), ("none", {"jpg": b"p"})])
    whole = order(shards, buffer=100)
    Path(shards[1]).write_bytes(Path(shards[1]).read_bytes()[: 2048 * 2 + 600])
    stream = SampleStream(whole)
    assert Counter(stream.draw(only_good) for _ in range(30)) == {"good": 10, "1-0": 10, "1-1": 10}
    skips = stream.take_skips()
    kinds = Counter[str]()
    for skip in skips:
        kinds[skip.kind] += skip.samples
    assert kinds == stream.state_dict()["skipped"]
    assert kinds.keys() == {"no_picture", "no_caption", "broken_shard"}
    assert {skip.key for skip in skips} == {"bad", "none", None}
    assert all(shards[1] in skip.reason for skip in skips if skip.kind == "broken_shard")
    assert stream.take_skips() == []


@pytest.mark.parametrize(("counted", "word", "lost"), [(2, "2 samples more than the 2", 2), (6, "fewer samples", 2)])
def test_shard_with_other_samples_than_were_counted_is_told_of(tmp_path, counted: int, word: str, lost: int) -> None:
    (shard,) = make_shards(tmp_path, [4])
    stream = SampleStream(Order(sources=(ShardSet(shards=(shard,), counts=(counted,)),), seed=0, streams=1, buffer=9))
    drawn(stream, min(counted, 4))
    stream.draw(prepare)  # of the next epoch
    skips = [skip for skip in stream.take_skips() if word in skip.reason]
    assert lost <= sum(skip.samples for skip in skips) <= 2 * lost


@pytest.mark.parametrize("damage", [True, False])
def test_shard_that_breaks_or_heals_before_a_resume_moves_no_other_sample(tmp_path: Path, damage: bool) -> None:
    shards = make_shards(tmp_path, [20, 20, 20])
    sound, broken = Path(shards[1]).read_bytes(), Path(shards[1]).read_bytes()[: 5 * 2048 + 100]
    whole = order(shards, buffer=25, max_bad_share=0.9)
    expected = [key for key, _ in drawn(SampleStream(whole), 60)]
    Path(shards[1]).write_bytes(sound if damage else broken)
    stream = SampleStream(whole)
    before = [key for key, _ in drawn(stream, 17)]
    told = stream.take_skips()
    Path(shards[1]).write_bytes(broken if damage else sound)
    resumed = SampleStream(whole)
    resumed.load_state_dict(stream.state_dict())
    after = []
    while resumed.state_dict()["sources"][0]["epoch"] == 0 and len(before) + len(after) < 60:
        after.append(resumed.draw(prepare)[0])
    told += resumed.take_skips()
    seen = [key for key in [*before, *after] if key in expected]
    first = list(dict.fromkeys(seen))
    assert [key for key in expected if key in set(first)] == first
    assert len(first) + sum(skip.samples for skip in told) >= 60
    assert len(before) == len(set(before))


def test_unsafe_names_and_repeated_keys_are_skipped(tmp_path: Path) -> None:
    content = {"jpg": b"p", "txt": b"t"}
    names = ["a/../../etc/x", "/x", "fine", "..dots", "other", "fine"]
    path = tmp_path / "0.tar"
    write_shard(path, [(name, content) for name in names if "." not in name.rpartition("/")[2]])
    stream = SampleStream(order((str(path),), buffer=9))
    assert {key for key, _ in drawn(stream, 2)} == {"fine", "other"}
    assert Counter(skip.kind for skip in stream.take_skips()) == {"unsafe_path": 2, "duplicate_key": 1}


def test_too_many_bad_samples_are_an_error_that_says_what_would_do(tmp_path: Path) -> None:
    stream = SampleStream(order(make_shards(tmp_path, [20]), max_bad_share=0.01))

    def mostly(sample: Sample, caption: str, generator: np.random.Generator) -> str:
        if sample.key != "0-3":
            raise SampleError("too blurred", kind="blurred")
        return sample.key

    with pytest.raises(OrderError, match=r"11 of the last .* blurred 11.* too blurred.*raise data\.max_bad_share"):
        drawn_keys = [stream.draw(mostly) for _ in range(3)]
        assert drawn_keys


def test_bad_samples_are_counted_in_windows(tmp_path: Path) -> None:
    stream = SampleStream(order(make_shards(tmp_path, [25]), max_bad_share=0.05))

    def all_but_one(sample: Sample, caption: str, generator: np.random.Generator) -> str:
        if sample.key == "0-3":
            raise SampleError("too blurred", kind="blurred")
        return sample.key

    for _ in range(1500):
        stream.draw(all_but_one)
    assert stream.state_dict()["skipped"]["blurred"] > 55  # more than 5 % of a window, but 4 % of all


def test_shards_that_vanish_one_and_all_stop_the_stream(tmp_path: Path) -> None:
    shards = make_shards(tmp_path, [3] * 30)
    whole = order(shards)
    for shard in shards:
        Path(shard).unlink()
    with pytest.raises(OrderError, match="21 shards in a row cannot be read; the last: cannot read shard"):
        drawn(SampleStream(whole), 1)


def test_fewer_samples_than_streams_are_an_error_that_says_what_would_do(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"2 samples.*too few for 3 streams: set streams to 2 or less"):
        order(make_shards(tmp_path, [1, 1]), streams=3)
