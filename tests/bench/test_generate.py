import sys
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
import torch
from PIL import Image

import contracap
from contracap.bench import caption_pair, generate
from contracap.bench.caption_pair import Pair, Setting
from contracap.bench.generate import (
    BEAM,
    GREEDY,
    ROWS,
    bench_generate,
    caption_row,
    describe_change,
    folder_row,
    int8_row,
    large_batch_row,
    require_same_captions,
    write_pictures,
)
from contracap.bench.peer_captions import PACKAGES, PeerCaptions, random_pixels
from contracap.bench.timing import NoPeerError, Row, UnequalError
from contracap.generation import BeamSearch, Captioner

CPU = torch.device("cpu")
IMAGES = 6
TOKENS = 14


@pytest.fixture(autouse=True)
def short_texts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(caption_pair, "TOKENS", TOKENS)


@pytest.fixture
def setting() -> Setting:
    return Setting(device=CPU, rounds=7, seed=0)


@pytest.fixture(scope="module")
def packages(open_clip: ModuleType) -> Path:
    if not PACKAGES.is_dir():
        pytest.skip(f"no transformers 4.49 at {PACKAGES}: make setup")
    return PACKAGES


@pytest.fixture(scope="module")
def both(packages: Path) -> Iterator[tuple[Pair, PeerCaptions]]:
    with pytest.MonkeyPatch.context() as patch, ExitStack() as stack:
        patch.setattr(caption_pair, "TOKENS", TOKENS)
        pair = Pair("tiny", Setting(device=CPU, rounds=7, seed=0), images=IMAGES)
        yield pair, pair.open_peer(stack)


def short(strategy):
    return replace(strategy, max_tokens=TOKENS, min_tokens=TOKENS - 1)


@pytest.mark.slow
def test_legacy_and_beam_search_have_the_ids_of_open_clip_and_of_transformers(both) -> None:
    pair, peer = both
    note = pair.require_equal_beams(peer)
    assert "legacy has the ids of open_clip's 6 beams in 3 groups" in note
    assert "the 6 best of transformers'" in note
    lengths = {len(text.token_ids) for text in pair.captioner.generate(pair.pixels, BeamSearch(6, TOKENS, 5))}
    assert len(lengths) > 1, "some captions should end before others"


@pytest.mark.slow
def test_greedy_has_the_ids_of_open_clip_s_default_top_k(both) -> None:
    pair, peer = both
    assert "6 pictures, 6 different captions" in pair.require_equal_greedy(peer)


@pytest.mark.slow
def test_another_caption_is_not_timed(both, monkeypatch: pytest.MonkeyPatch) -> None:
    pair, peer = both
    other = Pair("tiny", replace(pair.setting, seed=1), images=IMAGES)
    monkeypatch.setattr(pair, "captioner", other.captioner)
    for compared, name in ((pair.require_equal_beams, "legacy"), (pair.require_equal_greedy, "greedy")):
        with pytest.raises(UnequalError, match=f"{name}: picture 0, caption 0: .* the peer's"):
            compared(peer)


@pytest.mark.slow
def test_timed_texts_fill_their_length_on_both_sides(both) -> None:
    pair, peer = both
    for way in ("groups", "top_k", "transformers"):
        found = peer(pair.request(way, min_tokens=TOKENS - 1))
        assert {len(ids) for best in found for ids in best} == {TOKENS}
    for strategy in map(short, (BEAM, GREEDY)):
        for caption in pair.captioner.generate(pair.pixels, strategy):
            assert len(caption.token_ids) in (TOKENS - 2, TOKENS - 1)  # the last token may be the end


@pytest.mark.slow
def test_the_peer_s_packages_are_its_own(both) -> None:
    _, peer = both
    assert (peer.versions["open_clip"], peer.versions["transformers"]) == ("3.3.0", "4.49.0")
    assert "transformers" not in sys.modules


@pytest.mark.slow
def test_pixels_are_the_same_in_the_other_process(both) -> None:
    pair, peer = both
    seen = peer._process.submit(random_pixels, IMAGES, pair.side, pair.setting.seed, CPU).result()
    assert torch.equal(seen, pair.pixels)


@pytest.mark.slow
def test_a_row_says_what_was_equal_and_how_much_faster_ours_is(setting: Setting, packages: Path) -> None:
    row = caption_row(setting, size="tiny", name="top-k", images=2, ours=short(GREEDY), peer="top_k")
    assert row.work == "tiny, top-k, 2 pictures"
    assert row.peer and row.ratio and not row.reason
    assert "greedy has the ids of open_clip's top_k of 1" in row.note and "both write 13 tokens a caption" in row.note


