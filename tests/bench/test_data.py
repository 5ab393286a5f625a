import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from contracap.bench import data
from contracap.bench.data import MARKS, bench_data, make_shards, memory_peaks, pipeline_row, tokenizer_row
from contracap.bench.timing import NoPeerError, UnequalError
from contracap.data.loader import evaluation_samples
from contracap.data.shards import list_shards, write_shard
from contracap.images import decode
from contracap.tokenizer import Tokenizer

PICTURES = 8


@pytest.fixture(autouse=True)
def small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data, "BATCH", PICTURES)


def jpeg(number: int) -> bytes:
    rows = np.linspace(0, 255, 30)[:, None, None] * np.random.default_rng(number).random((1, 40, 3))
    file = io.BytesIO()
    Image.fromarray(rows.astype(np.uint8)).save(file, "JPEG")
    return file.getvalue()


@pytest.fixture(scope="module")
def flickr8k(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A few pictures of 40 x 30 pixels, in the layout of Flickr8k."""
    folder = tmp_path_factory.mktemp("data") / "flickr8k" / "train"
    captions = [json.dumps({"captions": [f"Picture {number} &amp; more", "another"]}) for number in range(PICTURES)]
    records = [(f"{number:03}", {"jpg": jpeg(number), "json": captions[number].encode()}) for number in range(PICTURES)]
    write_shard(folder / "000000.tar", records)
    return folder


@pytest.fixture(scope="module")
def shards(flickr8k: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shards")
    make_shards(folder, flickr8k, samples=PICTURES, side=50, of=max)
    return folder


# open_clip leaves the shards to the garbage collector.
leaves_files_open = pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")


@pytest.fixture
def no_peer(monkeypatch: pytest.MonkeyPatch) -> None:
    def peer_module(name: str) -> None:
        raise NoPeerError(f"{name} is not here")

    monkeypatch.setattr(data, "peer_module", peer_module)


def test_made_shards_hold_each_picture_once_resized_with_its_first_caption(flickr8k: Path, shards: Path) -> None:
    assert len(list_shards(shards)) == 4
    made = {sample.key: sample for sample in evaluation_samples(shards)}
    assert made.keys() == {sample.key for sample in evaluation_samples(flickr8k)}
    assert made["005"].captions == ("Picture 5 &amp; more",)
    assert decode(made["005"].image).shape == (3, 38, 50)


def test_shorter_side_is_the_smaller_one(flickr8k: Path, tmp_path: Path) -> None:
    make_shards(tmp_path, flickr8k, samples=4, side=60, of=min)
    assert decode(next(evaluation_samples(tmp_path)).image).shape == (3, 60, 80)


def test_more_pictures_than_there_are_is_refused(flickr8k: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"holds {PICTURES} pictures, {2 * PICTURES} are needed"):
        make_shards(tmp_path, flickr8k, samples=2 * PICTURES, side=50, of=max)


@leaves_files_open
def test_pipelines_agree_on_ids_and_pixels(open_clip, shards: Path) -> None:
    row = pipeline_row("small", shards, samples=PICTURES, rounds=7, seed=0)
    assert row.peer and row.ratio and not row.reason
    assert "token ids are equal" in row.note


@leaves_files_open
def test_other_pixels_are_not_timed(open_clip, shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data, "normalise", lambda pixels, image: torch.zeros(pixels.shape))
    with pytest.raises(UnequalError, match=r"000 and the 7 pictures behind it .* pixels of evaluation differ"):
        pipeline_row("small", shards, samples=PICTURES, rounds=7, seed=0)


def test_other_ids_are_not_timed(open_clip, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer_row(["A dog &amp; a cat", "two"], rounds=7)
    monkeypatch.setattr(Tokenizer, "__call__", lambda self, texts: torch.full((len(texts), self.context), self.end))
    with pytest.raises(UnequalError, match="caption 'A dog &amp; a cat': token ids differ"):
        tokenizer_row(["A dog &amp; a cat", "two"], rounds=7)


def test_without_open_clip_only_ours_is_measured(no_peer: None, shards: Path) -> None:
    for row in (
        pipeline_row("small", shards, samples=PICTURES, rounds=7, seed=0),
        tokenizer_row(["a dog"], rounds=7),
    ):
        assert row.ours > 0
        assert (row.peer, row.ratio, row.quartiles, row.reason) == (None, None, None, "open_clip is not here")


def test_memory_is_read_twenty_times_and_never_falls(shards: Path) -> None:
    peaks = memory_peaks(shards, draws=MARKS * PICTURES, seed=0)
    assert len(peaks) == MARKS
    assert peaks == sorted(peaks)


@pytest.mark.slow
def test_benchmark_has_its_four_rows(flickr8k: Path, no_peer: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CONTRACAP_DATA", str(flickr8k.parent.parent))
    benchmark = bench_data(samples=PICTURES, draws=MARKS * PICTURES)
    assert [row.unit for row in benchmark.rows] == ["images/s per core", "images/s per core", "captions/s", "MiB"]
    assert all(row.reason for row in benchmark.rows)


def test_missing_data_and_an_unfit_number_of_samples_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CONTRACAP_DATA", "/no/such/folder")
    with pytest.raises(FileNotFoundError, match="no pictures at /no/such/folder/flickr8k/train: set CONTRACAP_DATA"):
        bench_data()
    with pytest.raises(ValueError, match="samples is 100; it must be a multiple of 8"):
        bench_data(samples=100)
