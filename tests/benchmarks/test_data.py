import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks import data
from benchmarks.data import make_shards, memory_row, pipeline_row, tokenizer_row
from benchmarks.harness import Run, UnequalError
from contracap.data.loader import evaluation_samples
from contracap.data.shards import list_shards, write_shard
from contracap.image_files import decode
from contracap.tokenizer import Tokenizer

IMAGES = 8
# open_clip leaves the shards to the garbage collector.
pytestmark = pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")


@pytest.fixture(autouse=True)
def flickr8k(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A few images of 40 x 30 pixels, in the layout of Flickr8k."""
    records = []
    for number in range(IMAGES):
        rows = np.linspace(0, 255, 30)[:, None, None] * np.random.default_rng(number).random((1, 40, 3))
        Image.fromarray(rows.astype(np.uint8)).save(file := io.BytesIO(), "JPEG")
        captions = json.dumps({"captions": [f"Image {number} &amp; more", "another"]}).encode()
        records.append((f"{number:03}", {"jpg": file.getvalue(), "json": captions}))
    folder = tmp_path / "flickr8k" / "train"
    write_shard(folder / "000000.tar", records)
    monkeypatch.setenv("CONTRACAP_DATA", str(tmp_path))
    monkeypatch.setattr(data, "BATCH", IMAGES)
    monkeypatch.setattr(data, "SAMPLES", IMAGES)
    monkeypatch.setattr(data, "DRAWS", 10 * IMAGES)
    return folder


def test_shards_hold_each_image_once_resized_with_its_first_caption(flickr8k: Path, tmp_path: Path) -> None:
    large, small = (make_shards(tmp_path / of.__name__, side=60, of=of) for of in (max, min))
    assert len(list_shards(large)) == 4
    made = {sample.key: sample for sample in evaluation_samples(large)}
    assert made.keys() == {sample.key for sample in evaluation_samples(flickr8k)}
    assert made["005"].captions == ("Image 5 &amp; more",)
    assert decode(made["005"].image).shape == (3, 45, 60)
    assert decode(next(evaluation_samples(small)).image).shape == (3, 60, 80)


def test_equal_pipelines_are_timed_and_others_are_not(open_clip, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    row = pipeline_row(run, work="small", side=50, of=max)
    assert row.ratio and "token ids are equal" in row.note
    monkeypatch.setattr(data, "normalise", lambda pixels, image: torch.zeros(pixels.shape))
    with pytest.raises(UnequalError, match="000 and the next 7 images"):
        pipeline_row(run, work="small", side=50, of=max)


def test_equal_token_ids_are_timed_and_others_are_not(open_clip, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    assert tokenizer_row(run).ratio
    monkeypatch.setattr(Tokenizer, "__call__", lambda self, texts: torch.full((len(texts), self.context), self.end))
    with pytest.raises(UnequalError, match="Image 0 &amp; more"):
        tokenizer_row(run)


def test_memory_of_a_worker_never_falls(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data, "in_fresh_process", lambda function, *arguments: function(*arguments))
    assert memory_row(run).ours >= 0