def test_without_the_peer_s_packages_only_ours_is_timed(setting: Setting, tmp_path: Path) -> None:
    missing = replace(setting, packages=tmp_path / "none")
    row = caption_row(missing, size="tiny", name="beam 6", images=1, ours=short(BEAM))
    assert row.ours > 0 and row.work == "tiny, beam 6, 1 picture"
    assert (row.peer, row.ratio) == (None, None)
    assert row.reason.endswith(f"there is none at {tmp_path / 'none'}: make setup") and "\n" not in row.reason


def test_captions_differ_and_some_end_before_others(setting: Setting) -> None:
    pair = Pair("tiny", setting, images=IMAGES)
    ids = [caption.token_ids for caption in pair.captioner.generate(pair.pixels, BeamSearch(6, TOKENS, 5))]
    assert len(set(ids)) == IMAGES and len({len(each) for each in ids}) > 1
    assert not {0, pair.end - 1} & {token for each in ids for token in each}


def test_a_row_survives_a_later_row_s_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(setting: Setting) -> Row:
        raise UnequalError("other ids")

    reported = []
    row = Row(work="first", unit="captions/s", ours=1.0)
    monkeypatch.setattr(generate, "ROWS", {"first": lambda setting: row, "second": failing})
    with pytest.raises(UnequalError, match="other ids"):
        bench_generate(report=reported.append)
    assert reported == [row]


def test_rows_are_those_asked_for_in_that_order(monkeypatch: pytest.MonkeyPatch) -> None:
    named = {name: lambda setting, name=name: Row(work=name, unit="captions/s", ours=1.0) for name in ROWS}
    monkeypatch.setattr(generate, "ROWS", named)
    assert [row.work for row in bench_generate(rows=["folder", "beam-8"]).rows] == ["folder", "beam-8"]
    assert [row.work for row in bench_generate().rows] == list(ROWS)
    with pytest.raises(ValueError, match=r"no row 'l-14-beam-256' in this benchmark; the rows are beam-1, beam-8, .*"):
        bench_generate(rows=["l-14-beam-256"])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="device is 'cuda', but torch finds no CUDA device; say cpu"):
        bench_generate(device="cuda")


def test_int8_weights_are_timed_beside_exact_ones_and_their_change_is_told(
    setting: Setting, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(generate, "BEAM", short(BEAM))
    row = int8_row(setting, size="tiny", images=2)
    assert row.peer and row.ratio
    assert "of 2 captions change, a token's log-probability by" in row.note


def test_a_captioner_does_not_differ_from_itself(setting: Setting) -> None:
    pair = Pair("tiny", setting, images=2)
    expected = "0 of 2 captions change, a token's log-probability by 0.0e+00 nats on average"
    assert describe_change(pair.captioner, pair.captioner, pair.pixels) == expected


def test_large_batches_are_captioned_in_bf16(setting: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generate, "BEAM", short(BEAM))
    row = large_batch_row(setting, size="tiny", images=3)
    assert row.work == "tiny, beam 6, 3 pictures, bf16" and row.ours > 0


def test_folder_row_says_what_share_of_the_engine_s_rate_is_left(
    setting: Setting, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(generate, "SMALL", "tiny")
    monkeypatch.setattr(generate, "PICTURES", 3)
    row = folder_row(setting)
    assert row.work == "tiny, folder of 3 pictures of 500x375 beside tensors in memory"
    assert row.ratio and row.note.startswith(f"{row.ratio:.0%} of the rate")


def test_other_captions_in_the_folder_than_on_tensors_stop_the_benchmark(tmp_path: Path) -> None:
    captioner = Captioner(*contracap.load("tiny", weights="random", seed=0))
    pixels = captioner.processor.images([Image.new("RGB", (40, 30), "red")])
    (tmp_path / "0000.txt").write_text("a dog\n")
    with pytest.raises(UnequalError, match=r"0000\.txt holds 'a dog"):
        require_same_captions(captioner, tmp_path, pixels)


def test_pictures_of_the_folder_have_the_stated_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generate, "PICTURES", 2)
    first, second = (Image.open(path) for path in write_pictures(tmp_path, seed=0))
    assert first.size == second.size == (500, 375) and first.tobytes() != second.tobytes()


def test_missing_packages_are_said_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(NoPeerError, match=r"open_clip captions with transformers 4\.49, and there is none at .*: make"):
        PeerCaptions(tmp_path, device=CPU, threads=1, packages=tmp_path / "none")
